"""Gradient effects: time and memory of every engine against plain passes, plain loops and other projects.

    python bench/geffect.py                 # a SmolLM2-135M-shaped Llama, fp32, 8 x 72 tokens a batch
    python bench/geffect.py --shape tiny    # seconds, to see that it runs
    python bench/geffect.py --json geffect.json
    python bench/geffect.py --sweep length --shape tiny --json geffect_sweep_length.json    # or batch, depth
    python bench/geffect.py --device cuda --shape llama-2-7b --dtype bf16 --json geffect_7b.json

Times are medians over interleaved rounds in one run. Before timing, every provider's numbers on two rows are compared
with plain autograd's, group by group, relative to the product of the norms (models of over 50 million parameters are
cut to four blocks for this, or to one where four would not fit); gfast beyond the tolerance is reported as wrong
and not timed, others are marked unequal (and refused over 50 %). Who is known to approximate is compared on two of its
micro-batches instead, relative to the exact effect too, and timed whatever that error.

A floor is what a measurement cannot do without, in plain passes (logits, cross entropy, backward into .grad) and plain
forwards timed right before each call: two passes for the risks' gradients and one for the objective's; a sample engine
adds a forward's worth of dot products; the token engine replaces the third pass by 9 forwards' worth of tangents; gram
is to take no more than a training step on both batches (their gradients accumulated, plain SGD) and than 1.3 times two
passes that compute no gradient of a weight. Peak memory is what a call needs beyond the model and its data.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from _effect_checks import Truth, error, off_by
from _effect_peers import PEERS
from _effect_providers import PROVIDERS, input_pass, plain_forward, plain_pass, plain_step
from _laws import PUBLISHED
from _models import DTYPES, SHAPES, answers, random_model, rows_of
from _timing import environment, interleaved, of_floor, peak_extra_bytes, peak_in_fresh_process, write_json

ALL = PROVIDERS | PEERS
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative to the product of the norms; bf16: plain autograd's own error
NO_RESULT = 0.5
CHECK_ROWS = 2
CHECK_LAYERS, CHECK_PARAMETERS = 4, 50_000_000  # a check holds a dozen gradients: larger models are checked cut short
LARGE = 200_000_000  # parameters of that which a CPU's memory does not hold a dozen times: cut to one block
UNITS = {
    "plain pass": lambda model, forget, retain: plain_pass(model, forget),
    "plain forward": lambda model, forget, retain: plain_forward(model, forget),
    "training step": plain_step,
    "pass without dW": lambda model, forget, retain: input_pass(model, forget),
}
SWEEPS = {"batch": [1, 2, 4, 8, 16], "length": [32, 64, 128, 256, 512], "depth": [2, 4, 8, 16, 32]}
SWEPT = "g_effect(WGA),pg_effect,gram_effect,token_effect,clone loop, WGA,published way,sample loop,vmap(grad)"


def setup(settings: dict[str, Any]) -> tuple[torch.nn.Module, dict, dict]:
    """A random model of the shape, a forget batch and a retain batch."""
    model = random_model(settings["shape"], settings["dtype"], settings["device"], settings["layers"])
    return model, *batches(settings)


def batches(settings: dict[str, Any]) -> tuple[dict, dict]:
    vocab, device = SHAPES[settings["shape"]]["vocab_size"], settings["device"]
    forget, retain = (answers(vocab, settings["batch"], settings["tokens"], seed, device) for seed in (1, 2))
    return forget, retain


def shell(settings: dict[str, Any]) -> torch.nn.Module:
    """The model without memory for its parameters."""
    return random_model(settings["shape"], settings["dtype"], "meta", settings["layers"])


def checked(settings: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """For each provider its error, or why there is none: failed, wrong (of those nothing is timed)."""
    large = settings["device"] == "cpu" and _parameters(settings | {"layers": CHECK_LAYERS}) > LARGE
    most = 1 if large else CHECK_LAYERS
    if _parameters(settings) > CHECK_PARAMETERS and (settings["layers"] or most + 1) > most:
        settings = settings | {"layers": most}
    model, forget, retain = setup(settings)
    found: dict[str, dict[str, Any]] = {}
    rows_for = {name: max(CHECK_ROWS, 2 * ALL[name].micro_batch) for name in names}
    for rows in sorted(set(rows_for.values())):
        truth = Truth(model, *(rows_of(batch, 0, rows) for batch in (forget, retain)))
        some = [name for name in names if rows_for[name] == rows]
        found |= {name: _compared(truth, name, TOLERANCE[settings["dtype"]]) for name in some}
        del truth  # its gradients, before the next one's
    return found


def _compared(truth: Truth, name: str, tolerance: float) -> dict[str, Any]:
    provider = ALL[name]
    kind = "effect, GA" if name.startswith("g_effect(GA)") else provider.kind
    try:
        values = provider.run(truth.model, truth.forget, truth.retain)
        gap = error(truth, values, kind, provider.parameters)
        off = off_by(truth, values, kind) if provider.micro_batch else None
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"}
    found: dict[str, Any] = {"error": gap}
    ours = name in PROVIDERS and "effect" in name
    if off is not None and math.isfinite(off):
        found["off_by"] = off
        if gap > tolerance:
            found["unequal"] = f"off by {off:.2e} of the exact effect"
    elif gap > (tolerance if ours else NO_RESULT):
        found["wrong"] = f"error {gap:.2e} of the norms' product against plain autograd: not timed"
    elif gap > tolerance:
        found["unequal"] = f"error {gap:.2e} of the norms' product"
    return found


def _parameters(settings: dict[str, Any]) -> int:
    return sum(p.numel() for p in shell(settings).parameters())


def bench(settings: dict[str, Any], names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a provider, after one for each unit."""
    model, (forget, retain) = shell(settings), batches(settings)
    missing = {name: why for name in names if (why := ALL[name].why_not(model, forget)) is not None}
    notes = {name: {"skipped": why} for name, why in missing.items()}
    notes |= checked(settings, [name for name in names if name not in missing])
    model, _, _ = setup(settings)
    good = [name for name in names if "error" in notes[name] and "wrong" not in notes[name]]
    steps: dict[str, Callable[[], object]] = {
        name: functools.partial(unit, model, forget, retain) for name, unit in UNITS.items()
    }
    steps |= {name: functools.partial(ALL[name].run, model, forget, retain) for name in good}
    beside = {name: ALL[name].units() for name in good}
    times = interleaved(steps, settings["device"], args.repetitions, warmup=1, budget_s=args.budget, beside=beside)
    if settings["device"] == "cpu":  # the fresh processes that measure memory hold a model of their own
        del model
        steps = {}
    one, forward, training, without = (times[name] for name in UNITS)
    rows: list[dict[str, Any]] = []
    for name, time in times.items():
        row: dict[str, Any] = {"name": name, **time}
        if name in good:
            provider = ALL[name]
            row |= {"kind": provider.kind, "parameters": provider.parameters, **notes[name]}
            units = ((provider.passes, one), (provider.forwards, forward), (provider.steps, training))
            if provider.floor:
                row["ratio"], row["floor"] = round(of_floor(time, *units), 4), provider.floor
                if provider.law is not None:
                    row |= {"law": provider.law, "law_met": row["ratio"] <= provider.law}
            if provider.input_law is not None:
                ratio = round(of_floor(time, (provider.input_passes, without)), 4)
                row["of_passes_without_dw"] = {
                    "ratio": ratio,
                    "floor": f"{provider.input_passes:g} passes without dW",
                    "law": provider.input_law,
                    "law_met": ratio <= provider.input_law,
                }
        if not args.no_memory and name not in ("plain forward", "pass without dW"):  # units of time only
            try:
                row["peak_extra_mb"] = peak_mb(name, settings, steps.get(name))
            except RuntimeError as problem:  # too large for the machine, say: the times are not lost with it
                print(f"{name}: {problem}", flush=True)
        rows.append(row)
    rows += [{"name": name, "kind": ALL[name].kind, **notes[name]} for name in names if name not in good]
    return rows


def peak_mb(name: str, settings: dict[str, Any], step: Callable[[], object] | None) -> float | None:
    """Peak extra memory of a case; on a CPU in a fresh process, where no freed memory is there to be reused."""
    if settings["device"] == "cuda":
        size = peak_extra_bytes(step, "cuda")
    else:
        description = json.dumps({"name": name, **settings})
        size = peak_in_fresh_process(measure, description, ["_effect_peers", "transformers.models.llama"])
    return None if size is None else round(size / 2**20, 1)


def measure(description: str) -> int | None:
    settings = json.loads(description)
    name = settings.pop("name")
    model, forget, retain = setup(settings)
    if name in UNITS:
        return peak_extra_bytes(lambda: UNITS[name](model, forget, retain), settings["device"])
    return peak_extra_bytes(lambda: ALL[name].run(model, forget, retain), settings["device"])


def against_published(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """g_effect(WGA) against the published way, both paddings: how many times less time and memory it takes."""
    by_name = {row["name"]: row for row in rows if "median_ms" in row}
    ours, found = by_name.get("g_effect(WGA)"), []
    for name in PUBLISHED:
        if ours is None or name not in by_name:
            continue
        row = {"against": name, "times_less": round(by_name[name]["median_ms"] / ours["median_ms"], 2)}
        sizes = [by_name[name].get("peak_extra_mb"), ours.get("peak_extra_mb")]
        if all(sizes):
            row["memory_less"] = round(sizes[0] / sizes[1], 2)
        found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<24}{'ms':>10}{'ratio':>8}{'peak MB':>10}{'error':>10}"]
    for row in rows:
        note = next((note for note in ("skipped", "failed", "wrong") if note in row), None)
        if note is not None:
            lines.append(f"{row['name']:<24}{note.upper()}: {row[note]}")
            continue
        laws = [found for found in (row, row.get("of_passes_without_dw")) if found and "law" in found]
        law = "".join(
            f"  law {found['law']:.2f} of {found['floor']}: {'met' if found['law_met'] else 'MISSED'}" for found in laws
        )
        unequal = f"  UNEQUAL: {row['unequal']}" if "unequal" in row else ""
        ratio, size, gap = row.get("ratio"), row.get("peak_extra_mb"), row.get("error")
        lines.append(
            f"{row['name']:<24}{row['median_ms']:>10.1f}{'' if ratio is None else f'{ratio:.3f}':>8}"
            f"{'' if size is None else size:>10}{'' if gap is None else f'{gap:.0e}':>10}{law}{unequal}"
            f"{'  Linear layers only' if row.get('parameters') == 'linear' else ''}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--layers", type=int, help="cut the model to this depth")
    parser.add_argument("--providers", help="separated by semicolons; default: all, a sweep takes fewer: " + SWEPT)
    parser.add_argument("--sweep", choices=SWEEPS, help="over the batch, the length or the depth")
    parser.add_argument("--values", type=lambda text: [int(v) for v in text.split(",")], help="the sweep's values")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds a provider")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--json", help="file name under bench/results/DEVICE, or a path; written after every value of a sweep"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    swept = [name for name in ALL if name in SWEPT]
    names = args.providers.split(";") if args.providers else swept if args.sweep else list(ALL)
    if unknown := [name for name in names if name not in ALL]:
        parser.error(f"unknown provider {unknown[0]!r}; choose from {'; '.join(ALL)}")
    if args.batch < CHECK_ROWS and args.sweep != "batch":
        parser.error(f"--batch must be at least {CHECK_ROWS}: that many rows are checked")
    settings = {key: getattr(args, key) for key in ("shape", "dtype", "batch", "tokens", "layers", "device")}
    swept_key = {"batch": "batch", "length": "tokens", "depth": "layers"}.get(args.sweep or "")
    results: list[dict[str, Any]] = []
    for value in (args.values or SWEEPS[args.sweep]) if args.sweep else [None]:
        at = settings if value is None else settings | {swept_key: value}
        print(f"\n{at['shape']}, {at['dtype']}, {at['batch']} x {at['tokens']} tokens, {at['device']}", flush=True)
        rows = bench(at, names, args)
        print(table(rows), flush=True)
        results += rows if value is None else [{args.sweep: value, **row} for row in rows]
        published = [] if args.sweep else against_published(rows)
        for row in published:
            print(f"g_effect(WGA) takes {row['times_less']}x less time than the {row['against']}", end="")
            print(f" and {row['memory_less']}x less memory" if "memory_less" in row else "")
        if args.json:
            record = settings | {"parameters": _parameters(settings)}
            payload = {"environment": environment(args.device), "settings": record, "sweep": args.sweep}
            write_json(args.json, payload | {"published": published, "rows": results})


if __name__ == "__main__":
    main()
