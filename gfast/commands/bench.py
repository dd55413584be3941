# SPDX-License-Identifier: Apache-2.0
"""`gfast bench`: run the benchmarks of a source checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import gfast
from gfast.commands.parser import Parser


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="gfast bench",
        description="Run a benchmark of a source checkout; without a name, say which there are.",
        epilog="Arguments after the name go to the benchmark: gfast bench losses --help",
    )
    parser.add_argument("name", nargs="?", help="losses, geffect, grad_dot or overhead")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    run = Path(gfast.__file__).resolve().parent.parent / "bench" / "run.py"
    if not run.is_file():
        raise FileNotFoundError(
            "the benchmarks are in the folder bench/ of gfast's source repository, and this installation has none; "
            "check the repository out, run pip install -e . in it and call gfast bench again"
        )
    words = ["--help"] if options.name is None else [options.name, *options.arguments]
    return subprocess.run([sys.executable, str(run), *words], check=False).returncode
