"""Models that a function of the user's own code builds: a person names it; a name from a file is never imported."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from regrow.axes import Example
from regrow.nets.errors import ModelError, first_line
from regrow.references import names_code

Builder = Callable[[], Any]
"""Gives a module, or a module and its example input."""


def import_builder(name: str) -> Builder:
    """Import the function that a person named.

    Args:
        name: ``pkg.mod:fn``, importable from where Python runs. Never pass what a file says.

    Raises:
        ModelError: If it cannot be imported.
    """
    return partial(_run, import_object(name))


def import_object(name: str) -> Any:
    """Import what a person named, or an installed package declares as an entry point.

    Args:
        name: ``pkg.mod:NAME``, importable from where Python runs. Never pass what a file says.

    Raises:
        ModelError: If it cannot be imported.
    """
    if not names_code(name):
        raise ModelError(f"{name!r} does not name a function; write pkg.mod:fn, for example mynets:tiny")
    module_name, _, attribute = name.partition(":")
    try:
        return _run(partial(_attribute, module_name, attribute))
    except ImportError as error:
        raise ModelError(f"{name}: cannot import {module_name!r} ({first_line(error)})") from None
    except AttributeError as error:
        raise ModelError(f"{name}: {first_line(error)}; mend the function, or name another") from None
    except Exception as error:
        raise ModelError(f"{name}: importing it failed: {type(error).__name__}: {first_line(error)}; mend it") from None


def check_code(recorded: str, needed: bool, code: str) -> None:
    """Assert that a person has named the code that a folder needs, and none that it does not need.

    Args:
        recorded: The name that the folder gives, for the message alone.
        needed: Whether the user's own code builds its network.
        code: The function that the person named; empty: none.

    Raises:
        ModelError: Naming the remedy.
    """
    if needed and not code:
        name = recorded if names_code(recorded) else "pkg.mod:fn"
        raise ModelError(
            f"its network is built by your own code ({recorded!r:.80}), and a name in a file is never imported; "
            f"add --code {name} if you trust it (in Python: code= or model=)"
        )
    if code and not needed:
        raise ModelError(f"--code {code} is for a network that your own code builds, and this one is not; leave it out")


def call_builder(builder: Builder, name: str) -> tuple[nn.Module, Example | None]:
    """What a function of the user's own code gives: a model, and an example input if it gives one.

    Args:
        builder: The function.
        name: What it is called in errors.

    Raises:
        ModelError: If it fails, or gives something else.
    """
    try:
        made = builder()
    except AttributeError as error:
        raise ModelError(f"{name}: {first_line(error)}; mend the function, or name another") from None
    except Exception as error:
        raise ModelError(f"{name}: calling it failed: {type(error).__name__}: {first_line(error)}; mend it") from None
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name}: returned a {type(model).__name__}, not a torch.nn.Module; name a function that returns a network"
        )
    return model, _as_example(example)


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _run(function: Callable[[], Any]) -> Any:
    """Call a function where modules beside the user are found, as `python -m` finds them; console scripts do not."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return function()
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _as_example(value: Any) -> Example | None:
    if value is None or isinstance(value, Example):
        return value
    return Example(tuple(value) if isinstance(value, tuple | list) else (value,))
