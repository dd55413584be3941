"""Writes README.md's measured tables and docs/benchmarks.md from bench/results/*.json; nothing is typed by hand.

python bench/render.py            # rewrites README.md between the results markers, and docs/benchmarks.md
python bench/render.py --check    # exits 1 when either is not what the JSON says

A result is bench/results/KIND_cpu*.json or KIND_cuda*.json. Pictures are those of bench/plots.py, where they exist.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _tables import KINDS, where

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DOCUMENT = Path("docs") / "benchmarks.md"
PICTURES = Path("docs") / "benchmarks"
README_PICTURES = ("losses_cpu.png", "geffect_cpu.png", "losses_cuda.png", "geffect_cuda.png")
TITLES = {
    "geffect": "Gradient effects",
    "losses": "Losses",
    "grad_dot": "Dot products",
    "overhead": "Training with measurements",
    "profile_losses": "Where the time of a loss goes",
    "profile_geffect": "Where the time of a gradient effect goes",
}
INTRODUCTION = """# Benchmarks

Written by `python bench/render.py` from `bench/results/*.json`, the pictures by `python bench/plots.py`. Every provider
was compared with fp64 or plain autograd before it was timed, in the same script: what is wrong is refused, what rounds
or filters is timed and marked. Medians of interleaved repetitions; memory is what a call needs beyond its inputs.
"""


def kind_of(path: Path) -> str | None:
    kind = path.stem.split("_cpu")[0].split("_cuda")[0]
    return kind if kind in KINDS else None


def device_of(path: Path) -> str:
    return "cuda" if "_cuda" in path.stem else "cpu"


def results(root: Path) -> list[tuple[str, Path, dict[str, Any]]]:
    found = [(kind_of(path), path) for path in sorted((root / "bench" / "results").glob("*.json"))]
    order = list(KINDS)
    named = [(kind, path, json.loads(path.read_text())) for kind, path in found if kind is not None]
    return sorted(named, key=lambda item: (order.index(item[0]), item[1].name))


def readme(root: Path) -> str:
    """The part between the markers: short tables and the overview pictures."""
    parts = [
        f"![{name.removesuffix('.png').replace('_', ' on ')}]({(PICTURES / name).as_posix()})"
        for name in README_PICTURES
        if (root / PICTURES / name).is_file()
    ]
    for name, device in dict.fromkeys((kind, device_of(path)) for kind, path, _ in results(root)):
        short = KINDS[name][0]
        here = [(path, data) for kind, path, data in results(root) if (kind, device_of(path)) == (name, device)]
        here = [(path, data) for path, data in here if not data.get("sweep")]
        if short is None or not here:
            continue
        notes = [f"<sub>{path.name}: {where(data['environment'])}</sub>" for path, data in here]
        if name == "losses":  # one table of all files, as a head and a row a file would be more frame than content
            parts += [short({"rows": [row for _, data in here for row in data["rows"]]}), "<br>\n".join(notes)]
        else:
            parts += [f"{short(data)}\n\n{note}" for (_, data), note in zip(here, notes, strict=True)]
    parts.append(f"All of it, with every provider, sweep and profile: [{DOCUMENT.name}]({DOCUMENT.as_posix()}).")
    return "\n\n".join(parts)


def document(root: Path) -> str:
    """docs/benchmarks.md: everything."""
    parts, last = [INTRODUCTION.rstrip()], None
    pictures = sorted((root / PICTURES).glob("*.png"))
    for kind, path, data in results(root):
        if kind != last:
            parts.append(f"## {TITLES[kind]}")
            parts += [
                f"![{p.stem.replace('_', ' ')}]({PICTURES.name}/{p.name})" for p in pictures if kind_of(p) == kind
            ]
            last = kind
        parts.append(f"### {path.stem}\n\n{where(data['environment'])}\n\n{KINDS[kind][1](data)}")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    page, report = args.root / "README.md", args.root / DOCUMENT
    before, rest = page.read_text().split(BEGIN)
    wanted = {page: f"{before}{BEGIN}\n{readme(args.root)}\n{END}{rest.split(END)[1]}", report: document(args.root)}
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if args.check:
        for path in changed:
            print(f"{path.relative_to(args.root)} is not what bench/results says: run python bench/render.py")
        return int(bool(changed))
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
