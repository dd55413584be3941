"""A function of log-probs is an objective: in the losses, in every engine, in token effects and in the trainer."""

from __future__ import annotations

import pytest
import torch
from helpers.training_tiny import collator, config, datasets, tiny_model

import gfast
from gfast.data import batches
from gfast.objectives import GA, NLL, WGA, Mix, Weights

FORGET, RETAIN = datasets()


def squared(logp, ref_logp, sequence_id):
    """WGA(alpha=2.0), written as a user would."""
    return torch.exp(2 * logp)


def against_reference(logp, ref_logp, sequence_id):
    return torch.sigmoid(logp - ref_logp)


@pytest.fixture(scope="module")
def setting():
    model = tiny_model()
    data = {name: batches(rows, collator(), 3) for name, rows in (("forget", FORGET), ("retain", RETAIN))}
    return model, data


def equal(one, other):
    for side in ("unlearn", "retain"):
        torch.testing.assert_close(getattr(one, side), getattr(other, side), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
def test_every_engine_takes_a_function(setting, engine):
    model, data = setting
    equal(
        gfast.g_effect(model, squared, engine=engine, **data),
        gfast.g_effect(model, WGA(alpha=2.0), engine=engine, **data),
    )


def test_token_effects_give_it(setting):
    model, data = setting
    tokens = gfast.token_effect(model, **data)
    equal(tokens.g_effect(squared), tokens.g_effect(WGA(alpha=2.0)))
    equal(tokens.g_effect(squared), gfast.g_effect(model, squared, **data))


def test_in_a_list_and_a_mix(setting):
    model, data = setting
    effects = gfast.g_effect(model, [squared, GA(), Mix(squared, NLL(), alpha=0.5)], **data)
    wanted = gfast.g_effect(model, [WGA(alpha=2.0), GA(), Mix(WGA(alpha=2.0), NLL(), alpha=0.5)], **data)
    for one, other in zip(effects, wanted, strict=True):
        equal(one, other)
    assert [effect.objective for effect in effects] == ["Weights(squared)", "GA()", "Weights(squared) + 0.5 NLL()"]


def test_it_reads_the_reference_where_a_batch_has_one(setting):
    model, data = setting
    with torch.no_grad():
        marked = [{**batch, "ref_logp": gfast.model_logp(model, batch) + 0.3} for batch in data["forget"]]
    effect = gfast.g_effect(model, against_reference, forget=marked, retain=data["retain"])
    share = float(torch.sigmoid(torch.tensor(-0.3)))
    plain = gfast.g_effect(model, GA(), **data)
    assert effect.total("unlearn") == pytest.approx(share * plain.total("unlearn"), rel=1e-5)


def test_the_trainer_takes_it(tmp_path):
    weights = {}
    for name, objective in (("own", squared), ("built in", WGA(alpha=2.0))):
        model, args = tiny_model(), config(tmp_path / name, max_steps=2)
        gfast.UnlearnTrainer(model, args, objective=objective, train_dataset=FORGET, data_collator=collator()).train()
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights["own"], weights["built in"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [GA, 3, None, "ga"])
def test_what_is_no_objective_is_refused(setting, wrong):
    model, data = setting
    with pytest.raises(ValueError, match="an objective of gfast.objectives is needed"):
        gfast.g_effect(model, [wrong], **data)


def test_a_wrong_shape_is_named(setting):
    model, data = setting
    with pytest.raises(ValueError, match="returned shape"):
        gfast.g_effect(model, lambda logp, ref_logp, sequence_id: logp.new_ones(1), engine="token", **data)


def test_equal_functions_are_equal_objectives():
    assert Weights(squared) == Weights(squared) != Weights(against_reference)
