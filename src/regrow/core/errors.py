"""Error types by who can fix the problem; every other error of regrow is a ``ValueError`` about an argument."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Raised for a file or setting that cannot be used; its one line has the problem, the value and the remedy."""


class ResourceError(ValueError):
    """Raised where the machine lacks memory, a device or a package; its one line has the value and the remedy."""


class RefusedError(ValueError):
    """Raised where a check rejects a result, which is then not saved; its one line has the figure and the remedy."""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text, or its type, at most 200 characters, without a final stop.

    >>> first_line(ValueError("\\nsize mismatch:\\n  a long list"))
    'size mismatch:'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra of regrow; it is right wherever regrow came from.

    >>> install_command("vision")
    "pip install 'pillow>=10' 'torchvision>=0.24'"
    """
    from importlib import metadata  # 20 ms, which only a missing package costs

    lines = dict.fromkeys(line for found in metadata.distributions(name="regrow") for line in found.requires or ())
    names = [line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    return f"pip install {shlex.join(names or [f'.[{extra}]'])}"  # without metadata it is a checkout on the path


@contextmanager
def keep_interrupts() -> Iterator[None]:
    """Context manager that raises Ctrl-C again if a library has put another error in its place while it unwound."""
    try:
        yield
    except Exception as error:
        first: BaseException | None = error
        while first is not None and not isinstance(first, KeyboardInterrupt):
            first = first.__context__
        if first is not None:
            raise first from None
        raise
