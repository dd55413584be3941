"""Rotary embeddings that the longest text of a batch stretches for all: measured as alone, or refused by name."""

from functools import partial

import pytest
import torch
from helpers.small_models import stretching
from helpers.training_tiny import config

import gfast
from gfast.data import Collator
from gfast.evaluation.generation import generate
from gfast.evaluation.samples import Sample
from gfast.evaluation.scoring import score
from gfast.objectives import GA, NPO
from gfast.training import NLLCallback
from gfast.training.evaluation import nll


def texts(*lengths):
    draws = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 50, (length,), generator=draws) for length in lengths]
    return [{"input_ids": one, "labels": one} for one in ids]


def cut(data, size, multiple=1):
    collate = Collator(0, pad_to_multiple_of=multiple)
    return [collate(data[start : start + size]) for start in range(0, len(data), size)]


def effect(model, batches, engine):
    if engine == "gram_effect":
        return sum(float(m.sum()) for m in gfast.gram_effect(model, forget=batches, retain=batches).matrix.values())
    if engine == "nll":
        return nll(model, batches)
    return gfast.g_effect(model, GA(), forget=batches, retain=batches, engine=engine).total("unlearn")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram_effect", "nll"])
def test_the_cut_into_batches_changes_nothing_or_is_refused(kind, engine):
    """Effects were -17.9, -18.5 and -17.2 in batches of 1, 2 and 8."""
    model, data = stretching(kind), texts(30, 8, 12, 30)
    measured = partial(effect, model, engine=engine)
    found = [measured(batches) for batches in (cut(data, 1), cut([data[0], data[3], data[1], data[2]], 2))]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for size in (2, 4):
        with pytest.raises(ValueError, match=r"texts of 8 beside 30 tokens.*beyond 20.*max_length=20.*=31 or more"):
            measured(cut(data, size))
    padded = [measured(cut(data, size, multiple=40)) for size in (1, 2, 4)]
    assert padded == [pytest.approx(padded[0], rel=1e-5)] * 3 and padded[0] != pytest.approx(found[0], rel=1e-5)
    if kind == "dynamic":  # which stay as the longest has made them
        one, other = cut(texts(30), 1), cut(texts(25), 1)
        if engine != "nll":
            with pytest.raises(ValueError, match="batches have texts of 25 beside 30 tokens"):
                measured([*one, *other])
        alone = effect(stretching(kind), other, engine)
        model(**one[0])
        seen = model(**other[0]).logits
        assert measured(other) == pytest.approx(alone, rel=1e-6)
        assert torch.equal(model(**other[0]).logits, seen)  # and a training goes on as it was


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_packed_texts_are_held_to_the_longest_of_their_row(kind):
    model = stretching(kind)
    packed = [texts(30)[0], texts(30, 8)[1]]
    ids = torch.cat([one["input_ids"] for one in packed])[None]
    positions = torch.cat([torch.arange(len(one["input_ids"])) for one in packed])[None]
    batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
    with pytest.raises(ValueError, match="texts of 8 beside 30 tokens"):
        effect(model, [batch], "stream")
    within = {key: torch.cat([value[:, :15], value[:, 30:]], 1) for key, value in batch.items()}
    place = (within["position_ids"] == 0).cumsum(1)
    within["attention_mask"] = ((place[..., None] == place[:, None]) & torch.ones(23, 23).tril().bool())[:, None]
    expected = [{"input_ids": one, "labels": one} for one in (ids[:, :15], ids[:, 30:])]
    assert effect(model, [within], "stream") == pytest.approx(effect(model, expected, "stream"), rel=1e-5)
    assert gfast.model_loss(model, batch, NPO(), ref_logp=torch.zeros(ids.shape)).loss.isfinite()  # a training's own


def test_a_callback_refuses_before_it_measures():
    batches = cut(texts(30, 8), 2)
    callback = NLLCallback(1, batches, batches, label="NLL")
    with pytest.raises(ValueError, match="a batch of the unlearn data has texts of 8 beside 30"):
        callback._measure(None, None, stretching("longrope"))


def test_a_trainer_says_that_its_evaluation_is_of_its_batches(tmp_path, caplog):
    model = stretching("longrope")
    trainer = gfast.UnlearnTrainer(model, config(tmp_path))
    for lengths, said in (((8, 8), 0), ((30, 8), 1), ((30, 8), 1)):
        (batch,) = cut(texts(*lengths), 2)
        found, *_ = trainer.prediction_step(model, batch, prediction_loss_only=True)
        assert found.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
        assert sum("texts of 8 beside 30" in one and "batches as they are" in one for one in caplog.messages) == said


def test_evaluations_find_dynamic_embeddings_afresh():
    """They stayed as a longer text had made them: that of 25 had the numbers of one of 30 tokens."""
    rows = [tuple(one["input_ids"].tolist()) for one in texts(30, 25)]
    samples = [Sample(0, "", "", ((ids, ids),), {"gt": (0,)}) for ids in rows]
    fresh, used = stretching("dynamic"), stretching("dynamic")
    alone = [score(stretching("dynamic"), [sample], 0)[0][0].logp for sample in samples]
    found = [scored[0].logp for scored in score(fresh, samples, 0)]
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    used(torch.tensor([[3] * 99]))
    assert generate(used, [rows[1]], 4, [], 0) == generate(stretching("dynamic"), [rows[1]], 4, [], 0)
