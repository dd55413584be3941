"""A pass that forms no weight gradient: parameters frozen, the seed of the backward given by token weights.

    seed = sum_i w_i grad logp_i        (w detached)

The decoder runs to its final hidden states, the head goes chunk by chunk (logits, their gradient in the same memory,
dH), and dH runs back through the decoder. What each trainable parameter gets is handed over row by row, see `modules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast import hf
from gfast.geffect.data import Term
from gfast.geffect.head_rows import HeadRows
from gfast.geffect.modules import Outer, Share, Sites, Sum, Watch
from gfast.geffect.state import uncompiled
from gfast.geffect.uses import UseWatch
from gfast.model import model_logits, model_logp, shifted
from gfast.ops.common import IGNORE_INDEX, check_label_range, default_chunk_rows, row_chunks, sequence_layout
from gfast.ops.head import ChunkedHead, check_map, prepare_head, valid_rows
from gfast.ops.token_logp import logp_rows, logp_rows_grad
from gfast.ops.unlearn_loss import check_reference, spec_of, weigh
from gfast.ops.weights import WeightSpec, token_weights

# Rows, as a share of the hidden size, up to which the head's b [n, V] exists whole: it is no larger than the head then.
_WHOLE = 1.0

# consume(name, share, place): `place` int64 [n] are the rows' positions among all B * T, None for rows in their order
Consumer = Callable[[str, Share, Tensor | None], None]


class Seeds(NamedTuple):
    """The token weights of a seed: a formula that the row kernels evaluate, or given values.

    given, ref_logp: [B, T] at the positions that score (one before the label's).
    """

    spec: WeightSpec = WeightSpec()
    given: Tensor | None = None
    ref_logp: Tensor | None = None


def check_weighted(term: Term, engine: str) -> None:
    """ValueError for an objective that is no weighted sum of token log-probs."""
    try:
        spec_of(term.objective)
    except TypeError:
        raise ValueError(
            f"{term.objective} has no token weights, and the {engine} engine measures only objectives that have: use "
            f"engine='stream'"
        ) from None


def seeds_of(model: nn.Module, batch: Mapping[str, Any], objective: Any) -> Seeds:
    """The detached weights of an objective on a batch. Those that depend on whole sequences take a scoring pass."""
    reference = batch.get("ref_logp")
    check_reference("g_effect", objective, reference, batch["labels"])
    ref = None if reference is None else _to_scoring(reference)
    spec = spec_of(objective)
    if spec is not None and spec.level == "token":
        return Seeds(spec, None, ref if spec.uses_ref else None)
    labels = shifted(batch["labels"])
    with torch.no_grad():
        logp = _to_scoring(model_logp(model, batch)).reshape(-1)
    ids, count = sequence_layout("g_effect", labels, None)
    valid = (labels != IGNORE_INDEX).reshape(-1)
    ref = None if ref is None else ref.reshape(-1).to(logp.dtype)
    return Seeds(WeightSpec(), weigh(objective, logp, ref, valid, ids, count)[0].view(labels.shape))


def _to_scoring(values: Tensor) -> Tensor:
    """[B, T] aligned with labels, moved to the positions that score them."""
    return nn.functional.pad(values[:, 1:], (0, 1))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, no module checkpoints activations (the inputs are kept in any case)."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for module, _ in modules:
            module.training = False
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modules:
            module.training = training


class SeededPasses:
    """Forwards and backwards over batches, with all shares going to `consume`.

    A context manager; the model must be frozen, see `frozen`. Seeds are multiplied by `loss_scale`, and so is every b.
    With `whole_head` the share of the head's weight comes as one that may be kept: with its b [n, V], or as `HeadRows`
    where that would be large. Without, it comes a chunk of rows at a time, whose b is gone when `consume` returns.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        consume: Consumer,
        engine: str,
        loss_scale: float = 1.0,
        whole_head: bool = False,
    ) -> None:
        self.model, self.sites, self.consume = model, sites, consume
        self.ran, self.loss_scale, self.whole_head = False, loss_scale, whole_head
        self.watch = Watch(sites.modules, lambda name, share: consume(name, share, None), engine)
        self.uses = UseWatch(model, sites.owners(), self.watch.running, engine)
        self.stack = ExitStack()

    def __enter__(self) -> SeededPasses:
        with self.stack as stack:  # what was entered is left again if the next one fails
            for one in (uncompiled(), self.watch):
                stack.enter_context(one)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def finish(self) -> None:
        """ValueError for a module with trainable parameters that no pass has called."""
        if self.ran:
            self.watch.check_all_ran()

    def run(self, batch: Mapping[str, Any], seeds: Seeds) -> Tensor:
        """One batch (on the device); returns the log-probs [B, T] at the positions that score, 0 where ignored."""
        labels = shifted(batch["labels"])
        self.watch.start(*labels.shape)
        self.ran = True
        if self.sites.head is None:
            return self._own_logits(batch, labels, seeds)
        return self._chunked(batch, labels, seeds)

    def _own_logits(self, batch: Mapping[str, Any], labels: Tensor, seeds: Seeds) -> Tensor:
        with self.uses:
            logits = model_logits(self.model, batch)  # [B, T, V]
        rows = logits.detach().reshape(-1, logits.shape[-1])
        check_label_range("labels", labels.reshape(-1), rows.shape[1])
        grad = torch.empty_like(rows)
        logp = self._rows_gradient(rows, labels.reshape(-1), _flat(seeds), 1.0, 0.0, grad)[0]
        if logits.requires_grad:
            self.uses.check_graph(logits)
            self._backward(logits, grad.view(logits.shape))
        return logp.view(labels.shape)

    def _chunked(self, batch: Mapping[str, Any], labels: Tensor, seeds: Seeds) -> Tensor:
        head, names = self.sites.head, self.sites.head_parameters
        with self.uses:
            hidden = hf.final_hidden(self.model, batch)  # [B, T, D]
        flat_labels = labels.reshape(-1)
        h, weight, bias = prepare_head("g_effect", hidden.detach().flatten(0, 1), head.weight, head.bias, flat_labels)
        check_label_range("labels", flat_labels, weight.shape[0])
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            order = valid_rows(flat_labels)
            count = len(h) if order is None else len(order)
            whole = self.whole_head and "weight" in names
            tiled = whole and count > _WHOLE * weight.shape[1]
            chunk = count if whole and not tiled else default_chunk_rows(*weight.shape, h.device)
            chunks = ChunkedHead(h, weight, bias, flat_labels, chunk, order)
            seeds = Seeds(*(chunks.select(x).contiguous() if isinstance(x, Tensor) else x for x in _flat(seeds)))
            place = torch.arange(chunks.rows, device=h.device) if chunks.index is None else chunks.index  # [n]
            chunks.start_gradients(hidden.requires_grad, False, False)
            scale, cap = check_map("g_effect", head.logit_scale, head.softcap)
            found = []  # log-probs, statistics and weights of the chunks
            for start, stop in row_chunks(chunks.rows, chunks.chunk):
                part = slice(start, stop)
                rows = chunks.logits(start, stop)  # [chunk, V]
                some = Seeds(*(x[part] if isinstance(x, Tensor) else x for x in seeds))
                found.append(self._rows_gradient(rows, chunks.labels[part], some, scale, cap, rows))
                chunks.add_gradients(start, stop, rows)
                if "weight" in names and not tiled:
                    self.consume(names["weight"], Outer(chunks.hidden[part], rows), place[part])
                if "bias" in names:
                    self.consume(names["bias"], Sum(rows), place[part])
            logp, stats, coef = map(torch.cat, zip(*found, strict=True))
            if tiled:
                own = (head.weight.detach(), None if head.bias is None else head.bias.detach(), scale, cap)
                share = HeadRows(chunks.hidden, chunks.labels, logp, stats, coef, *own)
                self.consume(names["weight"], share, place)
            grad = chunks.gradients()[0]
            logp = chunks.scatter(logp).view(labels.shape)
        if hidden.requires_grad:
            self.uses.check_graph(hidden)
            self._backward(hidden, grad.view(hidden.shape).to(hidden.dtype))
        return logp

    def _backward(self, output: Tensor, grad: Tensor) -> None:
        with torch.autocast(output.device.type, enabled=False):
            output.backward(grad)

    def _rows_gradient(
        self, rows: Tensor, labels: Tensor, seeds: Seeds, scale: float, cap: float, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out [n, V] = c_i d logp_i / d rows (may be `rows` itself); returns logp [n], statistics [n, 2] and c [n]."""
        logp, stats = logp_rows(rows, labels, scale, cap, "auto")
        weight = seeds.given
        if weight is None:
            ref = None if seeds.ref_logp is None else seeds.ref_logp.to(logp.dtype)
            weight = torch.where(labels != IGNORE_INDEX, token_weights(seeds.spec, logp, ref), 0.0)
        coef = (weight.to(logp.dtype) * self.loss_scale).contiguous()
        logp_rows_grad(rows, labels, logp, stats, coef, scale, cap, out, "auto")
        return logp, stats, coef


def _flat(seeds: Seeds) -> Seeds:
    return Seeds(*(x.reshape(-1) if isinstance(x, Tensor) else x for x in seeds))
