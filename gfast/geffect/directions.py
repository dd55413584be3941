"""Directions: the risk's gradients on the forget and the retain set, stored where there is room for them.

Every engine but gram dots gradients with these two. They cost two passes over the data; measured once, they serve any
number of measurements of the same model: `gfast.risk_gradients` gives them, `directions=` takes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfast import sharded, wrappers
from gfast.files import DamagedFile, read_json, undamaged, write_json
from gfast.geffect.backward import Job, Passes, job_label
from gfast.geffect.data import Data, Term
from gfast.geffect.groups import GroupMap
from gfast.geffect.processes import Processes
from gfast.geffect.storage import FileStore, Store, store_for, sum_dtype
from gfast.model_settings import difference, settings_of
from gfast.objectives import Objective
from gfast.ops.grad_dot import dots_of_each
from gfast.sides import SETS, SIDES

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
FORMAT = "gfast-directions-3"
# Of earlier versions; their files have no checksums.
KNOWN_FORMATS = ("gfast-directions-2", FORMAT)
REMEDY = "measure the directions again with gfast.risk_gradients"
DESCRIPTION = "directions.json"
GATHERED = 1 / 16  # of the largest gradient: the bytes of those that wait for each other


class Directions:
    """The gradients of a risk on both sets, parameter by parameter, and what is known of them.

    Attributes:
        names: trainable parameters, as `model.named_parameters()` calls them, in the model's order.
        groups: the group of each.
        gram: fp64 [G, 2, 2], dot products of the two gradients by group; index 0 is the forget set, 1 the retain set.
        counts: "unlearn" and "retain" -> what the risk was averaged over.
        risk: readable label of the risk.
        squares: fp64 [P], squared norm of each parameter of the model that they belong to.
        risks: "unlearn" and "retain" -> the risk itself.
        data: "forget" and "retain" -> fingerprint of the data.
        processes: those that hold a shard of every gradient each, if FSDP2 shards the model.
        frozen: squared norms of the model's other weights by name, which decide its gradients as well, and settings: of
            its configuration and adapters; None: not known, of files that an earlier version wrote.
    """

    def __init__(
        self,
        groups: GroupMap,
        stores: list[Store],
        gram: Tensor,
        counts: dict[str, int],
        risk: str,
        squares: Tensor,
        risks: dict[str, float],
        data: dict[str, str],
        processes: Processes = Processes(),  # noqa: B008 - frozen
        frozen: dict[str, float] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.groups, self.stores, self.gram = groups, stores, gram
        self.counts, self.risk, self.squares, self.risks = counts, risk, squares, risks
        self.data, self.processes, self.frozen, self.settings = data, processes, frozen, settings
        self.names = list(groups.index)
        self._position = {name: index for index, name in enumerate(self.names)}

    def get(self, side: int, name: str) -> Tensor | None:
        """The gradient of the risk on a side (0 forget, 1 retain) by a parameter, on the device; None is zero."""
        return self.stores[side].get(self._position[name])

    def norms(self) -> dict[str, dict[str, float]]:
        """Side ("unlearn", "retain") -> {group: norm of the risk's gradient}."""
        return {side: self.groups.named(self.gram[:, k, k].sqrt()) for k, side in enumerate(SIDES)}

    def check(self, model: nn.Module, groups: GroupMap, risk: Objective) -> None:
        """Raise ValueError unless these are directions of this model, grouping and risk, and say what differs."""
        why = "measure them again with gfast.risk_gradients"
        if str(risk) != self.risk:
            raise ValueError(f"gfast: these directions are of the risk {self.risk}, not {risk}: {why}")
        if groups != self.groups:
            missing = sorted(set(groups.index) ^ set(self.groups.index))
            what = f"parameter {missing[0]!r} is trainable in only one of them" if missing else "the groups differ"
            raise ValueError(f"gfast: these directions are of another model or grouping ({what}): {why}")
        # The sums repeat to about 1e-8 between instruction sets and devices; one small optimizer step shows above that.
        now = parameter_squares(model, self.names, self.processes).tolist()
        known = [("parameters", dict(zip(self.names, zip(self.squares.tolist(), now, strict=True), strict=True)))]
        if self.frozen is not None:
            frozen = frozen_squares(model, self.names, self.processes)
            names = {**self.frozen, **frozen}
            # one that only one of them has: -1, which is no square
            known += [("frozen parameters", {n: (self.frozen.get(n, -1.0), frozen.get(n, -1.0)) for n in names})]
        for what, pairs in known:
            wrong = [name for name, (then, now) in pairs.items() if abs(now - then) > 1e-7 * max(then, 1e-30)]
            if wrong:
                raise ValueError(
                    f"gfast: these directions were measured at other weights: {len(wrong)} of {len(pairs)} {what} "
                    f"have changed, first {wrong[0]!r}; {why}"
                )
        if (other := difference(self.settings, settings_of(model))) is not None:
            raise ValueError(f"gfast: these directions were measured with other settings of the model: {other}; {why}")
        for store in self.stores:
            store.move_to(next(model.parameters()).device)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the directions to a folder (two safetensors files and a description); `load` reads them back."""
        if self.processes.sharded:
            raise ValueError(
                "gfast: each process has a shard of these directions, and a folder would be of one alone: measure them "
                "on a model that is not sharded to save them"
            )
        folder = Path(folder)
        checksums = [
            FileStore.write(folder / f"{side}.safetensors", {n: store.get(i) for i, n in enumerate(self.names)})
            for store, side in zip(self.stores, SIDES, strict=True)
        ]
        return self._describe(folder, checksums)

    def _describe(self, folder: Path, checksums: list[str | None]) -> Path:
        description = {
            "format": FORMAT,
            "risk": self.risk,
            "counts": self.counts,
            "risks": self.risks,
            "groups": self.groups.names,
            "parameters": list(self.groups.index.items()),  # in order
            "gram": self.gram.flatten().tolist(),
            "squares": self.squares.tolist(),
            "frozen": self.frozen,
            "settings": self.settings,
            "data": self.data,
            "files": dict(zip(SIDES, checksums, strict=True)),
        }
        write_json(folder / DESCRIPTION, description)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Directions:
        """Directions saved by `save`, memory-mapped: a parameter's part is read when it is asked for.

        Raises:
            ValueError: a folder that holds no directions, or (DamagedFile) damaged ones. The values of a parameter are
                checked when they are first read.
        """
        folder = Path(folder)
        path = folder / DESCRIPTION
        try:
            description = read_json(path, REMEDY)
            stored = str(description["format"])
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"gfast: {folder} holds no directions that can be read ({error})") from error
        if stored not in KNOWN_FORMATS:
            raise ValueError(f"gfast: {folder} holds no directions that can be read (their format is {stored!r})")
        with undamaged(path, REMEDY):
            groups = GroupMap(description["groups"], dict(description["parameters"]))
            names = list(groups.index)
            stores = [FileStore(folder / f"{side}.safetensors", names) for side in SIDES]
            gram = torch.tensor(description["gram"], dtype=torch.float64, device="cpu").view(len(groups.names), 2, 2)
            squares = torch.tensor(description["squares"], dtype=torch.float64, device="cpu")
            frozen = description.get("frozen")
            frozen = None if frozen is None else {str(name): float(square) for name, square in frozen.items()}
            risks = {side: float(description["risks"][side]) for side in SIDES}
            data = {source: str(description["data"][source]) for source in SETS}
            expected = description["files"] if stored == FORMAT else {side: None for side in SIDES}
        for store, side in zip(stores, SIDES, strict=True):
            if store.checksum != expected[side]:
                raise DamagedFile(store.path, f"it is not the file that {DESCRIPTION} was written with", REMEDY)
        about = (description["counts"], description["risk"], squares, risks, data)
        return cls(groups, stores, gram, *about, frozen=frozen, settings=description.get("settings"))

    def __enter__(self) -> Directions:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        for store in self.stores:
            store.close()

    def __repr__(self) -> str:
        return f"Directions({len(self.names)} parameters, risk {self.risk}, {self.counts}, {self.stores[0]})"


def collect(
    passes: Passes, risk: Objective, groups: GroupMap, dtype: torch.dtype, storage: str | os.PathLike[str]
) -> Directions:
    """Measure the gradients of the risk on both sets."""
    stores: list[Store] = []
    gram = torch.zeros(passes.num_groups, 2, 2, dtype=torch.float64, device="cpu")
    for side, source in enumerate(SETS):
        job = ((1.0, Term(risk, source)),)
        into = store_for(storage, dtype, source, passes.names, passes.device)
        table, gradient = accumulate(passes, job, stores, into)
        sums = passes.by_group(table, job_label(job))  # [G, side + 1]
        for other in range(side + 1):
            gram[:, side, other] = gram[:, other, side] = sums[:, other]
        stores.append(gradient)
    counts = risk_counts(passes.data, risk)
    squares = parameter_squares(passes.model, passes.names, passes.processes)
    directions = Directions(
        groups,
        stores,
        gram,
        counts,
        str(risk),
        squares,
        passes.risks(risk),
        passes.data.fingerprints(),
        passes.processes if passes.processes.sharded else Processes(),
        frozen_squares(passes.model, passes.names, passes.processes),
        settings_of(passes.model),
    )
    if isinstance(stores[0], FileStore):
        directions._describe(Path(storage), [store.checksum for store in stores])
    return directions


def risk_counts(data: Data, risk: Objective) -> dict[str, int]:
    """What the risk is averaged over on each side."""
    return {"unlearn": data.count(Term(risk, "forget")), "retain": data.count(Term(risk, "retain"))}


def accumulate(passes: Passes, job: Job, stores: list[Store], into: Store) -> tuple[Tensor, Store]:
    """The gradient over all batches of a job, stored: its dots with `stores` and itself [P, len + 1], and the store.

    The sum over batches is made in fp32 (fp64 for fp64) and rounded once, when it is complete.
    """
    gathered = Dots(stores, passes.parameters, waits=type(into) is Store)
    work = passes.work(job)
    last = len(work) - 1

    def consume(index: int, grad: Tensor, position: int) -> None:
        whole = into.add(index, grad, single=last == 0)
        if (
            position == last and not passes.processes.replicated
        ):  # dotted soon, because the gradient is still in the cache
            gathered.add(index, whole)

    passes.backward(work, consume)
    rows = gathered.rows()
    if passes.processes.replicated:
        rows = [None] * len(rows)
        _sum_over_processes(passes, into)
    for index, row in enumerate(rows):  # a parameter that the last batch did not reach
        whole = into.sum_of(index) if row is None else None
        if whole is not None:
            gathered.add(index, whole)
    rows = [row if late is None else late for row, late in zip(rows, gathered.rows(), strict=True)]
    table = passes.table(rows, len(stores) + 1)
    into.finish()
    # of the whole gradient, the same in every process
    return table if not passes.processes.replicated else table * (passes.processes.rank == 0), into


def _sum_over_processes(passes: Passes, into: Store) -> None:
    """A gradient's sums over this process's batches become those over all."""
    sums = [into.sum_of(index) for index in range(len(passes.parameters))]
    there = passes.processes.sum(torch.tensor([x is not None for x in sums], dtype=torch.int32, device=passes.device))
    for index, (total, parameter, count) in enumerate(zip(sums, passes.parameters, there.tolist(), strict=True)):
        if count:
            wide = sum_dtype(parameter) if total is None else sum_dtype(total)
            total = torch.zeros_like(parameter, dtype=wide) if total is None else total.to(wide)
            into.put(index, passes.processes.sum(total.detach()))


class Dots:
    """Dots of gradients with the stored ones, of several parameters in a call: a call takes longer than a small
    gradient does.

    What waits is no more than `GATHERED` of the largest gradient, which has to be held in any case. None waits without
    `waits`, or where stored ones are lent for a moment only, from a file or the host.

    adds: a parameter's second gradient adds to the first; else it stands in its place.
    """

    def __init__(
        self, stores: list[Store], parameters: list[nn.Parameter], waits: bool = True, adds: bool = False
    ) -> None:
        self.stores, self.count, self.adds = stores, len(parameters), adds
        waits = waits and all(type(store) is Store for store in stores)
        largest = max((sharded.local(parameter).nbytes for parameter in parameters), default=0)
        self.limit = GATHERED * largest if waits else 0
        self._start()

    def _start(self) -> None:
        self.dots: list[Tensor | None] = [None] * self.count
        self.waiting: dict[int, Tensor] = {}
        self.bytes = 0

    def add(self, index: int, x: Tensor) -> bool:
        """Take a parameter's gradient; returns whether it is its first."""
        size, elsewhere = x.nbytes, any(x.device != y.device for y in self.waiting.values())
        alone = size > self.limit
        if index in self.waiting or elsewhere or (not alone and self.bytes + size > self.limit):
            self._flush()
        first = self.dots[index] is None
        if alone:
            self._dot({index: x})
        else:
            self.waiting[index] = x
            self.bytes += size
        return first

    def rows(self) -> list[Tensor | None]:
        """By parameter, since the last time: [stores + 1] fp64 on its device, the dots with the stored gradients, then
        the squared norm; None where there was no gradient."""
        self._flush()
        finished = self.dots
        self._start()
        return finished

    def _flush(self) -> None:
        self._dot(self.waiting)
        self.waiting, self.bytes = {}, 0

    def _dot(self, gradients: dict[int, Tensor]) -> None:
        by_present: dict[tuple[bool, ...], list[int]] = {}  # a gradient that is not stored is zero
        stored = {i: [_beside(x, store.get(i)) for store in self.stores] for i, x in gradients.items()}
        for index, ys in stored.items():
            by_present.setdefault(tuple(y is not None for y in ys), []).append(index)
        for present, indices in by_present.items():
            columns = [column for column, there in enumerate(present) if there]
            xs, ys = [gradients[i] for i in indices], [[stored[i][c] for i in indices] for c in columns]
            values = dots_of_each(xs, ys)  # [n, columns + 1]
            if not all(present):
                full = values.new_zeros(len(xs), len(present) + 1)
                full[:, [*columns, len(present)]] = values
                values = full
            for index, row in zip(indices, values, strict=True):
                before = self.dots[index] if self.adds else None
                self.dots[index] = row if before is None else before + row


def _beside(x: Tensor, y: Tensor | None) -> Tensor | None:
    """y on the device of x: stores of the host and of files lend all on that of the model's first parameter."""
    return None if y is None else y.to(x.device)


def parameter_squares(model: nn.Module, names: list[str], processes: Processes) -> Tensor:
    """Squared norms of parameters, fp64 [P] on the CPU: they tell one set of weights from another at one read."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    squares = dots_of_each([sharded.local(parameters[name].detach()) for name in names], [])[:, 0]
    return (processes.dots(squares) if processes.sharded else squares).cpu()


def frozen_squares(model: nn.Module, names: list[str], processes: Processes) -> dict[str, float]:
    """The same of all other parameters, by name; without those that quantisation packs, 8-bit ones too."""
    known, named = set(names), {name: sharded.local(p) for name, p in model.named_parameters()}
    others = [n for n, p in named.items() if n not in known and wrappers.is_whole(p) and p.dtype.itemsize > 1]
    return dict(zip(others, parameter_squares(model, others, processes).tolist(), strict=True)) if others else {}
