"""What a G-effect measurement returns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

SIDES = ("unlearn", "retain")
_NEEDS_NORM = (
    "the norm of the objective's gradient was not measured, because over several batches that takes storing one more "
    "gradient; call g_effect(..., norms=True)"
)


@dataclass(repr=False)
class GEffect:
    """The G-effect of one objective on the risk of the forget set and of the retain set, by layer group.

        e(D) = < grad R(D), grad L(D_u) >        unlearn: D = D_u; retain: D = D_r

    Attributes:
        objective: readable label of L.
        risk: readable label of R.
        unlearn, retain: group -> e, in order from the model's input to its output.
        norms: "unlearn" and "retain" -> {group: ||grad R(D)||}, and, where it was measured, "objective" ->
            {group: ||grad L||}.
        counts: what was averaged over: "unlearn" and "retain" -> number of tokens (or sequences) of the risk.
    """

    objective: str
    unlearn: dict[str, float]
    retain: dict[str, float]
    norms: dict[str, dict[str, float]]
    risk: str = "NLL()"
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """Group names from the model's input to its output."""
        return list(self.unlearn)

    def total(self, side: str) -> float:
        """The G-effect over all parameters: the sum over groups. `side` is "unlearn" or "retain"."""
        return math.fsum(self._side(side).values())

    def cosine(self, side: str, group: str | None = None) -> float:
        """cos(grad R(D), grad L) within a group, or over all parameters (None or "total").

        A small cosine warns that the G-effect is a small difference of large numbers. 0/0 is NaN.

        Raises:
            ValueError: an unknown side or group, or a norm that was not measured (with the remedy).
        """
        effects, risk = self._side(side), self.norms[side]
        if "objective" not in self.norms:
            raise ValueError(f"cosine({side!r}) of {self.objective}: {_NEEDS_NORM}")
        own = self.norms["objective"]
        if group is None or group == "total":
            effect, scale = self.total(side), math.hypot(*own.values()) * math.hypot(*risk.values())
        elif group in effects:
            effect, scale = effects[group], own[group] * risk[group]
        else:
            raise ValueError(f"there is no group {group!r}; the groups are {', '.join(effects)} and total")
        return effect / scale if scale else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {quantity, side, group, value}: g_effect, risk_norm, and where known objective_norm and cosine.

        Every quantity has the group "total" too. These are the columns that training records use.
        """
        rows: list[dict[str, Any]] = []

        def add(quantity: str, side: str, values: Mapping[str, float], total: float) -> None:
            for group, value in (*values.items(), ("total", total)):
                rows.append({"quantity": quantity, "side": side, "group": group, "value": value})

        for side in SIDES:
            add("g_effect", side, self._side(side), self.total(side))
        for side in SIDES:
            add("risk_norm", side, self.norms[side], math.hypot(*self.norms[side].values()))
        if "objective" in self.norms:
            add("objective_norm", "", self.norms["objective"], math.hypot(*self.norms["objective"].values()))
            for side in SIDES:
                add("cosine", side, {group: self.cosine(side, group) for group in self.groups}, self.cosine(side))
        return rows

    def to_frame(self) -> pandas.DataFrame:
        """`rows()` as a DataFrame with the columns objective, quantity, side, group, value."""
        import pandas

        frame = pandas.DataFrame(self.rows(), columns=["quantity", "side", "group", "value"])
        frame.insert(0, "objective", self.objective)
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GEffect:
        """The inverse of `to_dict`. Raises ValueError for keys that are missing or unknown."""
        known = [item.name for item in fields(cls)]
        unknown, missing = sorted(set(values) - set(known)), [name for name in known[:4] if name not in values]
        if unknown or missing:
            raise ValueError(f"not a GEffect: unknown keys {unknown}, missing keys {missing}")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON; floats are written so that they read back exactly."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> GEffect:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def _side(self, side: str) -> dict[str, float]:
        if side not in SIDES:
            raise ValueError(f'side must be "unlearn" or "retain", not {side!r}')
        return getattr(self, side)

    def __repr__(self) -> str:
        groups = self.groups if len(self.groups) <= 6 else []  # one column a layer would not fit a line
        lines = [f"G-effect of {self.objective} on {self.risk}" + ("" if groups else f", {len(self.groups)} groups")]
        lines.append(" " * 8 + "".join(f"{group:>12}" for group in (*groups, "total")))
        for side in SIDES:
            values = [self._side(side)[group] for group in groups] + [self.total(side)]
            lines.append(f"{side:<8}" + "".join(f"{value:>12.4g}" for value in values))
        return "\n".join(lines)
