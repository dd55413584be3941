"""Scoring an evaluation's losses: the answer, its paraphrase and the wrong answers of every TOFU row, on real weights.

gfast's one pass against open-unlearning's evaluator (three passes over its own batches, every answer with its prompt,
the logits of all positions in memory), and against gfast without shared prompts. All get the same token ids.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from harness import peak_extra_bytes, peak_in_fresh_process, summary
from laws import SCORING, verdict
from machine import Row
from torch import nn

from gfast.data import load_tofu
from gfast.evaluation import EvaluationSet, Sample, encoded
from gfast.evaluation.scoring import score

BATCH = 16  # gfast evaluate's own
THEIR_BATCH = 32  # configs/eval/tofu.yaml
PROVIDERS = ("gfast", "gfast, no shared prompts", "open-unlearning")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepared(settings: Row) -> tuple[nn.Module, list[Sample], int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"]).to(DTYPES[settings["dtype"]]).eval()
    rows = load_tofu(settings["config"], settings["data"])[: settings["rows"] or None]
    fields = {"paraphrase": "paraphrased_answer", "perturbed": "perturbed_answer"}
    samples = encoded(EvaluationSet("forget", settings["config"], rows, **fields), tokenizer)
    return model, samples, tokenizer.eos_token_id


def ours(model: nn.Module, samples: list[Sample], pad_id: int, shared: bool) -> list[list[float]]:
    """Mean loss of the answers of each sample, as `gfast evaluate` batches them."""
    order = sorted(range(len(samples)), key=lambda at: (len(samples[at].prompt), at))
    losses: dict[int, list[float]] = {}
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        scored = score(model, [samples[at] for at in places], pad_id, shared)
        for at, parts in zip(places, scored, strict=True):
            losses[at] = [-float(part.logp.double().mean()) for part in parts]
    return [losses[at] for at in range(len(samples))]


def theirs(evaluator: types.ModuleType, model: nn.Module, samples: list[Sample], pad_id: int) -> list[list[float]]:
    """The same by open-unlearning's run_batchwise_evals and evaluate_probability: a pass a field, rows in order."""

    def padded(batch: list[Sample], answer: int) -> dict[str, torch.Tensor]:
        answers = [sample.answers[answer] for sample in batch]
        width = max(len(ids) for ids, _ in answers)
        rows = {
            "input_ids": [[*ids, *[pad_id] * (width - len(ids))] for ids, _ in answers],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in answers],
            "labels": [[*labels, *[-100] * (width - len(labels))] for _, labels in answers],
            "index": [sample.index for sample in batch],
        }
        return {key: torch.tensor(value) for key, value in rows.items()}

    batches = [samples[start : start + THEIR_BATCH] for start in range(0, len(samples), THEIR_BATCH)]
    losses: list[list[float]] = [[] for _ in samples]
    for places in ([0], [1], range(2, len(samples[0].answers))):
        loader = [{str(place): padded(batch, place) for place in places} for batch in batches]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            values = evaluator.run_batchwise_evals(model, loader, evaluator.evaluate_probability, {}, "losses")
        for at, sample in enumerate(samples):
            loss = values[sample.index]["avg_loss"]
            losses[at] += loss if isinstance(loss, list) else [loss]
    return losses


def their_evaluator(folder: str) -> types.ModuleType:
    """open-unlearning's src/evals/metrics/utils.py alone: its package would load every evaluator that it has."""
    data = types.ModuleType("data.utils")
    data.IGNORE_INDEX = -100
    kept = {name: sys.modules.get(name) for name in ("data", "data.utils")}
    sys.modules.update({"data": types.ModuleType("data"), "data.utils": data})
    try:
        spec = importlib.util.spec_from_file_location("their_utils", Path(folder) / "src/evals/metrics/utils.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, before in kept.items():
            sys.modules.pop(name) if before is None else sys.modules.__setitem__(name, before)
    return module


def step_of(provider: str, settings: Row, model: nn.Module, samples: list[Sample], pad_id: int) -> Any:
    if provider == "open-unlearning":
        evaluator = their_evaluator(settings["open_unlearning"])
        return lambda: theirs(evaluator, model, samples, pad_id)
    return lambda: ours(model, samples, pad_id, provider == "gfast")


def peak(description: str) -> int | None:
    """Bytes beyond the model at the peak of scoring; in a process of its own."""
    settings = json.loads(description)
    model, samples, pad_id = prepared(settings)
    step = step_of(settings["provider"], settings, model, samples, pad_id)
    few = samples[:2]
    step_of(settings["provider"], settings, model, few, pad_id)()  # what is loaded once
    return peak_extra_bytes(step)


def bench(args: argparse.Namespace) -> list[Row]:
    settings = {"config": args.config, "rows": args.rows, "dtype": args.dtype}
    where = {"model": args.model, "data": args.data, "open_unlearning": args.open_unlearning}
    model, samples, pad_id = prepared(settings | where)
    names = [name for name in PROVIDERS if args.open_unlearning or name != "open-unlearning"]
    steps = {name: step_of(name, settings | where, model, samples, pad_id) for name in names}
    losses = {name: step() for name, step in steps.items()}  # the warm-up too
    apart = {
        name: max(abs(a - b) for one, other in zip(losses["gfast"], by_sample, strict=True)
                  for a, b in zip(one, other, strict=True))
        for name, by_sample in losses.items()
    }  # fmt: skip
    # Nats a token. Theirs sums fp32 terms over a strided vocabulary, one by one, which costs it two digits.
    for name, difference in apart.items():
        if difference > ((1e-3 if name == "open-unlearning" else 1e-5) if args.dtype == "fp32" else 0.1):
            sys.exit(f"losses of {name} and gfast differ by up to {difference:.3g} nats a token; nothing was timed")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}  # of all threads: what a neighbour takes is no part
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter(), time.process_time()
            steps[name]()
            seconds[name].append(time.perf_counter() - started[0])
            busy[name].append(time.process_time() - started[1])
    answers = sum(len(sample.answers) for sample in samples)
    tokens = sum(len(ids) for sample in samples for ids, _ in sample.answers)
    del model
    rows = []
    for name in names:
        row: Row = {"provider": name, **summary(seconds[name]), "samples": len(samples), "answers": answers}
        row |= {"tokens": tokens, "largest_difference": apart[name]}
        row["cpu_ms"] = round(1e3 * sorted(busy[name])[len(busy[name]) // 2], 3)
        description = json.dumps(settings | where | {"provider": name})
        if not args.no_memory and (extra := peak_in_fresh_process(peak, description)) is not None:
            row["extra_mb"] = round(extra / 2**20, 1)
        if name == "open-unlearning":
            ours_ms = rows[0]["rounds_ms"]
            ratios = sorted(b / a for a, b in zip(ours_ms, row["rounds_ms"], strict=True))
            rows[0]["less_time"] = round(ratios[len(ratios) // 2], 4)
            rows[0] |= verdict(rows[0]["less_time"], SCORING, at_least=True)
        rows.append(row)
    return rows
