"""Numbers in words: with a unit, three significant digits, and a sign that says what they are."""

import math

SPACE = "\N{NO-BREAK SPACE}"
NONE = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float | None) -> str:
    """A number as digits times a power of ten.

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
    """Three significant digits; thousands apart; very large and very small ones as powers of ten.

    >>> significant(33.24), significant(9.1), significant(1502.3), significant(2.5e9), significant(None)
    ('33.2', '9.10', '1,502', '2.5·10⁹', '–')
    """
    if value is None:
        return NONE
    if value and not 1e-3 <= abs(value) < 1e7:
        return power(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def tick(value: float) -> str:
    """A number at a figure's axis, as short as it gets.

    >>> tick(20.0), tick(0.5), tick(133000), tick(1e-6)
    ('20', '0.5', '133,000', '10⁻⁶')
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        return power(value).removeprefix("1.0·")
    return f"{value:,.10g}"


def count(value: float | None) -> str:
    """How many: in full below 100,000, else in thousands, millions or billions.

    >>> count(1536), count(134_515_008), count(None)
    ('1,536', '134.5\\xa0M', '–')
    """
    if value is None:
        return NONE
    if abs(value) < 1e5:
        return f"{value:,.0f}"
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:,.1f}{SPACE}{name}"
    return f"{value:,.0f}"


def octets(value: float | None) -> str:
    """Bytes, in decimal units.

    >>> octets(269_100_000)
    '269.1\\xa0MB'
    """
    if value is None:
        return NONE
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:,.1f}{SPACE}{name}"
    return f"{value:,.0f}{SPACE}B"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage.

    >>> percent(0.9004)
    '90.0\\xa0%'
    """
    return NONE if fraction is None else f"{100 * fraction:.1f}{SPACE}%"


def factor(value: float | None) -> str:
    """A ratio.

    >>> factor(1.2345), factor(250.0)
    ('×1.23', '×250')
    """
    return NONE if value is None else f"×{value:.2f}" if value < 100 else f"×{significant(value)}"


def duration(seconds: float | None) -> str:
    """A time span.

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
