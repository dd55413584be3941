"""Objectives whose weight depends on a whole sequence: NPO, SimNPO and DPO.

Symbols: S = sum of a sequence's token log-probs, S_o the same under the original model, len its number of valid tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gfast.objectives.base import WeightedObjective
from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.weights import WeightSpec


@dataclass(frozen=True)
class NPO(WeightedObjective):
    r"""Negative preference optimisation: :math:`L = \frac{2}{\beta} \log(1 + (p/p_o)^\beta)`, mean over sequences.

    One weight a sequence: :math:`w = 2 \sigma(\beta (S - S_o))`; on the original model the value is (2 ln 2) / beta
    and the weight 1.

    Attributes:
        beta: > 0, inverse temperature.

    Source: arXiv 2404.05868; arXiv 2502.19301, section 3. Its code: npo. open-unlearning: NPO.

    Example:
        >>> NPO(beta=0.1).default_reduction
        'sequence_mean'
    """

    beta: float = 0.1
    key: ClassVar[str] = "npo"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})
    default_reduction: ClassVar[str] = "sequence_mean"
    positive: ClassVar[tuple[str, ...]] = ("beta",)

    def spec(self) -> WeightSpec:
        return WeightSpec("sequence", beta=float(self.beta), uses_ref=True)


@dataclass(frozen=True)
class SimNPO(WeightedObjective):
    r"""Reference-free, length-normalised NPO: :math:`L = -\frac{2}{\beta} \log \sigma(\beta (\mathrm{NLL}/len -
    \delta))`.

    Weight of each token of the sequence: :math:`w = 2 \sigma(-\beta (\mathrm{NLL}/len - \delta)) / len`.

    Attributes:
        beta: > 0. delta: reward margin (the paper's gamma).

    Source: arXiv 2410.07163. open-unlearning: SimNPO.

    Example:
        >>> SimNPO().needs
        frozenset()
    """

    beta: float = 4.5
    delta: float = 0.0
    key: ClassVar[str] = "simnpo"
    default_reduction: ClassVar[str] = "sequence_mean"
    positive: ClassVar[tuple[str, ...]] = ("beta",)

    def spec(self) -> WeightSpec:
        return WeightSpec("sequence", beta=float(self.beta), delta=float(self.delta), length_norm=True)


@dataclass(frozen=True)
class DPO(WeightedObjective):
    r"""Direct preference optimisation against the forget answer:
    :math:`L = -\frac{2}{\beta} \log \sigma(\beta (D_{pref} - D_{rej}))`, :math:`D = S - S_o`, mean over pairs.

    The sequences of a batch are pairs: the first half the forget (rejected) answers, the second half the preferred
    (refusal) answers of the same questions in the same order. Weights: :math:`+2 \sigma(\beta (D_{rej} - D_{pref}))`
    on the rejected answer's tokens, minus the same on the preferred one's.

    Attributes:
        beta: > 0, inverse temperature.

    Source: arXiv 2305.18290; Maini et al., arXiv 2401.06121. open-unlearning: DPO.

    Example:
        >>> sorted(DPO().needs)
        ['preferred', 'ref_logp']
    """

    beta: float = 0.1
    key: ClassVar[str] = "dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp", "preferred"})
    default_reduction: ClassVar[str] = "sequence_mean"
    positive: ClassVar[tuple[str, ...]] = ("beta",)

    def spec(self) -> WeightSpec:
        return WeightSpec("pair", beta=float(self.beta), uses_ref=True)

    def count(self, labels: Tensor) -> int:
        present = (labels != IGNORE_INDEX).any(-1)  # [2B]
        half = present.shape[0] // 2
        return int((present[:half] | present[half:]).sum())
