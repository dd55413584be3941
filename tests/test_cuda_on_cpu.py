"""The source of the CUDA kernels, run on the CPU in a model of CUDA: right, within their memory, free of races."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cuda_on_cpu import ADDRESSES, GXX, THREADS, assert_missed, assert_right, build, run, source
from helpers.marks import slow_when

pytestmark = pytest.mark.skipif(GXX is None, reason="it takes g++")

# two warps are enough for all they can do to each other
SMALL = {"kThreads = 256": "kThreads = 64", "kChunk = 1 << 16": "kChunk = 1 << 10", "Records = 580": "Records = 20"}
GRAD_DOTS = source("grad_dots", SMALL)
ROWS = source("rows", {"kThreads = 256": "kThreads = 64", "kPartBytes = 1 << 16": "kPartBytes = 1 << 9"})
ROWS_OF_ONE_WARP = source("rows", {"kThreads = 256": "kThreads = 32", "kPartBytes = 1 << 16": "kPartBytes = 1 << 9"})
KERNELS = {kernel.harness: kernel for kernel in (GRAD_DOTS, ROWS)}
LEFT_OUT = [
    (name, what, str(n)) for name, one in KERNELS.items() for what, count in one.counts.items() for n in range(count)
]
LEFT_OUT.append(("grad_dots", "exchange", "0"))


@pytest.fixture(scope="module")
def threads(tmp_path_factory) -> dict[str, Path]:
    return {name: build(one, tmp_path_factory.mktemp(name), *THREADS) for name, one in KERNELS.items()}


def test_grad_dots_are_right(tmp_path):
    assert_right(run(build(GRAD_DOTS, tmp_path), "cases"))


def test_rows_are_right(tmp_path):
    """Of bf16; fp32 and fp16 as well where they are held within their memory."""
    assert_right(run(build(ROWS_OF_ONE_WARP, tmp_path), "cases", "bf16"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [GRAD_DOTS, ROWS_OF_ONE_WARP], ids=lambda one: one.harness)
def test_they_stay_within_their_memory(kernel, tmp_path):
    """And are right in every dtype."""
    assert_right(run(build(kernel, tmp_path, *ADDRESSES), "cases"))


@slow_when(lambda p: p.name != "grad_dots")
@pytest.mark.parametrize("name", KERNELS)
def test_no_thread_reads_what_another_may_be_writing(name, threads):
    assert_right(run(threads[name], "orders"))


@slow_when(lambda p: p.left_out[2] != "0")  # the others of a kind
@pytest.mark.parametrize("left_out", LEFT_OUT, ids=" ".join)
def test_every_fence_barrier_wait_and_atomic_is_needed_and_missed(threads, left_out):
    """Else the test before this one could not fail."""
    name, what, number = left_out
    assert_missed(run(threads[name], "orders", what, number))
