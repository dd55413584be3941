# SPDX-License-Identifier: Apache-2.0
"""gfast in TRL's trainers: SFTTrainer takes `GFastLossMixin` as it is, DPOTrainer with `dpo_batch`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gfast import packed
from gfast.integrations.transformers import GFastLossMixin
from gfast.ops.checks import IGNORE_INDEX

__all__ = ["GFastLossMixin", "dpo_batch"]


def dpo_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    r"""TRL's batch of preferences as gfast takes it, with labels.

    TRL's halves are the chosen and then the rejected answers, gfast's the rejected (forget) and then the preferred: an
    objective on TRL's batch as it is would learn what it should forget. gfast's value is 2/beta times TRL's
    :math:`-\log \sigma(\beta (D_{chosen} - D_{rejected}))`.

    Args:
        batch: input_ids, attention_mask and completion_mask [2B, T] of TRL's DataCollatorForPreference, and what else
            the model takes a row; or padding-free, all answers one after another in one row [1, T] with position_ids
            that start again or cu_seq_lens_q [2B + 1].

    Returns:
        The batch with its halves exchanged and labels: the answers' tokens, -100 elsewhere. A new dict, which
        objectives that are not of pairs refuse as it is; tensors without a row or token of their own stay as they are.

    Raises:
        ValueError: a batch that lacks input_ids or completion_mask, an odd number of answers, an answer without tokens,
            rows of a pair whose prompts differ (batches of three answers a prompt), sums of log-probs that TRL computed
            ahead (they are no log-probs of tokens).

    Source: arXiv 2305.18290.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[1, 2, 3], [1, 2, 4]])                       # chosen 3, rejected 4
        >>> out = dpo_batch(dict(input_ids=ids, completion_mask=torch.tensor([[0, 0, 1], [0, 0, 1]])))
        >>> out["labels"].tolist()
        [[-100, -100, 4], [-100, -100, 3]]
    """
    lacking = [key for key in ("input_ids", "completion_mask") if not isinstance(batch.get(key), Tensor)]
    if lacking:
        raise ValueError(
            f"gfast: dpo_batch needs input_ids and completion_mask, as TRL's DataCollatorForPreference makes them; "
            f"{', '.join(lacking)} is missing (the batch has {', '.join(map(str, batch))})"
        )
    ahead = [key for key in batch if key.startswith("ref_") and key.endswith("_logps")]
    if ahead:
        raise ValueError(
            f"gfast: the batch has {', '.join(ahead)}, sums over answers that TRL computed ahead, and gfast needs the "
            f"log-probs of tokens: set precompute_ref_log_probs=False (then ref_model or the adapters give them), or "
            f"give references={{'forget': ReferenceCache}}"
        )
    ids, completion = batch["input_ids"], batch["completion_mask"]
    labels = torch.where(completion.bool(), ids, IGNORE_INDEX)
    given = {key: value for key, value in batch.items() if key != "completion_mask"} | {"labels": labels}
    if ids.shape[0] == 1:
        return _exchanged_in_a_row(given)
    rows = ids.shape[0]
    if rows % 2:
        raise ValueError(f"gfast: {rows} rows are no pairs: dpo_batch takes the chosen and then the rejected answers")
    _check_answers((labels[:, 1:] != IGNORE_INDEX).any(1))
    _check_prompts(ids, completion, batch.get("attention_mask"))
    if packed.texts(given) is not None:
        raise ValueError("gfast: rows that hold several answers must be one row [1, T], as TRL's padding_free makes it")

    def exchanged(value: Any) -> Any:
        if packed.length_of(value) != rows:
            return value
        first, second = value[: rows // 2], value[rows // 2 :]
        return torch.cat([second, first]) if isinstance(value, Tensor) else [*second, *first]

    return packed.Pairs({key: exchanged(value) for key, value in given.items()})


def _check_answers(present: Tensor) -> None:
    if not bool(present.all()):
        half = present.numel() // 2
        lost = int((~present).nonzero()[0])
        which = f"chosen answer {lost}" if lost < half else f"rejected answer {lost - half}"
        raise ValueError(
            f"gfast: the {which} of a batch has no tokens (cut off by max_length?), so that it is no part of a pair; "
            f"leave such pairs out of the data"
        )


def _check_prompts(ids: Tensor, completion: Tensor, mask: Tensor | None) -> None:
    """The answers of a pair are to one prompt: its tokens [2B, T], counted back from the answer, are the same as far as
    both rows have them (TRL may have cut their beginnings).
    """
    back = completion.int().argmax(1, keepdim=True) - 1 - torch.arange(ids.shape[1], device=ids.device)
    there, place = back >= 0, back.clamp(min=0)
    if mask is not None:
        there = there & mask.gather(1, place).bool()
    tokens, half = ids.gather(1, place), ids.shape[0] // 2
    differ = ((tokens[:half] != tokens[half:]) & there[:half] & there[half:]).any(1)
    if bool(differ.any()):
        first = int(differ.nonzero()[0])
        raise ValueError(
            f"gfast: rows {first} and {first + half} of {2 * half} answer different prompts, so they are no pair: "
            f"dpo_batch takes the chosen answers of all prompts and then the rejected ones, as TRL's "
            f"DataCollatorForPreference makes them (that of TPOTrainer adds a third answer: include_reference=False)"
        )


def _exchanged_in_a_row(batch: dict[str, Any]) -> dict[str, Any]:
    """Answers one after another in one row: the second half of them comes first."""
    width = batch["labels"].shape[1]
    starts = packed.starts(batch)  # [S]
    if starts is None or len(starts) % 2:
        answers = (
            "nothing says where its answers begin (position_ids, cu_seq_lens_q)" if starts is None else len(starts)
        )
        raise ValueError(f"gfast: one row [1, {width}] must hold pairs, an even number of answers; {answers}")
    ends = [*starts[1:], width]
    batch["labels"] = batch["labels"].index_fill(1, torch.tensor(starts, device=batch["labels"].device), IGNORE_INDEX)
    scored = [bool((batch["labels"][0, a + 1 : b] != IGNORE_INDEX).any()) for a, b in zip(starts, ends, strict=True)]
    _check_answers(torch.tensor(scored, device="cpu"))
    cut = starts[len(starts) // 2]
    out = packed.Pairs(batch)
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            continue
        if key.startswith("cu_seq_lens"):
            lengths = value.reshape(-1).diff().roll(len(starts) // 2)
            out[key] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(value.dtype).view(value.shape)
        elif value.dim() > 1 and value.shape[:2] == (1, width):
            out[key] = value.roll(-cut, 1)
    return out
