"""What people see while work goes on."""

import io
import re

import pytest
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


def test_an_error_is_printed_although_printing_was_interrupted_before(capsys: pytest.CaptureFixture[str]) -> None:
    screen.err._enter_buffer()  # Ctrl-C came before it was left
    try:
        screen.print_failure("stopped", 130)
        assert capsys.readouterr().err == "regrow: stopped\n"
    finally:
        screen.err._exit_buffer()
