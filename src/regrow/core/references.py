"""Recognise names that refer to Python functions, ``package.module:function``."""

import re

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def names_code(name: str) -> bool:
    """Whether a model name has the form of a Python function, ``package.module:function``.

    >>> names_code("toys:classifier"), names_code("torchvision:resnet18"), names_code("resnet18")
    (True, False, False)

    Args:
        name: The name as the user gave it.
    """
    return _FUNCTION.fullmatch(name) is not None and not name.startswith("torchvision:")
