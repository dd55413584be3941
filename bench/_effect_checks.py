"""Plain autograd's answer to what a provider measures, and how far a provider is from it."""

from __future__ import annotations

import math
from collections.abc import Callable

from _effect_providers import Sides, gradient, plain_loss, token_losses
from _models import Batch, rows_of
from torch import Tensor, nn

from gfast.geffect import assign

Gradient = dict[str, Tensor]
TOKENS_CHECKED = 6


def linear_parameters(model: nn.Module) -> set[str]:
    """The matrices of the blocks' Linear layers: all that kronfluence and bergson see, without the head."""
    modules = ((name, module) for name, module in model.named_modules() if "layers." in name)
    return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}


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

    def items(self, kind: str) -> list[Gradient]:
        """Gradients that the provider's values are dots of, one an entry."""
        if kind not in self.known:
            self.known[kind] = list(self._items(kind))
        return self.known[kind]

    def _items(self, kind: str):
        if kind == "effect":
            yield gradient(self.model, plain_loss(self.model, self.forget, "wga"))
        elif kind == "effect, GA":
            yield gradient(self.model, plain_loss(self.model, self.forget, "ga"))
        elif kind in ("sample", "gram"):
            yield from self._samples(self.forget)
        else:
            valid = (self.forget["labels"][:, 1:] != -100).nonzero()[:TOKENS_CHECKED].tolist()
            for row, position in valid:
                logp = -token_losses(self.model, rows_of(self.forget, row, row + 1))
                yield gradient(self.model, logp[0, position])

    def _samples(self, batch: Batch) -> list[Gradient]:
        rows = (rows_of(batch, row, row + 1) for row in range(batch["labels"].shape[0]))
        return [gradient(self.model, -token_losses(self.model, row).sum()) for row in rows]

    def sides(self, kind: str) -> dict[str, list[Gradient]]:
        """What the items are dotted with: the risk's gradient, or for a matrix the gradients of the samples' NLL."""
        if kind != "gram":
            return {side: [risk] for side, risk in self.risks.items()}
        if "sides" not in self.known:
            found = {"unlearn": self._samples(self.forget), "retain": self._samples(self.retain)}
            self.known["sides"] = {s: [{n: -g for n, g in one.items()} for one in many] for s, many in found.items()}
        return self.known["sides"]

    def dots(self, left: Gradient, right: Gradient, keep: Callable[[str], bool]) -> tuple[float, float]:
        """The dot product over some parameters, and the product of the norms there."""
        total = a = b = 0.0
        for name in left:
            if keep(name) and name in right:
                x, y = left[name].double().flatten(), right[name].double().flatten()
                total, a, b = total + float(x @ y), a + float(x @ x), b + float(y @ y)
        return total, math.sqrt(a * b)


def error(truth: Truth, found: Sides, kind: str, parameters: str = "all") -> float:
    """Largest error of an entry relative to the product of the norms; infinite for a result of another shape."""
    items, worst = truth.items(kind), 0.0
    for side, others in truth.sides(kind).items():
        for group, values in found[side].items():
            entries = values.double().cpu().reshape(-1)
            entries = entries[: len(items)] if kind == "token" else entries
            if entries.numel() != len(items) * len(others):
                return math.inf

            def keep(name: str, group: str = group) -> bool:
                return name in truth.linear if parameters == "linear" else group in ("total", truth.group[name])

            pairs = [(item, other) for item in items for other in others]
            for value, (item, other) in zip(entries.tolist(), pairs, strict=True):
                exact, scale = truth.dots(item, other, keep)
                gap = abs(value - exact) / scale if scale else abs(value)
                worst = max(worst, gap if math.isfinite(gap) else math.inf)
    if set(found["unlearn"]) not in ({"total"}, set(truth.group.values())):
        return math.inf
    return worst
