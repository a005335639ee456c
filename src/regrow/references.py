"""Names that refer to Python code."""

import re

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def names_code(name: str) -> bool:
    """Whether a name has the form of a Python function, ``pkg.mod:fn``.

    >>> names_code("toys:classifier"), names_code("torchvision:resnet18"), names_code("resnet18")
    (True, False, False)
    """
    return _FUNCTION.fullmatch(name) is not None and not name.startswith("torchvision:")
