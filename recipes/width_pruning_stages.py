"""The points of the tables of GPrune's stages: each stage alone, and with three base metrics."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from width_pruning_points import BASE_ORDER, DOMAINS, LEARNED, Point, dense

NO_STAGE = "no stage (base order, outer blocks unpruned)"
UNLEARNED: Mapping[str, Any] = {"base": "flap", "steps": 0, "start": "inner"}
STAGES: Mapping[str, Mapping[str, Any]] = {
    NO_STAGE: BASE_ORDER,
    "modules, never switch": {"switch": "never"},
    "random modules, never switch": {"partition": "random", "switch": "never"},
    "modules, switch": {},
    "random modules, switch": {"partition": "random"},
    "whole layers, switch": {"partition": "layer"},
    "modules, always switch": {"switch": "always"},
    "modules, reversed switch": {"switch": "reversed"},
    "the same mixture everywhere, no switch": {"switch": "even"},
    "shares of the base method": {"start": "base"},
    "uniform shares": {"start": "uniform"},
}
"""What GPrune's stages are compared on: name → settings that differ from the unlearned method."""

STAGE_ARMS: Mapping[str, Mapping[str, Any]] = {
    **{arm: {**UNLEARNED, **change} for arm, change in STAGES.items()},
    "learned shares": LEARNED,
}
"""Name of an arm of the stages, all on MLP neurons → its settings."""

CONTRASTS = (
    ("partition, no switch", "modules, never switch", "random modules, never switch"),
    ("partition, with the switch", "modules, switch", "random modules, switch"),
    ("partition against none", "modules, never switch", NO_STAGE),
    ("partition against whole layers", "modules, switch", "whole layers, switch"),
    ("switch against never", "modules, switch", "modules, never switch"),
    ("switch against always", "modules, switch", "modules, always switch"),
    ("switch against reversed", "modules, switch", "modules, reversed switch"),
    ("switch against the same mixture everywhere", "modules, switch", "the same mixture everywhere, no switch"),
    ("switch of random modules against never", "random modules, switch", "random modules, never switch"),
    ("shares: base against inner", "shares of the base method", "modules, switch"),
    ("shares: uniform against inner", "uniform shares", "modules, switch"),
    ("shares: learned against inner", "learned shares", "modules, switch"),
    ("all stages, learned, against none", "learned shares", NO_STAGE),
)
"""The stage, the arm with it, and the arm that it is compared with."""


BASES = ("flap", "wanda_sp", "llm_pruner")
"""The base metrics whose choice should matter less with GPrune."""
BASE_STAGES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    (stage, base): {**UNLEARNED, **change, "base": base}
    for base in BASES
    for stage, change in (("none", BASE_ORDER), ("switch", {}), ("switch of random modules", {"partition": "random"}))
}
"""Stage, base metric → settings. All have the same shares; with the stage ``none`` the order is the base's own."""


def staged(stage: str, base: str) -> str:
    """The name of an arm of :data:`BASE_STAGES`."""
    return f"{stage}, base {base}"


def bases(keeps: Sequence[float], folds: Sequence[int], samples: int) -> Iterator[Point]:
    """Each base metric alone, and with the switch, on MLP neurons at keep 0.8 and 0.7."""
    yield dense(DOMAINS)
    for sample, fold, keep in product(range(samples), folds, [one for one in keeps if one in (0.8, 0.7)]):
        for (stage, base), settings in BASE_STAGES.items():
            yield Point(staged(stage, base), "gprune", keep, fold, sample, settings=settings)


def stages(keeps: Sequence[float], folds: Sequence[int], samples: int) -> Iterator[Point]:
    """Each stage of GPrune alone, on MLP neurons at keep 0.8 and 0.7."""
    yield dense(DOMAINS)
    for sample, fold, keep in product(range(samples), folds, [one for one in keeps if one in (0.8, 0.7)]):
        for arm, settings in STAGE_ARMS.items():
            yield Point(arm, "gprune", keep, fold, sample, settings=settings)
