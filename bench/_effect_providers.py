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

import torch
import torch.nn.functional as F
from _models import Batch, padded, rows_of
from torch import Tensor, nn

import gfast
from gfast.geffect import ENGINES
from gfast.objectives import GA, WGA, SatImp, SimNPO

Sides = dict[str, dict[str, Tensor]]
PUBLISHED_WIDTH = 500  # tokens to which the published code pads every sample
MICRO_BATCH = 2  # samples; the published configuration's 4 would leave a batch of 4 without a second one to average
OLD, NEW = 0.6, 0.4  # the published code's moving average
TOKEN_UNITS = 9  # forward units of the tangents of two directions by group (DESIGN: about 9)
VMAP_BYTES = 2**31  # per-sample gradients are held at once: only where they fit easily


@dataclass(frozen=True)
class Effects:
    """A provider. ``passes``, ``forwards`` and ``steps`` are the plain passes, forwards and training steps that it is
    measured by: what it cannot do without, or is to be had for."""

    run: Callable[[nn.Module, Batch, Batch], Sides]
    kind: str  # "effect", "sample", "token" or "gram"
    what: str
    passes: float = 0
    forwards: float = 0
    law: float | None = None
    package: str | None = None
    needs: Callable[[nn.Module, Batch], str | None] = lambda model, batch: None
    parameters: str = "all"  # or "linear": the Linear layers of the blocks
    steps: float = 0
    input_passes: float = 0  # passes without gradients of weights, as a second measure
    input_law: float | None = None
    micro_batch: int = 0  # samples at a time, of who is exact for one micro-batch and approximates over several

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
        """What it is measured by, as `geffect.UNITS` names it."""
        counts = {
            "plain pass": self.passes,
            "plain forward": self.forwards,
            "training step": self.steps,
            "pass without dW": self.input_passes,
        }
        return [name for name, count in counts.items() if count]

    def why_not(self, model: nn.Module, forget: Batch) -> str | None:
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        return self.needs(model, forget)


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


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """A copy of every parameter's gradient."""
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    parts = [(a[name].float() * b[name].float()).sum().double() for name in a if name in b]
    return torch.stack(parts).sum()


def host_gradients(model: nn.Module, loss: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's gradient on the host, one by one; the model drops its own after the last."""
    loss.backward()
    for name, p in model.named_parameters():
        yield name, p.grad.detach().cpu()
    model.zero_grad(set_to_none=True)


def published_total(own: dict[str, Tensor], risk: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """Dot products on the device, summed over groups that are matched by name (blocks 0-9, 10-19, 20 and more)."""
    groups: dict[str, float] = {}
    for name, grad in own.items():
        block = re.search(r"layers\.(\d+)\.", name)
        group = "other" if block is None else ("0-9", "10-19", "20+")[min(int(block.group(1)) // 10, 2)]
        groups[group] = groups.get(group, 0.0) + float((grad.to(device) * risk[name].to(device)).sum())
    return {"total": torch.tensor(sum(groups.values()), dtype=torch.float64)}


def published_way(model: nn.Module, forget: Batch, retain: Batch, width: int | None, objective: str = "wga") -> Sides:
    """The published code's four forward/backwards and copies to the host, once for the whole batch.

    One micro-batch leaves nothing to average: this is exact, and costs less than `published_micro_batches`. For each
    side the objective's and the risk's gradient are computed anew and copied to host lists.
    """
    if width is not None:
        forget, retain = padded(forget, width), padded(retain, width)

    def to_host(batch: Batch, kind: str) -> dict[str, Tensor]:
        return {name: grad.clone() for name, grad in host_gradients(model, plain_loss(model, batch, kind))}

    out: Sides = {}
    for side, batch in (("unlearn", forget), ("retain", retain)):
        own, risk = to_host(forget, objective), to_host(batch, "nll")
        out[side] = published_total(own, risk, "cpu")
    return out


def published_micro_batches(model: nn.Module, forget: Batch, retain: Batch, objective: str = "wga") -> Sides:
    """The published code's way, micro-batch by micro-batch: an approximation, as soon as there are two.

    A micro-batch takes four forward/backwards: the forget samples' risk, the objective, the retain samples' risk, and
    the trainer's own of a loss times 0. Each of the first three gradients is copied to the host and mixed there, in the
    model's dtype, into a moving average of its own (0.6 old, 0.4 new); the effect is the dot product of the objective's
    average with a risk's, on the device. So late micro-batches count more than early ones, and a token counts by its
    micro-batch.

    Where the published code leaves a choice, the cheaper one is taken: nothing is padded beyond the batch, no copy is
    made of a gradient that is on the host, and the dot products are taken once, after the last micro-batch (it takes
    them at the third of every four, and prints them).
    """
    averages: dict[str, dict[str, Tensor]] = {"unlearn": {}, "objective": {}, "retain": {}}
    for start in range(0, forget["labels"].shape[0], MICRO_BATCH):
        some, other = (rows_of(batch, start, start + MICRO_BATCH) for batch in (forget, retain))
        for key, batch, kind in (("unlearn", some, "nll"), ("objective", some, objective), ("retain", other, "nll")):
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

    def logp(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
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


def _gfast_missing(name: str) -> Callable[[nn.Module, Batch], str | None]:
    def why(model: nn.Module, batch: Batch) -> str | None:
        return None if hasattr(gfast, name) else f"this version has no gfast.{name}"

    return why


def _no_engine(engine: str) -> Callable[[nn.Module, Batch], str | None]:
    return lambda model, batch: None if engine in ENGINES else f"g_effect has no engine {engine!r} in this version"


def g_effect(objective, engine: str = "stream") -> Callable[[nn.Module, Batch, Batch], Sides]:
    def run(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
        return sides_of(gfast.g_effect(model, objective, forget=forget, retain=retain, engine=engine))

    return run


def sides_of(effect: gfast.GEffect) -> Sides:
    return {
        side: {group: torch.tensor(value, dtype=torch.float64) for group, value in getattr(effect, side).items()}
        for side in ("unlearn", "retain")
    }


def g_effect_of_four(engine: str) -> Callable[[nn.Module, Batch, Batch], Sides]:
    """Four objectives in one call; WGA's result is handed on."""
    objectives = [GA(), WGA(), SatImp(), SimNPO()]

    def run(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
        return sides_of(gfast.g_effect(model, objectives, forget=forget, retain=retain, engine=engine)[1])

    return run


def _engine(name: str, kind: str) -> Callable[[nn.Module, Batch, Batch], Sides]:
    def run(model: nn.Module, forget: Batch, retain: Batch, **options) -> Sides:
        found = getattr(gfast, name)(model, forget=forget, retain=retain, **options)
        sides: Sides = {"unlearn": dict(found.unlearn), "retain": dict(found.retain)}
        if kind == "token":
            return {side: {g: torch.cat(list(rows)) for g, rows in groups.items()} for side, groups in sides.items()}
        return sides

    return run


def _given(name: str, kind: str) -> Callable[[nn.Module, Batch, Batch], Sides]:
    """The engine with the directions of the risks given: they are measured once a model, before the first call."""
    run, held = _engine(name, kind), {}

    def with_directions(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
        if held.get("model") is not model:
            held.update(model=model, directions=gfast.risk_gradients(model, forget=forget, retain=retain))
        return run(model, forget, retain, directions=held["directions"])

    return with_directions


PROVIDERS: dict[str, Effects] = {
    "g_effect(GA)": Effects(g_effect(GA()), "effect", "stream engine, GA", 2, law=1.05),
    "g_effect(WGA)": Effects(g_effect(WGA()), "effect", "stream engine, WGA", 3, law=1.05),
    "g_effect(4 objectives)": Effects(
        g_effect_of_four("stream"), "effect", "stream, GA, WGA, SatImp, SimNPO", 5, law=1.05
    ),
    "g_effect(WGA), sample": Effects(
        g_effect(WGA(), "sample"), "effect", "sample engine", 3, 1, 1.15, needs=_no_engine("sample")
    ),
    "g_effect(WGA), gram": Effects(
        g_effect(WGA(), "gram"), "effect", "gram engine", law=1.0, needs=_no_engine("gram"), steps=1
    ),
    "g_effect(GA), gram": Effects(
        g_effect(GA(), "gram"), "effect", "gram engine, GA", law=1.0, needs=_no_engine("gram"), steps=1
    ),
    "g_effect(4 objectives), gram": Effects(g_effect_of_four("gram"), "effect", "gram engine, the same four", 5),
    "g_effect(WGA), token": Effects(
        g_effect(WGA(), "token"), "effect", "token engine", 2, TOKEN_UNITS, 2.0, needs=_no_engine("token")
    ),
    "clone loop, WGA": Effects(clone_loop, "effect", "three backwards, gradients cloned", 3),
    "published way": Effects(
        lambda m, f, r: published_way(m, f, r, None), "effect", "published code's way, padding to the longest", 3
    ),
    "published way, padded": Effects(
        lambda m, f, r: published_way(m, f, r, PUBLISHED_WIDTH),
        "effect",
        f"published code's way, padding to {PUBLISHED_WIDTH} tokens as it does",
        3,
    ),
    "published way, micro-batches": Effects(
        published_micro_batches,
        "effect",
        f"published code's way, {MICRO_BATCH} samples at a time, with its moving averages",
        3,
        micro_batch=MICRO_BATCH,
    ),
    "pg_effect": Effects(
        _engine("pg_effect", "sample"), "sample", "one value a sample", 3, 1, 1.15, needs=_gfast_missing("pg_effect")
    ),
    "pg_effect, directions given": Effects(
        _given("pg_effect", "sample"), "sample", "the pass over the samples alone", 1, 1, 1.15
    ),
    "sample loop": Effects(sample_loop, "sample", "a backward for each sample", 3, 1),
    "vmap(grad)": Effects(sample_vmap, "sample", "torch.func, all gradients at once", 3, 1, needs=_vmap_fits),
    "token_effect": Effects(
        _engine("token_effect", "token"),
        "token",
        "one value a label token",
        2,
        TOKEN_UNITS,
        2.0,
        needs=_gfast_missing("token_effect"),
    ),
    "gram_effect": Effects(
        _engine("gram_effect", "gram"),
        "gram",
        "all pairs of samples, both sides",
        steps=1,
        law=1.0,
        input_passes=2,
        input_law=1.3,
        needs=_gfast_missing("gram_effect"),
    ),
}
