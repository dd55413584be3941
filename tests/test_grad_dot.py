"""grad_dot: every backend against fp64, bit for bit repeatable, and its argument errors."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import gfast
from gfast.geffect.directions import frozen_squares, parameter_squares
from gfast.geffect.live.merging import merged_squares
from gfast.geffect.processes import Processes
from gfast.ops import dispatch
from gfast.ops.grad_dot import dots_of_each, grad_dot, grad_dots

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(3,), (257, 129), (0, 7), (64, 64), (1,), (2, 3, 5), (70001,), ()]
GROUPS = [0, 2, 2, 0, 3, 3, 2, 0]  # group 1 is empty, group 3 is small
NUM_GROUPS = 4


def backends() -> list:
    cuda = torch.cuda.is_available()
    skip = pytest.mark.skipif(not cuda, reason="needs an NVIDIA GPU")
    return [
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("cpp", "cpu"), id="cpp"),
        pytest.param(("cuda", "cuda"), id="cuda", marks=[pytest.mark.cuda, skip]),
    ]


@pytest.fixture(params=backends())
def impl_device(request) -> tuple[str, str]:
    impl, device = request.param
    reason = dispatch.why_not("grad_dot", impl, device)
    if reason:
        pytest.skip(reason)
    return impl, device


def make(dtype: torch.dtype, seed: int, device: str = "cpu", shapes=SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device) for s in shapes]


def truth(xs, directions, groups=GROUPS, num_groups=NUM_GROUPS) -> torch.Tensor:
    """Exactly rounded sums of exact products: math.fsum over fp64 products of fp64 copies."""
    rows = [[[] for _ in range(len(directions) + 1)] for _ in range(num_groups)]
    for t, g in enumerate(groups):
        for c, ys in enumerate([*directions, xs]):
            rows[g][c] += (xs[t].double().cpu() * ys[t].double().cpu()).flatten().tolist()
    return torch.tensor([[math.fsum(cell) for cell in row] for row in rows], dtype=torch.float64)


def scale_of(xs, directions, groups=GROUPS, num_groups=NUM_GROUPS) -> torch.Tensor:
    """sum |x y| per cell: what a rounding error is relative to."""
    return truth([x.abs() for x in xs], [[y.abs() for y in ys] for ys in directions], groups, num_groups)


@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_every_pair_of_dtypes_against_fp64(impl_device, x_dtype, y_dtype):
    impl, device = impl_device
    xs, ys, zs = make(x_dtype, 0, device), make(y_dtype, 1, device), make(y_dtype, 2, device)
    out = grad_dots(xs, [ys, zs], GROUPS, NUM_GROUPS, impl=impl).cpu()
    assert out.dtype == torch.float64 and out.shape == (NUM_GROUPS, 3)
    # A run of n fp32 products, n <= 40, has a relative error of at most n * 2^-24; random signs leave far less.
    double = torch.float64 in (x_dtype, y_dtype)
    tolerance = torch.full((3,), 1e-15 if double else 4 * 2.0**-24)
    tolerance[2] = 1e-15 if x_dtype == torch.float64 else 4 * 2.0**-24
    error = (out - truth(xs, [ys, zs])).abs()
    assert (error <= tolerance * scale_of(xs, [ys, zs])).all()
    assert (out[1] == 0).all()


def test_dtypes_mixed_between_tensors_and_directions(impl_device):
    impl, device = impl_device
    kinds = [DTYPES[i % 4] for i in range(len(SHAPES))]
    xs = [x.to(d) for x, d in zip(make(torch.float64, 0, device), kinds, strict=True)]
    ys = [y.to(d) for y, d in zip(make(torch.float64, 1, device), kinds[1:] + kinds[:1], strict=True)]
    zs = [z.to(d) for z, d in zip(make(torch.float64, 2, device), kinds[2:] + kinds[:2], strict=True)]
    out = grad_dots(xs, [ys, zs], GROUPS, NUM_GROUPS, impl=impl).cpu()
    error = (out - truth(xs, [ys, zs])).abs()
    assert (error <= 4 * 2.0**-24 * scale_of(xs, [ys, zs])).all()


@pytest.mark.parametrize("num_dirs", [0, 1, 2, 3, 5])
def test_any_number_of_directions(impl_device, num_dirs):
    impl, device = impl_device
    xs = make(torch.bfloat16, 0, device)
    directions = [make(torch.float32, d + 1, device) for d in range(num_dirs)]
    out = grad_dots(xs, directions, GROUPS, NUM_GROUPS, impl=impl).cpu()
    assert out.shape == (NUM_GROUPS, num_dirs + 1)
    error = (out - truth(xs, directions)).abs()
    assert (error <= 4 * 2.0**-24 * scale_of(xs, directions)).all()


def test_public_function_is_the_first_column(impl_device):
    impl, device = impl_device
    xs, ys = make(torch.float32, 0, device), make(torch.float32, 1, device)
    out = gfast.grad_dot(xs, ys, GROUPS, NUM_GROUPS, impl=impl)
    assert out.shape == (NUM_GROUPS,) and out.dtype == torch.float64 and out.device.type == device
    assert torch.equal(out, grad_dots(xs, [ys], GROUPS, NUM_GROUPS, impl=impl)[:, 0])


def test_nearly_orthogonal_vectors_keep_their_digits(impl_device):
    """cos 1e-4 over 2^20 elements: the sum is 1e-4 of its terms' norm, where a plain fp32 sum has lost digits."""
    impl, device = impl_device
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1 << 20, generator=generator, dtype=torch.float64)
    y = torch.randn(1 << 20, generator=generator, dtype=torch.float64)
    y -= (x @ y) / (x @ x) * x
    y = y / y.norm() + 1e-4 * x / x.norm()
    x, y = x.float().to(device), y.float().to(device)
    exact = truth([x], [[y]], [0], 1)[0, 0]
    cosine = exact / (x.double().norm() * y.double().norm()).cpu()
    assert 0.9e-4 < cosine < 1.1e-4
    ours = abs(grad_dot([x], [y], [0], 1, impl=impl).cpu()[0] / exact - 1)
    plain = abs((x * y).sum().double().cpu() / exact - 1)
    assert ours <= 2 * plain + 2.0**-20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype):
    if dispatch.why_not("grad_dot", "cpp", "cpu"):
        pytest.skip(dispatch.why_not("grad_dot", "cpp", "cpu"))
    shapes = [(300_001,), (17, 1000), (5,)]
    xs, ys = make(dtype, 0, shapes=shapes), make(dtype, 1, shapes=shapes)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            results.append(grad_dots(xs, [ys], [0, 1, 0], 2, impl="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_same_bits_again(impl_device):
    impl, device = impl_device
    xs, ys = make(torch.bfloat16, 0, device), make(torch.bfloat16, 1, device)
    first = grad_dots(xs, [ys], GROUPS, NUM_GROUPS, impl=impl)
    assert all(torch.equal(first, grad_dots(xs, [ys], GROUPS, NUM_GROUPS, impl=impl)) for _ in range(3))


def test_any_memory_layout(impl_device):
    impl, device = impl_device
    base = torch.randn(40, 60, 3, generator=torch.Generator().manual_seed(0)).to(device)
    other = torch.randn(40, 60, 3, generator=torch.Generator().manual_seed(1)).to(device)
    xs = [
        base.permute(2, 0, 1),  # both dense in the same foreign order
        base.transpose(0, 1),  # only x
        base[::2, 1:, :2],  # strided
        base[0, 0, 0].expand(7, 11),  # stride 0
        base.flatten()[1:],  # not on a 16-byte boundary
        base.flatten()[3:4].expand(0, 1),
    ]
    ys = [
        other.permute(2, 0, 1),
        other.transpose(0, 1).contiguous(),
        other[1::2, :-1, 1:],
        other[:7, :11, 0],
        other.flatten()[:-1],
        other.flatten()[:1].expand(0, 1),
    ]
    groups = list(range(len(xs)))
    out = grad_dots(xs, [ys], groups, len(xs), impl=impl).cpu()
    error = (out - truth(xs, [ys], groups, len(xs))).abs()
    assert (error <= 4 * 2.0**-24 * scale_of(xs, [ys], groups, len(xs))).all()


def test_hundreds_of_tensors(impl_device):
    impl, device = impl_device
    shapes = [(1 + i % 13, 1 + i % 7) for i in range(291)]
    groups = [(i * 5) % 34 for i in range(291)]
    xs, ys = make(torch.bfloat16, 0, device, shapes), make(torch.float32, 1, device, shapes)
    out = grad_dots(xs, [ys], groups, 34, impl=impl).cpu()
    error = (out - truth(xs, [ys], groups, 34)).abs()
    assert (error <= 4 * 2.0**-24 * scale_of(xs, [ys], groups, 34)).all()


def test_nothing_to_add(impl_device):
    impl, device = impl_device
    assert grad_dots([], [[], []], [], 3, impl=impl if device == "cpu" else "auto").tolist() == [[0.0] * 3] * 3
    empty = torch.empty(0, device=device)
    assert grad_dots([empty], [[empty]], [0], 2, impl=impl).tolist() == [[0.0, 0.0]] * 2


def test_infinities_and_nans_stay_in_their_group(impl_device):
    impl, device = impl_device
    xs = [torch.ones(300, device=device) for _ in range(3)]
    ys = [torch.ones(300, device=device) for _ in range(3)]
    ys[0][7], ys[1][9] = math.inf, math.nan
    out = grad_dot(xs, ys, [0, 1, 2], 3, impl=impl).tolist()
    assert out[0] == math.inf and math.isnan(out[1]) and out[2] == 300.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_patterns_are_widened_exactly(impl_device, dtype):
    """Each finite 16-bit value, subnormals too, times a power of two that brings it into range."""
    impl, device = impl_device
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & ((values.abs() > 2.0**-100) | (values == 0) | (values.abs() < 2.0**-20))]
    if dtype == torch.bfloat16:
        values = values[values.abs() < 2.0**60]
    xs = list(values.to(device).split(4096))
    ys = [torch.full_like(x, 2.0, dtype=torch.float32) for x in xs]
    groups = list(range(len(xs)))
    out = grad_dot(xs, ys, groups, len(xs), impl=impl).cpu()
    expected, scale = truth(xs, [ys], groups, len(xs))[:, 0], scale_of(xs, [ys], groups, len(xs))[:, 0]
    assert ((out - expected).abs() <= 4 * 2.0**-24 * scale).all()


def test_needs_no_gradient_and_leaves_no_graph(impl_device):
    impl, device = impl_device
    x = torch.ones(5, device=device, requires_grad=True)
    out = grad_dot([x], [x], [0], 1, impl=impl)
    assert not out.requires_grad and x.grad is None


def test_opcheck():
    if dispatch.why_not("grad_dot", "cpp", "cpu"):
        pytest.skip(dispatch.why_not("grad_dot", "cpp", "cpu"))
    xs, ys = make(torch.float32, 0), make(torch.bfloat16, 1)
    grad_dot(xs, ys, GROUPS, NUM_GROUPS, impl="cpp")  # loads the extension and registers the fake op
    torch.library.opcheck(torch.ops.gfast.grad_dots.default, (xs, ys, GROUPS, NUM_GROUPS, 1))
    torch.library.opcheck(torch.ops.gfast.grad_dots.default, (xs[:3], [], [0, 1, 0], 2, 0))


def test_compiles_in_one_graph(impl_device):
    impl, device = impl_device
    xs, ys = make(torch.float32, 0, device)[:4], make(torch.float32, 1, device)[:4]
    compiled = torch.compile(lambda a, b: grad_dot(a, b, GROUPS[:4], 3, impl=impl) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(xs, ys), grad_dot(xs, ys, GROUPS[:4], 3, impl=impl) * 2)


X = torch.ones(2, 3)
BAD = {
    "lengths": (lambda: grad_dot([X, X], [X], [0, 0], 1), r"direction 0 has 1 tensors but xs has 2"),
    "groups": (lambda: grad_dot([X], [X], [0, 0], 1), r"2 group indices for 1 tensors"),
    "shape": (lambda: grad_dot([X, X], [X, X.T], [0, 0], 1), r"tensor 1 has shape \(3, 2\) but xs\[1\] has \(2, 3\)"),
    "high group": (lambda: grad_dot([X, X], [X, X], [0, 4], 4), r"groups\[1\] = 4 is outside \[0, 4\)"),
    "low group": (lambda: grad_dot([X], [X], [-1], 4), r"groups\[0\] = -1 is outside"),
    "dtype": (lambda: grad_dot([X.int()], [X], [0], 1), r"xs\[0\] has dtype .*; take one of"),
    "sparse": (lambda: grad_dot([X.to_sparse()], [X], [0], 1), r"xs\[0\] is not a strided tensor"),
    "device": (lambda: grad_dot([X], [X.to("meta")], [0], 1), r"is on meta but xs\[0\] is on cpu"),
    "count": (lambda: grad_dot([X], [X], [0], -1), r"num_groups must not be negative"),
    "impl": (lambda: grad_dot([X], [X], [0], 1, impl="fast"), r"'fast'"),
    "unavailable": (lambda: grad_dot([X], [X], [0], 1, impl="cuda"), r"'cuda' cannot serve grad_dot"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("case", sorted(set(BAD) - {"impl", "unavailable"}))
def test_bad_arguments_without_the_extension(case, monkeypatch):
    monkeypatch.setattr(sys.modules["gfast.ops.grad_dot"], "_choose", lambda impl, device: "reference")
    test_bad_arguments(case)


class Elsewhere(torch.Tensor):
    """Says that it lies on a second GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", 1))

    def detach(self):
        return super().detach().as_subclass(Elsewhere)


def test_parameters_on_several_devices_are_dotted_where_they_are(monkeypatch):
    """Of a model spread over GPUs, as by device_map="auto": no call gets tensors of two devices."""

    def of_one_device(xs, directions, groups, num_groups):
        xs, *directions = [list(tensors) for tensors in (xs, *directions)]
        assert len({x.device for tensors in (xs, *directions) for x in tensors}) == 1
        plain = [[x.as_subclass(torch.Tensor) for x in tensors] for tensors in (xs, *directions)]
        return grad_dots(plain[0], plain[1:], groups, num_groups)

    monkeypatch.setattr(sys.modules["gfast.ops.grad_dot"], "grad_dots", of_one_device)
    plain = make(torch.float32, 1), make(torch.float32, 2)
    xs, ys = ([x.as_subclass(Elsewhere) if i % 3 else x for i, x in enumerate(tensors)] for tensors in plain)
    expected = grad_dots(plain[0], [plain[1]], range(len(xs)), len(xs))
    assert torch.equal(dots_of_each(xs, [ys]), expected)

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    squares = [p.detach().double().square().sum().item() for p in model.parameters()]
    model[1].weight = torch.nn.Parameter(model[1].weight.detach().as_subclass(Elsewhere))
    names = [name for name, _ in model.named_parameters()]
    assert parameter_squares(model, names, Processes()).tolist() == pytest.approx(squares)
    assert frozen_squares(model, names, Processes()) == {}
    for p in model.parameters():
        p.grad = p.detach()
    assert merged_squares(list(model.parameters())).tolist() == pytest.approx(squares)


def test_no_python_for_each_tensor():
    """Thousands of parameters cost no more calls of Python functions, or of torch's, than a few."""
    if dispatch.why_not("grad_dot", "cpp", "cpu"):
        pytest.skip(dispatch.why_not("grad_dot", "cpp", "cpu"))

    def calls(count: int) -> int:
        xs, groups, seen = [torch.ones(2)] * count, [0] * count, []
        grad_dots(xs, [xs, xs], groups, 1)  # what is decided once is decided
        sys.setprofile(lambda frame, event, arg: seen.append(event) if event in ("call", "c_call") else None)
        try:
            grad_dots(xs, [xs, xs], groups, 1)
        finally:
            sys.setprofile(None)
        return len(seen)

    assert calls(3) == calls(3000)


def test_the_compiled_op_checks_for_itself():
    if dispatch.extension()[0] is None:
        pytest.skip(dispatch.extension()[1])
    op = torch.ops.gfast.grad_dots
    with pytest.raises(ValueError, match=r"groups\[1\] = 7 is outside \[0, 2\)"):
        op([X, X], [X, X], [0, 7], 2, 1)
    with pytest.raises(ValueError, match=r"got 1 direction tensors for 2 tensors and 1 directions"):
        op([X, X], [X], [0, 0], 2, 1)
    with pytest.raises(ValueError, match=r"direction 1's tensor 0 has shape \(3, 2\) but xs\[0\] has \(2, 3\)"):
        op([X], [X, X.T], [0], 1, 2)
    with pytest.raises(ValueError, match=r"has dtype"):
        op([X.int()], [X], [0], 1, 1)
