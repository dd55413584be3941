"""The product of fp32 rows and a 16-bit matrix on a CPU: exact as fp32 is, at every edge of its blocks."""

import pytest
import torch

from gfast.ops.backend import has_cpu_kernel

if not has_cpu_kernel("mixed_mm"):
    pytest.skip("gfast._C is not built, or with a torch that has no brgemm", allow_module_level=True)

mixed_mm = torch.ops.gfast.mixed_mm
EPS = torch.finfo(torch.float32).eps
KINDS = {
    "rows x bf16": (torch.float32, torch.bfloat16),
    "rows x fp16": (torch.float32, torch.float16),
    "bf16 x rows": (torch.bfloat16, torch.float32),
    "fp16 x rows": (torch.float16, torch.float32),
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


@pytest.mark.parametrize("bias", [None, "columns", "rows"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows, columns, depth", SHAPES)
def test_the_product_is_fp32_exact(rows, columns, depth, kinds, bias):
    a, b = factors(rows, columns, depth, kinds)
    shape = {None: None, "columns": (columns,), "rows": (rows, 1)}[bias]
    added = None if shape is None else torch.randn(shape)
    around = torch.full((rows + 2, columns + 5), 7.0)  # out is a part of something larger
    out = around[1:-1, 2 : 2 + columns]
    mixed_mm(a, b, added, out)
    truth = a.double() @ b.double().T + (0 if added is None else added.double())
    bound = (depth + 1) * EPS * (a.double().abs() @ b.double().abs().T + (0 if added is None else added.abs()))
    assert ((out.double() - truth).abs() <= bound).all()
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


def test_it_refuses_what_does_not_fit():
    a, b, out = torch.zeros(2, 4), torch.zeros(3, 4).bfloat16(), torch.zeros(2, 3)
    for message, arguments in {
        "a must be float32, bfloat16 or float16": (a.double(), b, None, out),
        "b must be a matrix with contiguous rows": (a, torch.zeros(4, 3).bfloat16().T, None, out),
        "need a float32 out \\[2, 3\\], not Float \\[3, 2\\]": (a, b, None, torch.zeros(3, 2)),
        "need a float32 out \\[2, 3\\], not BFloat16": (a, b, None, out.bfloat16()),
        "a \\[2, 4\\] and b \\[3, 5\\]": (a, torch.zeros(3, 5), None, out),
        "bias must be contiguous float32 of shape \\[3\\] or \\[2, 1\\]": (a, b, torch.zeros(2), out),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            mixed_mm(*arguments)
