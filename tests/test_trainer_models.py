"""gfast's losses in a Trainer over models and batches as others have them, each against fp64: one step is the gradient
of one big batch.
"""

from __future__ import annotations

import pytest
import torch
from helpers.literal_losses import FirstGradient, assert_same, gradients, literal
from helpers.training_tiny import TOKENIZER, collator, copied, datasets, tiny_model
from test_integrations_transformers import Forget, arguments, columns

from gfast.objectives import NPO, SimNPO

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
