"""`gfast doctor`: one screen, and the one thing to do."""

from __future__ import annotations

import types

import pytest
import torch

from gfast import cli
from gfast.ops import dispatch


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "unlearn_loss" in said and len(said.splitlines()) <= 20
    assert cli.main(["doctor", "--all"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, advice",
    [
        ({}, "Nothing is missing"),
        ({"torch": "2.0.0"}, "built for torch 2.0.0"),
        ({"threads": False}, "built without OpenMP"),
        (None, "Build the C++ kernels"),
    ],
)
def test_doctor_says_the_one_thing_to_do(changes, advice, monkeypatch, capsys):
    info = {"torch": torch.__version__, "threads": True, "cuda": False, "cuda_reason": "", "instruction_set": "avx2"}
    module = changes is not None and types.SimpleNamespace(build_info=lambda: info | changes)
    monkeypatch.setattr("gfast.ops.dispatch.extension", lambda: (module or None, "gfast._C could not be imported"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    for name in ("OMP_NUM_THREADS", "GFAST_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if torch.cuda.is_available():
        pytest.skip("the advice is for a machine without a GPU")
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert advice in said[-2]


def test_kernels_for_nvidia_gpus_are_not_taken_on_others(monkeypatch):
    """Triton's compiler for AMD refuses their options, in an error of its own at the first launch."""
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert "NVIDIA" in dispatch.why_not("unlearn_loss", "triton", "cuda")
