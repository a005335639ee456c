"""Checks of a command line before torch is imported: names of models, methods and data, devices, files and folders."""

import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.core.amounts import parse_bytes
from regrow.core.errors import InputError
from regrow.core.limits import expanded
from regrow.core.model_names import find_problem
from regrow.core.source_names import DOMAINS, check_evaluated, find_data_problem, find_source_problem
from regrow.settings import grow, prune
from regrow.settings.declaration import options_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MODELS = frozenset({"show", "prune", "grow", "evaluate", "apply", "chat", "export"})
"""Commands whose MODEL, OTHER or RUN is any model."""
RUNS = frozenset({"recover", "settings", "report", "compare", "history", "undo"})
"""Commands that take run folders alone."""
FOLDERS = frozenset({"prune", "grow", "recover", "learn", "search", "apply"})
"""Commands that write a folder of their own, ``--out``."""
RESUMABLE = frozenset({"prune", "grow", "learn"})
"""Commands that need ``--out`` or another option in its place."""
METHODS = {
    ("prune", "method"): "pruning",
    ("prune", "recover"): "recovery",
    ("recover", "by"): "recovery",
    ("learn", "method"): "continual",
    ("search", "method"): "search",
}
"""Command and setting → the kind of method that it names."""
EVALUATED = {("prune", "unseen"), ("evaluate", "sources"), ("grow", "sources")}
"""Command and setting that names sources to evaluate on alone."""
GIVEN = {"method": "method", "by": "recovery"}
"""Setting that names a method → the first word of the setting that holds the settings of the method."""
FILES = {"show": ("json_file",), "evaluate": ("json_file",), "prune": ("dry_run",), "grow": ("plan",)}
"""Command → the options that name a JSON file to write."""
_DEVICE = re.compile(r"auto|(?:cpu|cuda|mps|xpu)(?::\d{1,3})?")


def check_words(
    command: str, settings: "DataclassInstance | None", options: Mapping[str, object], *, nested: bool = False
) -> None:
    """Raise ValueError if a command line names something that cannot be used, as far as names and files show it.

    Args:
        command: The name of the command.
        settings: Its settings, if it has any.
        options: The values of its other options and arguments, by name.
        nested: Whether it makes several runs, in folders below ``--out``.

    Raises:
        ValueError: The error that the command itself would raise once it had loaded what it needs.
    """
    own = {one.name: getattr(settings, one.name) for one in fields(settings)} if settings else {}
    given = {**options, **own}
    for name, value in given.items():
        if (command, name) in METHODS and value:
            check_method(METHODS[command, name], str(value), own.get(f"{GIVEN.get(name, '')}_settings"))
    if isinstance(settings, grow.Settings):
        settings.check_growth()
        settings.check_training()
    if command in RESUMABLE and not any(given.get(name) for name in ("out", "dry_run", "resume")):
        raise click.UsageError("--out names the folder of the run, for example --out run")
    if command in MODELS:
        check_models(str(given[name]) for name in ("model", "other", "run") if given.get(name))
    elif command in RUNS:
        several = given.get("runs")
        check_runs([*(several if isinstance(several, tuple) else ()), *filter(None, [given.get("run")])])
    if device := given.get("device"):
        check_device(str(device))
    for field in options_of(type(settings)) if settings else ():
        if field.setting.source:
            check_sources(own[field.name])
            if (command, field.name) in EVALUATED:
                check_evaluated(own[field.name])
    check_data(given)
    for name in FILES.get(command, ()):
        if file := given.get(name):
            others = (value for other, value in given.items() if other != name)
            inputs = (one for value in others for one in (value if isinstance(value, tuple) else (value,)))
            check_json(Path(str(file)), *map(str, inputs))
    if command == "export":
        check_target(given)
    if command != "search" and (memory := given.get("memory")):  # a setting of a search, which checks it
        check_memory(str(memory))
    if track := given.get("track"):
        from regrow.jobs.trackers import check_tracker

        check_tracker(str(track), str(given.get("out") or given.get("resume") or ""))
    if command == "methods" and given.get("name"):
        check_method("", str(given["name"]))
    if command in FOLDERS and (out := given.get("out")):
        below = prune.folder_name(settings) if nested and isinstance(settings, prune.Settings) else ""
        check_folder(Path(str(out)) / below)


def check_method(kind: str, name: str, settings: object = None) -> None:
    """Raise ValueError unless there is a method of this name, with settings of these names.

    Args:
        kind: The kind of method: ``pruning``, ``continual``, ``search`` or ``recovery``; empty: any.
        name: Its name.
        settings: A mapping with the names of its settings that are given, or ``None``.
    """
    from regrow.methods import MethodKind, check_name

    names = list(map(str, settings)) if kind and isinstance(settings, Mapping) else ()
    check_name(MethodKind(kind) if kind else None, name, names)


def check_models(names: Iterable[str]) -> None:
    """Raise InputError if a name certainly leads to no model.

    Args:
        names: Names of models, or model folders.
    """
    for name in names:
        if problem := find_problem(name):
            raise InputError(problem)


def check_runs(folders: Iterable[object]) -> None:
    """Raise StoreError unless folders hold runs, finished or not.

    Args:
        folders: The folders.
    """
    from regrow.store.replacing import settle
    from regrow.store.run_record import read_run, unfinished_folder

    for folder in map(Path, map(str, folders)):
        settle(folder)
        if unfinished_folder(folder) is None:
            read_run(folder)


def check_device(name: str) -> None:
    """Raise InputError unless a name is that of a device; whether this machine has it is checked later.

    Args:
        name: ``cpu``, ``cuda:1``, ``mps``.
    """
    if not _DEVICE.fullmatch(name):
        raise InputError(f"there is no device {name!r}; write cpu, cuda, cuda:1 or mps")


def check_memory(text: str) -> None:
    """Raise InputError unless a text is an amount of memory.

    Args:
        text: The value of ``--memory``.
    """
    try:
        parse_bytes(text)
    except ValueError as error:
        raise InputError(f"--memory: {error}") from None


def check_sources(sources: object) -> None:
    """Raise InputError unless all sources are known by name, or their files and folders exist.

    Args:
        sources: Sources, ``NAME`` or ``NAME=PATH``.

    Raises:
        InputError: Names the first that is not there.
    """
    for source in sources if isinstance(sources, tuple) else ():
        if problem := find_source_problem(str(source)):
            raise InputError(problem)


def check_data(values: Mapping[str, object]) -> None:
    """Raise InputError unless the labelled data of a search or of tasks are there.

    Args:
        values: The values of the settings; ``data`` and ``tasks`` are read.
    """
    if (data := values.get("data")) and (problem := _find_problem(str(data))):
        raise InputError(problem)
    tasks = values.get("tasks")
    for spec in map(str, tasks if isinstance(tasks, tuple) else ()):
        fit = re.fullmatch(r"(?:permuted|rotated|split):(.+?):\d{1,3}", spec)
        if problem := _find_problem(fit[1] if fit else spec):
            raise InputError(problem)


def _find_problem(name: str) -> str:
    """Return why a labelled data set or a text domain cannot be read; empty if it may be there."""
    text = name in DOMAINS or "=" in name
    return find_source_problem(name) if text else find_data_problem(name)


def check_json(path: Path, *inputs: str) -> None:
    """Raise StoreError unless a JSON file can be written, before the work begins.

    Args:
        path: The file.
        inputs: What the command reads, which must not be overwritten: files, ``NAME=PATH``, or other names.

    Raises:
        StoreError: If it cannot be written.
    """
    from regrow.store.atomic import JSON, check_output

    files = [part for one in inputs for part in (one, one.partition("=")[2]) if part]
    check_output(path, JSON, files, streams=True)


def check_target(options: Mapping[str, object]) -> None:
    """Raise an error unless an export has a known format, and its file may be written.

    Args:
        options: The values of the command's options: ``run``, ``to``, ``out``, ``dtype``, ``cache``.
    """
    from regrow.exporters.formats import check_export

    run, to, out, dtype = (str(options[name]) for name in ("run", "to", "out", "dtype"))
    check_export(run, to, Path(out), dtype=dtype, cache=bool(options["cache"]))
    if not Path(out).exists():
        _check_writable(Path(out))


def check_folder(out: Path) -> None:
    """Raise an error unless a folder can be written: it is new, empty, or holds an unfinished run.

    Args:
        out: The folder; nothing in it is changed.

    Raises:
        StoreError: If it holds something else, or it is no folder.
        OSError: If it cannot be made.
    """
    from regrow.store.atomic import LEFTOVER
    from regrow.store.errors import StoreError
    from regrow.store.replacing import WORK, check_replaceable, settle
    from regrow.store.run_record import RUN

    check_replaceable(out)
    settle(out)
    if out.is_dir():
        names = {one.name for one in out.iterdir() if not LEFTOVER.fullmatch(one.name)}
        if names - {WORK} and RUN not in names:
            raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")
        return
    _check_writable(out)


def _check_writable(path: Path) -> None:
    """Raise an error unless the nearest folder above a path takes new files: one is made and deleted."""
    from regrow.store.errors import StoreError, explain_os_errors

    place = expanded(path).resolve()
    parent = next(one for one in place.parents if one.exists())
    if not parent.is_dir():
        raise StoreError(f"{path} cannot be made, since {parent} is a file; choose another place")
    probe = parent / f".{place.name}.{secrets.token_hex(4)}.partial"  # if killed, the next command deletes it
    with explain_os_errors(path):
        probe.mkdir()
        with suppress(FileNotFoundError):  # another command took it for a leftover
            probe.rmdir()
