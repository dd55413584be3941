"""``token_kl``: KL(reference || model) over valid tokens from logits, gradient in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX, check_reduction, check_rows
from gfast.ops.derivatives import check_literal_labels, wants_literal
from gfast.ops.dispatch import kernel, select
from gfast.ops.gradients import kept_scale, with_gradients
from gfast.ops.labels import label_factor
from gfast.ops.memory import fresh
from gfast.ops.reductions import Tokens
from gfast.ops.registration import python_op
from gfast.ops.token_logp import capped, finite_slope, stats_dtype, unit_stride


def token_kl_reference(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """The literal definition per token, differentiable by autograd, 0 where ignored. In fp64: in fp32 the rounding of
    its terms, 1e-7, is more than the KL of a model that has hardly moved. A q below the least fp32 number is 0 all the
    same, and adds nothing where the model has masked the entry."""
    dtype = stats_dtype(logits.dtype)
    log_p = torch.log_softmax(logits.double(), dim=-1)  # [..., V]
    log_q = torch.log_softmax(ref_logits.double(), dim=-1)
    q = log_q.exp()
    terms = torch.where(q < torch.finfo(dtype).tiny, 0.0, q * (log_q - log_p))
    return torch.where(labels != IGNORE_INDEX, terms.sum(-1), 0.0).to(dtype)


def _kl_rows_reference(logits, ref_logits, labels, factor, scale, softcap, ref_scale, ref_softcap, out) -> Tensor:
    z = capped(logits, scale, softcap)
    ref_z = capped(ref_logits, ref_scale, ref_softcap).to(z.dtype)
    kl = token_kl_reference(z, ref_z, labels)
    if out is not None:
        delta = (torch.softmax(z.double(), -1) - torch.softmax(ref_z.double(), -1)).to(z.dtype)
        gradient = factor * delta * finite_slope(z, scale, softcap)
        out.copy_(torch.where((labels != IGNORE_INDEX)[:, None], gradient, 0.0))
    return kl


def kl_rows(logits, ref_logits, labels, factor, scale, softcap, ref_scale, ref_softcap, out, impl: str) -> Tensor:
    """KL [N] of logits against ref_logits, both [N, V]; ``out`` (may be logits; None: not wanted) gets factor (0-dim)
    * d KL_i / d logits."""
    impl = select("token_kl", impl, logits.device, logits.dtype)
    launch = _kl_rows_reference if impl == "reference" else kernel("kl_rows", impl)
    return launch(logits, ref_logits, labels, factor, scale, softcap, ref_scale, ref_softcap, out)


def fake_values(logits, *rest):
    """Values [N] and a gradient [N, V] for tracing; the last two arguments of the op are with_grad and impl."""
    rows, vocab = logits.shape
    return logits.new_empty(rows, dtype=stats_dtype(logits.dtype)), logits.new_empty(rows if rest[-2] else 0, vocab)


@python_op("token_kl", fake_values)
def _token_kl(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, factor: Tensor, with_grad: bool, impl: str
) -> tuple[Tensor, Tensor]:
    impl = select("token_kl", impl, logits.device, logits.dtype)
    label_factor("token_kl", labels, logits.shape[1], stats_dtype(logits.dtype), impl)
    gradient = fresh((logits.shape[0] if with_grad else 0, logits.shape[1]), logits.dtype, logits.device)
    out = gradient if with_grad else None
    kl = kl_rows(unit_stride(logits), unit_stride(ref_logits), labels, factor, 1.0, 0.0, 1.0, 0.0, out, impl)
    return kl, gradient


def kl_factor(name: str, labels: Tensor, reduction: str, normalizer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat labels [N] and the 0-dim factor of the sum over tokens."""
    check_reduction(name, reduction)
    if reduction == "none":
        raise ValueError(f"gfast: {name}: reduction 'none' is not offered; use 'token_mean', 'sequence_mean' or 'sum'.")
    tokens = Tokens.of(name, labels, None, "token", reduction)
    return tokens.labels, tokens.factor(reduction, normalizer, dtype)


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
        normalizer: replaces the count. impl: "auto", "reference", "cpp" or "triton". Second derivatives, forward mode
            and torch.func's transforms take "reference"; elsewhere they raise RuntimeError.

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
    flat, factor = kl_factor(name, labels, reduction, normalizer, stats_dtype(logits.dtype))
    vocab, ref_logits = logits.shape[-1], ref_logits.detach()

    def literal(logits: Tensor) -> Tensor:
        return token_kl_reference(logits, ref_logits, labels).sum() * factor

    if wants_literal(name, impl, logits):
        check_literal_labels(name, flat, vocab)
        return literal(logits)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    inner, late = kept_scale(factor, logits.dtype) if wanted else (factor, None)
    rows, ref_rows = logits.detach().reshape(-1, vocab), ref_logits.reshape(-1, vocab)
    kl, gradient = _token_kl(rows, ref_rows, flat, inner, wanted, impl)
    if not wanted:
        return kl.sum() * factor
    defined = literal if impl == "reference" else None
    return with_gradients(name, kl.sum(), factor, [logits], [gradient.view(logits.shape)], late, defined)
