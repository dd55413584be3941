# SPDX-License-Identifier: Apache-2.0
"""The losses that a GEffectMonitor is given, and how it refuses what it cannot measure."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from torch import Tensor

Loss = Any  # a scalar tensor, something with a .loss, or a function that returns one of them
FREED = (
    "FSDP2 and ZeRO free the gathered weights of a forward after its first backward: give risk= as a function that "
    "computes it"
)


def refuse(message: str) -> NoReturn:
    """ValueError in gfast's name."""
    raise ValueError(f"gfast: {message}")


def check_factor(factor: float) -> None:
    """ValueError for 0, and for what is no number to divide by."""
    if factor == 0.0:
        refuse("factor=0: nothing follows for an objective from a loss that is 0 times it; leave its term out")
    if not math.isfinite(factor):
        refuse(f"factor={factor}: it must be a finite number, what the objective is multiplied by in the loss")


def is_function(loss: Loss) -> bool:
    """Whether a loss is to be computed."""
    return callable(loss) and not isinstance(loss, Tensor)


def shares_forward(risk: Loss | None, sharded: bool) -> bool:
    """Whether a risk comes with a graph, which may be that of the loss beside it; ValueError for one of shards."""
    shared = risk is not None and not is_function(risk)
    if shared and sharded:
        refuse(FREED)
    return shared


def value_of(loss: Loss, what: str) -> Tensor:
    """The scalar of a loss, with a graph."""
    loss = loss() if is_function(loss) else loss
    loss = getattr(loss, "loss", loss)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        refuse(f"the {what} must be one number, and it is {got}")
    if not loss.requires_grad:
        refuse(
            f"the {what} has no graph, so there is no gradient: compute it with gradients on (not in torch.no_grad()), "
            f"from parameters that are trained"
        )
    return loss
