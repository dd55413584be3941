"""What several processes do to one folder, and processes that the system refuses room on the disk."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path

from gfast.locks import FolderInUse, claimed, locked
from gfast.training.records import LOCK, write_record


def rows(writer: str, step: int):
    common = {"run": "a", "objective": "GA()", "step": step, "epoch": 0.0}
    return [{**common, "quantity": f"{writer}-{i}", "value": float(i)} for i in range(3)]


def write_steps(folder: str, writer: str, steps: int, gate) -> None:
    gate.wait(60)
    for step in range(steps):
        write_record(folder, rows(writer, step))


def hold(folder: str, held, child_lives: bool = False) -> None:
    """Claim the folder until killed; child_lives: with a child, such as a data loader's worker, that lives longer."""
    with claimed(folder):
        if child_lives and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        held.set()
        signal.pause()


def try_to_claim(folder: str, answers) -> None:
    try:
        with claimed(folder):
            answers.put("mine")
    except FolderInUse as error:
        answers.put(str(error))


def with_little_room(limit: int, action, folder: str, answers) -> None:
    """What `action(folder)` says where no file may have more than `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        action(Path(folder))
        answers.put((None, "nothing was refused"))
    except OSError as error:
        answers.put((error.errno, str(error)))
    except Exception as error:
        answers.put((None, repr(error)))


def lock_in_turn(folder: Path, counts: list[int]) -> None:
    """Adds to a number that is read and written back: it only adds up where one thread at a time has the lock."""
    for _ in range(200):
        with locked(folder / LOCK):
            before = counts[0]
            threading.Event().wait(0)
            counts[0] = before + 1
