"""KL(q || p) of rows of logits against a reference's, with its gradient, each program walking over rows.

    kl = sum_v q_v (log q_v - log p_v),   q = softmax(ref z'),   p = softmax(z')
    d logits = coef_scale (p - q) dz'/dz

The first sweep finds the totals of both softmaxes, the second adds up p - q + q (log q - log p) = q (exp(-d) - 1 + d),
d = log q - log p: sum(p) - sum(q) = 0 makes every term nonnegative, so the KL of a model that has hardly left its
reference keeps its relative accuracy. An error e of the totals' ratio, the same in every d, adds e^2 / 2; it shows as
r = sum(p - q) = -e, and r^2 / 2 is taken off again.

Rows with label -100 give 0 and a gradient row of zeros; a column with q = 0 adds p.

Soft targets are the same sweeps: ref z' may be lowered at the row's label, and the entropy of q added, which makes the
cross-entropy - sum_v q_v log p_v. The Jensen-Shannon divergence takes a sweep more for its gradient (js_row).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gfast.kernels.common import (
    LOWEST,
    absorb,
    cap_scale,
    cap_slope,
    check_rows,
    columns,
    exp_exact,
    is_column,
    launch,
    slope_factor,
    zero_row,
)

# Kinds of divergence
KL = tl.constexpr(0)
CROSS_ENTROPY = tl.constexpr(1)
JS = tl.constexpr(2)


@triton.jit
def exp_tail(d):
    """(exp(-d) - 1 + d) / d^2 for |d| < 0.34, within 1.2e-7: the minimax polynomial of degree 4."""
    tail = d * 0.0013900819 + -0.00836202
    tail = tail * d + 0.04166684
    tail = tail * d + -0.16666584
    return tail * d + 0.5


@triton.jit
def lowered(z, y, start, by, R: tl.constexpr, K: tl.constexpr):
    """A block z' [R, K] with `by` taken off column y, where that is among its columns."""
    if (y >= start) & (y < start + R * K):
        z = tl.where(is_column(y, start, R, K), z - by, z)
    return z


@triton.jit
def kl_block(row, ref, out, start, V, c, y, by, top_p, log_p, top_q, log_q, apart, gap, masked: tl.constexpr,
             scale: tl.constexpr, softcap: tl.constexpr, ref_scale: tl.constexpr, ref_softcap: tl.constexpr,
             has_out: tl.constexpr, lower: tl.constexpr, kind: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """A block's terms of the KL and of sum(p - q), summed along K [R]; its gradient c (p - q) dz'/dz into `out`."""
    at = start + columns(R, K)
    if masked:
        raw = tl.load(row + at, mask=at < V, other=0.0, eviction_policy="evict_first")
        raw_q = tl.load(ref + at, mask=at < V, other=0.0, eviction_policy="evict_first")
    else:
        raw = tl.load(row + at, eviction_policy="evict_first")
        raw_q = tl.load(ref + at, eviction_policy="evict_first")
    z_p = cap_scale(raw, scale, softcap)
    z_q = cap_scale(raw_q, ref_scale, ref_softcap)
    if lower:
        z_q = lowered(z_q, y, start, by, R, K)
    if apart != 0.0:
        z_p -= apart
    p = tl.exp2((z_p - top_p) * 1.4426950408889634 - log_p)
    q = tl.exp2((z_q - top_q) * 1.4426950408889634 - log_q)
    # Of close rows z_q - z_p has no rounding; z - top would have, of the size of a small d.
    d = (z_q - z_p) - gap
    near = tl.abs(d) < 0.34
    shift = tl.where(q == 0.0, 0.0, q * d)  # where q = 0, d may be infinite or none
    term = shift * (d * exp_tail(d))  # q (exp(-d) - 1 + d)
    delta = tl.where(near, term - shift, p - q)  # where p is close to q, not by subtracting them
    term = tl.where(near, term, (p - q) + shift)
    if kind == CROSS_ENTROPY:
        term += tl.where(q == 0.0, 0.0, q * (log_q * 0.6931471805599453 - (z_q - top_q)))
    if has_out:
        grad = c * delta
        if softcap > 0.0:
            grad = grad * cap_slope(raw, scale, softcap, out.dtype.element_ty == tl.float32)
        grad = grad.to(out.dtype.element_ty)
        if masked:
            tl.store(out + at, grad, mask=at < V, eviction_policy="evict_first")
        else:
            tl.store(out + at, grad, eviction_policy="evict_first")
    if masked:
        term = tl.where(at < V, term, 0.0)
        delta = tl.where(at < V, delta, 0.0)
    return tl.sum(term, 1), tl.sum(delta, 1)


@triton.jit
def kl_row(row, ref, out, c, y, by, V, top_p, sum_p, top_q, sum_q, scale: tl.constexpr, softcap: tl.constexpr,
           ref_scale: tl.constexpr, ref_softcap: tl.constexpr, has_out: tl.constexpr, lower: tl.constexpr,
           kind: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """The second sweep. Backwards, as in common.gradient_row: the columns read last are the surest to be in cache."""
    block: tl.constexpr = R * K
    blocks = V // block
    kl = tl.zeros((R,), tl.float32)
    rest = tl.zeros((R,), tl.float32)
    c = c * slope_factor(scale, softcap)
    # Rows that are far apart but for a constant: a whole number leaves most logits exact.
    apart = top_p - top_q
    apart = tl.where(tl.abs(apart) < 1e30, tl.floor(apart + 0.5), 0.0)
    top_p -= apart
    gap = (top_q - top_p) + tl.log(sum_q / sum_p)  # d = log q - log p = (z_q - z_p) - gap
    log_p = tl.log2(sum_p)
    log_q = tl.log2(sum_q)
    if blocks * block < V:
        kl, rest = kl_block(row, ref, out, blocks * block, V, c, y, by, top_p, log_p, top_q, log_q, apart, gap, True,
                            scale, softcap, ref_scale, ref_softcap, has_out, lower, kind, R, K)
    for j in range(blocks):
        terms, deltas = kl_block(row, ref, out, (blocks - 1 - j) * block, V, c, y, by, top_p, log_p, top_q, log_q,
                                 apart, gap, False, scale, softcap, ref_scale, ref_softcap, has_out, lower, kind, R, K)
        kl += terms
        rest += deltas
    r = tl.sum(rest, 0)
    return tl.sum(kl, 0) - 0.5 * r * r


@triton.jit
def js_block(row, ref, start, V, y, by, top_p, log_p, top_q, log_q, apart, gap, masked: tl.constexpr,
             scale: tl.constexpr, softcap: tl.constexpr, ref_scale: tl.constexpr, ref_softcap: tl.constexpr,
             lower: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """A block's p, p log(p/m) and terms of twice the divergence, [R, K] each; 0 past the row."""
    at = start + columns(R, K)
    raw = tl.load(row + at, mask=at < V, other=0.0) if masked else tl.load(row + at)
    raw_q = tl.load(ref + at, mask=at < V, other=0.0) if masked else tl.load(ref + at)
    z_p = cap_scale(raw, scale, softcap)
    z_q = cap_scale(raw_q, ref_scale, ref_softcap)
    if lower:
        z_q = lowered(z_q, y, start, by, R, K)
    if apart != 0.0:
        z_p -= apart
    p = tl.exp2((z_p - top_p) * 1.4426950408889634 - log_p)
    q = tl.exp2((z_q - top_q) * 1.4426950408889634 - log_q)
    d = (z_q - z_p) - gap
    near = tl.abs(d) < 0.34
    x = 0.5 * d
    x2 = x * x
    bend = x2 * (((x2 * (-17.0 / 2520.0) + 1.0 / 45.0) * x2 - 1.0 / 12.0) * x2 + 0.5)  # log cosh x
    both = x2 * (((x2 * (-17.0 / 360.0) + 1.0 / 9.0) * x2 - 0.25) * x2 + 0.5)  # x tanh x - log cosh x
    fall = tl.log(1.0 + tl.exp2(-tl.abs(d) * 1.4426950408889634))  # beside log 2: its absolute error counts
    log_pm = tl.where(near, -x - bend, 0.6931471805599453 - (tl.maximum(d, 0.0) + fall))
    of_p = tl.where(p == 0.0, p, p * log_pm)
    of_q = tl.where(q == 0.0, q, q * tl.where(p == 0.0, 0.6931471805599453, log_pm + d))
    term = tl.where(near, (p + q) * both, of_p + of_q)  # where p is close to q, not by subtracting them
    if masked:
        p = tl.where(at < V, p, 0.0)
        of_p = tl.where(at < V, of_p, 0.0)
        term = tl.where(at < V, term, 0.0)
    return p, of_p, term


@triton.jit
def js_write(row, out, start, V, c, p, of_p, center, masked: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr,
             R: tl.constexpr, K: tl.constexpr):
    """Write c p (h - sum(p h)) dz'/dz, h = log(p/m) / 2."""
    at = start + columns(R, K)
    grad = c * (0.5 * of_p - p * center)
    if softcap > 0.0:
        raw = tl.load(row + at, mask=at < V, other=0.0) if masked else tl.load(row + at)
        grad = grad * cap_slope(raw, scale, softcap, out.dtype.element_ty == tl.float32)
    grad = grad.to(out.dtype.element_ty)
    if masked:
        tl.store(out + at, grad, mask=at < V)
    else:
        tl.store(out + at, grad)


@triton.jit
def js_row(row, ref, out, c, y, by, V, top_p, sum_p, top_q, sum_q, scale: tl.constexpr, softcap: tl.constexpr,
           ref_scale: tl.constexpr, ref_softcap: tl.constexpr, has_out: tl.constexpr, lower: tl.constexpr,
           R: tl.constexpr, K: tl.constexpr):
    """Sweeps two and three: sum_v (p log(p/m) + q log(q/m)) / 2 with m = (p + q) / 2, then its gradient, which takes
    sum(p h). With d = log q - log p, log(p/m) = -d/2 - log cosh(d/2), and log(q/m) = d/2 - log cosh(d/2)."""
    block: tl.constexpr = R * K
    blocks = V // block
    value = tl.zeros((R,), tl.float32)
    mean = tl.zeros((R,), tl.float32)
    c = c * slope_factor(scale, softcap)
    apart = top_p - top_q
    apart = tl.where(tl.abs(apart) < 1e30, tl.floor(apart + 0.5), 0.0)
    top_p -= apart
    gap = (top_q - top_p) + tl.log(sum_q / sum_p)
    log_p = tl.log2(sum_p)
    log_q = tl.log2(sum_q)
    if blocks * block < V:
        p, of_p, term = js_block(row, ref, blocks * block, V, y, by, top_p, log_p, top_q, log_q, apart, gap, True,
                                 scale, softcap, ref_scale, ref_softcap, lower, R, K)
        value += tl.sum(term, 1)
        mean += tl.sum(of_p, 1)
    for j in range(blocks):
        p, of_p, term = js_block(row, ref, (blocks - 1 - j) * block, V, y, by, top_p, log_p, top_q, log_q, apart, gap,
                                 False, scale, softcap, ref_scale, ref_softcap, lower, R, K)
        value += tl.sum(term, 1)
        mean += tl.sum(of_p, 1)
    if has_out:
        center = 0.5 * tl.sum(mean, 0)
        for j in range(blocks):
            p, of_p, term = js_block(row, ref, j * block, V, y, by, top_p, log_p, top_q, log_q, apart, gap, False,
                                     scale, softcap, ref_scale, ref_softcap, lower, R, K)
            js_write(row, out, j * block, V, c, p, of_p, center, False, scale, softcap, R, K)
        if blocks * block < V:
            p, of_p, term = js_block(row, ref, blocks * block, V, y, by, top_p, log_p, top_q, log_q, apart, gap, True,
                                     scale, softcap, ref_scale, ref_softcap, lower, R, K)
            js_write(row, out, blocks * block, V, c, p, of_p, center, True, scale, softcap, R, K)
    return 0.5 * tl.sum(value, 0)


@triton.jit(do_not_specialize=["N"])
def kl_rows_kernel(logits, row_stride, ref_logits, ref_stride, labels, lowers, coef_scale, kl, totals, out, out_stride,
                   N, V, scale: tl.constexpr, softcap: tl.constexpr, ref_scale: tl.constexpr, ref_softcap: tl.constexpr,
                   has_out: tl.constexpr, has_totals: tl.constexpr, lower: tl.constexpr, kind: tl.constexpr,
                   R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        label = tl.load(labels + i)
        if label != -100:
            y = label.to(tl.int32)  # 64-bit column numbers would cost two registers each
            by = tl.load(lowers + i) if lower else 0.0
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
                if lower:
                    z_q = lowered(z_q, y, start, by, R, K)
                m_p, s_p = absorb(m_p, s_p, z_p)
                m_q, s_q = absorb(m_q, s_q, z_q)
            if blocks * block < V:
                at = blocks * block + cols
                z_p = tl.load(row + at, mask=at < V, other=0.0, eviction_policy=policy)
                z_q = tl.load(ref + at, mask=at < V, other=0.0, eviction_policy=policy)
                z_p = tl.where(at < V, cap_scale(z_p, scale, softcap), float("-inf"))
                z_q = tl.where(at < V, cap_scale(z_q, ref_scale, ref_softcap), float("-inf"))
                if lower:
                    z_q = lowered(z_q, y, blocks * block, by, R, K)
                m_p, s_p = absorb(m_p, s_p, z_p)
                m_q, s_q = absorb(m_q, s_q, z_q)
            top_p = tl.max(m_p, 0)
            top_q = tl.max(m_q, 0)
            sum_p = tl.sum(s_p * exp_exact(m_p - top_p), 0)
            sum_q = tl.sum(s_q * exp_exact(m_q - top_q), 0)
            to = out + i * out_stride
            c = tl.load(coef_scale)
            if kind == JS:
                value = js_row(row, ref, to, c, y, by, V, top_p, sum_p, top_q, sum_q, scale, softcap, ref_scale,
                               ref_softcap, has_out, lower, R, K)
            else:
                value = kl_row(row, ref, to, c, y, by, V, top_p, sum_p, top_q, sum_q, scale, softcap, ref_scale,
                               ref_softcap, has_out, lower, kind, R, K)
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


@triton.jit(do_not_specialize=["N"])
def kl_rows_grad_kernel(logits, row_stride, ref_logits, ref_stride, labels, totals, coef_scale, out, out_stride, N, V,
                        scale: tl.constexpr, softcap: tl.constexpr, ref_scale: tl.constexpr, ref_softcap: tl.constexpr,
                        R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        to = out + i * out_stride
        if tl.load(labels + i) != -100:
            kl_row(logits + i * row_stride, ref_logits + i * ref_stride, to, tl.load(coef_scale), 0, 0.0, V,
                   tl.load(totals + 4 * i), tl.load(totals + 4 * i + 1), tl.load(totals + 4 * i + 2),
                   tl.load(totals + 4 * i + 3), scale, softcap, ref_scale, ref_softcap, True, False, KL, R, K)
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
    return soft_rows(
        logits, ref_logits, labels, None, coef_scale, 0, scale, softcap, ref_scale, ref_softcap, out, totals)


def soft_rows(
    logits: torch.Tensor,  # [N, V]
    ref_logits: torch.Tensor,  # [N, V], may be logits
    labels: torch.Tensor,  # [N] int64
    lower: torch.Tensor | None,  # [N] fp32
    coef_scale: torch.Tensor,  # 0-dim fp32 on the device of logits
    kind: int,  # KL, CROSS_ENTROPY or JS
    scale: float = 1.0,
    softcap: float = 0.0,
    ref_scale: float = 1.0,
    ref_softcap: float = 0.0,
    out: torch.Tensor | None = None,  # [N, V], may be logits
    totals: torch.Tensor | None = None,  # [N, 4] fp32
) -> torch.Tensor:
    """`kl_rows` against a reference whose z' is lower by `lower` at the label, of any kind of divergence.

    >>> value = soft_rows(logits, ref_logits, labels, torch.full((rows,), 10.0), one, 1, out=logits)
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
                logits, logits.stride(0), ref_logits, ref_logits.stride(0), labels.contiguous(),
                kl if lower is None else lower.contiguous(), coef_scale, kl, kl if totals is None else totals, target,
                target.stride(0), rows, vocab, float(scale), float(softcap), float(ref_scale), float(ref_softcap),
                out is not None, totals is not None, lower is not None, kind, **options)
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
