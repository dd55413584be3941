"""bench/on_gpu.sh without a GPU: its plan, its order, and that a cut at any moment loses nothing that was finished."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"

pytestmark = pytest.mark.skipif(os.name != "posix" or shutil.which("bash") is None, reason="it takes bash and sessions")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def call(out: Path, *words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(BENCH / "on_gpu.sh"), str(out), *words],
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(out.parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def archived(out: Path) -> dict[str, bytes]:
    """Name -> content of every file of the archive, which must be whole to its end."""
    with tarfile.open(out / "all.tar.gz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive.getmembers()}


def finished(summary: str) -> list[str]:
    """Steps that a summary says are done."""
    return re.findall(r"^(?:DRY RUN )? *[\d.]+ s  (\S+) +ok", summary, re.M)


def planned(bench, name: str = "first") -> list:
    return [step for stage in bench("gpu_plan").CALLS[name] for step in stage]


# The plan


def test_each_call_fits_its_window_and_tells_of_results_within_two_minutes(bench):
    plan = bench("gpu_plan")
    for name, stages in plan.CALLS.items():
        assert plan.ends(stages)[-1] <= plan.SECONDS == 540, name
        names = [step.name for stage in stages for step in stage]
        assert len(names) == len(set(names))
    first = dict(zip((stage[0].name for stage in plan.FIRST), plan.ends(plan.FIRST), strict=True))
    assert first[f"kernel_{next(iter(plan.KERNELS))}"] <= 120  # every kernel has been tested once
    order = ["build", "kernel_logp_rows", "rows", "linear", "scoring", "grad_dot", "tests_cuda", "counters"]
    order += ["tiles", "peer_liger", "1b", "7b", "overhead"]
    assert [name for name in first if name in order] == order


def test_the_plan_stands_in_the_head_of_the_script(bench):
    text = (BENCH / "on_gpu.sh").read_text()
    head = text.split("# plan:begin\n")[1].split("# plan:end")[0]
    assert [line.removeprefix("# ") for line in head.splitlines()] == bench("gpu_plan").table(bench("gpu_plan").FIRST)
    calls = [name for name in bench("gpu_plan").CALLS if name != "first"]
    assert calls and all(f"--{name}" in text for name in calls)


def test_benchmarks_are_called_with_what_they_know(bench):
    """A typo in a flag, a provider or a head would only show on the GPU."""
    run, seen = bench("run"), 0
    for name in bench("gpu_plan").CALLS:
        for step in planned(bench, name):
            if "bench/run.py" in step.command:
                run.parser().parse_args(list(step.command[2:]))  # exits at what it does not know
                assert step.result.split("_")[0] == step.command[2].split("_")[0]
                seen += 1
    assert seen > 20


@pytest.mark.slow
def test_tests_of_kernels_exist(bench):
    ids = list(bench("gpu_plan").KERNELS.values())
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *ids]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert all(test in done.stdout for test in ids)


def test_every_marked_file_is_among_the_tests_of_the_gpu(bench):
    (step,) = [step for step in planned(bench) if step.name == "tests_cuda"]
    assert {"tests/test_gpu.py", "tests/test_grad_dot.py", "tests/test_triton.py"} <= set(step.command)


def test_the_extension_is_built_by_any_setuptools(tmp_path):
    """Of a project whose pyproject.toml the installed one refuses, as setuptools before 77 does gfast's."""
    (tmp_path / "bench").mkdir()
    shutil.copy(BENCH / "build.py", tmp_path / "bench")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 1\n")
    (tmp_path / "setup.py").write_text(
        "from setuptools import Extension, setup\n"
        "from setuptools.command.build_ext import build_ext\n"
        "class Build(build_ext):\n"
        "    def run(self): open('built', 'w').write(f'{self.inplace} {[e.name for e in self.extensions]}')\n"
        "setup(ext_modules=[Extension('gfast._C', sources=[])], cmdclass={'build_ext': Build}, packages=[])\n"
    )
    for command, works in ([["setup.py", "build_ext", "--inplace"], False], [["bench/build.py"], True]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr[-2000:]
    assert (tmp_path / "built").read_text() == "True ['gfast._C']"


# The dry run


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[Path, str, int]:
    out = tmp_path_factory.mktemp("dry") / "out"
    process = call(out, "--dry", GFAST_DRY_FAIL="linear,1b")
    printed, _ = process.communicate(timeout=120)
    return out, printed, process.returncode


def test_a_dry_run_goes_through_the_plan_in_its_order(dry, bench):
    out, printed, status = dry
    assert status == 2, printed  # two steps were to fail, and stopped none
    record = json.loads(archived(out)["dry-run/on_gpu.json"])
    came = iter([one["step"] for one in record["steps"]])
    for stage in bench("gpu_plan").CALLS["first"]:
        names = [step.name for step in stage]
        assert sorted(names) == sorted(next(came, "") for _ in names)  # the steps of a stage end in any order
    assert next(came, None) is None
    assert {one["step"]: one["outcome"] for one in record["steps"] if one["outcome"] != "ok"} == {
        "build_cpu": "skipped: build did it",
        "linear": "failed with 1",
        "1b": "failed with 1",
    }
    assert (out / "summary.txt").read_bytes() == archived(out)["summary.txt"]


def test_what_a_dry_run_leaves_cannot_be_taken_for_a_result(dry, bench, tmp_path):
    files = archived(dry[0])
    assert len(list(dry[0].iterdir())) <= 8 and all(path.stat().st_size <= 16 << 20 for path in dry[0].iterdir())
    assert not any(name.startswith("results") for name in files)  # what README's tar command unpacks
    results = {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}
    assert len(results) > 10 and all(data["dry_run"] for data in results.values())
    times = [row["median_ms"] for data in results.values() for row in data.get("rows", [])]
    assert times and all(time < 0 for time in times)
    assert "DRY RUN" in files["summary.txt"].decode() and all(
        b"DRY RUN" in files[n] for n in files if n.endswith(".log")
    )
    folder = tmp_path / "bench" / "results" / "h200"
    folder.mkdir(parents=True)
    (folder / "losses.json").write_bytes(files["dry-run/losses_linear.json"])
    with pytest.raises(ValueError, match="dry run"):
        bench("report").results(tmp_path)
    committed = (ROOT / "bench" / "results").glob("*/*.json")
    assert not [path for path in committed if '"dry_run": true' in path.read_text()]


POINTS = [pytest.param(lines, 0.01 * lines, id=f"after {lines}") for lines in (1, 7, 16)]
POINTS += [pytest.param(n, random.Random(n).random() * 0.3, marks=pytest.mark.slow, id=str(n)) for n in range(24)]


@pytest.mark.parametrize("lines, more", POINTS)
def test_a_kill_loses_no_step_that_was_finished(lines, more, tmp_path):
    out = tmp_path / "out"
    process = call(out, "--dry")
    summary = out / "summary.txt"
    end = time.monotonic() + 60
    while not summary.exists() or len(summary.read_text().splitlines()) < max(1, lines):
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.002)
    time.sleep(more)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    said, files = finished(summary.read_text()), archived(out)
    assert len(said) >= max(1, lines - 1)  # build_cpu is skipped
    assert said == finished(files["summary.txt"].decode())[: len(said)]
    record = {one["step"]: one["outcome"] for one in json.loads(files["dry-run/on_gpu.json"])["steps"]}
    for name in said:
        assert record[name] == "ok" and b"DRY RUN" in files[f"logs/{name}.log"]
    results = {name: json.loads(content) for name, content in files.items() if name.startswith("dry-run/")}
    for name in set(said) & {"rows", "linear", "scoring", "peer_liger"}:
        assert len(results[f"dry-run/losses_{name}.json"]["rows"]) == 2
    assert len(list(out.iterdir())) <= 8
    assert len(list(out.glob("*.part"))) <= 1


def test_an_earlier_archive_is_not_written_over(tmp_path):
    (tmp_path / "all.tar.gz").write_bytes(b"of before")
    process = call(tmp_path, "--dry")
    assert "earlier call" in process.communicate()[0] and process.returncode == 1
    assert (tmp_path / "all.tar.gz").read_bytes() == b"of before"


def test_without_a_gpu_nothing_is_run(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    process = call(tmp_path / "out", "--steps", "rows")
    printed, _ = process.communicate()
    assert (
        process.returncode == 1 and "sees no CUDA device" in printed and not (tmp_path / "out" / "all.tar.gz").exists()
    )


# Steps


def made(bench, tmp_path: Path, seconds: float = 60.0, **facts):
    on_gpu = bench("on_gpu")
    known = {"environment": {"name": "gpu"}, "arch": "90", "missing": ["absent"], "workers": ["-n", "2"], "folders": []}
    (tmp_path / "out").mkdir()
    return on_gpu.Call(tmp_path / "out", tmp_path / "work", False, seconds, {**known, **facts})


class Clock:
    """Stands in for on_gpu's time: it goes on by sleeps while it may: a machine that stalls changes nothing."""

    def __init__(self, goes):
        self.now, self.goes = 0.0, goes

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(0.001)
        self.now += seconds if self.goes() else 0.0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def shell(bench, name: str, line: str, seconds: int = 1, **more):
    return bench("gpu_plan").Step(name, seconds, "what", ("bash", "-c", line), **more)


def outcomes(made_call) -> dict[str, str]:
    return {one["step"]: one["outcome"] for one in made_call.steps}


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="processes are looked up in /proc")
def test_a_step_that_fails_hangs_or_cannot_run_stops_no_other(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench("on_gpu"), "GRACE", 0.2)
    orphan = tmp_path / "orphan"
    clock = Clock(goes=lambda: orphan.exists() and "hangs" not in outcomes(run))
    monkeypatch.setattr(bench("on_gpu"), "time", clock)
    run = made(bench, tmp_path)
    pid = f"echo $BASHPID > {orphan}.part; mv {orphan}.part {orphan}"
    stubborn = f"trap '' TERM; (trap '' TERM INT; {pid}; sleep 600) & sleep 600"
    for stage in (
        [shell(bench, "bad", "echo why; exit 3")],
        [shell(bench, "hangs", stubborn), shell(bench, "beside", "true")],
        [shell(bench, "here_not", "echo no permission; exit 77")],
        [shell(bench, "needy", "true", needs=("absent",)), shell(bench, "tool", "true", tool="no-such-tool")],
        [shell(bench, "instead", "true", unless="bad"), shell(bench, "needless", "true", unless="beside")],
        [
            shell(bench, "spoilt", "false", without=(("SPOILT", "1"),)),
            shell(bench, "fine", "true", without=(("FINE", "1"),)),
        ],
        [shell(bench, "last", 'test "$GFAST_CUDA_ARCH$SPOILT$FINE" = 901')],
    ):
        run.run(tuple(stage), 60)
    assert outcomes(run) == {
        "bad": "failed with 3",
        "hangs": "cut after 2 s",
        "beside": "ok",
        "here_not": "skipped: no permission",
        "needy": "skipped: absent: not installed",
        "tool": "skipped: no-such-tool was not found",
        "instead": "ok",
        "needless": "skipped: beside did it",
        "spoilt": "failed with 1",
        "fine": "ok",
        "last": "ok",
    }
    end = time.monotonic() + 60
    while is_running(int(orphan.read_text())):  # what a step started goes with it
        assert time.monotonic() < end
        time.sleep(0.01)
    summary = archived(run.out)["summary.txt"].decode()
    assert "| why" in summary and set(outcomes(run)) <= set(re.findall(r"s  (\S+)", summary))


def test_time_left_over_goes_to_later_steps_and_none_is_taken_from_them(bench, tmp_path, monkeypatch):
    started, enough = tmp_path / "started", tmp_path / "enough"
    clock = Clock(goes=lambda: started.exists() and not enough.exists() and (clock.now < 1.5 or enough.touch()))
    monkeypatch.setattr(bench("on_gpu"), "time", clock)
    run = made(bench, tmp_path)
    run.run((shell(bench, "quick", "true", seconds=3),), 3)
    line = f"touch {started}; until [ -e {enough} ]; do sleep 0.01; done"
    run.run((shell(bench, "slow", line, seconds=1),), 4)  # more than its own second, within what was left
    assert run.elapsed >= 1.5
    assert outcomes(run) == {"quick": "ok", "slow": "ok"}
    run.run((shell(bench, "late", "sleep 9", seconds=9),), run.elapsed + 1)
    assert outcomes(run)["late"] == "skipped: no time left"


def test_a_case_is_in_the_archive_before_its_step_is_over(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench("on_gpu"), "EVERY", 0.1)
    run = made(bench, tmp_path)
    case, enough = run.results / "losses.json", tmp_path / "enough"
    seen = []
    archive = run.archive

    def archived_now():
        archive()
        seen.append("results/gpu/losses.json" in archived(run.out))
        if any(seen):
            enough.touch()

    monkeypatch.setattr(run, "archive", archived_now)
    line = f"echo '{{}}' > {case}; until [ -e {enough} ]; do sleep 0.01; done"
    run.run((shell(bench, "losses", line, seconds=30),), 60)
    assert seen.count(True) > 1 and outcomes(run) == {"losses": "ok"}


def test_what_is_too_large_is_left_out_and_no_result_with_it(bench, tmp_path, monkeypatch):
    on_gpu = bench("on_gpu")
    monkeypatch.setattr(on_gpu, "MOST", 100 << 10)
    run = made(bench, tmp_path)
    noise = random.Random(0).randbytes(300 << 10)
    (run.work / "traces").mkdir()
    (run.work / "traces" / "trace.json").write_bytes(noise)
    (run.work / "logs" / "long.log").write_bytes(noise + b"the end")
    (run.results / "losses.json").write_text("{}")
    (run.results / "half.json.part").write_text("{")
    run.archive()
    files = archived(run.out)
    assert (run.out / "all.tar.gz").stat().st_size <= 100 << 10
    assert files["results/gpu/losses.json"] == b"{}" and b"too many" in files["traces/trace.json.left-out"]
    assert files["logs/long.log"].endswith(b"the end") and not any(".part" in name for name in files)
