"""The output head's contribution of every row, whose gradient of the logits exists a tile of the vocabulary at a time.

    b_t = c_t (onehot(y_t) - softmax(z_t)) dz_t/d logits,        z_t = cap(scale * (W a_t + bias))

With more rows than the hidden size has entries, all b_t [n, V] would be larger than the head. Kept are the rows'
hidden states, weights and softmax statistics, from which any columns of b follow by one product with those rows of W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gfast.ops.memory import fresh
from gfast.ops.token_logp import cap_slope, capped, logp_columns_grad


@dataclass(frozen=True)
class HeadProduct:
    """Row t adds b_t a_t^T to the gradient [V, D] of the head's weight.

    a: hidden states [n, D], in the dtype that products are made in.
    labels: int64 [n]. logp, coef: [n], log-prob of the label and its weight. stats: [n, 2] of the softmax.
    weight: [V, D], the parameter itself, in any dtype; bias: [V] or None.
    """

    a: Tensor
    labels: Tensor
    logp: Tensor
    stats: Tensor
    coef: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float

    @property
    def rows(self) -> int:
        return len(self.a)

    @property
    def width(self) -> int:
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    def select(self, rows: Tensor | slice) -> HeadProduct:
        """The same for some of the rows."""
        chosen = {name: getattr(self, name)[rows] for name in ("a", "labels", "logp", "stats", "coef")}
        return replace(self, **chosen)

    def used(self) -> Tensor:
        """Which rows are not zero (NaN is something), bool [n]."""
        return self.coef != 0

    def columns(self, start: int, stop: int) -> Tensor:
        """b [n, stop - start] of the vocabulary entries from start to stop."""
        weight = self.weight[start:stop].to(self.a.dtype)
        out = fresh((self.rows, len(weight)), self.a.dtype, self.a.device)
        if self.bias is None:
            torch.mm(self.a, weight.t(), out=out)
        else:
            torch.addmm(self.bias[start:stop].to(self.a.dtype), self.a, weight.t(), out=out)
        logp_columns_grad(out, self.labels, start, self.logp, self.stats, self.coef, self.scale, self.softcap, "auto")
        return out

    def at(self, ids: Tensor) -> Tensor:
        """b [n, m] of the vocabulary entries ids [m], which may repeat; in the dtype of the statistics."""
        logits = self.a @ self.weight.index_select(0, ids).to(self.a.dtype).t()
        if self.bias is not None:
            logits = logits + self.bias.index_select(0, ids).to(self.a.dtype)
        z = capped(logits, self.scale, self.softcap)
        m, log_total = self.stats[:, :1], self.stats[:, 1:]
        is_label = self.labels[:, None] == ids
        # 1 - p from log p: where p is near 1 it is all the signal there is
        delta = torch.where(is_label, -torch.expm1(self.logp)[:, None], -torch.exp((z - m) - log_total))
        return self.coef[:, None] * delta * cap_slope(z, self.scale, self.softcap)
