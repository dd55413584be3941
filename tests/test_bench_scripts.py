"""The benchmarks' shell scripts, and those of every op at small shapes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


def test_micro_benchmarks_run_once():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", str(BENCH / "micro")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_public_function_has_a_micro_benchmark():
    import inspect

    import gfast

    text = (BENCH / "micro" / "test_micro.py").read_text()
    functions = [name for name in gfast.__all__ if inspect.isfunction(getattr(gfast, name))]
    assert len(functions) >= 14
    assert [name for name in functions if f"gfast.{name}(" not in text and f'"{name}"' not in text] == []


def test_micro_benchmarks_are_not_collected_by_default():
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text()


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 90; exit 0 ;;
  *harness.py*) echo h200; exit 0 ;;
  -c*|*gfast.doctor*) exit 0 ;;
esac
result=''
while [ $# -gt 0 ]; do [ "$1" = --json ] && result=$2; shift; done
[ -n "$result" ] && echo "$CONTENT" > "$result"
exit "$STATUS"
"""


@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and timeout")
def test_on_gpu_never_loses_an_earlier_result(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "out"

    def call(content: str, status: int) -> int:
        environment = {"PYTHON": str(python), "GFAST_GPU_STEPS": "losses grad_dot", "CONTENT": content}
        environment["STATUS"] = str(status)
        return subprocess.run(
            ["bash", str(BENCH / "on_gpu.sh"), str(out)], env={**os.environ, **environment}, capture_output=True
        ).returncode

    assert call("part", 1) == 2  # two steps failed, and what they had is better than nothing
    assert (out / "h200" / "losses.json").read_text() == "part\n"
    assert call("whole", 0) == 0
    assert call("part of the next", 1) == 2
    assert (out / "h200" / "losses.json").read_text() == "whole\n"
    assert (out / "partial" / "losses.json").read_text() == "part of the next\n"
    assert "FAILED  losses" in (out / "summary.txt").read_text()


@pytest.mark.parametrize("name", ["on_gpu.sh", "on_cpu.sh"])
def test_scripts_are_called_with_what_they_know(name, monkeypatch):
    """Flags, providers and names in the shell scripts: a typo there would only show hours later, or on a GPU."""
    monkeypatch.syspath_prepend(str(BENCH))
    import run

    text = (BENCH / name).read_text().replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+)=(\(.*\)|'.*'|[\w,]+)$", text, re.M))
    for key, more in re.findall(r"^(\w+)\+=('.*'|[\w,]+)$", text, re.M):
        variables[key] += more
    lines = [shlex.split(line)[1:] for line in text.splitlines() if line.lstrip().startswith("bench ")]
    assert len(lines) >= 12
    known = {**variables, "sweep": "batch", "out": "out"}
    for words in lines:
        words = words[1:] if name == "on_cpu.sh" else words[3:]  # after the step, or the step, its seconds and result
        while any(word.startswith("${") for word in words):  # arrays of arguments
            words = [part for w in words for part in (shlex.split(variables[w[2:-4]][1:-1]) if w[0:2] == "${" else [w])]
        words = [re.sub(r"\$(\w+)", lambda found: known[found[1]].replace("'", ""), word) for word in words]
        run.parser().parse_args(words)  # exits at a flag or a name that it does not know
    for script in re.findall(r"bench/(\w+\.py)", text):
        assert (BENCH / script).is_file()
