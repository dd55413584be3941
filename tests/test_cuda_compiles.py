"""The CUDA sources compile where there is no GPU: the host's against torch's headers, the device's by nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")


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
