"""Plain autograd: the passes that floors are made of, exact gradient effects, and how far a provider is from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Batch, rows_of
from torch import Tensor, nn

from gfast.geffect import assign

Gradient = dict[str, Tensor]
Sides = dict[str, dict[str, Tensor]]  # "unlearn" or "retain" -> group -> values
TOKENS_CHECKED = 3


def linear_parameters(model: nn.Module) -> set[str]:
    """The matrices of the blocks' Linear layers: all that kronfluence and bergson see, without the head."""
    modules = ((name, module) for name, module in model.named_modules() if "layers." in name)
    return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}


def token_losses(model: nn.Module, batch: Batch, embeds: Tensor | None = None) -> Tensor:
    """NLL [B, T - 1] from full logits, 0 at ignored labels; ``embeds`` [B, T, D] stand for the tokens where given."""
    inputs = {"input_ids": batch["input_ids"]} if embeds is None else {"inputs_embeds": embeds}
    logits = model(**inputs, attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, targets.reshape(-1), reduction="none").view(targets.shape)


def plain_loss(model: nn.Module, batch: Batch, objective: str) -> Tensor:
    """Token mean written out: NLL, GA or WGA with alpha 1."""
    nll = token_losses(model, batch)
    count = (batch["labels"][:, 1:] != -100).sum()
    if objective == "wga":
        return -((-nll).detach().exp() * nll).sum() / count
    return (-nll if objective == "ga" else nll).sum() / count


def plain_pass(model: nn.Module, batch: Batch, objective: str = "nll") -> None:
    plain_loss(model, batch, objective).backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def plain_forward(model: nn.Module, batch: Batch) -> Tensor:
    return plain_loss(model, batch, "nll")


def plain_step(model: nn.Module, forget: Batch, retain: Batch) -> None:
    """A training step on both batches: gradients accumulated over them, and the cheapest update there is."""
    for batch in (forget, retain):
        plain_loss(model, batch, "nll").backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    model.zero_grad(set_to_none=True)


def input_pass(model: nn.Module, batch: Batch) -> None:
    """A forward and a backward down to the embedded tokens: gradients of activations, none of weights."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        embeds = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        token_losses(model, batch, embeds).sum().backward()
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


UNITS: dict[str, Callable[[nn.Module, Batch, Batch], object]] = {  # of floors
    "plain pass": lambda model, forget, retain: plain_pass(model, forget),
    "plain forward": lambda model, forget, retain: plain_forward(model, forget),
    "training step": plain_step,
    "pass without dW": lambda model, forget, retain: input_pass(model, forget),
}


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """A copy of every parameter's gradient."""
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


class Truth:
    """Risk gradients of both batches, and dots of any gradient with them by group, from plain autograd."""

    def __init__(self, model: nn.Module, forget: Batch, retain: Batch):
        self.model, self.forget, self.retain = model, forget, retain
        groups = assign(model)
        self.group = {name: groups.names[index] for name, index in groups.index.items()}
        self.linear = linear_parameters(model)
        self.risks = {
            side: gradient(model, plain_loss(model, batch, "nll"))
            for side, batch in (("unlearn", forget), ("retain", retain))
        }
        self.known: dict[str, list] = {}
        self.tables: dict[tuple[str, str], list[dict[str, tuple[float, float]]]] = {}

    def items(self, kind: str) -> list[Gradient]:
        """Gradients that the provider's values are dots of, one an entry."""
        kind = "sample" if kind == "gram" else kind
        if kind not in self.known:
            self.known[kind] = list(self._items(kind))
        return self.known[kind]

    def _items(self, kind: str):
        if kind == "effect":
            yield gradient(self.model, plain_loss(self.model, self.forget, "wga"))
        elif kind == "effect, GA":
            yield gradient(self.model, plain_loss(self.model, self.forget, "ga"))
        elif kind == "sample":
            yield from self._samples(self.forget)
        elif kind == "retain samples":
            yield from self._samples(self.retain)
        else:
            valid = (self.forget["labels"][:, 1:] != -100).nonzero()[:TOKENS_CHECKED].tolist()
            for row, position in valid:
                logp = -token_losses(self.model, rows_of(self.forget, row, row + 1))
                yield gradient(self.model, logp[0, position])

    def _samples(self, batch: Batch) -> list[Gradient]:
        rows = (rows_of(batch, row, row + 1) for row in range(batch["labels"].shape[0]))
        return [gradient(self.model, -token_losses(self.model, row).sum()) for row in rows]

    def sides(self, kind: str) -> dict[str, list[Gradient]]:
        """What the items are dotted with: the risk's gradient, or for a matrix the gradients of the samples' log p."""
        if kind != "gram":
            return {side: [risk] for side, risk in self.risks.items()}
        return {"unlearn": self.items("sample"), "retain": self.items("retain samples")}

    def table(self, kind: str, side: str) -> list[dict[str, tuple[float, float]]]:
        """For each entry: group (also "total", and "linear") -> the dot product there, and the product of the norms."""
        if (kind, side) not in self.tables:
            sign = -1.0 if kind == "gram" else 1.0  # whose entries are of an NLL and a log p
            pairs = [(item, other) for item in self.items(kind) for other in self.sides(kind)[side]]
            self.tables[kind, side] = [self._sums(item, other, sign) for item, other in pairs]
        return self.tables[kind, side]

    def _sums(self, left: Gradient, right: Gradient, sign: float) -> dict[str, tuple[float, float]]:
        sums: dict[str, list[float]] = {}
        for name in left.keys() & right.keys():
            x, y = left[name].double().flatten(), right[name].double().flatten()
            dots = [float(x @ y), float(x @ x), float(y @ y)]
            for key in (self.group[name], "total", *(["linear"] if name in self.linear else [])):
                sums[key] = [a + b for a, b in zip(sums.get(key, [0.0, 0.0, 0.0]), dots, strict=True)]
        return {key: (sign * dot, math.sqrt(a * b)) for key, (dot, a, b) in sums.items()}


def error(truth: Truth, sides: Sides, kind: str, parameters: str = "all") -> float:
    """Largest error of an entry relative to the product of the norms; infinite for a result of another shape."""
    worst = 0.0
    for side in ("unlearn", "retain"):
        table = truth.table(kind, side)
        for group, values in sides[side].items():
            entries = values.double().cpu().reshape(-1)
            entries = entries[: len(table)] if kind == "token" else entries
            if entries.numel() != len(table):
                return math.inf
            key = "linear" if parameters == "linear" else group
            for value, exact in zip(entries.tolist(), table, strict=True):
                dot, scale = exact.get(key, (0.0, 0.0))
                gap = abs(value - dot) / scale if scale else abs(value)
                worst = max(worst, gap if math.isfinite(gap) else math.inf)
    if set(sides["unlearn"]) not in ({"total"}, set(truth.group.values())):
        return math.inf
    return worst


def off_by(truth: Truth, sides: Sides, kind: str) -> float:
    """Larger error of the two sides' totals relative to the exact totals themselves."""
    gaps = []
    for side in ("unlearn", "retain"):
        exact, _ = truth.table(kind, side)[0]["total"]
        gap = abs(float(sides[side]["total"]) - exact)
        gaps.append(gap / abs(exact) if exact else gap)
    return max(gaps)
