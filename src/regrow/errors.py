"""Errors by who can mend them; every other error of regrow is a ``ValueError`` about what it was given."""


class InputError(ValueError):
    """A file or a setting that cannot be used; one line with the problem, the value and the remedy."""


class ResourceError(ValueError):
    """What the machine lacks (memory, a device, a package); one line with the value and the remedy."""


class RefusedError(ValueError):
    """A result that a check refused, so that it was not kept; one line with the figure and the remedy."""
