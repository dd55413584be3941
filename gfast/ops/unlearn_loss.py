"""``unlearn_loss``: an unlearning objective from logits; weights, log-probs, loss and gradient in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops import stat_loss
from gfast.ops.checks import IGNORE_INDEX, check_rows, raise_if_not_finite
from gfast.ops.derivatives import check_literal_labels, wants_literal
from gfast.ops.dispatch import kernel, select
from gfast.ops.gradients import kept_scale, with_gradients
from gfast.ops.held_rows import select_rows
from gfast.ops.inplace import Overwritten
from gfast.ops.labels import label_factor
from gfast.ops.memory import fresh
from gfast.ops.reductions import LossOutput
from gfast.ops.registration import python_op
from gfast.ops.stat_spec import stat_spec_of
from gfast.ops.token_logp import (
    _logp_rows_grad_reference,
    _logp_rows_reference,
    capped,
    label_logp,
    label_logp_gradient,
    logp_rows_grad,
    stats_dtype,
    token_logp,
    token_logp_reference,
    unit_stride,
)
from gfast.ops.weights import Terms, WeightSpec, token_weights


def unlearn_loss_reference(logits, labels, objective, ref_logp=None, reduction=None, weight=None) -> LossOutput:
    """The literal definition for leading-dimension sequences, differentiable by autograd; never optimised."""
    terms = Terms.of("unlearn_loss", objective, labels, ref_logp, reduction, weight=weight)
    logp = token_logp_reference(logits, labels).reshape(-1)
    weight, value = terms.weigh(logp.detach(), terms.reference(logp.dtype))
    factor = terms.factor(logp.dtype)
    surrogate = (weight * logp).sum() * factor
    # the difference first: the sum would take the digits of a value far below it (NPO's, once a text is forgotten)
    loss = value.sum() * factor + (surrogate - surrogate.detach())
    return terms.output(loss, logp.detach(), weight)


def _log_others(z: Tensor, labels: Tensor, logp: Tensor) -> Tensor:
    """log(1 - p) [N] from effective logits [N, V]: from logp, unless the label is so far above the others that only
    their logits tell."""
    target = labels.clamp(min=0)[:, None]
    lost = torch.logsumexp(z.scatter(1, target, -torch.inf), -1) - z.gather(1, target)[:, 0]  # log((1 - p) / p)
    return torch.where((logp > -1e-20) & (lost < -40), lost, torch.log(-torch.expm1(logp)))


def _weighted_rows_reference(logits, labels, ref_logp, spec: WeightSpec, factor, scale, softcap, out):
    logp, stats = _logp_rows_reference(logits, labels, scale, softcap)
    others = _log_others(capped(logits, scale, softcap), labels, logp) if spec.q_pow else None
    weight = torch.where(labels != IGNORE_INDEX, token_weights(spec, logp, ref_logp, others), 0.0)
    if out is not None:
        _logp_rows_grad_reference(logits, labels, logp, stats, weight * factor, scale, softcap, out)
    return logp, weight


def weighted_rows(
    logits: Tensor, labels: Tensor, ref_logp, spec: WeightSpec, factor, scale: float, softcap: float, out, impl: str
) -> tuple[Tensor, Tensor]:
    """logp [N] and token-level weights [N] of logits [N, V]; ``out`` (may be logits; None: not wanted) gets factor
    (0-dim, or one a row [N]) * w_i * d logp_i / d logits. ``impl`` is one that serves them, not "auto"."""
    if impl == "reference":
        return _weighted_rows_reference(logits, labels, ref_logp, spec, factor, scale, softcap, out)
    numbers = (spec.sign, spec.p_pow, spec.q_pow, spec.beta if spec.uses_ref else 0.0)
    return kernel("weighted_rows", impl)(logits, labels, ref_logp, *numbers, factor, scale, softcap, out)


def _fake_rows(logits, labels, ref_logp, numbers, factor, with_grad, impl, given=None):
    dtype, (rows, vocab) = stats_dtype(logits.dtype), logits.shape
    per_row = logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)
    return *per_row, logits.new_empty(rows if with_grad else 0, vocab), logits.new_empty((), dtype=dtype)


@python_op("unlearn_rows", _fake_rows)
def _unlearn_rows(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None,
    numbers: list[float],
    factor: Tensor | None,
    with_grad: bool,
    impl: str,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``weighted_rows`` of logits of any strides, after a check of the labels, times the weights given [N] if any; the
    gradient (empty if unwanted) at ``kept_scale``; and the factor, which is that of the mean over the labels where none
    is given."""
    chosen = select("unlearn_loss", impl, logits.device, logits.dtype)
    counted = label_factor("unlearn_loss", labels, logits.shape[1], stats_dtype(logits.dtype), chosen)
    factor = counted if factor is None else factor.clone()  # an op returns none of its arguments
    spec = WeightSpec.from_numbers("token", numbers)
    gradient = fresh((logits.shape[0] if with_grad else 0, logits.shape[1]), logits.dtype, logits.device)
    inner, out = (kept_scale(factor, logits.dtype, given, 2.0)[0], gradient) if with_grad else (factor, None)
    rows = unit_stride(logits)
    chosen = select_rows("unlearn_loss", impl, rows, out, 0.0)
    logp, weight = weighted_rows(rows, labels, ref_logp, spec, by_row(inner, given), 1.0, 0.0, out, chosen)
    return logp, weight if given is None else weight * given, gradient, factor


def by_row(factor: Tensor, given: Tensor | None) -> Tensor:
    """A factor (0-dim) times the weights that were given [N], if any."""
    return factor if given is None else factor * given


def loss_from_logp(terms: Terms, logp: Tensor, literal: bool = False) -> LossOutput:
    """Any objective from differentiable log-probs [...]: the weights are detached, autograd does the rest. With
    ``literal`` values of sequences are themselves differentiated: the gradient is the same, and further derivatives are
    the value's."""
    logp = logp.reshape(-1)  # [N]
    whole = literal and terms.whole
    own, value = terms.own(logp if whole else logp.detach(), terms.reference(logp.dtype))
    weight, value = terms.times_given(own.detach(), value)
    per_token = weight * logp
    unit = terms.tokens.ids % value.shape[0] if terms.whole else None  # both halves of a pair share a value
    if whole and terms.given is not None:  # the value has the mean of a text's weights: what they add to that
        mean = terms.tokens.mean(terms.given_as(logp.dtype))[unit]
        carried = torch.zeros_like(value).index_add(0, unit, (weight - own.detach() * mean) * logp)
        value = value + (carried - carried.detach())
    if terms.reduction == "none":
        if not terms.whole:
            loss = per_token.reshape(terms.labels.shape)
        elif whole:
            loss = value
        else:
            carried = torch.zeros_like(value).index_add(0, unit, per_token)  # [S]
            loss = value + (carried - carried.detach())
    else:
        total = value.sum()
        if not whole:
            surrogate = per_token.sum()
            total = total + (surrogate - surrogate.detach())  # in this order: see unlearn_loss_reference
        loss = total * terms.factor(logp.dtype)
    return terms.output(loss, logp.detach(), weight)


def _scalar_loss(terms: Terms, logits: Tensor, impl: str, inplace: bool) -> LossOutput:
    """A loss that is one number; where it is differentiated, the gradient comes out of the same pass."""
    name, spec, labels = terms.name, terms.spec, terms.tokens.labels
    dtype = stats_dtype(logits.dtype)
    # None: the mean over the labels, for the kernel that looks at them to find
    factor = None if terms.by_token and terms.counts_labels else terms.factor(dtype)
    ref, given = terms.reference(dtype), terms.given_as(dtype)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    memory = None
    if inplace and wanted and not torch.compiler.is_compiling():
        chosen = select(name if terms.by_token else "token_logp", impl, logits.device, logits.dtype)
        counted = label_factor(name, labels, logits.shape[-1], dtype, chosen)  # before the logits are touched
        factor = counted if factor is None else factor
        memory = Overwritten(name, logits)
        flat = logits.detach().view(-1, logits.shape[-1])
        impl = select_rows(name, impl, flat, flat, 0.0) if terms.by_token else chosen
    rows = logits.detach().reshape(-1, logits.shape[-1])  # [N, V]
    if terms.by_token:
        ref = ref if spec.uses_ref else None
        if memory is None:
            arguments = (rows, labels, ref, spec.numbers(), factor, wanted, impl, given)
            logp, weight, gradient, factor = _unlearn_rows(*arguments)
            late = kept_scale(factor, logits.dtype, given, 2.0)[1] if wanted else None
        else:
            inner, late = kept_scale(factor, logits.dtype, given, 2.0)
            memory.start()
            logp, weight = weighted_rows(rows, labels, ref, spec, by_row(inner, given), 1.0, 0.0, rows, impl)
            weight = by_row(weight, given)
        value = weight * logp
    else:
        logp, stats = label_logp(rows, labels, impl)
        weight, value = terms.weigh(logp, ref)
        inner, late = kept_scale(factor, logits.dtype, weight) if wanted else (factor, None)
        coef = weight * inner
        if memory is not None:
            memory.start()
            logp_rows_grad(rows, labels, logp, stats, coef, 1.0, 0.0, rows, impl)
        elif wanted:
            gradient = label_logp_gradient(rows, labels, logp, stats, coef, impl)
    total = value.sum()
    if memory is not None:
        loss = memory.finished(total * factor, late)
    elif wanted:

        def literal(logits: Tensor) -> Tensor:
            return loss_from_logp(terms, token_logp_reference(logits, terms.labels), literal=True).loss

        defined = literal if impl == "reference" else None
        loss = with_gradients(name, total, factor, [logits], [gradient.view(logits.shape)], late, defined)
    else:
        loss = total * factor
    return terms.output(loss, logp, weight)


def unlearn_loss(
    logits: Tensor,
    labels: Tensor,
    objective,
    *,
    ref_logp: Tensor | None = None,
    reduction: str | None = None,
    sequence_id: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    weight: Tensor | None = None,
    impl: str = "auto",
    check_finite: bool = False,
    inplace: bool = False,
) -> LossOutput:
    r"""An unlearning objective from logits.

    .. math:: \nabla L_u = \frac{1}{Z} \sum_i w_i \nabla \log p(s_i \mid s_{<i}; \theta)

    Token-level objectives (GA, WGA, SatImp, TNPO, WTNPO, PO, NLL) read the logits once and write their gradient once;
    sequence-level ones (NPO, SimNPO, DPO) and callables read them once more. The backward only multiplies by the
    upstream gradient.

    Args:
        logits: [..., V], fp32, bf16, fp16 (fp64: reference); ``logits[..., i, :]`` scores ``labels[..., i]``.
        labels: [...], int64, -100 ignored. The leading dimensions are sequences: [B, T] holds B.
        objective: from ``gfast.objectives``, or a callable ``(logp, ref_logp, sequence_id) -> weights`` on 1-D tensors.
        ref_logp: [...], log-probs under the original model (TNPO, WTNPO, NPO, DPO): constants, whatever made them.
        reduction: "token_mean", "sequence_mean", "sum" or "none"; None takes the objective's default.
        sequence_id: [...], int64 in [0, labels.numel()), for packed rows; of DPO the preferred answer of s is
            s + labels.numel() / 2.
        normalizer: replaces the token or sequence count (gradient accumulation, data-set-exact gradients).
        weight: [...], constants v_i of any real dtype that the objective's own weights are multiplied by: the gradient
            is that of sum v_i w_i logp_i, ``out.weight`` is v_i w_i, and with GA v_i is the weight. The count that the
            loss is divided by stays that of the labels. The value of a sequence (NPO, SimNPO, DPO, TPO) is multiplied
            by the mean of v over its tokens, so that one v for all of them is a weight of the sequence's loss.
        impl: "auto", "reference", "cpp", "triton" or, for token-level objectives on GPUs with clusters (sm_90 and
            later) and rows that eight blocks of 64 KiB hold, "cuda". Second derivatives, forward mode and torch.func's
            transforms take "reference"; elsewhere they raise RuntimeError. They are those of the value where the
            gradient is (GA, PO, NLL, NPO, SimNPO, DPO; with v_i that differ within a sequence what these add to their
            mean is constant), and of sum w_i logp_i with constant w_i for WGA, SatImp, TNPO, WTNPO and callables.
        check_finite: raise on NaN or infinite log-probs (waits for the device).
        inplace: the gradient overwrites the logits, which saves as much memory as they take and the time to fill
            it. They hold no logits after the call, so compute metrics before it. What else of the graph needs them
            raises in the backward; a leaf that requires grad, or rows that do not lie evenly in memory (a slice
            along the sequence: pad the labels with -100 instead), raise at once. Where no gradient is wanted, and
            under torch.compile, which plans memory itself, the logits are left alone.

    Returns:
        LossOutput(loss, logp, weight); logp and weight are None for PDU, MASC, TPO and BST: no token
        weights.

    Raises:
        ValueError: a label outside the vocabulary, mismatched shapes or devices, a missing ref_logp, a weight that is
            not finite or requires grad, an unknown reduction, an ``impl`` that is not available here, logits that
            ``inplace`` cannot overwrite.
        TypeError: wrong dtypes, or something that is no token-weight objective.

    Source: arXiv 2502.19301, sections 3 and 4.

    Example:
        >>> import torch, gfast
        >>> from gfast.objectives import WGA
        >>> logits = torch.zeros(1, 3, 4, requires_grad=True)
        >>> out = gfast.unlearn_loss(logits, torch.tensor([[0, 1, -100]]), WGA(alpha=1.0))
        >>> round(out.loss.item(), 4), out.weight.tolist()
        (-0.3466, [[0.25, 0.25, 0.0]])
    """
    name = "unlearn_loss"
    check_rows(name, logits, labels)
    terms = Terms.of(name, objective, labels, ref_logp, reduction, sequence_id, normalizer, weight)
    if (spec := stat_spec_of(objective)) is not None:
        out = stat_loss.logits_loss(terms, spec, logits, impl, inplace)
    elif wants_literal(name, impl, logits, ref_logp):
        check_literal_labels(name, labels, logits.shape[-1])
        out = loss_from_logp(terms, token_logp_reference(logits, labels), impl == "reference")
    elif terms.reduction != "none":
        out = _scalar_loss(terms, logits, impl, inplace)
    elif inplace:
        raise ValueError(stat_loss.NOT_ONE_NUMBER.format(name=name))
    else:
        out = loss_from_logp(terms, token_logp(logits, labels, impl=impl), impl == "reference")
    if check_finite:
        raise_if_not_finite(name, out.loss if out.logp is None else out.logp)
    return out
