"""A Trainer whose model FSDP2 shards trains and measures like one process, and goes on under another number of them."""

from __future__ import annotations

import pytest
import torch
from helpers import training_sharded
from helpers.training_tiny import in_processes
from safetensors.torch import load_file

from gfast.training.records import read_records


def run(folder, *parts):
    """(steps, engine, processes) after each other in one folder; the parameters at the end, in the last process."""
    folder.mkdir()
    for steps, engine, world in parts:
        in_processes(training_sharded.check, str(folder), steps, engine, world=world, seconds=300)
    return load_file(folder / f"process-{world - 1}-of-{world}.safetensors")


def values(folder):
    rows = read_records(folder)
    rows = rows[rows["quantity"].isin(["g_effect", "risk", "loss", "forget_loss"])]
    return rows.set_index(["step", "quantity", "objective", "side", "group"])["value"].sort_index()


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_fsdp2_trains_and_measures_like_one_process(tmp_path):
    one, two = run(tmp_path / "one", (2, "none", 1)), run(tmp_path / "two", (2, "fsdp2", 2))
    same(two, one)
    right, found = values(tmp_path / "one"), values(tmp_path / "two")
    assert list(found.index) == list(right.index) and set(found.reset_index()["quantity"]) >= {
        "g_effect",
        "risk",
        "loss",
    }
    assert found.to_numpy() == pytest.approx(right.to_numpy(), rel=2e-4, abs=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_under_another_number_of_processes(tmp_path):
    one = run(tmp_path / "one", (4, "none", 1))
    same(run(tmp_path / "more", (2, "fsdp2", 2), (4, "fsdp2", 4)), one)
    same(run(tmp_path / "fewer", (3, "ddp", 4), (4, "ddp", 2)), one)


@pytest.mark.slow
def test_gru_under_fsdp2_goes_on_from_a_checkpoint(tmp_path):
    one = run(tmp_path / "one", (3, "none+gru:tensor", 1))
    two = run(tmp_path / "two", (1, "fsdp2+gru:tensor", 2), (3, "fsdp2+gru:tensor", 2))
    same(two, one)
    checkpoint = tmp_path / "two" / "checkpoint-1"
    assert {f"gru_average-{rank}-of-2.safetensors" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}


@pytest.mark.slow
def test_a_scorer_under_fsdp2_is_that_of_one_process(tmp_path):
    words = "+atwu:every=1,beta=0.1,lr=0.5"
    one = run(tmp_path / "one", (3, f"none{words}", 1))
    same(run(tmp_path / "two", (1, f"fsdp2{words}", 2), (3, f"fsdp2{words}", 2)), one)
