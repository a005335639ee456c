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

    added = added_methods()
    if name is None:
        for kind, command in _COMMANDS.items():
            known = dict(TABLES[MethodKind(kind)]) | {key: one for key, one in added.items() if one.kind == kind}
            rows = [(key, one.about.strip().splitlines()[0].rstrip(".")) for key, one in known.items()]
            table(f"Methods of `regrow {command}`", ("name", "what it does"), rows)
        say("`regrow methods NAME` explains one and lists its settings")
        return
    one = find_method(None, name)
    say(one.about.strip() + "\n", lines=True)
    helps = _helps(one.settings.__doc__ or "")
    rows = [
        (f"--set {field.name}={_shown(field.default)}", helps.get(field.name, "")) for field in fields(one.settings)
    ]
    table("Settings and their defaults", ("flag", "meaning"), rows)
    say(f"\nCite: {one.citation}", lines=True)


def _shown(value: object) -> str:
    """Return the default of a setting as it is typed after ``--set NAME=``."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _helps(doc: str) -> dict[str, str]:
    """Return the description of every field from the Args section of a docstring."""
    found: dict[str, str] = {}
    current = ""
    for line in doc.partition("Args:")[2].splitlines():
        if match := re.match(r"\s{8}(\w+): (.*)", line):
            current = match[1]
            found[current] = match[2]
        elif current and line.strip():
            found[current] += " " + line.strip()
    return found
