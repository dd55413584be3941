"""`gfast doctor`: what will run where, and what to do to get more; with --all everything that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys

import torch

import gfast
from gfast.commands.parser import Parser
from gfast.ops import dispatch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
    "matplotlib",
)
SETTINGS = (
    "GFAST_CPU_ISA",
    "GFAST_HELD_ROWS",
    "GFAST_POOL_MIB",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def _versions() -> list[str]:
    lines = [f"gfast        {gfast.__version__} at {os.path.dirname(gfast.__file__)}"]
    lines.append(f"python       {platform.python_version()} at {sys.executable}")
    lines.append(f"system       {platform.system()} {platform.release()} {platform.machine()}")
    for name in PACKAGES:
        try:
            lines.append(f"{name:<12} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name:<12} not installed")
    return lines


def _build() -> list[str]:
    module, reason = dispatch.extension()
    if module is None:
        return [f"not available: {reason}", "build it with: pip install --no-build-isolation -e ."]
    try:
        info = module.build_info()
    except Exception as error:  # GFAST_CPU_ISA can name a set that this CPU lacks; the message says so
        return [f"not usable: {error}"]
    lines = [
        f"compiler     {info['compiler']} {info['flags'].strip()}",
        f"built for    torch {info['torch']}",
        f"CUDA         {'yes' if info['cuda'] else 'no'}: {info['cuda_reason']}",
        f"CPU kernels  {', '.join(info['instruction_sets'])}; in use: {info['instruction_set']}",
    ]
    if not info.get("threads"):
        lines.append("warning      built without OpenMP: the CPU kernels run on one thread (build with CXX=g++)")
    if info["torch"] != torch.__version__:
        lines.append(f"warning      torch is now {torch.__version__}: build gfast again")
    return lines


def _devices() -> list[str]:
    lines = [f"cpu          {torch.get_num_threads()} threads, PyTorch uses {torch.backends.cpu.get_cpu_capability()}"]
    if not torch.cuda.is_available():
        built = f"torch has CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [*lines, f"cuda         none ({built})"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index:<7} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _backends() -> list[str]:
    lines = []
    for row in dispatch.status():
        mark = "*" if row.get("auto") else "+" if row["available"] else " "
        reason = f"  {row['reason']}" if row["reason"] else ""
        lines.append(f"{mark} {row['op']:<20} {row['device']:<5} {row['impl']:<10}{reason}".rstrip())
    return [*lines, "* chosen by impl='auto'   + available"]


def _line(read) -> str:
    """What `read` says, or why it could not be read: a machine that is out of order is when a doctor is asked."""
    try:
        return read()
    except Exception as error:
        return f"could not be read: {type(error).__name__}: {error}"


def _cpu() -> str:
    module, reason = dispatch.extension()
    threads = f"{torch.get_num_threads()} threads"
    if module is None:
        return f"{threads}, plain PyTorch: {reason}"
    return f"{threads}, C++ kernels for {module.build_info()['instruction_set']}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
    return f"{count} x {name}" if count > 1 else name


def _table() -> list[str]:
    """A line an op: who serves it on each kind of device there is."""
    chosen = {(row["op"], row["device"]): row["impl"] for row in dispatch.status() if row["auto"]}
    kinds = list(dict.fromkeys(kind for _, kind in chosen))
    rows = [["op", *kinds], *([op, *(chosen[op, kind] for kind in kinds)] for op in dispatch.OPS)]
    width = max(len(text) for row in rows for text in row)
    return ["  ".join(f"{text:<{width}}" for text in row).rstrip() for row in rows]


def _advice() -> str:
    """The one thing that would bring the most here."""
    build = "pip install --no-build-isolation -e ."
    module, reason = dispatch.extension()
    if module is None:
        return f"Build the C++ kernels: {build}"
    info = module.build_info()
    if info["torch"] != torch.__version__:
        return f"The kernels were built for torch {info['torch']}; build them again: {build}"
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return f"NVIDIA's driver is here, but torch has no CUDA. Install a torch that has, then {build}"
    if torch.cuda.is_available():
        if reason := dispatch.why_not("unlearn_loss", "triton", "cuda"):
            return f"The losses run in plain PyTorch on the GPU ({reason}): pip install triton"
        if not info["cuda"]:
            return f"grad_dot has no CUDA kernel here ({info['cuda_reason']}). Mend that, then {build}"
    if not info.get("threads"):
        return f"The kernels run on one thread: they were built without OpenMP. CXX=g++ {build}"
    for name, what in (("GFAST_CPU_ISA", "chooses the kernels"), ("OMP_NUM_THREADS", "limits the threads")):
        if value := os.environ.get(name):
            return f"{name}={value} {what}; unset it to use all that this CPU has"
    return "Nothing is missing: gfast uses all that this machine has"


def summary() -> str:
    """One screen: what will run where, and the one thing to do to get more."""
    head = f"gfast {gfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    try:
        table = _table()
    except Exception as error:
        table = [f"backends could not be read: {type(error).__name__}: {error}"]
    lines = [head, f"CPU  {_line(_cpu)}", f"GPU  {_line(_gpu)}", "", *table, "", _line(_advice)]
    return "\n".join([*lines, "Every detail, for a report of a fault: gfast doctor --all"])


def report() -> str:
    """Everything a bug report needs, as text. Never raises: a part that cannot be read says why."""
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ] or ["none set"]
    sections = {
        "Versions": _versions,
        "Extension gfast._C": _build,
        "Devices": _devices,
        "Backends": _backends,
        "Environment": lambda: settings,
    }
    text = []
    for title, lines in sections.items():
        try:
            body = lines()
        except Exception as error:
            body = [f"could not be read: {type(error).__name__}: {error}"]
        text += [title, *(f"  {line}" for line in body), ""]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="gfast doctor", description="What will run where, and what to do to get more.")
    parser.add_argument(
        "--all", action="store_true", help="versions, the build, and why each backend is or is not there"
    )
    print(report() if parser.parse_args(argv).all else summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
