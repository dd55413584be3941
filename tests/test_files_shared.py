"""Folders that several processes write to, and disks that are full."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time

import pytest
import torch
from helpers import files_shared
from helpers.marks import slow_when
from helpers.training_tiny import TOKENIZER, collator, config, datasets, pairing, server, tiny_model
from safetensors import SafetensorError

from gfast import cli, files
from gfast.files import TEMPORARY_PREFIX, read_json, remove_partial_files, whole_file, write_json
from gfast.locks import RUN_LOCK, FolderInUse, claimed
from gfast.tensor_files import write_tensors
from gfast.training.records import read_records, write_record, write_run_info
from gfast.training.reference import ReferenceCache
from gfast.training.resume import last_checkpoint, room_for
from gfast.training.trainer import UnlearnTrainer

STEPS = 40


@pytest.fixture(scope="module")
def context():
    return server()


def assert_nothing_lost(folder, writers):
    frame = read_records(folder)
    assert len(frame) == STEPS * len(writers) * 3
    assert {name.split("-")[0] for name in frame["quantity"]} == set(writers)
    assert not [path.name for path in folder.rglob(".gfast-*")]


def test_two_processes_write_the_same_steps(tmp_path, context):
    gate, writers = context.Event(), ["terms", "effects", "others"]
    processes = [
        context.Process(target=files_shared.write_steps, args=(str(tmp_path), name, STEPS, gate)) for name in writers
    ]
    for process in processes:
        process.start()
    gate.set()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    assert_nothing_lost(tmp_path, writers)


def test_two_threads_write_the_same_steps(tmp_path):
    gate, writers = threading.Event(), ["terms", "effects", "others"]
    threads = [
        threading.Thread(target=files_shared.write_steps, args=(str(tmp_path), name, STEPS, gate)) for name in writers
    ]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(100)
    assert_nothing_lost(tmp_path, writers)


def test_a_lock_is_one_threads_at_a_time(tmp_path):
    counts = [0]
    threads = [threading.Thread(target=files_shared.lock_in_turn, args=(tmp_path, counts)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert counts == [4 * 200] and list(tmp_path.iterdir()) == []


def started(context, target, *arguments):
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def answer(context, folder):
    answers = context.Queue()
    started(context, files_shared.try_to_claim, str(folder), answers).join(60)
    return answers.get(timeout=60)


@pytest.mark.parametrize("child_lives", [False, True], ids=["alone", "with a child that lives on"])
def test_one_process_a_run_folder(tmp_path, context, child_lives, capsys):
    folder, held = tmp_path / "run", context.Event()
    holder = started(context, files_shared.hold, str(folder), held, child_lives)
    assert held.wait(60)
    try:
        for _ in range(2):  # being refused changes nothing
            assert f"process {holder.pid} on " in answer(context, folder)
        # Neither the trainer nor the command goes on; what only reads does.
        data, collate = pairing()
        trainer = UnlearnTrainer(tiny_model(), config(folder), train_dataset=data, data_collator=collate)
        with pytest.raises(FolderInUse, match=f"is in use: process {holder.pid} on .* give another output folder"):
            trainer.train()
        assert cli.main(["unlearn", "--model", "nowhere", "--data", "bundled", "--output_dir", str(folder)]) == 2
        assert f"process {holder.pid}" in capsys.readouterr().err
        assert read_records(folder).empty
    finally:
        os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    assert answer(context, folder) == "mine"


def test_a_process_may_claim_its_folder_again(tmp_path, context):
    with claimed(tmp_path):
        with claimed(tmp_path / ".." / tmp_path.name):
            pass
        assert f"process {os.getpid()} on " in answer(context, tmp_path)
    assert answer(context, tmp_path) == "mine"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def none(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with claimed(tmp_path):
        write_record(tmp_path, files_shared.rows("terms", 0))
    assert len(read_records(tmp_path)) == 3 and "this file system has no locks" in caplog.text


def test_what_killed_writers_left_goes_when_the_folder_is_claimed(tmp_path, context):
    ended = started(context, time.sleep, 0)
    ended.join()
    for name in ("records", "evaluations", "parts", "elsewhere"):
        (tmp_path / name).mkdir()
    with whole_file(tmp_path / "records" / "step.parquet") as own:
        name = own.name
        others = {
            "of a process that ended": name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"),
            "old, of another machine": f"{TEMPORARY_PREFIX}elsewhere-1-{32 * 'a'}.json",
            "old, of an earlier version": f"{TEMPORARY_PREFIX}{32 * 'b'}.json",
            "of another machine": f"{TEMPORARY_PREFIX}elsewhere-1-{32 * 'c'}.json",
        }
        for folder in ("", "records", "evaluations", "parts", "elsewhere"):
            for which, other in others.items():
                (tmp_path / folder / other).write_text("half")
                if which.startswith("old"):
                    os.utime(tmp_path / folder / other, (0, 0))
        with claimed(tmp_path):
            assert (tmp_path / RUN_LOCK).exists()
        assert own.exists()
    for folder in (tmp_path, *(tmp_path / name for name in ("records", "evaluations", "parts"))):
        assert {path.name for path in folder.glob(f"{TEMPORARY_PREFIX}*")} == {others["of another machine"]}
    assert len(list((tmp_path / "elsewhere").iterdir())) == len(others), "only a run's own folders are swept"
    remove_partial_files([tmp_path / "elsewhere"])
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_the_new_name_is_on_the_disk_too(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "_sync", lambda path: done.append("file"))
    monkeypatch.setattr(files, "_sync_folder", lambda path: done.append(path))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("rename"))
    with whole_file(tmp_path / "a"):
        pass
    assert done == ["file", "rename", tmp_path]


# Each writes more than 2000 bytes to the file it returns.


def big_record(folder):
    for i in range(40):
        write_record(folder, files_shared.rows(f"{os.urandom(30).hex()}-{i}", 5))
    return folder / "records" / "step-00000005.parquet"


def big_json(folder):
    return write_json(folder / "big.json", {"text": os.urandom(2000).hex()})


def big_tensors(folder):
    write_tensors(folder / "big.safetensors", {"a": torch.rand(1000)})
    return folder / "big.safetensors"


def big_reference(folder):
    path = folder / "reference.safetensors"
    path.unlink(missing_ok=True)
    data, _ = datasets()
    ReferenceCache.build(tiny_model(), data, collator(), path, what={"layer_hidden"}, layer=1)
    return path


def training(folder, steps=4):
    data, collate = pairing()
    args = config(folder, objective="WGA", max_steps=steps, save_strategy="steps", save_steps=2)
    options = {"train_dataset": data, "data_collator": collate, "processing_class": TOKENIZER}
    model = tiny_model()
    UnlearnTrainer(model, args, **options).train(resume_from_checkpoint=True)
    return model


def little_room(context, action, folder, limit=2000):
    answers = context.Queue()
    started(context, files_shared.with_little_room, limit, action, str(folder), answers).join(100)
    return answers.get(timeout=60)


@pytest.mark.parametrize("write", [big_record, big_json, big_tensors], ids=["record", "JSON", "tensors"])
def test_a_full_disk_keeps_the_old_file(tmp_path, context, write):
    path = write(tmp_path)
    before = {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()}
    assert len(before[path]) > 2000
    number, said = little_room(context, write, tmp_path)
    assert number == errno.EFBIG and f"could not write {path}: " in said and "too large" in said, said
    assert {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()} == before


def test_a_full_disk_leaves_no_reference(tmp_path, context):
    _, said = little_room(context, big_reference, tmp_path)
    assert f"could not write {tmp_path / 'reference.safetensors'}: " in said, said
    assert list(tmp_path.iterdir()) == []


@slow_when(lambda p: p.limit == 300_000)
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (2000, "could not write .*records/step-00000003.parquet: .*nothing was left half written"),
        (100_000, "could not save .*/checkpoint-4: Error while serializing.* Make room and start again"),
        (300_000, "could not save .*/checkpoint-4: .*inline_container.* Make room and start again"),
    ],
    ids=["a record", "the weights", "the optimizer"],
)
def test_a_full_disk_while_training(tmp_path, context, limit, words):
    whole = training(tmp_path / "whole")
    training(tmp_path / "run", steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoint-2").rglob("*") if path.is_file()}
    number, said = little_room(context, training, tmp_path / "run", limit)
    assert number in (errno.EFBIG, errno.EIO) and re.search(words, said), said
    assert {path: path.read_bytes() for path in before} == before
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    again = training(tmp_path / "run")
    for name, value in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name
    found, expected = (read_records(tmp_path / which) for which in ("run", "whole"))
    assert found["value"].tolist() == expected["value"].tolist()


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left (os error 28)"), Exception("No space left (os error 28)")]
)
def test_a_full_disk_under_a_model_or_tokenizer_is_said(error):
    """The errors of safetensors and tokenizers name no file."""
    with pytest.raises(OSError, match="could not save the/model: .*No space left.* it is taught again") as said:
        with room_for("the/model", "it is taught again"):
            raise error
    assert said.value.errno == errno.ENOSPC


def test_a_run_goes_on_with_the_data_it_was_begun_with(tmp_path):
    info = {"config": {"seed": 0}, "data_sha256": {"the forget set (a.jsonl)": "1", "the retain set (b.jsonl)": "2"}}
    write_run_info(tmp_path, info)
    write_run_info(tmp_path, info)
    other = {"the forget set (a.jsonl)": "1", "the retain set (b.jsonl)": "3"}
    with pytest.raises(ValueError, match=r"other data: the rows of the retain set \(b.jsonl\) are not those"):
        write_run_info(tmp_path, info | {"data_sha256": other})
    write_run_info(tmp_path / "earlier", {"config": {"seed": 0}})
    write_run_info(tmp_path / "earlier", info)
    assert "data_sha256" not in read_json(tmp_path / "earlier" / "run.json")
