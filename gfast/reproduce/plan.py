# SPDX-License-Identifier: Apache-2.0
"""From a recipe to its steps: data -> teach -> retain model -> unlearn, evaluate, calibrate -> ablations."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gfast.commands.common import say
from gfast.commands.models import DECIDING, check_model, find_adapter, load_tokenizer
from gfast.data.encode import writes_date
from gfast.evaluation.results import require_libraries
from gfast.files import read_json, write_json
from gfast.objectives.registry import parse_objective
from gfast.reproduce import work
from gfast.reproduce.recipe import Data, Evaluated, Load, Recipe, objective_flags, processes_of
from gfast.reproduce.steps import Checksums, Step

# Folders of the trainings that are what a study is about: one that diverges is an outcome.
RUNS = ("runs/", "sizes/", "grid/runs/")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "config.json", "adapter_config.json")
# What a run of a study has no use for, unless its recipe says otherwise.
QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
# Of the flags of a training, what changes nothing but what is seen or saved of it.
SHOWN_ONLY = (
    "disable_tqdm", "report_to", "logging_strategy", "logging_steps", "save_strategy", "save_steps", "save_only_model",
    "save_total_limit",
)  # fmt: skip


class Plan:
    """The steps of a recipe over a folder. Everything that can be checked before any work is checked here.

    Errors: those of data, flags, model and tokenizer, naming the step; ImportError for a library that is missing.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out, self.checksum = recipe, out, Checksums(out)
        self.steps: list[Step] = []
        self.sizes: dict[str, tuple[int, int]] = {}  # name of data -> rows to forget, to retain
        first = recipe.seeds[0]
        sets = []
        if recipe.evaluate is not None:
            require_libraries(retain_log=True)
            sets = work.evaluation_sets(recipe.data, recipe.evaluate)
        self.scored = any(eval_set.name == "forget" and eval_set.perturbed for eval_set in sets)
        self.asker = work.Asker(recipe, sets, recipe.chat_kwargs)
        self._data(recipe.data)
        self.base = self._base()
        self._fix_date()
        if sets:
            # every row can be asked, before hours of work show that one cannot
            self.asker.evaluation(self.tokenizer).check_lengths(self.config)
        self.taught = self._teach("taught", "full.jsonl", "both sets are taught to the model")
        self._evaluate("taught", self.taught, None)
        self.retain = None
        if recipe.retain_model and recipe.teach is not None:
            self.retain = self._teach("retain-model", "retain.jsonl", "the retain set alone is taught to the model")
            self._evaluate("retain-model", self.retain, None)
        for name in recipe.objectives:
            for seed in recipe.seeds:
                run = self._unlearn(f"runs/{name}/seed{seed}", name, recipe.objectives[name], seed, recipe.data)
                self._evaluate(f"{name}/seed{seed}", run, self._retain_log())
                if recipe.calibrate:
                    self._calibrate(f"{name}/seed{seed}", run)
        if recipe.grid:
            self._grid(first)
        for changes in recipe.sizes.data if recipe.sizes else ():
            data = recipe.with_size(changes)
            self._data(data)
            for name in recipe.sizes.objectives:
                self._unlearn(f"sizes/{data.name}/{name}", name, recipe.objectives[name], first, data)

    def _add(self, step: Step) -> str:
        if step.name not in {known.name for known in self.steps}:
            self.steps.append(step)
        return step.name

    def _data(self, data: Data) -> None:
        forget, retain = work.data_rows(data)
        self.sizes[data.name] = len(forget), len(retain)
        inputs = {"rows": {name: _sum(rows) for name, rows in (("forget", forget), ("retain", retain))}}
        what = f"{len(forget)} rows to forget, {len(retain)} to retain"
        run = partial(work.write_data, forget, retain)
        self._add(Step(f"data/{data.name}", what, inputs, (), work.DATA_FILES, run))

    def _base(self) -> str:
        """The model that is taught: a step's, a folder or a name."""
        recipe = self.recipe
        if isinstance(recipe.model, dict):
            from gfast.data import demo_tokenizer

            self.tokenizer, self.config = demo_tokenizer(), work.fresh_config(recipe.model)
            run = partial(work.fresh_model, recipe.model, recipe.seeds[0])
            inputs = {"sizes": recipe.model, "seed": recipe.seeds[0]}
            return self._add(Step("model", "a small Llama with random weights", inputs, (), WEIGHTS, run))
        arguments = self.asker.arguments(recipe.model)
        if recipe.calibrate and find_adapter(arguments) is not None:
            raise ValueError(
                f"calibrate mixes whole weights, and {recipe.model} is an adapter: merge it into its base first "
                "(PEFT's merge_and_unload), or leave calibrate out"
            )
        self.config = check_model(arguments)
        self.tokenizer = load_tokenizer(arguments)
        return recipe.model

    def _fix_date(self) -> None:
        """A chat template that writes today's date writes one date in all steps, however long they take."""
        options = self.asker.chat_kwargs
        if writes_date(self.tokenizer, self.recipe.template, options):
            path = self.out / "steps" / "date.json"
            if not path.exists():
                write_json(path, {"date": time.strftime("%Y-%m-%d")})
            options["strftime_now"] = read_json(path)["date"]
            say(f"The chat template may write a date: it is {options['strftime_now']} in all steps")

    def _model(self, model: str) -> tuple[str, tuple[str, ...], dict[str, Any]]:
        """Where a model is, the step that makes it, and what else decides it: the files of a folder, or a name."""
        if any(step.name == model for step in self.steps):
            return str(self.out / model), (model,), {}
        folder = Path(model)
        if not folder.is_dir():
            return model, (), {"model": model}
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(DECIDING))
        return model, (), {"model": {path.name: self.checksum(path) for path in files}}

    def _training(
        self,
        name: str,
        what: str,
        model: str,
        flags: Mapping[str, Any],
        data: Data,
        files: str,
        keep: int | None = None,
        along: int = 0,
    ) -> str:
        """A step that is one `gfast unlearn`. keep: step of a checkpoint that stays. along: evaluate every so many."""
        recipe = self.recipe
        where, needs, decides = self._model(model)
        rows = self.sizes[data.name]
        count = {"forget.jsonl": rows[0], "retain.jsonl": rows[1], "full.jsonl": sum(rows)}[files]
        load = {key: value for key, value in asdict(self.asker.arguments(where)).items() if value is not None}
        loading = {key: load[key] for key in ("tokenizer", "gguf_file", "attn_implementation", "dtype") if key in load}
        if load["trust_remote_code"]:
            loading["trust_remote_code"] = True
        settings = {
            **QUIET,
            **steps_of(dict(flags), count, processes_of(recipe.launch) or 1),
            **loading,
            "template": recipe.template,
        }
        settings["chat_kwargs"] = self.asker.chat_kwargs or None
        settings = {key: value for key, value in settings.items() if value is not None}
        folder = self.out / "data" / data.name
        places = {"model": where, "data": "jsonl", "data_path": folder, "forget": files, "retain": "retain.jsonl"}
        whole = {**places, **settings}
        self._check(name, whole)
        command = shlex.join(["gfast", "unlearn", *work.words(whole), "--output_dir", str(self.out / name)])
        deciding = {key: value for key, value in settings.items() if key not in SHOWN_ONLY}
        inputs = {"flags": {**deciding, "forget": files}, **decides}
        checkpoint = f"checkpoint-{keep}" if keep is not None else ""
        run = partial(work.train, whole, launch=recipe.launch, checkpoint=checkpoint,
                      may_diverge=name.startswith(RUNS))  # fmt: skip
        if keep is not None:
            inputs["keeps"] = checkpoint
        if along:
            inputs["evaluated"] = {"every": along, **self._asked()}
            run = partial(run, along=partial(self.asker.along, name, along))
        makes = (*WEIGHTS, f"{checkpoint}/*.safetensors") if checkpoint else WEIGHTS
        return self._add(Step(name, what, inputs, (*needs, f"data/{data.name}"), makes, run, command))

    def _check(self, name: str, flags: Mapping[str, Any]) -> None:
        """The errors that the flags would have, now."""
        from gfast.commands.unlearn import parsed

        try:
            *_, config = parsed([*work.words(flags), "--output_dir", str(self.out / name)])
            config.build_objective()
        except (ValueError, ImportError) as error:
            raise ValueError(f"{name}: {str(error).removeprefix('gfast: ')}") from error

    def _teach(self, name: str, files: str, what: str) -> str:
        if self.recipe.teach is None:
            return self.base
        flags = {"objective": "NLL", "seed": self.recipe.seeds[0], "record_every": 0, **self.recipe.teach}
        return self._training(name, what, self.base, flags, self.recipe.data, files)

    def _unlearn(self, step: str, name: str, flags: Mapping[str, Any], seed: int, data: Data) -> str:
        both = {**self.recipe.unlearn, **flags, "seed": seed}
        grid, evaluated = self.recipe.grid, self.recipe.evaluate
        along = evaluated.along if evaluated is not None and step.startswith("runs/") else 0
        every, keep = along, None
        if grid and step == f"runs/{grid.run}/seed{self.recipe.seeds[0]}":
            count = self.sizes[data.name][0]
            last = steps_of(dict(both), count, processes_of(self.recipe.launch) or 1).get("max_steps")
            if last is not None and 0 < int(last) < grid.step:
                raise ValueError(f"grid.step is {grid.step}, and the runs of {grid.run} have {last} steps")
            every, keep = math.gcd(along, grid.step), grid.step
        if every:
            # A recipe that saves checkpoints to go on from keeps them whole.
            whole = both.get("save_strategy") == "steps"
            every = math.gcd(every, int(both.get("save_steps", 500))) if whole else every
            both |= {"save_strategy": "steps", "save_steps": every, "save_only_model": not whole}
            both["save_total_limit"] = None
        shown = f"{name}: {_short(flags)}, seed {seed}" + ("" if data == self.recipe.data else f", {data.name}")
        return self._training(step, shown, self.taught, both, data, "forget.jsonl", keep, along)

    def _retain_log(self) -> str | None:
        return "evaluations/retain-model" if self.retain and self.scored else None

    def _evaluate(self, name: str, model: str, retain_log: str | None) -> None:
        recipe = self.recipe
        if recipe.evaluate is None:
            return
        where, needs, decides = self._model(model)
        inputs = {**self._asked(), **self._load(), **decides}
        needs += (retain_log,) if retain_log else ()
        log = self.out / retain_log if retain_log else None

        def run(folder: Path) -> None:
            ask = partial(self.asker.evaluate, name, where, folder, log)
            work.unless_diverged(self.out / model, ask) if model.startswith(RUNS) else ask()

        self._add(Step(f"evaluations/{name}", "evaluate", inputs, needs, ("log.json",), run))

    def _asked(self) -> dict[str, Any]:
        """What decides an evaluation, but for the model."""
        asked = {key: value for key, value in asdict(self.recipe.evaluate).items() if key != "along"}
        return {
            "asked": asked, "template": self.recipe.template, "chat_kwargs": self.asker.chat_kwargs,
            "rows": {eval_set.name: eval_set.checksum() for eval_set in self.asker.sets},
        }  # fmt: skip

    def _load(self) -> dict[str, Any]:
        """How models are loaded and asked, where it is not the usual way: it decides the numbers too."""
        recipe = self.recipe
        inputs = {"load": asdict(recipe.load)} if recipe.load != Load() else {}
        return inputs | ({"tokenizer": recipe.tokenizer} if recipe.tokenizer else {})

    def _calibrate(self, name: str, unlearned: str) -> None:
        taught, needs, decides = self._model(self.taught)
        plan, log = self.recipe.calibrate, self._retain_log()
        inputs = {**asdict(plan), **self._asked(), **self._load(), **decides}

        def run(folder: Path) -> None:
            retain_log, other = self.out / log if log else None, self.out / unlearned
            calibrate = partial(self.asker.calibrate, name, taught, str(other), plan, folder, retain_log)
            work.unless_diverged(other, calibrate)

        needs += (unlearned, *((log,) if log else ()))
        makes = ("calibration.json", "log.json")
        what = f"mix with the taught weights until {plan.metric.replace('_', ' ')} of retain is {plan.keep:g} of it"
        self._add(Step(f"calibrated/{name}", what, inputs, needs, makes, run))

    def _grid(self, seed: int) -> None:
        """One measurement of token effects for all parameters, and a real run for each."""
        grid, recipe = self.recipe.grid, self.recipe
        taught, needs, decides = self._model(self.taught)
        source = f"runs/{grid.run}/seed{seed}"
        samples = recipe.unlearn.get("geffect_samples", 0)
        flags = {"per": "token", "objectives": list(grid.objectives), "max_forget": samples, "max_retain": samples,
                 "template": recipe.template, "chat_kwargs": self.asker.chat_kwargs or None, "step": grid.step,
                 "batch_size": (recipe.evaluate or Evaluated()).batch_size, "dtype": recipe.load.dtype}  # fmt: skip
        if recipe.unlearn.get("use_cpu"):
            flags["device"] = "cpu"
        places = {"model": self.out / source / f"checkpoint-{grid.step}", "reference_model": taught, "data": "jsonl",
                  "data_path": self.out / "data" / recipe.data.name, "forget": "forget.jsonl",
                  "retain": "retain.jsonl"}  # fmt: skip
        whole = {key: str(value) if isinstance(value, Path) else value for key, value in {**places, **flags}.items()}
        command = shlex.join(["gfast", "geffect", *work.words(whole), "--output_dir", str(self.out / "grid/effects")])
        what = f"token effects at step {grid.step} of {grid.run}: {len(grid.objectives)} settings from one measurement"
        needs += (source, f"data/{recipe.data.name}")

        def run(folder: Path) -> None:
            work.unless_diverged(self.out / source, partial(work.effects, whole, folder))

        self._add(Step("grid/effects", what, {"flags": flags, **decides}, needs, ("geffect.json",), run, command))
        for text, run_of in self.grid_runs().items():
            if run_of.startswith("grid/"):
                flags = objective_flags(text, f"grid.objectives {text}")
                self._unlearn(run_of, text, flags, seed, recipe.data)

    def grid_runs(self) -> dict[str, str]:
        """The settings of the grid and the run of each: one of the recipe's own where it is the same."""
        known = {}
        for name, flags in self.recipe.objectives.items():
            if set(flags) <= {"objective", "objective_args"}:
                setting = f"{flags['objective']}:{','.join(flags.get('objective_args', ()))}"
                known[str(parse_objective(setting))] = f"runs/{name}/seed{self.recipe.seeds[0]}"
        folders = {}
        for text in self.recipe.grid.objectives if self.recipe.grid else ():
            label = str(parse_objective(text))
            folders[text] = known.get(label, f"grid/runs/{re.sub('[^A-Za-z0-9.]+', '-', label).strip('-')}")
        return folders


def steps_of(flags: dict[str, Any], rows: int, processes: int = 1) -> dict[str, Any]:
    """`epochs` and `warmup_epochs` as max_steps and warmup_steps: whole optimizer steps, as the published code counts
    them (arXiv 2401.06121, 2502.19301): what is left of the last pass over the data is dropped. A step takes a batch of
    each process.

    >>> steps_of({"epochs": 5, "warmup_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    ...          | {"learning_rate": 1e-5}, 200) | {"per_device_train_batch_size": 4}
    {'per_device_train_batch_size': 4, 'gradient_accumulation_steps': 4, 'learning_rate': 1e-05, 'max_steps': 62, \
'warmup_steps': 12}
    """
    batch = int(flags.get("per_device_train_batch_size", 8)) * int(flags.get("gradient_accumulation_steps", 1))
    batch *= processes
    epochs, warmup = flags.pop("epochs", None), flags.pop("warmup_epochs", None)
    if epochs is not None:
        flags["max_steps"] = max(1, int(float(epochs) * rows) // batch)
    if warmup is not None:
        flags["warmup_steps"] = max(1, int(float(warmup) * rows) // batch)
    return flags


def _short(flags: Mapping[str, Any]) -> str:
    arguments = ", ".join(flags.get("objective_args", ()))
    retain = flags.get("retain_term")
    return f"{flags['objective']}({arguments})" + (f" + {retain}" if retain else "")


def _sum(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
