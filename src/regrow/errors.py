"""Error types by who can fix the problem; every other error of regrow is a ``ValueError`` about an argument."""


class InputError(ValueError):
    """Raised for a file or setting that cannot be used; its one line has the problem, the value and the remedy."""


class ResourceError(ValueError):
    """Raised where the machine lacks memory, a device or a package; its one line has the value and the remedy."""


class RefusedError(ValueError):
    """Raised where a check rejects a result, which is then not kept; its one line has the figure and the remedy."""
