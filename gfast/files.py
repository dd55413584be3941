# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".gfast-partial-"


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` in one step, on any failure it is removed.

    Readers see the old file or the new one, never a part of one: a full disk, an exception or Ctrl-C leaves what was
    there before. A killed process can leave a hidden temporary file, which no reader looks at.

    Errors: OSError when the folder cannot be written or the disk is full, with `path` in the message.

    >>> with whole_file("run.json") as temporary:      # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{path.suffix}"
        temporary.touch(exist_ok=False)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"could not write {path}: {reason} (nothing was left half written)") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # Without fsync a full disk or a power cut can surface after the rename, and the rename would then have replaced a
    # good file.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all. Values JSON does not know are written as their `str`."""
    options: dict[str, Any] = {"indent": 2, "sort_keys": True, "default": str}
    text = json.dumps(value, ensure_ascii=False, **options) + "\n"
    if not _is_unicode(text):
        text = json.dumps(value, **options) + "\n"  # lone surrogates (see `readable`) survive as escapes
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a damaged one is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it or restore it from a copy") from error


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` if need be and prove that a file can be written there, so that hours of work do not end in an
    error.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except FileExistsError as error:
        raise OSError(error.errno, f"{folder} is a file; give a folder to write the run to") from error
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write to the folder {folder}: {error.strerror}; choose another one"
        ) from error
    return folder
