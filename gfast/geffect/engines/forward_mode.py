# SPDX-License-Identifier: Apache-2.0
"""A model whose attention and experts are plain PyTorch operations, which forward mode can follow."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gfast.wrappers import unwrap

_log = logging.getLogger("gfast")


@contextmanager
def differentiable_forward(model: nn.Module) -> Iterator[None]:
    """Attention and mixtures of experts as plain PyTorch operations inside, as they were outside.

    Attention by SDPA or written out (eager) stays; other kernels (flash, flex) become SDPA, or eager attention where
    the model has no SDPA; experts run one by one. What was switched is logged once.
    """
    inner = unwrap(model)
    attention = "sdpa" if getattr(inner, "_supports_sdpa", False) else "eager"
    switches = (
        ("_attn_implementation", ("sdpa", "eager"), attention),
        ("_experts_implementation", ("eager",), "eager"),
    )
    configs = {id(value): value for m in inner.modules() if (value := getattr(m, "config", None)) is not None}
    changed: list[tuple[Any, str, Any]] = []
    try:
        for config in configs.values():
            for key, fine, instead in switches:
                # the attribute behind the property, whose setter would reach into other configurations
                name = f"{key}_internal" if hasattr(config, f"{key}_internal") else key
                value = getattr(config, name, None)
                if value is not None and value not in fine:
                    changed.append((config, name, value))
                    setattr(config, name, instead)
                    _log_switch(type(inner).__name__, key.strip("_"), str(value), instead)
        yield
    finally:
        for config, name, value in reversed(changed):
            setattr(config, name, value)


@functools.cache
def _log_switch(model: str, what: str, value: str, instead: str) -> None:
    _log.warning("%s: %s %r has no forward mode; %r is used for this measurement", model, what, value, instead)
