"""The raw operators, torch.ops.gfast.*, called by a user: an error in words instead of a crash or a wrong number."""

from __future__ import annotations

import pytest
import torch

from gfast.ops.dispatch import compiled, has_cpu_kernel

if not compiled("empty_cache"):
    pytest.skip("gfast._C is not built, or an older one", allow_module_level=True)

ops = torch.ops.gfast
REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)
LARGE = 2**63 - 1
brgemm = pytest.mark.skipif(not has_cpu_kernel("mixed_mm"), reason="this torch has no brgemm")


def rows(dtype=torch.float32):
    return torch.randn(3, 5).to(dtype), torch.tensor([1, 4, -100])


@brgemm
def test_a_vocabulary_of_nothing_and_any_number_of_parts():
    out = torch.full((3, 4), 7.0)
    ops.head_grad_hidden(torch.zeros(3, 0), torch.zeros(0, 4), 1, out)
    assert (out == 0).all()
    grad, weight = torch.randn(3, 600), torch.randn(600, 4)
    few, many = torch.empty(2, 3, 4)
    ops.head_grad_hidden(grad, weight, 3, few)
    ops.head_grad_hidden(grad, weight, LARGE, many)
    assert torch.equal(few, many)
    for most in (0, -1, -LARGE - 1):
        with pytest.raises(ValueError, match="most must be 1 or more"):
            ops.head_grad_hidden(grad, weight, most, few)


def test_sums_and_products_of_sizes_do_not_wrap():
    x = torch.zeros(3, 5)
    for counts in ([LARGE, LARGE, 5], [LARGE, 1], [LARGE, -LARGE, 3]):
        with pytest.raises(ValueError, match="more rows than 64 bits can count|cannot have -|have \\d+ rows of 3"):
            ops.pair_sums(x, x, counts, [5])
    for count, dirs in ((4, 2**62), (2, LARGE), (1, 1)):
        with pytest.raises(ValueError, match="got 0 direction tensors"):
            ops.grad_dots([x] * count, [], [0] * count, 1, dirs)
    for make in (ops.fresh, ops.unpooled):
        for size in ([2**40, 2**40], [2**62, 4], [-1], [LARGE]):
            with pytest.raises((ValueError, RuntimeError), match="more than any memory|negative|no memory"):
                make(size, torch.float32)
        with pytest.raises(TypeError, match="floating point"):
            make([3], torch.complex64)


def test_empty_tensors_of_any_width():
    none, wide = torch.empty(0, dtype=torch.int64), torch.empty(0, LARGE)
    assert ops.logp_rows(wide, none, 1.0, 0.0)[0].numel() == 0
    assert ops.used_rows(wide).numel() == 0
    assert ops.pair_sums(wide, wide, [], [LARGE]).shape == (0, 1)
    ops.fold_rows(wide, none, 0, 1.0, 0.0, torch.empty(3, 0, dtype=torch.float64))


def memory_for(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors again, all at the start of one memory."""
    room = torch.zeros(max(x.nbytes for x in tensors) + 8, dtype=torch.uint8)
    return [room[: x.nbytes].view(x.dtype).view(x.shape) for x in tensors]


def overlaps() -> dict:
    """Calls whose written argument lies over another one, by the name of that."""
    logits, labels = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    logp, stats, one = torch.zeros(3), torch.zeros(3, 2), torch.ones(())
    totals, state = torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    numbers = (1.0, 1.0, 0.0, 1.0)
    calls = {}

    def add(op: str, place: int, args: list, out: int) -> None:
        args = list(args)
        args[place], args[out] = memory_for(args[place], args[out])
        calls[f"{op} {place}"] = (op, args)

    for place in (1, 2, 3, 4):
        add("logp_rows_grad", place, [logits, labels, logp, stats, logp.clone(), 1.0, 0.0, torch.zeros(3, 5)], 7)
    for place in (1, 2, 7):
        add("weighted_rows", place, [logits, labels, logp, *numbers, logp.clone(), 1.0, 0.0, torch.zeros(3, 5)], 10)
    told = [logits, labels, torch.zeros(3, 6), stats.new_zeros(3, 3), labels[:, None].clone(), torch.zeros(3, 1)]
    for place in (1, 2, 3, 4, 5):
        add("stat_rows_grad", place, [*told, True, 1.0, 0.0, torch.zeros(3, 5)], 9)
    kl = (1.0, 0.0, 1.0, 0.0, torch.zeros(3, 5))
    for place in (1, 2):
        add("kl_rows", place, [logits, logits.clone(), labels, one, *kl], 8)
    for place in (1, 2, 3):
        add("kl_rows_grad", place, [logits, logits.clone(), labels, totals, one, *kl], 9)
    for place in (1, 2, 3):
        add("soft_rows", place, [logits, logits.clone(), labels, torch.zeros(3), one, 1, *kl], 10)
    for place in (0, 1):
        add("fold_rows", place, [logits, labels, 0, 1.0, 0.0, state], 5)
    add("accumulate", 1, [torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.bfloat16)], 0)
    if has_cpu_kernel("mixed_mm"):
        square = [torch.zeros(4, 4) for _ in range(4)]
        for place in (0, 1, 2):
            add("mixed_mm", place, [square[0], square[1], torch.zeros(4), square[2]], 3)
        for place in (0, 1):
            add("head_grad_hidden", place, [square[0], square[1], 1, square[2]], 3)
            add("head_grad_weight", place, [square[0], square[1], square[2].bfloat16()], 2)
        for place in range(4):
            add("pair_dots", place, [*square, [4], [4], False, torch.zeros(4, 64), False], 7)
    return calls


OVERLAPS = overlaps()


@pytest.mark.parametrize("name", OVERLAPS)
def test_no_output_lies_over_an_input(name):
    op, args = OVERLAPS[name]
    with pytest.raises(ValueError, match="(out|state|total|inputs) shares memory with \\w+"):
        getattr(ops, op)(*args)


def test_the_logits_themselves_may_be_overwritten():
    logits, labels = rows()
    logp, stats = ops.logp_rows(logits, labels, 1.0, 0.0)
    apart = torch.empty_like(logits)
    ops.logp_rows_grad(logits, labels, logp, stats, torch.ones(3), 1.0, 0.0, apart)
    ops.logp_rows_grad(logits, labels, logp, stats, torch.ones(3), 1.0, 0.0, logits)
    assert torch.equal(apart, logits)


def test_an_op_without_a_derivative_says_so():
    logits, labels = rows()
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="logp_rows has no derivative but logits requires grad.*public function"):
        ops.logp_rows(logits, labels, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="grad_dots has no derivative but xs requires grad"):
        ops.grad_dots([logits], [], [0], 1, 0)
    with torch.no_grad():
        ops.logp_rows(logits, labels, 1.0, 0.0)
    assert ops.used_rows(logits).all()


def test_what_an_op_writes_counts_as_modified():
    x = torch.ones(4, requires_grad=True)
    y = x * 2
    z = y * y  # keeps y
    ops.scale_(y.detach(), torch.tensor(3.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_dense_memory():
    logits, labels = rows()
    gone = logits.clone()
    gone.untyped_storage().resize_(0)
    for what in (
        None,
        gone,
        logits.to("meta"),
        logits.to_sparse(),
        logits + 1j,
        logits.double(),
        logits.to(torch.float8_e4m3fn),
        logits.to_mkldnn(),
        torch.quantize_per_tensor(logits, 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([logits, logits]),
    ):
        with pytest.raises(REFUSALS):
            ops.logp_rows(what, labels, 1.0, 0.0)
    for place in range(2):
        args = [[logits], [logits]]
        args[place] = [gone]
        with pytest.raises(ValueError, match="lost its memory"):
            ops.grad_dots(*args, [0], 1, 1)
    with pytest.raises(ValueError, match="labels .* lost its memory"):
        away = labels.clone()
        away.untyped_storage().resize_(8)
        ops.logp_rows(logits, away, 1.0, 0.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, 1e300, 1e-60])
def test_numbers_that_fp32_has_not(number):
    logits, labels = rows()
    for scale, softcap in ((number, 0.0), (1.0, number)):
        with pytest.raises(ValueError, match="scale|softcap"):
            ops.logp_rows(logits, labels, scale, softcap)


def test_labels_of_a_tile_do_not_overflow():
    logits = torch.randn(3, 5)
    state = torch.zeros(3, 3, dtype=torch.float64)
    state[0] = -torch.inf
    labels = torch.tensor([-LARGE - 1, LARGE, 7])
    ops.fold_rows(logits, labels, 5, 1.0, 0.0, state)
    assert state[2].tolist() == [0.0, 0.0, logits[2, 2].item()]
    with pytest.raises(ValueError, match="first must be a vocabulary entry"):
        ops.fold_rows(logits, labels, -1, 1.0, 0.0, state)


@brgemm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_expanded_factors_that_are_packed(dtype):
    rows, weight = torch.randn(6, 40), torch.randn(1, 40).to(dtype).expand(70, 40)
    found, expected = torch.empty(2, 6, 70)
    ops.mixed_mm(rows, weight, None, found)
    ops.mixed_mm(rows, weight.contiguous(), None, expected)
    assert torch.equal(found, expected)
    grad = torch.randn(6, 70)
    found, expected = torch.empty(2, 6, 40)
    ops.head_grad_hidden(grad, weight, 1, found)
    ops.head_grad_hidden(grad, weight.contiguous(), 1, expected)
    assert torch.equal(found, expected)
    assert torch.equal(ops.row_dots(rows, grad, weight), ops.row_dots(rows, grad, weight.contiguous()))
