"""What takes long shows how far it is: in a log by lines."""

import itertools

import pytest

from nas.machine import progress as module
from nas.machine.progress import counted, duration, progress


def test_durations() -> None:
    assert [duration(s) for s in (5, 65, 3700, 200_000)] == ["5 s", "1 min 5 s", "1 h 1 min", "2 d 7 h"]


def test_in_a_log_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = itertools.count(0, 20)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    assert list(progress("abcdef", "finding a basis")) == list("abcdef")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["finding a basis: 2 of 6, 1 min 20 s left", "finding a basis: 4 of 6, 40 s left"]


def test_what_is_over_in_no_time_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("refitting", 2) as advance:
        advance()
        advance()
    assert capsys.readouterr().err == ""
