"""``soft_target_loss``: the divergence of a model from a target over the vocabulary; its gradient, softmax(z) - q but
for Jensen and Shannon's, in the same pass.

The target q is the softmax of other logits, with the label's entry lowered: a reference model's, or the model's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX, check_like_labels, check_rows, reads_are_free, runs_now
from gfast.ops.derivatives import check_literal_labels, wants_literal
from gfast.ops.dispatch import kernel, select
from gfast.ops.gradients import kept_scale, with_gradients
from gfast.ops.labels import label_factor
from gfast.ops.memory import fresh
from gfast.ops.registration import python_op
from gfast.ops.token_kl import fake_values, kl_factor, token_kl_reference
from gfast.ops.token_logp import capped, finite_slope, stats_dtype, unit_stride

KINDS = ("kl", "cross_entropy", "js")  # as kernels number them


def lowered(logits: Tensor, labels: Tensor, beta: Tensor) -> Tensor:
    """Logits [..., V] with beta [...] taken off the label's entry; where ignored, as they are."""
    beta = torch.where(labels != IGNORE_INDEX, beta.to(logits.dtype), 0.0)
    hit = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    return torch.where(hit, logits - beta.unsqueeze(-1), logits)


def soft_target_reference(logits: Tensor, target: Tensor, labels: Tensor, beta: Tensor, kind: str) -> Tensor:
    """The literal definition per token, differentiable by autograd, 0 where ignored; fp64 as ``token_kl_reference``."""
    target = lowered(target, labels, beta)
    if kind == "kl":
        return token_kl_reference(logits, target, labels)
    dtype = stats_dtype(logits.dtype)
    tiny = torch.finfo(dtype).tiny
    log_p, log_q = torch.log_softmax(logits.double(), -1), torch.log_softmax(target.double(), -1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "cross_entropy":
        terms = torch.where(q < tiny, 0.0, -q * log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
        terms = 0.5 * (
            torch.where(p < tiny, 0.0, p * (log_p - log_m)) + torch.where(q < tiny, 0.0, q * (log_q - log_m))
        )
    return torch.where(labels != IGNORE_INDEX, terms.sum(-1), 0.0).to(dtype)


def _soft_rows_reference(logits, target, labels, lower, factor, kind, scale, softcap, t_scale, t_softcap, out):
    z = capped(logits, scale, softcap)
    goal = capped(target, t_scale, t_softcap).to(z.dtype)
    value = soft_target_reference(z, goal, labels, lower, KINDS[kind])
    if out is not None:
        log_p = torch.log_softmax(z.double(), -1)
        log_q = torch.log_softmax(lowered(goal, labels, lower).double(), -1)
        p, q = log_p.exp(), log_q.exp()
        delta = p - q
        if KINDS[kind] == "js":
            h = torch.where(p == 0, 0.0, 0.5 * (math.log(2.0) - torch.logaddexp(torch.zeros_like(p), log_q - log_p)))
            delta = p * (h - (p * h).sum(-1, keepdim=True))
        gradient = factor * delta.to(z.dtype) * finite_slope(z, scale, softcap)
        out.copy_(torch.where((labels != IGNORE_INDEX)[:, None], gradient, 0.0))
    return value


def soft_rows(logits, target, labels, lower, factor, kind: int, form: list[float], out, impl: str) -> Tensor:
    """Divergence [N] of logits from the target's, both [N, V] and possibly one tensor, with ``lower`` [N] taken off the
    target's label entry; ``out`` (may be logits; None: not wanted) gets factor (0-dim) * its gradient. ``kind``:
    of ``KINDS``. ``form``: scale, softcap of the logits, then of the target's."""
    impl = select("soft_target_loss", impl, logits.device, logits.dtype)
    launch = _soft_rows_reference if impl == "reference" else kernel("soft_rows", impl)
    return launch(logits, target, labels, lower, factor, kind, *form, out)


@python_op("soft_target", fake_values)
def _soft_target(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor,
    lower: Tensor,
    factor: Tensor,
    kind: int,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    name = "soft_target_loss"
    impl = select(name, impl, logits.device, logits.dtype)
    label_factor(name, labels, logits.shape[1], stats_dtype(logits.dtype), impl)
    gradient = fresh((logits.shape[0] if with_grad else 0, logits.shape[1]), logits.dtype, logits.device)
    rows = unit_stride(logits)
    goal = rows if target is None else unit_stride(target)
    out = gradient if with_grad else None
    return soft_rows(rows, goal, labels, lower, factor, kind, [1.0, 0.0, 1.0, 0.0], out, impl), gradient


def kind_number(name: str, kind: str) -> int:
    if kind not in KINDS:
        raise ValueError(f"gfast: {name}: kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}.")
    return KINDS.index(kind)


def lowering(name: str, beta: float | Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """beta as one number a label, [N]; a tensor is looked at where that costs no waiting."""
    if not isinstance(beta, Tensor):
        if not float(beta) >= 0:
            raise ValueError(
                f"gfast: {name}: beta must be >= 0 (inf takes the label out of the target q), not {float(beta)}."
            )
        return torch.full((labels.numel(),), float(beta), dtype=dtype, device=labels.device)
    check_like_labels(name, "beta", beta, labels)
    flat = beta.detach().reshape(-1).to(dtype)
    if runs_now(flat) and reads_are_free(flat.device):
        bad = ~(flat >= 0) & (labels.reshape(-1) != IGNORE_INDEX)
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise ValueError(
                f"gfast: {name}: beta must be >= 0 (inf takes the label out of the target q), but beta[{where}] "
                f"(flattened) is {float(flat[where])}."
            )
    return flat.contiguous()


def log_of_probabilities(name: str, q: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """log q [..., V] in that dtype, after a check that q is a distribution wherever a label counts."""
    if runs_now(q) and reads_are_free(q.device):
        sums, least = q.sum(-1, dtype=torch.float64), q.amin(-1)
        allowed = max(1e-4, 2 * torch.finfo(q.dtype).eps)
        bad = ~((sums - 1).abs() <= allowed) | ~(least >= 0)
        bad = (bad & (labels != IGNORE_INDEX)).reshape(-1)
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise ValueError(
                f"gfast: {name}: the target q must be probabilities that sum to one, but row {where} (flattened) sums "
                f"to {float(sums.reshape(-1)[where]):.6g} and its least entry is "
                f"{float(least.reshape(-1)[where]):.3g}; pass q / q.sum(-1, keepdim=True), or logits with "
                f"probabilities=False."
            )
    return q.to(torch.promote_types(stats_dtype(q.dtype), dtype)).log().to(dtype)


def soft_target_loss(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor,
    *,
    beta: float | Tensor = 0.0,
    kind: str = "cross_entropy",
    probabilities: bool = False,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Divergence of a model from a soft target over the vocabulary, from logits.

    .. math:: L = -\frac1N \sum_i \sum_v q_{iv} \log p_{iv}, \quad q_i = \mathrm{softmax}(x_i - \beta_i e_{y_i}), \quad
        \nabla_{z_i} L = \frac1N (p_i - q_i)

    with x the logits of a reference model, or z itself: a target is a constant, whatever it is made of. UNDIAL, CE-U,
    SHRED and JensUn's retain loss are its cases.

    Args:
        logits: [..., V], fp32, bf16, fp16 (fp64: reference).
        target: x, of the shape, dtype and device of logits. None: logits themselves, detached.
        labels: [...], int64: the entry y that beta lowers; -100 does not count.
        beta: >= 0, a number or [...]; inf takes the label out of q.
        kind: "cross_entropy"; "kl", KL(q || p), which is less by the entropy of q and has the same gradient; or "js",
            the Jensen-Shannon divergence in nats, with the gradient :math:`p (h - \sum_v p_v h_v)`, :math:`h = \frac12
            \log \frac{2 p}{p + q}`.
        probabilities: target is q itself, in any floating dtype; rows must sum to one (to 1e-4, or two roundings of its
            dtype), and are divided by what they sum to. beta then lowers log q.
        reduction, normalizer, impl: as ``token_kl``.

    Returns:
        0-dim fp32 (fp64) loss, differentiable with respect to logits only.

    Raises:
        ValueError, TypeError: mismatched shapes, dtypes or devices, labels outside the vocabulary, a negative beta, a q
        that does not sum to one, an unknown kind, an unavailable ``impl``.

    Source: arXiv 2402.10052 (UNDIAL), 2503.01224 (CE-U), 2605.07482 (SHRED), 2509.02820 (JensUn).

    Example:
        >>> import torch, gfast
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> loss = gfast.soft_target_loss(logits, torch.zeros(2, 4), torch.tensor([1, -100]), beta=float("inf"))
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in logits.grad[0].tolist()]
        (1.3863, [-0.0833, 0.25, -0.0833, -0.0833])
    """
    name = "soft_target_loss"
    check_rows(name, logits, labels)
    number, dtype, vocab = kind_number(name, kind), stats_dtype(logits.dtype), logits.shape[-1]
    if target is not None:
        if target.shape != logits.shape or target.device != logits.device:
            raise ValueError(
                f"gfast: {name}: target {tuple(target.shape)} on {target.device} does not match logits "
                f"{tuple(logits.shape)} on {logits.device}."
            )
        if not target.is_floating_point():
            raise TypeError(f"gfast: {name}: target must be floating point, not {target.dtype}.")
        if target.dtype != logits.dtype and not probabilities:
            raise TypeError(f"gfast: {name}: target is {target.dtype} but logits {logits.dtype}; cast one of them.")
        target = log_of_probabilities(name, target.detach(), labels, dtype) if probabilities else target.detach()
    elif probabilities:
        raise ValueError(f"gfast: {name}: probabilities=True needs the target q, not None.")
    flat, factor = kl_factor(name, labels, reduction, normalizer, dtype)
    lower = lowering(name, beta, labels, dtype)

    def literal(logits: Tensor) -> Tensor:
        goal = logits.detach() if target is None else target
        return soft_target_reference(logits, goal, labels, lower.view(labels.shape), kind).sum() * factor

    if wants_literal(name, impl, logits):
        check_literal_labels(name, flat, vocab)
        return literal(logits)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    inner, late = kept_scale(factor, logits.dtype) if wanted else (factor, None)
    rows = logits.detach().reshape(-1, vocab)
    goal = None if target is None else target.reshape(-1, vocab)
    value, gradient = _soft_target(rows, goal, flat, lower, inner, number, wanted, impl)
    if not wanted:
        return value.sum() * factor
    defined = literal if impl == "reference" else None
    return with_gradients(name, value.sum(), factor, [logits], [gradient.view(logits.shape)], late, defined)
