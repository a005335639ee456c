"""A run folder: settings, measurements and plans of one run, so that it can be read, resumed and run again."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from regrow.method import State
from regrow.runs.attics import read_attic, write_attic
from regrow.runs.checkpoints import file_name, read_learned, read_statistics, write_learned, write_statistics
from regrow.runs.ledger import Ledger
from regrow.runs.loop import Learned
from regrow.runs.metrics import Metrics, finite
from regrow.scores import Statistics
from regrow.store.atomic import PARTIAL, StoreError, telling, write_text
from regrow.store.versions import versions
from regrow.surgery import Attic

FORMAT = "regrow-run/1"
_LONGEST = 2**24


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Args:
        path: Where it is. :meth:`create` begins or resumes a run there, :meth:`open` reads one.
        resumed: Whether an earlier process had begun this run.
    """

    path: Path
    resumed: bool = False

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        verb: str,
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        command: str = "",
    ) -> "RunFolder":
        """Begin a run in a new or empty folder, or go on with the same run if it was interrupted.

        Args:
            path: The folder.
            verb: What is done: ``"prune"``.
            settings: Everything that the result depends on, as JSON data; the run is the same if these are.
            defaults: What the method takes for granted beside them; a run goes on under the same alone.
            command: The command that does it again.

        Raises:
            StoreError: If the folder holds something else, another run, or this one finished; nothing is touched.
        """
        path = Path(path)
        wanted = _wanted(verb, settings, defaults)
        if cls.check(path, verb=verb, settings=settings, defaults=defaults):
            cls(path)._sweep()
            return cls(path, resumed=True)
        with telling(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder._sweep()
        folder._write("run.json", {"format": FORMAT, "verb": verb, "command": command, **wanted} | _now("started"))
        return folder

    @classmethod
    def check(
        cls,
        path: str | Path,
        *,
        verb: str,
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> bool:
        """Whether an interrupted run would be resumed in a folder (``False``: a new one would begin); changes nothing.

        Raises:
            StoreError: As :meth:`create`.
        """
        path, wanted = Path(path), _wanted(verb, settings, defaults)
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; choose a folder that does not exist yet")
        if not path.is_dir() or all(PARTIAL.fullmatch(p.name) for p in path.iterdir()):
            return False
        _check_same(path, cls(path).run() if (path / "run.json").is_file() else None, wanted)
        return True

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run.

        Raises:
            StoreError: If the folder has no readable ``run.json``.
        """
        folder = cls(Path(path))
        folder.run()
        return folder

    def run(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises:
            StoreError: If it is missing or damaged.
        """
        data = self._read("run.json")
        if data is None:
            raise StoreError(f"{self.path} is not a run folder (no run.json); give the folder of a run")
        objects: dict[str, Any] = {"settings": None, "defaults": {}, "versions": {}}
        if (
            not isinstance(data, dict)
            or data.get("format") != FORMAT
            or not all(isinstance(data.get(name, missing), dict) for name, missing in objects.items())
        ):
            raise StoreError(f"{self.path / 'run.json'} is not of the format {FORMAT!r}; restore it")
        return data

    def update(self, **fields: Any) -> None:
        """Set fields of ``run.json``: ``seconds``, ``notes``.

        Raises:
            StoreError: If the disk is full; the file is then as it was.
        """
        self._write("run.json", self.run() | fields)

    def finish(self, **fields: Any) -> None:
        """Set fields of ``run.json``, and that the run is complete; what was kept for resuming goes."""
        self.update(**fields, finished=_now("finished")["finished"])
        shutil.rmtree(self.path / "statistics", ignore_errors=True)

    @property
    def ledger(self) -> Ledger:
        """The plans of the run."""
        return Ledger(self.path / "ledger.json")

    def keep(self, attic: Attic) -> None:
        """Write ``attic.safetensors``: what cuts have taken out, so that a later run can restore it.

        Raises:
            StoreError: If the disk is full; the file is then as it was.
        """
        write_attic(self.path / "attic.safetensors", attic)

    def attic(self) -> Attic:
        """What cuts have taken out; an empty attic if nothing was kept.

        Raises:
            StoreError: If the file is damaged.
        """
        path = self.path / "attic.safetensors"
        return read_attic(path) if path.exists() else Attic()

    def log(self, what: str, *, number: int | None = None, **values: Any) -> None:
        """Add a measurement to ``metrics.jsonl``, unless it is there; it is on the disk when this returns.

        Args:
            what: The kind of measurement: ``"perplexity"``, ``"size"``. One of ``regrow.runs.metrics.KEYS`` is told
                from others of its kind by the fields named there; other kinds are always added.
            number: Which measurement of its kind this is, for ``regrow.runs.metrics.NUMBERED``.
            values: What was measured, as JSON data; numbers that are not finite become null.

        Raises:
            StoreError: If the disk is full; the file then holds what it held.
        """
        self._metrics.add({"what": what, **values}, number)

    def metrics(self) -> list[dict[str, Any]]:
        """Every measurement, in order; a last line that a crash cut short is left out.

        Raises:
            StoreError: If another line is damaged.
        """
        return self._metrics.rows()

    @cached_property
    def _metrics(self) -> Metrics:
        return Metrics(self.path / "metrics.jsonl")

    def write_axes(self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
        """Write ``axes.json``.

        Args:
            before: One object per axis before the run: ``key``, ``size``, ``mark``, ``reason``, ``block``, ``label``,
                ``unit_params``, ``unit_macs``.
            after: The same after it.
        """
        self._write("axes.json", {"before": [dict(row) for row in before], "after": [dict(row) for row in after]})

    def axes(self) -> dict[str, Any]:
        """What ``axes.json`` holds; empty if there is none."""
        return self._object("axes.json")

    def write_scores(self, metric: str, axes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write ``scores.json``.

        Args:
            metric: The name of the measure.
            axes: Axis key → ``quantiles`` (21 ascending numbers), ``kept_min``, ``dropped_max``, and ``massive``: a
                list of ``{"unit", "ratio", "share"}``.
        """
        self._write("scores.json", {"metric": metric, "axes": {key: dict(entry) for key, entry in axes.items()}})

    def scores(self) -> dict[str, Any]:
        """What ``scores.json`` holds; empty if there is none."""
        return self._object("scores.json")

    def save_statistics(self, source: str, shard: int, statistics: Statistics, *, key: str = "") -> None:
        """Keep what was measured on one shard of a source, for resuming.

        Args:
            source: The name of the source.
            shard: Which part of it.
            statistics: The sums.
            key: What they depend on (:func:`regrow.runs.fingerprint`); others will not be taken for these.

        Raises:
            StoreError: If the disk is full.
        """
        path = self.path / "statistics" / file_name(source, shard)
        with telling(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_statistics(path, source, shard, statistics, key)

    def statistics(self, keys: Mapping[str, str], shards: int = 1) -> dict[tuple[str, int], Statistics]:
        """What an interrupted calibration has finished: (source, shard) → statistics, as ``collect(done=…)`` takes it.

        Args:
            keys: The name of each source → the key that its statistics must have been saved with.
            shards: Into how many parts each source is split.
        """
        found = {}
        for source, key in keys.items():
            for shard in range(shards):
                path = self.path / "statistics" / file_name(source, shard)
                if path.is_file() and (statistics := read_statistics(path, source, shard, key)) is not None:
                    found[source, shard] = statistics
        return found

    def save_learned(self, learned: Learned, *, key: str = "") -> None:
        """Keep where a method that learns stands, for resuming.

        Args:
            learned: Where it stands.
            key: What that depends on.

        Raises:
            StoreError: If the disk is full.
        """
        path = self.path / "statistics" / "learned.safetensors"
        with telling(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_learned(path, learned, key)

    def learned(self, state: State, *, key: str = "") -> Learned | None:
        """Where an interrupted run had got to in learning; ``None``: nowhere.

        Args:
            state: The first state of the method.
            key: As in :meth:`save_learned`.
        """
        path = self.path / "statistics" / "learned.safetensors"
        return read_learned(path, state, key) if path.is_file() else None

    def write_findings(self, method: str, findings: Mapping[str, Any]) -> None:
        """Write ``findings.json``: what a method saw.

        Args:
            method: Its name.
            findings: Tables by name, as JSON data.
        """
        self._write("findings.json", {"method": method, **findings})

    def findings(self) -> dict[str, Any]:
        """What ``findings.json`` holds; empty if there is none."""
        return self._object("findings.json")

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")

    def _read(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            return None
        if path.stat().st_size > _LONGEST * 16:
            raise StoreError(f"{path} is too long to be of a run; restore it")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{path} cannot be read ({str(error)[:80]}); restore it") from None

    def _object(self, name: str) -> dict[str, Any]:
        data = self._read(name)
        if data is not None and not isinstance(data, dict):
            raise StoreError(f"{self.path / name} is not a JSON object; restore it")
        return data or {}

    def _sweep(self) -> None:
        """Delete what a killed process left unfinished."""
        for place in (self.path, self.path / "statistics"):
            for path in place.iterdir() if place.is_dir() else ():
                if PARTIAL.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def set_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a method as the command line takes them.

    >>> set_words({"named": True, "levels": ("operations", "weights"), "gate": "hard"})
    ['--set', 'named=true', '--set', 'levels=["operations", "weights"]', '--set', 'gate=hard']
    """
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [word for name, value in told.items() for word in ("--set", f"{name}={value}")]


def _wanted(verb: str, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """What makes a run this one, as it comes back from ``run.json``."""
    told = {"verb": verb, "settings": dict(settings)} | ({} if defaults is None else {"defaults": dict(defaults)})
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


def _check_same(path: Path, run: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    if run is None:
        raise StoreError(f"{path} exists and is not empty; choose another folder, or delete it")
    if run.get("verb") != wanted["verb"]:
        raise StoreError(f"{path} holds a run of {run.get('verb')!r}; choose another folder, or delete it")
    old, new = run["settings"], wanted["settings"]
    if other := [key for key in {**new, **old} if old.get(key) != new.get(key)]:
        was, now = (json.dumps(settings.get(other[0]))[:60] for settings in (old, new))
        raise StoreError(
            f"{path} holds another run ({other[0]} was {was}, here {now}); choose another folder, or delete it"
        )
    if run.get("finished"):
        raise StoreError(f"{path} holds this very run, finished; choose another folder, or delete it")
    old, new = run.get("defaults"), wanted.get("defaults")
    if old is None or new is None:  # nothing was noted
        return
    if other := [key for key in {**new, **old} if key not in old or old[key] != new.get(key)]:
        was, now = (json.dumps(values[other[0]])[:60] if other[0] in values else "unknown" for values in (old, new))
        version = run.get("versions", {}).get("regrow", "of another version")
        raise StoreError(
            f"{path} was begun by regrow {version}, where {other[0]} was {was} unless told, here {now}: finish it with "
            "that version, or choose another folder"
        )


def _now(what: str) -> dict[str, Any]:
    time = {what: datetime.now(UTC).isoformat(timespec="seconds")}
    return {"versions": versions(), **time} if what == "started" else time
