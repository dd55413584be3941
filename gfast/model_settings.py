# SPDX-License-Identifier: Apache-2.0
"""What decides a model's answers beside its weights: its configuration, and how far adapters count."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from gfast import peft_models, wrappers

# Of a configuration, what changes no answer to a text in evaluation mode, or what the weights say themselves.
_NEUTRAL = frozenset(
    "_name_or_path architectures auto_map chunk_size_feed_forward dtype finetuning_task gradient_checkpointing "
    "is_decoder max_position_embeddings prefix pretraining_tp problem_type pruned_heads quantization_config "
    "return_dict router_aux_loss_coef task_specific_params tie_word_embeddings tokenizer_class torch_dtype torchscript "
    "transformers_version use_bfloat16 use_cache vocab_size".split()
)
_NEUTRAL_PARTS = ("drop", "token_id", "label", "output_", "initializer", "_implementation", "_attn_was_changed")


def settings_of(model: nn.Module, adapters: bool | str = True) -> dict[str, Any]:
    """The configuration, by dotted names, as JSON has it; with `adapters` how far they count, with the name of one that
    one. Empty for a model that is not transformers'.
    """
    inner = next((module for module in model.modules() if hasattr(type(module), "base_model_prefix")), None)
    config = getattr(inner, "config", None)
    settings = dict(_flat(config.to_dict())) if hasattr(config, "to_dict") else {}
    scales: dict[str, set[float]] = {}
    for module in model.modules() if adapters else ():
        scaling = getattr(module, "scaling", None)
        for name, scale in scaling.items() if isinstance(scaling, Mapping) and wrappers.is_peft(module) else ():
            if isinstance(scale, (int, float)) and adapters in (True, name):
                scales.setdefault(name, set()).add(float(scale))
    settings |= {f"the scaling of adapter {name}": sorted(values) for name, values in scales.items()}
    on = peft_models.adapters_on(model) if adapters is True else None
    if on is not None:
        settings["the adapters that are on"] = on
    return json.loads(json.dumps(settings, default=str))


def difference(there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> str | None:
    """The first setting that both have, but not alike, in words; None where there is none, or nothing is known."""
    for key, value in (there or {}).items():
        if key in here and here[key] != value:
            return f"{key} was {value} and is {here[key]}"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in _NEUTRAL or any(part in str(key) for part in _NEUTRAL_PARTS):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (bool, int, float, str, list, tuple)):
            yield f"{prefix}{key}", value
