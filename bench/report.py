"""Renders the measured blocks and pictures of README.md and the performance pages; no number is typed.

python bench/report.py            # rewrites what stands between the markers, and draws the pictures
python bench/report.py --check    # exits 1 when a page is not what the JSON says; draws nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from gpu_numbers import NUMBERS, cells
from gpu_plan import CALLS
from laws import FAMILIES, LAWS, Law, Result, cell, demanded, figure, law_checks

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs") / "performance.md"
GPU_PAGE = Path("docs") / "performance-gpu.md"
MISSED_PAGE = Path("docs") / "performance-missed.md"
PICTURES = Path("docs") / "performance"
# A result's name is one of them, or KIND_MORE. Laws are asked of those of the first line.
KINDS = (
    *("losses", "soft_targets", "geffect", "grad_dot", "overhead", "live", "evaluate", "trainer", "sharded", "host"),
    *("profile", "counters", "tiles", "on_gpu"),
)
DRAWN = {  # picture: its text
    "laws": "every measured case against its law",
    "losses": "time of the losses in floors",
    "geffect": "time and memory of gradient effects",
    "geffect_peers": "time and memory of gradient effects beside other projects",
    "sweeps": "time and memory over the vocabulary and over the length of the samples",
}
NO_GPU = "NVIDIA GPU"  # the column that waits for one


def results(root: Path) -> list[Result]:
    """All of them, a device's together, GPUs last."""
    read = []
    for path in (root / "bench" / "results").glob("*/*.json"):
        kind = next((kind for kind in KINDS if path.stem == kind or path.stem.startswith(kind + "_")), None)
        if kind is not None:
            data = json.loads(path.read_text())
            if data.get("dry_run") or data["environment"].get("dry_run"):
                raise ValueError(f"{path} is of a dry run: nothing was measured; delete it")
            read.append(Result(path.parent.name, kind, path.stem, data))
    return sorted(read, key=lambda r: (is_gpu(r.device), r.device, KINDS.index(r.kind), r.name))


def is_gpu(device: str) -> bool:
    return not device.startswith("cpu-")


def devices_of(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(result.device for result in results))


def table(header: list[str], rows: Iterable[list[str]], right: int = 0) -> str:
    """The last `right` columns are numbers."""
    rule = ["---"] * (len(header) - right) + ["---:"] * right
    return "\n".join(["| " + " | ".join(header) + " |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(r)} |" for r in rows)])


def rows_of(results: list[Result], families: Iterable[tuple[tuple[str, ...], Law]]) -> str:
    """A row a family of laws, a column a device, empty where nothing was measured."""
    known, rows = law_checks(results), []
    waiting = [] if any(is_gpu(result.device) for result in results) else [NO_GPU]
    for names, law in families:
        by_device = {
            device: [check for name in names for check in known[name].get(device, [])] for device in devices_of(results)
        }
        if every := [check for some in by_device.values() for check in some]:
            cells = [cell(some) for some in by_device.values()]
            rows.append([law.what, demanded(law, every), *cells, *[""] * len(waiting)])
    return table(["what", "law", *(f"`{device}`" for device in devices_of(results)), *waiting], rows)


def total(results: list[Result]) -> str:
    every = [check for some in law_checks(results).values() for checks in some.values() for check in checks]
    return f"The laws hold in {sum(check.met for check in every)} of {len(every)} measured cases."


def readme(results: list[Result], root: Path) -> str:
    more = f"Each law by itself, machines, pictures: [{PAGE.name}]({PAGE.as_posix()}); "
    more += f"[what is missed, and why]({MISSED_PAGE.as_posix()})."
    return "\n\n".join([total(results), rows_of(results, FAMILIES), more])


def laws(results: list[Result], root: Path) -> str:
    return f"{total(results)}\n\n" + rows_of(results, [((name,), law) for name, law in LAWS.items()])


def missed(results: list[Result], root: Path) -> str:
    """Every case that misses its law: a row a law and device, the worst case first."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for law, by_device in law_checks(results).items():
        for device, some in by_device.items():
            for check in sorted(some, key=lambda check: -check.share):
                if not check.met:
                    row = (LAWS[law].what, figure(law, check.demanded), f"`{device}`")
                    rows.setdefault(row, []).append(f"{check.case}: {figure(law, check.value)}")
    lines = ([*row, "<br>".join(cases)] for row, cases in rows.items())
    return table(["what", "law", "device", "missed by"], lines) if rows else "Nothing."


def machines(results: list[Result], root: Path) -> str:
    """A line a device on hardware, versions and dates."""
    lines = []
    for device in devices_of(results):
        parts: dict[str, dict[str, None]] = {}
        for record in (result.data["environment"] for result in results if result.device == device):
            commit = record["commit"]
            for part, text in (
                ("device", record["device"]),
                ("threads", f"{record.get('threads', '?')} threads of {record.get('cores', '?')} cores"),
                ("torch", f"torch {record['torch']}"),
                ("build", f"build {record.get('gfast_build', '?')}"),
                ("commit", f"{commit[:10]}{'+changes' * ('+' in commit)}"),
                ("date", record["date"][:10]),
            ):
                parts.setdefault(part, {})[text] = None
        commits = ", ".join(parts.pop("commit"))
        lines.append(f"`{device}`: {', '.join(' and '.join(texts) for texts in parts.values())}; commits {commits}")
    return "<sub>" + "<br>\n".join(lines) + "</sub>" if lines else ""


def gpu(results: list[Result], root: Path) -> str:
    """The numbers that must be reached, what the machine code predicts of them, and what was measured on each GPU."""
    header = ["what", "floor", "must reach", "predicted", "measured", "floors", "host", "peak memory"]
    names, blocks = [name for name in devices_of(results) if is_gpu(name)], []
    _, code = predictions(root)
    for name in names or [None]:
        here = [result for result in results if result.device == name]
        rows = [
            [number.what, number.floor, number.must, number.predicted(code), *cells(number, here)] for number in NUMBERS
        ]
        title = f"`{name}`" if name else "Nothing of gfast has run on a GPU: no cell of this table is filled."
        blocks.append(f"{title}\n\n{table(header, rows, right=5)}")
    return "\n\n".join(blocks)


def steps(results: list[Result], root: Path) -> str:
    """The steps of bench/on_gpu.sh: what each came to on each GPU, empty where it has not run."""
    names = [name for name in devices_of(results) if is_gpu(name)]
    came = {
        (result.device, step["step"]): step["outcome"]
        for result in sorted(results, key=lambda result: result.data["environment"]["date"])
        if result.kind == "on_gpu"
        for step in result.data["steps"]
    }
    every = [step for stages in CALLS.values() for stage in stages for step in stage]
    rows = [
        [f"`{step.name}`", step.what, *(came.get((name, step.name), "") for name in names or [NO_GPU])]
        for step in dict.fromkeys(every)
    ]
    return table(["step", "what", *(names or [NO_GPU])], rows)


def predictions(root: Path) -> tuple[str | None, dict[str, dict]]:
    """What the machine code predicts (bench/static.py), by the oldest Triton that is recorded: GPU machines have it."""
    path = root / "bench" / "results" / "static" / "sm_90.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    version = min(record, key=lambda text: [int(part) for part in text.split(".")], default=None)
    return version, {label: figures for label, figures in record.get(version, {}).items() if "slots" in figures}


def static(results: list[Result], root: Path) -> str:
    """Those predictions, a row a kernel."""
    version, code = predictions(root)
    rows = []
    for label, code_of_kernel in code.items():
        figures = [f"{code_of_kernel['slots']:.1f}", f"{code_of_kernel['special']:.1f}", str(code_of_kernel["bytes"])]
        capped = f"`{label}`, soft cap" if code_of_kernel["softcap"] else f"`{label}`"
        rows.append([capped, *figures, code_of_kernel["bound"], f"{code_of_kernel['share_of_copy']:.0%}", ""])
    header = ["kernel", "instructions", "exponentials, roots", "bytes", "bound by", "predicted", "measured"]
    return f"Triton {version}, compute capability 9.0.\n\n" + table(header, rows, right=6)


def pictures(results: list[Result], root: Path) -> str:
    """Those that are there, in the order in which they are drawn."""
    there = {path.stem: path for path in (root / PICTURES).glob("*.png")}
    lines = [f"![{text}]({PICTURES.name}/{there[name].name})" for name, text in DRAWN.items() if name in there]
    return "\n\n".join(lines)


def files(results: list[Result], root: Path) -> str:
    """Links to every result."""
    lines = []
    for device in devices_of(results):
        names = [result.name for result in results if result.device == device]
        links = (f"[{name}](../bench/results/{device}/{name}.json)" for name in names)
        lines.append(f"- `{device}`: " + ", ".join(links))
    return "\n".join(lines)


BLOCKS = {
    Path("README.md"): {"results": readme},
    PAGE: {
        "gpu": gpu,
        "laws": laws,
        "pictures": pictures,
        "machines": machines,
        "files": files,
    },
    GPU_PAGE: {"steps": steps, "static": static},
    MISSED_PAGE: {"missed": missed},
}


def filled(page: Path, blocks: dict[str, Callable[[list[Result], Path], str]], root: Path) -> str:
    """The page with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` rendered anew."""
    text, read = (root / page).read_text(), results(root)
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} must have one {begin} and one {end}: the results are written between them")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block(read, root)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds the pages and bench/results")
    args = parser.parse_args()
    if not args.check:
        from pictures import draw

        for path in draw(results(args.root), args.root / PICTURES):
            print(path.relative_to(args.root))
    changed = 0
    for page, blocks in BLOCKS.items():
        text = filled(page, blocks, args.root)
        if (args.root / page).read_text() == text:
            continue
        changed += 1
        if args.check:
            print(f"{page} is not what bench/results says: run python bench/report.py")
        else:
            (args.root / page).write_text(text)
    return int(args.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
