"""Names of models, sources and data sets: find without importing torch what is wrong with one."""

import difflib
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from regrow.core.errors import InputError, install_command
from regrow.core.limits import expanded

# The names of pretrained models that come in Python packages
PACKAGED = ("smollm2-135m", "gemma3-270m")
# A pattern of names of models on the Hugging Face Hub, OWNER/MODEL
HUB = r"[\w-][\w.-]*/[\w-][\w.-]*"
# The suffixes of files that are pickles
_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt")
# A function that torchvision registers as a model, with other decorators between
_REGISTERED = re.compile(r"^@register_model\(\)\n(?:[@ )][^\n]*\n)*def (\w+)\(", re.MULTILINE)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# The names of the text domains that are included, and of the data set of images
DOMAINS = ("news", "code", "manual", "talk")
DIGITS = "digits"
# The name of the text that the model generates
GENERATED = "generated"


def names_function(name: str) -> bool:
    """Whether a model name has the form of a Python function, ``package.module:function``.

    >>> names_function("toys:classifier"), names_function("torchvision:resnet18"), names_function("resnet18")
    (True, False, False)
    """
    return _FUNCTION.fullmatch(name) is not None and not name.startswith("torchvision:")


@cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's networks, without quantised ones, from its source; empty if it is missing."""
    spec = find_spec("torchvision")
    names: list[str] = []
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder, "models").rglob("*.py")):
            if "quantization" not in file.parts:
                names += _REGISTERED.findall(file.read_text(encoding="utf-8"))
    return tuple(sorted(names))


def find_model_problem(name: str) -> str:
    """Return why a model's name leads to none, with the remedy; empty if it may lead to one (:func:`regrow.nets.load`).

    >>> find_model_problem("smollm2-135m"), find_model_problem("smolm2-135m").partition("; ")[2]
    ('', "did you mean 'smollm2-135m'?")
    """
    first = f"for a first try: {PACKAGED[0]!r}"
    if not name.strip():
        return f"the name of the model is empty; {first}"
    path = expanded(Path(name))
    if name in PACKAGED or path.is_dir():
        return ""
    if path.suffix in _PICKLES:
        safe = path.with_suffix(".safetensors")
        return (
            f"{path}: a pickle can run code when it is read; convert it once: python -c "
            f'"import torch, safetensors.torch as s; d = torch.load({str(path)!r}, weights_only=True); '
            f's.save_file({{k: v.clone().contiguous() for k, v in d.items()}}, {str(safe)!r})"'
        )
    if path.is_file() and path.suffix == ".gguf":
        return ""
    if path.is_file() and path.suffix == ".safetensors":
        return (
            f"{name}: weights alone have no architecture; give the folder with config.json, or torchvision:NAME:{name}"
        )
    if path.is_file():
        return f"{name}: not a model; give a transformers folder, a .gguf file, or pkg.mod:fn"
    known = torchvision_names()
    if name.startswith("torchvision:") or names_function(name) or name in known or re.fullmatch(HUB, name):
        return ""
    near = difflib.get_close_matches(name.lower(), [*PACKAGED, *known], n=1, cutoff=0.5)
    if not known and not near and name.isidentifier():
        return f"no model {name!r}: no such folder, file or packaged model; torchvision: {install_command('vision')}"
    hint = f"did you mean {near[0]!r}?" if near else first
    return f"no model {name!r}: no such folder, file, packaged or torchvision model; {hint}"


def find_source_problem(spec: str) -> str:
    """Return why a source (``NAME`` or ``NAME=PATH``) cannot be read, with the remedy; empty if it may be readable.

    >>> find_source_problem("news"), find_source_problem("nws")
    ('', "no source 'nws'; did you mean 'news'?")
    """
    name, equals, path = spec.partition("=")
    if equals:
        missing = path.strip() and not expanded(Path(path.strip())).exists()
        return f"source {name!r}: {path} does not exist; check the path" if missing else ""
    known = (*DOMAINS, DIGITS, GENERATED)
    if name in known:
        return ""
    try:
        if name and expanded(Path(name)).exists():
            return f"source {name!r}: give it a name, NAME=PATH: {Path(name).stem}={name}"
    except InputError as error:
        return f"source {name!r}: {error}"
    if near := difflib.get_close_matches(name, known, n=1):
        return f"no source {name!r}; did you mean {near[0]!r}?"
    return (
        f"no source {name!r}; known: {', '.join(known)}; your own: NAME=PATH, of images NAME=FOLDER with one folder "
        "per class"
    )


def check_evaluation_sources(specs: Iterable[str]) -> None:
    """Raise ``InputError`` if one of the sources to evaluate on is generated text, which has no evaluation half."""
    if GENERATED in specs:
        raise InputError(
            f"source {GENERATED!r} is text to calibrate on and has no evaluation half; evaluate on another source, "
            f"such as {DOMAINS[0]}"
        )


def find_data_problem(name: str) -> str:
    """Return why a labelled data set cannot be read, with the remedy; empty if it is included or a folder."""
    try:
        if name == DIGITS or expanded(Path(name)).is_dir():
            return ""
    except InputError as error:
        return str(error)
    return (
        f"no data {name!r}: write digits, or a folder with MNIST's four files, or with pictures in train/CLASS/… and "
        "test/CLASS/…"
    )
