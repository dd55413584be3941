# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and say so when they were damaged afterwards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".gfast-partial-"
MANIFEST = "gfast-manifest.json"
CHECKSUM = "gfast_checksum"

_SUM = re.compile(r"gfast-sha256:[0-9a-f]{64}")
_PARTIAL = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{{32}}(\..*)?")
_CHUNK = 4 << 20
# Of gfast's own, none of which is a part of what the others wrote.
_NOT_LISTED = (MANIFEST, ".gfast-", "run.json", "result.json")


class DamagedFile(ValueError):
    """A file is not what gfast wrote: changed, cut short, emptied, or another one under its name.

    The message names the file, says what does not fit, and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], why: str, remedy: str) -> None:
        super().__init__(f"{os.fspath(path)} is damaged: {why}; {remedy}")


@contextlib.contextmanager
def undamaged(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Whatever reading a damaged file raises becomes DamagedFile; what the system says of a file stays as it is.

    Readers of binary formats raise what their parser trips over: errors of their own, KeyError, MemoryError, OSError
    without a number.
    """
    try:
        yield
    except DamagedFile:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedFile(path, f"it cannot be read ({reason})", remedy) from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` in one step, on any failure it is removed.

    Readers see the old file or the new one, never a part of one: a full disk, an exception or Ctrl-C leaves what was
    there before. A killed process can leave a hidden temporary file, which no reader looks at and the next run in the
    folder removes (`remove_partial_files`).

    Errors: OSError when the folder cannot be written or the disk is full, with `path` in the message.

    >>> with whole_file("run.json") as temporary:      # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}{path.suffix}"
        temporary = path.parent / name
        temporary.touch(exist_ok=False)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(errno_of(error), f"could not write {path}: {reason} (nothing was left half written)") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file by `whole_file`; a text as UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def _sync(path: Path) -> None:
    # Without fsync a full disk or a power cut can surface after the rename, and the rename would then have replaced a
    # good file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    # The new name is an entry of the folder: after a power cut it could be the old file, or none.
    try:
        _sync(folder)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
        # Not every file system does this for folders, nor every folder may be read.


def errno_of(error: Exception) -> int:
    """The system's number of an error; libraries that raise errors of their own have it in the text, if at all."""
    match = re.search(r"(?:os error|errno) (\d+)", str(error), re.IGNORECASE)
    return getattr(error, "errno", None) or (int(match[1]) if match else errno.EIO)


def files_like(folder: Path, pattern: str) -> list[Path]:
    """`folder.glob(pattern)`, sorted, without files that are being written or that a killed writer left."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(TEMPORARY_PREFIX))


def remove_partial_files(folders: Iterable[Path]) -> None:
    """Remove what killed writers left in `folders`; files that a living process may still be writing stay."""
    for folder in folders:
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(OSError):
                if path.is_file() and not _being_written(path):
                    path.unlink()


def _being_written(path: Path) -> bool:
    match = _PARTIAL.fullmatch(path.name)
    if match is None or match["host"] != socket.gethostname():
        # A process that cannot be asked from here: of another machine, or of an earlier gfast.
        return time.time() - path.stat().st_mtime < 3600
    return is_alive(int(match["pid"]))


def is_alive(pid: int) -> bool:
    """Whether there is a process with this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def readable(text: str | os.PathLike[str]) -> str:
    """A path or an argument as text that every file can hold: bytes that are no UTF-8 become escapes.

    Python keeps bytes of file names and arguments that its locale does not know as lone surrogates, which neither JSON,
    Parquet nor HTML can store; most often they are UTF-8 in a locale that is not.

    >>> readable("gr\\udcc3\\udcb6n"), readable("\\udcff")
    ('grön', '\\\\xff')
    """
    try:
        return os.fspath(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return os.fspath(text).encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> Path:
    """Write `value` as indented JSON with its checksum, whole or not at all; `read_json` takes the checksum off again.

    Values JSON does not know are written as their `str`.
    """
    options: dict[str, Any] = {"indent": 2, "sort_keys": True, "default": str}
    value = {**value, CHECKSUM: _json_checksum(json.loads(json.dumps(value, **options)))}
    text = json.dumps(value, ensure_ascii=False, **options) + "\n"
    if not _is_unicode(text):
        text = json.dumps(value, **options) + "\n"  # lone surrogates (see `readable`) survive as escapes
    return write_whole(path, text)


def _json_checksum(value: Any) -> str:
    """Of the value and not of the text: white space may change."""
    return "gfast-sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: str | os.PathLike[str], remedy: str = "delete it or restore it from a copy") -> Any:
    """Read a JSON file and check it, where it has a checksum (others' files have none, nor those of earlier versions).

    Errors: DamagedFile, which names it and says `remedy`.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, f"not valid JSON ({error})", remedy) from error
    if isinstance(value, dict):
        written = value.pop(CHECKSUM, None)
        # A checksum whose own name is damaged must not make the file one of those that have none.
        unnamed = any(isinstance(entry, str) and _SUM.fullmatch(entry) for entry in value.values())
        if unnamed or (written is not None and written != _json_checksum(value)):
            edited = f"or, if you edited it on purpose, take the line {CHECKSUM} out of it"
            raise DamagedFile(path, "its contents do not fit its checksum", f"{remedy}, {edited}")
    return value


def file_checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: str | os.PathLike[str], deep: bool = True) -> Path:
    """Write size and SHA-256 of every file in `folder` to a manifest there, after all of them are on the disk.

    For folders that others fill (Trainer, PEFT, torch): `check_manifest` tells whether they are still what they were.
    deep: with the folders in it.
    """
    folder = Path(folder)
    entries = {}
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        if not path.is_file() or path.name.startswith(_NOT_LISTED):
            continue
        _sync(path)
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": file_checksum(path)}
    return write_json(folder / MANIFEST, {"format": "gfast-manifest-1", "folder": folder.name, "files": entries})


def note_deleted(path: str | os.PathLike[str], why: str) -> None:
    """Say in the manifest that lists a file, if there is one, that it is about to be deleted on purpose, and why."""
    path = Path(path)
    if (path.parent / MANIFEST).exists():
        manifest = read_json(path.parent / MANIFEST)
        if path.name in manifest["files"]:
            manifest["files"][path.name]["deleted"] = why
            write_json(path.parent / MANIFEST, manifest)


def check_manifest(
    folder: str | os.PathLike[str], remedy: str, only: tuple[str, ...] = ("",), deleted: bool = False
) -> bool:
    """True if every file of the manifest in `folder` is as it was written, False if there is no manifest.

    only: beginnings of the names of files to look at. deleted: those that were deleted on purpose may be gone.

    Errors: DamagedFile, which names the first file that differs or is missing.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_json(folder / MANIFEST, remedy)
    with undamaged(folder / MANIFEST, remedy):
        entries = {
            str(name): (entry["size"], entry["sha256"], entry.get("deleted"))
            for name, entry in manifest["files"].items()
        }
    for name, (size, checksum, why) in entries.items():
        path = folder / name
        if not path.name.startswith(only):
            continue
        if not path.is_file():
            if why and deleted:
                continue
            raise DamagedFile(path, f"it was deleted ({why})" if why else "it is missing", remedy)
        if path.stat().st_size != size:
            raise DamagedFile(path, f"it has {path.stat().st_size} bytes, and {size} were written", remedy)
        if file_checksum(path) != checksum:
            raise DamagedFile(path, "its contents do not fit its checksum", remedy)
    return True


def require_writable(folder: str | os.PathLike[str], model: bool = False) -> Path:
    """Create `folder` if need be and prove that a file can be written there, so that hours of work do not end in an
    error. model: one of transformers' too, whose libraries in Rust take no other names than those in UTF-8.
    """
    folder = Path(folder)
    try:
        if model:
            str(folder.resolve()).encode()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"gfast: cannot write to the folder {readable(str(folder))}: this Python takes names of files for "
            f"{sys.getfilesystemencoding()}, and this one is not. Set PYTHONUTF8=1, or choose another folder"
        ) from error
    except FileExistsError as error:
        raise OSError(error.errno, f"{folder} is a file; give a folder to write the run to") from error
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write to the folder {folder}: {error.strerror}; choose another one"
        ) from error
    return folder
