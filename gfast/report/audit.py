# SPDX-License-Identifier: Apache-2.0
"""What each recorded update of a run did, judged, as JSON and as one page for a person who must sign it."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gfast.files import MANIFEST, check_manifest, file_checksum, read_json, write_json, write_whole
from gfast.report.figures import Drawing
from gfast.report.html import flatten, rendered
from gfast.report.matched import match, matched_sentence
from gfast.report.numbers import number
from gfast.report.runs import LIVE, Run, load_runs
from gfast.report.style import Theme, signed_axis, steps_axis, zero_line
from gfast.report.tables import FLAT_COSINE, cells, summarize
from gfast.sides import SIDES

_HOW = "Train with --geffect_every or --geffect_live_unlearn, or with a GEffectCallback"
# What makes the model: a folder may hold other files, such as what a command printed, that go on being written.
_OF_MODEL = (
    "config.json",
    "generation_config.json",
    "model",
    "adapter_",
    "pytorch_model",
    "tokenizer",
    "training_args",
)
_WEIGHTS = re.compile(r"^(?!training_args).*\.(safetensors|bin)$")


@dataclass(frozen=True)
class Criteria:
    """When an update counts as one that removed what it should and spared the rest.

    flat: a G-effect of less than this share of both gradient norms (its cosine) has no direction, where norms are
        recorded: too little to unlearn, and too little to harm.
    harm: how negative a retain effect may be, as a share of the unlearn effect's size.
    rise: how far the retain NLL may have risen in the end, as a multiple of its start: what updates do to first order
        and what the optimizer makes of them are two things.
    """

    flat: float = FLAT_COSINE
    harm: float = 0.0
    rise: float = 1.1

    def __post_init__(self) -> None:
        for name, low, high, words in (
            ("flat", 0.0, 1.0, "a cosine from 0 to below 1"),
            ("harm", 0.0, math.inf, "a share of 0 or more"),
            ("rise", 1.0, math.inf, "a multiple of 1 or more"),
        ):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"gfast: {name} is {getattr(self, name):g}; give {words}")

    def outcome(self, forget: Mapping[str, float] | None, retain: Mapping[str, float] | None, total: int) -> list[str]:
        """What is wrong with the NLL after all updates, in words; empty where nothing is."""
        faults = [] if forget and retain else ["the NLL of both sets was not measured (--nll_every)"]
        for nll in [
            course
            for course in (forget, retain)
            if course and (course["first_step"], course["last_step"]) != (0, total)
        ][:1]:
            faults.append(
                f"the NLL was measured from step {nll['first_step']} to {nll['last_step']}, and the run is one of "
                f"{total} updates"
            )
        if forget and not forget["after"] > forget["before"]:
            faults.append(f"the forget NLL did not rise ({number(forget['before'])} to {number(forget['after'])})")
        if retain and not retain["after"] <= self.rise * retain["before"]:
            faults.append(
                f"the retain NLL rose from {number(retain['before'])} to {number(retain['after'])}, more than "
                f"{self.rise:g} times its start"
            )
        return faults

    def faults(self, values: Mapping[str, float | None]) -> list[str]:
        """What is wrong with an update, in words; empty where nothing is."""
        unlearn, retain = values["unlearn"], values["retain"]
        faults = [f"{side} effect not recorded" for side in SIDES if values[side] is None]
        faults += [f"{side} effect is {values[side]}" for side in SIDES if _broken(values[side])]
        if unlearn is not None and not _broken(unlearn):
            if unlearn >= 0:
                faults.append("did not remove: unlearn effect not negative")
            elif _at_most(values["unlearn_cosine"], self.flat):
                faults.append(f"did not remove: unlearn effect flat (cosine within {self.flat:g})")
        if retain is not None and not _broken(retain) and retain < 0:
            allowed = self.harm * abs(unlearn) if unlearn is not None and not _broken(unlearn) else 0.0
            if retain < -allowed and not _at_most(values["retain_cosine"], self.flat):
                faults.append("did not spare: retain effect negative")
        return faults


def _broken(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _at_most(cosine: float | None, limit: float) -> bool:
    return cosine is not None and abs(cosine) < limit


def audit(
    run_folder: str | os.PathLike[str],
    criteria: Criteria = Criteria(),  # noqa: B008 - frozen
    objective: str | None = None,
    beside: Iterable[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Judge the recorded updates of a run; write `audit.json` and `audit.html`, return the page's path and the JSON.

    A G-effect recorded at step s is that of the model before update s + 1, so it judges that update; one recorded after
    the last update judges none. The page holds everything that it shows and needs no network.

    Args:
        run_folder: a folder with records of total G-effects (`gfast unlearn --geffect_every`, `GEffectCallback`).
        criteria: what is asked of an update.
        objective: in whose name the effects are recorded, where the folder has several.
        beside: other runs, for the retain NLL at equal forget NLL.
        out: where to write; None is the run's folder.

    Returns:
        The page, and {`passed`, `verdict` (a sentence), `updates` (a dict a measured update, with its `faults`), ...}.

    Raises:
        FileNotFoundError: a folder without records.
        ValueError: no update was measured, or several objectives are recorded and none is named.
        DamagedFile: records, settings or a model that are not what was written.

    >>> page, record = audit("run")      # doctest: +SKIP
    >>> record["passed"], record["verdict"]     # doctest: +SKIP
    """
    folder = Path(run_folder)
    runs = load_runs([folder, *(Path(other) for other in beside)])
    of_folder = [each for each in runs if each.folder == folder]
    run = replace(_with_nll_of_sets(_chosen(of_folder, objective), of_folder), along=None)
    result = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
    total = result.get("steps") or max(int(each.steps[-1]) for each in of_folder)
    updates = [_update(run, step, criteria) for step in _measured(run) if step < total]
    if not updates:
        raise ValueError(
            f"gfast: {folder} has a G-effect after its last update only, which judges none of them. {_HOW}"
        )
    failed = [each for each in updates if each["faults"]]
    summaries = [summarize(run), *(summarize(each) for each in runs if each.folder != folder)]
    match(summaries)
    forget, retain = summaries[0]["forget_nll"], summaries[0]["retain_nll"]
    outcome = criteria.outcome(forget, retain, total)
    if not result and (run.info.get("argv") or [])[:2] == ["gfast", "unlearn"]:  # which leaves one
        outcome.insert(0, "the run did not finish (it left no result.json)")
    record = {
        "passed": not failed and not outcome,
        "verdict": _verdict(updates, failed, total, outcome),
        "outcome_faults": outcome,
        "updates": updates,
        "of_updates": total,
        "finished": bool(result),
        "stopped": result.get("stopped") or _stopped(of_folder),
        "criteria": asdict(criteria),
        "objective": run.objective,
        "nll": {"forget": forget, "retain": retain},
        "matched": [{"run": each["label"], **each["matched"]} for each in summaries if each["matched"]],
        "fingerprints": _fingerprints(folder, run),
        "settings": run.info,
        "made": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    page = _page(run, record, failed, summaries)
    out = folder if out is None else Path(out)
    write_json(out / "audit.json", _finite(record))
    return write_whole(out / "audit.html", page), record


def _page(run: Run, record: dict[str, Any], failed: list[dict[str, Any]], summaries: list[dict[str, Any]]) -> str:
    drawing = Drawing(
        "audit",
        "Every measured update",
        "Above, the G-effect on the forget set (gold, wanted below zero) and on the retain set (blue, wanted at or "
        "above zero); below, the NLL of both sets. Updates that did not pass are crossed.",
        lambda runs, theme: _draw(runs[0], [update["step"] for update in failed], theme),
    )
    settings = {key: value for key, value in flatten(run.info).items() if not key.startswith("data_sha256")}
    return rendered(
        "audit.html.j2",
        title=f"Audit of {run.name}",
        record=record,
        live=run.objective.endswith(LIVE),
        failed=failed,
        number=number,
        run=run,
        figure={"drawing": drawing, **drawing.render([run]).uris()},
        matched=matched_sentence(summaries),
        rows=[cells(summary) for summary in summaries] if len(summaries) > 1 else [],
        settings={key: value for key, value in settings.items() if not key.startswith("config.")},
        details={key: value for key, value in settings.items() if key.startswith("config.")},
    )


def _finite(value: Any) -> Any:
    """Numbers that JSON does not know as text."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _measured(run: Run) -> list[int]:
    """Steps with a total G-effect on a side."""
    return sorted({int(step) for side in SIDES for step in run.series("g_effect", side, "total")[0]})


def _stopped(runs: list[Run]) -> str | None:
    """The rule that ended a run, from its records."""
    from gfast.training.stop import parse_rules

    rows = pd.concat([run.records for run in runs])
    # What a step measures is recorded at the step before it.
    rows = rows[(rows["quantity"] == "stop") & (rows["step"] >= rows["step"].max() - 1)]
    held = [row for row in rows.itertuples() if row.value >= parse_rules(row.group)[0].times]
    return f"rule {held[0].group!r} at step {held[0].step}" if held else None


def _chosen(runs: list[Run], objective: str | None) -> Run:
    """The one among the objectives recorded in a folder that the audit is about."""
    measured = [run for run in runs if _measured(run)]
    if not measured:
        raise ValueError(f"gfast: {runs[0].folder} has no recorded G-effect to judge updates by. {_HOW}")
    names = [run.objective for run in measured]
    wanted = objective
    if objective is None:  # effects of whole sets before those of a step's batches
        whole = [name for name in names if not name.endswith(LIVE)] or names
        wanted = whole[0] if len(whole) == 1 else runs[0].info.get("objective")
    if wanted not in names:
        raise ValueError(f"gfast: say with --objective which of the recorded ones is meant: {', '.join(sorted(names))}")
    return measured[names.index(wanted)]


def _with_nll_of_sets(run: Run, of_folder: list[Run]) -> Run:
    """A run of live effects with the NLL of whole sets that was recorded beside it: that of a step's batch is another
    batch's at every step, and says nothing of a rise.
    """
    if not run.of_batches:
        return run
    beside = next((other for other in of_folder if other.objective == run.objective.removesuffix(LIVE)), None)
    records = [run.records[run.records["quantity"] != "risk"]]
    if beside is not None:
        records.append(beside.records[beside.records["quantity"] == "risk"])
    return replace(run, records=pd.concat(records, ignore_index=True), of_batches=False)


def _update(run: Run, step: int, criteria: Criteria) -> dict[str, Any]:
    values = {
        f"{side}{suffix}": _at(run, quantity, side, "total", step)
        for side in SIDES
        for quantity, suffix in (("g_effect", ""), ("cosine", "_cosine"))
    }
    for side in SIDES:  # of the step that was taken, where surgery has changed it
        taken = _at(run, "step_effect", side, "total", step)
        if taken is not None:
            values |= {side: taken, f"{side}_cosine": None}
    nll = {f"{side}_nll": _at(run, "risk", side, "", step) for side in SIDES}
    by_group = {group: _at(run, "g_effect", "retain", group, step) for group in run.groups}
    harmed = {group: value for group, value in by_group.items() if value is not None and value < 0}
    return {
        "step": step,
        "update": step + 1,
        **values,
        **nll,
        "most_harmed": min(harmed, key=harmed.__getitem__) if harmed else None,
        "faults": criteria.faults(values),
    }


def _at(run: Run, quantity: str, side: str, group: str, step: int) -> float | None:
    steps, values = run.series(quantity, side, group)
    matching = values[steps == step]
    return float(matching[-1]) if len(matching) else None


def _verdict(updates: list[dict[str, Any]], failed: list[dict[str, Any]], total: int, outcome: list[str]) -> str:
    measured = f"{len(updates)} measured of {total} updates" if len(updates) < total else f"{total} updates"
    if failed:
        kinds = {
            "did not remove what they should": sum(
                any("remove" in fault for fault in update["faults"]) for update in failed
            ),
            "did not spare the rest": sum(any("spare" in fault for fault in update["faults"]) for update in failed),
            "cannot be judged": sum(any("did not" not in fault for fault in update["faults"]) for update in failed),
        }
        said = ", ".join(f"{count} {words}" for words, count in kinds.items() if count)
        end = f"; and {' and '.join(outcome)}" if outcome else ""
        return (
            f"Not passed: of the {measured}, {len(failed)} did not do what an update should ({said}), the first of "
            f"them update {failed[0]['update']}{end}."
        )
    each = "the only update" if total == 1 else f"each of the {measured}" if len(updates) > 1 else f"the {measured}"
    did = f"{each} removed what it should and spared the rest, to first order"
    return f"Not passed: {' and '.join(outcome)}, although {did}." if outcome else f"Passed: {did}."


def _fingerprints(folder: Path, run: Run) -> dict[str, Any]:
    """SHA-256 of what the verdict is about."""
    digest = hashlib.sha256()
    for path in run.record_files:
        digest.update(f"{file_checksum(path)}  {path.name}\n".encode())
    if check_manifest(folder, "restore it from a copy: the audit is of what the run wrote", _OF_MODEL, deleted=True):
        listed = {name: entry for name, entry in read_json(folder / MANIFEST)["files"].items() if _WEIGHTS.search(name)}
        model = {name: entry["sha256"] for name, entry in listed.items()}
        gone = {name: entry["deleted"] for name, entry in listed.items() if not (folder / name).exists()}
    else:
        gone = {}
        model = {p.name: file_checksum(p) for p in sorted(folder.iterdir()) if _WEIGHTS.search(p.name)}
    return {
        "original_model": run.info.get("model_fingerprint"),
        "model_files": model,
        "deleted_files": gone,
        "data": run.info.get("data_sha256") or {},
        "settings": run.info.get("fingerprint"),
        "records": digest.hexdigest(),
        "record_files": len(run.record_files),
    }


def _draw(run: Run, failed: list[int], theme: Theme) -> Figure:
    shown = [("g_effect", "total", "G-effect ⟨∇NLL, ∇objective⟩")]
    if len(run.series("cosine", "unlearn", "total")[0]):
        shown.append(("cosine", "total", "cosine of the G-effect"))
    if len(run.series("risk", "unlearn", "")[0]):
        shown.append(("risk", "", "NLL (nats per answer token)"))
    figure = Figure(figsize=(10.5, 2.1 * len(shown) + 0.6), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (quantity, group, label) in zip(axes, shown, strict=True):
        drawn = []
        for side, color, marker in (("unlearn", theme.unlearn, "o"), ("retain", theme.retain, "s")):
            steps, values = run.series(quantity, side, group)
            keep = np.isfinite(values)
            ax.plot(steps[keep], values[keep], color=color, marker=marker, zorder=3)
            crossed = keep & np.isin(steps, failed)
            if quantity != "risk":
                ax.plot(steps[crossed], values[crossed], "x", color=theme.cycle[1], markersize=9, zorder=4)
            drawn.append(values[keep])
        ax.set_ylabel(label)
        if quantity != "risk":
            zero_line(ax, theme)
        if quantity == "g_effect":
            signed_axis([ax], np.concatenate(drawn), theme)
        steps_axis(ax)
    axes[-1].set_xlabel("optimizer step")
    handles = [
        Line2D([], [], color=theme.unlearn, marker="o", label="forget set"),
        Line2D([], [], color=theme.retain, marker="s", label="retain set"),
        Line2D([], [], color=theme.cycle[1], marker="x", linestyle="", markersize=9, label="update did not pass"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure
