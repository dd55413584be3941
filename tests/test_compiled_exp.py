"""The laws of the Triton kernels once more, interpreted with the exponentials that compiled kernels have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from helpers.compiled_exp import SWITCH, ex2  # noqa: E402

from gfast.ops.dispatch import interpreter_fails  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the kernels are compiled"),
    pytest.mark.skipif(bool(interpreter_fails()), reason=interpreter_fails()),
]
HERE = Path(__file__).parent


def passed(files: list[str], chosen: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen]
    done = subprocess.run([*command, *files], env={**os.environ, SWITCH: "1"}, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(done.stdout.split(" passed")[0].split()[-1])


def test_what_is_emulated():
    x = np.linspace(-149, 127, 10001, dtype=np.float32)
    got, exact = ex2(x), np.exp2(x.astype(np.float64))
    normal = exact > 2.0**-126
    off = np.abs(got / exact - 1)[normal] * 2.0**23
    assert (
        1 < off.max() < 2.6 and (got[exact < 2.0**-126] == 0).all() and ex2(np.float32([3.0, 0.0])).tolist() == [8, 1]
    )


def test_the_ends_of_the_range():
    """Labels far from the rest, a saturated soft cap, masked columns, a KL with masks and offsets."""
    assert passed(["test_triton.py"], "far_from or large_logits or masked_vocabulary or with_masks") >= 14


@pytest.mark.slow
def test_every_law():
    """In fp32: the rounding of 16 bits hides what exponentials do."""
    assert passed(["test_triton.py"], "triton and not float16") > 50  # not bfloat16 either
    files = ["test_ops_losses.py", "test_ops_small_values.py", "test_ops_not_finite.py", "test_ops_backward.py"]
    assert passed([*files, "test_linear_head.py", "test_linear_extremes.py"], "triton and not float16") >= 25
