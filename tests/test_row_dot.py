"""linear_row_dot: every implementation against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.marks import slow_when

from gfast.ops.dispatch import why_not
from gfast.ops.row_dot import linear_row_dot, linear_row_dot_reference, row_sums

SHAPES = [(1, 1, 1), (5, 3, 7), (300, 40, 24), (70, 24, 130), (3, 200, 9), (0, 4, 5), (65, 64, 64), (4, 0, 3)]
SHAPES += [(17, 400, 650), (129, 1030, 40), (70, 70, 2100), (3, 5, 0)]  # several blocks on a CPU, and parts of them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def inputs(shape: tuple[int, int, int], dtypes: tuple = (F32, F32, F32)):
    n, d_in, d_out = shape
    generator = torch.Generator().manual_seed(n + 7 * d_in + 31 * d_out)
    sizes = ((n, d_in), (n, d_out), (d_out, d_in))
    drawn = (torch.randn(size, generator=generator) for size in sizes)
    return tuple(x.to(DEVICE, dtype) for x, dtype in zip(drawn, dtypes, strict=True))


def available(impl: str) -> None:
    reason = why_not("linear_row_dot", impl, DEVICE, F32)
    if reason:
        pytest.skip(reason)


def assert_right(a, b, direction, impl: str) -> None:
    """Error relative to the product of norms of each row: at most that of a plain GEMM in the products' dtype."""
    found = linear_row_dot(a, b, direction, impl=impl)
    assert found.dtype == F64 and found.shape == (a.shape[0],)
    truth = linear_row_dot_reference(a, b, direction)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), direction.dtype)
    plain = ((a.to(dtype) @ direction.to(dtype).t()).double() * b.double()).sum(-1)
    scale = (a.double().norm(dim=1) * b.double().norm(dim=1)) * direction.double().norm()
    allowed = 2 * (plain - truth).abs().max() if len(truth) else 0.0
    assert ((found - truth).abs() <= allowed + torch.finfo(dtype).eps * scale).all()


@slow_when(lambda p: p.impl == "triton" and p.shape in [(129, 1030, 40), (70, 70, 2100)])  # interpreted
@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, impl):
    available(impl)
    assert_right(*inputs(shape), impl)


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, BF16), (BF16, BF16, F32), (F32, BF16, F32), (F16, F16, F16), (F32, F32, BF16)]
)
def test_dtypes(dtypes, impl):
    available(impl)
    assert_right(*inputs((90, 40, 72), dtypes), impl)


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
def test_an_fp32_direction_keeps_its_digits_beside_bf16_inputs(impl):
    available(impl)
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-25, 25, (1, 64), generator=generator)
    direction = (torch.randn(1, 64, generator=generator) * sizes).to(DEVICE)
    each = torch.eye(64, dtype=BF16, device=DEVICE), torch.ones(64, 1, dtype=BF16, device=DEVICE)
    torch.testing.assert_close(
        linear_row_dot(*each, direction, impl=impl), direction[0].double(), rtol=torch.finfo(F32).eps, atol=0
    )


def test_fp64_is_exact_and_only_for_the_reference():
    a, b, direction = inputs((40, 30, 20), (F64, F64, F64))
    torch.testing.assert_close(
        linear_row_dot(a, b, direction), linear_row_dot_reference(a, b, direction), rtol=1e-13, atol=1e-13
    )
    for impl in ("cpp", "triton"):
        with pytest.raises(ValueError, match="float64"):
            linear_row_dot(a, b, direction, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
def test_strided_inputs(impl):
    available(impl)
    a, b, direction = inputs((20, 12, 18))
    expected = linear_row_dot(a, b, direction, impl=impl)
    for x, y, g in [
        (a.t().contiguous().t(), b, direction),
        (a, torch.cat([b, b], 1)[:, :18], direction.t().contiguous().t()),
        (a.repeat_interleave(2, 0)[::2], b, torch.cat([direction, direction])[:18]),
    ]:
        torch.testing.assert_close(linear_row_dot(x, y, g, impl=impl), expected, rtol=1e-6, atol=1e-5)
    rows = a[:1].expand(20, -1)
    torch.testing.assert_close(
        linear_row_dot(rows, b, direction, impl=impl), linear_row_dot(rows.clone(), b, direction, impl=impl)
    )


def test_offsets_of_a_tile_do_not_wrap_around(monkeypatch):
    """Rows cut out of a tensor of more dimensions may lie so far apart that those of one tile are 2^31 elements away.
    Shapes alone: what the kernel is given must stay within its 32-bit offsets."""
    pytest.importorskip("triton")
    from gfast.kernels import row_dot

    given = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: given.append((args, options))

    monkeypatch.setattr(row_dot, "row_dot_kernel", Kernel())
    far = torch.empty(300, 2**25, dtype=BF16, device="meta")  # 127 * 2^25 > 2^31
    tall = torch.empty(300, 16, dtype=BF16, device="meta")
    direction = torch.empty(16, 2**25, dtype=BF16, device="meta")[:, :16]
    cut, odd = far[:, :16], far[:, 3:19]
    for a, b, g in [(cut, tall, direction), (tall, cut, direction), (odd, cut, tall[:16])]:
        row_dot.linear_row_dot(a, b, g)
        args, options = given.pop()
        for x, stride, rows in zip(args[0:6:2], args[1:6:2], (300, 300, 16), strict=True):
            most = min(rows, max(options["BM"], options["BN"])) - 1
            assert x.stride(1) == 1 and most * stride + x.shape[1] < 2**31


def test_sums_do_not_lose_accuracy_with_length():
    """A constant row, where an fp32 sum term after term would be off by hundreds of roundings."""
    terms = torch.full((2, 1_000_033), 0.1)
    exact = terms.double().sum(1)
    assert ((row_sums(terms) - exact).abs() <= 8 * torch.finfo(F32).eps * exact).all()


def test_repeats_bit_for_bit():
    a, b, direction = inputs((600, 64, 960))
    found = [linear_row_dot(a, b, direction) for _ in range(8)]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of a CPU")
@pytest.mark.parametrize("shape", [(90, 40, 700), (70, 900, 66), (33, 130, 640)])
def test_any_number_of_threads(shape):
    available("cpp")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert_right(*inputs(shape), "cpp")
    finally:
        torch.set_num_threads(before)


def test_without_onednn_the_library_multiplies():
    available("cpp")
    arguments = inputs((70, 40, 90))
    with torch.backends.mkldnn.flags(enabled=False):
        found = linear_row_dot(*arguments)
        with pytest.raises(ValueError, match="mkldnn is turned off"):
            linear_row_dot(*arguments, impl="cpp")
    assert torch.equal(found, linear_row_dot(*arguments, impl="reference"))


def test_what_is_not_finite_stays_in_its_row():
    """A block that is cut off overlaps the rows before it."""
    a, b, direction = inputs((70, 40, 90))
    b[3, 5], a[68, 2] = torch.nan, torch.inf
    for impl in ("reference", "cpp", "triton"):
        if not why_not("linear_row_dot", impl, DEVICE, F32):
            finite = linear_row_dot(a, b, direction, impl=impl).isfinite()
            assert finite.logical_not().nonzero().flatten().tolist() == [3, 68]


def test_opcheck_and_compile():
    a, b, direction = inputs((6, 4, 5))
    for impl in ("reference", "cpp", "auto"):
        if not why_not("linear_row_dot", impl, DEVICE, F32):
            torch.library.opcheck(torch.ops.gfast.linear_row_dot.default, (a, b, direction, impl))
    compiled = torch.compile(linear_row_dot, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, direction), linear_row_dot(a, b, direction))


def test_is_not_differentiable():
    a, b, direction = inputs((6, 4, 5))
    assert not linear_row_dot(a.requires_grad_(), b, direction).requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(a=torch.ones(3)), "a must be a matrix"),
        (dict(b=torch.ones(4, 2)), "a has 3 rows but b 4"),
        (dict(direction=torch.ones(5, 2)), r"direction must be \[2, 5\]"),
        (dict(a=torch.ones(3, 5, dtype=torch.int64)), "a is torch.int64"),
        (dict(direction=torch.ones(2, 5, device="meta")), "a is on cpu but direction on meta"),
        (dict(impl="cuda"), "impl='cuda' cannot serve linear_row_dot"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(a=torch.ones(3, 5), b=torch.ones(3, 2), direction=torch.ones(2, 5), impl="auto") | change
    impl = arguments.pop("impl")
    with pytest.raises(ValueError, match=message):
        linear_row_dot(*arguments.values(), impl=impl)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(a=torch.ones(3, 5).double()), TypeError, "a must be float32, not Double"),
        (dict(direction=torch.ones(2, 5).double()), TypeError, "direction must be float32, bfloat16 or float16"),
        (dict(b=torch.ones(4, 2)), ValueError, "must have equally many rows"),
        (dict(direction=torch.ones(5, 2)), ValueError, "a row for each column of b"),
        (dict(b=torch.ones(2, 3).t()), ValueError, "contiguous rows"),
    ],
)
def test_the_kernel_refuses(change, error, message):
    available("cpp")
    arguments = dict(a=torch.ones(3, 5), b=torch.ones(3, 2), direction=torch.ones(2, 5)) | change
    with pytest.raises(error, match=message):
        torch.ops.gfast.row_dots(*arguments.values())
