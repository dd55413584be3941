"""A run that is killed, however and whenever, and started again is as if it had never been killed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
from helpers import training_killed
from helpers.marks import slow_when
from helpers.training_tiny import server
from safetensors.torch import load_file

from gfast.files import MANIFEST, TEMPORARY_PREFIX
from gfast.training.records import KEY, read_records, recorded_steps
from gfast.training.resume import check_checkpoint, last_checkpoint

KILLS, RUNS = 30, 3
A_FEW = 4  # by each signal, and while it loads


@pytest.fixture(scope="module")
def start():
    """Starts training_killed.main in a process of its own."""
    context = server()

    def started(folder, *arguments, **options):
        process = context.Process(target=training_killed.main, args=(str(folder), *arguments), kwargs=options)
        process.start()
        return process

    started.context = context
    return started


def finish(process):
    process.join(timeout=300)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(folder)) == 0
    return folder


def assert_the_same(folder, uninterrupted):
    found, expected = (read_records(which).set_index(list(KEY)) for which in (folder, uninterrupted))
    assert sorted(set(expected.index.get_level_values("step"))) == list(range(8))
    assert found.index.equals(expected.index)
    differ = found["value"].to_numpy().view("int64") != expected["value"].to_numpy().view("int64")
    assert not differ.any(), found[differ].join(expected[differ], rsuffix=" expected").to_string()
    weights, whole = (load_file(which / "model.safetensors") for which in (folder, uninterrupted))
    assert set(weights) == set(whole)
    for name, value in whole.items():
        assert torch.equal(weights[name], value), name
    assert not [path.name for path in folder.rglob(".gfast-*")], "leftovers of the killed"


@slow_when(lambda p: p.where in ("write", "manifest"))
@pytest.mark.parametrize(
    ("where", "number"),
    [("step", 1), ("write", 9), ("checkpoint", 4), ("manifest", 4)],
    ids=["before any checkpoint", "writing a record", "saving a checkpoint", "before its manifest"],
)
def test_killed_and_resumed_is_as_if_never_killed(tmp_path, uninterrupted, start, where, number):
    folder = tmp_path / "run"
    assert finish(start(folder, where, number)) == -signal.SIGKILL
    before = set(recorded_steps(folder))
    read_records(folder)
    if where == "manifest":
        assert last_checkpoint(folder).name == "checkpoint-4" and not (folder / "checkpoint-4" / MANIFEST).exists()
    assert finish(start(folder)) == 0
    assert before <= set(recorded_steps(folder))
    assert_the_same(folder, uninterrupted)


@slow_when(lambda p: p.kills > A_FEW)
@pytest.mark.parametrize(("seed", "kills"), [(RUNS, A_FEW), *((seed, KILLS // RUNS) for seed in range(RUNS))])
def test_killed_at_random_again_and_again(tmp_path, uninterrupted, start, seed, kills):
    """So many times, by signals in turn: while it loads, trains, records, saves. A run that ends before its kill
    comes is compared, and a new one begins."""
    choose, runs, folder = random.Random(seed), 1, tmp_path / "1" / "run"
    codes, landed = [], {"saving": 0, "no checkpoint": 0, "partial file": 0}
    for number in range(KILLS):
        begun = start.context.Event()
        process = start(folder, begun=begun, save_steps=1)
        if number % 4 == 3:  # while it loads
            begun.wait(choose.uniform(0.0, 0.3))
        else:
            assert begun.wait(100) or process.exitcode is not None
            time.sleep(choose.uniform(0.0, 0.25))
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        if process.is_alive():
            os.kill(process.pid, how)
        codes.append(finish(process))
        # Whatever there is, is whole, and what was recorded stays.
        read_records(folder) if folder.exists() else None
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            check_checkpoint(checkpoint)
        numbered = [path for path in folder.glob("checkpoint-*") if not (path / MANIFEST).exists()]
        landed["saving"] += bool(numbered)
        landed["no checkpoint"] += checkpoint is None
        landed["partial file"] += bool(list(folder.rglob(f"{TEMPORARY_PREFIX}*")))
        if len(codes) - codes.count(0) == kills:
            break
        if codes[-1] == 0:
            assert_the_same(folder, uninterrupted)
            runs += 1
            folder = tmp_path / str(runs) / "run"
    assert set(codes) <= {-signal.SIGKILL, -signal.SIGTERM, 1, 0}, codes
    assert len(codes) - codes.count(0) == kills, codes
    assert finish(start(folder)) == 0
    assert_the_same(folder, uninterrupted)
    print(f"{runs} runs, exit codes {codes}; kills that left: {landed}")
