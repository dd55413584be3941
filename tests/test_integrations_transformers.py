"""gfast's losses in a Trainer of transformers: the gradient of one big batch, whatever is accumulated and counted."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from helpers import integrations_parallel
from helpers.literal_losses import LOGGED, FirstGradient, assert_same, gradients, literal
from helpers.training_tiny import collator, copied, datasets, pairing, tiny_model
from test_training_parallel import together
from transformers import Trainer, TrainerCallback, TrainingArguments

import gfast
from gfast import hf
from gfast.integrations.transformers import GFastLossMixin
from gfast.objectives import DPO, GA, NLL, NPO, PDU, TNPO, WGA, WTNPO, Mix, SatImp, SimNPO

RATE = 1e-2
TOKENS = [GA(), NLL(), WGA(alpha=1.0), SatImp(5.0, 1.0)]
OBJECTIVES = [*TOKENS, TNPO(1.0), WTNPO(1.0, 1.0), NPO(beta=0.1), SimNPO(4.5, 0.0), DPO(beta=0.1)]


class Forget(GFastLossMixin, Trainer):
    pass


def arguments(folder, **options):
    settings = dict(output_dir=str(folder), use_cpu=True, learning_rate=RATE, lr_scheduler_type="constant", seed=0)
    settings |= dict(max_grad_norm=0.0, max_steps=1, optim="sgd", save_strategy="no", report_to="none", logging_steps=1)
    return TrainingArguments(**settings, disable_tqdm=True, **options)


def columns(data):
    """Items as a collator of one's own sees them: every column that the data has."""
    return [dict(item) for item in (data[index] for index in range(len(data)))]


def trained(model, folder, items, objective=None, batch_size=6, accumulate=1, trainer=Forget, collate=None, **options):
    args = arguments(folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate)
    if objective is not None:
        options["objective"] = objective
    run = trainer(model, args=args, train_dataset=items, data_collator=collate or collator(), **options)
    run.first = FirstGradient()
    run.add_callback(run.first)
    run.train()
    return run


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_step_is_the_gradient_of_one_big_batch(tmp_path, objective):
    """Six samples at once, three times two, and four and then two, against fp64."""
    kind = "pairs" if isinstance(objective, DPO) else "qa"
    data, _ = datasets(kind)
    items = columns(data)
    original = tiny_model()
    # away from the original, where the weights of reference objectives are all 1
    start = tiny_model()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    twin = copied(start).double()
    expected = literal(objective, twin, [collator()(items)], copied(original).double() if objective.needs else None)
    expected.backward()
    options = {}
    if "ref_logp" in objective.needs:
        options["references"] = {"forget": gfast.ReferenceCache.build(original, data, collator())}
    for batch_size, accumulate in ((6, 1), (2, 3), (4, 2)):
        model = copied(start)
        run = trained(model, tmp_path, items, objective, batch_size, accumulate, **options)
        assert_same(run.first.found, gradients(twin))
        assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=LOGGED + 1e-7)


def test_a_reference_model_of_the_trainer_is_the_original(tmp_path):
    class WithReference(Forget):
        ref_model = tiny_model()

    items, model = columns(datasets()[0]), tiny_model(seed=1)
    twin = copied(model).double()
    expected = literal(NPO(0.1), twin, [collator()(items)], copied(WithReference.ref_model).double())
    expected.backward()
    run = trained(model, tmp_path, items, NPO(0.1), 2, 3, WithReference)
    assert_same(run.first.found, gradients(twin))


def test_columns_that_gfast_reads_are_kept_and_a_mix_takes_both_sides(tmp_path):
    data, retain = datasets()
    seen = []

    def collate(items):
        seen.append(set(items[0]))
        return collator()(items)

    import datasets as hf_datasets

    table = hf_datasets.Dataset.from_list(
        [{k: torch.as_tensor(v).tolist() for k, v in i.items()} for i in columns(data)]
    )
    cache = gfast.ReferenceCache.build(tiny_model(), data, collator())
    trained(tiny_model(), tmp_path, table, TNPO(), collate=collate, references={"forget": cache})
    assert seen[0] == {"input_ids", "labels", "sample_id"}
    pairs = [{"forget": one, "retain": other} for one, other in zip(columns(data), columns(retain), strict=False)]
    sides = {"forget": collator(), "retain": collator()}
    nested = lambda items: {side: own([item[side] for item in items]) for side, own in sides.items()}  # noqa: E731
    run = trained(tiny_model(), tmp_path, pairs, Mix(GA(), NLL()), collate=nested)
    assert run.state.log_history[0]["retain_loss"] > 0
    with pytest.raises(ValueError, match="has a retain term, but the batches hold only forget"):
        trained(tiny_model(), tmp_path, columns(data), Mix(GA(), NLL()))


def test_a_run_that_goes_on_within_an_epoch_has_its_pairs(tmp_path):
    def run(steps, start=None):
        data, collate = pairing()
        options = dict(max_steps=steps, save_strategy="steps", save_steps=4, per_device_train_batch_size=2)
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **options)
        seen = []

        def noted(items):
            batch = collate(items)
            seen.append((batch["forget"]["sample_id"].tolist(), batch["retain"]["sample_id"].tolist()))
            return batch

        trainer = Forget(tiny_model(), args, train_dataset=data, data_collator=noted, objective=Mix(GA(), NLL()))
        trainer.train(resume_from_checkpoint=start)
        return seen

    whole, resumed = run(5), run(5, str(tmp_path / "checkpoint-4"))  # of three steps an epoch
    assert resumed and resumed == whole[-len(resumed) :]


def test_data_are_free_after_a_training_that_ended_in_an_error(tmp_path):
    data, collate = pairing()

    def broken(items):
        raise KeyboardInterrupt

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    for own in (broken, collate):
        trainer = Forget(tiny_model(), args, train_dataset=data, data_collator=own, objective=Mix(GA(), NLL()))
        with pytest.raises(KeyboardInterrupt) if own is not collate else contextlib.nullcontext():
            trainer.train()
        data.set_epoch(7)
        assert data.epoch == 7


def test_what_is_missing_or_without_effect_is_said_first(tmp_path, caplog):
    items = columns(datasets()[0])
    masked = [item | {"labels": torch.full_like(torch.as_tensor(item["labels"]), -100)} for item in items]
    with caplog.at_level(logging.WARNING, "gfast"):
        trained(tiny_model(), tmp_path, masked, GA(), 2, 2)
    assert caplog.text.count("no token of the forget batches of step 1 has a label") == 1
    with pytest.raises(ValueError, match="Forget has no objective: give objective="):
        trained(tiny_model(), tmp_path, items)
    with pytest.raises(ValueError, match="compute_metrics cannot be used with Forget"):
        trained(tiny_model(), tmp_path, items, GA(), compute_metrics=lambda _: {})
    with pytest.raises(ValueError, match=r"NPO\(beta=0.1\) needs ref_logp"):
        trained(tiny_model(), tmp_path, items, NPO())


def test_a_loss_of_ones_own_that_is_not_called_is_named(tmp_path, caplog, monkeypatch):
    class Penalised(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise AssertionError("the mixin's stands before it")

    class Mine(GFastLossMixin, Penalised):
        objective = GA()

    class Beside(Mine):  # what the message says to do
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + 1.0

    monkeypatch.setattr(logging.getLogger("gfast"), "propagate", True)
    data, _ = datasets()
    with caplog.at_level(logging.WARNING, logger="gfast"):
        trained(tiny_model(), tmp_path / "mine", data, trainer=Mine)
    assert "compute_loss of Penalised is not called" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="gfast"):
        trained(tiny_model(), tmp_path / "plain", data, GA())
    assert "is not called" not in caplog.text
    trained(tiny_model(), tmp_path / "beside", data, trainer=Beside)


class Looks(TrainerCallback):
    """Asks the Trainer for the loss of a batch after each step, to look at it."""

    def __init__(self, batch, with_graph):
        self.batch, self.with_graph, self.found = batch, with_graph, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.set_grad_enabled(self.with_graph):
            alone = gfast.model_loss(model, self.batch["retain"], NLL()).loss
            self.found.append((self.trainer.compute_loss(model, self.batch).item(), alone.item()))


def test_a_prediction_step_whose_loss_is_not_taken_is_named(tmp_path, caplog):
    class Twice(Forget):
        def prediction_step(self, *given, **more):
            loss, *rest = super().prediction_step(*given, **more)
            return 2 * loss, *rest

    losses = []
    for trainer in (Forget, Twice):
        run = trainer(tiny_model(), args=arguments(tmp_path), objective=GA(), data_collator=collator())
        losses.append(run.evaluate(datasets()[0])["eval_loss"])
        assert ("prediction_step of Twice" in caplog.text) == (trainer is Twice)
    assert losses[0] == losses[1]


def test_logs_of_a_training_are_of_its_own_steps(tmp_path):
    """Not of the training before, nor of an attempt that failed: three steps, of which a log each two tells of two."""

    class Fails(Forget):
        def training_step(self, *given, **more):
            if self.fails and self.state.global_step == 1:
                self.fails = False
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*given, **more)

    logs = []
    for attempts in ("one", "two", "failed"):
        args = arguments(tmp_path, per_device_train_batch_size=4)
        args.logging_steps, args.max_steps, args.learning_rate = 2, 3, 0.0
        args.auto_find_batch_size = attempts == "failed"
        run = Fails(tiny_model(), args=args, objective=GA(), train_dataset=datasets()[0], data_collator=collator())
        run.fails = args.auto_find_batch_size
        for _ in range(2 if attempts == "two" else 1):
            run.train()
        found = next(log for log in run.state.log_history if "forget_loss" in log)
        assert found["forget_loss"] == pytest.approx(found["loss"], rel=1e-5)
        logs.append(found["forget_loss"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6) and run._train_batch_size < 4


@pytest.mark.parametrize("with_graph", [False, True])
def test_a_loss_between_steps_is_part_of_none(tmp_path, with_graph):
    """It is divided by its own count, is in no log, and does not move a dual variable."""
    data, _ = datasets()
    items = [{"forget": item, "retain": item} for item in columns(data)]

    def collate(rows):
        return {side: collator()([row[side] for row in rows]) for side in ("forget", "retain")}

    def run(folder, objective, *callbacks):
        args = arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        args.max_steps = 3
        trainer = Forget(tiny_model(), args, objective=objective, train_dataset=items, data_collator=collate)
        for callback in callbacks:
            callback.trainer = trainer
            trainer.callback_handler.callbacks.insert(0, callback)
        trainer.train()
        names = ("loss", "forget_loss", "retain_loss", "dual", "mean_weight")
        return [{name: row.get(name) for name in names} for row in trainer.state.log_history if "loss" in row]

    for objective in (Mix(WGA(), NLL(), gamma=0.0), Mix(PDU(primal_dual=True), NLL())):
        looks = Looks(collate(items[:5]), with_graph)
        assert run(tmp_path / "looked", objective, looks) == run(tmp_path / "plain", objective)
        if objective.gamma == 0.0:
            for asked, alone in looks.found:
                assert asked == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("how", ["as it is", "copied", "masked", "in place", "prepared"])
def test_labels_that_are_masked_after_they_were_counted_are_said(tmp_path, monkeypatch, how):
    def masked(inputs):
        labels = inputs["labels"] if how in ("as it is", "in place") else inputs["labels"].clone()
        if how not in ("as it is", "copied"):
            labels[0, -6:] = -100
        return {**inputs, "labels": labels}

    class Masks(Forget):
        objective = GA()

        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs if how == "prepared" else masked(inputs), *args, **kwargs)

        def _prepare_inputs(self, inputs):
            found = super()._prepare_inputs(inputs)
            return masked(found) if how == "prepared" else found

    said = []
    monkeypatch.setattr(logging.getLogger("gfast"), "warning", lambda text, *args: said.append(text % args))
    trained(tiny_model(), tmp_path, columns(datasets()[0]), None, 2, 2, trainer=Masks)
    said = [one for one in said if "the labels of a forget batch are not those that the collator made" in one]
    assert len(said) == (0 if how in ("as it is", "copied") else 1)


def test_micro_batches_that_nobody_counted_are_refused(tmp_path):
    class Own(Forget):
        def get_batch_samples(self, epoch_iterator, num_batches, device=None):
            return [next(epoch_iterator) for _ in range(num_batches)], None

    with pytest.raises(ValueError, match=r"Own has a get_batch_samples of its own"):
        trained(tiny_model(), tmp_path, datasets()[0], GA(), 2, 2, trainer=Own)


def test_two_processes_are_one_whatever_is_averaged(tmp_path):
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    together(integrations_parallel.losses, runs)
    found = {world: torch.load(folder / "process-0.pt") for world, folder in runs.items()}
    assert found[1].keys() | {"refused"} == found[2].keys()
    assert "average_tokens_across_devices is off" in found[2].pop("refused")
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_sequence_ids_tell_texts_from_rows():
    """Two texts in a row, told by sequence_id alone, weigh like the same texts told by positions that start again."""
    model, items = tiny_model(), [datasets()[0][index] for index in range(4)]
    rows = {key: [torch.as_tensor(item[key]) for item in items] for key in ("input_ids", "labels")}
    packed = {key: torch.cat(values)[None] for key, values in rows.items()}
    lengths = [len(x) for x in rows["input_ids"]]
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.repeat_interleave(torch.tensor([7, 3, 11, 5]), torch.tensor(lengths))[None]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    expected = gfast.model_loss(model, packed, SimNPO(1.0, 0.0))
    plain = {key: value for key, value in packed.items() if key != "position_ids"}
    plain["position_ids"] = torch.arange(sum(lengths))[None]  # one text to the model
    as_one = gfast.model_loss(model, plain, SimNPO(1.0, 0.0))
    apart = gfast.model_loss(model, plain, SimNPO(1.0, 0.0), sequence_id=numbers)
    assert float(apart.loss.detach()) != pytest.approx(float(as_one.loss.detach()), rel=1e-3)
    logp = apart.logp[0].split(lengths)
    value = torch.stack(
        [
            -2 * torch.nn.functional.logsigmoid(-x[1:].sum() / (y[1:] != -100).sum())
            for x, y in zip(logp, rows["labels"], strict=True)
        ]
    ).mean()
    torch.testing.assert_close(apart.loss, value)
    both = gfast.model_loss(model, {**packed, "cu_seq_lens_q": bounds}, SimNPO(1.0, 0.0))
    torch.testing.assert_close(both.loss, expected.loss)
    with pytest.raises(ValueError, match="sequence_id must be integers of the shape of labels"):
        gfast.model_loss(model, packed, SimNPO(1.0, 0.0), sequence_id=numbers[:, 1:])
    sees = (numbers[0, :, None] == numbers[0]).tril()[None, None]  # [1, 1, T, T]
    for mask in (sees, torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)):
        hidden = gfast.model_loss(model, {**plain, "attention_mask": mask}, SimNPO(1.0, 0.0))
        torch.testing.assert_close(hidden.loss, expected.loss)


def test_logits_that_are_made_are_said_once(caplog):
    class Peeking(type(tiny_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1.0
            return out

    hf._log_materialised.cache_clear()
    batch = collator()(columns(datasets()[0])[:2])
    model = Peeking(tiny_model().config)
    with caplog.at_level(logging.WARNING, "gfast"):
        for _ in range(3):
            gfast.model_loss(model, batch, GA())
        gfast.model_loss(tiny_model(), batch, GA())
    said = [record.getMessage() for record in caplog.records if "logits of whole batches" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("Peeking: ") and "add" in said[0]
