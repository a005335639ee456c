"""Budgets read what people write, and refuse what they cannot mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.core.amounts import CONTEXT_MEASURES, Measure, Target, parse_amount
from regrow.core.budget import Budget, Timing


@given(st.sampled_from(list(Measure)), st.integers(1, 10**13), st.integers(1, 10**6))
def test_a_target_reads_as_it_is_written(measure: Measure, much: int, tokens: int) -> None:
    context = tokens if measure in CONTEXT_MEASURES else 0
    target, share = Target(measure, float(much), context), (much % 9999 + 1) / 1e4
    assert Target.parse(str(target)) == target
    part = Target.parse(str(Target(measure, context=context, share=share)))
    assert part.share == pytest.approx(share, rel=1e-15) and part.limit(10**9) == (much % 9999 + 1) * 10**5


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("params=0.5M", Target(Measure.PARAMETERS, 5e5)),
        ("macs=2G", Target(Measure.MACS, 2e9)),
        ("bytes=200MB", Target(Measure.BYTES, 2e8)),
        ("bytes=64MiB", Target(Measure.BYTES, 64 * 2**20)),
        ("bytes=1Gi", Target(Measure.BYTES, 2**30)),
        (" kv_cache=50M@4096 ", Target(Measure.CACHE, 5e7, 4096)),
        ("ms=7.5", Target(Measure.TIME, 7.5)),
        ("ms=120@512", Target(Measure.TIME, 120, 512)),
        ("params=70%", Target(Measure.PARAMETERS, share=0.7)),
        ("kv_cache=50 %@4096", Target(Measure.CACHE, context=4096, share=0.5)),
        ("weights=100%", Target(Measure.WEIGHTS, share=1)),
    ],
)
def test_amounts_have_the_units_people_have(text: str, target: Target) -> None:
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.8", "is like params=100M"),
        ("params=" + "9" * 400, r"above 0, below 2\*\*63 and written like"),
        ("watts=3", "is like params=100M"),
        ("params=", "0.5M, 50k or 500000"),
        ("params=-3", "0.5M, 50k or 500000"),
        ("params=0", "above 0"),
        ("params=3MiB", "0.5M, 50k or 500000"),
        ("bytes=3i", "64MiB"),
        ("ms=3k", "120 or 7.5"),
        ("kv_cache=5M", "kv_cache=5000000@4096"),
        ("kv_cache=5M@0", "like @4096"),
        ("kv_cache=5M@x", "like @4096"),
        ("macs=5M@16", "only kv_cache and ms"),
        ("macs=101%", "at most 100%, like macs=70%"),
        ("macs=0%", "above 0%"),
        ("macs=nan%", "above 0%"),
        ("macs=x%", "written like 0.2 or 20%"),
    ],
)
def test_what_is_no_target_is_refused_with_what_one_looks_like(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Target.parse(text)


def test_a_budget_has_a_fraction_or_a_target() -> None:
    with pytest.raises(ValueError, match="not both"):
        Budget(0.5, target=Target(Measure.MACS, 9))
    budget = Budget(target=Target(Measure.MACS, 9.5))
    assert budget.measure == Measure.MACS and budget.limit(100) == 9
    assert budget.record()["target"] == "macs=9.5" and "keep" not in budget.record()
    assert Budget(0.29).limit(100) == 29, "0.29 · 100 is a little less than 29 in binary"
    assert Budget(target=Target(Measure.TIME, 1.235)).limit(10**9) == 1_235_000


def test_a_timing_survives_its_record() -> None:
    timing = Timing("cpu", 16, 90, {"a": ((1, 2), (4, 9))}, {"a": "a", "b": "a"})
    assert Timing.from_record(timing.record()) == timing
    assert parse_amount("1.5k", Measure.MACS) == 1500
