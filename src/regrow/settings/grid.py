"""Settings of ``regrow grid``, and the file that lists its cells: pruning runs for every combination of settings."""

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from regrow.errors import InputError
from regrow.settings import prune
from regrow.settings.constraints import Range
from regrow.settings.declaration import Setting, check_settings
from regrow.settings.file import check_values, parse_file
from regrow.settings.words import build_settings

ROWS = "grid.jsonl"
"""The file of a grid's folder with one row per cell."""
MAX_CELLS = 10_000
WHERE = "Where it runs"
_LONGEST = 200
_ELSEWHERE = ("--out", "--dry-run", "--again", "--code", "--memory", "--track", "--config")
_PLAIN = re.compile(r"[A-Za-z0-9.+-][A-Za-z0-9._+-]{0,47}")


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow grid``: the file of the grid, and where its cells run."""

    # fmt: off
    file: Annotated[str, Setting(
        "A YAML or TOML file. grid: names of settings of `regrow prune`, each with a list of values; every combination "
        "is a cell. base: settings of all cells.",
        argument=True, path=True, example="grid.yaml --out GRID",
    )]
    model: Annotated[str, Setting(
        "The MODEL of all cells. A function of your own, pkg.mod:fn, is named here, not in FILE.", code=True,
    )] = ""
    on: Annotated[str, Setting(
        "Run cells on this machine, or as tasks on a Ray cluster (pip install 'regrow[cluster]').",
        choices=("local", "ray"), group=WHERE,
    )] = "local"
    jobs: Annotated[int | None, Setting(
        "The largest number of cells that run at the same time; default: 1 on this machine, on Ray as many as it has "
        "CPUs for.",
        group=WHERE, range=Range(1, 4096), example="4",
    )] = None
    threads: Annotated[int, Setting("CPU threads of each cell.", group=WHERE, range=Range(1, 1024))] = 1
    retries: Annotated[int, Setting(
        "How often a cell is resumed in a new process after its process was killed.", group=WHERE, range=Range(0, 100),
    )] = 3
    address: Annotated[str, Setting(
        "The address of a running Ray cluster, host:port or auto; default: RAY_ADDRESS, else one is started here.",
        group=WHERE, example="auto",
    )] = ""
    # fmt: on

    def __post_init__(self) -> None:
        """Raise InputError if the address of a cluster is given for this machine."""
        if self.address and self.on != "ray":
            raise InputError(f"--address {self.address} is of a Ray cluster; add --on ray, or leave it out")


@dataclass(frozen=True)
class GridCell:
    """One pruning run of a grid.

    Args:
        name: The name of its folder, such as ``method=flap,keep=0.8``.
        values: The settings in which cells differ, by their names in the file.
        settings: The settings of the run.
    """

    name: str
    values: Mapping[str, Any]
    settings: prune.Settings


def read_grid(path: Path, model: str = "") -> list[GridCell]:
    """Read the file of a grid, and return its cells: the product of its lists, the last list varying fastest.

    Args:
        path: The file, in YAML or TOML.
        model: The model of all cells; empty: the file names it.

    Raises:
        InputError: If a list is empty or holds a value twice, or a setting is unknown, missing or not allowed.
    """
    data = parse_file(path)
    if unknown := sorted(data.keys() - {"base", "grid"}):
        raise InputError(f"{path}: {unknown[0]!r:.60} is neither base nor grid; put settings under one of these")
    base, lists = (data.get(name) or {} for name in ("base", "grid"))
    if not isinstance(base, Mapping) or not isinstance(lists, Mapping) or not lists:
        raise InputError(f"{path}: base and grid hold names with values; write for example grid: with keep: [0.8, 0.7]")
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: grid takes lists, got {values!r:.60} for {name}; put one value under base")
    if both := sorted(name for name in base.keys() & lists.keys() if not isinstance(base[name], Mapping)):
        raise InputError(f"{path}: {both[0]} is given in base and in grid; leave one out")
    if model and "model" in {**base, **lists}:
        raise InputError(f"{path} names the model, and so does --model {model}; leave one out")
    count = 1
    for values in lists.values():
        count *= len(values)
    if count > MAX_CELLS:
        raise InputError(f"{path} has {count:,} cells, and at most {MAX_CELLS:,} are allowed; shorten its lists")
    common = check_values(path, base, prune.Settings, _ELSEWHERE) | ({"model": model} if model else {})
    cells: dict[str, GridCell] = {}
    for chosen in itertools.product(*lists.values()):
        cell = _cell(path, dict(zip(lists, chosen, strict=True)), common)
        if cell.name in cells:
            raise InputError(f"{path} has the cell {cell.name} twice; leave one of its values out")
        cells[cell.name] = cell
    return list(cells.values())


def _cell(path: Path, values: Mapping[str, Any], common: Mapping[str, Any]) -> GridCell:
    name = ",".join(f"{key}={_word(value)}" for key, value in values.items())
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    given = check_values(path, values, prune.Settings, _ELSEWHERE)
    try:
        settings = build_settings(prune.Settings, given, common)
        check_settings(settings)
    except InputError as error:
        raise InputError(f"{path}: {name}: {error}") from None
    return GridCell(name, values, settings)


def _word(value: object) -> str:
    """Return a value as part of a folder's name: as it is, or shortened and with a digest if a name cannot hold it.

    >>> _word(0.8), _word(["news", "code"]), _word({"steps": 0}), _word("models/llama")
    ('0.8', 'news+code', 'steps.0', 'llama-8832d334')

    Args:
        value: A value in the file of a grid.
    """
    if isinstance(value, Mapping):
        text = "+".join(f"{key}.{part}" for key, part in value.items())
    else:
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text.rstrip("/").rpartition("/")[2]).strip(".-")
    return f"{plain[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".removeprefix("-")
