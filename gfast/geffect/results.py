"""What measurements return: one base for effects of objectives, steps, samples, tokens and pairs, with one table."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas

SIDES = ("unlearn", "retain")
# Every result is a tidy table with these columns; those that a kind does not have are empty.
COLUMNS = ("objective", "step", "quantity", "side", "group", "sample", "token", "other", "value")
Norms = dict[str, dict[str, float]]

# In a run folder the name of a file says of which step it is.
_IN_A_RUN = re.compile(r"[a-z]+-\d{8,}\.parquet")
_WHOLE = frozenset({"step", "sample", "token", "other"})
_NEEDS_NORM = (
    "the norm of the objective's gradient was not measured, because over several batches that takes storing one more "
    "gradient; call g_effect(..., norms=True) with the stream engine"
)


def standard_error(parts: Tensor, shares: Tensor) -> float:
    """Standard error of a sum over units (batches or samples) that is divided by a count over the same units.

    The sum e = sum_u parts_u already has the count in it; a unit with twice the share of the count is expected to
    contribute twice as much, so what varies is r_u = parts_u - e shares_u / sum shares:

        se = sqrt( U / (U - 1) sum_u r_u^2 )

    over the U units with a share. It is the first-order (delta-method) error of a ratio of means.

    Args:
        parts: [U], fp64. shares: [U], tokens or sequences of each unit.

    Returns:
        float; NaN for fewer than two units, which show no variation.

    >>> import torch
    >>> standard_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    2.0
    """
    counted = shares > 0
    units = int(counted.sum())
    if units < 2:
        return math.nan
    parts, shares = parts[counted].double(), shares[counted].double()
    residual = parts - parts.sum() * shares / shares.sum()
    return math.sqrt(units / (units - 1) * float(residual.square().sum()))


class Effect:
    """The base of all results: groups, the two sides, the tidy table and its file.

    `unlearn` and `retain` map group names, in order from the model's input to its output, to the values of a group:
    numbers (GEffect), lists of them by step (EffectHistory), or tensors of samples, tokens or pairs of samples.
    """

    kind: ClassVar[str]
    unlearn: dict[str, Any]
    retain: dict[str, Any]
    norms: Norms
    risk: str
    counts: dict[str, int]

    @property
    def groups(self) -> list[str]:
        """Group names from the model's input to its output."""
        return list(self.unlearn)

    def total(self, side: str) -> Any:
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def to_frame(self) -> pandas.DataFrame:
        """`rows()` as a DataFrame with those of `COLUMNS` that this kind of effect has."""
        import pandas

        rows = self.rows()
        used = [name for name in COLUMNS if any(name in row for row in rows)]
        frame = pandas.DataFrame(rows, columns=used)
        if "objective" not in used and hasattr(self, "objective"):
            frame.insert(0, "objective", self.objective)
        return frame

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write the table with `COLUMNS` to a Parquet file, whole or not at all; `from_parquet` is its inverse."""
        import pyarrow

        from gfast.tables import write_table

        text, whole = pyarrow.string(), pyarrow.int64()
        kinds = {name: whole if name in _WHOLE else text for name in COLUMNS} | {"value": pyarrow.float64()}
        scalars = {"kind": self.kind, "file": Path(path).name, **self._scalars()}
        schema = pyarrow.schema(kinds.items(), metadata={"gfast_effect": json.dumps(scalars)})
        table = pyarrow.Table.from_pylist(self.rows(), schema=schema)
        if hasattr(self, "objective"):
            names = pyarrow.array([self.objective] * len(table), text)
            table = table.set_column(0, schema.field(0), names)
        return write_table(path, table)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str]) -> Any:
        """The effect that `to_parquet` wrote, of its own class.

        Raises:
            DamagedFile: a file that cannot be read, is not as it was written, or is no effect at all.
            ValueError: a file that holds another kind of effect than the class it is asked of.
        """
        from gfast.files import DamagedFile
        from gfast.tables import read_table

        remedy = "restore it from a copy, or measure again"
        table = read_table(path, remedy)
        try:
            scalars = json.loads((table.schema.metadata or {})[b"gfast_effect"])
            kind, name = scalars.pop("kind"), scalars.pop("file", Path(path).name)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(path, f"it is no effect written by gfast ({error})", remedy) from error
        if name != Path(path).name and _IN_A_RUN.fullmatch(name) and _IN_A_RUN.fullmatch(Path(path).name):
            raise DamagedFile(path, f"it is {name} under another name", f"give it its name back, {remedy}")
        found = {getattr(one, "kind", None): one for one in Effect.__subclasses__()}.get(kind)
        if found is None or not issubclass(found, cls):
            raise ValueError(f"{path} holds a {kind} effect, not a {getattr(cls, 'kind', 'known')} one")
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        return found._from_rows(rows, scalars)

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def _scalars(self) -> dict[str, Any]:
        return {"risk": self.risk, "counts": self.counts}

    def _side(self, side: str) -> dict[str, Any]:
        if side not in SIDES:
            raise ValueError(f'side must be "unlearn" or "retain", not {side!r}')
        return getattr(self, side)

    def _group(self, group: str | None) -> str:
        if group is None or group == "total":
            return "total"
        if group not in self.unlearn:
            raise ValueError(f"there is no group {group!r}; the groups are {', '.join(self.unlearn)} and total")
        return group

    def _at(self, side: str, group: str | None) -> Any:
        """The values of a group, or the total (None or "total")."""
        effects, group = self._side(side), self._group(group)
        return self.total(side) if group == "total" else effects[group]

    def _norm_rows(self) -> list[dict[str, Any]]:
        """Rows of the norms of the risk's gradients, with their total over all groups."""
        return [
            {"quantity": "risk_norm", "side": side, "group": group, "value": value}
            for side in SIDES
            if side in self.norms
            for group, value in (*self.norms[side].items(), ("total", math.hypot(*self.norms[side].values())))
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.groups)} groups: {', '.join(self.groups[:6])}; risk {self.risk})"


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

    def total(self, side: str) -> float:
        """The G-effect over all parameters: the sum over groups. `side` is "unlearn" or "retain"."""
        return math.fsum(self._side(side).values())

    def cosine(self, side: str, group: str | None = None) -> float:
        """cos(grad R(D), grad L) within a group, or over all parameters (None or "total").

        A small cosine warns that the G-effect is a small difference of large numbers. 0/0 is NaN.

        Raises:
            ValueError: an unknown side or group, or a norm that was not measured (with the remedy).
        """
        self._side(side)
        risk = self.norms.get(side, {})
        if "objective" not in self.norms or not risk:
            raise ValueError(f"cosine({side!r}) of {self.objective}: {_NEEDS_NORM}")
        own = self.norms["objective"]
        group = self._group(group)
        scale = math.hypot(*own.values()) * math.hypot(*risk.values()) if group == "total" else own[group] * risk[group]
        return self._at(side, group) / scale if scale else math.nan

    def standard_error(self, side: str, group: str | None = None) -> float:
        """Standard error of the G-effect of a group, or of the total (None).

        Raises:
            ValueError: an unknown side or group, or nothing to estimate it from.
        """
        self._side(side)
        if not self.errors:
            raise ValueError(
                f"the standard error of {self.objective} is not known: it takes two or more batches of an objective "
                f"that is measured by passes of its own (GA and NLL follow from the directions); over samples, "
                f"pg_effect(...).g_effect(objective) gives it for GA and objectives with one weight a sequence, "
                f"token_effect(...).g_effect(objective) for every objective with token weights"
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
                f"{self.objective} has no single count to scale by (a combination of terms, or no labelled token)"
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

        for side in SIDES:
            add("g_effect", side, self._side(side), self.total(side))
        rows += [
            {"quantity": "standard_error", "side": side, "group": group, "value": value}
            for side, errors in self.errors.items()
            for group, value in errors.items()
        ]
        rows += self._norm_rows()
        if "objective" in self.norms:
            add("objective_norm", "", self.norms["objective"], math.hypot(*self.norms["objective"].values()))
            for side in SIDES:
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
            raise ValueError(f"not a GEffect: unknown keys {unknown}, missing keys {missing}")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON; floats are written so that they read back exactly."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> GEffect:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def _scalars(self) -> dict[str, Any]:
        return {"objective": self.objective, "risks": self.risks, **super()._scalars()}

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> GEffect:
        found: dict[str, dict[str, dict[str, float]]] = {}
        for row in rows:
            if row["group"] != "total" or row["quantity"] == "standard_error":
                found.setdefault(row["quantity"], {}).setdefault(row["side"], {})[row["group"]] = row["value"]
        norms = found.get("risk_norm", {})
        if "objective_norm" in found:
            norms["objective"] = found["objective_norm"][""]
        sides = {side: found["g_effect"][side] for side in SIDES}
        return cls(**scalars, **sides, norms=norms, errors=found.get("standard_error", {}))

    def __repr__(self) -> str:
        groups = self.groups if len(self.groups) <= 6 else []  # one column a layer would not fit a line
        lines = [f"G-effect of {self.objective} on {self.risk}" + ("" if groups else f", {len(self.groups)} groups")]
        lines.append(" " * 8 + "".join(f"{group:>12}" for group in (*groups, "total")))
        for side in SIDES:
            values = [self._side(side)[group] for group in groups] + [self.total(side)]
            lines.append(f"{side:<8}" + "".join(f"{value:>12.4g}" for value in values))
        return "\n".join(lines)


def rows_by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Rows of a table by the value of a column, in the order of the table."""
    parts: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(row)
    return parts


def row_values(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Values of rows, fp64 [rows]."""
    return torch.tensor([row["value"] for row in rows], dtype=torch.float64, device="cpu")


def tensors_by_group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Group -> fp64 [its rows]. The total is left out: it follows from the groups."""
    return {group: row_values(some) for group, some in rows_by(rows, "group").items() if group != "total"}
