"""The numerical tests of the compiled CPU kernels again on every other instruction set this CPU has, in processes of
their own: the set is fixed at first use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gfast.ops.backend import has_cpu_kernel

try:
    from gfast import _C
except ImportError as error:
    pytest.skip(f"gfast._C is not built: {error}", allow_module_level=True)
if "GFAST_CPU_ISA" in os.environ:
    pytest.skip("this is already a run on another instruction set", allow_module_level=True)

HERE = Path(__file__).parent
TESTS = {  # file: those of its tests that reach the kernels
    "test_cpp_rows.py": "not bad and not threads",
    "test_linear_head.py": "fold or one_chunk_or_many or multiplied_in_fp32 or keep_their_digits or sum_over_chunks",
    "test_linear_extremes.py": "cpp and few_rows",
    "test_vocab_parallel.py": "of_parts",
    "test_mixed_mm.py": "not refuse",
    "test_head_grads.py": "not refuse",
    "test_pair_dots.py": "not refuse",
    "test_row_dot.py": "cpp or threads or finite",
    "test_grad_dot.py": "cpp",
    "test_geffect_gram.py": "used_rows or (pair_sums and not refuse)",
}
BRGEMM = ("test_mixed_mm.py", "test_head_grads.py", "test_pair_dots.py", "test_row_dot.py")


def environment(isa: str) -> dict[str, str]:
    return {**os.environ, "GFAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}


@pytest.fixture(params=("default", "avx2", "avx512"), scope="module")
def isa(request):
    name = request.param
    if name not in _C.build_info()["instruction_sets"] or name == _C.build_info()["instruction_set"]:
        pytest.skip(f"{name} is not built, or is the one tested already")
    probe = f"import torch; from gfast import _C; assert _C.build_info()['instruction_set'] == {name!r}"
    done = subprocess.run([sys.executable, "-c", probe], env=environment(name), capture_output=True, text=True)
    if "not available on this CPU" in done.stderr:
        pytest.skip(f"this CPU has no {name}")
    assert done.returncode == 0, done.stderr
    return name


def test_every_instruction_set(isa):
    """One process for all files: importing torch takes longer than most of them."""
    files = [file for file in TESTS if file not in BRGEMM or has_cpu_kernel("mixed_mm")]
    chosen = " or ".join(f"({file.removesuffix('.py')} and ({TESTS[file]}))" for file in files)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *(str(HERE / file) for file in files)]
    done = subprocess.run([*command, "-k", chosen], env=environment(isa), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    for file in files:
        assert re.search(rf"{re.escape(file)}::\S+ PASSED", done.stdout), f"nothing of {file} ran"
