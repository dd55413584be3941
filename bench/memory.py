"""What memory a loss over the head may take: its gradients and one chunk, as the library itself cuts it."""

from __future__ import annotations

import torch
from cases import OBJECTIVES, Case, Inputs
from laws import MEMORY, verdict

from gfast.ops.chunks import plan_chunks, sequence_length, valid_rows
from gfast.ops.dispatch import select
from gfast.ops.head import _TILE_BYTES, ChunkedHead, _grad_dtype, _mixes, _wide_rows, sum_parts
from gfast.ops.linear_inputs import local_head
from gfast.ops.reductions import sequence_layout
from gfast.ops.stat_spec import stat_spec_of
from gfast.ops.weights import spec_of


def of_memory(extra_mb: float, allowed: int) -> dict[str, float | bool]:
    """Fields of a row: the law of its memory, given the bytes it may take."""
    ratio = round(extra_mb * 2**20 / allowed, 3)
    return {"allowed_mb": round(allowed / 2**20, 1), "ratio": ratio, **verdict(ratio, MEMORY)}


def allowed_bytes(case: Case, inputs: Inputs) -> int:
    """Of a linear case: the gradients it wants and one chunk; without gradient, what scoring takes.

    Gradients: dH [N, D] and dW [V, D] in the dtypes of H and W; dW once more in fp32 where it has 16 bits and is the
    sum of several chunks (fp16 in any case, which stays wide until it is scaled).

    A chunk: its logits [rows, V] in the dtype of the products, fp32 on a CPU that multiplies 16 bits slowly; the rows
    that take part and their dH, where some have no label or their dtype is another; where W has to be converted, the
    tile of it that is at hand; on a CPU, the tile of a product that is added to a dW of another dtype. Where a CPU's
    kernels widen W in the cache, there are no such tiles, but sums of dH by parts of the vocabulary.

    Scoring: logp and two statistics a row in fp32, and the fp64 they are made of, all [N]; the rows that take part and
    the tile of W as above; of the logits what is folded at a time, or a chunk where no kernel folds them.
    """
    hidden, weight = inputs.tensors
    labels, scored, want_dw = inputs.labels.flatten(), case.mode == "nograd", case.mode in ("train", "forward")
    with torch.set_grad_enabled(not scored):  # it decides on the rows of a chunk
        given = local_head("memory", hidden, weight.detach().requires_grad_(want_dw), None, inputs.labels, None)
    if scored:
        order, chunk = valid_rows(labels), given.chunk_rows[0]
    else:
        objective, (ids, count) = OBJECTIVES[case.objective], sequence_layout("memory", inputs.labels, None)
        level = (stat_spec_of(objective) or spec_of(objective)).level
        length = sequence_length(inputs.labels, None)
        order, chunk, _ = plan_chunks(level, labels, ids, count, length, given.chunk_rows)
    head = ChunkedHead(given.hidden, weight, None, labels, chunk, order)
    product, native, row = head.dtype.itemsize, weight.dtype.itemsize, head.dtype.itemsize * case.width

    taken = head.hidden.numel() * product if head.hidden.data_ptr() != hidden.data_ptr() else 0
    logits = head.chunk * case.vocab * product
    tile, mixes = _wide_rows(row, case.vocab) * row, _mixes(head.dtype, weight)
    if scored:
        folds = stat_spec_of(OBJECTIVES[case.objective]) is None  # the others take whole rows
        if folds and select("linear_token_logp", "auto", hidden.device, hidden.dtype) != "reference":
            logits = min(head.fold_sizes()[1], head.rows * case.vocab * product)
        converts = head.dtype != weight.dtype and not mixes
        return case.rows * 3 * (4 + 8) + taken + logits + converts * tile

    gradient = _grad_dtype(head.dtype)  # that dH is made in
    if head.index is not None or gradient != hidden.dtype:
        taken += head.hidden.numel() * gradient.itemsize
    converted = tile if head.dtype != weight.dtype else 0
    if mixes:
        parts = sum_parts(head.chunk, case.vocab, case.width)
        converted = parts * head.chunk * row if parts > 1 else 0
    allowed = hidden.numel() * native + taken + logits + converted
    if want_dw:
        wide = native == 2 and (head.chunk < head.rows or weight.dtype == torch.float16)
        total = torch.float32 if wide else weight.dtype
        if head.dtype != total and weight.is_cpu and not mixes:
            allowed += tile if head.dtype == torch.float32 else max(256 * row, _TILE_BYTES)
        allowed += weight.numel() * (native + 4 * wide)
    return allowed
