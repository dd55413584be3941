"""`gfast doctor`: what is installed, what was built, which backend serves each op, and why others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

import gfast
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
SETTINGS = ("GFAST_CPU_ISA", "GFAST_POOL_MIB", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


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


def main() -> int:
    """Print the report."""
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
