"""Gradient effects: time, memory and error of every engine beside plain passes, plain loops and other projects."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable

import torch
from cases import batch_pair, random_model, rows_of
from harness import interleaved, of_floor, peak_extra_bytes, peak_in_fresh_process, reason
from laws import verdict
from machine import Row
from peers_effects import PROVIDERS
from truth import UNITS, Truth, error, off_by

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative to the product of the norms; bf16: plain autograd's own error
NO_RESULT = 0.5
CHECK_ROWS = 2
CHECK_LAYERS, CHECK_PARAMETERS = 4, 50_000_000  # a check holds a dozen gradients: larger models are checked cut short
LARGE = 200_000_000  # parameters of that which a CPU's memory does not hold a dozen times: cut to one block
SWEEPS = {"batch": [1, 2, 4, 8, 16], "length": [32, 64, 128, 256, 512], "depth": [2, 4, 8, 16, 32]}
SWEPT = "g_effect(WGA);clone loop, WGA;published way;pg_effect;sample loop;vmap(grad);token_effect;gram_effect".split(
    ";"
)
RANGES = {  # of a profile: what is wrapped in which name
    "gfast.geffect.backward:Passes.backward": "gfast::pass",
    "gfast.geffect.backward:model_loss": "gfast::batch/forward",
    "torch:Tensor.backward": "gfast::batch/backward",
    "gfast.geffect.directions:Dots._dot": "gfast::hook/dots",
    "gfast.geffect.storage:Store.add": "gfast::hook/direction storage",
    "gfast.geffect.storage:Store.finish": "gfast::direction storage/finish",
    "gfast.geffect.directions:parameter_squares": "gfast::fingerprint of the weights",
    "gfast.geffect.engines.sample:objective_dots": "gfast::sample engine",
    "gfast.geffect.engines.gram:objective_dots": "gfast::gram engine",
    "gfast.geffect.engines.token:objective_dots": "gfast::token engine",
}


def setup(settings: Row) -> tuple[torch.nn.Module, dict, dict]:
    """A random model of the shape, a forget batch and a retain batch."""
    model = random_model(settings["shape"], settings["dtype"], settings["device"], settings["layers"])
    return model, *batches(settings)


def batches(settings: Row) -> tuple[dict, dict]:
    return batch_pair(settings["shape"], settings["batch"], settings["tokens"], settings["device"])


def shell(settings: Row) -> torch.nn.Module:
    """The model without memory for its parameters."""
    return random_model(settings["shape"], settings["dtype"], "meta", settings["layers"])


def checked(settings: Row, names: list[str]) -> dict[str, Row]:
    """For each provider its error, or why there is none: failed, wrong (of those nothing is timed)."""
    large = settings["device"] == "cpu" and parameters(settings | {"layers": CHECK_LAYERS}) > LARGE
    most = 1 if large else CHECK_LAYERS
    if parameters(settings) > CHECK_PARAMETERS and (settings["layers"] or most + 1) > most:
        settings = settings | {"layers": most}
    model, forget, retain = setup(settings)
    compared: dict[str, Row] = {}
    rows_for = {name: max(CHECK_ROWS, 2 * PROVIDERS[name].micro_batch) for name in names}
    for rows in sorted(set(rows_for.values())):
        truth = Truth(model, *(rows_of(batch, 0, rows) for batch in (forget, retain)))
        some = [name for name in names if rows_for[name] == rows]
        compared |= {name: _compared(truth, name, TOLERANCE[settings["dtype"]]) for name in some}
        del truth  # its gradients, before the next one's
    return compared


def _compared(truth: Truth, name: str, tolerance: float) -> Row:
    provider = PROVIDERS[name]
    kind = "effect, GA" if name.startswith("g_effect(GA)") else provider.kind
    try:
        values = provider.run(truth.model, truth.forget, truth.retain)
        gap = error(truth, values, kind, provider.parameters)
        off = off_by(truth, values, kind) if provider.micro_batch else None
    except Exception as problem:
        return {"failed": reason(problem)}
    row: Row = {"error": gap}
    if off is not None and math.isfinite(off):
        row["off_by"] = off
        if gap > tolerance:
            row["unequal"] = f"off by {off:.2e} of the exact effect"
    elif gap > (tolerance if provider.ours else NO_RESULT):
        row["wrong"] = f"error {gap:.2e} of the norms' product against plain autograd: not timed"
    elif gap > tolerance:
        row["unequal"] = f"error {gap:.2e} of the norms' product"
    return row


def parameters(settings: Row) -> int:
    return sum(p.numel() for p in shell(settings).parameters())


def bench(settings: Row, names: list[str], args: argparse.Namespace) -> list[Row]:
    """One row a provider, after one for each unit."""
    model, (forget, retain) = shell(settings), batches(settings)
    missing = {name: why for name in names if (why := PROVIDERS[name].why_not(model, forget)) is not None}
    notes = {name: {"skipped": why} for name, why in missing.items()}
    notes |= checked(settings, [name for name in names if name not in missing])
    model, _, _ = setup(settings)
    good = [name for name in names if "error" in notes[name] and "wrong" not in notes[name]]
    steps: dict[str, Callable[[], object]] = {
        name: functools.partial(unit, model, forget, retain) for name, unit in UNITS.items()
    }
    steps |= {name: functools.partial(PROVIDERS[name].run, model, forget, retain) for name in good}
    beside = {name: PROVIDERS[name].units() for name in good}
    times = interleaved(steps, settings["device"], args.repetitions, warmup=1, budget_s=args.budget, beside=beside)
    if settings["device"] == "cpu":  # the fresh processes that measure memory hold a model of their own
        del model
        steps = {}
    training_passes, forward, training, without = (times[name] for name in UNITS)
    rows: list[Row] = []
    for name, time in times.items():
        row: Row = {"name": name, **time}
        if name in good:
            provider = PROVIDERS[name]
            row |= {"kind": provider.kind, "parameters": provider.parameters, **notes[name]}
            units = ((provider.passes, training_passes), (provider.forwards, forward), (provider.steps, training))
            if provider.floor:
                row["ratio"], row["floor"] = round(of_floor(time, *units), 4), provider.floor
                if provider.law is not None:
                    row |= verdict(row["ratio"], provider.law)
            if provider.input_law is not None:
                ratio = round(of_floor(time, (provider.input_passes, without)), 4)
                floor = f"{provider.input_passes:g} passes without dW"
                row["of_passes_without_dw"] = {"ratio": ratio, "floor": floor, **verdict(ratio, provider.input_law)}
        if not args.no_memory and name not in ("plain forward", "pass without dW"):  # units of time only
            try:
                row["peak_extra_mb"] = peak_mb(name, settings, steps.get(name))
            except RuntimeError as problem:  # too large for the machine, say: the times are not lost with it
                print(f"{name}: {problem}", flush=True)
        rows.append(row)
    rows += [{"name": name, "kind": PROVIDERS[name].kind, **notes[name]} for name in names if name not in good]
    return rows


def peak_mb(name: str, settings: Row, step: Callable[[], object] | None) -> float | None:
    """Peak extra memory of a case; on a CPU in a fresh process, where no freed memory is there to be reused."""
    if settings["device"] == "cuda":
        size = peak_extra_bytes(step, "cuda")
    else:
        description = json.dumps({"name": name, **settings})
        size = peak_in_fresh_process(measure, description, ["geffect", "transformers.models.llama.modeling_llama"])
    return None if size is None else round(size / 2**20, 1)


def measure(description: str) -> int | None:
    settings = json.loads(description)
    name = settings.pop("name")
    model, forget, retain = setup(settings)
    step = UNITS[name] if name in UNITS else PROVIDERS[name].run
    return peak_extra_bytes(lambda: step(model, forget, retain), settings["device"])
