"""``regrow methods``: list the methods, or explain one."""

import re
from dataclasses import fields

import click

from regrow.cli.boundary import Verb
from regrow.cli.screen import say, table

_COMMANDS = {"pruning": "prune", "recovery": "recover", "continual": "learn", "search": "search"}
"""Kind of method → the command that uses it."""


@click.command(cls=Verb, needs="torch")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List all methods, or explain method NAME: what it does, its settings, its citation."""
    from regrow.methods import TABLES, MethodKind, added_methods, find_method

    if name is None:
        added = added_methods()
        for kind, command in _COMMANDS.items():
            known = dict(TABLES[MethodKind(kind)]) | {key: row for key, row in added.items() if row.kind == kind}
            rows = [(key, row.about.strip().splitlines()[0].rstrip(".")) for key, row in known.items()]
            table(f"Methods of `regrow {command}`", ("name", "what it does"), rows)
        say("`regrow methods NAME` explains one and lists its settings")
        return
    method = find_method(None, name)
    say(method.about.strip() + "\n", lines=True)
    helps: dict[str, str] = {}
    current = ""
    for line in (method.settings.__doc__ or "").partition("Args:")[2].splitlines():
        if match := re.match(r"\s{8}(\w+): (.*)", line):
            current = match[1]
            helps[current] = match[2]
        elif current and line.strip():
            helps[current] += " " + line.strip()
    settings = fields(method.settings)
    rows = [(f"--set {field.name}={_shown(field.default)}", helps.get(field.name, "")) for field in settings]
    table("Settings and their defaults", ("flag", "meaning"), rows)
    say(f"\nCite: {method.citation}", lines=True)


def _shown(value: object) -> str:
    """Return the default of a setting as it is typed after ``--set NAME=``."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
