"""PDU's dual variable in training: moved as by hand, kept in checkpoints, refused where it would mean nothing."""

import pytest
import torch
from helpers import open_unlearning as ou
from helpers.training_tiny import config, copied, pairing, tiny_model
from test_token_stats import plain_loss

import gfast
from gfast.model_output import shifted
from gfast.objectives import ETW, MASC, NLL, PDU, Mix
from gfast.objectives.registry import parse_objective
from gfast.training.callback import GEffectCallback
from gfast.training.dual import moves
from gfast.training.trainer import UnlearnTrainer

ARGS = {"retain_loss_eps": 3.0, "primal_dual": True, "dual_step_size": 0.5}
SGD = {"optim": "sgd", "learning_rate": 1e-3, "per_device_train_batch_size": 6}


def trainer_of(folder, objective_args, model=None, alpha=0.7, **options):
    data, collator = pairing()
    args = config(folder, objective="PDU", objective_args=objective_args, retain_term="nll", alpha=alpha)
    for name, value in {**SGD, "max_steps": 3, **options}.items():
        setattr(args, name, value)
    model = tiny_model().double() if model is None else model
    return UnlearnTrainer(model, args, train_dataset=data, data_collator=collator)


def by_hand(trainer, start, steps, eps, size):
    """The dual variable before each step and after the last, and losses, of plain SGD in fp64; a step is an epoch."""
    model, dual, data = copied(start), 0.7, trainer.train_dataset
    duals, losses = [dual], []
    for epoch in range(steps):
        data.set_epoch(epoch)
        batch = trainer.data_collator([data[i] for i in range(len(data))])
        forget, retain = (
            (model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b)
            for b in (batch["forget"], batch["retain"])
        )
        margins = plain_loss(forget[0], shifted(forget[1]["labels"]), PDU())[0]
        z, y = retain[0][:, :-1], retain[1]["labels"][:, 1:]
        nll = torch.nn.functional.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1))
        loss = margins + dual * (nll - eps)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(1e-3 * parameter.grad)
        losses.append(loss.item())
        dual = max(0.0, dual + size * (nll.item() - eps))
        duals.append(dual)
    return duals, losses


@pytest.mark.parametrize("batch, accumulated", [(6, 1), (2, 3)])
def test_the_dual_variable_moves_as_by_hand(tmp_path, batch, accumulated):
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    trainer = trainer_of(tmp_path, ARGS, **options)
    duals, losses = by_hand(trainer, trainer.model, 3, 3.0, 0.5)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "dual" in log]
    assert [log["dual"] for log in logs] == pytest.approx(duals[:3], rel=1e-9)
    assert [log["loss"] for log in logs] == pytest.approx(losses, abs=1e-4)  # Trainer rounds it
    assert trainer.dual.value == pytest.approx(duals[3], rel=1e-9) and duals[3] != duals[0]
    records = gfast.training.read_records(tmp_path)
    assert records[records.quantity == "dual"].value.tolist() == pytest.approx(duals[:3], rel=1e-9)


def test_a_resumed_run_goes_on_with_it(tmp_path):
    whole = trainer_of(tmp_path / "whole", ARGS, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    part = trainer_of(tmp_path / "part", ARGS, max_steps=4, save_strategy="steps", save_steps=2)
    part.args.max_steps = 2
    part.train()
    again = trainer_of(tmp_path / "part", ARGS, max_steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.dual.value == pytest.approx(whole.dual.value, rel=1e-6) and again.state.global_step == 4
    other = trainer_of(tmp_path / "without", {"retain_loss_eps": 3.0}, max_steps=1, save_strategy="steps", save_steps=1)
    other.train()
    assert other.dual is None
    moving = trainer_of(tmp_path / "without", ARGS, max_steps=2)
    with pytest.raises(ValueError, match="holds no dual variable"):
        moving.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("more", [{"dual_update_upon": "epoch"}, {"dual_warmup_epochs": 1}], ids=str)
def test_the_end_of_an_epoch_is_not_lost_with_the_run(tmp_path, more):
    """Trainer saves the checkpoint of an epoch's last step before that epoch ends; steps are epochs here."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    whole = trainer_of(tmp_path, ARGS | more, **options)
    whole.train()
    logged = [log["dual"] for log in whole.state.log_history if "dual" in log]
    for step in (1, 2, 3):
        again = trainer_of(tmp_path, ARGS | more, **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert [log["dual"] for log in again.state.log_history if "dual" in log] == logged
        assert again.dual.value == whole.dual.value != logged[-1]


@pytest.mark.parametrize("upon", ["step", "epoch"])
def test_warm_up_and_epochs(tmp_path, upon):
    """Steps are epochs here: held for two of them; by epochs the end of the second moves it already."""
    args = {**ARGS, "dual_update_upon": upon, "dual_warmup_epochs": 2}
    trainer = trainer_of(tmp_path, args, max_steps=4)
    trainer.train()
    found = [log["dual"] for log in trainer.state.log_history if "dual" in log]
    assert found[:2] == [0.7, 0.7] and (found[2] == 0.7) == (upon == "step") and found[3] != found[2]


def test_what_has_no_meaning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dual variable.*retain_term nll"):
        config(tmp_path, objective="PDU", objective_args=["primal_dual=True"])
    with pytest.raises(ValueError, match="PDU's dual variable moves one"):
        config(tmp_path, objective="PDU", objective_args=["primal_dual=True"], retain_term="nll", geffect_every=1)
    with pytest.raises(ValueError, match="PDU's dual variable moves one"):
        config(tmp_path, objective="PDU", objective_args=["primal_dual=True"], retain_term="nll", surgery="pcgrad")
    with pytest.raises(ValueError, match="change along a run"):
        GEffectCallback(1, [], [], Mix(PDU(primal_dual=True), NLL()))
    for text, message in (("WGA:alpha=half", "alpha must be a number"), ("PDU:dual_update_upon=never", "'step' or")):
        with pytest.raises(ValueError, match=message):
            parse_objective(text)


def test_from_words_and_in_open_unlearning():
    assert parse_objective("PDU:dual_update_upon=epoch,primal_dual=True") == PDU(
        dual_update_upon="epoch", primal_dual=True
    )
    assert (parse_objective("masc:k=3"), parse_objective("ETW(temperature=2)")) == (MASC(k=3), ETW(2))
    assert not moves(Mix(PDU(), NLL()))
    from gfast.integrations.open_unlearning.trainers import METHODS, _objective

    make, defaults = METHODS["PDU"]
    known = {"gamma": 1.0, "alpha": 1.0, "retain_loss_type": "NLL"} | defaults
    assert _objective("PDU", make, known, {}) == Mix(PDU(), NLL())
    given = {"retain_loss_eps": 1, "primal_dual": True, "dual_update_upon": "epoch", "dual_warmup_epochs": 5}
    assert _objective("PDU", make, known, given | {"alpha": 2}) == Mix(PDU(**given), NLL(), alpha=2.0)
    assert "GFastPDU" in ou.registered()
