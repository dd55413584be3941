# SPDX-License-Identifier: Apache-2.0
"""Locks between processes: one run a folder, one writer a record. The system releases them when a process ends.

They are `flock`s. Where a file system has none, a line in the log says so and the work goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from gfast.files import remove_partial_files, require_writable

RUN_LOCK = ".gfast-run-lock"
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

logger = logging.getLogger("gfast")

# Folders that commands make in a run's folder and fill.
_INSIDE = ("records", "effects", "reference", "evaluations", "parts", "relearning")
_guard = threading.Lock()
_descriptors: set[int] = set()
_claims: dict[Path, int] = {}


class FolderInUse(RuntimeError):
    """Another process is writing its run to the folder."""


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], wait: bool = True) -> Iterator[int]:
    """Hold the lock `path`, a file that is there as long as it is held; threads exclude each other as processes do.

    Errors: BlockingIOError when somebody else holds it and `wait` is False; OSError when the file cannot be made.
    """
    path = Path(path)
    descriptor = _acquire(path, wait)
    try:
        yield descriptor
    finally:
        if descriptor in _descriptors:
            # While it is held: whoever waits for this file then sees that it is gone, and takes a new one.
            with contextlib.suppress(OSError):
                path.unlink()
            _close(descriptor)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _descriptors.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(path, descriptor):
                return descriptor
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                _close(descriptor)
                raise
            logger.warning("%s: this file system has no locks; see to it that one process at a time writes", path)
            return descriptor
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close(descriptor: int) -> None:
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _after_fork() -> None:
    # A lock is held as long as any copy of its descriptor is open: workers of a data loader outlive a killed run.
    global _guard
    _guard = threading.Lock()
    for descriptor in list(_descriptors):
        _close(descriptor)
    _claims.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def claimed(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a run folder for one process, and remove what killed ones left half written; a process may claim it again.

    Errors: FolderInUse, with the number of the process that holds it.
    """
    folder = require_writable(folder).resolve()
    with _guard:
        again = folder in _claims
        _claims[folder] = _claims.get(folder, 0) + 1
    try:
        if again:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                descriptor = stack.enter_context(locked(folder / RUN_LOCK, wait=False))
            except BlockingIOError:
                raise FolderInUse(
                    f"{folder} is in use: {_holder(folder / RUN_LOCK)} is writing its run there. Wait until it has "
                    "ended, or give another output folder"
                ) from None
            try:
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            except OSError as error:
                raise OSError(error.errno, f"cannot write to the folder {folder}: {error.strerror}") from error
            inside = [folder / name for name in _INSIDE]
            remove_partial_files([folder, *inside, *folder.glob("checkpoint-*")])
            yield
    finally:
        with _guard:
            if folder in _claims:
                _claims[folder] -= 1
                if not _claims[folder]:
                    del _claims[folder]


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"
