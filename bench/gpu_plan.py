"""What bench/on_gpu.sh runs, in which order and for how long: three calls, each for a window of ten minutes.

The most telling come first. A stage is one step, or several that run at once, each in a process of its own. What a step
finds out is a file: results/DEVICE/RESULT.json, written again after every case, and logs/NAME.log.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 540  # of a call: ten minutes less the start of a machine's first process and the end of the last


@dataclass(frozen=True)
class Step:
    """``command`` runs in the repository; "{python}" and "{result}", the file to write, are put in.

    ``needs`` are modules that must be importable, or "module:attribute"; ``tool`` is a program that must be found;
    ``unless`` a step whose success makes this one needless; ``without`` the environment of all later steps where this
    one does not succeed.
    """

    name: str
    seconds: int
    what: str
    command: tuple[str, ...]
    result: str | None = None
    needs: tuple[str, ...] = ()
    tool: str | None = None
    unless: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    without: tuple[tuple[str, str], ...] = ()


Stage = tuple[Step, ...]


def bench(name: str, seconds: int, what: str, arguments: str, **more) -> Stage:
    """A benchmark on the GPU. The first argument is its kind, with which the name of its result begins."""
    kind, *words = shlex.split(arguments)
    command = ("{python}", "bench/run.py", kind, *words, "--device", "cuda", "--json", "{result}")
    return (Step(name, seconds, what, command, kind if name == kind else f"{kind}_{name}", **more),)


def tests(name: str, seconds: int, what: str, arguments: str, **more) -> Step:
    words = shlex.split(arguments)
    return Step(name, seconds, what, ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", *words), **more)


def checked(name: str, seconds: int, what: str, arguments: str, tool: str = "") -> Stage:
    """Tests under compute-sanitizer. torch's own pool of memory would hide reads beyond the end of a tensor."""
    step = tests(name, seconds, what, arguments)
    words = f"compute-sanitizer --error-exitcode 86 --launch-timeout 60 --target-processes all {tool}".split()
    env = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return (Step(name, seconds, what, (*words, *step.command), tool=words[0], env=env),)


def files_with(mark: str) -> str:
    """The test files that have a mark: collecting all the others takes longer than running these."""
    files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if mark in path.read_text())
    return " ".join(f"tests/{path.name}" for path in files)


KERNELS = {  # kernel or what it is used for: a test of it
    "logp_rows": "tests/test_triton.py::test_logp_rows_and_grad",
    "weighted_rows": "tests/test_triton.py::test_weighted_rows_ragged",
    "kl_rows": "tests/test_triton.py::test_kl_rows",
    "scale": "tests/test_triton.py::test_scale",
    "held_rows": "tests/test_gpu.py::test_rows_held_on_the_chip_by_the_law",
    "real_sizes": "tests/test_triton.py::test_real_sizes",
    "row_dot": "tests/test_row_dot.py::test_shapes",
    "chunk_dots": "tests/test_grad_dot.py::test_hundreds_of_tensors",
    "head": "tests/test_gpu.py::test_chunks_of_the_head_add_up_in_fp32",
    "scoring": "tests/test_gpu.py::test_a_graph_replays_it_with_new_values[linear_token_logp]",
}
WITHOUT = {"held_rows": (("GFAST_HELD_ROWS", "0"),)}  # a kernel that hangs would take every later step with it
PEERS = {  # provider: (seconds in the first call, what it needs)
    "liger": (20, ("liger_kernel",)),
    "liger_cute": (15, ("liger_kernel", "cutlass")),
    "quack": (25, ("quack", "cutlass")),
    "cce": (20, ("cut_cross_entropy",)),
    "trl": (20, ("trl",)),
    "torch_chunked_rows": (10, ("torch.nn:LinearCrossEntropyOptions",)),
}
HEAD = "--heads llama-3.1-8b --dtypes bf16 --budget 1"
OURS = "--providers gfast,gfast_logp,floor"
MANY = "--providers gfast,gfast_logp,floor,eager,compile,liger,liger_cute,quack,cce,cce_exact,trl,torch_chunked_rows"
LINES = "--providers gfast,floor,eager,compile,liger,cce,trl"
EFFECTS = "--providers 'g_effect(GA);g_effect(WGA);pg_effect;token_effect;gram_effect;clone loop, WGA'"
EVERY_EFFECT = (
    "--providers 'g_effect(GA);g_effect(WGA);g_effect(4 objectives);g_effect(WGA), sample;g_effect(GA), gram;"
    "g_effect(WGA), gram;g_effect(4 objectives), gram;g_effect(WGA), token;pg_effect;pg_effect, directions given;"
    "token_effect;gram_effect;clone loop, WGA;sample loop;published way;published way, padded;"
    "kronfluence, identity;bergson'"
)
MARKED = files_with("mark.cuda")
COMPILED = "tests/test_triton.py tests/test_row_dot.py"


# With the torch and the setuptools that are there: no isolated environment, no network.
SETUP = ("{python}", "bench/build.py")
BUILD = (Step("build", 75, "the extension, with CUDA where nvcc is found", SETUP),)
BUILD_CPU = (
    Step("build_cpu", 25, "the same without CUDA, if that failed", SETUP, unless="build", env=(("GFAST_CUDA", "0"),)),
)


FIRST: list[Stage] = [
    BUILD,
    tuple(
        tests(f"kernel_{name}", 30, f"a test a kernel: {name}", f"-x '{test}'", without=WITHOUT.get(name, ()))
        for name, test in KERNELS.items()
    ),
    bench(
        *("rows", 20, "from logits: WGA and KL"),
        f"losses --ops logits,kl {HEAD} {OURS},gfast_triton --rows 8192 --objectives wga",
    ),
    BUILD_CPU,  # only now: Triton needs no extension
    bench(
        *("linear", 30, "from hidden states: WGA"),
        f"losses --ops linear {HEAD} {OURS} --rows 2048,4096,8192 --objectives wga",
    ),
    bench(
        *("scoring", 15, "from hidden states, no gradient"),
        f"losses --ops linear {HEAD} {OURS} --rows 8192 --objectives nll --modes nograd",
    ),
    bench("grad_dot", 20, "group dots of a 7B model's tensors", "grad_dot --repetitions 9"),
    (
        tests("tests_cuda", 60, "every test that needs a GPU", f"-m cuda {{workers}} {MARKED}"),
        tests("tests_triton", 60, "every test of a Triton kernel, compiled", f"-m 'not cuda' {{workers}} {COMPILED}"),
    ),
    bench("counters", 30, "DRAM bytes and L2 hits of the kernels", "counters", tool="ncu"),
    bench("tiles", 20, "tiles of the row kernel", "tiles"),
    *(
        bench(
            *(f"peer_{name}", seconds, f"beside {name}"),
            f"losses --ops linear {HEAD} --providers gfast,floor,{name} --rows 4096 --objectives nll",
            needs=needs,
        )
        for name, (seconds, needs) in PEERS.items()
    ),
    bench(
        *("1b", 30, "effects of a 1B model"),
        f"geffect --model llama-3.2-1b --dtype bf16 --batch 8 --tokens 256 --budget 1 {EFFECTS}",
    ),
    bench(
        *("7b", 40, "effects of a 7B model"),
        "geffect --model llama-2-7b --dtype bf16 --batch 4 --tokens 256 --budget 2 --repetitions 3 "
        "--providers 'g_effect(GA);g_effect(WGA);clone loop, WGA'",
    ),
    bench("overhead", 35, "training with GEffectCallback", "overhead --models smollm2-135m --dtype bf16 --rounds 1"),
]

SECOND: list[Stage] = [
    BUILD,
    BUILD_CPU,
    (tests("tests", 120, "all tests", "{workers} --ignore tests/test_packaging.py tests"),),
    bench(
        *("losses", 50, "from logits and hidden states, beside everyone"),
        f"losses {HEAD} --ops logits,linear --rows 8192 --objectives wga,nll {MANY}",
    ),
    bench(
        "small", 20, "a short chunk, beside everyone", f"losses --ops linear {HEAD} --rows 2048 --objectives nll {MANY}"
    ),
    bench(
        *("modes", 25, "frozen head and no gradient"),
        f"losses --ops linear {HEAD} --rows 8192 --objectives wga,nll --modes frozen,nograd,forward {LINES}",
    ),
    bench(
        *("batches", 25, "short answers and long sequences"),
        f"losses --ops linear {HEAD} --rows 8192 --objectives wga,npo --batches tofu,long {LINES}",
    ),
    bench(
        *("geffect", 55, "effects of a 1B model, beside everyone"),
        f"geffect --model llama-3.2-1b --dtype bf16 --batch 8 --tokens 256 --budget 3 {EVERY_EFFECT}",
    ),
    checked(
        "race_grad_dot",
        40,
        "grad_dot under racecheck",
        "-x -m cuda -k hundreds tests/test_grad_dot.py",
        "--tool racecheck",
    ),
    checked(
        "memory_grad_dot", 40, "grad_dot under memcheck", "-x -m cuda -k 'hundreds or layout' tests/test_grad_dot.py"
    ),
    checked(
        *("memory_rows", 55, "the row kernels under memcheck"),
        "-x -k 'test_few_rows or test_weight_families or test_kl_rows or test_scale or (held and 1000)' "
        "tests/test_triton.py tests/test_gpu.py",
    ),
]
THIRD: list[Stage] = [
    BUILD,
    BUILD_CPU,
    bench(
        *("shapes", 75, "every head"),
        "losses --heads all --rows 8192 --dtypes bf16 --objectives wga --budget 1 "
        "--providers gfast,floor,compile,liger,cce,trl",
    ),
    bench(
        *("sweep_rows", 60, "over the rows"),
        "losses --sweep rows --values 512,1024,2048,4096,8192,16384 --heads llama-3.2-1b --dtypes bf16 "
        f"--objectives wga --budget 1 {LINES}",
    ),
    bench(
        *("sweep_vocab", 60, "over the vocabulary"),
        f"losses --sweep vocab --heads llama-3.2-1b --rows 4096 --dtypes bf16 --objectives wga --budget 1 {LINES}",
    ),
    bench(
        *("sweep_length", 50, "effects over the length"),
        "geffect --sweep length --model smollm2-135m --dtype bf16 --budget 1 --repetitions 5",
    ),
    bench(
        *("live", 50, "the G-effect of every step"),
        "live --model smollm2-135m --dtype bf16 --objective wga --batch 8 --tokens 256 --budget 2",
    ),
    bench("soft_targets", 30, "objectives with soft targets", "soft_targets --heads small --dtypes bf16"),
    bench(
        *("margins", 20, "ETW, PDU, MASC and BST"),
        "losses --heads small --dtypes bf16 --rows 4096 --objectives etw,pdu,masc,bst --budget 1 "
        "--providers gfast,wga,floor",
    ),
    bench(
        *("profile_losses", 25, "a profile of the losses"),
        "losses --profile --ops linear,logits --heads llama-3.1-8b --rows 8192 --objectives wga --dtypes bf16 "
        "--traces {traces}",
    ),
    bench(
        *("profile_geffect", 25, "a profile of the effects"),
        "geffect --profile --model llama-3.2-1b --dtype bf16 --batch 8 --tokens 256 --traces {traces}",
    ),
    (
        Step(
            "micro",
            40,
            "every public function at small shapes",
            ("{python}", "-m", "pytest", "-q", "bench/micro", "--benchmark-only"),
        ),
    ),
]
CALLS = {"first": FIRST, "second": SECOND, "third": THIRD}


def ends(stages: list[Stage]) -> list[int]:
    """By which second of its call each stage is over at the latest."""
    total, seconds = 0, []
    for stage in stages:
        total += max(step.seconds for step in stage)
        seconds.append(total)
    return seconds


def table(stages: list[Stage]) -> list[str]:
    """A line a stage: the second by which it is over, its steps, what they are."""
    lines = []
    for end, stage in zip(ends(stages), stages, strict=True):
        first, several = stage[0], len(stage) > 1
        name = f"{first.name.split('_')[0]}_* ({len(stage)} at once)" if several else first.name
        what = "; ".join(dict.fromkeys(step.what.split(":")[0] for step in stage)) if several else first.what
        lines.append(f"{end:>4}  {name:<24}{what}")
    return lines
