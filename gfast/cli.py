# SPDX-License-Identifier: Apache-2.0
"""The command line: `gfast COMMAND`, one of `COMMANDS`."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from gfast.commands.parser import Parser
from gfast.words import did_you_mean

# Command -> module with main(argv) and a line of help. Modules load when their command runs: `gfast --help` loads none.
COMMANDS = {
    "demo": (
        "gfast.commands.demo",
        "learn, forget and measure on a small model; ends with an HTML report (no download, no GPU)",
    ),
    "unlearn": ("gfast.commands.unlearn", "train a model to forget, with any objective, recording what happens"),
    "geffect": ("gfast.commands.geffect", "measure the G-effect of objectives on a model, without training"),
    "evaluate": ("gfast.commands.evaluate", "does a model forget, does it keep: logs, tables and a page"),
    "reproduce": (
        "gfast.commands.reproduce",
        "a study from a recipe: teach, unlearn, evaluate; tables, figures, a page",
    ),
    "audit": ("gfast.commands.audit", "did each update remove what it should? one page to sign"),
    "report": ("gfast.commands.report", "figures, tables and one HTML page from run folders"),
    "bench": ("gfast.commands.bench", "run the benchmarks of a source checkout"),
    "plan": ("gfast.commands.plan", "memory and time of a training and its measurements on a machine, and what fits"),
    "doctor": ("gfast.doctor", "say what will run where, and what to do to get more"),
}

# Those that several processes (torchrun, accelerate launch) do together, and one that only says what it sees. Any other
# would be done by each of them, in one folder.
IN_SEVERAL = ("unlearn", "geffect", "doctor")

_EXAMPLES = """examples:
  gfast demo
  gfast unlearn --model ORIGINAL --forget forget01 --retain retain99 --objective WGA --retain_term nll --output_dir run
  gfast unlearn --config run.yaml --learning_rate 2e-5
  gfast geffect --model ORIGINAL --forget forget01 --retain retain99 --objectives GA WGA:alpha=0.5 NPO
  gfast evaluate --model run --data tofu --forget forget10 --retain_log RETAIN_LOG
  gfast reproduce demo
  gfast report run --out report
  gfast audit run

`gfast COMMAND --help` describes a command. With --debug an error shows its traceback.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 after an audit that was not passed, 2 after an error (one line on
    stderr), 130 after Ctrl-C.
    """
    code = _main(argv)
    distributed = sys.modules.get("torch.distributed")
    if argv is None and distributed is not None and distributed.is_available() and distributed.is_initialized():
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    """End this process, one of several, without taking Python down first: beside threads of the process group that
    aborts at random (SIGABRT), and torchrun then kills the others, who may still be writing.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(arguments)
    if argv is None and {"-h", "--help", "--help_all"} & set(arguments):
        # transformers' TrainingArguments import peft where it is installed, which takes as long as all else. This
        # process prints flags and ends, so it may do without.
        sys.modules.setdefault("peft", None)  # type: ignore[arg-type]
    with _printable():
        try:
            return _run(arguments)
        except SystemExit as stop:
            # argparse ends with 0 after --help.
            return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
        except KeyboardInterrupt as interrupt:
            print(f"\n{interrupt or 'Interrupted; what was written so far is complete.'}", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of a pipe (head, less) has seen enough; nothing more can be said to it.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            return 0
        except Exception as error:
            if debug:
                raise
            print(f"gfast: error: {_one_line(error)}", file=sys.stderr)
            return 2


@contextlib.contextmanager
def _printable() -> Iterator[None]:
    """Let every text be printed: what a terminal's encoding lacks is shown as an escape, and a closed stream is none.

    Questions, answers, paths and names of runs may hold any character; the terminal may know ASCII alone.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors=errors)


def _run(arguments: list[str]) -> int:
    given = arguments[:1]
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ValueError(
            f"there is no command {given[0]!r}{did_you_mean(given[0], COMMANDS) or '.'} The commands are {known}"
        )
    command, rest = _parser().parse_args(given).command, arguments[1:]
    if command is None:
        _parser().print_help()
        return 0
    if {"-h", "--help", "--help_all"}.isdisjoint(rest):
        _refuse_several(command)
    module = importlib.import_module(COMMANDS[command][0])
    return module.main(rest) or 0


def _refuse_several(command: str) -> None:
    """ValueError for a command that one process does, where a launcher has started several."""
    told = os.environ.get("WORLD_SIZE", "")
    if command not in IN_SEVERAL and told.isdecimal() and int(told) > 1:
        raise ValueError(
            f"gfast {command} is work for one process, and {told} were started (WORLD_SIZE, which torchrun and "
            f"accelerate launch set): start it without a launcher. gfast unlearn and gfast geffect run in several"
        )


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:<{width}}{help_line}" for name, (_, help_line) in COMMANDS.items())
    parser = Parser(
        prog="gfast",
        usage="gfast COMMAND [options]",
        description="Exact and fast unlearning for language models: losses, gradient effects, training.",
        epilog=f"commands:\n{listed}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument(
        "command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below"
    )
    return parser


def _version() -> str:
    import gfast

    return f"gfast {gfast.__version__}"


def _take_debug(arguments: list[str]) -> bool:
    # TrainingArguments has a --debug of its own that takes a value; a bare --debug is ours.
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        if argument == "--debug" and (following.startswith("-") or following in COMMANDS):
            del arguments[index]
            return True
    return False


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = (ValueError, OSError, ImportError, RuntimeError)
    if not isinstance(error, expected) or not text:
        text = f"{type(error).__name__}: {text or 'no message'} (gfast --debug ... shows where)"
    text = text.removeprefix("gfast: ")
    return text if len(text) <= 1000 else text[:1000] + " ... (gfast --debug ... shows the rest)"


if __name__ == "__main__":
    sys.exit(main())
