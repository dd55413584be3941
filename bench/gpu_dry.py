"""Stands for a step of bench/on_gpu.sh in a dry run: does nothing, and writes what can never be taken for a result.

python bench/gpu_dry.py NAME RESULT COMMAND...    RESULT: the file to write, or -

GFAST_DRY_FAIL and GFAST_DRY_HANG name steps, separated by commas, that fail or never end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

SECONDS = float(os.environ.get("GFAST_DRY_SECONDS", "0.05"))


def main(name: str, result: str, *command: str) -> int:
    print(f"DRY RUN of {name}; nothing was measured. On a GPU: {' '.join(command)}", flush=True)
    cases = []
    for number in range(2):  # as a benchmark does, after every case
        time.sleep(SECONDS / 2)
        cases.append({"case": number, "step": name, "median_ms": -1.0, "dry_run": True})
        if result != "-":
            environment = {"name": "dry-run", "device": "none: this was a dry run", "dry_run": True}
            payload = {"dry_run": True, "environment": environment, "rows": cases}
            part = Path(result + ".part")
            part.write_text(json.dumps(payload, indent=1) + "\n")
            os.replace(part, result)
    while name in os.environ.get("GFAST_DRY_HANG", "").split(","):
        time.sleep(0.1)
    return int(name in os.environ.get("GFAST_DRY_FAIL", "").split(","))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
