# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings that stretch: beyond a length they are others, and the longest text of a batch decides for all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_BY_ORIGINAL, _BY_LIMIT = {"longrope", "su"}, {"dynamic"}


def stretches_beyond(model: nn.Module) -> int | None:
    """The number of positions up to which the rotary embeddings of a model are the same whatever else is in a batch; 0
    where it does not say, None where they do not stretch.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found, limits = [config.to_dict()], []
    while found:  # by any name, in the configuration of any part, maybe by kind of layer
        one = found.pop()
        kinds = {one.get("rope_type"), one.get("type")}
        for name, known in (("original_", _BY_ORIGINAL), ("", _BY_LIMIT)):
            if kinds & known:
                key = f"{name}max_position_embeddings"
                limits.append(one.get(key) or getattr(text, key, None) or 0)
        found += [value for value in one.values() if isinstance(value, Mapping)]
    return min(limits, default=None)
