# SPDX-License-Identifier: Apache-2.0
"""Values that people give, in Python and in files: one of another kind is an error by name, never taken as it comes."""

from __future__ import annotations

import math
import operator
import os
from typing import Any


def whole(name: str, value: Any, least: int | None = 0, meaning: str = "") -> int:
    """A whole number of at least `least`, NumPy's too, as an int. ValueError, with what it means, for anything else: a
    fraction would be rounded, or never come, and a text or True is something else that was meant.

    >>> whole("every", 3), whole("seed", -1, least=None)
    (3, -1)
    """
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or (least is not None and number < least):
        wanted = "a whole number" if least is None else f"a whole number, {least} or more"
        raise ValueError(f"{name} is {value!r}; give {meaning or wanted}")
    return number


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of the kind that a field says: int, float, bool or str. NumPy's numbers are numbers, and paths
    are texts; a text that would have to be read first is no number.

    >>> fits("10", "int"), fits(True, "int"), fits(1, "float"), fits(float("nan"), "float"), fits("false", "bool")
    (False, False, True, False, False)
    """
    if isinstance(value, (bool, str)):
        return type(value).__name__ == kind
    if kind == "str":
        return isinstance(value, os.PathLike)
    if kind == "int":
        return hasattr(value, "__index__")
    return kind == "float" and hasattr(value, "__float__") and math.isfinite(value)
