"""Which rows of logits the CUDA kernel that holds them takes, and who computes the others."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from helpers.losses import need, problem

import gfast
from gfast.objectives import TNPO
from gfast.ops import dispatch, held_rows
from gfast.ops.dispatch import kernel
from gfast.ops.held_rows import MAX_BLOCKS, PART_BYTES, select_rows, why_not_held

HEADER = (Path(__file__).parents[1] / "csrc/cuda/rows_kernel.h").read_text()


def test_the_sizes_are_the_kernels():
    assert int(re.search(r"kPartBytes = 1 << (\d+);", HEADER)[1]) == PART_BYTES.bit_length() - 1
    assert int(re.search(r"kMaxBlocks = (\d+);", HEADER)[1]) == MAX_BLOCKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_fit(dtype):
    longest = MAX_BLOCKS * PART_BYTES // dtype.itemsize
    for vocab in (1, 50257, longest - 16, longest):
        logits = torch.empty(1, vocab, dtype=dtype)
        assert logits.data_ptr() % 16 == 0 and not why_not_held(logits, torch.empty_like(logits), 0.0)
    assert "rows of up to 524288 bytes" in why_not_held(torch.empty(1, longest + 1, dtype=dtype), None, 0.0)
    assert why_not_held(torch.empty(3, 0, dtype=dtype), None, 0.0)
    shifted = torch.empty(longest + 1, dtype=dtype)[1:].view(1, -1)  # one vector of 16 bytes more
    assert "rows of up to" in why_not_held(shifted, None, 0.0)
    assert not why_not_held(shifted[:, :-16], shifted[:, :-16], 0.0)
    assert why_not_held(logits, None, 30.0) == "the kernel has no soft cap"


def test_rows_and_their_gradient_lie_alike():
    logits = torch.empty(4, 1001, dtype=torch.bfloat16)
    assert not why_not_held(logits, torch.empty(4, 1001, dtype=torch.bfloat16), 0.0)
    assert not why_not_held(logits, torch.empty(4, 1009, dtype=torch.bfloat16)[:, :1001], 0.0)
    assert "modulo 16" in why_not_held(logits, torch.empty(4, 1008, dtype=torch.bfloat16)[:, :1001], 0.0)
    assert "modulo 16" in why_not_held(logits, torch.empty(4, 1009, dtype=torch.bfloat16)[:, 1:1002], 0.0)
    assert not why_not_held(logits[:1], torch.empty(1, 1008, dtype=torch.bfloat16)[:, :1001], 0.0)  # no second row


def test_what_it_does_not_take_goes_to_triton_or_raises(monkeypatch):
    monkeypatch.setattr(held_rows, "select", lambda op, impl, device, dtype: "cuda" if impl == "auto" else impl)
    monkeypatch.setattr(held_rows, "why_not", lambda *_: "")
    logits = torch.empty(2, 1000)
    assert select_rows("unlearn_loss", "auto", logits, logits, 0.0) == "cuda"
    assert select_rows("unlearn_loss", "auto", logits, logits, 30.0) == "triton"
    assert select_rows("unlearn_loss", "triton", logits, logits, 0.0) == "triton"
    monkeypatch.setattr(held_rows, "why_not", lambda op, impl, *_: "" if impl == "cuda" else "triton is not installed")
    assert select_rows("unlearn_loss", "auto", logits, logits, 30.0) == "reference"
    with pytest.raises(ValueError, match="impl='cuda' cannot serve these logits: the kernel has no soft cap"):
        select_rows("unlearn_loss", "cuda", logits, logits, 30.0)


def test_auto_takes_it_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *_: "")
    monkeypatch.delenv("GFAST_HELD_ROWS", raising=False)
    auto = dispatch._auto.__wrapped__  # each process decides once
    assert auto("unlearn_loss", "cuda", None) == "triton" and auto("grad_dot", "cuda", None) == "cuda"
    for value in ("true", "yes", "2"):
        monkeypatch.setenv("GFAST_HELD_ROWS", value)
        with pytest.raises(ValueError, match=f"GFAST_HELD_ROWS='{value}' is neither 1 nor 0"):
            dispatch.opted_in("unlearn_loss")
    monkeypatch.setenv("GFAST_HELD_ROWS", "1")
    assert auto("unlearn_loss", "cuda", None) == "cuda"
    assert dispatch.select("unlearn_loss", "cuda", "cuda") == "cuda"


def test_losses_hand_it_their_rows(monkeypatch):
    """As on a GPU, with the CPU kernel of the same schema in its place."""
    need("unlearn_loss", "cpp", "cpu")
    handed = []
    monkeypatch.setattr(held_rows, "select", lambda *_: "cuda")
    monkeypatch.setattr(held_rows, "why_not", lambda *_: "")
    losses = importlib.import_module("gfast.ops.unlearn_loss")  # the name is also a function's
    monkeypatch.setattr(losses, "kernel", lambda name, impl: handed.append((name, impl)) or kernel(name, "cpp"))
    hidden, weight, _, labels, ref = problem(dtype=torch.float32)
    weight.requires_grad_()
    logits = hidden @ weight.T
    for loss in (
        lambda: gfast.unlearn_loss(logits, labels, TNPO(), ref_logp=ref),
        lambda: gfast.unlearn_loss(logits * 1, labels, TNPO(), ref_logp=ref, inplace=True),
        lambda: gfast.linear_unlearn_loss(hidden, weight, labels, TNPO(), ref_logp=ref),
    ):
        handed.clear()
        out = loss()
        assert handed == [("weighted_rows", "cuda")]
        expected = gfast.unlearn_loss(logits, labels, TNPO(), ref_logp=ref, impl="reference")
        (found,), (right,) = (torch.autograd.grad(one.loss, weight, retain_graph=True) for one in (out, expected))
        torch.testing.assert_close(found, right)
