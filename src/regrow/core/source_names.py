"""Names of data: find without importing torch what is wrong with the name of a source or of a data set."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from regrow.core.errors import InputError
from regrow.core.limits import expanded

DOMAINS = ("news", "code", "manual", "talk")
"""The names of the included text domains."""
DIGITS = "digits"
"""The name of the included images."""
GENERATED = "generated"
"""The name of the text that the model generates."""


def find_source_problem(spec: str) -> str:
    """Return why a source cannot be read, with the remedy; empty if its name is known or its path exists.

    >>> find_source_problem("news"), find_source_problem("nws")
    ('', "no source 'nws'; did you mean 'news'?")

    Args:
        spec: The source, ``NAME`` or ``NAME=PATH``.
    """
    name, equals, path = spec.partition("=")
    if equals:
        if path.strip() and not expanded(Path(path.strip())).exists():
            return f"source {name!r}: {path} does not exist; check the path"
        return ""
    if name in (*DOMAINS, DIGITS, GENERATED):
        return ""
    try:
        there = bool(name) and expanded(Path(name)).exists()
    except InputError as error:
        return f"source {name!r}: {error}"
    if there:
        return f"source {name!r}: give it a name, NAME=PATH: {Path(name).stem}={name}"
    near = difflib.get_close_matches(name, (*DOMAINS, DIGITS, GENERATED), n=1)
    own = "your own: NAME=PATH, of images NAME=FOLDER with one folder per class"
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join((*DOMAINS, DIGITS, GENERATED))}; {own}"
    return f"no source {name!r}; {hint}"


def check_evaluated(specs: Iterable[str]) -> None:
    """Raise InputError if a source is to be evaluated on that has nothing to evaluate on.

    Args:
        specs: Sources, ``NAME`` or ``NAME=PATH``.
    """
    if GENERATED in specs:
        raise InputError(
            f"source {GENERATED!r} is text to calibrate on and has no evaluation half; evaluate on another source, "
            f"such as {DOMAINS[0]}"
        )


def find_data_problem(name: str) -> str:
    """Return why a labelled data set cannot be read, with the remedy; empty if it is included or a folder.

    >>> find_data_problem("digits")
    ''

    Args:
        name: ``digits`` or the path of a folder.
    """
    try:
        if name == DIGITS or expanded(Path(name)).is_dir():
            return ""
    except InputError as error:
        return str(error)
    return (
        f"no data {name!r}: write digits, or a folder with MNIST's four files, or with pictures in train/CLASS/… and "
        "test/CLASS/…"
    )
