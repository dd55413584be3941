"""The products of per-sample gradients that the gram engine adds up, and the rows that it leaves out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from helpers.geffect_samples import WAYS, multiplied  # noqa: E402

from gfast.geffect.contributions import layers  # noqa: E402
from gfast.geffect.contributions.layers import OuterProduct, RowLookup, RowSum  # noqa: E402
from gfast.geffect.engines import gram_products  # noqa: E402
from gfast.geffect.engines.gram_products import own_products  # noqa: E402
from gfast.geffect.engines.gram_rows import Rows, Selected, rows_of  # noqa: E402


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    yield from multiplied(request.param, monkeypatch)


def literal_gradients(share, owner: list[int], samples: int, shape: tuple[int, ...]) -> torch.Tensor:
    out = torch.zeros(samples, *shape, dtype=torch.float64)
    for row, sample in enumerate(owner):
        if isinstance(share, OuterProduct):
            out[sample] += torch.outer(share.b[row], share.a[row])
        elif isinstance(share, RowLookup):
            out[sample, share.ids[row]] += share.b[row]
        else:
            out[sample] += share.terms[row].view(shape)
    return out.flatten(1)


@pytest.mark.parametrize(
    ("left", "right"),
    [("outer", "outer"), ("outer", "lookup"), ("lookup", "outer"), ("lookup", "lookup"), ("sum", "sum")],
)
@pytest.mark.parametrize("rows", [7, 600])
def test_products_of_every_pair_of_shares(left, right, rows, way):
    generator = torch.Generator().manual_seed(rows)

    def made(kind: str, n: int, samples: int):
        owner = torch.randint(0, samples, (n,), generator=generator).sort().values  # a sample may have no row
        b = torch.randn(n, 9 if kind == "outer" else 6, generator=generator, dtype=torch.float64)
        b[::3] = 0.0
        if kind == "outer":
            share = OuterProduct(torch.randn(n, 6, generator=generator, dtype=torch.float64), b)
        elif kind == "lookup":
            share = RowLookup(torch.randint(0, 9, (n,), generator=generator), b)
        else:
            share = RowSum(b)
        truth = literal_gradients(share, owner.tolist(), samples, (6,) if kind == "sum" else (9, 6))
        return rows_of(share, owner, samples), truth

    (x, x_truth), (y, y_truth) = made(left, rows, 11), made(right, rows // 2, 4)
    assert left == "sum" or x.size == rows - len(range(0, rows, 3))
    cross, own = gram_products.products(x, y, own=True)
    torch.testing.assert_close(cross, x_truth @ y_truth.t(), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(own, x_truth @ x_truth.t(), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(own_products(x), x_truth @ x_truth.t(), rtol=1e-10, atol=1e-9)
    assert bool(way) == (left == "outer")


def test_products_with_a_batch_without_rows():
    empty = rows_of(OuterProduct(torch.zeros(0, 6), torch.zeros(0, 9)), torch.zeros(0, dtype=torch.int64), 3)
    some = rows_of(OuterProduct(torch.ones(8, 6), torch.ones(8, 9)), torch.arange(8) // 2, 4)
    assert torch.equal(gram_products.products(empty, some, own=False)[0], torch.zeros(3, 4, dtype=torch.float64))
    cross, own = gram_products.products(some, empty, own=True)
    assert torch.equal(cross, torch.zeros(4, 3, dtype=torch.float64)) and (own == 4 * 6 * 9).all()


def test_a_few_rows_of_zeros_are_kept_and_many_left_out():
    a, b = torch.ones(40, 3), torch.ones(40, 2)
    owner = torch.arange(40) // 10
    b[5] = 0.0
    assert rows_of(OuterProduct(a, b), owner, 4).counts == [10, 10, 10, 10]
    b[20:] = 0.0
    found = rows_of(OuterProduct(a, b), owner, 4)
    assert found.counts == [9, 10, 0, 0] and len(found.contribution.a) == 19
    assert isinstance(found, Rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["cpp", "plain"])
def test_used_rows(way, dtype, monkeypatch):
    """Something in the first, the last or a middle column counts, NaN too; -0 and what lies between rows does not."""
    if way == "plain":
        monkeypatch.setattr(layers, "compiled", lambda op: False)
    elif not layers.compiled("used_rows"):
        pytest.skip("gfast._C is not built, or older than used_rows")
    for columns in (1, 5, 64, 200):
        x = torch.ones(9, columns + 3, dtype=dtype)[:, :columns].zero_()
        x[1], x[2, 0], x[3, -1], x[4, columns // 2] = -0.0, 1.0, -1.0, float("nan")
        x[5, columns // 3], x[6] = torch.finfo(dtype).smallest_normal, 0.0
        assert layers._not_zero(x).tolist() == [False, False, True, True, True, True, False, False, False]
    assert layers._not_zero(torch.zeros(0, 7, dtype=dtype)).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["cpp", "plain"])
def test_pair_sums(way, dtype, monkeypatch):
    """Sums by samples of a part of the rows and columns, some samples empty, x and y parts of larger matrices."""
    if way == "plain":
        monkeypatch.setattr(gram_products, "compiled", lambda op: False)
    elif not gram_products.compiled("pair_sums"):
        pytest.skip("gfast._C is not built, or older than pair_sums")
    generator = torch.Generator().manual_seed(0)
    counts, others = [5, 0, 40, 1], [0, 300, 2, 17, 0]
    left, right = (Rows(OuterProduct(torch.zeros(sum(c), 1), torch.zeros(sum(c), 1)), c) for c in (counts, others))
    x, y = (torch.randn(46, 400, generator=generator, dtype=dtype) for _ in range(2))
    for rows, columns in ((slice(0, 46), slice(0, 319)), (slice(3, 30), slice(100, 310)), (slice(7, 7), slice(0, 319))):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        a, b = x[:height, :width], y[:height, 3 : 3 + width]
        truth = a.double() * b.double()
        expected = left.membership[:, rows].double() @ truth @ right.membership[:, columns].double().t()
        found = gram_products._sample_sums(a, b, left, rows, right, columns)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=20 * tolerance)


def test_pair_sums_refuses_what_does_not_fit():
    if not gram_products.compiled("pair_sums"):
        pytest.skip("gfast._C is not built, or older than pair_sums")
    x = torch.zeros(4, 6)
    for arguments, error, message in (
        ((x, x.double(), [4], [6]), TypeError, "both be float32 or float64"),
        ((x, x[:3], [4], [6]), ValueError, "matrices of one shape"),
        ((x.t(), x.t(), [6], [4]), ValueError, "contiguous rows"),
        ((x, x, [3], [6]), ValueError, "have 3 rows of 4"),
        ((x, x, [4], [7, -1]), ValueError, "cannot have -1 columns"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.gfast.pair_sums(*arguments)
    with pytest.raises(ValueError, match="contiguous rows"):
        torch.ops.gfast.used_rows(x.t())
    with pytest.raises(TypeError, match="floating point"):
        torch.ops.gfast.used_rows(x.long())


def test_rows_of_one_input_are_selected_once():
    """And never taken for those of another input, or for other rows of it."""
    a, owner = torch.randn(40, 3), torch.arange(40) // 10
    b, c = torch.randn(2, 40, 2)
    b[20:], c[:20] = 0.0, 0.0
    selected = Selected()
    first, again = (rows_of(OuterProduct(a, b * scale), owner, 4, selected) for scale in (1, 2))
    assert first.contribution.a.data_ptr() == again.contribution.a.data_ptr() and torch.equal(
        first.contribution.a, a[:20]
    )
    assert torch.equal(rows_of(OuterProduct(a, c), owner, 4, selected).contribution.a, a[20:])
    other = a + 1
    assert torch.equal(rows_of(OuterProduct(other, c), owner, 4, selected).contribution.a, other[20:])
    assert torch.equal(first.contribution.a, a[:20])


def test_products_of_inputs_are_not_mixed_up():
    """Of one input they are made once, and never taken for those of another, or for a batch's own."""
    generator = torch.Generator().manual_seed(0)
    a, other, b, c = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    x, y, z, w = (Rows(OuterProduct(*factors), [2, 4]) for factors in ((a, b), (other, c), (a, c), (a.clone(), c)))
    inputs = gram_products.InputProducts()
    first = gram_products._by_pairs(x, y, inputs)
    assert inputs.of(x, y) is not None and inputs.of(z, y) is inputs.of(x, y)
    assert inputs.of(w, y) is inputs.of(x, z) is inputs.of(x, x) is None
    for left, right in ((x, y), (z, y), (w, y), (x, x), (z, z), (x, y)):
        found = gram_products._by_pairs(left, right, inputs)
        torch.testing.assert_close(found, gram_products._by_pairs(left, right, gram_products.InputProducts()))
    torch.testing.assert_close(found, first)


class OnDevice(torch.Tensor):
    """A tensor whose values the host has to wait for, and how often it did."""

    looks = 0
    WAITS = ("cpu", "nonzero", "equal", "tolist", "item", "bincount", "__bool__", "unique", "isin")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        OnDevice.looks += func.__name__ in cls.WAITS
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if func.__name__ == "cpu" else out


@pytest.mark.parametrize("by_sample", [True, False], ids=["owners", "even"])
def test_the_rows_of_a_module_take_one_look_at_the_device(by_sample, monkeypatch):
    monkeypatch.setattr(layers, "compiled", lambda op: False)
    a, b = torch.randn(12, 5), torch.randn(12, 7)
    a[4:9], b[10] = 0, 0
    owner = torch.tensor([0] * 5 + [1] * 7) if by_sample else None
    selected, plain = Selected(), rows_of(OuterProduct(a, b), owner, 2)
    lent = OuterProduct(a.as_subclass(OnDevice), b.as_subclass(OnDevice))
    for _ in range(2):  # the second finds the first one's rows
        OnDevice.looks = 0
        found = rows_of(lent, None if owner is None else owner.as_subclass(OnDevice), 2, selected)
        assert OnDevice.looks == 1
        assert found.counts == plain.counts and torch.equal(found.contribution.b, plain.contribution.b)
