"""``linear_unlearn_loss``: an unlearning objective from hidden states and the head; loss and gradients in one pass.

Logits exist one chunk at a time. Once a chunk's log-probs are known its weights follow, the gradient overwrites the
chunk in place and goes straight into dH and dW: 6 N V D flops, where recomputing the logits in the backward costs 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops import checks, stat_loss
from gfast.ops.checks import IGNORE_INDEX, raise_if_not_finite
from gfast.ops.chunks import plan_chunks, row_chunks, sequence_length
from gfast.ops.derivatives import wants_literal
from gfast.ops.gradients import summed_scale, with_gradients
from gfast.ops.head import ChunkedHead, fake_gradients, sums_are_wide
from gfast.ops.held_rows import select_rows
from gfast.ops.linear_inputs import LocalHead, check_map, local_head, unpacked
from gfast.ops.linear_token_logp import flat_logp, linear_token_logp_reference, literal_of_head
from gfast.ops.reductions import LossOutput
from gfast.ops.registration import python_op
from gfast.ops.stat_spec import stat_spec_of
from gfast.ops.token_logp import stats_dtype
from gfast.ops.unlearn_loss import by_row, loss_from_logp, weighted_rows
from gfast.ops.weights import Terms, WeightSpec, sequence_weights, weigh


def linear_unlearn_loss_reference(
    hidden, head, labels, objective, ref_logp=None, reduction=None, weight=None, **form
) -> LossOutput:
    """The literal definition: all logits, then log softmax, detached weights and autograd."""
    terms = Terms.of("linear_unlearn_loss", objective, labels, ref_logp, reduction, weight=weight)
    return loss_from_logp(terms, linear_token_logp_reference(hidden, head, labels, **form))


def _fake_rows(head, *rest):
    hidden, weight, _ = head
    logp = hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden.dtype))
    return logp, torch.empty_like(logp), *fake_gradients(hidden, weight, rest[-1])


@python_op("linear_unlearn", _fake_rows)
def _linear_unlearn(
    head: list[Tensor | None],
    labels: Tensor,
    per_row: list[Tensor | None],
    factor: Tensor,
    level: str,
    numbers: list[float],
    sequences: list[int],
    sizes: list[int],
    form: list[float],
    group: str,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [N], weight [N], and factor (0-dim) * gradients of sum_i sg(w_i) logp_i: dH [N, D], dW [v, D], db [v] (empty
    if unwanted).

    Args:
        head: hidden [N, D], weight [v, D], bias [v] or None. labels: int64 [N].
        per_row: ref_logp, weights of the objective, sequence ids, and weights beside the objective's own (may be left
            out), [N] each or None. An objective's weights are those, and nothing is computed from ``numbers``.
        level, numbers: a ``WeightSpec``.
        sequences: count and length of ``plan_chunks``. For the rest see ``LocalHead.options``.
    """
    hidden = head[0]
    asked = impl
    shard, chunk_rows, impl = unpacked("linear_unlearn_loss", hidden, labels, sizes, group, impl)
    spec, (count, length) = WeightSpec.from_numbers(level, numbers), sequences
    order, chunk, spans = plan_chunks(level, labels, per_row[2], count, length, chunk_rows)
    chunked = ChunkedHead(*head, labels, chunk, order)
    dtype = stats_dtype(hidden.dtype)
    ref, known, ids, given = map(chunked.select, [*per_row, None][:4])
    logp, weights = hidden.new_empty(chunked.rows, dtype=dtype), hidden.new_empty(chunked.rows, dtype=dtype)
    stats = hidden.new_empty((chunked.rows, 2), dtype=dtype)
    chunked.start_gradients(*need)

    def factors(part: slice) -> Tensor:
        return by_row(factor, None if given is None else given[part])

    def row_span(start: int, stop: int) -> None:
        part, rows = slice(start, stop), chunked.logits(start, stop)
        chunk_ref = None if ref is None else ref[part].contiguous()
        chosen = select_rows("linear_unlearn_loss", asked, rows, rows, form[1])
        arguments = (rows, chunked.labels[part], chunk_ref, spec, factors(part), *form, rows, chosen)
        logp[part], weights[part] = weighted_rows(*arguments)
        chunked.add_gradients(start, stop, rows)

    def weights_of(part: slice) -> Tensor:
        if known is not None:
            return known[part].to(dtype)
        span_ref, span_ids = None if ref is None else ref[part].to(dtype), None if ids is None else ids[part]
        valid = chunked.labels[part] != IGNORE_INDEX
        return weigh(spec, logp[part], span_ref, valid, span_ids, count)[0]

    def whole_span(start: int, stop: int) -> None:
        pieces = [(start + a, start + b) for a, b in row_chunks(stop - start, chunked.chunk)]
        for a, b in pieces:
            rows, part = chunked.logits(a, b), slice(a, b)
            logp[part], stats[part] = shard.logp_rows(rows, chunked.labels[part], *form, impl)
        weights[start:stop] = weights_of(slice(start, stop))
        for a, b in pieces:
            if len(pieces) > 1:  # longer than a chunk, and not the first: its logits are gone, compute them again
                rows = chunked.logits(a, b)
            part = slice(a, b)
            coef = (weights[part] * factors(part)).to(dtype)
            shard.logp_rows_grad(rows, chunked.labels[part], logp[part], stats[part], coef, *form, impl)
            chunked.add_gradients(a, b, rows)

    def first_span(start: int, stop: int) -> None:
        """A sequence longer than a chunk, before anything else is summed. Its one weight, which only its last row
        tells, multiplies the sums: no row is computed twice."""
        unweighted = WeightSpec(sign=spec.sign)
        for a, b in row_chunks(stop - start, chunked.chunk):
            rows, part = chunked.logits(start + a, start + b), slice(start + a, start + b)
            chosen = select_rows("linear_unlearn_loss", asked, rows, rows, form[1])
            arguments = (rows, chunked.labels[part], None, unweighted, factors(part), *form, rows, chosen)
            logp[part] = weighted_rows(*arguments)[0]
            chunked.add_gradients(part.start, part.stop, rows)
        weights[start:stop] = weights_of(slice(start, stop))
        chunked.scale_gradients(start, stop, weights[start:stop].abs().amax())

    # one kernel from logits to gradient, unless the weights or the log-probs need more than the row
    alone = level == "token" and known is None and not group
    # spans longer than a chunk are single sequences, unless boundaries had to follow from shapes that do not tell them
    single = level == "sequence" and not group and (length > 0 or checks.may_wait(labels.device))
    lone = next((span for span in spans if single and span[1] - span[0] > chunked.chunk), None)
    if lone is not None:
        first_span(*lone)
    for span in spans:
        if span != lone:
            (row_span if alone else whole_span)(*span)
    weights = by_row(weights, given)
    return chunked.scatter(logp), chunked.scatter(weights), *shard.gradients(chunked)


def _scalar_loss(terms: Terms, head: LocalHead, form: tuple[float, float], impl: str) -> LossOutput:
    """The loss of a head that is differentiated: its gradients come out of the same pass."""
    spec, tokens, dtype = terms.spec or WeightSpec(), terms.tokens, stats_dtype(head.hidden.dtype)
    factor, ref, known, given = terms.factor(dtype), terms.reference(dtype), None, terms.given_as(dtype)
    if terms.spec is None:
        with torch.no_grad():
            scored = flat_logp(head, form, impl)
        known, value = terms.weigh(scored, ref)
        given, value = None, value.sum()
        del scored  # [N], not needed beside the gradients
    ref = ref if spec.uses_ref else None
    of_rows = (known, 1.0) if given is None else (given, 2.0)
    inner, late = summed_scale(factor, head.hidden.dtype, sums_are_wide(head.hidden), *of_rows)
    logp, weights, *gradients = _linear_unlearn(
        head.detached(),
        head.labels,
        [ref, known, tokens.ids, given],
        inner,
        spec.level,
        spec.numbers(),
        [tokens.count, sequence_length(terms.labels, terms.sequence_id)],
        *head.options(form, impl),
        head.wanted(),
    )
    if known is None:
        value = weights * logp
    if terms.whole:
        value = sequence_weights(spec, logp, ref, tokens.valid, tokens.ids, tokens.count)[1]
        value = terms.times_given(weights, value)[1]

    def literal(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logp = linear_token_logp_reference(hidden, weight, head.labels, bias, *form)
        return loss_from_logp(terms, logp, literal=True).loss

    defined = literal if impl == "reference" and not head.shard.group else None
    loss = with_gradients(terms.name, value.sum(), factor, head.inputs, gradients, late, defined)
    return terms.output(loss, logp, weights)


def linear_unlearn_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    objective,
    *,
    bias: Tensor | None = None,
    ref_logp: Tensor | None = None,
    reduction: str | None = None,
    sequence_id: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    weight: Tensor | None = None,
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
        hidden: [..., D], fp32, bf16 or fp16 (fp64: reference). head: [V, D], same dtype (a DTensor is a
            vocabulary-parallel head: see ``linear_token_logp``). bias: [V] or None. Under torch.autocast they are cast
            as in ``F.linear``.
        labels: [...], int64, -100 ignored. The leading dimensions are sequences: [B, T] holds B.
        objective: from ``gfast.objectives``, or a callable ``(logp, ref_logp, sequence_id) -> weights`` on 1-D tensors.
        ref_logp: [...], log-probs under the original model (TNPO, WTNPO, NPO, DPO): constants, whatever made them.
        reduction: "token_mean", "sequence_mean", "sum" or "none"; None takes the objective's default.
        sequence_id: [...], int64 in [0, labels.numel()), for packed rows; of DPO the preferred answer of s is
            s + labels.numel() / 2.
        normalizer: replaces the token or sequence count.
        weight: [...], constants that the objective's own token weights are multiplied by, as in ``unlearn_loss``; the
            same on every process of a vocabulary-parallel head.
        logit_scale, softcap: logits are softcap * tanh(scale * (W h + b) / softcap).
        chunk_rows: rows of logits held at a time; None chooses by device and head. Logits of bf16 rows are held all at
            once up to the memory that the sum of several chunks' dW, in fp32, would take.
        impl: "auto", "reference", "cpp" or "triton". Derivatives other than the first, backward, as in
            ``unlearn_loss``.
        check_finite: raise on NaN or infinite log-probs (waits for the device).

    Returns:
        LossOutput(loss, logp, weight); logp and weight are None for PDU, MASC, TPO and BST: no token
        weights.

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
    local = local_head(name, hidden, head, bias, labels, chunk_rows)
    terms = Terms.of(name, objective, labels, ref_logp, reduction, sequence_id, normalizer, weight)
    form = check_map(name, logit_scale, softcap)
    if (stat := stat_spec_of(objective)) is not None:
        out = stat_loss.head_loss(terms, stat, local, form, impl)
    elif wants_literal(name, impl, *local.inputs, ref_logp):
        out = loss_from_logp(terms, literal_of_head(name, local, form), impl == "reference")
    elif terms.reduction == "none" or not any(local.wanted()):
        # scoring is enough, and needs no logits where they can be folded
        out = loss_from_logp(terms, flat_logp(local, form, impl), impl == "reference")
    else:
        out = _scalar_loss(terms, local, form, impl)
    if check_finite:
        raise_if_not_finite(name, out.loss if out.logp is None else out.logp)
    return out
