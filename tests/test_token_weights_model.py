"""weight= over models, in the engines and in training."""

from __future__ import annotations

import pytest
import torch
from helpers.weights import drawn, literal, logp_of

import gfast
from gfast.objectives import GA, KL, NLL, NPO, RMU, WGA


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
    loader = torch.utils.data.DataLoader(weighted["forget"], batch_size=None, shuffle=True)
    with pytest.raises(ValueError, match="retain_conflict: the forget DataLoader shuffles"):
        retain_conflict(model, forget=loader, retain=weighted["retain"])


def test_training_by_retain_conflict(tmp_path):
    """Two steps with weights measured before each, and before the first only, against a loop written out."""
    from helpers.training_tiny import config, copied, pairing, tiny_model

    from gfast.data import ForgetRetain
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
    with pytest.raises(
        ValueError, match="geffect_every measures the objective as it is, and weights='retain_conflict'"
    ):
        config(tmp_path / "x", geffect_every=1, **given)
    with pytest.raises(ValueError, match="weights='retain_conflict' is for objectives over the forget answers"):
        gfast.UnlearnTrainer(model, config(tmp_path / "x", **given | dict(objective="PO")), train_dataset=data)
    with pytest.raises(ValueError, match="train on gfast.data.ForgetRetain"):
        args = config(tmp_path / "y", **given | dict(retain_term="none"))
        gfast.UnlearnTrainer(model, args, train_dataset=data.forget, data_collator=collate.forget).train()
    twice = ForgetRetain([*data.forget, {**data.forget[0], "sample_id": 3}], data.retain)
    with pytest.raises(ValueError, match="two samples of the forget data have the sample_id 3"):
        args = config(tmp_path / "z", **given)
        gfast.UnlearnTrainer(model, args, train_dataset=twice, data_collator=collate).train()


def test_a_run_by_retain_conflict_goes_on_with_the_weights_that_it_had(tmp_path):
    """From a checkpoint between two measurements."""
    from helpers.training_tiny import config, pairing, tiny_model

    def run(folder, steps, **options):
        data, collate = pairing()
        args = config(
            tmp_path / folder, objective="WGA", retain_term="nll", max_steps=steps, save_strategy="steps", save_steps=3,
            lr_scheduler_type="constant", **options,
        )  # fmt: skip
        trainer = gfast.UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate)
        trainer.train(resume_from_checkpoint=True)
        return trainer

    weighted = dict(weights="retain_conflict", weights_every=2, weights_tau=0.5)
    whole = run("whole", 5, **weighted)
    run("parts", 3, **weighted)
    resumed = run("parts", 5, **weighted)
    for ours, right in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, right)
    run("other", 3)
    with pytest.raises(ValueError, match="has no conflict_weights.safetensors, the weights by retain conflict"):
        run("other", 5, **weighted)


@pytest.mark.parametrize("objective", [GA(), WGA()])
def test_live_effects_beside_the_models_own_terms(tmp_path, objective):
    """The risk is the NLL alone, though the losses of both sides have the balance of experts in them."""
    from helpers.training_tiny import TOKENIZER, config, copied, pairing
    from transformers import MixtralConfig, MixtralForCausalLM

    data, collate = pairing()
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_local_experts=4, vocab_size=len(TOKENIZER)
    )
    heads = dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, experts_implementation="eager")
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, output_router_logits=True, router_aux_loss_coef=5.0))
    batch, twin = collate([data[i] for i in range(len(data))]), copied(model).train()

    def gradient(side, one, own_terms):
        loss = gfast.model_loss(twin, batch[side], one, own_terms=own_terms).loss
        found = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
        return loss, torch.cat([torch.zeros(p.numel()) if g is None else g.flatten()
                                for p, g in zip(twin.parameters(), found, strict=True)]).double()  # fmt: skip

    _, step = gradient("forget", objective, 1.0)
    risks = {side: gradient(where, NLL(), 0.0) for side, where in (("unlearn", "forget"), ("retain", "retain"))}
    args = config(tmp_path, objective=str(objective), retain_term="nll", per_device_train_batch_size=len(data),
                  max_steps=1, geffect_live_unlearn=True, own_loss_terms=True)  # fmt: skip
    trainer = gfast.UnlearnTrainer(model, args, train_dataset=data, data_collator=collate)
    trainer.train()
    for side, (risk, gradient_of_risk) in risks.items():
        assert trainer.live.latest[f"nll/{side}"] == pytest.approx(float(risk.detach()), rel=1e-5)
        assert trainer.live.latest[side] == pytest.approx(float(step @ gradient_of_risk), rel=1e-4)


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
