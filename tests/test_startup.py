"""What a command loads before it works: transformers' trainer, drawing and tables only where they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import slow_when

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
# the commands that train are transformers' Trainer with every flag of its arguments
COMMANDS = {
    "gfast.commands.geffect": set(),
    "gfast.commands.evaluate": set(),
    "gfast.commands.report": set(),
    "gfast.commands.bench": set(),
    "gfast.doctor": set(),
    "gfast.commands.unlearn": HEAVY - {"matplotlib"},
    "gfast.demo": HEAVY - {"matplotlib"},
}


def loaded(code: str, folder: Path) -> set[str]:
    """Of HEAVY, what a fresh process that ran `code` has loaded."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code += f"\nimport sys; print(*({HEAVY!r} & set(sys.modules)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")) & HEAVY


@pytest.mark.parametrize("module", COMMANDS)
@slow_when(lambda p: p.module not in ("gfast.commands.geffect", "gfast.commands.evaluate"))
def test_a_command_starts_light(module, tmp_path):
    assert loaded(f"import torch, transformers, {module}", tmp_path) <= COMMANDS[module]


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
