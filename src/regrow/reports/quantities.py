"""Formatting of numbers: with a unit, and three significant digits."""

import math
import re
from collections.abc import Sequence

SPACE = "\N{NO-BREAK SPACE}"
NONE = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float | None) -> str:
    """Format a number as digits times a power of ten.

    >>> power(3.14e-14)
    '3.1·10⁻¹⁴'
    """
    if value is None:
        return NONE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def significant(value: float | None) -> str:
    """Format a number with three significant digits; very large and very small ones as powers of ten.

    >>> significant(33.24), significant(9.1), significant(1502.3), significant(2.5e9), significant(None)
    ('33.2', '9.10', '1,502', '2.5·10⁹', '–')
    """
    if value is None:
        return NONE
    if value and not 1e-3 <= abs(value) < 1e7:
        return power(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def spread(value: float | None, of: float | None) -> str:
    """Format a standard error with as many decimals as the number that it belongs to.

    >>> spread(1.824, 33.2), spread(0.364, 6.63), spread(30.4, 1502)
    ('1.8', '0.36', '30')
    """
    if value is None or of is None or (of and not 1e-3 <= abs(of) < 1e7):
        return power(value)
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(of)))) if of else 0}f}"


def tick(value: float) -> str:
    """Format a number at a figure's axis, as short as possible.

    >>> tick(20.0), tick(0.5), tick(133000), tick(1e-6)
    ('20', '0.5', '133,000', '10⁻⁶')
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        return power(value).removeprefix("1.0·")
    return f"{value:,.10g}"


def count(value: float | None) -> str:
    """Format a count: in full below 100,000, else with k, M, G, T or P; small fractions with three digits.

    >>> count(1536), count(134_515_008), count(6.866), count(None)
    ('1,536', '134.5\\xa0M', '6.87', '–')
    """
    if value is not None and value % 1 and abs(value) < 1000:
        return significant(value)
    return _scaled(value, ("k", "M", "G", "T", "P"), 1e5)


def octets(value: float | None) -> str:
    """Format a number of bytes in decimal units.

    >>> octets(269_100_000), octets(12)
    ('269.1\\xa0MB', '12\\xa0B')
    """
    if value is not None and value < 1000:
        return f"{value:,.0f}{SPACE}B"
    return _scaled(value, ("kB", "MB", "GB", "TB"), 1e3)


def _scaled(value: float | None, units: Sequence[str], least: float) -> str:
    """Format a number with the largest of some units, each a thousand times the one before, from ``least`` on."""
    if value is None:
        return NONE
    if abs(value) < least:
        return f"{value:,.0f}"
    power = 1
    while power < len(units) and abs(value) >= 1000 ** (power + 1):
        power += 1
    scaled = value / 1000**power
    return f"{scaled:,.{2 if abs(scaled) < 9.995 else 1}f}{SPACE}{units[power - 1]}"


def measured(value: float | None, measure: str) -> str:
    """Format an amount of what a budget counts.

    >>> measured(5e7, "kv_cache"), measured(7.5, "ms"), measured(1536, "macs")
    ('50.0\\xa0MB', '7.50 ms', '1,536')
    """
    if measure == "ms":
        return f"{significant(value)} ms"
    return octets(value) if measure in ("bytes", "kv_cache") else count(value)


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage.

    >>> percent(0.9004)
    '90.0\\xa0%'
    """
    return NONE if fraction is None else f"{100 * fraction:.1f}{SPACE}%"


def percent_tick(fraction: float | None) -> str:
    """Format a fraction at a figure's axis as a percentage, as short as possible.

    >>> percent_tick(0.25), percent_tick(0.125)
    ('25\\xa0%', '12.5\\xa0%')
    """
    return NONE if fraction is None else f"{100 * fraction:.3g}{SPACE}%"


def points(difference: float | None) -> str:
    """Format a difference of two fractions in percentage points.

    >>> points(0.0123), points(-0.2)
    ('+1.2\\xa0points', '−20.0\\xa0points')
    """
    return NONE if difference is None else f"{100 * difference:+.1f}{SPACE}points".replace("-", "−")


def factor(value: float | None) -> str:
    """Format a ratio, as ``×1.23``.

    >>> factor(1.2345), factor(0.931), factor(17.29)
    ('×1.23', '×0.93', '×17.3')
    """
    return NONE if value is None else f"×{value:.2f}" if 0.01 <= value < 9.995 else f"×{significant(value)}"


def duration(seconds: float | None) -> str:
    """Format a time span.

    >>> duration(0.84), duration(192.0), duration(3900)
    ('0.84\\xa0s', '3\\xa0min 12\\xa0s', '1\\xa0h 05\\xa0min')
    """
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.2f}{SPACE}s" if seconds < 0.995 else f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02d}{SPACE}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,}{SPACE}h {minutes:02d}{SPACE}min"


def moment(stamp: str) -> str:
    """Format a point in time from its ISO form; other texts are returned unchanged.

    >>> moment("2026-11-24T15:02:11.5+00:00"), moment("yesterday")
    ('2026-11-24 15:02 UTC', 'yesterday')
    """
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(?::[\d.]+)?(Z|[+-]\d\d:?\d\d)?", stamp)
    if not match:
        return stamp
    day, clock, zone = match.groups()
    return f"{day} {clock}" + (" UTC" if zone in ("Z", "+00:00", "+0000") else f" {zone}" if zone else "")


def in_words(value: object) -> str:
    """Return the value of a setting as a short text; empty for objects and nothing.

    >>> in_words(True), in_words(0.30000000000000004), in_words(["a", 2]), in_words(None)
    ('yes', '0.3', 'a, 2', '')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(filter(None, map(in_words, value[:20])))
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:300] if isinstance(value, int | str) else ""


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values; ``None`` if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def won_back(before: float | None, cut: float | None, after: float | None) -> float | None:
    """Return the fraction of the log-perplexity lost by a cut that was won back; ``None`` if nothing was lost."""
    if not before or not cut or not after or cut <= before:
        return None
    return math.log(cut / after) / math.log(cut / before)


def leaders(sizes: Sequence[float | None], values: Sequence[float | None]) -> list[bool]:
    """Return which values are not beaten by any at the same size or less (within half a per cent).

    >>> leaders([100, 100, 200], [0.7, 0.6, 0.8])
    [True, False, True]
    """
    known = [(v, s) for v, s in zip(values, sizes, strict=True) if v is not None and s is not None]
    return [
        v is not None and s is not None and not any(other > v and size <= 1.005 * s for other, size in known)
        for v, s in zip(values, sizes, strict=True)
    ]


def shorten(words: str, most: int) -> str:
    """Return words cut to a length, with an ellipsis if they are longer."""
    return words if len(words) <= most else words[: most - 1] + "…"
