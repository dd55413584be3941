# SPDX-License-Identifier: Apache-2.0
"""The page of a study: study.html, with figures as PNG and tables as Markdown and JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gfast.files import readable, write_whole
from gfast.report.figures import Drawing, draw_pareto, drawings
from gfast.report.html import flatten, rendered
from gfast.report.numbers import number
from gfast.report.runs import Run
from gfast.report.style import Theme, run_color
from gfast.reproduce.plan import Plan
from gfast.reproduce.steps import Steps
from gfast.reproduce.summary import CALIBRATED_COLUMNS, Results, shown, table

GRID_COLUMNS = (
    ("setting", "Setting"),
    ("unlearn", "Unlearn effect"),
    ("retain", "Retain effect"),
    ("predicted", "Retain over unlearn, predicted"),
    ("measured", "the same over a real run"),
    ("matched", "Real run: retain NLL at equal forget NLL"),
    ("forget_nll", "Real run: forget NLL, end"),
)
SIZE_COLUMNS = (
    ("objective", "Objective"),
    ("data", "Forget set"),
    ("rows", "Rows"),
    ("matched", "Retain NLL at equal forget NLL"),
    ("level", "that forget NLL"),
    ("ratio", "Retain over unlearn G-effect"),
    ("forget_nll", "Forget NLL, end"),
    ("retain_nll", "Retain NLL, end"),
)
COST_COLUMNS = (
    ("what", "Steps"),
    ("steps", "Number"),
    ("seconds", "Seconds"),
    ("each", "Seconds each"),
    ("measuring", "of it, G-effects and NLL"),
)


MATCHED = (
    "Retain NLL at equal forgetting",
    "Of each objective, where its runs have forgotten as much as all the others. A bar is one deviation over seeds.",
)


def write_page(plan: Plan, steps: Steps) -> Path:
    """Write the page and what lies beside it, each file whole or not at all, the page last."""
    results, recipe, out = Results(plan, steps), plan.recipe, plan.out
    columns, rows = shown(results.rows)
    tables = [{"title": "Objectives", "columns": columns, "rows": rows, "note": results.note()}]
    if recipe.calibrate:
        columns, rows = shown([row for row in results.rows if "share" in row], CALIBRATED_COLUMNS, empty=True)
        note = results.calibrated_note()
        tables.append({"title": "At equal retention", "columns": columns, "rows": rows, "note": note})
    grid, sizes, cost = results.grid(), results.sizes(), results.cost()
    if grid:
        tables.append(_table("Parameters, from one measurement of token effects beside real runs", GRID_COLUMNS,
                             grid["rows"], _grid_note(grid)))  # fmt: skip
    if sizes:
        tables.append(_table("Size of the forget set", SIZE_COLUMNS, sizes, "One seed; compared by objective."))
    tables.append(_table("Cost", COST_COLUMNS, cost, "Wall-clock seconds on this machine, whatever else it did."))
    figures = []
    for title, drawing, runs in _drawn(results):
        pictures = drawing.render(runs)
        write_whole(out / "figures" / f"{drawing.name}.png", pictures.png)
        figures.append({"title": title, "name": drawing.name, "caption": drawing.caption, **pictures.uris()})
    sentences = results.sentences()
    page = rendered(
        "study.html.j2",
        title=recipe.title,
        lines=sentences,
        tables=tables,
        figures=figures,
        steps=[(step, steps.record(step.name).get("seconds", 0.0)) for step in steps.steps],
        settings=flatten(_plain(asdict(recipe))),
        versions=_versions(results),
    )
    markdown = "\n".join(
        f"## {described['title']}\n\n{table(described['columns'], described['rows'])}\n{described['note']}\n"
        for described in tables
    )
    write_whole(out / "tables.md", readable("\n".join([*sentences, "", markdown])))
    values = {"sentences": sentences, "objectives": results.rows, "grid": grid, "sizes": sizes, "cost": cost}
    write_whole(out / "tables.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return write_whole(out / "study.html", page)


def _drawn(results: Results) -> list[tuple[str, Drawing, list[Run]]]:
    """Title, figure and runs, in the order of the page: what all have in common, then each figure of the recipe."""
    every = list(results.runs.values())
    drawn = [
        (drawing.title, drawing, every) for drawing in drawings(every) if drawing.name in ("pareto", "nll", "training")
    ]
    drawn.sort(key=lambda entry: entry[1].name != "pareto")
    if drawn and drawn[0][1].name == "pareto":
        title, drawing, _ = drawn[0]
        drawn[0] = title, replace(drawing, draw=partial(draw_pareto, level=results.level)), every
    groups = results.recipe.figures or {"All objectives": tuple(results.runs)}
    if sum(bool(row.get("matched")) for row in results.rows) > 1:
        title, caption = MATCHED
        draw = partial(_draw_matched, results=results, groups=groups)
        drawn.insert(1, (title, Drawing("matched", title, caption, draw), every))
    for number_of, (title, names) in enumerate(groups.items(), 1):
        runs = [results.runs[name] for name in names if name in results.runs]
        for drawing in drawings(runs):
            if drawing.name.startswith("geffect"):
                named = replace(drawing, name=f"{drawing.name}-{number_of}")
                drawn.append((f"{title}: {drawing.title}", named, runs))
    return drawn


def _draw_matched(_: list[Run], theme: Theme, results: Results, groups: Mapping[str, Sequence[str]]) -> Figure:
    matched = {row["name"]: row["matched"] for row in results.rows if row.get("matched")}
    grouped = {name for names in groups.values() for name in names}
    every = *groups.values(), [name for name in matched if name not in grouped]
    rows = [some for names in every if (some := [name for name in names if name in matched])]
    figure = Figure(figsize=(7.6, 1.0 + 0.27 * sum(map(len, rows)) + 0.16 * len(rows)), layout="constrained")
    ax, place, places = figure.subplots(), 0.0, {}
    for at, names in enumerate(rows):
        for name in names:
            mean, deviation = matched[name]
            ax.errorbar(mean, place, xerr=deviation, color=run_color(theme, at), marker="D", markersize=5, capsize=3)
            places[place] = name
            place += 1.0
        place += 0.6  # between groups
    ax.set_yticks(list(places), list(places.values()))
    ax.invert_yaxis()
    ax.set_xlabel(f"retain NLL at a forget NLL of {number(results.level)} (right: damage)")
    return figure


def _table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]], note: str) -> dict:
    texts = [{key: value if isinstance(value, str) else number(value) for key, value in row.items()} for row in rows]
    return {"title": title, "columns": columns, "rows": texts, "note": note}


def _grid_note(grid: Mapping[str, Any]) -> str:
    note = (
        f"One seed. The effects are weighted sums of the effects of single tokens, measured once, at step "
        f"{grid['step']} of {grid['run']}; a real run has its own course. Runs are compared at a forget NLL of "
        f"{number(grid['level'])}. "
    )
    if grid["rank"] is not None:
        note += (
            f"Rank correlation of the predicted ratio and the retain NLL of the real runs: {grid['rank']:+.2f} "
            f"(over {grid['ranked']} settings)."
        )
    return note


def _plain(value: Any) -> Any:
    """Without what is not set, and the long lists of objectives, which have a table."""
    return {key: entry for key, entry in value.items() if entry not in (None, {}, ()) and key != "title"}


def _versions(results: Results) -> dict[str, str]:
    info = next(iter(results.by_seed.values()))[0].info
    return flatten({key: info[key] for key in ("versions", "device", "created") if key in info})
