"""Functions that format a number as a short text: with a unit, and three significant digits."""

import math
from collections.abc import Sequence
from datetime import timedelta

SPACE = "\N{NO-BREAK SPACE}"
NONE = "–"  # what stands for a missing value
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float) -> str:
    """Format a number as two digits times a power of ten.

    >>> power(3.14e-14)
    '3.1·10⁻¹⁴'
    """
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def significant(value: float | None) -> str:
    """Format a number with three significant digits; very large and very small ones as powers of ten.

    >>> significant(33.24), significant(9.1), significant(1502.3), significant(2.5e9), significant(None)
    ('33.2', '9.10', '1,502', '2.5·10⁹', '–')
    """
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e7:
        return power(value)
    decimals = 2 - int(f"{value:.2e}".partition("e")[2])  # of the rounded number: 9.999 is 10.0
    return f"{value:,.{max(0, decimals)}f}"


def count(value: float | None) -> str:
    """Format a count: in full below 100,000, else with k, M, G, T or P.

    >>> count(1536), count(134_515_008), count(None)
    ('1,536', '134.5\\xa0M', '–')
    """
    return _scaled(value, ("", "k", "M", "G", "T", "P"), 1e5)


def decimal_bytes(value: float | None) -> str:
    """Format a number of bytes in powers of 1000; :func:`regrow.core.amounts.format_bytes` has powers of 1024.

    >>> decimal_bytes(269_100_000), decimal_bytes(12)
    ('269.1\\xa0MB', '12\\xa0B')
    """
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"), 1e3)


def _scaled(value: float | None, units: Sequence[str], least: float) -> str:
    """Format a number, scaled from ``least`` on to the largest unit that it reaches; ``None``: a dash.

    ``units``: the names of 1, 1000, 1000², …
    """
    if value is None:
        return NONE
    if abs(value) < least:
        return f"{value:,.0f}{SPACE}{units[0]}".rstrip(SPACE)
    step = min(int(math.log10(abs(value)) / 3), len(units) - 1)
    scaled = value / 1000**step
    return f"{scaled:,.{2 if abs(scaled) < 9.995 else 1}f}{SPACE}{units[step]}"


def amount(value: float | None, measure: str) -> str:
    """Format an amount of what a budget limits (:class:`regrow.core.amounts.Measure`): bytes, milliseconds or a count.

    >>> amount(5e7, "kv_cache"), amount(7.5, "ms"), amount(1536, "macs")
    ('50.0\\xa0MB', '7.50\\xa0ms', '1,536')
    """
    if measure == "ms" and value is not None:
        return f"{significant(value)}{SPACE}ms"
    return decimal_bytes(value) if measure in ("bytes", "kv_cache") else count(value)


def percent(fraction: float | None) -> str:
    """Format a fraction, 0 to 1, as a percentage; ``None``: a dash.

    >>> percent(0.9004)
    '90.0\\xa0%'
    """
    return NONE if fraction is None else f"{100 * fraction:.1f}{SPACE}%"


def points(difference: float | None) -> str:
    """Format a difference of two fractions in percentage points, with its sign; ``None``: a dash.

    >>> points(0.0123), points(-0.2)
    ('+1.2\\xa0points', '−20.0\\xa0points')
    """
    return NONE if difference is None else f"{100 * difference:+.1f}{SPACE}points".replace("-", "−")


def factor(value: float | None) -> str:
    """Format a ratio, with ``×`` in front; ``None``: a dash.

    >>> factor(1.2345), factor(0.931), factor(17.29)
    ('×1.23', '×0.93', '×17.3')
    """
    if value is None:
        return NONE
    return f"×{value:.2f}" if 0.01 <= value < 9.995 else f"×{significant(value)}"


def duration(seconds: float) -> str:
    """Format a time span in seconds as hours, minutes and seconds.

    >>> duration(3900)
    '1:05:00'
    """
    return str(timedelta(seconds=round(min(seconds, 1e9))))


def format_setting(value: object) -> str:
    """Format the value of a setting, as JSON has it, as a short text; a dash for ``None``, mappings and empty lists.

    >>> format_setting(True), format_setting(0.30000000000000004), format_setting(["a", 2]), format_setting(None)
    ('yes', '0.3', 'a, 2', '–')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(format_setting, value[:20])) or NONE
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)[:300] if isinstance(value, int | str) else NONE


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not ``None``; ``None`` if there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def shorten(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters: a longer one is cut, and ends with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"
