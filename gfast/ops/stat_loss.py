"""Losses of what rows of logits are like: ETW, PDU, MASC, TPO, BST. Values, detached weights and factors of the
gradient in closed form from the statistics of ``token_stats``, so that a chunk of logits becomes its own gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.chunks import plan_chunks, row_chunks, sequence_length
from gfast.ops.derivatives import check_literal_labels, wants_literal
from gfast.ops.dispatch import select
from gfast.ops.gradients import kept_scale, summed_scale, with_gradients
from gfast.ops.head import ChunkedHead, fake_gradients, sums_are_wide
from gfast.ops.inplace import Overwritten
from gfast.ops.labels import label_factor
from gfast.ops.linear_inputs import LocalHead, unpacked
from gfast.ops.linear_token_logp import check_literal, flat_logp
from gfast.ops.linear_token_stats import check_whole, head_row_stats, head_row_stats_reference
from gfast.ops.memory import fresh
from gfast.ops.reductions import LossOutput
from gfast.ops.registration import python_op
from gfast.ops.stat_spec import StatSpec
from gfast.ops.token_logp import stats_dtype, token_logp, unit_stride
from gfast.ops.token_stats import (
    RowStats,
    row_stats,
    row_stats_reference,
    rows_of_stats,
    stat_rows,
    stat_rows_grad,
)
from gfast.ops.weights import Terms

NOT_ONE_NUMBER = (
    "gfast: {name}: inplace=True needs a loss that is one number: with reduction 'none' the gradient is only known in "
    "the backward."
)


class Parts(NamedTuple):
    """Of rows [n]: values, weights of log-probs (0 where the loss has none), and the gradient of the sum of values:
    factors of the mean of the logits [n], entries of single logits [n, c] and their columns [n, c]."""

    value: Tensor
    weight: Tensor
    mean: Tensor
    columns: Tensor
    adds: Tensor


def entropy_weights(entropy: Tensor, valid: Tensor, ids: Tensor, count: int) -> Tensor:
    """n_s H_i / sum_{j in s} H_j [N], 0 where not valid, of sequences s = ids [N]; 1 where all entropies of s are 0."""
    entropy = torch.where(valid, entropy, 0.0).double()
    sums, sizes = (torch.zeros(count, dtype=torch.float64, device=entropy.device) for _ in range(2))
    sums, sizes = sums.index_add(0, ids, entropy), sizes.index_add(0, ids, valid.double())
    weight = torch.where(sums[ids] == 0, 1.0, sizes[ids] * entropy / sums[ids])
    return torch.where(valid, weight, 0.0)


def preference(
    beta: float, floor: float, label: Tensor, valid: Tensor, ids: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """TPO's x_s = beta (floor - mean label logit) of each row's sequence, and 1 over its label tokens, [N] each."""
    sums, sizes = (torch.zeros(count, dtype=torch.float64, device=label.device) for _ in range(2))
    sums = sums.index_add(0, ids, torch.where(valid, label, 0.0).double())
    sizes = sizes.index_add(0, ids, valid.double()).clamp(min=1.0)
    return beta * (floor - sums / sizes)[ids], sizes.reciprocal()[ids]


def belief(stats: RowStats) -> Tensor:
    """The softmax of the largest logits alone [N, k], a constant."""
    return torch.softmax(stats.values.detach(), 1)


def values(spec: StatSpec, stats: RowStats, labels: Tensor, ids: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The literal definition: values [N], whose sum is reduced, and detached weights [N]; differentiable in ``stats``.

    entropy (T):                sg(w_i) log p_i, w as in ``entropy_weights`` of the entropies of softmax(z / T)
    flat ():                    (max_j z_ij - mean_j z_ij)^2
    margin (k, tau, eta, beta): max(0, m_i - (tau - eta)) / eta, m_i = beta z_iy - log sum_{j in K_i} exp(beta z_ij),
                                K_i the k largest logits but the label's
    beliefs (lambda, k):        (1 - lambda) log p_iy + lambda sum_{j in K_i} q_ij log p_ij, q_i = sg softmax of the k
                                largest logits K_i
    logit (beta, floor):        -(2 / beta) log sigmoid(x_s) / n_s, x as in ``preference``, n_s label tokens of s
    """
    valid = labels != IGNORE_INDEX
    if spec.kind == "entropy":
        weight = entropy_weights(stats.entropy.detach(), valid, ids, count).to(stats.logp.dtype)
        return weight * stats.logp, weight
    weight = torch.zeros_like(stats.label)
    if spec.kind == "logit":
        beta, floor = spec.numbers
        x, share = preference(beta, floor, stats.label, valid, ids, count)
        value = ((2 / beta) * torch.nn.functional.softplus(-x) * share).to(stats.label.dtype)
    elif spec.kind == "beliefs":
        # log p_y + lambda (sum_j q_j z_j - z_y): q sums to one
        q, z = belief(stats), stats.values
        moved = torch.where(q == 0, 0.0, q * z).sum(1) - stats.label
        value = stats.logp + torch.where(stats.label == -torch.inf, 0.0, spec.numbers[0] * moved)
        weight = torch.where(valid, 1.0, weight)
    elif spec.kind == "flat":
        value = (stats.values[:, 0] - stats.mean) ** 2
    else:
        _, tau, eta, beta = spec.numbers
        rivals = stats.rivals(labels)[0]
        value = torch.relu(beta * stats.label - torch.logsumexp(beta * rivals, 1) - (tau - eta)) / eta
    return torch.where(valid, value, 0.0), weight


def parts(spec: StatSpec, stats: RowStats, labels: Tensor, ids: Tensor | None, count: int) -> Parts:
    """``values`` and the gradient of their sum with respect to the logits, where the weights are constants."""
    value, weight = values(spec, stats, labels, ids, count)
    valid, zero = labels != IGNORE_INDEX, torch.zeros_like(value)
    first, none = stats.ids[:, :1], zero[:, None]
    if spec.kind == "entropy":
        return Parts(value, weight, zero, first, none)
    if spec.kind == "logit":
        x, share = preference(*spec.numbers, stats.label, valid, ids, count)
        slope = torch.where(valid, 2 * torch.sigmoid(-x) * share, 0.0).to(value.dtype)
        return Parts(value, weight, zero, labels.clamp(min=0)[:, None], slope[:, None])
    if spec.kind == "beliefs":
        share = torch.where(valid, zero + spec.numbers[0], 0.0)[:, None]
        adds = torch.cat([-share, torch.where(share == 0, 0.0, share * belief(stats))], 1)
        return Parts(value, weight, zero, torch.cat([labels.clamp(min=0)[:, None], stats.ids], 1), adds)
    if spec.kind == "flat":
        slope = torch.where(valid, 2 * (stats.values[:, 0] - stats.mean), 0.0)
        return Parts(value, weight, -slope, first, slope[:, None])
    _, _, eta, beta = spec.numbers
    rivals, columns = stats.rivals(labels)
    slope = torch.where(valid & (value > 0), zero + beta / eta, 0.0)[:, None]  # NaN is not above 0: it is in the value
    adds = torch.cat([slope, torch.where(slope == 0, 0.0, -slope * torch.softmax(beta * rivals, 1))], 1)
    return Parts(value, weight, zero, torch.cat([labels.clamp(min=0)[:, None], columns], 1), adds)


def times_given(row_parts: Parts, given: Tensor | None) -> Parts:
    """Of values times the weights that were given [n], if any."""
    if given is None:
        return row_parts
    scaled = [x * given for x in (row_parts.value, row_parts.weight, row_parts.mean)]
    return Parts(*scaled, row_parts.columns, row_parts.adds * given[:, None])


class _Rows:
    """What ``stat_rows`` found of the rows of a loss, and the gradients that follow."""

    def __init__(self, spec: StatSpec, vocab: int, rows: int, like: Tensor, impl: str):
        self.spec, self.impl, self.top = spec, impl, spec.top(vocab)
        dtype = stats_dtype(like.dtype)
        self.stats = like.new_zeros((rows, 6), dtype=dtype)
        self.values = like.new_zeros((rows, self.top), dtype=dtype)
        self.ids = like.new_zeros((rows, self.top), dtype=torch.int64)

    def read(self, part: slice, logits: Tensor, labels: Tensor, form) -> None:
        spec = self.spec
        statistics = stat_rows(logits, labels, self.top, 1.0 / spec.temperature, spec.soft, *form, self.impl)
        self.stats[part], self.values[part], self.ids[part] = statistics

    def of(self, part: slice) -> RowStats:
        return rows_of_stats(self.stats[part], self.values[part], self.ids[part])

    def write(
        self, within: slice, part: slice, logits: Tensor, labels: Tensor, row_parts: Parts, factor, form, out
    ) -> None:
        """The gradient of rows ``part``, which are rows ``within`` of ``row_parts``."""
        zero = torch.zeros_like(row_parts.mean[within])
        dense = torch.stack([row_parts.weight[within], zero, row_parts.mean[within]], 1) * factor
        adds = (row_parts.adds[within] * factor).to(dense.dtype)
        given = self.stats[part], dense, row_parts.columns[within].contiguous(), adds
        stat_rows_grad(logits, labels, *given, self.spec.soft, *form, out, self.impl)


def _fake_logits(logits, labels, per_row, factor, kind, numbers, count, with_grad, impl):
    dtype, (rows, vocab) = stats_dtype(logits.dtype), logits.shape
    per_row = [logits.new_empty(rows, dtype=dtype) for _ in range(3)]
    return *per_row, logits.new_empty(rows if with_grad else 0, vocab), logits.new_empty((), dtype=dtype)


def _room(row_parts: Parts, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a gradient of ``dtype`` at ``factor`` is multiplied by to stay within the range, 0-dim: a power of two, 1
    unless a row's factors are beyond what was expected."""
    if dtype != torch.float16 or not row_parts.adds.numel():
        return torch.ones_like(factor)
    rows = torch.cat([x.reshape(-1) for x in (row_parts.mean, row_parts.weight, row_parts.adds)]).abs()
    top = factor * rows.nan_to_num(0.0, posinf=0.0).amax()
    return torch.exp2((15.0 - torch.log2(top).ceil()).clamp(-100.0, 0.0))


def _into(logits, labels, per_row, factor, spec: StatSpec, count: int, out, impl: str):
    """Values, log-probs and weights [N] of logits [N, V], and r of ``_room``; ``out`` (None: unwanted, or the logits)
    gets r times factor times the gradient of the values' sum. ``per_row``: ids of sequences and weights that were
    given, [N] or None."""
    rows, every = _Rows(spec, logits.shape[1], logits.shape[0], logits, impl), slice(None)
    rows.read(every, logits, labels, (1.0, 0.0))
    stats = rows.of(every)
    ids, given = per_row
    row_parts = times_given(parts(spec, stats, labels, ids, count), given)
    room = torch.ones_like(factor) if out is None else _room(row_parts, factor, out.dtype)
    if out is not None:
        rows.write(every, every, logits, labels, row_parts, factor * room, (1.0, 0.0), out)
    return row_parts.value, stats.logp.clone(), row_parts.weight, room


@python_op("stat_loss", _fake_logits)
def _stat_logits(
    logits: Tensor,
    labels: Tensor,
    per_row: list[Tensor | None],
    factor: Tensor,
    kind: str,
    numbers: list[float],
    count: int,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = select("token_stats", impl, logits.device, logits.dtype)
    label_factor("unlearn_loss", labels, logits.shape[1], stats_dtype(logits.dtype), chosen)
    out = fresh((logits.shape[0] if with_grad else 0, logits.shape[1]), logits.dtype, logits.device)
    spec, rows = StatSpec(kind, tuple(numbers)), unit_stride(logits)
    *row_parts, room = _into(rows, labels, per_row, factor, spec, count, out if with_grad else None, chosen)
    return *row_parts, out, room


def _fake_head(head, labels, per_row, factor, *rest):
    hidden, weight, _ = head
    per_row = [hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden.dtype)) for _ in range(3)]
    return *per_row, *fake_gradients(hidden, weight, rest[-1])


@python_op("linear_stat_loss", _fake_head)
def _stat_head(
    head: list[Tensor | None],
    labels: Tensor,
    per_row: list[Tensor | None],
    factor: Tensor,
    kind: str,
    numbers: list[float],
    sequences: list[int],
    sizes: list[int],
    form: list[float],
    group: str,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, log-probs and weights [N], and factor (0-dim) times the gradients of the values' sum: dH [N, D], dW [V,
    D], db [V] (empty if unwanted). See ``_linear_unlearn``."""
    hidden, spec, (count, length) = head[0], StatSpec(kind, tuple(numbers)), sequences
    ids, given = per_row
    shard, chunk_rows, _ = unpacked("linear_unlearn_loss", hidden, labels, sizes, group, impl)
    order, chunk, spans = plan_chunks(spec.level, labels, ids, count, length, chunk_rows)
    chunked = ChunkedHead(*head, labels, chunk, order)
    chosen = select("token_stats", impl, hidden.device, chunked.dtype)
    rows = _Rows(spec, chunked.vocab, chunked.rows, chunked.hidden, chosen)
    ids, given, wanted = chunked.select(ids), chunked.select(given), any(need)
    value, logp, weight = (torch.zeros_like(rows.stats[:, 0]) for _ in range(3))
    chunked.start_gradients(*need)
    for start, stop in spans:
        span, pieces = slice(start, stop), list(row_chunks(stop - start, chunked.chunk))
        for a, b in pieces:
            part, logits = slice(start + a, start + b), chunked.logits(start + a, start + b)
            rows.read(part, logits, chunked.labels[part], form)
        stats = rows.of(span)
        row_parts = parts(spec, stats, chunked.labels[span], None if ids is None else ids[span], count)
        row_parts = times_given(row_parts, None if given is None else given[span])
        value[span], logp[span], weight[span] = row_parts.value, stats.logp, row_parts.weight
        for a, b in pieces if wanted else ():
            part = slice(start + a, start + b)
            if len(pieces) > 1:  # a sequence longer than a chunk: its logits are gone, compute them again
                logits = chunked.logits(part.start, part.stop)
            rows.write(slice(a, b), part, logits, chunked.labels[part], row_parts, factor, form, logits)
            chunked.add_gradients(part.start, part.stop, logits)
    return *map(chunked.scatter, (value, logp, weight)), *shard.gradients(chunked)


class StatTerms(NamedTuple):
    """A loss of this family and what it sums."""

    spec: StatSpec
    terms: Terms

    def finished(self, loss: Tensor, logp: Tensor, weight: Tensor) -> LossOutput:
        if not self.spec.weighted:
            return LossOutput(loss, None, None)
        return self.terms.output(loss, logp.detach(), weight)

    def literal(self, stats: RowStats) -> LossOutput:
        """From differentiable statistics."""
        terms, tokens = self.terms, self.terms.tokens
        of = self.spec, stats, tokens.labels, tokens.ids, tokens.count
        value, weight = values(*of)
        if (given := terms.given_as(value.dtype)) is not None:
            if self.spec.kind == "logit":  # as of NPO: the mean times the value, v_i times its token's gradient
                mean, slope = tokens.mean(given)[tokens.ids], parts(*of).adds[:, 0].detach()
                carried = value.detach() + slope * (stats.label - stats.label.detach())
                value = mean * value + (given - mean) * carried
            else:
                value = value * given
            weight = weight * given
        if terms.reduction == "none":
            return self.finished(value.reshape(terms.labels.shape), stats.logp, weight)
        return self.finished(value.sum() * terms.factor(value.dtype), stats.logp, weight)

    def each(self, logp: Tensor, weight: Tensor) -> LossOutput:
        """Reduction "none" of weighted log-probs, which are differentiable."""
        weight = weight.detach()
        return self.finished((weight * logp).reshape(self.terms.labels.shape), logp, weight)

    def kept(self, factor: Tensor, summed: bool = False) -> tuple[Tensor | None, float]:
        """What ``kept_scale`` takes beside a factor and a dtype: how large a row's factors may be. ``summed``: the
        scale is that of all rows of a head, before their entropies are known; elsewhere ``_room`` makes room."""
        given, times = self.terms.given_as(factor.dtype), self.spec.largest
        if summed and self.spec.weighted:  # a weight is at most the number of labels of its sequence
            labels, several = self.terms.labels, self.terms.sequence_id is not None
            times = max(times, float(labels.numel() if several or labels.dim() < 2 else labels.shape[-1]))
        return (factor.new_ones(1) if given is None and times > 2 else given), times

    def per_row(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [self.terms.tokens.ids, self.terms.given_as(dtype)]


def check_vocab(name: str, objective, spec: StatSpec, vocab: int) -> None:
    if spec.kind == "margin" and vocab < 2:
        raise ValueError(f"gfast: {name}: {objective} compares logits, and there is only one.")


def logits_loss(terms: Terms, spec: StatSpec, logits: Tensor, impl: str, inplace: bool) -> LossOutput:
    """``unlearn_loss`` of this family."""
    stat_terms, tokens, dtype, vocab = StatTerms(spec, terms), terms.tokens, stats_dtype(logits.dtype), logits.shape[-1]
    check_vocab(terms.name, terms.objective, spec, vocab)
    top, flat = spec.top(vocab), logits.reshape(-1, vocab)
    if wants_literal(terms.name, impl, logits):
        check_literal_labels(terms.name, tokens.labels, vocab)
        return stat_terms.literal(row_stats_reference(flat, tokens.labels, top, spec.temperature))
    options, rows = (spec.kind, list(spec.numbers), tokens.count), flat.detach()
    factor = terms.factor(dtype)
    if terms.reduction == "none":
        if inplace:
            raise ValueError(NOT_ONE_NUMBER.format(name=terms.name))
        if not spec.weighted:
            return stat_terms.literal(row_stats(flat, tokens.labels, top, spec.soft, impl))
        weight = _stat_logits(rows, tokens.labels, stat_terms.per_row(dtype), factor, *options, False, impl)[2]
        return stat_terms.each(token_logp(flat, tokens.labels, impl=impl), weight)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    inner, late = kept_scale(factor, logits.dtype, *stat_terms.kept(factor)) if wanted else (factor, None)
    if inplace and wanted and not torch.compiler.is_compiling():
        chosen = select("token_stats", impl, logits.device, logits.dtype)
        label_factor(terms.name, tokens.labels, vocab, dtype, chosen)  # before the logits are touched
        memory = Overwritten(terms.name, logits)
        memory.start()
        of = rows, tokens.labels, stat_terms.per_row(dtype), inner, spec, tokens.count, rows, chosen
        value, logp, weight, room = _into(*of)
        late = None if late is None else late / room
        return stat_terms.finished(memory.finished(value.sum() * factor, late), logp, weight)
    of = rows, tokens.labels, stat_terms.per_row(dtype), inner, *options, wanted, impl
    value, logp, weight, gradient, room = _stat_logits(*of)
    late = None if late is None else late / room
    total = value.sum()
    if not wanted:
        return stat_terms.finished(total * factor, logp, weight)

    def literal(logits: Tensor) -> Tensor:
        return stat_terms.literal(
            row_stats_reference(logits.reshape(flat.shape), tokens.labels, top, spec.temperature)
        ).loss

    defined = literal if impl == "reference" else None
    loss = with_gradients(terms.name, total, factor, [logits], [gradient.view(logits.shape)], late, defined)
    return stat_terms.finished(loss, logp, weight)


def head_loss(terms: Terms, spec: StatSpec, head: LocalHead, form: tuple[float, float], impl: str) -> LossOutput:
    """``linear_unlearn_loss`` of this family."""
    stat_terms, tokens, top = StatTerms(spec, terms), terms.tokens, spec.top(head.shard.vocab)
    check_whole(terms.name, terms.objective, head)
    check_vocab(terms.name, terms.objective, spec, head.shard.vocab)

    def literal(*inputs: Tensor | None) -> LossOutput:
        return stat_terms.literal(head_row_stats_reference(*inputs, head.labels, top, form, spec.temperature))

    if wants_literal(terms.name, impl, *head.inputs):
        check_literal(terms.name, head)
        return literal(*head.inputs)
    factor, need, none = terms.factor(stats_dtype(head.hidden.dtype)), head.wanted(), terms.reduction == "none"
    if none and not spec.weighted:
        return stat_terms.literal(head_row_stats(head, top, form, impl))
    inner, late = summed_scale(
        factor, head.hidden.dtype, sums_are_wide(head.hidden), *stat_terms.kept(factor, summed=True)
    )
    sequences = [tokens.count, sequence_length(terms.labels, terms.sequence_id)]
    given = (
        head.detached(),
        head.labels,
        stat_terms.per_row(factor.dtype),
        inner,
        spec.kind,
        list(spec.numbers),
        sequences,
    )
    wanted = [False] * 3 if none else need
    value, logp, weight, *gradients = _stat_head(*given, *head.options(form, impl), wanted)
    if none:
        return stat_terms.each(flat_logp(head, form, impl), weight)
    total = value.sum()
    if not any(need):
        return stat_terms.finished(total * factor, logp, weight)
    defined = (lambda *inputs: literal(*inputs).loss) if impl == "reference" else None
    loss = with_gradients(terms.name, total, factor, head.inputs, gradients, late, defined)
    return stat_terms.finished(loss, logp, weight)
