# SPDX-License-Identifier: Apache-2.0
"""Parquet files with a checksum of their values, verified when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gfast.files import DamagedFile, undamaged, whole_file

if TYPE_CHECKING:
    import pyarrow

_SUM = b"gfast_sha256"


def write_table(path: str | os.PathLike[str], table: pyarrow.Table) -> Path:
    """Write a Parquet file, whole or not at all. The checksum is of names, values and the schema's metadata."""
    import pyarrow.parquet

    metadata = table.schema.metadata or {}
    table = table.replace_schema_metadata({**metadata, _SUM: _checksum(table, metadata)})
    # Into a file that Python has opened: Arrow takes paths as UTF-8, which those of another locale need not be.
    with whole_file(path) as temporary, temporary.open("wb") as file:
        pyarrow.parquet.write_table(table, file, write_page_checksum=True)
    return Path(path)


def read_table(path: str | os.PathLike[str], remedy: str) -> pyarrow.Table:
    """The table that `write_table` wrote; one of an earlier version has no checksum and is read as it is.

    Errors: DamagedFile, which says `remedy`; OSError for a file that the system does not give.
    """
    import pyarrow.parquet

    with undamaged(path, remedy):
        # A page that is damaged must not reach a decoder written for whole ones: pages have checksums of their own.
        # From bytes, not through the memory-mapped dataset reader: the file may be replaced while it is read.
        content = pyarrow.BufferReader(Path(path).read_bytes())
        table = pyarrow.parquet.ParquetFile(content, page_checksum_verification=True).read()
        metadata = dict(table.schema.metadata or {})
        written = metadata.pop(_SUM, None)
        if written is not None and written != _checksum(table, metadata):
            edited = f"or, if you changed it on purpose, take the metadata {_SUM.decode()} out of it"
            raise DamagedFile(path, "its values do not fit their checksum", f"{remedy}, {edited}")
    return table.replace_schema_metadata(metadata)


def _checksum(table: pyarrow.Table, metadata: Mapping[bytes, bytes]) -> bytes:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        # Of the values, not of Arrow's buffers: how those are cut and padded is Arrow's.
        digest.update(json.dumps([name, str(column.type), column.to_pylist()]).encode())
    return digest.hexdigest().encode()
