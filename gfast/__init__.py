"""gfast: fast, exact unlearning losses and gradient effects for language models.

Importing gfast imports torch and nothing heavier; every name below loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "token_logp": "gfast.ops.token_logp",
    "linear_token_logp": "gfast.ops.linear_token_logp",
    "unlearn_loss": "gfast.ops.unlearn_loss",
    "linear_unlearn_loss": "gfast.ops.linear_unlearn_loss",
    "token_stats": "gfast.ops.token_stats",
    "linear_token_stats": "gfast.ops.linear_token_stats",
    "TokenStats": "gfast.ops.token_stats",
    "token_kl": "gfast.ops.token_kl",
    "linear_token_kl": "gfast.ops.linear_token_kl",
    "soft_target_loss": "gfast.ops.soft_target_loss",
    "linear_soft_target_loss": "gfast.ops.linear_soft_target_loss",
    "grad_dot": "gfast.ops.grad_dot",
    "empty_cache": "gfast.ops.memory",
    "LossOutput": "gfast.ops.reductions",
    "model_loss": "gfast.model",
    "model_logp": "gfast.model_output",
    "g_effect": "gfast.geffect",
    "pg_effect": "gfast.geffect",
    "token_effect": "gfast.geffect",
    "gram_effect": "gfast.geffect",
    "risk_gradients": "gfast.geffect",
    "Directions": "gfast.geffect",
    "GEffect": "gfast.geffect",
    "GEffectMonitor": "gfast.geffect",
    "SampleEffect": "gfast.geffect",
    "TokenEffect": "gfast.geffect",
    "GramEffect": "gfast.geffect",
    "ReferenceCache": "gfast.training",
    "UnlearnTrainer": "gfast.training",
    "UnlearnConfig": "gfast.training",
    "GEffectCallback": "gfast.training",
    "EvaluateCallback": "gfast.evaluation",
}

# What the pages call by its full name, as in gfast.geffect.EffectHistory: loaded when it is first used, too.
_PARTS = ("data", "deferred", "evaluation", "geffect", "integrations", "metrics", "objectives", "report", "training")

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from gfast.evaluation import EvaluateCallback
    from gfast.geffect import (
        Directions,
        GEffect,
        GEffectMonitor,
        GramEffect,
        SampleEffect,
        TokenEffect,
        g_effect,
        gram_effect,
        pg_effect,
        risk_gradients,
        token_effect,
    )
    from gfast.model import model_loss
    from gfast.model_output import model_logp
    from gfast.ops.grad_dot import grad_dot
    from gfast.ops.linear_soft_target_loss import linear_soft_target_loss
    from gfast.ops.linear_token_kl import linear_token_kl
    from gfast.ops.linear_token_logp import linear_token_logp
    from gfast.ops.linear_token_stats import linear_token_stats
    from gfast.ops.linear_unlearn_loss import linear_unlearn_loss
    from gfast.ops.memory import empty_cache
    from gfast.ops.reductions import LossOutput
    from gfast.ops.soft_target_loss import soft_target_loss
    from gfast.ops.token_kl import token_kl
    from gfast.ops.token_logp import token_logp
    from gfast.ops.token_stats import TokenStats, token_stats
    from gfast.ops.unlearn_loss import unlearn_loss
    from gfast.training import GEffectCallback, ReferenceCache, UnlearnConfig, UnlearnTrainer


def __getattr__(name: str):
    if name in _PARTS:
        return importlib.import_module(f"gfast.{name}")
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'gfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_PARTS})
