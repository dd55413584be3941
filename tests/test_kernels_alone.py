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


# What the compiler makes of them in full is in gfast._C and tested there (test_instruction_sets.py).
QUICK = ["-O1" if flag == "-O3" else flag for flag in FLAGS]


def objects(compiler: str, folder: Path, flags: list[str], csrc: Path = CSRC, only: str = "*") -> dict[str, Path]:
    """The kernels' sources compiled, and tests/kernels_alone beside all of them; by name."""

    def compiled(source: Path) -> Path:
        out = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([compiler, *flags, f"-I{csrc}", "-c", source, "-o", out], check=True)
        return out

    sources = [*sorted(csrc.glob(f"cpu/kernels/{only}.cpp")), *([HERE / "kernels_alone/kernels.cpp"] * (only == "*"))]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        return dict(zip((source.stem for source in sources), pool.map(compiled, sources), strict=True))


def linked(compiler: str, folder: Path, some: dict[str, Path]) -> Path:
    """The program of tests/kernels_alone."""
    subprocess.run([compiler, "-static", *some.values(), "-o", folder / "kernels"], check=True)
    return folder / "kernels"


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> dict[str, Path]:
    return objects(NATIVE, tmp_path_factory.mktemp("here"), QUICK)


def assert_right(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("0 of "), done.stdout + done.stderr


@native
@pytest.mark.slow
def test_right_on_this_machine(here, tmp_path):
    assert_right(linked(NATIVE, tmp_path, here))


@native
@pytest.mark.slow
def test_a_wrong_kernel_is_found(here, tmp_path):
    """Else the tests beside this one could not fail: one digit of the exponential's polynomial is changed."""
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    path = csrc / "cpu/kernels/exp.h"
    text = path.read_text()
    assert text.count("0x1.55548ap-3f") == 1
    path.write_text(text.replace("0x1.55548ap-3f", "0x1.56548ap-3f"))
    wrong = {name: objects(NATIVE, tmp_path, QUICK, csrc, name)[name] for name in ("rows", "kl")}
    done = subprocess.run([linked(NATIVE, tmp_path, here | wrong)], capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED weighted_rows" in done.stdout and "FAILED kl_rows" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(ARM is None, reason="it takes aarch64-linux-gnu-g++ (see make arm-check)")
def test_right_on_64_bit_arm(tmp_path):
    program = linked(ARM, tmp_path, objects(ARM, tmp_path, FLAGS))
    if QEMU is None:
        pytest.skip("compiled, but not run: it takes qemu-aarch64 (see make arm-check)")
    assert_right(QEMU, program)
