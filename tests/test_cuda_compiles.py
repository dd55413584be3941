"""The CUDA sources compile where there is no GPU: the host's against torch's headers, the device's by nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(p.name for p in (CSRC / "cuda").glob("*.cpp")))
def test_host_code_against_the_real_headers(source, tmp_path):
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *([str(Path(NVCC).resolve().parents[1])] if NVCC else [])]
    cuda = [f"{home}/include" for home in homes if Path(home, "include/cuda_runtime_api.h").exists()]
    ours = [path for path in include_paths() if Path(path, "c10/cuda/CUDAStream.h").exists()]
    if not cuda or not ours or not shutil.which("g++"):
        pytest.skip("it takes g++, CUDA's headers and a torch that brings its own for CUDA")
    if torch.version.cuda is None:  # a torch without CUDA lacks this one header, which its build writes
        macros = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
        macros.parent.mkdir(parents=True)
        macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    system = [*include_paths(), cuda[0], sysconfig.get_paths()["include"]]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", f"-I{tmp_path}", f"-I{CSRC}"]
    command += [part for path in system for part in ("-isystem", path)]
    done = subprocess.run([*command, CSRC / "cuda" / source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
def test_device_code_compiles_without_spills():
    done = subprocess.run([CSRC / "cuda/compile_check.sh", "80", "90", "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("kernels compiled") == len(list((CSRC / "cuda").glob("*.cu")))


def inner_loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that holds no other."""
    at = {int(m[1], 16): m[2] for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)}
    ends = {
        (int(m[1], 16), address) for address, text in at.items() if (m := re.search(r"\bBRA .*?(0x[0-9a-f]+)", text))
    }
    spans = {(begin, end) for begin, end in ends if begin < end}
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[text for address, text in at.items() if begin <= address <= end] for begin, end in inner]


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
@pytest.mark.parametrize("sm", [90, 100])
def test_held_rows_take_few_instructions(sm, tmp_path):
    """At the speed of a copy an SM of an H200 moves 4.1 elements of 16 bits a cycle, and issues 128: 31 for each."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        knobs = pytest.importorskip("triton").knobs
        try:
            tool = knobs.nvidia.cuobjdump.path
        except Exception as error:
            pytest.skip(f"no cuobjdump: {error}")
    cubin = tmp_path / "rows.cubin"
    source = CSRC / "cuda/rows_kernel.cu"
    subprocess.run(
        [NVCC, "-std=c++20", "-O3", f"-I{CSRC}", f"-arch=sm_{sm}", "-cubin", source, "-o", cubin], check=True
    )
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"\n\s+Function : ", text)[1:]
    assert len(kernels) == 3
    for kernel in kernels:
        assert not re.search(r"\b(LDL|STL)\b", kernel), "local memory"
        assert "UBLKCP" in kernel and "UCGABAR_WAIT" in kernel, "no bulk copy, or no barrier of clusters"
        slots: dict[str, list[float]] = {"maximum": [], "sum": [], "gradient": []}
        for loop in inner_loops(kernel):
            exps, loads = (sum(name in line for line in loop) for name in ("MUFU.EX2", "LDS.128"))
            if loads == 0:
                continue
            kind = "maximum" if exps == 0 else "gradient" if any("STG" in line for line in loop) else "sum"
            assert kind != "gradient" or any("STG.E.EF.128" in line for line in loop), "narrow stores"
            # an exponential an element; a vector of 16 bytes holds 4 of fp32, 8 of 16 bits
            slots[kind].append(len(loop) / (exps or loads * (4 if "weighted_rowsIf" in kernel else 8)))
        total = sum(min(found) for found in slots.values())  # of the unrolled loops; there are some for remainders
        assert total <= 13, slots
