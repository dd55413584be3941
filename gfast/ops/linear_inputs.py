"""What the ops over a head are given: checks, casts, the part of a sharded head, and all of it as an op's arguments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.checks import check_chunk_rows, check_head, check_rows
from gfast.ops.chunks import default_chunk_rows
from gfast.ops.dispatch import select
from gfast.ops.head import product_dtype
from gfast.ops.labels import label_factor
from gfast.ops.token_logp import stats_dtype
from gfast.ops.vocab_parallel import Shard, is_sharded, local_part


class LocalHead(NamedTuple):
    """The tensors that an op over a head takes, and how it takes them.

    Attributes:
        hidden: [N, D]. weight: [v, D], the rows that are here. bias: [v] or None.
        labels: int64 [N].
        shard: which rows of the head weight and bias are.
        chunk_rows: rows of a chunk of logits, and up to how many rows in all there is only one. Both are the same on
            all processes.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    shard: Shard
    chunk_rows: list[int]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias."""
        return self[:3]

    def wanted(self) -> list[bool]:
        """Of which inputs a gradient is wanted."""
        return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in self.inputs]

    def detached(self) -> list[Tensor | None]:
        """The inputs for an op that computes their gradients itself."""
        return [None if x is None else x.detach() for x in self.inputs]

    def options(self, form: tuple[float, float], impl: str) -> tuple[list[int], list[float], str, str]:
        """What an op takes beside tensors: sizes (first and vocab of the shard, chunk_rows), form (scale and softcap of
        the logits, 0 for no softcap), the shard's group, and impl."""
        return [self.shard.first, self.shard.vocab, *self.chunk_rows], list(form), self.shard.group, impl


def unpacked(name: str, hidden: Tensor, labels: Tensor, sizes, group, impl) -> tuple[Shard, list[int], str]:
    """Inside an op: the shard, ``chunk_rows`` and the implementation that serves the op, after checks of what raw calls
    may get wrong."""
    (first, vocab), chunk_rows = sizes[:2], sizes[2:]
    check_chunk_rows(name, chunk_rows)
    chosen = select(name, impl, hidden.device, hidden.dtype)
    label_factor(name, labels, vocab, stats_dtype(hidden.dtype), chosen)
    return Shard(first, vocab, group), chunk_rows, chosen


def local_head(name: str, hidden, weight, bias, labels, chunk_rows: int | None, buffers: int = 1) -> LocalHead:
    """Checks, autocast's casts and, of a DTensor head, this process's part; gradients flow back into what was given.
    ``buffers``: how many chunks of logits the op holds."""
    rows = weight.shape[0]
    shard = Shard(0, rows, "")
    if is_sharded(weight):
        hidden, weight, bias, shard, rows = local_part(name, hidden, weight, bias)
    hidden, weight, bias = prepare_head(name, hidden, weight, bias, labels)
    if shard.vocab == 0:
        raise ValueError(f"gfast: {name}: the head's weight {tuple(weight.shape)} has an empty vocabulary.")
    if chunk_rows is not None:
        check_chunk_rows(name, [chunk_rows])
        chunks = [chunk_rows, chunk_rows]
    else:
        chunks = [default_chunk_rows(rows, weight.shape[1], hidden.device)] * 2
        if weight.dtype == torch.bfloat16 and weight.requires_grad and torch.is_grad_enabled():
            # Several chunks' dW is summed in an fp32 copy of it, 4 V D bytes, which one chunk does not need: more rows
            # in one chunk until they take that memory, and the time for the sum is saved.
            size = product_dtype(weight.dtype, weight.device).itemsize
            chunks[1] += 4 * weight.shape[1] // (size * buffers)
    return LocalHead(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1).long(), shard, chunks)


def reference_head(name: str, head: LocalHead, hidden, weight, bias, labels, chunk_rows: int | None) -> LocalHead:
    """What a model with this head is compared with: constants, in the dtype of its hidden states."""
    given = [None if x is None else x.detach().to(head.hidden.dtype) for x in (hidden, weight, bias)]
    ref = local_head(name, *given, labels, chunk_rows)
    if ref.shard.vocab != head.shard.vocab:
        raise ValueError(
            f"gfast: {name}: the heads have different vocabularies: {head.shard.vocab} and {ref.shard.vocab}."
        )
    return ref


def prepare_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor):
    """Checks, and the casts autocast would make: hidden, weight and bias in one dtype, gradients flow through the
    casts."""
    check_rows(name, hidden, labels, what="hidden")
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    check_head(name, hidden, weight, bias)
    return hidden, weight, bias


def as_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype that F.linear would multiply in: autocast's, where it is on; fp64 stays as it is."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight, bias))


def check_map(name: str, logit_scale: float, softcap: float | None) -> tuple[float, float]:
    """Scale and softcap of the logits, 0 for none."""
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"gfast: {name}: logit_scale must be positive and finite, not {logit_scale}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"gfast: {name}: softcap must be positive and finite or None, not {softcap}.")
    return float(logit_scale), float(softcap or 0.0)
