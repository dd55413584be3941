"""A pass that forms no weight gradient: parameters are constants, the seed of the backward given by token weights.

    seed = sum_i w_i grad logp_i        (w detached)

The decoder runs to its final hidden states, the head goes chunk by chunk (logits, their gradient in the same memory,
dH), and dH runs back through the decoder. What each trainable parameter gets is handed over row by row, see `layers`.
Several seeds of one batch take one forward and a backward each, through the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast.deferred import Head
from gfast.geffect.contributions.coverage import check_graph, repeatable
from gfast.geffect.contributions.head import HeadProduct
from gfast.geffect.contributions.layers import Contribution, OuterProduct, RowSum, Sites, Watch
from gfast.geffect.contributions.order import Order
from gfast.geffect.data import Term
from gfast.model import output_loss
from gfast.model_output import ModelOutput, model_output, output_logp, shifted
from gfast.model_state import uncompiled
from gfast.ops.checks import IGNORE_INDEX, check_label_range
from gfast.ops.chunks import default_chunk_rows, row_chunks, valid_rows
from gfast.ops.head import ChunkedHead
from gfast.ops.linear_inputs import check_map, prepare_head
from gfast.ops.reductions import sequence_layout
from gfast.ops.stat_spec import stat_spec_of
from gfast.ops.token_logp import logp_rows, logp_rows_grad
from gfast.ops.weights import WeightSpec, check_reference, is_pair, spec_of, token_weights, weigh
from gfast.packed import pair_ids, sequence_ids

# Rows, in hidden sizes, up to which the head's b [n, V] exists whole: it is no larger than the head then.
_WHOLE = 1.0

# consume(name, contribution, place): `place` int64 [n] are the rows' positions among all B * T, None: in their order
Consumer = Callable[[str, Contribution, Tensor | None], None]
# the term whose detached token weights seed a backward (None: every weight is 1), and who gets the contributions
Seed = tuple[Term | None, Consumer]


class Seeds(NamedTuple):
    """The token weights of a seed: a formula that the row kernels evaluate, or given values.

    given, ref_logp, times: [B, T] at the positions that score (one before the label's); `times` multiplies either.
    """

    spec: WeightSpec = WeightSpec()
    given: Tensor | None = None
    ref_logp: Tensor | None = None
    times: Tensor | None = None


def check_weighted(term: Term, engine: str) -> None:
    """ValueError for an objective that is no weighted sum of token log-probs by weights that the engine can know."""
    spec = stat_spec_of(term.objective)
    if spec is not None and spec.weighted and engine != "token":
        return
    try:
        spec_of(term.objective)
    except TypeError:
        lacks = "weights by entropy, not log-prob" if spec is not None and spec.weighted else "no token weights"
        raise ValueError(
            f"gfast: {term.objective} has {lacks}, and the {engine} engine measures only objectives that have weights "
            f"by log-probs: use engine='stream'"
        ) from None


@dataclass
class _Forward:
    """What a batch's forward leaves: logits [B, T, V], or hidden states [B, T, D] and the head that reads them.

    labels: [B, T] at the positions that score. tiled: the contribution to the head's weight comes as `HeadProduct`.
    repeats: further backwards through the graph are as good as the first.
    """

    batch: Mapping[str, Any]
    labels: Tensor
    output: Tensor
    head: Head | None
    names: dict[str, str]
    chunks: ChunkedHead | None
    tiled: bool
    repeats: bool

    def release(self) -> None:
        """After an error: let go of the graph, even where the frames of a traceback hold the output."""
        self.output.detach_()
        self.chunks = None
        # on a CPU nodes that were due stay in this thread's queue until its next backward, which drops them
        torch.zeros((), device="cpu", requires_grad=True).backward()


class RowPass:
    """Forwards and backwards over batches, with all contributions going to consumers.

    A context manager; the model must be lent, see `measuring`. Seeds are multiplied by `loss_scale`, and so is every b.
    With `whole_head` the contribution to the head's weight comes as one that may be kept: with its b [n, V], or as
    `HeadProduct` where that and those of other seeds that are kept would be large. Without, it comes a chunk of rows at
    a time, whose b is gone when the consumer returns.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, engine: str, loss_scale: float = 1.0, whole_head: bool = False
    ) -> None:
        self.model, self.sites = model, sites
        self.ran, self.loss_scale, self.whole_head = False, loss_scale, whole_head
        self.watch, self.order = Watch(sites.modules, engine), Order(sites.modules, engine)
        self.engine = engine
        self.stack = ExitStack()

    def __enter__(self) -> RowPass:
        with self.stack as stack:  # what was entered is left again if the next one fails
            for context in (uncompiled(), self.watch):
                stack.enter_context(context)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def finish(self) -> None:
        """ValueError for a module with trainable parameters that no pass has called."""
        if self.ran:
            self.watch.check_all_ran()

    def run(self, batch: Mapping[str, Any], *seeds: Seed, heads: int = 1) -> Tensor:
        """One batch (on the device), a backward for each seed in order. heads: how many keep the head's contribution.

        They share one forward, whose graph is held until the last of them has run through it; where a backward may
        not leave the graph as it was, each has a forward of its own.

        Returns the log-probs [B, T] at the positions that score, 0 where ignored.
        """
        forward, left = None, len(seeds)
        try:
            for term, consume in seeds:
                left -= 1
                forward = forward or self._forward(batch, heads)
                self.watch.consume, self.watch.again = partial(consume, place=None), left > 0 and forward.repeats
                score = self._own_logits if forward.chunks is None else partial(self._chunked, consume=consume)
                logp = score(forward, term)
                if not self.watch.again:
                    forward = None
        finally:
            self.watch.consume, self.watch.again = None, False
            if forward is not None:
                forward.release()
        return logp

    def _forward(self, batch: Mapping[str, Any], heads: int) -> _Forward:
        labels = shifted(batch["labels"])
        labels = labels.long() if labels.dtype == torch.int32 else labels  # as the loss ops take them
        with self.order.checked(batch, self._answer):
            head, output, _ = self._answer(batch)
        self.ran = True
        names = {} if head is None else self.sites.parameters_of(head.module)
        # the same tensor, but for autograd no view of another, which could not be detached in place
        output = torch.ops.aten._unsafe_view(output, output.shape)
        check_graph(output, self.sites.names(), self.engine)
        repeats = repeatable(output)
        whole = self.whole_head and "weight" in names
        chunks, tiled = (None, False) if head is None else _head_of(head, output, labels.reshape(-1), heads, whole)
        check_label_range("labels", labels.reshape(-1), output.shape[-1] if chunks is None else chunks.vocab)
        return _Forward(batch, labels, output, head, names, chunks, tiled, repeats)

    def _answer(self, batch: Mapping[str, Any]) -> ModelOutput:
        self.watch.start(*batch["labels"].shape)
        return model_output(self.model, batch)

    def _own_logits(self, forward: _Forward, term: Term | None) -> Tensor:
        seeds = _flat(self._seeds(forward, term))
        rows = forward.output.detach().reshape(-1, forward.output.shape[-1])
        grad = torch.empty_like(rows)
        logp = self._rows_gradient(rows, forward.labels.reshape(-1), seeds, 1.0, 0.0, grad)[0]
        self._backward(forward, grad)
        return logp.view(forward.labels.shape)

    def _chunked(self, forward: _Forward, term: Term | None, consume: Consumer) -> Tensor:
        seeds = self._seeds(forward, term)
        with torch.no_grad(), torch.autocast(forward.output.device.type, enabled=False):
            logp = self._head_contributions(forward, seeds, consume)
            grad = forward.chunks.gradients()[0]
            logp = forward.chunks.scatter(logp).view(forward.labels.shape)
        self._backward(forward, grad)
        return logp

    def _head_contributions(self, forward: _Forward, seeds: Seeds, consume: Consumer) -> Tensor:
        """Hands over what the head gets, and leaves dH in `forward.chunks`; log-probs [n] of the rows that count."""
        head, names, chunks = forward.head, forward.names, forward.chunks
        seeds = Seeds(*(chunks.select(x).contiguous() if isinstance(x, Tensor) else x for x in _flat(seeds)))
        place = torch.arange(chunks.rows, device=forward.output.device) if chunks.index is None else chunks.index  # [n]
        chunks.start_gradients(forward.output.requires_grad, False, False)
        scale, cap = check_map("g_effect", head.logit_scale, head.softcap)
        chunk_results = []  # log-probs, statistics and weights of the chunks
        for start, stop in row_chunks(chunks.rows, chunks.chunk):
            part = slice(start, stop)
            rows = chunks.logits(start, stop)  # [chunk, V]
            chunk_seeds = Seeds(*(x[part] if isinstance(x, Tensor) else x for x in seeds))
            chunk_results.append(self._rows_gradient(rows, chunks.labels[part], chunk_seeds, scale, cap, rows))
            chunks.add_gradients(start, stop, rows)
            if "weight" in names and not forward.tiled:
                consume(names["weight"], OuterProduct(chunks.hidden[part], rows), place[part])
            if "bias" in names:
                consume(names["bias"], RowSum(rows), place[part])
        logp, stats, coef = map(torch.cat, zip(*chunk_results, strict=True))
        if forward.tiled:
            head_parts = (head.weight.detach(), None if head.bias is None else head.bias.detach(), scale, cap)
            contribution = HeadProduct(chunks.hidden, chunks.labels, logp, stats, coef, *head_parts)
            consume(names["weight"], contribution, place)
        return logp

    def _backward(self, forward: _Forward, grad: Tensor) -> None:
        if not forward.output.requires_grad:
            return
        grad = grad.view(forward.output.shape).to(forward.output.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            forward.output.backward(grad, retain_graph=self.watch.again)

    def _seeds(self, forward: _Forward, term: Term | None) -> Seeds:
        """The detached weights of a term's objective. Those that depend on whole sequences score the batch first."""
        if term is None:
            return Seeds()
        objective, batch = term.objective, term.own(forward.batch)
        check_reference("g_effect", objective, batch.get("ref_logp"), batch["labels"])
        ref, times = (
            None if batch.get(key) is None else nn.functional.pad(batch[key][:, 1:], (0, 1))  # where it is scored
            for key in ("ref_logp", "weight")
        )
        if times is not None:
            times = torch.where(forward.labels != IGNORE_INDEX, times, 0)
        if stat_spec_of(objective) is not None:  # by entropy; the batch's own weights are in them already
            with torch.no_grad():
                weight = output_loss(ModelOutput(forward.head, forward.output.detach()), batch, objective).weight
            return Seeds(given=nn.functional.pad(weight[:, 1:], (0, 1)))
        spec = spec_of(objective)
        if spec is not None and spec.level == "token":
            return Seeds(spec, None, ref if spec.uses_ref else None, times)
        with torch.no_grad():
            logp = output_logp(ModelOutput(forward.head, forward.output.detach()), forward.labels).reshape(-1)
        even = forward.labels.numel() + forward.labels.numel() % 2
        pairs = is_pair(objective)
        texts = pair_ids(forward.batch, even) if pairs else sequence_ids(forward.batch)
        ids, count = sequence_layout("g_effect", forward.labels, texts)
        count = even if pairs and texts is not None else count  # which ops halve
        valid = (forward.labels != IGNORE_INDEX).reshape(-1)
        ref = None if ref is None else ref.reshape(-1).to(logp.dtype)
        given = weigh(objective, logp, ref, valid, ids, count)[0].view(forward.labels.shape)
        return Seeds(given=given, times=times)

    def _rows_gradient(
        self, rows: Tensor, labels: Tensor, seeds: Seeds, scale: float, cap: float, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out [n, V] = c_i d logp_i / d rows (may be `rows` itself); returns logp [n], statistics [n, 2] and c [n]."""
        logp, stats = logp_rows(rows, labels, scale, cap, "auto")
        weight = seeds.given
        if weight is None:
            ref = None if seeds.ref_logp is None else seeds.ref_logp.to(logp.dtype)
            weight = torch.where(labels != IGNORE_INDEX, token_weights(seeds.spec, logp, ref), 0.0)
        if seeds.times is not None:
            weight = weight * seeds.times
        coef = (weight.to(logp.dtype) * self.loss_scale).contiguous()
        logp_rows_grad(rows, labels, logp, stats, coef, scale, cap, out, "auto")
        return logp, stats, coef


def _head_of(head: Head, hidden: Tensor, labels: Tensor, heads: int, whole: bool) -> tuple[ChunkedHead, bool]:
    """The head over the rows that count, and whether its b is too large to exist whole, if that is wanted."""
    h, weight, bias = prepare_head("g_effect", hidden.detach().flatten(0, 1), head.weight, head.bias, labels)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        order = valid_rows(labels)
        count = len(h) if order is None else len(order)
        tiled = whole and heads * count > _WHOLE * weight.shape[1]
        chunk = count if whole and not tiled else default_chunk_rows(*weight.shape, h.device)
        return ChunkedHead(h, weight, bias, labels, chunk, order), tiled


def _flat(seeds: Seeds) -> Seeds:
    return Seeds(*(x.reshape(-1) if isinstance(x, Tensor) else x for x in seeds))
