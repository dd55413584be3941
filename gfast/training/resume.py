# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a killed run goes on from, and whether it is still what was saved."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from gfast import peft_models
from gfast.files import MANIFEST, DamagedFile, check_manifest, errno_of, read_json, write_manifest

STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What is saved beside the weights, by Trainer alone, with FSDP or DeepSpeed.
_COURSE = ("rng_state*.pth", "scheduler.pt", "optimizer*", "global_step*")

logger = logging.getLogger("gfast")


def last_checkpoint(run_folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    A run killed while saving leaves a folder that has the highest number but not all of its files, and Trainer would
    take it. Trainer writes `trainer_state.json` last: a checkpoint is complete when that file is there and whole.
    UnlearnTrainer writes a manifest after it: with one the checkpoint was complete, whatever has become of it since
    (`check_checkpoint` tells).

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
    return next((entry for step, entry in numbered if (entry / MANIFEST).exists() or _is_complete(entry, step)), None)


def check_adapters_saved(model: nn.Module, resumed: bool) -> None:
    """A warning where PEFT's checkpoints and final adapter lack something that is trained; ValueError for a run that
    would go on from one of them, or from one of which Trainer loads a part.
    """
    lost = peft_models.unsaved(model)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        text = (
            f"the parameter {lost[0]!r}{more} is trained beside the adapters, and PEFT saves adapters alone: what is "
            f"saved is not the model that was trained. Name its module in modules_to_save, freeze it, or save the "
            f"whole model yourself (merge_and_unload, save_pretrained)"
        )
        if resumed:
            raise ValueError(f"a run that goes on from a checkpoint of adapters would be another: {text}")
        logger.warning("gfast: %s", text)
    active = peft_models.active_adapters(model)
    if resumed and len(active) > 1:
        raise ValueError(
            f"the adapters {list(active)} are trained together, and Trainer goes on with one of them only: load the "
            f"checkpoint's adapters yourself and start a new run, or train one at a time"
        )


def _is_complete(checkpoint: Path, step: int) -> bool:
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return state["global_step"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoint_to_resume(run_folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint that training can go on from, or None: one with more than weights."""
    checkpoint = last_checkpoint(run_folder)
    if checkpoint is None or not _is_weights_alone(checkpoint):
        return checkpoint
    # What `save_only_model` writes: with one setting for a whole run, all of its checkpoints are like that.
    logger.warning("%s holds weights alone (save_only_model): the run starts again from step 0", checkpoint)
    return None


def _is_weights_alone(checkpoint: Path) -> bool:
    """Without the optimizer's state and all that Trainer saves with it, which would begin anew without a word."""
    return not any(any(checkpoint.glob(name)) for name in _COURSE)


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """DamagedFile unless every file of a checkpoint is as it was saved; without a manifest that is only logged.
    ValueError for one of weights alone, and for none.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(
            f"gfast: there is no checkpoint folder {checkpoint}. Give one that there is (OUTPUT_DIR/checkpoint-STEP), "
            "or True for the newest of the run"
        )
    remedy = f"delete the folder {checkpoint} to go on from the checkpoint before it, or restore it from a copy"
    if not check_manifest(checkpoint, remedy):
        logger.warning("%s has no %s: its files go unchecked", checkpoint, MANIFEST)
    elif (name := read_json(checkpoint / MANIFEST, remedy).get("folder")) != checkpoint.name:
        if _NAME.fullmatch(checkpoint.name):
            raise DamagedFile(checkpoint / MANIFEST, f"it is that of {name}", remedy)
    if _is_weights_alone(checkpoint):
        raise ValueError(
            f"gfast: {checkpoint} holds weights alone (it was saved with save_only_model): the optimizer would begin "
            "anew in the midst of the run. Give another checkpoint, or this one as the model of a new run"
        )


@contextlib.contextmanager
def saving(checkpoint: str | os.PathLike[str], mine: bool) -> Iterator[None]:
    """Around the saving of a checkpoint by all processes; `mine`: this one writes what all share.

    Errors: OSError, with the folder, when the disk is full.
    """
    checkpoint = Path(checkpoint)
    if mine:
        # Over a checkpoint of the same step: killed half-way, its files would be of two runs.
        for name in (MANIFEST, STATE):
            (checkpoint / name).unlink(missing_ok=True)
    with room_for(checkpoint, "the run goes on from the checkpoint before it"):
        yield
        if mine:
            write_manifest(checkpoint)


@contextlib.contextmanager
def room_for(folder: str | os.PathLike[str], then: str) -> Iterator[None]:
    """Around what libraries save: OSError, with the folder and what comes `then`, when the disk is full."""
    try:
        yield
    except Exception as error:
        if not _is_about_files(error):
            raise
        reason = " ".join(str(error).split())
        raise OSError(
            errno_of(error), f"could not save {folder}: {reason}. Make room and start again: {then}"
        ) from error


def _is_about_files(error: Exception) -> bool:
    from safetensors import SafetensorError

    # torch.save says it with a RuntimeError of its file writer, and tokenizers with an Exception.
    said = any(mark in str(error) for mark in ("inline_container", "os error"))
    return isinstance(error, (OSError, SafetensorError)) or said
