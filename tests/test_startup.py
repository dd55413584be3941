"""What a command loads before it works: transformers' trainer, drawing and tables only where they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import slow_when

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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code += f"\nimport sys; print(*({HEAVY!r} & set(sys.modules)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")) & HEAVY


@pytest.mark.parametrize("module", MODULES)
@slow_when(lambda p: p.module not in ("gfast.commands.geffect", "gfast.commands.unlearn"))
def test_a_command_starts_light(module, tmp_path):
    assert loaded(f"{NO_PEFT}import torch, transformers, {module}", tmp_path) <= MODULES[module]


@pytest.mark.parametrize("command", cli.COMMANDS)
@slow_when(lambda p: p.command not in ("unlearn", "demo"))
def test_help_loads_no_trainer(command, tmp_path):
    code = f"{NO_PEFT}from gfast import cli; assert cli.main([{command!r}, '--help']) == 0"
    assert loaded(code, tmp_path) <= MODULES[cli.COMMANDS[command][0]]


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
    bare = loaded("from transformers import TrainingArguments", tmp_path)
    assert loaded("import gfast.commands.unlearn", tmp_path) <= bare


def test_a_measurement_loads_no_trainer(tmp_path):
    code = """
from helpers.training_tiny import TOKENIZER, tiny_model
tiny_model().save_pretrained("model")
TOKENIZER.save_pretrained("model")
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    code = """
from gfast import cli
assert cli.main("geffect --model model --data bundled --objectives GA WGA --batch_size 64".split()) == 0
"""
    assert not loaded(code, tmp_path) & (TRAINER - {"peft"} | {"matplotlib"})
