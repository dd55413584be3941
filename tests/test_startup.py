"""What a command loads before it works: transformers' trainer, drawing and tables only where they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.training_tiny import saved_tiny

from gfast import cli

ROOT = Path(__file__).resolve().parents[1]
TRAINER = {"transformers.trainer", "transformers.training_args", "datasets", "pandas", "pyarrow", "peft"}
HEAVY = TRAINER | {
    "matplotlib",
    "accelerate",
    "torch._dynamo",
    "torch._inductor",
    "transformers.modeling_utils",
    "scipy",
}
# What the flags of a training are: transformers' TrainingArguments, which load accelerate.
FLAGS = {"transformers.training_args", "accelerate"}
MODULES = {
    **{module: set() for module, _ in cli.COMMANDS.values()},
    "gfast.commands.unlearn": FLAGS,
    "gfast.reproduce.study": FLAGS,  # a recipe's steps are trainings, whose flags are checked first
}
# Where peft is installed, transformers' TrainingArguments load it, and it loads torch.compile and the model code: more
# than half of such a start. Nothing of gfast asks for it, so what gfast adds is seen without.
NO_PEFT = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
"""


def loaded(code: str, folder: Path) -> set[str]:
    """Of HEAVY, what a fresh process that ran `code` has loaded."""
    return set(said(f"{code}\nprint(*loaded(), sep='\\n')", folder).split("\n")) & HEAVY


def said(code: str, folder: Path) -> str:
    """What a fresh process prints; `loaded()` is what it has loaded of HEAVY."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = f"import sys\ndef loaded(): return {HEAVY!r} & set(sys.modules)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_by_one(steps: dict[str, str], allowed: dict[str, set[str]], folder: Path) -> None:
    """Each of `steps` (lines of code by name) loads no more than it may, in one process: those that may most, last."""
    names = sorted(steps, key=lambda name: len(allowed[name]))
    lines = [NO_PEFT, "import torch, transformers"]
    lines += [f"{steps[name]}; print('loaded by', {name!r}, *loaded(), sep='\\t')" for name in names]
    found = [
        line.split("\t")[1:] for line in said("\n".join(lines), folder).splitlines() if line.startswith("loaded by")
    ]
    assert [name for name, *_ in found] == names
    assert not {name: extra for name, *has in found if (extra := set(has) - allowed[name])}


def test_a_command_starts_light(tmp_path):
    one_by_one({module: f"import {module}" for module in MODULES}, MODULES, tmp_path)


def test_help_loads_no_trainer(tmp_path):
    steps = {name: f"from gfast import cli; assert cli.main([{name!r}, '--help']) == 0" for name in cli.COMMANDS}
    one_by_one(steps, {name: MODULES[module] for name, (module, _) in cli.COMMANDS.items()}, tmp_path)


@pytest.mark.slow
def test_help_of_a_training_leaves_peft_alone(tmp_path):
    pytest.importorskip("peft")
    code = """
import sys
from gfast import cli
sys.argv = ["gfast", "unlearn", "--help"]
assert cli.main() == 0
del sys.modules["peft"]
"""
    assert loaded(code, tmp_path) <= FLAGS


@pytest.mark.slow
def test_the_flags_of_a_training_load_no_more_than_transformers_own(tmp_path):
    code = "from transformers import TrainingArguments\nbare = loaded()\nimport gfast.commands.unlearn\n"
    assert said(f"{code}print(*sorted(loaded() - bare), len(bare))", tmp_path).split()[0].isdigit()


def test_a_measurement_loads_no_trainer(tmp_path):
    saved_tiny(tmp_path / "model")
    code = """
from gfast import cli
assert cli.main("geffect --model model --data bundled --objectives GA WGA --batch_size 64".split()) == 0
"""
    assert not loaded(code, tmp_path) & (TRAINER - {"peft"} | {"matplotlib"})
