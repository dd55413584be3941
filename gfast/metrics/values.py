# SPDX-License-Identifier: Apache-2.0
"""What the metrics share: libraries that they load when they need them, and numbers that are checked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

# Added to denominators: open-unlearning's is 1e-10, the TOFU repository has none.
EPSILON = {"tofu": 0.0, "open-unlearning": 1e-10}


def required(module: str, package: str, what: str) -> ModuleType:
    """The module, loaded; ImportError that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"gfast: {what} needs {package}, which cannot be loaded ({error}): pip install "
            f"'gfast[{'lm-eval' if package == 'lm-eval' else 'evaluate'}]' (or pip install {package})"
        ) from error


def chosen(name: str, value: str, choices: Any) -> str:
    """`value`; ValueError where it is none of `choices`."""
    if value not in choices:
        raise ValueError(f"gfast: {name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
    return value


def numbers(name: str, values: Any, dimensions: int = 1) -> np.ndarray:
    """`values` as finite fp64 with so many dimensions, none of them empty; ValueError by `name`."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
        if array.dtype == object or array.dtype.kind in "USMmc":
            raise ValueError
        array = array.astype(np.float64)
    except (ValueError, TypeError):
        raise ValueError(f"gfast: {name} must be numbers, in rows of one length, got {values!r:.80}") from None
    if array.ndim != dimensions:
        raise ValueError(f"gfast: {name} must have {dimensions} dimension(s), got shape {array.shape}")
    if not array.size:
        raise ValueError(f"gfast: {name} is empty")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise ValueError(f"gfast: {name}[{where}] is {array[tuple(bad[0])]}; every value must be finite")
    return array


def log_probabilities(name: str, values: Any) -> np.ndarray:
    """log p [N] in nats, none above 0 by more than rounding."""
    array = numbers(name, values)
    if array.max() > 1e-3:
        at = int(array.argmax())
        raise ValueError(
            f"gfast: {name}[{at}] is {array[at]:g}, and a log-probability is at most 0; give log p, in nats"
        )
    return array


def right_or_wrong(name: str, values: Any) -> np.ndarray:
    """bool [N]; ValueError for anything but True and False (or 1 and 0)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    array = np.asarray(list(values) if isinstance(values, Iterator) else values)
    if array.ndim != 1:
        raise ValueError(
            f"gfast: {name} must be of one sample: a list [N] of right (1) or wrong (0), got {values!r:.80}"
        )
    if array.size and (array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all()):
        raise ValueError(f"gfast: {name} must hold only right (1) and wrong (0), got {values!r:.80}")
    return array.astype(bool)
