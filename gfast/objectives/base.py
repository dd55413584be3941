"""What an objective is: numbers for the weight family, what data it needs, and what its default reduction counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.weights import WeightSpec


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: frozen, hashable, and printable as ``WGA(alpha=1.0)``.

    Class attributes:
        key: short lower-case name, as used on the command line.
        needs: data a batch must carry beyond input_ids and labels: "weight" (of its tokens), "ref_logp", "ref_hidden",
            "ref_head", "ref_layer_hidden", "preferred" (DPO's pairs) or "refusal" (PO's replaced answers).
        default_reduction: "token_mean" or "sequence_mean".
        weight_range: what a batch's ``weight`` may be, from, to; None: any number. whole_weights: whole numbers only.
        gradient: its form in words, where it does not follow from ``spec``.
        of_batch: whether the sequences of a batch are weighed against each other, so that cutting data into other
            batches gives another loss.
        positive, not_negative: arguments that must be above 0, and at least 0.
    """

    key: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    default_reduction: ClassVar[str] = "token_mean"
    weight_range: ClassVar[tuple[float, float] | None] = None
    whole_weights: ClassVar[bool] = False
    gradient: ClassVar[str] = ""
    of_batch: ClassVar[bool] = False
    positive: ClassVar[tuple[str, ...]] = ()
    not_negative: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("float", "int"):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                self._require(number, f"{field.name} must be a number.")
            if isinstance(value, float):
                self._require(math.isfinite(value), f"{field.name} must be a finite number.")
            if field.type == "int":
                self._require(value == int(value), f"{field.name} must be a whole number.")
                object.__setattr__(self, field.name, int(value))  # 2.0 is no place in a list
            if field.type == "bool":
                self._require(isinstance(value, bool), f"{field.name} must be True or False.")
        for name in self.not_negative:
            self._require(getattr(self, name) >= 0, f"{name} must be >= 0.")
        for name in self.positive:
            self._require(getattr(self, name) > 0, f"{name} must be > 0.")

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


@dataclass(frozen=True, repr=False)
class Weights(Objective):
    r"""Weights of your own: :math:`L = \frac1N \sum_i \mathrm{sg}(w_i) \log p_i`.

    The losses, ``model_loss`` and the G-effect take the bare function as well.

    Attributes:
        function: (logp, ref_logp, sequence_id) -> weights, all [N]: log-probs of the label tokens in at least fp32, the
            same under the original model (None where the batch has no ref_logp), and int64 numbers of the sequences.
            Weights of ignored positions, where logp is 0, are set to 0. It may see the tokens of all sequences or of
            some, so a weight may depend on its own sequence alone.

    Example:
        >>> def half_sure(logp, ref_logp, sequence_id):
        ...     return 4 * logp.exp() * (1 - logp.exp())
        >>> Weights(half_sure)
        Weights(half_sure)
    """

    function: Callable[..., Any]
    key: ClassVar[str] = "weights"

    def __call__(self, logp: Tensor, ref_logp: Tensor | None, sequence_id: Tensor | None) -> Tensor:
        return self.function(logp, ref_logp, sequence_id)

    def __repr__(self) -> str:
        return f"Weights({getattr(self.function, '__name__', type(self.function).__name__)})"


def as_objective(value: Any) -> Objective:
    """An objective as it is, a function as ``Weights``.

    Raises:
        ValueError: something else, such as the class of an objective.
    """
    if isinstance(value, Objective):
        return value
    if callable(value) and not isinstance(value, type):
        return Weights(value)
    raise ValueError(
        f"an objective of gfast.objectives is needed (such as GA()), or a function (logp, ref_logp, sequence_id) -> "
        f"weights, not {value!r}"
    )
