"""Names of models: find without importing torch what is wrong with one."""

import difflib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from regrow.core.limits import expanded
from regrow.core.references import names_code

PACKAGED = ("smollm2-135m", "gemma3-270m")
"""The names of pretrained models that come in Python packages."""
HUB = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""Pattern of a hub id, ``ORG/NAME``."""
_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt")
_REGISTERED = re.compile(r"^@register_model\(\)\n(?:[@ )][^\n]*\n)*def (\w+)\(", re.MULTILINE)


@cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's networks, without quantised ones, read from its source; empty without it."""
    spec = find_spec("torchvision")
    names: list[str] = []
    for place in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(place, "models").rglob("*.py")):
            if "quantization" not in file.parts:
                names += _REGISTERED.findall(file.read_text(encoding="utf-8"))
    return tuple(sorted(names))


def find_problem(name: str) -> str:
    """Return why a name leads to no model, with the remedy; empty if it may lead to one.

    >>> find_problem("smollm2-135m"), find_problem("smolm2-135m").partition("; ")[2]
    ('', "did you mean 'smollm2-135m'?")

    Args:
        name: The name of a model, as :func:`regrow.nets.load` takes it.
    """
    if not name.strip():
        return f"the name of the model is empty; for a first try: {PACKAGED[0]!r}"
    path = expanded(Path(name))
    if name in PACKAGED or path.is_dir():
        return ""
    if path.suffix in _PICKLES:
        return _convert_pickle(path)
    if path.is_file():
        return _problem_of_file(path, name)
    known = torchvision_names()
    if name.startswith("torchvision:") or names_code(name) or name in known or re.fullmatch(HUB, name):
        return ""
    near = difflib.get_close_matches(name.lower(), [*PACKAGED, *known], n=1, cutoff=0.5)
    if not known and not near and name.isidentifier():
        return (
            f"no model {name!r}: no such folder, file or packaged model; if it is one of torchvision, that is not "
            "installed: pip install 'regrow[vision]'"
        )
    hint = f"did you mean {near[0]!r}?" if near else f"for a first try: {PACKAGED[0]!r}"
    return f"no model {name!r}: no such folder, file, packaged or torchvision model; {hint}"


def _problem_of_file(path: Path, name: str) -> str:
    if path.suffix == ".gguf":
        return ""
    if path.suffix == ".safetensors":
        return (
            f"{name}: weights alone have no architecture; give the folder with config.json, or torchvision:NAME:{name}"
        )
    return f"{name}: not a model; give a transformers folder, a .gguf file, or pkg.mod:fn"


def _convert_pickle(path: Path) -> str:
    safe = path.with_suffix(".safetensors")
    return (
        f"{path}: a pickle can run code when it is read; convert it once: python -c "
        f'"import torch, safetensors.torch as s; d = torch.load({str(path)!r}, weights_only=True); '
        f's.save_file({{k: v.clone().contiguous() for k, v in d.items()}}, {str(safe)!r})"'
    )
