"""``unlearn_loss``: an unlearning objective from logits; weights, log-probs, loss and gradient in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.backend import extension, select
from gfast.ops.common import (
    IGNORE_INDEX,
    LossOutput,
    check_label_range,
    check_like_labels,
    check_pairs,
    check_reduction,
    check_rows,
    coef_scale,
    fresh,
    kept_scale,
    raise_if_not_finite,
    runs_now,
    scaled,
    sequence_layout,
)
from gfast.ops.derivatives import differentiable_once, wants_literal
from gfast.ops.overwrite import Overwritten
from gfast.ops.token_logp import (
    _logp_rows_grad_reference,
    _logp_rows_reference,
    capped,
    label_logp,
    label_logp_gradient,
    literal_logp,
    logp_rows_grad,
    stats_dtype,
    token_logp,
    token_logp_reference,
    unit_stride,
)
from gfast.ops.weights import WeightSpec, token_weights, weights_and_values


def unlearn_loss_reference(logits, labels, objective, ref_logp=None, reduction=None) -> LossOutput:
    """The literal definition for leading-dimension sequences, differentiable by autograd; never optimised."""
    valid = (labels != IGNORE_INDEX).reshape(-1)
    logp = token_logp_reference(logits, labels).reshape(-1)
    ref = None if ref_logp is None else ref_logp.reshape(-1).to(logp.dtype)
    ids, count = sequence_layout("unlearn_loss", labels, None)
    weight, value = weigh(objective, logp.detach(), ref, valid, ids, count)
    reduction = reduction or default_reduction(objective)
    factor = coef_scale(valid, reduction, None, ids, count, is_pair(objective), logp.dtype)
    surrogate = (weight * logp).sum() * factor
    # the difference first: the sum would take the digits of a value far below it (NPO's, once a text is forgotten)
    loss = value.sum() * factor + (surrogate - surrogate.detach())
    return LossOutput(loss, logp.detach().reshape(labels.shape), weight.reshape(labels.shape))


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
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None,
    spec: WeightSpec,
    factor: Tensor,
    scale: float,
    softcap: float,
    out: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """logp [N] and token-level weights [N] of logits [N, V]; ``out`` (may be logits) gets factor * w_i * d logp_i / d
    logits."""
    impl = select("unlearn_loss", impl, logits.device, logits.dtype)
    if impl == "reference":
        return _weighted_rows_reference(logits, labels, ref_logp, spec, factor, scale, softcap, out)
    beta = spec.beta if spec.uses_ref else 0.0
    numbers = (spec.sign, spec.p_pow, spec.q_pow, beta)
    if impl == "cpp":
        extension()
        return torch.ops.gfast.weighted_rows(logits, labels, ref_logp, *numbers, factor, scale, softcap, out)
    from gfast.kernels import rows

    return rows.weighted_rows(logits, labels, ref_logp, *numbers, factor, scale, softcap, out)


def _unlearn_rows(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None,
    numbers: list[float],
    factor: Tensor,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    impl = select("unlearn_loss", impl, logits.device, logits.dtype)
    if impl != "cpp":  # which checks for itself
        check_label_range("unlearn_loss", labels, logits.shape[1])
    spec = WeightSpec.from_numbers("token", numbers)
    shape = logits.shape if with_grad else (0, logits.shape[1])
    out = fresh(tuple(shape), logits.dtype, logits.device)
    logp, weight = weighted_rows(
        unit_stride(logits), labels, ref_logp, spec, factor, 1.0, 0.0, out if with_grad else None, impl
    )
    return logp, weight, out


_unlearn_rows_op = torch.library.custom_op("gfast::unlearn_rows", _unlearn_rows, mutates_args=())


@_unlearn_rows_op.register_fake
def _(logits, labels, ref_logp, numbers, factor, with_grad, impl):
    dtype = stats_dtype(logits.dtype)
    rows, vocab = logits.shape
    out = torch.empty((rows if with_grad else 0, vocab), dtype=logits.dtype, device=logits.device)
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype), out


def _literal(ctx):
    if ctx.define is None:
        return None
    logits = ctx.saved_tensors[2]
    return ctx.define(logits), [logits]


class _Loss(torch.autograd.Function):
    """Ties a loss to logits whose gradient was written by the pass that computed it."""

    @staticmethod
    def forward(ctx, logits, loss, grad, late, define):
        ctx.define = define  # the loss as a function of the logits, or None
        loss = loss.clone()
        ctx.save_for_backward(grad, late, None if define is None else logits, loss)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @differentiable_once("unlearn_loss", _literal)
    def backward(ctx, grad_loss):
        nothing = (None,) * 4
        if grad_loss is None:
            return None, *nothing
        grad, late = ctx.saved_tensors[:2]
        return scaled(ctx, grad, grad_loss, late), *nothing


def spec_of(objective) -> WeightSpec | None:
    """The numbers of a built-in objective; None for a callable of the user's own."""
    is_class = isinstance(objective, type)
    spec = getattr(objective, "spec", None)
    if spec is not None and not is_class:
        return spec()
    if not callable(objective) or is_class:
        name = getattr(objective, "__name__", type(objective).__name__)
        raise TypeError(
            f"gfast: {name} is no token-weight objective. Pass an objective such as WGA(alpha=1.0) (an instance) or "
            f"a callable "
            "(logp, ref_logp, sequence_id) -> weights; KL goes through token_kl, RMU, RR and Mix through model_loss."
        )
    return None


def is_pair(objective) -> bool:
    spec = spec_of(objective)
    return spec is not None and spec.level == "pair"


def default_reduction(objective) -> str:
    return getattr(objective, "default_reduction", "token_mean")


def weigh(objective, logp, ref_logp, valid, sequence_id, num_sequences):
    """Detached weights [N] and values (of tokens [N], sequences [S] or pairs [S/2])."""
    spec = spec_of(objective)
    if spec is None:
        weight = torch.as_tensor(objective(logp, ref_logp, sequence_id), dtype=logp.dtype, device=logp.device)
        if weight.shape != logp.shape:
            raise ValueError(
                f"gfast: the weight callable returned shape {tuple(weight.shape)}, not {tuple(logp.shape)}."
            )
        weight = torch.where(valid, weight.detach(), 0.0)
        return weight, weight * logp
    return weights_and_values(spec, logp, ref_logp, valid, sequence_id, num_sequences)


def check_reference(name: str, objective, ref_logp: Tensor | None, labels: Tensor) -> None:
    """An objective that needs a reference has one, of the right shape."""
    spec = spec_of(objective)
    if spec is not None and spec.uses_ref and ref_logp is None:
        raise ValueError(
            f"gfast: {name}: {objective} needs ref_logp, the log-probs of the labels under the original model. "
            f"Compute them once "
            "with gfast.ReferenceCache, or with gfast.token_logp under torch.no_grad()."
        )
    if ref_logp is not None:
        check_like_labels(name, "ref_logp", ref_logp, labels)


def loss_from_logp(
    objective, logp, ref_logp, labels, sequence_id, reduction, normalizer, name, literal: bool = False
) -> LossOutput:
    """Any objective from differentiable log-probs (shape of labels): the weights are detached, autograd does the
    rest. With ``literal`` values of sequences are themselves differentiated: the gradient is the same, and further
    derivatives are the value's."""
    valid = (labels != IGNORE_INDEX).reshape(-1)
    ids, count = sequence_layout(name, labels, sequence_id)
    spec = spec_of(objective)
    if spec is not None:
        check_pairs(name, spec.level, count)
    flat = logp.reshape(-1)  # [N]
    ref = None if ref_logp is None else ref_logp.reshape(-1).to(flat.dtype)
    whole = literal and spec is not None and spec.level != "token"
    weight, value = weigh(objective, flat if whole else flat.detach(), ref, valid, ids, count)
    weight = weight.detach()
    out_logp, out_weight = flat.detach().reshape(labels.shape), weight.reshape(labels.shape)
    per_token = weight * flat
    if reduction == "none":
        if spec is None or spec.level == "token":
            return LossOutput(per_token.reshape(labels.shape), out_logp, out_weight)
        if whole:
            return LossOutput(value, out_logp, out_weight)
        unit = ids % value.shape[0]  # both halves of a pair share a value
        carried = torch.zeros_like(value).index_add(0, unit, per_token)  # [S]
        return LossOutput(value + (carried - carried.detach()), out_logp, out_weight)
    factor = coef_scale(valid, reduction, normalizer, ids, count, is_pair(objective), flat.dtype)
    if whole:
        return LossOutput(value.sum() * factor, out_logp, out_weight)
    surrogate = per_token.sum()
    loss = (value.sum() + (surrogate - surrogate.detach())) * factor  # in this order: see unlearn_loss_reference
    return LossOutput(loss, out_logp, out_weight)


def _scalar_loss(
    name, logits, labels, objective, ref_logp, reduction, sequence_id, normalizer, impl, inplace
) -> LossOutput:
    spec = spec_of(objective)
    level = "given" if spec is None else spec.level
    flat = labels.reshape(-1).long()  # [N]
    valid = flat != IGNORE_INDEX
    ids, count = None, 0
    if sequence_id is not None or level != "token" or reduction == "sequence_mean":
        ids, count = sequence_layout(name, labels, sequence_id)
    check_pairs(name, level, count)
    dtype = stats_dtype(logits.dtype)
    factor = coef_scale(valid, reduction, normalizer, ids, count, level == "pair", dtype)
    ref = None if ref_logp is None else ref_logp.detach().reshape(-1).to(dtype).contiguous()  # [N]
    wanted = logits.requires_grad and torch.is_grad_enabled()
    memory = None
    if inplace and wanted and not torch.compiler.is_compiling():
        impl = select(name, impl, logits.device, logits.dtype)
        check_label_range(name, flat, logits.shape[-1])  # before the logits are touched
        memory = Overwritten(name, logits)
    rows = logits.detach().reshape(-1, logits.shape[-1])  # [N, V]
    now = runs_now(rows)  # then the dispatcher, which takes longer than 16 rows of logits, is not needed
    if level == "token":
        ref = ref if spec.uses_ref else None
        inner, late = kept_scale(factor, logits.dtype) if wanted else (factor, None)
        if memory is None:
            unlearn_rows = _unlearn_rows if now else torch.ops.gfast.unlearn_rows
            logp, weight, grad = unlearn_rows(rows, flat, ref, spec.numbers(), inner, wanted, impl)
        else:
            memory.start()
            logp, weight = weighted_rows(rows, flat, ref, spec, inner, 1.0, 0.0, rows, impl)
        value = weight * logp
    else:
        logp, stats = (label_logp if now else torch.ops.gfast.token_logp)(rows, flat, impl)
        weight, value = weigh(objective, logp, ref, valid, ids, count)
        inner, late = kept_scale(factor, logits.dtype, weight) if wanted else (factor, None)
        coef = weight * inner
        if memory is not None:
            memory.start()
            logp_rows_grad(rows, flat, logp, stats, coef, 1.0, 0.0, rows, impl)
        elif wanted:
            gradient = label_logp_gradient if now else torch.ops.gfast.token_logp_backward
            grad = gradient(rows, flat, logp, stats, coef, impl)
    loss = value.sum() * factor
    if memory is not None:
        loss = memory.finished(loss, late)
    elif wanted:
        define = None
        if impl == "reference" and not torch.compiler.is_compiling():
            given = (ref_logp, labels, sequence_id, reduction, normalizer, name, True)
            define = lambda z: loss_from_logp(objective, token_logp_reference(z, labels), *given).loss  # noqa: E731
        loss = _Loss.apply(logits, loss, grad.view(logits.shape), late, define)
    return LossOutput(loss, logp.reshape(labels.shape), weight.reshape(labels.shape))


def unlearn_loss(
    logits: Tensor,
    labels: Tensor,
    objective,
    *,
    ref_logp: Tensor | None = None,
    reduction: str | None = None,
    sequence_id: Tensor | None = None,
    normalizer: float | Tensor | None = None,
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
        ref_logp: [...], log-probs under the original model (TNPO, WTNPO, NPO, DPO).
        reduction: "token_mean", "sequence_mean", "sum" or "none"; None takes the objective's default.
        sequence_id: [...], int64 in [0, labels.numel()), for packed rows.
        normalizer: replaces the token or sequence count (gradient accumulation, data-set-exact gradients).
        impl: "auto", "reference", "cpp" or "triton". Second derivatives, forward mode and torch.func's transforms take
            "reference"; elsewhere they raise RuntimeError. They are those of the value where the gradient is (GA, PO,
            NLL, NPO, SimNPO, DPO), and of sum w_i logp_i with constant w_i for WGA, SatImp, TNPO, WTNPO and callables.
        check_finite: raise on NaN or infinite log-probs (waits for the device).
        inplace: the gradient overwrites the logits, which saves as much memory as they take and the time to fill
            it. They hold no logits after the call, so compute metrics before it. What else of the graph needs them
            raises in the backward; a leaf that requires grad, or rows that do not lie evenly in memory (a slice
            along the sequence: pad the labels with -100 instead), raise at once. Where no gradient is wanted, and
            under torch.compile, which plans memory itself, the logits are left alone.

    Returns:
        LossOutput(loss, logp, weight).

    Raises:
        ValueError: a label outside the vocabulary, mismatched shapes or devices, a missing ref_logp, an unknown
            reduction, an ``impl`` that is not available here, logits that ``inplace`` cannot overwrite.
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
    check_reference(name, objective, ref_logp, labels)
    reduction = reduction or default_reduction(objective)
    check_reduction(name, reduction)
    literal = impl == "reference"
    given = (ref_logp, labels, sequence_id, reduction, normalizer, name, literal)
    if wants_literal(name, impl, logits, ref_logp):
        out = loss_from_logp(objective, literal_logp(name, logits, labels), *given)
    elif reduction == "none":
        if inplace:
            raise ValueError(
                f"gfast: {name}: inplace=True needs a loss that is one number: with reduction 'none' the gradient is "
                f"only known in the backward."
            )
        logp = token_logp(logits, labels, impl=impl)
        out = loss_from_logp(objective, logp, *given)
    else:
        out = _scalar_loss(name, logits, labels, objective, ref_logp, reduction, sequence_id, normalizer, impl, inplace)
    if check_finite:
        raise_if_not_finite(name, out.logp)
    return out
