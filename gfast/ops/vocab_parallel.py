"""Vocabulary-parallel heads: each process holds some rows of the head and sees all hidden states.

A process reduces its own logits to (maximum, sum of the others' exps, the label's logit) a row; three numbers a row are
merged across the processes, and from the merged statistics each one forms the gradient of its own logits. dW stays
where its rows are; dH is summed over the processes. The ops over a head are written once: a ``Shard`` says which rows
of the head are here, and a whole head is the shard that holds all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.head import ChunkedHead, finished_stats, nothing_folded
from gfast.ops.token_logp import capped, local_labels, logp_columns_grad, logp_rows, logp_rows_grad, stats_dtype


class Shard(NamedTuple):
    """The rows of a head that are here.

    Attributes:
        first: vocabulary entry of the first of them.
        vocab: rows of the whole head, V.
        group: name of the group of processes that hold a part each; "" for a whole head. All of them must work through
            the same chunks of the same labels, as every chunk's statistics are merged. With fewer rows than processes
            some hold none; they take part all the same.
    """

    first: int
    vocab: int
    group: str

    def _processes(self):
        from torch.distributed.distributed_c10d import _resolve_process_group

        return _resolve_process_group(self.group)

    def gathered(self, state: Tensor) -> Tensor:
        """``state`` [k, n] of every process, [processes, k, n]."""
        from torch import distributed

        # the older of its two names warns where there are both
        all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        group = self._processes()
        out = state.new_empty(group.size() * state.shape[0], state.shape[1])
        if out.numel():
            all_gather(out, state.contiguous(), group=group)
        return out.view(group.size(), *state.shape)

    def summed(self, x: Tensor) -> Tensor:
        """``x`` summed over the processes, in fp32 (fp64); of a whole head ``x`` itself."""
        if not self.group or not x.numel():
            return x
        from torch.distributed import all_reduce

        x = x.to(stats_dtype(x.dtype), copy=True)
        all_reduce(x, group=self._processes())
        return x

    def fold(self, head: ChunkedHead, scale: float, softcap: float, impl: str) -> tuple[Tensor, Tensor]:
        """``logp_rows`` of all rows, holding at most a tile of the vocabulary at a time."""
        nothing = None if head.vocab else nothing_folded(head.rows, head.labels.device)
        state = head.fold_state(self.first, scale, softcap, impl) if nothing is None else nothing
        return self._finished(state, head.labels, stats_dtype(head.out_dtype))

    def logp_rows(self, rows: Tensor, labels: Tensor, scale: float, softcap: float, impl: str) -> tuple[Tensor, Tensor]:
        """logp [n] and statistics [n, 2] over the whole vocabulary from this shard's logits [n, v]; labels are entries
        of the whole vocabulary. As ``token_logp.logp_rows`` on a whole head."""
        if not self.group:
            return logp_rows(rows, labels, scale, softcap, impl)
        if rows.shape[1] == 0:
            return self._finished(nothing_folded(rows.shape[0], rows.device), labels, stats_dtype(rows.dtype))
        local, foreign = local_labels(labels, self.first, rows.shape[1])
        target = capped(rows.gather(1, local.clamp(min=0)[:, None])[:, 0], scale, softcap)
        logp, stats = logp_rows(rows, local, scale, softcap, impl)
        top, total = stats[:, 0], torch.exp(stats[:, 1])
        # 1 - p from logp: where p is near 1 the others' sum is all the signal there is
        others = torch.where(foreign, total, total * -torch.expm1(logp))
        others = torch.where((total == 0) | (top == -torch.inf), 0.0, others)  # all masked here
        state = torch.stack([top, others, torch.where(foreign, -torch.inf, target)])
        return self._finished(state, labels, logp.dtype)

    def logp_rows_grad(self, rows: Tensor, labels, logp, stats, coef, scale: float, softcap: float, impl: str) -> None:
        """This shard's logits [n, v] become coef_i * d logp_i / d logits."""
        if not self.group:
            logp_rows_grad(rows, labels, logp, stats, coef, scale, softcap, rows, impl)
        elif rows.shape[1]:
            logp_columns_grad(rows, labels, self.first, logp, stats, coef, scale, softcap, impl)

    def gradients(self, head: ChunkedHead) -> tuple[Tensor, Tensor, Tensor]:
        """``head.gradients()`` with dH summed over the processes, before its last rounding."""
        if head.grad_hidden is not None:
            head.grad_hidden = self.summed(head.grad_hidden)
        return head.gradients()

    def _finished(self, state: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """logp [n] and statistics [n, 2], 0 where ignored, from this shard's [3, n] (see ``fold_state``)."""
        state = state.double()  # every process the same dtype, whatever kernel it took
        if self.group:
            top, others, target = self.gathered(state).unbind(1)  # [processes, n] each
            highest = top.amax(0)
            shift = torch.where(top == -torch.inf, -torch.inf, top - highest)  # not -inf - -inf
            state = torch.stack([highest, (others * torch.exp(shift)).sum(0), target.amax(0)])
        logp, stats = finished_stats(*state)
        ignored = labels == IGNORE_INDEX
        return logp.masked_fill(ignored, 0.0).to(dtype), stats.masked_fill(ignored[:, None], 0.0).to(dtype)


def is_sharded(weight: Tensor) -> bool:
    """Whether ``weight`` is a DTensor; nothing of torch.distributed is imported to find out."""
    return type(weight).__name__ == "DTensor"


def check_alike(name: str, weight: Tensor, ref_weight: Tensor) -> None:
    """The heads of model and reference are both whole or sharded over the same mesh in the same way."""
    sharded, ref_sharded = is_sharded(weight), is_sharded(ref_weight)
    if sharded != ref_sharded:
        split, whole = ("weight", "ref_weight") if sharded else ("ref_weight", "weight")
        raise TypeError(
            f"gfast: {name}: {split} is a DTensor but {whole} a plain tensor. Shard it alike with "
            f"torch.distributed.tensor.distribute_tensor({whole}, {split}.device_mesh, {split}.placements), its bias "
            f"too, or gather {split} with full_tensor()."
        )
    if sharded and (weight.device_mesh != ref_weight.device_mesh or weight.placements != ref_weight.placements):
        raise ValueError(
            f"gfast: {name}: weight is {weight.placements} on {weight.device_mesh} but ref_weight "
            f"{ref_weight.placements} on {ref_weight.device_mesh}; shard them alike."
        )


def rows_like(whole: Tensor | None, sharded: Tensor) -> Tensor | None:
    """``whole`` [V, ...], which every process holds, as a DTensor sharded over dim 0 as ``sharded`` is; nothing is
    sent."""
    from torch.distributed.tensor import DTensor

    if whole is None or is_sharded(whole):
        return whole
    mesh, vocab = sharded.device_mesh, whole.shape[0]
    rows = -(-vocab // mesh.size())
    first = min(vocab, mesh.get_local_rank() * rows)
    part = whole[first : first + rows]
    return DTensor.from_local(part, mesh, sharded.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def local_part(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """This process's part of a DTensor head, and the most rows that any process has (the same number on all)."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Sharded

    mesh = weight.device_mesh
    if mesh.ndim != 1 or type(weight.placements[0]) is not Sharded or weight.placements[0].dim != 0:
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
    vocab = weight.shape[0]
    rows = -(-vocab // mesh.size())  # as torch.chunk: all but the last shards have the same size
    shard = Shard(min(vocab, mesh.get_local_rank() * rows), vocab, mesh.get_group().group_name)
    local = weight.to_local(grad_placements=[Sharded(0)])
    bias = None if bias is None else bias.to_local(grad_placements=[Sharded(0)])
    return hidden, local, bias, shard, rows
