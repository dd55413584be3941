"""What a loss op returns, and how it sums over tokens and sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.checks import (
    IGNORE_INDEX,
    check_like_labels,
    check_normalizer,
    check_pairs,
    check_sequence_range,
)


class LossOutput(NamedTuple):
    """Result of a loss op.

    Attributes:
        loss: 0-dim; with reduction "none" one value a token (shape of labels) or a sequence [S].
        logp: log-prob of each label, shape of labels, fp32, detached, 0 where ignored.
        weight: the weight each token's log-prob gradient got, shape of labels, detached, 0 where ignored. Both are None
            of an objective whose gradient is no weighted sum of log-probs' (PDU, MASC, TPO, BST, KL, RMU, RR).
    """

    loss: Tensor
    logp: Tensor | None
    weight: Tensor | None


def sequence_layout(name: str, labels: Tensor, sequence_id: Tensor | None) -> tuple[Tensor, int]:
    """Flat sequence ids [N] and a static bound S on their number: leading dimensions, or the ids given.

    With ids given the bound is the number of labels, so that nothing waits for the device.
    """
    if sequence_id is not None:
        check_like_labels(name, "sequence_id", sequence_id, labels)
        check_sequence_range(name, sequence_id)
        return sequence_id.reshape(-1).long(), labels.numel()
    if labels.dim() <= 1:
        return torch.zeros(labels.numel(), dtype=torch.int64, device=labels.device), 1
    length = labels.shape[-1]
    count = labels.numel() // length if length else 0
    ids = torch.arange(count, device=labels.device)
    return ids[:, None].expand(count, length).reshape(-1), count


class Tokens(NamedTuple):
    """What a loss sums over.

    Attributes:
        name: of the public op, for messages.
        labels: int64 [N].
        ids: of their sequences, int64 [N]. count: a bound S on these. None and 0 where nothing depends on sequences.
        paired: whether sequences s and s + S/2 are counted as one.
    """

    name: str
    labels: Tensor
    ids: Tensor | None
    count: int
    paired: bool

    @classmethod
    def of(cls, name: str, labels: Tensor, sequence_id: Tensor | None, level: str, reduction: str) -> Tokens:
        """Of labels [...]; ``level``: what a weight depends on, "token" or more."""
        flat, ids, count = labels.reshape(-1).long(), None, 0
        if sequence_id is not None or level != "token" or reduction == "sequence_mean":
            ids, count = sequence_layout(name, labels, sequence_id)
        check_pairs(name, level, count, flat, None if sequence_id is None else ids)
        return cls(name, flat, ids, count, level == "pair")

    @property
    def valid(self) -> Tensor:
        """Those that count, bool [N]."""
        return self.labels != IGNORE_INDEX

    def mean(self, values: Tensor) -> Tensor:
        """Of values [N] over the tokens that count of each sequence [S] or pair [S/2], 0 where there are none."""
        counted = torch.stack([torch.where(self.valid, values, 0), self.valid]).double()  # [2, N]
        total, length = counted.new_zeros(2, self.count).index_add(1, self.ids, counted)
        if self.paired:
            total, length = (x[: self.count // 2] + x[self.count // 2 :] for x in (total, length))
        return (total / length.clamp(min=1)).to(values.dtype)

    def factor(self, reduction: str, normalizer: float | Tensor | None, dtype: torch.dtype) -> Tensor:
        """0-dim; turns a sum into the reduction: 1/N, 1/S or 1; 0 tokens give 1 (the sum is 0 anyway)."""
        device = self.labels.device
        if normalizer is not None:
            if reduction in ("sum", "none"):
                raise ValueError(f"gfast: {self.name}: normalizer has no meaning with reduction {reduction!r}.")
            check_normalizer(self.name, normalizer)
            if not isinstance(normalizer, Tensor):  # filled in on the device: a copy from the host would wait
                return torch.full((), 1.0 / normalizer, dtype=dtype, device=device)
            return normalizer.to(device, dtype).reciprocal()
        if reduction == "token_mean":
            return self.valid.sum().clamp(min=1).to(dtype).reciprocal()
        if reduction == "sequence_mean":
            present = torch.zeros(self.count, dtype=torch.float32, device=device)
            present = present.index_add(0, self.ids, self.valid.float()) > 0  # [S]
            if self.paired:
                present = present[: self.count // 2] | present[self.count // 2 :]
            return present.sum().clamp(min=1).to(dtype).reciprocal()
        return torch.ones((), dtype=dtype, device=device)
