"""pair_dots, products of samples' gradients tile by tile on a CPU, against fp64."""

import pytest
import torch

from gfast.geffect.contributions.layers import OuterProduct
from gfast.geffect.engines import gram_products
from gfast.geffect.engines.gram_products import InputProducts, _in_one, own_products, products
from gfast.geffect.engines.gram_rows import Rows
from gfast.ops.dispatch import has_cpu_kernel

if not has_cpu_kernel("pair_dots"):
    pytest.skip("gfast._C is not built, or with a torch that has no brgemm", allow_module_level=True)

SAMPLES = {  # rows of each sample: fewer and more than a tile has, one as large as several tiles, some without rows
    "few": [3, 0, 9],
    "tile": [64],
    "one row": [1],
    "uneven": [0, 70, 1, 33, 0, 127, 64],
    "long": [700, 5],
}


def sides(counts: list[int], d_in: int, d_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(sum(counts), d, generator=generator) for d in (d_in, d_out))


def truth(left, rows, right, columns) -> torch.Tensor:
    """[S, S'] in fp64."""

    def gradients(a, b, counts):
        parts = zip(a.double().split(counts), b.double().split(counts), strict=True)
        return torch.stack([(y.t() @ x).flatten() for x, y in parts])

    return gradients(*left, rows) @ gradients(*right, columns).t()


def plain_error(left, rows, right, columns, expected) -> torch.Tensor:
    """What the same products and sums in plain fp32 are off by, entry by entry."""
    terms = (left[0] @ right[0].t()) * (left[1] @ right[1].t())
    found = torch.stack([torch.stack([x.sum() for x in part.split(columns, 1)]) for part in terms.split(rows)])
    return (found - expected).abs()


def assert_exact(*draws) -> None:
    """By the law, over the entries of all draws of (found, left, rows, right, columns)."""
    errors, plain, sizes = [], [], []
    for found, left, rows, right, columns in draws:
        expected = truth(left, rows, right, columns)
        size = [(a.norm() * b.norm()).item() for a, b in (left, right)]  # the largest entry these samples could have
        errors.append((found - expected).flatten() / (size[0] * size[1]))
        plain.append(plain_error(left, rows, right, columns, expected).flatten() / (size[0] * size[1]))
        sizes.append(expected.flatten() / (size[0] * size[1]))
    errors, plain = torch.cat(errors).abs(), torch.cat(plain)
    assert errors.norm() <= 1e-5 * torch.cat(sizes).norm()
    worst = (lambda x: x.max()) if len(draws) == 1 else (lambda x: x.square().mean().sqrt())
    assert worst(errors) <= 2 * worst(plain) + 1e-7


def draws_of(rows: list[int], columns: list[int]) -> range:
    """Seeds: the error of a few numbers is chance, a plain sum's too."""
    return range(1 if sum(rows) * sum(columns) > 64 else 24)


@pytest.mark.parametrize(("d_in", "d_out"), [(1, 3), (48, 65), (40, 2500)])
@pytest.mark.parametrize("columns", SAMPLES)
@pytest.mark.parametrize("rows", SAMPLES)
def test_products_of_two_sides(rows, columns, d_in, d_out):
    rows, columns = SAMPLES[rows], SAMPLES[columns]
    draws = []
    for seed in draws_of(rows, columns):
        left, right = sides(rows, d_in, d_out, 2 * seed), sides(columns, d_in, d_out, 2 * seed + 1)
        found = torch.ops.gfast.pair_dots(*left, *right, rows, columns, False, None, False)
        draws.append((found, left, rows, right, columns))
    assert_exact(*draws)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", SAMPLES)
def test_products_with_itself_are_symmetric(rows, threads):
    rows, before, draws = SAMPLES[rows], torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for seed in draws_of(rows, rows):
            left = sides(rows, 30, 70, seed)
            found, again = (torch.ops.gfast.pair_dots(*left, *left, rows, rows, True, None, False) for _ in range(2))
            assert torch.equal(found, again)
            torch.testing.assert_close(found, found.t(), rtol=1e-6, atol=1e-6 * found.abs().max().item())
            draws.append((found, left, rows, left, rows))
    finally:
        torch.set_num_threads(before)
    assert_exact(*draws)


@pytest.mark.parametrize("same", [False, True])
def test_kept_products_of_inputs_stand_for_the_inputs(same):
    rows = columns = SAMPLES["uneven"]
    left = sides(rows, 30, 70, 0)
    right = left if same else sides(columns, 30, 70, 1)
    inputs = torch.full((sum(rows) * (sum(columns) + 63),), float("nan"))
    first = torch.ops.gfast.pair_dots(*left, *right, rows, columns, same, inputs, False)
    other = [(a, torch.randn_like(b)) for a, b in (left, right)]
    other = [other[0], other[0] if same else other[1]]
    wrong = [(torch.full_like(a, float("nan")), b) for a, b in other]  # not looked at any more
    found = torch.ops.gfast.pair_dots(*wrong[0], *wrong[1], rows, columns, same, inputs, True)
    assert_exact((first, left, rows, right, columns))
    assert_exact((found, other[0], rows, other[1], columns))


def test_rows_of_larger_matrices():
    rows, columns = [5, 80], [90]
    wide = [torch.randn(90, 50) for _ in range(4)]
    left, right = [x[3:88, 7:40] for x in wide[:2]], [x[:, 1:34] for x in wide[2:]]
    found = torch.ops.gfast.pair_dots(*left, *right, rows, columns, False, None, False)
    assert_exact((found, left, rows, right, columns))
    alone = [x[:1, ::1].as_strided((1, 33), (1, 1)) for x in left]  # a single row's stride says nothing
    found = torch.ops.gfast.pair_dots(*alone, *right, [1], columns, False, None, False)
    assert_exact((found, alone, [1], right, columns))


def test_not_finite_stays_not_finite():
    left, right = sides([64, 64], 8, 8, 0), sides([9], 8, 8, 1)
    left[1][70, 3] = float("nan")
    found = torch.ops.gfast.pair_dots(*left, *right, [64, 64], [9], False, None, False)
    assert torch.isfinite(found[0]).all() and torch.isnan(found[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_a_module_come_from_it(dtype, monkeypatch):
    """Rows of 16 bits where they are multiplied in fp32; and the readers of one input share its products."""
    counts, others = SAMPLES["uneven"], [40, 30]
    left, right = ([x.to(dtype) for x in sides(c, 300, 70, seed)] for seed, c in enumerate((counts, others)))
    x, y = Rows(OuterProduct(*left), counts), Rows(OuterProduct(*right), others)
    if not _in_one(x, y):
        pytest.skip(f"this CPU multiplies {dtype} by instructions of its own")
    used, inputs = [], InputProducts()
    monkeypatch.setattr(gram_products, "_gradients_are_cheaper", lambda *args: False)
    original = torch.ops.gfast.pair_dots
    monkeypatch.setattr(torch.ops.gfast, "pair_dots", lambda *a: used.append(a[-1]) or original(*a))
    for _ in range(2):
        cross, own = products(x, y, own=True, inputs=inputs)
        torch.testing.assert_close(cross, truth(left, counts, right, others), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(own, truth(left, counts, left, counts), rtol=1e-4, atol=1e-2)
    assert used == [False, False, True, True]
    torch.testing.assert_close(own_products(x), own, rtol=1e-4, atol=1e-2)


def test_bad_arguments_are_refused():
    a, b, c, d = torch.zeros(4, 6), torch.zeros(4, 3), torch.zeros(5, 6), torch.zeros(5, 3)
    for arguments, error, message in (
        ((a, b, c, d, [4], [5], False, torch.zeros(10), False), ValueError, "at least 256 entries"),
        ((a, b, c, d, [4], [5], False, None, True), ValueError, "no inputs are given"),
        ((a, b, c, d, [3], [5], False, None, False), ValueError, "have 3 rows of 4"),
        ((a, b, c, d, [4], [6, -1], False, None, False), ValueError, "cannot have -1 columns"),
        ((a, b, c, d, [4], [5], True, None, False), ValueError, "other samples than itself"),
        ((a, d, c, d, [4], [5], False, None, False), ValueError, "equally many rows"),
        ((a, b, d, c, [4], [5], False, None, False), ValueError, "equally many columns"),
        ((a.double(), b, c, d, [4], [5], False, None, False), TypeError, "a must be float32"),
        ((a, b.bfloat16(), c, d, [4], [5], False, None, False), TypeError, "must be float32"),
        ((a[:, :0], b, c[:, :0], d, [4], [5], False, None, False), ValueError, "a matrix with columns"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.gfast.pair_dots(*arguments)
