"""What the machine code of the Triton kernels says of their speed, read where there is no GPU.

python bench/static.py                 # prints it, for the Triton that is installed
python bench/static.py --check         # exits 1 where a kernel is worse than bench/results/static/sm_90.json says
python bench/static.py --record        # writes that file's part of this version of Triton
python bench/static.py --quick ...     # the first case of each kernel

Another version of Triton: PYTHONPATH=FOLDER in front, from `pip install --no-deps --target FOLDER triton==3.6.0`.
A prediction is arithmetic on what the code holds, not a measurement:

    cycles an element = max(bytes / COPY, slots / ISSUE, special / SPECIAL)        on one multiprocessor

with the bytes that must pass memory, the instructions of the loops over columns, and those of them for the unit of
exponentials and roots; its share of copy bandwidth is bytes / COPY over that. It leaves latencies out, and whether the
second read of a row is served by the L2 cache, as it is meant to be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

from gfast.kernels import aot

COPY = 16.5  # bytes a clock and multiprocessor, read and written, that a copy reaches on an H200 at 1.98 GHz
ISSUE = 128  # instructions: four schedulers, 32 lanes
SPECIAL = 16  # exponentials, reciprocals, roots
RECORDED = Path(__file__).resolve().parent / "results" / "static" / "sm_90.json"
STREAMS = {"kl_rows": 2, "kl_rows_grad": 2, "soft_rows": 2}  # matrices read together; the others read one
SM = 90


class Loop(NamedTuple):
    """An innermost loop that reads memory: what one of its iterations does, a thread."""

    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, instruction)) for instruction in self.instructions)

    def loaded(self) -> int:
        """Bytes of global loads."""
        widths = {"128": 16, "64": 8, "U16": 2, "U8": 1}
        parts = (
            instruction.split()[0].split(".") for instruction in self.instructions if instruction.startswith("LDG")
        )
        return sum(next((n for width, n in widths.items() if width in part), 4) for part in parts)


def parse(sass: str) -> list[tuple[int, str, bool]]:
    """Address, instruction, whether it is predicated."""
    instructions = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", sass, re.MULTILINE)
    return [(int(address, 16), text, bool(predicate)) for address, predicate, text in instructions]


def loops(sass: str) -> list[Loop]:
    """Innermost loops with global loads, in the order of the code. What a forward branch inside one can jump over is
    left out: the label's columns, which one block of a row holds.
    """
    code = parse(sass)
    jumps = [(at, int(m[1], 16), predicated) for at, text, predicated in code
             if (m := re.match(r"BRA\b.*?(0x[0-9a-f]+)", text))]  # fmt: skip
    spans = sorted({(to, at) for at, to, _ in jumps if to < at})
    loops = []
    for first, last in spans:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            continue
        over = [(at, to) for at, to, predicated in jumps if predicated and first <= at < to <= last]
        body = [text for at, text, _ in code if first <= at <= last and not any(a < at < b for a, b in over)]
        if any(text.startswith("LDG") for text in body):
            loops.append(Loop(body))
    return loops


def facts(spec: Any, sass: str, report: Any) -> dict[str, Any]:
    name, *words = spec.label.split()
    hot = loops(sass)
    known = {
        "registers": report.registers,
        "local_memory": report.spilled,
        "local_in_loops": sum(loop.count("LDL|STL") for loop in hot),
        "loads_128": all(loop.count("LDG") == loop.count(r"LDG\S*\.128") for loop in hot),
        "stores_128": all(loop.count("STG") == loop.count(r"STG\S*\.128") for loop in hot),
        "matrix": dict(Counter(m[0] for m in re.findall(r"\b((HGMMA|HMMA|IMMA|DMMA)\b)", sass))),
    }
    if name in ("row_dot", "label_factor", "stat_rows", "stat_rows_grad"):  # no one or two walks over rows
        return known
    dtype = next(word for word in words if word in aot.ITEMSIZE)
    itemsize, streams = aot.ITEMSIZE[dtype], STREAMS.get(name, 1)
    elements = [loop.loaded() / itemsize / streams for loop in hot]  # of a thread and iteration
    stored = any(loop.count("STG") for loop in hot)
    slots = sum(len(loop.instructions) / n for loop, n in zip(hot, elements, strict=True))
    special = sum(loop.count("MUFU|FRND|F2I|I2F") / n for loop, n in zip(hot, elements, strict=True))
    size = itemsize * (streams + stored)
    cycles = {"memory": size / COPY, "instructions": slots / ISSUE, "exponentials": special / SPECIAL}
    bound = max(cycles, key=cycles.get)
    return known | {
        "dtype": dtype,
        "softcap": spec.constants.get("softcap", 0.0),
        "sweeps": len(hot),
        "bytes": size,
        "slots": round(slots, 2),
        "special": round(special, 2),
        "bound": bound,
        "share_of_copy": round(cycles["memory"] / cycles[bound], 3),
    }


def survey(quick: bool) -> dict[str, dict[str, Any]]:
    """Facts by label of all specialisations, or of the first of each kernel."""
    chosen = list(aot.specs())
    if quick:
        chosen = aot.first_of_each(chosen)
    surveyed = {}
    for spec in chosen:
        compiled = aot.machine_code(spec, SM)
        surveyed[spec.label] = facts(spec, aot.disassembled(compiled.asm["cubin"]), aot.report(spec, SM, compiled))
    return surveyed


def worse(now: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """What is worse than it was, in words."""
    bad = [f"{key} {now[key]:g}, recorded {recorded[key]:g}" for key in ("slots", "special", "local_memory")
           if key in now and now[key] > recorded[key]]  # fmt: skip
    bad += [f"no {key} any more" for key in ("loads_128", "stores_128") if recorded[key] and not now[key]]
    if bool(now["matrix"]) != bool(recorded["matrix"]):
        bad.append(f"matrix instructions {now['matrix']}, recorded {recorded['matrix']}")
    if now["local_in_loops"]:
        bad.append("local memory inside a loop over columns")
    return bad


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if reason := aot.missing():
        print(f"nothing can be compiled: {reason}", file=sys.stderr)
        return 2
    surveyed = survey(options.quick)
    for label, facts_of_kernel in surveyed.items():
        print(f"{label:36}", *(f"{key} {value}" for key, value in facts_of_kernel.items() if key != "dtype"), sep="  ")
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if options.record:
        recorded[triton.__version__] = surveyed
        RECORDED.parent.mkdir(parents=True, exist_ok=True)
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    if not options.check:
        return 0
    known = recorded.get(triton.__version__)
    if known is None:
        print(f"Triton {triton.__version__} has no record; there are {', '.join(recorded)}", file=sys.stderr)
        return 2
    bad = [
        f"{label}: {text}"
        for label, facts_of_kernel in surveyed.items()
        for text in worse(facts_of_kernel, known[label])
    ]
    print("\n".join(bad) if bad else f"all {len(surveyed)} as recorded or better, Triton {triton.__version__}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
