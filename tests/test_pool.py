"""The pool of the CPU extension: freed gradients are used again, by one tensor at a time, within a limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

import gfast
from gfast.objectives import NPO, WGA
from gfast.ops.dispatch import compiled
from gfast.ops.memory import fresh

pytestmark = pytest.mark.skipif(not compiled("fresh"), reason="gfast._C is not built, or older than the pool")
CPU = torch.device("cpu")


def test_freed_memory_is_taken_again_and_never_shared():
    shape = (3, 1_500_000)
    first, second = (fresh(shape, torch.float32, CPU) for _ in range(2))
    pointers = {first.data_ptr(), second.data_ptr()}
    assert len(pointers) == 2 and first.is_contiguous() and first.shape == shape
    view = first[1:]
    del first
    third = fresh(shape, torch.float32, CPU)
    assert third.data_ptr() not in pointers  # a view keeps the memory
    del view, second
    again = {fresh(shape, torch.float32, CPU).data_ptr() for _ in range(3)}
    assert again <= pointers


def test_a_much_smaller_tensor_does_not_take_a_large_block():
    large = fresh((40_000_000,), torch.bfloat16, CPU)
    pointer = large.data_ptr()
    del large
    small = fresh((4_000_000,), torch.bfloat16, CPU)
    assert small.data_ptr() != pointer
    assert fresh((39_000_000,), torch.bfloat16, CPU).data_ptr() == pointer


@pytest.mark.parametrize("objective", [WGA(), NPO(0.1)], ids=str)
def test_gradients_do_not_depend_on_what_the_memory_held(objective):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 20, 33_000, generator=rng)  # a gradient of 10 MB
    labels = torch.randint(0, 33_000, (4, 20), generator=rng)
    labels[0, :5] = -100
    ref = torch.randn(4, 20, generator=rng) - 10

    def gradient() -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        gfast.unlearn_loss(leaf, labels, objective, ref_logp=ref).loss.backward()
        return leaf.grad

    first = gradient()
    expected = first.clone()
    second = gradient()
    assert second.data_ptr() != first.data_ptr() and torch.equal(first, expected) and torch.equal(second, expected)
    pointers = {first.data_ptr(), second.data_ptr()}
    first.fill_(torch.nan)
    second.fill_(torch.nan)
    del first, second
    third = gradient()
    assert third.data_ptr() in pointers and torch.equal(third, expected)


@pytest.mark.skipif(not compiled("unpooled"), reason="gfast._C is older than this op")
@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_keeps_no_gradient_of_a_weight(chunk_rows, dtype):
    """It lives beside what else the backward makes: what is freed of two of them goes back to the system."""
    torch.manual_seed(0)
    weight = torch.randn(60_000, 256, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 60_000, (2, 9))
    gfast.empty_cache()
    loss = 0.0
    for _ in range(2):
        hidden = torch.randn(2, 9, 256, dtype=dtype, requires_grad=True)
        loss = loss + gfast.linear_unlearn_loss(hidden, weight, labels, WGA(), chunk_rows=chunk_rows).loss
    loss.backward()
    weight.grad = None
    del loss, hidden
    # the sum of several chunks of bf16 rows is in fp32 and nobody's: the next call takes it again, as chunks of logits
    wide = 4 * weight.numel() if dtype == torch.bfloat16 and chunk_rows else 0
    assert gfast.empty_cache() - wide < weight.nbytes


@pytest.mark.parametrize(("limit", "kept"), [("0", False), ("64", True)])
def test_the_limit(limit, kept):
    code = """
import torch
from gfast.ops.memory import fresh
one = fresh((20_000_000,), torch.bfloat16, torch.device("cpu"))
one.zero_()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
del one
print(before - resident() < 20e6)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"GFAST_POOL_MIB": limit}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(kept), done.stderr


def run(code: str, **settings: str) -> subprocess.CompletedProcess:
    head = "import os, time, torch, gfast\nfrom gfast.ops.memory import fresh\ncpu = torch.device('cpu')\n"
    head += "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE')\n"
    return subprocess.run(
        [sys.executable, "-c", head + code], env=os.environ | settings, capture_output=True, text=True
    )


def test_empty_cache_gives_everything_back_that_nobody_uses():
    gfast.empty_cache()
    used, freed = (fresh((3_000_000,), torch.float32, CPU) for _ in range(2))
    used.fill_(3)
    del freed
    assert gfast.empty_cache() == 12 << 20  # in whole huge pages
    assert gfast.empty_cache() == 0 and (used == 3).all()


def test_blocks_that_nobody_takes_again_grow_old():
    code = """
one, other = (fresh((20_000_000,), torch.bfloat16, cpu).zero_() for _ in range(2))
del one
time.sleep(1.1)
before = resident()
del other  # young: it stays
print(30e6 < before - resident() < 60e6, gfast.empty_cache() >> 20)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")
    done = run(code, GFAST_POOL_SECONDS="1")
    assert done.stdout.split() == ["True", "40"], done.stdout + done.stderr


def test_a_setting_that_is_no_number_is_refused():
    """In one process: a setting that is refused is read again."""
    values = ["1G", "-1", "0x10", " 5", "99999999999999999999", "1.5"]
    code = f"""
for name in ("GFAST_POOL_MIB", "GFAST_POOL_SECONDS"):
    for value in {values}:
        os.environ[name] = value
        try:
            fresh((3_000_000,), torch.float32, cpu)
        except ValueError as error:
            print(error)
    os.environ[name] = "1000"
fresh((3_000_000,), torch.float32, cpu)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    said = [f"gfast: {name}='{value}' is not a whole number from 0" for name in ("GFAST_POOL_MIB", "GFAST_POOL_SECONDS")
            for value in values]  # fmt: skip
    assert len(lines := done.stdout.splitlines()) == len(said)
    assert all(line.startswith(one) for line, one in zip(lines, said, strict=True)), lines


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes fork")
def test_a_fork_amid_other_threads_leaves_a_pool_that_works():
    code = """
import threading
stop = False
def churn():
    while not stop:
        fresh((1_500_000,), torch.float32, cpu)
threads = [threading.Thread(target=churn) for _ in range(3)]
[t.start() for t in threads]
failed = 0
for _ in range(60):
    child = os.fork()
    if child == 0:
        import signal
        signal.alarm(20)
        one = torch.ops.gfast.fresh([1_500_000], torch.float32)
        del one
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
stop = True
[t.join() for t in threads]
print('failed', failed)
"""
    done = run(code)
    assert done.stdout.strip() == "failed 0", done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes fork")
def test_a_fork_amid_the_first_use_leaves_ops_that_work():
    # What a thread is making as it is first used, a child of that moment would wait for. Each trial is a copy of a
    # process that has used nothing yet.
    code = """
import signal, threading, gfast._C
logits, labels = torch.randn(1, 8), torch.zeros(1, dtype=torch.int64)
def use():
    torch.ops.gfast.fresh([1_500_000], torch.float32)
    torch.ops.gfast.logp_rows(logits, labels, 1.0, 0.0)
failed = 0
for trial in range(50):
    copy = os.fork()
    if copy == 0:
        signal.alarm(60)
        start = threading.Barrier(4)
        threads = [threading.Thread(target=lambda: (start.wait(), use())) for _ in range(3)]
        [t.start() for t in threads]
        start.wait()
        time.sleep(trial % 15 * 1e-5)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            use()
            os._exit(0)
        os._exit(os.waitpid(child, 0)[1] != 0)
    failed += os.waitpid(copy, 0)[1] != 0
    if failed: break
print('failed', failed)
"""
    done = run(code, OMP_NUM_THREADS="1")
    assert done.stdout.strip() == "failed 0", done.stdout + done.stderr


LIMITS = {
    "version 2": ("0::/a/b\n", {"a/memory.max": "7000", "a/b/memory.max": "max"}, 7000),
    "version 2, in a container": ("0::/elsewhere\n", {"memory.max": "5000"}, 5000),
    "version 1": ("9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n", {"memory/a/b/memory.limit_in_bytes": "300"}, 300),
    "version 1, a parent's": ("4:memory:/a/b\n", {"memory/a/memory.limit_in_bytes": "20"}, 20),
    "another controller": ("4:memoryless:/a\n", {"memory/a/memory.limit_in_bytes": "20"}, 2**64 - 1),
    "none": ("", {}, 2**64 - 1),
}


@pytest.fixture(scope="module")
def limit_reader(tmp_path_factory):
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("it takes g++")
    folder = tmp_path_factory.mktemp("limit")
    source = '#include "cpu/memory_limit.h"\n#include <iostream>\n'
    source += "int main(int, char** v) { std::cout << gfast::cgroup_limit(v[1], v[2]); }\n"
    (folder / "reader.cpp").write_text(source)
    csrc = os.path.join(os.path.dirname(__file__), "..", "csrc")
    subprocess.run([gxx, "-std=c++20", f"-I{csrc}", folder / "reader.cpp", "-o", folder / "reader"], check=True)
    return folder / "reader"


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_control_groups(name, limit_reader, tmp_path):
    groups, files, expected = LIMITS[name]
    (tmp_path / "cgroup").write_text(groups)
    for path, text in files.items():
        (tmp_path / "fs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / path).write_text(text + "\n")
    done = subprocess.run([limit_reader, tmp_path / "cgroup", tmp_path / "fs"], capture_output=True, text=True)
    assert int(done.stdout) == expected
