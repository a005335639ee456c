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
RUN = "run.json"  # name of the record in the folder of a run
FORMAT = "regrow-run/2"
BEFORE = "before"  # name of the folder, inside that of a run, with the model that the run started from


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of ``run.json`` directly in a folder, or raise StoreError if it is missing or damaged."""
    run: dict[str, Any] | None = read_json(folder / RUN)
    if run is None:
        raise StoreError(f"{folder} is not a run folder (no {RUN}); give the folder of a run")
    check_format(run, FORMAT, folder / RUN)
    convert(run, schemas.RunJson, folder / RUN)
    return run


def convert_settings(values: Mapping[str, object], kind: type[Settings]) -> Settings:
    """Return a run's recorded settings as its command's dataclass ``kind``; StoreError or InputError if invalid."""
    known = {field.name for field in fields(kind)}
    if differing := min(known ^ values.keys(), default=""):
        what = "unknown here" if differing in values else "missing"
        raise StoreError(f"settings: {differing!r:.60} is {what}; use the version of regrow that wrote the run")
    settings = convert(values, kind, "run.json: settings")
    check_settings(settings)
    return settings


def check_repeatable(path: Path, run: Mapping[str, Any]) -> None:
    """Raise StoreError if ``run``, the ``run.json`` of ``path``, has data from Python, which no command can read."""
    if run.get("python") is not None:
        raise StoreError(
            f"{path} was written by regrow.{run.get('verb')} in Python with data that no file names; call that again, "
            "or give the folder as a MODEL"
        )


def check_same_run(path: Path, run: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise StoreError unless ``run``, a ``run.json``, is that of ``identity`` and not finished; ``path``: its folder.

    ``identity``: ``verb``, ``settings`` or ``asked``, and perhaps ``defaults``, which are compared if given.
    """
    if run["verb"] != identity["verb"]:
        raise StoreError(f"{path} holds a run of {run['verb']!r}; choose another folder, or delete it")
    for kind in ("asked", "settings"):
        if kind in identity and (difference := find_changed_setting(run.get(kind) or identity[kind], identity[kind])):
            name, was, now = difference
            raise StoreError(
                f"{path} holds another run ({name} was {was}, here {now}); choose another folder, or delete it"
            )
    if run.get("finished"):
        raise StoreError(f"{path} holds this very run, finished; choose another folder, or delete it")
    if difference := find_changed_setting(run["defaults"], identity.get("defaults", run["defaults"])):
        name, was, now = difference
        raise StoreError(
            f"{path} was begun by regrow {run['versions'].get('regrow')}, where {name} was {was} by default, "
            f"here {now}: finish it with that version, or choose another folder"
        )


def find_changed_setting(old: Mapping[str, object], new: Mapping[str, object]) -> tuple[str, str, str] | None:
    """Return (name, old, new value) of the first differing setting, or None; values are JSON, cut to 60 characters."""
    for name in {**new, **old}:
        was, now = (json.dumps(values.get(name), sort_keys=True) for values in (old, new))
        if was != now:
            return name, was[:60], now[:60]
    return None


def find_unfinished(out: Path) -> Path | None:
    """Return the working area (``out/.work``) of an unfinished run, or ``None``; StoreError if links are in it."""
    check_area(out / WORK)
    return out / WORK if (out / WORK / RUN).is_file() else None


def is_resumable(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds this run, unfinished; ``False`` if it is empty or missing, StoreError for all else.

    ``identity``: ``verb``, ``settings`` and perhaps ``defaults`` of the run, by name.
    """
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir() if not LEFTOVER.fullmatch(path.name)}
    if RUN in names:
        check_same_run(out, read_run(out), identity)
        raise StoreError(f"{out / RUN} has no finishing time; restore it, or delete {out}")
    if names - {WORK}:
        raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")
    area = find_unfinished(out)
    if area is None:
        return False
    # One that was killed in finish() may have its finishing time already.
    check_same_run(out, read_run(area) | {"finished": None}, identity)
    return True


def check_area(area: Path) -> None:
    """Raise StoreError if a working area, which need not exist, or a folder in it, is a link or no folder."""
    inside = (Path(root) / name for root, names, _ in os.walk(area) for name in names)
    for path in (area, *inside):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise StoreError(f"{path} is not a folder of its own, as unfinished work needs it; delete {area}")


def recreate_area(out: Path) -> Path:
    """Create an empty working area (``out/.work``), deleting one that is there, and return its path."""
    area = out / WORK
    with explain_os_errors(out):
        if area.exists():
            shutil.rmtree(area)
        area.mkdir()
    return area


def copy_into_area(out: Path) -> None:
    """Replace the working area (``out/.work``) by one with the files of the finished run in ``out``, to be changed."""
    area = recreate_area(out)
    with explain_os_errors(out):
        link_tree(out, area, skip={WORK, RUN})
    write_text(area / RUN, (out / RUN).read_text(encoding="utf-8"))  # last: now there is a run


# The packages whose versions are recorded.
PACKAGES = ("regrow", "torch", "transformers", "tokenizers", "torchvision", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return name → version, of Python and of the packages in ``PACKAGES`` that are installed.

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
