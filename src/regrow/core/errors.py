"""Error types by who can fix the problem; every other error of regrow is a ``ValueError`` about an argument."""


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
