"""Adapters over quantised weights: losses, gradients and effects are those of the quantised model itself."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers.training_tiny import collator, datasets, tiny_model

import gfast
from gfast.objectives import GA, NPO

KINDS = ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8")


def quantised(kind, folder):
    """A small Llama, quantised, with adapters that are not zero; the model and the reason why there is none."""
    peft = pytest.importorskip("peft")
    package = kind.split()[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)  # 4-bit: by 32
    tiny_model(**sizes).save_pretrained(folder)
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        config = transformers.BitsAndBytesConfig(**{"load_in_4bit" if "4" in kind else "load_in_8bit": True})
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        )
    except (RuntimeError, ImportError, ValueError) as error:
        pytest.skip(f"{kind} does not load here: {error}")
    torch.manual_seed(1)
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    # There is no dropout. 8-bit products differ between modes; in eval mode a plain forward would pack 4-bit weights.
    return peft.get_peft_model(model, adapters).train(mode="4-bit" in kind)


def plain(model, batch):
    """Sums of log p by row, and the number of labels, from the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    logp = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != -100, logp, 0.0).sum(1), int((labels != -100).sum())


def gradients(model, loss):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_and_an_effect_over_quantised_weights(tmp_path, kind):
    model = quantised(kind, tmp_path)
    forget, retain = (collator()([data[i] for i in range(2)]) for data in datasets())
    with model.disable_adapter(), torch.no_grad():
        original, _ = plain(model, forget)
    sums, _ = plain(model, forget)
    expected = (-2 / 0.1 * torch.nn.functional.logsigmoid(-0.1 * (sums - original))).mean()
    found = gfast.model_loss(model, forget, NPO(0.1), reference="base").loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))
    effect = gfast.g_effect(model, GA(), forget=[forget], retain=[retain])
    own, other = (gradients(model, -sums.sum() / count) for sums, count in (plain(model, forget), plain(model, retain)))
    dot = -sum(float((own[name].double() * other[name].double()).sum()) for name in own)
    assert effect.total("retain") == pytest.approx(dot, rel=1e-3)


def test_weights_packed_for_inference_are_refused(tmp_path):
    model = quantised("bitsandbytes 4-bit", tmp_path).eval()
    batch = collator()([datasets()[0][0]])
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    states = [getattr(getattr(m, "weight", None), "quant_state", None) for m in model.modules()]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes packs no weights on this machine")
    with pytest.raises(ValueError, match="packed by bitsandbytes for inference"):
        gfast.model_loss(model, batch, GA())
