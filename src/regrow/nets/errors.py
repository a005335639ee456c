"""Errors of finding, reading and building models."""


class ModelError(ValueError):
    """Raised if a model cannot be found, read or built; one line with the value and the remedy."""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text, for messages that must stay on one line.

    Args:
        error: The error.

    >>> first_line(ValueError("\\nsize mismatch:\\n  a long list"))
    'size mismatch:'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def needs(extra: str, package: str) -> ModelError:
    """Return the error for an optional package that is not installed.

    Args:
        extra: The extra of regrow that installs it.
        package: The package.

    >>> str(needs("vision", "torchvision"))
    "this needs torchvision, which is not installed: pip install 'regrow[vision]'"
    """
    return ModelError(f"this needs {package}, which is not installed: pip install 'regrow[{extra}]'")
