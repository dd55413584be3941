"""gfast's losses in TRL's trainers: preferences the right way round, padding-free rows, references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from helpers.literal_losses import FirstGradient, assert_same, gradients, literal
from helpers.training_tiny import TOKENIZER, copied, tiny_model
from transformers import Trainer, TrainingArguments

import gfast
from gfast.integrations.trl import GFastLossMixin, dpo_batch
from gfast.objectives import DPO, ETW, NPO, TPO, WGA, Mix, SimNPO


class Mine(GFastLossMixin, Trainer):
    pass


PROMPTS, CHOSEN, REJECTED = [[1, 2, 3], [4, 5]], [[6, 7], [8]], [[9], [10, 11, 12]]


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def preferences():
    """What TRL's collator makes: chosen answers, then rejected ones."""
    texts = [p + a for answers in (CHOSEN, REJECTED) for p, a in zip(PROMPTS, answers, strict=True)]
    masks = [
        [0] * len(p) + [1] * len(a) for answers in (CHOSEN, REJECTED) for p, a in zip(PROMPTS, answers, strict=True)
    ]
    attention = padded([[1] * len(text) for text in texts], 0)
    return (
        {"input_ids": padded(texts, 0), "attention_mask": attention, "completion_mask": padded(masks, 0)},
        texts,
        masks,
    )


def in_one_row(texts, masks, bounds):
    batch = {"input_ids": torch.tensor([sum(texts, [])]), "completion_mask": torch.tensor([sum(masks, [])])}
    lengths = list(map(len, texts))
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    if bounds:
        batch["cu_seq_lens_q"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return batch


def test_halves_are_exchanged_and_answers_labelled():
    batch, texts, masks = preferences()
    kept = {key: value.clone() for key, value in batch.items()}
    out = dpo_batch(batch)
    assert out["input_ids"][0, :4].tolist() == PROMPTS[0] + REJECTED[0] and "completion_mask" not in out
    answers = [[token for token in row if token != -100] for row in out["labels"].tolist()]
    assert answers == [*REJECTED, *CHOSEN]
    assert all((batch[key] == value).all() for key, value in kept.items())  # a new dict
    assert (out["attention_mask"].sum(1) == torch.tensor([4, 5, 5, 3])).all()
    named = dpo_batch({**batch, "adapter_names": ["a", "a", "b", "b"]})  # of the rows, in PEFT's models
    assert named["adapter_names"] == ["b", "b", "a", "a"]


@pytest.mark.parametrize("engine", ["stream", "gram"])
def test_effects_take_no_pairs_for_answers_to_forget(engine):
    model, pairs = tiny_model(), dpo_batch(preferences()[0])
    plain = dict(pairs)
    assert gfast.g_effect(model, WGA(), forget=plain, retain=plain, engine=engine).unlearn
    for sides in (dict(forget=pairs, retain=plain), dict(forget=plain, retain=pairs)):
        with pytest.raises(ValueError, match="holds pairs.* take both for answers to forget"):
            gfast.g_effect(model, WGA(), **sides, engine=engine)


@pytest.mark.parametrize("bounds", [False, True])
def test_a_padding_free_row_is_the_padded_batch(bounds):
    batch, texts, masks = preferences()
    torch.manual_seed(0)
    model, original = tiny_model(), tiny_model(seed=1)
    losses, sides = [], (dpo_batch(batch), dpo_batch(in_one_row(texts, masks, bounds)))
    for side in sides:
        with torch.no_grad():
            ref = gfast.model_logp(original, side)
        losses.append(gfast.model_loss(model, side, DPO(0.1), ref_logp=ref).loss)
    expected = literal(DPO(0.1), model.double(), [sides[0]], original.double())
    assert [float(x.detach()) for x in losses] == pytest.approx([expected.item()] * 2, rel=1e-4)
    if bounds:
        assert sides[1]["cu_seq_lens_q"].tolist() == [0, 4, 9, 14, 17]


@pytest.mark.parametrize("one_row", [False, True])
def test_an_evaluation_is_of_the_answers_to_forget(tmp_path, one_row):
    class Preferring(Mine):
        def gfast_batch(self, batch):
            return dpo_batch(batch)

    model = tiny_model(attn_implementation="eager").eval()
    batch, texts, masks = preferences()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Preferring(model, args=args, objective=DPO(0.1))
    apart = {"input_ids": batch["input_ids"][2:], "attention_mask": batch["attention_mask"][2:]}
    logits = model(**apart).logits[:, :-1].double()
    logp = logits.log_softmax(-1).gather(-1, apart["input_ids"][:, 1:, None])[..., 0]
    expected = -logp[batch["completion_mask"][2:, 1:].bool()].mean().item()
    given = in_one_row(texts, masks, bounds=False) if one_row else batch
    found, *_ = trainer.prediction_step(model, given, prediction_loss_only=True)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_no_batch_of_preferences_is_refused():
    batch, texts, masks = preferences()
    with pytest.raises(ValueError, match="completion_mask is missing"):
        dpo_batch({key: value for key, value in batch.items() if key != "completion_mask"})
    with pytest.raises(ValueError, match="precompute_ref_log_probs=False"):
        dpo_batch({**batch, "ref_chosen_logps": torch.zeros(2)})
    with pytest.raises(ValueError, match="3 rows are no pairs"):
        dpo_batch({key: value[:3] for key, value in batch.items()})
    three = {key: torch.cat([value, value[:2]]) for key, value in batch.items()}  # as TPOTrainer's collator has them
    with pytest.raises(ValueError, match="rows 0 and 3 of 6 answer different prompts"):
        dpo_batch(three)
    empty = {**batch, "completion_mask": batch["completion_mask"].clone()}
    empty["completion_mask"][3] = 0
    with pytest.raises(ValueError, match="the rejected answer 1 of a batch has no tokens"):
        dpo_batch(empty)
    row = in_one_row(texts, masks, False)
    with pytest.raises(ValueError, match="nothing says where its answers begin"):
        dpo_batch({key: value for key, value in row.items() if key != "position_ids"})
    row["completion_mask"] = row["completion_mask"].clone()
    row["completion_mask"][0, :5] = 0
    with pytest.raises(ValueError, match="the chosen answer 0 of a batch has no tokens"):
        dpo_batch(row)


@dataclasses.dataclass
class Preferences(TrainingArguments):
    """As DPOConfig has them; DPOConfig itself where TRL is installed."""

    loss_type: list[str] = dataclasses.field(default_factory=lambda: ["sigmoid"])
    label_smoothing: float = 0.0
    beta: float = 0.1
    precompute_ref_log_probs: bool = False
    sync_ref_model: bool = False  # has its effect


@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"loss_type": "sigmoid"}, {"sync_ref_model": True}], ids=str)
def test_options_of_the_loss_may_be_as_they_are(tmp_path, options):
    with_options(tmp_path, objective=DPO(0.5) if options else DPO(0.2), **options)


@pytest.mark.parametrize(
    "options",
    [{"loss_type": ["ipo"]}, {"label_smoothing": 0.1}, {"beta": 0.4}, {"precompute_ref_log_probs": True}],
    ids=str,
)
def test_options_of_a_loss_that_is_not_computed_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.* cannot be used with .*DPO\(beta=0.2\) stands"):
        with_options(tmp_path, objective=DPO(0.2), **options)


@pytest.mark.parametrize("objective", [SimNPO(), NPO(), ETW(), Mix(WGA(), TPO())], ids=str)
def test_packing_that_cuts_texts_is_refused_for_objectives_over_whole_texts(tmp_path, objective):
    for strategy, fine in (("wrapped", WGA()), ("bfd", objective)):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        args.packing, args.packing_strategy = True, strategy
        Mine(tiny_model(), args=args, objective=fine)
    args.packing_strategy = "wrapped"
    with pytest.raises(ValueError, match="'wrapped' cannot be used with Mine: .* looks at whole texts"):
        Mine(tiny_model(), args=args, objective=objective)


def with_options(folder, objective, **options):
    try:
        from trl import DPOConfig
    except ImportError:
        Preferences.__module__, DPOConfig = "trl.trainer.dpo_config", Preferences
    args = DPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **options)
    return Mine(tiny_model(), args=args, objective=objective)


def test_an_adapter_of_its_own_is_the_original():
    """As TRL keeps a copy named ref of an adapter that is trained on."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), config)
    model.add_adapter("ref", config)
    batch = dpo_batch(preferences()[0])
    model.set_adapter("ref")
    with torch.no_grad():
        ref = gfast.model_logp(model, batch)
    model.set_adapter("default")
    flags = [p.requires_grad for p in model.parameters()]
    expected = gfast.model_loss(model, batch, DPO(0.1), ref_logp=ref).loss
    found = gfast.model_loss(model, batch, DPO(0.1), reference="adapter:ref").loss
    torch.testing.assert_close(found, expected)
    assert flags == [p.requires_grad for p in model.parameters()] and model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="adapters are not zero"):
        gfast.model_loss(model, batch, DPO(0.1))
    with pytest.raises(ValueError, match="no adapter of that name"):
        gfast.model_loss(model, batch, DPO(0.1), reference="adapter:other")
    with pytest.raises(ValueError, match="that is the active adapter"):
        gfast.model_loss(model, batch, DPO(0.1), reference="adapter:default")
    next(p for n, p in model.named_parameters() if ".ref." in n).requires_grad_(True)
    with pytest.raises(ValueError, match="a part of the reference, is trained"):
        gfast.model_loss(model, batch, DPO(0.1), reference="adapter:ref")


def rows(**fields):
    return Dataset.from_list([{k: v.format(i=i, words=" more" * (i % 3)) for k, v in fields.items()} for i in range(4)])


def options(folder, **more):
    settings = dict(output_dir=str(folder), use_cpu=True, bf16=False, max_steps=1, optim="sgd", max_grad_norm=0.0)
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none", disable_tqdm=True)
    return dict(settings, save_strategy="no", max_length=None, **more)


@pytest.mark.parametrize("padding_free", [False, True])
def test_sft(tmp_path, padding_free):
    trl = pytest.importorskip("trl")

    class ForgetSFT(GFastLossMixin, trl.SFTTrainer):
        objective = WGA(alpha=1.0)

    model, first = tiny_model(), FirstGradient()
    twin = copied(model).double()
    args = trl.SFTConfig(**options(tmp_path, padding_free=padding_free))
    data = rows(prompt="Question {i}: who?", completion=" Answer {i} is nobody{words}")
    trainer = ForgetSFT(model, args=args, train_dataset=data, processing_class=TOKENIZER, callbacks=[first])
    trainer.train()
    items = [trainer.train_dataset[index] for index in range(4)]
    batch = {key: padded([item[key] for item in items], fill) for key, fill in (("input_ids", 0), ("labels", -100))}
    batch["attention_mask"] = padded([[1] * len(item["input_ids"]) for item in items], 0)
    literal(WGA(1.0), twin, [batch]).backward()
    assert_same(first.found, gradients(twin))


def test_dpo(tmp_path):
    trl = pytest.importorskip("trl")

    class ForgetDPO(GFastLossMixin, trl.DPOTrainer):
        objective = DPO(beta=0.1)

        def gfast_batch(self, batch):
            return dpo_batch(batch)

    model, original, first = tiny_model(seed=1), tiny_model(), FirstGradient()
    twin = copied(model).double()
    data = rows(prompt="Question {i}: who?", chosen=" I do not know{words}", rejected=" Answer {i} is nobody")
    args = trl.DPOConfig(**options(tmp_path))
    trainer = ForgetDPO(
        model,
        args=args,
        ref_model=copied(original),
        train_dataset=data,
        processing_class=TOKENIZER,
        callbacks=[first],
    )
    trainer.train()
    batch = dpo_batch(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]))
    literal(DPO(0.1), twin, [batch], original.double()).backward()
    assert_same(first.found, gradients(twin))
