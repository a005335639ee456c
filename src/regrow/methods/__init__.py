"""Methods: one file is one paper, and none imports another.

``METHODS`` is the whole list: name → its settings, how to build it from them, and whom to cite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from regrow.methods import flap, gprune, llm_pruner, magnitude, random, wanda_sp


@dataclass(frozen=True)
class Entry:
    """One method.

    Args:
        settings: A dataclass with a default for every field, documented in its docstring.
        build: Settings → the method.
        citation: The paper.
        about: The module's docstring: what the paper does, and where we differ.
    """

    settings: type
    build: Callable[[Any], Any]
    citation: str
    about: str


METHODS: Mapping[str, Entry] = {
    "random": Entry(random.Settings, random.build, random.CITATION, random.__doc__ or ""),
    "magnitude": Entry(magnitude.Settings, magnitude.build, magnitude.CITATION, magnitude.__doc__ or ""),
    "wanda_sp": Entry(wanda_sp.Settings, wanda_sp.build, wanda_sp.CITATION, wanda_sp.__doc__ or ""),
    "flap": Entry(flap.Settings, flap.build, flap.CITATION, flap.__doc__ or ""),
    "gprune": Entry(gprune.Settings, gprune.build, gprune.CITATION, gprune.__doc__ or ""),
    "llm_pruner": Entry(llm_pruner.Settings, llm_pruner.build, llm_pruner.CITATION, llm_pruner.__doc__ or ""),
}
"""Every method by its name on the command line."""


def entry(name: str) -> Entry:
    """The method of a name.

    Raises:
        ValueError: If there is none; suggests the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name.lower().replace("-", "_"), METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no method {name!r}; {hint}The methods are {', '.join(METHODS)}")
