"""The NLL of both sets along a training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.training_tiny import collator, config, datasets, pairing, parameters, tiny_model
from test_training import plain_nll
from test_training_resume import measured, run
from transformers import LlamaForCausalLM, TrainerCallback

from gfast.data import batches
from gfast.objectives import GA
from gfast.training.averaged import averaged, refuse_flat
from gfast.training.callback import GEffectCallback
from gfast.training.config import UnlearnConfig
from gfast.training.records import read_records, read_step, write_record
from gfast.training.trainer import UnlearnTrainer
from gfast.training.trajectory import NLLCallback

FORGET, RETAIN = (batches(side, collator(), 4) for side in datasets())
NAME = "WGA(alpha=1.0) + NLL()"


def risks(folder, name=NAME):
    frame = read_records(folder)
    frame = frame[(frame["quantity"] == "risk") & (frame["objective"] == name)]
    return frame.pivot(index="step", columns="side", values="value")


class Literally(TrainerCallback):
    """The same by cross-entropy."""

    def __init__(self):
        self.found = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        training = model.training
        model.eval()
        with torch.no_grad():
            sums = [plain_nll(model, side) for side in (FORGET, RETAIN)]
        self.found[state.global_step] = [float(total) / tokens for total, tokens in sums]
        model.train(training)


def test_it_is_the_nll_and_training_does_not_notice(tmp_path):
    plain, literally = run(tmp_path / "plain"), Literally()
    watched = run(tmp_path / "run", NLLCallback(2, lambda: iter(FORGET), RETAIN), literally)
    for name, value in parameters(plain).items():
        assert torch.equal(value, watched.get_parameter(name)), name
    found = risks(tmp_path / "run")
    assert found.index.tolist() == [0, 2, 4, 5]
    for step in (2, 4, 5):
        assert found.loc[step, ["unlearn", "retain"]].tolist() == pytest.approx(literally.found[step], rel=1e-5)


def test_beside_the_g_effect(tmp_path):
    effects = measured(every=2, objectives=GA(), label=NAME)
    effects.forget, effects.retain = FORGET, RETAIN
    run(tmp_path / "run", NLLCallback(1, FORGET, RETAIN), effects, max_steps=3)
    found = risks(tmp_path / "run")
    assert found.index.tolist() == [0, 1, 2, 3] and found.notna().all(axis=None)
    with pytest.raises(ValueError, match="different lists of batches under one name"):
        run(tmp_path / "other", measured(objectives=GA(), label=NAME), NLLCallback(1, FORGET, RETAIN))
    run(tmp_path / "names", measured(every=1, objectives=GA()), NLLCallback(1, FORGET, RETAIN), max_steps=1)
    assert len(risks(tmp_path / "names")) == len(risks(tmp_path / "names", "GA()")) == 2
    for every in (-1, 2.5, "2", float("nan"), True, None):  # every 2.5 steps would be every 5
        for make in (NLLCallback, partial(GEffectCallback, objectives=GA())):
            with pytest.raises(ValueError, match="^every is .*; give the optimizer steps between measurements"):
                make(every, [], [])


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_folder_of_another_training_says_so_and_lends_no_end(tmp_path, caplog, goes_on):
    """The end of a run that is stopped early is its own, whatever the folder holds of that step."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    data, collate = pairing()
    for rate, every, more in ((1e-3, 1, []), (0.5, 0, [Stop()])):
        again = goes_on and bool(more)
        args = config(tmp_path, optim="sgd", retain_term="nll", max_steps=3 if again else 4)
        args.learning_rate = rate
        args.save_strategy, args.save_steps = ("steps" if goes_on else "no"), 1
        sides = [collator()([side[i] for i in range(6)]) for side in (data.forget, data.retain)]
        caplog.clear()
        trainer = UnlearnTrainer(
            tiny_model(), args, train_dataset=data, data_collator=collate,
            callbacks=[NLLCallback(every, [sides[0]], [sides[1]]), *more],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if again else None)
        assert ("holds records of steps up to 4" in caplog.text) == bool(more)
        assert ("this training ends at step 3" in caplog.text) == again
        if goes_on and not again:
            write_record(tmp_path, [row | {"value": 99.0} for row in read_step(tmp_path, 2)])
    total, n = plain_nll(trainer.model.eval(), [sides[1]])
    found = [row["value"] for row in read_step(tmp_path, 2) if row["quantity"] == "risk" and row["side"] == "retain"]
    assert found == [pytest.approx(float(total.detach()) / n, rel=1e-5)]


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD: it takes gradients at y, and the model is the average x = y + (1 - 1/beta)(z - y)."""

    def __init__(self, parameters, lr, beta=0.5):
        super().__init__(parameters, dict(lr=lr, beta=beta, k=0, train_mode=False))

    @torch.no_grad()
    def _to(self, training):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != training else ():
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - group["beta"] if training else 1 - 1 / group["beta"])
            group["train_mode"] = training

    def train(self):
        self._to(True)

    def eval(self):
        self._to(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                z, share = self.state[p].setdefault("z", p.clone()), 1 / group["k"]
                p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class Averages(Literally):
    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained, own = parameters(model), optimizer.optimizer
        with torch.no_grad():
            for p in model.parameters():
                p.lerp_(own.state[p]["z"], 1 - 1 / own.param_groups[0]["beta"])
            super().on_step_end(args, state, control, model=model)
            self.found[state.global_step].append(parameters(model))
            for name, p in model.named_parameters():
                p.copy_(trained[name])


@pytest.mark.parametrize("training", [True, False])
def test_an_optimizer_that_has_not_moved_stays_in_its_mode(training):
    """In a warm-up whose rate is 0 its average is where it trains."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = ScheduleFree([parameter], 0.0)
    optimizer.train()
    parameter.grad = torch.ones(2)
    optimizer.step()
    getattr(optimizer, "train" if training else "eval")()
    with averaged(optimizer):
        assert not optimizer.param_groups[0]["train_mode"]
    assert optimizer.param_groups[0]["train_mode"] == training and parameter.tolist() == [1, 1]


def test_a_schedule_free_optimizer_is_measured_and_saved_at_its_average(tmp_path):
    def train(folder, *callbacks, resume=None, **options):
        data, collate = pairing()
        model = tiny_model()
        args = config(folder, objective="WGA", retain_term="nll", max_steps=3, **options)
        trainer = UnlearnTrainer(
            model, args, train_dataset=data, eval_dataset=data, data_collator=collate, callbacks=list(callbacks),
            optimizers=(ScheduleFree(model.parameters(), 0.3), None),
        )  # fmt: skip
        trainer.train(resume)
        return trainer

    saves = dict(save_strategy="steps", save_steps=2)
    plain = train(tmp_path / "plain", **saves)
    literally = Averages()
    watched = train(tmp_path / "run", NLLCallback(1, FORGET, RETAIN), literally, **saves)
    found = risks(tmp_path / "run")
    for step, (*right, weights) in literally.found.items():
        assert found.loc[step, ["unlearn", "retain"]].tolist() == pytest.approx(right, rel=1e-6)
        if step == 2:
            saved = LlamaForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
            assert all(torch.equal(value, weights[name]) for name, value in parameters(saved).items()), step
    resumed = train(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"), **saves)
    best = train(
        tmp_path / "best", literally, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_forget_loss", greater_is_better=True, load_best_model_at_end=True,
    )  # fmt: skip
    assert best.state.best_model_checkpoint.endswith("checkpoint-1")  # the NLL falls
    best.evaluate()
    for trainer, right in ((plain, weights), (watched, weights), (resumed, weights), (best, literally.found[1][2])):
        assert all(torch.equal(value, right[name]) for name, value in parameters(trainer.model).items())


def test_a_schedule_free_optimizer_under_deepspeed_is_refused(tmp_path):
    args = UnlearnConfig(str(tmp_path), optim="schedule_free_adamw", use_cpu=True)
    refuse_flat(args, None, False)
    refuse_flat(UnlearnConfig(str(tmp_path), use_cpu=True), None, True)
    with pytest.raises(ValueError, match="optim='schedule_free_adamw' under DeepSpeed.*DDP or FSDP2"):
        refuse_flat(args, None, True)
    given = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    refuse_flat(args, given, True)  # which is taken in the place of optim
    given.train = given.eval = lambda: None
    with pytest.raises(ValueError, match="the SGD that was given under DeepSpeed"):
        refuse_flat(UnlearnConfig(str(tmp_path), use_cpu=True), given, True)
