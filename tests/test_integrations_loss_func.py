"""`gfast_loss_func`: gfast's losses as the compute_loss_func of a Trainer of transformers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.literal_losses import assert_same, gradients, literal
from helpers.training_tiny import collator, copied, datasets, parameters, tiny_model
from test_integrations_transformers import TOKENS, arguments, columns, trained
from transformers import DataCollatorWithFlattening, Trainer
from transformers.modeling_outputs import MaskedLMOutput, Seq2SeqLMOutput

from gfast.integrations.transformers import gfast_loss_func
from gfast.objectives import DPO, ETW, GA, KL, NPO, PDU, RMU, TNPO, WGA, WTNPO, Mix, SimNPO


@pytest.mark.parametrize("objective", TOKENS, ids=str)
def test_a_loss_func_is_the_gradient_of_one_big_batch(tmp_path, objective):
    items, start = columns(datasets()[0]), tiny_model()
    twin = copied(start).double()
    expected = literal(objective, twin, [collator()(items)])
    expected.backward()
    for batch_size, accumulate in ((6, 1), (2, 3), (4, 2)):
        model = copied(start)
        func = gfast_loss_func(objective)
        run = trained(model, tmp_path, items, None, batch_size, accumulate, Trainer, compute_loss_func=func)
        assert_same(run.first.found, gradients(twin))
    before = parameters(model)
    unlabelled = [{**item, "labels": torch.full_like(item["labels"], -100)} for item in items]
    run = trained(model, tmp_path, unlabelled, None, 2, 3, Trainer, compute_loss_func=func)
    assert run.state.log_history[0]["loss"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@pytest.mark.parametrize("known", [True, False])
def test_a_loss_func_over_a_count_of_first_tokens_is_refused(tmp_path, known):
    """Of a class whose name says nothing of its loss Trainer counts labels that nothing scores."""

    class Own(type(tiny_model())):
        pass

    items, start = [{**item, "labels": item["input_ids"]} for item in columns(datasets()[0])], tiny_model()
    model = start if known else Own(start.config)
    shifts = getattr(Trainer(model, arguments(tmp_path)), "_loss_shifts_labels", False)
    options = dict(trainer=Trainer, compute_loss_func=gfast_loss_func(GA()))
    if not shifts:
        with pytest.raises(ValueError, match="counts the labels of this model's first tokens"):
            trained(model, tmp_path, items, **options)
        return
    twin = copied(start).double()
    literal(GA(), twin, [collator()(items)]).backward()
    assert known
    assert_same(trained(model, tmp_path, items, **options).first.found, gradients(twin))


@pytest.mark.parametrize("objective", [NPO(), SimNPO(), DPO(), TNPO(), WTNPO(), KL(), RMU(layer=1), Mix(GA())], ids=str)
def test_a_loss_func_refuses_what_tokens_alone_do_not_give(objective):
    with pytest.raises(ValueError, match="GFastLossMixin"):
        gfast_loss_func(objective)


def test_a_loss_func_refuses_the_trainers_label_smoothing_unasked(tmp_path):
    items, model = columns(datasets()[0]), tiny_model()
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = Trainer(
        model, args, train_dataset=items, data_collator=collator(), compute_loss_func=gfast_loss_func(GA())
    )
    with pytest.raises(ValueError, match="label_smoothing_factor has no meaning"):
        trainer.train()


@pytest.mark.parametrize("objective, refused", [(ETW(), True), (lambda logp, ref, ids: logp, True), (WGA(), False)])
def test_a_loss_func_refuses_whole_texts_where_rows_hold_several(tmp_path, objective, refused):
    items, model = columns(datasets()[0]), tiny_model()
    options = dict(data_collator=DataCollatorWithFlattening(), compute_loss_func=gfast_loss_func(objective))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=items, **options)
    with pytest.raises(ValueError, match="looks at whole texts") if refused else contextlib.nullcontext():
        trainer.train()


def test_a_loss_func_has_no_dual_variable():
    with pytest.raises(ValueError, match="dual variable.*retain loss, and there is none"):
        gfast_loss_func(PDU(primal_dual=True))


def test_a_loss_func_without_labels_or_logits_says_so():
    func = gfast_loss_func(GA())
    with pytest.raises(ValueError, match="no labels"):
        func({"logits": torch.zeros(1, 2, 3)}, None)
    with pytest.raises(ValueError, match="no logits"):
        func({"loss": torch.zeros(())}, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="DataParallel"):
        func({"logits": torch.zeros(1, 2, 3)}, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]))
    for kind in (MaskedLMOutput, Seq2SeqLMOutput):
        with pytest.raises(ValueError, match=f"{kind.__name__} is not of a causal"):
            func(kind(logits=torch.zeros(1, 2, 3)), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="label_smoothing_factor has no meaning"):
        gfast_loss_func(GA(), arguments("unused", label_smoothing_factor=0.1))
