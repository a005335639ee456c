"""Checks of a command line before torch is imported: names of models, methods and data, devices, files and folders."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from regrow.core.amounts import parse_bytes
from regrow.core.errors import InputError
from regrow.core.limits import expanded
from regrow.core.names import DOMAINS, find_data_problem, find_model_problem, find_source_problem
from regrow.methods import MethodKind, check_name
from regrow.settings import export, grow
from regrow.settings.declaration import list_options
from regrow.settings.learn import parse_sequence
from regrow.store.atomic import JSON, LEFTOVER, check_output
from regrow.store.errors import StoreError
from regrow.store.replacing import WORK, check_replaceable, clear_leftovers, settle
from regrow.store.run_record import RUN, find_unfinished, read_run

# Commands that write a folder of their own, ``--out``.
FOLDER_COMMANDS = frozenset({"prune", "grow", "recover", "learn", "search", "apply"})
# Command → the kind of its methods.
METHOD_KINDS = {
    "prune": MethodKind.PRUNING,
    "recover": MethodKind.RECOVERY,
    "learn": MethodKind.CONTINUAL,
    "search": MethodKind.SEARCH,
}
_DEVICE = re.compile(r"auto|(?:cpu|cuda|mps|xpu)(?::\d{1,3})?")


def check_command_line(command: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError or UsageError if a command line names something unusable, as far as names and files show.

    ``command``: its name, such as ``"prune"``; ``options``: parameter name → parsed value, with the dataclass of
    settings as ``settings``. The errors are those that the command would raise once it had loaded what it needs.
    """
    values = dict(options)
    settings = values.pop("settings", None)
    if settings:
        values |= {field.name: getattr(settings, field.name) for field in fields(settings)}
        for field in list_options(type(settings)):
            for source in values[field.name] if field.setting.source else ():
                if problem := find_source_problem(source):
                    raise InputError(problem)
    if settings and command == "recover":
        check_name(MethodKind.RECOVERY, values["by"], list(values["recovery_settings"]))
    elif settings and command in METHOD_KINDS and values["method"]:
        check_name(METHOD_KINDS[command], values["method"], list(values["method_settings"]))
    if command == "methods" and values["name"]:
        check_name(None, values["name"])
    if isinstance(settings, grow.Settings):
        settings.check_growth()
    for name in ("model", "other"):  # `learn` takes names of new networks, too
        if command != "learn" and values.get(name) and (problem := find_model_problem(values[name])):
            raise InputError(problem)
    for run in values.get("runs") or filter(None, [values.get("run")]):
        read_run_record(Path(run))
    if (device := values.get("device")) and not _DEVICE.fullmatch(device):
        raise InputError(f"there is no device {device!r}; write cpu, cuda, cuda:1 or mps")
    _check_data(values)
    if memory := values.get("memory"):
        try:
            parse_bytes(memory)
        except ValueError as error:
            raise InputError(f"--memory: {error}") from None
    if file := values.get("json_file") or values.get("dry_run"):  # which must not be a file that is read
        others = (value for value in values.values() if value != file)
        words = [str(part) for value in others for part in (value if isinstance(value, tuple) else (value,))]
        check_output(file, JSON, [*words, *(word.partition("=")[2] for word in words)])
    if isinstance(settings, export.Settings):
        _check_export(settings, values["out"])
    if command in FOLDER_COMMANDS and not values.get("dry_run") and not values.get("resume"):
        if not values["out"]:
            raise click.UsageError("--out names the folder of the run, for example --out run")
        check_run_folder(values["out"])


def read_run_record(folder: Path) -> dict[str, Any]:
    """Return the parsed ``run.json`` of a finished or unfinished run, or raise StoreError.

    If a process was killed while it replaced the folder, the replacement is completed first.
    """
    settle(folder)
    return read_run(find_unfinished(folder) or folder)


def _check_data(values: Mapping[str, object]) -> None:
    """Raise InputError unless all data exist that ``values["data"]`` (of a search) or ``values["tasks"]`` name."""
    tasks = values.get("tasks")
    names = [str(values["data"])] if values.get("data") else []
    for spec in map(str, tasks if isinstance(tasks, tuple) else ()):
        _, name, _ = parse_sequence(spec)
        names.append(name)
    for name in names:
        is_text = name in DOMAINS or "=" in name
        problem = find_source_problem(name) if is_text else find_data_problem(name)
        if problem:
            raise InputError(problem)


def check_run_folder(out: Path) -> None:
    """Raise StoreError unless a run can write its folder: new, empty, or with a run; delete what killed runs left."""
    check_replaceable(out)
    clear_leftovers(out)
    if not out.is_dir():
        _check_writable(out)
        return
    names = {path.name for path in out.iterdir() if not LEFTOVER.fullmatch(path.name)}
    if names - {WORK} and RUN not in names:
        raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")


def _check_export(settings: export.Settings, out: Path) -> None:
    """Raise InputError or StoreError unless an export may write ``out``: what is there must suit the format."""
    from regrow.jobs.export import check_out

    check_out(settings, out)
    if not out.exists():
        _check_writable(out)


def _check_writable(path: Path) -> None:
    """Raise StoreError unless the nearest existing folder above a path is one in which this process may write."""
    parent = next(folder for folder in expanded(path).resolve().parents if folder.exists())
    if not parent.is_dir():
        raise StoreError(f"{path} cannot be made, since {parent} is a file; choose another place")
    if not os.access(parent, os.W_OK):
        raise StoreError(f"{path} cannot be made, since {parent} may not be written; choose a folder that is yours")
