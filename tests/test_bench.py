"""The benchmarks end to end on tiny shapes: what they measure, what they refuse, what is made of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench_pages import BENCH, ROOT, render

DEVICE = "cpu-test"
PAGES = ("README.md", "docs/performance.md", "docs/performance-gpu.md", "docs/performance-missed.md")
ENVIRONMENT = {"name", "device", "instructions", "cores", "threads", "torch", "peers", "python", "commit", "date"}
ENVIRONMENT |= {"gfast_build"}
# Half a minute of small runs, which their scripts' own tests and the pages' (test_bench_pages.py) do without.
pytestmark = pytest.mark.slow

# One interpreter for all runs: each imports torch and transformers, which takes longer than the measurements.
RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for line in sys.stdin.read().splitlines():
    script, *arguments = line.split("\\t")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


def run(lines: list[list[str]], **environment: str) -> str:
    text = "\n".join("\t".join([str(BENCH / "run.py"), *line]) for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(BENCH)],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    """A copy of the pages with results of tiny runs beside it, and what the runs printed."""
    root = tmp_path_factory.mktemp("bench")
    (root / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, root / page)
    results = root / "bench" / "results" / DEVICE
    results.mkdir(parents=True)
    few = ["--repetitions", "2", "--budget", "1", "--no-memory"]
    loss = ["losses", "--heads", "tiny", *few, "--providers", "gfast,gfast_logp,floor,fresh_copy,eager,liger"]
    effect = ["geffect", "--model", "tiny", *few, "--tokens", "12"]
    providers = [
        "--providers",
        "g_effect(GA);g_effect(WGA);clone loop, WGA;published way;sample loop;pg_effect;gram_effect",
    ]

    def to(name: str) -> list[str]:
        return ["--json", str(results / name)]

    modes = ["--rows", "64", "--objectives", "wga,nll", "--modes", "train,forward,frozen,nograd"]
    lines = [
        [*loss, *modes, "--batches", "full,tofu", "--dtypes", "fp32", *to("losses.json")],
        [*loss, "--sweep", "vocab", "--values", "256,512", "--rows", "64", *to("losses_sweep_vocab.json")],
        [*effect, "--batch", "2", *providers, *to("geffect.json")],
        [
            *effect,
            "--sweep",
            "length",
            "--values",
            "6,12",
            "--batch",
            "2",
            *providers,
            *to("geffect_sweep_length.json"),
        ],
        ["live", "--model", "tiny", "--repetitions", "2", "--batch", "2", "--tokens", "10", *to("live.json")],
        ["overhead", "--models", "tiny", "--rounds", "1", "--batch", "2", "--tokens", "10", *to("overhead.json")],
        [
            *["losses", "--profile", "--heads", "tiny", "--rows", "64", "--objectives", "wga", "--dtypes", "bf16"],
            *["--traces", str(root), *to("profile_losses.json")],
        ],
        ["geffect", "--profile", "--model", "tiny", "--tokens", "12", "--traces", str(root)]
        + to("profile_geffect.json"),
        ["grad_dot", "--model", "tiny", "--pairs", "bf16:fp32", "--repetitions", "2", *to("grad_dot.json")],
    ]
    return root, run(lines)


def read(root: Path, name: str) -> dict:
    data = json.loads((root / "bench" / "results" / DEVICE / name).read_text())
    assert ENVIRONMENT <= set(data["environment"])
    assert str(Path.home()) not in json.dumps(data["environment"])
    return data


def test_losses_in_every_mode_and_batch(made):
    rows = read(made[0], "losses.json")["rows"]
    cases = {(row["op"], row["objective"], row["mode"], row["batch"]) for row in rows}
    assert len(cases) == 2 * 2 * 4 * 2 - 4  # logits have no frozen head
    for row in rows:
        if row["provider"] == "liger":
            assert row["skipped"] in ("not installed", "needs a GPU")
            continue
        assert row["median_ms"] > 0 and row["repetitions"] >= 1
        assert (row.get("gb_per_s") if row["op"] == "logits" else row.get("tflop_per_s")) is not None
        if row["provider"] not in ("floor", "fresh_copy"):
            assert row["relative_error"] < 1e-5
    assert {row["valid"] for row in rows if row["batch"] == "full"} == {64}
    assert all(0 < row["valid"] < 40 for row in rows if row["batch"] == "tofu")
    lawful = {(row["op"], row["mode"]) for row in rows if row["provider"] == "gfast" and "law" in row}
    assert lawful == {("logits", "train"), ("linear", "train"), ("linear", "frozen"), ("linear", "nograd")}
    floors = {row["mode"]: row for row in rows if row["op"] == "linear" and row["provider"] == "floor"}
    assert set(floors) == {"train", "forward", "frozen", "nograd"}


def test_sweeps_have_a_row_at_every_value(made):
    rows = read(made[0], "losses_sweep_vocab.json")["rows"]
    assert {row["vocab"] for row in rows if row["provider"] == "gfast"} == {256, 512}
    data = read(made[0], "geffect_sweep_length.json")
    assert data["sweep"] == "length"
    assert {row["length"] for row in data["rows"] if row["name"] == "g_effect(WGA)"} == {6, 12}


def test_geffect_rows_and_laws(made):
    data = read(made[0], "geffect.json")
    rows = {row["name"]: row for row in data["rows"]}
    assert {"plain pass", "plain forward", "g_effect(WGA)", "clone loop, WGA", "sample loop"} <= set(rows)
    for name in ("g_effect(GA)", "g_effect(WGA)", "clone loop, WGA", "published way", "sample loop"):
        assert rows[name]["error"] < 1e-5 and rows[name]["median_ms"] > 0
    assert rows["g_effect(GA)"]["floor"] == "2 plain passes" and rows["g_effect(GA)"]["law"] == 1.05
    assert rows["pg_effect"]["floor"] == "3 plain passes + 1 forward" and rows["pg_effect"]["law"] == 1.15
    assert rows["gram_effect"]["floor"] == "1 training step" and rows["gram_effect"]["law"] == 1.0
    assert rows["gram_effect"]["of_passes_without_dw"]["floor"] == "2 passes without dW"
    assert rows["pg_effect"]["error"] < 1e-5 and rows["gram_effect"]["error"] < 1e-5
    assert data["settings"]["parameters"] > 1000


def test_profiles_leave_traces_with_the_named_ranges(made):
    root, printed = made
    for name, ranges in (
        ("profile_losses.json", {"gfast::row kernel", "gfast::chunk/head GEMM"}),
        ("profile_geffect.json", {"gfast::pass", "gfast::batch/forward", "gfast::batch/backward"}),
    ):
        runs = read(root, name)["runs"]
        found = {row["range"] for one in runs for row in one["ranges"]}
        assert ranges <= found
        assert all(one["ops"] and one["step_ms"] > 0 for one in runs)
    traces = sorted(root.glob("*.json"))
    assert [trace.name.split("_")[0] for trace in traces] == ["geffect", "losses", "losses"]
    for trace in traces:
        assert any(
            event.get("name", "").startswith("gfast::") for event in json.loads(trace.read_text())["traceEvents"]
        )
    assert "Self CPU time total" in printed


def test_grad_dot_is_held_against_the_read_bandwidth(made):
    rows = read(made[0], "grad_dot.json")["rows"]
    assert {(row["case"], row["directions"]) for row in rows} == {("bf16:fp32", 1), ("bf16:fp32", 2)}
    assert {row["provider"] for row in rows} == {"sum", "copy", "gfast"}  # torch.dot takes one dtype
    assert all(row["law"] == 0.85 and row["error"] < 1e-6 for row in rows if row["provider"] == "gfast")


def test_missed_memory_is_named(made):
    root = shutil.copytree(made[0], made[0].parent / "memory")
    path = root / "bench" / "results" / DEVICE / "losses.json"
    data = json.loads(path.read_text())
    assert not any("of_memory" in row for row in data["rows"])  # these runs did not measure it
    for row in data["rows"]:
        if (row["op"], row["provider"], row["mode"]) == ("linear", "gfast", "frozen"):
            row["of_memory"] = {"allowed_mb": 1.0, "ratio": 1.3, "law": 1.1, "law_met": False}
    path.write_text(json.dumps(data))
    between, report = rendered(root)
    assert "| `linear_unlearn_loss`, peak memory | at most 1.1 times what it has to hold |" in between
    assert "| `linear_unlearn_loss`, peak memory | at most 1.1 times its gradients and one chunk of logits |" in report
    missed = (root / "docs" / "performance-missed.md").read_text()
    assert re.search(r"peak memory \| 1\.10 \| `cpu-test` \| [^\n]*tiny, full\), frozen: 1\.30", missed)


def rendered(root: Path) -> tuple[str, str]:
    """README's measured part, and docs/performance.md."""
    assert render(root).returncode == 0
    page = (root / "README.md").read_text()
    between = page.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    return between, (root / "docs" / "performance.md").read_text()


def test_pages_are_what_the_results_say(made):
    root = shutil.copytree(made[0], made[0].parent / "pages")
    assert render(root, "--check").returncode == 1
    between, report = rendered(root)
    assert render(root, "--check").returncode == 0
    tables = [lines for lines in between.split("\n\n") if lines.startswith("|")]
    assert len(tables) == 1 and len(tables[0].splitlines()) <= 2 + 6  # the README stays readable
    assert "docs/performance.md" in between and f"../bench/results/{DEVICE}/losses.json" in report
    path = root / "bench" / "results" / DEVICE / "geffect.json"
    path.write_text(path.read_text().replace('"ratio": ', '"ratio": 1'))
    told = render(root, "--check")
    assert told.returncode == 1 and "README.md" in told.stdout and "python bench/report.py" in told.stdout


def test_devices_stand_side_by_side(made):
    root = shutil.copytree(made[0], made[0].parent / "devices")
    laws = rendered(root)[0].split("\n\n")[1]
    assert laws.startswith("| what | law | `cpu-test` | NVIDIA GPU |")
    assert all(line.endswith("|  |") for line in laws.splitlines()[2:])  # until there is one
    shutil.copytree(root / "bench" / "results" / DEVICE, root / "bench" / "results" / "h200")
    between, report = rendered(root)
    for laws in (between.split("\n\n")[1], report.split("<!-- laws:begin -->")[1].split("<!-- laws")[0]):
        rows = laws[laws.index("| what") :].strip().splitlines()
        assert rows[0].startswith("| what | law | `cpu-test` | `h200` |") and len(rows) >= 5
        for line in rows[2:]:
            *_, one, other, _ = line.split("|")
            assert one == other and one.strip()


def test_a_page_without_its_markers_is_refused(made):
    root = shutil.copytree(made[0], made[0].parent / "markers")
    page = root / "docs" / "performance-missed.md"
    page.write_text(page.read_text().replace("<!-- missed:end -->", ""))
    told = render(root, "--check")
    assert told.returncode != 0 and "must have one <!-- missed:begin -->" in told.stderr


def test_missed_laws_are_named(made):
    root = shutil.copytree(made[0], made[0].parent / "missed")
    path = root / "bench" / "results" / DEVICE / "geffect.json"
    data = json.loads(path.read_text())
    row = next(row for row in data["rows"] if row["name"] == "g_effect(GA)")
    row |= {"ratio": 1.5, "law_met": False}
    path.write_text(json.dumps(data))
    between, _ = rendered(root)
    assert re.search(r"\| `g_effect` \| at most 1\.05 .*\*\*\d of \d\*\*: ", between)
    missed = (root / "docs" / "performance-missed.md").read_text().split("<!-- missed:begin -->")[1]
    (line,) = [line for line in missed.splitlines() if line.startswith("| `g_effect` |")]
    assert line.startswith("| `g_effect` | 1.05 | `cpu-test` | ")
    assert "g_effect(GA), tiny, fp32, 2 x 12 tokens a batch: 1.50" in line


def test_pictures_of_every_kind(made):
    root = shutil.copytree(made[0], made[0].parent / "pictures")
    done = render(root)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem for path in (root / "docs" / "performance").glob("*.png")}
    assert drawn == {"laws", "losses", "geffect", "sweeps"}
    report = (root / "docs" / "performance.md").read_text()
    assert all(f"(performance/{name}.png)" in report for name in drawn) and "geffect_peers.png" not in report


def test_overhead_of_measuring(made):
    rows = read(made[0], "overhead.json")["rows"]
    assert [row["every"] for row in rows] == [None, 10, 5, 1]
    assert all(row["step_ms"] > 0 for row in rows) and rows[0]["of_plain_step"] == 1.0
    assert rows[3]["of_plain_step"] == pytest.approx(rows[3]["step_ms"] / rows[0]["step_ms"], rel=0.01)
    assert rows[3]["loop_floor_ms"] > 0


def test_live_effects_are_judged_by_the_plain_step(made):
    rows = {row["name"]: row for row in read(made[0], "live.json")["rows"]}
    assert rows["retain side"]["law"] == 1.05 and rows["both sides"]["law"] == 1.25 and "law" not in rows["plain step"]
    assert rows["retain side, update"]["floor"] == "retain side" and rows["retain side"]["of_memory"]["law"] == 1.0
    assert all(row["median_ms"] > 0 for row in rows.values())
