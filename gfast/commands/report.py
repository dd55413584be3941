# SPDX-License-Identifier: Apache-2.0
"""`gfast report`: figures, tables and one HTML page from run folders."""

from __future__ import annotations

from pathlib import Path

from gfast.commands.parser import Parser


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="gfast report", description=__doc__.partition(": ")[2])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that gfast unlearn, geffect or demo wrote")
    parser.add_argument("--out", default="report", help="folder of the report (default: %(default)s)")
    parser.add_argument("--title", default="G-effect report", help="heading of the page (default: %(default)s)")
    options = parser.parse_args(argv)

    from gfast.report import build_report

    # it reads the runs before it makes the folder: a name that is mistyped leaves none behind
    page = build_report([Path(run) for run in options.runs], options.out, title=options.title)
    print(f"Report: {page}")
    return 0
