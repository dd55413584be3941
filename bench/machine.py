"""What a machine is called, and JSON results that name it.

`python bench/machine.py cpu` (or cuda) prints the name of this machine's folder under bench/results.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
NOT_RESULTS = (":(top)", ":(top,exclude)bench/results", ":(top,exclude)docs", ":(top,exclude)README.md")
PEERS = (  # those of bench/requirements*.txt
    *("bergson", "cut-cross-entropy", "kronfluence", "liger-kernel", "nvidia-cutlass-dsl", "quack-kernels", "trl"),
)
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

Row = dict[str, Any]


def device_name(device: str = "cpu") -> str:
    """The name of "cpu" or "cuda", fit for a folder.

    A CPU's is its family and the widest instructions it has, as those decide which dtype it multiplies fastest; a GPU's
    its model. GFAST_BENCH_DEVICE replaces the name, for instance where two machines would share one.
    """
    if chosen := os.environ.get("GFAST_BENCH_DEVICE"):
        if _words(chosen) != chosen:
            raise ValueError(f"GFAST_BENCH_DEVICE names a folder: small letters, digits and dashes, not {chosen!r}")
        return chosen
    if device == "cuda":
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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() == field:
                return line.split(":", 1)[1].strip()
    return None


def _words(text: str) -> str:
    """Small letters and digits, dashes between."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("(r)", " ").replace("(tm)", " ")).strip("-")


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *NOT_RESULTS)
    except (OSError, subprocess.CalledProcessError):  # a copy without the repository
        return os.environ.get("GFAST_COMMIT") or "unknown"
    return head + ("+changes" if changed else "")


def installed(names: Sequence[str]) -> dict[str, str]:
    """Distribution -> version, of those that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def environment(device: str = "cpu") -> Row:
    """What a reader needs to judge a number: device, processor, versions, threads, commit. No paths."""
    record: Row = {
        "name": device_name(device),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **installed(["triton"]),
        "peers": installed(PEERS),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if device == "cuda":
        record["cuda"] = torch.version.cuda
    try:
        from gfast import _C

        record["gfast_build"] = _C.build_info()["instruction_set"]
    except ImportError:
        record["gfast_build"] = "not built"
    return record


def write_json(name: str, payload: Row) -> Path:
    """Writes ``bench/results/DEVICE/NAME`` (or the path given, if it has folders) whole or not at all."""
    path = Path(name) if len(Path(name).parts) > 1 else RESULTS / str(payload["environment"]["name"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(json.dumps(payload, indent=1) + "\n")
    os.replace(partial, path)
    return path


if __name__ == "__main__":
    print(device_name(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
