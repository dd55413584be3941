"""The gram engine: dot products between the gradients of samples, with no direction and no weight gradient.

    entry i, j = < grad NLL(s_j), grad log p(s_i) >        i from the forget set, j from the forget or the retain set

One pass over a forget batch (a forward, and the backward of the activations) keeps the inputs and output gradients of
its modules; then every other batch passes by and is multiplied with them as its own appear. Two single batches cost two
such passes and the products. With m_f and m_r batches there are m_f (m_f + 1) / 2 + m_f m_r passes, because only one
forget batch is kept at a time: a forward's activations, twice. The head's output gradient [n, V] exists whole only for
n up to the hidden size; for more rows it is formed a tile of the vocabulary at a time (`HeadRows`).

The G-effect of an objective keeps its batches under the objective's seeds, and both sets pass by under the risk's:
m_f (m_f + m_r) forwards for an objective on the forget set. The kept batch itself passes by in the graph that it is
kept from: a second backward, not a second pass. For the risk itself, and for GA, which is minus the NLL, not even that:
what is kept is multiplied with itself. Until a second backward is through, all activations of the batch stay beside
what is kept of it, which is no more than while another batch of its size passes by. Where functions that are not
PyTorch's own take part, whose backward may overwrite what they had saved, it takes a forward of its own, as all do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gfast.geffect.data import SIDE_SOURCES, Term, identity_factor, to_device
from gfast.geffect.measurement import Measurement
from gfast.geffect.modules import Outer, Share, find_sites
from gfast.geffect.pairs import GramEffect
from gfast.geffect.passes import Passes, Progress
from gfast.geffect.products import Caches, own_products, products
from gfast.geffect.rows import Rows, rows_of
from gfast.geffect.seeded import Seed, SeededPasses, check_weighted, frozen
from gfast.geffect.state import measuring, refuse_sharded
from gfast.model import shifted
from gfast.objectives import Objective
from gfast.ops.common import IGNORE_INDEX

_Batch = Mapping[str, Any]


def gram_effect(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    groups: str | Callable[[str], str] = "paper",
    loss_scale: float | None = None,
    progress: bool = False,
) -> GramEffect:
    r"""Dot products of the gradients of forget samples with those of forget and retain samples, by layer group.

        entry i, j = < grad NLL(s_j), grad log p(s_i) >,    both summed over the labelled tokens of the sample

    A step that lowers log p(s_i) changes the NLL of s_j by -lr times the entry, to first order. Nothing of a
    parameter's size is formed or stored: two passes without weight gradients, and products between rows. Made for
    batches of some hundred to a few thousand tokens; memory holds one forget batch's activations twice. The output
    head's gradients [n, V] of n labelled tokens are held where n is at most the hidden size, else formed a tile of
    the vocabulary at a time, which costs up to one more product with the head a batch.

    Args:
        model: as for `pg_effect`: its trainable parameters must belong to Linears (or GPT-2's Conv1D), embeddings and
            norms. It is measured in evaluation mode and left as found, also after an error.
        forget, retain: as for `g_effect`. Every pair of a forget and another batch costs a pass.
        groups, loss_scale, progress: as for `pg_effect`.

    Returns:
        GramEffect: `unlearn` group -> fp64 [S_f, S_f] and `retain` group -> [S_f, S_r].

    Raises:
        ValueError: as `pg_effect`.

    Source: arXiv 2502.19301, Definition 1, between single samples.

    Example:
        >>> import torch
        >>> from gfast.geffect.gram import gram_effect
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> ids = torch.arange(12).view(2, 6)
        >>> gram = gram_effect(LlamaForCausalLM(config), forget={"input_ids": ids, "labels": ids},
        ...                    retain={"input_ids": ids[:1], "labels": ids[:1]})
        >>> gram.total("retain").shape
        torch.Size([2, 1])
    """
    return gram_effects(Measurement.of(model, forget, retain, groups=groups, loss_scale=loss_scale, progress=progress))


def gram_effects(measurement: Measurement) -> GramEffect:
    """`gram_effect` of a request that is checked."""
    batches = measurement.data.batches
    tokens = {
        source: torch.cat([(batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).cpu() for batch in batches[source]])
        for source in SIDE_SOURCES
    }
    starts = {source: _starts(batches[source]) for source in SIDE_SOURCES}
    total = {source: len(tokens[source]) for source in SIDE_SOURCES}
    groups = measurement.groups.names
    out = {s: torch.zeros(total["forget"], len(groups), total[s], dtype=torch.float64) for s in SIDE_SOURCES}

    def put(source: str, first: int, second: int, values: Tensor) -> None:
        rows, columns = starts["forget"][first], starts[source][second]
        # -: the entry is of NLL(s_j) and log p(s_i)
        out[source][rows : rows + values.shape[0], :, columns : columns + values.shape[2]] = -values

    with _Pairs(measurement, "log p", by_sample=True, own=True) as pairs:
        for first, batch in enumerate(batches["forget"]):
            pairs.keep(batch)
            for second, other in enumerate(batches["forget"][first + 1 :], first + 1):
                values = pairs.cross(other)
                put("forget", first, second, values)
                put("forget", second, first, values.transpose(0, 2))
            for second, other in enumerate(batches["retain"]):
                put("retain", first, second, pairs.cross(other))
            put("forget", first, first, pairs.own())
    sides = ({name: out[s][:, g].contiguous() for g, name in enumerate(groups)} for s in SIDE_SOURCES)
    counts = {"unlearn": int(tokens["forget"].sum()), "retain": int(tokens["retain"].sum())}
    return GramEffect(*sides, tokens, counts=counts)


def gram_dots(measurement: Measurement, term: Term) -> Tensor:
    """< grad L, grad R(D) > by group and side, fp64 [G, 2], of an objective with token weights on a set.

    The batches of the objective are kept one at a time, and both sets pass by: the risk's seeds on one side, the
    objective's on the other. Raises ValueError for an objective or a risk without token weights.
    """
    data = measurement.data
    risks = [Term(measurement.risk, source) for source in SIDE_SOURCES]
    for one in (term, *risks):
        check_weighted(one, "gram")
    label = f"{term.objective} on the {term.source} data"
    dots = torch.zeros(len(measurement.groups.names), 2, dtype=torch.float64)
    factor = identity_factor(term, measurement.risk)  # if known, the batch's products with itself are its own

    def add(side: int, values: Tensor) -> None:  # [1, G, 1]
        dots[:, side] += values[0, :, 0] / (data.count(term) * data.count(risks[side]))

    with _Pairs(measurement, label, by_sample=False, own=factor is not None) as pairs:
        others = [(side, other) for side, risk in enumerate(risks) for _, other in data.counted(risk)]
        for _, batch in data.counted(term):
            sides = [side for side, other in others if other is batch]
            same = pairs.keep(batch, term.objective, measurement.risk if sides and factor is None else None)
            for side, other in others:
                if other is not batch:
                    add(side, pairs.cross(other, measurement.risk))
            if sides and factor is not None:
                same = factor * pairs.own()  # after the others, which leave less to do
            for side in sides:
                add(side, same)
    return dots


class _Pairs:
    """One batch's shares kept, and the products of other batches' with them. A context manager: it lends the model.

    With `by_sample` False a batch counts as one sample, with the sum of its rows' gradients. With `own` products of the
    kept batch with itself are made beside those with the first other one, as far as that is cheaper.
    """

    def __init__(self, measurement: Measurement, label: str, by_sample: bool, own: bool) -> None:
        model = measurement.model
        refuse_sharded(model)
        sites = find_sites(model, measurement.groups, "gram")
        self.label, self.by_sample, self.wants_own = label, by_sample, own
        self.bar = Progress(measurement.progress, "gram")
        self.passes = Passes(model, measurement.data, measurement.groups, self.bar, measurement.loss_scale)
        self.position = {name: index for index, name in enumerate(self.passes.names)}
        self.kept: dict[str, list[Rows]] = {}
        self.readers: Counter[int] = Counter()  # of the inputs that are kept, by their place in memory
        self.caches = Caches.new()
        self.model, self.stack = model, ExitStack()
        scale = self.passes.loss_scale
        self.seeded = SeededPasses(model, sites, "gram", scale, whole_head=True)

    def __enter__(self) -> _Pairs:
        with self.stack as stack:  # what was entered is left again if a later one fails
            for one in (self.bar, measuring(self.model), frozen(self.model), self.seeded):
                stack.enter_context(one)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.kept, self.caches = {}, Caches.new()
        self.stack.__exit__(*error)
        if error[0] is None:
            self.seeded.finish()

    def keep(self, batch: _Batch, objective: Objective | None = None, risk: Objective | None = None) -> Tensor | None:
        """Run a batch and keep its shares under the objective's seeds (None: log p), in place of those kept before.

        With a risk the products with the same batch under its seeds, as `cross` gives them, from the same forward.
        """
        self.kept, self.readers = {}, Counter()
        self.caches = Caches.new(self.readers)
        self.samples = self._samples(batch)
        self.own_table, self.own_done = self._table(self.samples), set()
        self.table = self._table(self.samples)
        self._run(batch, (objective, self._keep), *([] if risk is None else [(risk, self._multiply)]))
        return None if risk is None else self._by_group(self.table)

    def cross(self, batch: _Batch, objective: Objective | None = None) -> Tensor:
        """Products of the kept batch's samples with this one's by group, fp64 [S, G, S'] on the CPU."""
        self.table = self._table(self._samples(batch))
        self._run(batch, (objective, self._multiply))
        return self._by_group(self.table)

    def own(self) -> Tensor:
        """Products of the kept batch's samples with each other by group, [S, G, S]."""
        for name in self.kept:
            self._take_own(name)
        return self._by_group(self.own_table)

    def _samples(self, batch: _Batch) -> int:
        return batch["labels"].shape[0] if self.by_sample else 1

    def _table(self, columns: int) -> Tensor:
        shape = (len(self.position), self.samples, columns)
        return torch.zeros(shape, dtype=torch.float64, device=self.passes.device)

    def _by_group(self, table: Tensor) -> Tensor:
        return self.passes.by_group(table.transpose(0, 1) / self.passes.loss_scale**2, self.label)

    def _run(self, batch: _Batch, *seeds: Seed) -> None:
        batch = to_device(batch, self.passes.device)
        self.shape = batch["labels"].shape
        if bool((shifted(batch["labels"]) != IGNORE_INDEX).any()):
            self.seeded.run(batch, *seeds)
        self.caches = Caches.new(self.readers)  # what it holds belongs to this batch
        self.bar.update()

    def _rows(self, share: Share, place: Tensor | None) -> Rows:
        count, length = self.shape
        owner = None if place is None or not self.by_sample else place // length
        return rows_of(share, owner, count if self.by_sample else 1, self.caches.selected)

    def _keep(self, name: str, share: Share, place: Tensor | None) -> None:
        found, kept = self._rows(share, place), self.kept.setdefault(name, [])
        if kept and isinstance(found.share, Tensor):  # whole gradients of samples add up
            kept[0].share.add_(found.share)
        else:
            kept.append(found)
            if isinstance(found.share, Outer):
                self.readers[found.share.a.data_ptr()] += 1

    def _multiply(self, name: str, share: Share, place: Tensor | None) -> None:
        found, kept, index = self._rows(share, place), self.kept.get(name, []), self.position[name]
        # forming gradients of the kept samples serves their own products too
        joint = self.wants_own and len(kept) == 1 and name not in self.own_done
        for one in kept:
            values, own = products(one, found, joint, self.caches)
            self.table[index] += values
            if joint:
                self.own_table[index] = own
                self.own_done.add(name)

    def _take_own(self, name: str) -> None:
        if name in self.own_done:
            return
        self.own_done.add(name)
        kept, index = self.kept[name], self.position[name]
        for first, one in enumerate(kept):  # a module called several times, or a tied matrix: all pairs of its uses
            self.own_table[index] += own_products(one)
            for other in kept[first + 1 :]:
                values = products(one, other, own=False)[0]
                self.own_table[index] += values + values.t()


def _starts(batches: list[_Batch]) -> list[int]:
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch["labels"].shape[0])
    return starts
