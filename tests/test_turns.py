"""Turns: one run at a time, in order; an error in one ends all."""

import threading

import pytest

from regrow.core.turns import StopRunError, Turns


def test_runs_that_end_early_are_left_out_of_the_turns():
    turns, order = Turns(3), []

    def run(number):
        for step in range(3 - number):
            order.append((step, number))
            turns.wait(number)

    for _ in range(2):
        turns.run(run)
        assert order == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
        order.clear()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_ends_all_runs_and_is_raised(bad):
    turns, ended, before = Turns(3), [], threading.active_count()

    def run(number):
        try:
            for step in range(4):
                if step == 2 and number == bad:
                    raise ValueError("broken")
                turns.wait(number)
        except StopRunError:
            ended.append(number)
            raise

    with pytest.raises(ValueError, match="broken"):
        turns.run(run)
    assert sorted([*ended, bad]) == [0, 1, 2]
    assert threading.active_count() == before


def test_a_single_run_needs_no_thread():
    turns, threads = Turns(1), []
    turns.run(lambda number: (turns.wait(number), threads.append(threading.current_thread())))
    assert threads == [threading.main_thread()]
