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
from regrow.core.names import DOMAINS, check_evaluated, find_data_problem, find_problem, find_source_problem
from regrow.methods import MethodKind, check_name
from regrow.settings import export, grow, prune
from regrow.settings.declaration import options_of
from regrow.store.atomic import JSON, LEFTOVER, check_output
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.replacing import WORK, check_replaceable, clear_leftovers, settle
from regrow.store.run_record import RUN, read_run, unfinished_folder

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
    ("prune", "method"): ("pruning", "method_settings"),
    ("recover", "by"): ("recovery", "recovery_settings"),
    ("learn", "method"): ("continual", "method_settings"),
    ("search", "method"): ("search", "method_settings"),
}
"""Command and setting → the kind of method that it names, and the setting that holds the settings of the method."""
EVALUATED = {("prune", "unseen"), ("evaluate", "sources"), ("grow", "sources")}
"""Command and setting that names sources to evaluate on alone."""
FILES = {"show": "json_file", "evaluate": "json_file", "prune": "dry_run", "grow": "plan"}
"""Command → the option that names a JSON file to write."""
_DEVICE = re.compile(r"auto|(?:cpu|cuda|mps|xpu)(?::\d{1,3})?")


def check_words(
    command: str, settings: "DataclassInstance | None", options: Mapping[str, object], *, nested: bool = False
) -> None:
    """Raise ValueError if a command line names something that cannot be used, as far as names and files show it.

    The errors are those that the command itself would raise once it had loaded what it needs. If ``nested``, it makes
    several runs, in folders below ``--out``.
    """
    values = dict(options)
    if settings:
        values |= {field.name: getattr(settings, field.name) for field in fields(settings)}
    for name, value in values.items():
        if (command, name) in METHODS and value:
            kind, where = METHODS[command, name]
            _check_method(kind, str(value), values.get(where))
    if isinstance(settings, grow.Settings):
        settings.check_growth()
        settings.check_training()
    if command in RESUMABLE and not any(values.get(name) for name in ("out", "dry_run", "resume")):
        raise click.UsageError("--out names the folder of the run, for example --out run")
    if command in MODELS:
        for name in (str(values[name]) for name in ("model", "other", "run") if values.get(name)):
            if problem := find_problem(name):
                raise InputError(problem)
    elif command in RUNS:
        several = values.get("runs")
        _check_runs([*(several if isinstance(several, tuple) else ()), *filter(None, [values.get("run")])])
    if (device := values.get("device")) and not _DEVICE.fullmatch(str(device)):
        raise InputError(f"there is no device {device!r}; write cpu, cuda, cuda:1 or mps")
    for field in options_of(type(settings)) if settings else ():
        if field.setting.source:
            value = values[field.name]
            sources = tuple(map(str, value)) if isinstance(value, tuple) else ()
            for problem in map(find_source_problem, sources):
                if problem:
                    raise InputError(problem)
            if (command, field.name) in EVALUATED:
                check_evaluated(sources)
    _check_data(values)
    if file := values.get(FILES.get(command, "")):
        others = (value for name, value in values.items() if name != FILES[command])
        inputs = (part for value in others for part in (value if isinstance(value, tuple) else (value,)))
        check_json(Path(str(file)), *map(str, inputs))
    if isinstance(settings, export.Settings):
        _check_export(settings, Path(str(options["out"])))
    if command != "search" and (memory := values.get("memory")):  # a setting of a search, which checks it
        try:
            parse_bytes(str(memory))
        except ValueError as error:
            raise InputError(f"--memory: {error}") from None
    if track := values.get("track"):
        from regrow.jobs.trackers import check_tracker

        check_tracker(str(track), str(values.get("out") or values.get("resume") or ""))
    if command == "methods" and values.get("name"):
        _check_method("", str(values["name"]), None)
    if command in FOLDERS and (out := values.get("out")):
        below = prune.folder_name(settings) if nested and isinstance(settings, prune.Settings) else ""
        check_folder(Path(str(out)) / below)


def _check_method(kind: str, name: str, settings: object) -> None:
    """Raise ValueError unless there is a method of a kind (empty: of any), which has settings of the given names."""
    names = list(map(str, settings)) if kind and isinstance(settings, Mapping) else ()
    check_name(MethodKind(kind) if kind else None, name, names)


def _check_runs(folders: Iterable[object]) -> None:
    """Raise StoreError unless folders hold runs, finished or not."""
    for folder in map(Path, map(str, folders)):
        settle(folder)
        if unfinished_folder(folder) is None:
            read_run(folder)


def _check_data(values: Mapping[str, object]) -> None:
    """Raise InputError unless the labelled data or the text of a search (``data``) or of ``tasks`` are there."""
    tasks = values.get("tasks")
    names = [str(values["data"])] if values.get("data") else []
    for spec in map(str, tasks if isinstance(tasks, tuple) else ()):
        fit = re.fullmatch(r"(?:permuted|rotated|split):(.+?):\d{1,3}", spec)
        names.append(fit[1] if fit else spec)
    for name in names:
        text = name in DOMAINS or "=" in name
        if problem := find_source_problem(name) if text else find_data_problem(name):
            raise InputError(problem)


def check_json(path: Path, *inputs: str) -> None:
    """Raise StoreError unless a JSON file can be written that is no input (a file or ``NAME=PATH``) of the command."""
    files = [part for text in inputs for part in (text, text.partition("=")[2]) if part]
    check_output(path, JSON, files)


def check_folder(out: Path) -> None:
    """Raise an error unless a folder can be written: it is new, empty, or holds an unfinished run."""
    check_replaceable(out)
    clear_leftovers(out)
    if not out.is_dir():
        _check_writable(out)
        return
    names = {path.name for path in out.iterdir() if not LEFTOVER.fullmatch(path.name)}
    if names - {WORK} and RUN not in names:
        raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")


def _check_export(settings: export.Settings, out: Path) -> None:
    """Raise an error unless the file or folder of an export may be written."""
    from regrow.jobs.export import check_out

    check_out(settings, out)
    if not out.exists():
        _check_writable(out)


def _check_writable(path: Path) -> None:
    """Raise an error unless the nearest folder above a path takes new files: one is made and deleted."""
    target = expanded(path).resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise StoreError(f"{path} cannot be made, since {parent} is a file; choose another place")
    probe = parent / f".{target.name}.{secrets.token_hex(4)}.partial"  # if killed, the next command deletes it
    with explain_os_errors(path):
        probe.mkdir()
        with suppress(FileNotFoundError):  # another command took it for a leftover
            probe.rmdir()
