"""``regrow methods``: what there is to choose from."""

import re
from dataclasses import fields

import click

from regrow.cli.boundary import Verb
from regrow.cli.screen import say, table


@click.command(cls=Verb, needs="regrow.methods")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the methods, or explain NAME: what it does, its settings, whom to cite."""
    from regrow.methods import (
        LEARNERS,
        METHODS,
        RECOVERIES,
        SEARCHERS,
        entry,
        learner_entry,
        recovery_entry,
        searcher_entry,
    )

    if name is None:
        for verb, known in (
            ("prune", METHODS),
            ("recover", RECOVERIES),
            ("learn", LEARNERS),
            ("search", SEARCHERS),
        ):
            rows = [(key, one.about.strip().splitlines()[0].rstrip(".")) for key, one in known.items()]
            table(f"Methods of `regrow {verb}`", ("name", "what it does"), rows)
        say("`regrow methods NAME` explains one and lists its settings")
        return
    of = {
        **dict.fromkeys(LEARNERS, learner_entry),
        **dict.fromkeys(SEARCHERS, searcher_entry),
        **dict.fromkeys(RECOVERIES, recovery_entry),
    }
    one = of.get(name, entry)(name)
    say(one.about.strip() + "\n", lines=True)
    helps = _helps(one.settings.__doc__ or "")
    rows = [
        (f"--set {field.name}={_shown(field.default)}", helps.get(field.name, "")) for field in fields(one.settings)
    ]
    table("Settings and their defaults", ("flag", "meaning"), rows)
    say(f"\nCite: {one.citation}", lines=True)


def _shown(value: object) -> str:
    """A default as one would write it behind ``--set``."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _helps(doc: str) -> dict[str, str]:
    """Field → its help, from a docstring's Args."""
    found: dict[str, str] = {}
    current = ""
    for line in doc.partition("Args:")[2].splitlines():
        if match := re.match(r"\s{8}(\w+): (.*)", line):
            current = match[1]
            found[current] = match[2]
        elif current and line.strip():
            found[current] += " " + line.strip()
    return found
