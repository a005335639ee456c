"""What the recipes of tables share: a file of rows that a stopped run goes on from, and what is made of several."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import ttest_rel


def rows(path: Path) -> list[dict[str, Any]]:
    """What is there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, row: dict[str, Any]) -> None:
    """One row more, at once."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def spread(values: Sequence[float], scale: float = 100) -> str:
    """Mean and standard deviation, in percent unless the scale says otherwise.

    >>> spread([0.5, 0.6]), spread([1200.0], 1)
    ('55.00 ± 7.07', '1,200.00')
    """
    return f"{scale * fmean(values):,.2f}" + (f" ± {scale * stdev(values):,.2f}" if len(values) > 1 else "")


def difference(pairs: Sequence[tuple[float, float]]) -> str:
    """How far one is from another in percent, run by run, and how surely, by a paired t-test.

    >>> difference([(0.5, 0.4)]), difference([(0.5, 0.4), (0.6, 0.45), (0.7, 0.6)])
    ('+10.00', '+11.67 (p = 0.020)')
    """
    gaps = [a - b for a, b in pairs]
    if len(gaps) < 2:
        return f"{100 * gaps[0]:+.2f}" if gaps else ""
    chance = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return f"{100 * fmean(gaps):+.2f} (p {'<' if chance < 0.001 else '='} {max(chance, 0.001):.3f})"


def line(cells: Iterable[str]) -> str:
    """A line of a table in Markdown.

    >>> line(["a", "b"])
    '| a | b |'
    """
    return f"| {' | '.join(cells)} |"


def head(cells: Sequence[str]) -> str:
    """Its first two lines.

    >>> head(["a", "b"])
    '| a | b |\\n|---|---|'
    """
    return f"{line(cells)}\n|{'---|' * len(cells)}"
