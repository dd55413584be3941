"""The benchmarks' shell scripts, and those of every op at small shapes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

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


def test_on_cpu_calls_with_what_is_known(monkeypatch):
    """Flags, providers and names in the shell script: a typo there would only show hours later."""
    monkeypatch.syspath_prepend(str(BENCH))
    import run

    text = (BENCH / "on_cpu.sh").read_text().replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+)=(\(.*\)|'.*'|[\w,]+)$", text, re.M))
    for key, more in re.findall(r"^(\w+)\+=('.*'|[\w,]+)$", text, re.M):
        variables[key] += more
    lines = [shlex.split(line)[1:] for line in text.splitlines() if line.lstrip().startswith("bench ")]
    assert len(lines) >= 12
    for words in (line[1:] for line in lines):  # after the step
        while any(word.startswith("${") for word in words):  # arrays of arguments
            words = [part for w in words for part in (shlex.split(variables[w[2:-4]][1:-1]) if w[0:2] == "${" else [w])]
        words = [re.sub(r"\$(\w+)", lambda found: variables[found[1]].replace("'", ""), word) for word in words]
        run.parser().parse_args(words)  # exits at a flag or a name that it does not know
    for script in re.findall(r"bench/(\w+\.py)", text):
        assert (BENCH / script).is_file()
