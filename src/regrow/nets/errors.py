"""What can be wrong with a model that someone names."""


class ModelError(ValueError):
    """A model that cannot be found, read or rebuilt; the message is one line, names the value and the remedy."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, for messages that must stay on one line.

    >>> first_line(ValueError("\\nsize mismatch:\\n  a long list"))
    'size mismatch:'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def needs(extra: str, package: str) -> ModelError:
    """The error for an optional package that is not installed.

    >>> str(needs("vision", "torchvision"))
    "this needs torchvision, which is not installed: pip install 'regrow[vision]'"
    """
    return ModelError(f"this needs {package}, which is not installed: pip install 'regrow[{extra}]'")
