"""The head a chunk or a tile at a time: accuracy of what is summed, and what memory exists."""

import pytest
import torch
import torch.utils.checkpoint
from helpers.linear_head import DRAWS, Inside, largest_tensors, rows_problem
from helpers.losses import assert_law, assert_law_of_draws, need, run

import gfast
from gfast.objectives import NPO, WGA, SimNPO
from gfast.ops import head, linear_inputs
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference


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


LONG = {  # valid labels of each sequence -> chunks of 8 rows: the first one longer than a chunk is computed once
    (20,): 3,
    (20, 19): 3 + 2 * 3,
    (5, 20, 3, 9): 1 + 3 + 1 + 2 * 2,
    (8, 8): 2,
}


# dtypes, and whether 16 bits are multiplied as such: fp32 always is
PRODUCTS = [
    (torch.float32, True),
    *((dtype, native) for dtype in (torch.bfloat16, torch.float16) for native in (True, False)),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("dtype", "native"), PRODUCTS, ids=str)
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


def test_rows_of_logits_on_a_gpu_begin_at_whole_lines():
    """An odd vocabulary keeps 16-byte loads; on a CPU nothing is left between the rows."""
    for device, stride in (("meta", 50304), ("cpu", 50257)):
        hidden, weight = (torch.ones(n, 8, device=device, dtype=torch.bfloat16) for n in (3, 50257))
        labels = torch.zeros(3, dtype=torch.int64, device=device)
        chunked = head.ChunkedHead(hidden, weight, None, labels, 2, torch.arange(3, device=device))
        assert chunked.logits(0, 2).stride() == (stride, 1) and chunked.logits(2, 3).shape == (1, 50257)
