# SPDX-License-Identifier: Apache-2.0
"""argparse with errors in one line that says what to do; light, so that `gfast --help` stays fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from gfast.words import did_you_mean


class OneLineErrors:
    """Mixed into an ArgumentParser: a wrong command line is a ValueError, and a mistyped flag gets a suggestion."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} ({self.prog} --help lists the flags)")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """ValueError for the `words` that the parser had no use for, if there are any."""
        if not words:
            return
        flag = next((word.partition("=")[0] for word in words if word.startswith("--")), None)
        if flag is None:
            return self.error(f"{words[0]!r} belongs to no flag")
        known = [name for name in self._option_string_actions if name.startswith("--") and "-" not in name[2:]]
        return self.error(f"there is no flag {flag}{did_you_mean(flag, known)}")

    def refuse_twice(self, words: Sequence[str]) -> None:
        """ValueError for a flag of several values, or of a file of settings, that stands twice among `words`: only the
        last of the two lists would count. Other flags are overridden by a second one, as everywhere.
        """
        for name, action in self._option_string_actions.items():
            given = sum(word.partition("=")[0] in action.option_strings for word in words)
            if given > 1 and (action.nargs in ("+", "*") or name == "--config"):
                how = "in one file" if name == "--config" else f"behind one flag: {name} FIRST SECOND"
                self.error(f"{name} is given {given} times, and only the last would count; give all of it {how}")


class Parser(OneLineErrors, argparse.ArgumentParser):
    """Flags are spelled out: an abbreviation would change its meaning with the next flag that is added."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        self.refuse_twice(sys.argv[1:] if args is None else args)
        return options
