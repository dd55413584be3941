"""Whether a model answers a batch alike in every pass of a measurement: an effect is of one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# By how much log-probs of a batch may differ between passes, in the mean of their size and of a nat a token: kernels
# sum in other orders, and the token engine's attention is another.
_APART = {torch.float64: 1e-6, torch.float32: 1e-3}
_APART_16_BIT = 1e-1  # a batch may be a single token


class Answers:
    """The log-probs of the labels of each batch, as their sums, in the first pass that had them; later ones are held to
    them. It costs no forward, and waits for the device once a pass.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[Mapping[str, Any], Tensor, Tensor]] = {}  # by the batch, which it keeps
        self._apart: list[Tensor] = []

    def add(self, batch: Mapping[str, Any], logp: Tensor | None, dtype: torch.dtype) -> None:
        """logp: of the labels of a batch (always the same object), 0 where there are none; dtype: the model's."""
        if logp is None:  # of an objective that has none
            return
        logp = logp.detach().double()
        total, size = logp.sum(), logp.abs().sum() + (logp != 0).sum()
        _, first, most = self._first.setdefault(id(batch), (batch, total, size))
        fast = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"  # products of TF32 or bf16
        limit = _APART_16_BIT if fast else _APART.get(dtype, _APART_16_BIT)
        self._apart.append((first.to(total) - total).abs() > limit * torch.maximum(size, most.to(size)))

    def apart(self) -> bool:
        """Whether passes since the last look found something else than those before them."""
        differences, self._apart = self._apart, []
        return bool(differences) and bool(torch.stack(differences).any())

    def check(self) -> None:
        """ValueError where that is so."""
        if self.apart():
            raise ValueError(CHANGES)


CHANGES = (
    "gfast: the model gives the labels of a batch other log-probs in one pass of this measurement than in another, so "
    "that there is no one model whose effect it would be: something changes from call to call, such as a hook with a "
    "flag or a counter (steering that switches itself), or dropout that evaluation mode does not end. Hold it for the "
    "measurement"
)
