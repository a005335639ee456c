"""Networks built by a user's own function: the user names it; a name read from a file is never imported."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from regrow.core.axes import Example
from regrow.core.names import names_code
from regrow.nets.errors import ModelError, first_line

Builder = Callable[[], object]
"""A function that returns a network, or a network and its example input."""


def import_builder(name: str) -> Builder:
    """Return the user's function that builds a network, given its name on the command line.

    Args:
        name: ``pkg.mod:fn``, importable from the current folder. Never pass a name read from a file.

    Raises:
        ModelError: If it cannot be imported.
    """
    return partial(_run, import_object(name))


def import_object(name: str) -> Any:
    """Import an object by the name that a user or an installed package's entry point gives.

    Args:
        name: ``pkg.mod:NAME``, importable from the current folder. Never pass a name read from a file.

    Raises:
        ModelError: If it cannot be imported.
    """
    if not names_code(name):
        raise ModelError(f"{name!r} does not name a function; write pkg.mod:fn, for example mynets:tiny")
    module_name, _, attribute = name.partition(":")
    try:
        return _run(partial(_attribute, module_name, attribute))
    except ImportError as error:
        raise ModelError(
            f"{name}: cannot import {module_name!r} ({first_line(error)}); modules are searched in the current folder "
            "and among installed packages, and named without .py, for example mynets:tiny"
        ) from None
    except AttributeError as error:
        raise ModelError(f"{name}: {first_line(error)}; mend the function, or name another") from None
    except Exception as error:
        raise ModelError(f"{name}: importing it failed: {type(error).__name__}: {first_line(error)}; mend it") from None


def check_code(recorded: str, needed: bool, code: str) -> None:
    """Raise ModelError unless the user named a function if and only if the folder's network is built by one.

    Args:
        recorded: The name that the folder records, for the message alone.
        needed: Whether the user's own code builds the network of the folder.
        code: The function that the user named; empty if none.

    Raises:
        ModelError: If code is needed and not named, or named and not needed; names the remedy.
    """
    if needed and not code:
        name, known = recorded if names_code(recorded) else "pkg.mod:fn", f" ({recorded!r:.80})" if recorded else ""
        raise ModelError(
            f"its network is built by your own code{known}, and a name in a file is never imported; "
            f"add --code {name} if you trust it (in Python: regrow.load(folder, model=function))"
        )
    if code and not needed:
        raise ModelError(f"--code {code} is for a network that your own code builds, and this one is not; leave it out")


def call_builder(builder: Builder, name: str) -> tuple[nn.Module, Example | None]:
    """Call the user's function and return its network, and the example input if it returns one.

    Args:
        builder: The function.
        name: The name of the function, for error messages.

    Raises:
        ModelError: If it fails, or returns anything else.
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
    """Call a function with the current folder on ``sys.path``, as ``python -m`` does; console scripts do not."""
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
