"""What people see while work goes on."""

import contextlib
import io
import math
import re
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from regrow.cli import screen
from regrow.jobs import progress_bar

HOW = "stage 2, 41.2k of 33.6k params, validation 0.31, operations 62%, filters 80%, weights 91%"


@pytest.mark.parametrize("width", [24, 80, 200])
def test_how_it_goes_stands_below_the_bar_in_any_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "err", Console(file=shown, force_terminal=True, width=width, soft_wrap=True))
    with screen.show_progress() as tell:
        tell(12, 2100, f"search, {HOW}")
    # Each frame begins where the cursor was put back to; a line too wide would put it back too low.
    frame = re.split(r"\r(?:\x1b\[[0-9]*[AK])*", shown.getvalue().split("search")[-1])[0]
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).splitlines()[1:]
    assert " ".join(" ".join(lines).split()) == HOW
    assert max(map(len, lines)) <= width


def test_a_bar_shows_a_name_like_markup_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "err", Console(file=shown, force_terminal=True, color_system=None, width=80))
    with screen.show_progress() as tell:
        tell(1, 2, "evaluating on [/x]\x1b[31m[red]")
    assert "evaluating on [/x]\\x1b[31m[red]" in shown.getvalue()


def test_a_bar_begins_anew_with_what_is_done_and_not_with_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.setattr(screen, "err", Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(progress_bar.ProgressBar, "reset", lambda self, task, **more: begun.append(task))
    with screen.show_progress() as tell:
        for what in ("search", "search, stage 1", "search, stage 2", "retraining", "retraining"):
            tell(1, 2, what)
    assert len(begun) == 2


def test_lines_of_a_long_run_get_rarer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.002)
    began = time.monotonic()
    with screen.show_progress() as tell:
        for turn in range(2):
            for done in range(0, 401, 4):
                tell(done, 400, f"training, loss {done}")
                time.sleep(0.005)
                if done % 40 == 0:
                    tell(turn, 3, f"evaluating on {turn}")
    turns = (time.monotonic() - began) / 0.002
    lines = capsys.readouterr().err.splitlines()
    assert 10 <= len(lines) <= 65 + 60 * math.log(turns / 120) < turns / 2.5, lines
    assert any(re.fullmatch(r"training, loss \d+: \d+/400, about \d+ s left", line) for line in lines)


def test_what_takes_long_is_said_again_and_what_is_over_at_once_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.02)
    with screen.show_lines("importing"):
        time.sleep(0.2)
    with screen.show_lines("importing") as tell:
        tell(0, 1, "loading")
        tell(0, 1, "tracing")
        with contextlib.redirect_stderr(io.StringIO()):  # as loading and tracing do
            time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert list(dict.fromkeys(lines)) == [
        "importing …", "importing …, 0 s so far", "tracing …", "tracing …, 0 s so far"
    ], lines  # fmt: skip


@pytest.mark.parametrize("width", [80, 66, 60, 20])
def test_a_table_breaks_between_words_before_it_breaks_within_them(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "out", Console(file=shown, width=width, soft_wrap=True))
    columns = ("Run", "Final average accuracy", "Forgetting", "tasks", "", "日本 method")
    cells = ("grown", "67.3 %", "+1.0 points", "permuted:digits:5, rotated:digits:3", "", "sparsegrow")
    screen.print_table("", columns, [cells])
    lines = shown.getvalue().splitlines()[1:]
    assert max(map(cell_len, lines)) <= width
    words = " ".join(lines).split()
    assert (("Forgetting" in words) and ("accuracy" in words) and ("sparsegrow" in words)) == (width > 20)
    assert ("permuted:digits:5," in words) == (width > 60), "a long value breaks before a header does"


def test_a_step_that_comes_again_has_a_time_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.05)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with screen.show_lines() as tell:
        for now in (0.0, 400.0):
            clock[0] = now
            tell(0, 1, "timing")
            time.sleep(0.2)
            tell(0, 1, "pruning")
    assert "timing …, 0 s so far" in (told := capsys.readouterr().err) and "timing …, 400" not in told, told


def test_time_left_falls_while_a_step_takes_longer_than_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    task = screen._Task(done=4, is_new=False, began=0.0, moved=8.0)
    told = []
    for clock[0] in (8.0, 12.0, 20.0):
        told.append(task.describe_time(4, 8))
    assert told == [", about 8 s left", ", about 4 s left", ", 12 s since the last step"]


def test_an_error_is_printed_although_printing_was_interrupted_before(capsys: pytest.CaptureFixture[str]) -> None:
    screen.err._enter_buffer()  # Ctrl-C came before it was left
    try:
        screen.print_failure("stopped", 130)
        assert capsys.readouterr().err == "regrow: stopped\n"
    finally:
        screen.err._exit_buffer()
