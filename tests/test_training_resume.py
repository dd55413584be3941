"""G-effects along a training, which does not notice, and which checkpoint a run goes on from."""

from __future__ import annotations

import pytest
import torch
from helpers.training_tiny import collator, config, datasets, pairing, parameters, tiny_model

from gfast.data import batches
from gfast.objectives import GA, NPO, WGA
from gfast.training.callback import GEffectCallback
from gfast.training.evaluation import nll
from gfast.training.records import read_records, recorded_steps
from gfast.training.resume import checkpoint_to_resume, last_checkpoint, saving
from gfast.training.trainer import UnlearnTrainer


def measured(every=2, objectives=None, **options):
    forget, retain = (batches(side, collator(), 4) for side in datasets())
    return GEffectCallback(every, forget, retain, objectives or [GA(), WGA()], **options)


def run(folder, *callbacks, model=None, **options):
    data, collate = pairing()
    model = tiny_model(attention_dropout=0.2) if model is None else model
    torch.manual_seed(7)
    args = config(folder, objective="WGA", retain_term="nll", **{"max_steps": 5, **options})
    trainer = UnlearnTrainer(model, args, train_dataset=data, data_collator=collate, callbacks=list(callbacks))
    trainer.train()
    return model


def test_training_is_bit_for_bit_the_same_with_and_without_measuring(tmp_path):
    plain = run(tmp_path / "plain")
    watched = run(tmp_path / "watched", measured())
    for name, value in parameters(plain).items():
        assert torch.equal(value, watched.get_parameter(name)), name
    records = [read_records(tmp_path / which) for which in ("plain", "watched")]
    losses = [frame[frame["quantity"] == "loss"]["value"].tolist() for frame in records]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_what_is_measured_when(tmp_path):
    model = tiny_model()
    forget, retain = (batches(side, collator(), 4) for side in datasets())
    expected = nll(model, forget), nll(model, retain)
    run(tmp_path / "run", measured(), model=model, max_steps=5)
    frame = read_records(tmp_path / "run")
    effects = frame[frame["quantity"] == "g_effect"]
    assert sorted(effects["step"].unique()) == [0, 2, 4, 5]
    assert set(effects["objective"]) == {"GA()", "WGA(alpha=1.0)"}
    assert set(effects["group"]) == {"embed", "shallow", "middle", "deep", "lm", "total"}
    totals = effects[(effects["group"] == "total") & (effects["objective"] == "GA()") & (effects["step"] == 0)]
    assert totals.set_index("side")["value"]["unlearn"] < 0
    risk = frame[(frame["quantity"] == "risk") & (frame["objective"] == "GA()")].pivot(
        index="step", columns="side", values="value"
    )
    assert risk.loc[0, "unlearn"] == pytest.approx(expected[0]) and risk.loc[0, "retain"] == pytest.approx(expected[1])
    assert risk.loc[5, "unlearn"] == pytest.approx(nll(model, forget))
    assert not frame.duplicated(["run", "objective", "step", "quantity", "side", "group"]).any()


def test_the_nll_of_both_sets_costs_no_pass_of_its_own(tmp_path, monkeypatch):
    from gfast.training import evaluation

    def forbidden(*args):
        raise AssertionError("the passes of the effects have found the NLL already")

    monkeypatch.setattr(evaluation, "nll", forbidden)
    run(tmp_path / "run", measured(), max_steps=1)
    assert "risk" in set(read_records(tmp_path / "run")["quantity"])
    monkeypatch.undo()
    model = tiny_model()
    forget, retain = (batches(side, collator(), 4) for side in datasets())
    expected = nll(model, forget), nll(model, retain)
    run(tmp_path / "other", measured(risk=GA()), model=model, max_steps=1)  # whose passes tell nothing of the NLL
    frame = read_records(tmp_path / "other")
    risk = (
        frame[(frame["quantity"] == "risk") & (frame["step"] == 0)].drop_duplicates("side").set_index("side")["value"]
    )
    assert (risk["unlearn"], risk["retain"]) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_it_works_in_a_plain_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    forget, _ = datasets()
    settings = {"use_cpu": True, "max_steps": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(tmp_path / "out"), remove_unused_columns=False, **settings)

    def collate(items):
        batch = collator()(items)
        batch.pop("sample_id")
        return batch

    callback = measured(every=0, objectives=GA(), run_folder=tmp_path / "elsewhere", run="mine", label="what I call it")
    Trainer(tiny_model(), args, train_dataset=forget, data_collator=collate, callbacks=[callback]).train()
    frame = read_records(tmp_path / "elsewhere")
    assert recorded_steps(tmp_path / "elsewhere") == [0, 2]
    assert set(frame["run"]) == {"mine"} and set(frame["objective"]) == {"what I call it"}


def test_a_run_stopped_early_is_measured_where_it_stopped(tmp_path):
    from transformers import TrainerCallback

    class StopAt3(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    run(tmp_path / "run", measured(every=2), StopAt3())
    frame = read_records(tmp_path / "run")
    assert sorted(frame[frame["quantity"] == "g_effect"]["step"].unique()) == [0, 2, 3]


def test_an_objective_without_its_data_is_said(tmp_path):
    with pytest.raises(ValueError, match="ref_logp"):
        run(tmp_path / "run", measured(objectives=NPO()))
    with pytest.raises(ValueError, match="at least one objective"):
        GEffectCallback(1, [], [], objectives=[])
    with pytest.raises(ValueError, match="single objective"):
        measured(label="one name for two")


def test_a_checkpoint_cut_short_is_not_taken(tmp_path):
    for step, text in ((2, '{"global_step": 2}'), (4, '{"global_st'), (10, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_that_is_saved_again_is_none_until_it_is_whole(tmp_path):
    run(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt), saving(tmp_path / "checkpoint-4", mine=True):
        assert last_checkpoint(tmp_path).name == "checkpoint-2"
        raise KeyboardInterrupt
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_finished_run_takes_no_further_step(tmp_path):
    """Killed after its last checkpoint and started again: in the middle of an epoch, and at the end of one."""
    for steps in (2, 3, 4):
        folder, weights, records = tmp_path / str(steps), [], []
        for resume in (None, True):
            data, collate = pairing()
            saves = dict(max_steps=steps, save_strategy="steps", save_steps=1)
            args = config(folder, objective="GA", retain_term="nll", **saves)
            trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate)
            trainer.train(resume_from_checkpoint=resume)
            assert trainer.state.global_step == steps
            weights.append(parameters(trainer.model))
            records.append(read_records(folder))
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        assert records[0].equals(records[1])


def test_weights_alone_are_not_gone_on_from(tmp_path, caplog):
    """The optimizer would begin anew without a word."""
    data, collate = pairing()
    args = config(tmp_path, objective="WGA", max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate)
    trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2" and checkpoint_to_resume(tmp_path) is None
    assert "checkpoint-2 holds weights alone (save_only_model): the run starts again from step 0" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-1 holds weights alone .it was saved with save_only_model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="there is no checkpoint folder .*checkpoint-3"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
