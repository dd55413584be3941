"""What measurements return: one base for effects of objectives, steps, samples, tokens and pairs, with one table."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from gfast.sides import SIDES

if TYPE_CHECKING:
    import pandas

# Every result is a tidy table with these columns; those that a kind does not have are empty.
COLUMNS = ("objective", "step", "quantity", "side", "group", "sample", "token", "other", "value")
Norms = dict[str, dict[str, float]]

# In a run folder the name of a file says of which step it is.
_IN_A_RUN = re.compile(r"[a-z]+-\d{8,}\.parquet")
_WHOLE = frozenset({"step", "sample", "token", "other"})


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
        kind_class = {getattr(subclass, "kind", None): subclass for subclass in Effect.__subclasses__()}.get(kind)
        if kind_class is None or not issubclass(kind_class, cls):
            raise ValueError(f"gfast: {path} holds a {kind} effect, not a {getattr(cls, 'kind', 'known')} one")
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        return kind_class._from_rows(rows, scalars)

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def _scalars(self) -> dict[str, Any]:
        return {"risk": self.risk, "counts": self.counts}

    def _side(self, side: str) -> dict[str, Any]:
        if side not in SIDES:
            raise ValueError(f'gfast: side must be "unlearn" or "retain", not {side!r}')
        return getattr(self, side)

    def _group(self, group: str | None) -> str:
        if group is None or group == "total":
            return "total"
        if group not in self.unlearn:
            raise ValueError(f"gfast: there is no group {group!r}; the groups are {', '.join(self.unlearn)} and total")
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
    return {group: row_values(group_rows) for group, group_rows in rows_by(rows, "group").items() if group != "total"}
