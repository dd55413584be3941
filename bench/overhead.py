"""What measuring the G-effect adds to training: UnlearnTrainer's steps with GEffectCallback at every 1, 5, 10 steps.

    python bench/overhead.py                                     # tiny and SmolLM2-135M-shaped models
    python bench/overhead.py --shapes tiny --rounds 3
    python bench/overhead.py --json overhead.json

Trains WGA on forget data and NLL on retain data, 10 optimizer steps a run, the runs interleaved; the step's time is a
run's from its first to its last step over the number of steps, without the measurement before training. Law: a
measurement of one objective takes at most 1.15 times three plain passes that a callback makes in the same place
(between two steps memory that the system took back has to be had again, so that passes take longer there than in a loop
of their own, whose time stands beside it), judged by the runs that measure at every step: at every k steps the
difference of two runs is k times as noisy. That the callback changes no weight is checked first: the runs with and
without it must end with the same bits. The tiny model shows the fixed costs (Python, the record's file) and is under no
law.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from _effect_providers import plain_pass
from _models import SHAPES, answers, random_model
from _timing import environment, interleaved, synchronize, write_json
from torch.utils.data import Dataset
from transformers import TrainerCallback

import gfast
from gfast.objectives import NLL, WGA, Mix

LAW = 1.15
PASSES = "passes"  # plain ones after every step, in place of a measurement
EVERY = (None, 10, 5, 1)


class Pairs(Dataset):
    """Index -> one forget and one retain row, all of one width."""

    def __init__(self, forget: dict, retain: dict):
        self.sides = {"forget": forget, "retain": retain}

    def __len__(self) -> int:
        return self.sides["forget"]["labels"].shape[0]

    def __getitem__(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        return {side: {key: value[index] for key, value in batch.items()} for side, batch in self.sides.items()}


def collate(rows: list[dict]) -> dict[str, dict[str, torch.Tensor]]:
    return {
        side: {key: torch.stack([row[side][key] for row in rows]) for key in rows[0][side]}
        for side in ("forget", "retain")
    }


class Clock(TrainerCallback):
    """Seconds from the start of the first step to the end of the last, other callbacks of the steps included."""

    def __init__(self, device: str):
        self.device, self.start, self.seconds = device, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            synchronize(self.device)
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.start


class Passes(TrainerCallback):
    """The plain passes that a measurement cannot do without, after every step: both risks' and the objective's."""

    def __init__(self, forget: dict, retain: dict):
        self.forget, self.retain = forget, retain

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model)  # a measurement comes before training too

    def on_step_end(self, args, state, control, model=None, **kwargs):
        plain_pass(model, self.forget)
        plain_pass(model, self.retain)
        plain_pass(model, self.forget, "wga")


def train(model, forget: dict, retain: dict, every: int | str | None, steps: int, device: str) -> float:
    """Seconds a step of a run that starts from the model's weights and leaves them as trained."""
    clock, rows = Clock(device), forget["labels"].shape[0]
    host = [{key: value.cpu() for key, value in batch.items()} for batch in (forget, retain)]
    callbacks: list[TrainerCallback] = [clock]
    if every == PASSES:
        callbacks.insert(0, Passes(forget, retain))
    elif every is not None:
        callbacks.insert(0, gfast.GEffectCallback(every, [host[0]], [host[1]], WGA()))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = gfast.UnlearnConfig(
            output_dir=folder,
            objective="WGA",
            retain_term="nll",
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            per_device_train_batch_size=rows,
            max_steps=steps,
            save_strategy="no",
            logging_steps=steps,
            record_every=0,
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=0,
        )
        trainer = gfast.UnlearnTrainer(
            model,
            args,
            train_dataset=Pairs(*host),
            data_collator=collate,
            objective=Mix(WGA(), NLL()),
            callbacks=callbacks,
        )
        trainer.train()
    return clock.seconds / steps


def same_weights(args: argparse.Namespace, shape: str) -> None:
    """Exits when a run that is measured at every step does not end with the bits of one that is not."""
    ends = []
    for every in (None, 1):
        model, forget, retain = setup(args, shape)
        train(model, forget, retain, every, 2, args.device)
        ends.append([p.detach().cpu() for p in model.parameters()])
    if not all(torch.equal(a, b) for a, b in zip(*ends, strict=True)):
        sys.exit(f"{shape}: training with the callback ends with other weights than without; nothing was timed")


def setup(args: argparse.Namespace, shape: str):
    model = random_model(shape, args.dtype, args.device)
    vocab = SHAPES[shape]["vocab_size"]
    return model, *(answers(vocab, args.batch, args.tokens, seed, args.device) for seed in (1, 2))


def bench(args: argparse.Namespace, shape: str) -> list[dict[str, Any]]:
    if args.device == "cpu":  # a GPU's atomics may differ from run to run without any callback
        same_weights(args, shape)
    model, forget, retain = setup(args, shape)
    seconds: dict[int | str | None, list[float]] = {every: [] for every in (*EVERY, PASSES)}
    train(model, forget, retain, None, 2, args.device)
    loop: list[float] = []
    for turn in range(args.rounds):
        order = list(seconds)
        for every in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody always comes last
            seconds[every].append(train(model, forget, retain, every, args.steps, args.device))
        units = {"pass": lambda: plain_pass(model, forget)}
        loop.append(interleaved(units, args.device, 3, warmup=1)["pass"]["median_ms"])
    step = {every: 1e3 * statistics.median(values) for every, values in seconds.items()}
    floor, loop_floor = step[PASSES] - step[None], 3 * statistics.median(loop)
    rows = []
    for every in EVERY:
        row: dict[str, Any] = {
            "shape": shape,
            "every": every,
            "step_ms": round(step[every], 3),
            "runs": args.rounds,
            "of_plain_step": round(step[every] / step[None], 4),
        }
        if every is not None:
            measurement = every * (step[every] - step[None])
            row |= {"measurement_ms": round(measurement, 3), "floor_ms": round(floor, 3)}
            row["loop_floor_ms"] = round(loop_floor, 3)
            if floor > 0:  # else the passes are lost in the noise of the runs
                row["ratio"] = round(measurement / floor, 4)
            # of the tiny model a measurement is mostly writing its record, and a pass mostly Python
            if every == 1 and shape != "tiny" and "ratio" in row:
                row |= {"law": LAW, "law_met": row["ratio"] <= LAW}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,smollm2-135m", help="some of " + ", ".join(SHAPES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a run, a multiple of 10")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", help="file name under bench/results/DEVICE, or a path; written after every shape")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.steps % 10 or args.steps < 10:
        parser.error("--steps must be a multiple of 10, so that measurements at every 1, 5 and 10 steps come out even")
    if unknown := [shape for shape in args.shapes.split(",") if shape not in SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}; choose from {', '.join(SHAPES)}")
    results: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        rows = bench(args, shape)
        print(f"\n{shape}, {args.dtype}, batches of {args.batch} x {args.tokens} tokens, {args.device}")
        print(f"{'measured':<18}{'step ms':>10}{'of plain':>10}{'measurement ms':>16}{'of its floor':>14}")
        for row in rows:
            name = "never" if row["every"] is None else f"every {row['every']} steps"
            line = f"{name:<18}{row['step_ms']:>10.1f}{row['of_plain_step']:>10.3f}"
            if "ratio" in row:
                line += f"{row['measurement_ms']:>16.1f}{row['ratio']:>14.3f}"
            if "law" in row:
                line += f"  law {LAW}: {'met' if row['law_met'] else 'MISSED'}"
            print(line, flush=True)
        results += rows
        if args.json:
            settings = {key: getattr(args, key) for key in ("dtype", "batch", "tokens", "steps", "rounds")}
            write_json(args.json, {"environment": environment(args.device), "settings": settings, "rows": results})


if __name__ == "__main__":
    main()
