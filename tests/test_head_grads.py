"""dH and dW of a 16-bit head, multiplied in fp32: exact as fp32 is, at every edge of their blocks."""

import pytest
import torch

from gfast.ops.dispatch import has_cpu_kernel

if not has_cpu_kernel("head_grad_weight"):
    pytest.skip("gfast._C is not built, or with a torch that has no brgemm", allow_module_level=True)

grad_hidden, grad_weight = torch.ops.gfast.head_grad_hidden, torch.ops.gfast.head_grad_weight
EPS = torch.finfo(torch.float32).eps
SUMS = 32
SHAPES = (  # rows, vocabulary, width: around blocks of 8, 64, 1024 rows, of 64, 256 entries, of 64, 512 columns
    (1, 1, 1),
    (2, 3, 5),
    (7, 70, 64),
    (8, 256, 65),
    (9, 257, 31),
    (63, 300, 97),
    (64, 64, 128),
    (65, 1000, 63),
    (130, 600, 640),
    (40, 2600, 1100),
    (1030, 130, 70),
    (2050, 65, 33),
)


def factors(rows, vocab, width, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    grad, hidden, weight = (torch.randn(s, generator=g) for s in ((rows, vocab), (rows, width), (vocab, width)))
    return grad, hidden, weight.to(dtype)


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


def in_order(left, right):
    """left [m, k] @ right [k, n] in fp32, one k after the other."""
    out = torch.zeros(left.shape[0], right.shape[1])
    for k in range(left.shape[1]):
        out += left[:, k : k + 1] * right[k].float()
    return out


@pytest.mark.parametrize("sums", [1, 3, SUMS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, vocab, width", SHAPES)
def test_dh_is_fp32_exact(rows, vocab, width, dtype, sums):
    grad, _, weight = factors(rows, vocab, width, dtype)
    out = torch.full((rows + 2, width), 7.0)
    grad_hidden(grad, weight, sums, out[1:-1])
    truth = grad.double() @ weight.double()
    assert relative(out[1:-1], truth) <= relative(in_order(grad, weight), truth) + EPS
    assert (out[[0, -1]] == 7).all()


@pytest.mark.parametrize("rows, vocab, width", SHAPES)
def test_dw_is_rounded_once(rows, vocab, width):
    grad, hidden, _ = factors(rows, vocab, width)
    around = torch.full((vocab + 2, width), 7.0, dtype=torch.bfloat16)
    out = around[1:-1]  # at any alignment
    grad_weight(grad, hidden, out)
    exact = grad.double().T @ hidden.double()
    slack = (grad.double().T.abs() @ hidden.double().abs()) * (rows + 1) * EPS  # of sums in fp32
    half_ulp = exact.abs() * 2.0**-8 * (1 + EPS)  # of bf16, whose numbers have 8 bits
    assert ((out.double() - exact).abs() <= half_ulp + slack).all()
    assert relative(out, exact) <= relative(in_order(grad.T, hidden).bfloat16(), exact) * (1 + 1e-3) + EPS
    assert (around[[0, -1]] == 7).all()


def test_gradients_of_logits_that_are_part_of_a_buffer():
    grad, hidden, weight = factors(30, 700, 80)
    whole, part = torch.empty(30, 80), torch.empty(30, 80)
    wide = torch.full((40, 900), torch.nan)
    wide[3:33, 100:800] = grad
    grad_hidden(grad, weight, SUMS, whole)
    grad_hidden(wide[3:33, 100:800], weight, SUMS, part)
    assert torch.equal(whole, part)
    first, second = torch.empty(2, 700, 80, dtype=torch.bfloat16)
    grad_weight(grad, hidden, first)
    grad_weight(wide[3:33, 100:800], hidden, second)
    assert torch.equal(first, second)


def test_the_number_of_threads_changes_no_bit():
    grad, hidden, weight = factors(100, 5000, 600)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            dh, dw = torch.empty(100, 600), torch.empty(5000, 600, dtype=torch.bfloat16)
            grad_hidden(grad, weight, SUMS, dh)
            grad_weight(grad, hidden, dw)
            found.append((dh, dw))
    finally:
        torch.set_num_threads(before)
    for dh, dw in found[1:]:
        assert torch.equal(dh, found[0][0]) and torch.equal(dw, found[0][1])


def test_no_number_in_a_row_stays_in_it():
    grad, hidden, weight = factors(12, 300, 70)
    grad[3, 200], weight[7, 5], hidden[4, 9] = torch.nan, torch.inf, torch.nan
    dh, dw = torch.empty(12, 70), torch.empty(300, 70, dtype=torch.bfloat16)
    grad_hidden(grad, weight, SUMS, dh)
    assert dh[3].isnan().all() and not dh[:, 5].isfinite().any()
    rest = [i for i in range(12) if i != 3]
    assert dh[rest][:, [d for d in range(70) if d != 5]].isfinite().all()
    grad_weight(grad, hidden, dw)
    assert dw[200].isnan().all() and dw[:, 9].isnan().all()
    entries = [v for v in range(300) if v != 200]
    assert dw[entries][:, [d for d in range(70) if d != 9]].isfinite().all()


def test_numbers_beyond_bf16_round_to_infinity():
    dw = torch.empty(1, 40, dtype=torch.bfloat16)
    grad_weight(torch.tensor([[3.4e38]]), torch.tensor([[1.0, -1.0, 1e-30, 0.0] * 10]), dw)
    assert torch.equal(dw[0, :4].float(), torch.tensor([3.4e38, -3.4e38, 3.4e8, 0.0]).bfloat16().float())


def test_nothing_to_multiply():
    dh, dw = torch.full((0, 5), 3.0), torch.full((4, 5), 3.0, dtype=torch.bfloat16)
    grad_hidden(torch.empty(0, 4), torch.empty(4, 5).bfloat16(), SUMS, dh)
    grad_weight(torch.empty(0, 4), torch.empty(0, 5), dw)
    assert (dw == 0).all()


def test_they_refuse_what_does_not_fit():
    grad, hidden, weight = factors(3, 4, 5)
    dh, dw = torch.zeros(3, 5), torch.zeros(4, 5).bfloat16()
    for message, op, arguments in (
        ("grad_logits must be float32", grad_hidden, (grad.bfloat16(), weight, SUMS, dh)),
        ("weight must be float32, bfloat16 or float16", grad_hidden, (grad, weight.double(), SUMS, dh)),
        ("out must be Float", grad_hidden, (grad, weight, SUMS, dh.bfloat16())),
        ("do not make a contiguous", grad_hidden, (grad, weight[:3], SUMS, dh)),
        ("do not make a contiguous", grad_hidden, (grad, weight, SUMS, torch.zeros(5, 3).t())),
        ("out shares memory with grad_logits", grad_hidden, (torch.zeros(3, 5), torch.zeros(5, 5), SUMS, None)),
        ("hidden must be float32", grad_weight, (grad, hidden.bfloat16(), dw)),
        ("out must be BFloat16", grad_weight, (grad, hidden, dw.float())),
        ("do not make a contiguous", grad_weight, (grad[:2], hidden, dw)),
    ):
        if arguments[-1] is None:
            arguments = (*arguments[:-1], arguments[0])
        with pytest.raises((ValueError, TypeError), match=message):
            op(*arguments)
