# SPDX-License-Identifier: Apache-2.0
"""What a run measured, as tidy Parquet files: one file a step, one row a value.

A run folder holds `run.json` (what the run is), `records/step-00000010.parquet` (what was measured at step 10) and the
trainer's checkpoints. A file is written whole or not at all, and writing a step again replaces the rows with the same
key, so a run that is killed and resumed neither loses nor doubles a step, whatever its folder is called by then.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfast.files import DamagedFile, read_json, readable, undamaged, write_json
from gfast.locks import locked
from gfast.tables import read_table, write_table

if TYPE_CHECKING:
    import pandas

COLUMNS = ("run", "objective", "step", "epoch", "quantity", "side", "group", "value")
# A folder is one run: the name that a row has of it changes with that of the folder.
KEY = ("objective", "step", "quantity", "side", "group")
SORT = ("step", "run", "objective", "quantity", "side", "group")
# What a run is does not depend on when, where or with which command line it was started.
NOT_IN_FINGERPRINT = frozenset({"argv", "versions", "created", "fingerprint", "device", "data_sha256", "tokens_sha256"})
# Held while a record is merged: between reading and writing it, another writer's rows would be lost.
LOCK = ".gfast-records-lock"
MODELS = "models.json"
# Of a run whose model became one that gives NaN or infinite numbers: the step at which that was seen, and how.
DIVERGED = "diverged.json"

_TEXT = ("run", "objective", "quantity", "side", "group")
_FILE = re.compile(r"step-(\d{8,})\.parquet")


def step_file(run_folder: str | os.PathLike[str], step: int) -> Path:
    """The file that holds the rows of one step."""
    return Path(run_folder) / "records" / f"step-{step:08d}.parquet"


def effect_file(run_folder: str | os.PathLike[str], kind: str, step: int) -> Path:
    """The file of the effects of samples or tokens ("sample", "token") at one step."""
    return Path(run_folder) / "effects" / f"{kind}-{step:08d}.parquet"


def token_texts_file(run_folder: str | os.PathLike[str]) -> Path:
    """The file with the words behind the tokens of a run: JSON, {"samples": [{"question": ..., "pieces": [...]}]}."""
    return Path(run_folder) / "effects" / "token-texts.json"


def run_name(output_dir: str | os.PathLike[str]) -> str:
    """The name of a run in its records: that of its folder."""
    return readable(Path(output_dir).resolve().name)


def write_record(run_folder: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write the rows of one step to `run_folder/records/`, whole or not at all, and return the file.

    Args:
        run_folder: the run's folder; it is created if need be.
        rows: mappings with the keys run, objective, step, epoch, quantity, side, group, value (`side` and `group` may
            be missing: they are then ""), all of one step. Rows already in the step's file stay, unless a new row has
            the same (objective, step, quantity, side, group): then the new one replaces it.

    Writers of one step, in threads or processes, wait for each other: nobody's rows are lost.

    Errors: ValueError for no rows, rows of several steps, a missing or unknown key; DamagedFile for a file that is
    there and damaged; OSError when it cannot be written (what was there before is untouched).

    >>> import tempfile
    >>> row = {"run": "a", "objective": "GA()", "step": 10, "epoch": 1.0, "quantity": "loss", "value": -2.5}
    >>> write_record(tempfile.mkdtemp(), [row]).name
    'step-00000010.parquet'
    """
    import pyarrow

    rows = [_clean(row, index) for index, row in enumerate(rows)]
    steps = sorted({row["step"] for row in rows})
    if len(steps) != 1:
        raise ValueError(
            f"a record holds the rows of one step, but these {len(rows)} rows have steps {steps}; write them one by one"
        )
    with _only_writer(run_folder):
        merged = {_key(row): row for row in read_step(run_folder, steps[0])}
        merged.update((_key(row), row) for row in rows)
        ordered = sorted(merged.values(), key=lambda row: tuple(row[name] for name in SORT))
        table = pyarrow.Table.from_pylist(ordered, schema=_schema())
        return write_table(step_file(run_folder, steps[0]), table)


def check_step_model(run_folder: str | os.PathLike[str], step: int, model: Mapping[str, str]) -> dict[str, Any]:
    """Of the steps of a series, whose models are not those of one run, the model of each, with this one; ValueError
    where the folder has another at this step, beside whose measurements its own would stand as if of one.

    model: its `name` and `fingerprint`, and by their names the checksums of what else a measurement may be of: the
        reference model, sets that an objective has of its own.
    """
    path = Path(run_folder) / MODELS
    known = read_json(path, "delete it, and the records of the steps that are measured again") if path.exists() else {}
    there = known.get(str(step), model)
    if there["fingerprint"] != model["fingerprint"]:
        raise ValueError(
            f"{run_folder} holds measurements of step {step} of another model ({there['name']}): give this one a "
            f"--step of its own, as in a series of models, or another --output_dir"
        )
    changed = [key for key in model if key not in ("name", "fingerprint") and there.get(key, model[key]) != model[key]]
    if changed:
        raise ValueError(
            f"{run_folder} holds measurements of step {step} with a different {changed[0]}: give that one again, or "
            f"another --output_dir"
        )
    return {**known, str(step): {**there, **model}}


def write_step_model(run_folder: str | os.PathLike[str], step: int, model: Mapping[str, str]) -> None:
    """Say of which model a step's measurements are; see `check_step_model`."""
    with _only_writer(run_folder):
        write_json(Path(run_folder) / MODELS, check_step_model(run_folder, step, model))


def write_diverged(run_folder: str | os.PathLike[str], step: int, why: str) -> None:
    """Say that a run diverged."""
    write_json(Path(run_folder) / DIVERGED, {"step": step, "why": why.removeprefix("gfast: ")})


def read_diverged(run_folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The step at which a run was seen to have diverged, and why; None where nothing says so."""
    path = Path(run_folder) / DIVERGED
    return read_json(path, "delete it, and the run goes on") if path.exists() else None


@contextlib.contextmanager
def _only_writer(run_folder: str | os.PathLike[str]) -> Iterator[None]:
    """One process, and one thread of it, at a time."""
    path = Path(run_folder) / LOCK
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path))
        except OSError as error:
            raise OSError(error.errno, f"cannot write to the folder {run_folder}: {error.strerror}") from error
        yield


def read_records(run_folder: str | os.PathLike[str]) -> pandas.DataFrame:
    """All rows of a run as one DataFrame with the columns of `COLUMNS`, sorted, one row per key; empty if nothing was
    recorded.

    Errors: FileNotFoundError when the folder does not exist; DamagedFile, which names a file that is damaged or is no
    record.

    >>> import tempfile
    >>> list(read_records(tempfile.mkdtemp()).columns) == list(COLUMNS)
    True
    """
    import pandas

    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise FileNotFoundError(
            f"there is no run folder {run_folder}; a run folder is what `gfast unlearn --output_dir` wrote"
        )
    rows = [row for step in recorded_steps(run_folder) for row in read_step(run_folder, step)]
    frame = pandas.DataFrame(rows, columns=list(COLUMNS))
    kinds = {"step": "int64", "epoch": "float64", "value": "float64", **dict.fromkeys(_TEXT, "str")}
    frame = frame.astype(kinds)
    return frame.sort_values(list(SORT), kind="stable").reset_index(drop=True)


def recorded_steps(run_folder: str | os.PathLike[str]) -> list[int]:
    """The steps that have a record file, in order."""
    folder = Path(run_folder) / "records"
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for name in os.listdir(folder) if (match := _FILE.fullmatch(name)))


def read_step(run_folder: str | os.PathLike[str], step: int) -> list[dict[str, Any]]:
    """The rows of one step, [] if nothing was recorded there; DamagedFile for a damaged file."""
    path = step_file(run_folder, step)
    rows = _read_rows(path, step) if path.exists() else []
    name = run_name(run_folder)
    rows.sort(key=lambda row: row["run"] == name)  # of several with one key the one of the folder's present name
    return list({_key(row): row for row in rows}.values())


def say_other_training(run_folder: str, step: int, end: int) -> None:
    """A warning where a training that begins at this step and ends at that one does so in a folder that holds records
    of another. `gfast unlearn` knows by run.json whose they are.
    """
    last = max(recorded_steps(run_folder), default=0)
    if last > (end if step else 0) and not (Path(run_folder) / "run.json").exists():
        _say_other_training(run_folder, last, f"ends at step {end}" if step else "begins at step 0")


@functools.cache
def _say_other_training(run_folder: str, last: int, does: str) -> None:
    logging.getLogger("gfast").warning(
        "gfast: %s holds records of steps up to %d, and this training %s: those that it does not come to stay, and "
        "reports show both as one run. Give another output_dir, go on with resume_from_checkpoint=True, or delete %s",
        run_folder,
        last,
        does,
        Path(run_folder) / "records",
    )


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short stable hash of a JSON-like mapping: equal for equal contents in any order.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(config, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_run_info(run_folder: str | os.PathLike[str], info: Mapping[str, Any]) -> Path:
    """Claim `run_folder` for one run and write `run.json`; the same run may claim it again (to resume), another may
    not.

    Args:
        run_folder: the run's folder; it is created if need be.
        info: what the run is, JSON-like: objective, model, data, seed, argv, versions, counts. Two runs are the same
            when everything but the keys of `NOT_IN_FINGERPRINT` is equal; `info["config"]`, where present, alone
            decides. `info["data_sha256"]`, where both have it, maps the names of data sets to checksums of their rows,
            which must be equal too; so must `info["tokens_sha256"]`, of their token ids, and
            `info["model_fingerprint"]`, of the model that the run starts from.

    Errors: ValueError when the folder holds another run (it says which settings differ), one of other data (it says
    which) or another model, or files of something else.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> write_run_info(folder, {"objective": "GA()", "seed": 0}).name
    'run.json'
    >>> write_run_info(folder, {"objective": "NPO(beta=0.1)", "seed": 0})    # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ... holds another run: objective is 'GA()' there and 'NPO(beta=0.1)' here...
    """
    path = Path(run_folder) / "run.json"
    with _only_writer(run_folder):
        if not check_run_folder(run_folder, info):
            write_json(path, {**info, "fingerprint": fingerprint(_identity(info))})
    return path


def check_run_folder(run_folder: str | os.PathLike[str], info: Mapping[str, Any]) -> bool:
    """True if `run_folder` already holds this very run, False if it is free; ValueError if it holds another."""
    run_folder = Path(run_folder)
    if (run_folder / "run.json").exists():
        recorded = read_run_info(run_folder)
        if recorded.get("fingerprint") != fingerprint(_identity(info)):
            raise ValueError(
                f"{run_folder} holds another run: {_difference(_identity(recorded), _identity(info))}. "
                "Give another output folder, or the settings of that run to resume it"
            )
        for key, what in _SUMS.items():
            _check_data(run_folder, what, recorded.get(key) or {}, info.get(key) or {})
        there, here = recorded.get("model_fingerprint"), info.get("model_fingerprint")
        if there and here and there != here:
            raise ValueError(
                f"{run_folder} holds a run of another model: the weights of {info.get('model', 'the model')} are not "
                f"those that it was begun with (fingerprint {there[:12]} there and {here[:12]} here). Restore them to "
                "go on with it, or give another output folder"
            )
        return True
    leftovers = sorted(p.name for p in run_folder.glob("checkpoint-*")) if run_folder.is_dir() else []
    if leftovers or recorded_steps(run_folder):
        raise ValueError(
            f"{run_folder} holds {', '.join(leftovers) or 'records'} but no run.json, so it cannot be told whose they "
            "are. Give another output folder, or delete them"
        )
    return False


# Of run.json, checksums by the name of a set, and what they are of.
_SUMS = {"data_sha256": "the rows of", "tokens_sha256": "the token ids (tokenizer, template, refusals) of"}


def _check_data(run_folder: Path, what: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    changed = [name for name, checksum in here.items() if there.get(name, checksum) != checksum]
    if changed:
        raise ValueError(
            f"{run_folder} holds a run with other data: {what} {' and of '.join(changed)} are not those that it "
            "was begun with. Restore them to go on with it, or give another output folder"
        )


def read_run_info(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_run_info` wrote. FileNotFoundError when there is no run.json, DamagedFile when it is damaged."""
    path = Path(run_folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run_folder} is not a run folder: it has no run.json")
    remedy = "restore it from a copy, or give another output folder"
    info = read_json(path, remedy)
    if not isinstance(info, dict):
        raise DamagedFile(path, f"it should hold a JSON object, but it holds a {type(info).__name__}", remedy)
    return info


def _identity(info: Mapping[str, Any]) -> Mapping[str, Any]:
    config = info.get("config")
    # Through JSON, so that a tuple in memory equals the list that was read back.
    chosen = config if isinstance(config, Mapping) else {k: v for k, v in info.items() if k not in NOT_IN_FINGERPRINT}
    return json.loads(json.dumps(chosen, default=str))


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    shown = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names[:4]]
    if len(names) > 4:
        shown.append(f"and {len(names) - 4} more settings differ")
    return ", ".join(shown) or "run.json was edited"


def _schema() -> Any:
    import pyarrow

    kinds = {"step": pyarrow.int64(), "epoch": pyarrow.float64(), "value": pyarrow.float64()}
    return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in COLUMNS])


def _clean(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    row = {"side": "", "group": "", **row}
    missing, unknown = [n for n in COLUMNS if n not in row], sorted(set(row) - set(COLUMNS))
    if missing or unknown:
        raise ValueError(
            f"row {index} of the record lacks {missing} and has unknown keys {unknown}; its keys are {list(COLUMNS)}"
        )
    clean = {name: str(row[name]) for name in _TEXT}
    value = math.nan if row["value"] is None else float(row["value"])
    epoch = math.nan if row["epoch"] is None else float(row["epoch"])
    return {**clean, "step": int(row["step"]), "epoch": epoch, "value": value}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _read_rows(path: Path, step: int) -> list[dict[str, Any]]:
    remedy = "delete it and run that step again"
    table = read_table(path, remedy)
    with undamaged(path, remedy):
        rows = table.select(list(COLUMNS)).cast(_schema()).to_pylist()
    others = sorted({row["step"] for row in rows} - {step})
    if others or not rows:
        raise DamagedFile(path, f"it holds the rows of the steps {others}" if others else "it has no rows", remedy)
    return rows
