# SPDX-License-Identifier: Apache-2.0
"""TrainingArguments from open-unlearning's YAML, and UnlearnConfig from TrainingArguments."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import TrainingArguments

from gfast.training.config import UnlearnConfig


def make_load_trainer_args() -> Callable[[Mapping[str, Any], Any], TrainingArguments]:
    """open-unlearning's load_trainer_args for any supported transformers, and for machines without a GPU."""
    known = {field.name for field in fields(TrainingArguments) if field.init}

    def load_trainer_args(trainer_args: Mapping[str, Any], dataset: Any) -> TrainingArguments:
        # None in YAML is a word (null is none); of ddp_find_unused_parameters, whose word DDP does not take
        given = {str(name): None if value == "None" else plain(value) for name, value in trainer_args.items()}
        warmup_epochs = given.pop("warmup_epochs", None)
        if warmup_epochs:
            step = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
            given["warmup_steps"] = int(warmup_epochs * len(dataset) // (step * max(1, torch.cuda.device_count())))
        folder = given.get("logging_dir")
        if "logging_dir" not in known and given.pop("logging_dir", None):
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))  # what transformers 5 has in its place
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(
                f"trainer.args has {', '.join(unknown)}, which the TrainingArguments of this transformers do not take; "
                f"take it out of the YAML, or with ~trainer.args.{unknown[0]} on the command line"
            )
        return TrainingArguments(**given)

    return load_trainer_args


def plain(value: Any) -> Any:
    """Hydra's mappings and lists as dicts and lists: what reads arguments, or writes them as JSON, knows no others.

    >>> from collections import UserDict
    >>> plain(UserDict(min_lr=1e-5, of=(1, "a")))
    {'min_lr': 1e-05, 'of': [1, 'a']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return list(map(plain, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def unlearn_config(args: TrainingArguments) -> UnlearnConfig:
    """The same arguments as an UnlearnConfig. A copy: to make them anew would start what they have started again."""
    config = copy.copy(args)
    config.__class__ = UnlearnConfig
    theirs = {field.name for field in fields(TrainingArguments)}
    for field in fields(UnlearnConfig):
        if field.name not in theirs:
            value = field.default if field.default is not MISSING else field.default_factory()
            object.__setattr__(config, field.name, value)
    config.remove_unused_columns = False
    if config.label_names is None:
        config.label_names = ["labels"]
    return config
