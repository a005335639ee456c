"""``run.json``: the settings that identify a run, so that a folder resumes the same run and no other.

The files of an unfinished run lie in a working area: a hidden folder in the folder of the run, never mistaken for a
result. The ``run.json`` at the top of a folder is that of a finished run.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from regrow.settings.declaration import check_settings
from regrow.store import schemas
from regrow.store.atomic import LEFTOVER, write_text
from regrow.store.convert import check_format, convert, read_json
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.replacing import WORK, link_tree

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
RUN = "run.json"
FORMAT = "regrow-run/2"


def read_run(folder: Path) -> dict[str, Any]:
    """Read and check the ``run.json`` of a run folder."""
    run: dict[str, Any] | None = read_json(folder / RUN)
    if run is None:
        raise StoreError(f"{folder} is not a run folder (no {RUN}); give the folder of a run")
    check_format(run, FORMAT, folder / RUN)
    convert(run, schemas.RunJson, folder / RUN)
    return run


def convert_settings(values: Mapping[str, object], kind: type[Settings]) -> Settings:
    """Convert the recorded settings of a run to the dataclass of its command, and check them."""
    known = {field.name for field in fields(kind)}
    if other := min(known ^ values.keys(), default=""):
        what = "unknown here" if other in values else "missing"
        raise StoreError(f"settings: {other!r:.60} is {what}; use the version of regrow that wrote the run")
    settings = convert(values, kind, "run.json: settings")
    check_settings(settings)
    return settings


def check_repeatable(path: Path, run: Mapping[str, Any]) -> None:
    """Raise StoreError if a run got its data from Python, so that no command line can read them again."""
    if run.get("python") is not None:
        raise StoreError(
            f"{path} was written by regrow.{run.get('verb')} in Python with data that no file names; call that again, "
            "or give the folder as a MODEL"
        )


def check_same(path: Path, run: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise StoreError unless the run in a folder is the wanted one, and not finished."""
    if run["verb"] != wanted["verb"]:
        raise StoreError(f"{path} holds a run of {run['verb']!r}; choose another folder, or delete it")
    if difference := first_difference(run["settings"], wanted["settings"]):
        name, was, now = difference
        raise StoreError(
            f"{path} holds another run ({name} was {was}, here {now}); choose another folder, or delete it"
        )
    if run.get("finished"):
        raise StoreError(f"{path} holds this very run, finished; choose another folder, or delete it")
    if difference := first_difference(run["defaults"], wanted.get("defaults", run["defaults"])):
        name, was, now = difference
        raise StoreError(
            f"{path} was begun by regrow {run['versions'].get('regrow')}, where {name} was {was} by default, "
            f"here {now}: finish it with that version, or choose another folder"
        )


def first_difference(old: Mapping[str, object], new: Mapping[str, object]) -> tuple[str, str, str] | None:
    """Return the name of the first setting that differs, and both values in short; ``None`` if all are equal."""
    for name in {**new, **old}:
        was, now = (json.dumps(values.get(name), sort_keys=True) for values in (old, new))
        if was != now:
            return name, was[:60], now[:60]
    return None


def unfinished_folder(out: Path) -> Path | None:
    """Return the folder that has the files of the unfinished run in ``out``; ``None`` if there is none."""
    check_area(out / WORK)
    return out / WORK if (out / WORK / RUN).is_file() else None


def is_resumable(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a folder holds the wanted run, unfinished; ``False`` if it is empty or missing, else it is refused."""
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir() if not LEFTOVER.fullmatch(path.name)}
    if RUN in names:
        check_same(out, read_run(out), wanted)
        raise StoreError(f"{out / RUN} has no finishing time; restore it, or delete {out}")
    if names - {WORK}:
        raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")
    begun = unfinished_folder(out)
    if begun is None:
        return False
    check_same(out, read_run(begun) | {"finished": None}, wanted)
    return True


def check_area(area: Path) -> None:
    """Raise StoreError if the working area or a folder in it is a symbolic link, so that all writes stay inside it."""
    inside = (Path(at) / name for at, names, _ in os.walk(area) for name in names)
    for path in (area, *inside):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise StoreError(f"{path} is not a folder of its own, as unfinished work needs it; delete {area}")


def make_area(out: Path) -> Path:
    """Create an empty working area in a folder, and return its path."""
    area = out / WORK
    with explain_os_errors(out):
        if area.exists():
            shutil.rmtree(area)
        area.mkdir()
    return area


def copy_into_area(out: Path) -> None:
    """Fill the working area with the files of the finished run in a folder, so that they can be changed there."""
    area = make_area(out)
    with explain_os_errors(out):
        link_tree(out, area, skip={WORK, RUN})
    write_text(area / RUN, (out / RUN).read_text(encoding="utf-8"))  # last: now there is a run


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
