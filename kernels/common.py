"""Maths shared by the Triton row kernels: soft-cap, logarithms that keep small values, online softmax, token weights.

Everything is fp32 and built from exp2, log, rsqrt and arithmetic only: libdevice is missing in Triton's interpreter,
and the interpreter must run the very code that the GPU runs. Floats that select code or scale it (scale, softcap,
powers, beta, sign) are `tl.constexpr`, because a Python float argument is fp32 in an eager launch but fp64 under
Inductor.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

IGNORE_INDEX = -100

# Lowest finite fp32. It stands for "no maximum yet" instead of -inf, so that -inf logits never meet -inf - -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


# Warps that the row kernels put on one SM, over all its programs, and the registers a thread may then use. A thread has
# 32 bytes in flight: 32 KiB an SM, about twice what HBM latency asks for.
WARPS_PER_SM = 32
COMPILER = {"maxnreg": 64, "enable_fp_fusion": True}


@functools.cache  # else a tenth of the time that the host takes for a loss
def tile(vocab: int, row_bytes: int, itemsize: int, streams: int = 1, aligned: bool = True) -> dict[str, int]:
    """Shape of one step over a row: R groups of K neighbouring columns, and the warps that share them.

    K columns are 16 bytes, one vector load of one thread, so maxima and sums over K stay inside the thread and the loop
    needs no barrier; R gives each thread 32 bytes of loads in flight over all `streams` (matrices read together). Rows
    that are not 16-byte aligned (odd vocabularies) take K = 1, so that neighbouring threads load neighbouring columns,
    and 4 of them a thread: the addresses and masks of more would not fit the registers.

    The gradient kernels read a row twice and must find it in L2 the second time. A program holds half its row between
    the two reads on average, so longer rows get more warps and thereby fewer programs an SM: 4 of 8 warps up to 64 KiB,
    2 of 16 warps up to 256 KiB, 1 of 32 warps above. On 132 SMs that is at most 34 MB of a 50 MB L2 up to rows of
    512 KiB (a 256k vocabulary in bf16). `row_bytes` counts all rows that one program reads twice (two for the KL).
    """
    if row_bytes <= 8 << 10:
        warps = 4
    elif row_bytes <= 64 << 10:
        warps = 8
    elif row_bytes <= 256 << 10:
        warps = 16
    else:
        warps = 32
    columns = 16 // itemsize if aligned else 1
    groups = 32 * warps * (2 if aligned else 4) // streams
    groups = min(groups, triton.next_power_of_2(triton.cdiv(vocab, columns)))
    return {"R": groups, "K": columns, "num_warps": min(warps, max(1, groups // 32))}


def launch(*matrices: torch.Tensor, streams: int = 1) -> tuple[tuple[int], dict[str, int | bool]]:
    """Grid and launch options for [N, V] matrices; the first `streams` of them are read together.

    The grid is no larger than what runs at once and every program walks over rows, so that the number of rows in flight
    is known, and the warps that finish a row first already load the next one.
    """
    rows, vocab = matrices[0].shape
    itemsize = max(m.itemsize for m in matrices)
    # Triton's own rule: it emits vector loads only where pointer and row stride are known multiples of 16.
    aligned = all(m.data_ptr() % 16 == 0 and m.stride(0) % 16 == 0 for m in matrices)
    row_bytes = vocab * sum(m.itemsize for m in matrices[:streams])
    options = tile(vocab, row_bytes, itemsize, streams, aligned)
    programs = 2  # the interpreter runs them one after the other
    if matrices[0].is_cuda:
        sms = torch.cuda.get_device_properties(matrices[0].device).multi_processor_count
        programs = sms * (WARPS_PER_SM // options["num_warps"])
    return (min(rows, programs),), {**options, **COMPILER}


def check_rows(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise where a [N, V] tensor cannot be walked row by row: wrong shape, or columns that are not neighbours."""
    if tensor.shape != shape:
        raise ValueError(f"gfast: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"gfast: {name} has stride {tensor.stride(1)} along the vocabulary, not 1; call .contiguous()")


@triton.jit
def exp(x):
    """exp(x) by one rounded product and exp2, which flushes denormals: |x| / 2 ulps of error in two instructions."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp_exact(x):
    """exp(x) to two ulps, for the few numbers of a row that powers and logarithms are taken of."""
    n = tl.floor(tl.minimum(tl.maximum(x * 1.4426950408889634, -200.0), 200.0))  # beyond, 2^n is 0 or inf
    r = (x - n * 0.693145751953125) - n * 1.42860677e-06  # log 2 in two parts: the first product is exact
    return tl.exp2(n) * tl.exp2(r * 1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x for 1 <= x <= 2 to an ulp or two. Of a block [R, K] four neighbours, a thread's own, share one reciprocal
    of their product: its unit is an eighth as fast as the others, and a division takes eight instructions.
    """
    if len(x.shape) == 2 and x.shape[1] % 4 == 0:
        even, odd = tl.split(tl.reshape(x, (x.shape[0] * x.shape[1] // 4, 2, 2)))
        left, right = tl.split(even * odd)
        r = reciprocal_of(left * right)
        r = tl.join(right * r, left * r)  # 1 / (even odd)
        return tl.reshape(tl.join(odd * r, even * r), x.shape)
    else:
        return reciprocal_of(x)


@triton.jit
def reciprocal_of(x):
    r = tl.rsqrt(x)
    r = r * r
    return r * (2.0 - x * r)


@triton.jit
def with_sign(x, of):
    """x >= 0 with the sign of `of`."""
    sign = of.to(tl.int32, bitcast=True) >> 31 << 31
    return (x.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def tanh_parts(z, slope: tl.constexpr):
    """Of x = slope z, with e = exp(-2 |x|): r = 1 / (1 + e) and e r, so that |tanh x| = 1 - 2 e r."""
    e = tl.exp2(tl.abs(z) * (-2.0 * 1.4426950408889634 * slope))
    r = reciprocal(1.0 + e)
    return r, e * r


@triton.jit
def tanh_bend(x):
    """tanh(x) / x - 1 for |x| < 1, where the exponential's error would show in 1 - 2 e r: the minimax polynomial."""
    x2 = x * x
    poly = x2 * -0.00035845148 + 0.0023013628
    poly = poly * x2 + -0.0079461047
    poly = poly * x2 + 0.021486657
    poly = poly * x2 + -0.053879801
    poly = poly * x2 + 0.13332345
    poly = poly * x2 + -0.33333296
    return x2 * poly


@triton.jit
def log1p_positive(x):
    """log(1 + x) for x >= 0, inf included, with a small relative error down to the smallest x."""
    t = x / (x + 2.0)  # log(1 + x) = 2 atanh(t), |t| <= 0.2 where the series is used
    t2 = t * t
    poly = t2 * (1.0 / 11.0) + (1.0 / 9.0)
    poly = poly * t2 + (1.0 / 7.0)
    poly = poly * t2 + (1.0 / 5.0)
    poly = poly * t2 + (1.0 / 3.0)
    return tl.where(x < 0.5, 2.0 * t + 2.0 * t * (t2 * poly), tl.log(1.0 + x))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0 with a small relative error: 2 t / (1 + t) with t = tanh(-x / 2) where it would cancel."""
    h = -0.5 * x
    t = h + h * tanh_bend(h)
    return tl.where(h < 0.35, 2.0 * t / (1.0 + t), 1.0 - exp_exact(x))


@triton.jit
def sigmoid(x):
    e = exp_exact(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def cap_scale(z, scale: tl.constexpr, softcap: tl.constexpr):
    """Effective logit z' = softcap tanh(scale z / softcap), or scale z where softcap is 0, in fp32."""
    z = z.to(tl.float32)  # first: bf16 arithmetic is wrong in the interpreter
    if softcap > 0.0:
        _, er = tanh_parts(z, scale / softcap)
        x = z * (scale / softcap)
        scaled = z * scale
        z = tl.where(tl.abs(x) < 1.0, scaled + scaled * tanh_bend(x), with_sign(softcap - 2.0 * softcap * er, z))
    elif scale != 1.0:
        z = z * scale
    return z


@triton.jit
def cap_slope(z, scale: tl.constexpr, softcap: tl.constexpr, fine: tl.constexpr):
    """dz'/dz / slope_factor, with d tanh = 4 e / (1 + e)^2, which keeps its relative accuracy where tanh saturates."""
    z = z.to(tl.float32)
    r, er = tanh_parts(z, scale / softcap)
    if fine:  # where saturated, e decides
        er = exp_exact(-2.0 * tl.abs(z * (scale / softcap))) * r
    return er * r


@triton.jit
def slope_factor(scale: tl.constexpr, softcap: tl.constexpr):
    return 4.0 * scale if softcap > 0.0 else scale


@triton.jit
def exp_of_row(z, m, scale: tl.constexpr, softcap: tl.constexpr, fine: tl.constexpr):
    """exp(z' - m). Not `fine`, z' is within 2e-7 softcap: enough where the result is rounded to 16 bits."""
    if softcap > 0.0 and not fine:
        z = z.to(tl.float32)
        _, er = tanh_parts(z, scale / softcap)
        top: tl.constexpr = softcap * 1.4426950408889634
        value = tl.exp2(with_sign(top - 2.0 * top * er, z) - m * 1.4426950408889634)
    else:
        value = exp(cap_scale(z, scale, softcap) - m)
    return value


@triton.jit
def columns(R: tl.constexpr, K: tl.constexpr):
    return tl.arange(0, R)[:, None] * K + tl.arange(0, K)[None, :]  # [R, K]


@triton.jit
def is_column(y, start, R: tl.constexpr, K: tl.constexpr):
    # Against 0..K-1, immediates in the instruction: a comparison of whole column numbers would hold each in a register.
    offset = y - start - tl.arange(0, R) * K
    return tl.arange(0, K)[None, :] == offset[:, None]  # [R, K]


@triton.jit
def absorb(m, s, z):
    """Add a block z [R, K] to running maxima m [R] and sums s [R] of exp(z - m)."""
    m_new = tl.maximum(m, tl.max(z, 1))
    s = s * exp(m - m_new) + tl.sum(exp(z - m_new[:, None]), 1)
    return m_new, s


@triton.jit
def max_and_sum(row, y, V, scale: tl.constexpr, softcap: tl.constexpr, policy: tl.constexpr, R: tl.constexpr,
                K: tl.constexpr):
    """M = max z' and sum exp(z' - M) over all columns of a row but y, in one read. y = -1 leaves none out."""
    block: tl.constexpr = R * K
    cols = columns(R, K)
    y = y.to(tl.int32)  # 64-bit column numbers would cost two registers each
    m = tl.full((R,), LOWEST, tl.float32)
    s = tl.zeros((R,), tl.float32)
    full = V // block * block
    for start in range(0, full, block):
        z = cap_scale(tl.load(row + start + cols, eviction_policy=policy), scale, softcap)
        if (y >= start) & (y < start + block):
            z = tl.where(is_column(y, start, R, K), float("-inf"), z)
        m, s = absorb(m, s, z)
    if full < V:
        at = full + cols
        z = cap_scale(tl.load(row + at, mask=at < V, other=0.0, eviction_policy=policy), scale, softcap)
        m, s = absorb(m, s, tl.where((at >= V) | is_column(y, full, R, K), float("-inf"), z))
    top = tl.max(m, 0)
    return top, tl.sum(s * exp_exact(m - top), 0)


@triton.jit
def target_stats(z_y, top, rest):
    """From z'_y and the other columns' (max, sum): m, log(total), logp, exp(z'_y - m), s_other, all scalars.

    With the target as the maximum log(total) = log1p(s_other), so logp keeps its relative accuracy as p -> 1.
    """
    m = tl.maximum(top, z_y)
    s_other = rest * exp_exact(top - m)
    e_y = exp_exact(z_y - m)
    log_total = log1p_positive(tl.where(z_y >= top, s_other, s_other + e_y - 1.0))
    log_total = tl.where(s_other + e_y == 0.0, float("nan"), log_total)  # all -inf: no softmax
    return m, log_total, (z_y - m) - log_total, e_y, s_other


@triton.jit
def log_one_minus_p(e_y, s_other, log_total, m, top, rest):
    """log(1 - p), accurate at both ends, however far the label is above the others; -inf if there are none."""
    lost = (top - m) + tl.log(rest) - log_total  # where s_other underflows, or is about to
    return tl.where(s_other < 1e-20, lost, -log1p_positive(e_y / s_other))


@triton.jit
def token_weight(logp, log_1mp, ref_logp, sign: tl.constexpr, p_pow: tl.constexpr, q_pow: tl.constexpr,
                 beta: tl.constexpr):
    """sign p^p_pow (1-p)^q_pow 2 sigmoid(beta (logp - ref_logp)), powers formed in log space, one of 0 left out."""
    log_w = tl.full(logp.shape, 0.0, tl.float32)
    if p_pow != 0.0:
        log_w += p_pow * logp
    if q_pow != 0.0:
        log_w += q_pow * log_1mp
    w = sign * exp_exact(log_w)
    if beta > 0.0:  # a factor rather than a term of log w: one rounding less, and exactly 1 at logp = ref_logp
        w *= 2.0 * sigmoid(beta * (logp - ref_logp))
    return w


@triton.jit
def zero_row(row, V, R: tl.constexpr, K: tl.constexpr):
    cols = columns(R, K)
    zero = tl.zeros((R, K), tl.float32).to(row.dtype.element_ty)
    for start in range(0, V, R * K):
        tl.store(row + start + cols, zero, mask=start + cols < V)


@triton.jit
def gradient_block(row, out, start, y, V, m, others, target, masked: tl.constexpr, scale: tl.constexpr,
                   softcap: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Write others exp(z' - m) dz'/dz for one block of columns and target dz'/dz at column y."""
    at = start + columns(R, K)
    if masked:
        raw = tl.load(row + at, mask=at < V, other=0.0, eviction_policy="evict_first")
    else:
        raw = tl.load(row + at, eviction_policy="evict_first")
    factor = slope_factor(scale, softcap)
    fine: tl.constexpr = out.dtype.element_ty == tl.float32
    grad = (factor * others) * exp_of_row(raw, m, scale, softcap, fine)
    if (y >= start) & (y < start + R * K):
        grad = tl.where(is_column(y, start, R, K), factor * target, grad)
    if softcap > 0.0:
        grad = grad * cap_slope(raw, scale, softcap, fine)
    grad = grad.to(out.dtype.element_ty)  # the one rounding
    if masked:
        tl.store(out + at, grad, mask=at < V, eviction_policy="evict_first")
    else:
        tl.store(out + at, grad, eviction_policy="evict_first")


@triton.jit
def gradient_row(row, out, y, V, m, others, target, scale: tl.constexpr, softcap: tl.constexpr, R: tl.constexpr,
                 K: tl.constexpr):
    """Second sweep. It runs backwards: what the first sweep read last is what the caches are surest to hold still.

    `out` may be `row`: every column is loaded before it is stored, by the same program.
    """
    block: tl.constexpr = R * K
    blocks = V // block
    y = y.to(tl.int32)
    if blocks * block < V:
        gradient_block(row, out, blocks * block, y, V, m, others, target, True, scale, softcap, R, K)
    for i in range(blocks):
        start = (blocks - 1 - i) * block
        gradient_block(row, out, start, y, V, m, others, target, False, scale, softcap, R, K)
