"""Tables of all methods (pruning, continual learning, search, recovery), and look-up by name.

One file or folder is one paper, and none imports another. The tables map a name to the method's settings, the function
that builds it from them, and the paper to cite. Packages add methods by entry points of the group ``regrow.methods``;
``docs/add-a-method.md`` shows how.
"""

import ast
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from regrow.core.names import names_function
from regrow.settings.words import parse_pairs

GROUP = "regrow.methods"  # the group of entry points by which packages add methods


class MethodKind(StrEnum):
    """The task of a method: pruning, continual learning, architecture search, or recovery of a pruned network."""

    PRUNING = "pruning"
    CONTINUAL = "continual"
    SEARCH = "search"
    RECOVERY = "recovery"


@dataclass(frozen=True)
class MethodEntry:
    """A row of a table of methods: settings, the function that builds the method, citation and description.

    Args:
        kind: The task of the method.
        settings: A dataclass with a default for every field, documented in its docstring.
        build: Returns the method; called with the settings.
        citation: The paper to cite.
        about: The docstring of the method's module: what the paper does, and where this implementation differs.
    """

    kind: MethodKind
    settings: type
    build: Callable[..., Any]
    citation: str
    about: str

    def defaults(self, chosen: Collection[str]) -> dict[str, Any]:
        """Return the default of every setting not in ``chosen``; a run records them, since another version may differ.

        >>> find_method(MethodKind.PRUNING, "wanda_sp").defaults(chosen={"compensate"})
        {'allocation': 'uniform'}
        """
        return {field.name: field.default for field in fields(self.settings) if field.name not in chosen}

    def create(self, name: str, settings: Mapping[str, object]) -> Any:
        """Build the method; settings not given have defaults. ValueError for an unknown setting or a wrong type.

        ``name``: the method's, for errors. Returns what ``build`` does: a Pruner, a Learner, a Search or a recovery.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings must be a dict from names to values, got {settings!r:.60}")
        from regrow.store.convert import convert

        defaults, values = self.defaults(()), dict(settings)
        for key, value in settings.items():
            if key not in defaults:
                raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(defaults) or 'none'}")
            if isinstance(value, str) and isinstance(defaults[key], tuple):  # several values with commas
                values[key] = [parse_pairs([f"{key}={part.strip()}"])[key] for part in value.split(",")]
        remedy = f"`regrow methods {name}` explains the settings"
        return self.build(convert(values, self.settings, name, remedy))


@dataclass(frozen=True)
class MethodText:
    """What is printed about a method; parts as in :class:`MethodEntry`."""

    about: str
    citation: str
    settings_help: str  # the docstring of the settings
    defaults: Mapping[str, object]  # the default of each setting


class MethodTable(Mapping[str, MethodEntry]):
    """A read-only mapping from name to built-in method of one kind; reading an entry imports its module."""

    def __init__(self, kind: MethodKind, names: Sequence[str]) -> None:
        self._kind, self._names = kind, names

    def __getitem__(self, name: str) -> MethodEntry:
        if name not in self._names:
            raise KeyError(name)
        module = importlib.import_module(f"regrow.methods.{self._kind}.{name}")
        return MethodEntry(self._kind, module.Settings, module.build, module.CITATION, module.__doc__ or "")

    def describe(self, name: str) -> "MethodText":
        """Return what the source of a method says of it, without importing it."""
        path = Path(__file__).parent / self._kind / name
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        module = ast.parse(file.read_text(encoding="utf-8"))
        (settings,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
        values = {ast.unparse(node.targets[0]): node.value for node in module.body if isinstance(node, ast.Assign)}
        defaults = {
            ast.unparse(node.target): ast.literal_eval(node.value)
            for node in settings.body
            if isinstance(node, ast.AnnAssign) and node.value
        }
        about, help = ast.get_docstring(module) or "", ast.get_docstring(settings, clean=False) or ""
        return MethodText(about, ast.literal_eval(values["CITATION"]), help, defaults)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_NAMES = {
    MethodKind.PRUNING: "random magnitude wanda_sp flap gprune llm_pruner obs depth fisher",
    MethodKind.CONTINUAL: "naive ewc si laplace ncl gpm lwf replay packnet wsn sparsegrow",
    MethodKind.SEARCH: "mgas trials blind darts",
    MethodKind.RECOVERY: "refit lora distil",
}
TABLES: Mapping[MethodKind, MethodTable] = {kind: MethodTable(kind, names.split()) for kind, names in _NAMES.items()}
METHODS, LEARNERS, SEARCHERS, RECOVERIES = (TABLES[kind] for kind in MethodKind)  # METHODS: of pruning


def find_method(kind: MethodKind | None, name: str) -> MethodEntry:
    """Look up a method by name: built in, from an installed package, or ``pkg.mod:NAME`` of the user's own code.

    NAME is then a :class:`MethodEntry`. Never pass a name of code that comes from a file. ``kind``: the wanted one,
    ``None``: any. Raise ValueError if there is no such method (suggests the nearest name), or it is of another kind.
    """
    check_name(kind, name)
    for table in _tables(kind):
        if name in table:
            return table[name]
    from regrow.nets.load import import_object

    value = import_object(name if names_function(name) else _installed_methods()[name].value)
    if not isinstance(value, MethodEntry):
        raise ValueError(f"{name} is a {type(value).__name__}, not a regrow.methods.MethodEntry; name one")
    if kind and value.kind != kind:
        raise ValueError(f"{name} is a method of {value.kind}, and one of {kind} is needed; name one")
    return value


def check_name(kind: MethodKind | None, name: str, settings: Collection[str] = ()) -> None:
    """Raise ValueError unless a name is known or of the form ``pkg.mod:NAME`` of user code; imports no method.

    ``kind``: as for :func:`find_method`; ``settings``: names of settings that a method of this package must have.
    """
    tables = _tables(kind)
    if table := next((table for table in tables if name in table), None):
        known = table.describe(name).defaults if settings else ()
        for key in settings:
            if key not in known:
                raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(known) or 'none'}")
        return
    if names_function(name):
        return
    if name in _installed_methods():
        return
    names = list_names(kind)
    near = get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? the" if near else "the"
    what, all_of = ("recovery", "recoveries") if kind == MethodKind.RECOVERY else ("method", "methods")
    raise ValueError(f"there is no {what} {name!r}; {hint} {all_of} are {', '.join(names)}")


def list_names(kind: MethodKind | None) -> list[str]:
    """Return the names of the methods of one kind (``None``: any), and of those of any kind that packages add."""
    built_in = {name for table in TABLES.values() for name in table}
    return [*(name for table in _tables(kind) for name in table), *(_installed_methods().keys() - built_in)]


def describe_method(name: str) -> MethodText:
    """Return what is printed about a method of any kind; imports it only if it is not in this package."""
    for table in TABLES.values():
        if name in table:
            return table.describe(name)
    entry = find_method(None, name)
    return MethodText(entry.about, entry.citation, entry.settings.__doc__ or "", entry.defaults(()))


def _tables(kind: MethodKind | None) -> list[MethodTable]:
    """Return the table of one kind of methods, or all tables for ``None``."""
    return [TABLES[kind]] if kind else [*TABLES.values()]


def _installed_methods() -> dict[str, EntryPoint]:
    """Return the entry points by which installed packages add methods, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def refuse_recorded_code(name: str, command: str) -> None:
    """Raise ValueError if a run folder's method is user code; ``command``: the command line to repeat."""
    if names_function(name):
        raise ValueError(
            f"the run's method is your own code ({name!r:.80}), and a name in a file is never imported; install it as "
            f"an entry point of {GROUP}, or give the whole command again: {command}"
        )


def added_methods() -> dict[str, MethodEntry]:
    """Return name → method of any kind that an installed package adds; those that cannot be imported are left out."""
    methods = {}
    for name in _installed_methods():
        with suppress(ValueError):
            methods[name] = find_method(None, name)
    return methods
