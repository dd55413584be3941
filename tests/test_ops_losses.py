"""The loss ops: literal references, every backend by the relative-error law, shapes, bad input, tracing."""

import math

import pytest
import torch
from helpers.losses import ALL, DEVICES, DRAWS, IMPLS, assert_law_of_draws, label, need, problem, run, squared
from helpers.marks import slow_when

import gfast
from gfast.objectives import DPO, GA, NLL, NPO, TNPO, WGA, SimNPO
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference
from gfast.ops.token_kl import token_kl_reference
from gfast.ops.unlearn_loss import unlearn_loss_reference


@pytest.mark.parametrize("objective", [*ALL, squared], ids=label)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum", "none"])
def test_fp64_equals_the_literal_reference(objective, reduction):
    hidden, weight, bias, labels, ref = problem()
    options = dict(ref_logp=ref, reduction=reduction)

    def literal(h, w, b):
        return linear_unlearn_loss_reference(h, w, labels, objective, bias=b, **options)

    def linear(rows):
        return lambda h, w, b: gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, chunk_rows=rows, **options)

    def from_logits(h, w, b):
        return gfast.unlearn_loss(torch.nn.functional.linear(h, w, b), labels, objective, **options)

    truth = run(literal, (hidden, weight, bias))
    for fn in (linear(3), linear(8), linear(1000), from_logits):
        for ours, exact in zip(run(fn, (hidden, weight, bias)), truth, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


# interpreted, each takes seconds; test_triton.py asks the kernels themselves about every weight
QUICK_ON_TRITON = [(WGA(0.5), torch.float32), (WGA(1.0), torch.float32), (NPO(0.3), torch.float16)]
few_on_triton = slow_when(lambda p: p.impl == "triton" and (p.objective, p.dtype) not in QUICK_ON_TRITON)


@few_on_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", ALL, ids=str)
def test_from_logits_by_the_law(objective, dtype, impl, device):
    need("unlearn_loss", impl, device, dtype)
    if impl == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates when it casts to bfloat16; compiled Triton rounds")
    draws = []
    for seed in range(DRAWS):
        hidden, weight, bias, labels, ref = problem(seed, device=device)
        logits = torch.nn.functional.linear(hidden, weight, bias).to(dtype)

        def literal(z):
            return unlearn_loss_reference(z, labels, objective, ref_logp=ref)  # noqa: B023

        ours = run(lambda z: gfast.unlearn_loss(z, labels, objective, ref_logp=ref, impl=impl), (logits,))  # noqa: B023
        assert ours[1].dtype == dtype
        draws.append((ours, run(literal, (logits,)), run(literal, (logits.double(),))))
    assert_law_of_draws(draws, dtype, impl)


@few_on_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", [WGA(1.0), TNPO(1.0), NPO(0.3)], ids=str)
def test_linear_by_the_law(objective, dtype, impl, device):
    need("linear_unlearn_loss", impl, device, dtype)
    options, draws = dict(logit_scale=0.5, softcap=8.0), []
    T, rows = (12, 20) if impl == "triton" and device == "cpu" else (40, 64)  # interpreted, 40 would take minutes
    for seed in range(DRAWS):
        hidden, weight, bias, labels, ref = problem(seed, T=T, D=16, V=101, dtype=dtype, device=device)

        def literal(h, w, b):
            return linear_unlearn_loss_reference(h, w, labels, objective, ref_logp=ref, bias=b, **options)  # noqa: B023

        def ours(h, w, b):
            given = dict(ref_logp=ref, bias=b, chunk_rows=rows, impl=impl, **options)  # noqa: B023
            return gfast.linear_unlearn_loss(h, w, labels, objective, **given)  # noqa: B023

        inputs = (hidden, weight, bias)
        draws.append((run(ours, inputs), run(literal, inputs), run(literal, [x.double() for x in inputs])))
    assert_law_of_draws(draws, dtype, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("target", [30.0, 12.0, -30.0])
def test_the_target_entry_keeps_its_relative_accuracy(impl, target):
    """Near p = 1 the gradient of the target logit is 1 - p: computed as p - 1 in fp32 it would be 0 or wrong by
    half."""
    need("unlearn_loss", impl, "cpu", torch.float32)
    logits = torch.zeros(1, 50)
    logits[0, 7] = target
    labels = torch.tensor([7])
    ours = run(lambda z: gfast.unlearn_loss(z, labels, GA(), impl=impl), (logits,))
    others = 49 * math.exp(-target)  # relative to the target; log1p and 1 - p from it keep every digit
    exact = torch.full((1, 50), -math.exp(-target) / (1 + others), dtype=torch.float64)
    exact[0, 7] = others / (1 + others)
    torch.testing.assert_close(ours[1].double(), exact, rtol=2e-6, atol=0)
    assert ours[0].item() == pytest.approx(-math.log1p(others), rel=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_token_kl(impl, dtype):
    need("token_kl", impl, "cpu", dtype)
    draws = []
    for seed in range(DRAWS):
        hidden, weight, bias, labels, _ = problem(2 * seed, T=9)
        reference = problem(2 * seed + 1, T=9)[:3]
        valid = int((labels != -100).sum())

        def logits_of(h, w, b):
            return 7 * torch.tanh(0.8 * torch.nn.functional.linear(h, w, b) / 7)

        ref_logits = logits_of(*reference)

        def literal(h, w, b):
            return token_kl_reference(logits_of(h, w, b), ref_logits.to(h.dtype), labels).sum() / valid  # noqa: B023

        def from_logits(h, w, b):
            return gfast.token_kl(logits_of(h, w, b), ref_logits.to(h.dtype), labels, impl=impl)  # noqa: B023

        def linear(h, w, b):
            ref_hidden, ref_weight, ref_bias = (x.to(dtype) for x in reference)  # noqa: B023
            head = dict(bias=b, ref_bias=ref_bias, logit_scale=0.8, softcap=7.0)
            return gfast.linear_token_kl(h, w, ref_hidden, ref_weight, labels, chunk_rows=5, impl=impl, **head)  # noqa: B023

        inputs = [x.to(dtype) for x in (hidden, weight, bias)]
        plain, truth = run(literal, inputs), run(literal, (hidden, weight, bias))
        draws.append([(run(fn, inputs), plain, truth) for fn in (from_logits, linear)])
    for drawn in zip(*draws, strict=True):
        if dtype == torch.float64:
            for found, _, truth in drawn:
                torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)
        else:
            assert_law_of_draws(drawn, dtype, impl)


def test_kl_of_a_model_with_itself_is_zero():
    hidden, weight, bias, labels, _ = problem(dtype=torch.float32)
    loss, *grads = run(
        lambda h, w: gfast.linear_token_kl(h, w, hidden, weight, labels, bias=bias, ref_bias=bias), (hidden, weight)
    )
    assert loss == 0 and all((grad == 0).all() for grad in grads)


def test_gradcheck():
    hidden, weight, bias, labels, ref = problem(B=2, T=3, D=3, V=5)
    hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: gfast.token_logp(z, labels), logits)
    assert torch.autograd.gradcheck(
        lambda *a: gfast.linear_token_logp(a[0], a[1], labels, bias=a[2]), (hidden, weight, bias)
    )
    # the weights of WGA are detached, so a numerical derivative of its value is another thing: GA, NLL and NPO have
    # none of that
    for objective in (GA(), NLL(), NPO(0.5)):
        assert torch.autograd.gradcheck(
            lambda *a, o=objective: (
                gfast.linear_unlearn_loss(
                    a[0], a[1], labels, o, bias=a[2], ref_logp=ref, softcap=5.0, logit_scale=0.7, chunk_rows=2
                ).loss
            ),
            (hidden, weight, bias),
        )
    ref_hidden, ref_weight = hidden.detach() + 1, weight.detach().clone()  # gradcheck moves the inputs in place
    assert torch.autograd.gradcheck(
        lambda *a: gfast.linear_token_kl(a[0], a[1], ref_hidden, ref_weight, labels), (hidden, weight)
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_odd_layouts(impl):
    hidden, weight, _, labels, ref = problem(dtype=torch.float32)
    logits = torch.nn.functional.linear(hidden, weight)  # [B, T, V]
    expected = run(lambda z: gfast.unlearn_loss(z, labels, WGA(), impl=impl), (logits,))
    transposed = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert transposed.stride(-1) != 1
    torch.testing.assert_close(run(lambda z: gfast.unlearn_loss(z, labels, WGA(), impl=impl), (transposed,)), expected)
    row = logits[0, 3]
    wide = row.expand(5, -1)  # stride 0 along the rows
    targets = torch.full((5,), 3)
    torch.testing.assert_close(
        gfast.token_logp(wide, targets, impl=impl), gfast.token_logp(row[None], targets[:1]).expand(5)
    )
    torch.testing.assert_close(
        gfast.linear_token_logp(hidden.transpose(0, 1), weight, labels.T, impl=impl),
        gfast.linear_token_logp(hidden, weight, labels, impl=impl).T,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", [WGA(), NPO(), DPO()], ids=str)
def test_nothing_to_learn_is_zero(impl, objective):
    need("unlearn_loss", impl, "cpu", torch.float32)
    hidden, weight, _, labels, ref = problem(dtype=torch.float32)
    nothing = torch.full_like(labels, -100)
    logits = hidden @ weight.T
    options = dict(ref_logp=ref, impl=impl)
    for result in (
        run(lambda z: gfast.unlearn_loss(z, nothing, objective, **options), (logits,)),
        run(lambda h, w: gfast.linear_unlearn_loss(h, w, nothing, objective, **options), (hidden, weight)),
        run(lambda z: gfast.unlearn_loss(z, nothing[:0], objective, ref_logp=ref[:0], impl=impl), (logits[:0],)),
    ):
        assert result[0] == 0 and all((grad == 0).all() for grad in result[1:])


def test_packed_rows_equal_separate_sequences():
    hidden, weight, _, labels, ref = problem()
    packed_ids = torch.arange(4)[:, None].expand(4, 7).reshape(1, -1)
    for objective in (NPO(0.3), SimNPO(), WGA()):
        apart = gfast.linear_unlearn_loss(hidden, weight, labels, objective, ref_logp=ref, reduction="sequence_mean")
        packed = gfast.linear_unlearn_loss(
            hidden.reshape(1, 28, -1),
            weight,
            labels.reshape(1, -1),
            objective,
            ref_logp=ref.reshape(1, -1),
            sequence_id=packed_ids,
            reduction="sequence_mean",
        )
        torch.testing.assert_close(apart.loss, packed.loss)
        torch.testing.assert_close(apart.weight.reshape(1, -1), packed.weight)


def test_normalizer_adds_up_over_micro_batches():
    hidden, weight, _, labels, ref = problem()
    total = int((labels != -100).sum())
    whole = run(lambda h, w: gfast.linear_unlearn_loss(h, w, labels, WGA()), (hidden, weight))
    parts = [
        run(lambda h, w, s=s: gfast.linear_unlearn_loss(h, w, labels[s], WGA(), normalizer=total), (hidden[s], weight))
        for s in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(parts[0][2] + parts[1][2], whole[2])


def test_backward_twice_and_scaled():
    hidden, weight, _, labels, _ = problem(dtype=torch.float32)
    logits = (hidden @ weight.T).requires_grad_()
    loss = gfast.unlearn_loss(logits, labels, WGA()).loss
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = once.clone()
    (thrice,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(thrice, 3 * kept)
    torch.testing.assert_close(once, kept)


def test_frozen_parts_get_no_gradient():
    hidden, weight, bias, labels, _ = problem(dtype=torch.float32)
    hidden.requires_grad_()
    gfast.linear_unlearn_loss(hidden, weight, labels, WGA(), bias=bias).loss.backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    hidden, weight = hidden.detach(), weight.requires_grad_()
    gfast.linear_unlearn_loss(hidden, weight, labels, WGA(), bias=bias).loss.backward()
    assert hidden.grad is None and weight.grad is not None
    logits = torch.randn(2, 5)
    assert not gfast.unlearn_loss(logits, torch.tensor([1, 2]), WGA()).loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_outside_the_vocabulary(impl):
    need("unlearn_loss", impl, "cpu", torch.float32)
    hidden, weight, _, labels, _ = problem(dtype=torch.float32)
    for bad in (37, 40, -1, -101):
        wrong = labels.clone()
        wrong[1, 2] = bad
        with pytest.raises(
            (ValueError, RuntimeError, IndexError), match=rf"= {bad} is outside the vocabulary \[0, 37\)"
        ):
            gfast.unlearn_loss(hidden @ weight.T, wrong, WGA(), impl=impl)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            gfast.linear_unlearn_loss(hidden, weight, wrong, WGA(), impl=impl)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            gfast.linear_token_logp(hidden, weight, wrong, impl=impl)
        with pytest.raises((ValueError, RuntimeError, IndexError), match="outside the vocabulary"):
            gfast.token_logp(hidden @ weight.T, wrong, impl=impl)
        with pytest.raises((ValueError, RuntimeError, IndexError), match="outside the vocabulary"):
            gfast.token_kl(hidden @ weight.T, hidden @ weight.T, wrong, impl=impl)


def test_bad_arguments_are_told_in_words():
    hidden, weight, bias, labels, ref = problem(dtype=torch.float32)
    logits = hidden @ weight.T
    cases = [
        (ValueError, "need labels of shape", lambda: gfast.unlearn_loss(logits, labels[:2], WGA())),
        (ValueError, "needs ref_logp", lambda: gfast.unlearn_loss(logits, labels, NPO())),
        (ValueError, "needs ref_logp", lambda: gfast.linear_unlearn_loss(hidden, weight, labels, TNPO())),
        (ValueError, "one value a label", lambda: gfast.unlearn_loss(logits, labels, NPO(), ref_logp=ref[:2])),
        (ValueError, "unknown reduction", lambda: gfast.unlearn_loss(logits, labels, WGA(), reduction="mean")),
        (TypeError, "labels must be int64", lambda: gfast.unlearn_loss(logits, labels.float(), WGA())),
        (TypeError, "must be floating point", lambda: gfast.token_logp(logits.long(), labels)),
        (ValueError, r"must be \[V, D\]", lambda: gfast.linear_unlearn_loss(hidden, weight[:, :3], labels, WGA())),
        (
            TypeError,
            "under torch.autocast",
            lambda: gfast.linear_unlearn_loss(hidden, weight.bfloat16(), labels, WGA()),
        ),
        (ValueError, "bias must be", lambda: gfast.linear_token_logp(hidden, weight, labels, bias=bias[:4])),
        (ValueError, "softcap must be", lambda: gfast.linear_token_logp(hidden, weight, labels, softcap=-1.0)),
        (
            ValueError,
            "logit_scale must",
            lambda: gfast.linear_unlearn_loss(hidden, weight, labels, WGA(), logit_scale=-1.0),
        ),
        (ValueError, "no implementation is called", lambda: gfast.unlearn_loss(logits, labels, WGA(), impl="fast")),
        (ValueError, "takes CUDA tensors, not cpu", lambda: gfast.unlearn_loss(logits, labels, WGA(), impl="cuda")),
        (ValueError, "no CUDA kernel of its own", lambda: gfast.token_kl(logits, logits, labels, impl="cuda")),
        (ValueError, "even number", lambda: gfast.unlearn_loss(logits[:3], labels[:3], DPO(), ref_logp=ref[:3])),
        (ValueError, "do not match logits", lambda: gfast.token_kl(logits, logits[:2], labels)),
        (ValueError, "no meaning", lambda: gfast.unlearn_loss(logits, labels, WGA(), reduction="sum", normalizer=3)),
        (ValueError, "returned shape", lambda: gfast.unlearn_loss(logits, labels, lambda p, r, s: p[:2])),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_non_finite_logits_on_request():
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    logits[1, 0, 4] = float("nan")
    with pytest.raises(ValueError, match="not finite .first at flattened position 3"):
        gfast.unlearn_loss(logits, labels, WGA(), check_finite=True)


def test_outputs_are_detached():
    hidden, weight, _, labels, _ = problem(dtype=torch.float32)
    hidden.requires_grad_()
    for objective in (WGA(), SimNPO(), squared):
        out = gfast.linear_unlearn_loss(hidden, weight, labels, objective)
        assert not out.logp.requires_grad and not out.weight.requires_grad and out.loss.requires_grad


def test_opcheck():
    hidden, weight, bias, labels, ref = problem(B=2, T=3, dtype=torch.float32)
    rows, flat = (hidden @ weight.T).reshape(6, -1), labels.reshape(-1)
    factor = torch.tensor(0.25)
    h = hidden.reshape(6, -1)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    ops = torch.ops.gfast
    torch.library.opcheck(ops.token_logp, (rows.clone().requires_grad_(), flat, "auto"))
    torch.library.opcheck(ops.unlearn_rows, (rows, flat, None, WGA().spec().numbers(), factor, True, "auto"))
    torch.library.opcheck(ops.token_kl, (rows, rows * 0.5, flat, factor, True, "auto"))
    leaves = [x.clone().requires_grad_() for x in (h, weight, bias)]
    options = ([0, 37, 4, 4], [1.0, 0.0], "", "auto")
    torch.library.opcheck(ops.linear_token_logp, (*leaves, flat, *options))
    numbers = NPO(0.3).spec().numbers()
    need_all = [True, True, True]
    reference = ref.reshape(-1).float()
    head, per_row, last = [h, weight, bias], [reference, None, ids], (*options, need_all)
    torch.library.opcheck(ops.linear_unlearn, (head, flat, per_row, factor, "sequence", numbers, [2, 3], *last))
    torch.library.opcheck(ops.linear_token_kl, (head, head, flat, factor, *last))


@pytest.mark.parametrize("objective", [WGA(), TNPO(), NPO(), SimNPO(), DPO()], ids=str)
def test_full_graph_compile(objective):
    hidden, weight, bias, labels, ref = problem(dtype=torch.float32)
    ref = ref.float()

    def step(h, w, b):
        out = gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, ref_logp=ref, softcap=20.0)
        logits = torch.nn.functional.linear(h, w, b)
        return out.loss + gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, inplace=True).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = (hidden, weight, bias)
    for ours, eager in zip(run(compiled, inputs), run(step, inputs), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_full_graph_compile_of_kl_and_logp():
    hidden, weight, bias, labels, _ = problem(dtype=torch.float32)

    def step(h, w, b):
        kl = gfast.linear_token_kl(h, w, hidden * 0.5, weight, labels, bias=b)
        logits = torch.nn.functional.linear(h, w, b)
        kl = kl + gfast.token_kl(logits, torch.zeros_like(logits), labels)
        return kl + gfast.linear_token_logp(h, w, labels).sum() + gfast.token_logp(logits, labels).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = (hidden, weight, bias)
    for ours, eager in zip(run(compiled, inputs), run(step, inputs), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
