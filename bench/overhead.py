"""What measuring the G-effect adds to training: UnlearnTrainer's steps with GEffectCallback at every 1, 5, 10 steps."""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time

import torch
from cases import Batch, batch_pair, random_model
from harness import interleaved, synchronize
from laws import MEASUREMENT, verdict
from machine import Row
from torch.utils.data import default_collate
from transformers import TrainerCallback
from truth import plain_pass

import gfast
from gfast.objectives import NLL, WGA, Mix

PASSES = "passes"  # plain ones after every step, in place of a measurement
EVERY = (None, 10, 5, 1)


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


def to_host(batch: Batch) -> Batch:
    return {key: value.cpu() for key, value in batch.items()}


def train(model, forget: dict, retain: dict, every: int | str | None, steps: int, device: str) -> float:
    """Seconds a step of a run that starts from the model's weights and leaves them as trained."""
    clock, rows = Clock(device), forget["labels"].shape[0]
    host = {"forget": to_host(forget), "retain": to_host(retain)}
    pairs = [{side: {key: v[row] for key, v in batch.items()} for side, batch in host.items()} for row in range(rows)]
    callbacks: list[TrainerCallback] = [clock]
    if every == PASSES:
        callbacks.insert(0, Passes(forget, retain))
    elif every is not None:
        callbacks.insert(0, gfast.GEffectCallback(every, [host["forget"]], [host["retain"]], WGA()))
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
            train_dataset=pairs,
            data_collator=default_collate,
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


def setup(args: argparse.Namespace, name: str):
    return random_model(name, args.dtype, args.device), *batch_pair(name, args.batch, args.tokens, args.device)


def bench(args: argparse.Namespace, shape: str) -> list[Row]:
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
        row: Row = {
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
                row |= verdict(row["ratio"], MEASUREMENT)
        rows.append(row)
    return rows
