"""``linear_unlearn_loss``: an unlearning objective from hidden states and the head; loss and gradients in one pass.

Logits exist one chunk at a time. Once a chunk's log-probs are known its weights follow, the gradient overwrites the
chunk in place and goes straight into dH and dW: 6 N V D flops, where recomputing the logits in the backward costs 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops import common
from gfast.ops.backend import select
from gfast.ops.common import (
    IGNORE_INDEX,
    LossOutput,
    check_chunk_rows,
    check_label_range,
    check_pairs,
    check_reduction,
    coef_scale,
    raise_if_not_finite,
    row_chunks,
    sequence_layout,
)
from gfast.ops.derivatives import differentiable_once, wants_literal
from gfast.ops.head import ChunkedHead, check_map, fake_gradients, finished_gradients, flat_reference
from gfast.ops.linear_token_logp import flat_logp, linear_token_logp_reference, literal_of_head
from gfast.ops.plan import plan_chunks, sequence_length
from gfast.ops.token_logp import stats_dtype
from gfast.ops.unlearn_loss import (
    check_reference,
    default_reduction,
    loss_from_logp,
    spec_of,
    weigh,
    weighted_rows,
)
from gfast.ops.vocab_parallel import Shard, local_head
from gfast.ops.weights import WeightSpec, sequence_weights, weights_and_values


def linear_unlearn_loss_reference(
    hidden, weight, labels, objective, ref_logp=None, reduction=None, **head
) -> LossOutput:
    """The literal definition: all logits, then log softmax, detached weights and autograd."""
    logp = linear_token_logp_reference(hidden, weight, labels, **head)
    reduction = reduction or default_reduction(objective)
    return loss_from_logp(objective, logp, ref_logp, labels, None, reduction, None, "linear_unlearn_loss")


@torch.library.custom_op("gfast::linear_unlearn", mutates_args=())
def _linear_unlearn(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref_logp: Tensor | None,
    given: Tensor | None,
    ids: Tensor,
    count: int,
    length: int,
    level: str,
    numbers: list[float],
    factor: Tensor,
    first: int,
    vocab: int,
    group: str,
    scale: float,
    softcap: float,
    chunk_rows: list[int],
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [N], weight [N], and factor * gradients of sum_i sg(w_i) logp_i: dH [N, D], dW [V, D], db [V] (empty if
    unwanted).

    With ``given`` [N] the weights are those and nothing is computed from ``numbers``. ``first``, ``vocab``, ``group``:
    the ``Shard`` that weight [v, D] and bias [v] are.
    """
    check_label_range("linear_unlearn_loss", labels, vocab)
    check_chunk_rows("linear_unlearn_loss", chunk_rows)
    select("linear_unlearn_loss", impl, hidden.device, hidden.dtype)  # also where there are no rows
    shard = Shard(first, vocab, group)
    spec = WeightSpec.from_numbers(level, numbers)
    order, chunk, spans = plan_chunks(level, labels, ids, count, length, chunk_rows)
    head = ChunkedHead(hidden, weight, bias, labels, chunk, order)
    dtype = stats_dtype(hidden.dtype)
    ref, given = head.select(ref_logp), head.select(given)
    ids = head.select(ids)
    logp, weights = hidden.new_empty(head.rows, dtype=dtype), hidden.new_empty(head.rows, dtype=dtype)
    stats = hidden.new_empty((head.rows, 2), dtype=dtype)
    head.start_gradients(*need)

    def row_span(start: int, stop: int) -> None:
        part, rows = slice(start, stop), head.logits(start, stop)
        logp[part], weights[part] = weighted_rows(
            rows,
            head.labels[part],
            None if ref is None else ref[part].contiguous(),
            spec,
            factor,
            scale,
            softcap,
            rows,
            impl,
        )
        head.add_gradients(start, stop, rows)

    def weights_of(part: slice) -> Tensor:
        if given is not None:
            return given[part].to(dtype)
        some_ref = None if ref is None else ref[part].to(dtype)
        valid = head.labels[part] != IGNORE_INDEX
        return weights_and_values(spec, logp[part], some_ref, valid, ids[part], count)[0]

    def whole_span(start: int, stop: int) -> None:
        pieces = [(start + a, start + b) for a, b in row_chunks(stop - start, head.chunk)]
        for a, b in pieces:
            rows, part = head.logits(a, b), slice(a, b)
            logp[part], stats[part] = shard.logp_rows(rows, head.labels[part], scale, softcap, impl)
        weights[start:stop] = weights_of(slice(start, stop))
        for a, b in pieces:
            if len(pieces) > 1:  # longer than a chunk, and not the first: its logits are gone, compute them again
                rows = head.logits(a, b)
            part = slice(a, b)
            coef = (weights[part] * factor).to(dtype)
            shard.logp_rows_grad(rows, head.labels[part], logp[part], stats[part], coef, scale, softcap, impl)
            head.add_gradients(a, b, rows)

    def first_span(start: int, stop: int) -> None:
        """A sequence longer than a chunk, before anything else is summed. Its one weight, which only its last row
        tells, multiplies the sums: no row is computed twice."""
        one = torch.ones_like(factor)
        unweighted = WeightSpec(sign=spec.sign)
        for a, b in row_chunks(stop - start, head.chunk):
            rows, part = head.logits(start + a, start + b), slice(start + a, start + b)
            logp[part] = weighted_rows(rows, head.labels[part], None, unweighted, one, scale, softcap, rows, impl)[0]
            head.add_gradients(part.start, part.stop, rows)
        weights[start:stop] = weights_of(slice(start, stop))
        head.scale_gradients(start, stop, weights[start:stop].abs().amax() * factor)

    # one kernel from logits to gradient, unless the weights or the log-probs need more than the row
    by_row = level == "token" and given is None and not group
    # spans longer than a chunk are single sequences, unless boundaries had to follow from shapes that do not tell them
    single = level == "sequence" and not group and (length > 0 or common.may_wait(labels.device))
    lone = next((span for span in spans if single and span[1] - span[0] > head.chunk), None)
    if lone is not None:
        first_span(*lone)
    for span in spans:
        if span != lone:
            (row_span if by_row else whole_span)(*span)
    return head.scatter(logp), head.scatter(weights), *shard.gradients(head)


@_linear_unlearn.register_fake
def _(
    hidden,
    weight,
    bias,
    labels,
    ref_logp,
    given,
    ids,
    count,
    length,
    level,
    numbers,
    factor,
    first,
    vocab,
    group,
    scale,
    softcap,
    chunk_rows,
    impl,
    need,
):
    dtype, rows = stats_dtype(hidden.dtype), hidden.shape[0]
    logp = hidden.new_empty(rows, dtype=dtype)
    return logp, torch.empty_like(logp), *fake_gradients(hidden, weight, tuple(need))


def _literal(ctx):
    if ctx.define is None:
        return None
    inputs = ctx.saved_tensors[4:7]
    return ctx.define(*inputs), inputs


class _LinearLoss(torch.autograd.Function):
    """Scalar loss whose gradients were accumulated by the pass that computed it."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        labels,
        ref_logp,
        given,
        ids,
        count,
        length,
        level,
        numbers,
        factor,
        shard,
        scale,
        softcap,
        chunk_rows,
        impl,
        define,
    ):
        ctx.define = define  # the loss as a function of hidden, weight and bias, or None
        need = [bool(flag) for flag in ctx.needs_input_grad[:3]]
        # fp16 gradients of one token would vanish if divided by N here: they are divided after the sums instead
        late = hidden.dtype == torch.float16
        inner = torch.ones_like(factor) if late else factor
        logp, weights, *grads = torch.ops.gfast.linear_unlearn(
            hidden,
            weight,
            bias,
            labels,
            ref_logp,
            given,
            ids,
            count,
            length,
            level,
            numbers,
            inner,
            *shard,
            scale,
            softcap,
            chunk_rows,
            impl,
            need,
        )
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logp, weights)
        if given is None and level != "token":
            spec = WeightSpec.from_numbers(level, numbers)
            ref = None if ref_logp is None else ref_logp.to(logp.dtype)
            value = sequence_weights(spec, logp, ref, labels != IGNORE_INDEX, ids, count)[1]
        else:
            value = weights * logp
        loss = value.sum() * factor
        inputs = () if define is None else (hidden, weight, bias)
        ctx.save_for_backward(factor if late else None, *grads, *inputs, loss)
        return loss, logp, weights

    @staticmethod
    @differentiable_once("linear_unlearn_loss", _literal)
    def backward(ctx, grad_loss, _logp, _weights):
        nothing = (None,) * 18
        if grad_loss is None:
            return nothing
        late, *grads = ctx.saved_tensors[:4]
        return (*finished_gradients(ctx, grads, grad_loss, late), *nothing[3:])


def linear_unlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective,
    *,
    bias: Tensor | None = None,
    ref_logp: Tensor | None = None,
    reduction: str | None = None,
    sequence_id: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
    check_finite: bool = False,
) -> LossOutput:
    r"""An unlearning objective from hidden states and the output head, with the gradients computed in the same pass.

    .. math:: \nabla L_u = \frac{1}{Z} \sum_i w_i \nabla \log p(s_i \mid s_{<i}; \theta)

    Rows labelled -100 are left out before any product; a head that needs no gradient costs no dW, and a loss that
    nobody differentiates is scored as by ``linear_token_logp``. Callables see all tokens at once and take a first
    scoring pass; so do the sequences longer than a chunk of objectives with a weight a sequence, all but the first
    (with DPO or a vocabulary-parallel head: all of them).

    Args:
        hidden: [..., D], fp32, bf16 or fp16 (fp64: reference). weight: [V, D], same dtype (a DTensor is a
            vocabulary-parallel head: see ``linear_token_logp``). bias: [V] or None. Under torch.autocast they are cast
            as in ``F.linear``.
        labels: [...], int64, -100 ignored. The leading dimensions are sequences: [B, T] holds B.
        objective: from ``gfast.objectives``, or a callable ``(logp, ref_logp, sequence_id) -> weights`` on 1-D tensors.
        ref_logp: [...], log-probs under the original model (TNPO, WTNPO, NPO, DPO).
        reduction: "token_mean", "sequence_mean", "sum" or "none"; None takes the objective's default.
        sequence_id: [...], int64 in [0, labels.numel()), for packed rows.
        normalizer: replaces the token or sequence count.
        logit_scale, softcap: logits are softcap * tanh(scale * (W h + b) / softcap).
        chunk_rows: rows of logits held at a time; None chooses by device and head. Logits of bf16 rows are held all at
            once up to the memory that the sum of several chunks' dW, in fp32, would take.
        impl: "auto", "reference", "cpp" or "triton". Derivatives other than the first, backward, as in
            ``unlearn_loss``.
        check_finite: raise on NaN or infinite log-probs (waits for the device).

    Returns:
        LossOutput(loss, logp, weight).

    Raises:
        ValueError, TypeError: as ``unlearn_loss``, and a head that does not match hidden.

    Source: arXiv 2502.19301, sections 3 and 4.

    Example:
        >>> import torch, gfast
        >>> from gfast.objectives import WGA
        >>> hidden, head = torch.zeros(1, 2, 3, requires_grad=True), torch.ones(4, 3)
        >>> out = gfast.linear_unlearn_loss(hidden, head, torch.tensor([[0, 1]]), WGA(alpha=1.0))
        >>> round(out.loss.item(), 4)
        -0.3466
    """
    name = "linear_unlearn_loss"
    head = local_head(name, hidden, weight, bias, labels, chunk_rows)
    check_reference(name, objective, ref_logp, labels)
    reduction = reduction or default_reduction(objective)
    check_reduction(name, reduction)
    form = check_map(name, logit_scale, softcap)
    spec = spec_of(objective)
    inputs = (head.hidden, head.weight, head.bias)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    literal = impl == "reference"
    given = (ref_logp, labels, sequence_id, reduction, normalizer, name, literal)
    if wants_literal(name, impl, *inputs, ref_logp):
        out = loss_from_logp(objective, literal_of_head(name, head, labels, *form).reshape(labels.shape), *given)
    elif reduction == "none" or not differentiated:  # scoring is enough, and needs no logits where they can be folded
        logp = flat_logp(head, labels, *form, impl).reshape(labels.shape)
        out = loss_from_logp(objective, logp, *given)
    else:
        flat_labels = labels.reshape(-1).long()
        valid = flat_labels != IGNORE_INDEX
        ids, count = sequence_layout(name, labels, sequence_id)
        level = "token" if spec is None else spec.level
        check_pairs(name, level, count)
        dtype = stats_dtype(head.hidden.dtype)
        factor = coef_scale(valid, reduction, normalizer, ids, count, level == "pair", dtype)
        ref, weights = flat_reference(name, ref_logp, labels), None
        ref = None if ref is None else ref.to(dtype)
        if spec is None:
            with torch.no_grad():
                logp = flat_logp(head, labels, *form, impl)
            weights = weigh(objective, logp, ref, valid, ids, count)[0]
        define = None
        if literal and not head.shard.group and not torch.compiler.is_compiling():

            def define(h, w, b):
                logp = linear_token_logp_reference(h, w, flat_labels, b, *form).reshape(labels.shape)
                return loss_from_logp(objective, logp, *given).loss

        loss, logp, weights = _LinearLoss.apply(
            head.hidden,
            head.weight,
            head.bias,
            flat_labels,
            ref if spec is None or spec.uses_ref else None,
            weights,
            ids,
            count,
            sequence_length(labels, sequence_id),
            level,
            (spec or WeightSpec()).numbers(),
            factor,
            head.shard,
            *form,
            head.chunk_rows,
            impl,
            define,
        )
        out = LossOutput(loss, logp.reshape(labels.shape), weights.reshape(labels.shape))
    if check_finite:
        raise_if_not_finite(name, out.logp)
    return out
