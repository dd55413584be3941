"""The output head a chunk of rows at a time: logits of the chunk, and the products its gradient goes into."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from gfast.ops import checks
from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.chunks import row_chunks
from gfast.ops.dispatch import compiled, extension, has_cpu_kernel, kernel
from gfast.ops.memory import fresh
from gfast.ops.token_logp import stats_dtype

_FOLD_ROWS, _FOLD_BYTES = 512, 2**23  # of a tile of logits that is folded: what a processor's last cache holds
_GPU_FOLD_ROWS, _GPU_FOLD_BYTES = 4096, 2**25  # what a GPU's second cache holds, [4096, 4096] in 16 bits
_TILE_BYTES = 2**21  # of a tile of dW that is added up: what one core's second cache holds
_WIDE_TILE_BYTES = 2**24  # of a tile of W or dW in fp32: larger products are worth more than the nearest cache
_SUM_BYTES, _SUM_ENTRIES = 2**24, 256  # of the sums of dH by parts of the vocabulary; of the least part
_FEW_ROWS = 16  # twice what MKL and 2 threads were seen to sum term after term


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply in. A CPU without matrix or dot product instructions for 16 bits multiplies those dtypes 3
    to 100 times slower than fp32."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 and not _native(dtype) else dtype


@cache
def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a 16-bit dtype by instructions of its own."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # on x86 that is also true where oneDNN emulates bf16 by AVX-512, in four times the time that fp32 takes
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def _has_mixed_mm() -> bool:
    """Whether there are products of fp32 and 16 bits, and fast ones: in AVX2 or AVX-512.

    Tiles widened for the library's fp32 products instead would do for training, and scoring would miss its law.
    """
    names = ("mixed_mm", "head_grad_hidden", "head_grad_weight")
    return all(map(has_cpu_kernel, names)) and extension()[0].build_info()["instruction_set"] != "default"


def _mixes(rows: torch.dtype, weight: Tensor) -> bool:
    """Whether rows of that dtype are multiplied by ``weight`` as it is, without a conversion of it in memory."""
    sixteen = weight.dtype in (torch.bfloat16, torch.float16)
    usable = rows == torch.float32 and sixteen and weight.is_cpu and weight.stride(1) == 1
    return usable and _multiplies_mixed()


def _multiplies_mixed() -> bool:
    return torch.backends.mkldnn.enabled and _has_mixed_mm()


def _grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of finished gradients. fp16 ones stay wide: the reduction's factor and a loss scale are applied later, and before
    it sums can overflow and small weights vanish."""
    return torch.float32 if dtype == torch.float16 else dtype


def _stride(vocab: int, device: torch.device) -> int:
    """Elements from one row of logits to the next: on a GPU whole lines of 128 bytes, for the widest loads."""
    return vocab if device.type == "cpu" else -(-vocab // 64) * 64


class ChunkedHead:
    """Logits of some rows, one chunk at a time, and the accumulation of dH, dW and db.

    Args:
        hidden: [N, D], all rows.
        weight: [V, D]. bias: [V] or None.
        labels: int64 [N].
        chunk: rows of logits held at a time.
        order: the rows that take part, in order (see ``valid_rows``); None: all as they come. Rows labelled -100 among
            them must get zeros as the gradient of their logits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, order: Tensor | None
    ):
        self.total_rows, self.index = hidden.shape[0], order
        self.dtype, self.out_dtype = product_dtype(hidden.dtype, hidden.device), hidden.dtype
        if not checks.may_wait(labels.device):
            # ignored rows stay: whatever padding holds (NaN times a zero gradient is NaN) must not reach dW
            hidden = torch.where((labels != IGNORE_INDEX)[:, None], hidden, 0)
        self.hidden = self.select(hidden).to(self.dtype).contiguous()  # [n, D]
        self.labels = self.select(labels).contiguous()  # [n]
        self.rows = self.hidden.shape[0]
        self.chunk = min(chunk, max(self.rows, 1))
        self._weight, self._bias, self.vocab = weight, bias, weight.shape[0]
        self._wide_tile, self._buffer = None, None

    def select(self, values: Tensor | None) -> Tensor | None:
        """Per-row values [N] of the rows that take part [n]."""
        return values if values is None or self.index is None else values.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """Values of these rows [n, ...] at their places among all rows [N, ...], 0 elsewhere."""
        if self.index is None:
            return values
        return values.new_zeros(self.total_rows, *values.shape[1:]).index_copy_(0, self.index, values)

    def _tiles(self, step: int | None = None, mixed: bool = False) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Parts of the vocabulary, and W [t, D] and b [t] there in the dtype of the products.

        All at once where that is their own dtype and no ``step`` is asked for. A head in another dtype passes a
        tile at a time through one buffer, each gone with the next: never whole in fp32. With ``mixed`` W stays as it is
        where ``_product`` can take it as it is.
        """
        weight, bias = self._weight, self._bias
        narrow = weight.dtype != self.dtype and not (mixed and _mixes(self.dtype, weight))
        if narrow:
            fitting = _wide_rows(self.dtype.itemsize * weight.shape[1], self.vocab)
            step = min(fitting, step or fitting)
            if self._wide_tile is None:
                self._wide_tile = self.hidden.new_empty(min(fitting, self.vocab), weight.shape[1])
        for part in _parts(self.vocab, step or max(self.vocab, 1)):
            tile = weight[part]
            if narrow:
                tile = self._wide_tile[: tile.shape[0]].copy_(tile)
            yield part, tile, None if bias is None else bias[part].to(self.dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """Logits [stop - start, V] of a chunk, before scale and cap, in the one buffer there is."""
        if self._buffer is None:
            device = self.hidden.device
            self._buffer = fresh((self.chunk, _stride(self.vocab, device)), self.dtype, device)[:, : self.vocab]
        out = self._buffer[: stop - start]
        for part, weight, bias in self._tiles(mixed=True):
            _product(self.hidden[start:stop], weight, bias, out[:, part])
        return out

    def fold_sizes(self) -> tuple[int, int, int]:
        """Most rows, bytes and columns of a tile of logits that is folded."""
        if self.hidden.is_cuda:
            return _GPU_FOLD_ROWS, _GPU_FOLD_BYTES, _GPU_FOLD_BYTES
        return _FOLD_ROWS, _FOLD_BYTES, 8192

    def fold_state(self, offset: int, scale: float, softcap: float, impl: str) -> Tensor:
        """[3, n] fp64: maximum of the logits but the label's, sum of their exps relative to it, logit of the label.

        A tile of logits [n, t] at a time, folded by ``impl`` ("cpp" or "triton") while it is in cache. ``offset`` is
        the vocabulary entry of W's first row; a label that is not among W's rows has the logit -inf.
        """
        fold, (most, size, widest) = kernel("fold_rows", impl), self.fold_sizes()
        states = [self.hidden.new_empty((3, 0), dtype=torch.float64)]
        for start, stop in row_chunks(self.rows, most):
            rows, part_labels = stop - start, self.labels[start:stop]
            state = nothing_folded(rows, self.hidden.device)
            fitting = max(512, min(widest, size // (self.dtype.itemsize * rows)))
            step = 1 << fitting.bit_length() - 1  # a power of 2: few different row strides, see mixed_mm.cpp
            buffer = self.hidden.new_empty(rows, min(step, self.vocab))
            for part, weight, bias in self._tiles(step, mixed=True):
                tile = buffer[:, : weight.shape[0]]
                _product(self.hidden[start:stop], weight, bias, tile)
                fold(tile, part_labels, offset + part.start, scale, softcap, state)
            states.append(state)
        return torch.cat(states, dim=1)

    def start_gradients(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        self._need_weight, self._added = need_weight, 0
        new = torch.empty_like if self.vocab else torch.zeros_like  # to a share of no entries nothing is added
        self.grad_hidden = new(self.hidden, dtype=_grad_dtype(self.dtype)) if need_hidden else None
        self.grad_bias = self.hidden.new_zeros(self.vocab, dtype=stats_dtype(self.dtype)) if need_bias else None
        self._total: Tensor | None = None  # of dW [V, D]

    def add_gradients(self, start: int, stop: int, grad_logits: Tensor) -> None:
        """The chunk's share of every gradient that is wanted; ``grad_logits`` [stop - start, V]."""
        if not self.vocab:
            return
        hidden = self.hidden[start:stop]
        if self.grad_hidden is not None:
            out = self.grad_hidden[start:stop]
            if _mixes(grad_logits.dtype, self._weight):
                parts = sum_parts(stop - start, *self._weight.shape)
                torch.ops.gfast.head_grad_hidden(grad_logits, self._weight, parts, out)
            else:
                for part, weight, _ in self._tiles():
                    _accumulate_product(out, grad_logits[:, part].t(), weight, first=part.start == 0)
        if self._need_weight:
            if self._total is None:
                # A chunk that holds all rows is summed in fp32 inside the product: one rounding, no wide copy.
                finished, wide = _grad_dtype(self._weight.dtype), stats_dtype(self.dtype)
                only = stop - start == self.rows and self.dtype in (finished, wide)
                kind = finished if only else wide
                self._total = fresh(tuple(self._weight.shape), kind, self._weight.device, pooled=kind != finished)
            _accumulate_product(self._total, grad_logits, hidden, first=self._added == 0)
        if self.grad_bias is not None:
            # on a CPU a sum in another dtype makes a copy in that dtype first: never of the whole chunk
            for part in _parts(self.vocab, _SUM_ENTRIES if grad_logits.is_cpu else max(self.vocab, 1)):
                self.grad_bias[part] += grad_logits[:, part].sum(0, dtype=self.grad_bias.dtype)
        self._added += 1

    def scale_gradients(self, start: int, stop: int, factor: Tensor) -> None:
        """Multiply all gradients; nothing but the rows from start to stop has been added to them so far."""
        sums = (None if self.grad_hidden is None else self.grad_hidden[start:stop], self._total, self.grad_bias)
        for x in sums:
            if x is not None:
                x *= factor

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dH [N, D] in hidden's dtype, dW [V, D] in weight's (both fp32 for fp16), db [V] in at least fp32; an unwanted
        one is empty."""
        self._buffer = None
        # Each its own tensor: a custom op may not return the same one twice.
        grad_weight = self.hidden.new_empty(0)
        if self._need_weight:
            dtype = _grad_dtype(self._weight.dtype)
            grad_weight, self._total = self._total, None
            if grad_weight is None:
                grad_weight = torch.zeros_like(self._weight, dtype=dtype)
            elif grad_weight.dtype != dtype:
                narrow = fresh(tuple(grad_weight.shape), dtype, grad_weight.device, pooled=False)
                grad_weight = narrow.copy_(grad_weight)
        grad_hidden = self.hidden.new_empty(0)
        if self.grad_hidden is not None:
            grad_hidden = self.scatter(self.grad_hidden.to(_grad_dtype(self.out_dtype)))
        return grad_hidden, grad_weight, self.hidden.new_empty(0) if self.grad_bias is None else self.grad_bias


def nothing_folded(rows: int, device: torch.device) -> Tensor:
    """The state [3, n] of no logits at all, see ``fold_state``. Filled in on the device: a copy from the host would
    wait for it, and cannot be recorded in a CUDA graph."""
    state = torch.full((3, rows), -torch.inf, dtype=torch.float64, device=device)
    state[1].zero_()
    return state


def _product(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [m, n] = left [m, D] @ right [n, D].T + bias [n], rounded once."""
    if left.dtype != right.dtype:
        torch.ops.gfast.mixed_mm(left, right, bias, out)
    elif bias is None or _few_rows(left):
        add_mm(out, left, right.t(), first=True)
        if bias is not None:
            out += bias
    else:
        torch.addmm(bias, left, right.t(), out=out)


def _few_rows(left: Tensor) -> bool:
    """Whether a library may sum ``left @ right`` term after term: it does so in fp32 for fewer rows than its registers
    hold, and a sum over the vocabulary then loses a digit that the same rows keep among others."""
    return left.dtype == torch.float32 and left.is_cpu and left.shape[0] < _FEW_ROWS and left.shape[1] > _SUM_ENTRIES


def add_mm(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [m, n] += left [m, k] @ right [k, n], or = for the first, all of one dtype; as exact for few rows as for
    many."""
    if _few_rows(left):
        if first:
            total.zero_()
        for part in _parts(left.shape[1], _SUM_ENTRIES):
            total += left[:, part] @ right[part]
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def sums_are_wide(hidden: Tensor) -> bool:
    """Whether products with rows like ``hidden`` [N, D] are added up in fp32 without having been 16 bits before."""
    dtype = product_dtype(hidden.dtype, hidden.device)
    return dtype.itemsize > 2 or (hidden.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"))


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [m, D] += left.T @ right, or = for the first; left [n, m] and right [n, D] may have another dtype."""
    if first and total.is_cpu and (left.dtype, total.dtype) == (torch.float32, torch.bfloat16) and _multiplies_mixed():
        torch.ops.gfast.head_grad_weight(left, right, total)
    elif left.dtype == total.dtype:
        add_mm(total, left.t(), right, first)
    elif left.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        # the matrix units accumulate in fp32 anyway: asking for fp32 out avoids rounding every chunk's share
        if first:
            torch.mm(left.t(), right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        # Elsewhere a product has the dtype of its factors. It is taken a cached tile at a time, so that no product of
        # the head's size exists and only the sum itself moves through memory.
        row = left.dtype.itemsize * right.shape[1]
        step = _wide_rows(row, total.shape[0]) if left.dtype == torch.float32 else max(256, _TILE_BYTES // row)
        buffer = left.new_empty(min(step, total.shape[0]), right.shape[1])
        for part in _parts(total.shape[0], step):
            share = buffer[: part.stop - part.start]
            torch.mm(left[:, part].t(), right, out=share)
            if first:
                total[part].copy_(share)
            elif total.device.type == "cpu" and compiled("accumulate"):
                torch.ops.gfast.accumulate(total[part], share)
            else:
                total[part] += share


def sum_parts(rows: int, vocab: int, width: int) -> int:
    """Parts of the vocabulary that threads add up dH [rows, width] for, where W is widened in the cache."""
    return max(1, min(32, -(-vocab // _SUM_ENTRIES), _SUM_BYTES // max(4 * rows * width, 1)))


def _wide_rows(row: int, vocab: int) -> int:
    """Rows, of ``row`` bytes in fp32, of a tile of W or dW that has 16 bits elsewhere."""
    return max(64, min(_WIDE_TILE_BYTES // row, vocab // 8) // 64 * 64)


def _parts(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def finished_stats(top: Tensor, others: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logp [n] and statistics [n, 2] (maximum, log of the sum relative to it) from the three parts of ``fold_state``;
    any other shift does as well as the maximum."""
    m = torch.maximum(top, target)
    m = torch.where(m == -torch.inf, 0.0, m)  # all masked: -inf - -inf would be NaN
    others = others * torch.exp(top - m)
    distance = target - m  # <= 0
    # with the label as the maximum log p = -log1p(others), which keeps its relative accuracy as p -> 1
    log_total = torch.where(distance == 0, torch.log1p(others), torch.log(others + torch.exp(distance)))
    return distance - log_total, torch.stack([m, log_total], dim=1)


def fake_backward(hidden: Tensor, weight: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """``fake_gradients`` of an op whose last argument says which are wanted."""
    return fake_gradients(hidden, weight, rest[-1])


def fake_values(head: list[Tensor | None], *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [N] of the rows, and ``fake_backward``."""
    hidden, weight, _ = head
    return hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden.dtype)), *fake_backward(hidden, weight, *rest)


def fake_gradients(hidden: Tensor, weight: Tensor, need: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``ChunkedHead.gradients`` for tracing."""
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    dtypes = _grad_dtype(hidden.dtype), _grad_dtype(weight.dtype), stats_dtype(weight.dtype)
    gradients = zip(shapes, dtypes, need, strict=True)
    return tuple(hidden.new_empty(shape if wanted else 0, dtype=dtype) for shape, dtype, wanted in gradients)
