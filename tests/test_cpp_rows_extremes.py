"""CPU row kernels at their limits: probabilities of 0 and 1, masks, large outputs, threads, bad arguments."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

try:
    from gfast import _C
except ImportError as error:
    pytest.skip(f"gfast._C is not built: {error}", allow_module_level=True)

from helpers.cpp_rows import DTYPES, EPS, NLL, WGA, case, check, literal, literal_kl, one, ops, poisoned, weighted


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1 << 18, (1 << 18) + 16, (1 << 18) + 5))
def test_outputs_larger_than_the_caches_are_the_same(dtype, vocab, one_thread):
    """From 32 MiB on, memory that was written before is written past the caches, where rows are aligned (every second
    row has 16 entries more): each row while the next of a thread's share is visited.
    """
    rows = 40 if dtype == torch.float32 else 72  # shares of 5 and 8
    z = case(rows, 1000, dtype)[0].repeat(1, vocab // 1000 + 1)[:, :vocab].contiguous()
    y = torch.arange(rows) * 31
    y[1] = y[10] = -100
    y[-2:] = -100  # the gradient of the last labelled row has no visit of a next row to be written in
    y[5], y[6] = vocab - 1, vocab - 1 - 64
    z[3, :4096], z[3, 4096:] = 0.0, 60.0  # its third block is visited twice in 16 bits: the maximum rises too far
    out = poisoned(z)
    assert out.nbytes >= 32 << 20
    logp, weight = weighted(z, y, out, **WGA)
    small = poisoned(z[:12])
    weighted(z[:12], y[:12], small, **WGA)
    assert torch.equal(out[:12], small)
    stats = ops.logp_rows(z, y, 1.0, 0.0)[1]
    again = poisoned(z)
    ops.logp_rows_grad(z, y, logp, stats, weight, 1.0, 0.0, again)
    ops.logp_rows_grad(z[:12], y[:12], logp[:12], stats[:12], weight[:12], 1.0, 0.0, small)
    assert torch.equal(again[:12], small)
    weighted(z, y, z, **WGA)
    assert torch.equal(z, out)


@pytest.mark.parametrize("margin", (5.0, 15.0, 30.0, 60.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_probability_near_one(dtype, margin):
    """1 - p keeps its relative accuracy: it is the whole signal once a token is memorised."""
    z, y = case(4, 3001, dtype, spread=0.5)
    y = y.clamp(min=0)
    z.scatter_(1, y[:, None], margin)
    e = z.double()
    others = e.scatter(1, y[:, None], -math.inf).logsumexp(1)
    miss = torch.sigmoid(others - e.gather(1, y[:, None])[:, 0])  # 1 - p
    out = poisoned(z)
    coef = 1.0 if margin < 30 else 2.0**40  # lifts fp16's entries off its subnormals
    if dtype == torch.float16 and margin == 60.0:
        coef = 2.0**85
    logp, _ = weighted(z, y, out, sign=1.0, coef=coef)
    entry = out.gather(1, y[:, None])[:, 0].double() / coef
    assert torch.allclose(entry, miss, rtol=torch.finfo(dtype).eps + 4 * EPS, atol=0)
    assert torch.allclose(logp.double(), torch.log1p(-miss), rtol=8 * EPS, atol=0)
    only, stats = ops.logp_rows(z, y, 1.0, 0.0)
    ops.logp_rows_grad(z, y, only, stats, torch.full((4,), coef), 1.0, 0.0, out)
    entry = out.gather(1, y[:, None])[:, 0].double() / coef
    assert torch.allclose(entry, miss, rtol=torch.finfo(dtype).eps + 4 * EPS, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype):
    """Logits up to 1e4, rising so that the running maximum moves far from block to block, p near 0 and exactly 1."""
    vocab = 9000
    z = torch.linspace(-1e4, 1e4, vocab).repeat(4, 1).to(dtype)
    z[1] = z[1].flip(0)
    z[3] = torch.where(torch.arange(vocab) == 4000, 1e4, -1e4).to(dtype)
    y = torch.tensor([0, 0, vocab - 1, 4000])
    out = poisoned(z)
    kwargs = dict(NLL)
    logp, weight = weighted(z, y, out, **kwargs)
    truth, plain = literal(z, y, **kwargs), literal(z, y, **kwargs, dtype=torch.float32)
    check(logp, plain[0], truth[0])
    assert logp[3] == 0 and (out[3] == 0).all()
    check(out[:3], plain[2][:3], truth[2][:3])
    assert weighted(z, y, None, **WGA)[1][0] == 0


@pytest.mark.parametrize("scale", (1.0, 0.7))
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabulary(dtype, scale):
    z, y = case(4, 5000, dtype)
    z[:, :4200] = -math.inf  # the first two blocks of the kernel hold nothing finite
    z[2, 4200:] = -math.inf
    y = torch.tensor([4300, -100, 4999, 4250])
    z[2, 4999] = 2.0  # p is exactly 1
    kwargs = dict(WGA, scale=scale)
    truth, plain = literal(z, y, **kwargs), literal(z, y, **kwargs, dtype=torch.float32)
    out = poisoned(z)
    logp, weight = weighted(z, y, out, **kwargs)
    check(logp, plain[0], truth[0])
    check(out, plain[2], truth[2])
    assert (out[:, :4200] == 0).all() and (out[2] == 0).all()
    assert logp[2] == 0 and weight[2] == 1
    assert weighted(z, y, None, sign=1.0, p_pow=1.0, q_pow=2.0, scale=scale)[1][2] == 0
    only, stats = ops.logp_rows(z, y, scale, 0.0)
    ops.logp_rows_grad(z, y, only, stats, weight, scale, 0.0, out)
    assert (out[:, :4200] == 0).all() and torch.isfinite(out).all()


def test_nan_logits_show():
    z, y = case(3, 5000, torch.bfloat16)
    z[0, 4000] = math.nan
    logp, weight = weighted(z, y, None, **WGA)
    assert logp[0].isnan() and weight[0].isnan() and not logp[1:].isnan().any()
    assert ops.kl_rows(z, z.clone(), y, one(), 1.0, 0.0, 1.0, 0.0, None)[0].isnan()


def test_kl_mixed_dtypes_close_and_masked():
    z, y = case(4, 3000, torch.float32)
    near = z + 1e-4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    # About 5e-9: in fp32 a difference of log-probs would be noise.
    truth = literal_kl(z, near, y, 1.0, 1.0, 0.0, 1.0, 0.0, torch.float64)[0]
    kl = ops.kl_rows(z, near, y, one(), 1.0, 0.0, 1.0, 0.0, None)
    assert torch.allclose(kl.double(), truth, rtol=1e-2, atol=0)
    assert torch.equal(ops.kl_rows(z, z.clone(), y, one(), 1.0, 0.0, 1.0, 0.0, None), torch.zeros(4))
    half = near.bfloat16()
    mixed = ops.kl_rows(z, half, y, one(), 1.0, 0.0, 1.0, 0.0, None)
    assert torch.equal(mixed, ops.kl_rows(z, half.float(), y, one(), 1.0, 0.0, 1.0, 0.0, None))
    z[:, :2500] = -math.inf
    near[:, :2400] = -math.inf
    out = poisoned(z)
    kl = ops.kl_rows(z, near, y, one(), 1.0, 0.0, 1.0, 0.0, out)
    assert kl[0] == math.inf  # the reference has mass where the model has none
    near[:, :2500] = -math.inf
    kl = ops.kl_rows(z, near, y, one(), 1.0, 0.0, 1.0, 0.0, out)
    assert torch.isfinite(kl).all() and torch.isfinite(out).all() and (out[:, :2500] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_rounding_to_sixteen_bits(dtype):
    """The gradient is the fp32 one rounded to nearest even once, subnormals included."""
    z, y = case(3, 4001, torch.float16 if dtype == torch.float16 else torch.bfloat16, spread=6.0)
    stats = torch.zeros(3, 2)
    logp = torch.full((3,), -1.0)
    coef = torch.full((3,), -1.0)
    zeros_at = z.float().clamp(max=0)  # exp(z - 0 - 0) * 1: every size of fp16 number
    z = zeros_at.to(dtype)
    out, wide = poisoned(z), poisoned(z.float())
    ops.logp_rows_grad(z, y, logp, stats, coef, 1.0, 0.0, out)
    ops.logp_rows_grad(z.float(), y, logp, stats, coef, 1.0, 0.0, wide)
    assert torch.equal(out, wide.to(dtype))


def test_threads_do_not_change_a_bit():
    z, y = case(37, 3001, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, again, toward, flat = (poisoned(z) for _ in range(4))
            logp, weight = weighted(z, y, out, **WGA)
            _, stats = ops.logp_rows(z, y, 1.0, 0.0)
            ops.logp_rows_grad(z, y, logp, stats, weight, 1.0, 0.0, again)
            kl = ops.kl_rows(z, z.roll(1, 0), y, one(), 1.0, 0.0, 1.0, 0.0, toward)
            ops.scale_(flat.copy_(z), one(0.3))
            results.append((logp, weight, out, stats, again, kl, toward, flat))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the process's threads where Linux lists them")
@pytest.mark.skipif(
    "gcc" not in _C.build_info()["compiler"], reason="other compilers build for one thread, with a warning"
)
@pytest.mark.parametrize(
    "call",
    (
        "torch.ops.gfast.logp_rows(torch.zeros(64, 100), torch.zeros(64, dtype=torch.long), 1.0, 0.0)",
        "torch.ops.gfast.grad_dots([torch.empty(1 << 20)], [torch.empty(1 << 20)], [0], 1, 1)",
    ),
)
def test_every_thread_is_used(call):
    """torch's parallel loop compiles to a plain one, silently, where OpenMP is off in the extension."""
    code = f"""
import os, torch
from gfast import _C
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
{call}
print(len(os.listdir("/proc/self/task")) - before)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr


def bad_calls():
    z, y = case(4, 50, torch.bfloat16)
    f32 = torch.zeros(4)
    outside, negative = y.clone(), y.clone()
    outside[3], negative[3] = 50, -1
    yield "labels\\[3\\] \\(flattened\\) = 50 is outside the vocabulary \\[0, 50\\)", z, outside, f32, z.shape, {}
    yield "labels\\[3\\] \\(flattened\\) = -1 is outside", z, negative, f32, z.shape, {}
    yield "labels must be \\[4\\]", z, y[:3], f32, z.shape, {}
    yield "labels must be int64", z, y.int(), f32, z.shape, {}
    yield "logits must be \\[N, V\\]", z[0], y, f32, z.shape, {}
    yield "float32, bfloat16 or float16", z.double(), y, f32, z.shape, {}
    yield "rows of logits must be contiguous", z.t().contiguous().t(), y, f32, z.shape, {}
    yield "out must have the shape", z, y, f32, (4, 51), {}
    yield "out must have the dtype", z.float(), y, f32, z.shape, {}
    yield "ref_logp must be \\[4\\]", z, y, f32[:2], z.shape, {}
    yield "ref_logp must be float32", z, y, f32.double(), z.shape, {}
    yield "ref_logp is needed", z, y, None, z.shape, {}
    yield "coef_scale must be \\[4\\]", z, y, f32, z.shape, {"coef": torch.ones(2)}
    yield "coef_scale must be float32", z, y, f32, z.shape, {"coef": torch.ones((), dtype=torch.float64)}


@pytest.mark.parametrize("message, z, y, ref, shape, extra", list(bad_calls()))
def test_bad_arguments_leave_out_untouched(message, z, y, ref, shape, extra):
    out = torch.full(shape, 7.0, dtype=torch.bfloat16)
    with pytest.raises((ValueError, TypeError), match=message):
        ops.weighted_rows(z, y, ref, 1.0, 1.0, 0.0, 1.0, extra.get("coef", one()), 1.0, 0.0, out)
    assert (out == 7).all()


def test_overlapping_outputs_are_refused():
    z, y = case(4, 50, torch.float32)
    memory = torch.zeros(8, 50)
    with pytest.raises(ValueError, match="rows of out overlap"):
        weighted(z, y, memory[:1].expand(4, -1), **WGA)
    with pytest.raises(ValueError, match="shares memory with logits"):
        weighted(memory[:4], y, memory[1:5], **WGA)
    with pytest.raises(ValueError, match="shares memory with ref_logits"):
        ops.kl_rows(z, memory[:4], y, one(), 1.0, 0.0, 1.0, 0.0, memory[:4])
    with pytest.raises(ValueError, match="stats must be \\[4, 2\\]"):
        ops.logp_rows_grad(z, y, torch.zeros(4), torch.zeros(4), torch.zeros(4), 1.0, 0.0, memory[:4])
    with pytest.raises(ValueError, match="ref_logits must have the shape"):
        ops.kl_rows(z, z[:, :49], y, one(), 1.0, 0.0, 1.0, 0.0, None)
    assert (memory == 0).all()
