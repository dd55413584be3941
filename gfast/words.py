# SPDX-License-Identifier: Apache-2.0
"""Words that were probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A question to append to an error about an unknown name; empty where no name is close.

    >>> did_you_mean("--learning_rat", ["--learning_rate", "--seed"])
    '; did you mean --learning_rate?'
    >>> did_you_mean("--dance", ["--learning_rate", "--seed"])
    ''
    """
    plain = {name.lower().replace("-", "_"): name for name in names}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1, cutoff=0.65)
    return f"; did you mean {plain[close[0]]}?" if close else ""
