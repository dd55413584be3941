"""The CPU kernels compiled without torch: for this machine, and for 64-bit ARM by a cross compiler, run under QEMU.

`make arm-check` runs them; on Debian and Ubuntu it takes `apt-get install g++-aarch64-linux-gnu qemu-user`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
# as CMakeLists.txt compiles kernels of the instruction set that every CPU has
FLAGS = ["-std=c++20", "-O3", "-DGFAST_ISA=default", "-fno-math-errno", "-fno-trapping-math", "-w", "-static"]
ARM, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
NATIVE = shutil.which("g++") if os.name == "posix" else None
native = pytest.mark.skipif(NATIVE is None, reason="it takes g++")


def built(compiler: str, folder: Path, csrc: Path = CSRC, flags: list[str] = FLAGS) -> Path:
    """The program of tests/kernels_alone with the kernels."""

    def compiled(source: Path) -> Path:
        out = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([compiler, *flags, f"-I{csrc}", "-c", source, "-o", out], check=True)
        return out

    sources = [HERE / "kernels_alone/kernels.cpp", *sorted(csrc.glob("cpu/kernels/*.cpp"))]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, "-static", *objects, "-o", folder / "kernels"], check=True)
    return folder / "kernels"


def assert_right(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("0 of "), done.stdout + done.stderr


@native
@pytest.mark.slow
def test_right_on_this_machine(tmp_path):
    assert_right(built(NATIVE, tmp_path))


@native
@pytest.mark.slow
def test_a_wrong_kernel_is_found(tmp_path):
    """Else the tests beside this one could not fail: one digit of the exponential's polynomial is changed."""
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    path = csrc / "cpu/kernels/exp.h"
    text = path.read_text()
    assert text.count("0x1.55548ap-3f") == 1
    path.write_text(text.replace("0x1.55548ap-3f", "0x1.56548ap-3f"))
    quick = ["-O1" if flag == "-O3" else flag for flag in FLAGS]
    done = subprocess.run([built(NATIVE, tmp_path, csrc, quick)], capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED weighted_rows" in done.stdout and "FAILED kl_rows" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(ARM is None, reason="it takes aarch64-linux-gnu-g++ (see make arm-check)")
def test_right_on_64_bit_arm(tmp_path):
    program = built(ARM, tmp_path)
    if QEMU is None:
        pytest.skip("compiled, but not run: it takes qemu-aarch64 (see make arm-check)")
    assert_right(QEMU, program)
