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

    Which tokens are chosen is a method's own affair: `gfast.data.top_tokens` makes a mask of any scores of tokens. N
    counts all labels, chosen or not; where a method divides by the chosen ones, its factor is N over their number.

    Source: the form alone of arXiv 2605.00364 (hard selection), arXiv 2506.00876 and arXiv 2510.00125, of which only
    the abstracts were read: how they choose is not computed here.

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

    Source: the form alone of arXiv 2605.00364 (soft weighting), of which only the abstract was read: its scores are not
    computed here.

    Example:
        >>> SoftMask().weight_range
        (0.0, 1.0)
    """

    key: ClassVar[str] = "softmask"
    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    weight_range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    def spec(self) -> WeightSpec:
        return WeightSpec()
