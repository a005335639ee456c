"""Errors of finding, reading and building models."""

from regrow.core.errors import first_line

__all__ = ["ModelError", "first_line", "needs"]


class ModelError(ValueError):
    """Raised if a model cannot be found, read or built; one line with the value and the remedy."""


def needs(extra: str, package: str) -> ModelError:
    """Return the error for an optional package that is not installed.

    Args:
        extra: The extra of regrow that installs it.
        package: The package.

    >>> str(needs("vision", "torchvision"))
    "this needs torchvision, which is not installed: pip install 'regrow[vision]'"
    """
    return ModelError(f"this needs {package}, which is not installed: pip install 'regrow[{extra}]'")
