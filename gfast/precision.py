# SPDX-License-Identifier: Apache-2.0
"""Which mixed precision a model runs in, and the original's values in a batch were computed in: ratios start at 1 where
these are one.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfast import wrappers

# By the names that Trainer and Accelerate have for them.
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = tuple(DTYPES)
_logger = logging.getLogger("gfast")
_said: weakref.WeakKeyDictionary[nn.Module, set[tuple[str, str]]] = weakref.WeakKeyDictionary()


def in_force(kind: str) -> str:
    """The autocast on devices of that kind where this is called, by its name, "no" for none."""
    if not torch.is_autocast_enabled(kind):
        return "no"
    dtype = torch.get_autocast_dtype(kind)
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def of_model(model: nn.Module) -> str:
    """The autocast that a call of the model would run in here, by its name."""
    with_own = wrappers.accelerated_dtype(model)
    if with_own is not None:
        return next((name for name, known in DTYPES.items() if known == with_own), str(with_own))
    return in_force(device_kind(model))


def device_kind(model: nn.Module) -> str:
    """Where the model is, which autocast goes by."""
    return next((p.device.type for p in model.parameters() if not p.is_meta), "cpu")


def key_of(mixed_precision: str | None, rows: int) -> dict[str, Tensor]:
    """What a batch is given beside values of the original: `ref_precision` [B, 1 + n], of the n-th precision. It is its
    shape that says it, which is read without waiting for a device, and stays however rows are cut, moved and cast.
    """
    if mixed_precision not in DTYPES:
        return {}
    return {"ref_precision": torch.zeros(rows, 1 + _NAMES.index(mixed_precision), dtype=torch.int8, device="cpu")}


def say_other(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """A warning, once for a model, where a batch says that its values of the original are of another precision than
    the one that the model runs in here. ValueError where something has cast its log-probs, which are no less than fp32.
    """
    given, logp = batch.get("ref_precision"), batch.get("ref_logp")
    if not isinstance(given, Tensor) or given.dim() != 2 or not 1 <= given.shape[1] <= len(_NAMES):
        return
    if isinstance(logp, Tensor) and logp.dtype.itemsize < 4:
        raise ValueError(
            f"gfast: the original's log-probs in a batch, ref_logp, have been cast to {str(logp.dtype)[6:]}, which "
            f"rounds them by up to a hundredth of a nat a token: cast no batch of a ReferenceCache. Lightning does by "
            f"precision='bf16-true' and '16-true': load the model in 16 bits and leave precision='32-true' instead"
        )
    built_in, running = _NAMES[given.shape[1] - 1], of_model(model)
    if built_in != running and is_new(model, built_in, running):
        _logger.warning(
            "gfast: the original's values in a batch were computed %s, and the model runs %s: they differ by rounding "
            "where nothing has been trained yet, so that ratios to the original do not start at 1, nor KL at 0. Build "
            "them with ReferenceCache.build(..., mixed_precision=%r)",
            words(built_in),
            words(running),
            running,
        )


def is_new(model: nn.Module, built_in: str, running: str) -> bool:
    """Whether nobody has said so of this model yet; from now on somebody has."""
    said = _said.setdefault(list(wrappers.chain(model))[-1], set())
    new = (built_in, running) not in said
    said.add((built_in, running))
    return new


def words(mixed_precision: str) -> str:
    """A precision in a sentence."""
    return "without autocast" if mixed_precision == "no" else f"under {mixed_precision} autocast"
