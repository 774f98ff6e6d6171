import io
import re

import pytest

from daajax.console import Progress, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_show_progress_rate_time_left_and_numbers(capsys):
    progress = Progress("train", 4, "update")
    progress.advance()
    progress.advance({"loss": 0.5})
    progress.advance()
    progress.advance()
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, lines  # one with numbers, one at the end
    assert re.fullmatch(r"train 2/4 \(\d+\.\d\d update/s, \d+ s left\): loss 0\.5", lines[0])
    assert re.fullmatch(r"train 4/4 \(\d+\.\d\d update/s, 0 s left\)", lines[1])


def test_plain_lines_come_though_there_are_no_numbers(capsys):
    progress = Progress("score", 100, "batch", seconds=0.0)
    progress.advance()
    assert capsys.readouterr().out.startswith("score 1/100 (")


def test_a_terminal_gets_one_bar_with_the_numbers(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    progress = Progress("train", 2, "update")
    progress.advance({"loss": 0.25})
    say("a line")
    progress.advance()
    progress.close()
    shown = terminal.getvalue()
    assert "2/2" in shown
    assert "loss 0.25" in shown
    assert "a line\n" in shown
    assert shown.count("\n") == 2  # the line, and the end of the one bar
