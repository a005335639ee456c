"""Tables of all methods (pruning, continual learning, search, recovery), and look-up by name.

One file or folder is one paper, and none imports another. The tables map a name to the method's settings, the function
that builds it from them, and the paper to cite. Packages add methods by entry points of the group ``regrow.methods``;
``docs/add-a-method.md`` shows how.
"""

import ast
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_args, get_type_hints

from regrow.core.references import names_code

GROUP = "regrow.methods"
"""The group of entry points by which packages add methods."""


class MethodKind(StrEnum):
    """The task of a method: pruning, continual learning, architecture search, or recovery of a pruned network."""

    PRUNING = "pruning"
    CONTINUAL = "continual"
    SEARCH = "search"
    RECOVERY = "recovery"


@dataclass(frozen=True)
class MethodEntry:
    """A method as a table lists it: its settings, the function that builds it, its citation and its description.

    Args:
        kind: The task of the method.
        settings: A dataclass with a default for every field, documented in its docstring.
        build: Returns the method; called with the settings, and with the keyword arguments of :meth:`made`.
        citation: The paper to cite.
        about: The docstring of the method's module: what the paper does, and where this implementation differs.
    """

    kind: MethodKind
    settings: type
    build: Callable[..., Any]
    citation: str
    about: str

    def defaults(self, given: Collection[str]) -> dict[str, Any]:
        """Return the default of every setting not in ``given``; a run records them, since another version may differ.

        Args:
            given: The names of the settings that the user gave.

        >>> find_method(MethodKind.PRUNING, "wanda_sp").defaults(given={"compensate"})
        {'allocation': 'uniform', 'minimum': 1}
        """
        return {one.name: one.default for one in fields(self.settings) if one.name not in given}

    def made(self, name: str, settings: Mapping[str, object], **inputs: object) -> Any:
        """Build the method with the given settings, after checking their names and types.

        Args:
            name: The method's name, for error messages.
            settings: Setting name → value; all others have their defaults.
            **inputs: Further keyword arguments of ``build``, such as ``prices``, the time that operations take.

        Raises:
            ValueError: If a setting is unknown, or is of another type than its default.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings must be a dict from names to values, got {settings!r:.60}")
        defaults = {field.name: field.default for field in fields(self.settings)}
        given = dict(settings)
        for key, value in list(given.items()):
            if key not in defaults:
                raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(defaults) or 'none'}")
            if type(value) is int and type(defaults[key]) is float:
                value = given[key] = float(value)
            if isinstance(value, str | list) and type(defaults[key]) is tuple:
                value = given[key] = self._several(name, key, value)
            if type(value) is not type(defaults[key]):
                kind = type(defaults[key]).__name__
                raise ValueError(f"{name}: {key} is of type {kind}, like its default {defaults[key]!r}; got {value!r}")
        return self.build(self.settings(**given), **inputs)

    def _several(self, name: str, key: str, value: str | list[object]) -> tuple[Any, ...]:
        """Return a setting of several values as a tuple of the right type; a string is split at commas."""
        parts = value.split(",") if isinstance(value, str) else value
        kind = get_args(get_type_hints(self.settings)[key])[0]
        try:
            return tuple(kind(part.strip() if isinstance(part, str) else part) for part in parts)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: {key} is several of type {kind.__name__}; got {value!r}") from None


class MethodTable(Mapping[str, MethodEntry]):
    """The methods of one kind by name; the module of a method is imported when its entry is read.

    Args:
        kind: The kind.
        modules: Name → the module in ``regrow.methods``, which has ``Settings``, ``build`` and ``CITATION``.
    """

    def __init__(self, kind: MethodKind, modules: Mapping[str, str]) -> None:
        self._kind, self._modules = kind, modules

    def __getitem__(self, name: str) -> MethodEntry:
        module = importlib.import_module(f"regrow.methods.{self._modules[name]}")
        return MethodEntry(self._kind, module.Settings, module.build, module.CITATION, module.__doc__ or "")

    def settings_of(self, name: str) -> tuple[str, ...] | None:
        """Return the names of a method's settings, read from its source without importing it; ``None`` if not found.

        Args:
            name: The method's name.
        """
        place = Path(__file__).parent.joinpath(*self._modules[name].split("."))
        for file in (place.with_suffix(".py"), place / "settings.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else ():
                if isinstance(node, ast.ClassDef) and node.name == "Settings" and not node.bases:
                    fields = (one.target for one in node.body if isinstance(one, ast.AnnAssign))
                    return tuple(one.id for one in fields if isinstance(one, ast.Name))
        return None

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


METHODS = MethodTable(
    MethodKind.PRUNING,
    {
        "random": "pruning.random",
        "magnitude": "pruning.magnitude",
        "wanda_sp": "pruning.wanda_sp",
        "flap": "pruning.flap",
        "gprune": "pruning.gprune",
        "llm_pruner": "pruning.llm_pruner",
        "obs": "pruning.obs",
        "depth": "pruning.depth",
        "fisher": "pruning.fisher",
        "fisher_obs": "pruning.fisher_obs",
    },
)
"""The pruning methods, by name."""

LEARNERS = MethodTable(
    MethodKind.CONTINUAL,
    {
        "naive": "continual.naive",
        "ewc": "continual.ewc",
        "si": "continual.si",
        "lwf": "continual.lwf",
        "replay": "continual.replay",
        "packnet": "continual.packnet",
        "wsn": "continual.wsn",
        "sparsegrow": "continual.sparsegrow",
    },
)
"""The continual-learning methods, by name."""

SEARCHERS = MethodTable(
    MethodKind.SEARCH,
    {"mgas": "search.mgas", "blind": "search.baselines", "darts": "search.darts", "gold_nas": "search.gold_nas"},
)
"""The architecture-search methods, by name."""

RECOVERIES = MethodTable(
    MethodKind.RECOVERY,
    {"bias": "recovery.bias", "refit": "recovery.refit", "lora": "recovery.lora", "distil": "recovery.distil"},
)
"""The methods that recover accuracy which pruning lost, by name."""

TABLES: Mapping[MethodKind, MethodTable] = {
    MethodKind.PRUNING: METHODS,
    MethodKind.CONTINUAL: LEARNERS,
    MethodKind.SEARCH: SEARCHERS,
    MethodKind.RECOVERY: RECOVERIES,
}
"""All methods of this package, by kind and name."""


def find_method(kind: MethodKind | None, name: str) -> MethodEntry:
    """Look up a method by name: built in, from an installed package, or from the user's own code.

    Args:
        kind: The kind that the method must have; ``None``: any.
        name: A name in :data:`TABLES`, that of an entry point of an installed package, or ``pkg.mod:NAME``, where NAME
            is a :class:`MethodEntry` of your own code. Never pass a name of code that comes from a file.

    Raises:
        ValueError: If there is no such method (suggests the nearest name), or it has another kind.
    """
    check_name(kind, name)
    for table in _tables(kind):
        if name in table:
            return table[name]
    from regrow.nets.load import import_object

    if names_code(name):
        return _checked(kind, name, import_object(name))
    return _checked(kind, name, import_object(_added()[name].value))


def check_name(kind: MethodKind | None, name: str) -> None:
    """Raise ValueError unless a name is that of a method, or may be that of user code; imports no method.

    Args:
        kind: The kind that the method must have; ``None``: any.
        name: The name, as for :func:`find_method`.

    Raises:
        ValueError: If there is no such method; suggests the nearest name.
    """
    tables = _tables(kind)
    if any(name in table for table in tables) or names_code(name) or name in (added := _added()):
        return
    elsewhere = {other for table in TABLES.values() for other in table}
    known = [*(key for table in tables for key in table), *(added.keys() - elsewhere)]
    near = get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? the" if near else "the"
    what, all_of = ("recovery", "recoveries") if kind == MethodKind.RECOVERY else ("method", "methods")
    raise ValueError(f"there is no {what} {name!r}; {hint} {all_of} are {', '.join(known)}")


def check_setting_names(kind: MethodKind, name: str, settings: Collection[str]) -> None:
    """Raise ValueError if a method of this package certainly has no such setting; imports no method.

    Args:
        kind: The kind of the method.
        name: Its name.
        settings: The names of the settings that are given.

    Raises:
        ValueError: If there is no such setting; lists those that there are.
    """
    table = TABLES[kind]
    known = table.settings_of(name) if name in table else None
    for key in settings:
        if known is not None and key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(known) or 'none'}")


def _tables(kind: MethodKind | None) -> list[Mapping[str, MethodEntry]]:
    return [TABLES[kind]] if kind else [*TABLES.values()]


def _added() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def refuse_recorded_code(name: str, command: str) -> None:
    """Raise ValueError if the method named in a run folder is user code: names in files are never imported.

    Args:
        name: The method's name as the run folder records it.
        command: The command line that started the run, for the message.

    Raises:
        ValueError: If the name is that of user code, ``package.module:NAME``; the message names the remedy.
    """
    if names_code(name):
        raise ValueError(
            f"the run's method is your own code ({name!r:.80}), and a name in a file is never imported; install it as "
            f"an entry point of {GROUP}, or give the whole command again: {command}"
        )


def added_methods() -> dict[str, MethodEntry]:
    """Return the methods that installed packages add, by name; those that cannot be imported are left out."""
    from regrow.nets.load import import_object

    methods = {}
    for point in _added().values():
        try:
            value = import_object(point.value)
        except ValueError:
            continue
        if isinstance(value, MethodEntry):
            methods[point.name] = value
    return methods


def _checked(kind: MethodKind | None, name: str, value: object) -> MethodEntry:
    if not isinstance(value, MethodEntry):
        raise ValueError(f"{name} is a {type(value).__name__}, not a regrow.methods.MethodEntry; name one")
    if kind and value.kind != kind:
        raise ValueError(f"{name} is a method of {value.kind}, and one of {kind} is needed; name one")
    return value
