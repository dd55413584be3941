"""Where a stored gradient lies: on the model's device, in pinned host memory, or in a memory-mapped file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from gfast.tensor_files import TensorFile, write_tensors


def store_for(
    storage: str | os.PathLike[str], dtype: torch.dtype, source: str, names: list[str], device: torch.device
) -> Store:
    """An empty store for the gradient of one side: "device", "host", or the folder of a file."""
    if storage == "device":
        return Store(len(names), dtype, device)
    if storage == "host":
        return HostStore(len(names), dtype, device)
    side = {"forget": "unlearn", "retain": "retain"}[source]
    return FileStore(Path(storage) / f"{side}.safetensors", names, dtype, device)


def check_storage(storage: str | os.PathLike[str]) -> None:
    """ValueError for a word that is no storage; a folder has to look like one, so that a typo does not make one."""
    known = storage in ("device", "host") or isinstance(storage, os.PathLike)
    text = storage if isinstance(storage, str) else ""
    if not known and (not text or (os.sep not in text and not Path(text).is_dir())):
        raise ValueError(
            f'gfast: direction_storage must be "device", "host" or a folder (such as "./directions"), not {storage!r}'
        )


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What gradients of several batches are added in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Store:
    """A gradient by parameter index, on the model's device.

    Gradients of the batches are added in fp32 and rounded to `dtype` once, by `finish`. `dtype` only ever narrows:
    bf16 gradients of a single batch stay what they are.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kept: list[Tensor | None] = [None] * count
        self.dtype, self.device = dtype, device

    def add(self, index: int, grad: Tensor, single: bool) -> Tensor:
        """Add a batch's gradient; returns the sum so far on the device. A `single` one is taken over, not copied."""
        before = self.kept[index]
        if before is None:
            self.kept[index] = grad if single else grad.to(sum_dtype(grad))
        elif before.dtype == sum_dtype(before):
            before.add_(grad)
        else:
            self.kept[index] = before.to(sum_dtype(before)).add_(grad)
        return self.kept[index]

    def sum_of(self, index: int) -> Tensor | None:
        """The sum so far of one parameter, on the device."""
        return self.get(index)

    def put(self, index: int, total: Tensor) -> None:
        """In the place of a parameter's sum."""
        self.kept[index] = None
        self.add(index, total, single=False)

    def finish(self) -> None:
        """All batches are in: round to the dtype, one at a time, so that no second copy of all of them exists."""
        for index, kept in enumerate(self.kept):
            if kept is not None:
                self.kept[index] = self._narrow(kept)

    def _narrow(self, kept: Tensor) -> Tensor:
        narrower = kept.dtype != torch.float64 and kept.dtype.itemsize > self.dtype.itemsize
        return kept.to(self.dtype) if narrower else kept

    def get(self, index: int) -> Tensor | None:
        """The gradient of one parameter on the device; None is zero."""
        return self.kept[index]

    def move_to(self, device: torch.device) -> None:
        """Serve a model that is on another device now."""
        if device != self.device:
            self.kept = [None if kept is None else kept.to(device) for kept in self.kept]
            self.device = device

    def close(self) -> None:
        self.kept = []

    def __repr__(self) -> str:
        return f"on {self.device}"


class HostStore(Store):
    """A gradient in host memory, pinned where there is a GPU to copy to.

    A parameter's part is copied to the device when it is asked for, and the one that followed it the last time is
    copied ahead, on a stream of its own, while the caller computes: passes ask in the same order every time.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(count, dtype, device)
        self._follows: dict[int, int] = {}
        self._last: int | None = None
        self._ahead: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def add(self, index: int, grad: Tensor, single: bool) -> Tensor:
        before = self.kept[index]
        if before is None:
            self.kept[index] = self._to_host(grad, grad.dtype if single else sum_dtype(grad))
            return grad
        if before.dtype != sum_dtype(before):
            self.kept[index] = before = before.to(sum_dtype(before))
        before.add_(grad.to(before.device))
        return before.to(grad.device)

    def sum_of(self, index: int) -> Tensor | None:
        kept = self.kept[index]
        return None if kept is None else kept.to(self.device)

    def _to_host(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        host = torch.empty(grad.shape, dtype=dtype, device="cpu", pin_memory=grad.is_cuda)
        return host.copy_(grad)

    def finish(self) -> None:
        for index, kept in enumerate(self.kept):
            if kept is not None and (narrow := self._narrow(kept)) is not kept:
                self.kept[index] = narrow.pin_memory() if kept.is_pinned() else narrow

    def get(self, index: int) -> Tensor | None:
        if self.device.type != "cuda":
            return self._host(index)
        grad = self._ahead.pop(index) if index in self._ahead else self._copy(index)
        if grad is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._stream)
            grad.record_stream(now)  # its memory may be reused only after what the caller is about to do with it
        if self._last is not None:
            self._follows[self._last] = index
        self._last = index
        following = self._follows.get(index)
        if following is not None and following not in self._ahead:
            copy = self._copy(following)
            self._ahead = {} if copy is None else {following: copy}
        return grad

    def _copy(self, index: int) -> Tensor | None:
        kept = self._host(index)
        if kept is None:
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            return kept.to(self.device, non_blocking=True)

    def _host(self, index: int) -> Tensor | None:
        return self.kept[index]

    def move_to(self, device: torch.device) -> None:
        self.device, self._stream = device, None
        self._ahead.clear()

    def close(self) -> None:
        super().close()
        self._ahead.clear()

    def __repr__(self) -> str:
        return "in host memory"


class FileStore(HostStore):
    """A gradient in a safetensors file, memory-mapped: what is not asked for is not read.

    Without a dtype it opens a file that exists; with one it collects in host memory and `finish` writes the file.
    """

    def __init__(
        self, path: Path, names: list[str], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__(len(names), dtype or torch.float64, device or torch.device("cpu"))
        self.path, self.names = path, names
        self._file: TensorFile | None = None
        if dtype is None:
            self._open()

    def finish(self) -> None:
        super().finish()
        self.write(self.path, dict(zip(self.names, self.kept, strict=True)))
        self.kept = [None] * len(self.names)
        self._open()

    @staticmethod
    def write(path: Path, tensors: dict[str, Tensor | None]) -> str:
        """A safetensors file of what is not None, whole or not at all; returns its checksum."""
        return write_tensors(path, {n: t for n, t in tensors.items() if t is not None})

    @property
    def checksum(self) -> str | None:
        """Of the file; None in one of an earlier version."""
        return None if self._file is None else self._file.checksum

    def _open(self) -> None:
        self._file = TensorFile(self.path, "measure the directions again with gfast.risk_gradients")

    def _host(self, index: int) -> Tensor | None:
        if self._file is None:
            return self.kept[index]
        name = self.names[index]
        return self._file.get(name) if name in self._file.names else None

    def close(self) -> None:
        super().close()
        self._file = None

    def __repr__(self) -> str:
        return f"in {self.path.parent}"
