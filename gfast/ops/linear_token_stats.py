"""``linear_token_stats``: ``token_stats`` from hidden states and the head, never holding [N, V]."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.checks import check_chunk_rows
from gfast.ops.chunks import row_chunks, rows_at_once, valid_rows
from gfast.ops.derivatives import wants_literal
from gfast.ops.dispatch import select
from gfast.ops.head import ChunkedHead, fake_backward
from gfast.ops.linear_inputs import LocalHead, check_map, local_head, unpacked
from gfast.ops.linear_token_logp import check_literal
from gfast.ops.registration import python_op
from gfast.ops.token_logp import capped, stats_dtype
from gfast.ops.token_stats import (
    RowStats,
    TokenStats,
    any_given,
    factors,
    fake_row_stats,
    padded,
    row_stats_backward,
    row_stats_reference,
    rows_of_stats,
    stat_rows,
    stat_rows_grad,
)


def check_whole(name: str, what: object, head: LocalHead) -> None:
    """ValueError for a head of which other processes hold a part."""
    if head.shard.group:
        raise ValueError(
            f"gfast: {name}: {what} looks at all logits of a row, and the head is sharded over the vocabulary: "
            f"largest logits and entropies are not merged across processes. Gather it first with weight.full_tensor()."
        )


def head_row_stats_reference(hidden, weight, bias, labels, top: int, form, temperature: float = 1.0) -> RowStats:
    """The literal definition: all logits, then ``row_stats_reference``."""
    logits = capped(torch.nn.functional.linear(hidden, weight, bias), *form)
    return row_stats_reference(logits, labels, top, temperature)


@python_op("linear_token_stats_backward", fake_backward)
def _linear_row_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    stats: Tensor,
    dense: Tensor,
    columns: Tensor,
    adds: Tensor,
    soft: bool,
    sizes: list[int],
    form: list[float],
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dH [N, D], dW [V, D], db [V] (empty if unwanted) of what ``stat_rows_grad`` describes."""
    check_chunk_rows("linear_token_stats", sizes[2:])
    order = valid_rows(labels)
    head = ChunkedHead(hidden, weight, bias, labels, rows_at_once(labels, order, sizes[2:]), order)
    chosen = select("token_stats", impl, hidden.device, head.dtype)
    given = [head.select(x).contiguous() for x in (stats, dense, columns, adds)]
    head.start_gradients(*need)
    for start, stop in row_chunks(head.rows, head.chunk):
        part, rows = slice(start, stop), head.logits(start, stop)
        stat_rows_grad(rows, head.labels[part], *(x[part] for x in given), soft, *form, rows, chosen)
        head.add_gradients(start, stop, rows)
    return head.gradients()


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, ctx.top, ctx.sizes, ctx.form, _group, ctx.impl = inputs
    ctx.name, (logp, *_, ids, stats) = "linear_token_stats", output
    ctx.mark_non_differentiable(ids, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, ids, stats, logp)


def _backward_once(ctx, *grads):
    rest = (None,) * 6
    if not any_given(grads[:5]):
        return None, None, None, *rest
    *tensors, labels, ids, stats, _ = ctx.saved_tensors
    need = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    given = factors(grads, labels, ids, stats.dtype)
    options = any_given(grads[:2]), ctx.sizes, ctx.form, ctx.impl, need
    gradients = _linear_row_stats_backward(*tensors, labels, stats, *given, *options)
    cast = [x.to(y.dtype) if wanted else None for x, y, wanted in zip(gradients, tensors, need, strict=True)]
    return (*cast, *rest)


def _literal(ctx):
    hidden, weight, bias, labels, *_ = ctx.saved_tensors
    stats = head_row_stats_reference(hidden, weight, bias, labels, ctx.top, ctx.form)
    return stats, [hidden, weight, bias]


def _fake_stats(hidden, weight, bias, labels, top, *_):
    return fake_row_stats(hidden, top)


@python_op("linear_token_stats", _fake_stats, _setup, row_stats_backward(_backward_once, _literal))
def _linear_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    top: int,
    sizes: list[int],
    form: list[float],
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``RowStats`` and the statistics [N, 6]; for what is no tensor see ``LocalHead.options``."""
    chunk_rows = unpacked("linear_token_stats", hidden, labels, sizes, group, impl)[1]
    head = ChunkedHead(hidden, weight, bias, labels, chunk_rows[0], valid_rows(labels))
    chosen, chunks = select("token_stats", impl, hidden.device, head.dtype), []
    for start, stop in row_chunks(head.rows, head.chunk):
        rows = head.logits(start, stop)
        chunks.append(stat_rows(rows, head.labels[start:stop], top, 1.0, True, *form, chosen))
    dtype = stats_dtype(hidden.dtype)
    empty = [hidden.new_empty((0, k), dtype=d) for k, d in ((6, dtype), (top, dtype), (top, torch.int64))]
    stats, values, ids = (head.scatter(torch.cat(x)) for x in (zip(*chunks, strict=True) if chunks else zip(empty)))
    return *(x.clone() for x in rows_of_stats(stats, values, ids)[:4]), values, ids, stats


def head_row_stats(head: LocalHead, top: int, form: tuple[float, float], impl: str) -> RowStats:
    """``RowStats`` of checked arguments, differentiable."""
    return RowStats(*_linear_row_stats(*head.inputs, head.labels, top, *head.options(form, impl))[:6])


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> TokenStats:
    r"""``token_stats`` from hidden states and the output head; no tensor of size [N, V] exists.

    .. math:: z_i = \mathrm{cap}(\text{logit\_scale} (W h_i + b))

    Args:
        hidden: [..., D], fp32, bf16 or fp16 (fp64: reference); ``hidden[..., i, :]`` scores ``labels[..., i]``.
        weight: [V, D], same dtype, whole. bias: [V] or None. Under torch.autocast all are cast as in ``F.linear``.
        labels: [...], int64; rows labelled -100 cost nothing.
        logit_scale, softcap, chunk_rows, impl: as ``linear_token_logp``; the statistics are those of the logits after
            both.

    Returns:
        TokenStats, as ``token_stats``; differentiable with respect to hidden, weight and bias (the backward recomputes
        the logits chunk by chunk).

    Raises:
        ValueError, TypeError: as ``token_stats``, and a head that does not match hidden or is sharded over the
        vocabulary.

    Source: as ``token_stats``.

    Example:
        >>> import torch, gfast
        >>> stats = gfast.linear_token_stats(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, -100]))
        >>> [round(x, 4) for x in stats.entropy.tolist()]
        [1.3863, 0.0]
    """
    name = "linear_token_stats"
    head = local_head(name, hidden, weight, bias, labels, chunk_rows)
    check_whole(name, "it", head)
    form = check_map(name, logit_scale, softcap)
    top = min(2, head.shard.vocab)
    if wants_literal(name, impl, *head.inputs):
        check_literal(name, head)
        stats = head_row_stats_reference(*head.inputs, head.labels, top, form)
    else:
        stats = head_row_stats(head, top, form, impl)
    return padded(stats, 2).token_stats(labels)
