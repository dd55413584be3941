"""The forward over a head in tiles: accuracy of the fold, and a path that never waits."""

import pytest
import torch
from helpers.linear_head import Inside, rows_problem
from helpers.losses import DEVICES, assert_law, need, problem, run
from helpers.marks import slow_when
from torch._subclasses.fake_tensor import FakeTensorMode

import gfast
from gfast.objectives import DPO, NLL, NPO, TNPO, WGA, SatImp, SimNPO
from gfast.ops import checks, head
from gfast.ops.linear_token_logp import linear_token_logp_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [(1.0, None), (0.5, None), (1.0, 6.0), (0.7, 3.0)], ids=str)
@pytest.mark.parametrize("n, V", [(1, 1), (7, 33), (33, 700), (64, 513), (130, 1111)])
def test_the_fold_by_the_law(n, V, form, dtype, monkeypatch):
    need("linear_token_logp", "cpp", "cpu", dtype)
    monkeypatch.setattr(head, "_FOLD_BYTES", 1)  # tiles of 512 entries: labels fall into first, last and partial ones
    hidden, weight, bias, labels = rows_problem(n, 24, V, dtype)
    labels[: n // 4] = -100
    labels[-1] = V - 1
    options = dict(bias=bias, logit_scale=form[0], softcap=form[1])
    wide = [x.double() for x in (hidden, weight, bias)]
    truth = linear_token_logp_reference(*wide[:2], labels, wide[2], form[0], form[1])
    plain = linear_token_logp_reference(hidden, weight, labels, bias, form[0], form[1])
    ours = gfast.linear_token_logp(hidden, weight, labels, impl="cpp", **options)
    assert ours.dtype == torch.float32 and (ours[labels == -100] == 0).all()
    assert_law([ours], [plain], [truth], dtype)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_log_probs_near_zero_keep_their_digits(impl):
    need("linear_token_logp", impl, "cpu", torch.float32)
    V, labels = 1500, torch.tensor([3, 700, 1499])
    for gap in (12.0, 20.0, 30.0):
        weight = torch.zeros(V, 1)
        hidden = torch.ones(3, 1)
        bias = torch.zeros(V)
        logits = []
        for row, y in enumerate(labels):
            bias.zero_()
            bias[y] = gap
            logits.append(gfast.linear_token_logp(hidden[row], weight, y, bias=bias, impl=impl))
        exact = -torch.log1p(torch.tensor((V - 1) * 2.718281828459045**-gap, dtype=torch.float64))
        torch.testing.assert_close(torch.stack(logits).double(), exact.expand(3), rtol=2e-6, atol=0)


def test_the_fold_takes_masked_logits():
    need("linear_token_logp", "cpp", "cpu", torch.float32)
    hidden, weight, bias, labels = rows_problem(5, 8, 1300, torch.float32)
    bias[:1200] = -torch.inf  # more than two tiles with nothing in them
    labels[:] = torch.tensor([1200, 1299, 1250, 1201, 1280])
    ours = gfast.linear_token_logp(hidden, weight, labels, bias=bias, impl="cpp")
    torch.testing.assert_close(ours, linear_token_logp_reference(hidden, weight, labels, bias))
    assert gfast.linear_token_logp(hidden, weight, labels - 1200, bias=bias, impl="cpp")[0] == -torch.inf
    bias[1270] = torch.nan
    assert gfast.linear_token_logp(hidden, weight, labels, bias=bias, impl="cpp").isnan().all()


@slow_when(lambda p: p.V == 700)
@pytest.mark.parametrize("form", [(1.0, None), (0.5, 3.0)], ids=str)
@pytest.mark.parametrize("n, D, V", [(1, 16, 1), (7, 24, 33), (40, 70, 700)])
def test_the_fold_by_triton_by_the_law(n, D, V, form, monkeypatch):
    need("linear_token_logp", "triton", DEVICES[-1], torch.float16)
    monkeypatch.setattr(head, "_FOLD_BYTES", 1)  # tiles of 512 entries, and rows in two parts
    monkeypatch.setattr(head, "_GPU_FOLD_BYTES", 1)
    monkeypatch.setattr(head, "_FOLD_ROWS", 24)
    monkeypatch.setattr(head, "_GPU_FOLD_ROWS", 24)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden, weight, bias, labels = (x.to(DEVICES[-1]) for x in rows_problem(n, D, V, dtype))
        labels[: n // 4] = -100
        labels[-1] = V - 1
        wide = [x.double() for x in (hidden, weight, bias)]
        for b, wide_b in ((None, None), (bias, wide[2])):
            truth = linear_token_logp_reference(*wide[:2], labels, wide_b, *form)
            plain = linear_token_logp_reference(hidden, weight, labels, b, *form)
            options = dict(bias=b, logit_scale=form[0], softcap=form[1], impl="triton")
            ours = gfast.linear_token_logp(hidden, weight, labels, **options)
            assert ours.dtype == torch.float32 and (ours[labels == -100] == 0).all()
            assert_law([ours], [plain], [truth], dtype)
            assert torch.equal(ours, gfast.linear_token_logp(hidden, weight, labels, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_fold_in_triton(dtype):
    """Labels at the borders of tiles, a label in none, a masked tile, a masked label, a NaN, tiles of odd widths."""
    need("linear_token_logp", "triton", DEVICES[-1], dtype)
    from gfast.kernels.head import fold_rows

    bounds = [0, 128, 255, 400, 700]
    logits = 5 * torch.randn(10, 700, generator=torch.Generator().manual_seed(0)).to(DEVICES[-1], dtype)
    labels = torch.tensor([0, 127, 128, 254, 255, 699, 400, 300, -100, 2**40], device=DEVICES[-1])
    logits[:, 128:255] = -torch.inf
    logits[6, 650] = torch.nan
    others, rows = logits.double(), torch.arange(8)
    target = others[rows, labels[:8]]
    others[rows, labels[:8]] = -torch.inf
    state = torch.tensor([[-torch.inf], [0.0], [-torch.inf]], dtype=torch.float64, device=DEVICES[-1]).repeat(1, 10)
    memory = torch.full((10, 301), 99.0, dtype=dtype, device=DEVICES[-1])
    for first, stop in zip(bounds, bounds[1:], strict=False):
        tile = memory[:, : stop - first].copy_(logits[:, first:stop])  # rows apart: what lies between is not theirs
        fold_rows(tile, labels, first, 1.0, 0.0, state)
    expected = others.logsumexp(1)
    torch.testing.assert_close(state[0] + state[1].log(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert expected.isnan().sum() == 1
    assert torch.equal(state[2, :8], target) and (state[2, 8:] == -torch.inf).all()
    with pytest.raises(ValueError, match="must be contiguous fp64"):
        fold_rows(logits, labels, 0, 1.0, 0.0, state.float())


def test_the_fold_does_not_depend_on_threads():
    need("linear_token_logp", "cpp", "cpu", torch.float32)
    logits = torch.randn(200, 900, generator=torch.Generator().manual_seed(0))
    labels, states, before = torch.arange(200) * 4, [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            state = torch.tensor([[-torch.inf], [0.0], [-torch.inf]], dtype=torch.float64).repeat(1, 200)
            torch.ops.gfast.fold_rows(logits, labels, 0, 1.0, 0.0, state)
            states.append(state)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*states)


@pytest.mark.parametrize("objective", [WGA(), TNPO(), NPO(0.3), SimNPO(), DPO(0.3), SatImp(2.0, 1.0)], ids=str)
@pytest.mark.parametrize("chunk", [3, 14, 1000])
def test_without_looking_at_labels_the_result_is_the_same(objective, chunk, monkeypatch):
    """The path of a recording CUDA graph: all rows stay, boundaries come from shapes, nothing is read back."""
    hidden, weight, bias, labels, ref = problem()
    options = dict(ref_logp=ref, chunk_rows=chunk)
    packed = torch.arange(4)[:, None].expand(4, 7)
    layouts = [{}] if isinstance(objective, DPO) else [{}, dict(sequence_id=packed)]

    def loss(extra):
        return lambda h, w, b: gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, **options, **extra)

    def logp(h, w, b):
        return gfast.linear_token_logp(h, w, labels, bias=b, chunk_rows=chunk)

    def kl(h, w, b):
        return gfast.linear_token_kl(h, w, hidden + 1, weight, labels, bias=b, chunk_rows=chunk)

    steps = [*(loss(extra) for extra in layouts), logp, kl]
    expected = [run(step, (hidden, weight, bias)) for step in steps]
    hidden = hidden.clone()
    hidden[labels == -100] = torch.nan  # padding may hold anything
    monkeypatch.setattr(checks, "may_wait", lambda device: False)
    for step, truth in zip(steps, expected, strict=True):
        torch.testing.assert_close(run(step, (hidden, weight, bias)), truth, rtol=1e-10, atol=1e-12)


@pytest.fixture
def recording(monkeypatch):
    """As on a GPU while a CUDA graph records."""
    monkeypatch.setattr(checks, "may_wait", lambda device: False)
    monkeypatch.setattr(checks, "reads_are_free", lambda device: False)


@pytest.mark.parametrize("objective", [WGA(), NPO(0.3), DPO(0.3), NLL()], ids=str)
def test_nothing_waits_while_a_graph_records(objective, recording):
    """On fake tensors whatever needs a value or a data-dependent shape raises; the bodies of the ops run."""
    with FakeTensorMode(), Inside():
        hidden = torch.empty(4, 7, 16, requires_grad=True)
        weight = torch.empty(50, 16, requires_grad=True)
        labels, ref = torch.empty(4, 7, dtype=torch.int64), torch.empty(4, 7)
        options = dict(impl="reference", chunk_rows=9)
        loss = gfast.linear_unlearn_loss(hidden, weight, labels, objective, ref_logp=ref, normalizer=3, **options).loss
        loss = loss + gfast.linear_token_logp(hidden, weight, labels, **options).sum()
        loss = loss + gfast.linear_token_kl(hidden, weight, hidden, weight, labels, **options)
        loss.backward()
        assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_a_16_bit_head_without_16_bit_products_on_fake_tensors(recording, monkeypatch):
    monkeypatch.setattr(head, "_native", lambda dtype: False)
    with FakeTensorMode(), Inside():
        hidden = torch.empty(4, 7, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(50, 16, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(4, 7, dtype=torch.int64)
        options = dict(impl="reference", chunk_rows=9, normalizer=3)
        gfast.linear_unlearn_loss(hidden, weight, labels, WGA(), **options).loss.backward()
        assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_fake_tensors_notice_waiting(monkeypatch):
    """The test above can fail: outside a recording rows are compacted and labels looked at."""
    labels = torch.empty(4, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True), Inside():
        hidden, weight = torch.empty(4, 16), torch.empty(50, 16)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            gfast.linear_token_logp(hidden, weight, labels, impl="reference")
        monkeypatch.setattr(checks, "reads_are_free", lambda device: False)
        with pytest.raises(Exception, match="nonzero"):
            gfast.linear_token_logp(hidden, weight, labels, impl="reference")
