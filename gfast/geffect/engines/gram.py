"""The gram engine: dot products between the gradients of samples, with no direction and no weight gradient.

    entry i, j = < grad NLL(s_j), grad log p(s_i) >        i from the forget set, j from the forget or the retain set

One pass over a forget batch (a forward, and the backward of the activations) keeps the inputs and output gradients of
its modules; then every other batch passes by and is multiplied with them as its own appear. Two single batches cost two
such passes and the products. With m_f and m_r batches there are m_f (m_f + 1) / 2 + m_f m_r passes, because only one
forget batch is kept at a time: a forward's activations, twice. The head's output gradient [n, V] exists whole only for
n up to the hidden size; for more rows it is formed a tile of the vocabulary at a time (`HeadProduct`).

The G-effect of an objective keeps its batches under the objective's seeds, and both sets pass by under the risk's:
m_f (m_f + m_r) forwards for objectives on the forget set, however many: of each batch the inputs are kept once and the
output gradients for every objective, by a backward each, and what passes by is multiplied with all of them. The kept
batch itself passes by in the graph that it is kept from: one more backward, not a second pass. With the risk itself
among the objectives, or GA, which is minus the NLL, not even that: what is kept is multiplied with what is kept of it.
Until the last backward is through, all activations of the batch stay beside what is kept of it, which for one objective
is no more than while another batch of its size passes by. Where functions that are not PyTorch's own take part, whose
backward may overwrite what they had saved, every backward takes a forward of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gfast.geffect.backward import term_label
from gfast.geffect.contributions.layers import Contribution, find_sites
from gfast.geffect.contributions.row_pass import RowPass, Seed, check_weighted
from gfast.geffect.data import Term, identity_factor, to_device
from gfast.geffect.engines.gram_products import InputProducts, own_products, products
from gfast.geffect.engines.gram_rows import Rows, Selected, rows_of
from gfast.geffect.request import Request
from gfast.geffect.results.gram_effect import GramEffect
from gfast.model_output import shifted
from gfast.model_state import measuring
from gfast.ops.checks import IGNORE_INDEX
from gfast.progress import Bar
from gfast.sides import SETS

_Batch = Mapping[str, Any]


def gram_effects(request: Request) -> GramEffect:
    """`gram_effect` of a request that is checked."""
    request.refuse_weights("gram_effect")
    request.look_at_texts()
    batches, processes = request.data.batches, request.processes
    tokens = {
        source: torch.cat([(batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).cpu() for batch in batches[source]])
        for source in SETS
    }
    starts = {s: list(accumulate((len(batch["labels"]) for batch in batches[s]), initial=0)) for s in SETS}
    total = {source: len(tokens[source]) for source in SETS}
    groups = request.groups.names
    out = {s: torch.zeros(total["forget"], len(groups), total[s], dtype=torch.float64, device="cpu") for s in SETS}

    def put(source: str, first: int, second: int, values: Tensor) -> None:
        rows, columns = starts["forget"][first], starts[source][second]
        # -: the entry is of NLL(s_j) and log p(s_i)
        out[source][rows : rows + values.shape[0], :, columns : columns + values.shape[2]] = -values

    def measure() -> None:
        with _Pairs(request, by_sample=True) as pairs:
            for first, batch in list(enumerate(batches["forget"]))[processes.rank :: processes.size]:
                pairs.keep(batch, [None], own=0)
                for second, other in enumerate(batches["forget"][first + 1 :], first + 1):
                    (values,) = pairs.cross(other)
                    put("forget", first, second, values)
                    put("forget", second, first, values.transpose(0, 2))
                for second, other in enumerate(batches["retain"]):
                    put("retain", first, second, pairs.cross(other)[0])
                put("forget", first, first, pairs.with_kept(0)[0])

    processes.together(measure)
    out = {source: _of_all(request, values) for source, values in out.items()}
    sides = ({name: out[s][:, g].contiguous() for g, name in enumerate(groups)} for s in SETS)
    counts = {"unlearn": int(tokens["forget"].sum()), "retain": int(tokens["retain"].sum())}
    return GramEffect(*sides, tokens, counts=counts)


def objective_dots(request: Request, terms: Sequence[Term]) -> list[Tensor]:
    """< grad L, grad R(D) > by group and side, fp64 [G, 2], of objectives with token weights, each on a set.

    The batches of the objectives are kept one at a time, and both sets pass by: the risk's seeds on one side, the
    objectives' on the other. Raises ValueError for an objective or a risk without token weights.
    """
    data, processes = request.data, request.processes
    risks = [Term(request.risk, source) for source in SETS]
    for each in (*terms, *risks):
        check_weighted(each, "gram")
    dots = {term: torch.zeros(len(request.groups.names), 2, dtype=torch.float64, device="cpu") for term in terms}
    factors = {term: identity_factor(term, request.risk) for term in terms}
    others = [(side, other) for side, risk in enumerate(risks) for _, other in data.counted(risk)]

    def add(side: int, batch_terms: Sequence[Term], values: Tensor) -> None:  # [K, 1, G, 1]
        for term, value in zip(batch_terms, values, strict=True):
            dots[term][:, side] += value[0, :, 0] / (data.count(term) * data.count(risks[side]))

    def measure() -> None:
        with _Pairs(request, by_sample=False) as pairs:
            for batch, batch_terms in data.shared(terms)[processes.rank :: processes.size]:
                sides = [side for side, other in others if other is batch]
                # one whose gradient is the risk's, times a factor, stands for it: no backward of the risk is needed
                known = next((which for which, term in enumerate(batch_terms) if factors[term] is not None), None)
                risk = risks[sides[0]] if sides and known is None else None
                same = pairs.keep(batch, batch_terms, risk, known if sides else None)
                for side, other in others:
                    if other is not batch:
                        add(side, batch_terms, pairs.cross(other, risks[side]))
                if sides and known is not None:  # after the others, which leave less to do
                    same = factors[batch_terms[known]] * pairs.with_kept(known)
                for side in sides:
                    add(side, batch_terms, same)

    processes.together(measure)
    return [_of_all(request, dots[term]) for term in terms]


class _Pairs:
    """One batch's contributions kept, and the products of other batches' with them. A context manager that lends the
    model.

    What is kept may be of several terms (None: log p), whose K contributions to a parameter are multiplied one after
    the other. With `by_sample` False a batch counts as one sample, with the sum of its rows' gradients.
    """

    def __init__(self, request: Request, by_sample: bool) -> None:
        model = request.model
        sites = find_sites(model, request.groups, "gram")
        self.by_sample = by_sample
        self.bar = Bar("gram", show=request.options.progress)
        self.passes = request.passes(self.bar)
        self.position = {name: index for index, name in enumerate(self.passes.names)}
        self._forget()
        self.model, self.stack = model, ExitStack()
        scale = self.passes.loss_scale
        self.seeded = RowPass(self.passes.module, sites, "gram", scale, whole_head=True)

    def __enter__(self) -> _Pairs:
        with self.stack as stack:  # what was entered is left again if a later one fails
            for context in (self.bar, measuring(self.model, checkpoints=False), self.seeded):
                stack.enter_context(context)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._forget()
        self.stack.__exit__(*error)
        if error[0] is None:
            self.seeded.finish()

    def _forget(self) -> None:
        self.kept: list[dict[str, list[Rows]]] = []  # of each term, by parameter
        self.inputs, self.selected = InputProducts(), Selected()

    def keep(
        self, batch: _Batch, terms: Sequence[Term | None], risk: Term | None = None, own: int | None = None
    ) -> Tensor | None:
        """Run a batch and keep its contributions under each term's seeds, in place of those kept before.

        With a risk the products with the same batch under its seeds, as `cross` gives them, from the same forward. own:
        the number of the term whose products with itself will be wanted: they are made beside those with the first
        other batch, as far as that is cheaper.
        """
        self._forget()
        self.kept = [{} for _ in terms]
        self.labels = [term_label(term) for term in terms]
        self.samples, self.wants_own = self._samples(batch), own
        self.own_table, self.own_done = self._table(1, self.samples)[0], set()
        self.table = self._table(len(terms), self.samples)
        seeds = [(term, partial(self._keep, which)) for which, term in enumerate(terms)]
        self.selected = Selected(every=len(terms) > 1)
        self._run(batch, *seeds, *([] if risk is None else [(risk, self._multiply)]), heads=len(terms))
        return None if risk is None else self._by_group(self.table)

    def cross(self, batch: _Batch, risk: Term | None = None) -> Tensor:
        """Products of the kept batch's samples with this one's by group, fp64 [K, S, G, S'] on the CPU."""
        self.table = self._table(len(self.kept), self._samples(batch))
        self._run(batch, (risk, self._multiply))
        return self._by_group(self.table)

    def with_kept(self, which: int) -> Tensor:
        """The same of the kept batch's samples with themselves, under the seeds of one of the terms."""
        self.table = self._table(len(self.kept), self.samples)
        for name, rows in self.kept[which].items():
            if name not in self.own_done:
                self.own_done.add(name)
                self.own_table[self.position[name]] += self._own(rows)
            for number, kept in enumerate(self.kept):
                if number != which:
                    self._add_products(number, name, kept.get(name, []), rows)
        self.table[which] = self.own_table
        return self._by_group(self.table)

    def _samples(self, batch: _Batch) -> int:
        return batch["labels"].shape[0] if self.by_sample else 1

    def _table(self, terms: int, columns: int) -> Tensor:
        shape = (terms, len(self.position), self.samples, columns)
        return torch.zeros(shape, dtype=torch.float64, device=self.passes.device)

    def _by_group(self, table: Tensor) -> Tensor:
        table = table.transpose(1, 2) / self.passes.loss_scale**2  # [K, S, P, S']
        return torch.stack(
            [self.passes.by_group(values, label, alone=True) for values, label in zip(table, self.labels, strict=True)]
        )

    def _run(self, batch: _Batch, *seeds: Seed, heads: int = 1) -> None:
        host_batch, batch = batch, to_device(batch, self.passes.device)
        self.shape = batch["labels"].shape
        if bool((shifted(batch["labels"]) != IGNORE_INDEX).any()):
            logp = self.seeded.run(batch, *seeds, heads=heads)
            self.passes.data.answers.add(host_batch, logp, self.passes.parameters[0].dtype)
            self.passes.data.answers.check()
        self.inputs, self.selected = InputProducts(), Selected()  # what they hold belongs to this batch
        self.bar.update()

    def _rows(self, contribution: Contribution, place: Tensor | None) -> Rows:
        count, length = self.shape
        owner = None if place is None or not self.by_sample else place // length
        return rows_of(contribution, owner, count if self.by_sample else 1, self.selected)

    def _keep(self, which: int, name: str, contribution: Contribution, place: Tensor | None) -> None:
        rows, kept = self._rows(contribution, place), self.kept[which].setdefault(name, [])
        if kept and isinstance(rows.contribution, Tensor):  # whole gradients of samples add up
            kept[0].contribution.add_(rows.contribution)
        else:
            kept.append(rows)

    def _multiply(self, name: str, contribution: Contribution, place: Tensor | None) -> None:
        rows = [self._rows(contribution, place)]
        for which, kept in enumerate(self.kept):
            self._add_products(which, name, kept.get(name, []), rows)

    def _add_products(self, which: int, name: str, rows: list[Rows], others: list[Rows]) -> None:
        # forming gradients of the kept samples serves their own products too
        joint = self.wants_own == which and len(rows) == 1 and name not in self.own_done
        for left in rows:
            for right in others:
                values, own = products(left, right, joint, self.inputs)
                self.table[which, self.position[name]] += values
                if joint:
                    self.own_table[self.position[name]] = own
                    self.own_done.add(name)

    def _own(self, rows: list[Rows]) -> Tensor:
        """Products of a parameter's kept contributions with themselves, [S, S]: of all pairs of the uses of a module
        that is called several times, or of a tied matrix."""
        total = self.own_table.new_zeros(self.samples, self.samples)
        for first, left in enumerate(rows):
            total += own_products(left)
            for right in rows[first + 1 :]:
                values = products(left, right, own=False)[0]
                total += values + values.t()
        return total


def _of_all(request: Request, values: Tensor) -> Tensor:
    """What each process has measured a part of, summed."""
    device = next(request.model.parameters()).device
    return request.processes.sum(values.to(device)).cpu() if request.processes.size > 1 else values
