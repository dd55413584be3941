# SPDX-License-Identifier: Apache-2.0
"""What the steps of a study do: data, models, trainings, evaluations, calibrations."""

from __future__ import annotations

import contextlib
import gc
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gfast.commands.arguments import ModelArguments
from gfast.commands.common import rows_of, say
from gfast.commands.models import load_model, load_tokenizer
from gfast.data import bundled_authors
from gfast.errors import NotFinite
from gfast.evaluation import Evaluation, EvaluationSet, encoded, sources
from gfast.evaluation.results import read_summaries, summarize, write_results, write_summaries
from gfast.files import read_json, write_json, write_whole
from gfast.metrics import load_log
from gfast.metrics.log import LOG_FILE, parse_log
from gfast.progress import Bar
from gfast.reproduce.recipe import Calibration, Data, Evaluated, Recipe
from gfast.sides import SETS, SIDES
from gfast.training.records import DIVERGED, read_diverged, read_records, write_diverged
from gfast.training.resume import room_for
from gfast.words import did_you_mean

DATA_FILES = ("forget.jsonl", "retain.jsonl", "full.jsonl")


def data_rows(data: Data) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to forget and to retain. Errors of the files say where; ValueError for none."""
    if data.source == "bundled":
        forget, retain = bundled_authors(data.forget_authors)
    else:
        forget, retain = (rows_of(data.source, data.path, name) for name in (data.forget, data.retain))
    forget, retain = forget[: data.max_forget or None], retain[: data.max_retain or None]
    for name, rows in (("forget", forget), ("retain", retain)):
        if not rows:
            raise ValueError(f"the {name} set of {data.name} has no rows")
    return forget, retain


def write_data(forget: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The sets as JSON lines, and both together, retain first as in TOFU's `full`."""
    for name, rows in zip(DATA_FILES, (forget, retain, [*retain, *forget]), strict=True):
        write_whole(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def evaluation_sets(data: Data, options: Evaluated) -> list[EvaluationSet]:
    """What every model is asked: of the rows that it was taught, and of TOFU's other sets."""
    places, limits = (data.forget, data.retain, data.path), dict(max_forget=data.max_forget, max_retain=data.max_retain)
    sets = sources.trained(data.source, *places, options.rows, **limits, forget_authors=data.forget_authors)
    if options.max_new_tokens is not None:
        sets = [replace(eval_set, generate=options.max_new_tokens) for eval_set in sets]
    return sets


def fresh_config(sizes: Mapping[str, Any]) -> Any:
    """Of a Llama of these sizes with the bundled tokenizer. ValueError for a size that it has not."""
    from transformers import LlamaConfig

    from gfast.data import demo_tokenizer

    known = LlamaConfig().to_dict()
    for name in sizes:
        if name not in known:
            raise ValueError(f"there is no size model.{name}{did_you_mean(str(name), known)} (LlamaConfig has them)")
    tokenizer = demo_tokenizer()
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        return LlamaConfig(**{"vocab_size": len(tokenizer), **tokens, **sizes})
    except Exception as error:  # of libraries that check configurations
        raise ValueError(f"model is no Llama: {' '.join(str(error).split())[:200]}") from error


def fresh_model(sizes: Mapping[str, Any], seed: int, folder: Path) -> None:
    """A Llama of these sizes with random weights, and the bundled tokenizer."""
    from transformers import LlamaForCausalLM

    from gfast.data import demo_tokenizer

    torch.manual_seed(seed)
    model = LlamaForCausalLM(fresh_config(sizes))
    with room_for(folder, "the model is made again"):
        model.save_pretrained(folder)
        demo_tokenizer().save_pretrained(folder)


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them.

    >>> words({"seed": 1, "objective_args": ["alpha=1", "beta=2"], "stop": None})
    ['--seed', '1', '--objective_args', 'alpha=1', 'beta=2']
    """
    arguments = []
    for name, value in flags.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        several = value if isinstance(value, (list, tuple)) else [value]
        arguments += [f"--{name}", *(str(value_of_flag) for value_of_flag in several)] if value is not None else []
    return arguments


def train(
    flags: Mapping[str, Any],
    folder: Path,
    launch: str | None,
    checkpoint: str,
    along: Callable[[Path], None] | None = None,
    may_diverge: bool = False,
) -> None:
    """`gfast unlearn` with these flags; what it prints goes to a file. `along` is done with its checkpoints, of which
    that of this name stays. may_diverge: a model that became one of NaN is what came out, and no error.
    """
    (folder / DIVERGED).unlink(missing_ok=True)
    try:
        _unlearn(flags, folder, launch)
    except (NotFinite, RuntimeError):  # the second of processes of their own
        if not may_diverge or read_diverged(folder) is None:
            raise
    diverged = _not_finite(folder) if may_diverge else None
    if diverged is not None:
        write_diverged(folder, *diverged)
    if along is not None:
        free()
        unless_diverged(folder, partial(along, folder))
    # Large, and of use to this run only.
    for path in (folder / "reference", *folder.glob("checkpoint-*")):
        if path.name != checkpoint:
            shutil.rmtree(path, ignore_errors=True)
    free()


def _unlearn(flags: Mapping[str, Any], folder: Path, launch: str | None) -> None:
    argv = [*words(flags), "--output_dir", str(folder)]
    if launch:
        command = [*shlex.split(launch), "-m", "gfast.cli", "unlearn", *argv]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise RuntimeError(f"`{shlex.join(command)}` ended with {code}; what it printed says why")
    else:
        from gfast.commands import unlearn

        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "printed.txt", "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            unlearn.main(argv)


def _not_finite(folder: Path) -> tuple[int, str] | None:
    """The first step at which an NLL of a run's records is not finite, and what it is; None where all are."""
    records = read_records(folder)
    risks = records[(records["quantity"] == "risk") & ~np.isfinite(records["value"])]
    if not len(risks):
        return None
    first = risks.iloc[0]
    of = dict(zip(SIDES, SETS, strict=True))[first["side"]]
    return int(first["step"]), f"the NLL of the {of} set is {first['value']}"


def unless_diverged(run: Path, measure: Callable[[], Any]) -> None:
    """Measure what became of a run. Nothing of one that diverged; what gives no finite number shows that it did."""
    if read_diverged(run) is None:
        try:
            measure()
        except NotFinite as error:
            write_diverged(run, read_json(run / "result.json")["steps"], str(error))


def effects(flags: Mapping[str, Any], folder: Path) -> None:
    """`gfast geffect` with these flags."""
    from gfast.commands import geffect

    with contextlib.redirect_stdout(sys.stderr):
        geffect.main([*words(flags), "--output_dir", str(folder)])
    free()


def free() -> None:
    """Give the memory of models that are gone back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Asker:
    """Evaluates the models of one study: the same sets, prompts and settings for all."""

    def __init__(self, recipe: Recipe, sets: Sequence[EvaluationSet], chat_kwargs: Mapping[str, Any]) -> None:
        self.recipe, self.sets, self.chat_kwargs = recipe, list(sets), dict(chat_kwargs)

    def load(self, model: str) -> nn.Module:
        """A model where it is to be evaluated."""
        device = "cuda" if torch.cuda.is_available() and not self.recipe.unlearn.get("use_cpu") else "cpu"
        return load_model(self.arguments(model)).to(device)

    def arguments(self, model: str) -> ModelArguments:
        """How `gfast unlearn` would be told of a model."""
        load, of_recipe = self.recipe.load, model == self.recipe.model
        return ModelArguments(
            model=model,
            tokenizer=self.recipe.tokenizer if of_recipe else None,
            gguf_file=self.recipe.gguf_file if of_recipe else None,
            dtype=load.dtype,
            attn_implementation=load.attn_implementation,
            trust_remote_code=load.trust_remote_code,
        )

    def evaluation(self, tokenizer: Any) -> Evaluation:
        """What every model is asked, as this tokenizer writes it. Errors name the row that cannot be asked."""
        samples = [encoded(eval_set, tokenizer, self.recipe.template, self.chat_kwargs) for eval_set in self.sets]
        asked = self.recipe.evaluate
        return Evaluation(self.sets, samples, tokenizer, asked.batch_size, asked.extraction, asked.extraction_samples)

    def evaluate(
        self, name: str, model: str, folder: Path, retain_log: Path | None, weights: nn.Module | None = None
    ) -> dict[str, Any]:
        """Log and numbers of a model (weights: that which is loaded already), in `folder`; what is there already is
        not measured again.
        """
        tokenizer = load_tokenizer(self.arguments(model))
        evaluation = self.evaluation(tokenizer)
        loaded = self.load(model) if weights is None else weights
        evaluation.check_model(loaded)
        units = evaluation.units()
        with Bar(f"Evaluating {name}", len(units)) as bar:
            results = evaluation.run(loaded, folder, units, lambda unit: bar.update())
        log = evaluation.log(results, name, {"dtype": str(next(loaded.parameters()).dtype)})
        summary = summarize(
            parse_log(log, str(folder / LOG_FILE)), None if retain_log is None else load_log(retain_log)
        )
        write_results(folder, log, summary)
        del loaded
        free()
        return summary

    def along(self, name: str, every: int, folder: Path) -> None:
        """Evaluate the checkpoints of a run that are before its end: numbers by step in `evaluations/summaries.json`,
        where the report of a run looks for them.
        """
        there, end = folder / "evaluations", read_json(folder / "result.json")["steps"]
        summaries = read_summaries(there)
        for step in range(every, end, every):
            if step not in summaries:
                checkpoint = f"checkpoint-{step}"
                summaries[step] = self.evaluate(
                    f"{name} at step {step}", str(folder / checkpoint), there / checkpoint, None
                )
                write_summaries(there, summaries)

    def calibrate(
        self, name: str, taught: str, unlearned: str, plan: Calibration, folder: Path, retain_log: Path | None
    ) -> None:
        """Mix, find the largest share that keeps the retain set, and evaluate that mixture."""
        tokenizer = load_tokenizer(self.arguments(taught))
        retain = next(eval_set for eval_set in self.sets if eval_set.name == "retain")
        samples = [encoded(retain, tokenizer, self.recipe.template, self.chat_kwargs)]
        retain = replace(retain, generate=0)  # the losses say whether it is kept
        evaluation = Evaluation([retain], samples, tokenizer, self.recipe.evaluate.batch_size)
        model, other = self.load(taught), load_model(self.arguments(unlearned))
        original = {key: value.detach().clone() for key, value in model.named_parameters()}
        changed = dict(other.named_parameters())

        def measured(share: float) -> float:
            mix(model, original, changed, share)
            log = evaluation.log(evaluation.run(model), name, {})
            return float(summarize(parse_log(log))["sets"]["retain"][plan.metric])

        whole = measured(0.0)
        if not whole:
            what = plan.metric.replace("_", " ")
            say(f"{name}: {what} of the retain set is 0 before unlearning, which every mixture keeps: not calibrated. "
                "Teach longer, or take another calibrate.metric")  # fmt: skip
            values = {"share": None, "metric": plan.metric, "level": 0.0, "curve": [(0.0, whole)], "sets": {}}
            write_json(folder / "calibration.json", values)
            return
        curve: list[tuple[float, float]] = []
        for share in shares(plan.resolution):
            curve.append((share, measured(share) if share else whole))
            if curve[-1][1] >= plan.keep * whole:
                break
        share = curve[-1][0]
        mix(model, original, changed, share)
        del other
        original.clear(), changed.clear()
        summary = self.evaluate(name, taught, folder, retain_log, model)
        values = {"share": share, "metric": plan.metric, "level": plan.keep * whole, "curve": curve}
        write_json(folder / "calibration.json", values | {"sets": summary["sets"]})


def shares(resolution: float) -> list[float]:
    """1, 1 - resolution, ..., 0.

    >>> shares(0.4)
    [1.0, 0.6, 0.2, 0.0]
    """
    count = int(1 / resolution + 1e-9)
    mixes = [round(1 - at * resolution, 12) for at in range(count + 1)]
    return mixes if mixes[-1] == 0 else [*mixes, 0.0]


@torch.no_grad()
def mix(model: nn.Module, first: Mapping[str, Any], second: Mapping[str, Any], share: float) -> None:
    """Parameters (1 - share) first + share second, computed in fp32 at least; at 0 and 1 bit for bit those of one."""
    for name, parameter in model.named_parameters():
        a, b = first[name], second[name]
        if a.shape != b.shape:
            raise ValueError(f"gfast: {name} has other sizes in the two models: {tuple(a.shape)} and {tuple(b.shape)}")
        wide = torch.promote_types(a.dtype, torch.float32)
        parameter.copy_(torch.lerp(a.to(wide), b.to(a.device, wide), share))
