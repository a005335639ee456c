"""What a result depends on beside its settings: the versions of what computed it."""

import platform
from importlib import metadata

PACKAGES = ("regrow", "torch", "transformers", "tokenizers", "torchvision", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed.

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
