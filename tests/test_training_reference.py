"""The reference cache: exact values, found by sample, refused for another model or other data."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.small_models import stretching
from helpers.training_tiny import FORGET_ROWS, TOKENIZER, collator, config, copied, datasets, pairing, tiny_model

import gfast
from gfast import files
from gfast.data import Collator, QADataset
from gfast.objectives import NPO
from gfast.tensor_files import TensorFile, write_tensors
from gfast.training import UnlearnTrainer
from gfast.training.batches import ReferenceJoin, join
from gfast.training.reference import OLD_FORMATS, ReferenceCache


def plain_logp(model, batch):
    """[B, T] aligned with labels, in fp64, with nothing of gfast's in it."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    labels = batch["labels"]
    scores = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(torch.where(labels[:, 1:] != -100, scores, 0.0), (1, 0))


def test_values_do_not_depend_on_the_batches(tmp_path):
    model, (data, _) = tiny_model(), datasets()
    model.train()
    model.model.layers[0].eval()
    caches = [
        ReferenceCache.build(model, data, collator(), what={"logp", "hidden", "layer_hidden"}, layer=1, batch_size=size)
        for size in (1, 4, 6)
    ]
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    double = copied(model).double().eval()
    for index in (0, 5):
        batch = collator()([data[index]])
        expected = plain_logp(double, batch)[0]
        states = double(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
        for cache in caches:
            found = cache.get(index)
            assert found["ref_logp"].dtype == torch.float32
            torch.testing.assert_close(found["ref_logp"].double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["ref_hidden"].double(), states[-1][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["ref_layer_hidden"].double(), states[1][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(caches[0].head["ref_head"], model.lm_head.weight)
    assert caches[0].what == {"logp", "hidden", "layer_hidden"} and len(caches[0]) == 6 and 5 in caches[0]


def test_save_and_load_bit_for_bit(tmp_path):
    model, (data, _) = tiny_model(), datasets()
    path = tmp_path / "cache" / "forget.safetensors"
    built = ReferenceCache.build(model, data, collator(), path, what={"logp", "hidden"})
    loaded = ReferenceCache.load(path, model=model, dataset=data, what={"logp"})
    for index in range(len(data)):
        for key, value in built.get(index).items():
            assert torch.equal(loaded.get(index)[key], value)
    assert torch.equal(loaded.head["ref_head"], built.head["ref_head"])
    again = ReferenceCache.build(model, data, collator(), path)
    assert again.what == built.what, "an existing file is loaded and not computed again"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_log_probs_of_fp64_models_are_fp64(tmp_path):
    """In a cache, its file, batches, and those that a loss takes of its own model."""
    model, (data, _) = tiny_model().double(), datasets()
    model.lm_head.weight.data *= 1000
    path = tmp_path / "reference.safetensors"
    cache = ReferenceCache.build(model, data, collator(), path)
    batch = collator()([data[0], data[3]])
    expected = plain_logp(model, batch)
    assert expected.min() < -100, "where fp32 is 1e-5 off"
    for found in (cache, ReferenceCache.load(path, model=model)):
        joined = join(found, batch)["ref_logp"]
        assert joined.dtype == torch.float64
        torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-10)
    # Its own original: the value of NPO is log 2 of every text, its gradient that of GA.
    loss = gfast.model_loss(model, {**batch, **join(cache, batch)}, NPO(beta=1.0)).loss
    assert abs(loss.item() - 2 * math.log(2)) < 1e-10
    file = TensorFile(path, "")
    tensors = {name: file.get(name) for name in file.names}
    write_tensors(
        path, tensors | {"ref_logp": tensors["ref_logp"].float()}, file.description | {"format": OLD_FORMATS[1]}
    )
    with pytest.raises(ValueError, match="rounded the log-probs of fp64 models to fp32; delete it"):
        ReferenceCache.build(model, data, collator(), path)


def test_deepspeed_leaves_reference_values_as_they_are(tmp_path, monkeypatch):
    """Trainer casts floating point inputs to the dtype of DeepSpeed's settings."""
    data, collate = pairing()
    cache = ReferenceCache.build(tiny_model(), data.forget, collator())
    options = dict(train_dataset=data, data_collator=collate, objective=NPO(), references={"forget": cache})
    trainer = UnlearnTrainer(tiny_model(), config(tmp_path), **options)
    batch = trainer.data_collator([data[0], data[1]])
    batch["forget"]["pixel_values"] = torch.ones(2, 3)
    settings = SimpleNamespace(dtype=lambda: torch.bfloat16)
    plugin = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=settings)))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trainer, "accelerator", plugin)
    moved = trainer._prepare_inputs(batch)["forget"]
    assert torch.equal(moved["ref_logp"], batch["forget"]["ref_logp"])
    assert moved["pixel_values"].dtype == torch.bfloat16, "which the model takes"


def test_another_model_other_data_or_too_little_is_refused(tmp_path):
    model, (data, _) = tiny_model(), datasets()
    path = tmp_path / "reference.safetensors"
    ReferenceCache.build(model, data, collator(), path, what={"layer_hidden"}, layer=1)
    other = copied(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 2] += 1e-6
    with pytest.raises(ValueError, match=r"reference.safetensors: .*for another model .*delete the file"):
        ReferenceCache.load(path, model=other, dataset=data)
    with pytest.raises(ValueError, match="for another model"):
        ReferenceCache.load(path, model=copied(model).bfloat16())
    changed = [dict(entry) for entry in FORGET_ROWS]
    changed[4]["answer"] += "!"
    with pytest.raises(ValueError, match="for other data .*delete the file"):
        ReferenceCache.load(path, model=model, dataset=QADataset(changed, TOKENIZER))
    with pytest.raises(ValueError, match=r"not \['logp'\]"):
        ReferenceCache.load(path, what={"logp"})
    with pytest.raises(ValueError, match="of layer 1, not 0"):
        ReferenceCache.load(path, what={"layer_hidden"}, layer=0)
    with pytest.raises(ValueError, match="for another model"):
        ReferenceCache.build(other, data, collator(), path, what={"layer_hidden"}, layer=1)
    with pytest.raises(FileNotFoundError, match="no reference cache"):
        ReferenceCache.load(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        ReferenceCache.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        ReferenceCache.load(path)


def test_joined_values_are_aligned_with_the_batch(tmp_path):
    model, (data, _) = tiny_model(), datasets()
    cache = ReferenceCache.build(model, data, collator(), batch_size=2)
    items = [data[index] for index in (4, 0, 2)]
    batch = Collator(TOKENIZER, reference=cache)(items)
    expected = plain_logp(copied(model).double().eval(), batch)
    torch.testing.assert_close(batch["ref_logp"].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ReferenceJoin(collator(), {"forget": cache})(items)["ref_logp"], batch["ref_logp"])


def test_what_says_something_of_nothing_is_refused(tmp_path):
    model, (data, _) = tiny_model(), datasets()
    path = tmp_path / "reference.safetensors"
    with pytest.raises(ValueError, match=r"layer=1 has no effect with what=\['logp'\]"):
        ReferenceCache.build(model, data, collator(), path, layer=1)
    cache = ReferenceCache.build(model, data, collator(), path)
    with pytest.raises(ValueError, match=r"layer=1 has no effect with what=\[\]"):
        ReferenceCache.load(path, layer=1)
    for options in ({"adapted": True}, {"fingerprint": "another"}):
        for check in (cache.check, lambda **options: ReferenceCache.load(path, **options)):
            with pytest.raises(ValueError, match="say which model a cache has to be of: give model="):
                check(**options)


def test_pairs_have_a_reference_for_both_halves():
    model, (data, _) = tiny_model(), datasets("pairs")
    cache = ReferenceCache.build(model, data, collator(), batch_size=4)
    assert len(cache) == 2 * len(data)
    batch = Collator(TOKENIZER, reference=cache)([data[3], data[1]])
    expected = plain_logp(copied(model).double().eval(), batch)
    torch.testing.assert_close(batch["ref_logp"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [False, True])
def test_other_texts_and_labels_of_the_same_length_are_refused(tmp_path, stored):
    model, ids = tiny_model(), torch.arange(3, 30).view(3, 9)
    items = [
        {"input_ids": row, "labels": torch.cat([torch.full((5,), -100), row[5:]]), "sample_id": index}
        for index, row in enumerate(ids)
    ]
    cache = ReferenceCache.build(model, items, collator(), tmp_path / "reference.safetensors")
    cache = ReferenceCache.load(tmp_path / "reference.safetensors") if stored else cache
    exchanged = [{**one, "sample_id": index} for index, one in enumerate(items[1:])]
    relabelled = [{**one, "labels": one["input_ids"]} for one in items]
    fewer = [{**one, "labels": torch.cat([one["labels"][:-1], torch.tensor([-100])])} for one in items]
    for join_to in (Collator(TOKENIZER, reference=cache), ReferenceJoin(collator(), {"forget": cache})):
        assert join_to(items)["ref_logp"].any() and join_to(fewer)["ref_logp"].any()
        with pytest.raises(ValueError, match="sample 0 is another text than .* give samples the sample_id"):
            join_to(exchanged)
        with pytest.raises(ValueError, match="sample 0 has a label at position 1 of which .* no log-prob"):
            join_to(relabelled)


def test_samples_that_are_unknown_or_have_changed():
    model, (data, _) = tiny_model(), datasets()
    cache = ReferenceCache.build(model, data, collator())
    with pytest.raises(ValueError, match=r"sample_id 6 is not in the reference cache \(6 samples, ids 0..5\)"):
        cache.get(6)
    with pytest.raises(ValueError, match="has 3 tokens, but the reference cache has"):
        cache.join([0], [3], 8)
    left = collator()([data[0], data[1]])
    left = {key: value.flip(1) if value.dim() == 2 else value for key, value in left.items()}
    with pytest.raises(ValueError, match="padded on the left"):
        join(cache, left)
    with pytest.raises(ValueError, match="padded on the left"):  # GPT-2's log-probs would be others
        ReferenceCache.build(model, data, lambda items: {**left, "sample_id": collator()(items)["sample_id"]})
    with pytest.raises(ValueError, match="no attention_mask"):
        ReferenceCache.build(model, data, lambda items: {**collator()(items), "attention_mask": None})
    with pytest.raises(ValueError, match="needs layer="):
        ReferenceCache.build(model, data, collator(), what={"layer_hidden"})
    with pytest.raises(ValueError, match="must be some of"):
        ReferenceCache.build(model, data, collator(), what={"logits"})
    with pytest.raises(ValueError, match="appears twice"):
        ReferenceCache.build(model, [data[0], data[0]], collator())


def test_values_that_depend_on_the_padded_length_are_said(caplog):
    data, _ = datasets()
    for model in (tiny_model(), tiny_model().bfloat16()):
        ReferenceCache.build(model, data, collator())
    assert not caplog.messages
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda module, args, out: out * (1 + out.shape[1] / 100))
    ReferenceCache.build(model, data, collator())
    (said,) = caplog.messages
    widest = max(len(data[index]["input_ids"]) for index in range(len(data)))
    assert f"to {widest} tokens" in said and "ref_logp of sample" in said
    caplog.clear()
    ReferenceCache.build(model, data, Collator(TOKENIZER, pad_to_multiple_of=widest))
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["meta", "offloaded"])
def test_a_model_without_values_is_refused_before_any_work(kind, tmp_path):
    model, (data, _) = tiny_model(), datasets()
    if kind == "offloaded":
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        model.model.layers[1].to("meta")
    model.forward = None  # any work would fail differently
    why = "offloaded by Accelerate" if kind == "offloaded" else "on the meta device"
    with pytest.raises(
        ValueError, match=f"{why}.*A fingerprint, by which a reference cache is known, is of every value"
    ):
        ReferenceCache.build(model, data, collator())


def test_a_full_disk_leaves_no_cache(tmp_path, monkeypatch):
    model, (data, _) = tiny_model(), datasets()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match="reference.safetensors: No space left"):
        ReferenceCache.build(model, data, collator(), tmp_path / "reference.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_that_stretch_each_others_rotary_embeddings_have_no_reference(kind):
    """Their values are those of one batch: NPO of the original itself was 11.5 for 13.9 in other batches."""
    model = stretching(kind)

    def texts(*lengths):
        ids = [torch.arange(length) % 40 + 2 for length in lengths]
        return [{"input_ids": one, "labels": one, "sample_id": number} for number, one in enumerate(ids)]

    with pytest.raises(
        ValueError, match="8 to 30 tokens a text, and beyond 20 the longest .*Give max_length=20, or .* of at least 30"
    ):
        ReferenceCache.build(model, texts(8, 30), Collator(0))
    for data, multiple in ((texts(8, 20), 1), (texts(30, 30), 1), (texts(8, 30), 30)):
        padded = dict(pad_to_multiple_of=multiple)
        batch = Collator(0, ReferenceCache.build(model, data, Collator(0, **padded)), **padded)(data[:1])
        assert gfast.model_loss(model, batch, NPO(beta=0.1)).loss.item() == pytest.approx(20 * math.log(2))
