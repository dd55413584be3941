"""Relearning and quantization: what comes back of what was forgotten."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from helpers.training_tiny import TOKENIZER, saved_tiny, tiny_model
from test_cli_evaluate import fails, flags

import gfast
from gfast import cli, metrics
from gfast.commands.arguments import ModelArguments
from gfast.commands.models import load_reference
from gfast.data import Collator, QADataset, batches
from gfast.evaluation import sources
from gfast.evaluation.attacks import QUANTIZERS, Relearning, quantize, relearn, split
from gfast.files import read_json
from gfast.peft_models import merged
from gfast.training.fingerprints import model_fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=256)


def test_the_forget_set_is_split_into_what_is_learned_and_the_rest():
    (forget,) = [one for one in sources.bundled(10) if one.name == "forget"]
    rest, learned = split(forget, Relearning(3, rows=4), None)
    assert (rest.name, rest.index, learned.name, learned.index) == (
        "forget",
        tuple(range(4, 10)),
        "relearned",
        (0, 1, 2, 3),
    )
    assert [*learned.rows, *rest.rows] == list(forget.rows)
    assert len(split(forget, Relearning(3), None)[1].rows) == 1  # a tenth
    assert split(forget, Relearning(3), [{"question": "q", "answer": "a"}]) == [forget]
    with pytest.raises(ValueError, match="rows=4 of the forget set has no effect beside related data"):
        split(forget, Relearning(3, rows=4), [{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="leaves none"):
        split(forget, Relearning(3, rows=10), None)
    for settings, message in (({"steps": 0}, "steps is 0"), ({"steps": 1, "learning_rate": 0.0}, "learning_rate is 0")):
        with pytest.raises(ValueError, match=message):
            Relearning(**settings)


def test_what_is_relearned_is_what_is_measured(tmp_path):
    (forget,) = [one for one in sources.bundled(3) if one.name == "forget"]
    forget, plan = replace(forget, generate=0, perturbed=None, paraphrase=None), Relearning(1, rows=1, every=1)
    others = [
        {"asked": row["question"], "said": row["answer"], "question": "Who?", "answer": "I."} for row in forget.rows
    ]
    renamed = replace(forget, rows=others, question="asked", answer="said")
    found = [relearn(tiny_model(), TOKENIZER, one, plan, tmp_path / str(len(one.rows[0]))) for one in (forget, renamed)]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="writes its own prompts"):
        relearn(tiny_model(), TOKENIZER, replace(forget, encode=sources.Continuation(TOKENIZER)), plan, tmp_path)


@pytest.mark.parametrize("rank", [0, 2])
def test_relearning_and_its_effect(tmp_path, rank):
    (forget,) = [one for one in sources.bundled(6) if one.name == "forget"]
    # what a text weighed when it was to be forgotten is nothing to an attack
    forget = replace(forget, rows=[{**row, "weight": 0.0} for row in forget.rows])
    plan = Relearning(4, rows=2, learning_rate=1e-2, lora_r=rank, every=2)
    found = relearn(tiny_model(), TOKENIZER, forget, plan, tmp_path)
    assert [row["step"] for row in found["curve"]] == [0, 2, 4]
    first, last = found["curve"][0], found["curve"][-1]
    assert last["relearned"]["nll"] < first["relearned"]["nll"]
    log = metrics.load_log(tmp_path / "step-00000004.json")
    assert log.sets["forget"].index == (2, 3, 4, 5)
    for name in ("forget", "relearned"):  # two parts of one set, by one measure
        ratios = metrics.truth_ratio(log, per_sample=True)[name]
        assert last[name]["truth_ratio"] == metrics.aggregate(ratios, "closer_to_1_better")
    assert found["settings"]["learned"] == 2
    if rank:
        return
    # the gradients of the two NLLs, by plain autograd
    network, collate = tiny_model(), Collator(TOKENIZER)
    gradients = []
    for rows in (forget.rows[:2], forget.rows[2:]):
        data = QADataset(rows, TOKENIZER)
        (batch,) = batches(data, collate, len(data))
        loss = -gfast.model_logp(network, batch).sum() / (batch["labels"][:, 1:] != -100).sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(*gradients, strict=True))
    assert found["g_effect"]["total"] == pytest.approx(dot, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_adapters_are_merged_before_a_relearning(tmp_path, rank):
    """It begins at the model as it is with them, and learns with all weights, or with adapters over all of it."""
    peft = pytest.importorskip("peft")
    (forget,) = [one for one in sources.bundled(4) if one.name == "forget"]
    forget, plan = replace(forget, generate=0, perturbed=None, paraphrase=None), Relearning(1, 2, 1e-2, lora_r=rank)

    def adapted(**options):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options)
        return peft.get_peft_model(tiny_model(), lora)

    merged = adapted().merge_and_unload().requires_grad_(True)
    wanted = relearn(merged, TOKENIZER, forget, plan, tmp_path / "merged")
    assert relearn(adapted(), TOKENIZER, forget, plan, tmp_path / "apart") == wanted
    if not rank:
        with pytest.raises(ValueError, match="merges the model's adapters.*bfloat16.*--dtype float32"):
            relearn(adapted().to(torch.bfloat16), TOKENIZER, forget, plan, tmp_path)
        off = adapted()
        off.base_model.disable_adapter_layers()
        with pytest.raises(ValueError, match="cannot be merged.*switched off.*without --relearn"):
            relearn(off, TOKENIZER, forget, plan, tmp_path)


def test_relearning_from_the_command_line(model, tmp_path, capsys):
    words = flags(model, tmp_path / "out", ds_size=5, relearn=2, relearn_rows=2, relearn_learning_rate=1e-2)
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "| forget: nll |" in out and "G-effect of the relearning" in out
    result = read_json(tmp_path / "out" / "relearn.json")
    assert cli.main(words) == 0  # the same again is not measured again
    again = capsys.readouterr()
    assert "Relearning:" not in again.err and again.out == out
    related = tmp_path / "related.jsonl"
    related.write_text(json.dumps({"question": "Who writes?", "answer": "Nobody does."}) + "\n")
    capsys.readouterr()
    assert cli.main([*words, "--relearn_data", str(related)]) == 2
    assert "rows=2 of the forget set has no effect beside related data" in capsys.readouterr().err
    words = [word for at, word in enumerate(words) if "--relearn_rows" not in words[max(at - 1, 0) : at + 1]]
    assert cli.main([*words, "--relearn_data", str(related)]) == 0
    assert "Relearning:" in capsys.readouterr().err
    other = read_json(tmp_path / "out" / "relearn.json")
    assert other["settings"]["related_data"] and other["g_effect"] != result["g_effect"]
    fails(capsys, "leaves none", flags(model, tmp_path / "x", relearn=1, relearn_rows=4))
    fails(capsys, "no such forget set", flags(model, tmp_path / "x", relearn=1, data="wmdp"))
    fails(capsys, "weights of bfloat16", flags(model, tmp_path / "x", relearn=1, dtype="bfloat16", ds_size=5))
    assert not (tmp_path / "x" / "run.json").exists()
    fails(capsys, "one attack at a time", flags(model, tmp_path / "x", relearn=1, quantize="8bit"))


def test_quantization_is_refused_with_what_to_install(model, tmp_path, capsys, monkeypatch):
    fails(capsys, "choose one of 4bit, 8bit", flags(model, tmp_path / "x", quantize="2bit"))
    fails(capsys, "give the bits", flags(model, tmp_path / "x", quantize_by="bitsandbytes"))
    for module, by in (("torchao.quantization", "torchao"), ("bitsandbytes", "bitsandbytes")):
        monkeypatch.setitem(sys.modules, module, None)
        fails(capsys, f"pip install {by}", flags(model, tmp_path / "x", quantize="8bit", quantize_by=by))
    assert not (tmp_path / "x" / "run.json").exists()


@pytest.mark.parametrize("by", QUANTIZERS)
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_weights(bits, by):
    pytest.importorskip(by)
    network, ids = tiny_model(hidden_size=64, intermediate_size=128).eval(), torch.arange(3, 20)[None]
    head = network.lm_head.weight.clone()
    weight = network.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        before = network(input_ids=ids).logits
        found = quantize(network, bits, by)(input_ids=ids).logits
    assert torch.equal(network.lm_head.weight, head)
    apart = float((found - before).norm() / before.norm())
    assert 1e-4 < apart < (0.1 if bits == "8bit" else 2)
    rounded = network.model.layers[0].mlp.up_proj
    if by == "torchao":
        assert len(rounded.weight.dequantize()[0].unique()) <= (256 if bits == "8bit" else 32)
    else:
        assert type(rounded).__name__ == ("Linear8bitLt" if bits == "8bit" else "Linear4bit")
        assert not torch.equal(rounded.weight.float().reshape(-1)[:9], weight.reshape(-1)[:9])
    marks = [
        model_fingerprint(quantize(tiny_model(seed, hidden_size=64, intermediate_size=64), bits, by))
        for seed in (0, 0, 1)
    ]
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize("by", QUANTIZERS)
def test_what_is_rounded_is_all_that_a_model_multiplies_with(by):
    pytest.importorskip(by)
    ids = torch.arange(3, 20)[None]
    sizes = dict(vocab_size=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()  # of Conv1D
    network.transformer.h[1].mlp = network.transformer.h[0].mlp  # two names
    with torch.no_grad():
        before = network(input_ids=ids).logits
        found = quantize(network, "8bit", by)(input_ids=ids).logits
    assert 1e-4 < float((found - before).norm() / before.norm()) < 0.1
    first, second = (block.mlp.c_fc for block in network.transformer.h)
    assert first is second and isinstance(first, torch.nn.Linear) and first.out_features == 256
    with pytest.raises(ValueError, match="transformer.h.0.attn.c_attn is rounded already"):
        quantize(network, "8bit", by)
    experts = dict(num_local_experts=4, num_key_value_heads=2, num_hidden_layers=1, num_attention_heads=2)
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=64, hidden_size=64, intermediate_size=64, **experts)
    )
    if any(p.dim() == 3 for p in mixture.parameters()):  # of transformers 5
        with pytest.raises(ValueError, match="75% of the weights of this model's layers are in others"):
            quantize(mixture, "8bit", by)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 loads no bitsandbytes on a plain CPU")
@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_bitsandbytes_rounds_as_transformers_loads(bits, tmp_path):
    """With inputs beyond the threshold of LLM.int8, and NF4 whose scales are not rounded once more."""
    pytest.importorskip("bitsandbytes")
    network, ids = tiny_model(hidden_size=64, intermediate_size=128).eval(), torch.arange(3, 20)[None]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter[3] *= 60 if "norm" in name else 1
    network.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **bits)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    with torch.no_grad():
        wanted = loaded(input_ids=ids).logits
        found = quantize(network, "8bit" if "load_in_8bit" in bits else "4bit", "bitsandbytes")(input_ids=ids).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("by", QUANTIZERS)
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_are_merged_before_weights_are_rounded(bits, by):
    """Rounded apart they are others: PEFT casts what an adapter is given to the type of its weights, int8."""
    pytest.importorskip(by)
    peft, ids = pytest.importorskip("peft"), torch.arange(3, 20)[None]

    def adapted():
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(tiny_model(hidden_size=64, intermediate_size=128).eval(), lora)

    with torch.no_grad():
        wanted = quantize(adapted().merge_and_unload(), bits, by)(input_ids=ids).logits
        found = quantize(adapted(), bits, by)(input_ids=ids).logits
    assert torch.equal(found, wanted)
    inside = adapted().get_base_model()  # as transformers' add_adapter has them
    with pytest.raises(ValueError, match="adapters cannot be merged.*without --quantize"):
        quantize(inside, bits, by)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_a_tied_weight_that_an_adapter_changes_in_one_place_is_merged_there(targets, tmp_path):
    """Into both it is another model: logits more than twice the size of the right ones away."""
    peft, ids = pytest.importorskip("peft"), torch.arange(3, 20)[None]
    torch.manual_seed(1)
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    network = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    network.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    reference = load_reference(ModelArguments(model=str(tmp_path / "base")), str(tmp_path / "adapter"))
    with torch.no_grad():
        wanted = network(input_ids=ids).logits
        for found in (reference, merged(network)):
            assert torch.allclose(found(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("by", "odd", "instead"), [("bitsandbytes", 96, "--quantize_by torchao"),
                                                    ("torchao", 72, "--quantize 8bit")])  # fmt: skip
def test_a_layer_that_a_library_does_not_take_is_named(by, odd, instead):
    pytest.importorskip(by)
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.down_proj has {odd} inputs.*{instead}"):
        quantize(tiny_model(hidden_size=64, intermediate_size=odd), "4bit", by)


class Harness:
    """As much of lm-eval as is called: its tasks, its wrapper and its evaluation."""

    asked: list = []

    class TaskManager:
        all_tasks = ["wmdp", "mmlu"]

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.logits = pretrained(torch.arange(3, 9)[None]).logits
            assert not pretrained.training and tokenizer is not None

    @classmethod
    def simple_evaluate(cls, model, tasks, log_samples):
        cls.asked.append(tasks)
        return {
            "results": {
                task: {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": task, "sample_len": 6} for task in tasks
            }
        }


def test_tasks_of_lm_eval(model, tmp_path, capsys, monkeypatch):
    """Asked once of the model in memory, after the evaluation; without the library, what to install."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    fails(capsys, "pip install 'gfast[lm-eval]'", flags(model, tmp_path / "x", lm_eval="wmdp"))
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, Harness)
    fails(capsys, "no task 'wmpd'; did you mean wmdp?", flags(model, tmp_path / "x", lm_eval="wmpd"))
    assert not (tmp_path / "x" / "run.json").exists()
    for _ in range(2):
        assert cli.main(flags(model, tmp_path / "out", lm_eval="wmdp")) == 0
        printed = capsys.readouterr().out
        assert "| wmdp | acc | 0.2500 |" in printed and "sample_len" not in printed
    assert Harness.asked == [["wmdp"]]
    assert read_json(tmp_path / "out" / "lm_eval.json")["results"]["wmdp"]["acc,none"] == 0.25
