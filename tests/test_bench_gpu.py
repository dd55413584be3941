"""What the benchmarks measure by on a GPU, without one: its clock, counters, tiles, and the numbers made of them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


class FakeCuda:
    """A device whose clock is moved by the work given to it: a spin, then a kernel of 3 ms a call."""

    def __init__(self, monkeypatch, waits: bool = False):
        import torch

        self.now, self.done_at, self.waits, self.spins = 0.0, 0.0, waits, []
        monkeypatch.setattr("harness.time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.wait())
        monkeypatch.setattr(torch.cuda, "_sleep", self.spin, raising=False)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))

    def wait(self) -> None:
        self.now = max(self.now, self.done_at)

    def launch(self, seconds: float) -> None:
        self.done_at = max(self.now, self.done_at) + seconds

    def spin(self, cycles: int) -> None:
        self.spins.append(cycles)
        self.launch(cycles / 1e9)  # slower than the fastest clock: it takes longer

    def step(self) -> None:
        self.now += 0.002  # the host
        self.launch(0.001)
        if self.waits:
            self.wait()
        self.now += 0.001
        self.launch(0.002)


class FakeEvent:
    def __init__(self, device: FakeCuda):
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.now, self.device.done_at)

    def query(self) -> bool:
        return self.device.now >= self.at

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


def test_a_gpu_is_timed_behind_a_spin_and_the_host_apart(bench, monkeypatch):
    harness, cuda = bench("harness"), FakeCuda(monkeypatch)
    found = harness.cuda_times(cuda.step)
    assert found.device == pytest.approx(0.003) and found.host == pytest.approx(0.003) and found.queued
    assert found.wall == pytest.approx(0.005)  # 2 ms of Python, then 3 ms of kernels; 1 ms of Python beside them
    assert cuda.spins[0] / 2.5e9 >= 2 * 0.003
    row = harness.aside([found])
    assert row == {"wall_ms": 5.0, "host_ms": 3.0, "queued": True}
    assert harness.aside([]) == {}


def test_a_step_that_waits_for_the_gpu_is_said_to_be_not_queued(bench, monkeypatch):
    harness, cuda = bench("harness"), FakeCuda(monkeypatch, waits=True)
    found = harness.cuda_times(cuda.step)
    assert not found.queued and found.device > 0.003  # the host's part is in it
    monkeypatch.setattr(harness, "QUEUE_S", 0.001)
    cuda.spins.clear()
    assert not harness.cuda_times(cuda.step).queued and not cuda.spins


def test_what_is_here_is_asked_of_a_process_of_its_own(bench, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = bench("on_gpu").probe(["torch", "no_such_module", "torch.nn:Linear", "torch.nn:NoSuchOptions"])
    assert found["missing"] == ["no_such_module", "torch.nn:NoSuchOptions"]
    assert found["arch"] == "90" and found["environment"]["name"] == "h200" and "commit" in found["environment"]
    assert found["workers"] in ([], ["-n", str(min(6, os.cpu_count() or 1))])


NCU = """#!/usr/bin/env bash
echo "==PROF== Connected to process 1"
cat <<END
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","count_valid","dram__bytes_read.sum","byte","1,000"
"0","1","count_valid","dram__bytes_write.sum","byte","0"
"1","1","weighted_rows_kernel","dram__bytes_read.sum","byte","30,000"
"1","1","weighted_rows_kernel","dram__bytes_write.sum","byte","20000.5"
"1","1","weighted_rows_kernel","lts__t_sectors_op_read.sum","sector","200"
"1","1","weighted_rows_kernel","lts__t_sectors_op_read_lookup_hit.sum","sector","50"
END
"""


def test_counters_add_up_the_kernels_of_a_call(bench, tmp_path, monkeypatch):
    counters = bench("counters")
    ncu = tmp_path / "ncu"
    ncu.write_text(NCU)
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    args = bench("run").parser().parse_args(["counters", "--head", "tiny", "--rows", "16", "--model", "tiny"])
    rows = {row["op"]: row for row in counters.bench(args)}
    assert set(rows) == {"weighted_rows", "kl_rows", "chunk_dots"}
    one = rows["weighted_rows"]
    assert one["must"] == 2 * 16 * 512 * 2 and one["bytes"] == 51000 and one["of_bytes"] == round(51000 / 32768, 4)
    assert [kernel["l2_hits"] for kernel in one["kernels"]] == [None, 0.25]
    assert rows["kl_rows"]["must"] == 3 * 16 * 512 * 2
    ncu.write_text("#!/usr/bin/env bash\necho '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1\n")
    assert all("no permission" in row["failed"] for row in counters.bench(args))
    monkeypatch.setattr(counters, "SECONDS", 0.01)
    ncu.write_text("#!/usr/bin/env bash\nsleep 1\n")
    assert all("TimeoutExpired" in row["failed"] for row in counters.bench(args))


@pytest.mark.parametrize("op", ["weighted_rows", "kl_rows", "chunk_dots"])
def test_what_the_counters_are_read_of_runs(op, bench):
    args = bench("run").parser().parse_args(["counters", "--head", "tiny", "--rows", "16", "--model", "tiny"])
    bench("counters").profiled(op, args)


def test_tiles_are_checked_before_they_are_timed(bench, monkeypatch):
    from gfast.ops.dispatch import why_not

    if why := why_not("unlearn_loss", "triton", "cpu"):
        pytest.skip(why)
    tiles = bench("tiles")
    common, own = tiles.common, tiles.common.tile
    monkeypatch.setattr(tiles, "WARPS", (4,))
    monkeypatch.setattr(tiles, "WARPS_PER_SM", (32,))
    args = bench("run").parser().parse_args(["tiles", "--head", "tiny", "--rows", "8"])
    rows = list(tiles.bench(args))
    assert [row["name"] for row in rows[:2]] == ["copy", "own"] and len(rows) > 2
    assert all(row["median_ms"] > 0 for row in rows)
    assert rows[2]["tile"] != rows[1]["tile"] and common.tile is own


def test_numbers_of_a_gpu_are_rendered_and_misses_are_bold(bench, tmp_path):
    report, laws = bench("report"), bench("laws")
    base = {"environment": {"date": "2026-01-01", "name": "h200"}}
    row = {"op": "logits", "dtype": "bf16", "batch": "full", "head": "llama-3.1-8b", "provider": "gfast", "rows": 8192}
    row |= {"mode": "train", "objective": "wga", "median_ms": 1.0, "times_floor": 1.05, "host_ms": 0.06}
    slow = {**row, "op": "linear", "rows": 2048, "median_ms": 9.0, "peak_extra_mb": 3000.0}
    steps = [{"step": "build", "outcome": "ok"}, {"step": "tiles", "outcome": "cut after 25 s"}]
    found = [
        laws.Result("h200", "losses", "losses_rows", {**base, "rows": [row, slow]}),
        laws.Result("h200", "on_gpu", "on_gpu", {**base, "steps": steps}),
    ]
    text = report.gpu(found, tmp_path)
    assert "| a copy | 90% of its bandwidth |  | 95% | 1.05 | 0.06 ms |  |" in text  # nothing is predicted there
    assert "| under 7.96 ms |  | **9.00 ms** |" in text and "3000 MB" in text
    done = report.steps(found, tmp_path)
    assert "has run on a GPU" not in text and "| cut after 25 s |" in done and "`build` |" in done
    nothing = report.gpu([], report.ROOT)
    assert "Nothing of gfast has run on a GPU" in nothing and "| ok |" not in report.steps([], tmp_path)
    assert nothing.count("|  |") >= 7 and "| 90% of its bandwidth | 100% |  |" in nothing  # what the machine code says
