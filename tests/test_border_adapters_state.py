"""Adapters whose state decides what the model, its original and its fingerprint are: on, off, merged, learned."""

from __future__ import annotations

import pytest
import torch
from helpers.border import DATA, adapted
from helpers.geffect_models import tiny

import gfast
from gfast import peft_models
from gfast.objectives import NPO


def start(model, values: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=values)


def zero_here(kind):
    """Adapters that have learned, but nothing that a batch of ``DATA`` shows; and what of the batch shows it."""
    peft = pytest.importorskip("peft")
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    ids = batch["input_ids"]
    token = min(set(range(ids.max() + 2)) - set(ids.flatten().tolist()))
    options = dict(r=2, task_type="CAUSAL_LM")
    if kind == "tokens":
        config = peft.LoraConfig(**options, target_modules=["q_proj"], trainable_token_indices=[token])
    elif kind == "embeddings":
        config = peft.LoraConfig(**options, target_modules=["embed_tokens"])
    elif kind == "phrase":
        if "alora_invocation_tokens" not in peft.LoraConfig.__dataclass_fields__:
            pytest.skip("this version of peft has no activated LoRA")
        config = peft.LoraConfig(**options, target_modules=["q_proj"], alora_invocation_tokens=[token])
    else:
        config = peft.LoraConfig(**options, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny("llama"), config).eval()
    shown = {"input_ids": torch.full_like(ids, token)}
    if kind == "rows":
        model.add_adapter("two", config)
        shown = {"adapter_names": ["two"] * len(ids)}
        batch["adapter_names"] = ["__base__"] * len(ids)
    elif kind == "off":
        shown = None

    def teach():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter += 0.5
                if "lora_embedding_A" in name:
                    parameter[:, token] += 0.5
                if "lora_B" in name and kind not in ("tokens", "embeddings"):
                    parameter.normal_(std=0.5)

    return model, batch, shown, teach


@pytest.mark.parametrize("kind", ["tokens", "embeddings", "phrase", "rows", "off"])
def test_what_adapters_have_learned_is_seen_where_a_batch_does_not_show_it(kind):
    """Tokens that are not in it, a phrase that it lacks, other adapters for its rows, adapters that are off."""
    for taught in (True, False):
        model, batch, shown, teach = zero_here(kind)
        if taught:
            teach()
        if kind == "off":
            with model.disable_adapter():
                gfast.model_loss(model, batch, NPO())
        elif not taught or kind == "rows":
            gfast.model_loss(model, batch, NPO())
        else:
            with pytest.raises(ValueError, match="adapters are not zero"):
                gfast.model_loss(model, batch, NPO())
        if taught:
            with pytest.raises(ValueError, match="adapters are not zero"):
                gfast.model_loss(model, batch | (shown or {}), NPO())
        else:
            gfast.model_loss(model, batch | (shown or {}), NPO())
            teach()  # as training does
            gfast.model_loss(model, batch | (shown or {}), NPO())


def test_the_original_of_rows_with_their_own_adapters_is_not_one_of_them():
    model = adapted(init_lora_weights=False)
    model.add_adapter("ref", model.peft_config["default"])
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    gfast.model_loss(model, batch, NPO(), reference="adapter:ref")
    names = ["default"] * len(batch["input_ids"])
    with pytest.raises(ValueError, match="the batch has 'adapter_names'"):
        gfast.model_loss(model, batch | {"adapter_names": names}, NPO(), reference="adapter:ref")


def test_merged_adapters_stay_merged():
    """PEFT takes them out to switch them off, and leaves them out: another model, where others are active."""
    model = adapted(init_lora_weights=False)
    model.add_adapter("two", model.peft_config["default"])
    start(model, 0.5)
    model.requires_grad_(False)
    model.merge_adapter(["two"])
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    expected = gfast.model_logp(model, batch)
    for reference in ("base", "adapter:two"):
        with pytest.raises(ValueError, match="have been merged into .*q_proj.*unmerge_adapter"):
            gfast.model_loss(model, batch, NPO(), reference=reference)
    with pytest.raises(ValueError, match=r"\['two'\] are merged already.* \['default'\]"):
        peft_models.merged(model)
    torch.testing.assert_close(gfast.model_logp(model, batch), expected, rtol=0, atol=0)
    model.set_adapter("two")
    model.merge_adapter(["two"])
    torch.testing.assert_close(gfast.model_logp(peft_models.merged(model), batch), expected)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_adapters_around_trained_tokens_are_merged_or_refused(kind):
    peft = pytest.importorskip("peft")
    try:
        config = peft.LoraConfig(
            target_modules=["lm_head"], r=2, trainable_token_indices=[3, 5], init_lora_weights=False
        )
    except TypeError:
        pytest.skip("this version of PEFT has no trained tokens")
    model = peft.get_peft_model(tiny("tied_llama" if kind == "tied" else "llama"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.5
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    expected = gfast.model_logp(model, batch)
    if kind == "tied":
        with pytest.raises(ValueError, match="of 'base_model.model.lm_head' lie around others"):
            peft_models.merged(model)
    else:
        torch.testing.assert_close(gfast.model_logp(peft_models.merged(model), batch), expected)


@pytest.mark.parametrize("kind", ["tokens", "adalora", "mixed", "saved head"])
def test_the_fingerprint_of_a_model_with_adapters_is_its_bases(kind):
    peft = pytest.importorskip("peft")
    from gfast.training.fingerprints import model_fingerprint

    base = tiny("tied_llama" if kind == "tokens" else "llama")
    expected, options = model_fingerprint(base), dict(target_modules=["q_proj"], r=2)
    config = {
        "tokens": lambda: peft.LoraConfig(**options, trainable_token_indices=[3, 5]),
        "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], init_r=3, target_r=2, total_step=9),
        "mixed": lambda: peft.LoraConfig(**options),
        "saved head": lambda: peft.LoraConfig(**options, modules_to_save=["lm_head"]),
    }[kind]
    model = peft.get_peft_model(base, config(), mixed=kind == "mixed")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    assert model_fingerprint(model) == expected
    assert model_fingerprint(model, adapters=True) != expected
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "down_proj" in name).add_(1e-3)
    assert model_fingerprint(model) != expected


@pytest.mark.parametrize("kind", ["norm", "saved norm", "two at once"])
def test_a_run_goes_on_only_from_a_checkpoint_that_has_all_that_is_trained(kind, tmp_path, caplog):
    """PEFT saves adapters alone, and Trainer loads one of them."""
    from helpers.training_tiny import config, pairing, tiny_model

    from gfast.training import UnlearnTrainer

    peft = pytest.importorskip("peft")
    data, collate = pairing()

    def trained(steps, resume=None):
        more = {"modules_to_save": ["norm"]} if kind == "saved norm" else {}
        settings = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", **more)
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny_model(), settings)
        if kind == "norm":
            model.base_model.model.model.norm.weight.requires_grad_(True)
        if kind == "two at once":
            model.add_adapter("two", settings)
            model.base_model.set_adapter(["default", "two"])
        args = config(tmp_path, objective="GA", max_steps=steps, save_strategy="steps", save_steps=1)
        UnlearnTrainer(model, args, train_dataset=data, data_collator=collate).train(resume_from_checkpoint=resume)
        return model

    whole = trained(2)
    assert ("norm.weight' is trained beside the adapters" in caplog.text) == (kind == "norm")
    checkpoint = str(tmp_path / "checkpoint-1")
    if kind == "saved norm":
        again = dict(trained(2, checkpoint).named_parameters())
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(again[name], parameter, rtol=0, atol=0)
    else:
        message = {
            "norm": "norm.weight' is trained beside",
            "two at once": r"\['default', 'two'\] are trained together",
        }
        with pytest.raises(ValueError, match=message[kind]):
            trained(2, checkpoint)
