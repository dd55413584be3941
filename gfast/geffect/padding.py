"""Batches without padding that nobody needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX

_BY_POSITION = frozenset(
    "input_ids inputs_embeds labels attention_mask position_ids token_type_ids mm_token_type_ids "
    "ref_logp ref_hidden ref_layer_hidden".split()
)
_NOT_BY_POSITION = frozenset("sample_id ref_head ref_head_bias ref_head_form pixel_values image_grid_thw".split())


def trimmed(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch without the columns on the right in which no row has a token that is attended to, or a label.

    In a causal model they change nothing before them, and have no loss: padding to a fixed width would only cost time.
    The batch itself where there are none, where no attention_mask [B, T] says what padding is, or with a tensor of
    which it is not known whether its columns are those of the tokens.
    """
    labels, mask, position = batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
    rows, width = labels.shape
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return batch
    if isinstance(position, Tensor) and position.shape not in ((rows, width), (1, width)):
        return batch
    if any(isinstance(x, Tensor) and key not in _BY_POSITION | _NOT_BY_POSITION for key, x in batch.items()):
        return batch
    needed = ((mask.to(labels.device) != 0) | (labels != IGNORE_INDEX)).any(0).nonzero()  # [columns, 1]
    kept = int(needed.max()) + 1 if len(needed) else width
    if kept == width:
        return batch
    short = {key: batch[key][:, :kept] for key in _BY_POSITION if isinstance(batch.get(key), Tensor)}
    return {**batch, **short}
