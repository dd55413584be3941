# SPDX-License-Identifier: Apache-2.0
"""What an evaluation comes to: numbers by set, the numbers of the whole, and the files that hold them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gfast import metrics
from gfast.evaluation.samples import EvaluationSet, Sample, tokens_checksum
from gfast.files import read_json, write_json, write_whole
from gfast.metrics import EvaluationLog
from gfast.metrics.answers import MEANS, UTILITY_SETS
from gfast.metrics.log import LOG_FILE, LogSet
from gfast.metrics.quality import check_comparable, say_other_tokens
from gfast.metrics.values import required

# Of a set: name in the summary, heading of the table, and a plain mean of a field of the log where it is one.
SET_COLUMNS = (
    ("samples", "Samples", None),
    ("nll", "NLL per token", None),
    ("probability", "Probability", None),
    ("rougeL_recall", "ROUGE-L recall", "rougeL_recall"),
    ("rougeL_f1", "ROUGE-L F1", "rougeL_f1"),
    ("truth_ratio", "Truth ratio", None),
    ("extraction_strength", "Extraction strength", "extraction_strength"),
    ("exact_memorization", "Exact memorization", "exact_memorization"),
    ("accuracy", "Accuracy", "right_choice"),
    ("generations_cut", "Generations cut", None),
)

SUMMARIES = "summaries.json"

# What PrivLeak compares.
LEAK = {"forget", "holdout"}


def require_libraries(retain_log: Any = None, holdout: Any = None) -> None:
    """ImportError, before any work, that says what to install where a library is missing that the numbers will need."""
    required("rouge_score.rouge_scorer", "rouge-score", "an evaluation")
    required("scipy.stats", "scipy", "model utility" if retain_log is None else "forget quality")
    if holdout:
        required("sklearn.metrics", "scikit-learn", "the AUC of membership inference")


def summarize(log: EvaluationLog, retain_log: EvaluationLog | None = None) -> dict[str, Any]:
    """The numbers of a log, JSON-ready; a metric that the log has no data for is left out.

    `sets`: of each set, means over its samples (NLL over its tokens). `model_utility`, `forget_quality`: by the mean of
    the truth ratio, geometric and arithmetic. `privleak`, `mia_auc`: where there is a set named holdout.
    """
    summary: dict[str, Any] = {"run": log.run, "sets": {name: _of_set(log, name) for name in log.sets}}
    if all(name in log.sets and _is_complete(log, name) for name in UTILITY_SETS):
        summary["model_utility"] = {mean: metrics.model_utility(log, mean) for mean in MEANS}
    pair = LEAK <= log.sets.keys()
    if retain_log is not None:
        summary["retain_log"] = retain_log.run
        if not pair or "average_perturb_loss" in log.sets["forget"].values:
            summary["forget_quality"] = {
                mean: metrics.forget_quality(log, retain_log, mean)._asdict() for mean in MEANS
            }
    if pair:
        scores = [{"loss": s.values["avg_gt_loss"], "min_k": s.values.get("min_k")} for s in _pair(log)]
        aucs = {key: metrics.mia_auc(scores[0][key], scores[1][key]) for key in scores[0] if scores[0][key] is not None
                and scores[1][key] is not None}  # fmt: skip
        reference = 0.5
        if retain_log is not None and LEAK <= retain_log.sets.keys():
            for one, other in zip(_pair(log), _pair(retain_log), strict=True):
                check_comparable(one, other, log.path or "the log", retain_log.path or "the retain log")
            reference = metrics.mia_auc(*(s.column("min_k", "privleak") for s in _pair(retain_log)))
        summary["mia_auc"] = aucs
        if "min_k" in aucs:
            summary["privleak"] = {"value": metrics.privleak(aucs["min_k"], reference), "auc_retain": reference}
    return summary


def check_retain_log(
    sets: Sequence[EvaluationSet], samples: Sequence[Sequence[Sample]], retain_log: EvaluationLog
) -> None:
    """ValueError, before any pass, where the retain log is of other rows, another split or another tokenizer, or lacks
    what it is given for.
    """
    asked = {eval_set.name: (eval_set, some) for eval_set, some in zip(sets, samples, strict=True)}
    quality = "forget" in asked and asked["forget"][0].perturbed is not None
    if not quality and not LEAK <= asked.keys():
        raise ValueError(
            "the retain log has no use here: forget quality needs perturbed answers of a set forget, and PrivLeak the "
            f"sets forget and holdout. This evaluation is of {', '.join(asked)}"
        )
    if quality:
        for name in ("avg_paraphrased_loss", "average_perturb_loss"):
            retain_log.of("forget", "forget quality").column(name, "forget quality")
        _check_set(*asked["forget"], retain_log)
    if LEAK <= asked.keys() and (not quality or LEAK <= retain_log.sets.keys()):
        for name in sorted(LEAK):
            retain_log.of(name, "PrivLeak").column("min_k", "PrivLeak")
            _check_set(*asked[name], retain_log)


def _check_set(eval_set: EvaluationSet, samples: Sequence[Sample], retain_log: EvaluationLog) -> None:
    there, config = retain_log.sets[eval_set.name], retain_log.config_of(eval_set.name)
    if config not in (None, eval_set.config):
        raise ValueError(
            f"the set {eval_set.name} of the retain log {retain_log.path} is of {config}, and that of this evaluation "
            f"of {eval_set.config}: different splits do not compare"
        )
    values = {}
    for name in samples[0].fields:
        counts = [sample.counts(name) for sample in samples]
        values[f"num_token_{name}"] = np.array(
            counts if name == "perturb" else [c[0] for c in counts], dtype=np.float64
        )
    texts = [{"index": sample.index, "ground_truth": sample.truth} for sample in samples]
    here = LogSet(eval_set.name, tuple(sample.index for sample in samples), values, texts)
    check_comparable(here, there, "this evaluation", retain_log.path or "the retain log")
    say_other_tokens(eval_set.name, tokens_checksum(samples), "this evaluation", retain_log)


def _pair(log: EvaluationLog) -> list[Any]:
    return [log.sets["forget"], log.sets["holdout"]]


def _is_complete(log: EvaluationLog, name: str) -> bool:
    return {"average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall"} <= log.sets[name].values.keys()


def _of_set(log: EvaluationLog, name: str) -> dict[str, Any]:
    log_set = log.sets[name]
    part = EvaluationLog(log.run, {name: log_set}, log.path)
    summary: dict[str, Any] = {"samples": len(log_set)}
    values = log_set.values
    if {"gt_loss", "num_token_gt"} <= values.keys():
        summary["nll"] = float(values["gt_loss"].sum() / values["num_token_gt"].sum())
    summary["probability"] = metrics.probability(part)[name]
    if {"average_perturb_loss", "avg_paraphrased_loss"} <= values.keys():
        summary["truth_ratio"] = metrics.truth_ratio(part)[name]
    for key, _, plain in SET_COLUMNS:
        if plain in values:
            summary[key] = float(values[plain].mean())
    if "generation_cut" in values:
        summary["generations_cut"] = int(values["generation_cut"].sum())
    for key, column in sorted({**values, **log_set.extraction}.items()):
        if key.startswith("ps_"):
            summary[key] = float(column.mean())
    return summary


def columns_of(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key and heading of every number that a set of the summary has."""
    present = {key for summary_of_set in summary["sets"].values() for key in summary_of_set}
    extra = sorted(key for key in present if key.startswith("ps_"))
    columns = [(key, heading) for key, heading, _ in SET_COLUMNS if key in present]
    return columns + [(key, f"PS, {key.removeprefix('ps_')}") for key in extra]


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: a table of the sets, then the numbers of the whole."""
    sets, keys = summary["sets"], columns_of(summary)
    lines = ["| Set | " + " | ".join(heading for _, heading in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, summary_of_set in sets.items():
        lines.append(f"| {name} | " + " | ".join(shown(summary_of_set.get(key)) for key, _ in keys) + " |")
    return "\n".join([*lines, "", *wholes(summary)]) + "\n"


def wholes(summary: Mapping[str, Any]) -> list[str]:
    """The numbers of the whole, a line each."""
    lines = []
    if "model_utility" in summary:
        both = summary["model_utility"]
        lines.append(
            f"Model utility: {both['geometric']:.4f} (truth ratio by geometric mean; "
            f"arithmetic {both['arithmetic']:.4f})"
        )
    if "forget_quality" in summary:
        one, other = (summary["forget_quality"][mean] for mean in MEANS)
        lines.append(
            f"Forget quality against {summary['retain_log']}: p = {one['pvalue']:.4g} (log10 p {one['log10_p']:.3f}, "
            f"D {one['statistic']:.4f}; arithmetic mean: p = {other['pvalue']:.4g})"
        )
    if "mia_auc" in summary:
        aucs = ", ".join(f"{key} {value:.4f}" for key, value in summary["mia_auc"].items())
        lines.append(f"Membership inference, AUC of forget against holdout: {aucs}")
    if "privleak" in summary:
        one = summary["privleak"]
        lines.append(f"PrivLeak: {one['value']:+.2f} % (retain AUC {one['auc_retain']:.4f})")
    return lines


def shown(value: Any) -> str:
    """A number of the table; a dash where there is none."""
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def write_results(folder: str | os.PathLike[str], log: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """log.json, samples.parquet, summary.json and table.md, each whole or not at all."""
    from gfast.tables import write_table

    folder = Path(folder)
    write_json(folder / LOG_FILE, log)
    write_table(folder / "samples.parquet", samples_table(log))
    write_json(folder / "summary.json", summary)
    write_whole(folder / "table.md", table(summary))


def write_summaries(folder: str | os.PathLike[str], summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """summaries.json: the numbers of evaluations along a run, by step."""
    write_json(Path(folder) / SUMMARIES, {str(step): summaries[step] for step in sorted(summaries)})


def read_summaries(folder: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
    """What `write_summaries` wrote; {} where nothing was evaluated."""
    path = Path(folder) / SUMMARIES
    by_step = read_json(path, "delete it; the logs beside it have the same numbers") if path.exists() else {}
    return {int(step): summary for step, summary in by_step.items() if step.isdecimal()}


def retention(summary: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation says of how much is kept: `model_utility` (truth ratio by geometric mean) where all of its
    sets are there, and the retain set's `retain_extraction`.
    """
    utility, retain = summary.get("model_utility", {}), summary["sets"].get("retain", {})
    values = {"model_utility": utility.get("geometric"), "retain_extraction": retain.get("extraction_strength")}
    return {name: value for name, value in values.items() if value is not None}


def samples_table(log: Mapping[str, Any]) -> Any:
    """A row for every sample of a log: its set, its row number, its values and texts, as an Arrow table."""
    import pyarrow

    rows = []
    for name, log_set in log["sets"].items():
        texts = {text["index"]: text for text in log_set.get("text", ())}
        for at, index in enumerate(log_set["index"]):
            row = {"set": name, "index": index}
            row |= {key: column[at] for key, column in log_set.items() if key not in ("index", "text", "extraction")}
            row |= dict(sorted((key, value) for key, value in texts.get(index, {}).items() if key != "index"))
            rows.append(row)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return pyarrow.table({key: _floats([row.get(key) for row in rows]) for key in keys})


def _floats(values: list[Any]) -> list[Any]:
    # Integers and floats of one column (a count of 1, a loss of 0): one type.
    if any(isinstance(value, float) for value in values):
        return [float(value) if isinstance(value, (int, np.integer)) else value for value in values]
    return values
