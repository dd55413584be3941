"""Batches that the border's fuzzer draws, texts in rows or several in one, pairs too; and objectives literally."""

from __future__ import annotations

import inspect
import random
from typing import NamedTuple

import torch
from helpers.architectures import VOCAB
from torch import Tensor, nn

from gfast.objectives import DPO, ETW, GA, NLL, NPO, TNPO, WGA, WTNPO, BalDRO, BalDROG, SatImp, SimNPO

OBJECTIVES = (GA(), NLL(), WGA(0.5), SatImp(1.0, 1.0), TNPO(2.0), WTNPO(0.5, 1.0), NPO(0.3), SimNPO(2.0, 0.5), ETW(1.3))
OBJECTIVES += (BalDRO(0.5, 2.0), BalDROG(0.5, 0.6), DPO(0.4), DPO(2.0))
REDUCTIONS = "token_mean", "sequence_mean", "sum"
KINDS = ("plain", "right", "left", "left, positions", "no mask", "prompt", "a text without labels", "first label")
KINDS += ("strided",)
PACKED = ("position_ids", "bounds", "sequence_id", "numbers", "mask of pairs")


class Drawn(NamedTuple):
    """texts: the number of each token's text [B, T], -1 for padding; they are numbered 0 to count - 1."""

    batch: dict[str, Tensor]
    texts: Tensor
    count: int
    said: str


def draw_batch(r: random.Random, pairs: bool = False) -> Drawn:
    """Texts one a row, or several; of `pairs` the first half of the texts are those to forget."""
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    if r.random() < 0.35:
        return _packed(r, generator, pairs)
    rows, width = r.choice((2, 4) if pairs else (1, 2, 3)), r.choice((2, 5, 8))
    ids = torch.randint(3, VOCAB - 3, (rows, width), generator=generator)
    labels, mask, kind = ids.clone(), torch.ones_like(ids), r.choice(KINDS)
    for row in range(rows):
        length = r.randint(1, width)
        if kind in ("right", "left", "left, positions"):
            gone = slice(length, width) if kind == "right" else slice(0, width - length)
            mask[row, gone], ids[row, gone], labels[row, gone] = 0, 0, -100
            labels[row, (width - length) % width] = -100  # padding would score it
        if kind == "prompt":
            labels[row, : length - 1] = -100
    if kind == "a text without labels":
        labels[r.randrange(rows)] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if kind == "left, positions":
        batch["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    if kind == "no mask":
        del batch["attention_mask"]
    batch = _with_constants(r, batch, generator)
    if kind == "strided":
        batch = {key: value.t().contiguous().t() for key, value in batch.items()}
    return Drawn(batch, torch.arange(rows)[:, None].expand(rows, width), rows, f"{kind} {rows}x{width}")


def _packed(r: random.Random, generator: torch.Generator, pairs: bool) -> Drawn:
    count = r.choice((2, 4, 6) if pairs else (2, 3, 5))
    rows, lengths = r.choice((1, 1, 2)), [r.randint(2, 6) for _ in range(count)]
    cuts = sorted(r.sample(range(1, count), rows - 1))
    each = [range(a, b) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    width = max(sum(lengths[i] for i in row) for row in each) + r.choice((0, 0, 3))
    lost, prompts = r.choice((None, None, r.randrange(count))), r.random() < 0.3
    texts = torch.full((rows, width), -1)
    ids, labels, positions = torch.zeros_like(texts), torch.full_like(texts, -100), torch.zeros_like(texts)
    for row, some in enumerate(each):
        start = 0
        for text in some:
            place = slice(start, start := start + lengths[text])
            ids[row, place] = 3 + torch.randperm(VOCAB - 6, generator=generator)[: lengths[text]]
            texts[row, place], positions[row, place] = text, torch.arange(lengths[text])
            begins = place.start + (r.randint(1, lengths[text]) if prompts else 1)
            if text != lost:
                labels[row, begins : place.stop] = ids[row, begins : place.stop]
    kind, real = r.choice(PACKED), texts >= 0
    batch = {"input_ids": ids, "labels": labels}
    if kind in ("position_ids", "bounds"):
        batch["position_ids"] = positions
    if kind == "bounds":
        begins = (positions == 0).reshape(-1).nonzero()[:, 0] if bool(real.all()) else None
        if begins is None:  # padding behind the last text of a row is a text of its own
            ends = torch.nn.functional.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True)
            begins = ends.reshape(-1).nonzero()[:, 0]
        batch["cu_seq_lens_q"] = torch.cat([begins, begins.new_tensor([texts.numel()])]).int()
        batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"]
        batch["max_length_q"] = batch["max_length_k"] = int(batch["cu_seq_lens_q"].diff().max())
    if kind == "sequence_id":
        order = list(range(count))
        if not pairs:
            r.shuffle(order)
        batch["sequence_id"] = torch.tensor([*order, count])[texts]  # padding has a number of its own
    if kind == "numbers":
        batch["attention_mask"] = texts + 1
    elif kind == "mask of pairs":
        sees = (texts[:, :, None] == texts[:, None, :]).tril()
        batch["attention_mask"] = sees[:, None]
    elif not bool(real.all()) or r.random() < 0.5:
        batch["attention_mask"] = real.long()
    batch = _with_constants(r, batch, generator)
    return Drawn(batch, texts, count, f"{kind} {rows}x{width} of {count} texts{'' if lost is None else ', one lost'}")


def _with_constants(r: random.Random, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    labels = batch["labels"]
    batch["ref_logp"] = torch.where(labels != -100, torch.randn(labels.shape, generator=generator) - 4, 0.0)
    if r.random() < 0.2:
        batch["weight"] = torch.rand(labels.shape, generator=generator)
    return batch


class NotTaken(Exception):
    """The model itself takes no such batch."""


def label_logp(model: nn.Module, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """Of the model's own logits, fp64: log p [B, T - 1] of the labels, 0 where there is none; which there are; z."""
    own = {"labels", "ref_logp", "weight", "sequence_id"}
    given = {key: value for key, value in drawn.batch.items() if key not in own}
    inner = getattr(model, "_orig_mod", model)
    if "use_cache" in inspect.signature(type(inner).__mro__[hasattr(inner, "is_tuple")].forward).parameters:
        given["use_cache"] = False  # with a cache transformers' models do not tell texts apart by their positions
    try:
        out = model(**given)
    except Exception as error:
        raise NotTaken(str(error)) from None
    logits = (out[0] if isinstance(out, tuple) else out.logits)[:, :-1].double()
    labels = drawn.batch["labels"][:, 1:]
    valid = labels != -100
    logits = torch.where(valid[..., None], logits, 0.0)  # padding's may be NaN, and nothing is scored by it
    picked = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(valid, picked, 0.0), valid, logits


def terms(model: nn.Module, drawn: Drawn, objective) -> tuple[Tensor, dict[str, int]]:
    """Of the objective's formula: what has the gradient of the sum of its terms, and what reductions divide it by."""
    logp, valid, logits = label_logp(model, drawn)
    now = logp.detach()
    ref = torch.where(valid, drawn.batch["ref_logp"][:, 1:].double(), 0.0)
    texts = torch.where(valid, drawn.texts[:, 1:], drawn.count)  # [B, T - 1]; what counts nothing is a text behind all

    def summed(x: Tensor) -> Tensor:  # [count + 1]
        return torch.zeros(drawn.count + 1, dtype=torch.float64).index_add(0, texts.reshape(-1), x.double().reshape(-1))

    length = summed(valid)
    present = length[:-1] > 0
    sequences, weight = int(present.sum()), torch.ones_like(now)
    if isinstance(objective, NLL):
        weight = -weight
    elif isinstance(objective, WGA):
        weight = torch.exp(objective.alpha * now)
    elif isinstance(objective, SatImp):
        weight = torch.exp(objective.beta1 * now) * (1 - now.exp()) ** objective.beta2
    elif isinstance(objective, (TNPO, WTNPO)):
        weight = 2 * torch.sigmoid(objective.beta * (now - ref))
        weight = weight * torch.exp(now * getattr(objective, "alpha", 0.0))
    elif isinstance(objective, ETW):
        tempered = torch.log_softmax(logits.detach() / objective.temperature, -1)
        entropy = torch.where(valid, -(tempered.exp() * tempered).sum(-1), 0.0)
        weight = (length / summed(entropy))[texts] * entropy
        weight = torch.where(valid, weight, 0.0)
    elif isinstance(objective, (NPO, BalDRO, BalDROG)):
        margin = objective.beta * summed(now - ref)  # [count + 1]
        each = 2 * torch.sigmoid(margin)
        value = (2 / objective.beta * torch.nn.functional.softplus(margin))[:-1]
        if isinstance(objective, BalDRO):
            share = torch.softmax(torch.where(present, -value / objective.tau, -torch.inf), 0)
            each = each * sequences * torch.nn.functional.pad(share, (0, 1))
        if isinstance(objective, BalDROG) and sequences:
            known = torch.where(present, (summed(now) / length.clamp(min=1))[:-1], -torch.inf)
            kept = max(1, int(objective.share * sequences))
            best = torch.zeros(drawn.count + 1, dtype=torch.float64)
            best[known.argsort(descending=True, stable=True)[:kept]] = sequences / kept
            each = each * best
        weight = each[texts]
    elif isinstance(objective, SimNPO):
        size = length.clamp(min=1)
        weight = (2 * torch.sigmoid(objective.beta * (summed(now) / size + objective.delta)) / size)[texts]
    elif isinstance(objective, DPO):
        ratio, half = summed(now - ref)[:-1], drawn.count // 2
        each = 2 * torch.sigmoid(objective.beta * (ratio[:half] - ratio[half:]))
        weight = torch.cat([each, -each, torch.zeros(1)])[texts]
        sequences = int((present[:half] | present[half:]).sum())
    if drawn.batch.get("weight") is not None:
        weight = weight * drawn.batch["weight"][:, 1:]
    counts = {"token_mean": int(valid.sum()), "sequence_mean": sequences, "sum": 1}
    return (weight * logp).sum(), counts
