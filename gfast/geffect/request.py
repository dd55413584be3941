"""What every engine is asked: a model, its data by set, layer groups, a risk, and where directions are kept."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfast import hf, packed, peft_models, precision, wrappers
from gfast.embedding_rows import refuse_beyond
from gfast.geffect.backward import Passes
from gfast.geffect.contributions.coverage import refuse_gradient_hooks
from gfast.geffect.data import Data, Term, risk_terms, to_device
from gfast.geffect.directions import DTYPES, Directions, collect, frozen_squares, parameter_squares, risk_counts
from gfast.geffect.groups import GroupMap, assign
from gfast.geffect.processes import Processes
from gfast.geffect.storage import check_storage
from gfast.model import check_batch
from gfast.model_output import model_logp
from gfast.model_settings import settings_of
from gfast.model_state import measuring
from gfast.objectives import NLL, Objective
from gfast.ops.checks import IGNORE_INDEX
from gfast.original import REFERENCE_KEYS, check_reference_name
from gfast.progress import Bar
from gfast.rotary import refuse_cut
from gfast.sides import SETS

_log = logging.getLogger("gfast")


@dataclass(frozen=True)
class Options:
    """What every measurement takes, as `gfast.g_effect` describes it; dtype and storage are those of the directions."""

    groups: str | Callable[[str], str] = "paper"
    risk: Objective = NLL()
    dtype: torch.dtype = torch.float32
    storage: str | os.PathLike[str] = "device"
    directions: Directions | None = None
    loss_scale: float | None = None
    progress: bool = False
    reference: str = "auto"
    processes: str = "auto"
    engine: str = "stream"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"gfast: direction_dtype must be torch.float64, float32 or bfloat16, not {self.dtype}")
        check_storage(self.storage)
        check_reference_name(self.reference)
        stored = (self.dtype, self.storage) != (torch.float32, "device")
        if self.directions is not None and stored:
            raise ValueError(
                "gfast: direction_dtype and direction_storage say how directions are kept that are measured now, and "
                "directions= gives some: say it to gfast.risk_gradients (dtype=, storage=), or leave them out"
            )
        if self.loss_scale is not None and not 0 < self.loss_scale < float("inf"):
            raise ValueError(f"gfast: loss_scale must be positive, not {self.loss_scale}")


@dataclass
class Request:
    """A checked request."""

    model: nn.Module
    data: Data
    groups: GroupMap
    options: Options
    processes: Processes = Processes()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        forget: Any,
        retain: Any,
        options: Options = Options(),  # noqa: B008 - frozen
        used: Iterable[Term] = (),
        objective_batches: Any = None,
    ) -> Request:
        """Check everything that can be checked before any work.

        Raises:
            ValueError: an empty set, a malformed batch, data that an objective needs and a batch lacks, a parameter
                that no group takes, an unknown grouping, dtype or storage, directions of something else.
        """
        processes = Processes.of(model, options.processes, options.engine)
        alone = wrappers.measured(model)  # DDP would wait for processes that measure nothing
        used = [*used, *risk_terms(options.risk)]

        def checked() -> Data:
            """What one process may find wrong with what it was given, and another not."""
            wrappers.refuse_offloaded(model)
            peft_models.refuse_merged(model)
            wrappers.refuse_hooks_around(model, alone)
            adapters, fixed_width = peft_models.is_adapted(model), hf.depends_on_width(alone)
            data = Data(forget, retain, objective_batches, used, adapters, fixed_width, options.reference)
            for term in used:
                for batch in data.batches[term.source] if term.objective.needs & REFERENCE_KEYS else ():
                    precision.say_other(model, batch)
            refuse_cut(alone, data.batches)
            _say_what_has_no_label(data)
            if processes.sharded:
                _refuse_sharded(alone, used, data)
            return data

        def assigned() -> GroupMap:
            first = processes.divided(data.batches["forget"])[0]
            hf.check_causal(alone, to_device(first, next(model.parameters()).device))
            return assign(model, options.groups)

        data = processes.together(checked)
        groups = processes.together(assigned)
        processes.check_alike(data.batches, _asked(used, groups, options))
        if processes.replicated:
            names = list(groups.index)
            squares = dict(zip(names, parameter_squares(model, names, processes).tolist(), strict=True))
            squares |= frozen_squares(model, names, processes)
            processes.check_same_model(squares, settings_of(model))
        whole = _check_whole(used, data)
        data.batches |= {source: processes.divided(data.batches[source]) for source in SETS if source not in whole}
        if processes.sharded and options.storage not in ("device", "host"):
            raise ValueError(
                "gfast: direction_storage: each process has a shard of the directions of a model that FSDP2 shards, "
                'and a folder would be of one alone: use "device" or "host"'
            )
        request = cls(model, data, groups, options, processes)
        if options.engine in ("sample", "token", "gram"):
            refuse_gradient_hooks(model, request.groups.index, options.engine)
        if options.directions is not None:
            request._check_given(options.directions)
        return request

    @property
    def risk(self) -> Objective:
        return self.options.risk

    def passes(self, progress: Bar) -> Passes:
        """Forwards and backwards over the data; the model must be lent, see `measuring`."""
        return Passes(self.model, self.data, self.groups, progress, self.options.loss_scale, self.processes)

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
                scored = [(given["labels"][:, 1:] != IGNORE_INDEX).to(device) for given in (rows, batch)]
                apart, together = (x[:, 1:][y] for x, y in zip((apart, together), scored, strict=True))
                if len(apart) != len(together):
                    raise ValueError(
                        f"gfast: {source}: the first token of a text in the packed rows of batch {index} has a label, "
                        f"which the text before it would score: set it to -100, as padding-free collators do"
                    )
                together = together[packed.by_text(packed.texts(batch)[:, 1:].to(device)[scored[1]])[0]]
                narrow = min(p.dtype.itemsize for p in module.parameters() if p.is_floating_point()) < 4
                off = float((apart - together).abs().max())
                if not off <= (0.3 if narrow else 1e-3):
                    raise ValueError(
                        f"gfast: {source}: the model mixes the texts of the packed rows of batch {index} (a log-prob "
                        f"changes by {off:.3g} if its text stands alone). Give batches with a text a row, or an "
                        f"attention that keeps texts apart (attn_implementation='flash_attention_2')"
                    )
                batches[index] = rows

    def refuse_weights(self, name: str) -> None:
        """ValueError where batches have a `weight`: effects of samples are of their log-probs alone."""
        if self.data.weighted:
            raise ValueError(
                f"gfast: {name}: the {sorted(self.data.weighted)[0]} batches have a 'weight' of their tokens, which "
                f"log p of a sample has not: take it out of the batches, or use g_effect or token_effect"
            )

    @contextmanager
    def directions(self) -> Iterator[Directions]:
        """The directions that were given, or fresh ones for as long as they are needed."""
        if self.options.directions is not None:
            yield self.options.directions
            return
        with self.measure_directions() as directions:
            yield directions

    def measure_directions(self) -> Directions:
        """The gradients of the risk on both sets; see `gfast.risk_gradients`."""
        with Bar("risk gradients", show=self.options.progress) as bar, measuring(self.model):
            return self.collect(self.passes(bar))

    def collect(self, passes: Passes) -> Directions:
        """The same with passes on a model that is lent already."""
        return collect(passes, self.risk, self.groups, self.options.dtype, self.options.storage)

    def _check_given(self, given: Any) -> None:
        if not isinstance(given, Directions):
            raise ValueError(
                f"gfast: directions= takes what gfast.risk_gradients returns, not a {type(given).__name__}"
            )
        if given.processes != (self.processes if self.processes.sharded else Processes()):
            raise ValueError(
                "gfast: these directions are of a model that was sharded over the processes in another way: measure "
                "them again with gfast.risk_gradients"
            )
        given.check(self.model, self.groups, self.risk)
        again = "measure them again with gfast.risk_gradients"
        counts = risk_counts(self.data, self.risk)
        if counts != given.counts:
            raise ValueError(
                f"gfast: these directions were measured on other data: they average over {given.counts} labels, this "
                f"data has {counts}; {again}"
            )
        for source, fingerprint in self.data.fingerprints().items():
            if fingerprint != given.data[source]:
                raise ValueError(
                    f"gfast: these directions were measured on other {source} data: it had as many labels, but not "
                    f"these tokens; {again}"
                )


def _say_what_has_no_label(data: Data) -> None:
    for source in SETS:
        if not any(bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()) for batch in data.batches[source]):
            _log.warning(
                "gfast: no token of the %s data has a label that is scored (all are -100: a mask that found no "
                "answer?): its gradient is zero, and so is what is measured with it",
                source,
            )


def _refuse_sharded(model: nn.Module, used: Iterable[Term], data: Data) -> None:
    """ValueError for what only the process that runs a batch would find wrong with it, while others wait for its part
    of the weights.
    """
    for term in used:
        for batch in data.batches[term.source]:
            check_batch(model, term.own(batch), term.objective)
            refuse_beyond(model, batch)


def _asked(used: Iterable[Term], groups: GroupMap, options: Options) -> str:
    """A measurement in words that are the same in every process that is asked for it."""
    terms = ", ".join(dict.fromkeys(f"{term.objective} on the {term.source} data" for term in used))
    told = f"{terms}, by {options.engine}, in {len(groups.names)} groups of {len(groups.index)} parameters"
    return re.sub(r" at 0x[0-9a-f]+", "", told)


def _check_whole(used: Iterable[Term], data: Data) -> set[str]:
    """The sources of objectives that weigh the sequences of a batch against each other; ValueError for data in several
    batches.
    """
    used = [term for term in used if term.objective.of_batch]
    for term in used:
        batches = data.batches[term.source]
        if len(batches) > 1:
            raise ValueError(
                f"gfast: {term.objective} weighs the sequences of a batch against each other, and the {term.source} "
                f"data is cut into {len(batches)} batches: give one, as of a training step (a larger batch size)"
            )
    return {term.source for term in used}
