"""Caches and directions belong to a model's settings, not to its weights alone."""

from __future__ import annotations

import copy

import pytest
from helpers.geffect_models import batches
from helpers.training_tiny import collator, datasets, tiny_model

import gfast
from gfast.model_settings import difference, settings_of
from gfast.objectives import WGA


def changed(model, **settings):
    """The same weights under another configuration."""
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    other = type(model)(config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    return other


def slower_rope(model):
    name = "rope_parameters" if hasattr(model.config, "rope_parameters") else "rope_theta"
    value = {**model.config.rope_parameters, "rope_theta": 500.0} if name == "rope_parameters" else 500.0
    return changed(model, **{name: value})


@pytest.mark.parametrize("change", [slower_rope, lambda model: changed(model, rms_norm_eps=0.1)], ids=["rope", "eps"])
def test_other_settings_are_named(tmp_path, change):
    model, data, name = tiny_model(), datasets()[0], "rope_theta|rms_norm_eps"
    path = tmp_path / "cache"
    gfast.ReferenceCache.build(model, data, collator(), path)
    gfast.ReferenceCache.load(path, model=model)
    with pytest.raises(ValueError, match=rf"other settings: .*({name}) was .* and is"):
        gfast.ReferenceCache.load(path, model=change(model))
    sets = dict(forget=batches(1), retain=batches(2))
    directions = gfast.risk_gradients(model, **sets)
    directions.save(tmp_path / "directions")
    for given in (directions, gfast.Directions.load(tmp_path / "directions")):
        gfast.g_effect(model, WGA(), **sets, directions=given)
        with pytest.raises(ValueError, match=rf"other settings of the model: .*({name})"):
            gfast.g_effect(change(model), WGA(), **sets, directions=given)


def test_settings_that_change_no_answer_are_passed_by():
    model = tiny_model()
    there = settings_of(model)
    other = dict(attention_dropout=0.5, pad_token_id=3, use_cache=False, initializer_range=1.0, _name_or_path="x")
    assert difference(there, settings_of(changed(model, **other))) is None
    assert there  # something is looked at
    assert difference(None, there) is None


def test_adapters_that_count_more(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(alpha: float):
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model(), config)

    one, two = adapted(8), adapted(16)
    two.load_state_dict(one.state_dict())
    path = tmp_path / "cache"
    gfast.ReferenceCache.build(one, datasets()[0], collator(), path, reference="adapted")
    with pytest.raises(ValueError, match=r"the scaling of adapter default was \[4.0\] and is \[8.0\]"):
        gfast.ReferenceCache.load(path, model=two, adapted=True)
    sets = dict(forget=batches(1), retain=batches(2))
    with pytest.raises(ValueError, match="the scaling of adapter default"):
        gfast.g_effect(two, WGA(), **sets, directions=gfast.risk_gradients(one, **sets))
    two.load_state_dict(one.state_dict())
    for model in (one, two):
        model.add_adapter("other", model.peft_config["default"])
    path.unlink()
    gfast.ReferenceCache.build(one, datasets()[0], collator(), path, reference="adapted")
    directions = gfast.risk_gradients(one, **sets)
    for change, on in ((lambda: one.set_adapter("other"), "other"), (one.base_model.disable_adapter_layers, "")):
        change()
        for parameter in one.parameters():
            parameter.requires_grad_(True)
        with pytest.raises(ValueError, match=rf"adapters that are on was \['default'\] and is \['?{on}'?\]"):
            gfast.ReferenceCache.load(path, model=one, adapted=True)
        with pytest.raises(ValueError, match="directions"):
            gfast.g_effect(one, WGA(), **sets, directions=directions)
    off = tmp_path / "off"
    gfast.ReferenceCache.build(tiny_model(), datasets()[0], collator(), off)
    gfast.ReferenceCache.load(off, model=two)  # off, they do not count
