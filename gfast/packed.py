"""Several texts in one row of a batch: which token belongs to which.

Padding-free collators put texts one after another into a row and say where each begins: `position_ids` that start
again, `cu_seq_lens_q` [S + 1] (the first token of each text among those of all rows, and their number), `seq_idx`
[B, T] (the number of each token's text), an attention mask [B, 1, T, T] that hides the texts before, or one [B, T] that
numbers them 1, 2, ... with 0 for padding. `sequence_id`
[B, T] says it to gfast alone, the model does not get it: tokens of one number are one text, wherever in their row
they stand. What
depends on a sequence (a weight for the whole of it, a mean over sequences, a sample of an effect) then sees texts, not
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX


def length_of(value: Any) -> int | None:
    """How many rows an entry of a batch may be of: of a tensor its first dimension, of a list (PEFT's adapter_names)
    its length; None of anything else.
    """
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    return len(value) if isinstance(value, (list, tuple)) else None


def texts(batch: Mapping[str, Any]) -> Tensor | None:
    """The number of each token's text, int64 [B, T]; None where no row holds two texts with labels, and nothing but the
    rows says what a text is.
    """
    labels, ids = batch["labels"], _numbers(batch)
    if ids is None or batch.get("sequence_id") is not None:
        return ids
    valid = labels != IGNORE_INDEX
    valid[:, 0] = False  # nothing scores the first
    # padding has positions of its own too: only texts that are scored count
    low = torch.where(valid, ids, ids.numel()).amin(1)
    high = torch.where(valid, ids, -1).amax(1)
    return ids if bool((high > low).any()) else None


def starts(batch: Mapping[str, Any]) -> list[int] | None:
    """Where the texts of a batch of one row [1, T] begin; None where nothing says."""
    begins = _begins(batch, batch["labels"].shape)
    if begins is None:
        return None
    begins[:, 0] = True
    return begins[0].nonzero()[:, 0].tolist()


def _numbers(batch: Mapping[str, Any]) -> Tensor | None:
    """The number of each token's text, int64 [B, T], where padding may have numbers too; None where nothing says."""
    labels = batch["labels"]
    if batch.get("sequence_id") is not None:
        return _numbered(batch["sequence_id"], labels)
    begins = _begins(batch, labels.shape)
    if begins is None:
        return None
    begins = begins.to(labels.device)
    begins[:, 0] = True
    return begins.reshape(-1).long().cumsum(0).view(labels.shape) - 1


def _numbered(ids: Tensor, labels: Tensor) -> Tensor:
    """Given numbers of texts [B, T] as 0, 1, ... in their order."""
    if not isinstance(ids, Tensor) or ids.shape != labels.shape or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(
            f"gfast: sequence_id must be integers of the shape of labels {tuple(labels.shape)}, the number of each "
            f"token's text; it is {got}"
        )
    ids = torch.unique(ids.to(labels.device), return_inverse=True)[1]
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    counted = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (1, 0))
    first, last = (torch.full((ids.numel(),), fill, device=ids.device) for fill in (len(ids), -1))
    first = first.scatter_reduce(0, ids[counted], rows[counted], "amin")
    last = last.scatter_reduce(0, ids[counted], rows[counted], "amax")
    if bool((last > first).any()):
        number = int((last > first).nonzero()[0])
        raise ValueError(
            f"gfast: sequence_id numbers a text in row {int(first[number])} and one in row {int(last[number])} alike, "
            f"and a model sees no text across rows: number them through the whole batch, not anew in every row"
        )
    return ids


def _begins(batch: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Where a text begins, bool [B, T], as far as the batch says; the first column does not matter."""
    bounds, numbers, positions = (batch.get(key) for key in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if isinstance(numbers, Tensor) and numbers.shape == shape:
        return torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))
    if isinstance(bounds, Tensor):
        begins = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=bounds.device)
        begins[bounds.reshape(-1).long().clamp(0, shape.numel())] = True
        return begins[:-1].view(shape)
    ways = _by_positions(positions, shape), _by_mask(batch.get("attention_mask"), shape)
    known = [begins for begins in ways if begins is not None]
    return torch.stack(known).any(0) if known else None


def _by_positions(positions: Any, shape: torch.Size) -> Tensor | None:
    """Where positions start again."""
    if not isinstance(positions, Tensor):
        return None
    # with several kinds of positions (text, then time, height, width of an image) the first tells the order
    inner = positions[0] if positions.dim() == 3 else positions
    if inner.dim() != 2 or inner.shape[-1] != shape[-1] or inner.shape[0] not in (1, shape[0]):
        return None
    inner = inner.expand(shape)
    again = inner[:, 1:] < inner[:, :-1]
    if positions.dim() == 2:  # texts of one token; the places of an image are at one time
        again = again | (inner[:, 1:] == 0)
    return torch.nn.functional.pad(again, (1, 0))


def _by_mask(mask: Any, shape: torch.Size) -> Tensor | None:
    """Where a token does not see the one before it, by a mask [B, heads, T, T] of booleans or of what scores get; or is
    of another text, by a mask [B, T] of their numbers."""
    if isinstance(mask, Tensor) and mask.shape == shape and not mask.is_floating_point() and bool((mask > 1).any()):
        return torch.nn.functional.pad(mask[:, 1:] != mask[:, :-1], (1, 0))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2:] != (shape[1], shape[1]):
        return None
    before = mask[:, 0].diagonal(-1, -2, -1)  # [B, T - 1]: of each token's attention to the one before it
    hidden = before <= -1e4 if mask.is_floating_point() else before == 0
    return torch.nn.functional.pad(hidden.expand(shape[0], -1), (1, 0))


def sequence_ids(batch: Mapping[str, Any]) -> Tensor | None:
    """The text of each label, numbered 0, 1, ... among those that are scored, int64 [B, T] at the positions that score
    (one before the label's), as loss ops take it; None where rows are sequences.
    """
    ids = texts(batch)
    if ids is None:
        return None
    ids, valid = ids[:, 1:].reshape(-1), (batch["labels"][:, 1:] != IGNORE_INDEX).reshape(-1)
    scored = torch.zeros(batch["labels"].numel(), dtype=torch.bool, device=ids.device).index_fill_(0, ids[valid], True)
    rank = (scored.long().cumsum(0) - 1).clamp(min=0)
    return torch.nn.functional.pad(rank[ids].view(batch["labels"].shape[0], -1), (0, 1))


def _as_they_come(ids: Tensor) -> Tensor:
    """The distinct numbers in ids [n], in the order of their first places."""
    numbers, which = torch.unique(ids, return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    return numbers[torch.full_like(numbers, len(ids)).scatter_reduce(0, which, places, "amin").argsort()]


def by_text(ids: Tensor) -> tuple[Tensor, list[int]]:
    """From the text of each token [n]: the places [n] of the tokens text by text, as the texts begin, and
    how many each has. `sequence_id` may number texts in any order, and one may go on behind another.
    """
    numbers = _as_they_come(ids)
    rank = torch.empty(int(ids.max()) + 1 if len(ids) else 0, dtype=torch.int64, device=ids.device)
    rank[numbers] = torch.arange(len(numbers), device=ids.device)
    return rank[ids].argsort(stable=True), torch.bincount(rank[ids]).tolist()


_BY_TOKEN = (
    "input_ids",
    "labels",
    "weight",
    "ref_logp",
    "ref_hidden",
    "ref_layer_hidden",
    "token_type_ids",
    "inputs_embeds",
)
BOUNDS = (
    "sequence_id",
    "position_ids",
    "attention_mask",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def unpacked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The scored texts of a packed batch as rows of their own, padded on the right, in the order in which they begin.

    Raises ValueError, naming it, for an entry that belongs to rows and not to tokens.
    """
    shape = batch["labels"].shape
    whole = {"ref_head", "ref_head_bias", "ref_head_form"}
    for key, value in batch.items():
        if (
            (isinstance(value, Tensor) or length_of(value) is not None)
            and key not in (*_BY_TOKEN, *BOUNDS, "sample_id", "ref_layer", "ref_precision")
            and key not in whole
        ):
            what = tuple(value.shape) if isinstance(value, Tensor) else f"({len(value)} of them)"
            raise ValueError(
                f"gfast: {key!r} {what} of a packed batch belongs to rows, and effects of samples look "
                f"at the texts in them one by one: unpack the batch, one text a row"
            )
    ids = texts(batch).reshape(-1)  # [B T]
    scored = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORE_INDEX, (1, 0)).reshape(-1)
    places = [(ids == number).nonzero()[:, 0] for number in _as_they_come(ids[scored])]  # of each text's tokens
    width = max(map(len, places))
    out = {key: value for key, value in batch.items() if key in whole}
    out["attention_mask"] = torch.zeros(len(places), width, dtype=torch.int64, device=ids.device)
    for row, place in enumerate(places):
        out["attention_mask"][row, : len(place)] = 1
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        batch = {**batch, "_positions": positions.expand(shape)}
    for key in (*_BY_TOKEN, "_positions"):
        value = batch.get(key)
        if value is None:
            continue
        flat = value.flatten(0, 1)  # [B T, ...]
        rows = flat.new_full((len(places), width, *flat.shape[1:]), IGNORE_INDEX if key == "labels" else 0)
        for row, place in enumerate(places):
            rows[row, : len(place)] = flat[place]
        out["position_ids" if key == "_positions" else key] = rows
    return out


def count(objective: Any, batch: Mapping[str, Any], start: int = 1) -> int:
    """What the default reduction of an objective divides by: valid tokens, sequences or pairs.

    start: the first position whose label counts; 0 for objectives on the hidden states of the labelled positions.
    """
    labels = batch["labels"]
    if "preferred" in getattr(objective, "needs", ()) and (pairs := pair_numbers(batch)) is not None:
        ids, texts = pairs
        each = labels.new_full((texts, 1), IGNORE_INDEX)  # a row a text, in the order of pairs
        each[ids[:, 1:][labels[:, 1:] != IGNORE_INDEX]] = 0
        return objective.count(each)
    ids = sequence_ids(batch) if objective.default_reduction == "sequence_mean" else None
    if ids is None:
        return objective.count(labels[..., start:])
    each = ids.new_full((int(ids.max()) + 1, 1), IGNORE_INDEX)  # a row a text: those that are here are all scored
    return objective.count(each.fill_(0))


def pair_numbers(batch: Mapping[str, Any]) -> tuple[Tensor, int] | None:
    """The number of each token's text among those of packed pairs, int64 [B, T], and how many these are: the second
    half are the preferred answers. Of tokens that nothing scores the number may be another. None where a row is a text.

    A text that lost its labels, as truncation does it, keeps its place among the others: without it every pair behind
    it would be of two answers to different questions. Raises ValueError for an odd number of texts.
    """
    ids = _numbers(batch)
    if ids is None:
        return None
    scored, flat = batch["labels"][:, 1:] != IGNORE_INDEX, ids[:, 1:].reshape(-1)
    present = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device).index_fill_(0, flat[scored.view(-1)], True)
    present |= _worded(batch, ids)
    here, mask = present[ids], batch.get("attention_mask")
    several = torch.where(here, ids, -1).amax(1) > torch.where(here, ids, ids.numel()).amin(1)  # [B]
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        here = here | (mask.to(ids.device) != 0)  # a row of a single token is a text too, though nothing scores it
    if not bool(several.any()) and bool(here.any(1).all()):
        return None
    rank = present.long().cumsum(0) - 1
    texts = int(rank[-1]) + 1
    if texts % 2:
        raise ValueError(
            f"gfast: DPO needs pairs: an even number of texts, the forget answers and then the preferred ones in the "
            f"same order; the packed rows hold {texts}"
        )
    return rank.clamp(min=0)[ids], texts


class Pairs(dict[str, Any]):
    """A batch known to be of pairs: answers to forget, and as many preferred ones, which no other objective may take
    for answers to forget.
    """


def check_pairs(batch: Mapping[str, Any], objective: Any) -> None:
    """ValueError for pairs before an objective that is not of pairs."""
    if isinstance(batch, Pairs) and "preferred" not in getattr(objective, "needs", ()):
        raise ValueError(
            f"gfast: the batch holds pairs, answers to forget and then preferred ones, and {objective} would take "
            f"both for answers to forget: use an objective of pairs (DPO), or give it the first half of the rows"
        )


def first_of_pairs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of pairs whose preferred answers have no labels."""
    labels, pairs = batch["labels"], pair_numbers(batch)
    if pairs is None:
        preferred = (torch.arange(len(labels), device=labels.device) >= len(labels) // 2)[:, None]  # [B, 1]
    else:
        preferred = pairs[0] >= pairs[1] // 2  # [B, T]
    return {**batch, "labels": labels.masked_fill(preferred, IGNORE_INDEX)}


def pair_ids(batch: Mapping[str, Any], size: int) -> Tensor | None:
    """Sequence ids of packed pairs, int64 [B, T] at the positions that score: the second half of the texts begins at
    size // 2, half the number of ids that there may be, where ops look for it. None where a row is a text; see
    `pair_numbers`.
    """
    pairs = pair_numbers(batch)
    if pairs is None:
        return None
    ids, texts = pairs
    return torch.nn.functional.pad(torch.where(ids >= texts // 2, ids - texts // 2 + size // 2, ids)[:, 1:], (0, 1))


def _worded(batch: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Of texts by number, bool [B T]: those in one piece with two different tokens that are attended to. Padding has
    none, and what a sequence_id calls by one number beside its texts (all prompts) is in several.
    """
    tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
    begin = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    pieces = ids[begin].bincount(minlength=ids.numel())
    if tokens is None:  # vectors: any two are taken to differ
        tokens = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        seen = mask.to(ids.device) != 0
        ids, tokens = ids[seen], tokens[seen]
    ids, tokens = ids.reshape(-1), tokens.reshape(-1).long()
    empty = tokens.new_full((batch["labels"].numel(),), -1)
    high = empty.scatter_reduce(0, ids, tokens, "amax")
    low = empty.scatter_reduce(0, ids, tokens, "amin", include_self=False)
    return (high > low) & (pieces == 1)
