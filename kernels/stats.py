"""What rows of logits are like (largest entries, mean, the entropy of their softmax) and the gradient of all of it.

A row is read from memory once. The first sweep keeps the maximum of every block of columns; the k largest entries then
come out one after the other, each by a look at the one block that holds it. What takes exps comes in a second sweep,
when the maximum is known, over what the L2 cache holds. The sum of the exps leaves the maximum's own, which is 1, out:

    log_total = log1p(others)    gap = sum_j p_j (top - z'_j)    entropy = log_total + gap
    d entropy / d z'_j = -p_j ((z'_j - top) + gap)

Rows labelled -100 give zeros, a row with a NaN gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gfast.kernels.common import (
    cap_scale,
    cap_slope,
    check_rows,
    columns,
    exp,
    exp_exact,
    is_column,
    launch,
    log1p_positive,
    one_minus_exp,
    slope_factor,
    zero_row,
)


@triton.jit
def load_block(row, start, V, masked: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, R: tl.constexpr,
               K: tl.constexpr):
    """z' of a block of columns, -inf beyond the last."""
    at = start + columns(R, K)
    if masked:
        z = cap_scale(tl.load(row + at, mask=at < V, other=0.0, eviction_policy="evict_last"), scale, softcap)
        z = tl.where(at < V, z, float("-inf"))
    else:
        z = cap_scale(tl.load(row + at, eviction_policy="evict_last"), scale, softcap)
    return z


@triton.jit
def load_others(row, start, V, first, masked: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, R: tl.constexpr,
                K: tl.constexpr):
    """The same, -inf at column `first` too."""
    z = load_block(row, start, V, masked, scale, softcap, R, K)
    if (first >= start) & (first < start + R * K):
        z = tl.where(is_column(first, start, R, K), float("-inf"), z)
    return z


@triton.jit
def is_later(z, at, value, column):
    """Which entries come after that of `column`: smaller ones, and equal ones on its right."""
    return (z < value) | ((z == value) & (at > column))


@triton.jit
def add_exps(s, w, z, top, sharpness: tl.constexpr):
    """Sums of exp(x) and x exp(x), x = sharpness (z - top), along K."""
    x = (z - top) * sharpness
    e = exp(x)
    return s + tl.sum(e, 1), w + tl.sum(tl.where(e == 0.0, 0.0, e * x), 1)  # x may be -inf


@triton.jit(do_not_specialize=["N"])
def stat_rows_kernel(logits, row_stride, labels, stats, values, ids, N, V, top: tl.constexpr, sharpness: tl.constexpr,
                     soft: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
                     K: tl.constexpr):
    block: tl.constexpr = R * K
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        y = tl.load(labels + i)
        if y != -100:
            row = logits + i * row_stride
            z_y = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan"))
            z_y = cap_scale(z_y, scale, softcap)
            numbers = tl.arange(0, B)
            tops = tl.full((B,), float("-inf"), tl.float32)  # of every block, what has not come out yet
            total = tl.zeros((R,), tl.float32)
            full = V // block * block
            for start in range(0, full, block):
                z = load_block(row, start, V, False, scale, softcap, R, K)
                tops = tl.where(numbers == start // block, tl.max(tl.max(z, 1), 0), tops)
                total += tl.sum(z, 1)
            tail = tl.zeros((R,), tl.float32)  # apart: Triton fails where the sum of what a loop loads is used twice
            if full < V:
                z = load_block(row, full, V, True, scale, softcap, R, K)
                tops = tl.where(numbers == full // block, tl.max(tl.max(z, 1), 0), tops)
                tail = tl.sum(tl.where(full + columns(R, K) < V, z, 0.0), 1)
            sum_z = tl.sum(total + tail, 0)
            bad = 0
            if sum_z != sum_z:  # a NaN, which no maximum sees, or inf - inf
                for start in range(0, V, block):
                    z = load_block(row, start, V, True, scale, softcap, R, K)
                    bad = tl.maximum(bad, tl.max(tl.max((z != z).to(tl.int32), 1), 0))
            value = float("inf")
            column = -1
            first = -1
            m = float("-inf")
            for k in range(top):
                best = tl.max(tops, 0)
                which = tl.min(tl.where(tops == best, numbers, B - 1), 0)
                at = which * block + columns(R, K)
                z = load_block(row, which * block, V, True, scale, softcap, R, K)
                wanted = (at < V) & (z == best) & is_later(z, at, value, column)
                place = tl.min(tl.min(tl.where(wanted, at, V), 1), 0)
                if place >= V:  # masked entries are left: they do not tell blocks apart
                    for start in range(0, V, block):
                        at = start + columns(R, K)
                        z = load_block(row, start, V, True, scale, softcap, R, K)
                        wanted = (at < V) & (z == best) & is_later(z, at, value, column)
                        place = tl.minimum(place, tl.min(tl.min(tl.where(wanted, at, V), 1), 0))
                    which = place // block
                    at = which * block + columns(R, K)
                    z = load_block(row, which * block, V, True, scale, softcap, R, K)
                value = best
                column = tl.minimum(place, V - 1)  # all of a row with a NaN may have come out
                left = tl.where((at < V) & is_later(z, at, value, column), z, float("-inf"))
                tops = tl.where(numbers == which, tl.max(tl.max(left, 1), 0), tops)
                if k == 0:
                    first = column
                    m = value
                tl.store(values + i * top + k, tl.where(bad > 0, float("nan"), value))
                tl.store(ids + i * top + k, column)
            log_total = 0.0
            gap = 0.0
            entropy = 0.0
            if soft:
                s = tl.zeros((R,), tl.float32)
                w = tl.zeros((R,), tl.float32)
                s_sharp = tl.zeros((R,), tl.float32)
                w_sharp = tl.zeros((R,), tl.float32)
                for start in range(0, full, block):
                    z = load_others(row, start, V, first, False, scale, softcap, R, K)
                    s, w = add_exps(s, w, z, m, 1.0)
                    if sharpness != 1.0:
                        s_sharp, w_sharp = add_exps(s_sharp, w_sharp, z, m, sharpness)
                if full < V:
                    z = load_others(row, full, V, first, True, scale, softcap, R, K)
                    s, w = add_exps(s, w, z, m, 1.0)
                    if sharpness != 1.0:
                        s_sharp, w_sharp = add_exps(s_sharp, w_sharp, z, m, sharpness)
                others = tl.sum(s, 0)
                log_total = log1p_positive(others)
                gap = -tl.sum(w, 0) / (1.0 + others)
                entropy = log_total + gap
                if sharpness != 1.0:
                    others = tl.sum(s_sharp, 0)
                    entropy = log1p_positive(others) - tl.sum(w_sharp, 0) / (1.0 + others)
            wrong = tl.where(bad > 0, float("nan"), 0.0)
            tl.store(stats + 6 * i, m + wrong)
            tl.store(stats + 6 * i + 1, log_total + wrong)
            tl.store(stats + 6 * i + 2, gap + wrong)
            tl.store(stats + 6 * i + 3, sum_z / V)
            tl.store(stats + 6 * i + 4, z_y + wrong)
            tl.store(stats + 6 * i + 5, entropy + wrong)
        else:
            for k in range(6):
                tl.store(stats + 6 * i + k, 0.0)
            for k in range(top):
                tl.store(values + i * top + k, 0.0)
                tl.store(ids + i * top + k, 0)


@triton.jit
def stat_slope(raw, scale: tl.constexpr, softcap: tl.constexpr, fine: tl.constexpr):
    """dz'/dz."""
    if softcap > 0.0:
        slope = slope_factor(scale, softcap) * cap_slope(raw, scale, softcap, fine)
    else:
        slope = tl.full(raw.shape, scale, tl.float32)
    return slope


@triton.jit
def stat_gradient_block(row, out, start, V, m, log_total, gap, from_logp, from_entropy, from_mean,
                        masked: tl.constexpr, soft: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr,
                        R: tl.constexpr, K: tl.constexpr):
    at = start + columns(R, K)
    grad = tl.zeros((R, K), tl.float32) + from_mean
    if soft or softcap > 0.0:
        if masked:
            raw = tl.load(row + at, mask=at < V, other=0.0, eviction_policy="evict_first")
        else:
            raw = tl.load(row + at, eviction_policy="evict_first")
        if soft:
            x = cap_scale(raw, scale, softcap) - m
            p = exp(x - log_total)
            grad -= tl.where(p == 0.0, 0.0, p * (from_logp + from_entropy * (x + gap)))
        grad *= stat_slope(raw, scale, softcap, out.dtype.element_ty == tl.float32)
    else:
        grad *= scale
    grad = grad.to(out.dtype.element_ty)
    if masked:
        tl.store(out + at, grad, mask=at < V, eviction_policy="evict_first")
    else:
        tl.store(out + at, grad, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["N"])
def stat_rows_grad_kernel(logits, row_stride, labels, stats, dense, entries, adds, out, out_stride, N, V,
                          count: tl.constexpr, soft: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr,
                          C: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    block: tl.constexpr = R * K
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        y = tl.load(labels + i)
        to = out + i * out_stride
        if y != -100:
            row = logits + i * row_stride
            m = tl.load(stats + 6 * i)
            log_total = tl.load(stats + 6 * i + 1)
            gap = tl.load(stats + 6 * i + 2)
            from_logp = tl.load(dense + 3 * i)
            from_entropy = tl.load(dense + 3 * i + 1)
            from_mean = tl.load(dense + 3 * i + 2) / V
            # single entries, the label's among them, before the row may be written over
            c = tl.arange(0, C)
            column = tl.load(entries + i * count + c, mask=c < count, other=0)
            column = tl.where(c < count, column, y)
            add = tl.load(adds + i * count + c, mask=c < count, other=0.0)
            value = tl.sum(tl.where(column[:, None] == column[None, :], add[None, :], 0.0), 1) + from_mean
            known = (column >= 0) & (column < V)  # a label that is none is found out later: no stray read or write
            raw = tl.load(row + column, mask=known, other=float("nan")).to(tl.float32)
            if soft:
                x = cap_scale(raw, scale, softcap) - m
                p = exp_exact(x - log_total)
                value += from_logp * tl.where(column == y, one_minus_exp(x - log_total), -p)
                value -= tl.where(p == 0.0, 0.0, from_entropy * p * (x + gap))
            value *= stat_slope(raw, scale, softcap, True)
            tl.debug_barrier()
            blocks = V // block
            if blocks * block < V:
                stat_gradient_block(row, to, blocks * block, V, m, log_total, gap, from_logp, from_entropy, from_mean,
                                    True, soft, scale, softcap, R, K)
            for b in range(blocks):
                stat_gradient_block(row, to, (blocks - 1 - b) * block, V, m, log_total, gap, from_logp, from_entropy,
                                    from_mean, False, soft, scale, softcap, R, K)
            tl.debug_barrier()
            tl.store(to + column, value.to(out.dtype.element_ty), mask=known)  # twice the same where twice given
        else:
            zero_row(to, V, R, K)


def half_full(options: dict[str, int | bool]) -> dict[str, int | bool]:
    """Launch options with twice the registers a thread, of which at most 16 warps have as many."""
    few = {"num_warps": 16, "R": options["R"] // 2} if options["num_warps"] > 16 else {}
    return {**options, **few, "maxnreg": 128}


def stat_rows(
    logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N] int64
    top: int,
    sharpness: float,
    soft: bool,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics [N, 6] fp32 (maximum, log_total, gap, mean, the label's z', entropy of softmax(sharpness z')), the
    `top` largest z' [N, top] fp32 and their columns [N, top] int64. Without `soft` what takes exps is 0.

    >>> stats, values, ids = stat_rows(logits, labels, 2, 1.0, True)
    """
    rows, vocab = logits.shape
    check_rows("logits", logits, (rows, vocab))
    if not 1 <= top <= vocab:
        raise ValueError(f"gfast: stat_rows: top must be 1 to {vocab}, not {top}")
    stats = torch.empty(rows, 6, dtype=torch.float32, device=logits.device)
    values = torch.empty(rows, top, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, top, dtype=torch.int64, device=logits.device)
    if rows:
        grid, options = launch(logits)
        options = half_full(options)
        blocks = triton.next_power_of_2(triton.cdiv(vocab, options["R"] * options["K"]))
        with torch.cuda.device_of(logits):
            stat_rows_kernel[grid](
                logits, logits.stride(0), labels.contiguous(), stats, values, ids, rows, vocab, top, float(sharpness),
                bool(soft), float(scale), float(softcap), blocks, **options)
    return stats, values, ids


def stat_rows_grad(
    logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N] int64
    stats: torch.Tensor,  # [N, 6] fp32, of sharpness 1
    dense: torch.Tensor,  # [N, 3] fp32
    entries: torch.Tensor,  # [N, c] int64
    adds: torch.Tensor,  # [N, c] fp32
    soft: bool,
    scale: float,
    softcap: float,
    out: torch.Tensor,  # [N, V], may be logits
) -> None:
    """Write the gradient of sum_i dense_i0 logp_i + dense_i1 entropy_i + dense_i2 mean_i + sum_k adds_ik
    z'_i,entries_ik. Without `soft` the first two are none of it, and the logits are read for a soft cap only.

    >>> stat_rows_grad(logits, labels, stats, dense, ids, adds, True, 1.0, 0.0, logits)
    """
    rows, vocab = logits.shape
    check_rows("logits", logits, (rows, vocab))
    check_rows("out", out, (rows, vocab))
    if rows:
        count = entries.shape[1]
        grid, options = launch(logits, out)
        with torch.cuda.device_of(logits):
            stat_rows_grad_kernel[grid](
                logits, logits.stride(0), labels.contiguous(), stats.contiguous(), dense.contiguous(),
                entries.contiguous(), adds.contiguous(), out, out.stride(0), rows, vocab, count, bool(soft),
                float(scale), float(softcap), triton.next_power_of_2(count + 1), **options)
