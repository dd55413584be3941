# SPDX-License-Identifier: Apache-2.0
"""One self-contained page from recorded runs: figures, table, settings and what the numbers say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gfast.files import readable, write_whole
from gfast.report.figures import drawings
from gfast.report.matched import match
from gfast.report.runs import TEXTS, Run, load_runs
from gfast.report.tables import HARM, cells, columns_of, comparison, markdown, reading, summarize


def build_report(
    run_folders: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    title: str = "G-effect report",
    samples: Iterable[dict[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `figures/*.png`, `table.md`, `table.json` and `report.html` from recorded runs and return the page's path.

    Args:
        run_folders: folders with `records/step-*.parquet` (and `run.json`), as `UnlearnTrainer` writes them, in the
            order of the page.
        out: folder of the report; it is created, and what an earlier report wrote there is replaced.
        title: heading of the page.
        samples: optional answers to show, dicts with `set` ("forget" or "retain"), `question`, `answer` (the text that
            was learned) and `replies` (a dict from the name of a model to what it says).
        settings: optional lines to put before the settings that the runs recorded.

    The page holds everything it shows and needs no network; only its links to the Parquet files lead out, relative to
    `out`. Each file is written whole or not at all, the page last.

    Errors: ValueError for no folder or the same folder twice; FileNotFoundError naming a folder without records.

    >>> from gfast.report import build_report
    >>> build_report(["demo/runs/ga", "demo/runs/npo"], "demo", title="GA and NPO")   # doctest: +SKIP
    PosixPath('demo/report.html')
    """
    from markupsafe import Markup

    out = Path(out)
    runs = load_runs([Path(folder) for folder in run_folders])
    summaries = [summarize(run) for run in runs]
    match(summaries)
    figures = []
    for drawing in drawings(runs):
        pictures = drawing.render(runs)
        write_whole(out / "figures" / f"{drawing.name}.png", pictures.png)
        figures.append({"drawing": drawing, **pictures.uris()})
    common = shared_settings(runs)
    # The full configuration of a training run is a page of its own: it is there to unfold.
    details = {key: value for key, value in common.items() if key.startswith("config.")}
    shared = flatten(dict(settings or {})) | {key: value for key, value in common.items() if key not in details}
    page = rendered(
        "page.html.j2",
        title=title,
        runs=runs,
        once=all(run.once for run in runs),
        columns=columns_of(summaries),
        rows=[(cells(summary), reading(summary)) for summary in summaries],
        comparison=comparison(summaries),
        limits=[limit for limit, _, _ in HARM[:-1]],
        figures=figures,
        formulas=[(name, Markup(value), Markup(weight)) for name, (value, weight) in _formulas(runs)],
        shared=shared,
        details=details,
        own=own_settings(runs),
        files=[(run, [(_link(path, out), path.name) for path in run.record_files]) for run in runs],
        samples=list(samples),
    )
    write_whole(out / "table.md", readable(markdown(summaries)))
    write_whole(out / "table.json", json.dumps(summaries, indent=2, ensure_ascii=False) + "\n")
    return write_whole(out / "report.html", page)


def rendered(template: str, **values: Any) -> str:
    """A page of this package, with every text that is not Markup escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gfast.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return readable(environment.get_template(template).render(**values))


def _link(path: Path, out: Path) -> str:
    return quote(os.fsencode(Path(os.path.relpath(path, out)).as_posix()))


def _formulas(runs: list[Run]) -> list[tuple[str, tuple[str, str]]]:
    """As on the page; HTML in the formulas is ours, everything that comes from a run is escaped by the template."""
    used = {name for run in runs for name in re.findall(r"\w+", run.objective)}
    return [(name, formula) for name, formula in TEXTS["formulas"].items() if name in used]


def flatten(info: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of `outer.inner` names with readable values.

    >>> flatten({"seed": 0, "model": {"hidden": 128}, "argv": ["a", "b"]})
    {'seed': '0', 'model.hidden': '128', 'argv': 'a b'}
    """
    flat: dict[str, str] = {}
    for key, value in info.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, (list, tuple)):
            flat[name] = " ".join(str(item) for item in value)
        else:
            flat[name] = f"{value:g}" if isinstance(value, float) else str(value)
    return flat


def shared_settings(runs: list[Run]) -> dict[str, str]:
    """The settings that every run has in common."""
    flat = [flatten(run.info) for run in runs]
    return {key: value for key, value in flat[0].items() if all(other.get(key) == value for other in flat)}


def own_settings(runs: list[Run]) -> list[tuple[str, dict[str, str]]]:
    """What is left of each run's settings, by its label."""
    shared = shared_settings(runs)
    return [(run.label, {k: v for k, v in flatten(run.info).items() if k not in shared}) for run in runs]
