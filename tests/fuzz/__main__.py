"""Fuzzes every raw operator and public function: what is taken comes out as its definition in fp64 says, what is not
is refused before anything is written, and nothing crashes.

    python tests/fuzz 100000             cases 0 to 99999
    python tests/fuzz --case 1234        one of them, in this process, with its arguments

A case follows from the seed and its number alone. Cases run in a process of their own; one that dies names its case.
"""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
LARGEST_FAILURES = 20
REFUSALS = "ValueError", "TypeError", "RuntimeError", "NotImplementedError", "OutOfMemoryError", "IndexError"


def run_case(seed: int, number: int, show: bool = False) -> str:
    """Empty, or what went wrong."""
    import public
    import raw
    from draw import Draw, described, hostile

    from gfast.ops.dispatch import extension

    if extension()[0] is None:
        sys.exit(extension()[1])
    r = Draw(seed, number)
    bad, what = r.maybe(0.45), "valid arguments"
    if r.maybe(0.25):
        case = r.choice(public.KINDS)(r)
        if bad:
            what = public.spoil(r, case.tensors)
        run = lambda: public.run(r, case, bad)  # noqa: E731
    else:
        case = r.choice(raw.OPS)(r)
        if bad:
            what = hostile(r, case.args, case.written)
        run = lambda: _run_raw(case)  # noqa: E731
    label = f"{case.name}: {what}"
    if show:
        given = case.args if hasattr(case, "args") else case.tensors.values()
        print(label, *map(described, given), sep="\n    ")
    try:
        run()
    except AssertionError as error:
        return f"{label}: {error}"
    except Exception as error:
        # a definition may fail on what an op took: that is no refusal of the op's
        ours = not any(
            Path(f.filename).name in ("raw.py", "softmax_rows.py") and f.name == "check"
            for f in traceback.extract_tb(error.__traceback__)
        )
        if bad and ours and type(error).__name__ in REFUSALS:
            return ""
        if show:
            traceback.print_exc()
        return f"{label}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _storage(x):
    """All bytes that a tensor's memory has, or None where it has none to look at."""
    import torch

    if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.layout != torch.strided:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _tensors(args):
    for x in args:
        yield from x if isinstance(x, list) else (x,)


def _values(x):
    """A copy to compare with; of what has no values, itself."""
    import torch

    if isinstance(x, list):
        return [_values(one) for one in x]
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.layout != torch.strided:
        return x
    if x.untyped_storage().nbytes() < x.numel() * x.element_size() and all(s for s in x.stride()):
        return x
    return x.detach().clone()


def _run_raw(case) -> None:
    import torch

    memory = [(view, view.clone()) for view in map(_storage, _tensors(case.args)) if view is not None]
    before = [_values(x) for x in case.args]
    written = case.args[case.written] if case.written is not None else None
    try:
        result = getattr(torch.ops.gfast, case.name)(*case.args)
    except Exception:
        assert all(torch.equal(view, old) for view, old in memory), "it was refused after something had been written"
        raise
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in _tensors(case.args)):
        assert not isinstance(written, torch.Tensor) or written.is_meta, (
            "nothing was computed, of tensors without values"
        )
        return
    after = None
    if isinstance(written, torch.Tensor):
        after = written.detach().clone()
        with torch.no_grad():
            written.detach().copy_(before[case.written])
    assert all(torch.equal(view, old) for view, old in memory), "memory beside the output was written to"
    case.check(before, result, after)


def _broken(number: int) -> str:
    """What GFAST_FUZZ_BREAK says happens in case 7: the fuzzer's own test."""
    how = os.environ.get("GFAST_FUZZ_BREAK") if number == 7 else None
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        os._exit(3)
    return "broken to see it" if how else ""


def work(seed: int, first: int, stop: int, progress: str) -> None:
    """Runs cases in this process, the number of the current one in the shared file ``progress``."""
    warnings.simplefilter("ignore")
    import torch

    with open(progress, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 8)
    for number in range(first, stop):
        shared[:8] = struct.pack("q", number)
        if number % 100 == 0:  # a change costs as much as many cases
            torch.set_num_threads(1 + number // 100 % 3)
        failure = _broken(number) or run_case(seed, number)
        if failure:
            print(f"FAILED case {number}: {failure}\n    python tests/fuzz --seed {seed} --case {number}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    sys.path.append(str(HERE.parents[1]))  # last: another build of gfast may be meant
    if args.case is not None:
        failure = run_case(args.seed, args.case, show=True)
        print(failure or "all right")
        return bool(failure)
    if args.worker:
        work(args.seed, args.first, args.count, args.worker)
        return 0
    stop, first, begun, failures = args.first + args.count, args.first, time.time(), 0
    with tempfile.NamedTemporaryFile() as progress:
        progress.write(struct.pack("q", first))
        progress.flush()
        while first < stop and failures < LARGEST_FAILURES:
            command = [sys.executable, str(HERE), str(stop), "--first", str(first), "--seed", str(args.seed)]
            child = subprocess.Popen(
                [*command, "--worker", progress.name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            said = []
            for line in child.stdout:
                failures += line.startswith("FAILED")
                said = [*said[-60:], line]
                if line.startswith(("FAILED", "    python")):
                    print(line, end="", flush=True)
                if failures >= LARGEST_FAILURES:
                    child.kill()
            code = child.wait()
            if code == 0:
                first = stop
                break
            number = struct.unpack("q", Path(progress.name).read_bytes()[:8])[0]
            if failures < LARGEST_FAILURES:
                how = signal.Signals(-code).name if code < 0 else f"status {code}"
                print("".join(said[-40:]), f"CRASHED case {number}: {how}", sep="")
                print(f"    python tests/fuzz --seed {args.seed} --case {number}", flush=True)
                failures += 1
            first = number + 1
    print(f"{first - args.first} cases, seed {args.seed}: {failures} failed, {time.time() - begun:.0f} s")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
