"""Progress in a log file: whole lines, few of them, and a last one that tells the end."""

from __future__ import annotations

import io

import pytest

from gfast import progress
from gfast.progress import Bar


def test_a_log_gets_whole_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    with Bar("g_effect", 3) as bar:
        for _ in range(3):
            bar.update()
        bar.note(loss="0.5")
    said = capsys.readouterr().err
    assert said.splitlines() == [f"g_effect: {n} of 3 (batch), 0:00 min" for n in (1, 2, 3)]
    assert said.endswith("\n") and "\r" not in said


def test_short_work_says_its_end_alone(capsys):
    with Bar("learning", 30, "step") as bar:
        for _ in range(30):
            bar.update()
        bar.note(loss="0.048")
    assert capsys.readouterr().err == "learning: 30 of 30 (step), 0:00 min, loss 0.048\n"


def test_an_interrupted_loop_says_how_far_it_came(capsys):
    with pytest.raises(KeyboardInterrupt):
        for item in Bar("Reference", 4).over(range(4)):
            if item == 2:
                raise KeyboardInterrupt
    assert capsys.readouterr().err in (
        "",
        "Reference: 2 of 4 (batch), 0:00 min\n",
    )  # a generator ends when it is collected


def test_silence(capsys):
    with Bar("gram", show=False) as bar:
        bar.update()
    assert list(Bar(show=False).over("ab")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with Bar("sample effects", 2) as bar:
        bar.update(2)
    assert "100%" in terminal.getvalue()
