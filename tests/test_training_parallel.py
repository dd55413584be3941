"""Data parallelism: several processes give what one gives."""

from __future__ import annotations

import math
import os
import socket

import pytest
import torch
from helpers import training_parallel
from helpers.process_group import alone
from helpers.training_tiny import in_processes, saved_tiny, server, tiny_model
from safetensors.torch import load_file
from test_training import plain_nll
from torch.nn.parallel import DistributedDataParallel

from gfast.files import MANIFEST, read_json
from gfast.geffect import Effect
from gfast.locks import claimed
from gfast.training.evaluation import own_batches
from gfast.training.options import refuse_reentrant
from gfast.training.records import effect_file, read_records


def together(target, runs):
    """Run `target(folder, rank, world, port)` in every process of every world; the folders by world."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    context, processes = server(), []
    for world, folder in runs.items():
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes += [context.Process(target=target, args=(str(folder), rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_two_processes_train_like_one(tmp_path):
    runs = {1: tmp_path / "one" / "run", 2: tmp_path / "two" / "run"}
    together(training_parallel.train, runs)
    expected = load_file(runs[1] / "process-0.safetensors")
    for rank in range(2):
        found = load_file(runs[2] / f"process-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    one, two = (read_records(folder) for folder in runs.values())
    assert (
        one["quantity"].tolist() == two["quantity"].tolist() and (one["quantity"] == "risk").sum() == 12
    )  # of both callbacks
    for folder in runs.values():  # all processes stopped where one of them saw it
        assert (folder / "checkpoint-2" / "trainer_state.json").exists()
    assert two["value"].to_numpy() == pytest.approx(one["value"].to_numpy(), rel=1e-4)


def test_a_job_is_one_writer_and_fails_as_one(tmp_path):
    folder = tmp_path / "two"
    with claimed(tmp_path / "held"):
        together(training_parallel.one_job, {2: folder})
    for step in (1, 2):
        listed = read_json(folder / f"checkpoint-{step}" / MANIFEST)["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", "optimizer.pt"} <= set(listed)
    for rank in range(2):
        damaged, held = read_json(folder / f"process-{rank}.json")["said"]
        assert "rng_state_0.pth is damaged: it has " in damaged and "go on from the checkpoint before it" in damaged
        assert f"is in use: process {os.getpid()} on " in held


def expected_losses(kind, samples):
    """The token means of a whole data set, by cross-entropy of one batch of all of it."""
    data, collate = training_parallel.evaluation_data(kind, samples)
    batch = collate([data[index] for index in range(samples)])
    sides = batch if kind == "nested" else {"forget": batch}
    with torch.no_grad():
        sums = {side: plain_nll(tiny_model().eval(), [part]) for side, part in sides.items()}
    total, tokens = (sum(column) for column in zip(*sums.values(), strict=True))
    found = {"loss": float(total) / tokens}
    return found | ({f"{side}_loss": float(nll) / n for side, (nll, n) in sums.items()} if kind == "nested" else {})


@pytest.mark.slow
def test_every_sample_is_evaluated_once_by_any_number_of_processes(tmp_path):
    runs = {world: tmp_path / str(world) for world in (1, 2, 3)}
    together(training_parallel.evaluate, runs)
    for world, folder in runs.items():
        ranks = [load_file(folder / f"process-{rank}.safetensors") for rank in range(world)]
        for kind in training_parallel.KINDS:
            for samples in (1, 3, 5):
                expected = expected_losses(kind, samples)
                for batch_size in (1, 2, 4):
                    name = f"{kind}, {samples} by {batch_size}"
                    for found in ranks:
                        for which in ("eval", "test"):
                            losses = {key: float(found[f"{name}: {which}: {key}"]) for key in expected}
                            assert losses == pytest.approx(expected, rel=1e-5), (world, name, which)
                    # A model whose forwards communicate needs as many of them in every process.
                    rounds = math.ceil(math.ceil(samples / batch_size) / world)
                    forwards = 2 * rounds * (2 if kind == "nested" else 1)
                    assert [int(found[f"{name}: forwards"]) for found in ranks] == [forwards] * world, (world, name)
        assert all(("refused" in found) == (world > 1) and found.get("refused", 1.0) == 1.0 for found in ranks)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("samples", [0, 1, 5, 8, 13])
def test_batches_are_dealt_out_once_and_evenly(samples, batch_size, processes):
    dealt = [own_batches(samples, batch_size, processes, rank) for rank in range(processes)]
    counted = [index for batches, count in dealt for batch in batches[:count] for index in batch]
    assert sorted(counted) == list(range(samples))
    assert len({len(batches) for batches, _ in dealt}) == 1
    assert all(0 < len(batch) <= batch_size for batches, _ in dealt for batch in batches)


def test_the_command_of_effects_is_one_measurement_in_all_processes(tmp_path):
    model = str(saved_tiny(tmp_path / "model"))
    for world in (1, 2):
        in_processes(training_parallel.measure, model, str(tmp_path / str(world)), world=world)
    for name, rows in (("whole", 176), ("sample", 2), ("token", 38)):
        one, two = (read_records(tmp_path / world / name) for world in "12")
        keys = ["objective", "quantity", "side", "group"]
        assert one[keys].equals(two[keys])
        assert two["value"].to_numpy() == pytest.approx(one["value"].to_numpy(), rel=2e-4, abs=1e-7)
        assert len(one) == rows
    one, two = (Effect.from_parquet(effect_file(tmp_path / world / "sample", "sample", 0)) for world in "12")
    torch.testing.assert_close(two.total("retain"), one.total("retain"), rtol=1e-4, atol=1e-6)


def test_reentrant_checkpoints_take_one_forward_a_backward(tmp_path):
    """PyTorch says so in the midst of the first step, in many words that name no option."""
    for options in ({"use_reentrant": True}, {"use_reentrant": False}):
        model = tiny_model()
        model.gradient_checkpointing_enable(options)
        with alone():
            wrapped = DistributedDataParallel(model)
        if options["use_reentrant"]:
            with pytest.raises(ValueError, match="gradient_checkpointing_kwargs={'use_reentrant': False}"):
                refuse_reentrant(wrapped)
        else:
            refuse_reentrant(wrapped)
        refuse_reentrant(model)  # one process
        wrapped.static_graph = True
        refuse_reentrant(wrapped)
