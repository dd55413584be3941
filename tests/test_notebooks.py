"""Every notebook runs from top to bottom, as a reader would run it, and was saved with what it shows."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow  # each teaches a model
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook, monkeypatch, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    if "lora" in notebook.name:
        pytest.importorskip("peft")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {number + 1}", "exec"), names)
    sys.modules["matplotlib.pyplot"].close("all")


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_its_outputs_and_no_error(notebook):
    outputs = [output for cell in cells(notebook) for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    machine = (Path.home(), FOLDER.parents[1], Path(tempfile.gettempdir()))
    assert not [place for place in machine if f"{place}/" in notebook.read_text()]
