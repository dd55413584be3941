"""The source of the CUDA kernel, run on the CPU in a model of CUDA: right, within its memory, free of races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
GXX = shutil.which("g++")

pytestmark = pytest.mark.skipif(GXX is None or os.name != "posix", reason="it takes g++")


def respelled(text: str) -> tuple[str, int, int]:
    """The kernel for the model: what is syntax of CUDA becomes calls. And how many fences and barriers it has."""

    def numbered(pattern: str, into) -> int:
        nonlocal text
        pieces, count = [], 0
        for count, match in enumerate(re.finditer(pattern, text), 1):  # noqa: B007
            pieces.append(match)
        assert count, f"nothing matches {pattern}"
        for number in reversed(range(count)):
            match = pieces[number]
            text = text[: match.start()] + into(match, number) + text[match.end() :]
        return count

    numbered(r"kThreads = 256\b", lambda m, _: "kThreads = 64")  # two warps: enough for all they can do to each other
    numbered(
        r"__shared__ (\w+) (\w+)(\[[^\]]*\])?;",
        lambda m, n: f"auto& {m[2]} = model::shared<{m[1]}{m[3] or ''}, {n}>();",
    )
    numbered(
        r"(\w+<D>)<<<(.*), (\w+), 0, stream>>>\(args\);",
        lambda m, _: f"model::launch({m[2]}, {m[3]}, [&] {{ {m[1]}(args); }});",
    )
    fences = numbered(r"__threadfence\(\)", lambda m, n: f"model::fence({n})")
    barriers = numbered(r"__syncthreads\(\)", lambda m, n: f"model::barrier({n})")
    return text, fences, barriers


KERNEL, FENCES, BARRIERS = respelled((CSRC / "cuda/grad_dots_kernel.cu").read_text())


def build(folder: Path, *flags: str) -> Path:
    (folder / "cuda").mkdir()
    header = (CSRC / "cuda/grad_dots_kernel.h").read_text()
    small = header.replace("kChunk = 1 << 16", "kChunk = 1 << 10")
    assert small != header
    (folder / "cuda/grad_dots_kernel.h").write_text(small)
    (folder / "kernel.inc").write_text(KERNEL)
    out = folder / "harness"
    command = [GXX, "-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", f"-I{folder}", f"-I{HERE}/cuda_on_cpu"]
    done = subprocess.run(
        [*command, *flags, HERE / "cuda_on_cpu/harness.cpp", "-o", out, "-pthread"], capture_output=True, text=True
    )
    if done.returncode and ("cannot find" in done.stderr or "unrecognized" in done.stderr):
        pytest.skip(f"this g++ has no {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    # ThreadSanitizer cannot start at some of the addresses that the system picks at random
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    # at the first race, as threads that a barrier no longer holds together may wait for each other for ever
    settings = dict(env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}, capture_output=True, text=True, timeout=100)
    done = subprocess.run([*fixed, program, *arguments], **settings)
    if "failed to set personality" in done.stderr:
        done = subprocess.run([program, *arguments], **settings)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not start at the addresses this system gives")
    return done


@pytest.fixture(scope="module")
def threads(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("threads"), "-fsanitize=thread")


def test_it_is_right_and_stays_within_its_memory(tmp_path):
    program = build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = run(program, "cases")
    assert done.returncode == 0 and done.stdout.endswith("all right\n"), done.stdout + done.stderr[-4000:]


def test_no_thread_reads_what_another_may_be_writing(threads):
    done = run(threads, "orders")
    assert done.returncode == 0 and done.stdout.endswith("all right\n"), done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize(
    "left_out",
    [*(("fence", n) for n in range(FENCES)), *(("barrier", n) for n in range(BARRIERS)), ("exchange", 0)],
    ids=lambda one: f"{one[0]} {one[1]}",
)
def test_every_fence_barrier_and_atomic_is_needed_and_missed(threads, left_out):
    """Else the test before this one could not fail."""
    done = run(threads, "orders", left_out[0], str(left_out[1]))
    assert done.returncode != 0 and ("data race" in done.stderr or "not " in done.stdout), done.stdout + done.stderr
