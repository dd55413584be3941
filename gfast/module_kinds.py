# SPDX-License-Identifier: Apache-2.0
"""What a module that owns parameters computes, where it is known for certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_OFFSET_EMBEDDINGS = frozenset({"OPTLearnedPositionalEmbedding"})
_SCALED_EMBEDDING = "ScaledWordEmbedding"


def kind_of(module: nn.Module) -> str | None:
    """What a module that owns parameters computes, where it is known for certain; None for anything else.

    "linear": x W^T + bias. "conv1d": x W + bias (GPT-2). "embedding": rows of W, possibly scaled (`embedding_lookup`).
    "norm": a class that is called a norm and owns at most `weight` and `bias`; whether its output is linear in them is
    for the caller to try. Subclasses are listed by name: one that overrides forward may compute something else.
    """
    name = type(module).__name__
    if type(module) is nn.Linear or name == "FalconLinear":
        return "linear"
    if name == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        known = type(module) is nn.Embedding or name in _OFFSET_EMBEDDINGS or name.endswith(_SCALED_EMBEDDING)
        return "embedding" if known else None
    if "Norm" in name and set(module._parameters) <= {"weight", "bias"} and not any(True for _ in module.children()):
        return "norm"
    return None


def embedding_lookup(module: nn.Embedding, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | float]:
    """The row ids that a call of an "embedding" module looked up, and the factor on what it returned."""
    if type(module).__name__ in _OFFSET_EMBEDDINGS:
        names = ("attention_mask", "past_key_values_length", "position_ids")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        positions = given.get("position_ids")
        if positions is None:
            mask = given["attention_mask"]
            positions = (torch.cumsum(mask, dim=1) * mask - 1).long()[:, given.get("past_key_values_length", 0) :]
        return positions + module.offset, 1.0
    ids = args[0] if args else next(iter(kwargs.values()))
    scale = module.embed_scale if type(module).__name__.endswith(_SCALED_EMBEDDING) else 1.0
    return ids, scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale


def is_routed(name: str) -> bool:
    """Is a module of this name one of a mixture's experts, which see tokens in an order of their own?"""
    return any(part in ("expert", "experts") for part in name.split("."))
