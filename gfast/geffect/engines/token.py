"""The token engine: the effect of every label token, by group, in one pass of forward mode along the stored directions.

    e(D, i) = < grad R(D), grad logp_i > = d/de logp_i(theta + e grad R(D))

One stream a group and a side (`gfast.geffect.engines.jvp`). The output head is reversed: with b_i = d logp_i / d logits
and dH_i = W' b_i, computed once, a stream's effect on token i is the dot product of dH_i with its tangent of the final
hidden state, so the head's cost does not grow with the streams. Forward units: 1, and for each side 1 (what parameters
add) and as many as streams are alive in a layer: about 9 for two sides by the groups of the paper. No activations are
kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gfast.deferred import Head
from gfast.errors import NotFinite
from gfast.geffect.backward import default_loss_scale
from gfast.geffect.contributions.row_pass import check_weighted
from gfast.geffect.data import Term, to_device
from gfast.geffect.directions import Directions
from gfast.geffect.engines.forward_mode import differentiable_forward
from gfast.geffect.engines.jvp import Along, tangents_along
from gfast.geffect.groups import GroupMap
from gfast.geffect.request import Request
from gfast.geffect.results import TokenEffect
from gfast.model_output import logits_of, model_output, shifted
from gfast.model_state import measuring, uncompiled
from gfast.ops.checks import IGNORE_INDEX, check_label_range
from gfast.ops.chunks import default_chunk_rows, row_chunks
from gfast.ops.head import ChunkedHead
from gfast.ops.linear_inputs import as_autocast
from gfast.ops.row_dot import row_sums
from gfast.ops.token_logp import logp_rows, logp_rows_grad, stats_dtype
from gfast.ops.weights import is_pair, weigh
from gfast.packed import by_text, pair_numbers, sequence_ids
from gfast.progress import Bar
from gfast.wrappers import measured


@dataclass
class Tokens:
    """The label tokens of a batch in order: n tokens of B rows, on the CPU.

    Attributes:
        effects: [2, G, n] fp64, sides forget and retain.
        logp: [n] fp64. ref_logp: the same under the original model, or None. weight: [n] fp64, the batch's, or None.
        labels, samples, positions: [n] int64; the label, whose it is, and its place in its row of input_ids.
        sequences: S, the rows of the batch, or the texts in rows that hold several.
    """

    effects: Tensor
    logp: Tensor
    ref_logp: Tensor | None
    weight: Tensor | None
    labels: Tensor
    samples: Tensor
    positions: Tensor
    sequences: int

    def order(self) -> tuple[Tensor, list[int]]:
        """The places [n] of the tokens sample by sample, and how many each sample has."""
        if bool((self.samples[1:] < self.samples[:-1]).any()):  # numbered by a sequence_id
            return by_text(self.samples)
        return torch.arange(len(self.samples), device="cpu"), self.samples.bincount(minlength=self.sequences).tolist()


def token_effects(request: Request) -> TokenEffect:
    """`token_effect` of a request that is checked."""
    with request.directions() as directions:
        measured = measure_tokens(request, directions, request.data.batches["forget"])
        norms, counts = directions.norms(), dict(directions.counts)

    def by_sample(take: Callable[[Tokens], Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        for batch in measured:
            places, sizes = batch.order()
            out += take(batch)[places].split(sizes)
        return out

    names = request.groups.names
    sides = [
        {name: by_sample(lambda batch, side=side, g=g: batch.effects[side, g]) for g, name in enumerate(names)}
        for side in (0, 1)
    ]
    with_ref = all(batch.ref_logp is not None for batch in measured)
    with_weight = "forget" in request.data.weighted
    return TokenEffect(
        *sides,
        logp=by_sample(lambda batch: batch.logp),
        labels=by_sample(lambda batch: batch.labels),
        positions=by_sample(lambda batch: batch.positions),
        norms=norms,
        ref_logp=by_sample(lambda batch: batch.ref_logp) if with_ref else None,
        weight=by_sample(lambda batch: batch.weight) if with_weight else None,
        risk=str(request.risk),
        counts=counts,
    )


def objective_dots(request: Request, directions: Directions, terms: Sequence[Term]) -> list[Tensor]:
    """< grad L, G > by group and side, fp64 [G, 2], of every term's data-set loss, from the effects of its tokens.

    Each set of batches is measured once, whatever the number of terms on it.

    Raises:
        ValueError: a term whose gradient is no weighted sum of token log-prob gradients, with the remedy.
    """
    for term in terms:
        check_weighted(term, "token")
    data, out = request.data, {}
    for source in dict.fromkeys(term.source for term in terms):
        measured = measure_tokens(request, directions, data.batches[source])
        for term in (term for term in terms if term.source == source):
            dots = torch.zeros(2, len(request.groups.names), dtype=torch.float64, device="cpu")
            for batch, tokens in zip(data.batches[source], measured, strict=True):
                dots += tokens.effects @ token_weights(term, batch, tokens)
            out[term] = dots.t() / max(data.count(term), 1)
    return [out[term] for term in terms]


def token_weights(term: Term, batch: Mapping[str, Any], tokens: Tokens) -> Tensor:
    """Detached weights [n] fp64 of the term on a batch's tokens."""
    valid = torch.ones(len(tokens.logp), dtype=torch.bool, device="cpu")
    samples, sequences = tokens.samples, tokens.sequences
    if is_pair(term.objective) and (pairs := pair_numbers(batch)) is not None:  # also those without labels
        ids, sequences = pairs
        samples = ids[:, 1:][batch["labels"].to(ids.device)[:, 1:] != IGNORE_INDEX].cpu()
    weight, _ = weigh(term.objective, tokens.logp, tokens.ref_logp, valid, samples, sequences)
    return weight * tokens.weight if term.weighted else weight


def measure_tokens(request: Request, directions: Directions, batches: Sequence[Mapping[str, Any]]) -> list[Tokens]:
    """Effects of the label tokens of every batch."""
    return request.processes.each(list(batches), partial(_measure_own, request, directions))


def _measure_own(request: Request, directions: Directions, batches: Sequence[Mapping[str, Any]]) -> list[Tokens]:
    model, groups = request.model, request.groups
    parameters = dict(model.named_parameters())
    scales = _scales(directions, groups, parameters)  # [G, 2]
    loss_scale = request.options.loss_scale or default_loss_scale([parameters[name] for name in groups.index])

    def along(name: str, side: int) -> Tensor | None:
        direction, scale = directions.get(side, name), float(scales[groups.index[name], side])
        return direction if direction is None or scale == 1.0 else direction * scale

    streams: Along = {
        parameters[name]: [(2 * group + side, partial(along, name, side)) for side in (0, 1)]
        for name, group in groups.index.items()
    }
    device, out = next(iter(streams)).device, []
    with Bar("token effects", show=request.options.progress) as bar, _ready(model):
        for batch in batches:
            tokens = _measure_batch(streams, measured(model), to_device(batch, device), groups.names, loss_scale)
            request.data.answers.add(batch, tokens.logp, next(iter(streams)).dtype)
            request.data.answers.check()
            tokens.effects /= loss_scale * scales.t()[:, :, None]
            out.append(tokens)
            bar.update()
    return out


def _scales(directions: Directions, groups: GroupMap, parameters: Mapping[str, Tensor]) -> Tensor:
    """Factors of the directions by group and side [G, 2], powers of 2: 1, but in float16 such that their entries are
    about 1/64, where a gradient's own would vanish and tangents of larger ones overflow.
    """
    scales = torch.ones(len(groups.names), 2, dtype=torch.float64, device="cpu")
    if all(parameters[name].dtype != torch.float16 for name in groups.index):
        return scales
    sizes = torch.zeros(len(groups.names), dtype=torch.float64, device="cpu")
    for name, group in groups.index.items():
        sizes[group] += parameters[name].numel()
    mean = (directions.gram.diagonal(dim1=1, dim2=2) / sizes[:, None]).sqrt()  # [G, 2]
    return torch.where(mean > 0, torch.exp2(-6 - mean.clamp(min=1e-300).log2().round()), scales)


@contextlib.contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """The model lent, in evaluation mode throughout, without compiled code and kernels that have no forward mode."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(measuring(model))
        for module in model.modules():  # no activations are kept here, so checkpointing modules need no exception
            module.training = False
        stack.enter_context(differentiable_forward(model))
        stack.enter_context(uncompiled())
        yield


def _measure_batch(
    streams: Along, model: nn.Module, batch: Mapping[str, Any], names: list[str], loss_scale: float
) -> Tokens:
    labels = shifted(batch["labels"])  # [B, T] at the positions that score them
    flat = labels.reshape(-1)
    order = (flat != IGNORE_INDEX).nonzero()[:, 0]  # [n]
    effects = torch.zeros(2 * len(names), len(order), dtype=torch.float64, device=flat.device)
    with tangents_along(streams, model):
        head, out, _ = output = model_output(model, batch)
        if head is not None and not _is_of_parameters(head.module):
            head, out = None, logits_of(output)  # which carry the tangents of what its weight is made of
        value, tangent = forward_ad.unpack_dual(out.reshape(-1, out.shape[-1])[order])  # [n, D] or [n, V]
    if head is None:
        check_label_range("token_effect", labels, value.shape[-1])
        logp, slopes = _slopes(value, flat[order], 1.0, 0.0, loss_scale), value
    else:
        logp, slopes = _by_head(streams, value, head, flat[order], effects, loss_scale)
    if tangent is not None:
        for stream, part in tangent.parts.items():
            effects[stream] += _row_dots(slopes, part)
    logp, effects = logp.double().cpu(), effects.cpu()
    length = labels.shape[1]
    rows, positions = order // length, order % length + 1
    texts = sequence_ids(batch)
    samples, sequences = (rows, len(labels)) if texts is None else (texts.reshape(-1)[order], int(texts.max()) + 1)
    ref, weight = (
        None if batch.get(key) is None else batch[key][rows, positions].double().cpu() for key in ("ref_logp", "weight")
    )
    bad = ~torch.isfinite(effects)  # [2 G, n]
    if bool(bad.any()):
        where = [names[stream // 2] for stream in bad.any(1).nonzero()[:, 0].tolist()]
        hint = "" if loss_scale == 1.0 else f" (loss scale {loss_scale:g}: try loss_scale=1.0)"
        raise NotFinite(
            f"gfast: token effects are not finite at {int(bad.any(0).sum())} of {bad.shape[1]} tokens, in the groups "
            f"{', '.join(dict.fromkeys(where))}: check the model's weights and, in float16, its range{hint}"
        )
    return Tokens(
        effects.view(len(names), 2, -1).transpose(0, 1).contiguous(),
        logp,
        ref,
        weight,
        *(index.cpu() for index in (flat[order], samples, positions)),
        sequences=sequences,
    )


def _by_head(
    streams: Along, value: Tensor, head: Head, labels: Tensor, effects: Tensor, loss_scale: float
) -> tuple[Tensor, Tensor]:
    """Log-probs [n] and their derivatives dH [n, D] by final hidden states, times the loss scale; what the head's own
    parameters add is added to the effects [2 G, n].
    """
    # of the layer: those that were multiplied with may carry tangents, as casts of it do
    own_weight, own_bias = head.module.weight.detach(), head.module.bias
    value, weight, bias = as_autocast(value, own_weight, None if own_bias is None else own_bias.detach())
    scale, softcap = head.logit_scale, head.softcap or 0.0
    check_label_range("token_effect", labels, weight.shape[0])
    rows = ChunkedHead(value, weight, bias, labels, default_chunk_rows(*weight.shape, weight.device), None)
    rows.start_gradients(True, False, False)
    along = {name: _directions_of(streams, getattr(head.module, name)) for name in ("weight", "bias")}
    logp = value.new_empty(rows.rows, dtype=stats_dtype(value.dtype))
    for start, stop in row_chunks(rows.rows, rows.chunk):
        part, chunk = slice(start, stop), rows.logits(start, stop)
        logp[part] = _slopes(chunk, rows.labels[part], scale, softcap, loss_scale)  # chunk is b now, [chunk, V]
        rows.add_gradients(start, stop, chunk)
        for stream, direction in along["weight"]:
            # b . (G h) as (b G) . h: no second [chunk, V]
            effects[stream, part] += _row_dots(chunk @ direction.to(chunk.dtype), rows.hidden[part])
        for stream, direction in along["bias"]:
            effects[stream, part] += (chunk @ direction.to(chunk.dtype)).double()
    return logp, rows.grad_hidden


def _is_of_parameters(layer: nn.Module) -> bool:
    """Whether a linear layer's weight and bias are parameters themselves: a parametrisation makes them of others."""
    return all(x is None or isinstance(x, nn.Parameter) for x in (layer.weight, layer.bias))


def _directions_of(streams: Along, parameter: Tensor | None) -> list[tuple[int, Tensor]]:
    """The streams in which a parameter moves, and how; none for a constant."""
    return [(stream, direction) for stream, along in streams.get(parameter, ()) if (direction := along()) is not None]


def _slopes(logits: Tensor, labels: Tensor, scale: float, softcap: float, loss_scale: float) -> Tensor:
    """Log-probs [n] of logits [n, V], which loss_scale * d logp_i / d logits overwrites."""
    logp, stats = logp_rows(logits, labels, scale, softcap, "auto")
    coef = torch.full_like(logp, loss_scale)
    logp_rows_grad(logits, labels, logp, stats, coef, scale, softcap, logits, "auto")
    return logp


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """[n] fp64 dot products of the rows of two matrices [n, D]."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return row_sums(x.to(wide) * y.to(wide))
