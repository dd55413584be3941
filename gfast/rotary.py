# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings that stretch: beyond a length they are others, and the longest text of a batch decides for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gfast import packed, wrappers
from gfast.ops.checks import IGNORE_INDEX

_BY_ORIGINAL, _BY_LIMIT = {"longrope", "su"}, {"dynamic"}


def stretches_beyond(model: nn.Module) -> int | None:
    """The number of positions up to which the rotary embeddings of a model are the same whatever else is in a batch; 0
    where it does not say, None where they do not stretch.
    """
    return min((limit for _, limit in _limits(model)), default=None)


def change_each_other(model: nn.Module, lengths: Sequence[int]) -> int | None:
    """The limit beyond which texts of these lengths, in one batch, change each other's numbers; None where they do not.
    All beyond an original length have one embedding; a dynamic one is made for the longest.
    """
    shortest, longest = min(lengths), max(lengths)
    limits = (limit for original, limit in _limits(model) if shortest <= (limit if original else longest - 1))
    return next((limit for limit in limits if limit < longest), None)


def refuse_cut(model: nn.Module, sets: Mapping[str, Iterable[Mapping[str, Any]]], afresh: bool = False) -> None:
    """ValueError where a scored text of these batches by set has another embedding than alone, so that numbers would
    depend on how the data are cut into batches. Not where padding makes all of a set one width, which shows where that
    is more than any text's. afresh: each batch finds dynamic ones as before any text (`unstretched`); else they stay as
    the longest has made them, until a batch is below the limit.
    """
    limits = _limits(model)
    dynamic = [limit for original, limit in limits if not original]
    cuts, longer = [], set()
    for name, batches in sets.items() if limits else ():
        seen = [(width, lengths) for width, lengths in map(_reach, batches) if lengths]
        longer |= {width for width, _ in seen if dynamic and width >= min(dynamic)}
        if len({width for width, _ in seen}) == 1 and all(width > max(lengths) for width, lengths in seen):
            continue
        for width, lengths in seen:
            limit = change_each_other(model, (min(lengths), width))
            cuts += [] if limit is None else [(limit, min(lengths), width, f"a batch of the {name} data has")]
    if len(longer) > 1 and not afresh:
        cuts.append((min(dynamic), min(longer), max(longer), "batches have"))
    for limit, shortest, longest, who in cuts[:1]:
        *_, inner = wrappers.chain(model)
        by_length = ", longer ones by their length" if dynamic else ""
        raise ValueError(
            f"gfast: {who} texts of {shortest} beside {longest} tokens, padding included, and beyond {limit} the "
            f"longest decides which rotary embeddings all have ({type(inner).__name__}): these numbers would not be "
            f"those of each text alone, and depend on how the data are cut into batches. Give max_length={limit}, "
            f"batches cut at that length (texts of up to {limit} tokens apart from longer ones{by_length}), or all "
            f"padded to one width beyond the longest text (a collator's pad_to_multiple_of={longest + 1} or more)"
        )


def _reach(batch: Mapping[str, Any]) -> tuple[int, list[int]]:
    """How many positions a batch has, and how many tokens each of its scored texts."""
    labels, mask, positions = (batch.get(key) for key in ("labels", "attention_mask", "position_ids"))
    ids = packed.texts(batch)
    if ids is None:
        ids = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    attended = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        attended = mask.to(ids.device) != 0
    scored = ids[:, 1:][labels[:, 1:] != IGNORE_INDEX].unique()
    lengths = ids[attended].bincount(minlength=ids.numel())[scored].tolist()
    return (int(positions.max()) + 1 if isinstance(positions, Tensor) else labels.shape[1]), lengths


@contextlib.contextmanager
def unstretched(model: nn.Module) -> Iterator[None]:
    """Dynamic embeddings as they are before any text, and as they were again afterwards: they stay as the longest text
    has made them, so that what is measured would depend on what came before, and what is trained on what is measured.
    """
    stretched = []
    for module in model.modules():
        cached = [name for name in vars(module) if name.endswith("max_seq_len_cached")]
        if cached and "dynamic" in str(getattr(module, "rope_type", "")):
            stretched.append((module, {name: getattr(module, name) for name in cached}, dict(module._buffers)))
    try:
        for module, lengths, buffers in stretched:
            vars(module).update(dict.fromkeys(lengths, module.original_max_seq_len))
            for name, buffer in buffers.items():
                if name.endswith("inv_freq") and "original" not in name:
                    original = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq")
                    module._buffers[name] = original.to(buffer.device)
        yield
    finally:
        for module, lengths, buffers in stretched:
            vars(module).update(lengths)
            module._buffers.update(buffers)


def _limits(model: nn.Module) -> list[tuple[bool, int]]:
    """(whether by the original length, up to where) of all that stretch."""
    *_, inner = wrappers.chain(model)  # of one of its own kind, itself
    config = getattr(inner, "config", None)
    if not hasattr(config, "to_dict"):
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts, limits = [config.to_dict()], []
    while parts:  # by any name, in the configuration of any part, maybe by kind of layer
        part = parts.pop()
        kinds = {part.get("rope_type"), part.get("type")}
        for original, known in ((True, _BY_ORIGINAL), (False, _BY_LIMIT)):
            if kinds & known:
                key = f"{'original_' if original else ''}max_position_embeddings"
                limits.append((original, part.get(key) or getattr(text, key, None) or 0))
        parts += [value for value in part.values() if isinstance(value, Mapping)]
    return limits
