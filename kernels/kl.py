"""KL(q || p) of rows of logits against a reference's, with its gradient, each program walking over rows.

    kl = sum_v q_v (log q_v - log p_v),   q = softmax(ref z'),   p = softmax(z')
    d logits = coef_scale (p - q) dz'/dz

The first sweep finds the totals of both softmaxes, the second adds up p - q + q (log q - log p) = q (exp(-d) - 1 + d),
d = log q - log p: sum(p) - sum(q) = 0 makes every term nonnegative, so the KL of a model that has hardly left its
reference keeps its relative accuracy. An error e of the totals' ratio, the same in every d, adds e^2 / 2; it shows as
r = sum(p - q) = -e, and r^2 / 2 is taken off again.

Rows with label -100 give 0 and a gradient row of zeros; a column with q = 0 adds p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gfast.kernels.common import LOWEST, absorb, cap_scale, cap_slope, check_rows, columns, launch, zero_row


@triton.jit
def exp_tail(x):
    """(exp(x) - 1 - x) / x^2 for |x| < 0.35, its power series: within 1e-9."""
    tail = x * (1.0 / 40320.0) + (1.0 / 5040.0)
    tail = tail * x + (1.0 / 720.0)
    tail = tail * x + (1.0 / 120.0)
    tail = tail * x + (1.0 / 24.0)
    tail = tail * x + (1.0 / 6.0)
    return tail * x + 0.5


@triton.jit
def subtract(a, b):
    """a - b and what its rounding lost; of an infinite one nothing."""
    value = a - b
    back = value - a
    lost = (a - (value - back)) - (b + back)
    return value, tl.where(value > float("-inf"), lost, 0.0)


@triton.jit
def kl_block(row, ref, out, start, V, c, top_p, inverse_p, top_q, inverse_q, log_ratio, masked: tl.constexpr,
             scale: tl.constexpr, softcap: tl.constexpr, ref_scale: tl.constexpr, ref_softcap: tl.constexpr,
             has_out: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """A block's terms of the KL and of sum(p - q), summed along K [R]; its gradient c (p - q) dz'/dz into `out`."""
    at = start + columns(R, K)
    if masked:
        raw = tl.load(row + at, mask=at < V, other=0.0, eviction_policy="evict_first")
        raw_q = tl.load(ref + at, mask=at < V, other=0.0, eviction_policy="evict_first")
    else:
        raw = tl.load(row + at, eviction_policy="evict_first")
        raw_q = tl.load(ref + at, eviction_policy="evict_first")
    x_p, lost_p = subtract(cap_scale(raw, scale, softcap), top_p)
    x_q, lost_q = subtract(cap_scale(raw_q, ref_scale, ref_softcap), top_q)
    p = tl.exp(x_p) * inverse_p
    q = tl.exp(x_q) * inverse_q
    # relative to both maxima: differences of raw logits would lose the KL of rows with a large offset
    d = (x_q - x_p) + ((lost_q - lost_p) - log_ratio)
    near = tl.abs(d) < 0.34
    bend = d * d * exp_tail(-d)  # exp(-d) - 1 + d
    term = tl.where(near, q * bend, (p - q) + q * d)
    term = tl.where(q == 0.0, p, term)  # p may be 0 there, and d infinite or none
    delta = tl.where(near, q * (bend - d), p - q)  # where p is close to q, not by subtracting them
    if has_out:
        grad = (c * delta * cap_slope(raw, scale, softcap)).to(out.dtype.element_ty)
        if masked:
            tl.store(out + at, grad, mask=at < V, eviction_policy="evict_first")
        else:
            tl.store(out + at, grad, eviction_policy="evict_first")
    if masked:
        term = tl.where(at < V, term, 0.0)
        delta = tl.where(at < V, delta, 0.0)
    return tl.sum(term, 1), tl.sum(delta, 1)


@triton.jit
def kl_row(row, ref, out, c, V, top_p, sum_p, top_q, sum_q, scale: tl.constexpr, softcap: tl.constexpr,
           ref_scale: tl.constexpr, ref_softcap: tl.constexpr, has_out: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """The second sweep. Backwards, as in common.gradient_row: the columns read last are the surest to be in cache."""
    block: tl.constexpr = R * K
    blocks = V // block
    kl = tl.zeros((R,), tl.float32)
    rest = tl.zeros((R,), tl.float32)
    inverse_p = 1.0 / sum_p
    inverse_q = 1.0 / sum_q
    log_ratio = tl.log(sum_q) - tl.log(sum_p)
    if blocks * block < V:
        kl, rest = kl_block(row, ref, out, blocks * block, V, c, top_p, inverse_p, top_q, inverse_q, log_ratio, True,
                            scale, softcap, ref_scale, ref_softcap, has_out, R, K)
    for j in range(blocks):
        terms, deltas = kl_block(row, ref, out, (blocks - 1 - j) * block, V, c, top_p, inverse_p, top_q, inverse_q,
                                 log_ratio, False, scale, softcap, ref_scale, ref_softcap, has_out, R, K)
        kl += terms
        rest += deltas
    r = tl.sum(rest, 0)
    return tl.sum(kl, 0) - 0.5 * r * r


@triton.jit
def kl_rows_kernel(logits, row_stride, ref_logits, ref_stride, labels, coef_scale, kl, totals, out, out_stride, N, V,
                   scale: tl.constexpr, softcap: tl.constexpr, ref_scale: tl.constexpr, ref_softcap: tl.constexpr,
                   has_out: tl.constexpr, has_totals: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        if tl.load(labels + i) != -100:
            row = logits + i * row_stride
            ref = ref_logits + i * ref_stride
            policy: tl.constexpr = "evict_last"
            block: tl.constexpr = R * K
            cols = columns(R, K)
            m_p = tl.full((R,), LOWEST, tl.float32)
            s_p = tl.zeros((R,), tl.float32)
            m_q = tl.full((R,), LOWEST, tl.float32)
            s_q = tl.zeros((R,), tl.float32)
            blocks = V // block
            for start in range(0, blocks * block, block):
                z_p = cap_scale(tl.load(row + start + cols, eviction_policy=policy), scale, softcap)
                z_q = cap_scale(tl.load(ref + start + cols, eviction_policy=policy), ref_scale, ref_softcap)
                m_p, s_p = absorb(m_p, s_p, z_p)
                m_q, s_q = absorb(m_q, s_q, z_q)
            if blocks * block < V:
                at = blocks * block + cols
                z_p = tl.load(row + at, mask=at < V, other=0.0, eviction_policy=policy)
                z_q = tl.load(ref + at, mask=at < V, other=0.0, eviction_policy=policy)
                z_p = tl.where(at < V, cap_scale(z_p, scale, softcap), float("-inf"))
                z_q = tl.where(at < V, cap_scale(z_q, ref_scale, ref_softcap), float("-inf"))
                m_p, s_p = absorb(m_p, s_p, z_p)
                m_q, s_q = absorb(m_q, s_q, z_q)
            top_p = tl.max(m_p, 0)
            top_q = tl.max(m_q, 0)
            sum_p = tl.sum(s_p * tl.exp(m_p - top_p), 0)
            sum_q = tl.sum(s_q * tl.exp(m_q - top_q), 0)
            value = kl_row(row, ref, out + i * out_stride, tl.load(coef_scale), V, top_p, sum_p, top_q, sum_q, scale,
                           softcap, ref_scale, ref_softcap, has_out, R, K)
            tl.store(kl + i, value)
            if has_totals:
                tl.store(totals + 4 * i, top_p)
                tl.store(totals + 4 * i + 1, sum_p)
                tl.store(totals + 4 * i + 2, top_q)
                tl.store(totals + 4 * i + 3, sum_q)
        else:
            tl.store(kl + i, 0.0)
            if has_totals:
                tl.store(totals + 4 * i, 0.0)
                tl.store(totals + 4 * i + 1, 1.0)
                tl.store(totals + 4 * i + 2, 0.0)
                tl.store(totals + 4 * i + 3, 1.0)
            if has_out:
                zero_row(out + i * out_stride, V, R, K)


@triton.jit
def kl_rows_grad_kernel(logits, row_stride, ref_logits, ref_stride, labels, totals, coef_scale, out, out_stride, N, V,
                        scale: tl.constexpr, softcap: tl.constexpr, ref_scale: tl.constexpr, ref_softcap: tl.constexpr,
                        R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        to = out + i * out_stride
        if tl.load(labels + i) != -100:
            kl_row(logits + i * row_stride, ref_logits + i * ref_stride, to, tl.load(coef_scale), V,
                   tl.load(totals + 4 * i), tl.load(totals + 4 * i + 1), tl.load(totals + 4 * i + 2),
                   tl.load(totals + 4 * i + 3), scale, softcap, ref_scale, ref_softcap, True, R, K)
        else:
            zero_row(to, V, R, K)


def kl_rows(
    logits: torch.Tensor,  # [N, V]
    ref_logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N] int64; only -100 or not matters
    coef_scale: torch.Tensor,  # 0-dim fp32 on the device of logits
    scale: float = 1.0,
    softcap: float = 0.0,
    ref_scale: float = 1.0,
    ref_softcap: float = 0.0,
    out: torch.Tensor | None = None,  # [N, V], may be logits
    totals: torch.Tensor | None = None,  # [N, 4] fp32
) -> torch.Tensor:
    """KL(q || p) of each row [N] fp32 and, into `out`, the gradient coef_scale (p - q) dz'/dz of their sum.

    `totals` gets the maximum and the sum of exps relative to it of the row, then of the reference's.

    >>> kl = kl_rows(logits, ref_logits, labels, torch.ones((), device=logits.device), out=logits)
    """
    rows, vocab = logits.shape
    check_rows("logits", logits, (rows, vocab))
    check_rows("ref_logits", ref_logits, (rows, vocab))
    if out is not None:
        check_rows("out", out, (rows, vocab))
    kl = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        target = logits if out is None else out
        grid, options = launch(logits, ref_logits, target, streams=2)
        with torch.cuda.device_of(logits):
            kl_rows_kernel[grid](
                logits, logits.stride(0), ref_logits, ref_logits.stride(0), labels.contiguous(), coef_scale, kl,
                kl if totals is None else totals, target, target.stride(0), rows, vocab, float(scale), float(softcap),
                float(ref_scale), float(ref_softcap), out is not None, totals is not None, **options)
    return kl


def kl_rows_grad(
    logits: torch.Tensor,  # [N, V]
    ref_logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N] int64; only -100 or not matters
    totals: torch.Tensor,  # [N, 4] fp32
    coef_scale: torch.Tensor,  # 0-dim fp32 on the device of logits
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    out: torch.Tensor,  # [N, V], may be logits
) -> None:
    """Write the gradient coef_scale (p - q) dz'/dz, both softmaxes normalised by `totals` as `kl_rows` gives them:
    where these rows are parts of longer ones, those of the longer rows.

    >>> kl_rows_grad(logits, ref_logits, labels, totals, one, 1.0, 0.0, 1.0, 0.0, logits)
    """
    rows, vocab = logits.shape
    check_rows("logits", logits, (rows, vocab))
    check_rows("ref_logits", ref_logits, (rows, vocab))
    check_rows("out", out, (rows, vocab))
    if rows:
        grid, options = launch(logits, ref_logits, out, streams=2)
        with torch.cuda.device_of(logits):
            kl_rows_grad_kernel[grid](
                logits, logits.stride(0), ref_logits, ref_logits.stride(0), labels.contiguous(), totals.contiguous(),
                coef_scale, out, out.stride(0), rows, vocab, float(scale), float(softcap), float(ref_scale),
                float(ref_softcap), **options)
