"""The examples of other trainers run as they are, on their small models."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.open_unlearning import registered

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_trainer_of_transformers(tmp_path):
    trainer = example("transformers_trainer").main(None, str(tmp_path))
    logs = trainer.state.log_history
    assert sum("loss" in log for log in logs) == 3
    assert all(math.isfinite(log["geffect/WGA(alpha=0.5)/retain"]) for log in logs if "geffect/nll/retain" in log)


def test_trl(tmp_path):
    pytest.importorskip("trl")
    sft, dpo = example("trl_trainers").main(None, str(tmp_path))
    assert sft.state.log_history[0]["loss"] < 0 and dpo.state.log_history[0]["loss"] == pytest.approx(13.863, rel=1e-3)


def test_a_loop_of_ones_own():
    losses = example("plain_loop").main()
    assert len(losses) == 4 and losses[0] > 13.86 and losses[-1] < losses[0]


def test_lightning(tmp_path):
    pytest.importorskip("pytorch_lightning")
    module = example("lightning_module").main(None, str(tmp_path))
    assert len(module.losses) == 4 and module.losses[-1] < module.losses[0]


def test_open_unlearning(tmp_path):
    registered()  # its registry, or one laid out as its own
    trainer = example("open_unlearning_trainer").main(None, str(tmp_path))
    logs = trainer.state.log_history
    assert [log["forget_loss"] for log in logs if "forget_loss" in log][0] == pytest.approx(13.863, rel=1e-3)
    assert sum("geffect/nll/retain" in log for log in logs) == 3


def test_no_example_hides_a_package():
    """`python examples/NAME.py` puts the folder first on the path: a file named as a package would be found for it."""
    files = sorted(FOLDER.glob("*.py"))
    imported = {name for path in files for name in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)}
    packages = {*imported, *sys.stdlib_module_names, "lightning", "open_unlearning"}
    assert {path.stem for path in files} & packages == set()
    assert [path.stem for path in files if importlib.util.find_spec(path.stem)] == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_at_most_six_lines_change(path):
    assert len(re.findall(r"  # \d", path.read_text())) <= 6


def test_live_effects(tmp_path):
    module = example("live_geffect")
    assert all(math.isfinite(effect.total("retain")) for effect in module.plain_loop())
    logs = [log for log in module.transformers_trainer(str(tmp_path)).state.log_history if "loss" in log]
    assert len(logs) == 3 and all(math.isfinite(log["geffect_live/step/retain"]) for log in logs)


@pytest.mark.slow
def test_a_sharded_loop_by_torchrun():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", FOLDER / "sharded_loop.py"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step ") == 3
