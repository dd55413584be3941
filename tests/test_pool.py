"""The pool of the CPU extension: freed gradients are used again, by one tensor at a time, within a limit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gfast
from gfast.objectives import NPO, WGA
from gfast.ops.backend import compiled
from gfast.ops.common import fresh

pytestmark = pytest.mark.skipif(not compiled("fresh"), reason="gfast._C is not built, or older than the pool")
CPU = torch.device("cpu")


def test_freed_memory_is_taken_again_and_never_shared():
    shape = (3, 1_500_000)
    first, second = (fresh(shape, torch.float32, CPU) for _ in range(2))
    pointers = {first.data_ptr(), second.data_ptr()}
    assert len(pointers) == 2 and first.is_contiguous() and first.shape == shape
    view = first[1:]
    del first
    third = fresh(shape, torch.float32, CPU)
    assert third.data_ptr() not in pointers  # a view keeps the memory
    del view, second
    again = {fresh(shape, torch.float32, CPU).data_ptr() for _ in range(3)}
    assert again <= pointers


def test_a_much_smaller_tensor_does_not_take_a_large_block():
    large = fresh((40_000_000,), torch.bfloat16, CPU)
    pointer = large.data_ptr()
    del large
    small = fresh((4_000_000,), torch.bfloat16, CPU)
    assert small.data_ptr() != pointer
    assert fresh((39_000_000,), torch.bfloat16, CPU).data_ptr() == pointer


@pytest.mark.parametrize("objective", [WGA(), NPO(0.1)], ids=str)
def test_gradients_do_not_depend_on_what_the_memory_held(objective):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 20, 33_000, generator=rng)  # a gradient of 10 MB
    labels = torch.randint(0, 33_000, (4, 20), generator=rng)
    labels[0, :5] = -100
    ref = torch.randn(4, 20, generator=rng) - 10

    def gradient() -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        gfast.unlearn_loss(leaf, labels, objective, ref_logp=ref).loss.backward()
        return leaf.grad

    first = gradient()
    expected = first.clone()
    second = gradient()
    assert second.data_ptr() != first.data_ptr() and torch.equal(first, expected) and torch.equal(second, expected)
    pointers = {first.data_ptr(), second.data_ptr()}
    first.fill_(torch.nan)
    second.fill_(torch.nan)
    del first, second
    third = gradient()
    assert third.data_ptr() in pointers and torch.equal(third, expected)


@pytest.mark.parametrize(("limit", "kept"), [("0", False), ("64", True)])
def test_the_limit(limit, kept):
    code = """
import torch
from gfast.ops.common import fresh
one = fresh((20_000_000,), torch.bfloat16, torch.device("cpu"))
one.zero_()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
del one
print(before - resident() < 20e6)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"GFAST_POOL_MIB": limit}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(kept), done.stderr
