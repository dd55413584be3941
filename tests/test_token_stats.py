"""Statistics of rows of logits and the losses of them, ETW, PDU, MASC and BST, against formulas written again here."""

import math

import pytest
import torch
from helpers.losses import DEVICES, DRAWS, assert_law_of_draws, need, problem, run
from helpers.marks import slow_when

import gfast
from gfast.objectives import BST, ETW, GA, MASC, PDU, TPO
from gfast.ops import linear_token_stats as linear
from gfast.ops import stat_loss
from gfast.ops import token_stats as ops

IMPLS = ["reference", "cpp", "triton"]
OBJECTIVES = [ETW(), ETW(temperature=2.5), PDU(), MASC(k=1, rho=0.2, eta=2.0), MASC(k=4, rho=0.1, eta=3.0, beta=0.5)]
OBJECTIVES += [TPO(), TPO(beta=0.5, floor=1.0), BST(lambda_bst=0.4, top_k=3), BST(lambda_bst=0.7, top_k=1)]
FIELDS = gfast.TokenStats._fields


def plain_stats(z, labels):
    """The fields from logits [B, T, V] by loops over nothing but rows; differentiable."""
    out = []
    for row, y in zip(z.reshape(-1, z.shape[-1]), labels.reshape(-1).tolist(), strict=True):
        if y == -100:
            out.append(torch.zeros(6, dtype=z.dtype) + 0 * row.detach().sum().nan_to_num())
            continue
        p = torch.exp(row - torch.logsumexp(row, 0))
        others = torch.cat([row[:y], row[y + 1 :]])
        top, second = torch.topk(row, 2).values
        entropy = -(p * torch.log(p)).sum()
        out.append(torch.stack([torch.log(p[y]), entropy, top, second, row.sum() / len(row), row[y] - others.max()]))
    return torch.stack(out).unbind(1)


def plain_loss(z, labels, objective):
    """The mean over label tokens (TPO: sequences) by the papers' formulas, and ETW's weights; logits [B, T, V]."""
    total, weights = 0.0, []
    if isinstance(objective, TPO):
        for rows, ys in zip(z, labels.tolist(), strict=True):
            mean = torch.stack([row[y] for row, y in zip(rows, ys, strict=True) if y != -100]).mean()
            x = objective.beta * (objective.floor - mean)
            total = total - 2 / objective.beta * torch.nn.functional.logsigmoid(x)
        return total / len(labels), weights
    for rows, ys in zip(z, labels.tolist(), strict=True):
        rows = [(row, y) for row, y in zip(rows, ys, strict=True) if y != -100]
        if isinstance(objective, ETW):
            q = [torch.softmax(row.detach() / objective.temperature, 0) for row, _ in rows]
            entropies = [float(-(x * x.log()).sum()) for x in q]
            weights += [len(rows) * h / sum(entropies) for h in entropies]
            for (row, y), h in zip(rows, entropies, strict=True):
                total = total + len(rows) * h / sum(entropies) * torch.log_softmax(row, 0)[y]
        for row, y in rows if not isinstance(objective, ETW) else ():
            if isinstance(objective, BST):
                believed = row.topk(objective.top_k)
                target = torch.zeros_like(row).scatter(0, believed.indices, torch.softmax(believed.values, 0)).detach()
                target = objective.lambda_bst * target
                target[y] += 1 - objective.lambda_bst
                total = total + (target * torch.log_softmax(row, 0)).sum()
            elif isinstance(objective, PDU):
                total = total + (row.max() - row.mean()) ** 2
            else:
                rivals = torch.cat([row[:y], row[y + 1 :]]).topk(objective.k).values
                m = objective.beta * row[y] - torch.log(torch.exp(objective.beta * rivals).sum())
                tau = math.log(objective.rho / (1 - objective.rho))
                total = total + torch.clamp(m - (tau - objective.eta), min=0) / objective.eta
    return total / int((labels != -100).sum()), weights


def linear_of(h, w, b, scale=1.0, cap=None):
    z = torch.nn.functional.linear(h, w, b) * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def test_fields_and_their_gradients_in_fp64():
    hidden, weight, bias, labels, _ = problem()
    options = dict(logit_scale=0.7, softcap=6.0)
    factor = torch.randn(6, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def weighed(fields):
        return sum((f * x.reshape(-1)).sum() for f, x in zip(factor, fields, strict=True))

    truth = run(lambda *a: weighed(plain_stats(linear_of(*a, 0.7, 6.0), labels)), (hidden, weight, bias))
    logits = lambda *a: weighed(gfast.token_stats(linear_of(*a, 0.7, 6.0), labels))  # noqa: E731
    for rows in (3, 1000):

        def ours(h, w, b):
            return weighed(gfast.linear_token_stats(h, w, labels, bias=b, chunk_rows=rows, **options))  # noqa: B023

        for found in (run(ours, (hidden, weight, bias)), run(logits, (hidden, weight, bias))):
            for x, exact in zip(found, truth, strict=True):
                torch.testing.assert_close(x, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("field", FIELDS)
def test_one_field_at_a_time_on_kernels(field):
    hidden, weight, bias, labels, _ = problem(V=131, dtype=torch.float32)
    z = linear_of(hidden, weight, bias)
    exact = run(lambda x: plain_stats(x, labels)[FIELDS.index(field)], (z.double(),))
    found = run(lambda x: getattr(gfast.token_stats(x, labels, impl="cpp"), field).reshape(-1), (z,))
    for x, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stats_by_the_law(dtype, impl, device):
    need("token_stats", impl, device, dtype)
    if impl == "triton" and device == "cpu" and dtype != torch.float32:
        pytest.skip("interpreted, one dtype will do")
    draws = []
    for seed in range(DRAWS if impl != "triton" else 2):
        hidden, weight, bias, labels, _ = problem(seed, device=device)
        logits = linear_of(hidden, weight, bias).to(dtype)

        def literal(z):
            flat = ops.row_stats_reference(z.reshape(-1, z.shape[-1]), labels.reshape(-1), 2)  # noqa: B023
            return torch.stack(flat.token_stats(labels)[:5]).square()  # noqa: B023

        def ours(z):
            return torch.stack(gfast.token_stats(z, labels, impl=impl)[:5]).square()  # noqa: B023

        draws.append((run(ours, (logits,)), run(literal, (logits,)), run(literal, (logits.double(),))))
    assert_law_of_draws(draws, dtype, impl)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_losses_against_the_papers_formulas(objective):
    hidden, weight, bias, labels, _ = problem()
    truth = run(lambda *a: plain_loss(linear_of(*a), labels, objective)[0], (hidden, weight, bias))
    assert truth[0] != 0 and all(x.abs().max() > 0 for x in truth[1:])
    for rows in (2, 8, 1000):

        def ours(h, w, b):
            return gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, chunk_rows=rows)  # noqa: B023

        for x, exact in zip(run(ours, (hidden, weight, bias)), truth, strict=True):
            torch.testing.assert_close(x, exact, rtol=1e-10, atol=1e-12)
    logits = linear_of(hidden, weight, bias)
    out = gfast.unlearn_loss(logits, labels, objective)
    torch.testing.assert_close(out.loss, truth[0], rtol=1e-12, atol=0)
    if isinstance(objective, ETW):
        expected = torch.tensor(plain_loss(logits, labels, objective)[1], dtype=torch.float64)
        torch.testing.assert_close(out.weight[labels != -100], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.logp, gfast.token_logp(logits, labels))
    else:
        assert out.logp is None and out.weight is None


@pytest.mark.parametrize("objective", OBJECTIVES[1:4], ids=str)
def test_weights_that_are_given_multiply(objective):
    hidden, weight, bias, labels, _ = problem()
    given = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def expected(h, w, b):
        each = gfast.unlearn_loss(linear_of(h, w, b), labels, objective, reduction="none").loss
        return (each * given).sum() / (labels != -100).sum()

    truth = run(expected, (hidden, weight, bias))
    z = lambda *a: gfast.unlearn_loss(linear_of(*a), labels, objective, weight=given)  # noqa: E731
    head = lambda h, w, b: gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, weight=given, chunk_rows=8)  # noqa: E731
    for fn in (z, head):
        for x, exact in zip(run(fn, (hidden, weight, bias)), truth, strict=True):
            torch.testing.assert_close(x, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sequence_mean", "sum", "none"])
@pytest.mark.parametrize("objective", OBJECTIVES[::2], ids=str)
def test_reductions_add_up(objective, reduction):
    hidden, weight, bias, labels, _ = problem()
    count = {"sequence_mean": 4, "sum": 1, "none": 1}[reduction]
    own = 4 if isinstance(objective, TPO) else int((labels != -100).sum())
    mean = run(lambda *a: gfast.linear_unlearn_loss(*a[:2], labels, objective, bias=a[2]), (hidden, weight, bias))

    def linear_loss(h, w, b):
        return gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, reduction=reduction).loss.sum()

    def from_logits(h, w, b):
        return gfast.unlearn_loss(linear_of(h, w, b), labels, objective, reduction=reduction).loss.sum()

    for fn in (linear_loss, from_logits):
        for x, whole in zip(run(fn, (hidden, weight, bias)), mean, strict=True):
            torch.testing.assert_close(x, whole * own / count, rtol=1e-10, atol=1e-12)


@slow_when(lambda p: p.impl == "triton" and p.dtype != torch.bfloat16)  # interpreted
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES[1:], ids=str)
def test_losses_by_the_law(objective, dtype, impl):
    need("token_stats", impl, "cpu", dtype)
    if impl == "triton" and (dtype != torch.float32 or objective not in OBJECTIVES[1::2]):
        pytest.skip("interpreted, one dtype will do")
    draws, head = [], []
    for seed in range(DRAWS if impl != "triton" else 2):
        hidden, weight, bias, labels, _ = problem(seed, T=4 if impl == "triton" else 7, dtype=dtype)
        inputs, wide = (hidden, weight, bias), (hidden.double(), weight.double(), bias.double())
        logits = linear_of(*inputs)
        options = dict(logit_scale=0.5, softcap=8.0, impl=impl)

        def literal(z):
            spec = objective.stat_spec()
            flat = labels.reshape(-1)  # noqa: B023
            stats = ops.row_stats_reference(z.reshape(-1, 37), flat, spec.top(37), spec.temperature)
            ids = torch.arange(4).repeat_interleave(labels.shape[1])  # noqa: B023
            count = 4 if isinstance(objective, TPO) else (flat != -100).sum()
            return stat_loss.values(spec, stats, flat, ids, 4)[0].sum() / count

        def literal_head(h, w, b):
            return literal(8.0 * torch.tanh(linear_of(h, w, b).to(torch.promote_types(h.dtype, torch.float32)) / 16))  # noqa: B023

        def ours(z):
            return gfast.unlearn_loss(z, labels, objective, impl=impl)  # noqa: B023

        def ours_head(h, w, b):
            return gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, chunk_rows=16, **options)  # noqa: B023

        draws.append((run(ours, (logits,)), run(literal, (logits,)), run(literal, (logits.double(),))))
        head.append((run(ours_head, inputs), run(literal_head, inputs), run(literal_head, wide)))
    assert_law_of_draws(draws, dtype, impl)
    assert_law_of_draws(head, dtype, impl)


def test_gradcheck_and_second_derivatives():
    hidden, weight, _, labels, _ = problem(B=2, T=3, D=3, V=6)
    z = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(gfast.token_stats(x, labels)), z)
    assert torch.autograd.gradcheck(
        lambda h, w: gfast.linear_token_stats(h, w, labels, softcap=4.0, chunk_rows=2).entropy, (hidden, weight)
    )
    for objective in (PDU(), MASC(k=2, rho=0.2)):
        fn = lambda x, o=objective: gfast.unlearn_loss(x, labels, o, impl="reference").loss  # noqa: E731
        assert torch.autograd.gradcheck(fn, z) and torch.autograd.gradgradcheck(fn, z)
    assert torch.autograd.gradgradcheck(lambda x: gfast.token_stats(x, labels, impl="reference").entropy, z)
    assert torch.autograd.gradgradcheck(
        lambda h, w: gfast.linear_token_stats(h, w, labels, impl="reference").entropy, (hidden, weight)
    )
    assert torch.func.jacrev(lambda x: gfast.token_stats(x, labels, impl="reference").mean)(z).shape == (2, 3, 2, 3, 6)
    single = torch.randn(2, 3, 6, requires_grad=True)
    for make in (
        lambda: gfast.token_stats(single, labels, impl="cpp").mean.sum(),
        lambda: gfast.unlearn_loss(single, labels, PDU(), impl="cpp").loss,
        lambda: gfast.linear_token_stats(single, torch.randn(5, 6), labels.clamp(max=4), impl="cpp").top.sum(),
    ):
        (first,) = torch.autograd.grad(make(), single, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_hard(impl):
    """Ties, masked entries, a NaN, a certain prediction, nothing but masked entries."""
    need("token_stats", impl, "cpu", torch.float32)
    z = torch.randn(7, 9)
    z[0] = 1.5
    z[1, 3:] = -torch.inf
    z[2, 4] = torch.nan
    z[3] = torch.tensor([30.0] + [0.0] * 8)
    z[4] = -torch.inf
    z[5, :6] = -torch.inf
    labels = torch.tensor([2, 1, 0, 0, 3, 8, -100])
    stats, values, ids = ops.stat_rows(z, labels, 5, 1.0, True, 1.0, 0.0, impl)
    exact = ops._stat_rows_reference(z.double(), labels, 5, 1.0, True, 1.0, 0.0)
    torch.testing.assert_close(stats.double(), exact[0], rtol=2e-6, atol=1e-18, equal_nan=True)
    torch.testing.assert_close(values.double(), exact[1], equal_nan=True)
    kept = [0, 1, 3, 4, 5, 6]
    assert torch.equal(ids[kept], exact[2][kept])
    others = 8 * math.exp(-30)
    assert stats[3, ops.ENTROPY].item() == pytest.approx(math.log1p(others) + 30 * others / (1 + others), rel=2e-6)
    grads = run(lambda x: gfast.token_stats(x, labels, impl=impl).margin[:2], (z,))[1]
    assert grads[0].tolist() == [-1.0, 0, 1.0, 0, 0, 0, 0, 0, 0] and grads[6].abs().max() == 0


def test_a_label_that_is_none_reads_and_writes_nothing_on_triton():
    """On a GPU its assertion comes after the kernels."""
    need("token_stats", "triton", "cpu", torch.float32)
    kernels = pytest.importorskip("gfast.kernels.stats")
    around = torch.zeros(5, 8)
    z, labels = around[2:3], torch.tensor([9])
    stats, values, ids = kernels.stat_rows(z, labels, 2, 1.0, True)
    assert stats[0, ops.LABEL].isnan() and values.tolist() == [[0.0, 0.0]]
    dense, adds = torch.ones(1, 3), torch.ones(1, 2)
    kernels.stat_rows_grad(z, labels, stats, dense, ids, adds, True, 1.0, 0.0, z)
    assert (around[[0, 1, 3, 4]] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_nothing_to_look_at(impl):
    hidden, weight, _, labels, _ = problem(dtype=torch.float32)
    nothing = torch.full_like(labels, -100)
    for objective in OBJECTIVES:
        for found in (
            run(lambda z, o=objective: gfast.unlearn_loss(z, nothing, o, impl=impl), (hidden @ weight.T,)),
            run(lambda h, w, o=objective: gfast.linear_unlearn_loss(h, w, nothing, o, impl=impl), (hidden, weight)),
            run(lambda z, o=objective: gfast.unlearn_loss(z, nothing[:0], o, impl=impl), (hidden[:0] @ weight.T,)),
        ):
            assert found[0] == 0 and all((x == 0).all() for x in found[1:])
    one = gfast.token_stats(torch.zeros(2, 1), torch.tensor([0, -100]), impl=impl)
    assert one.second.tolist() == [-torch.inf, 0.0] and one.entropy.tolist() == [0.0, 0.0]
    assert gfast.token_stats(torch.zeros(0, 4), labels[0, :0], impl=impl).top.shape == (0,)
    assert gfast.linear_token_stats(hidden, weight, nothing, impl=impl).top.abs().max() == 0
    certain = torch.zeros(1, 2, 4)
    certain[..., 1] = 500.0
    out = gfast.unlearn_loss(certain, torch.tensor([[1, 2]]), ETW(), impl=impl)
    assert out.weight.tolist() == [[1.0, 1.0]]  # as GA: no entropy tells the tokens apart


def test_in_place_odd_layouts_and_packed_rows():
    hidden, weight, _, labels, _ = problem(dtype=torch.float32)
    z = hidden @ weight.T
    for objective in OBJECTIVES[::2]:
        expected = run(lambda x, o=objective: gfast.unlearn_loss(x, labels, o), (z,))
        leaf = z.clone().requires_grad_()
        gfast.unlearn_loss(leaf * 1, labels, objective, inplace=True).loss.backward()
        torch.testing.assert_close(leaf.grad, expected[1])
        transposed = z.transpose(-1, -2).contiguous().transpose(-1, -2)
        found = run(lambda x, o=objective: gfast.unlearn_loss(x, labels, o), (transposed,))
        torch.testing.assert_close(found, expected)
    packed = torch.arange(4)[:, None].expand(4, 7).reshape(1, -1)
    apart = gfast.linear_unlearn_loss(hidden, weight, labels, ETW())
    flat = hidden.reshape(1, 28, -1), weight, labels.reshape(1, -1)
    together = gfast.linear_unlearn_loss(*flat, ETW(), sequence_id=packed)
    torch.testing.assert_close(together.weight.reshape(4, 7), apart.weight)
    torch.testing.assert_close(gfast.unlearn_loss(z, labels, GA()).logp, apart.logp)


def test_ops_are_registered_and_trace():
    hidden, weight, bias, labels, _ = problem(B=2, T=3, D=3, V=9, dtype=torch.float32)
    z, flat = (hidden @ weight.T).reshape(6, 9), labels.reshape(-1)
    sizes, form, one = [0, 9, 4, 4], [1.0, 0.0], torch.ones(())
    head, ids = [hidden.reshape(6, 3), weight, None], torch.arange(2).repeat_interleave(3)
    stats = ops._row_stats(z, flat, 2, True, "auto")[-1]
    given = ops.factors([stats[:, 0]] * 4 + [None], flat, torch.zeros(6, 2, dtype=torch.int64), torch.float32)
    calls = [
        (ops._row_stats, (z.requires_grad_(), flat, 2, True, "auto")),
        (ops._row_stats_gradient, (z.detach(), flat, stats, *given, True, "auto")),
        (linear._linear_row_stats, (*(x.requires_grad_() for x in head[:2]), None, flat, 2, sizes, form, "", "auto")),
        (
            linear._linear_row_stats_backward,
            (
                *(x.detach() for x in head[:2]),
                None,
                flat,
                stats,
                *given,
                True,
                sizes,
                form,
                "auto",
                [True, True, False],
            ),
        ),
        (stat_loss._stat_logits, (z.detach(), flat, [ids, None], one, "entropy", [1.0], 2, True, "auto")),
        (
            stat_loss._stat_head,
            (
                [x if x is None else x.detach() for x in head],
                flat,
                [ids, torch.rand(6)],
                one,
                "margin",
                [2.0, 0.1, 1.0, 1.0],
                [2, 3],
            )
            + (sizes, form, "", "auto", [True, True, False]),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.registered, arguments)


@pytest.mark.slow
def test_full_graph():
    hidden, weight, _, labels, _ = problem(B=2, T=3, D=3, V=9, dtype=torch.float32)

    def step(h, w):
        loss = gfast.linear_unlearn_loss(h, w, labels, ETW()).loss + gfast.unlearn_loss(h @ w.T, labels, PDU()).loss
        loss = loss + gfast.linear_unlearn_loss(h, w, labels, MASC(k=2)).loss
        return (
            loss + gfast.token_stats(h @ w.T, labels).entropy.sum() + gfast.linear_token_stats(h, w, labels).top.sum()
        )

    expected = run(step, (hidden, weight))
    torch.testing.assert_close(run(torch.compile(step, fullgraph=True), (hidden, weight)), expected)


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: ETW(temperature=0.0), "temperature T must be > 0"),
        (lambda: PDU(dual_step_size=-1.0), "dual_step_size must be >= 0"),
        (lambda: PDU(dual_update_upon="batch"), "'step' or 'epoch'"),
        (lambda: PDU(dual_warmup_epochs=-1), "dual_warmup_epochs"),
        (lambda: TPO(beta=0.0), "beta must be > 0"),
        (lambda: MASC(rho=1.0), "rho must be between 0 and 1"),
        (lambda: MASC(eta=0.0), "eta must be > 0"),
        (lambda: MASC(k=0), "k must be 1 to 127"),
        (lambda: MASC(k=128), "k must be 1 to 127"),
        (lambda: MASC(beta=0.0), "beta must be > 0"),
        (lambda: gfast.unlearn_loss(torch.zeros(1, 1), torch.tensor([0]), MASC()), "compares logits"),
        (lambda: gfast.token_stats(torch.zeros(2, 3), torch.tensor([0, 3])), "outside the vocabulary"),
        (lambda: gfast.unlearn_loss(torch.zeros(2, 3), torch.tensor([0, 3]), PDU()), "outside the vocabulary"),
        (lambda: gfast.unlearn_loss(torch.zeros(2, 3), torch.tensor([0]), PDU()), "need labels of shape"),
        (lambda: gfast.unlearn_loss(torch.zeros(2, 3), torch.tensor([0, 1]), PDU(), impl="cuda"), "no CUDA kernel"),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
