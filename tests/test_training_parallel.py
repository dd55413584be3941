"""Data parallelism: two processes give what one gives."""

from __future__ import annotations

import socket

import pytest
import torch
import training_parallel
from safetensors.torch import load_file
from training_tiny import server

from gfast.training.records import read_records


def test_two_processes_train_like_one(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    context = server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = {1: tmp_path / "one" / "run", 2: tmp_path / "two" / "run"}
    processes = [
        context.Process(target=training_parallel.train, args=(str(folder), rank, world, port))
        for world, folder in runs.items()
        for rank in range(world)
    ]
    for folder in runs.values():
        folder.mkdir(parents=True)
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    expected = load_file(runs[1] / "process-0.safetensors")
    for rank in range(2):
        found = load_file(runs[2] / f"process-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    one, two = (read_records(folder) for folder in runs.values())
    assert one["quantity"].tolist() == two["quantity"].tolist()
    assert two["value"].to_numpy() == pytest.approx(one["value"].to_numpy(), rel=1e-4)
