"""Triton's interpreter with the exponentials of compiled kernels: its own are exact to half an ulp, theirs are not."""

from __future__ import annotations

import os

import numpy as np

SWITCH = "GFAST_COMPILED_EXP"  # set to 1 in the environment of a test run


def _off(x: np.ndarray, ulps: int) -> np.ndarray:
    """Each number off by up to `ulps`, always by the same; zeros, infinities and NaN as they are."""
    drawn = (x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(16)).astype(np.int64)
    moved = (x.view(np.int32) + drawn % (2 * ulps + 1) - ulps).astype(np.int32).view(np.float32)
    return np.where(np.isfinite(x) & (np.abs(x) >= np.finfo(np.float32).tiny), moved, x)


def ex2(x: np.ndarray) -> np.ndarray:
    """ex2.approx.ftz.f32: two ulps, exact at whole numbers, no denormals."""
    with np.errstate(all="ignore"):
        exact = np.exp2(x.astype(np.float64)).astype(np.float32)
        exact = np.where(exact < np.finfo(np.float32).tiny, np.float32(0), exact)  # NaN stays
        return np.where(x == np.rint(x), exact, _off(exact, 2))


def emulate() -> None:
    """exp and exp2 by ex2.approx, the first of a rounded product; rsqrt.approx and div.full to an ulp."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def unary(name, function):
        plain = getattr(InterpreterBuilder, name)

        def replaced(self, x):
            if x.data.dtype != np.float32:
                return plain(self, x)
            return TensorHandle(function(x.data), x.dtype.scalar)

        setattr(InterpreterBuilder, name, replaced)

    def divide(self, x, y):
        with np.errstate(all="ignore"):
            value = np.divide(x.data, y.data)
        return TensorHandle(_off(value, 1) if value.dtype == np.float32 else value, x.dtype.scalar)

    unary("create_exp2", ex2)
    unary("create_exp", lambda x: ex2(x * np.float32(1.4426950408889634)))
    with np.errstate(all="ignore"):
        unary("create_rsqrt", lambda x: _off(np.float32(1) / np.sqrt(x), 1))
    InterpreterBuilder.create_fdiv = divide


def emulate_if_asked() -> None:
    if os.environ.get(SWITCH) == "1":
        emulate()
