# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings that stretch: beyond a length they are others, and the longest text of a batch decides for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

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


def _limits(model: nn.Module) -> list[tuple[bool, int]]:
    """(whether by the original length, up to where) of all that stretch."""
    config = getattr(model, "config", None)
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
