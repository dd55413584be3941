# SPDX-License-Identifier: Apache-2.0
"""Optimizers that train at other weights than their model's (schedule-free): which are measured and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from gfast.geffect.live.processes import here


def schedule_free(optimizer: Any) -> Any:
    """The optimizer itself, if it has a mode to train in and one in which parameters are its model's; else None."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper has both methods, whatever it wraps
    return inner if all(callable(getattr(inner, name, None)) for name in ("train", "eval")) else None


def refuse_flat(args: Any, optimizer: Any, deepspeed: bool) -> None:
    """ValueError for such an optimizer under DeepSpeed, whose partitions it would move, and not the model's parameters:
    what is measured and saved would be what is trained.
    """
    name = str(getattr(args.optim, "value", args.optim))
    given = None if optimizer is None else schedule_free(optimizer)
    if deepspeed and (given is not None or (optimizer is None and name.startswith("schedule_free"))):
        what = f"optim={name!r}" if given is None else f"the {type(given).__name__} that was given"
        raise ValueError(
            f"{what} under DeepSpeed: nothing but its own flat copy of the weights would change to their "
            f"average, so that what is measured and saved would not be the model. Take another optimizer, or DDP or "
            f"FSDP2 (fsdp='full_shard' with fsdp_config={{'fsdp_version': 2}})"
        )


@contextlib.contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """The parameters as they are saved; then those that are trained again, to the bit: their way there and back rounds,
    so that they are copied.
    """
    inner = schedule_free(optimizer)
    if inner is None or not inner.state:
        yield
        return
    parameters = [p for group in inner.param_groups for p in group["params"]]
    trained = [here(p.detach()).clone() for p in parameters]
    training = any(group.get("train_mode", False) for group in inner.param_groups)
    inner.eval()
    moved = training or any(  # which nothing does while a warm-up's rate is 0
        not torch.equal(here(p.detach()), trained_weights)
        for p, trained_weights in zip(parameters, trained, strict=True)
    )
    try:
        yield
    finally:
        if moved:
            inner.train()
            with torch.no_grad():
                for parameter, trained_weights in zip(parameters, trained, strict=True):
                    here(parameter.detach()).copy_(trained_weights)


class SavesAveraged:
    """Over a Trainer: its model is saved, and left at the end, as its evaluation takes it. Trainer has the weights that
    a schedule-free optimizer trains at, unless an evaluation came before; the next step goes on with those.
    """

    def _average(self) -> None:
        inner = schedule_free(getattr(self, "optimizer", None))
        if inner is not None:
            inner.eval()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's."""
        self._average()
        super().save_model(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._average()  # or the next evaluation would take what is loaded for weights to average
        super()._load_best_model()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._inner_training_loop(*args, **kwargs)
        self._average()
        return output
