"""Objectives whose weights come with the data: masks over tokens. v_i is the batch's ``weight`` of token i.

Any other objective is masked in the same way, by the batch's ``weight`` alone: it multiplies every objective's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gfast.objectives.base import WeightedObjective
from gfast.ops.weights import WeightSpec


@dataclass(frozen=True)
class HardMask(WeightedObjective):
    r"""Gradient ascent on chosen tokens: :math:`L = \frac1N \sum_i v_i \log p_i`, :math:`v_i \in \{0, 1\}`.

    Which tokens are chosen is the method: those whose log-prob falls most when the knowledge is masked from the prompt,
    or of the highest entropy (TokenUnlearn); those on which two assistant models differ (selective unlearning); those
    that carry what is to be forgotten (direct token optimisation). `gfast.data.top_tokens` makes a mask of scores. N
    counts all labels, chosen or not; where a method divides by the chosen ones, its factor is N over their number. The
    papers' own scores are not computed here.

    Source: arXiv 2605.00364 (hard selection), arXiv 2506.00876, arXiv 2510.00125.

    Example:
        >>> sorted(HardMask().needs)
        ['weight']
    """

    key: ClassVar[str] = "hardmask"
    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    weight_range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    whole_weights: ClassVar[bool] = True

    def spec(self) -> WeightSpec:
        return WeightSpec()


@dataclass(frozen=True)
class SoftMask(WeightedObjective):
    r"""Gradient ascent by importance: :math:`L = \frac1N \sum_i \mathrm{sg}(v_i) \log p_i`, :math:`0 \le v_i \le 1`.

    v is any score of the tokens in [0, 1]: an importance, or what a scorer learns beside the model.

    Source: arXiv 2605.00364 (soft weighting).

    Example:
        >>> SoftMask().weight_range
        (0.0, 1.0)
    """

    key: ClassVar[str] = "softmask"
    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    weight_range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    def spec(self) -> WeightSpec:
        return WeightSpec()
