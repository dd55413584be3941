"""Dot products between the gradients of pairs of samples, from rows: no gradient of a parameter's size is formed.

For a Linear, samples i and j have the gradients W_i = sum_{t in i} b_t a_t^T and W_j, and

    <W_i, W_j> = sum over t in i, u in j of (a_t . a_u) (b_t . b_u)

With n rows on a side that costs n^2 (D_in + D_out) multiplications, forming the samples' gradients block by block costs
2 n D_in D_out and the way of those blocks through memory: what takes less time is done, a byte moved taking as long as
`_BALANCE` multiplications. A head whose b is not kept is multiplied by its gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.geffect.contributions.head import HeadProduct
from gfast.geffect.contributions.layers import OuterProduct, RowLookup
from gfast.geffect.engines.gram_rows import Rows
from gfast.ops.dispatch import compiled, has_cpu_kernel
from gfast.ops.head import product_dtype

_BALANCE = {2: 16.0, 4: 4.0, 8: 2.0}  # by bytes of the dtype of the products: what matrix units do while a byte moves
_BLOCK_ROWS = 512  # rows of token pairs held at a time
_BUFFER = 1 << 20  # elements of the block of all samples' gradients: it stays in the cache
_PANEL = 64  # columns of a tile of pair_dots
_KEPT = 1 << 22  # elements of the products of inputs that are kept for the next module
_TILES, _MIN_TILE = 0.125, 256  # columns of a head's b that are formed at a time: of its size; at least so many


class InputProducts:
    """Products a_t . a_u of the last inputs, for the next module: queries, keys and values read one input.

    Of a batch with another, and with itself, each in the layout of who made them.
    """

    def __init__(self) -> None:
        self._last: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, left: Rows, right: Rows) -> Tensor | None:
        """Those of these two, if they are kept."""
        x, y, last = self._last.get(left is right, (None, None, None))
        return last if x is left.contribution.a and y is right.contribution.a else None

    def keep(self, left: Rows, right: Rows, made: Tensor) -> Tensor:
        self._last[left is right] = left.contribution.a, right.contribution.a, made
        return made


def products(left: Rows, right: Rows, own: bool, inputs: InputProducts | None = None) -> tuple[Tensor, Tensor | None]:
    """<g_i, g_j> for samples i of `left` and j of `right`, fp64 [S_l, S_r]; with `own` those of left with itself too.

    Both must be of one parameter. Taking both at once forms left's gradients once, where they are formed.
    """
    matrices = (OuterProduct, HeadProduct)
    if not (isinstance(left.contribution, matrices) and isinstance(right.contribution, matrices)):
        return _mixed(left, right), own_products(left) if own else None
    if left.size == 0 or (right.size == 0 and not own):
        return _zeros(left, right), _zeros(left, left) if own else None
    inputs = inputs or InputProducts()
    if _gradients_are_cheaper(left, right, own, inputs.of(left, right) is not None):
        return _by_gradients(left, right, own)
    return _by_pairs(left, right, inputs), _by_pairs(left, left, inputs) if own else None


def own_products(rows: Rows) -> Tensor:
    """<g_i, g_j> for samples i and j of `rows`, fp64 [S, S]."""
    if not isinstance(rows.contribution, (OuterProduct, HeadProduct)):
        return _mixed(rows, rows)
    a = rows.contribution.a
    return products(rows, Rows(OuterProduct(a[:0], a.new_empty(0, rows.contribution.width)), []), own=True)[1]


def _zeros(left: Rows, right: Rows) -> Tensor:
    return torch.zeros(len(left.counts), len(right.counts), dtype=torch.float64, device=left.device)


def _gradients_are_cheaper(left: Rows, right: Rows, own: bool, known: bool) -> bool:
    """Whether forming the samples' gradients and multiplying those takes less time than products of pairs of rows.

    known: the products of the inputs are there.
    """
    if HeadProduct in (type(left.contribution), type(right.contribution)):
        return True
    d_in, d_out = left.contribution.a.shape[1], left.contribution.width
    n, m, samples, others = left.size, right.size, len(left.counts), len(right.counts)
    pairs = n * m + (n * n / 2 if own else 0)
    size = _dtype(left.contribution.dtype, right.contribution.dtype, left.device).itemsize
    balance = _BALANCE[size]
    by_pairs = pairs * (d_in * (not known) + d_out + balance * 16)  # both products are fp32, written and read once
    squares = samples * (others + (samples if own else 0))
    moved = (samples + others) * (2 * size + 8)  # each gradient is written, widened and read once
    return (n + m + squares + balance * moved) * d_in * d_out < by_pairs


def _dtype(x: torch.dtype, y: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply in. Rounded to fp16, products of gradients that carry a loss scale would be infinite."""
    common = torch.promote_types(x, y)
    return torch.float32 if common == torch.float16 else product_dtype(common, device)


def _mm(x: Tensor, y: Tensor) -> Tensor:
    """x y^T in fp32 or fp64: 16-bit products are accumulated in fp32, and on a CPU rounded once to 16 bits."""
    if x.is_cuda and x.dtype == y.dtype and x.dtype.itemsize == 2:
        return torch.mm(x, y.t(), out_dtype=torch.float32)
    dtype = _dtype(x.dtype, y.dtype, x.device)
    out = torch.mm(x.to(dtype), y.to(dtype).t())
    return out if out.dtype == torch.float64 else out.float()


def _sample_sums(x: Tensor, y: Tensor, left: Rows, rows: slice, right: Rows, columns: slice) -> Tensor:
    """[S_l, S_r] fp64 sums of x * y by the samples of rows and columns; x [n, m] may be overwritten, y of its size.

    rows, columns: which of left's and right's rows these are.
    """
    if x.device.type == "cpu" and x.dtype == y.dtype and compiled("pair_sums"):
        return torch.ops.gfast.pair_sums(x, y, left.within(rows), right.within(columns))
    terms = x.mul_(y)
    of_rows = left.membership[:, rows].to(terms.dtype)
    return (of_rows @ terms).double() @ right.membership[:, columns].double().t()


def _by_pairs(left: Rows, right: Rows, inputs: InputProducts) -> Tensor:
    """Products of all rows, and their sums by samples; those of `left` with itself are made once for both orders."""
    x, y, same, of_a = left.contribution, right.contribution, left is right, inputs.of(left, right)
    if _in_one(left, right):
        factors = (f if f.stride(1) == 1 else f.contiguous() for f in (z.float() for z in (x.a, x.b, y.a, y.b)))
        known, size = of_a is not None, left.size * -(-right.size // _PANEL) * _PANEL
        if not known and size <= _KEPT:
            of_a = inputs.keep(left, right, torch.empty(size, dtype=torch.float32, device="cpu"))
        return torch.ops.gfast.pair_dots(*factors, left.counts, right.counts, same, of_a, known)
    if of_a is None and left.size * right.size <= _KEPT:
        of_a = inputs.keep(left, right, _mm(x.a, y.a))
    out = _zeros(left, right)
    for start in range(0, left.size, _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, left.size))
        columns = slice(start if same else 0, right.size)
        of_b = _mm(x.b[block], y.b[columns])  # [block, columns]
        part = _mm(x.a[block], y.a[columns]) if of_a is None else of_a[block, columns]
        if not same:
            out += _sample_sums(of_b, part, left, block, right, columns)
            continue
        size, after = block.stop - start, slice(block.stop, left.size)  # what comes after counts for both orders
        out += _sample_sums(of_b[:, :size], part[:, :size], left, block, left, block)
        if after.start < after.stop:
            sums = _sample_sums(of_b[:, size:], part[:, size:], left, block, left, after)
            out += sums + sums.t()
    return out


def _in_one(left: Rows, right: Rows) -> bool:
    """Whether pair_dots takes them, products and sums in one: on a CPU what is multiplied in fp32."""
    if left.device.type != "cpu" or not (has_cpu_kernel("pair_dots") and torch.backends.mkldnn.enabled):
        return False
    sides = ((left.contribution.a, right.contribution.a), (left.contribution.b, right.contribution.b))
    return all(_dtype(x.dtype, y.dtype, x.device) == torch.float32 for x, y in sides)


def _by_gradients(left: Rows, right: Rows, own: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of all samples, a block of output rows at a time in one buffer, and their dot products."""
    a = left.contribution.a
    (d_in, d_out), samples, others = (a.shape[1], left.contribution.width), len(left.counts), len(right.counts)
    total = samples + others
    dtype = _dtype(left.contribution.dtype, right.contribution.dtype, a.device)
    tile = whole = max(1, min(d_out, _BUFFER // (total * d_in)))
    if HeadProduct in (type(left.contribution), type(right.contribution)):  # b, for several blocks if there is room
        room = min(d_out, max(_MIN_TILE, int(_TILES * d_out * d_in) // (left.size + right.size)))
        tile = min(tile, room)
        whole = room // tile * tile
    buffer = torch.zeros(total, tile, d_in, dtype=dtype, device=a.device)
    out = torch.zeros(samples, total, dtype=torch.float64, device=a.device)
    for first in range(0, d_out, whole):
        b_columns = [rows.contribution.columns(first, min(first + whole, d_out)) for rows in (left, right)]
        for start in range(0, b_columns[0].shape[1], tile):
            parts = [b[:, start : start + tile].to(dtype) for b in b_columns]
            width = parts[0].shape[1]
            _gradient_block(left, parts[0], buffer[:samples, :width])
            _gradient_block(right, parts[1], buffer[samples:, :width])
            block = buffer[:, :width].transpose(0, 1)  # [width, S, D_in]
            block = block if dtype == torch.float64 else block.float()
            # fp32 sums over one row of the gradient at a time, fp64 beyond
            out += torch.bmm(block[:, :samples], block.transpose(1, 2)).sum(0, dtype=torch.float64)
    return out[:, samples:], out[:, :samples] if own else None


def _gradient_block(rows: Rows, b: Tensor, out: Tensor) -> None:
    """out [S, width, D_in] = the rows of the gradient of each sample that b [n, width] is of."""
    a = rows.contribution.a.to(b.dtype)
    samples = len(rows.counts)
    if samples and rows.counts.count(rows.counts[0]) == samples:
        torch.bmm(b.view(samples, -1, b.shape[1]).transpose(1, 2), a.view(samples, -1, a.shape[1]), out=out)
        return
    for sample, (first, last) in enumerate(rows.bounds()):
        torch.mm(b[first:last].t(), a[first:last], out=out[sample])


def _mixed(left: Rows, right: Rows) -> Tensor:
    """Products of small parameters, of embeddings, and of an embedding with the head that it is tied to."""
    if isinstance(left.contribution, Tensor):
        return left.contribution @ right.contribution.t()
    if isinstance(left.contribution, RowLookup) and not isinstance(right.contribution, RowLookup):
        return _mixed(right, left).t()
    out = _zeros(left, right)
    for start in range(0, left.size, _BLOCK_ROWS):
        part, ids = slice(start, start + _BLOCK_ROWS), right.contribution.ids
        if not isinstance(left.contribution, RowLookup):  # row u of the embedding meets column ids_u of the head's b
            terms = _mm(left.contribution.a[part], right.contribution.b)
            factor = left.contribution.select(part).at(ids)
        else:
            terms = _mm(left.contribution.b[part], right.contribution.b)
            factor = left.contribution.ids[part, None] == ids
        out += _sample_sums(terms, factor, left, part, right, slice(0, right.size))
    return out
