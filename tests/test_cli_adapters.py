"""Adapters on the command line: measured later, compared with, gone on with; and models with code of their own."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.cli import fails, flags
from helpers.training_tiny import FORGET_ROWS, RETAIN_ROWS, TOKENIZER, collator, tiny_model
from safetensors.torch import load_file

import gfast
from gfast import cli
from gfast.data import QADataset
from gfast.model_output import model_logp
from gfast.objectives import GA, NPO
from gfast.training.records import read_records, recorded_steps


@pytest.fixture(scope="module")
def adapter(original, tmp_path_factory):
    """The folder of a LoRA run, with a checkpoint."""
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("runs") / "lora"
    settings = {"lora_r": 2, "learning_rate": 0.05, "objective": "GA", "save_strategy": "steps", "save_steps": 1}
    assert cli.main(["unlearn", *flags(original, out, **settings)]) == 0
    return out


def geffect(original, model=None, out=None, **options):
    """Flags of a measurement, on the data of `flags`."""
    settings = {"data": "jsonl", "data_path": original, "forget": "forget.jsonl", "retain": "retain.jsonl"}
    settings |= {"model": model, "output_dir": out, "device": "cpu", **options}
    words = ["geffect"]
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def measured(original, folder, model, **options):
    """The effects that the command wrote, the first objective's."""
    assert cli.main(geffect(original, model, folder, **options)) == 0
    return json.loads((folder / "geffect.json").read_text())["effects"][0]


def adapted(base, adapter):
    from peft import PeftModel

    model = type(tiny_model()).from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


def batches(**extra):
    """One batch a side; `extra` is computed on the forget one."""
    sides = [
        collator()([data[i] for i in range(6)])
        for data in (QADataset(r, TOKENIZER) for r in (FORGET_ROWS, RETAIN_ROWS))
    ]
    return {"forget": sides[0] | {name: make(sides[0]) for name, make in extra.items()}, "retain": sides[1]}


@pytest.mark.parametrize("folder", ["", "checkpoint-1"])
def test_a_lora_run_is_measured_over_its_adapter(original, adapter, tmp_path, folder):
    found = measured(original, tmp_path / "effects", adapter / folder)
    model = adapted(original, adapter / folder)
    expected = gfast.g_effect(model, GA(), **batches())
    for side in ("unlearn", "retain"):
        assert found[side] == pytest.approx(getattr(expected, side), rel=1e-4), side
    whole = measured(original, tmp_path / "whole", original)
    assert found["unlearn"] != pytest.approx(whole["unlearn"], rel=0.1)


def test_the_tokenizer_is_the_adapters_own_or_else_its_bases(original, adapter, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, bare / name)
    assert measured(original, tmp_path / "a", bare) == measured(original, tmp_path / "b", adapter)
    other = tmp_path / "other"
    shutil.copytree(adapter, other, ignore=shutil.ignore_patterns("checkpoint-*"))
    text = (other / "tokenizer_config.json").read_text(encoding="utf-8")
    (other / "tokenizer_config.json").write_text(text.replace("{", '{"chat_template": "{{ not_this_way() }}",', 1))
    fails(capsys, "not_this_way", *geffect(original, other, template="chat"))


def test_a_base_that_has_moved(original, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lost = tmp_path / "lost"
    shutil.copytree(adapter, lost, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = json.loads((lost / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(original.resolve())
    for gone in (str(tmp_path / "gone"), "no-such-owner/no-such-model", None):
        (lost / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": gone}))
        for command in (geffect(original, lost), ["unlearn", *flags(original, tmp_path / "run", model=lost)]):
            fails(capsys, str(lost), *command)
            capsys.readouterr()
            assert cli.main(command) == 2
            said = capsys.readouterr().err
            assert "--base_model" in said and (gone or "does not say which model") in said
    found = measured(original, tmp_path / "a", lost, base_model=original)
    assert found == measured(original, tmp_path / "b", adapter)
    fails(capsys, "--base_model is for adapters", *geffect(original, original, base_model=original))
    (lost / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(adapter)}))
    fails(capsys, "which is an adapter itself", *geffect(original, lost))


def test_a_relative_model_is_found_from_anywhere(original, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(original.parent)
    run = tmp_path / "run"
    assert cli.main(["unlearn", *flags(original, run, model=original.name, lora_r=2, max_steps=1)]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(geffect(original, "run")) == 0


@pytest.mark.parametrize("kind", ["no head", "a weight less", "adapter under other names"])
def test_weights_that_would_be_random_are_refused(original, adapter, tmp_path, capsys, kind):
    """A decoder saved without its head, files that lack a weight, an adapter of a model with other names."""
    from safetensors.torch import save_file

    folder = tmp_path / "changed"
    shutil.copytree(adapter if "adapter" in kind else original, folder)
    for manifest in folder.glob("*manifest*"):
        manifest.unlink()
    file = folder / ("adapter_model.safetensors" if "adapter" in kind else "model.safetensors")
    weights = load_file(file)
    if kind == "no head":
        weights = {name.removeprefix("model."): w for name, w in weights.items() if name != "lm_head.weight"}
        message = "no weights for 'lm_head.weight' of LlamaForCausalLM, which would be random"
    elif kind == "a weight less":
        weights.pop(name := "model.layers.0.mlp.up_proj.weight")
        message = f"no weights for '{name}' of LlamaForCausalLM"
    else:
        weights = {name.replace(".layers.", ".blocks."): w for name, w in weights.items()}
        message = "missing adapter keys"
    save_file(weights, file, metadata={"format": "pt"})
    fails(capsys, message, *geffect(original, folder, tmp_path / "out", objectives="GA"))


@pytest.mark.parametrize("kind", ["fewer layers", "all layers"])
def test_an_adapter_whose_weights_have_no_place_is_refused(original, tmp_path, capsys, kind):
    """PEFT loads the others, and says nothing."""
    peft = pytest.importorskip("peft")
    base, folder = original, tmp_path / "adapter"
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", trainable_token_indices=[3])
    model = peft.get_peft_model(type(tiny_model()).from_pretrained(original), config)
    model.save_pretrained(folder)
    if kind == "fewer layers":
        base = tmp_path / "small"
        small = model.unload()
        small.model.layers = small.model.layers[:1]
        small.config.num_hidden_layers = 1
        if hasattr(small.config, "layer_types"):
            small.config.layer_types = (small.config.layer_types or ["full_attention"])[:1]
        small.save_pretrained(base)
    command = geffect(original, folder, tmp_path / "out", objectives="GA", base_model=base, tokenizer=original)
    if kind == "all layers":
        assert cli.main(command) == 0
    else:
        fails(capsys, "layers.1.self_attn.q_proj.lora_A.weight' and 1 more have no place in the model", *command)


def test_adapters_over_adapters_are_refused(original, adapter, tmp_path, capsys):
    for command in (
        geffect(original, adapter, lora_r=4),
        ["unlearn", *flags(original, tmp_path / "run", model=adapter, lora_r=4)],
    ):
        fails(capsys, "is an adapter (rank 2), and --lora_r would put a second one over it", *command)


def test_what_is_compared_with_is_named(original, adapter, tmp_path, capsys):
    npo = {"objectives": ["GA", "NPO:beta=0.5"]}
    fails(capsys, "NPO(beta=0.5) compares with the original model", *geffect(original, adapter, **npo))
    for objective in ({"objective": "NPO"}, {"objective": "GA", "retain_term": "kl"}):
        command = ["unlearn", *flags(original, tmp_path / "run", model=adapter, **objective)]
        fails(capsys, "say which is the original, --reference adapted", *command)
    assert not (tmp_path / "run" / "run.json").exists()
    # Against the base, and against base and adapter together: there the two are the same model.
    model = adapted(original, adapter)
    for reference, of in ((original, tiny_model()), (adapter, model)):
        own = {"objectives": ["NPO:beta=0.5"], "reference_model": reference}
        found = measured(original, tmp_path / f"with-{reference.name}", adapter, **own)
        with torch.no_grad():
            both = batches(ref_logp=lambda batch, of=of: model_logp(of.eval(), batch))
        expected = gfast.g_effect(model, NPO(beta=0.5), **both)
        assert found["unlearn"] == pytest.approx(expected.unlearn, rel=1e-3)
    # The same model to the bit, also where merging would round: at first all weights are 1.
    own = {"reference_model": adapter, "dtype": "bfloat16"}
    found = measured(original, tmp_path / "16-bit", adapter, objectives=["TNPO"], **own)
    ones = measured(original, tmp_path / "16-bit-ga", adapter, dtype="bfloat16", objectives=["GA"])
    assert found["unlearn"] == pytest.approx(ones["unlearn"], rel=1e-6)
    whole = measured(original, tmp_path / "third", original, objectives=["NPO"], reference_model=adapter)
    assert whole["unlearn"] != measured(original, tmp_path / "fourth", original, objectives=["NPO"])["unlearn"]


@pytest.mark.parametrize("retain_term", ["none", "kl"])
@pytest.mark.parametrize("reference", ["adapted", "base"])
def test_which_is_the_original_of_an_adapter_that_goes_on(original, adapter, tmp_path, reference, retain_term):
    out = tmp_path / "run"
    settings = {"model": adapter, "objective": "NPO", "objective_args": "beta=0.5", "reference": reference}
    settings |= {"retain_term": retain_term, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1}
    assert cli.main(["unlearn", *flags(original, out, **settings, max_steps=1)]) == 0
    frame = read_records(out)
    first = frame[frame["quantity"] == "forget_loss"].iloc[0]["value"]
    at_start = 2 * math.log(2) / 0.5
    assert (first == pytest.approx(at_start, abs=1e-3)) == (reference == "adapted")
    if retain_term == "kl":
        kl = frame[frame["quantity"] == "retain_loss"].iloc[0]["value"]
        assert (abs(kl) < 1e-5) == (reference == "adapted")
    # killed and started again, the original is the same
    (out / "result.json").unlink()
    assert cli.main(["unlearn", *flags(original, out, **settings, max_steps=1)]) == 0


def test_unlearning_goes_on_with_an_adapter(original, adapter, tmp_path, capsys):
    before, base = load_file(adapter / "adapter_model.safetensors"), load_file(original / "model.safetensors")
    out = tmp_path / "run"
    settings = {"model": adapter, "objective": "WGA", "retain_term": "nll", "learning_rate": 0.05, "geffect_every": 1}
    settings |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    assert cli.main(["unlearn", *flags(original, out, **settings)]) == 0
    after = load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, load_file(original / "model.safetensors")[name]) for name, value in base.items())
    assert recorded_steps(out) == [0, 1, 2, 3]
    # A killed run goes on from its checkpoint, to the same end.
    for name in ("result.json", "adapter_model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-3")
    capsys.readouterr()
    assert cli.main(["unlearn", *flags(original, out, **settings)]) == 0
    assert "checkpoint-2" in capsys.readouterr().err
    again = load_file(out / "adapter_model.safetensors")
    for name, value in after.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective, retain_term", [("RMU:layer=1", "rr"), ("SHRED", "none")])
def test_the_effect_of_adapters_has_its_reference(objective, retain_term, original, tmp_path):
    """A training step reads hidden states and log-probs of the original with the adapters off; batches of a measurement
    have those that it does not read so: the states of a layer, log-probs.
    """
    pytest.importorskip("peft")
    settings = {"objective": objective, "retain_term": retain_term, "lora_r": 2, "geffect_every": 1, "max_steps": 1}
    assert cli.main(["unlearn", *flags(original, tmp_path / "run", **settings)]) == 0
    assert recorded_steps(tmp_path / "run") == [0, 1]


def test_a_run_folder_without_its_model_points_to_its_checkpoint(original, adapter, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copytree(adapter / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    fails(capsys, "did you mean", *geffect(original, tmp_path / "run"))


@pytest.fixture
def with_code(original, tmp_path):
    """A model folder that needs the Python files in it."""
    folder = tmp_path / "with-code"
    shutil.copytree(original, folder)
    config = json.loads((folder / "config.json").read_text())
    parts = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": parts}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_code_of_a_model_is_not_run_unasked(original, with_code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for model in (
        {"model": with_code},
        {"model": original, "tokenizer": with_code},
        {"model": original, "reference_model": with_code},
    ):
        command = geffect(original, **{"objectives": ["NPO"], **model})
        if "tokenizer" in model:
            settings = json.loads((with_code / "tokenizer_config.json").read_text())
            settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
            (with_code / "tokenizer_config.json").write_text(json.dumps(settings))
        fails(capsys, "--trust_remote_code true", *command)
        assert capsys.readouterr().out == ""
    fails(capsys, "--trust_remote_code true", "unlearn", *flags(original, tmp_path / "run", model=with_code))


@pytest.mark.slow
def test_code_of_a_model_runs_when_asked(original, with_code, tmp_path):
    command = geffect(original, with_code, tmp_path / "out", trust_remote_code="true")
    kept = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-m", "gfast.cli", *command], env=kept, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0
    found = json.loads((tmp_path / "out" / "geffect.json").read_text())["effects"][0]
    plain = measured(original, tmp_path / "plain", original)
    assert found["unlearn"] == pytest.approx(plain["unlearn"], rel=1e-4)
