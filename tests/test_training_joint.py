"""Both sides in one call of the model: the losses and gradients of two calls, fewer gathers, and who refuses it."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import training_joint
from helpers.training_tiny import TOKENIZER, config, datasets, in_processes, pairing, tiny_model
from test_training import cache_for

from gfast.data import ForgetRetainCollator
from gfast.objectives import CEU, DPO, GA, KL, NLL, NPO, PDU, RMU, RR, WGA, JensUn, Mix
from gfast.training.trainer import UnlearnTrainer

MIXES = [Mix(WGA(), NLL(), alpha=0.5), Mix(NPO(), KL()), Mix(DPO(), NLL()), Mix(PDU(), NLL()), Mix(CEU(), KL()),
         Mix(JensUn((3, 4)), NLL())]  # fmt: skip


def trainer_of(folder, mix, model, joint, **options):
    kind = "pairs" if mix.forget.key == "dpo" else "qa"
    forget, retain = datasets(kind)
    references = {"forget": cache_for(mix.forget, forget, model), "retain": cache_for(mix.retain, retain, model)}
    references = {side: cache for side, cache in references.items() if cache is not None}
    data, collate = pairing(kind)
    args = config(folder, joint_forward=joint, per_device_train_batch_size=3, optim="sgd", **options)
    return UnlearnTrainer(model, args, objective=mix, references=references, train_dataset=data, data_collator=collate)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_one_call_gives_what_two_give(tmp_path, mix):
    """Sides of unlike lengths, in fp64."""
    start, found, calls = tiny_model().double(), [], []
    for joint in (False, True):
        model = copy.deepcopy(start)
        trainer = trainer_of(tmp_path / str(joint), mix, model, joint)
        with torch.no_grad():  # away from the original
            for parameter in model.parameters():
                parameter.mul_(1.01)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["forget"]["input_ids"].shape[1] != batch["retain"]["input_ids"].shape[1]
        count = []
        handle = model.register_forward_hook(lambda *_: count.append(1))  # noqa: B023
        loss = trainer.compute_loss(model, batch)
        handle.remove()
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
        calls.append(len(count))
    assert calls == [2, 1]
    (two, gradients), (one, joint) = found
    assert one == pytest.approx(two, rel=1e-12)
    for name, value in gradients.items():
        torch.testing.assert_close(joint[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_a_training_is_the_same(tmp_path):
    losses = []
    for joint in (False, True):
        trainer = trainer_of(tmp_path / str(joint), Mix(NPO(), NLL()), tiny_model(), joint, max_steps=3,
                             gradient_accumulation_steps=2)  # fmt: skip
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "objective, options, words",
    [
        (GA(), {}, "is one side alone"),
        (Mix(GA(), NLL()), {"geffect_live": True}, "both sides apart"),
        (Mix(GA(), NLL()), {"own_loss_terms": True}, "adds to its own loss"),
        (Mix(RMU(layer=1), RR(layer=1)), {}, "stops at a layer"),
    ],
)
def test_what_needs_calls_of_its_own(tmp_path, objective, options, words):
    data, collate = pairing()
    args = config(tmp_path, joint_forward=True, **options)
    with pytest.raises(ValueError, match=f"joint_forward has no use here: .*{words}"):
        UnlearnTrainer(tiny_model(), args, objective=objective, train_dataset=data, data_collator=collate)


def test_batches_that_hold_more_for_the_model(tmp_path):
    class Positions(ForgetRetainCollator):
        def __call__(self, items):
            batch = super().__call__(items)
            shape = batch["retain"]["input_ids"].shape
            batch["retain"]["position_ids"] = torch.arange(shape[1]).expand(shape)
            return batch

    data, _ = pairing()
    args = config(tmp_path, joint_forward=True)
    trainer = UnlearnTrainer(tiny_model(), args, objective=Mix(GA(), NLL()), train_dataset=data,
                             data_collator=Positions(TOKENIZER))  # fmt: skip
    with pytest.raises(ValueError, match="the retain batch has position_ids: leave joint_forward out"):
        trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["forget"]["attention_mask"] = batch["forget"]["attention_mask"][:, None, None].expand(-1, 1, 4, -1)
    with pytest.raises(ValueError, match="the forget batch has an attention_mask of pairs of tokens"):
        trainer.compute_loss(trainer.model, batch)


def test_fsdp2_gathers_less_often(tmp_path):
    in_processes(training_joint.check, str(tmp_path), world=2)
