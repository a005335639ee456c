"""The networks of a recovery that are larger than memory, and files with the tensors that it changes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.tensors import read_header, read_tensors, write_tensors
from regrow.streaming.network import StreamedNetwork

FORMAT = "regrow-changed/1"
REFIT_FIELDS = ("weight", "ridge")
"""What the record of a layer that refit has solved has, as far as a resumed refit reads it."""


class ChangedTensors:
    """Tensors of a network that a recovery has changed, in files, one per step; each access reads one.

    Args:
        folder: The folder of the files; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, ""
        self.records: list[dict[str, Any]] = []
        self.places: dict[str, Path] = {}

    def open(self, key: str, fields: Collection[str] = ()) -> None:
        """Find the steps of an interrupted recovery; files of another one, and damaged ones, are deleted.

        Args:
            key: The digest of what the recovery depends on.
            fields: What the record of each step has.
        """
        self.key, self.records, self.places = key, [], {}
        for i, path in enumerate(sorted(self.folder.glob("*.safetensors"))):
            try:
                header = read_header(path, FORMAT)
            except StoreError:
                header = {}
            names, record = header.get("names"), header.get("record")
            expected = header.get("key") == key and path == self._path(i) and len(self.records) == i
            if expected and isinstance(names, list) and isinstance(record, dict) and record.keys() >= set(fields):
                self._add(path, names, record)
            else:
                path.unlink()

    def write(self, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
        """Write the tensors that a step has changed.

        Args:
            tensors: Name → its new value.
            record: What is known of the step, as JSON data.

        Raises:
            StoreError: If the disk is full.
        """
        path = self._path(len(self.records))
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"key": self.key, "record": dict(record)}, FORMAT)
        self._add(path, [*tensors], dict(record))

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        """Return the new value of a tensor.

        Raises:
            StoreError: If its file is damaged.
        """
        return read_tensors(self.places[name], FORMAT)[1][name]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"

    def _add(self, path: Path, names: list[str], record: dict[str, Any]) -> None:
        self.records.append(record)
        self.places |= dict.fromkeys(names, path)


@dataclass(frozen=True, eq=False)
class StreamedPair:
    """The two networks of a recovery, each with one block in memory at a time.

    Args:
        dense: The network before the cut.
        model: The network after the cut, as it was before the recovery.
        changed: What the recovery has made of its tensors.
        lacking: Why memory has no room for a block of both at a time, and what to do; empty: it has.
    """

    dense: StreamedNetwork
    model: StreamedNetwork
    changed: ChangedTensors
    lacking: str = ""
