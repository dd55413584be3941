"""The source of the CUDA kernels, run on the CPU in a model of CUDA: right, within their memory, free of races."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cuda_on_cpu import ADDRESSES, GXX, THREADS, assert_missed, assert_right, build, run, source

pytestmark = pytest.mark.skipif(GXX is None, reason="it takes g++")

# two warps are enough for all they can do to each other
SMALL = {"kThreads = 256": "kThreads = 64", "kChunk = 1 << 16": "kChunk = 1 << 10", "Records = 580": "Records = 20"}
GRAD_DOTS = source("grad_dots", SMALL)
LEFT_OUT = [(what, n) for what, count in GRAD_DOTS.counts.items() for n in range(count)] + [("exchange", 0)]


@pytest.fixture(scope="module")
def threads(tmp_path_factory) -> Path:
    return build(GRAD_DOTS, tmp_path_factory.mktemp("threads"), *THREADS)


def test_it_is_right(tmp_path):
    assert_right(run(build(GRAD_DOTS, tmp_path), "cases"))


@pytest.mark.slow
def test_it_stays_within_its_memory(tmp_path):
    assert_right(run(build(GRAD_DOTS, tmp_path, *ADDRESSES), "cases"))


def test_no_thread_reads_what_another_may_be_writing(threads):
    assert_right(run(threads, "orders"))


@pytest.mark.parametrize("left_out", LEFT_OUT, ids=lambda one: f"{one[0]} {one[1]}")
def test_every_fence_barrier_and_atomic_is_needed_and_missed(threads, left_out):
    """Else the test before this one could not fail."""
    assert_missed(run(threads, "orders", left_out[0], str(left_out[1])))
