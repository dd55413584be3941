# SPDX-License-Identifier: Apache-2.0
"""`gfast evaluate`: does a model forget, does it keep? Losses, generations, extraction; a log, tables, a page.

    gfast evaluate                                          # a small model taught here, bundled data, no download
    gfast evaluate --model MODEL --data tofu --forget forget10 --retain_log RETAIN_LOG --output_dir evaluation
    gfast evaluate --model MODEL --data wmdp --data_path wmdp

The log has the layout of the published logs of TOFU: one of those, or one written by this command, is the retain log of
another. An evaluation that is killed goes on where it was, to the same numbers bit for bit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.hf_argparser import HfArg

from gfast import metrics
from gfast.commands.arguments import CommandParser, ModelArguments, parse_options
from gfast.commands.common import as_text, device_name, first_day, say, show_log, versions
from gfast.commands.geffect import usable_device
from gfast.commands.models import check_model, load_model, load_tokenizer
from gfast.data import load_jsonl
from gfast.data.encode import writes_date
from gfast.evaluation import Evaluation, EvaluationSet, attacks, encoded, harness, sources
from gfast.evaluation.results import (
    check_retain_log,
    columns_of,
    require_libraries,
    shown,
    summarize,
    table,
    wholes,
    write_results,
)
from gfast.evaluation.run import EXTRACTIONS
from gfast.evaluation.samples import tokens_checksum
from gfast.files import read_json, require_writable, write_json, write_whole
from gfast.locks import claimed
from gfast.metrics import EvaluationLog
from gfast.metrics.log import parse_log
from gfast.metrics.values import required
from gfast.progress import Bar
from gfast.training.fingerprints import model_fingerprint
from gfast.training.records import check_run_folder, write_run_info

SOURCES = ("bundled", "tofu", "jsonl", "muse", "wmdp", "mmlu")
DEMO = "<demo>"  # no name of a model
# Flags that only some data have a use for.
_ONLY_WITH = {
    "data_path": SOURCES[1:],
    "hub_name": ("muse", "wmdp", "mmlu"),
    "retain": ("jsonl",),
    "holdout": ("tofu", "jsonl"),
    "subsets": ("wmdp", "mmlu"),
    "template": SOURCES[:3],  # the others have prompts of their own
    "chat_kwargs": SOURCES[:3],
}


@dataclass
class EvaluateArguments:
    """What to ask of the model."""

    _argument_group_name = "evaluation"

    data: str = HfArg(
        default="bundled",
        help="bundled (a small set of fictitious authors), tofu, jsonl (one's own question/answer lines), muse, "
        "wmdp or mmlu.",
        metadata={"choices": SOURCES},
    )
    data_path: str | None = HfArg(
        default=None, help="Local folder with the data's files; without it they come from the hub."
    )
    hub_name: str | None = HfArg(
        default=None, help="Data set on the hub: muse-bench/MUSE-News, cais/wmdp, cais/mmlu if not given."
    )
    forget: str = HfArg(default="forget10", help="TOFU's forget split, or a JSON lines file.")
    retain: str | None = HfArg(default=None, help="With jsonl: the file of the retain set.")
    holdout: str | None = HfArg(
        default=None, help="Rows like the forget set's that no model saw, for membership inference and PrivLeak."
    )
    subsets: list[str] | None = HfArg(
        default=None, help="Of wmdp and mmlu: configurations; wmdp-bio wmdp-chem wmdp-cyber, all."
    )
    ds_size: int | None = HfArg(
        default=None,
        help="Only the first so many rows of a set, of tofu's of retain and forget; 0: all. If not given, as "
        "many as the retain log has.",
    )
    retain_log: str | None = HfArg(
        default=None, help="Log of the model that never saw the forget set: forget quality needs it."
    )
    extraction: list[str] | None = HfArg(
        default=None, help="Also the paper's extraction strength by free generation: exact, similar, perturbed."
    )
    extraction_samples: int = HfArg(default=50, help="Of how many samples of a set.")
    batch_size: int = HfArg(default=16, help="Samples at a time; it changes results by rounding only.")
    max_new_tokens: int | None = HfArg(default=None, help="Tokens to generate at most; by data if not given.")
    max_length: int | None = HfArg(
        default=None, help="Refuse samples of more tokens; what the model takes if not given."
    )
    template: str = HfArg(default="auto", help="Prompt format: chat, plain, or auto.")
    chat_kwargs: list[str] | None = HfArg(default=None, help="Options of the chat template, as name=value or JSON.")
    relearn: int = HfArg(
        default=0, help="Fine-tune for so many steps on a part of the forget set, and report what comes back."
    )
    relearn_rows: int = HfArg(default=0, help="On the first so many rows of it; a tenth if not given.")
    relearn_data: str | None = HfArg(default=None, help="On a JSON lines file of related data instead.")
    relearn_learning_rate: float = HfArg(default=1e-5, help="Learning rate of the fine-tuning (AdamW).")
    relearn_lora_r: int = HfArg(default=0, help="With LoRA adapters of this rank; 0: all parameters.")
    quantize: str | None = HfArg(
        default=None, help="4bit or 8bit: round the model's weights first, all but the head's."
    )
    quantize_by: str = HfArg(
        default="torchao", help="torchao or bitsandbytes.", metadata={"choices": attacks.QUANTIZERS}
    )
    lm_eval: list[str] | None = HfArg(
        default=None,
        help="Also these tasks of lm-eval (pip install 'gfast[lm-eval]'), as in wmdp mmlu; their data "
        "come from the hub.",
    )
    device: str | None = HfArg(default=None, help="cpu, cuda, cuda:1; a GPU if there is one.")
    output_dir: str = HfArg(default="gfast-evaluation", help="Folder for the log, tables and the page.")

    def __post_init__(self) -> None:
        if self.data not in SOURCES:
            raise ValueError(f"data is {self.data!r}; choose one of {', '.join(SOURCES)}")
        for name, where in _ONLY_WITH.items():
            if getattr(self, name) != getattr(type(self), name) and self.data not in where:
                raise ValueError(f"--{name} has no use with the data {self.data}: it is for {', '.join(where)}")
        for name in ("relearn_rows", "relearn_data", "relearn_lora_r", "relearn_learning_rate"):
            if getattr(self, name) != getattr(type(self), name) and not self.relearn:
                raise ValueError(f"--{name} says how to relearn: give the steps, --relearn STEPS")
        if self.extraction_samples != type(self).extraction_samples and not self.extraction:
            raise ValueError("--extraction_samples says how many are extracted: give the kinds, --extraction exact")
        if self.forget != type(self).forget and self.data not in ("tofu", "jsonl"):
            raise ValueError(f"--forget has no use with the data {self.data}, which has its own forget set")
        for kind in self.extraction or ():
            if kind not in EXTRACTIONS:
                raise ValueError(f"extraction is {kind!r}; choose from {', '.join(EXTRACTIONS)}")
        if self.quantize is not None and self.quantize not in attacks.BITS:
            raise ValueError(f"quantize is {self.quantize!r}; choose one of {', '.join(attacks.BITS)}")
        if self.quantize is None and self.quantize_by != attacks.QUANTIZERS[0]:
            raise ValueError("--quantize_by says how to round: give the bits, --quantize 4bit or 8bit")
        if self.hub_name and self.data_path:
            raise ValueError("--hub_name has no use beside --data_path, where the data are read from")
        if self.relearn and self.quantize:
            raise ValueError("--relearn trains weights, and --quantize rounds them: evaluate one attack at a time")
        if self.relearn and self.data not in ("tofu", "jsonl", "bundled"):
            raise ValueError(f"--relearn learns questions and answers: the data {self.data} has no such forget set")
        numbers = {"batch_size": 1, "extraction_samples": 1, "ds_size": 0, "max_new_tokens": 1, "relearn": 0}
        for name, least in numbers.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give {least} or more")
        self.chat_kwargs = parse_options(self.chat_kwargs)


@dataclass
class EvaluatedModel(ModelArguments):
    """Which model to evaluate."""

    model: str | None = HfArg(
        default=None,
        help="The model: a name on the hub, a local folder, or a PEFT adapter. If not given, a small one that "
        "is taught the bundled data first (half a minute).",
    )

    def __post_init__(self) -> None:
        self.model = self.model or DEMO
        super().__post_init__()
        if self.lora_r:
            raise ValueError("--lora_r has no use here: new adapters change nothing; give --model ADAPTER")


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        [EvaluatedModel, EvaluateArguments],
        "gfast evaluate",
        "Losses, generations and extraction of a model on forget and retain sets: a log, tables and a page.",
    )
    model_arguments, arguments = parser.parse(argv)
    show_log()
    folder = require_writable(arguments.output_dir, model=model_arguments.model is None)
    with claimed(folder):
        try:
            return _evaluate(model_arguments, arguments, folder, list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped. What was measured stays in {folder}; the same command goes on from there."
            ) from None


def _evaluate(model_arguments: ModelArguments, arguments: EvaluateArguments, folder: Path, argv: list[str]) -> int:
    device = usable_device(arguments.device)
    require_libraries(retain_log=arguments.retain_log, holdout=arguments.holdout or arguments.data == "muse")
    retain_log = None if arguments.retain_log is None else metrics.load_log(arguments.retain_log)
    if model_arguments.model == DEMO:
        model_arguments.model = str(_taught(folder / "model"))
    check_model(model_arguments)
    tokenizer = load_tokenizer(model_arguments)
    sets = _sets(arguments, tokenizer, retain_log)
    options = dict(arguments.chat_kwargs)
    if writes_date(tokenizer, arguments.template, options):
        day = options["strftime_now"] = first_day(folder, {"created": time.strftime("%Y-%m-%d")})
        say(f"The chat template may write a date: it is {day}. --chat_kwargs strftime_now={day} fixes it")
    samples = [encoded(eval_set, tokenizer, arguments.template, options, arguments.max_length) for eval_set in sets]
    if retain_log is not None:
        check_retain_log(sets, samples, retain_log)
    plan, related = _plan(arguments, sets)
    if arguments.quantize is not None:
        attacks.require_quantizer(arguments.quantize, arguments.quantize_by)  # before the model is loaded
    if arguments.lm_eval:
        harness.require_tasks(arguments.lm_eval)
    model = load_model(model_arguments).to(device)
    if plan is not None:
        attacks.check_trainable(model, plan)
    kinds = arguments.extraction or ()
    evaluation = Evaluation(sets, samples, tokenizer, arguments.batch_size, kinds, arguments.extraction_samples)
    evaluation.check_model(model)
    # A relearning comes after the evaluation, and says by itself how it was done.
    elsewhere = {"data_path", "device", "output_dir", "retain_log", "lm_eval"}
    elsewhere |= {n for n in vars(arguments) if "relearn" in n}
    settings = {name: value for name, value in asdict(arguments).items() if name not in elsewhere}
    of_model = {"weights": model_fingerprint(model, adapters=True), "dtype": str(model.dtype)}
    settings |= {"chat_kwargs": options, "ends": evaluation.ends_for(model), **of_model}
    if arguments.quantize is not None:
        model = attacks.quantize(model, arguments.quantize, arguments.quantize_by)
    info = _described(str(model_arguments.model), arguments.data, evaluation, settings, argv)
    check_run_folder(folder, info)
    write_run_info(folder, info | {"device": device_name(device)})
    results = _run(evaluation, model, folder, f"{of_model['weights']} {arguments.quantize} {arguments.quantize_by}")
    source = {
        "model": info["model"],
        "template": arguments.template,
        "dtype": str(model.dtype),
        "weights": settings["weights"],
    }
    log = evaluation.log(results, Path(info["model"]).name, source)
    shown_settings = {key: info[key] for key in ("model", "data", "samples", "versions")}
    shown_settings |= {"template": arguments.template, "dtype": source["dtype"]}
    shown_settings |= {"max_new_tokens": {eval_set.name: eval_set.generate for eval_set in sets if eval_set.generate}}
    report(folder, log, retain_log, shown_settings | ({"weights": arguments.quantize} if arguments.quantize else {}))
    if arguments.lm_eval:
        print(harness.evaluated(model, tokenizer, arguments.lm_eval, arguments.batch_size, folder))
    if plan is not None:
        _relearned(model, tokenizer, sets, plan, related, arguments, options, folder)
    return 0


def _described(
    model: str, data: str, evaluation: Evaluation, settings: dict[str, Any], argv: list[str]
) -> dict[str, Any]:
    """run.json: of what the evaluation is, and how it asks."""
    asked = list(zip(evaluation.sets, evaluation.samples, strict=True))
    rows = {f"the set {eval_set.name} ({eval_set.config})": eval_set.checksum() for eval_set, _ in asked}
    tokens = {
        f"the set {eval_set.name} as token ids (tokenizer, template, questions in front)": tokens_checksum(samples)
        for eval_set, samples in asked
    }
    return as_text(
        {
            "model": model,
            "data": f"{data}: {', '.join(eval_set.config for eval_set, _ in asked)}",
            "samples": {eval_set.name: len(samples) for eval_set, samples in asked},
            "data_sha256": rows | tokens,
            "argv": ["gfast", "evaluate", *argv],
            "versions": versions(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": {"command": "evaluate", **settings},
        }
    )


def _plan(arguments: EvaluateArguments, sets: list[EvaluationSet]) -> tuple[attacks.Relearning | None, Any]:
    """How to relearn, and on which related data; ValueError, before any pass, where it cannot be done."""
    if not arguments.relearn:
        return None, None
    plan = attacks.Relearning(
        arguments.relearn, arguments.relearn_rows, arguments.relearn_learning_rate, lora_r=arguments.relearn_lora_r
    )
    if plan.lora_r:
        required("peft", "peft", "--relearn_lora_r")
    related = None if arguments.relearn_data is None else load_jsonl(arguments.relearn_data)
    attacks.split(_forget(sets), plan, related)
    return plan, related


def _forget(sets: list[EvaluationSet]) -> EvaluationSet:
    return next(eval_set for eval_set in sets if eval_set.name == "forget")


def _relearned(
    model: nn.Module,
    tokenizer: Any,
    sets: list[EvaluationSet],
    plan: attacks.Relearning,
    related: Any,
    arguments: EvaluateArguments,
    options: dict[str, Any],
    folder: Path,
) -> None:
    """Relearn, unless the folder holds the result of the same relearning, and print the curve."""
    path, asked = folder / "relearn.json", json.loads(json.dumps([asdict(plan), related]))
    relearned = read_json(path) if path.exists() else None
    if relearned is None or relearned.get("asked") != asked:
        say(f"Relearning: {plan.steps} steps, learning rate {plan.learning_rate:g}")
        relearned = attacks.relearn(model, tokenizer, _forget(sets), plan, folder / "relearning", data=related,
                                    template=arguments.template, chat_kwargs=options,
                                    batch_size=arguments.batch_size)  # fmt: skip
        write_json(path, relearned | {"asked": asked})
    print(attacks.curve_table(relearned))
    write_whole(folder / "relearn.md", attacks.curve_table(relearned))


def report(folder: Path, log: dict[str, Any], retain_log: EvaluationLog | None, settings: dict[str, Any]) -> None:
    """Files, page and table of a log."""
    from gfast.report.evaluation import write_page

    read = parse_log(log, str(folder / "log.json"))
    summary = summarize(read, retain_log)
    write_results(folder, log, summary)
    keys = [("set", "Set"), *columns_of(summary)]
    rows = [
        {"set": name, **{key: shown(values.get(key)) for key, _ in keys[1:]}}
        for name, values in summary["sets"].items()
    ]
    page = write_page(folder, read, retain_log, keys, rows, wholes(summary), settings)
    print(table(summary))
    say(f"Log, samples, tables: {folder}. Page: {page.resolve()}")


def _run(evaluation: Evaluation, model: nn.Module, folder: Path, weights: str) -> dict[str, list[dict[str, Any]]]:
    units = evaluation.units()
    total = sum(len(unit.places) for unit in units)
    with Bar(total=total, unit="sample") as bar:

        def done(unit: Any) -> None:
            bar.say(f"{evaluation.sets[unit.at_set].name}, {unit.kind}")
            bar.update(len(unit.places))

        return evaluation.run(model, folder, units, done, weights)


def _sets(arguments: EvaluateArguments, tokenizer: Any, retain_log: EvaluationLog | None) -> list[EvaluationSet]:
    size = arguments.ds_size or 0
    path = arguments.data_path
    if arguments.data == "tofu":
        sets = sources.tofu(arguments.forget, path, size, arguments.holdout)
    elif arguments.data == "bundled":
        sets = sources.bundled(size)
    elif arguments.data == "jsonl":
        files = {name: getattr(arguments, name) for name in ("retain", "forget", "holdout")}
        sets = sources.jsonl({name: file for name, file in files.items() if file}, path, size)
    elif arguments.data == "muse":
        sets = sources.muse(arguments.hub_name or "muse-bench/MUSE-News", path, tokenizer, size)
    else:
        hub, known = ("cais/wmdp", sources.WMDP) if arguments.data == "wmdp" else ("cais/mmlu", ("all",))
        names = arguments.subsets or known
        sets = [sources.choices(n, arguments.hub_name or hub, n, path, tokenizer, size) for n in names]
    if arguments.ds_size is None and retain_log is not None:
        sets = [sources.as_logged(eval_set, retain_log) for eval_set in sets]
    if arguments.max_new_tokens is not None:
        sets = [
            replace(eval_set, generate=arguments.max_new_tokens) if eval_set.generate else eval_set for eval_set in sets
        ]
    return sets


def _taught(folder: Path) -> Path:
    """The demo's small model, taught the bundled authors: an earlier call's, if the folder holds one."""
    from gfast.demo import Study
    from gfast.demo_plan import SMALL, Plan

    plan = Plan(**SMALL | dict(forget_rows=40, retain_rows=160, learned_below=0.3))
    if not folder.exists():
        say("No --model: a small one is taught the bundled authors first")
    Study(plan, folder.parent, cpu=True).learn()
    return folder
