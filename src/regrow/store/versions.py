"""The versions of Python and packages that a result depends on."""

import platform
from importlib import metadata

PACKAGES = ("regrow", "torch", "transformers", "tokenizers", "torchvision", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed.

    >>> sorted({"python", "torch", "regrow"} & versions().keys())
    ['python', 'regrow', 'torch']
    """
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return result
