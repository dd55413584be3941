"""The G-effect of an objective."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from gfast.geffect.results.base import Effect, Norms
from gfast.sides import SIDES

_NEEDS_NORM = (
    "the norm of the objective's gradient was not measured, because over several batches that takes storing one more "
    "gradient; call g_effect(..., norms=True) with the stream engine"
)


@dataclass(repr=False)
class GEffect(Effect):
    """The G-effect of one objective on the risk of the forget set and of the retain set, by layer group.

        e(D) = < grad R(D), grad L(D_u) >        unlearn: D = D_u; retain: D = D_r

    Attributes:
        objective: readable label of L.
        risk: readable label of R.
        unlearn, retain: group -> e, in order from the model's input to its output.
        norms: "unlearn" and "retain" -> {group: ||grad R(D)||}, and, where it was measured, "objective" ->
            {group: ||grad L||}.
        counts: what was averaged over: "unlearn" and "retain" -> number of tokens (or sequences) of the risk;
            "objective" -> what the objective's reduction divides by, "objective_tokens" -> its labelled tokens.
        errors: "unlearn" and "retain" -> {group or "total": standard error of e over the objective's batches (or
            samples, where those were measured), the risk's gradient taken as given}; empty where a single batch or an
            identity shows no variation.
        risks: "unlearn" and "retain" -> R(D), which the passes that measure its gradient give; empty
            where there was none: after the gram engine, and of effects made from those of samples or tokens.
        measured: of a training step (`gfast.GEffectMonitor`), how each side was measured, and the step's norm. A side
            that was not measured is NaN, and has no rows.
    """

    kind: ClassVar[str] = "objective"

    objective: str
    unlearn: dict[str, float]
    retain: dict[str, float]
    norms: Norms
    risk: str = "NLL()"
    counts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    risks: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> list[str]:
        """The sides that were measured."""
        return [side for side in SIDES if not all(map(math.isnan, self._side(side).values()))]

    def total(self, side: str) -> float:
        """The G-effect over all parameters: the sum over groups. `side` is "unlearn" or "retain"."""
        values = list(self._side(side).values())
        return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)  # fsum raises at inf - inf

    def cosine(self, side: str, group: str | None = None) -> float:
        """cos(grad R(D), grad L) within a group, or over all parameters (None or "total").

        A small cosine warns that the G-effect is a small difference of large numbers. 0/0 is NaN.

        Raises:
            ValueError: an unknown side or group, or a norm that was not measured (with the remedy).
        """
        self._side(side)
        risk = self.norms.get(side, {})
        if "objective" not in self.norms or not risk:
            raise ValueError(f"gfast: cosine({side!r}) of {self.objective}: {_NEEDS_NORM}")
        norms = self.norms["objective"]
        group = self._group(group)
        scale = (
            math.hypot(*norms.values()) * math.hypot(*risk.values()) if group == "total" else norms[group] * risk[group]
        )
        return self._at(side, group) / scale if scale else math.nan

    def standard_error(self, side: str, group: str | None = None) -> float:
        """Standard error of the G-effect of a group, or of the total (None).

        Raises:
            ValueError: an unknown side or group, or nothing to estimate it from.
        """
        self._side(side)
        if not self.errors:
            raise ValueError(
                f"gfast: the standard error of {self.objective} is not known: it takes two or more batches of an "
                f"objective that is measured by passes of its own (GA and NLL follow from the directions); over "
                f"samples, pg_effect(...).g_effect(objective) gives it for GA and objectives with one weight a "
                f"sequence, token_effect(...).g_effect(objective) for every objective with token weights"
            )
        return self.errors[side][self._group(group)]

    def per_token(self, side: str, group: str | None = None) -> float:
        """The effect with the objective's gradient per labelled token: e times its count over its number of tokens.

        A sum over sequences (NPO's default) is larger than a mean over tokens by the mean length and says nothing
        about the objective; on this scale objectives compare.

        Raises:
            ValueError: an unknown side or group, or an objective of several terms, which has no single count.
        """
        if not self.counts.get("objective_tokens"):
            raise ValueError(
                f"gfast: {self.objective} has no single count to scale by (a combination of terms, or no labelled "
                f"token)"
            )
        return self._at(side, group) * self.counts["objective"] / self.counts["objective_tokens"]

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {quantity, side, group, value}: g_effect, risk_norm, and where known standard_error, objective_norm
        and cosine.

        Every quantity has the group "total" too. These are the columns that training records use.
        """
        rows: list[dict[str, Any]] = []

        def add(quantity: str, side: str, values: Mapping[str, float], total: float) -> None:
            for group, value in (*values.items(), ("total", total)):
                rows.append({"quantity": quantity, "side": side, "group": group, "value": value})

        for side in self.sides:
            add("g_effect", side, self._side(side), self.total(side))
        rows += [
            {"quantity": "standard_error", "side": side, "group": group, "value": value}
            for side, errors in self.errors.items()
            for group, value in errors.items()
        ]
        rows += self._norm_rows()
        if "objective" in self.norms:
            add("objective_norm", "", self.norms["objective"], math.hypot(*self.norms["objective"].values()))
            for side in self.sides:
                if side not in self.norms:
                    continue
                add("cosine", side, {group: self.cosine(side, group) for group in self.groups}, self.cosine(side))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GEffect:
        """The inverse of `to_dict`. Raises ValueError for keys that are missing or unknown."""
        known = [item.name for item in fields(cls)]
        unknown, missing = sorted(set(values) - set(known)), [name for name in known[:4] if name not in values]
        if unknown or missing:
            raise ValueError(f"gfast: not a GEffect: unknown keys {unknown}, missing keys {missing}")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON; floats are written so that they read back exactly."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> GEffect:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def _scalars(self) -> dict[str, Any]:
        return {"objective": self.objective, "risks": self.risks, "measured": self.measured, **super()._scalars()}

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> GEffect:
        by_quantity: dict[str, dict[str, dict[str, float]]] = {}
        for row in rows:
            if row["group"] != "total" or row["quantity"] == "standard_error":
                by_quantity.setdefault(row["quantity"], {}).setdefault(row["side"], {})[row["group"]] = row["value"]
        norms = by_quantity.get("risk_norm", {})
        if "objective_norm" in by_quantity:
            norms["objective"] = by_quantity["objective_norm"][""]
        effects = by_quantity["g_effect"]
        nothing = dict.fromkeys(next(iter(effects.values())), math.nan)
        sides = {side: effects.get(side, nothing) for side in SIDES}
        return cls(**scalars, **sides, norms=norms, errors=by_quantity.get("standard_error", {}))

    def __repr__(self) -> str:
        groups = self.groups if len(self.groups) <= 6 else []  # one column a layer would not fit a line
        lines = [f"G-effect of {self.objective} on {self.risk}" + ("" if groups else f", {len(self.groups)} groups")]
        lines.append(" " * 8 + "".join(f"{group:>12}" for group in (*groups, "total")))
        for side in SIDES:
            values = [self._side(side)[group] for group in groups] + [self.total(side)]
            apart = self.measured and side not in self.sides  # a training step may leave a side out
            shown = f"{'not measured':>14}" if apart else "".join(f"{value:>12.4g}" for value in values)
            lines.append(f"{side:<8}{shown}")
        return "\n".join(lines)
