"""``run.json``: the settings that identify a run, so that a folder resumes the same run and no other.

The files of an unfinished run lie in a working area: a hidden folder in the folder of the run, never mistaken for a
result. The ``run.json`` at the top of a folder is that of a finished run.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from regrow.core.errors import InputError
from regrow.core.limits import parse_json, problem
from regrow.settings.declaration import check_settings
from regrow.store import schemas
from regrow.store.atomic import LEFTOVER, write_text
from regrow.store.convert import check_format, convert
from regrow.store.errors import StoreError, check_readable, explain_os_errors
from regrow.store.replacing import WORK, link_tree

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
RUN = "run.json"
FORMAT = "regrow-run/2"
_LONGEST = 2**28


def read_run(folder: Path) -> dict[str, Any]:
    """Read and check the ``run.json`` of a run folder."""
    data = read_json(folder / RUN)
    if data is None:
        raise StoreError(f"{folder} is not a run folder (no {RUN}); give the folder of a run")
    check_format(data, FORMAT, folder / RUN)
    convert(data, schemas.RunJson, folder / RUN)
    run: dict[str, Any] = data
    return run


def convert_settings(values: Mapping[str, object], kind: type[Settings]) -> Settings:
    """Convert the recorded settings of a run to the dataclass of its command, and check them."""
    known = {one.name for one in fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise StoreError(f"settings: {unknown[0]!r:.60} is unknown here; use the version of regrow that wrote the run")
    if missing := sorted(known - values.keys()):
        raise StoreError(f"settings: {missing[0]!r} is missing; restore run.json")
    settings: Settings = convert({"settings": values}, dict[str, kind], "run.json")["settings"]  # type: ignore[valid-type]
    check_settings(settings)
    return settings


def check_repeatable(path: Path, run: Mapping[str, Any]) -> None:
    """Raise StoreError if a run got its data from Python, so that no command line can read them again."""
    if run.get("python") is not None:
        raise StoreError(
            f"{path} was written by regrow.{run.get('verb')} in Python with data that no file names; call that again, "
            "or give the folder as a MODEL"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file that may be hostile; ``None`` if it does not exist."""
    if not path.is_file():
        return None
    check_readable(path)
    if path.stat().st_size > _LONGEST:
        raise StoreError(f"{path} is too long to be of a run; restore it")
    try:
        return parse_json(path.read_text(encoding="utf-8"), "its text")
    except (OSError, ValueError, InputError) as error:
        raise StoreError(f"{path} cannot be read ({problem(error)}); restore it") from None


def run_identity(verb: str, settings: Mapping[str, object], defaults: Mapping[str, object] | None) -> dict[str, Any]:
    """Return what identifies a run (command, settings, defaults), as it would come back from ``run.json``."""
    given = {"verb": verb, "settings": dict(settings)} | ({} if defaults is None else {"defaults": dict(defaults)})
    identity: dict[str, Any] = json.loads(json.dumps(given))
    return identity


def check_same(path: Path, run: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise StoreError unless the run in a folder is the wanted one, and not finished."""
    if run["verb"] != wanted["verb"]:
        raise StoreError(f"{path} holds a run of {run['verb']!r}; choose another folder, or delete it")
    old, new = run["settings"], wanted["settings"]
    if other := [key for key in {**new, **old} if old.get(key) != new.get(key)]:
        was, now = (json.dumps(settings.get(other[0]))[:60] for settings in (old, new))
        raise StoreError(
            f"{path} holds another run ({other[0]} was {was}, here {now}); choose another folder, or delete it"
        )
    if run.get("finished"):
        raise StoreError(f"{path} holds this very run, finished; choose another folder, or delete it")
    if "defaults" not in wanted:
        return
    old, new = run["defaults"], wanted["defaults"]
    if other := [key for key in {**new, **old} if key not in old or old[key] != new.get(key)]:
        was, now = (json.dumps(values[other[0]])[:60] if other[0] in values else "unknown" for values in (old, new))
        raise StoreError(
            f"{path} was begun by regrow {run['versions'].get('regrow')}, where {other[0]} was {was} unless told, "
            f"here {now}: finish it with that version, or choose another folder"
        )


def unfinished_folder(out: Path) -> Path | None:
    """Return the folder that has the files of the unfinished run in ``out``; ``None`` if there is none."""
    check_area(out / WORK)
    return out / WORK if (out / WORK / RUN).is_file() else None


def is_resumable(out: Path, wanted: Mapping[str, object]) -> bool:
    """Whether a folder holds the wanted run, unfinished; ``False`` if it is empty or missing, else it is refused."""
    if not out.is_dir():
        return False
    names = {one.name for one in out.iterdir() if not LEFTOVER.fullmatch(one.name)}
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
    for one in (area, *inside):
        if one.is_symlink() or (one.exists() and not one.is_dir()):
            raise StoreError(f"{one} is not a folder of its own, as unfinished work needs it; delete {area}")


def make_area(out: Path) -> Path:
    """Create an empty working area in a folder, and return its path."""
    with explain_os_errors(out):
        if (out / WORK).exists():
            shutil.rmtree(out / WORK)
        (out / WORK).mkdir()
    return out / WORK


def copy_into_area(out: Path) -> None:
    """Fill the working area with the files of the finished run in a folder, so that they can be changed there."""
    area = make_area(out)
    with explain_os_errors(out):
        link_tree(out, area, skip={WORK, RUN}, copy={"metrics.jsonl"})
    write_text(area / RUN, (out / RUN).read_text(encoding="utf-8"))  # last: now there is a run
