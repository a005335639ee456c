"""Completion in a shell: names of methods, models and sources, and run folders, found without torch."""

from collections.abc import Iterable
from glob import escape, glob

import click
from click.shell_completion import CompletionItem

from regrow.core.names import DIGITS, DOMAINS, GENERATED, PACKAGED, torchvision_names

_METHODS, _MODELS, _SOURCES = {"method", "by", "name"}, {"model", "other"}, {"sources", "unseen", "on"}
_FOLDERS = {*_MODELS, "space", "run", "runs", "config", "resume", "data", "tasks"}
# The parameters that take text which the model generates
_GENERATED = {("prune", "sources"), ("grow", "on")}


def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the values that begin with ``incomplete``, by the name of the parameter; shells add folders to ``dir``."""
    from regrow.store.run_record import RUN

    command, name = context.command.name or "", parameter.name or ""
    items = [CompletionItem(text) for text in _list_values(command, name, incomplete) if text.startswith(incomplete)]
    if name not in _FOLDERS:
        return items
    files = sorted(glob(f"{escape(incomplete)}*/{RUN}"))  # noqa: PTH207 (Path would change how the path is written)
    runs = (file.removesuffix(f"/{RUN}") for file in files)
    return [CompletionItem(incomplete, type="dir"), *items, *map(CompletionItem, runs)]  # bash: the folders come first


def _list_values(command: str, name: str, incomplete: str) -> Iterable[str]:
    """Return the names that a parameter of a command takes; those of torchvision once something is typed."""
    from regrow.cli.checks import METHOD_KINDS
    from regrow.methods import list_names

    if name in _METHODS:
        return list_names(METHOD_KINDS.get(command))
    if name in _MODELS or (command, name) == ("search", "space"):
        return (*PACKAGED, *(torchvision_names() if incomplete else ()))
    if name in _SOURCES:
        return (*DOMAINS, DIGITS, *([GENERATED] if (command, name) in _GENERATED else ()))
    return (DIGITS, *DOMAINS) if name in ("data", "tasks") else ()
