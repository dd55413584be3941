# SPDX-License-Identifier: Apache-2.0
"""Steps whose inputs are remembered: a step runs once, and again only where somebody says so.

`OUT/steps/NAME.json` holds what a step was run with (its own inputs, and the checksums of what it took from others) and
the checksums of what it made. A step whose inputs are others by now is named, with what differs, and nothing runs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfast.commands.common import say
from gfast.errors import NotFinite
from gfast.files import file_checksum, files_like, note_deleted, read_json, write_json
from gfast.words import did_you_mean

REDO_ALL = "changed"
# Inputs of what a step makes beside: where a recipe asks for that no more, the step is what it was.
BESIDE = ("evaluated",)


@dataclass(frozen=True)
class Step:
    """name: also its folder. inputs: what decides what it makes, JSON-like. needs: steps it takes files from. makes:
    patterns of the files in its folder that others take. run: does it. what: in a few words. command: how one would do
    it by hand, if there is a command.
    """

    name: str
    what: str
    inputs: Mapping[str, Any]
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    run: Callable[[Path], None]
    command: str = ""


class Checksums:
    """SHA-256 of files, of large ones read again only where size or time say that they changed."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "steps" / "checksums.json"
        self._seen: dict[str, Any] = read_json(self.file, "delete it") if self.file.exists() else {}

    def __call__(self, path: Path) -> str:
        stat, key = path.stat(), str(path.relative_to(self.out) if path.is_relative_to(self.out) else path.resolve())
        now = [stat.st_size, stat.st_mtime_ns]
        if self._seen.get(key, [None])[0] != now:
            self._seen[key] = [now, file_checksum(path)]
            write_json(self.file, self._seen)
        return self._seen[key][1]


class Steps:
    """The steps of a study in order, over what its folder holds."""

    def __init__(self, steps: Sequence[Step], checksum: Checksums, redo: Sequence[str] = ()) -> None:
        self.steps, self.checksum, self.out = list(steps), checksum, checksum.out
        self.by_name = {step.name: step for step in steps}
        self.redo = list(redo)
        for name in self.redo:
            if name != REDO_ALL and not self._named(name):
                raise ValueError(
                    f"--redo {name}: there is no such step{did_you_mean(name, self.by_name)} "
                    f"(--plan lists them; --redo {REDO_ALL} takes all whose inputs changed)"
                )
        self.again: set[str] = set()  # the steps that ran in this call

    def _named(self, name: str) -> list[str]:
        """The steps that a word of --redo means: one, or all in a folder."""
        return [known for known in self.by_name if known == name or known.startswith(name.rstrip("/") + "/")]

    def record(self, name: str) -> dict[str, Any]:
        """What is remembered of a step, {} where nothing is."""
        path = self._record_file(name)
        return read_json(path, "delete it, and the step runs again") if path.exists() else {}

    def _record_file(self, name: str) -> Path:
        return self.out / "steps" / f"{name.replace('/', '--')}.json"

    def made(self, name: str) -> dict[str, str]:
        """The checksums of what a step made, as it is now; of weights that were deleted, as it was."""
        record = self.record(name)
        if record.get("dropped"):
            return record["made"]
        folder = self.out / name
        files = sorted({path for like in self.by_name[name].makes for path in files_like(folder, like)})
        return {path.relative_to(folder).as_posix(): self.checksum(path) for path in files}

    def state(self, step: Step) -> tuple[str, str]:
        """("done" | "to do" | "changed", what differs)."""
        record = self.record(step.name)
        if not record:
            return "to do", ""
        if self._asked(step):
            return "changed", "--redo"
        there = {key: value for key, value in record["inputs"].items() if key in step.inputs or key not in BESIDE}
        differ = difference(there, _plain(step.inputs))
        for need in step.needs:
            # What a step took is known once it is done; a need that is not yet made changes nothing by itself.
            there, here = record.get("took", {}).get(need), self.made(need)
            nothing = self.record(need).get("made") == {}  # of a run that diverged
            if there is not None and (here or nothing) and there != here:
                differ.append(f"what it took from {need} is another by now")
        if differ:
            return "changed", "; ".join(differ)
        if not record.get("finished"):
            return "to do", ""
        made = self.made(step.name)
        if made == record["made"]:
            return "done", ""
        return ("changed", "what it made is not what it left") if made else ("to do", "what it made is gone")

    def _asked(self, step: Step) -> bool:
        named = (name for name in self.redo if name != REDO_ALL)
        return step.name not in self.again and any(step.name in self._named(name) for name in named)

    def run(self, said: Callable[[Step, str, int], None]) -> None:
        """Run what is to be run. Errors: ValueError that names steps with other inputs, before any work; the same in
        the midst of it where a step that had to run again made something else than before.
        """
        self._refuse([(step, self.state(step)[1]) for step in self.steps if self._stands_in_the_way(step)])
        for number, step in enumerate(self.steps):
            kind, why = self.state(step)
            if self._stands_in_the_way(step):
                self._refuse([(step, why)])
            said(step, kind, number)
            if kind == "done":
                continue
            for need in step.needs:
                if self.record(need).get("dropped"):
                    raise ValueError(
                        f"{step.name} needs the weights that {need} made, and keep_models is false: they were deleted. "
                        f"--redo {need} makes them again"
                    )
            before = self.record(step.name).get("seconds", 0.0)  # of starts that were broken off
            if kind == "changed" or self.record(step.name).get("finished"):
                before = 0.0
                shutil.rmtree(self.out / step.name, ignore_errors=True)
            took = {need: self.made(need) for need in step.needs}
            record = {"inputs": _plain(step.inputs), "took": took, "finished": False, "seconds": before}
            write_json(self._record_file(step.name), record)
            started = time.perf_counter()
            try:
                with _named(step):
                    step.run(self.out / step.name)
            finally:
                record["seconds"] = before + time.perf_counter() - started
                write_json(self._record_file(step.name), record)
            write_json(self._record_file(step.name), record | {"finished": True, "made": self.made(step.name)})
            self.again.add(step.name)

    def _stands_in_the_way(self, step: Step) -> bool:
        """Whether nobody said that a step with other inputs may run again, nor anything that it takes from."""
        return REDO_ALL not in self.redo and not self._runs_again(step) and self.state(step)[0] == "changed"

    def _runs_again(self, step: Step) -> bool:
        needs = (self._runs_again(self.by_name[need]) for need in step.needs)
        return step.name in self.again or self._asked(step) or any(needs)

    def _refuse(self, changed: Sequence[tuple[Step, str]]) -> None:
        if changed:
            listed = ". ".join(f"{step.name}: {why}" for step, why in changed[:3])
            more = f". And {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"the inputs of {len(changed)} {'step' if len(changed) == 1 else 'steps'} changed since they ran: "
                f"{listed}{more}. --redo {REDO_ALL} runs them and what follows again (and deletes what they made); or "
                "give another --out, or the settings of then"
            )

    def drop(self, name: str) -> None:
        """Delete the weights that a step made, once all that need them are done; they count as made."""
        record = self.record(name)
        if record.get("dropped") or any(
            self.state(step)[0] != "done" for step in self.steps if step.name == name or name in step.needs
        ):
            return
        write_json(self._record_file(name), record | {"dropped": True})
        for path in record["made"]:
            if path.endswith((".safetensors", ".bin")):
                note_deleted(self.out / name / path, "keep_models of its study is false")
                (self.out / name / path).unlink(missing_ok=True)
        say(f"{name}: weights deleted (keep_models: false)")


@contextlib.contextmanager
def _named(step: Step) -> Iterator[None]:
    """What a step says of an error, with its name: there are many, and each has models and data."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if type(error) not in (ValueError, RuntimeError, NotFinite):
            raise
        raise type(error)(f"{step.name}: {str(error).removeprefix('gfast: ')}") from error


def difference(there: Mapping[str, Any], here: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two JSON-like mappings, in words.

    >>> difference({"flags": {"seed": 0}}, {"flags": {"seed": 1}})
    ['flags.seed was 0 and is 1']
    """
    differences = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += difference(old, new, f"{where}{name}.")
        elif old != new:
            differences.append(f"{where}{name} was {old!r:.80} and is {new!r:.80}")
    return differences


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True, default=str))
