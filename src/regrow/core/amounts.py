"""Parse and format amounts as people write them (2G, 100M, 16GiB, 7.5, 20%, +32), and size targets."""

import re
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, floor

from regrow.core.errors import InputError


class Measure(StrEnum):
    """The quantity that a budget or target limits: parameters, MACs, bytes, key-value cache or milliseconds.

    ``params`` are all parameters, tied ones once; ``weights`` are those of ``AxisGraph.counted`` alone (linear and
    convolution layers). ``params``, ``weights``, ``macs`` and ``bytes`` are those of dense kernels and of the stored
    file: an entry that is 0 counts like any other. ``nonzero`` counts the parameters that masks leave.
    """

    PARAMETERS = "params"
    WEIGHTS = "weights"
    NONZERO = "nonzero"
    MACS = "macs"
    BYTES = "bytes"
    CACHE = "kv_cache"
    TIME = "ms"


# Measure → whole steps per unit of it, where that is not 1: milliseconds are counted in nanoseconds, as integers
STEPS_PER_UNIT = {Measure.TIME: 10**6}
# The measures whose value depends on the number of tokens, so that a target may name it (`@4096`)
CONTEXT_MEASURES = frozenset({Measure.CACHE, Measure.TIME})

# Number, prefix, its "i" (powers of 1024), "b" or "bytes"
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt])(i?))?(b|\s*bytes?)?", re.IGNORECASE)
# A number of units, or a percentage
_INCREASE = re.compile(r"\+?\s*(?:(\d+)|(\d+(?:\.\d*)?|\.\d+)\s*%)")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_EXAMPLES = {
    Measure.BYTES: "200M, 64MiB, 1.5 GB or 4096 bytes",
    Measure.CACHE: "50M, 64MiB or 50000",
    Measure.TIME: "120 or 7.5",
}


def parse_amount(text: str, measure: Measure) -> float:
    """Parse an amount such as ``0.5M`` or ``50MiB`` into parameters, MACs, bytes or milliseconds, by the measure.

    k, M, G and T are powers of 1000; Ki, Mi, Gi, Ti (of 1024), B and bytes fit bytes alone; milliseconds have no
    suffix. Raises ``ValueError`` for other text, and unless the amount is above 0 and below 2⁶³.

    >>> parse_amount("0.5M", Measure.PARAMETERS), parse_amount("50MiB", Measure.CACHE)
    (500000.0, 52428800.0)
    """
    amount = 0.0  # not valid
    if match := _AMOUNT.fullmatch(text.strip()):
        number, prefix, binary, named_bytes = match.groups("")
        fits_bytes = measure in (Measure.BYTES, Measure.CACHE) or not (binary or named_bytes)
        if fits_bytes and not (prefix and measure == Measure.TIME):
            amount = float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()]
    if not 0 < amount < 2**63:  # costs are int64
        forms = _EXAMPLES.get(measure, "2G, 0.5M, 50k or 500000")
        raise ValueError(f"an amount of {measure} is above 0, below 2**63 and written like {forms}; got {text!r:.40}")
    return amount


def parse_bytes(text: str | int) -> int:
    """Parse an amount of memory such as ``2GiB`` into whole bytes; raise ``ValueError`` for other text and below 1.

    >>> parse_bytes("2GiB"), parse_bytes("1.5 GB"), parse_bytes("2G"), parse_bytes("4096 bytes")
    (2147483648, 1500000000, 2000000000, 4096)
    """
    number = parse_amount(str(text), Measure.BYTES)
    if number < 1:
        raise ValueError(f"an amount of memory is at least 1 byte, like 64MiB, 2G or 4096 bytes; got {text!r:.40}")
    return int(number)


def parse_share(text: str) -> float:
    """Parse a fraction such as ``0.2`` or ``20%``; raise ``ValueError`` for other text, but not for any number.

    >>> parse_share("0.2"), parse_share("20 %")
    (0.2, 0.2)
    """
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise ValueError(f"a share is written like 0.2 or 20%; got {text!r:.40}") from None


def format_bytes(number: int) -> str:
    """Format a number of bytes in powers of 1024 (``1.5 GiB``), in a form that :func:`parse_bytes` reads.

    >>> format_bytes(1_610_612_736), format_bytes(7)
    ('1.5 GiB', '7 bytes')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.4g} {unit}"
    return f"{number} bytes"


def format_short(number: float) -> str:
    """Format a number with three significant digits and a suffix (k, M, G, T) that :func:`parse_amount` reads.

    >>> [format_short(x) for x in (33_640, 999_700, 950.4, 7.25, 2e13)]
    ['33.6k', '1M', '950', '7.25', '20T']
    """
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


@dataclass(frozen=True)
class Target:
    """Upper limit on one measure of a network: the size it may have at most after pruning or search.

    Args:
        measure: What is counted: all parameters, the weights of linear and convolution layers, parameters that are not
            masked, multiply–accumulates of one example, bytes of the file in the dtype as loaded, bytes of the cache of
            keys and values of one sequence, or milliseconds of a forward pass on this device.
        amount: The limit, in units of the measure; 0 where a share is given.
        context: The number of tokens for which a key-value cache or time holds; 0: that of the traced example.
        share: The limit as a fraction of what the unpruned network has, in (0, 1]; 0 where an amount is given.

    Raises:
        ValueError: If both or neither of amount and share are given, or the context does not fit the measure.
    """

    measure: Measure
    amount: float = 0.0
    context: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if not (self.amount > 0) != (0 < self.share <= 1) or self.context < 0:
            raise ValueError(
                f"a target is an amount above 0 or a share of at most 100 %, for at least 1 token; got {self}"
            )
        if self.context and self.measure not in CONTEXT_MEASURES:
            raise ValueError(f"only kv_cache and ms are for a number of tokens (@); got {self}")
        if self.measure == Measure.CACHE and self.amount and not self.context:
            raise ValueError(f"a cache grows with the text: say for how many tokens, like {self}@4096")

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Parse a target, ``MEASURE=AMOUNT`` or ``MEASURE=SHARE%`` and perhaps ``@TOKENS``; else raise ValueError.

        >>> Target.parse("kv_cache=50M@4096")
        Target(measure=<Measure.CACHE: 'kv_cache'>, amount=50000000.0, context=4096, share=0.0)
        """
        unit, equals, rest = text.strip().partition("=")
        amount, at, context = rest.partition("@")
        if not equals or unit not in tuple(Measure):
            raise ValueError(
                f"a target is like params=100M, macs=50%, bytes=200M, kv_cache=50M@4096 or ms=120; got {text!r:.60}"
            )
        if at and not (context.isdecimal() and int(context)):
            raise ValueError(f"what follows @ is a number of tokens, like @4096; got {text!r:.60}")
        if not amount.strip().endswith("%"):
            return cls(Measure(unit), parse_amount(amount, Measure(unit)), int(context or 0))
        share = parse_share(amount)
        if not 0 < share <= 1:
            raise ValueError(f"a share of a size is above 0% and at most 100%, like {unit}=70%; got {text!r:.60}")
        return cls(Measure(unit), context=int(context or 0), share=share)

    @classmethod
    def smaller(cls, by: float) -> "Target":
        """Return the target of a network that loses the fraction ``by`` of all its parameters, in (0, 1).

        >>> str(Target.smaller(0.3))
        'params=70%'
        """
        if not 0 < by < 1:
            raise InputError(f"smaller must be between 0 and 1, got {by:g}; to remove 30 %, use 0.3 or 30%")
        return cls(Measure.PARAMETERS, share=1 - by)

    def limit(self, total: int) -> int:
        """Return the limit, rounded down: parameters, MACs or bytes, or nanoseconds for ``ms``.

        ``total``: what the unpruned network has, in that unit; a limit given as an amount does not depend on it.

        >>> Target.parse("macs=50%").limit(301), Target.parse("ms=2").limit(0)
        (150, 2000000)
        """
        steps = self.share * total if self.share else self.amount * STEPS_PER_UNIT.get(self.measure, 1)
        return floor(steps + 1e-6)  # 0.29 · 100 is 28.999…

    def __str__(self) -> str:
        number = f"{self.amount:.0f}" if self.amount == int(self.amount) else f"{self.amount!r}"
        number = f"{100 * self.share:.12g}%" if self.share else number
        return f"{self.measure}={number}" + (f"@{self.context}" if self.context else "")


@dataclass(frozen=True)
class Increase:
    """How much an axis is widened: by a number of units, or by a fraction of its size; the other is 0."""

    units: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str | int) -> "Increase":
        """Parse an increase as users write it: ``+25%``, ``25%``, ``+32`` or ``32``; raise ``ValueError`` otherwise.

        >>> Increase.parse("+25%"), Increase.parse(32)
        (Increase(units=0, share=0.25), Increase(units=32, share=0.0))
        """
        match = _INCREASE.fullmatch(str(text).strip()) if type(text) in (str, int) else None
        increase = cls(int(match[1] or 0), float(match[2] or 0) / 100) if match else cls()
        if not (0 < increase.units < 2**31 or 0 < increase.share <= 1000):
            raise ValueError(f"an increase is above 0 and is written like +25%, +32 or 32; got {text!r:.40}")
        return increase

    def of(self, size: int) -> int:
        """Return how many units are added to ``size`` units; a fraction is rounded up.

        >>> Increase(share=0.25).of(10), Increase(units=4).of(10)
        (3, 4)
        """
        return self.units or ceil(round(self.share * size, 6))

    def __str__(self) -> str:
        return f"+{self.units}" if self.units else f"+{100 * self.share:g}%"
