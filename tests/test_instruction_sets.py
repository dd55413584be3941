"""The numerical tests of the compiled CPU kernels again on every other instruction set this CPU has, and with two
threads, in processes of their own: the set is fixed at first use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    from gfast import _C
except ImportError as error:
    pytest.skip(f"gfast._C is not built: {error}", allow_module_level=True)
if "GFAST_CPU_ISA" in os.environ:
    pytest.skip("this is already a run on another instruction set", allow_module_level=True)

HERE = Path(__file__).parent
TESTS = {  # file: those of its tests that reach the kernels
    "test_cpp_rows.py": "not bad and not thread",
    "test_cpp_rows_extremes.py": "not bad and not thread",
    "test_linear_forward.py": "fold or keep_their_digits",
    "test_linear_head.py": "one_chunk_or_many or multiplied_in_fp32 or sum_over_chunks",
    "test_linear_extremes.py": "few_rows and (cpp or 7-4099)",
    "test_vocab_parallel.py": "of_parts",
    "test_mixed_mm.py": "not refuse",
    "test_head_grads.py": "not refuse",
    "test_pair_dots.py": "not refuse",
    "test_row_dot.py": "cpp or threads or finite",
    "test_grad_dot.py": "cpp and not compiles",
    "test_geffect_gram_products.py": "used_rows or (pair_sums and not refuse)",
}
# some of each, in `make test`
FEW = {
    "test_cpp_rows.py": "row_counts or in_place or (weighted_and_logp and 31)",
    "test_linear_forward.py": "keep_their_digits",
    "test_mixed_mm.py": "not refuse",
    "test_grad_dot.py": "cpp and (pair_of_dtypes or any_number or patterns)",
}
BRGEMM = ("test_mixed_mm.py", "test_head_grads.py", "test_pair_dots.py", "test_row_dot.py")


# What makes the libraries compute as on a CPU without more: they choose by what the CPU has, whatever gfast is told.
LIBRARIES = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
}


def environment(isa: str, threads: int) -> dict[str, str]:
    """One thread: only gfast's kernels change. Two: the libraries' too. Threads that wait must not spin: there may be
    more of them than cores."""
    chosen = {"GFAST_CPU_ISA": isa, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **chosen, **(LIBRARIES[isa] if threads > 1 else {})}


# Says what the process computes with, then runs the tests of the first expression, or of the second without brgemm.
RUN = """
import sys, pytest
from gfast.ops.dispatch import extension, has_cpu_kernel
brgemm = has_cpu_kernel("mixed_mm")
print(extension()[0].build_info()["instruction_set"], brgemm, flush=True)
sys.exit(pytest.main([*sys.argv[3:], "-k", sys.argv[1 if brgemm else 2]]))
"""


def run_on(isa: str, threads: int, tests: dict[str, str]) -> None:
    """One process for all files: importing torch takes longer than most of them."""
    info, env = _C.build_info(), environment(isa, threads)
    if isa not in info["instruction_sets"] or (isa == info["instruction_set"] and threads == 1):
        pytest.skip(f"{isa} is not built, or is the one tested already")

    def expression(files: list[str]) -> str:
        of_files = " or ".join(f"({file.removesuffix('.py')} and ({tests[file]}))" for file in files)
        # by no instruction set of ours: Triton's kernels are interpreted, and the reference is the libraries'
        return f"({of_files}) and not triton" + (" and not reference" if threads == 1 else "")

    chosen = [expression([*tests]), expression(rest := [file for file in tests if file not in BRGEMM])]
    words = [*chosen, "-v", "-p", "no:cacheprovider", *(str(HERE / file) for file in tests)]
    done = subprocess.run([sys.executable, "-c", RUN, *words], env=env, capture_output=True, text=True)
    if "not available on this CPU" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    used, brgemm = done.stdout.split(maxsplit=2)[:2]
    assert used == isa
    for file in tests if brgemm == "True" else rest:
        assert re.search(rf"{re.escape(file)}::\S+ PASSED", done.stdout), f"nothing of {file} ran"


@pytest.mark.slow
@pytest.mark.parametrize("isa", LIBRARIES)
def test_every_instruction_set(isa):
    run_on(isa, 1 if isa == "default" else 2, TESTS)  # its libraries take minutes, and are not gfast's


@pytest.mark.parametrize("isa", LIBRARIES)
def test_a_few_of_them_on_every_other_set(isa):
    run_on(isa, 1, FEW)
