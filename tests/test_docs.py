"""Every Python block of the README and of docs/ runs as it stands, every command line is understood, those of the
README and of the audit run, and the API pages hold every public name.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.marks import slow_when
from helpers.training_tiny import FORGET_ROWS, RETAIN_ROWS, saved_tiny

import gfast
import gfast.objectives
from gfast import cli
from gfast.commands import common
from gfast.commands.arguments import CommandParser
from gfast.commands.parser import Parser
from gfast.evaluation import sources
from gfast.reproduce import study
from gfast.reproduce.recipe import build, load_recipe
from gfast.yaml_text import read_yaml

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


FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def gfast_commands(shell: str) -> list[list[str]]:
    """The words after `gfast` of every command, with the variables that the lines before it set."""
    variables: dict[str, str] = {}
    setting = re.compile(r'^(\w+)="(.*?)"\n', re.M | re.S)
    shell = setting.sub(lambda m: variables.update({m[1]: m[2]}) or "", shell.replace("\\\n", " "))
    found = []
    for line in re.sub(r"\$(\w+)", lambda m: " ".join(variables[m[1]].split()), shell).splitlines():
        words = shlex.split(line, comments=True) if line.lstrip().startswith("gfast ") else []
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append([word for word in words[1:end] if word != "..."])
            words = words[end + 1 :]
    return found


def of_page(page: Path) -> list[list[str]]:
    blocks = [block[2] for block in FENCED.finditer(page.read_text()) if block[1] in ("", "bash")]
    return gfast_commands("\n".join(blocks))


def of_help() -> list[list[str]]:
    """What the help and the reference page of every command show."""
    modules = [cli, *(importlib.import_module(module) for module, _ in cli.COMMANDS.values())]
    texts = [f"{module.__doc__}\n{getattr(module, '_EXAMPLES', '')}" for module in modules]
    shown = [re.findall(r"^ +gfast (?:.*\\\n)*.*$", text, re.M) for text in texts]
    return [command for lines in shown for command in gfast_commands("\n".join(lines))]


COMMANDS = {page.name: of_page(page) for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS["--help"] = of_help()


class Understood(BaseException):
    """Raised where a command begins its work."""


@pytest.mark.parametrize("page", [page for page, commands in COMMANDS.items() if commands])
def test_every_command_that_a_page_shows_is_understood(page, tmp_path, monkeypatch, capsys):
    """Its flags, their values, recipes and their keys are what today's gfast knows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: ORIGINAL\n")

    def stopped(parse):
        def parsed(self, *args, **kwargs):
            found = parse(self, *args, **kwargs)
            if self.prog == "gfast":  # the command's name, before its flags
                return found
            raise Understood

        return parsed

    def recipe(name, changes, *_):
        load_recipe(name, changes)
        raise Understood

    monkeypatch.setattr(Parser, "parse_args", stopped(Parser.parse_args))
    monkeypatch.setattr(CommandParser, "parse", stopped(CommandParser.parse))
    monkeypatch.setattr(study, "study", recipe)
    for command in COMMANDS[page]:
        if command[:1] in (["COMMAND"], ["RECIPE"]):
            continue
        with pytest.raises(Understood):
            code = cli.main(command)
            raise AssertionError(f"gfast {shlex.join(command)}: {code}, {capsys.readouterr().err}")


@slow_when(lambda p: p.page == "audit.md")
@pytest.mark.parametrize("page", ["README.md", "audit.md"])
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    """In order in one folder, on a tiny model; the bundled authors stand in for TOFU, which is on the hub. `reproduce`
    and what asks for nothing else is left to tests of their own.
    """
    monkeypatch.chdir(tmp_path)
    saved_tiny(tmp_path / "ORIGINAL")
    rows = {"forget": FORGET_ROWS, "retain": RETAIN_ROWS}
    monkeypatch.setattr(common, "load_tofu", lambda name, path: rows[name.rstrip("0123456789")])
    monkeypatch.setattr(sources, "tofu", lambda split, path, size, holdout: sources.bundled(2))
    ran = [command for command in COMMANDS[page] if command[0] not in ("reproduce", "doctor")]
    for command in ran:
        # of an audit 1 is an answer too: the model was not taught what it should forget
        assert cli.main(command) in ((0, 1) if command[0] == "audit" else (0,)), command
    assert {command[0] for command in ran} >= {"unlearn", "audit"}
    assert (tmp_path / "run" / "audit.html").exists()


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


def test_the_recipe_of_a_page_has_every_key():
    """And is one: what the page shows can be read, with all that a recipe and its parts know."""
    text = (ROOT / "docs/reproduce.md").read_text()
    shown = read_yaml(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    recipe = build(shown)
    for key, part in {"": recipe, **{key: getattr(recipe, key) for key in ("load", "evaluate", "calibrate")}}.items():
        known = {field.name for field in fields(part)}
        assert known == set(shown[key] if key else shown), key
    assert {field.name for field in fields(recipe.data)} <= set(re.findall(r"(\w+):", str(text)))
