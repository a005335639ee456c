"""Parts of the suite: `--tier fast` and `--tier usual` run the quick cases of every test function, `all` everything.

    pytest --tier fast             # make test-fast
    pytest --tier usual            # make test
    pytest --record-durations      # renews durations.json; on a quiet machine

Of each function the quickest cases run until they have taken the tier's seconds together; the first one always runs,
unless it alone takes longer than the tier allows. Without an option everything that is named runs.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

import pytest

DURATIONS = Path(__file__).parent / "durations.json"
LEAST = 0.1
"""Seconds below which a test is not listed."""


@dataclass(frozen=True)
class Tier:
    """Seconds that the cases of one test function may take together, a single case alone, and those not listed each."""

    function: float
    case: float
    unlisted: float = 0.0


TIERS = {"fast": Tier(0.1, 0.1, 0.05), "usual": Tier(1.5, 10), "all": Tier(inf, inf)}
WEIGHTS = {
    "tests/test_laws.py::test_every_law_holds": 40,
    "tests/test_fuzz.py::test_a_random_network_is_cut_exactly": 10,
    "tests/cli/test_modes.py::test_modes": 10,
}
"""Functions whose cases are many different networks or runs: multiples of a tier's seconds."""


def choose(names: Iterable[str], seconds: Mapping[str, float], tier: Tier) -> set[str]:
    """Return the tests of a tier among those with some names.

    >>> sorted(choose(["f[a]", "f[b]", "g", "h"], {"f[a]": 0.1, "f[b]": 0.05, "g": 5.0}, TIERS["fast"]))
    ['f[b]', 'h']
    """
    functions = defaultdict(list)
    for name in names:
        functions[name.split("[")[0]].append((seconds.get(name, tier.unlisted), name))
    chosen = set()
    for function, cases in functions.items():
        left = tier.function * WEIGHTS.get(function, 1)
        for i, (duration, name) in enumerate(sorted(cases)):
            left -= duration
            if duration <= tier.case and (i == 0 or left >= 0):
                chosen.add(name)
    return chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add both options."""
    parser.addoption("--tier", choices=[*TIERS], default="all", help="part of the suite; see tests/tiers.py")
    parser.addoption("--record-durations", action="store_true", help="renew tests/durations.json")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the tier."""
    tier = TIERS[config.getoption("--tier")]
    chosen = choose([item.nodeid for item in items], json.loads(DURATIONS.read_text("utf-8")), tier)
    if left_out := [item for item in items if item.nodeid not in chosen]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid in chosen]


SPENT: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up set-up, call and tear-down."""
    SPENT[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the durations, in the process that started the others."""
    if session.config.getoption("--record-durations") and not hasattr(session.config, "workerinput"):
        listed = {name: round(seconds, 1) for name, seconds in sorted(SPENT.items()) if seconds >= LEAST}
        DURATIONS.write_text(json.dumps(listed, indent=0, ensure_ascii=False) + "\n", "utf-8")
