# SPDX-License-Identifier: Apache-2.0
"""Both sides of a step in one call of the model: its weights are gathered, and embeddings get a gradient, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gfast import hf
from gfast.model_output import ModelOutput, model_output
from gfast.objectives import RMU, RR, Objective
from gfast.ops.checks import IGNORE_INDEX


def refuse_joint(objectives: Sequence[Objective], own_loss_terms: bool, live: bool) -> None:
    """ValueError, naming it, for what needs a call of the model of its own for each side."""
    why = None
    if len(objectives) < 2:
        why = f"{objectives[0]} is one side alone: there is nothing to join"
    elif live:
        why = "live effects and surgery need the gradients of both sides apart"
    elif own_loss_terms:
        why = "the terms that a model adds to its own loss would be those of both sides together"
    elif named := [str(objective) for objective in objectives if isinstance(objective, (RMU, RR))]:
        why = f"{named[0]} stops at a layer inside the model"
    if why is not None:
        raise ValueError(f"joint_forward has no use here: {why}; leave it out")


def outputs(model: nn.Module, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, ModelOutput]:
    """What the model answers to each side, by one call: rows of all sides, padded on the right to the longest.

    ValueError for batches that hold more for the model than token ids and their mask, and for a model whose answer
    depends on the padding.
    """
    for side, batch in sides.items():
        more = [key for key, value in batch.items() if value is not None and key not in {*_JOINED, *hf.OWN_KEYS}]
        if getattr(batch.get("attention_mask"), "ndim", 2) != 2:
            more.append("an attention_mask of pairs of tokens")
        if more or batch.get("input_ids") is None:
            raise ValueError(
                f"joint_forward puts both sides into one batch of input_ids and attention_mask, and the {side} batch "
                f"has {', '.join(more) or 'no input_ids'}: leave joint_forward out"
            )
    shapes = {side: tuple(batch["input_ids"].shape) for side, batch in sides.items()}
    width = max(length for _, length in shapes.values())
    if len({length for _, length in shapes.values()}) > 1 and hf.depends_on_width(model):
        raise ValueError(
            f"joint_forward pads the sides to one length, and what {type(hf.unwrap(model)).__name__} computes may "
            "depend on it (its rotary embeddings stretch, padding changes its logits, or nothing is known of it): "
            "leave joint_forward out"
        )
    ids = torch.cat([_widened(batch["input_ids"], width) for batch in sides.values()])  # [sum of B, T]
    labels = torch.cat([_widened(batch["labels"], width, IGNORE_INDEX) for batch in sides.values()])
    masks = [
        torch.ones_like(batch["input_ids"]) if batch.get("attention_mask") is None else batch["attention_mask"]
        for batch in sides.values()
    ]
    mask = torch.cat([_widened(mask_of_side.to(masks[0].dtype), width) for mask_of_side in masks])
    output = model_output(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    by_side, start = {}, 0
    for side, (rows, length) in shapes.items():
        by_side[side] = output._replace(value=output.value[start : start + rows, :length])
        start += rows
    return by_side


_JOINED = frozenset({"input_ids", "attention_mask"})


def _widened(x: Tensor, width: int, value: int = 0) -> Tensor:
    return nn.functional.pad(x, (0, width - x.shape[1]), value=value)
