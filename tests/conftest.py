"""Shared fixtures, seeds, and Triton's interpreter where there is no CUDA, chosen before triton is imported."""

from __future__ import annotations

import gc
import os
import random
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from helpers.compiled_exp import emulate_if_asked
from helpers.interpreted import patch_language_once
from helpers.marks import mark_slow

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_language_once()
    emulate_if_asked()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with small real models and data: $GFAST_SHARED, else `shared` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("GFAST_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no shared models and data at {folder}; set GFAST_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and two JSON lines files, for commands."""
    from helpers.cli import write_original

    return write_original(tmp_path_factory.mktemp("original"))


def seed(name: str) -> None:
    number = zlib.crc32(name.encode())
    for start in (random.seed, numpy.random.seed, torch.manual_seed):
        start(number)


# Every test and every fixture draws the same numbers in every run, alone or after others, in whichever process.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request) -> None:
    seed(f"{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item) -> None:
    seed(f"{item.path.name}::{item.name}")


@pytest.fixture(autouse=True)
def precision_of_its_own(monkeypatch) -> None:
    """TrainingArguments(bf16=True) of transformers 4 sets it for all trainers that follow in the process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    """A Trainer collects garbage whenever it trains, and goes through all modules and thousands of tests: half the time
    of its tests. What was there before a file, and what its first test imports, is left out.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton's bindings report at the end that they leak


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: the cores that this process may run on, up to eight, as every worker holds torch and transformers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


# Files of minutes, the longest first: begun last, one of them would have a worker to itself while the others idle. As
# pytest-xdist sorts files by their number of tests, it takes --no-loadscope-reorder to keep this order.
LONG = (
    "test_packaging.py",
    "test_instruction_sets.py",
    "test_ops_losses.py",
    "test_cli_terminal.py",
    "test_fuzz.py",
    "test_cuda_on_cpu.py",
    "test_training_killed.py",
    "test_bench.py",
    "test_demo.py",
    "test_vocab_parallel.py",
    "test_wrappers_parallel.py",
    "test_architectures.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest asks which are slow
def pytest_collection_modifyitems(items) -> None:
    """Long files first. And an id that holds an address differs between processes: pytest-xdist then runs nothing. Say
    it in every run.
    """
    for item in items:
        mark_slow(item)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving:
        raise pytest.UsageError(f"{moving[0]}: this id differs from run to run; give ids= a function that names it")
