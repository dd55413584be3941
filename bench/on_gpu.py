"""Runs a call of gpu_plan.py so that a kill at any moment loses nothing that was finished: bench/on_gpu.sh calls it.

OUT holds two files, each written under another name and then renamed, after every step and every few seconds in one:

    all.tar.gz    results/DEVICE/*.json, logs/*.log, summary.txt
    summary.txt   a line a step; what it names is in the archive

In a dry run the commands are replaced by bench/gpu_dry.py, whose times are negative, and the archive has a folder
``dry-run`` instead of ``results``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from gpu_plan import CALLS, ROOT, SECONDS, Stage, Step, ends, table

MOST = 16 << 20  # bytes of a file in OUT
LOG = 200 << 10  # bytes of a log that are kept, from its end
LIMITS = (
    8 << 20,
    256 << 10,
    16 << 10,
)  # bytes a file that is no result may have, the next where the archive is too big
EVERY = 5.0  # seconds between archives within a step
GRACE = 5.0  # seconds from SIGINT to SIGKILL
SKIPPED = 77  # exit status of a step that cannot run here; its last line says why


class Call:
    """One call: its folder of work, its clock, its archive."""

    def __init__(self, out: Path, work: Path, dry: bool, seconds: float, facts: dict):
        self.out, self.work, self.dry, self.seconds, self.facts = out, work, dry, seconds, facts
        self.start, self.archived = time.monotonic(), 0.0
        self.steps: list[dict] = []
        self.running: list[subprocess.Popen] = []
        name = facts["environment"]["name"]
        self.results = work / ("dry-run" if dry else "results") / ("" if dry else name)
        self.results.mkdir(parents=True)
        (work / "logs").mkdir()
        folders = [str(ROOT), *facts["folders"], *filter(None, [os.environ.get("PYTHONPATH")])]
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        self.path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
        self.env = {**os.environ, "PATH": self.path, "PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}
        self.env |= {"HF_HUB_OFFLINE": "1", "GFAST_CUDA_ARCH": facts["arch"]}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def why_not(self, step: Step) -> str | None:
        """Why a step cannot run here, or need not."""
        if step.unless and any(done["step"] == step.unless and done["outcome"] == "ok" for done in self.steps):
            return f"{step.unless} did it"
        if missing := [need for need in step.needs if need in self.facts["missing"]]:
            return f"{', '.join(missing)}: not installed"
        if step.tool and not self.dry and shutil.which(step.tool, path=self.path) is None:
            return f"{step.tool} was not found"
        return None

    def words(self, step: Step) -> list[str]:
        values = {"python": [sys.executable], "traces": [str(self.work / "traces")], "workers": self.facts["workers"]}
        values["result"] = [str(self.results / f"{step.result}.json")]
        words: list[str] = []
        for word in step.command:
            words += values[word[1:-1]] if word.startswith("{") and word[1:-1] in values else [word]
        if not self.dry:
            return words
        stub = [sys.executable, str(ROOT / "bench" / "gpu_dry.py"), step.name]
        return [*stub, values["result"][0] if step.result else "-", *words]

    def run(self, stage: Stage, end: float) -> None:
        """The steps of a stage at once, each until it is done or its time is over; then the archive.

        A step may take what is left until the planned end of its stage, at most twice its own seconds: it has what
        earlier ones left over, and takes nothing from later ones.
        """
        left = min(end, self.seconds) - self.elapsed
        jobs = []
        for step in stage:
            why = self.why_not(step) or ("no time left" if left < min(2, step.seconds / 2) else None)
            if why:
                self.note(step, f"skipped: {why}", 0.0)
                self.archive()
                continue
            with open(self.work / "logs" / f"{step.name}.log", "wb") as log:
                # a session of its own: whatever a step starts is ended with it
                process = subprocess.Popen(
                    self.words(step),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=self.env | dict(step.env),
                    start_new_session=True,
                )
            jobs.append((step, process, time.monotonic(), min(left, 2 * step.seconds)))
            self.running.append(process)
        while jobs:
            time.sleep(0.02)
            for job in list(jobs):
                step, process, started, limit = job
                took = time.monotonic() - started
                if process.poll() is None and took < limit:
                    continue
                status = process.poll()
                stop(process)
                jobs.remove(job)
                self.running.remove(process)
                self.note(step, outcome := self.outcome(step, status, limit), took)
                self.env |= {} if outcome == "ok" else dict(step.without)
                self.archive()
            if jobs and time.monotonic() - self.archived > EVERY:
                self.archive()

    def outcome(self, step: Step, status: int | None, limit: float) -> str:
        if status == 0:
            return "ok"
        last = tail(self.work / "logs" / f"{step.name}.log", 1)
        if status == SKIPPED:
            return f"skipped: {''.join(last).strip() or 'it does not say why'}"
        return f"cut after {limit:.0f} s" if status is None else f"failed with {status}"

    def note(self, step: Step, outcome: str, took: float) -> None:
        at = round(self.elapsed, 1)
        self.steps.append(
            {"step": step.name, "what": step.what, "outcome": outcome, "seconds": round(took, 1), "at": at}
        )
        line = f"{at:6.1f} s  {step.name:<24}{outcome}" + (f" ({took:.1f} s)" if took else "")
        lines = [f"{'DRY RUN  ' if self.dry else ''}{line}"]
        if outcome.startswith(("failed", "cut")):
            lines += [f"          | {text}" for text in tail(self.work / "logs" / f"{step.name}.log", 12)]
        print("\n".join(lines), flush=True)
        with open(self.work / "summary.txt", "a") as summary:
            summary.write("\n".join(lines) + "\n")
        record = {"environment": self.facts["environment"], "steps": self.steps, "dry_run": self.dry}
        replace(self.results / "on_gpu.json", (json.dumps(record, indent=1) + "\n").encode())

    def archive(self) -> None:
        """The summary comes last: every step that it names is in the archive already."""
        summary = self.work / "summary.txt"
        for limit in LIMITS:
            packed = pack(self.work, limit)
            if len(packed) <= MOST:
                break
        replace(self.out / "all.tar.gz", packed)
        replace(self.out / "summary.txt", summary.read_bytes() if summary.exists() else b"")
        self.archived = time.monotonic()


def pack(folder: Path, limit: int) -> bytes:
    """All files but those half written; logs by their ends, other files that are no results up to a limit."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as archive:
        for path in sorted(folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                if not path.is_file() or path.suffix == ".part":
                    continue
                name, content = str(path.relative_to(folder)), path.read_bytes()
                if path.suffix == ".log":
                    content = content[-min(LOG, limit) :]
                elif len(content) > limit and not name.startswith(("results/", "dry-run/")):
                    name, content = (
                        f"{name}.left-out",
                        f"{len(content)} bytes were too many for this archive\n".encode(),
                    )
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
                archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def replace(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def tail(path: Path, lines: int) -> list[str]:
    if not path.exists():
        return []
    return path.read_text(errors="replace").splitlines()[-lines:]


def stop(process: subprocess.Popen) -> None:
    """End a step and whatever it started. Interrupted, pytest still says what has failed."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if number == signal.SIGKILL:
                return


def probe(needs: list[str]) -> dict:
    """What is here, asked in a process of its own: this one must not hold the GPU."""
    import torch
    from machine import environment

    def missing(need: str) -> bool:
        module, _, attribute = need.partition(":")
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return True
        return bool(attribute) and not hasattr(importlib.import_module(module), attribute)

    if not torch.cuda.is_available():
        sys.exit(f"on_gpu: torch {torch.__version__} of {sys.executable} sees no CUDA device")
    workers = ["-n", str(min(6, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    absent = [need for need in needs if missing(need)]
    return {"environment": environment("cuda"), "arch": arch, "missing": absent, "workers": workers}


def facts_of(args: argparse.Namespace, work: Path, stages: list[Stage]) -> dict:
    if args.dry:
        nothing = {"name": "dry-run", "device": "none: this was a dry run", "dry_run": True}
        return {"environment": nothing, "arch": "90", "missing": [], "workers": [], "folders": []}
    folders = []
    if args.wheels is not None:
        target = tempfile.mkdtemp(prefix="gfast-wheels-")  # not in the folder of work, which is archived
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        wheels = sorted(map(str, args.wheels.glob("*.whl")))
        if wheels and subprocess.run([*install, "--target", target, *wheels]).returncode == 0:
            folders = [target]
        else:
            print(
                f"on_gpu: nothing was installed of the wheels in {args.wheels}; who needs them is left out", flush=True
            )
    needs = sorted({need for stage in stages for step in stage for need in step.needs})
    path = os.pathsep.join([str(ROOT), *folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).resolve()), "--probe", *needs]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        sys.exit("on_gpu: nothing was run; PYTHON chooses the interpreter, whose torch must see the GPU")
    return {**json.loads(done.stdout.splitlines()[-1]), "folders": folders}


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="bench/on_gpu.sh", description="Measure and test gfast on an NVIDIA GPU.")
    arguments.add_argument("out", type=Path, nargs="?", default=Path("runs") / "gpu", help="folder of all.tar.gz")
    which = arguments.add_mutually_exclusive_group()
    for name in ("second", "third"):
        which.add_argument(f"--{name}", dest="call", action="store_const", const=name, help=f"the {name} call")
    arguments.set_defaults(call="first")
    arguments.add_argument("--dry", action="store_true", help="run no step: stubs in their place, on any machine")
    arguments.add_argument("--plan", action="store_true", help="print the plan and run nothing")
    arguments.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"after which no step goes on (default: {SECONDS})"
    )
    arguments.add_argument("--steps", help="names, separated by commas; default: all of the call")
    arguments.add_argument(
        "--wheels", type=Path, help="folder of wheels to measure beside gfast, installed without a network"
    )
    return arguments


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        print(json.dumps(probe(sys.argv[2:])))
        return 0
    args = parser().parse_args()
    stages = CALLS[args.call]
    if args.plan:
        print("\n".join(table(stages)))
        return 0
    if args.steps:
        wanted, known = args.steps.split(","), {step.name for stage in stages for step in stage}
        if unknown := [name for name in wanted if name not in known]:
            sys.exit(f"on_gpu: the {args.call} call has no step {unknown[0]!r}; it has {', '.join(sorted(known))}")
        stages = [kept for stage in stages if (kept := tuple(step for step in stage if step.name in wanted))]
    archive = args.out / "all.tar.gz"
    if archive.exists():
        sys.exit(f"on_gpu: {archive} is an earlier call's; name another folder, or move it")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        replace(args.out / "summary.txt", b"")
    except OSError as problem:
        sys.exit(f"on_gpu: {args.out} cannot be written ({problem.strerror}); nothing was run")
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="gfast-gpu-"))
    call = Call(args.out, work, args.dry, args.seconds, facts_of(args, work, stages))
    call.start = began
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        for stage, end in zip(stages, ends(stages), strict=True):
            call.run(stage, args.seconds if args.steps else end)
    finally:
        for process in call.running:
            stop(process)
        call.archive()
    bad = sum(done["outcome"].startswith(("failed", "cut")) for done in call.steps)
    print(f"{bad} failed or cut; all of it is in {archive}" + (f", and with whole logs in {work}" * (not args.dry)))
    if args.dry:
        shutil.rmtree(work)
    return bad


if __name__ == "__main__":
    sys.exit(main())
