# SPDX-License-Identifier: Apache-2.0
"""safetensors files with a checksum of every tensor, verified when it is first read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfast.files import DamagedFile, errno_of, undamaged, whole_file

_CHUNK = 64 << 20
# The entries of a file's metadata.
_DESCRIPTION, _SUMS, _SUM = "gfast", "gfast_sha256", "gfast_sha256_of_all"


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add the name, dtype, shape and every byte of a tensor to a digest, in pieces of 64 MiB."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # of several tensors, such as rounded weights and their scales
        for part in tensor.__tensor_flatten__()[0]:
            hash_tensor(digest, part, getattr(tensor, part))
        return
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # [bytes]
    for start in range(0, flat.numel(), _CHUNK):
        digest.update(flat[start : start + _CHUNK].cpu().numpy())


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Any = None) -> str:
    """Write a safetensors file, whole or not at all; returns what `TensorFile.checksum` of it will be.

    Args:
        description: JSON-like, what the tensors are.

    Errors: OSError, with the path, when it cannot be written.
    """
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_DESCRIPTION: json.dumps(description)}
    metadata[_SUMS] = json.dumps({name: _checksum(name, tensor) for name, tensor in stored.items()}, sort_keys=True)
    with whole_file(path) as temporary:
        try:
            save_file(stored, temporary, metadata=metadata | {_SUM: _overall(metadata)})
        except Exception as error:
            # safetensors reports a full disk as its own exception type.
            raise OSError(errno_of(error), str(error)) from error
    return _overall(metadata)


def _checksum(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256()
    hash_tensor(digest, name, tensor)
    return digest.hexdigest()


def _overall(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{metadata[_DESCRIPTION]}|{metadata[_SUMS]}".encode()).hexdigest()


class TensorFile:
    """A memory-mapped safetensors file: what is not asked for is not read, what is asked for is checked once.

    Attributes:
        names: its tensors.
        description: what `write_tensors` was told.
        checksum: of the description and the checksums of all tensors; None in a file of an earlier version, which has
            none and is read as it is.

    Errors: FileNotFoundError; DamagedFile, which says `remedy`, here and from `get`.
    """

    def __init__(self, path: str | os.PathLike[str], remedy: str) -> None:
        from safetensors import safe_open

        self.path, self.remedy = Path(path), remedy
        self._checked: set[str] = set()
        with undamaged(path, remedy):
            self._file = safe_open(self.path, framework="pt", device="cpu")
            self.names = frozenset(self._file.keys())
            metadata = self._file.metadata() or {}
            self.description = json.loads(metadata.get(_DESCRIPTION, "null"))
            self.checksum = metadata.get(_SUM)
            self._sums = json.loads(metadata[_SUMS]) if _SUMS in metadata else None
            if (self.checksum is None) != (self._sums is None):
                raise DamagedFile(path, "a part of its checksums is missing", remedy)
            if self._sums is not None and (_overall(metadata) != self.checksum or set(self._sums) != self.names):
                raise DamagedFile(path, "its header does not fit its checksum", remedy)

    def get(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU."""
        with undamaged(self.path, self.remedy):
            tensor = self._file.get_tensor(name)
        if self._sums is not None and name not in self._checked:
            if _checksum(name, tensor) != self._sums[name]:
                raise DamagedFile(self.path, f"the values of {name} do not fit their checksum", self.remedy)
            self._checked.add(name)
        return tensor
