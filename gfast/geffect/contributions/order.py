"""Whether the rows that a module reads are the samples of a batch one after the other: its shapes do not tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gfast import module_kinds
from gfast.geffect.contributions.layers import Site
from gfast.packed import length_of

# How far apart, of its own norm, the inputs of a sample by itself and in a batch may be: the number of rows decides how
# kernels sum. Those of other tokens are about as far apart as they are long.
_APART = {torch.float64: 1e-6, torch.float32: 1e-2}
_APART_16_BIT = 0.2


class Order:
    """Compares what every module reads of one sample by itself with its rows in a batch, in the first batch of several
    that has a sample without padding (which by itself may be treated otherwise). It takes a forward of one sample."""

    def __init__(self, sites: list[Site], engine: str) -> None:
        self.sites, self.engine, self.done = sites, engine, False

    @contextmanager
    def checked(self, batch: Mapping[str, Any], answer: Callable[[Mapping[str, Any]], object]) -> Iterator[None]:
        """Around the forward of a batch; `answer` calls the model. ValueError from within the forward, naming a module.

        A sequence-first module whose batch has as many samples as tokens is found here, and tokens that are flattened
        in an order of their own.
        """
        row = None if self.done else _whole_row(batch)
        if row is None:
            yield
            return
        self.done = True
        alone: dict[str, list[Tensor]] = defaultdict(list)
        rows = batch["labels"].shape[0]
        text = {key: x[row : row + 1] if length_of(x) == rows else x for key, x in batch.items()}
        with torch.no_grad(), self._reading(lambda site, x: alone[site.name].append(x.clone())):
            answer(text)
        with self._reading(partial(self._compare, alone, row, *batch["labels"].shape)):
            yield

    @contextmanager
    def _reading(self, told: Callable[[Site, Tensor], None]) -> Iterator[None]:
        def before(site: Site, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            read = (*args, *kwargs.values(), None)[0]
            if site.kind == "embedding":
                read = module_kinds.embedding_lookup(module, args, kwargs)[0]
            if isinstance(read, Tensor):
                told(site, read.detach())

        handles = [
            site.module.register_forward_pre_hook(partial(before, site), with_kwargs=True) for site in self.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(
        self, alone: Mapping[str, list[Tensor]], row: int, rows: int, length: int, site: Site, read: Tensor
    ) -> None:
        if not alone[site.name]:
            return
        expected = alone[site.name].pop(0)
        flat = read.shape[0] == rows * length and length > 1
        if not flat and read.shape[0] != rows:
            return  # refused by its shape
        in_batch = read[row * length : (row + 1) * length] if flat else read[row : row + 1]
        if in_batch.shape == expected.shape and _alike(in_batch, expected):
            return
        raise ValueError(
            f"gfast: the {self.engine} engine cannot attribute the module {site.name!r}: its rows are not the samples "
            f"of a batch one after the other, for what it reads of a sample by itself is not what its rows of that "
            f"sample are in a batch of {rows} (or the model answers otherwise from call to call, by a hook with a flag "
            f"or a counter: hold that). Measure one sample a batch, freeze it, or use engine='stream' or 'token'"
        )


def _alike(in_batch: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(in_batch, expected)
    limit = _APART.get(expected.dtype, _APART_16_BIT)
    # a NaN is no difference in order
    return not (in_batch.double() - expected.double()).norm() > limit * expected.double().norm()


def _whole_row(batch: Mapping[str, Any]) -> int | None:
    """A sample that fills its row, of a batch of several; None where there is none, or where an entry has neither a
    row a sample nor one for all."""
    rows = batch["labels"].shape[0]
    if rows < 2 or any(length_of(x) not in (None, 1, rows) for x in batch.values()):
        return None
    mask = batch.get("attention_mask")
    if mask is None:
        return 0
    if mask.shape != batch["labels"].shape:
        return None
    whole = mask.bool().all(1).nonzero()
    return int(whole[0]) if len(whole) else None
