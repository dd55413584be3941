"""NPO with weights over the samples of a batch: BalDRO.

Symbols: S_s = sum of the token log-probs of sequence s, S_o,s the same under the original model, B their number,
:math:`l_s = \\frac{2}{\\beta} \\log(1 + e^{\\beta (S_s - S_{o,s})})` NPO's value of it.

The batch is what one call of a loss sees: in a training a micro-batch of one process, as in the published code. Four
micro-batches of one text are therefore not one of four (they are NPO): trainers say so, and `gfast.g_effect` takes
one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gfast.objectives.base import Objective
from gfast.ops.weights import WeightSpec, sequence_weights


@dataclass(frozen=True)
class _Balanced(Objective):
    beta: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})
    default_reduction: ClassVar[str] = "sequence_mean"
    gradient: ClassVar[str] = "one weight a sequence, from all of the batch"
    of_batch: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("beta",)

    def weigh(
        self, logp: Tensor, ref_logp: Tensor, valid: Tensor, sequence_id: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Weights [N] of all tokens of a batch, and values [N], whose mean over the sequences is L; arguments of
        ``gfast.ops.weights.weigh``."""
        spec = WeightSpec("sequence", beta=float(self.beta), uses_ref=True)
        weight, value = sequence_weights(spec, logp, ref_logp, valid, sequence_id, count)  # NPO's
        length = torch.zeros(count, dtype=torch.float64, device=logp.device)
        length = length.index_add(0, sequence_id, valid.double())  # [S]
        present = (length > 0).sum()
        share, total = self._shares(logp, value.double(), valid, sequence_id, length)
        weight = weight * (share * present).to(weight.dtype)[sequence_id]
        each = total * present / length.sum().clamp(min=1)  # L is of the whole batch: in equal parts
        return weight, each.to(weight.dtype).expand_as(weight)

    def _shares(
        self, logp: Tensor, value: Tensor, valid: Tensor, sequence_id: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each sequence [S], adding up to 1; 0 where it has no token. And L."""
        raise NotImplementedError


@dataclass(frozen=True)
class BalDRO(_Balanced):
    r"""BalDRO-DV over NPO: :math:`L = -\tau \log \frac1B \sum_s e^{-l_s / \tau}`.

    NPO's weight of each sequence times :math:`B e^{-l_s/\tau} / \sum_t e^{-l_t/\tau}`, over the B sequences of a batch:
    with other batches other weights. With reduction "none" the values are w log p of each token.

    This is the published code, where with tau > 0 the sequences that are forgotten most get the largest weights; the
    paper's words ask for the worst case, the samples that are hardest to unlearn: that is tau < 0,
    :math:`L = |\tau| \log \frac1B \sum_s e^{l_s / |\tau|}`.

    Attributes:
        beta: > 0, NPO's. tau: not 0, temperature (the code's ``beta_dv_forget``); far from 0 it is NPO.

    Source: arXiv 2601.09172 and its code, github.com/nxZhai/BalDRO. Its code: DrNPO (over an NPO of beta 1).

    Example:
        >>> BalDRO(beta=1.0, tau=-2.0)
        BalDRO(beta=1.0, tau=-2.0)
    """

    tau: float = 1.0
    key: ClassVar[str] = "baldro"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.tau != 0, "tau must not be 0.")

    def _shares(
        self, logp: Tensor, value: Tensor, valid: Tensor, sequence_id: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = torch.where(length > 0, -value / self.tau, -torch.inf)  # [S]
        return torch.softmax(x, 0), -self.tau * (torch.logsumexp(x, 0) - (length > 0).sum().double().log())


@dataclass(frozen=True)
class BalDROG(_Balanced):
    r"""BalDRO-G over NPO: the mean of :math:`l_s` over the share of a batch's sequences that the model knows best.

    Of B sequences the k = max(1, floor(share B)) with the highest mean log-prob a token get NPO's weight times B / k,
    the others 0.
    With reduction "none" the values are w log p of each token.

    Attributes:
        beta: > 0, NPO's. share: in (0, 1], the code's ``sampling_ratio``.

    The code thins the retain batch as well.

    Source: arXiv 2601.09172 and its code, github.com/nxZhai/BalDRO. Its code: GroupNPO.

    Example:
        >>> BalDROG().share
        0.5
    """

    share: float = 0.5
    key: ClassVar[str] = "baldrog"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.share <= 1, "share must be in (0, 1].")

    def _shares(
        self, logp: Tensor, value: Tensor, valid: Tensor, sequence_id: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros_like(length).index_add(0, sequence_id, torch.where(valid, logp, 0).double())
        known = torch.where(length > 0, sums / length.clamp(min=1), -torch.inf)  # [S]
        rank = known.argsort(descending=True, stable=True).argsort()
        count = (self.share * (length > 0).sum().double()).floor().clamp(min=1)
        share = torch.where((rank < count) & (length > 0), 1 / count, 0.0)
        return share, (share * value).sum()
