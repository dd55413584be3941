"""Live G-effects and surgery in the trainer: the weights of a plain run, the effects of g_effect, the records."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from helpers import training_parallel  # noqa: E402
from helpers.marks import slow_when  # noqa: E402
from helpers.training_tiny import (  # noqa: E402
    collator,
    config,
    copied,
    datasets,
    in_processes,
    pairing,
    parameters,
    tiny_model,
)
from torch.utils.data import IterableDataset  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import EffectHistory  # noqa: E402
from gfast.objectives import GA, NLL, PDU, WGA, Mix  # noqa: E402
from gfast.training.callback import GEffectCallback  # noqa: E402
from gfast.training.live import LiveSteps  # noqa: E402
from gfast.training.loss import GFastLossMixin  # noqa: E402
from gfast.training.records import read_records  # noqa: E402
from gfast.training.reference import ReferenceCache  # noqa: E402
from gfast.training.trainer import UnlearnTrainer  # noqa: E402


class Seeing(UnlearnTrainer):
    """Keeps the batches of its steps, whose order is transformers' own affair."""

    def training_step(self, model, inputs, *args, **kwargs):
        vars(self).setdefault("seen", []).append(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def trained(folder, model, callbacks=(), references=None, mix=None, **options):
    data, collate = pairing()
    args = config(folder, **options)
    trainer = Seeing(
        model,
        args,
        train_dataset=data,
        data_collator=collate,
        callbacks=list(callbacks),
        references=references,
        objective=mix,
    )
    trainer.train()
    return trainer


def rows(folder, quantity, side="retain", group="total", label=" (live)"):
    found = read_records(folder)
    found = found[(found["quantity"] == quantity) & (found["side"] == side) & (found["group"] == group)]
    found = found[found["objective"].str.endswith(label)]
    return dict(zip(found["step"].tolist(), found["value"].tolist(), strict=True))


@slow_when(lambda p: (p.options["retain_term"], p.accumulation) not in (("nll", 3), ("kl", 1)))
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        dict(objective="GA", retain_term="nll", alpha=0.7),
        dict(objective="WGA", retain_term="nll", gamma=0.5, geffect_live_unlearn=True),
        dict(objective="WGA", retain_term="none", geffect_live_unlearn=True),
        dict(objective="GA", retain_term="kl"),
    ],
    ids=lambda options: f"{options['objective']}+{options['retain_term']}",
)
def test_trains_as_without_it_and_measures_each_step(options, accumulation, tmp_path):
    live = {name: options[name] for name in options if name.startswith("geffect_live")}
    options = {name: value for name, value in options.items() if name not in live}
    options |= dict(max_steps=2, gradient_accumulation_steps=accumulation, optim="sgd")
    start = tiny_model()
    start.tie_weights()
    references = None
    if options["retain_term"] == "kl":
        references = {"retain": ReferenceCache.build(start, datasets()[1], collator(), what={"hidden"})}
    plain, model = copied(start), copied(start)
    one = trained(tmp_path / "plain", plain, references=references, **options)
    two = trained(tmp_path / "live", model, references=references, geffect_live=True, **live, **options)
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[name], value, rtol=1e-5, atol=1e-6)
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert {"geffect_live/retain", "geffect_live/cosine/retain", "geffect_live/clip"} <= set(b)
        assert b["forget_loss"] == pytest.approx(a["forget_loss"], rel=1e-4)
    # the effect of the first step, by g_effect on its batches
    batches = two.seen[:accumulation]
    forgets, retains = [b["forget"] for b in batches], [b["retain"] for b in batches]
    truth = gfast.g_effect(start.eval(), two.objective.forget, forget=forgets, retain=retains[:1], norms=True)
    for group, value in truth.retain.items():
        found = rows(tmp_path / "live", "g_effect", group=group)
        assert found.keys() == {0, 1} and found[0] == pytest.approx(
            value, rel=1e-3, abs=1e-6 * abs(truth.total("retain"))
        )
    assert rows(tmp_path / "live", "risk", group="")[0] == pytest.approx(truth.risks["retain"], rel=1e-4)
    if options["objective"] == "GA" or accumulation == 1:
        assert rows(tmp_path / "live", "g_effect", "unlearn")[0] == pytest.approx(truth.total("unlearn"), rel=1e-3)


@pytest.mark.parametrize("surgery", ["gru", "retain:tensor"])
def test_surgery_without_a_retain_term_spares_the_retain_rows_of_all_micro_batches(surgery, tmp_path):
    one, two = tiny_model().double(), tiny_model().double()
    options = dict(objective="WGA", surgery=surgery, max_steps=3, optim="sgd", learning_rate=0.05, logging_steps=1)
    at_once = trained(tmp_path / "one", one, per_device_train_batch_size=2, **options)
    parts = trained(tmp_path / "two", two, per_device_train_batch_size=1, gradient_accumulation_steps=2, **options)
    for name, value in parameters(one).items():
        torch.testing.assert_close(parameters(two)[name], value, rtol=1e-12, atol=1e-14, msg=name)
    for a, b in zip(at_once.state.log_history[:3], parts.state.log_history[:3], strict=True):
        for name in ("geffect_live/retain", "geffect_live/nll/retain", "geffect_live/step/retain"):
            assert b[name] == pytest.approx(a[name], rel=1e-6), name


def test_risks_of_several_processes_are_over_the_tokens_of_all(tmp_path):
    in_processes(training_parallel.live, str(tmp_path), world=2)


def test_weights_that_some_steps_have_and_others_do_not(tmp_path):
    """What follows of a gradient is asked anew in each step."""
    data, collate = pairing()

    def collator_with_weights(items):
        batch = collate(items)
        if int(batch["forget"]["sample_id"][0]) % 2:
            batch["forget"]["weight"] = torch.full(batch["forget"]["labels"].shape, 0.25)
        return batch

    found, right = [], []

    class Compared(UnlearnTrainer):
        def training_step(self, model, inputs, *args):
            batch, gradients = self.live.batches[0]["forget"], []
            for objective, given in ((GA(), batch), (NLL(), {**batch, "weight": None})):
                model.zero_grad()
                gfast.model_loss(model, given, objective).loss.backward()
                gradients.append([p.grad.double() for p in model.parameters()])
            right.append(sum(float((u * r).sum()) for u, r in zip(*gradients, strict=True)))
            model.zero_grad()
            loss = super().training_step(model, inputs, *args)
            found.append(self.live.latest["unlearn"])
            weighted.append("weight" in batch)
            return loss

    weighted = []
    args = config(tmp_path, retain_term="nll", max_steps=6, per_device_train_batch_size=1, geffect_live_unlearn=True)
    Compared(tiny_model(), args, train_dataset=data, data_collator=collator_with_weights).train()
    assert {*weighted} == {True, False} and found == pytest.approx(right, rel=1e-5)


def test_a_loss_with_a_constant_is_logged_as_without(tmp_path):
    mix = Mix(PDU(retain_loss_eps=0.5), NLL(), alpha=2.0)
    logged = [
        trained(tmp_path / name, tiny_model(), mix=mix, gradient_accumulation_steps=2, geffect_live=name == "live")
        for name in ("plain", "live")
    ]
    one, two = (trainer.state.log_history[0]["loss"] for trainer in logged)
    assert two == pytest.approx(one, rel=1e-5)


def test_live_and_measured_effects_are_on_one_page(tmp_path):
    from gfast.report.runs import load_runs, measured_runs
    from gfast.report.tables import summarize

    forget, retain = (next(iter(torch.utils.data.DataLoader(d, 4, collate_fn=collator()))) for d in datasets())
    callback = GEffectCallback(1, [forget], [retain], Mix(GA(), NLL()), norms=True)
    options = dict(max_steps=3, retain_term="nll", geffect_live_update=True, surgery="pcgrad:group")
    trained(tmp_path / "run", tiny_model(), [callback], **options)
    runs = load_runs([tmp_path / "run"])
    assert {run.objective for run in runs} == {"GA() + NLL()", "GA() + NLL() (live)"}
    (live,) = [run for run in runs if run.objective.endswith("(live)")]
    # the NLL of a step's batch is no course of the run, and does not count among those of whole sets
    assert summarize(live)["course"] == [] and summarize(live)["forget_nll"] is None
    (whole,) = measured_runs([tmp_path / "run"])
    assert whole.objective == "GA() + NLL()" and len(summarize(whole)["course"]) == 4
    history = EffectHistory.from_records(live.records)
    assert history.steps == [0, 1, 2] and history.unlearn["lm"][0] < 0
    assert len(rows(tmp_path / "run", "step_effect")) == 3
    assert rows(tmp_path / "run", "update_effect").keys() == {1, 2}  # before the first there is none
    from gfast.commands.report import main

    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "page")]) in (0, None)
    assert "<p>1 unlearning run followed over its optimizer steps" in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.parametrize("retain_term", ["none", "nll", "kl"])
def test_a_batch_without_labels_has_no_effect_and_no_risk(retain_term, tmp_path):
    data, collate = pairing()
    cache = ReferenceCache.build(tiny_model(), datasets()[1], collator(), what={"hidden"})

    def empty(items):
        batch = collate(items)
        for side in batch if len(steps) in (0, 4) else ["forget"] if len(steps) == 1 else ["retain"]:
            batch[side]["labels"][:] = -100
        steps.append(0)
        return batch

    steps: list[int] = []
    args = config(tmp_path, objective="GA", retain_term=retain_term, max_steps=3, geffect_live=True)
    args.gradient_accumulation_steps = 2
    references = {"retain": cache} if retain_term == "kl" else None
    trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=empty, references=references)
    trainer.train()
    # of the micro-batches (-, -), (-, r), (f, -), (f, -), (-, -), (f, -): the first retain one and all forget ones
    for quantity, group in (("g_effect", "total"), ("risk", "")):
        assert rows(tmp_path, quantity, "retain", group) == {}
        assert rows(tmp_path, quantity, "unlearn", group).keys() == {1, 2}
    assert all("geffect_live/nll/retain" not in log for log in trainer.state.log_history)


@pytest.mark.parametrize("live", [False, True])
def test_what_a_backward_does_not_reach_under_ddp_is_said(live, tmp_path, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")

    model = tiny_model()
    monkeypatch.setattr(model.model, "forward", forward)
    with pytest.raises(ValueError, match="RMU and RR stop at a layer.* Give ddp_find_unused_parameters=True"):
        trained(tmp_path, model, retain_term="nll", geffect_live=live)


def test_any_trainer_with_the_mixin_and_what_is_refused(tmp_path):
    class Forget(GFastLossMixin, Trainer):
        objective = Mix(WGA(), NLL())

    data, collate = pairing()
    settings = dict(use_cpu=True, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1)
    args = TrainingArguments(str(tmp_path / "run"), remove_unused_columns=False, **settings)
    trainer = Forget(tiny_model(), args, train_dataset=data, data_collator=collate, surgery="sago")
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["geffect_live/step/retain"])
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    with pytest.raises(ValueError, match="unknown surgery 'pc'"):
        Forget(tiny_model(), args, train_dataset=data, data_collator=collate, surgery="pc")
    with pytest.raises(ValueError, match="unknown surgery 'pc'"):
        config(tmp_path, surgery="pc")
    plain = Forget(tiny_model(), args, train_dataset=datasets()[0], data_collator=collator(), geffect_live=True)
    plain.objective = Mix(GA())
    with pytest.raises(ValueError, match="need a retain batch beside every forget batch"):
        plain.train()


class Stream(IterableDataset):
    def __init__(self, data, rows):
        self.data, self.rows = data, rows

    def __iter__(self):
        return iter([self.data[index] for index in range(self.rows)])


@pytest.mark.parametrize("live", [False, True])
def test_a_stream_that_ends_within_a_step_leaves_nothing_to_the_next(live, tmp_path):
    data, collate = pairing()

    def train(rows):
        options = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=1, logging_steps=1)
        args = config(tmp_path / str(rows), retain_term="nll", geffect_live=live, optim="sgd", **options)
        trainer = UnlearnTrainer(tiny_model(), args, train_dataset=Stream(data, rows), data_collator=collate)
        trainer.train()
        logs = [{name: log.get(name) for name in ("loss", "grad_norm")} for log in trainer.state.log_history[:-1]]
        return logs, parameters(trainer.model)

    (logs, found), (right, expected) = train(5), train(4)
    assert logs == right and all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="ended after 1 of the 2 micro-batches of the first step"):
        train(1)


class OwnLoss(GFastLossMixin, Trainer):
    def compute_loss(self, *args, **kwargs):
        return 2.0 * super().compute_loss(*args, **kwargs)


class HalvesGradients(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for parameter in self.model.parameters():
            parameter.grad.mul_(0.5)
        return loss


class OwnStep(GFastLossMixin, HalvesGradients):
    pass


@pytest.mark.parametrize("kind, own", [(OwnLoss, "compute_loss of OwnLoss"), (OwnStep, "training_step of Halves")])
@pytest.mark.parametrize("live", [dict(geffect_live=True), dict(surgery="pcgrad")], ids=str)
def test_a_loss_or_step_that_would_not_be_called_is_refused(kind, own, live, tmp_path):
    data, collate = pairing()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    given = dict(train_dataset=data, data_collator=collate, objective=Mix(GA(), NLL()))
    kind(tiny_model(), args, **given)
    with pytest.raises(ValueError, match=own):
        kind(tiny_model(), args, **given, **live)


def test_a_step_that_is_not_finite_changes_nothing_and_is_recorded(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    before = parameters(model)
    trained(tmp_path / "run", model, geffect_live=True, retain_term="nll", optim="sgd")
    assert all(torch.equal(before[name], value) for name, value in parameters(model).items())
    assert rows(tmp_path / "run", "dropped", side="", group="") == {0: 1.0}


@pytest.mark.parametrize("surgery", ["gru", "gru:tensor:0.3"])
def test_a_run_with_gru_goes_on_from_a_checkpoint_as_if_it_had_not_ended(surgery, tmp_path):
    def run(folder, steps, start=None, **options):
        data, collate = pairing()
        args = config(folder, retain_term="nll", max_steps=steps, save_strategy="steps", save_steps=2, **options)
        trainer = UnlearnTrainer(tiny_model(attention_dropout=0.2), args, train_dataset=data, data_collator=collate)
        trainer.train(resume_from_checkpoint=start)
        return trainer

    whole = run(tmp_path / "whole", 5, surgery=surgery)
    run(tmp_path / "parts", 2, surgery=surgery)
    resumed = run(tmp_path / "parts", 5, True, surgery=surgery)
    for name, value in parameters(whole.model).items():
        assert torch.equal(value, resumed.model.get_parameter(name)), name
    assert rows(tmp_path / "parts", "step_effect") == rows(tmp_path / "whole", "step_effect")
    averages = [one.live.monitor(one.live._monitor.model).state_dict() for one in (whole, resumed)]
    assert averages[0] and all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    with pytest.raises(ValueError, match="is of a run with surgery 'gru.*', and this one has 'gru:group:0.8'"):
        run(tmp_path / "other", 5, str(checkpoint), surgery="gru:group")
    run(tmp_path / "other", 2, surgery="pcgrad")
    with pytest.raises(ValueError, match="has no gru_average.safetensors, the averages of surgery 'gru"):
        run(tmp_path / "other", 5, True, surgery=surgery)
    weights = parameters(whole.model)  # a second training of the same Trainer begins anew
    torch.manual_seed(0)
    whole.train()
    assert whole.live._checkpoint is None and not all(
        torch.equal(value, whole.model.get_parameter(name)) for name, value in weights.items()
    )


def test_factors_of_zero_and_deepspeed_without_zero_are_refused_before_any_work(tmp_path):
    for options in (dict(gamma=0.0, retain_term="nll"), dict(alpha=0.0, retain_term="nll")):
        with pytest.raises(ValueError, match="gamma or alpha is 0"):
            trained(tmp_path / "run", tiny_model(), geffect_live=True, **options)
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 0}})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(objective=Mix(GA(), NLL()), is_deepspeed_enabled=True, accelerator=accelerator)
    with pytest.raises(ValueError, match="cannot run with this DeepSpeed config: without ZeRO.*DDP"):
        LiveSteps(trainer, "paper", False, None, False)
