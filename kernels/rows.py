"""Log-probabilities, token weights and logit gradients of rows of logits, each program walking over rows.

With z' the effective logits (soft-cap and scale), y the label and s_other = sum over j != y of exp(z'_j - m):

    logp = (z'_y - m) - log(total)          -log1p(s_other) where the target is the maximum
    1 - p = s_other / total                 never 1 - exp(logp) rounded: forget tokens live at p near 1
    d logits_j = coef (delta_jy - p_j) dz'/dz

The launchers take [N, V] logits (fp32, bf16, fp16; unit column stride, any row stride) and validated labels [N] int64,
-100 ignored: those rows give logp 0, weight 0, stats 0 and a gradient row of zeros. A label that is neither -100 nor a
column gives NaN, not a stray read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gfast.kernels.common import (
    cap_scale,
    check_rows,
    exp_exact,
    gradient_row,
    launch,
    log_one_minus_p,
    max_and_sum,
    one_minus_exp,
    target_stats,
    token_weight,
    zero_row,
)


@triton.jit(do_not_specialize=["N"])
def logp_rows_kernel(logits, row_stride, labels, logp, stats, N, V, scale: tl.constexpr, softcap: tl.constexpr,
                     R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        y = tl.load(labels + i)
        value = 0.0
        m = 0.0
        log_total = 0.0
        if y != -100:
            row = logits + i * row_stride
            z_y = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan"))
            z_y = cap_scale(z_y, scale, softcap)
            top, rest = max_and_sum(row, y, V, scale, softcap, "evict_first", R, K)
            m, log_total, value, _, _ = target_stats(z_y, top, rest)
        tl.store(logp + i, value)
        tl.store(stats + 2 * i, m)
        tl.store(stats + 2 * i + 1, log_total)


@triton.jit(do_not_specialize=["N"])
def logp_rows_grad_kernel(logits, row_stride, labels, logp, stats, coef, out, out_stride, N, V, scale: tl.constexpr,
                          softcap: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        y = tl.load(labels + i)
        if y != -100:
            m = tl.load(stats + 2 * i)
            log_total = tl.load(stats + 2 * i + 1)
            c = tl.load(coef + i)
            target = c * one_minus_exp(tl.load(logp + i))
            others = -c * exp_exact(-log_total)
            gradient_row(logits + i * row_stride, out + i * out_stride, y, V, m, others, target, scale, softcap, R, K)
        else:
            zero_row(out + i * out_stride, V, R, K)


@triton.jit(do_not_specialize=["N"])
def weighted_rows_kernel(logits, row_stride, labels, ref_logp, coef_scale, logp, weight, out, out_stride, N, V,
                         sign: tl.constexpr, p_pow: tl.constexpr, q_pow: tl.constexpr, beta: tl.constexpr,
                         scale: tl.constexpr, softcap: tl.constexpr, has_out: tl.constexpr, by_row: tl.constexpr,
                         R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        y = tl.load(labels + i)
        if y != -100:
            row = logits + i * row_stride
            z_y = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan"))
            z_y = cap_scale(z_y, scale, softcap)
            policy: tl.constexpr = "evict_last" if has_out else "evict_first"
            top, rest = max_and_sum(row, y, V, scale, softcap, policy, R, K)
            m, log_total, value, e_y, s_other = target_stats(z_y, top, rest)
            ref = value
            if beta > 0.0:
                ref = tl.load(ref_logp + i).to(tl.float32)
            log_1mp = log_one_minus_p(e_y, s_other, log_total, m, top, rest)
            w = token_weight(value, log_1mp, ref, sign, p_pow, q_pow, beta)
            tl.store(logp + i, value)
            tl.store(weight + i, w)
            if has_out:
                total = s_other + e_y
                c = tl.load(coef_scale + i if by_row else coef_scale) * w
                target = c * (s_other / total)
                gradient_row(row, out + i * out_stride, y, V, m, -c / total, target, scale, softcap, R, K)
        else:
            tl.store(logp + i, 0.0)
            tl.store(weight + i, 0.0)
            if has_out:
                zero_row(out + i * out_stride, V, R, K)


def logp_rows(
    logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N] int64
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's label, and (m, log(total)) from which any log p_j = (z'_j - m) - log(total).

    Returns logp [N] and stats [N, 2], fp32. The logits are read once.

    >>> logp, stats = logp_rows(torch.randn(4, 32000, device="cuda"), torch.randint(32000, (4,), device="cuda"))
    """
    rows, vocab = logits.shape
    check_rows("logits", logits, (rows, vocab))
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    stats = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    if rows:
        grid, options = launch(logits)
        with torch.cuda.device_of(logits):
            logp_rows_kernel[grid](logits, logits.stride(0), labels.contiguous(), logp, stats, rows, vocab,
                                   float(scale), float(softcap), **options)
    return logp, stats


def logp_rows_grad(
    logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N] int64
    logp: torch.Tensor,  # [N] fp32
    stats: torch.Tensor,  # [N, 2] fp32
    coef: torch.Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    out: torch.Tensor,  # [N, V], may be logits
) -> None:
    """Write out_ij = coef_i (delta_jy - p_ij) dz'/dz, with logp and stats as `logp_rows` gave them.

    >>> logp_rows_grad(logits, labels, logp, stats, torch.ones_like(logp), 1.0, 0.0, logits)
    """
    rows, vocab = logits.shape
    check_rows("logits", logits, (rows, vocab))
    check_rows("out", out, (rows, vocab))
    if rows:
        grid, options = launch(logits, out)
        with torch.cuda.device_of(logits):
            logp_rows_grad_kernel[grid](
                logits, logits.stride(0), labels.contiguous(), logp.contiguous(), stats.contiguous(),
                coef.contiguous(), out, out.stride(0), rows, vocab, float(scale), float(softcap), **options)


def weighted_rows(
    logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N] int64
    ref_logp: torch.Tensor | None,  # [N], needed where beta > 0
    sign: float,
    p_pow: float,
    q_pow: float,
    beta: float,
    coef_scale: torch.Tensor,  # 0-dim or [N], fp32 on the device of logits
    scale: float = 1.0,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,  # [N, V], may be logits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, token weights and, into `out`, the gradient coef_scale sum_i w_i dlogp_i/dlogits in one go.

        w = sign p^p_pow (1 - p)^q_pow [2 sigmoid(beta (logp - ref_logp)) where beta > 0]

    Returns logp [N] and weight [N], fp32. The logits are read from memory once and again from the L2 cache.
    Weight families of arXiv 2502.19301: WGA p_pow = alpha; SatImp p_pow, q_pow; TNPO beta; WTNPO p_pow and beta.

    >>> one = torch.ones((), device=logits.device)
    >>> logp, weight = weighted_rows(logits, labels, None, 1.0, 1.0, 0.0, 0.0, one, out=logits)
    """
    rows, vocab = logits.shape
    check_rows("logits", logits, (rows, vocab))
    if out is not None:
        check_rows("out", out, (rows, vocab))
    if beta > 0 and ref_logp is None:
        raise ValueError("gfast: these weights compare with the original model (beta > 0); pass ref_logp")
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    weight = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        target = logits if out is None else out
        grid, options = launch(logits, target)
        with torch.cuda.device_of(logits):
            weighted_rows_kernel[grid](
                logits, logits.stride(0), labels.contiguous(), logp if ref_logp is None else ref_logp.contiguous(),
                coef_scale.contiguous(), logp, weight, target, target.stride(0), rows, vocab, float(sign), float(p_pow),
                float(q_pow), float(beta), float(scale), float(softcap), out is not None, coef_scale.dim() > 0,
                **options)
    return logp, weight
