"""Stages: as few as keep the budget, and a refusal that says what would."""

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.allocation.stages import MemoryBudgetError, plan_stages
from regrow.core.amounts import format_bytes, parse_bytes

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=7)


def peak_of(sizes: list[int], share: float):
    """Whole cells take their size, earlier ones a share of it."""
    return lambda first, last: int(share * sum(sizes[:first])) + sum(sizes[first : last + 1])


@given(SIZES, st.floats(0, 1), st.integers(1, 400))
@settings(deadline=None)
def test_no_choice_of_cuts_needs_fewer_stages(sizes: list[int], share: float, budget: int) -> None:
    """Against all choices there are."""
    peak, n = peak_of(sizes, share), len(sizes)

    def fits(ends: tuple[int, ...]) -> bool:
        begins = [0, *(end + 1 for end in ends[:-1])]
        return all(peak(begin, end) <= budget for begin, end in zip(begins, ends, strict=True))

    every = [(*cut, n - 1) for k in range(n) for cut in combinations(range(n - 1), k)]
    fitting = [ends for ends in every if fits(ends)]
    if fitting:
        plan = plan_stages(peak, n, budget)
        assert plan.ends in fitting and len(plan.ends) == min(map(len, fitting))
        assert max(plan.peaks) <= budget
    else:
        with pytest.raises(MemoryBudgetError) as refused:
            plan_stages(peak, n, budget)
        cell, least = map(int, re.findall(r"part (\d+), .*\((\d+) bytes", str(refused.value))[0])
        assert max(plan_stages(peak, n, least).peaks) == least > budget and peak(cell - 1, cell - 1) == least
        with pytest.raises(MemoryBudgetError):
            plan_stages(peak, n, least - 1)


def test_the_refusal_says_what_would_do() -> None:
    with pytest.raises(MemoryBudgetError, match=r"5 KiB of memory do not suffice: part 2, .* needs 7.5 KiB \(7680 b"):
        plan_stages(lambda first, last: 7680 if last else 1024, 2, 5 * 1024)


def test_nothing_is_asked_twice() -> None:
    asked: list[tuple[int, int]] = []

    def peak(first: int, last: int) -> int:
        asked.append((first, last))
        return last - first + 1

    assert plan_stages(peak, 6, 2).ends == (1, 3, 5)
    assert len(asked) == len(set(asked)) <= 6 + 3


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("2GiB", 2**31),
        ("800MiB", 800 * 2**20),
        ("1.5 GB", 1_500_000_000),
        (" .5 kb ", 500),
        ("4096", 4096),
        ("4096 bytes", 4096),
        ("2G", 2 * 10**9),
        (7, 7),
    ],
)
def test_amounts_of_memory_are_read(amount: str | int, expected: int) -> None:
    assert parse_bytes(amount) == expected


@pytest.mark.parametrize(
    "amount", ["", "GiB", "2 gallons", "-1GiB", "0", "1e9", "0.1B", "2GiB more", "½GB", "nan", "9" * 400 + "GB"]
)
def test_what_is_no_amount_is_refused(amount: str) -> None:
    with pytest.raises(ValueError, match=r"like (200M, )?64MiB"):
        parse_bytes(amount)


def test_amounts_are_said_as_they_are_read() -> None:
    for amount in (1, 1024, 3 * 2**20, 5 * 2**30, 2**40):
        assert parse_bytes(format_bytes(amount)) == amount
