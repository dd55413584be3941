"""Calls of the CPU row kernels, what they compute written out, and the law that their errors are asked to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ops = torch.ops.gfast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps
NLL = dict(sign=-1.0, p_pow=0.0, q_pow=0.0, beta=0.0)
WGA = dict(sign=1.0, p_pow=1.0, q_pow=0.0, beta=0.0)


def one(value: float = 1.0) -> Tensor:
    return torch.tensor(value)


def effective(z: Tensor, scale: float, softcap: float) -> Tensor:
    z = scale * z
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def literal(
    z, y, *, ref=None, sign=1.0, p_pow=0.0, q_pow=0.0, beta=0.0, coef=1.0, scale=1.0, softcap=0.0, dtype=torch.float64
):
    """logp [N], weight [N] and d(sum coef w logp)/dz [N, V], in ``dtype``; the gradient in z's dtype."""
    x = z.to(dtype, copy=True).requires_grad_()  # [N, V]
    valid, safe = y >= 0, y.clamp(min=0)[:, None]
    e = effective(x, scale, softcap)
    full = torch.logsumexp(e, 1)
    logp = torch.where(valid, e.gather(1, safe)[:, 0] - full, 0.0)
    with torch.no_grad():
        others = torch.logsumexp(e.scatter(1, safe, -math.inf), 1) - full  # log(1 - p)
        log_w = p_pow * logp
        if q_pow:
            log_w = log_w + q_pow * others
        if beta:
            log_w = log_w + math.log(2) + torch.nn.functional.logsigmoid(beta * (logp - ref.to(dtype)))
        weight = torch.where(valid, sign * log_w.exp(), 0.0)
    (coef * weight * logp).sum().backward()
    grad = x.grad if dtype == torch.float64 else x.grad.to(z.dtype)
    return logp.detach(), weight, grad


def error(value: Tensor, truth: Tensor) -> float:
    """Largest relative error of an entry of a vector, or of a row of a matrix (in the 2-norm)."""
    if value.dim() == 1:
        value, truth = value[:, None], truth[:, None]
    # Rows whose entries are subnormal in value's dtype have no relative accuracy; zero rows are compared elsewhere.
    kept = truth.abs().amax(1) >= torch.finfo(value.dtype).smallest_normal
    value, truth = value.double()[kept], truth.double()[kept]
    return float(((value - truth).norm(dim=1) / truth.norm(dim=1)).amax()) if kept.any() else 0.0


def check(value: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert torch.isfinite(value).all()
    assert error(value, truth) <= 2 * error(plain, truth) + torch.finfo(value.dtype).eps


def case(rows: int, vocab: int, dtype: torch.dtype, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed + vocab)
    z = (torch.randn(rows, vocab, generator=rng) * spread).to(dtype)
    y = torch.randint(0, vocab, (rows,), generator=rng)
    if rows > 2:
        y[1] = -100
    return z, y


def weighted(z, y, out, *, ref=None, sign=1.0, p_pow=0.0, q_pow=0.0, beta=0.0, coef=1.0, scale=1.0, softcap=0.0):
    return ops.weighted_rows(z, y, ref, sign, p_pow, q_pow, beta, one(coef), scale, softcap, out)


def poisoned(z: Tensor) -> Tensor:
    return torch.full_like(z, math.nan)


def literal_kl(z, r, y, coef, scale, softcap, ref_scale, ref_softcap, dtype):
    x = z.to(dtype, copy=True).requires_grad_()
    log_p = torch.log_softmax(effective(x, scale, softcap), 1)
    log_q = torch.log_softmax(effective(r.to(dtype), ref_scale, ref_softcap), 1)
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q - log_p).masked_fill(q == 0, 0.0), 0.0)
    kl = torch.where(y >= 0, terms.sum(1), 0.0)
    # Written out: autograd through masked entries would give NaN.
    slope = scale * (1 - torch.tanh(scale * x / softcap) ** 2) if softcap > 0 else torch.full_like(x, scale)
    grad = torch.where((y >= 0)[:, None], coef * (log_p.exp() - q) * slope, 0.0).detach()
    return kl.detach(), grad if dtype == torch.float64 else grad.to(z.dtype)
