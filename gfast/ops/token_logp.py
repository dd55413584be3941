"""``token_logp``: log-probs of the labels from logits, with a backward that recomputes instead of storing [N, V]."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX, check_rows
from gfast.ops.derivatives import check_literal_labels, differentiable_once, wants_literal
from gfast.ops.dispatch import kernel, select
from gfast.ops.labels import label_factor
from gfast.ops.memory import fresh
from gfast.ops.registration import python_op


def token_logp_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """The literal definition, differentiable by autograd: log softmax, gather, 0 where ignored."""
    valid = labels != IGNORE_INDEX
    log_probs = torch.log_softmax(capped(logits, 1.0, 0.0), dim=-1)  # [..., V]
    picked = log_probs.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(valid, picked, 0.0)


def capped(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """softcap * tanh(scale * z / softcap), or scale * z without a cap, in fp32 (fp64 for fp64 logits)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * scale
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def cap_slope(z: Tensor, scale: float, softcap: float) -> Tensor | float:
    """d capped / d logits, from the capped value."""
    return scale * (1 - (z / softcap) ** 2) if softcap > 0 else scale


def finite_slope(z: Tensor, scale: float, softcap: float) -> Tensor | float:
    """``cap_slope``, 0 where the capped value is not finite."""
    return torch.where(torch.isfinite(z), cap_slope(z, scale, softcap), 0.0) if softcap > 0 else scale


def _logp_rows_reference(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    z = capped(logits, scale, softcap)  # [N, V]
    if z.shape[0] == 0:
        return z.new_zeros(0), z.new_zeros(0, 2)
    valid = labels != IGNORE_INDEX
    target = labels.clamp(min=0)[:, None]
    top = z.max(dim=-1, keepdim=True).values
    others = torch.exp(z - top).scatter(1, target, 0.0).sum(-1)  # [N]
    z_target = z.gather(1, target)[:, 0] - top[:, 0]
    log_total = torch.where(z_target == 0, torch.log1p(others), torch.log(others + torch.exp(z_target)))
    logp = torch.where(valid, z_target - log_total, 0.0)
    return logp, torch.stack([top[:, 0], log_total], dim=1)


def _logp_rows_grad_reference(logits, labels, logp, stats, coef, scale: float, softcap: float, out: Tensor) -> None:
    if logits.shape[0] == 0:
        return
    z = capped(logits, scale, softcap)  # [N, V]
    valid = (labels != IGNORE_INDEX)[:, None]
    probs = torch.exp((z - stats[:, :1]) - stats[:, 1:])
    # the target entry is 1 - p, formed before any rounding: where p is near 1 it is all the signal there is
    delta = (-probs).scatter(1, labels.clamp(min=0)[:, None], -torch.expm1(logp)[:, None])
    out.copy_(torch.where(valid, coef[:, None] * delta * finite_slope(z, scale, softcap), 0.0))


def logp_rows(logits: Tensor, labels: Tensor, scale: float, softcap: float, impl: str) -> tuple[Tensor, Tensor]:
    """logp [N] and softmax statistics [N, 2] (maximum, log of the sum relative to it) of logits [N, V]."""
    impl = select("token_logp", impl, logits.device, logits.dtype)
    if impl == "reference":
        return _logp_rows_reference(logits, labels, scale, softcap)
    return kernel("logp_rows", impl)(logits, labels, scale, softcap)


def logp_rows_grad(logits, labels, logp, stats, coef, scale: float, softcap: float, out: Tensor, impl: str) -> None:
    """out [N, V] = coef_i * d logp_i / d logits from what ``logp_rows`` gives and coef [N]; ``out`` may be ``logits``
    itself."""
    impl = select("token_logp", impl, logits.device, logits.dtype)
    launch = _logp_rows_grad_reference if impl == "reference" else kernel("logp_rows_grad", impl)
    launch(logits, labels, logp, stats, coef, scale, softcap, out)


def logp_columns_grad(logits, labels, first: int, logp, stats, coef, scale: float, softcap: float, impl: str) -> None:
    """Overwrites logits [N, t] of the vocabulary entries first to first + t with coef_i * d logp_i / d logits.

    logp and statistics are those of whole rows, labels int64 [N] those of the whole vocabulary.
    """
    local, foreign = local_labels(labels, first, logits.shape[1])
    z = capped(logits[:, 0].clone(), scale, softcap)
    logp_rows_grad(logits, local, logp, stats, coef, scale, softcap, logits, impl)
    # column 0 stood in for labels elsewhere: there it is a column like the others
    m, log_total = stats.unbind(1)
    column = -coef * torch.exp((z - m) - log_total) * cap_slope(z, scale, softcap)
    logits[:, 0] = torch.where(foreign, column.to(logits.dtype), logits[:, 0])


def local_labels(labels: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Labels relative to the vocabulary entries first to first + size, 0 for those elsewhere; and which are those."""
    valid = labels != IGNORE_INDEX
    foreign = valid & ((labels < first) | (labels >= first + size))
    return torch.where(valid, torch.where(foreign, 0, labels - first), IGNORE_INDEX), foreign


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(logits: Tensor) -> Tensor:
    """Kernels read rows with stride 1 along the vocabulary; anything else is copied once."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def fake_logp(logits: Tensor, *_) -> tuple[Tensor, Tensor]:
    """logp [N] and statistics [N, 2] of logits or hidden states [N, ...] for tracing."""
    dtype, rows = stats_dtype(logits.dtype), logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((rows, 2), dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    logits, labels, ctx.impl = inputs
    ctx.name, (logp, stats) = "token_logp", output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, stats, logp)


def _literal(ctx):
    if ctx.impl != "reference":
        return None
    logits, labels, *_ = ctx.saved_tensors
    return token_logp_reference(logits, labels), [logits]


@differentiable_once(_literal)
def _backward(ctx, grad_logp: Tensor | None, _grad_stats: Tensor | None):
    if grad_logp is None:
        return None, None, None
    logits, labels, stats, logp = ctx.saved_tensors
    return label_logp_gradient(logits, labels, logp, stats, grad_logp, ctx.impl), None, None


@python_op("token_logp", fake_logp, _setup, _backward)
def label_logp(logits: Tensor, labels: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """``logp_rows`` of logits of any strides, after a check of the labels."""
    impl = select("token_logp", impl, logits.device, logits.dtype)
    if impl != "cpp":  # which checks for itself
        label_factor("token_logp", labels, logits.shape[1], stats_dtype(logits.dtype), impl)
    return logp_rows(unit_stride(logits), labels, 1.0, 0.0, impl)


def _fake_gradient(logits: Tensor, *_) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@python_op("token_logp_backward", _fake_gradient)
def label_logp_gradient(logits: Tensor, labels: Tensor, logp: Tensor, stats: Tensor, coef: Tensor, impl: str) -> Tensor:
    """[N, V], coef_i * d logp_i / d logits, in memory of its own."""
    out = fresh(tuple(logits.shape), logits.dtype, logits.device)
    # .sum() sends a stride-0 gradient: the kernels read coef as a plain vector
    logp_rows_grad(unit_stride(logits), labels, logp, stats, coef.to(logp.dtype).contiguous(), 1.0, 0.0, out, impl)
    return out


def token_logp(logits: Tensor, labels: Tensor, *, impl: str = "auto") -> Tensor:
    r"""Log-probability of each label.

    .. math:: \mathrm{logp}_i = z_{i, y_i} - \log \sum_j e^{z_{ij}}

    Args:
        logits: [..., V], fp32, bf16, fp16 (fp64: reference); ``logits[..., i, :]`` scores ``labels[..., i]``.
        labels: [...], int64; -100 is ignored.
        impl: "auto", "reference", "cpp" or "triton". Second derivatives, forward mode and torch.func's transforms take
            "reference"; elsewhere they raise RuntimeError.

    Returns:
        [...], fp32 (fp64 for fp64 logits), 0 where ignored; differentiable with respect to logits. The backward
        recomputes the softmax, so nothing of size [N, V] is kept besides the logits.

    Raises:
        ValueError: a label outside [0, V) that is not -100; shapes or devices that do not match; an unavailable
            ``impl``.
        TypeError: logits that are not floating point or labels that are not integers.

    Source: arXiv 2502.19301, section 2.

    Example:
        >>> import torch, gfast
        >>> gfast.token_logp(torch.zeros(2, 4), torch.tensor([1, -100])).exp()
        tensor([0.2500, 1.0000])
    """
    check_rows("token_logp", logits, labels)
    if wants_literal("token_logp", impl, logits):
        check_literal_labels("token_logp", labels, logits.shape[-1])
        return token_logp_reference(logits, labels)
    logp, _ = label_logp(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long(), impl)
    return logp.reshape(labels.shape)
