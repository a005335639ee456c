"""Schemas of the JSON records in files; :func:`regrow.store.convert.convert` validates them.

A record from which a network is built may not have unknown fields; one that is only shown may.
"""

from typing import Annotated, Any, Literal

import msgspec

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63) + 1, le=2**63 - 1)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)]  # of a tensor
Milliseconds = Annotated[float, msgspec.Meta(ge=0, lt=1e9)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256


class ParentJson(msgspec.Struct, frozen=True):
    """The ``parent`` of ``run.json``: the model that a run started from."""

    name: str
    weights: str
    parameters: Count
    plans: Count  # how many plans of its ledger the run begins with
    files: dict[str, dict[str, int]] = {}


class CopiedFile(msgspec.Struct, frozen=True):
    """The size and digest of a file in ``before/``."""

    bytes: Count
    sha256: Digest


class SnapshotJson(msgspec.Struct, frozen=True):
    """The ``snapshot`` of ``run.json``: the files of ``before/``, to which the run can be undone."""

    bytes: Count
    files: dict[str, CopiedFile]


class StageJson(msgspec.Struct, frozen=True):
    """An entry of ``stages`` in ``run.json``: an earlier run on the same network."""

    name: str
    verb: str
    command: str
    changed: str
    before: Count
    parameters: Count
    plans: Count
    weights: Digest


class SourceJson(msgspec.Struct, frozen=True):
    """An entry of ``sources`` in ``run.json``: a source of data, and how much of it was read."""

    name: str
    origin: str = ""
    calibration_tokens: Count | None = None
    evaluation_tokens: Count | None = None


class LatencyJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The times in the ``run.json`` of a search: measured milliseconds of operations, sums and layers."""

    total: Milliseconds
    ops: dict[str, Milliseconds]
    sums: dict[str, Milliseconds]
    layers: dict[str, Milliseconds]


class RunJson(msgspec.Struct, frozen=True):
    """``run.json``: the settings, versions, times and notes of a run; it may have further fields."""

    format: Literal["regrow-run/2"]
    verb: str
    command: str
    settings: dict[str, Any]
    defaults: dict[str, Any]
    versions: dict[str, str]
    started: str
    finished: str | None = None
    notes: list[str] = []
    sources: list[SourceJson] = []
    seconds: dict[str, float] = {}
    timing: dict[str, Any] | None = None
    latency: LatencyJson | None = None
    memory: dict[str, int | None] = {}
    sequence: list[Any] = []
    extension: list[str] = []
    parent: ParentJson | None = None
    snapshot: SnapshotJson | None = None
    stages: list[StageJson] = []
    stage: StageJson | None = None  # this run


class LedgerJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ledger.json``: the plans that were applied to a network, in order."""

    format: Literal["regrow-ledger/2"]
    plans: list[Any]


class AxisRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of ``axes.json``: one axis, its size, its place, and the cost of one unit."""

    key: str
    size: Count
    mark: str = ""
    reason: str = ""
    label: str = ""
    block: str = ""
    inside: str = ""
    unit_params: Count = 0
    unit_macs: Count = 0
    tensors: Count = 0


class AxisRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``axes.json``: the axes before and after a run."""

    before: list[AxisRow]
    after: list[AxisRow]


class ProgressJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The progress of continual learning: the present task and epoch, and what was measured so far."""

    number: Count  # the index of the task
    epoch: Count
    step: Count
    before: list[Any]
    rows: list[list[Any]] = []
    events: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []


class CourseHeader(msgspec.Struct, frozen=True):
    """The header of ``course.safetensors``, a checkpoint of training."""

    along: dict[str, tuple[list[Any], float | None]]
    values: dict[str, Any]
    numbers: dict[str, float]
    course: ProgressJson  # the progress
    plans: list[dict[str, Any]] | Count
