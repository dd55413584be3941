# SPDX-License-Identifier: Apache-2.0
"""Reference values that a training computes by itself, once it has sharded its model: before, no process can run it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from gfast.training.reference import ReferenceCache


class PendingReference(ReferenceCache):
    """A cache that a trainer is given before there is a model to compute it with: empty, until it is filled."""

    def __init__(self, what: Collection[str], layer: int | None, build: Callable[[nn.Module], ReferenceCache]) -> None:
        super().__init__([], [], {}, layer=layer)
        self._expected, self._build = frozenset(what), build

    @property
    def pending(self) -> bool:
        """Whether it is still to be filled."""
        return self._build is not None

    @property
    def what(self) -> frozenset[str]:
        """The quantities that it holds, or will."""
        return self._expected

    def fill(self, model: nn.Module) -> None:
        """Compute it, with all processes."""
        built, head = self._build(model), self.head
        head.update(built.head)  # the trainer has the dictionary itself
        vars(self).update(vars(built), head=head, _build=None)


class Later(Sequence):
    """A list that is made when it is first read."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self._make, self._made = make, None

    def _list(self) -> list[Any]:
        if self._made is None:
            self._made, self._make = self._make(), None
        return self._made

    def __len__(self) -> int:
        return len(self._list())

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]
