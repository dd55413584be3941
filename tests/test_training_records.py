"""Records and run folders: whole or not at all, one row a key, one run a folder."""

from __future__ import annotations

import errno
import json
import os
import sys

import pyarrow
import pytest

from gfast import files
from gfast.tables import write_table
from gfast.training.records import (
    COLUMNS,
    read_records,
    read_run_info,
    recorded_steps,
    step_file,
    write_record,
    write_run_info,
)


def row(step=0, value=1.0, **fields):
    return {"run": "a", "objective": "GA()", "step": step, "epoch": 0.5, "quantity": "loss", "value": value, **fields}


def test_rows_come_back_sorted_typed_and_once(tmp_path):
    write_record(tmp_path, [row(20, 2.0), row(20, 3.0, quantity="g_effect", side="unlearn", group="deep")])
    write_record(tmp_path, [row(3, -1.5)])
    write_record(tmp_path, [row(20, 5.0), row(20, float("nan"), quantity="cosine")])
    frame = read_records(tmp_path)
    assert tuple(frame.columns) == COLUMNS
    assert frame["step"].tolist() == [3, 20, 20, 20] and str(frame["step"].dtype) == "int64"
    values = frame.set_index(["step", "quantity"])["value"]
    assert values[20, "loss"] == 5.0 and values[20, "g_effect"] == 3.0 and values[3, "loss"] == -1.5
    assert frame["value"].isna().sum() == 1
    assert recorded_steps(tmp_path) == [3, 20]
    assert step_file(tmp_path, 20).name == "step-00000020.parquet"


def test_a_run_whose_folder_was_renamed_goes_on_in_its_records(tmp_path):
    """As one run: the step that is recorded again, under the folder's new name, stands there once."""
    for step in (5, 9):
        write_record(tmp_path / "old", [row(step, 1.0, run="old")])
    (tmp_path / "old").rename(tmp_path / "new")
    write_record(tmp_path / "new", [row(9, 3.0, run="new")])
    assert read_records(tmp_path / "new")["value"].tolist() == [1.0, 3.0]
    table = pyarrow.Table.from_pylist(
        [row(9, 3.0, run="new", side="", group=""), row(9, 1.0, run="old", side="", group="")]
    )
    write_table(step_file(tmp_path / "new", 9), table)  # as earlier versions did
    assert read_records(tmp_path / "new")["value"].tolist() == [1.0, 3.0]


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    folder = tmp_path / "l\udce4uft"  # as Python has bytes of names that its locale does not know
    write_record(folder, [row(20, 2.0)])
    assert read_records(folder)["value"].tolist() == [2.0]


def test_an_empty_or_absent_run_folder(tmp_path):
    assert read_records(tmp_path).empty
    with pytest.raises(FileNotFoundError, match="no run folder"):
        read_records(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "rows of one step"),
        ([row(1), row(2)], r"have steps \[1, 2\]"),
        ([{"run": "a"}], "row 0 of the record lacks"),
        ([row(colour="red")], "unknown keys"),
    ],
)
def test_rows_that_are_no_record(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        write_record(tmp_path, rows)
    assert recorded_steps(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path, monkeypatch):
    write_record(tmp_path, [row(7, 1.0)])

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    for step in (7, 8):
        with pytest.raises(OSError, match=f"step-0000000{step}.parquet: No space left on device") as caught:
            write_record(tmp_path, [row(step, 2.0)])
        assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["step-00000007.parquet"]
    assert read_records(tmp_path)["value"].tolist() == [1.0]


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    sync, codes = files._sync, [errno.EINVAL, errno.EIO]

    def some(path):
        if path.is_dir():
            raise OSError(codes.pop(0), "said of a folder")
        sync(path)

    monkeypatch.setattr(files, "_sync", some)
    assert write_record(tmp_path, [row(7)]).exists()
    with pytest.raises(OSError, match="could not write .*step-00000008.parquet: said of a folder"):
        write_record(tmp_path, [row(8)])


def test_a_really_full_disk(tmp_path):
    import os

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="nothing was left half written"), files.whole_file(tmp_path / "run.json"):
        with open("/dev/full", "w") as device:
            device.write("x" * 10)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_named(tmp_path):
    path = write_record(tmp_path, [row(5)])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="step-00000005.parquet is damaged"):
        read_records(tmp_path)


def test_leftovers_of_a_killed_write_are_not_read(tmp_path):
    path = write_record(tmp_path, [row(5)])
    (path.parent / f"{files.TEMPORARY_PREFIX}abc.parquet").write_bytes(b"half a file")
    assert len(read_records(tmp_path)) == 1


def test_a_run_folder_belongs_to_one_run(tmp_path):
    info = {"objective": "GA()", "seed": 0, "argv": ["gfast"], "sizes": (1, 2)}
    write_run_info(tmp_path, info)
    write_run_info(tmp_path, {**info, "argv": ["another", "command", "line"]})
    assert read_run_info(tmp_path)["argv"] == ["gfast"]
    with pytest.raises(ValueError, match="holds another run: seed is 0 there and 1 here"):
        write_run_info(tmp_path, {**info, "seed": 1})
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0


def test_a_folder_with_somebodys_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(ValueError, match="holds checkpoint-10 but no run.json"):
        write_run_info(tmp_path, {"seed": 0})


def test_run_info_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run.json"):
        read_run_info(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_run_info(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file; give a folder"):
        files.require_writable(tmp_path / "file")
    with pytest.raises(OSError, match="cannot write to the folder|choose another"):
        files.require_writable("/proc/gfast")
    if sys.platform != "linux":
        return  # other file systems have no such names
    name = os.fsdecode(b"gr\xfcn")  # as any name beyond ASCII is in a locale that has no more
    assert files.require_writable(tmp_path / name).is_dir()
    with pytest.raises(ValueError, match=r"gr\\xfcn: this Python takes names of files for .*Set PYTHONUTF8=1"):
        files.require_writable(tmp_path / name, model=True)
