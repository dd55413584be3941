"""G-effects of one objective along a run: by step, and what they add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gfast.geffect.groups import depth
from gfast.geffect.results.base import Effect, rows_by
from gfast.geffect.results.g_effect import GEffect
from gfast.sides import SIDES

if TYPE_CHECKING:
    import pandas

_QUANTITIES = ("g_effect", "standard_error", "risk_norm", "objective_norm")


@dataclass(repr=False)
class EffectHistory(Effect):
    """The G-effects that were measured along a run, by optimizer step.

    Attributes:
        steps: optimizer steps, ascending. effects: the GEffect at each of them.
        unlearn, retain: group -> e at each step. norms: the same of norms, NaN at a step where one was not measured.
        objective, risk: the labels that all steps have in common. counts: those that all steps agree on.

    >>> def at(e): return GEffect("GA()", {"all": e}, {"all": -e}, {})
    >>> history = EffectHistory.of({0: at(-1.0), 10: at(-3.0), 15: at(-2.0)})
    >>> history.cumulative("unlearn")
    [0.0, -10.0, -25.0]
    """

    kind: ClassVar[str] = "history"

    steps: list[int]
    effects: list[GEffect]

    @classmethod
    def of(cls, effects: Mapping[int, GEffect]) -> EffectHistory:
        """From effects by step. Raises ValueError for none, or for effects of several objectives or groupings."""
        steps = sorted(effects)
        in_order = [effects[step] for step in steps]
        for what in ("objective", "groups", "risk"):
            several = {str(getattr(effect, what)) for effect in in_order}
            if len(several) != 1:
                raise ValueError(
                    f"gfast: a history is of one {what}, and these effects have {sorted(several) or 'none'}"
                )
        return cls(steps, in_order)

    @classmethod
    def from_records(
        cls,
        rows: pandas.DataFrame | Iterable[Mapping[str, Any]],
        risk: str = "NLL()",
        *,
        objective: str | None = None,
    ) -> EffectHistory:
        """From the records of a run (`gfast.training.read_records`), of one objective.

        Args:
            rows: the records. risk: label of the risk that was measured, which records do not hold.
            objective: its name in the records, where they hold G-effects of several; None where of one.

        Raises:
            ValueError: no G-effect among them, none of this objective, or those of several and none is named.
        """
        records = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
        by_step: dict[int, list[Mapping[str, Any]]] = {}
        for row in records:
            if row["quantity"] in _QUANTITIES:
                by_step.setdefault(int(row["step"]), []).append(row)
        objectives = {str(row["objective"]) for of_step in by_step.values() for row in of_step}
        if objective is None and len(objectives) == 1:
            (objective,) = objectives
        if objective not in objectives:
            raise ValueError(
                f"gfast: the records hold G-effects of {sorted(objectives) or 'no objective'}; choose one with "
                "objective="
            )
        of_it = {step: [row for row in of_step if row["objective"] == objective] for step, of_step in by_step.items()}
        # A step that measured neither side has norms alone.
        by_step = {
            step: of_step
            for step, of_step in of_it.items()
            if any(row["quantity"] == "g_effect" and row["group"] != "total" for row in of_step)
        }
        risks: dict[int, dict[str, float]] = {step: {} for step in by_step}
        for row in records if risk == "NLL()" else ():  # the callback records this one, whatever was measured
            if row["quantity"] == "risk" and row["objective"] == objective and row["step"] in risks:
                risks[int(row["step"])][str(row["side"])] = float(row["value"])
        effects = {}
        for step, of_step in by_step.items():
            of_step.sort(key=lambda row: depth(str(row["group"])))
            scalars = {"objective": objective, "risk": risk, "counts": {}, "risks": risks[step]}
            effects[step] = GEffect._from_rows(of_step, scalars)
        return cls.of(effects)

    @property
    def unlearn(self) -> dict[str, list[float]]:
        return self._by_group("unlearn")

    @property
    def retain(self) -> dict[str, list[float]]:
        return self._by_group("retain")

    @property
    def norms(self) -> dict[str, dict[str, list[float]]]:
        whose = dict.fromkeys(name for effect in self.effects for name in effect.norms)
        return {
            name: {g: [effect.norms.get(name, {}).get(g, math.nan) for effect in self.effects] for g in self.groups}
            for name in whose
        }

    @property
    def objective(self) -> str:
        return self.effects[0].objective

    @property
    def risk(self) -> str:
        return self.effects[0].risk

    @property
    def counts(self) -> dict[str, int]:
        first, *others = (effect.counts for effect in self.effects)
        return {name: n for name, n in first.items() if all(other.get(name) == n for other in others)}

    @property
    def groups(self) -> list[str]:
        return self.effects[0].groups

    def total(self, side: str) -> list[float]:
        """The G-effect over all parameters at each step."""
        return [effect.total(side) for effect in self.effects]

    def values(self, side: str, group: str | None = None) -> list[float]:
        """The G-effect at each step, of a group or of all parameters (None or "total")."""
        return [effect._at(side, group) for effect in self.effects]

    def cumulative(self, side: str, group: str | None = None, learning_rate: float = 1.0) -> list[float]:
        """The G-effects of all optimizer steps before each measured one, added up.

            C_k = learning_rate * sum over measured j < k of (step_{j+1} - step_j) e_j

        A step between two measurements counts with the effect at the earlier one. For plain gradient descent with that
        learning rate, -C_k is the first-order change of the risk since the first measurement; other optimizers scale
        and delay it.

        Returns:
            one float a measured step, the first 0.
        """
        values, total = self.values(side, group), [0.0]
        for k in range(1, len(values)):
            total.append(total[-1] + learning_rate * (self.steps[k] - self.steps[k - 1]) * values[k - 1])
        return total

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {step, quantity, side, group, value}: those of the G-effect at each step, and the quantity
        cumulative.
        """
        rows = [
            {"step": step, **row}
            for step, effect in zip(self.steps, self.effects, strict=True)
            for row in effect.rows()
        ]
        for side in SIDES:
            for group in (*self.groups, "total"):
                added = self.cumulative(side, group)
                rows += [
                    {"step": step, "quantity": "cumulative", "side": side, "group": group, "value": value}
                    for step, value in zip(self.steps, added, strict=True)
                ]
        return rows

    def _by_group(self, side: str) -> dict[str, list[float]]:
        return {group: self.values(side, group) for group in self.groups}

    def _scalars(self) -> dict[str, Any]:
        return {"effects": [effect._scalars() for effect in self.effects]}

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> EffectHistory:
        # GEffect reads what was measured and leaves out what follows from it: cosines and cumulative effects
        by_step = rows_by(rows, "step")
        pairs = zip(by_step.values(), scalars["effects"], strict=True)
        return cls(list(by_step), [GEffect._from_rows(rows_of_step, own) for rows_of_step, own in pairs])

    def __repr__(self) -> str:
        steps = ", ".join(map(str, self.steps[:6])) + (", ..." if len(self.steps) > 6 else "")
        return (
            f"{type(self).__name__}({self.objective} at steps {steps}; {', '.join(self.groups[:6])}; risk {self.risk})"
        )
