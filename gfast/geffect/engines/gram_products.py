"""Dot products between the gradients of pairs of samples, from rows: no gradient of a parameter's size is formed.

For a Linear, samples i and j have the gradients W_i = sum_{t in i} b_t a_t^T and W_j, and

    <W_i, W_j> = sum over t in i, u in j of (a_t . a_u) (b_t . b_u)

With n rows on a side that costs n^2 (D_in + D_out) products, forming the samples' gradients block by block costs
2 n D_in D_out: pairs win while n is below about D_in D_out / (D_in + D_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gfast.geffect.contributions.head import HeadProduct
from gfast.geffect.contributions.layers import OuterProduct, RowLookup
from gfast.geffect.engines.gram_rows import Rows, Selected, same_memory
from gfast.ops.dispatch import compiled, has_cpu_kernel
from gfast.ops.head import product_dtype

# What forming gradients costs against products of rows, per multiplication: the products are thin, and go through a
# buffer. Measured at 72 rows a sample; a CPU's 16-bit matrix units want larger ones. Beside pair_dots it costs one more
# of that for so many samples, measured at 30 to 110 rows a sample.
_THIN, _THIN_16_BIT, _THIN_SAMPLES = 1.3, 3.0, 14
_BLOCK_ROWS = 512  # rows of token pairs held at a time
_OWN_ROWS = 160  # the same against themselves, where a block's own half is computed twice
_KEPT_PRODUCTS = 1 << 22  # elements of products of inputs that are kept for the next module
_PANEL = 64  # columns of a tile of pair_dots
# Of the head's size: sums of pairs of rows that are held at a time, and columns of b; at least this many columns.
_STRIPS, _TILES, _MIN_TILE = 0.5, 0.125, 256
_BUFFER = 1 << 20  # elements of the block of all samples' gradients: it stays in the cache


class InputProducts:
    """Products a_t . a_u of one pair of inputs, kept for the next module: queries, keys and values read one input."""

    def __init__(self) -> None:
        self._inputs: tuple[Tensor, ...] = ()
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._tiles = torch.empty(0, dtype=torch.float32, device="cpu")  # as pair_dots lays them out
        self._filled = False

    def holds(self, x: Tensor, y: Tensor) -> bool:
        """Are products of these inputs kept?"""
        kept = bool(self._blocks) or self._filled
        return kept and same_memory(x, self._inputs[0]) and same_memory(y, self._inputs[1])

    def get(self, x: Tensor, y: Tensor, start: int, stop: int, first: int) -> Tensor:
        """x[start:stop] y[first:]^T."""
        self._begin(x, y)
        key = (start, first)
        if key not in self._blocks:
            found = _mm(x[start:stop], y[first:])
            if sum(block.numel() for block in self._blocks.values()) + found.numel() > _KEPT_PRODUCTS:
                return found
            self._blocks[key] = found
        return self._blocks[key]

    def tiles(self, x: Tensor, y: Tensor) -> tuple[Tensor | None, bool]:
        """Memory for all of x y^T that pair_dots fills, if that is not too much, and whether it has."""
        self._begin(x, y)
        size = len(x) * -(-len(y) // _PANEL) * _PANEL
        if size > _KEPT_PRODUCTS:
            return None, False
        if self._tiles.numel() < size:  # else that of the inputs before
            self._tiles = torch.empty(size, dtype=torch.float32, device="cpu")
        known, self._filled = self._filled, True
        return self._tiles, known

    def _begin(self, x: Tensor, y: Tensor) -> None:
        if not self.holds(x, y):  # holding the inputs keeps their memory from being used again
            self._inputs, self._blocks, self._filled = (x, y), {}, False


class Caches(NamedTuple):
    """Of products with the batch that passes by, of those of the kept batch with itself, of rows of a batch; and how
    many kept contributions read each input (by its place in memory): they take one product of inputs together."""

    other: InputProducts
    own: InputProducts
    selected: Selected
    readers: Mapping[int, int]

    @classmethod
    def new(cls, readers: Mapping[int, int] | None = None, every: bool = False) -> Caches:
        return cls(InputProducts(), InputProducts(), Selected(every), {} if readers is None else readers)


def products(left: Rows, right: Rows, own: bool, caches: Caches | None = None) -> tuple[Tensor, Tensor | None]:
    """<g_i, g_j> for samples i of `left` and j of `right`, fp64 [S_l, S_r]; with `own` those of left with itself too.

    Both must be of one parameter. Taking both at once forms left's gradients once, where they are formed.
    """
    caches = caches or Caches.new()
    matrices = (OuterProduct, HeadProduct)
    if isinstance(left.contribution, matrices) and isinstance(right.contribution, matrices):
        if left.size == 0 or (right.size == 0 and not own):
            return _zeros(left, right), _zeros(left, left) if own else None
        known = caches.other.holds(left.contribution.a, right.contribution.a)
        readers = caches.readers.get(left.contribution.a.data_ptr(), 1)
        if _gradients_are_cheaper(left, right, own, 0.0 if known else 1.0 / readers):
            return _by_gradients(left, right, own)
        if HeadProduct in (type(left.contribution), type(right.contribution)):
            return _by_tiles(left, right, own)
        return _by_pairs(left, right, caches.other), _by_own_pairs(left, caches.own) if own else None
    return _mixed(left, right), own_products(left) if own else None


def own_products(rows: Rows) -> Tensor:
    """<g_i, g_j> for samples i and j of `rows`, fp64 [S, S]."""
    if isinstance(rows.contribution, (OuterProduct, HeadProduct)):
        empty = Rows(
            OuterProduct(rows.contribution.a[:0], rows.contribution.a.new_empty(0, rows.contribution.width)), []
        )
        return products(rows, empty, own=True)[1]
    return _mixed(rows, rows)


def _zeros(left: Rows, right: Rows) -> Tensor:
    return torch.zeros(len(left.counts), len(right.counts), dtype=torch.float64, device=left.device)


def _gradients_are_cheaper(left: Rows, right: Rows, own: bool, inputs: float) -> bool:
    """By multiplications: of pairs of rows, or of forming the samples' gradients and multiplying those.

    inputs: how much of the products of inputs these have to pay for.
    """
    d_in, d_out = left.contribution.a.shape[1], left.contribution.width
    n, m, samples, others = left.size, right.size, len(left.counts), len(right.counts)
    pairs = (n * m + (n * n / 2 if own else 0)) * (inputs * d_in + d_out)
    squares = samples * (others + (samples if own else 0))
    if _in_one(left, right):
        return (1 + (samples + others) / _THIN_SAMPLES) * (n + m + squares) * d_in * d_out < pairs
    on_cpu = left.device.type == "cpu"
    thin = _THIN_16_BIT if on_cpu and left.contribution.a.dtype.itemsize == 2 else _THIN
    return thin * (n + m + thin * squares) * d_in * d_out < pairs


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


def _add_mm(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x y^T; total fp32 or fp64."""
    if x.is_cuda and x.dtype == y.dtype and x.dtype.itemsize == 2 and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, x, y.t(), out_dtype=total.dtype, out=total)
    elif x.dtype == y.dtype == total.dtype:
        total.addmm_(x, y.t())
    else:
        total += _mm(x, y)


def _sample_sums(x: Tensor, y: Tensor, left: Rows, rows: slice, right: Rows, columns: slice) -> Tensor:
    """[S_l, S_r] fp64 sums of x * y by the samples of rows and columns; x [n, m] may be overwritten, y of its size.

    rows, columns: which of left's and right's rows these are.
    """
    if x.device.type == "cpu" and x.dtype == y.dtype and compiled("pair_sums"):
        return torch.ops.gfast.pair_sums(x, y, left.within(rows), right.within(columns))
    terms = x.mul_(y)
    of_rows = left.membership[:, rows].to(terms.dtype)
    return (of_rows @ terms).double() @ right.membership[:, columns].double().t()


def _in_one(left: Rows, right: Rows) -> bool:
    """Whether pair_dots takes them: on a CPU what is multiplied in fp32."""
    if HeadProduct in (type(left.contribution), type(right.contribution)) or left.device.type != "cpu":
        return False
    sides = ((left.contribution.a, right.contribution.a), (left.contribution.b, right.contribution.b))
    wide = all(_dtype(x.dtype, y.dtype, x.device) == torch.float32 for x, y in sides)
    return wide and has_cpu_kernel("pair_dots") and torch.backends.mkldnn.enabled


def _pair_dots(left: Rows, right: Rows, inputs: InputProducts) -> Tensor:
    """Products and their sums by samples in one; `right` may be `left` itself."""
    tiles, known = inputs.tiles(left.contribution.a, right.contribution.a)
    factors = (left.contribution.a, left.contribution.b, right.contribution.a, right.contribution.b)
    factors = (x if x.dtype == torch.float32 and x.stride(1) == 1 else x.float().contiguous() for x in factors)
    return torch.ops.gfast.pair_dots(*factors, left.counts, right.counts, left is right, tiles, known)


def _by_pairs(left: Rows, right: Rows, inputs: InputProducts) -> Tensor:
    if _in_one(left, right):
        return _pair_dots(left, right, inputs)
    out = _zeros(left, right)
    for start in range(0, left.size, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, left.size)
        of_b = _mm(left.contribution.b[start:stop], right.contribution.b)  # [block, m]
        of_a = inputs.get(left.contribution.a, right.contribution.a, start, stop, 0)
        out += _sample_sums(of_b, of_a, left, slice(start, stop), right, slice(0, right.size))
    return out


def _by_own_pairs(rows: Rows, inputs: InputProducts) -> Tensor:
    """Half of the pairs: blocks of whole samples against themselves and the samples after them."""
    if _in_one(rows, rows):
        return _pair_dots(rows, rows, inputs)
    out, bounds, first = _zeros(rows, rows), rows.bounds(), 0
    while first < len(bounds):
        last, start = first + 1, bounds[first][0]
        while last < len(bounds) and bounds[last][1] - start <= _OWN_ROWS:
            last += 1
        stop = bounds[last - 1][1]
        of_b = _mm(rows.contribution.b[start:stop], rows.contribution.b[start:])
        of_a = inputs.get(rows.contribution.a, rows.contribution.a, start, stop, start)
        sums = _sample_sums(of_b, of_a, rows, slice(start, stop), rows, slice(start, rows.size))  # [S, S]
        out[first:last, first:] = sums[first:last, first:]
        out[last:, first:last] = sums[first:last, last:].t()
        first = last
    return out


def _by_tiles(left: Rows, right: Rows, own: bool) -> tuple[Tensor, Tensor | None]:
    """Pairs of rows of which one side's b does not exist: b_t . b_u adds up over tiles of the vocabulary.

    The sums of the pairs [n, m] (and with `own` half of [n, n]) are held for strips of left's rows that make them less
    than half as large as the head; a second strip forms the tiles again.
    """
    out, mine = _zeros(left, right), _zeros(left, left)
    n, m, vocab, size = (
        left.size,
        right.size,
        left.contribution.width,
        left.contribution.width * left.contribution.a.shape[1],
    )
    wide = torch.float64 if left.contribution.a.dtype == torch.float64 else torch.float32
    step = max(_BLOCK_ROWS, int(_STRIPS * size) // (m + (n if own else 0)))
    for first in range(0, n, step):
        here = left.contribution.some(
            slice(first, None if own else first + step)
        )  # with own: the rows after the strip too
        strip = min(step, n - first)
        blocks = [(r, min(r + _BLOCK_ROWS, strip)) for r in range(0, strip, _BLOCK_ROWS)]
        cross = [here.a.new_zeros(end - r, m, dtype=wide) for r, end in blocks]
        same = [here.a.new_zeros(end - r, here.rows - r, dtype=wide) for r, end in blocks] if own else []
        width = _tile_width(left, right)
        for start in range(0, vocab, width):
            stop = min(start + width, vocab)
            x, y = here.columns(start, stop), right.contribution.columns(start, stop)
            for i, (r, end) in enumerate(blocks):
                _add_mm(cross[i], x[r:end], y)
                if own:
                    _add_mm(same[i], x[r:end], x[r:])
        for i, (r, end) in enumerate(blocks):
            block, a = slice(first + r, first + end), here.a[r:end]
            out += _sample_sums(cross[i], _mm(a, right.contribution.a), left, block, right, slice(0, m))
            if own:  # the block itself, then what comes after it, which counts for both orders
                of_a, after = _mm(a, here.a[r:]), slice(first + end, n)
                mine += _sample_sums(same[i][:, : end - r], of_a[:, : end - r], left, block, left, block)
                if after.start < n:
                    sums = _sample_sums(same[i][:, end - r :], of_a[:, end - r :], left, block, left, after)
                    mine += sums + sums.t()
    return out, mine if own else None


def _tile_width(left: Rows, right: Rows) -> int:
    """Columns of b that both sides hold at a time, of a head whose b does not exist whole."""
    size = left.contribution.width * left.contribution.a.shape[1]
    return min(left.contribution.width, max(_MIN_TILE, int(_TILES * size) // (left.size + right.size)))


def _by_gradients(left: Rows, right: Rows, own: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of all samples, a block of output rows at a time in one buffer, and their dot products."""
    a = left.contribution.a
    (d_in, d_out), samples, others = (a.shape[1], left.contribution.width), len(left.counts), len(right.counts)
    total = samples + others
    work = [(0, left), (samples, right)]
    dtype = _dtype(left.contribution.dtype, right.contribution.dtype, a.device)
    tile = whole = max(1, min(d_out, _BUFFER // (total * d_in)))
    if HeadProduct in (
        type(left.contribution),
        type(right.contribution),
    ):  # b is formed for several blocks at once, if there is room
        tile = min(tile, _tile_width(left, right))
        whole = _tile_width(left, right) // tile * tile
    buffer = torch.zeros(total, tile, d_in, dtype=dtype, device=a.device)
    out = torch.zeros(samples, total, dtype=torch.float64, device=a.device)
    for first in range(0, d_out, whole):
        columns = [rows.contribution.columns(first, min(first + whole, d_out)) for _, rows in work]
        for start in range(0, min(whole, d_out - first), tile):
            width = min(tile, d_out - first - start)
            for (offset, rows), b in zip(work, columns, strict=True):
                into = buffer[offset : offset + len(rows.counts), :width]
                _gradient_block(rows, b[:, start : start + width].to(dtype), into)
            block = buffer[:, :width].reshape(total, width, d_in).transpose(0, 1)  # [width, S, D_in]
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
            factor = left.contribution.some(part).at(ids)
        else:
            terms = _mm(left.contribution.b[part], right.contribution.b)
            factor = left.contribution.ids[part, None] == ids
        out += _sample_sums(terms, factor, left, part, right, slice(0, right.size))
    return out
