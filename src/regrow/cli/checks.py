"""Checks of a command line before torch is imported: names of models, methods and data, devices, files and folders."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow.core.amounts import parse_bytes
from regrow.core.errors import InputError
from regrow.core.limits import expanded
from regrow.core.names import DOMAINS, find_data_problem, find_model_problem, find_source_problem
from regrow.methods import MethodKind, check_name
from regrow.settings import export, grow
from regrow.settings.declaration import options_of
from regrow.store.atomic import JSON, LEFTOVER, check_output
from regrow.store.errors import StoreError
from regrow.store.replacing import WORK, check_replaceable, clear_leftovers, settle
from regrow.store.run_record import RUN, find_unfinished, read_run

if TYPE_CHECKING:
    pass

FOLDERS = frozenset({"prune", "grow", "recover", "learn", "search", "apply"})
"""Commands that write a folder of their own, ``--out``."""
METHOD_KINDS = {
    "prune": MethodKind.PRUNING,
    "recover": MethodKind.RECOVERY,
    "learn": MethodKind.CONTINUAL,
    "search": MethodKind.SEARCH,
}
"""Command → the kind of its methods."""
_DEVICE = re.compile(r"auto|(?:cpu|cuda|mps|xpu)(?::\d{1,3})?")


def check_words(command: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if a command line names something that cannot be used, as far as names and files show it.

    The errors are those that the command itself would raise once it had loaded what it needs.
    """
    values = dict(options)
    settings = values.pop("settings", None)
    if settings:
        values |= {field.name: getattr(settings, field.name) for field in fields(settings)}
        for field in options_of(type(settings)):
            for source in values[field.name] if field.setting.source else ():
                if problem := find_source_problem(source):
                    raise InputError(problem)
    if settings and (kind := METHOD_KINDS.get(command)):
        name, chosen = ("by", "recovery_settings") if command == "recover" else ("method", "method_settings")
        check_name(kind, values[name], list(values[chosen]))
    if command == "methods" and values["name"]:
        check_name(None, values["name"])
    if isinstance(settings, grow.Settings):
        settings.check()
    for model in filter(None, (values.get("model"), values.get("other")) if command != "learn" else ()):
        if problem := find_model_problem(model):
            raise InputError(problem)
    for run in values.get("runs") or filter(None, [values.get("run")]):
        read_recorded(Path(run))
    if (device := values.get("device")) and not _DEVICE.fullmatch(device):
        raise InputError(f"there is no device {device!r}; write cpu, cuda, cuda:1 or mps")
    _check_data(values)
    if memory := values.get("memory"):
        try:
            parse_bytes(memory)
        except ValueError as error:
            raise InputError(f"--memory: {error}") from None
    if file := values.get("json_file") or values.get("dry_run"):
        others = (value for value in values.values() if value != file)
        words = [str(part) for value in others for part in (value if isinstance(value, tuple) else (value,))]
        check_output(file, JSON, [*words, *(word.partition("=")[2] for word in words)])
    if isinstance(settings, export.Settings):
        _check_export(settings, values["out"])
    if command in FOLDERS and not values.get("dry_run") and not values.get("resume"):
        if not values["out"]:
            raise click.UsageError("--out names the folder of the run, for example --out run")
        check_folder(values["out"])


def read_recorded(folder: Path) -> dict[str, Any]:
    """Return ``run.json`` of a finished or unfinished run, or raise StoreError."""
    settle(folder)
    return read_run(find_unfinished(folder) or folder)


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
    """Raise StoreError unless the nearest folder above a path takes new files."""
    parent = next(folder for folder in expanded(path).resolve().parents if folder.exists())
    if not parent.is_dir():
        raise StoreError(f"{path} cannot be made, since {parent} is a file; choose another place")
    if not os.access(parent, os.W_OK):
        raise StoreError(f"{path} cannot be made, since {parent} may not be written; choose a folder that is yours")
