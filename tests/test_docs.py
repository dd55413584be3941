"""Every Python block of the README and of docs/ runs as it stands, and the API pages hold every public name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import gfast
import gfast.objectives

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]
PACKAGES = (
    "gfast",
    "gfast.objectives",
    "gfast.geffect",
    "gfast.training",
    "gfast.data",
    "gfast.metrics",
    "gfast.evaluation",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, capsys):
    """Blocks of a page run in order in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {"__name__": "page"}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 2
        code = compile("\n" * (line - 1) + block[1], str(page), "exec")  # an error names the page's own line
        exec(code, names)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_page(package):
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {line.split()[1].rsplit(".", 1)[1] for line in pages.splitlines() if line.startswith("::: ")}
    module = __import__(package, fromlist=["__all__"])
    classes_and_functions = {name for name in module.__all__ if callable(getattr(module, name))}
    assert classes_and_functions - shown == set()


@pytest.mark.parametrize("module", ["transformers", "trl"])
def test_every_integration_has_a_page(module):
    module = pytest.importorskip(f"gfast.integrations.{module}")
    page = (ROOT / "docs" / "reference" / "integrations.md").read_text()
    assert [name for name in module.__all__ if f".{name}\n" not in page] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_version_is_said_once():
    assert f"version: {gfast.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_the_table_of_objectives_is_current():
    """`python docs/site/objectives.py` writes it, and the figure below it."""
    spec = importlib.util.spec_from_file_location("objectives_page", ROOT / "docs" / "site" / "objectives.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text() == page.page(), "run python docs/site/objectives.py"
    rows = page.table().splitlines()[2:]
    assert len(rows) == len(gfast.objectives.REGISTRY) and all(
        re.sub(r"\$.*?\$", "", row).count("|") == 7 for row in rows
    )
    assert all("|" not in formula for row in rows for formula in re.findall(r"\$.*?\$", row)) and page.FIGURE.exists()
