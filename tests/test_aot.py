"""The Triton kernels compiled for real GPUs, where there is none, and what their machine code holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "bench" / "static.py"
STARTED = ROOT / "tests" / "helpers" / "started.py"
OTHER = "GFAST_TRITON"  # a folder with another version of Triton: pip install --no-deps --target FOLDER triton==3.6.0
INSTALLED = pytest.param(False, id="installed")
BOTH = [INSTALLED, pytest.param(True, id="other")]


def said(other: bool, *arguments: str) -> str:
    """Standard output of a Python process in which Triton compiles."""
    folder = os.environ.get(OTHER)
    if other and not folder:
        pytest.skip(f"no other version of Triton: {OTHER} names no folder that holds one")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([*([folder] if other else []), str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_compiles_ahead_of_time():
    """Every kernel compiles for real GPUs, from a process in which Triton is not interpreted."""
    assert "all 22 compiled" in said(False, "-m", "gfast.kernels.aot", "--quick", "80", "90")


def test_machine_code_is_no_worse_than_recorded():
    """Instructions an element, 128-bit loads and stores, matrix instructions, spills: of each kernel's first case."""
    assert "all 11 as recorded" in said(False, str(STATIC), "--check", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("other", BOTH)
def test_machine_code_of_every_case(other):
    assert "as recorded" in said(other, str(STATIC), "--check")


@pytest.mark.slow
@pytest.mark.parametrize("other", BOTH)
def test_whatever_the_jit_can_make(other):
    """Integers that are 1 or not divisible by 16, strides of 64 bits."""
    assert "compiled" in said(other, "-m", "gfast.kernels.aot", "--jit", "90").splitlines()[-1]


def test_what_the_ops_start():
    """Through the launchers and Triton's JIT up to the launch, of aligned rows in fp32 and bf16."""
    assert "compiled" in said(False, str(STARTED), "--quick").splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("other", BOTH)
def test_whatever_the_ops_start(other):
    """And of odd rows, rows apart from each other, one column, no row."""
    assert "compiled" in said(other, str(STARTED)).splitlines()[-1]


def test_the_record():
    """What the kernels are meant to be, in the figures of the version of Triton that GPU machines have."""
    record = json.loads((ROOT / "bench" / "results" / "static" / "sm_90.json").read_text())
    assert len({frozenset(of_one) for of_one in record.values()}) == 1, "a kernel that one version has no figures of"
    for label, one in record["3.6.0"].items():
        assert one["local_in_loops"] == 0 and one["local_memory"] <= 32, label
        name, *words = label.split()
        assert bool(one["matrix"]) == (name == "row_dot" and words[0] != "fp32"), label
        if name in ("row_dot", "label_factor", "stat_rows", "stat_rows_grad"):
            continue
        aligned = not label.endswith("V=50257")
        assert (one["loads_128"], one["stores_128"]) == (aligned, aligned or one["bytes"] == 2), label
        if not aligned or "forward" in words or "js" in words:  # a Jensen-Shannon divergence reads a row once more
            continue
        if one["softcap"]:  # not bound by memory: docs/performance-gpu.md says why
            assert one["share_of_copy"] > (0.3 if name in ("kl_rows", "soft_rows") else 0.5), label
        else:
            least = {"kl_rows": 0.9, "soft_rows": 0.7}.get(name, 1.0)  # of a cross-entropy the entropy of q as well
            assert one["share_of_copy"] >= least, label


def test_a_worse_kernel_is_seen(tmp_path):
    """The same record with one figure lowered."""
    code = "import static; r = dict(slots=9.0, special=1.0, local_memory=0, loads_128=True, stores_128=True, "
    code += "matrix={}, local_in_loops=0); assert not static.worse(r, r); print(static.worse({**r, 'slots': 9.1, "
    code += "'loads_128': False, 'local_in_loops': 2}, r), static.worse(r, {**r, 'matrix': {'HGMMA': 4}}))"
    text = said(False, "-c", f"import sys; sys.path.insert(0, {str(STATIC.parent)!r}); {code}")
    for word in ("slots 9.1, recorded 9", "no loads_128", "local memory inside", "matrix instructions"):
        assert word in text
