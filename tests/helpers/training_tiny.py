"""A model, a tokenizer and data small enough to train in milliseconds, for the training tests."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gfast.data import (
    Collator,
    ForgetRetain,
    ForgetRetainCollator,
    PreferenceDataset,
    QADataset,
    RefusalDataset,
    bundled_authors,
    demo_tokenizer,
)
from gfast.training.config import UnlearnConfig

TOKENIZER = demo_tokenizer()
FORGET_ROWS, RETAIN_ROWS = (rows[:6] for rows in bundled_authors())


def tiny_model(seed: int = 0, layers: int = 2, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"vocab_size": len(TOKENIZER), "num_hidden_layers": layers, "initializer_range": 0.3, **sizes, **config}
    return LlamaForCausalLM(LlamaConfig(**settings))


def saved_tiny(folder, **config):
    """The folder, with a model and its tokenizer, as commands take it."""
    tiny_model(**config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def copied(model):
    return copy.deepcopy(model)


def datasets(kind: str = "qa", rows=None):
    rows = FORGET_ROWS if rows is None else rows
    make = {"qa": QADataset, "refusal": RefusalDataset, "pairs": PreferenceDataset}[kind]
    return make(rows, TOKENIZER), QADataset(RETAIN_ROWS, TOKENIZER, id_offset=1000)


def pairing(kind: str = "qa", rows=None):
    """Data set and collator of a training with both sides."""
    forget, retain = datasets(kind, rows)
    return ForgetRetain(forget, retain, seed=3), ForgetRetainCollator(TOKENIZER)


def collator():
    return Collator(TOKENIZER)


def config(folder, **options) -> UnlearnConfig:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        "objective": "GA",
    }
    return UnlearnConfig(**{**defaults, **options})


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def server():
    """A multiprocessing context whose processes are forked from a server that has imported everything once.

    They start at once, share no state with the test process, and may be killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "helpers.training_killed",
            "helpers.training_parallel",
            "helpers.files_shared",
            "helpers.integrations_parallel",
        ]
    )
    tests = str(Path(__file__).parents[1])  # what finds the package of this module
    if tests not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    return context


def in_processes(check, *given, world: int, seconds: float = 180):
    """`check(*given, rank, world, port)` in every process of a world; none may fail, or hang."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    processes = [context.Process(target=check, args=(*given, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    ends = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < ends:
        if any(process.exitcode for process in processes):
            ends = min(ends, time.monotonic() + 5)  # the others wait for it
        processes[0].join(timeout=0.05) if processes[0].is_alive() else time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
