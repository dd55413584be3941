"""Damaged files: whatever happens to a file that gfast wrote is said, or changes nothing that is read."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from helpers.geffect_models import batches as geffect_batches
from helpers.geffect_models import tiny
from helpers.training_tiny import TOKENIZER, collator, config, datasets, pairing, tiny_model
from safetensors.torch import save_file

import gfast
from gfast import files
from gfast.files import CHECKSUM, MANIFEST, DamagedFile, read_json, write_json, write_manifest
from gfast.geffect import Directions, Effect, SampleEffect
from gfast.tensor_files import TensorFile, write_tensors
from gfast.training.records import effect_file, read_run_info, read_step, step_file, write_record, write_run_info
from gfast.training.reference import ReferenceCache
from gfast.training.resume import check_checkpoint, last_checkpoint
from gfast.training.trainer import UnlearnTrainer

FLIPS = 400  # of the files of a kind together, and 60 of each


def bits(value):
    """Something to compare that is equal only when every bit is."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return [(name, bits(entry)) for name, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return repr(value)


def damages(content: bytes, seed: int, flips: int):
    """(name, damaged bytes): bits, bytes and blocks changed, and ends cut off or added."""
    choose = random.Random(seed)
    for number in range(flips):
        at = choose.randrange(len(content))
        # Every third in the first or last 200 bytes, where headers and footers are.
        if number % 3 == 0:
            at = choose.choice([at % min(200, len(content)), len(content) - 1 - at % min(200, len(content))])
        mask = 1 << choose.randrange(8) if number % 2 else choose.randrange(1, 256)
        yield f"byte {at} ^ {mask}", content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]
    for _ in range(8):
        at, size = choose.randrange(len(content)), choose.choice([16, 64, 512])
        cut = content[at : at + size]
        yield f"zeros at {at}", content[:at] + bytes(len(cut)) + content[at + size :]
        yield f"{size} bytes lost at {at}", content[:at] + content[at + size :]
        yield f"cut at {at}", content[:at]
    yield "empty", b""
    yield "longer", content + b"x"


def write_reference(folder):
    model, (data, _) = tiny_model(), datasets()
    path = folder / "reference.safetensors"
    ReferenceCache.build(model, data, collator(), path, what={"logp", "layer_hidden"}, layer=1)

    def read():
        cache = ReferenceCache.load(path)
        described = (cache.layer, cache.model_fingerprint, cache.data_fingerprint)
        return cache.sample_ids, cache.lengths, cache.values, cache.head, described

    return [path], read


def write_directions(folder):
    data = {side: geffect_batches(seed) for seed, side in enumerate(("forget", "retain"))}
    gfast.risk_gradients(tiny("llama").eval(), **data).save(folder / "d")

    def read():
        found = Directions.load(folder / "d")
        described = (found.names, found.groups.names, found.counts, found.risk, found.risks, found.data)
        gradients = [found.get(side, name) for side in (0, 1) for name in found.names]
        return gradients, found.gram, found.squares, described

    return sorted((folder / "d").iterdir()), read


def rows(step):
    common = {"run": "a", "objective": "GA()", "step": step, "epoch": 0.5, "side": "retain"}
    return [{**common, "quantity": f"q{i}", "value": step + i / 7} for i in range(6)]


def write_a_record(folder):
    write_record(folder, rows(3))
    return [step_file(folder, 3)], lambda: read_step(folder, 3)


def an_effect(scale=1.0):
    values = {"embed": torch.arange(4, dtype=torch.float64) * scale, "lm": torch.ones(4, dtype=torch.float64) / 3}
    norms = {"unlearn": {"embed": 1.0, "lm": 2.0}, "retain": {"embed": 1.5, "lm": 0.5}}
    counts = {"unlearn": 9, "retain": 8}
    logp = -torch.arange(4, dtype=torch.float64) / 7
    return SampleEffect(values, values, torch.tensor([2, 3, 1, 3]), norms, "NLL()", counts, logp)


def write_an_effect(folder):
    path = an_effect().to_parquet(effect_file(folder, "sample", 10))

    def read():
        found = Effect.from_parquet(path)
        return type(found).__name__, vars(found)

    return [path], read


def write_json_file(folder):
    write_run_info(folder, {"objective": "GA()", "seed": 0, "config": {"a": [1.5, None, "é"], "nested": {"b": True}}})
    return [folder / "run.json"], lambda: read_run_info(folder)


def write_checkpoint(folder):
    data, collate = pairing()
    args = config(folder, objective="WGA", max_steps=2, save_strategy="steps", save_steps=2)
    options = {"train_dataset": data, "data_collator": collate, "processing_class": TOKENIZER}
    UnlearnTrainer(tiny_model(), args, **options).train()
    checkpoint = folder / "checkpoint-2"
    paths = sorted(path for path in checkpoint.iterdir() if path.is_file())
    written = {path: path.read_bytes() for path in paths}

    def read():
        # What is not read as JSON is read byte by byte.
        found = last_checkpoint(folder)
        check_checkpoint(found)
        return [read_json(path) if path.name == MANIFEST else path.read_bytes() for path in written]

    return paths, read


KINDS = [write_reference, write_directions, write_a_record, write_an_effect, write_json_file, write_checkpoint]


@pytest.mark.parametrize("write", KINDS, ids=[kind.__name__.removeprefix("write_") for kind in KINDS])
def test_damage_is_said_or_changes_nothing(tmp_path, write):
    paths, read = write(tmp_path)
    whole = bits(read())
    said = unharmed = 0
    for seed, path in enumerate(paths):
        content = path.read_bytes()
        for name, damaged in damages(content, seed, max(60, FLIPS // len(paths))):
            if damaged == content:
                continue
            path.write_bytes(damaged)
            try:
                found = bits(read())
            except DamagedFile as error:
                assert path.name in str(error) and "is damaged: " in str(error), (name, error)
                said += 1
            else:
                assert found == whole, f"{path.name}, {name}: read as if nothing had happened"
                assert name != "empty", path.name
                unharmed += 1
        path.write_bytes(content)
        assert bits(read()) == whole
    assert said > 40 * len(paths)
    print(f"{write.__name__}: {said} damages said, {unharmed} changed nothing that is read")


def test_swapped_files_are_known(tmp_path):
    def swap(first, second):
        held = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(held)

    (_, retain, unlearn), read = write_directions(tmp_path)
    swap(unlearn, retain)
    with pytest.raises(DamagedFile, match="not the file that directions.json was written with"):
        read()
    for step in (3, 4):
        write_record(tmp_path, rows(step))
        an_effect(step).to_parquet(effect_file(tmp_path, "sample", step))
    swap(step_file(tmp_path, 3), step_file(tmp_path, 4))
    with pytest.raises(DamagedFile, match=r"step-00000003.parquet is damaged: it holds the rows of the steps \[4\]"):
        read_step(tmp_path, 3)
    swap(effect_file(tmp_path, "sample", 3), effect_file(tmp_path, "sample", 4))
    with pytest.raises(DamagedFile, match="it is sample-00000004.parquet under another name"):
        Effect.from_parquet(effect_file(tmp_path, "sample", 3))
    paths, read = write_checkpoint(tmp_path / "run")
    named = {path.name: path for path in paths}
    swap(named["scheduler.pt"], named["rng_state.pth"])
    with pytest.raises(DamagedFile, match="rng_state.pth|scheduler.pt"):
        read()
    swap(named["scheduler.pt"], named["rng_state.pth"])
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-8")
    with pytest.raises(DamagedFile, match="it is that of checkpoint-2"):
        check_checkpoint(tmp_path / "run" / "checkpoint-8")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(DamagedFile, match="optimizer.pt is damaged: it is missing; delete the folder"):
        read()


def test_a_damaged_checkpoint_is_not_trained_on(tmp_path):
    write_checkpoint(tmp_path)
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    data, collate = pairing()
    args = config(tmp_path, objective="WGA", max_steps=4)
    trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate)
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(DamagedFile, match=r"optimizer.pt is damaged.*go on from the checkpoint before it"):
            trainer.train(resume_from_checkpoint=resume)


def test_files_of_earlier_versions_are_read(tmp_path, caplog):
    """None of these had checksums."""
    import pyarrow.parquet

    (path,), read = write_reference(tmp_path)
    whole = bits(read())
    file = TensorFile(path, "")
    tensors = {name: file.get(name) for name in file.names}
    described = json.dumps(file.description | {"format": "gfast-reference-1"})
    save_file(tensors, path, metadata={"gfast": described})
    assert bits(read()) == whole
    paths, read = write_directions(tmp_path)
    whole = bits(read())
    for path in paths[1:]:
        file = TensorFile(path, "")
        save_file({name: file.get(name) for name in file.names}, path)
    found = read_json(paths[0]) | {"format": "gfast-directions-2"}
    found["parameters"] = dict(found["parameters"])
    del found["files"]
    paths[0].write_text(json.dumps(found))
    assert bits(read()) == whole
    for write in (write_a_record, write_an_effect):
        (path,), read = write(tmp_path)
        whole, table = bits(read()), pyarrow.parquet.read_table(path)
        metadata = {name: value for name, value in table.schema.metadata.items() if name != b"gfast_sha256"}
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
        assert bits(read()) == whole
    (path,), read = write_json_file(tmp_path / "other")
    whole = bits(read())
    path.write_text(json.dumps(json.loads(path.read_text()) | {CHECKSUM: None}))
    assert bits(read()) == whole
    _, read = write_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / MANIFEST).unlink()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    check_checkpoint(tmp_path / "run" / "checkpoint-2")
    assert "checkpoint-2 has no gfast-manifest.json: its files go unchecked" in caplog.text


def test_checksums_that_are_missing_where_they_must_be(tmp_path):
    (path,), read = write_reference(tmp_path)
    file = TensorFile(path, "")
    save_file({name: file.get(name) for name in file.names}, path, metadata={"gfast": json.dumps(file.description)})
    with pytest.raises(DamagedFile, match="its checksums are missing"):
        read()


def test_only_what_is_read_is_checked(tmp_path):
    """Directions of a large model are read a parameter at a time."""
    path = tmp_path / "two.safetensors"
    write_tensors(path, {"a": torch.ones(50), "b": torch.zeros(50)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of b, the last one
    path.write_bytes(bytes(content))
    file = TensorFile(path, "write it again")
    assert torch.equal(file.get("a"), torch.ones(50))
    with pytest.raises(DamagedFile, match="the values of b do not fit their checksum; write it again"):
        file.get("b")


def test_json_may_be_laid_out_anew_and_not_changed(tmp_path):
    path = write_json(tmp_path / "a.json", {"b": 1.0, "a": [float("nan"), 2], "text": "é \udc80"})
    first = read_json(path)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert repr(read_json(path)) == repr(first)
    path.write_text(path.read_text().replace("2", "3", 1))
    with pytest.raises(DamagedFile, match=f"take the line {CHECKSUM} out of it"):
        read_json(path)


def test_a_manifest_lists_what_others_wrote(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("model.bin", "deep/part.bin", ".gfast-run-lock", "run.json"):
        (tmp_path / name).write_bytes(name.encode())
    assert set(read_json(write_manifest(tmp_path))["files"]) == {"model.bin", "deep/part.bin"}
    assert set(read_json(write_manifest(tmp_path, deep=False))["files"]) == {"model.bin"}
    assert not files.check_manifest(tmp_path / "deep", "")
