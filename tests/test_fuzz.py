"""500 cases of the fuzzer: `python tests/fuzz 100000` runs more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import slow_when

from gfast.ops.dispatch import compiled

FUZZ = Path(__file__).parent / "fuzz"

pytestmark = pytest.mark.skipif(not compiled("empty_cache"), reason="gfast._C is not built, or an older one")


def fuzz(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(FUZZ), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GFAST_FUZZ_BREAK": code}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_what_is_taken_is_right_and_nothing_crashes():
    done = fuzz("500")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "500 cases, seed 0: 0 failed" in done.stdout


@slow_when(lambda p: p.code == "exit")
@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("wrong", "FAILED case 7:"),
        ("crash", "CRASHED case 7: SIGSEGV"),
        ("exit", "CRASHED case 7: status 3"),
    ],
)
def test_a_failing_case_is_named_and_the_others_run(code, found):
    done = fuzz("12", code=code)
    assert done.returncode == 1 and found in done.stdout, done.stdout + done.stderr
    assert "python tests/fuzz --seed 0 --case 7\n" in done.stdout and "12 cases, seed 0: 1 failed" in done.stdout
