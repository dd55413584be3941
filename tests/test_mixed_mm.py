"""The product of fp32 rows and a 16-bit matrix on a CPU: exact as fp32 is, at every edge of its blocks."""

import pytest
import torch

from gfast.ops.dispatch import has_cpu_kernel

if not has_cpu_kernel("mixed_mm"):
    pytest.skip("gfast._C is not built, or with a torch that has no brgemm", allow_module_level=True)

mixed_mm = torch.ops.gfast.mixed_mm
EPS = torch.finfo(torch.float32).eps
KINDS = {
    "rows x bf16": (torch.float32, torch.bfloat16),
    "rows x fp16": (torch.float32, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
SHAPES = (  # rows, columns, depth: around blocks of 64 rows, panels of 64 columns, depths of 1024
    (1, 1, 1),
    (5, 7, 3),
    (64, 64, 16),
    (65, 65, 17),
    (6, 129, 1025),
    (70, 300, 1030),
    (300, 70, 2049),
    (97, 48, 1024),
    (130, 1, 5),
    (1, 130, 31),
)


def factors(rows, columns, depth, kinds, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, depth, generator=g).to(kind) for n, kind in zip((rows, columns), kinds, strict=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows, columns, depth", SHAPES)
def test_the_product_is_fp32_exact(rows, columns, depth, kinds, bias):
    a, b = factors(rows, columns, depth, kinds)
    added = torch.randn(columns) if bias else None
    around = torch.full((rows + 2, columns + 5), 7.0)  # out is a part of something larger
    out = around[1:-1, 2 : 2 + columns]
    mixed_mm(a, b, added, out)
    truth = a.double() @ b.double().T + (0 if added is None else added.double())
    plain = torch.zeros(rows, columns) if added is None else added.expand(rows, columns).clone()
    for k in range(depth):  # in fp32, in order
        plain += a[:, k : k + 1].float() * b[:, k].float()
    error, least = (float((x.double() - truth).norm() / truth.norm()) for x in (out, plain))
    assert error <= least + EPS
    around[1:-1, 2 : 2 + columns] = 7
    assert (around == 7).all()


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_matrices_that_are_parts_of_others(kinds):
    a, b = factors(20, 70, 90, kinds)
    out, whole = torch.empty(20, 40), torch.empty(20, 40)
    mixed_mm(a[:, 10:60], b[5:45, 10:60], None, out)
    mixed_mm(a[:, 10:60].contiguous(), b[5:45, 10:60].contiguous(), None, whole)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("rows, columns", [(70, 1000), (1000, 70)])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_number_of_threads_changes_no_bit(rows, columns, kinds):
    a, b = factors(rows, columns, 600, kinds)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.empty(rows, columns))
            mixed_mm(a, b, None, found[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_no_number_in_the_factors_stays_no_number():
    a, b = factors(3, 40, 20, (torch.float32, torch.bfloat16))
    a[1, 4], b[33, 2] = torch.nan, torch.inf
    out = torch.empty(3, 40)
    mixed_mm(a, b, None, out)
    assert out[1].isnan().all() and not out[[0, 2], 33].isfinite().any()
    assert out[[0, 2]][:, [j for j in range(40) if j != 33]].isfinite().all()


def test_nothing_to_multiply():
    for rows, columns in ((0, 5), (5, 0)):
        mixed_mm(torch.empty(rows, 4), torch.empty(columns, 4).bfloat16(), None, torch.empty(rows, columns))
    for bias, expected in ((None, torch.zeros(2, 3)), (torch.arange(3.0), torch.arange(3.0).expand(2, 3))):
        out = torch.full((2, 3), 5.0)
        mixed_mm(torch.empty(2, 0), torch.empty(3, 0).bfloat16(), bias, out)
        assert torch.equal(out, expected)


def test_a_single_row_may_have_any_stride():
    a, b = torch.randn(5, 1).t(), torch.randn(4, 5).bfloat16()  # [1, 5] with strides (1, 1)
    out = torch.empty(4, 1).t()
    mixed_mm(a, b, None, out)
    torch.testing.assert_close(out, a @ b.float().T)


def test_it_refuses_what_does_not_fit():
    a, b, out = torch.zeros(2, 4), torch.zeros(3, 4).bfloat16(), torch.zeros(2, 3)
    for message, arguments in {
        "a must be float32, bfloat16 or float16": (a.double(), b, None, out),
        "b must be a matrix with contiguous rows": (a, torch.zeros(4, 3).bfloat16().T, None, out),
        "out float32 \\[M, N\\], not Float \\[3, 2\\]": (a, b, None, torch.zeros(3, 2)),
        "out float32 \\[M, N\\], not BFloat16": (a, b, None, out.bfloat16()),
        "a BFloat16 \\[2, 4\\]": (a.bfloat16(), b, None, out),
        "and b \\[3, 5\\]": (a, torch.zeros(3, 5), None, out),
        "rows of a overlap": (torch.zeros(1, 4).expand(2, 4), b, None, out),
        "rows of out overlap": (a, b, None, torch.zeros(1, 3).expand(2, 3)),
        "out shares memory with a": (a, b[:2], None, a[:, :2]),
        "bias must be contiguous float32 of shape \\[3\\]": (a, b, torch.zeros(2), out),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            mixed_mm(*arguments)
