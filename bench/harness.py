"""Shared by every benchmark: interleaved timing and peak memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from machine import Row

QUEUE_S = 0.1  # seconds of queueing from which a step is not queued beforehand
SPINS_PER_S = 2.5e9  # above the clock of any GPU: at a lower one the kernel that spins takes longer


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reason(problem: Exception) -> str:
    """An exception in one short line of a result."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"


FIELDS = (  # of a measured row, and how it is printed
    ("median_ms", "{:.4g} ms"),
    ("iqr_ms", "(iqr {:.2g})"),
    ("wall_ms", "{:.4g} ms from an idle device"),
    ("host_ms", "{:.3g} ms of them the host's"),
    ("step_ms", "{:.4g} ms a step"),
    ("of_plain_step", "({:.3f} of the plain one)"),
    ("measurement_ms", "{:.4g} ms a measurement"),
    ("gb_per_s", "{:.4g} GB/s"),
    ("of_read_bandwidth", "({:.1%} of what can be read)"),
    ("tflop_per_s", "{:.4g} TFLOP/s"),
    ("times_floor", "{:.3f} floors"),
    ("ratio", "{:.3f} floors"),
    ("peak_extra_mb", "{:.4g} MB"),
    ("of_bytes", "{:.3f} of the bytes it must move"),
    ("relative_error", "error {:.1e}"),
    ("error", "error {:.1e}"),
)


def line(name: str, row: Row) -> str:
    """A row of a result for the terminal: figures, laws, and what is wrong with it."""
    for note in ("wrong", "failed", "skipped"):
        if note in row:
            return f"  {name:<32}{note.upper()}: {row[note]}"
    words = [text.format(row[field]) for field, text in FIELDS if row.get(field) is not None]
    for prefix, law in (
        ("law", row),
        ("memory", row.get("of_memory")),
        ("without dW", row.get("of_passes_without_dw")),
    ):
        if law and "law" in law:
            of = f" {law['ratio']:.2f} of" if law is not row else ""
            words.append(f"{prefix}{of} {law['law']:.2f}: {'met' if law['law_met'] else 'MISSED'}")
    words += [f"UNEQUAL: {row['unequal']}"] if "unequal" in row else []
    words += ["Linear layers only"] if row.get("parameters") == "linear" else []
    return f"  {name:<32}{'  '.join(words)}"


# Time


def summary(seconds: list[float]) -> Row:
    """Median, minimum and interquartile range in milliseconds, and the time of every round."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median_ms": round(1e3 * middle, 4),
        "min_ms": round(1e3 * min(seconds), 4),
        "iqr_ms": round(1e3 * (high - low), 4),
        "repetitions": len(seconds),
        "rounds_ms": [round(1e3 * value, 3) for value in seconds],
    }


def of_floor(row: Row, *units: tuple[float, Row]) -> float:
    """Median over the rounds of a time in multiples of a floor, the sum of count times unit, in the same round.

    A neighbour that takes the machine for a while slows a round's steps alike: their ratio shows less of it than that
    of two medians does. Units that were timed right before each call of the step are taken from there. What was called
    once, outside the rounds, stands against the floor's medians.
    """
    units = [(count, unit) for count, unit in units if count]
    if len(row["rounds_ms"]) == 1:
        return row["median_ms"] / sum(count * unit["median_ms"] for count, unit in units)
    beside = row.get("beside_ms", {})
    turns = zip(*(beside.get(unit.get("name"), unit["rounds_ms"]) for _, unit in units), strict=False)
    floors = [sum(count * ms for (count, _), ms in zip(units, turn, strict=True)) for turn in turns]
    return statistics.median(ms / floor for ms, floor in zip(row["rounds_ms"], floors, strict=False))


def interleaved(
    steps: dict[str, Callable[[], object]],
    device: str = "cpu",
    repetitions: int = 15,
    warmup: int = 3,
    budget_s: float | dict[str, float] = 20.0,
    first: dict[str, float] | None = None,
    beside: dict[str, list[str]] | None = None,
) -> dict[str, Row]:
    """Times every step once per round, so that a change of the machine's speed hits all of them alike.

    A step that would take more than its ``budget_s`` in all rounds sits out the later ones; one that takes more in its
    first call (``first`` has the seconds of those made before) is timed by that alone. ``beside`` names the steps to
    time right before each call of another, the units of its floor: a round of slow steps lasts longer than a machine
    keeps its speed. They have no other turn in the rounds.

    Returns:
        name -> ``summary`` of its times, with those of what was called beside it, and its name where it was that. On a
        GPU with ``aside`` of its calls too.
    """
    rounds: dict[str, int] = {}
    near: dict[str, dict[str, list[float]]] = {
        name: {unit: [] for unit in units} for name, units in (beside or {}).items()
    }
    units = {unit for some in near.values() for unit in some}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        budget = budget_s[name] if isinstance(budget_s, dict) else budget_s
        warm = [first[name]] if first is not None and name in first else []
        while len(warm) < warmup and not (warm and warm[-1] > budget / 4):
            start = time.perf_counter()
            step()
            synchronize(device)
            warm.append(time.perf_counter() - start)
        if warm[0] > budget:  # so slow that a cold start is nothing: no second call
            times[name].append(warm[0])
            rounds[name] = 0
        else:
            rounds[name] = max(1, min(repetitions, int(budget / max(warm[-1], 1e-6))))
    calls: dict[str, list[CudaTimes]] = {name: [] for name in steps}

    def seconds(name: str) -> float:
        if device != "cuda":
            return _wall_seconds(steps[name])
        calls[name].append(cuda_times(steps[name]))
        return calls[name][-1].device

    for turn in range(max(rounds.values(), default=0)):
        for name in steps:
            if turn < rounds[name] and name not in units:
                for unit in near.get(name, ()):
                    near[name][unit].append(seconds(unit))
                    times[unit].append(near[name][unit][-1])
                times[name].append(seconds(name))
    for unit in units:
        while len(times[unit]) < min(3, rounds[unit]):  # nobody it stands beside had a turn
            times[unit].append(seconds(unit))
    summaries = {name: summary(values) for name, values in times.items()}
    for name, row in summaries.items():
        row |= {"name": name} if name in units else {}
        row |= aside(calls[name])
        if near.get(name):
            row["beside_ms"] = {unit: [round(1e3 * value, 3) for value in ms] for unit, ms in near[name].items()}
    return summaries


def _wall_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    del result  # outside the timed span
    return seconds


class CudaTimes(NamedTuple):
    """Seconds of a step: the device's, the host's until it returns, all from an idle device; whether the first is of
    work that was queued before it began."""

    device: float
    host: float
    wall: float
    queued: bool


def cuda_times(step: Callable[[], object]) -> CudaTimes:
    """Two calls. One on an idle device, by the host's clock; one behind a kernel that spins for as long as the host
    needs to queue the step, by events, so that the device never waits for Python within the time that counts.

    Who waits for the device itself cannot be queued, and above QUEUE_S of queueing nobody is: the device's time then
    has the host's in it.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    result = step()
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    del result
    if host >= QUEUE_S:
        return CudaTimes(begin.elapsed_time(end) / 1e3, host, wall, False)
    torch.cuda._sleep(int(SPINS_PER_S * (2 * host + 1e-4)))
    begin.record()
    result = step()
    queued = not begin.query()  # it still spins
    end.record()
    torch.cuda.synchronize()
    del result
    return CudaTimes(begin.elapsed_time(end) / 1e3, host, wall, queued)


def aside(calls: list[CudaTimes]) -> Row:
    """What a row says of a GPU's calls beside the device's time."""
    if not calls:
        return {}
    wall, host = (1e3 * statistics.median(values) for values in ([c.wall for c in calls], [c.host for c in calls]))
    return {"wall_ms": round(wall, 4), "host_ms": round(host, 4), "queued": all(call.queued for call in calls)}


# Memory


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_extra_bytes(step: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes that one call of ``step`` needs at its peak beyond what is held before it (its result included).

    CUDA: the allocator's peak. CPU: the process's peak resident memory, reset just before; measure in a fresh process
    (``peak_in_fresh_process``), where no freed memory is there to be reused, or after ``give_back``. None where the
    system cannot say.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
        before = _status_bytes("VmRSS")
        step()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, RuntimeError):
        return None


def give_back() -> bool:
    """Return freed memory to the system, so that it is counted when it is taken again; False where that cannot be
    asked for (glibc's allocator does it)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def peak_in_fresh_process(
    measure: Callable[[str], int | None], description: str, preload: Sequence[str] = ()
) -> int | None:
    """``measure(description)`` in a new process, with as many threads as here.

    The process is forked from a server that has imported ``preload`` and done nothing else: that saves the seconds that
    importing torch takes, and leaves no freed memory to be reused.
    """
    here = str(Path(__file__).resolve().parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # the server imports by it
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gfast", *preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, measure, description, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        peak = receiver.recv()
    except EOFError:
        peak = "the process died"
    process.join()
    if isinstance(peak, str):
        raise RuntimeError(f"measuring memory failed: {peak}")
    return peak


def _measure(sender: Connection, measure: Callable[[str], int | None], description: str, threads: int) -> None:
    torch.set_num_threads(threads)
    # What a warm-up call left in gfast's pool would serve the measured one and not be counted.
    os.environ["GFAST_POOL_MIB"] = "0"
    try:
        sender.send(measure(description))
    except Exception as problem:
        sender.send(f"{type(problem).__name__}: {problem}")
