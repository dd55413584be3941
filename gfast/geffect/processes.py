"""Several processes that measure one effect: each its share of the batches, of a model that each holds whole (DDP, or
none around it) or of which each holds a shard (FSDP2).

Every process is given the same batches. A replicated model's gradients are this process's batches' own: directions are
summed over the processes, dots with them are sums of numbers. FSDP2 sums the gradients itself and leaves a shard of the
sum: directions stay shards, and the dots of shards are summed, one number a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, distributed, nn

from gfast import sharded
from gfast.geffect.data import BY_POSITION, NOT_BY_POSITION
from gfast.model_settings import difference
from gfast.packed import length_of, texts
from gfast.tensor_files import hash_tensor

T = TypeVar("T")

CHOICES = ("auto", "own", "all")


@dataclass(frozen=True)
class Processes:
    """How many there are and which this one is.

    copies: how many of them hold the same shard of every parameter; 0 where each holds all of it.
    """

    size: int = 1
    rank: int = 0
    copies: int = 0

    @classmethod
    def of(cls, model: nn.Module, choice: str, engine: str) -> Processes:
        """Those that measure together.

        Raises:
            ValueError: a choice that is none, a model sharded in a way that the engine has no rule for, by its name.
        """
        if choice not in CHOICES:
            raise ValueError(f"gfast: processes must be one of {', '.join(map(repr, CHOICES))}, not {choice!r}")
        copies = sharded.check_shards(model, engine)
        if copies and choice == "own":
            raise ValueError(
                "gfast: FSDP2 shards this model over the processes, so that none can measure batches of its own: give "
                "every process the same batches, and leave out processes='own'"
            )
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if not several or not (copies or choice == "all"):
            return cls()
        return cls(distributed.get_world_size(), distributed.get_rank(), copies)

    @property
    def sharded(self) -> bool:
        """Whether each holds a shard of every parameter."""
        return self.copies > 0

    @property
    def replicated(self) -> bool:
        """Whether there are several, and each has the whole model."""
        return self.size > 1 and not self.sharded

    def sum(self, table: Tensor) -> Tensor:
        """A tensor on the model's device summed over the processes; the same in all of them."""
        if self.size > 1:
            table = table.contiguous()
            distributed.all_reduce(table)
        return table

    def dots(self, table: Tensor) -> Tensor:
        """Dot products with what this process holds of each parameter, summed over those that hold the rest."""
        return self.sum(table) / max(self.copies, 1)

    def rounds(self, items: Sequence[T]) -> list[T]:
        """This process's share, and so many of others' behind it that every process has as many."""
        share = list(items[self.rank :: self.size])
        return share + list(items[: -(-len(items) // self.size) - len(share)])

    def each(self, items: Sequence[T], measure: Callable[[list[T]], list[Any]]) -> list[Any]:
        """What `measure` gives of every item, each measured by one of the processes; on the CPU."""
        if self.size == 1:
            return measure(list(items))
        shares = self._told(lambda: measure(list(items[self.rank :: self.size])))
        return [shares[index % self.size][index // self.size] for index in range(len(items))]

    def together(self, function: Callable[[], T]) -> T:
        """What the function gives in this process; where it fails in one, all of them raise."""
        if self.size == 1:
            return function()
        results: list[T] = []
        self._told(lambda: results.append(function()))
        return results[0]

    def _told(self, function: Callable[[], Any]) -> list[Any]:
        """What the function gives in each process."""
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, (result, None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(told):
            if text is not None:
                raise RuntimeError(f"process {rank} failed: {text}")
        return [message for message, _ in told]

    def check_alike(self, batches: Mapping[str, Sequence[Mapping[str, Any]]], asked: str) -> None:
        """ValueError unless every process has the same batches, and was asked the same of them."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for source, set_batches in sorted(batches.items()):
            for index, batch in enumerate(set_batches):
                for key, value in sorted(batch.items()):
                    if isinstance(value, Tensor):
                        hash_tensor(digest, f"{source}|{index}|{key}", value)
                    elif length_of(value) is not None:
                        digest.update(f"{source}|{index}|{key}|{value!r}".encode())
        told = self._told(lambda: (digest.hexdigest(), asked))
        other = next((rank for rank, said in enumerate(told) if said != told[0]), None)
        if other is not None and told[other][0] == told[0][0]:
            raise ValueError(
                f"gfast: process {other} measures {told[other][1]}, and process 0 {told[0][1]}: what several processes "
                f"measure together is one effect. Give every one the same arguments"
                + ("" if self.sharded else ", or processes='own' for an effect of each process's own")
            )
        if other is not None:
            raise ValueError(
                f"gfast: process {other} was given other batches than process 0. What several processes measure "
                f"together is divided among them by gfast: give every one the same batches, in the same order"
                + ("" if self.sharded else ", or processes='own' for an effect of each process's own")
            )

    def check_same_model(self, squares: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        """ValueError unless every process holds the same model: its weights' squared norms, and its settings."""
        told = self._told(lambda: (dict(squares), settings))
        known, first_settings = told[0]
        for rank, (others, other_settings) in enumerate(told):
            # they repeat to about 1e-8 between kinds of processors
            pairs = {name: (known.get(name, -1.0), others.get(name, -1.0)) for name in (*known, *others)}
            what = next((name for name, (x, y) in pairs.items() if abs(x - y) > 1e-7 * max(x, y)), None)
            what = difference(first_settings, other_settings) if what is None else what
            if what is not None:
                raise ValueError(
                    f"gfast: process {rank} holds another model than process 0 ({what}). What several "
                    f"processes measure together is of one model: load or seed it alike in each (adapters begin with "
                    f"random numbers), wrap it with DDP, or take processes='own' for an effect of each process's own"
                )

    def divided(self, batches: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """As many batches as there are processes, where there are fewer and their rows can be taken apart."""
        if self.size == 1 or len(batches) >= self.size:
            return batches
        rows = -(-sum(len(batch["labels"]) for batch in batches) // self.size)
        return [part for batch in batches for part in _parts(batch, max(rows, 1))]


def _parts(batch: Mapping[str, Any], rows: int) -> list[Mapping[str, Any]]:
    """The rows of a batch in several, at most `rows` in each; the batch itself where it is not known what is whose."""
    count = len(batch["labels"])
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    by_row = {
        key: value for key, value in tensors.items() if key in BY_POSITION | {"sample_id", "ref_layer", "ref_precision"}
    }
    by_row |= {key: value for key, value in batch.items() if key not in tensors and length_of(value) == count}
    known = all(key in BY_POSITION | NOT_BY_POSITION - {"pixel_values", "image_grid_thw"} for key in tensors)
    whole = all(length_of(value) == count for value in by_row.values())
    if not (known and whole) or count <= rows or texts(batch) is not None:
        return [batch]
    return [
        {**batch, **{key: value[start : start + rows] for key, value in by_row.items()}}
        for start in range(0, count, rows)
    ]
