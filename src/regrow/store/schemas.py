"""Schemas of the JSON records in files; :func:`regrow.store.convert.convert` validates them.

A record from which a network is built may not have unknown fields; one that is only shown may.
"""

from typing import Annotated, Any, Literal

import msgspec

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Whole = Annotated[int, msgspec.Meta(ge=-(2**63) + 1, le=2**63 - 1)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, lt=1e9)]
Index = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,18}$")]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class SlotJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A slot: where the units of an axis lie in one dimension of a tensor."""

    name: str
    dim: Count
    outer: Count
    stride: Count
    inner: Count
    offset: Count
    role: Literal["produces", "consumes", "scales", "shifts"]


class FillJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How new units are initialised: the rule, and the random seed."""

    rule: str
    seed: Count


class ChangeJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan does to one axis: units kept, added and restored."""

    size: Count
    keep: list[Count]
    slots: list[SlotJson]
    ids: list[Count]
    grow: Count
    fill: FillJson
    restore: list[Count]
    fresh: bool


class PlaceholderJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The placeholder that replaces a dropped module: what it returns, and from which argument."""

    gives: Literal["zero", "input", "nothing"]
    takes: Annotated[int, msgspec.Meta(ge=0, lt=256)] | str
    of: Annotated[int, msgspec.Meta(ge=0, le=256)]
    at: Annotated[int, msgspec.Meta(ge=0, lt=256)]


class BlockCopyJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A copy of a block in a stack: its place, what it copies, and which of its parameters are 0."""

    position: Size
    of: Size
    zeros: list[str]


class InsertionJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Copies of blocks that are inserted into a stack."""

    size: Size
    copies: Annotated[list[BlockCopyJson], msgspec.Meta(max_length=4096)]


class PlanJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan as JSON; ``origin`` is only informative."""

    format: Literal["regrow-plan/1"]
    changes: dict[str, ChangeJson]
    origin: dict[str, Any]
    means: dict[str, dict[str, float]]
    drop: dict[str, dict[str, PlaceholderJson]]
    back: list[str]
    insert: dict[str, InsertionJson] = {}


class ParentJson(msgspec.Struct, frozen=True):
    """The ``parent`` of ``run.json``: the model that a run started from."""

    name: str
    weights: str
    parameters: Count
    plans: Count
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
    sources: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    timing: dict[str, Any] | None = None
    latency: LatencyJson | None = None
    memory: dict[str, int | None] = {}
    sequence: list[Any] = []
    extension: list[str] = []
    parent: ParentJson | None = None
    snapshot: SnapshotJson | None = None
    stages: list[StageJson] = []
    trackers: dict[str, str] = {}


class MetricsRow(msgspec.Struct, frozen=True):
    """A line of ``metrics.jsonl``, with its kind in ``what``; it may have further fields."""

    what: str


class LedgerJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ledger.json``: the plans that were applied to a network, in order."""

    format: Literal["regrow-ledger/2"]
    plans: list[Any]


class OriginJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to build an architecture: its kind, class or name, and configuration."""

    kind: Literal["transformers", "torchvision", "small", "cells", "mobile", "bench201", "callable"]
    reference: str
    config: dict[str, Any]
    name: str


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of ``shapes.json``: dtype, shape and kind of a stored tensor."""

    dtype: str
    shape: Shape
    sha256: Digest
    kind: Literal["parameter", "buffer", "derived", "attribute"] = "parameter"
    trains: bool = True
    was: Shape | None = None
    added: bool = False


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of ``shapes.json``: the size and digest of a file of the model folder."""

    bytes: Count
    sha256: Digest
    header: Digest | Literal[""]


class NoProbe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of ``shapes.json``: why a network was saved without a probe."""

    reason: str


class ShapesJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``shapes.json``: how a saved network differs from its architecture, and its files."""

    format: Literal["regrow-shapes/2"]
    origin: OriginJson
    tensors: dict[str, StoredTensor]
    attributes: dict[str, Whole | float | Annotated[tuple[Whole, ...], msgspec.Meta(max_length=64)]]
    ties: dict[str, str]
    files: dict[str, StoredFile]
    dropped: list[str]
    versions: dict[str, str]
    compared: bool
    stands: dict[str, PlaceholderJson]
    inserted: dict[str, list[InsertionJson]]
    probe: dict[str, Any]
    sha256: Digest


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


class MassiveUnit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A unit with massive activations, in ``scores.json``."""

    unit: Count
    ratio: float | None = None
    share: float | None = None


class AxisScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A summary of the scores of an axis; a number that was not finite is ``None``."""

    quantiles: list[float | None]
    kept_min: float | None = None
    dropped_max: float | None = None
    massive: list[MassiveUnit] = []


class ScoreSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``scores.json``: the metric, and a summary of the scores of every axis."""

    metric: str
    axes: dict[str, AxisScores]


class Findings(msgspec.Struct, frozen=True):
    """``findings.json``: what a pruning method found out; it may have further tables."""

    method: str
    sources: list[str] = []
    spectrum: list[dict[str, Any]] = []
    modules: list[dict[str, Any]] = []
    starts: dict[str, float | None] = {}
    history: list[dict[str, Any]] = []
    robust_among_cut: dict[str, float | None] = {}
    notes: list[str] = []
    best_step: Count | None = None


class ConstantJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The epsilon of a norm as it was before a cut, in the undo store."""

    own: float | None
    value: float
    size: Count


class UndoStoreHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of ``undo_store.safetensors``, the undo store: the units and modules that were cut."""

    format: Literal["regrow-undo-store/1"]
    shelves: list[str]
    born: dict[str, Count]
    gone: dict[str, list[Count]]
    means: dict[str, dict[Index, float]]
    constants: dict[str, ConstantJson]
    added: list[str]


class ProgressJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The progress of continual learning: the present task and epoch, and what was measured so far."""

    number: Count
    epoch: Count
    step: Count
    before: list[Any]
    loss: float | None
    validation: list[float]
    rows: list[list[Any]] = []
    events: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []


class CourseHeader(msgspec.Struct, frozen=True):
    """The header of ``course.safetensors``, a checkpoint of training."""

    along: dict[str, tuple[list[Any], float | None]]
    values: dict[str, Any]
    numbers: dict[str, float]
    course: ProgressJson
    plans: list[dict[str, Any]] | Count
    logged: Count | None
    open: list[dict[str, Any]]


class RecoveryHeader(msgspec.Struct, frozen=True):
    """The header of ``recovery.safetensors``, a checkpoint of recovery training."""

    step: Count
    values: dict[str, Any]
    key: str = ""
