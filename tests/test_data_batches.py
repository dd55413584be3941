"""Data: pairing of forget and retain, collation."""

from __future__ import annotations

import copy
import doctest
import importlib
import importlib.util
import types
import warnings

import numpy
import pytest
import torch
from helpers.data_chat import ROWS

from gfast.data import (
    Collator,
    ForgetRetain,
    ForgetRetainCollator,
    PreferenceDataset,
    QADataset,
    RefusalDataset,
    batches,
    bundled_authors,
    demo_tokenizer,
    epoch_callback,
)


def test_forget_retain_pairs_by_seed_and_epoch():
    forget, retain = list(range(100, 107)), list(range(20))
    data = ForgetRetain(forget, retain, seed=5)
    first = [data[i] for i in range(len(data))]
    assert [item["forget"] for item in first] == forget
    assert len({item["retain"] for item in first}) == 7, "no retain item twice before all have come once"
    data.set_epoch(1)
    second = [data[i]["retain"] for i in range(7)]
    assert second != [item["retain"] for item in first]
    other = ForgetRetain(forget, retain, seed=5)
    other.set_epoch(1)
    assert [other[i]["retain"] for i in (6, 0, 3)] == [second[i] for i in (6, 0, 3)], "any order of access"
    data.set_epoch(0)
    assert [data[i] for i in range(7)] == first
    assert [ForgetRetain(forget, retain, seed=6)[i]["retain"] for i in range(7)] != [i["retain"] for i in first]


def test_numbers_of_numpy_draw_as_pythons_and_others_are_refused():
    pairs = [ForgetRetain(range(5), range(9), seed=seed).partners() for seed in (3, numpy.int64(3), numpy.int32(3))]
    assert pairs[0] == pairs[1] == pairs[2]
    for seed in (None, 1.5, "3", float("nan"), True):
        with pytest.raises(ValueError, match="seed is .*; give a whole number"):
            ForgetRetain(range(5), range(9), seed=seed)
        with pytest.raises(ValueError, match="seed is .*; give a whole number"):
            RefusalDataset([{"question": "Who?", "answer": "Me."}], demo_tokenizer(), seed=seed)
    for kind in (RefusalDataset, PreferenceDataset):  # a text is a sequence of letters
        with pytest.raises(ValueError, match="refusals is 'No.', and a list of texts is needed"):
            kind([{"question": "Who?", "answer": "Me."}], demo_tokenizer(), refusals="No.")
    for multiple in (0, 2.5, "8", True):
        with pytest.raises(ValueError, match="pad_to_multiple_of is .*; give a whole number, 1 or more"):
            Collator(demo_tokenizer(), pad_to_multiple_of=multiple)


def test_texts_that_are_to_be_forgotten_and_kept_are_said():
    """With their number and the first; texts whose answers alone differ are other texts."""
    forget, retain = (rows[:4] for rows in bundled_authors())
    retain = [retain[0], forget[2], {**forget[1], "answer": "Another."}, forget[3], forget[3]]
    said = r"gfast: 2 of 4 forget items are in the retain set too, the first as item 3 of the forget set and 2 of the"
    for kind in (QADataset, PreferenceDataset):
        with pytest.warns(UserWarning, match=said):
            ForgetRetain(kind(forget, demo_tokenizer()), QADataset(retain, demo_tokenizer()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForgetRetain(QADataset(forget, demo_tokenizer()), QADataset(retain[:1], demo_tokenizer()))


def test_forget_retain_covers_a_small_retain_set_evenly():
    partners = ForgetRetain(list(range(10)), list("abc"), seed=0).partners()
    assert sorted(partners[:9]) == [0] * 3 + [1] * 3 + [2] * 3
    assert all(sorted(partners[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))
    for sides in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="set is empty"):
            ForgetRetain(*sides)


def test_persistent_workers_see_the_new_epoch():
    data = ForgetRetain(list(range(6)), list(range(50)), seed=2)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=3,
        num_workers=1,
        persistent_workers=True,
        collate_fn=lambda items: [i["retain"] for i in items],
    )
    for epoch in (0, 1):
        data.set_epoch(epoch)
        assert sum(loader, []) == data.partners()
        assert data.epoch == epoch


def test_epoch_callback_in_a_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data, seen = ForgetRetain([torch.ones(1)] * 4, [torch.ones(1)] * 9, seed=1), []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(data.epoch)
            return {"loss": (self.weight * x).sum()}

    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        Model(), args, train_dataset=data, callbacks=[epoch_callback(data)],
        data_collator=lambda items: {"x": torch.cat([i["retain"] for i in items])},
    ).train()  # fmt: skip
    assert seen == [0, 0, 1, 1, 2, 2]


def test_epoch_callback_rounds_a_tick_below_up():
    data = ForgetRetain([1], [2])
    callback = epoch_callback(data)
    for epoch, expected in [(None, 0), (0.0, 0), (1.9999999, 2), (1.5, 1)]:
        callback.on_epoch_begin(None, types.SimpleNamespace(epoch=epoch), None)
        assert data.epoch == expected


def test_epoch_callback_holds_against_accelerate_until_the_training_ends():
    data = ForgetRetain([1], [2])
    callback = epoch_callback(data)
    callback.on_epoch_begin(None, types.SimpleNamespace(epoch=2.0), None)
    data.set_epoch(0)  # as accelerate up to 1.6 does after a resume within an epoch
    assert data.epoch == 2
    callback.on_train_end(None, None, None)
    data.set_epoch(0)
    assert data.epoch == 0


class Cache:
    """A reference cache of known values: ref_logp[b, t] = -(sample_id + t / 100)."""

    def join(self, sample_ids, lengths, padded_length):
        values = torch.zeros(len(sample_ids), padded_length)
        for b, (sample_id, length) in enumerate(zip(sample_ids, lengths, strict=True)):
            values[b, :length] = -(sample_id + torch.arange(length) / 100)
        return {"ref_logp": values}


def test_collator_pads_right_and_masks():
    tokenizer, data = demo_tokenizer(), QADataset(ROWS, demo_tokenizer(), id_offset=7)
    lengths = [len(item["input_ids"]) for item in data]
    batch = Collator(tokenizer)(list(data))
    assert batch["input_ids"].shape == (3, max(lengths))
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["sample_id"].tolist() == [7, 8, 9] and batch["attention_mask"].sum(1).tolist() == lengths
    for b, item in enumerate(data):
        n = lengths[b]
        assert torch.equal(batch["input_ids"][b, :n], item["input_ids"])
        assert torch.equal(batch["labels"][b, :n], item["labels"])
        assert (batch["labels"][b, n:] == -100).all() and (batch["input_ids"][b, n:] == tokenizer.pad_token_id).all()
    rounded = Collator(9, pad_to_multiple_of=64)(list(data))
    assert rounded["input_ids"].shape == (3, (max(lengths) + 63) // 64 * 64) and rounded["input_ids"][0, -1] == 9
    assert Collator(tokenizer, pad_to_multiple_of=lengths[0])([data[0]])["input_ids"].shape == (1, lengths[0])


def test_collator_takes_lists_and_items_without_ids():
    batch = Collator(0)([{"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [5], "labels": [5]}])
    assert batch["labels"].tolist() == [[-100, 4], [5, -100]] and "sample_id" not in batch
    with pytest.raises(ValueError, match="2 input_ids but 1 labels"):
        Collator(0)([{"input_ids": [3, 4], "labels": [4]}])
    with pytest.raises(ValueError, match="sample_id"):
        Collator(0, reference=Cache())([{"input_ids": [3], "labels": [3]}])
    with pytest.raises(ValueError, match="no items"):
        Collator(0)([])


def test_collator_loses_nothing_of_tokenised_items():
    item = {"input_ids": [9, 9, 5, 6], "labels": [-100, -100, 5, 6]}
    beside = {"question": "Who?", "length": [4], "index": 7, "wrong": ["a", "b"], "token_type_ids": None}
    batch = Collator(0, pad_to_multiple_of=5)([{**item, "attention_mask": [0, 0, 1, 1], **beside}, item])
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    wide = {"input_ids": [5, 6, 0, 0], "labels": [-100, 6, -100, -100], "attention_mask": [1, 1, 0, 0], "sample_id": 3}
    batch = Collator(0, reference=Cache())([{**wide, "weight": [1, 2, 0, 0]}])  # padded by a tokenizer
    assert batch["input_ids"].tolist() == [[5, 6]] and batch["weight"].tolist() == [[1, 2]]
    assert batch["ref_logp"].shape == (1, 2)
    for key in ("position_ids", "token_type_ids", "sequence_id", "pixel_values", "ref_logp"):
        with pytest.raises(ValueError, match=f"item 1 of a batch has {key}, which this collator would leave out"):
            Collator(0)([item, {**item, key: [0, 1, 0, 1]}])
    preferred = {f"preferred_{key}": value for key, value in item.items()}
    with pytest.raises(ValueError, match="item 1 of a batch has position_ids"):
        Collator(0)([{**item, **preferred, "preferred_position_ids": [0, 0, 0, 1]}])


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"input_ids": [9.7, 9, 5, 6]}, "input_ids of item 0 of a batch must be whole numbers"),
        ({"labels": [-100, float("nan"), 5, 6]}, "labels of item 0 of a batch must be whole numbers"),
        ({"input_ids": [[9, 9, 5, 6]]}, r"must be of one text, \[T\], got \(1, 4\)"),
        ({"input_ids": [], "labels": []}, r"must be of one text, \[T\], got \(0,\)"),
        ({"labels": None}, "item 0 of a batch has no labels"),
        ({"attention_mask": [1, 1]}, "4 input_ids but 2 attention_mask"),
        ({"sample_id": 1.7}, "sample_id of item 0 of a batch is 1.7"),
        ({"sample_id": "a1"}, "sample_id of item 0 of a batch is 'a1'"),
    ],
)
def test_collator_names_what_is_no_row(wrong, said):
    with pytest.raises(ValueError, match=said):
        Collator(0)([{"input_ids": [9, 9, 5, 6], "labels": [-100, -100, 5, 6], **wrong}])


def test_collator_pad_token_falls_back_to_eos():
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.pad_token = None
    assert Collator(tokenizer).pad_id == tokenizer.eos_token_id
    batch = Collator(tokenizer)(list(QADataset(ROWS, tokenizer)))
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1, 1], "the EOS that ends an answer is labelled, the padding is not"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an EOS"):
        Collator(tokenizer)


def test_collator_joins_reference_values():
    data = QADataset(ROWS, demo_tokenizer(), id_offset=10)
    batch = Collator(demo_tokenizer(), reference=Cache(), pad_to_multiple_of=16)([data[2], data[0]])
    assert batch["ref_logp"].shape == batch["labels"].shape
    assert batch["ref_logp"][:, 1].tolist() == pytest.approx([-12.01, -10.01])
    assert (batch["ref_logp"][batch["attention_mask"] == 0] == 0).all()


def test_pairs_become_one_batch_of_two_halves():
    tokenizer, (forget, _) = demo_tokenizer(), bundled_authors()
    data = PreferenceDataset(forget, tokenizer, seed=1, id_offset=1000)
    own, refused = QADataset(forget, tokenizer), RefusalDataset(forget, tokenizer, seed=1)
    batch = Collator(tokenizer, reference=Cache())([data[4], data[9], data[0]])
    assert batch["input_ids"].shape[0] == 6 and set(batch) == {
        "input_ids", "attention_mask", "labels", "sample_id", "ref_logp",
    }  # fmt: skip
    assert batch["sample_id"].tolist() == [1004, 1009, 1000, 1044, 1049, 1040]
    for b, (source, i) in enumerate([(own, 4), (own, 9), (own, 0), (refused, 4), (refused, 9), (refused, 0)]):
        n = len(source[i]["input_ids"])
        assert batch["attention_mask"][b].sum() == n
        assert torch.equal(batch["labels"][b, :n], source[i]["labels"])
        assert batch["ref_logp"][b, 1] == pytest.approx(-(batch["sample_id"][b].item() + 0.01))
    ids = {item[key] for item in data for key in ("sample_id", "preferred_sample_id")}
    assert len(ids) == 80, "every half has an id of its own"
    with pytest.raises(ValueError, match="mixes items"):
        Collator(tokenizer)([data[0], own[0]])


def test_forget_retain_collator():
    tokenizer = demo_tokenizer()
    forget, retain = (QADataset(rows, tokenizer) for rows in bundled_authors())
    data = ForgetRetain(forget, retain, seed=0)
    batch = ForgetRetainCollator(tokenizer)([data[i] for i in range(4)])
    assert batch["forget"]["sample_id"].tolist() == [0, 1, 2, 3]
    assert batch["retain"]["sample_id"].tolist() == data.partners()[:4]
    assert "ref_logp" not in batch["forget"]
    both = ForgetRetainCollator(Collator(tokenizer, reference=Cache()), Collator(tokenizer))([data[0]])
    assert "ref_logp" in both["forget"] and "ref_logp" not in both["retain"]
    same = ForgetRetainCollator(Collator(tokenizer, reference=Cache()))([data[0]])
    assert "ref_logp" in same["retain"]


def test_batches_cover_the_data_in_order():
    data = QADataset(bundled_authors()[0], demo_tokenizer())
    out = batches(data, Collator(demo_tokenizer()), 16)
    assert [len(b["sample_id"]) for b in out] == [16, 16, 8]
    assert torch.cat([b["sample_id"] for b in out]).tolist() == list(range(40))
    with pytest.raises(ValueError, match="batch_size"):
        batches(data, Collator(demo_tokenizer()), 0)


@pytest.mark.parametrize("name", ["bundled", "collate", "dataset", "ids", "jsonl", "rows", "tofu", "tokenizer"])
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"gfast.data.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_a_mask_of_the_highest_scores():
    from gfast.data import top_tokens

    labels = torch.tensor([[-100, 1, 2, 3, 4], [-100, -100, -100, -100, -100], [7, -100, 8, 9, 10]])
    scores = torch.tensor([[9.0, 2.0, 1.0, 2.0, 2.0], [1.0] * 5, [-1.0, 9.0, -3.0, -2.0, -4.0]])
    assert top_tokens(scores, labels, 0.5).tolist() == [[0, 1, 0, 1, 0], [0] * 5, [1, 0, 0, 1, 0]]
    assert top_tokens(scores, labels, 0.3).sum(1).tolist() == [2, 0, 2] and top_tokens(scores, labels, 1.0).sum() == 8
    assert top_tokens(torch.arange(10.0), torch.arange(10), 0.3).sum() == 3
    lowest = torch.tensor([9.0, -torch.inf, -torch.inf, -torch.inf, torch.nan])  # still before what is ignored
    assert top_tokens(lowest, torch.tensor([-100, 5, 6, 7, -100]), 0.6).tolist() == [0, 1, 1, 0, 0]
    for wrong in (dict(share=0.0), dict(scores=scores[:1]), dict(scores=scores * torch.nan)):
        with pytest.raises(ValueError, match="top_tokens"):
            top_tokens(**{"scores": scores, "labels": labels, **wrong})


def test_pairs_with_answers_of_another_field():
    rows = [{"question": f"Who is {name}?", "answer": name, "alternate": f"Not {name}"} for name in ("Ann", "Bob")]
    pairs = PreferenceDataset(rows, demo_tokenizer(), preferred="alternate", id_offset=5)
    assert [pairs[i]["sample_id"] for i in (0, 1)] == [5, 6]
    assert [pairs[i]["preferred_sample_id"] for i in (0, 1)] == [7, 8]
    for index, row in enumerate(rows):
        for prefix, field in (("", "answer"), ("preferred_", "alternate")):
            labels = pairs[index][f"{prefix}labels"]
            assert row[field] in demo_tokenizer().decode(labels[labels != -100])
    with pytest.raises(ValueError, match="refusals would have no effect beside preferred"):
        PreferenceDataset(rows, demo_tokenizer(), preferred="alternate", refusals=["No."])
    with pytest.raises(ValueError, match="row 1: .*other"):
        PreferenceDataset(rows, demo_tokenizer(), preferred="other")
