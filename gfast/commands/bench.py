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
        description="Run a benchmark of a source checkout; without a name, list them.",
        epilog="Arguments after the name go to the benchmark: gfast bench losses --help",
    )
    parser.add_argument("name", nargs="?", help="which benchmark to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    folder = Path(gfast.__file__).resolve().parent.parent / "bench"
    found = {path.stem: path for path in sorted(folder.glob("[!_]*.py"))} if folder.is_dir() else {}
    if not found:
        raise FileNotFoundError(
            "the benchmarks are the scripts in the folder bench/ of gfast's source repository, and this installation "
            "has none; check the repository out, run pip install -e . in it and call gfast bench again"
        )
    if options.name is None:
        print("Benchmarks (gfast bench NAME --help):")
        for name, path in found.items():
            print(f"  {name:<{max(map(len, found)) + 2}}{_first_line(path)}")
        return 0
    if options.name not in found:
        raise ValueError(f"there is no benchmark {options.name!r}; there are {', '.join(found)}")
    return subprocess.run([sys.executable, str(found[options.name]), *options.arguments], check=False).returncode


def _first_line(path: Path) -> str:
    import ast

    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
