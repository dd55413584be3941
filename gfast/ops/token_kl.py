"""``token_kl`` and ``linear_token_kl``: KL(reference || model) over valid tokens, gradient in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.backend import extension, select
from gfast.ops.common import (
    IGNORE_INDEX,
    check_label_range,
    check_reduction,
    check_rows,
    coef_scale,
    default_chunk_rows,
    fresh,
    row_chunks,
    scaled,
    sequence_layout,
)
from gfast.ops.head import ChunkedHead, check_cap, fake_gradients, finished_gradients, prepare_head, valid_rows
from gfast.ops.token_logp import cap_slope, capped, stats_dtype, unit_stride
from gfast.ops.vocab_parallel import is_sharded


def token_kl_reference(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """The literal definition per token, differentiable by autograd, 0 where ignored."""
    log_p = torch.log_softmax(capped(logits, 1.0, 0.0), dim=-1)  # [..., V]
    log_q = torch.log_softmax(capped(ref_logits, 1.0, 0.0), dim=-1)
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
    return torch.where(labels != IGNORE_INDEX, terms.sum(-1), 0.0)


def _kl_rows_reference(logits, ref_logits, labels, factor, scale, softcap, ref_scale, ref_softcap, out) -> Tensor:
    z = capped(logits, scale, softcap)
    ref_z = capped(ref_logits, ref_scale, ref_softcap).to(z.dtype)
    kl = token_kl_reference(z, ref_z, labels)
    if out is not None:
        delta = torch.softmax(z, -1) - torch.softmax(ref_z, -1)
        slope = torch.where(torch.isfinite(z), cap_slope(z, scale, softcap), 0.0) if softcap > 0 else scale
        out.copy_(torch.where((labels != IGNORE_INDEX)[:, None], factor * delta * slope, 0.0))
    return kl


def kl_rows(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    factor: Tensor,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    out: Tensor | None,
    impl: str,
) -> Tensor:
    """KL [N] of logits against ref_logits, both [N, V]; ``out`` (may be logits) gets factor * d KL_i / d logits."""
    impl = select("token_kl", impl, logits.device, logits.dtype)
    arguments = (logits, ref_logits, labels, factor, scale, softcap, ref_scale, ref_softcap, out)
    if impl == "cpp":
        extension()
        return torch.ops.gfast.kl_rows(*arguments)
    if impl == "triton":
        from gfast.kernels import kl

        return kl.kl_rows(*arguments)
    return _kl_rows_reference(*arguments)


@torch.library.custom_op("gfast::token_kl", mutates_args=())
def _token_kl(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, factor: Tensor, with_grad: bool, impl: str
) -> tuple[Tensor, Tensor]:
    check_label_range("token_kl", labels, logits.shape[1])
    shape = logits.shape if with_grad else (0, logits.shape[1])
    out = fresh(tuple(shape), logits.dtype, logits.device)
    target = out if with_grad else None
    kl = kl_rows(unit_stride(logits), unit_stride(ref_logits), labels, factor, 1.0, 0.0, 1.0, 0.0, target, impl)
    return kl, out


@_token_kl.register_fake
def _(logits, ref_logits, labels, factor, with_grad, impl):
    out = torch.empty((logits.shape[0] if with_grad else 0, logits.shape[1]), dtype=logits.dtype, device=logits.device)
    return logits.new_empty(logits.shape[0], dtype=stats_dtype(logits.dtype)), out


@torch.library.custom_op("gfast::linear_token_kl", mutates_args=())
def _linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    scale: float,
    softcap: float,
    chunk_rows: int,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_label_range("linear_token_kl", labels, weight.shape[0])
    order = valid_rows(labels)
    head = ChunkedHead(hidden, weight, bias, labels, chunk_rows, order)
    ref = ChunkedHead(ref_hidden, ref_weight, ref_bias, labels, chunk_rows, order)
    kl = hidden.new_empty(head.rows, dtype=stats_dtype(hidden.dtype))
    head.start_gradients(*need)
    wanted = any(need)
    for start, stop in row_chunks(head.rows, head.chunk):
        rows, part = head.logits(start, stop), slice(start, stop)
        out = rows if wanted else None
        kl[part] = kl_rows(
            rows, ref.logits(start, stop), head.labels[part], factor, scale, softcap, scale, softcap, out, impl
        )
        if wanted:
            head.add_gradients(start, stop, rows)
    return head.scatter(kl), *head.gradients()


@_linear_token_kl.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, factor, scale, softcap, chunk_rows, impl, need):
    return hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden.dtype)), *fake_gradients(
        hidden, weight, tuple(need)
    )


class _KLLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, labels, factor, impl):
        kl, grad = torch.ops.gfast.token_kl(logits, ref_logits, labels, factor, ctx.needs_input_grad[0], impl)
        ctx.save_for_backward(grad)
        ctx.set_materialize_grads(False)
        return kl.sum() * factor

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return None, None, None, None, None
        return scaled(ctx, ctx.saved_tensors[0], grad_loss), None, None, None, None


class _LinearKLLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, factor, scale, softcap, chunk, impl
    ):
        need = [bool(flag) for flag in ctx.needs_input_grad[:3]]
        late = hidden.dtype == torch.float16  # see linear_unlearn_loss
        inner = torch.ones_like(factor) if late else factor
        kl, *grads = torch.ops.gfast.linear_token_kl(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, inner, scale, softcap, chunk, impl, need
        )
        ctx.save_for_backward(factor if late else None, *grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return kl.sum() * factor

    @staticmethod
    def backward(ctx, grad_loss):
        nothing = (None,) * 12
        if grad_loss is None:
            return nothing
        late, *grads = ctx.saved_tensors
        return (*finished_gradients(ctx, grads, grad_loss, late), *nothing[3:])


def _factor(name: str, labels: Tensor, reduction: str, normalizer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_reduction(name, reduction)
    if reduction == "none":
        raise ValueError(f"gfast: {name}: reduction 'none' is not offered; use 'token_mean', 'sequence_mean' or 'sum'.")
    flat = labels.reshape(-1).long()
    ids, count = sequence_layout(name, labels, None)
    return flat, coef_scale(flat != IGNORE_INDEX, reduction, normalizer, ids, count, dtype=dtype)


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""KL divergence of the model from the reference, over valid tokens.

    .. math:: L = \frac1N \sum_i \sum_v q_{iv} (\log q_{iv} - \log p_{iv}), \quad q =
    \mathrm{softmax}(\text{ref\_logits})

    Args:
        logits, ref_logits: [..., V], fp32, bf16, fp16 (fp64: reference).
        labels: [...], int64; only says which positions count (-100 does not).
        reduction: "token_mean", "sequence_mean" (sum over tokens, mean over sequences) or "sum".
        normalizer: replaces the count. impl: "auto", "reference", "cpp" or "triton".

    Returns:
        0-dim fp32 (fp64) loss, differentiable with respect to logits only.

    Raises:
        ValueError, TypeError: mismatched shapes, dtypes or devices, labels outside the vocabulary, an unavailable
        ``impl``.

    Source: arXiv 2502.19301, appendix; Maini et al., arXiv 2401.06121.

    Example:
        >>> import torch, gfast
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> gfast.token_kl(logits, torch.zeros(2, 4), torch.tensor([1, -100])).item()
        0.0
    """
    name = "token_kl"
    check_rows(name, logits, labels)
    if ref_logits.shape != logits.shape or ref_logits.device != logits.device:
        raise ValueError(
            f"gfast: {name}: ref_logits {tuple(ref_logits.shape)} on {ref_logits.device} do not match logits "
            f"{tuple(logits.shape)} on {logits.device}."
        )
    if ref_logits.dtype != logits.dtype:
        raise TypeError(
            f"gfast: {name}: ref_logits are {ref_logits.dtype} but logits {logits.dtype}; cast one of them."
        )
    flat, factor = _factor(name, labels, reduction, normalizer, stats_dtype(logits.dtype))
    vocab = logits.shape[-1]
    return _KLLoss.apply(logits.reshape(-1, vocab), ref_logits.detach().reshape(-1, vocab), flat, factor, impl)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""``token_kl`` from hidden states and heads of the model and the reference; no tensor of size [N, V] exists.

    .. math:: L = \frac1N \sum_i \mathrm{KL}(\mathrm{softmax}(W_o h_{o,i} + b_o) \,\|\, \mathrm{softmax}(W h_i + b))

    Args:
        hidden: [..., D]. weight: [V, D]. ref_hidden: [..., D_o]. ref_weight: [V, D_o]. bias, ref_bias: [V] or None.
        labels: [...], int64; only says which positions count.
        logit_scale, softcap: of both heads.
        reduction, normalizer, impl: as ``token_kl``. chunk_rows: rows of logits held at a time, of each head.

    Returns:
        0-dim loss, differentiable with respect to hidden, weight and bias.

    Raises:
        ValueError, TypeError: as ``token_kl``, and heads that do not match their hidden states or each other.

    Source: arXiv 2502.19301, appendix.

    Example:
        >>> import torch, gfast
        >>> h, w = torch.zeros(2, 3), torch.ones(4, 3)
        >>> gfast.linear_token_kl(h, w, h, w, torch.tensor([1, -100])).item()
        0.0
    """
    name = "linear_token_kl"
    if is_sharded(weight) or is_sharded(ref_weight):
        raise TypeError(f"gfast: {name}: vocabulary-parallel heads are not supported; gather them with full_tensor().")
    hidden, weight, bias = prepare_head(name, hidden, weight, bias, labels)
    ref_hidden, ref_weight = ref_hidden.detach().to(hidden.dtype), ref_weight.detach().to(hidden.dtype)
    ref_bias = None if ref_bias is None else ref_bias.detach().to(hidden.dtype)
    ref_hidden, ref_weight, ref_bias = prepare_head(name, ref_hidden, ref_weight, ref_bias, labels)
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"gfast: {name}: the heads have different vocabularies: {weight.shape[0]} and {ref_weight.shape[0]}."
        )
    flat, factor = _factor(name, labels, reduction, normalizer, stats_dtype(hidden.dtype))
    return _LinearKLLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        ref_bias,
        flat,
        factor,
        float(logit_scale),
        check_cap(name, softcap),
        chunk_rows or default_chunk_rows(*weight.shape, hidden.device),
        impl,
    )
