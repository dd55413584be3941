# SPDX-License-Identifier: Apache-2.0
"""What the report knows of a run: its records as series over optimizer steps, and its settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gfast.files import files_like, readable
from gfast.geffect.groups import depth
from gfast.sides import SETS, SIDES

# Titles and captions of the figures, formulas of the objectives.
TEXTS: dict[str, Any] = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))

LIVE = " (live)"  # what the names of effects end with that training steps measured (gfast.training.live)


@dataclass(frozen=True)
class Run:
    """One unlearning run read back from its folder."""

    folder: Path
    name: str
    label: str
    objective: str
    info: dict[str, Any]
    records: pd.DataFrame
    seeds: tuple[Run, ...] = ()  # of the mean of several runs: those runs
    of_batches: bool = False  # measured by training steps: its NLL is that of each step's batches, not of whole sets
    along: str | None = None  # the objective of the training that it was only measured along, whose the NLL is
    ended: str | None = None  # how its folder says that the training diverged, whatever was measured along it

    def series(self, quantity: str, side: str = "", group: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one recorded quantity, ordered by step; both empty where it was not recorded.

        Values that are not finite are returned as they are, so that a caller can count them.
        """
        rows = self.records
        rows = rows[(rows["quantity"] == quantity) & (rows["side"] == side) & (rows["group"] == group)]
        rows = rows.sort_values("step", kind="stable")
        return rows["step"].to_numpy(np.int64), rows["value"].to_numpy(np.float64)

    def band(self, quantity: str, side: str = "", group: str = "") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, and the lowest and the highest of the seeds there; all empty where there are not two of them."""
        if len(self.seeds) < 2:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        series = [dict(zip(*map(list, run.series(quantity, side, group)), strict=True)) for run in self.seeds]
        steps = sorted(set.intersection(*(set(by_step) for by_step in series)))
        values = np.array([[by_step[step] for step in steps] for by_step in series], dtype=np.float64)  # [seeds, steps]
        return np.array(steps, np.int64), values.min(axis=0), values.max(axis=0)

    @property
    def groups(self) -> list[str]:
        """Layer groups with a recorded G-effect, from the input of the model to its output, without the total."""
        names = self.records.loc[self.records["quantity"] == "g_effect", "group"].unique()
        return sorted((name for name in names if name != "total"), key=depth)

    @property
    def steps(self) -> np.ndarray:
        return np.unique(self.records["step"].to_numpy(np.int64))

    @property
    def once(self) -> bool:
        """Whether it is one state of a model, as `gfast geffect` measures it: it has no course and no end to judge."""
        return len(self.steps) == 1

    @property
    def diverged(self) -> str | None:
        """How it is seen that the model ended as one of NaN or infinite numbers; None where nothing says so."""
        return self.ended or next(filter(None, (_broken(self, "g_effect", side, "total") for side in SIDES)), None)

    @property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """The numbers of evaluations along the run, by step (`gfast.EvaluateCallback`)."""
        from gfast.evaluation.results import read_summaries

        return {} if self.seeds or self.of_batches else read_summaries(self.folder / "evaluations")

    @property
    def measured_on(self) -> list[Any] | None:
        """Which rows the NLL along the run is of, as far as run.json says: checksums of both sets, and how many of each
        were measured.
        """
        sums, config = self.info.get("data_sha256"), self.info.get("config")
        if self.of_batches or not isinstance(sums, dict) or not isinstance(config, dict):
            return None
        return [*sorted(sums.values()), int(config.get("geffect_samples") or 0)]

    def effect_files(self, kind: str) -> list[Path]:
        return sorted((self.folder / "effects").glob(f"{kind}-*.parquet"))

    def effects(self, kind: str) -> list[tuple[int, Any]]:
        """Steps and effects of samples or tokens (`kind`), ordered by step; empty where none were recorded."""
        from gfast.geffect import Effect

        files = self.effect_files(kind)
        return [(int(path.stem.rpartition("-")[2]), Effect.from_parquet(path)) for path in files]

    @property
    def texts(self) -> list[dict[str, Any]]:
        """The words behind the tokens, a dict a sample; empty where they were not recorded."""
        from gfast.files import read_json
        from gfast.training.records import token_texts_file

        path = token_texts_file(self.folder)
        content = read_json(path) if path.exists() else []
        return content["samples"] if isinstance(content, dict) else content  # earlier versions wrote the list alone

    @property
    def record_files(self) -> list[Path]:
        return files_like(self.folder / "records", "*.parquet")


def load_runs(folders: list[Path]) -> list[Run]:
    """Read run folders in the given order. Runs of the same objective are told apart by the name of their folder,
    with as many of the folders it lies in as it takes.

    Raises:
        FileNotFoundError: a folder has no records.
        ValueError: no folder was given, or one was given twice.
    """
    from gfast.training.records import read_records, read_run_info

    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ValueError("a report needs at least one run folder (a folder with run.json and records/)")
    twice = {folder for folder in folders if [f.resolve() for f in folders].count(folder.resolve()) > 1}
    if twice:
        raise ValueError(f"run folder given twice: {min(map(str, twice))}")
    read = []
    for folder in folders:
        if not files_like(folder / "records", "*.parquet"):
            if inside := sorted(path.parent for path in folder.glob("runs/*/*/records")):
                raise FileNotFoundError(f"{folder} is the folder of a study: give one of its runs, such as {inside[0]}")
            raise FileNotFoundError(
                f"{folder} holds no records: expected {folder / 'records'}/step-*.parquet; "
                "pass the folder of a run of gfast unlearn, of gfast geffect --output_dir, or of a GEffectCallback"
            )
        info = read_run_info(folder) if (folder / "run.json").exists() else {}
        # A folder may hold several objectives measured along one run (gfast geffect): each is a curve of its own.
        frame = read_records(folder)
        trained, ended = _trained(frame, info), _ended(folder, frame)
        for objective, rows in frame.groupby("objective", sort=False):
            along = None if str(objective) == trained else trained
            read.append((folder, str(objective), info, rows.reset_index(drop=True), along, ended))
    labels = [_short(objective) for _, objective, *_ in read]
    names = distinct_names(folders)
    return [
        Run(
            folder,
            names[folder],
            label if labels.count(label) == 1 else f"{label} · {names[folder]}",
            *rest,
            of_batches=rest[0].endswith(LIVE),
            along=None if rest[0].endswith(LIVE) else along,
            ended=ended,
        )
        for label, (folder, *rest, along, ended) in zip(labels, read, strict=True)
    ]


def _ended(folder: Path, frame: pd.DataFrame) -> str | None:
    """How a folder says that its training diverged: diverged.json, or the last NLL or loss of its records."""
    from gfast.training.records import read_diverged

    if mark := read_diverged(folder):
        return f"at step {mark['step']} {mark['why']}"
    whole = Run(folder, "", "", "", {}, frame)
    keys = *(("risk", side, "") for side in SIDES), ("loss", "", "")
    return next(filter(None, (_broken(whole, *key) for key in keys)), None)


def _broken(run: Run, quantity: str, side: str, group: str) -> str | None:
    """That the last value of a quantity is not finite, in words."""
    steps, values = run.series(quantity, side, group)
    if not len(values) or np.isfinite(values[-1]):
        return None
    what = {"risk": "NLL", "g_effect": "G-effect", "loss": "loss"}[quantity]
    where = f" on the {dict(zip(SIDES, SETS, strict=True))[side]} set" if side else ""
    return f"at step {steps[-1]} the {what}{where} is {values[-1]}"


def _trained(frame: pd.DataFrame, info: dict[str, Any]) -> str | None:
    """Which of several objectives whose NLL is recorded a folder's training descends; None where nothing says so."""
    names = set(frame.loc[frame["quantity"] == "risk", "objective"])
    losses = frame.loc[frame["quantity"] == "loss", "objective"].unique()
    return next((name for name in (info.get("objective"), *losses) if name in names), None)


def measured_runs(folders: list[Path]) -> list[Run]:
    """One run a folder: what was measured on fixed sets along it, not on the batches of its steps."""
    return [run for run in load_runs(folders) if not run.of_batches]


def averaged(runs: list[Run], label: str) -> Run:
    """The mean of runs of one objective that differ by their seed, over the steps that all of them recorded."""
    frame = pd.concat([run.records for run in runs])
    frame["empty"] = frame["value"].isna()
    key = ["step", "quantity", "side", "group"]
    means = frame.groupby(key, as_index=False).agg(
        run=("run", "first"), objective=("objective", "first"), epoch=("epoch", "first"), value=("value", "mean"),
        count=("step", "size"), empty=("empty", "any"),
    )  # fmt: skip
    means.loc[means["empty"], "value"] = np.nan  # a mean that leaves a seed out would be of others
    means = means[means["count"] == len(runs)].drop(columns=["count", "empty"])
    first = runs[0]
    return Run(first.folder, label, label, first.objective, first.info, means.reset_index(drop=True), tuple(runs))


def distinct_names(folders: list[Path]) -> dict[Path, str]:
    """The shortest end of each folder's path that no other folder has.

    >>> list(distinct_names([Path("/a/seed0/run"), Path("/a/seed1/run"), Path("/a/npo")]).values())
    ['seed0/run', 'seed1/run', 'npo']
    """
    parts = {folder: folder.resolve().parts for folder in folders}
    length = dict.fromkeys(folders, 1)
    while True:
        names = {folder: readable("/".join(parts[folder][-length[folder] :])) for folder in folders}
        twice = [folder for folder, name in names.items() if list(names.values()).count(name) > 1]
        if not any(length[folder] < len(parts[folder]) for folder in twice):
            return names
        for folder in twice:
            length[folder] += 1


def _short(objective: str) -> str:
    """The label of an objective on the page: "GA() + KL()" reads "GA + KL"."""
    return objective.replace("()", "")
