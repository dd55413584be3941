# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a killed run goes on from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(run_folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    A run killed while saving leaves a folder that has the highest number but not all of its files, and Trainer would
    take it. Trainer writes `trainer_state.json` last: a checkpoint is complete when that file is there and whole.

    >>> import tempfile
    >>> last_checkpoint(tempfile.mkdtemp()) is None
    True
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        return None
    numbered = sorted(
        ((int(match[1]), entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))), reverse=True
    )
    return next((entry for step, entry in numbered if _is_complete(entry, step)), None)


def _is_complete(checkpoint: Path, step: int) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return state["global_step"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False
