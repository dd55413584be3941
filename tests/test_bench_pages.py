"""The pages that benchmarks render, the names of devices and results, and what the README of bench/ explains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


def render(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCH / "report.py"), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_names_of_devices(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import machine

    for model, name in (("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("Tesla T4", "t4")):
        assert machine.gpu_name(model) == name
    for model, name in (("Intel(R) Xeon(R) Processor @ 2.80GHz", "xeon"), ("AMD EPYC 7B13", "epyc")):
        assert machine.family(model) == name
    assert re.fullmatch(r"cpu-[a-z0-9-]+", machine.device_name())
    monkeypatch.setenv("GFAST_BENCH_DEVICE", "my-machine")
    assert machine.device_name("cuda") == "my-machine"
    monkeypatch.setenv("GFAST_BENCH_DEVICE", "../elsewhere")
    with pytest.raises(ValueError, match="names a folder"):
        machine.device_name()


def test_results_go_to_the_folder_of_the_device(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    import machine

    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    payload = {"environment": machine.environment()}
    name = payload["environment"]["name"]
    assert machine.write_json("losses.json", payload) == tmp_path / name / "losses.json"
    assert machine.write_json(str(tmp_path / "x" / "y.json"), payload) == tmp_path / "x" / "y.json"


def test_pages_of_this_repository_are_rendered():
    done = render(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = (ROOT / "docs" / "performance.md").read_text().split("<!-- pictures:begin -->")[1]
    assert len(re.findall(r"\(performance/\w+\.png\)", shown)) == 5


def test_every_provider_is_explained(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import geffect
    import losses

    text = (BENCH / "README.md").read_text()
    known = [
        name for name in [*losses.PROVIDERS, *geffect.PROVIDERS] if "), " not in name
    ]  # the same by another engine
    assert [name for name in known if f"`{name}`" not in text] == []


def test_ranges_are_gone_after_a_profile(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import geffect
    import losses
    import traces

    from gfast.ops.head import ChunkedHead

    before = ChunkedHead.logits
    with traces.named(losses.RANGES | geffect.RANGES):  # all of which exist
        assert ChunkedHead.logits is not before
    assert ChunkedHead.logits is before
