"""Builds the source of a CUDA kernel for the model of CUDA in tests/cuda_on_cpu, and runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

MODEL = Path(__file__).parents[1] / "cuda_on_cpu"
CSRC = Path(__file__).parents[2] / "csrc"
GXX = shutil.which("g++") if os.name == "posix" else None
ADDRESSES = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)


class Source(NamedTuple):
    """A kernel for the model.

    Attributes:
        harness: of tests/cuda_on_cpu, without ".cpp". Its kernel is csrc/cuda/NAME_kernel.cu.
        text: the kernel, what is syntax of CUDA become calls. header: its NAME_kernel.h, with sizes for a test.
        counts: of what a run can leave out, as "fence": 2.
    """

    harness: str
    text: str
    header: str
    counts: dict[str, int]


def source(name: str, small: dict[str, str]) -> Source:
    """The kernel of csrc/cuda/NAME_kernel.cu with the texts of ``small``, of kernel or header, replaced."""
    text, header = ((CSRC / f"cuda/{name}_kernel.{end}").read_text() for end in ("cu", "h"))
    for old, new in small.items():
        assert (old in text) + (old in header) == 1, f"{name}: {old!r} stands in one of both files no longer"
        text, header = text.replace(old, new), header.replace(old, new)

    def numbered(pattern: str, into) -> int:
        """Replaces every match by ``into(match, its number)``; how many there are."""
        nonlocal text
        matches = list(re.finditer(pattern, text))
        for number, match in reversed(list(enumerate(matches))):
            text = text[: match.start()] + into(match, number) + text[match.end() :]
        return len(matches)

    numbered(r"extern __shared__ (\w+) (\w+)\[\];", lambda m, _: f"auto* {m[2]} = model::dynamic<{m[1]}>();")
    numbered(
        r"__shared__ (\w+) (\w+)(\[[^\]]*\])?;",
        lambda m, n: f"auto& {m[2]} = model::shared<{m[1]}{m[3] or ''}, {n}>();",
    )
    numbered(
        r"(\w+<D>)<<<(.*), (\w+), 0, stream>>>\(args\);",
        lambda m, _: f"model::launch({m[2]}, {m[3]}, [&] {{ {m[1]}(args); }});",
    )
    counts = {
        "fence": numbered(r"__threadfence\(\)", lambda _, n: f"model::fence({n})"),
        "barrier": numbered(r"__syncthreads\(\)", lambda _, n: f"model::barrier({n})"),
        "wait": numbered(r"cluster_wait\(\)", lambda _, n: f"model::cluster_wait({n})"),
        "arrival": numbered(r"await_arrival\((\w+)\)", lambda m, n: f"model::await_arrival({m[1]}, {n})"),
        "bulk fence": numbered(r"fence_bulk\(\)", lambda _, n: f"model::fence_bulk({n})"),
    }
    assert "<<<" not in text and "__shared__" not in text
    return Source(name, text, header, counts)


def build(kernel: Source, folder: Path, *flags: str) -> Path:
    """The harness with the kernel in it; ``folder`` is empty."""
    (folder / "cuda").mkdir()
    (folder / f"cuda/{kernel.harness}_kernel.h").write_text(kernel.header)
    shutil.copy(CSRC / "cuda/elements.h", folder / "cuda")
    (folder / "kernel.inc").write_text(kernel.text)
    out = folder / "harness"
    command = [GXX, "-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", f"-I{folder}", f"-I{MODEL}", *flags]
    done = subprocess.run(
        [*command, MODEL / f"{kernel.harness}.cpp", "-o", out, "-pthread"], capture_output=True, text=True
    )
    if done.returncode and ("cannot find" in done.stderr or "unrecognized" in done.stderr):
        pytest.skip(f"this g++ has no {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    # ThreadSanitizer cannot start at some of the addresses that the system picks at random
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    # at the first race, as threads that a barrier no longer holds together may wait for each other for ever
    settings = dict(env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}, capture_output=True, text=True, timeout=300)
    done = subprocess.run([*fixed, program, *arguments], **settings)
    if "failed to set personality" in done.stderr:
        done = subprocess.run([program, *arguments], **settings)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not start at the addresses this system gives")
    return done


def assert_right(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0 and done.stdout.endswith("all right\n"), done.stdout + done.stderr[-4000:]


def assert_missed(done: subprocess.CompletedProcess) -> None:
    """A run with something left out failed, by a race or by a wrong result."""
    assert done.returncode != 0 and ("data race" in done.stderr or "not " in done.stdout), done.stdout + done.stderr
