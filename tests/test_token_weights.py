"""weight=, constants that an objective's own token weights are multiplied by: in the ops, over models, in the engines
and in training, against formulas written here in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.losses import ALL, IMPLS, need, problem, run, squared
from helpers.marks import slow_when

import gfast
from gfast.objectives import DPO, GA, KL, NLL, NPO, RMU, TNPO, WGA, WTNPO, SatImp, SimNPO

sigmoid, softplus = torch.sigmoid, torch.nn.functional.softplus


def drawn(labels, seed=7):
    """Weights of both signs, some of them 0; what stands at ignored labels must not matter."""
    w = torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w[:, 1::4] = 0
    return torch.where(labels == -100, torch.nan, w)


def literal(objective, logp, ref, labels, w, reduction):
    """Value, a function of logp whose gradient is the loss's, and the weights; a text is a row [B, T]."""
    valid = labels != -100
    w, logp, ref = (torch.where(valid, x.double(), 0.0) for x in (w, logp, ref))
    p, old, length = logp.detach().exp(), ref.exp(), valid.sum(1).clamp(min=1)
    value = None
    if isinstance(objective, WTNPO):
        own = p**objective.alpha * 2 * p**objective.beta / (p**objective.beta + old**objective.beta)
    elif isinstance(objective, TNPO):
        own = 2 * p**objective.beta / (p**objective.beta + old**objective.beta)
    elif isinstance(objective, WGA):
        own = p**objective.alpha
    elif isinstance(objective, SatImp):
        own = p**objective.beta1 * (1 - p) ** objective.beta2
    elif objective is squared:
        own = p**2
    elif isinstance(objective, (GA, NLL)):
        own = torch.full_like(p, 1.0 if isinstance(objective, GA) else -1.0)
    else:
        s, o, b = logp.detach().sum(1), ref.sum(1), objective.beta
        if isinstance(objective, DPO):
            half = len(labels) // 2
            x = b * ((s - o)[:half] - (s - o)[half:])
            own = torch.cat([2 * sigmoid(x), -2 * sigmoid(x)])[:, None].expand_as(p)
            sums, length = (y[:half] + y[half:] for y in (w.sum(1), valid.sum(1)))
            value = 2 / b * softplus(x) * sums / length
        elif isinstance(objective, NPO):
            x = b * (s - o)
            own, value = (2 * sigmoid(x))[:, None].expand_as(p), 2 / b * softplus(x) * w.sum(1) / length
        else:
            x = b * (s / length + objective.delta)
            own = (2 * sigmoid(x) / length)[:, None].expand_as(p)
            value = 2 / b * softplus(x) * w.sum(1) / length
    weight = torch.where(valid, own, 0.0) * w
    texts = valid.any(1)
    if isinstance(objective, DPO):
        texts = texts[: len(texts) // 2] | texts[len(texts) // 2 :]
    z = {"token_mean": valid.sum(), "sequence_mean": texts.sum(), "sum": 1}[reduction]
    value = (weight * logp.detach()).sum() if value is None else value.sum()
    return value / z, (weight * logp).sum() / z, weight


def logp_of(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def check(out, inputs, truth, exact, rtol=1e-9, atol=1e-11):
    """A loss's value, weights and gradients are those of ``literal``."""
    value, surrogate, weight = truth
    torch.testing.assert_close(out.loss.detach().double(), value, rtol=rtol, atol=atol)
    torch.testing.assert_close(out.weight.double(), weight, rtol=rtol, atol=atol)
    for ours, right in zip(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(surrogate, exact), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=rtol, atol=atol * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("objective", [*ALL, squared], ids=lambda x: getattr(x, "__name__", str(x)))
def test_fp64_equals_the_formula(objective):
    hidden, head, _, labels, ref = problem()
    w = drawn(labels)
    exact = [x.requires_grad_() for x in (hidden, head)]

    def from_logits(h, v, **options):
        return gfast.unlearn_loss(h @ v.T, labels, objective, ref_logp=ref, weight=w, **options)

    def linear(h, v, **options):
        return gfast.linear_unlearn_loss(h, v, labels, objective, ref_logp=ref, weight=w, **options)

    for reduction in ("token_mean", "sequence_mean", "sum"):
        for loss, options in (
            (from_logits, {}),
            (from_logits, dict(inplace=True)),
            *((linear, dict(chunk_rows=rows)) for rows in (3, 8, 1000)),
        ):
            truth = literal(objective, logp_of(exact[0] @ exact[1].T, labels), ref, labels, w, reduction)
            inputs = [x.detach().clone().requires_grad_() for x in exact]
            check(loss(*inputs, reduction=reduction, **options), inputs, truth, exact)


@slow_when(lambda p: p.impl == "triton" and not isinstance(p.objective, WGA))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "objective", [WGA(0.5), TNPO(0.7), NPO(0.3), squared], ids=lambda x: getattr(x, "__name__", str(x))
)
def test_every_backend_equals_the_formula(objective, impl):
    need("unlearn_loss", impl, "cpu", torch.float32)
    hidden, head, _, labels, ref = problem(B=3, T=5, D=4, V=19)
    w = drawn(labels)
    exact = [x.requires_grad_() for x in (hidden, head)]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    given = dict(ref_logp=ref, reduction="token_mean", weight=w.float(), impl=impl)
    for loss in (
        lambda h, v: gfast.unlearn_loss(h @ v.T, labels, objective, **given),
        lambda h, v: gfast.linear_unlearn_loss(h, v, labels, objective, chunk_rows=6, **given),
    ):
        truth = literal(objective, logp_of(exact[0] @ exact[1].T, labels), ref, labels, w, "token_mean")
        check(loss(*inputs), inputs, truth, exact, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_keep_weights_of_any_size(dtype, size):
    """fp16 gradients are kept near the top of their range until the backward: by the largest weight, not by 1."""
    hidden, head, _, labels, _ = problem(dtype=dtype)
    w = size * drawn(labels)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    logits = (hidden @ head.T).requires_grad_()
    for loss, inputs, right in (
        (lambda z: gfast.unlearn_loss(z, labels, WGA(0.5), weight=w), [logits], [logits.detach().double()]),
        (lambda h, v: gfast.linear_unlearn_loss(h, v, labels, WGA(0.5), weight=w, chunk_rows=6), [hidden, head], exact),
    ):
        inputs, right = ([x.detach().clone().requires_grad_() for x in some] for some in (inputs, right))
        z = right[0] if len(right) == 1 else right[0] @ right[1].T
        surrogate = literal(WGA(0.5), logp_of(z, labels), w, labels, w, "token_mean")[1]
        # what a mixed-precision step does: a loss scale up, and down again in fp32
        scale = 1.0 / size
        ours = torch.autograd.grad(loss(*inputs).loss * scale, inputs)
        for one, other in zip(ours, torch.autograd.grad(surrogate * scale, right), strict=True):
            error = (one.double() - other).norm() / other.norm()
            assert error < 16 * torch.finfo(dtype).eps, error


def test_none_reduction_packed_rows_and_a_normalizer():
    hidden, head, _, labels, ref = problem()
    logits, w = hidden @ head.T, drawn(labels)
    valid = labels != -100
    for objective in (WGA(0.5), NPO(0.3), DPO(0.3)):
        single = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, weight=w, reduction="sum")
        parts = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, weight=w, reduction="none")
        torch.testing.assert_close(parts.loss.sum(), single.loss)
        halved = gfast.unlearn_loss(
            logits, labels, objective, ref_logp=ref, weight=w, reduction="sequence_mean", normalizer=2
        )
        torch.testing.assert_close(halved.loss, single.loss / 2)
    ids = torch.arange(4)[:, None].expand_as(labels)
    apart = gfast.unlearn_loss(logits, labels, NPO(0.3), ref_logp=ref, weight=w)
    flat = [x.reshape(1, -1, *x.shape[2:]) for x in (logits, labels, ref, w, ids)]
    packed = gfast.unlearn_loss(
        flat[0], flat[1], NPO(0.3), ref_logp=flat[2], weight=flat[3], sequence_id=flat[4], normalizer=valid.any(1).sum()
    )
    torch.testing.assert_close(packed.loss, apart.loss)
    torch.testing.assert_close(packed.weight.reshape(labels.shape), apart.weight)


@pytest.mark.parametrize("of", [torch.bool, torch.int64, torch.bfloat16], ids=str)
def test_a_mask_leaves_tokens_out(of):
    """0 and 1: the sums without those tokens, over the same count."""
    hidden, head, _, labels, ref = problem()
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = torch.where(mask, labels, -100)
    for objective in (GA(), TNPO(0.7)):

        def loss(h, v, some, **weight):
            return gfast.linear_unlearn_loss(h, v, some, objective, ref_logp=ref, reduction="sum", **weight)  # noqa: B023

        ours = run(loss, (hidden, head), some=labels, weight=mask.to(of))
        for one, other in zip(ours, run(loss, (hidden, head), some=kept), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective", [NPO(0.3), SimNPO(1.5, 0.2), DPO(0.3)], ids=str)
def test_a_weight_of_texts_has_every_derivative(objective):
    """One weight for all tokens of a text is the text's loss times it, further derivatives included."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 5, (4, 3), generator=generator)
    ref = -torch.rand(4, 3, generator=generator, dtype=torch.float64)
    v = torch.tensor([0.5, 2.0, 0.5, 2.0], dtype=torch.float64)
    weight = v[:, None].expand(4, 3)
    plain = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, reduction="none", impl="reference").loss
    whole = (plain * v[: len(plain)]).sum()
    out = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, reduction="sum", weight=weight, impl="reference")
    torch.testing.assert_close(out.loss, whole)

    def second(loss):
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return first, torch.autograd.grad(first.sin().sum(), logits)[0]

    for ours, right in zip(second(out.loss), second(whole), strict=True):
        torch.testing.assert_close(ours, right)
    uneven = drawn(labels)
    for reduction in ("sum", "none"):
        loss = gfast.unlearn_loss(
            logits, labels, objective, ref_logp=ref, reduction=reduction, weight=uneven, impl="reference"
        ).loss.sum()
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        truth = literal(objective, logp_of(logits, labels), ref, labels, uneven, "sum")
        torch.testing.assert_close(loss.detach(), truth[0])
        torch.testing.assert_close(first, torch.autograd.grad(truth[1], logits)[0])


def test_full_graph_compile():
    hidden, head, _, labels, ref = problem(dtype=torch.float32)
    ref, w = ref.float(), drawn(labels).float()

    def step(h, v, w):
        out = gfast.linear_unlearn_loss(h, v, labels, NPO(0.3), ref_logp=ref, weight=w)
        return out.loss + gfast.unlearn_loss(h @ v.T, labels, WGA(), weight=w).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        run(lambda h, v: compiled(h, v, w), (hidden, head)),
        run(lambda h, v: step(h, v, w), (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_opcheck_and_vmap():
    hidden, head, _, labels, _ = problem(B=2, T=3, dtype=torch.float32)
    rows, flat, w = (hidden @ head.T).reshape(6, -1), labels.reshape(-1), torch.randn(6)
    numbers, one = WGA().spec().numbers(), torch.tensor(0.25)
    torch.library.opcheck(torch.ops.gfast.unlearn_rows, (rows, flat, None, numbers, one, True, "auto", w))
    last = ([0, 37, 4, 4], [1.0, 0.0], "", "auto", [True, True, False])
    given = ([hidden.reshape(6, -1), head, None], flat, [None, None, None, w], one, "token", numbers, [2, 3], *last)
    torch.library.opcheck(torch.ops.gfast.linear_unlearn, given)

    def loss(z, y, v):
        return gfast.unlearn_loss(z, y, GA(), weight=v, reduction="sum", impl="reference").loss

    v = torch.randn(2, 3)
    z = hidden @ head.T
    torch.testing.assert_close(
        torch.func.vmap(loss)(z, labels, v), torch.stack([loss(*x) for x in zip(z, labels, v, strict=True)])
    )


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda w: w[:, :2], ValueError, r"weight has shape \(2, 2\) but labels \(2, 3\)"),
        (lambda w: w.fill_(torch.inf), ValueError, r"weights are not finite, first weight\[0, 1\] = inf"),
        (
            lambda w: w.index_fill_(1, torch.tensor(2), torch.nan),
            ValueError,
            r"2 of 6 weights are not finite.*\[0, 2\]",
        ),
        (lambda w: w.requires_grad_(), ValueError, r"weight requires grad.*weight.detach\(\)"),
        (lambda w: w.to(torch.complex64), TypeError, "weight must be real numbers"),
        (lambda w: w.to("meta"), ValueError, "weight is on meta but labels on cpu"),
        (lambda w: w.tolist(), TypeError, "weight must be a tensor like labels, not a list"),
    ],
)
def test_bad_weights_are_errors_before_any_work(wrong, error, message):
    labels = torch.tensor([[-100, 1, 2], [0, -100, 1]])
    logits, hidden, head = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(4, 5)

    class Refuses(torch.nn.Module):
        def hidden(self, batch):
            raise AssertionError("the model ran")

        head = torch.nn.Linear(5, 4)

    for call in (
        lambda w: gfast.unlearn_loss(logits, labels, GA(), weight=w),
        lambda w: gfast.linear_unlearn_loss(hidden, head, labels, GA(), weight=w),
        lambda w: gfast.model_loss(Refuses(), {"input_ids": labels, "labels": labels}, GA(), weight=w),
        lambda w: gfast.model_loss(Refuses(), {"input_ids": labels, "labels": labels, "weight": w}, GA()),
    ):
        with pytest.raises(error, match=message):
            call(wrong(torch.ones(2, 3)))


# over a model


@pytest.fixture(scope="module")
def setting():
    pytest.importorskip("transformers")
    from helpers.geffect_models import batches, tiny

    model = tiny("tied_llama", 2).eval()
    data = dict(forget=batches(1), retain=batches(2, rows=4, sizes=(1, 3)))
    weighted = {
        side: [{**b, "weight": drawn(b["labels"], 3 + i)} for i, b in enumerate(some)] for side, some in data.items()
    }
    return model, data, weighted


def model_truth(model, batch, objective, w):
    """``literal`` sums of a batch, over the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    ref = batch["ref_logp"][:, 1:] if "ref_logp" in batch else torch.zeros_like(logits[..., 0])
    return literal(objective, logp_of(logits, labels), ref, labels, w[:, 1:].double(), "sum")


def test_model_loss_aligns_it_with_labels(setting):
    model, data, _ = setting
    batch = data["forget"][0]
    w, parameters = drawn(batch["labels"]), list(model.parameters())
    count = int((batch["labels"][:, 1:] != -100).sum())
    for objective in (WGA(0.5), NPO(0.3)):
        value, surrogate, weight = model_truth(model, batch, objective, w)
        right = torch.autograd.grad(surrogate, parameters)
        for given in (dict(weight=w), {}):
            some = batch if given else {**batch, "weight": w}
            out = gfast.model_loss(model, some, objective, normalizer=count, **given)
            torch.testing.assert_close(out.loss.detach(), value / count)
            torch.testing.assert_close(out.weight[:, 1:], weight)
            for ours, exact in zip(torch.autograd.grad(out.loss, parameters), right, strict=True):
                torch.testing.assert_close(ours, exact / count, rtol=1e-8, atol=1e-12)
    whole = gfast.model_logp(model, {**batch, "weight": w})
    torch.testing.assert_close(whole, gfast.model_logp(model, batch))
    for objective in (KL(), RMU(layer=1)):
        with pytest.raises(ValueError, match="model_loss: the batch has a 'weight', and .* has no token weights"):
            gfast.model_loss(model, batch, objective, weight=w)


@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
def test_engines_weigh_the_objective_and_not_the_risk(setting, engine):
    model, data, weighted = setting
    objectives = [GA(), WGA(0.5), NPO(0.3)]
    effects = gfast.g_effect(model, objectives, engine=engine, **weighted)
    parameters, names = dict(model.named_parameters()), gfast.geffect.assign(model)
    counts = {side: sum(int((b["labels"][:, 1:] != -100).sum()) for b in some) for side, some in data.items()}
    texts = sum(int((b["labels"][:, 1:] != -100).any(1).sum()) for b in data["forget"])

    def gradient(side, objective, z, w=None):
        total = sum(
            model_truth(model, b, objective, torch.ones_like(b["labels"]) if w is None else w[i]["weight"])[1]
            for i, b in enumerate(data[side])
        )
        return dict(zip(parameters, torch.autograd.grad(total / z, list(parameters.values())), strict=True))

    risks = {side: gradient(side, NLL(), counts[side]) for side in data}
    for objective, effect in zip(objectives, effects, strict=True):
        z = texts if isinstance(objective, NPO) else counts["forget"]
        own = gradient("forget", objective, z, weighted["forget"])
        for side, found in (("forget", effect.unlearn), ("retain", effect.retain)):
            expected = dict.fromkeys(names.names, 0.0)
            for name, value in own.items():
                expected[names.names[names.index[name]]] += float((value * risks[side][name]).sum())
            assert found == pytest.approx(expected, rel=1e-7, abs=1e-10)


def test_effects_of_tokens_keep_it_and_those_of_samples_refuse_it(setting, tmp_path):
    model, data, weighted = setting
    tokens = gfast.token_effect(model, **weighted)
    for objective in (GA(), NPO(0.3)):
        found, right = tokens.g_effect(objective), gfast.g_effect(model, objective, **weighted)
        assert found.unlearn == pytest.approx(right.unlearn, rel=1e-7) and found.retain == pytest.approx(
            right.retain, rel=1e-7
        )
    tokens.to_parquet(tmp_path / "tokens.parquet")
    again = type(tokens).from_parquet(tmp_path / "tokens.parquet")
    torch.testing.assert_close(again.weights(WGA()), tokens.weights(WGA()))
    with pytest.raises(ValueError, match="these tokens have weights of their own"):
        tokens.samples()
    for call in (gfast.pg_effect, gfast.gram_effect):
        with pytest.raises(ValueError, match="the forget batches have a 'weight' of their tokens"):
            call(model, **weighted)
    mixed = [weighted["forget"][0], data["forget"][1]]
    with pytest.raises(ValueError, match="forget: batch 1 has no 'weight', and others have one"):
        gfast.g_effect(model, GA(), forget=mixed, retain=data["retain"])
    with pytest.raises(ValueError, match="g_effect: the batch has a 'weight'"):
        gfast.g_effect(model, RMU(layer=1), **weighted)


# data and training


def test_collated_per_token_and_per_sample():
    from gfast.data import Collator

    items = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "weight": [0, 0.5, 2]},
        {"input_ids": [4, 5], "labels": [4, 5], "weight": 3},
    ]
    assert Collator(0)(items)["weight"].tolist() == [[0, 0.5, 2], [3, 3, 0]]
    with pytest.raises(ValueError, match="item 1 of a batch has no weight"):
        Collator(0)([items[0], {"input_ids": [4, 5], "labels": [4, 5]}])
    with pytest.raises(ValueError, match=r"item 0 of a batch has 3 input_ids but a weight of shape \(2,\)"):
        Collator(0)([{**items[0], "weight": [1, 2]}])


def test_training_takes_the_column(tmp_path):
    from helpers.training_tiny import collator, config, datasets, tiny_model

    forget = datasets()[0]
    half = [{**forget[i], "weight": [0.5] * len(forget[i]["labels"])} for i in range(len(forget))]
    moved = {}
    for name, data, gamma in (("column", half, 1.0), ("factor", forget, 0.5)):
        model = tiny_model()
        args = config(
            tmp_path / name, optim="sgd", objective="WGA", objective_args=["alpha=0.5"], gamma=gamma, max_steps=2
        )
        gfast.UnlearnTrainer(model, args, train_dataset=data, data_collator=collator()).train()
        moved[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(moved["column"], moved["factor"], rtol=1e-5, atol=1e-7)


def test_retain_conflict_is_the_formula(setting):
    from gfast.geffect import conflict_weights, retain_conflict

    model, data, weighted = setting
    parameters = list(model.parameters())

    def gradients(batch):
        """Of every label token's log p, in order."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        for value in logp_of(logits, labels)[labels != -100]:
            some = torch.autograd.grad(value, parameters, retain_graph=True)
            yield torch.cat([g.flatten() for g in some])

    retain = torch.stack([g for batch in data["retain"] for g in gradients(batch)])
    risk = -retain.mean(0)  # the gradient of R(D_r), a mean over all its tokens
    effects = torch.stack([g @ risk for batch in data["forget"] for g in gradients(batch)])
    expected = torch.exp(effects.clamp(max=0) / (0.7 * effects.square().mean().sqrt()))
    found = retain_conflict(model, tau=0.7, **weighted)
    assert [w.shape for w in found] == [batch["labels"].shape for batch in data["forget"]]
    valid = [torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (1, 0)) for batch in data["forget"]]
    picked = torch.cat([w[v] for w, v in zip(found, valid, strict=True)])
    torch.testing.assert_close(picked.double(), expected, rtol=1e-5, atol=1e-6)
    assert all((w[~v] == 1).all() for w, v in zip(found, valid, strict=True)) and 0 < float(picked.min()) < 0.9
    assert conflict_weights([torch.zeros(3)])[0].tolist() == [1, 1, 1] and conflict_weights([]) == []
    for wrong in (dict(tau=0.0), dict(effects=[torch.tensor([torch.nan])])):
        with pytest.raises(ValueError, match="retain_conflict"):
            conflict_weights(**{"effects": [torch.ones(2)], **wrong})


def test_training_by_retain_conflict(tmp_path):
    """Two steps with weights measured before each, and before the first only, against a loop written out."""
    from helpers.training_tiny import config, copied, pairing, tiny_model

    from gfast.geffect import retain_conflict

    start = tiny_model()
    data, collate = pairing()
    given = dict(objective="WGA", retain_term="nll", weights="retain_conflict", weights_tau=0.5)
    for every in (1, 2):
        model, expected = copied(start), copied(start)
        args = config(
            tmp_path / str(every),
            optim="sgd",
            per_device_train_batch_size=len(data),
            max_steps=2,
            weights_every=every,
            **given,
        )
        gfast.UnlearnTrainer(model, args, train_dataset=data, data_collator=collate).train()
        for step in range(2):
            data.set_epoch(step)
            batch = collate([data[i] for i in range(len(data))])
            if step % every == 0:
                (weight,) = retain_conflict(expected, forget=batch["forget"], retain=batch["retain"], tau=0.5)
            forget = gfast.model_loss(expected, batch["forget"], WGA(), weight=weight).loss
            (forget + gfast.model_loss(expected, batch["retain"], NLL()).loss).backward()
            with torch.no_grad():
                for p in expected.parameters():
                    p -= args.learning_rate * p.grad
                    p.grad = None
        for ours, right in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="weights='retain_conflict' is for objectives over the forget answers"):
        gfast.UnlearnTrainer(model, config(tmp_path / "x", **given | dict(objective="PO")), train_dataset=data)
    with pytest.raises(ValueError, match="train on gfast.data.ForgetRetain"):
        args = config(tmp_path / "y", **given | dict(retain_term="none"))
        gfast.UnlearnTrainer(model, args, train_dataset=data.forget, data_collator=collate.forget).train()


def test_live_effects_are_of_the_weighted_objective(tmp_path):
    """With weights GA is not minus the risk, and a weighted retain NLL is not the risk either."""
    from helpers.training_tiny import config, copied, pairing, tiny_model

    data, collate = pairing()
    items = [data[i] for i in range(len(data))]
    for number, item in enumerate(items):
        for side in item.values():
            side["weight"] = [0.1 * (number + k % 5) for k in range(len(side["labels"]))]
    model = tiny_model()
    batch = collate(items)
    expected = gfast.g_effect(copied(model), GA(), forget=batch["forget"], retain=batch["retain"])
    args = config(
        tmp_path,
        objective="GA",
        retain_term="nll",
        per_device_train_batch_size=len(items),
        geffect_live=True,
        geffect_live_unlearn=True,
        max_steps=1,
    )
    trainer = gfast.UnlearnTrainer(model, args, train_dataset=items, data_collator=collate)
    trainer.train()
    latest = trainer.live.latest
    assert latest["retain"] == pytest.approx(expected.total("retain"), rel=1e-3)
    assert latest["nll/retain"] == pytest.approx(expected.risks["retain"], rel=1e-4)
    assert latest["unlearn"] == pytest.approx(expected.total("unlearn"), rel=1e-3)
