"""gfast's losses in a Trainer over models and batches as others have them, each against fp64: one step is the gradient
of one big batch.
"""

from __future__ import annotations

import pytest
import torch
from helpers.literal_losses import FirstGradient, assert_same, gradients, literal
from helpers.training_tiny import TOKENIZER, collator, config, copied, datasets, pairing, parameters, tiny_model
from test_integrations_transformers import Forget, arguments, columns

import gfast
from gfast.objectives import GA, NPO, SimNPO
from gfast.training.trainer import UnlearnTrainer

SIMNPO, NPO_ = SimNPO(4.5, 0.0), NPO(beta=0.1)


class WithReference(Forget):
    ref_model = tiny_model(seed=1)


def stepped(model, folder, objective=SIMNPO, items=None, collate=None, trainer=Forget, **options):
    """The first gradient of three micro-batches of two."""
    options = dict(remove_unused_columns=False, per_device_train_batch_size=2, gradient_accumulation_steps=3) | options
    items, first = columns(datasets()[0]) if items is None else items, FirstGradient()
    args = arguments(folder, **options)
    run = trainer(model, args=args, train_dataset=items, data_collator=collate or collator(), objective=objective)
    run.add_callback(first)
    run.train()
    return {name.replace("_orig_mod.", ""): gradient for name, gradient in first.found.items()}


def expected(model, objective=SIMNPO, items=None, batch=None, original=None):
    """Of all rows at once, in fp64."""
    twin = copied(model).double()
    batch = collator()(columns(datasets()[0]) if items is None else items) if batch is None else batch
    positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    loss = literal(objective, lambda **given: twin(**given, **positions), [batch], original and original.double())
    loss.backward()
    return gradients(twin)


@pytest.mark.parametrize("positions", [None, 0, 1])
def test_rows_padded_on_the_left(tmp_path, positions):
    def collate(items):
        batch = collator()(items)
        width, lengths = batch["labels"].shape[1], batch["attention_mask"].sum(1)
        for key in ("input_ids", "attention_mask", "labels"):
            batch[key] = torch.stack([x.roll(int(width - n)) for x, n in zip(batch[key], lengths, strict=True)])
        if positions is not None:  # of padding: 0, or 1 as generate() has it
            places = batch["attention_mask"].cumsum(1) - 1
            batch["position_ids"] = places.masked_fill(batch["attention_mask"] == 0, positions)
        return batch

    model, items = tiny_model(), columns(datasets()[0])
    batch = collate(items)
    assert (batch["attention_mask"][:, 0] == 0).any()
    assert_same(stepped(copied(model), tmp_path, collate=collate), expected(model, batch=batch))


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_was_resized(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(len(TOKENIZER) + 7, mean_resizing=False)
    items = columns(datasets()[0])
    for item in items:
        for key in ("input_ids", "labels"):
            item[key] = torch.as_tensor(item[key]).clone()
            item[key][-1] = len(TOKENIZER) + 3
    assert_same(stepped(copied(model), tmp_path, items=items), expected(model, items=items))


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_adapters_beside_trained_copies_of_modules(tmp_path, saved):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    model = peft.get_peft_model(tiny_model(), config)
    found = expected(model, NPO_, original=tiny_model())
    assert_same(stepped(copied(model), tmp_path, NPO_, gradient_checkpointing=True), found)


@pytest.mark.parametrize("way", ["object", "method", "blocks"])
def test_a_model_that_its_owner_compiled(tmp_path, way):
    model = tiny_model()
    found = expected(model)
    if way == "object":
        model = torch.compile(model, backend="eager")
    for module in {"object": [], "method": [model], "blocks": getattr(model, "model", model).layers}[way]:
        module.compile(backend="eager")
    assert_same(stepped(model, tmp_path), found)


def test_checkpoints_and_a_reference_model(tmp_path):
    model = tiny_model()
    found = expected(model, NPO_, original=copied(WithReference.ref_model))
    assert_same(stepped(model, tmp_path, NPO_, trainer=WithReference, gradient_checkpointing=True), found)


def test_a_model_with_a_loss_function_of_its_own(tmp_path):
    model = tiny_model()
    found = expected(model)
    model.loss_function = lambda logits, labels, vocab_size=None, **given: logits.float().pow(2).mean()
    assert_same(stepped(model, tmp_path), found)


@pytest.mark.parametrize(
    "option", [{"surgery": "gru:group"}, {"weights": "retain_conflict", "weights_every": 100}], ids=str
)
def test_a_second_training_is_one_from_its_beginning(tmp_path, option):
    """As of a trainer made anew: without the averages and the token weights of the training before."""
    found = []
    for anew in (False, True):
        model, (data, collate) = tiny_model(), pairing()
        args = config(tmp_path / str(anew), optim="sgd", objective="WGA", retain_term="nll", max_steps=2, **option)
        args.learning_rate = 0.5
        given = dict(train_dataset=data, data_collator=collate)
        trainer = UnlearnTrainer(model, args, **given)
        trainer.train()
        trainer = UnlearnTrainer(model, args, **given) if anew else trainer
        trainer.train()
        found.append(parameters(model))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("nested", [False, True])
def test_an_evaluation_of_pairs_is_of_the_answers_to_forget(tmp_path, nested):
    """An NLL over those that are to be preferred too rises and falls at once."""
    data, collate = pairing("pairs") if nested else (datasets("pairs")[0], collator())
    losses = []
    for evaluated in (data, datasets()[0]):
        args = config(tmp_path, objective="DPO", per_device_eval_batch_size=4)
        collate = collate if evaluated is data else collator()
        trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate)
        found = trainer.evaluate(evaluated)
        losses.append(found.get("eval_forget_loss", found["eval_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_adapters_that_were_merged_are_not_trained_or_measured(tmp_path):
    """The model runs without them: effects of 0, and losses that reach nothing."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    batch, args = collator()(columns(datasets()[0])), config(tmp_path)
    model.merge_adapter()
    trainer = UnlearnTrainer(model, args, train_dataset=datasets()[0], data_collator=collator())
    for attempt in (
        trainer.train,
        lambda: gfast.g_effect(model, GA(), forget=[batch], retain=[batch]),
        lambda: gfast.GEffectMonitor(model),
    ):
        with pytest.raises(ValueError, match="have been merged into .*q_proj"):
            attempt()
    model.unmerge_adapter()
    assert gfast.g_effect(model, GA(), forget=[batch], retain=[batch]).total("unlearn") < 0
