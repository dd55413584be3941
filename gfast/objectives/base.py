"""What an objective is: numbers for the weight family, what data it needs, and what its default reduction counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.weights import WeightSpec


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: frozen, hashable, and printable as ``WGA(alpha=1.0)``.

    Class attributes:
        key: short lower-case name, as used on the command line.
        needs: data a batch must carry beyond input_ids and labels: "ref_logp", "ref_hidden", "ref_head",
            "ref_layer_hidden", "preferred" (DPO's pairs) or "refusal" (PO's replaced answers).
        default_reduction: "token_mean" or "sequence_mean".
    """

    key: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    default_reduction: ClassVar[str] = "token_mean"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                self._require(math.isfinite(value), f"{field.name} must be a finite number.")

    def count(self, labels: Tensor) -> int:
        """What the default reduction divides by: valid tokens, sequences with a valid token, or pairs.

        Args:
            labels: [B, T], already shifted (every entry that is not -100 is scored).
        """
        valid = labels != IGNORE_INDEX
        return int(valid.any(-1).sum() if self.default_reduction == "sequence_mean" else valid.sum())

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"gfast: {self}: {message}")


@dataclass(frozen=True)
class WeightedObjective(Objective):
    """An objective whose gradient is a weighted sum of token log-prob gradients."""

    def spec(self) -> WeightSpec:
        """The numbers that kernels take: see ``gfast.ops.weights``."""
        raise TypeError(f"gfast: {type(self).__name__} defines no weights.")
