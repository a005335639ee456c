"""Methods: one file is one paper, and none imports another.

``METHODS`` is the whole list: name → its settings, how to build it from them, and whom to cite.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from regrow.methods.continual import ewc, lwf, naive, packnet, replay, si, sparsegrow, wsn
from regrow.methods.pruning import flap, gprune, llm_pruner, magnitude, random, wanda_sp
from regrow.methods.recovery import bias, distil, lora, refit
from regrow.methods.search import baselines as blind
from regrow.methods.search import darts, gold_nas, mgas


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

    def defaults(self, told: Collection[str]) -> dict[str, Any]:
        """The settings that are not told, as this version has them: a run notes them, as another may have others.

        >>> entry("wanda_sp").defaults(told={"compensate"})
        {'allocation': 'uniform', 'minimum': 1}
        """
        return {one.name: one.default for one in fields(self.settings) if one.name not in told}

    def made(self, name: str, settings: Mapping[str, Any]) -> Any:
        """The method with settings, checked.

        Raises:
            ValueError: If a setting is unknown, or is of another type than its default.
        """
        defaults = {field.name: field.default for field in fields(self.settings)}
        given = dict(settings)
        for key, value in settings.items():
            if key not in defaults:
                raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(defaults) or 'none'}")
            if type(value) is int and type(defaults[key]) is float:
                value = given[key] = float(value)
            if type(value) in (str, list) and type(defaults[key]) is tuple:
                value = given[key] = self._several(name, key, value)
            if type(value) is not type(defaults[key]):
                kind = type(defaults[key]).__name__
                raise ValueError(f"{name}: {key} is of type {kind}, like its default {defaults[key]!r}; got {value!r}")
        return self.build(self.settings(**given))

    def _several(self, name: str, key: str, value: str | list[Any]) -> tuple[Any, ...]:
        """A tuple of what the setting holds, from words with commas between them."""
        parts = value.split(",") if isinstance(value, str) else value
        kind = get_args(get_type_hints(self.settings)[key])[0]
        try:
            return tuple(kind(part.strip() if isinstance(part, str) else part) for part in parts)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: {key} is several of type {kind.__name__}; got {value!r}") from None


METHODS: Mapping[str, Entry] = {
    "random": Entry(random.Settings, random.build, random.CITATION, random.__doc__ or ""),
    "magnitude": Entry(magnitude.Settings, magnitude.build, magnitude.CITATION, magnitude.__doc__ or ""),
    "wanda_sp": Entry(wanda_sp.Settings, wanda_sp.build, wanda_sp.CITATION, wanda_sp.__doc__ or ""),
    "flap": Entry(flap.Settings, flap.build, flap.CITATION, flap.__doc__ or ""),
    "gprune": Entry(gprune.Settings, gprune.build, gprune.CITATION, gprune.__doc__ or ""),
    "llm_pruner": Entry(llm_pruner.Settings, llm_pruner.build, llm_pruner.CITATION, llm_pruner.__doc__ or ""),
}
"""Every method that prunes, by its name on the command line."""

LEARNERS: Mapping[str, Entry] = {
    "naive": Entry(naive.Settings, naive.build, naive.CITATION, naive.__doc__ or ""),
    "ewc": Entry(ewc.Settings, ewc.build, ewc.CITATION, ewc.__doc__ or ""),
    "si": Entry(si.Settings, si.build, si.CITATION, si.__doc__ or ""),
    "lwf": Entry(lwf.Settings, lwf.build, lwf.CITATION, lwf.__doc__ or ""),
    "replay": Entry(replay.Settings, replay.build, replay.CITATION, replay.__doc__ or ""),
    "packnet": Entry(packnet.Settings, packnet.build, packnet.CITATION, packnet.__doc__ or ""),
    "wsn": Entry(wsn.Settings, wsn.build, wsn.CITATION, wsn.__doc__ or ""),
    "sparsegrow": Entry(sparsegrow.Settings, sparsegrow.build, sparsegrow.CITATION, sparsegrow.__doc__ or ""),
}
"""Every method that learns task after task."""


SEARCHERS: Mapping[str, Entry] = {
    "mgas": Entry(mgas.Settings, mgas.build, mgas.CITATION, mgas.__doc__ or ""),
    "blind": Entry(blind.Settings, blind.build, blind.CITATION, blind.__doc__ or ""),
    "darts": Entry(darts.Settings, darts.build, darts.CITATION, darts.__doc__ or ""),
    "gold_nas": Entry(gold_nas.Settings, gold_nas.build, gold_nas.CITATION, gold_nas.__doc__ or ""),
}
"""Every method that searches."""

RECOVERIES: Mapping[str, Entry] = {
    "bias": Entry(bias.Settings, bias.build, bias.CITATION, bias.__doc__ or ""),
    "refit": Entry(refit.Settings, refit.build, refit.CITATION, refit.__doc__ or ""),
    "lora": Entry(lora.Settings, lora.build, lora.CITATION, lora.__doc__ or ""),
    "distil": Entry(distil.Settings, distil.build, distil.CITATION, distil.__doc__ or ""),
}
"""Every way to win back what pruning lost."""


def entry(name: str) -> Entry:
    """The method that prunes, of a name.

    Raises:
        ValueError: If there is none; suggests the nearest.
    """
    return _of(METHODS, name)


def learner_entry(name: str) -> Entry:
    """The method that learns task after task, of a name.

    Raises:
        ValueError: If there is none; suggests the nearest.
    """
    return _of(LEARNERS, name)


def searcher_entry(name: str) -> Entry:
    """The method that searches, of a name.

    Raises:
        ValueError: If there is none; suggests the nearest.
    """
    return _of(SEARCHERS, name)


def recovery_entry(name: str) -> Entry:
    """The recovery of a name.

    Raises:
        ValueError: If there is none; suggests the nearest.
    """
    return _of(RECOVERIES, name, "recovery", "recoveries")


def _of(known: Mapping[str, Entry], name: str, what: str = "method", all_of: str = "methods") -> Entry:
    if name in known:
        return known[name]
    near = get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? the" if near else "the"
    raise ValueError(f"there is no {what} {name!r}; {hint} {all_of} are {', '.join(known)}")
