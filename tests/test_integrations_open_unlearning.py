"""gfast's trainers in open-unlearning: three steps of every class against fp64, and what goes wrong around them."""

from __future__ import annotations

import subprocess
import sys
from collections import UserDict, UserList
from pathlib import Path

import pytest
import torch
import yaml
from helpers import open_unlearning as ou
from helpers.literal_losses import LOGGED, assert_same, gradients, label_logp, literal
from helpers.training_tiny import TOKENIZER, copied, tiny_model
from test_soft_objectives import formula
from test_token_stats import plain_loss
from test_training_parallel import together

import gfast
import gfast.integrations.open_unlearning as integration
from gfast.data import fingerprint
from gfast.integrations.open_unlearning.__main__ import with_configs
from gfast.integrations.open_unlearning.arguments import make_load_trainer_args
from gfast.integrations.open_unlearning.trainers import make_trainers
from gfast.model_output import shifted
from gfast.objectives import (
    BST,
    CEU,
    DPO,
    ETW,
    GA,
    JSD,
    MASC,
    NLL,
    NPO,
    PDU,
    SHRED,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    BalDRO,
    BalDROG,
    JensUn,
    OfLabel,
    SatImp,
    SimImp,
    SimNPO,
    SimSat,
    SoftTarget,
    Unilogit,
)

CLASSES = {
    "GradAscent": GA(),
    "GradDiff": GA(),
    "NPO": NPO(1.0),
    "DPO": DPO(1.0),
    "SimNPO": SimNPO(1.0, 0.0),
    "WGA": WGA(1.0),
    "SatImp": SatImp(5.0, 1.0),
    "SimSat": SimSat(5.0),
    "SimImp": SimImp(5.0),
    "PDU": PDU(),
    "TNPO": TNPO(1.0),
    "WTNPO": WTNPO(1.0, 1.0),
    "BST": BST(0.5, 20),
    "UNDIAL": UNDIAL(1.0),
    "CEU": CEU(),
    "JensUn": JensUn((3, 5)),
    "ETW": ETW(),
    "MASC": MASC(),
    "SHRED": SHRED(),
    "Unilogit": Unilogit(),
}


# over the samples of a batch: of one at a time they are NPO
BY_BATCH = {"DrNPO": BalDRO(1.0, 1.0), "GroupNPO": BalDROG(1.0, 0.5)}


def kl(model, original, batch):
    """KL(original || model), mean over the tokens that labels score."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        ref = torch.log_softmax(original(**inputs).logits[:, :-1].double(), -1)
    logp = torch.log_softmax(model(**inputs).logits[:, :-1].double(), -1)
    return (ref.exp() * (ref - logp)).sum(-1)[batch["labels"][:, 1:] != -100].mean()


def of_logits(objective, model, original, batch):
    """Losses of whole rows of logits, mean over the tokens that labels score, by the formulas of those tests."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels, z = shifted(batch["labels"]), model(**inputs).logits.double()
    if isinstance(objective, SoftTarget | OfLabel):
        with torch.no_grad():
            x = original(**inputs).logits.double()
        return formula(objective, z, x, labels, torch.arange(len(labels))[:, None].expand(labels.shape))
    return plain_loss(z, labels, objective)[0]


def kept_by(kind, model, original, batch):
    """The retain loss."""
    if kind == "KL":
        return kl(model, original, batch)
    return literal(NLL(), model, [batch]) if kind == "NLL" else of_logits(JSD(), model, original, batch)


def three_steps(name, trainer, start, alpha, retain="NLL"):
    """Losses of three steps of plain SGD and the first gradient, in fp64; each epoch is one step over all the data."""
    model, original = copied(start).double(), copied(start).double()
    losses, first, data = [], None, trainer.train_dataset
    for epoch in range(3):
        data.set_epoch(epoch)
        batch = (
            trainer.data_collator.collator(items(data)) if trainer.references else trainer.data_collator(items(data))
        )
        objective = CLASSES[name]
        if isinstance(objective, SoftTarget | OfLabel | BST | ETW | MASC):
            loss = of_logits(objective, model, original, batch["forget"])
        else:
            loss = literal(objective, model, [batch["forget"]], original if objective.needs else None)
        if name not in ("GradAscent", "CEU"):
            kind = "JensUn" if name == "JensUn" else retain
            loss = loss + alpha * kept_by(kind, model, original, batch["retain"])
        model.zero_grad()
        loss.backward()
        first = first or gradients(model)
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(1e-3 * parameter.grad)
    return losses, first


def items(data):
    return [data[index] for index in range(len(data))]


def logged(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("name", CLASSES)
def test_three_steps_are_those_of_fp64(tmp_path, name):
    """Four samples at once and one by one; the arguments and defaults are open-unlearning's."""
    alpha = 0.1 if name == "SatImp" else 1.0
    for batch_size, accumulate in ((4, 1), (1, 4)):
        model = tiny_model()
        options = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate)
        given = {"target_ids": [3, 5]} if name == "JensUn" else None
        trainer = ou.trained(name, tmp_path, model, method=given, **options)
        losses, first = three_steps(name, trainer, tiny_model(), alpha)
        assert logged(trainer) == pytest.approx(losses, rel=1e-4, abs=LOGGED)
        assert_same(trainer.first.found, first)


def test_ceu_leaves_out_the_first_labels_of_forget_answers(tmp_path):
    whole, cut = (ou.trained(name, tmp_path, tiny_model(), train=False).train_dataset for name in ("GradDiff", "CEU"))
    for index in range(len(whole)):
        labels, kept = whole[index]["forget"]["labels"], cut[index]["forget"]["labels"]
        first = int((labels != -100).nonzero()[0])
        assert kept[first] == -100 and torch.equal(kept[first + 1 :], labels[first + 1 :])
        assert torch.equal(whole[index]["retain"]["labels"], cut[index]["retain"]["labels"])


@pytest.mark.parametrize("name", ["GradDiff", "NPO"])
def test_kl_keeps_the_retain_rows_that_are_drawn(tmp_path, name):
    trainer = ou.trained(name, tmp_path, tiny_model(), method={"retain_loss_type": "KL", "alpha": 2.0})
    losses, first = three_steps(name, trainer, tiny_model(), 2.0, "KL")
    assert logged(trainer) == pytest.approx(losses, rel=1e-4, abs=LOGGED)
    assert_same(trainer.first.found, first)
    drawn = set()
    for epoch in range(3):
        trainer.train_dataset.set_epoch(epoch)
        drawn |= set(trainer.train_dataset.partners())
    assert len(trainer.references["retain"]) == len(drawn)


def test_two_processes_are_one(tmp_path):
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    together(ou.parallel, runs)
    one, two = (torch.load(folder / "process-0.pt") for folder in runs.values())
    assert one.keys() == two.keys() and all(len(one[f"{name} effects"]) for name in ("NPO", "SimNPO"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


def test_the_last_token_counts_where_padding_is_eos(tmp_path):
    class Padding:
        pad_token_id = eos_token_id = TOKENIZER.eos_token_id

    rows = ou.data()
    for row in rows.forget.items:
        assert row["input_ids"][-1] == Padding.eos_token_id and row["labels"][-1] == Padding.eos_token_id
    trainer = ou.trained("NPO", tmp_path, tiny_model(), rows, {"beta": 0.1}, Padding())
    assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(13.8629, rel=1e-4)
    batch = trainer.data_collator(items(trainer.train_dataset))["forget"]
    masked = {**batch, "attention_mask": batch["input_ids"].ne(Padding.pad_token_id).long()}
    with pytest.raises(ValueError, match="has a label at position .* where its attention_mask is 0"):
        gfast.ReferenceCache.build(tiny_model(), [0], lambda _: masked)


def test_rows_without_labels_count_nothing(tmp_path):
    rows = ou.data()
    rows.forget.items[2]["labels"] = torch.full_like(rows.forget.items[2]["labels"], -100)
    for name in ("SimNPO", "NPO", "WGA"):
        trainer = ou.trained(name, tmp_path, tiny_model(), rows)
        losses, first = three_steps(name, trainer, tiny_model(), 1.0)
        assert logged(trainer) == pytest.approx(losses, rel=1e-4, abs=LOGGED)
        assert_same(trainer.first.found, first)


def test_items_are_the_same_at_every_access(tmp_path):
    trainer = ou.trained("DPO", tmp_path, tiny_model(), train=False)
    state = torch.get_rng_state()
    first, again = (fingerprint(trainer.train_dataset) for _ in range(2))
    assert first == again and (torch.get_rng_state() == state).all()
    answers = {tuple(item["forget"]["preferred_labels"].tolist()) for item in items(trainer.train_dataset)}
    assert len(answers) > 1
    ids = [item["forget"]["sample_id"] for item in items(trainer.train_dataset)]
    assert ids == [0, 1, 2, 3]


def test_retain_anchored_data_and_data_without_a_retain_set(tmp_path):
    rows = ou.data()
    rows.anchor = "retain"
    trainer = ou.trained("NPO", tmp_path, tiny_model(), rows, max_steps=1)
    assert len(trainer.train_dataset) == 6 and set(trainer.train_dataset[0]) == {"forget", "retain"}
    alone = ou.data()
    alone.retain = None
    ou.trained("NPO", tmp_path, tiny_model(), alone, {"alpha": 0.0}, max_steps=1)
    with pytest.raises(ValueError, match="have no retain set"):
        ou.trained("NPO", tmp_path, tiny_model(), alone)


def test_what_it_cannot_do_is_refused_by_name(tmp_path):
    cases = [
        ("NPO", {"method": {"delta": 1.0}}, "GFastNPO has no argument delta; its method_args are gamma, alpha"),
        ("GradAscent", {"method": {"alpha": 1.0}}, "GFastGradAscent has no argument alpha"),
        ("GradDiff", {"method": {"retain_loss_type": "EMBED_DIFF"}}, "EMBED_DIFF.*has NLL and KL"),
        ("RMU", {}, "gfast has no RMU for open-unlearning"),
        ("CEU", {"method": {"alpha": 1.0}}, "GFastCEU has no argument alpha; its method_args are ignore_first"),
        ("NPO", {"method": {"reference": "none"}}, "it can be auto, cache, adapters_off, adapter:NAME"),
        ("NPO", {"method": {"reference": "adapters_off"}}, "the model has no adapters; use cache"),
        (
            "PDU",
            {"method": {"loss_names": ["a", "b"]}},
            "loss_names is .'a', 'b'., and gfast logs forget_loss and retain",
        ),
        ("NPO", {"train_dataset": ou.data(pairs=True)}, "holds original, alternate and no input_ids: use GFastDPO"),
        ("DPO", {"train_dataset": ou.data()}, "DPO needs pairs"),
        ("NPO", {"method": {"weights": "scorer"}}, "weights is 'scorer'; choose one of none, retain_conflict, atwu"),
        ("NPO", {"method": {"weights": "atwu", "geffect_every": 1}}, "geffect_every measures the objective as it is"),
        ("NPO", {"data_collator": lambda items: items}, "the data_collator function would not be run"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ou.trained(name, tmp_path, tiny_model(), **options)


def test_an_old_transformers_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.45.1")
    with pytest.raises(RuntimeError, match="4.45.1 is installed, as open-unlearning pins it, and gfast needs 4.51"):
        integration.register()


def test_evaluators_run_as_before(tmp_path):
    seen = []

    class Evaluator:
        def evaluate(self, **given):
            seen.append(given)
            return {"forget_quality": 0.5}

    ou.trained("GradDiff", tmp_path, tiny_model(), eval_strategy="epoch", evaluators={"tofu": Evaluator()})
    assert len(seen) == 3 and seen[0]["tokenizer"] is TOKENIZER
    ou.trained("GradDiff", tmp_path, tiny_model(), eval_strategy="epoch", eval_dataset="dummy")


def test_adapters_are_their_own_original_and_the_effect_is_measured(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model(), config)
    method = {"retain_loss_type": "KL", "geffect_every": 2, "geffect_samples": 2}
    trainer = ou.trained("NPO", tmp_path, model, method=method)
    assert not trainer.references and trainer.state.log_history[0]["geffect/nll/retain"] > 0
    keys = [key for log in trainer.state.log_history for key in log if key.startswith("geffect/") and "nll" not in key]
    assert any(key.endswith("/unlearn") for key in keys) and any("/retain/middle" in key for key in keys)
    cached = ou.trained("NPO", tmp_path, model, method={"reference": "cache"}, train=False)
    assert set(cached.references) == {"forget"}
    live = ou.trained("GradAscent", tmp_path, tiny_model(), method={"geffect_live": True, "surgery": "gru"})
    assert "geffect_live/step/retain" in live.state.log_history[0]
    scored = ou.trained("GradDiff", tmp_path, tiny_model(), method={"weights": "atwu:every=1"})
    assert float(scored.token_weights.phi.abs().max()) > 0 and (tmp_path / "scorer.safetensors").exists()
    pairs = ou.trained("DPO", tmp_path, tiny_model(), method={"geffect_every": 3, "geffect_samples": 2})
    assert any(key.startswith("geffect/DPO") for key in pairs.state.log_history[0])


def test_a_base_that_computes_its_loss_by_another_method(tmp_path, caplog):
    """One layout of open-unlearning's trainers has compute_loss call compute_unlearn_loss while it trains."""

    class Base(ou.FinetuneTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.compute_unlearn_loss(model, inputs, return_outputs, num_items_in_batch)

        def compute_unlearn_loss(self, *_):
            raise AssertionError("the loss is gfast's")

    registry, found = ou.registered(), {}
    for kind, made in (("plain", registry["GFastNPO"]), ("hook", make_trainers(Base)["NPO"])):
        options = dict(train_dataset=ou.data(), tokenizer=TOKENIZER, args=ou.arguments(tmp_path / kind, max_steps=2))
        trainer = made(model=tiny_model(seed=1), **options)
        trainer.train()
        found[kind] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert found["plain"] == found["hook"] and len(found["hook"]) == 2
    said = [record.message for record in caplog.records if "is not called" in record.message]
    assert len(said) == 1 and "compute_loss of Base" in said[0]


def test_configs_name_trainers_and_arguments_that_there_are():
    folder = Path(integration.__file__).parent / "configs" / "trainer"
    registry, found = ou.registered(), set()
    for file in folder.glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        assert config["handler"] == file.stem and set(config.get("method_args") or ()) <= set(
            registry[file.stem].__doc__.replace("=", " ").split()
        )
        assert config["defaults"] in (["GradDiff"], ["finetune"])
        found.add(file.stem)
    assert found == {f"GFast{name}" for name in CLASSES | BY_BATCH}


def test_a_dual_variable_moves_away_from_zero(tmp_path):
    """With what open-unlearning's own YAML gives beside."""
    method = {"alpha": 0.0, "primal_dual": True, "retain_loss_eps": 0.5, "loss_names": ["forget_loss", "retain_loss"]}
    trainer = ou.trained("PDU", tmp_path, tiny_model(), method=method, max_steps=2)
    first, second = (log for log in trainer.state.log_history if "loss" in log)
    assert first["loss"] == pytest.approx(first["forget_loss"], rel=1e-6)
    dual = first["retain_loss"] - 0.5
    expected = second["forget_loss"] + dual * (second["retain_loss"] - 0.5)
    assert second["loss"] == pytest.approx(expected, rel=1e-5) and second["dual"] == pytest.approx(dual, rel=1e-5)


def test_arguments_of_hydra_are_plain_values(tmp_path):
    """TensorBoard gets the arguments as JSON, schedulers take a dict, and DDP no word "None", as YAML has it."""
    given = UserDict(output_dir=str(tmp_path), use_cpu=True, report_to=UserList(["none"]), warmup_epochs=None)
    given |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": UserDict(min_lr=1e-5)}
    given["ddp_find_unused_parameters"] = yaml.safe_load("None")
    made = make_load_trainer_args()(given, [0])
    assert made.lr_scheduler_kwargs == {"min_lr": 1e-5} and made.report_to == [] and made.to_json_string()
    assert made.ddp_find_unused_parameters is None


@pytest.mark.parametrize("name", BY_BATCH)
def test_weights_over_a_batch_are_made(tmp_path, name):
    trainer = ou.trained(name, tmp_path, tiny_model(), train=False)
    assert trainer.objective.forget == BY_BATCH[name] and trainer.objective.retain == NLL()


def test_the_command_runs_a_script_as_it_is(tmp_path):
    source = tmp_path / "src"
    (source / "trainer").mkdir(parents=True)
    (source / "trainer" / "__init__.py").write_text(
        "from transformers import Trainer\nTRAINER_REGISTRY = {'NPO': Trainer}\nclass FinetuneTrainer(Trainer): pass\n"
    )
    script = source / "train.py"
    script.write_text(
        "import sys, trainer\nassert __name__ == '__main__'\n"
        "print(sys.argv[1:], trainer.TRAINER_REGISTRY['NPO'].__name__, 'GFastWTNPO' in trainer.TRAINER_REGISTRY)\n"
    )
    command = [sys.executable, "-m", "gfast.integrations.open_unlearning", "--replace", str(script), "trainer=NPO"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert out == f"{with_configs(['trainer=NPO'])} GFastNPO True"
    wrong = subprocess.run([*command[:3], "nothing.py"], capture_output=True, text=True)
    assert wrong.returncode and "there is no file nothing.py" in wrong.stderr and "Traceback" not in wrong.stderr


def test_label_logp_of_the_truth_is_that_of_a_model():
    """The literal losses stand on this."""
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    batch["labels"] = torch.tensor([[-100, -100, 3]])
    model = tiny_model()
    logp, valid = label_logp(model, batch)
    expected = -model(**batch).loss.detach().double()
    torch.testing.assert_close(logp[valid][0].detach(), expected, rtol=1e-5, atol=1e-6)
