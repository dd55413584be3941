"""The short name of this machine's processor or GPU: the folder of its results under bench/results.

    python bench/_device.py cpu      # cpu-xeon-avx512
    python bench/_device.py cuda     # h200

A CPU is named by its family and the widest instructions it has, as those decide which dtype it multiplies fastest; a
GPU by its model. GFAST_BENCH_DEVICE replaces the name, for instance where two machines would share one.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

FAMILIES = ("xeon", "epyc", "ryzen", "threadripper", "core", "neoverse", "graviton", "apple")
INSTRUCTIONS = {  # flag in /proc/cpuinfo: what it is called here, the widest first
    "amx_bf16": "amx",
    "avx512_bf16": "avx512-bf16",
    "avx512f": "avx512",
    "avx2": "avx2",
    "sve": "sve",
    "asimd": "neon",
}
MAKERS = {"nvidia", "geforce", "tesla", "quadro", "generation"}


def device_name(device: str = "cpu") -> str:
    """The name of "cpu" or "cuda", fit for a folder."""
    if chosen := os.environ.get("GFAST_BENCH_DEVICE"):
        if _words(chosen) != chosen:
            raise ValueError(f"GFAST_BENCH_DEVICE names a folder: small letters, digits and dashes, not {chosen!r}")
        return chosen
    if device == "cuda":
        import torch

        return gpu_name(torch.cuda.get_device_name())
    return f"cpu-{family(cpu_model())}-{(instructions() or [platform.machine().lower()])[0]}"


def gpu_name(model: str) -> str:
    return "-".join(word for word in _words(model).split("-") if word not in MAKERS)


def family(model: str) -> str:
    words = _words(model).split("-")
    return next((name for name in FAMILIES if name in words), words[0] or "unknown")


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Those of the CPU that matter to a product of matrices, the widest first."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [name for flag, name in INSTRUCTIONS.items() if flag in flags]


def _cpuinfo(field: str) -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() == field:
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


def _words(text: str) -> str:
    """Small letters and digits, dashes between."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("(r)", " ").replace("(tm)", " ")).strip("-")


if __name__ == "__main__":
    print(device_name(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
