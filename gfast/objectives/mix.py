"""A forget term and a retain term together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gfast.objectives.base import Objective, as_objective


@dataclass(frozen=True)
class Mix(Objective):
    r"""Any combination :math:`L = \gamma L_{forget}(D_u) + \alpha L_{retain}(D_r)`.

    Attributes:
        forget: objective (or function, see ``Weights``) on the forget data. retain: on the retain data, or None.
        gamma, alpha: their factors.

    Source: arXiv 2502.19301, section 5; open-unlearning: gamma and alpha of GradDiff (GA + NLL) and its family.

    Example:
        >>> from gfast.objectives import GA, NLL
        >>> str(Mix(GA(), NLL(), alpha=2.0))
        'GA() + 2 NLL()'
    """

    forget: Objective
    retain: Objective | None = None
    gamma: float = 1.0
    alpha: float = 1.0
    key: ClassVar[str] = "mix"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("forget", "retain"):
            if (term := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_objective(term))
        for side in (self.forget, self.retain):
            self._require(not isinstance(side, Mix), "its terms must be plain objectives, not another Mix.")

    @property
    def needs(self) -> frozenset[str]:
        return self.forget.needs | (self.retain.needs if self.retain else frozenset())

    def __str__(self) -> str:
        terms = [(self.gamma, self.forget)] + ([(self.alpha, self.retain)] if self.retain else [])
        return " + ".join(
            f"{objective}" if factor == 1 else f"{_short(factor)} {objective}" for factor, objective in terms
        )


def _short(factor: object) -> str:
    """A factor in a sum; in the error about one that is no number as it was given."""
    return f"{factor:g}" if isinstance(factor, (int, float)) else repr(factor)
