"""Shares of samples as the gram engine keeps them: rows sorted by sample, without most of those that are zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gfast.geffect.contributions.head import HeadProduct
from gfast.geffect.contributions.layers import Contribution, OuterProduct, RowLookup, RowSum

_FULL = 0.9  # leaving out fewer rows than the rest would not pay for the copy


@dataclass(frozen=True)
class Rows:
    """Contributions of the samples of a batch, sorted by sample, without most of the rows that are zero.

    contribution: what each row adds to the gradient; or fp64 [S, size], whole gradients, for small parameters.
    counts: rows of each sample.
    """

    contribution: OuterProduct | HeadProduct | RowLookup | Tensor
    counts: list[int]

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def device(self) -> torch.device:
        of = self.contribution
        return (of if isinstance(of, Tensor) else of.b if isinstance(of, RowLookup) else of.a).device

    @cached_property
    def membership(self) -> Tensor:
        """[S, n] of ones and zeros: sums over the rows of each sample, as a product in a fixed order."""
        samples = torch.arange(len(self.counts), device="cpu")
        owner = torch.repeat_interleave(samples, torch.tensor(self.counts, dtype=torch.int64, device="cpu"))
        return (owner == samples[:, None]).float().to(self.device)

    def bounds(self) -> list[tuple[int, int]]:
        """First row and the one after the last of each sample."""
        return list(pairwise(accumulate(self.counts, initial=0)))

    def within(self, rows: slice) -> list[int]:
        """Rows of each sample among some of them."""
        start, stop = rows.start, min(rows.stop, self.size)
        return [max(0, min(last, stop) - max(first, start)) for first, last in self.bounds()]


class Selected:
    """Rows of the last module's inputs, kept for the next: queries, keys and values read one input.

    every: of all modules, for further backwards through the same graph; it holds the whole inputs too.
    """

    def __init__(self, every: bool = False) -> None:
        self._every = every
        # by place in memory: input, rows of it (None: all), their entries
        self._known: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def of(self, contribution: OuterProduct, wanted: Tensor | None) -> tuple[OuterProduct, Tensor | None]:
        """`contribution.select(kept)` (None: all), or a few rows of zeros more where those of its input are there
        already; and which rows these are.
        """
        key = contribution.a.data_ptr()
        known = self._known.get(key)
        if known is None or not (same_memory(known[0], contribution.a) and _serve(known[1], wanted, contribution.rows)):
            if not self._every:
                self._known.clear()
            entries = contribution.a if wanted is None else _selected(contribution.a, wanted)
            known = self._known[key] = contribution.a, wanted, entries
        rows = known[1]
        return OuterProduct(known[2], contribution.b if rows is None else _selected(contribution.b, rows)), rows


def _selected(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x by their indices on the CPU."""
    return x.index_select(0, rows.to(x.device))


def _serve(known: Tensor | None, wanted_rows: Tensor | None, total: int) -> bool:
    """Whether rows that are there (None: all) hold those that are wanted, and not many more."""
    count, wanted = (total if rows is None else len(rows) for rows in (known, wanted_rows))
    if wanted > count or wanted <= _FULL * count:
        return False
    if known is None or wanted_rows is None:
        return known is None
    if wanted == count:
        return torch.equal(wanted_rows, known)
    return bool(torch.isin(wanted_rows, known, assume_unique=True).all())


def rows_of(contribution: Contribution, owner: Tensor | None, samples: int, selected: Selected | None = None) -> Rows:
    """The contribution's rows, without those that are zero if there are many.

    owner: int64 [n], ascending: the sample of each; None where all samples have equally many.
    """
    if isinstance(contribution, RowSum):
        if owner is None:
            sums = contribution.terms.reshape(samples, -1, contribution.terms.shape[1]).sum(1, dtype=torch.float64)
        else:
            member = (owner == torch.arange(samples, device=owner.device)[:, None]).double()  # [S, n]
            sums = member @ contribution.terms.double()
        return Rows(sums, [0] * samples)
    total, used = contribution.rows, contribution.used()
    # the one look at the device: all that follows from it is worked out on the host
    seen = used[None] if owner is None else torch.stack([used.long(), owner])
    there, *owners = seen.cpu()
    rows: Tensor | None = there.nonzero()[:, 0]
    rows = None if len(rows) > _FULL * total else rows
    if isinstance(contribution, OuterProduct):
        contribution, rows = (selected or Selected()).of(contribution, rows)
    elif rows is not None:
        contribution = contribution.select(rows.to(used.device))
    if not owners:
        each = max(1, total // samples)
        counts = [each] * samples if rows is None else torch.bincount(rows // each, minlength=samples).tolist()
    else:
        counts = torch.bincount(owners[0] if rows is None else owners[0][rows], minlength=samples).tolist()
    return Rows(contribution, counts)


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Are they the same entries of one storage? As long as neither is freed."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
