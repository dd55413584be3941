# SPDX-License-Identifier: Apache-2.0
"""The original model, which objectives compare with: the adapters off, where that is provably the original."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gfast import peft_models, wrappers, zero_adapters
from gfast.hidden_states import layer_hidden
from gfast.model_output import model_logp, model_output
from gfast.model_state import evaluating

# What a batch may hold of it.
REFERENCE_KEYS = frozenset({"ref_logp", "ref_hidden", "ref_head", "ref_layer_hidden"})
REFERENCES = ("auto", "base", "adapted")
# Of models, the adapters (their configurations) that were active, and zero, when first seen, or whose base was said to
# be the original.
_base_is_original: weakref.WeakKeyDictionary[nn.Module, list[dict[str, Any]]] = weakref.WeakKeyDictionary()
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def declare_base_original(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """From now on the base of this model with the adapters of those names, or that are active, is the original,
    although they are not zero: as in a run that goes on from a checkpoint. Until weights are loaded into it, which may
    have learned anything. What is written into the adapters by hand cannot be told from training.
    """
    if not is_base_original(model, names):
        _base_is_original.setdefault(wrappers.measured(model), []).append(_configs(model, names))
    inner = peft_models.base_module(model)
    if inner is not None and inner not in _watched:  # whatever loads weights comes by it
        _watched.add(inner)
        inner.register_load_state_dict_post_hook(_forget_original)


def is_base_original(model: nn.Module, names: Iterable[str] | None = None) -> bool:
    """Whether it is known that the base is the original, whatever the adapters of those names, or that are active, have
    become.
    """
    asked = _configs(model, names)
    known = _base_is_original.get(wrappers.measured(model), ())
    return any(
        weights.keys() == asked.keys() and all(weights[name] is asked[name] for name in weights) for weights in known
    )


def _configs(model: nn.Module, names: Iterable[str] | None) -> dict[str, Any]:
    return peft_models.configs(model, peft_models.active_adapters(model) if names is None else names)


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
        if batch.get("adapter_names") is not None:
            raise ValueError(
                f"gfast: reference={reference!r}: the batch has 'adapter_names', by which PEFT takes the adapter of "
                f"every row, for the original too. Take them out, or build the original's values with a ReferenceCache"
            )
        return
    check_reference_name(reference)
    if reference == "adapted":
        raise ValueError(
            "gfast: reference='adapted' is the model as it starts, adapters on: its values must be computed before "
            "training. Build them with ReferenceCache.build(model, ..., reference='adapted') and give them with the "
            "batches"
        )
    peft_models.check_base_is_original(model)
    for names in zero_adapters.asked_of(model, batch):
        if reference == "base":
            declare_base_original(model, names)
        if is_base_original(model, names):
            continue
        apart, whole = zero_adapters.difference(model, batch, names)
        if apart is not None:
            raise ValueError(
                f"gfast: this model's adapters are not zero ({apart} those of the base), so that it is not clear which "
                f"is the original: the base, or the model with its adapters as they start. Say reference='base' (as "
                f"for adapters that have been unlearning already), or build the values of the model as it starts with "
                f"ReferenceCache.build(..., reference='adapted') and give them with the batches"
            )
        if whole:
            declare_base_original(model, names)


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
