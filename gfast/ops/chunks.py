"""Which rows go into which chunk of logits, and how many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gfast.ops import checks
from gfast.ops.checks import IGNORE_INDEX

Spans = list[tuple[int, int]]


def valid_rows(labels: Tensor) -> Tensor | None:
    """Indices of the rows whose label counts, or None where all rows stay (also where looking would wait)."""
    if not checks.may_wait(labels.device):
        return None
    order = (labels != IGNORE_INDEX).nonzero()[:, 0]  # [n]
    return None if order.shape[0] == labels.shape[0] else order


def default_chunk_rows(vocab: int, width: int, device: torch.device) -> int:
    """Rows of logits held at a time: enough to feed the matrix units, little enough to stay small beside the model.

    On a CPU a chunk is no larger than the head itself ([rows, V] against [V, D]), within 256 to 1024 rows. Every chunk
    after the first costs one more pass over the fp32 sum of dW, 8 V D bytes for 6 rows V D flops: at 1 TFLOP/s and
    10 GB/s that is 13% of the products with 1024 rows and half of them with 256.
    """
    if device.type == "cpu":
        return min(1024, max(256, width))
    return int(min(4096, max(512, 2**30 // (2 * max(vocab, 1)))))


def rows_at_once(labels: Tensor, order: Tensor | None, chunk_rows: Sequence[int]) -> int:
    """Rows of a chunk. ``order``: those of labels [N] that take part, None: all; ``chunk_rows``: see ``LocalHead``."""
    rows, (of_chunk, of_single) = (labels if order is None else order).shape[0], chunk_rows
    return max(rows, 1) if rows <= of_single else of_chunk


def row_chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Boundaries of the fewest chunks of at most ``chunk`` rows, all of about the same size."""
    pieces = -(-rows // chunk)
    for i in range(pieces):
        yield rows * i // pieces, rows * (i + 1) // pieces


def plan_chunks(
    level: str, labels: Tensor, ids: Tensor | None, count: int, length: int, chunk_rows: Sequence[int]
) -> tuple[Tensor | None, int, Spans]:
    """Row order and chunk boundaries such that a chunk holds whole sequences (or pairs) where weights depend on them.

    Rows without a label are left out where the host may look at the labels. Where it may not (a CUDA graph records),
    all rows stay and the boundaries follow from shapes alone; with sequence ids given they cannot, so everything
    becomes one span.

    Args:
        ids: sequence of each row [N]. count: a bound S on them; for level "pair" s and s + S/2 belong together.
        length: rows of each sequence where all have the same number and lie one after the other, else 0.

    Returns:
        The rows that take part in their order (None: all as they come), rows of a chunk, and spans of that order. A
        span longer than a chunk is one sequence or pair, unless everything is one span.
    """
    if not checks.may_wait(labels.device):
        chunk = rows_at_once(labels, None, chunk_rows)
        order, spans = _plan_by_shape(level, labels, count, length, chunk)
        return order, chunk, spans
    order = valid_rows(labels)
    chunk = rows_at_once(labels, order, chunk_rows)
    if level == "token":
        return order, chunk, list(row_chunks((labels if order is None else order).shape[0], chunk))
    unit = ids if order is None else ids.index_select(0, order)
    if level == "pair":
        unit = unit % (count // 2)
    unit, by_unit = torch.sort(unit, stable=True)
    lengths = torch.unique_consecutive(unit, return_counts=True)[1].tolist()
    spans, start, stop = [], 0, 0
    for rows in lengths:
        if stop > start and stop + rows - start > chunk:
            spans.append((start, stop))
            start = stop
        stop += rows
    if stop > start:
        spans.append((start, stop))
    return by_unit if order is None else order.index_select(0, by_unit), chunk, spans


def _plan_by_shape(level: str, labels: Tensor, count: int, length: int, chunk: int) -> tuple[Tensor | None, Spans]:
    rows = labels.shape[0]
    if level == "token":
        return None, list(row_chunks(rows, chunk))
    if length == 0 or rows == 0:
        return None, [(0, rows)] if rows else []
    if level == "sequence":
        return None, [(a * length, b * length) for a, b in row_chunks(count, max(1, chunk // length))]
    half = count // 2
    order = torch.arange(rows, device=labels.device).view(2, half, length).transpose(0, 1).reshape(-1)
    return order, [(a * 2 * length, b * 2 * length) for a, b in row_chunks(half, max(1, chunk // (2 * length)))]


def sequence_length(labels: Tensor, sequence_id: Tensor | None) -> int:
    """``length`` of ``plan_chunks`` for labels [..., T]: T, or 0 where ids say which row is whose."""
    return 0 if sequence_id is not None else labels.shape[-1] if labels.dim() > 1 else labels.numel()
