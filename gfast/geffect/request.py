"""What every engine is asked: a model, its data by set, layer groups, a risk, and where directions are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfast import hf, packed, wrappers
from gfast.geffect.data import Data, Term, risk_terms, to_device
from gfast.geffect.directions import DTYPES, Directions, risk_counts, risk_directions
from gfast.geffect.groups import GroupMap, assign
from gfast.geffect.storage import check_storage
from gfast.model import model_logp
from gfast.model_state import measuring
from gfast.objectives import NLL, Objective
from gfast.ops.checks import IGNORE_INDEX


@dataclass
class Request:
    """A checked request. `given` are directions measured before, or None."""

    model: nn.Module
    data: Data
    groups: GroupMap
    risk: Objective
    dtype: torch.dtype = torch.float32
    storage: str | os.PathLike[str] = "device"
    progress: bool = False
    given: Directions | None = None
    loss_scale: float | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        forget: Any,
        retain: Any,
        *,
        used: Iterable[Term] = (),
        groups: str | Callable[[str], str] = "paper",
        risk: Objective = NLL(),  # noqa: B008 - frozen
        direction_dtype: torch.dtype = torch.float32,
        direction_storage: str | os.PathLike[str] = "device",
        directions: Directions | None = None,
        objective_batches: Any = None,
        loss_scale: float | None = None,
        progress: bool = False,
        reference: str = "auto",
    ) -> Request:
        """Check everything that can be checked before any work.

        Raises:
            ValueError: an empty set, a malformed batch, data that an objective needs and a batch lacks, a parameter
                that no group takes, an unknown grouping, dtype or storage, directions of something else.
        """
        if direction_dtype not in DTYPES:
            raise ValueError(f"direction_dtype must be torch.float64, float32 or bfloat16, not {direction_dtype}")
        check_storage(direction_storage)
        if loss_scale is not None and not 0 < loss_scale < float("inf"):
            raise ValueError(f"loss_scale must be positive, not {loss_scale}")
        wrappers.refuse_sharded(model)
        wrappers.refuse_offloaded(model)
        adapters, fixed_width = wrappers.is_adapted(model), hf.depends_on_width(model)
        used = [*used, *risk_terms(risk)]
        data = Data(forget, retain, objective_batches, used, adapters, fixed_width, reference)
        hf.check_causal(wrappers.measured(model), to_device(data.batches["forget"][0], next(model.parameters()).device))
        group_map = assign(model, groups)
        if directions is not None:
            _check_given(directions, model, data, group_map, risk)
        return cls(model, data, group_map, risk, direction_dtype, direction_storage, progress, directions, loss_scale)

    def look_at_texts(self) -> None:
        """Batches whose rows hold several texts give way to others with a text a row, as effects of samples need them.

        Raises ValueError where the model mixes the texts of a row: there is no effect of one of them then.
        """
        module = wrappers.measured(self.model)
        device = next(module.parameters()).device
        for source, batches in self.data.batches.items():
            for index, batch in enumerate(batches):
                if packed.texts(batch) is None:
                    continue
                rows = packed.unpacked(batch)
                with measuring(module), torch.no_grad():
                    apart = model_logp(module, to_device(rows, device))
                    together = model_logp(module, to_device(batch, device))
                labels = (rows["labels"], batch["labels"])
                apart, together = (
                    x[:, 1:][(y[:, 1:] != IGNORE_INDEX).to(x.device)]
                    for x, y in zip((apart, together), labels, strict=True)
                )
                narrow = min(p.dtype.itemsize for p in module.parameters() if p.is_floating_point()) < 4
                off = float((apart - together).abs().max())
                if not off <= (0.3 if narrow else 1e-3):
                    raise ValueError(
                        f"{source}: the model mixes the texts of the packed rows of batch {index} (a log-prob changes "
                        f"by {off:.3g} if its text stands alone). Give batches with a text a row, or an attention that "
                        f"keeps texts apart (attn_implementation='flash_attention_2')"
                    )
                batches[index] = rows

    @contextmanager
    def directions(self) -> Iterator[Directions]:
        """The directions that were given, or fresh ones for as long as they are needed."""
        if self.given is not None:
            yield self.given
            return
        with self.measure_directions() as directions:
            yield directions

    def measure_directions(self) -> Directions:
        """The gradients of the risk on both sets."""
        return risk_directions(
            self.model, self.data, self.groups, self.risk, self.dtype, self.storage, self.progress, self.loss_scale
        )


def _check_given(given: Any, model: nn.Module, data: Data, groups: GroupMap, risk: Objective) -> None:
    if not isinstance(given, Directions):
        raise ValueError(f"directions= takes what gfast.risk_gradients returns, not a {type(given).__name__}")
    given.check(model, groups, risk)
    counts = risk_counts(data, risk)
    if counts != given.counts:
        raise ValueError(
            f"these directions were measured on other data: they average over {given.counts} labels, this data has "
            f"{counts}; measure them again with gfast.risk_gradients"
        )
    for source, fingerprint in data.fingerprints().items():
        if fingerprint != given.data[source]:
            raise ValueError(
                f"these directions were measured on other {source} data: it had as many labels, but not these tokens; "
                f"measure them again with gfast.risk_gradients"
            )
