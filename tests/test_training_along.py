"""geffect_every and nll_every of UnlearnConfig, without callbacks of one's own."""

from __future__ import annotations

import pytest
from helpers.training_tiny import collator, config, datasets, pairing, tiny_model

from gfast.data import batches
from gfast.objectives import KL, NPO, Mix
from gfast.training.callback import GEffectCallback
from gfast.training.records import read_records
from gfast.training.reference import ReferenceCache
from gfast.training.trainer import UnlearnTrainer
from gfast.training.trajectory import NLLCallback

ASKED = {"geffect_every": 2, "nll_every": 1, "geffect_samples": 3, "max_steps": 3, "per_device_eval_batch_size": 2}


def trained(folder, model=None, kind="qa", callbacks=None, **options):
    data, collate = pairing(kind)
    references = options.pop("references", None)
    args = config(folder, **options)
    given = dict(train_dataset=data, data_collator=collate, references=references, callbacks=callbacks)
    UnlearnTrainer(model or tiny_model(), args, **given).train()
    frame = read_records(folder).drop(columns="run")
    return frame.sort_values([name for name in frame.columns if name != "value"]).reset_index(drop=True)


@pytest.mark.parametrize("retain_term", ["none", "kl"])
def test_the_configuration_alone_measures_what_callbacks_do(tmp_path, retain_term):
    model, data = tiny_model(), datasets()
    caches = {"forget": ReferenceCache.build(model, data[0], collator(), what={"logp"}, batch_size=2)}
    if retain_term == "kl":
        caches["retain"] = ReferenceCache.build(model, data[1], collator(), what={"hidden"}, batch_size=2)
    settings = {"objective": "NPO", "retain_term": retain_term, "references": caches}
    found = trained(tmp_path / "asked", **settings, **ASKED)

    few = [[side[i] for i in range(3)] for side in data]
    forget, retain = (batches(side, collator(), 2) for side in few)
    for side, some in (("forget", forget), ("retain", retain)):
        for batch in some:
            if side in caches:
                mask = batch["attention_mask"]
                batch |= caches[side].join(batch["sample_id"], mask.sum(1), mask.shape[1]) | caches[side].head
    objective = Mix(NPO(), KL()) if retain_term == "kl" else NPO()
    name = str(objective)
    own = [
        GEffectCallback(2, forget, retain, objective, norms=True, label=name),
        NLLCallback(1, forget, retain, label=name),
    ]
    settings["references"] = caches
    right = trained(tmp_path / "given", callbacks=own, max_steps=3, **settings)
    assert set(found["quantity"]) >= {"g_effect", "cosine", "risk", "loss"}
    assert set(found[found["quantity"] == "g_effect"]["step"]) == {0, 2, 3}
    assert set(found[found["quantity"] == "risk"]["step"]) == {0, 1, 2, 3}
    assert found.equals(right)


@pytest.mark.parametrize(("objective", "retain_term"), [("NPO", "none"), ("NPO", "kl"), ("SHRED", "none")])
def test_adapters_are_measured_with_their_own_original(tmp_path, objective, retain_term):
    peft = pytest.importorskip("peft")

    def adapted():
        return peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))

    settings = {"objective": objective, "retain_term": retain_term, **ASKED}
    found = trained(tmp_path / "run", adapted(), **settings)
    model, (forget, _) = adapted(), datasets()
    cache = {"forget": ReferenceCache.build(model, forget, collator(), what={"logp"}, batch_size=2)}
    right = trained(tmp_path / "cached", model, references=cache, **settings)
    assert found["value"].to_numpy() == pytest.approx(right["value"].to_numpy(), rel=1e-4, abs=1e-6)
    assert (found[found["quantity"] == "g_effect"]["value"] != 0).any()


@pytest.mark.parametrize(("objective", "retain_term"), [("NPO", "none"), ("WGA", "kl")])
def test_what_the_original_is_reaches_the_measurement(tmp_path, objective, retain_term):
    """Adapters that have been unlearning, at the start of another run."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    settings = {"objective": objective, "retain_term": retain_term, **ASKED}
    with pytest.raises(ValueError, match="adapters are not zero"):
        trained(tmp_path / "auto", model, **settings)
    found = trained(tmp_path / "base", model, reference="base", **settings)
    assert set(found[found["quantity"] == "g_effect"]["step"]) == {0, 2, 3}


def test_an_nll_alone_takes_no_reference(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setattr(ReferenceCache, "build", lambda *_, **__: pytest.fail("a reference was built"))
    assert "risk" in set(trained(tmp_path, model, objective="NPO", nll_every=1)["quantity"])


def test_what_is_not_known_is_asked_for(tmp_path):
    forget, retain = (batches(side, collator(), 2) for side in datasets())
    with pytest.raises(ValueError, match=r"geffect_every is 2.*DPO.*callbacks=\[GEffectCallback\(2, "):
        trained(tmp_path, kind="pairs", objective="DPO", geffect_every=2)
    with pytest.raises(ValueError, match=r"nll_every is 1.*GEffectCallback has batches of its own.*NLLCallback\(1, "):
        trained(tmp_path, callbacks=[GEffectCallback(1, forget, retain, NPO())], nll_every=1)
    args = config(tmp_path, nll_every=1)
    with pytest.raises(ValueError, match="the training data are no ForgetRetain"):
        UnlearnTrainer(tiny_model(), args, train_dataset=datasets()[0], data_collator=collator())
    UnlearnTrainer(tiny_model(), args, data_collator=collator())  # which evaluates only
    with pytest.raises(ValueError, match="geffect_samples is 3, and has no effect without --geffect_every"):
        config(tmp_path, geffect_samples=3)
