# SPDX-License-Identifier: Apache-2.0
"""The mixed precision that a model's answers were computed in: its original's have to be as its own are in training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gfast import wrappers
from gfast.precision import DTYPES, device_kind, in_force, is_new, of_model, words

_logger = logging.getLogger("gfast")


def check_precision(mixed_precision: str | None) -> None:
    """ValueError for something that names no mixed precision."""
    if mixed_precision is not None and mixed_precision not in DTYPES:
        raise ValueError(
            f"gfast: mixed_precision must be {', '.join(map(repr, DTYPES))} or None, not {mixed_precision!r}"
        )


@contextmanager
def in_precision(model: nn.Module, mixed_precision: str | None) -> Iterator[str]:
    """The model under that autocast, "no" for none, or for None in what it is in where it is called. Gives its name."""
    check_precision(mixed_precision)
    if mixed_precision is None:
        yield of_model(model)
        return
    dtype = DTYPES[mixed_precision]
    with torch.autocast(device_kind(model), dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        if dtype is not None:
            yield mixed_precision
            return
        with wrappers.own_precision(model):
            yield mixed_precision


def of_training(args: Any) -> str:
    """The autocast that a Trainer with these arguments will train in. DeepSpeed has none: it casts the weights."""
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        return "no"
    asked = "fp16" if args.fp16 else "bf16" if args.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "fp16" and args.device.type == "cpu":
        return "no"  # Accelerate has none there
    return asked if asked in DTYPES else "bf16"  # as fp8 has it around what it does not take


def of_accelerator(accelerator: Any) -> str:
    """The autocast of what an Accelerator has prepared."""
    with wrappers.autocast_of(accelerator):
        return in_force(accelerator.device.type)


def say_other_precision(caches: Mapping[str, Any], accelerator: Any, model: nn.Module) -> None:
    """A warning where values of the original are of another precision than the training's, of each side before it."""
    training = of_accelerator(accelerator)
    for side, cache in caches.items():
        built_in = getattr(cache, "mixed_precision", None)
        if built_in is not None and built_in != training:
            is_new(model, built_in, training)  # a loss of theirs need not say it again
            _logger.warning(
                "gfast: the original's values of the %s set were computed %s, and this training runs %s: they differ "
                "by rounding where nothing has been trained yet, so that ratios to the original do not start at 1, nor "
                "KL at 0. Build them with ReferenceCache.build(..., mixed_precision=%r)",
                side,
                words(built_in),
                words(training),
                training,
            )
