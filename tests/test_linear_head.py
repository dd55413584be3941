"""The head a chunk or a tile at a time: accuracy of the fold, what memory exists, and a path that never waits."""

import contextlib

import pytest
import torch
import torch.utils.checkpoint
from test_ops_losses import DEVICES, assert_law, assert_law_of_draws, need, problem, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gfast
from gfast.objectives import DPO, NLL, NPO, TNPO, WGA, SatImp, SimNPO
from gfast.ops import checks as common
from gfast.ops import head, linear_inputs, linear_token_kl, linear_token_logp, linear_unlearn_loss
from gfast.ops.linear_token_logp import linear_token_logp_reference
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference

BODIES = {
    torch.ops.gfast.linear_token_logp.default: linear_token_logp._linear_token_logp,
    torch.ops.gfast.linear_token_logp_backward.default: linear_token_logp._linear_token_logp_backward,
    torch.ops.gfast.linear_unlearn.default: linear_unlearn_loss._linear_unlearn,
    torch.ops.gfast.linear_token_kl.default: linear_token_kl._linear_token_kl,
}


class Inside(TorchDispatchMode):
    """Runs the bodies of gfast's own ops under this mode's eyes, so that what they call is seen."""

    def __init__(self, watch=lambda func, out: None):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in BODIES:
            with self:
                return BODIES[func]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.watch(func, out)
        return out


def rows_problem(n, D, V, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * 2 / D**0.5).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    labels = torch.randint(0, V, (n,), generator=g)
    return hidden, weight, bias, labels


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


@pytest.mark.parametrize("form", [(1.0, None), (0.5, 3.0)], ids=str)
@pytest.mark.parametrize("n, D, V", [(1, 16, 1), (7, 24, 33), (130, 70, 700)])
def test_the_fused_gpu_forward_by_the_law(n, D, V, form):
    need("linear_token_logp", "triton", DEVICES[-1], torch.float16)
    for dtype in (torch.float16, torch.bfloat16)[: len(DEVICES)]:  # the interpreter truncates when it casts to bf16
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
            again = gfast.linear_token_logp(hidden, weight, labels, **options)
            assert torch.equal(ours, again)


def test_the_fused_gpu_forward_splits_and_merges():
    """More runs of the vocabulary than one, labels in each of them, a label in none, and a masked run."""
    need("linear_token_logp", "triton", DEVICES[-1], torch.float16)
    from gfast.kernels.head import head_stats

    hidden, weight, bias, labels = (x.to(DEVICES[-1]) for x in rows_problem(9, 32, 700, torch.float16))
    labels[:8] = torch.tensor([0, 127, 128, 300, 511, 640, 699, 255])
    labels[8] = -5
    bias[256:384] = -torch.inf
    labels[3] = 600
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())  # [9, 700]
    others = logits.clone()
    rows = torch.arange(8)
    others[rows, labels[:8]] = -torch.inf
    top, rest, target = head_stats(hidden, weight, bias, labels).double()
    torch.testing.assert_close(top + rest.log(), others.logsumexp(1), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(target[:8], logits[rows, labels[:8]], rtol=2e-3, atol=2e-3)
    assert target[8] == 0


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [8, 40, 1000])
def test_one_chunk_or_many_by_the_law(chunk, dtype, monkeypatch):
    monkeypatch.setattr(head, "_TILE_BYTES", 1)  # dW by tiles of 512 entries
    hidden, weight, bias, labels = rows_problem(100, 16, 1111, dtype)
    labels[:20] = -100
    wide = [x.double() for x in (hidden, weight, bias)]

    def literal(h, w, b):
        return linear_unlearn_loss_reference(h, w, labels, WGA(), bias=b)

    def ours(h, w, b):
        return gfast.linear_unlearn_loss(h, w, labels, WGA(), bias=b, chunk_rows=chunk)

    found = run(ours, (hidden, weight, bias))
    assert [x.dtype for x in found[1:]] == [dtype] * 3
    assert_law(found, run(literal, (hidden, weight, bias)), run(literal, wide), dtype)


DRAWS = 16  # few sequences decide the error: see assert_law_of_draws
LONG = {  # valid labels of each sequence -> chunks of 8 rows: the first one longer than a chunk is computed once
    (20,): 3,
    (20, 19): 3 + 2 * 3,
    (5, 20, 3, 9): 1 + 3 + 1 + 2 * 2,
    (8, 8): 2,
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("native", [True, False], ids=["16-bit products", "fp32 products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", [NPO(0.3), SimNPO(2.0, 1.0)], ids=["npo", "simnpo"])
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_sequences_longer_than_a_chunk(lengths, objective, dtype, native, frozen, monkeypatch):
    monkeypatch.setattr(head, "_native", lambda dtype: native)
    chunks, logits = [], head.ChunkedHead.logits
    monkeypatch.setattr(head.ChunkedHead, "logits", lambda self, a, b: chunks.append(b - a) or logits(self, a, b))
    given, draws = 2 if frozen else 4, []
    for seed in range(DRAWS):
        hidden, weight, bias, labels = rows_problem(20 * len(lengths), 16, 300, dtype, seed)
        labels, hidden = labels.view(-1, 20), hidden.view(-1, 20, 16)
        for row, length in enumerate(lengths):
            labels[row, length:] = -100
        ref = -5 - torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))

        def ours(h, w, b):
            if frozen:
                w, b = w.detach(), b.detach()
            return gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, ref_logp=ref, chunk_rows=8)  # noqa: B023

        def literal(h, w, b):
            return linear_unlearn_loss_reference(h, w, labels, objective, ref_logp=ref, bias=b)  # noqa: B023

        inputs = (hidden, weight, bias)
        results = run(ours, inputs), run(literal, inputs), run(literal, [x.double() for x in inputs])
        draws.append([result[:given] for result in results])
        assert len(chunks) == LONG[lengths] and max(chunks) <= 8
        chunks.clear()
    assert_law_of_draws(draws, dtype)


def test_the_products_a_gpu_takes_exist():
    """bf16 products summed in fp32: no GPU is needed to see that torch knows the call."""
    left, right = torch.ones(8, 6, dtype=torch.bfloat16), torch.ones(8, 4, dtype=torch.bfloat16)
    total = torch.zeros(6, 4)
    for name, given in (("mm", ()), ("addmm", (total,))):
        try:
            getattr(torch, name)(*given, left.t(), right, out_dtype=torch.float32, out=total)
        except NotImplementedError as error:  # the call is understood; what is missing is a kernel for a CPU
            assert f"aten::{name}.dtype_out" in str(error)
    assert hasattr(torch.ops.aten.addmm, "dtype_out")


def test_without_the_extension_the_sum_over_chunks_is_the_same(monkeypatch):
    monkeypatch.setattr(head, "_TILE_BYTES", 1)
    hidden, weight, bias, labels = rows_problem(40, 16, 1111, torch.bfloat16)

    def step(h, w):
        return gfast.linear_unlearn_loss(h, w, labels, WGA(), chunk_rows=10)

    monkeypatch.setattr(head, "_native", lambda dtype: True)  # only such products are rounded and added up
    expected = run(step, (hidden, weight))
    monkeypatch.setattr(head, "compiled", lambda op: False)
    torch.testing.assert_close(run(step, (hidden, weight)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_gradient_checkpointing(reentrant):
    hidden, weight, bias, labels = rows_problem(20, 16, 300, torch.float32)
    for objective in (WGA(), NPO(0.3)):

        def step(h, w, b, objective=objective):
            h = h * 2
            loss = gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, ref_logp=-torch.ones(20)).loss
            return loss + gfast.linear_token_logp(h, w, labels, bias=b).mean()

        def checkpointed(h, w, b, step=step):
            return torch.utils.checkpoint.checkpoint(step, h, w, b, use_reentrant=reentrant)

        inputs = (hidden, weight, bias)
        torch.testing.assert_close(run(checkpointed, inputs), run(step, inputs), rtol=0, atol=0)


@contextlib.contextmanager
def largest_tensors(*known):
    """dtype -> entries of the largest tensor of that dtype that an op returned, not counting those already known."""
    seen, known = {}, {x.data_ptr() for x in known}

    def watch(func, out):
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                seen[x.dtype] = max(seen.get(x.dtype, 0), x.untyped_storage().nbytes() // x.itemsize)

    with Inside(watch):
        yield seen


@pytest.mark.parametrize("native", [True, False], ids=["16-bit products", "fp32 products"])
def test_what_memory_exists(native, monkeypatch):
    """bf16: nothing of the head's size but dW, in fp32 only where several chunks are summed; no chunk of logits where
    nothing is differentiated. A head that is multiplied in fp32 is converted a tile at a time."""
    need("linear_token_logp", "cpp", "cpu", torch.bfloat16)
    monkeypatch.setattr(head, "_native", lambda dtype: native)
    V, D, n = 40_000, 64, 32
    chunk_dtype = torch.bfloat16 if native else torch.float32
    tile = 2**21 // 4  # entries of 2 MiB in fp32, for dW
    hidden, weight, _, labels = rows_problem(n, D, V, torch.bfloat16)
    with largest_tensors(hidden, weight) as seen, torch.no_grad():
        gfast.linear_token_logp(hidden, weight, labels)
    assert seen[chunk_dtype] <= n * 8192 < n * V / 4
    hidden.requires_grad_()
    with largest_tensors(hidden, weight) as seen:
        gfast.linear_unlearn_loss(hidden, weight, labels, WGA()).loss.backward()
    assert seen[chunk_dtype] == n * V and all(size <= n * V for size in seen.values())
    weight.requires_grad_()
    for chunk in (n, n // 4):
        with largest_tensors(hidden, weight) as seen:
            gfast.linear_unlearn_loss(hidden, weight, labels, WGA(), chunk_rows=chunk).loss.backward()
        whole = chunk == n
        assert seen[torch.bfloat16] == V * D
        assert seen[torch.float32] <= (chunk * V if not native else tile) if whole else seen[torch.float32] == V * D


@pytest.mark.parametrize("native, most", [(True, 40), (False, 24)], ids=["16-bit products", "fp32 products"])
def test_one_chunk_as_long_as_it_takes_no_more_memory(native, most, monkeypatch):
    """bf16: rows whose logits take what an fp32 sum of dW would take besides a chunk of them are held at once."""
    monkeypatch.setattr(head, "_native", lambda dtype: native)
    monkeypatch.setattr(linear_inputs, "default_chunk_rows", lambda *args: 8)
    chunks, logits = [], head.ChunkedHead.logits
    monkeypatch.setattr(head.ChunkedHead, "logits", lambda self, a, b: chunks.append(b - a) or logits(self, a, b))

    def chunk_of(n, op, dtype=torch.bfloat16, frozen=False, **options):
        hidden, weight, _, labels = rows_problem(n, 16, 100, dtype)
        if op == "kl":
            options |= dict(ref_hidden=hidden * 0.5, ref_weight=weight)
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_(not frozen)
        if op == "logp":
            out = gfast.linear_token_logp(hidden, weight, labels, **options).sum()
        elif op == "kl":
            out = gfast.linear_token_kl(hidden, weight, labels=labels, **options)
        else:
            objective = NPO(0.3) if op == "npo" else WGA()
            ref = torch.zeros(n) - 5
            out = gfast.linear_unlearn_loss(hidden, weight, labels, objective, ref_logp=ref, **options).loss
        chunks.clear() if op == "logp" else None  # the forward folds tiles, or takes chunks as they come
        out.backward()
        return max(chunks), chunks.clear()

    for op in ("wga", "npo", "logp"):
        assert chunk_of(most, op)[0] == most, op
        assert chunk_of(most + 1, op)[0] <= 8, op
    assert chunk_of((most + 8) // 2, "kl")[0] == (most + 8) // 2  # its two heads share the memory
    assert chunk_of((most + 8) // 2 + 1, "kl")[0] <= 8
    assert chunk_of(most, "wga", frozen=True)[0] <= 8
    assert chunk_of(most, "wga", torch.float32)[0] <= 8  # the sum is the gradient itself
    assert chunk_of(most, "wga", chunk_rows=5)[0] <= 5


@pytest.mark.parametrize("mixed", [True, False], ids=["W as it is", "W by tiles"])
@pytest.mark.parametrize("chunk", [8, 20])
@pytest.mark.parametrize("op", ["loss", "logp"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_multiplied_in_fp32_is_as_exact_as_a_converted_one(bias, op, chunk, mixed, monkeypatch):
    need("linear_token_logp", "cpp", "cpu", torch.bfloat16)
    monkeypatch.setattr(head, "_native", lambda dtype: False)
    monkeypatch.setattr(head, "_FOLD_BYTES", 1)  # two tiles
    if not mixed:
        monkeypatch.setattr(head, "_multiplies_mixed", lambda: False)
    elif not head._has_mixed_mm():
        pytest.skip("there is no product of fp32 and 16 bits here")
    hidden, weight, b, labels = rows_problem(20, 16, 1000, torch.bfloat16)
    columns = weight.t().contiguous().t()  # no contiguous rows: converted in any case
    calls = []

    def step(h, w, c):
        c = c if bias else None
        if op == "loss":
            return gfast.linear_unlearn_loss(h, w, labels, WGA(), bias=c, chunk_rows=chunk).loss
        return gfast.linear_token_logp(h, w, labels, bias=c, chunk_rows=chunk).sin().sum()

    with Inside(lambda func, out: calls.append(func)):
        found = run(step, (hidden, weight, b))
    for name in ("mixed_mm", "head_grad_hidden", "head_grad_weight"):  # the sum of several chunks stays in fp32
        expected = mixed and (name != "head_grad_weight" or chunk == 20)
        assert (getattr(torch.ops.gfast, name).default in calls) == expected, name
    for ours in (found, run(step, (hidden, columns, b))):
        for value, exact in zip(ours, run(step, [x.float() for x in (hidden, weight, b)]), strict=True):
            if exact is not None:
                torch.testing.assert_close(value.float(), exact, rtol=2**-8, atol=1e-6)  # one rounding


def test_a_loss_that_nobody_differentiates_holds_no_logits():
    need("linear_token_logp", "cpp", "cpu", torch.float32)
    hidden, weight, bias, labels = rows_problem(40, 16, 40_000, torch.float32)
    for objective in (WGA(), NPO(0.3), lambda logp, ref, ids: logp.exp()):
        options = dict(bias=bias, ref_logp=torch.zeros(40) - 5)
        with largest_tensors(hidden, weight) as seen:
            scored = gfast.linear_unlearn_loss(hidden, weight, labels, objective, **options)
        assert seen[torch.float32] <= 40 * 8192 < 40 * 40_000 / 4
        with torch.no_grad():
            quiet = gfast.linear_unlearn_loss(hidden.requires_grad_(), weight, labels, objective, **options)
        trained = gfast.linear_unlearn_loss(hidden, weight, labels, objective, **options)
        assert not scored.loss.requires_grad and trained.loss.requires_grad
        for one in (scored, quiet):
            torch.testing.assert_close(tuple(one), tuple(x.detach() for x in trained), rtol=1e-5, atol=1e-7)
        hidden = hidden.detach()


def test_chunks_of_calls_inside_each_other_are_apart():
    hidden, weight, bias, labels = rows_problem(20, 16, 60_000, torch.float32)  # a chunk of 4.8 MB: from the pool

    def step(h, w, b, objective=None):
        return gfast.linear_unlearn_loss(h, w, labels, objective or WGA(), bias=b)

    def meanwhile(logp, ref_logp, ids):  # a weight callable that runs the op itself
        run(step, (hidden + 1, weight, bias))
        return logp.exp()

    expected = run(step, (hidden, weight, bias))
    inside = run(lambda h, w, b: step(h, w, b, meanwhile), (hidden, weight, bias))
    torch.testing.assert_close(inside, expected)


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
    monkeypatch.setattr(common, "may_wait", lambda device: False)
    for step, truth in zip(steps, expected, strict=True):
        torch.testing.assert_close(run(step, (hidden, weight, bias)), truth, rtol=1e-10, atol=1e-12)


@pytest.fixture
def recording(monkeypatch):
    """As on a GPU while a CUDA graph records."""
    monkeypatch.setattr(common, "may_wait", lambda device: False)
    monkeypatch.setattr(common, "reads_are_free", lambda device: False)


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
        monkeypatch.setattr(common, "reads_are_free", lambda device: False)
        with pytest.raises(Exception, match="nonzero"):
            gfast.linear_token_logp(hidden, weight, labels, impl="reference")
