"""Who measures gradient effects: gfast's engines, plain loops, and the published code's way.

Each provider takes (model, forget batch, retain batch) and returns {"unlearn": ..., "retain": ...}, each a dict from
group to a tensor: a number, one value a sample [S], one a label token [N], or a matrix [S_forget, S_retain]. Who has
groups of its own, or none, calls its only group "total".
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from cases import Batch, padded, rows_of
from peers_projects import bergson, kronfluence
from torch import Tensor, nn
from truth import UNITS, Gradient, Sides, gradient, plain_loss, token_losses

import gfast
from gfast.objectives import GA, WGA, SatImp, SimNPO

PUBLISHED_WIDTH = 500  # tokens to which the published code pads every sample
MICRO_BATCH = 2  # samples; the published configuration's 4 would leave a batch of 4 without a second one to average
OLD, NEW = 0.6, 0.4  # the published code's moving average
TOKEN_UNITS = 9  # forward units of the tangents of two directions by group
VMAP_BYTES = 2**31  # per-sample gradients are held at once: only where they fit easily


@dataclass(frozen=True)
class Provider:
    """Who measures. ``passes``, ``forwards`` and ``steps`` are the plain passes, forwards and training steps that it is
    measured by: what it cannot do without, or is to be had for."""

    run: Callable[[nn.Module, Batch, Batch], Sides]
    kind: str  # "effect", "sample", "token" or "gram"
    passes: float = 0
    forwards: float = 0
    steps: float = 0
    law: float | None = None
    input_passes: float = 0  # passes without gradients of weights, as a second measure
    input_law: float | None = None
    package: str | None = None  # must be importable
    needs: Callable[[nn.Module, Batch], str | None] = lambda model, batch: None
    parameters: str = "all"  # or "linear": the Linear layers of the blocks
    micro_batch: int = 0  # samples at a time, of who is exact for one micro-batch and approximates over several
    ours: bool = False  # a wrong result is a bug of this repository: never timed

    @property
    def floor(self) -> str:
        """In words."""
        units = (
            (self.passes, "plain pass", "plain passes"),
            (self.forwards, "forward", "forwards"),
            (self.steps, "training step", "training steps"),
        )
        return " + ".join(f"{count:g} {one if count == 1 else many}" for count, one, many in units if count)

    def units(self) -> list[str]:
        """What it is measured by, of ``UNITS``."""
        counts = (self.passes, self.forwards, self.steps, self.input_passes)
        return [name for name, count in zip(UNITS, counts, strict=True) if count]

    def why_not(self, model: nn.Module, forget: Batch) -> str | None:
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        return self.needs(model, forget)


def _dot(a: Gradient, b: Gradient) -> Tensor:
    parts = [(a[name].float() * b[name].float()).sum().double() for name in a if name in b]
    return torch.stack(parts).sum()


def host_gradients(model: nn.Module, loss: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's gradient on the host, one by one; the model drops its own after the last."""
    loss.backward()
    for name, p in model.named_parameters():
        yield name, p.grad.detach().cpu()
    model.zero_grad(set_to_none=True)


def published_total(own: Gradient, risk: Gradient, device: str | torch.device) -> Gradient:
    """Dot products on the device, summed over groups that are matched by name (blocks 0-9, 10-19, 20 and more)."""
    groups: dict[str, float] = {}
    for name, grad in own.items():
        block = re.search(r"layers\.(\d+)\.", name)
        group = "other" if block is None else ("0-9", "10-19", "20+")[min(int(block.group(1)) // 10, 2)]
        groups[group] = groups.get(group, 0.0) + float((grad.to(device) * risk[name].to(device)).sum())
    return {"total": torch.tensor(sum(groups.values()), dtype=torch.float64)}


def published_way(model: nn.Module, forget: Batch, retain: Batch, width: int | None = None) -> Sides:
    """The published code's four forward/backwards and copies to the host, once for the whole batch.

    One micro-batch leaves nothing to average: this is exact, and costs less than `published_micro_batches`. For each
    side the objective's and the risk's gradient are computed anew and copied to host lists.
    """
    if width is not None:
        forget, retain = padded(forget, width), padded(retain, width)

    def to_host(batch: Batch, kind: str) -> Gradient:
        return {name: grad.clone() for name, grad in host_gradients(model, plain_loss(model, batch, kind))}

    out: Sides = {}
    for side, batch in (("unlearn", forget), ("retain", retain)):
        own, risk = to_host(forget, "wga"), to_host(batch, "nll")
        out[side] = published_total(own, risk, "cpu")
    return out


def published_micro_batches(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
    """The published code's way, micro-batch by micro-batch: an approximation, as soon as there are two.

    A micro-batch takes four forward/backwards: the forget samples' risk, the objective, the retain samples' risk, and
    the trainer's own of a loss times 0. Each of the first three gradients is copied to the host and mixed there, in the
    model's dtype, into a moving average of its own (0.6 old, 0.4 new); the effect is the dot product of the objective's
    average with a risk's, on the device. So late micro-batches count more than early ones, and a token counts by its
    micro-batch.
    """
    averages: dict[str, Gradient] = {"unlearn": {}, "objective": {}, "retain": {}}
    for start in range(0, forget["labels"].shape[0], MICRO_BATCH):
        some, other = (rows_of(batch, start, start + MICRO_BATCH) for batch in (forget, retain))
        for key, batch, kind in (("unlearn", some, "nll"), ("objective", some, "wga"), ("retain", other, "nll")):
            held = averages[key]
            for name, grad in host_gradients(model, plain_loss(model, batch, kind)):
                held[name] = OLD * held[name] + NEW * grad if name in held else grad
        (0 * plain_loss(model, some, "nll")).backward()
        model.zero_grad(set_to_none=True)
    device = forget["labels"].device
    return {side: published_total(averages["objective"], averages[side], device) for side in ("unlearn", "retain")}


def clone_loop(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
    """The loop most people would write: three backwards, the gradients cloned, dots summed."""
    risks = {"unlearn": gradient(model, plain_loss(model, forget, "nll"))}
    risks["retain"] = gradient(model, plain_loss(model, retain, "nll"))
    own = gradient(model, plain_loss(model, forget, "wga"))
    return {side: {"total": _dot(own, risk)} for side, risk in risks.items()}


def sample_loop(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
    """A backward for each sample."""
    risks = [gradient(model, plain_loss(model, batch, "nll")) for batch in (forget, retain)]
    rows = []
    for row in range(forget["labels"].shape[0]):
        own = gradient(model, -token_losses(model, rows_of(forget, row, row + 1)).sum())
        rows.append(torch.stack([_dot(own, risk) for risk in risks]))
    values = torch.stack(rows)  # [S, 2]
    return {"unlearn": {"total": values[:, 0]}, "retain": {"total": values[:, 1]}}


def sample_vmap(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
    """torch.func: all per-sample gradients at once. Right padding is left to the causal mask, which vmap can trace."""
    risks = [gradient(model, plain_loss(model, batch, "nll")) for batch in (forget, retain)]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logp(weights: Gradient, ids: Tensor, labels: Tensor) -> Tensor:
        arguments = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(model, weights, (), arguments).logits[0, :-1]  # [T - 1, V]
        return -F.cross_entropy(logits, labels[1:], reduction="sum")

    grads = torch.func.vmap(torch.func.grad(logp), in_dims=(None, 0, 0))(
        parameters, forget["input_ids"], forget["labels"]
    )
    sums = [sum((g.flatten(1) @ risk[name].flatten()).double() for name, g in grads.items()) for risk in risks]
    return {"unlearn": {"total": sums[0]}, "retain": {"total": sums[1]}}


def _vmap_fits(model: nn.Module, forget: Batch) -> str | None:
    size = forget["labels"].shape[0] * sum(p.numel() * p.element_size() for p in model.parameters())
    return None if size <= VMAP_BYTES else f"its per-sample gradients would take {size / 2**30:.1f} GiB"


def g_effect(objective, engine: str = "stream") -> Callable[[nn.Module, Batch, Batch], Sides]:
    """Of several objectives the second's result is handed on."""

    def run(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
        effect = gfast.g_effect(model, objective, forget=forget, retain=retain, engine=engine)
        effect = effect[1] if isinstance(objective, list) else effect
        return {
            side: {group: torch.tensor(value, dtype=torch.float64) for group, value in getattr(effect, side).items()}
            for side in ("unlearn", "retain")
        }

    return run


def _engine(name: str, kind: str) -> Callable[[nn.Module, Batch, Batch], Sides]:
    def run(model: nn.Module, forget: Batch, retain: Batch, **options) -> Sides:
        effect = getattr(gfast, name)(model, forget=forget, retain=retain, **options)
        sides: Sides = {"unlearn": dict(effect.unlearn), "retain": dict(effect.retain)}
        if kind == "token":
            return {side: {g: torch.cat(list(rows)) for g, rows in groups.items()} for side, groups in sides.items()}
        return sides

    return run


def pg_effect_given() -> Callable[[nn.Module, Batch, Batch], Sides]:
    """With the directions of the risks given: they are measured once a model, before the first call."""
    run, held = _engine("pg_effect", "sample"), {}

    def with_directions(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
        if held.get("model") is not model:
            held.update(model=model, directions=gfast.risk_gradients(model, forget=forget, retain=retain))
        return run(model, forget, retain, directions=held["directions"])

    return with_directions


_ours = partial(Provider, ours=True)


_project = partial(Provider, kind="sample", passes=3, forwards=1, parameters="linear")
FOUR = [GA(), WGA(), SatImp(), SimNPO()]

PROVIDERS: dict[str, Provider] = {  # README.md says what each does
    "g_effect(GA)": _ours(g_effect(GA()), "effect", passes=2, law=1.05),
    "g_effect(WGA)": _ours(g_effect(WGA()), "effect", passes=3, law=1.05),
    "g_effect(4 objectives)": _ours(g_effect(FOUR), "effect", passes=5, law=1.05),
    "g_effect(WGA), sample": _ours(g_effect(WGA(), "sample"), "effect", passes=3, forwards=1, law=1.15),
    "g_effect(WGA), gram": _ours(g_effect(WGA(), "gram"), "effect", steps=1, law=1.0),
    "g_effect(GA), gram": _ours(g_effect(GA(), "gram"), "effect", steps=1, law=1.0),
    "g_effect(4 objectives), gram": _ours(g_effect(FOUR, "gram"), "effect", passes=5),
    "g_effect(WGA), token": _ours(g_effect(WGA(), "token"), "effect", passes=2, forwards=TOKEN_UNITS, law=2.0),
    "clone loop, WGA": Provider(clone_loop, "effect", passes=3),
    "published way": Provider(published_way, "effect", passes=3),
    "published way, padded": Provider(partial(published_way, width=PUBLISHED_WIDTH), "effect", passes=3),
    "published way, micro-batches": Provider(published_micro_batches, "effect", passes=3, micro_batch=MICRO_BATCH),
    "pg_effect": _ours(_engine("pg_effect", "sample"), "sample", passes=3, forwards=1, law=1.15),
    "pg_effect, directions given": _ours(pg_effect_given(), "sample", passes=1, forwards=1, law=1.15),
    "sample loop": Provider(sample_loop, "sample", passes=3, forwards=1),
    "vmap(grad)": Provider(sample_vmap, "sample", passes=3, forwards=1, needs=_vmap_fits),
    "token_effect": _ours(_engine("token_effect", "token"), "token", passes=2, forwards=TOKEN_UNITS, law=2.0),
    "gram_effect": _ours(_engine("gram_effect", "gram"), "gram", steps=1, law=1.0, input_passes=2, input_law=1.3),
    "kronfluence, identity": _project(kronfluence, package="kronfluence"),
    "bergson": _project(bergson, package="bergson"),
}
