"""Vocabulary-parallel heads: each process holds some rows of the head and sees all hidden states.

A process reduces its own logits to (maximum, sum of the others' exps, the label's logit) a row; three numbers a row are
merged across the processes, and from the merged statistics each one forms the gradient of its own logits. dW stays
where its rows are; dH is summed over the processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.backend import select
from gfast.ops.common import IGNORE_INDEX, check_label_range, row_chunks
from gfast.ops.head import ChunkedHead, fake_gradients, finished_stats, valid_rows
from gfast.ops.token_logp import cap_slope, capped, logp_rows, logp_rows_grad, stats_dtype


class HeadShard(NamedTuple):
    """The rows [first, first + weight.shape[0]) of a head of ``vocab`` rows that this process holds."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    first: int
    vocab: int
    group: str


def is_sharded(weight: Tensor) -> bool:
    """Whether ``weight`` is a DTensor; nothing of torch.distributed is imported to find out."""
    return type(weight).__name__ == "DTensor"


def local_shard(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadShard:
    """This process's part of a DTensor head; gradients flow back into the DTensors."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = weight.device_mesh
    if mesh.ndim != 1 or type(weight.placements[0]) is not Shard or weight.placements[0].dim != 0:
        raise ValueError(
            f"gfast: {name}: a DTensor head must be sharded on dim 0 (the vocabulary) of a mesh with one dimension, "
            f"not {weight.placements} on {mesh}. Gather it first with weight.full_tensor()."
        )
    if bias is not None and not is_sharded(bias):
        raise ValueError(f"gfast: {name}: the head's weight is a DTensor but its bias is not; shard it alike.")
    if bias is not None and (bias.device_mesh != mesh or bias.placements != weight.placements):
        raise ValueError(f"gfast: {name}: weight is {weight.placements} but bias {bias.placements}; shard them alike.")
    if is_sharded(hidden):
        hidden = hidden.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Replicate()])
    vocab, world, rank = weight.shape[0], mesh.size(), mesh.get_local_rank()
    first = min(vocab, rank * -(-vocab // world))  # as torch.chunk: all but the last shards have the same size
    local = weight.to_local(grad_placements=[Shard(0)])
    bias = None if bias is None else bias.to_local(grad_placements=[Shard(0)])
    return HeadShard(hidden, local, bias, first, vocab, mesh.get_group().group_name)


def _all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    from torch.distributed import ReduceOp, all_reduce
    from torch.distributed.distributed_c10d import _resolve_process_group

    all_reduce(x, getattr(ReduceOp, op), group=_resolve_process_group(group))
    return x


def _own_labels(labels: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Labels as columns of this shard, and which rows have theirs elsewhere: those point at column 0 for now."""
    valid = labels != IGNORE_INDEX
    foreign = valid & ((labels < first) | (labels >= first + size))
    return torch.where(valid, torch.where(foreign, 0, labels - first), IGNORE_INDEX), foreign


def _shard_state(head: ChunkedHead, first: int, scale: float, softcap: float, impl: str) -> Tensor:
    """[3, n]: maximum of this shard's logits but the label's, sum of their exps relative to it, the label's or -inf."""
    chosen = select("linear_token_logp", impl, head.hidden.device, head.out_dtype)
    if head.folds(chosen):
        return head.fold_state(first, scale, softcap, chosen)
    own, foreign = _own_labels(head.labels, first, head.vocab)
    state = head.hidden.new_empty((3, head.rows), dtype=stats_dtype(head.out_dtype))
    for start, stop in row_chunks(head.rows, head.chunk):
        part, rows = slice(start, stop), head.logits(start, stop)
        target = capped(rows.gather(1, own[part].clamp(min=0)[:, None])[:, 0], scale, softcap)
        logp, stats = logp_rows(rows, own[part], scale, softcap, impl)
        total = torch.exp(stats[:, 1])
        # 1 - p from logp: where p is near 1 the others' sum is all the signal there is
        rest = torch.where(foreign[part], total, total * -torch.expm1(logp))
        state[:, part] = torch.stack([stats[:, 0], rest, torch.where(foreign[part], -torch.inf, target)])
    return state


@torch.library.custom_op("gfast::sharded_token_logp", mutates_args=())
def _sharded_token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first: int,
    vocab: int,
    group: str,
    scale: float,
    softcap: float,
    chunk_rows: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    check_label_range("linear_token_logp", labels, vocab)
    head = ChunkedHead(hidden, weight, bias, labels, chunk_rows, valid_rows(labels))
    if weight.shape[0]:
        top, rest, target = _shard_state(head, first, scale, softcap, impl)
    else:  # fewer rows than processes
        lowest = hidden.new_full((head.rows,), -torch.inf, dtype=stats_dtype(hidden.dtype))
        top, rest, target = lowest, torch.zeros_like(lowest), lowest
    wide = torch.stack([top, target]).double()  # every process the same dtype, whatever kernel it took
    top_all, target = _all_reduce(wide.clone(), "MAX", group)
    shift = torch.where(wide[0] == -torch.inf, -torch.inf, wide[0] - top_all)  # not -inf - -inf
    rest = _all_reduce(rest.double() * torch.exp(shift), "SUM", group)
    logp, stats = finished_stats(top_all, rest, target)
    ignored, dtype = head.labels == IGNORE_INDEX, stats_dtype(hidden.dtype)
    logp, stats = logp.masked_fill(ignored, 0.0).to(dtype), stats.masked_fill(ignored[:, None], 0.0).to(dtype)
    return head.scatter(logp), head.scatter(stats)


@_sharded_token_logp.register_fake
def _(hidden, weight, bias, labels, first, vocab, group, scale, softcap, chunk_rows, impl):
    dtype, rows = stats_dtype(hidden.dtype), hidden.shape[0]
    return hidden.new_empty(rows, dtype=dtype), hidden.new_empty((rows, 2), dtype=dtype)


@torch.library.custom_op("gfast::sharded_token_logp_backward", mutates_args=())
def _sharded_token_logp_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logp: Tensor,
    stats: Tensor,
    coef: Tensor,
    first: int,
    group: str,
    scale: float,
    softcap: float,
    chunk_rows: int,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    head = ChunkedHead(hidden, weight, bias, labels, chunk_rows, valid_rows(labels))
    logp, stats, coef = (head.select(values).contiguous() for values in (logp, stats, coef.to(logp.dtype)))
    head.start_gradients(*need)
    own, foreign = _own_labels(head.labels, first, head.vocab)
    for start, stop in row_chunks(head.rows, head.chunk) if head.vocab else ():
        part, rows = slice(start, stop), head.logits(start, stop)
        z = capped(rows[:, 0].clone(), scale, softcap)
        logp_rows_grad(rows, own[part], logp[part], stats[part], coef[part], scale, softcap, rows, impl)
        # column 0 stood in for labels on other processes: there it is a column like the others
        m, log_total = stats[part].unbind(1)
        other = -coef[part] * torch.exp((z - m) - log_total) * cap_slope(z, scale, softcap)
        rows[:, 0] = torch.where(foreign[part], other.to(rows.dtype), rows[:, 0])
        head.add_gradients(start, stop, rows)
    grad_hidden, grad_weight, grad_bias = head.gradients()
    if need[0]:
        if head.vocab == 0:
            grad_hidden = torch.zeros_like(grad_hidden)
        grad_hidden = _all_reduce(grad_hidden.to(stats_dtype(hidden.dtype)), "SUM", group).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


@_sharded_token_logp_backward.register_fake
def _(hidden, weight, bias, labels, logp, stats, coef, first, group, scale, softcap, chunk_rows, impl, need):
    return fake_gradients(hidden, weight, tuple(need))


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, first, _, group, *options = inputs
    ctx.options = (first, group, *options)
    logp, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, logp, stats)


def _backward(ctx, grad_logp: Tensor | None, _grad_stats: Tensor | None):
    nothing = (None,) * 11
    if grad_logp is None:
        return nothing
    hidden, weight, bias, labels, logp, stats = ctx.saved_tensors
    need = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    grads = torch.ops.gfast.sharded_token_logp_backward(
        hidden, weight, bias, labels, logp, stats, grad_logp, *ctx.options, need
    )
    inputs = (hidden, weight, bias)
    cast = [grad.to(x.dtype) if wanted else None for grad, x, wanted in zip(grads, inputs, need, strict=True)]
    return (*cast, *nothing[3:])


_sharded_token_logp.register_autograd(_backward, setup_context=_setup)
