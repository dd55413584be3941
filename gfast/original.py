# SPDX-License-Identifier: Apache-2.0
"""The original model, which objectives compare with: the adapters off, where that is provably the original."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gfast import peft_models, wrappers
from gfast.hidden_states import layer_hidden
from gfast.model_output import model_logp, model_output
from gfast.model_state import evaluating
from gfast.ops.checks import IGNORE_INDEX

# What a batch may hold of it.
REFERENCE_KEYS = frozenset({"ref_logp", "ref_hidden", "ref_head", "ref_layer_hidden"})
REFERENCES = ("auto", "base", "adapted")
# Of models, the adapters (their configurations) that were active, and zero, when first seen, or whose base was said to
# be the original.
_base_is_original: weakref.WeakKeyDictionary[nn.Module, list[dict[str, Any]]] = weakref.WeakKeyDictionary()
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def declare_base_original(model: nn.Module) -> None:
    """From now on the base of this model with the adapters that are active is the original, although they are not zero:
    as in a run that goes on from a checkpoint. Until weights are loaded into it, which may have learned anything. What
    is written into the adapters by hand cannot be told from training.
    """
    if not is_base_original(model):
        _base_is_original.setdefault(wrappers.measured(model), []).append(peft_models.active_configs(model))
    inner = peft_models.base_module(model)
    if inner is not None and inner not in _watched:  # whatever loads weights comes by it
        _watched.add(inner)
        inner.register_load_state_dict_post_hook(_forget_original)


def is_base_original(model: nn.Module) -> bool:
    """Whether it is known that the base is the original, whatever the adapters that are active have become."""
    active = peft_models.active_configs(model)
    known = _base_is_original.get(wrappers.measured(model), ())
    return any(
        weights.keys() == active.keys() and all(weights[name] is active[name] for name in weights) for weights in known
    )


def _forget_original(inner: nn.Module, _: Any) -> None:
    for model in [known for known in _base_is_original if peft_models.base_module(known) is inner]:
        del _base_is_original[model]


@contextmanager
def original(model: nn.Module, batch: Mapping[str, Any], reference: str = "auto") -> Iterator[None]:
    """The model as it was before it was trained: with its adapters off, in evaluation mode, without gradients.

    Raises ValueError where that is not provably the original: see `model_loss`. ``batch`` is what adapters are looked
    at with, the first time.
    """
    check_original(model, batch, reference)
    name = adapter_name(reference)
    other = peft_models.adapters_off(model) if name is None else peft_models.other_adapter(model, name)
    with torch.no_grad(), evaluating(model), other:
        yield


def check_reference_name(reference: str) -> None:
    """ValueError for something that names no original model."""
    if reference not in REFERENCES and adapter_name(reference) is None:
        raise ValueError(
            f"gfast: reference must be one of {', '.join(map(repr, REFERENCES))} or 'adapter:NAME', not {reference!r}"
        )


def adapter_name(reference: str) -> str | None:
    """NAME of a reference "adapter:NAME"; None for any other."""
    kind, _, name = str(reference).partition(":")
    return name if kind == "adapter" and name else None


def check_original(model: nn.Module, batch: Mapping[str, Any], reference: str = "auto") -> None:
    """ValueError unless the model with its adapters off is the original, or a frozen adapter of its own makes it."""
    if (name := adapter_name(reference)) is not None:
        peft_models.check_frozen_adapter(model, name)
        return
    check_reference_name(reference)
    if reference == "adapted":
        raise ValueError(
            "gfast: reference='adapted' is the model as it starts, adapters on: its values must be computed before "
            "training. Build them with ReferenceCache.build(model, ..., reference='adapted') and give them with the "
            "batches"
        )
    peft_models.check_base_is_original(model)
    if reference == "base":
        declare_base_original(model)
    if is_base_original(model):
        return
    looked_at = _with_labels(batch)
    if not bool((looked_at["labels"][:, 1:] != IGNORE_INDEX).any()):
        return  # nothing is asked of the original, nor seen of the adapters
    apart = _distance_from_base(model, looked_at)
    if not apart == 0:
        raise ValueError(
            f"gfast: this model's adapters are not zero (its log-probs differ by {apart:.3g} a token from those of the "
            f"base), so that it is not clear which is the original: the base, or the model with its adapters as they "
            f"start. Say reference='base' (as for adapters that have been unlearning already), or build the values of "
            f"the model as it starts with ReferenceCache.build(..., reference='adapted') and give them with the batches"
        )
    declare_base_original(model)


def _with_labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch to look at adapters with: all of its tokens where it has no labels (other processes look too)."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()):
        return batch
    padding = torch.zeros_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask == 0
    return {**batch, "labels": ids.masked_fill(padding, IGNORE_INDEX)}


def _distance_from_base(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """By how much the mean log-prob of a label differs with the adapters off; 0 where that is rounding alone."""
    rounds = peft_models.round_at_zero(model)
    with torch.no_grad(), evaluating(model):
        adapted = model_logp(model, batch)
        with peft_models.adapters_off(model):
            base = model_logp(model, batch)
            again = base if rounds or torch.equal(adapted, base) else model_logp(model, batch)
    apart = float((adapted - base).abs().sum() / (batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    # Adapters that are zero add nothing: only where they divide by a norm, or the model never answers the same to the
    # bit, is a small difference no sign of what they have learned.
    if not rounds and torch.equal(base, again):
        return apart
    narrowest = min((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), default=4)
    return 0.0 if apart <= (2e-2 if narrowest < 4 else 1e-4 if narrowest == 4 else 1e-7) else apart


def with_reference(model: nn.Module, batch: Mapping[str, Any], objective, reference: str = "auto") -> dict[str, Any]:
    """The batch with the values of the original model that the objective needs and the batch lacks, from the model
    with its adapters off.
    """
    given = dict(batch)
    lacking = {key for key in objective.needs & REFERENCE_KEYS if given.get(key) is None}
    if not lacking:
        return given
    with original(model, batch, reference):
        if "ref_logp" in lacking:
            given["ref_logp"] = model_logp(model, batch)  # [B, T]
        if "ref_layer_hidden" in lacking:
            given["ref_layer_hidden"] = layer_hidden(model, batch, objective.layer)  # [B, T, D]
        if lacking & {"ref_hidden", "ref_head"}:
            given["ref_output"] = model_output(model, batch)
    return given
