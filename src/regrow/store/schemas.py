"""What records in files must hold; :func:`regrow.store.convert.convert` reads them.

A record that drives what is built has no unknown fields; one that only informs may have more than is known here. The
records know nothing of torch.
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


class RunJson(msgspec.Struct, frozen=True):
    """``run.json``; it may hold more. What drives the run is ``settings``: see the ``Settings`` of each command."""

    format: Literal["regrow-run/1"]
    settings: dict[str, Any]
    verb: str = ""
    command: str = ""
    defaults: dict[str, Any] = {}
    versions: dict[str, str] = {}
    started: str = ""
    finished: str | None = None
    notes: list[str] = []
    sources: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    timing: dict[str, Any] | None = None
    sequence: list[Any] = []
    extension: list[str] = []


class MetricsRow(msgspec.Struct, frozen=True):
    """A line of ``metrics.jsonl``; it may hold more."""

    what: str


class LedgerJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ledger.json``."""

    format: Literal["regrow-ledger/1", "regrow-ledger/2"]
    plans: list[Any]


class SlotJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the units of an axis lie in a tensor."""

    name: str
    dim: Count
    outer: Count
    stride: Count
    inner: Count
    offset: Count
    role: Literal["produces", "consumes", "scales", "shifts"]


class FillJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What new units hold."""

    rule: str = "zero_out"
    seed: Count = 0


class ChangeJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to an axis."""

    size: Count
    keep: list[Count]
    slots: list[SlotJson]
    ids: list[Count] = []
    grow: Count = 0
    fill: FillJson = FillJson()
    restore: list[Count] = []
    fresh: bool = False


class PlaceholderJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What takes the place of a dropped module."""

    gives: Literal["zero", "input", "nothing"]
    takes: Annotated[int, msgspec.Meta(ge=0, lt=256)] | str
    of: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    at: Annotated[int, msgspec.Meta(ge=0, lt=256)] = 0


class PlanJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan; ``origin`` informs, the rest is done."""

    format: Literal["regrow-plan/1"]
    changes: dict[str, ChangeJson]
    origin: dict[str, Any] = {}
    means: dict[str, dict[str, float]] = {}
    drop: dict[str, dict[str, PlaceholderJson]] = {}
    back: list[str] = []


class OriginJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an architecture is built."""

    kind: Literal["transformers", "torchvision", "small", "cells", "mobile", "bench201", "callable"]
    reference: str
    config: dict[str, Any]
    name: str = ""


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor in ``shapes.json``."""

    dtype: str
    shape: Shape
    kind: Literal["parameter", "buffer", "derived", "attribute"] = "parameter"
    trains: bool = True
    was: Shape | None = None
    added: bool = False
    sha256: Digest | Literal[""] = ""


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside ``shapes.json``."""

    bytes: Count
    sha256: str
    header: str = ""


class NoProbe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a network was saved without a probe."""

    reason: str


class ShapesJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``shapes.json``."""

    format: Literal["regrow-shapes/1"]
    origin: OriginJson
    tensors: dict[str, StoredTensor]
    attributes: dict[str, Whole | float | Annotated[tuple[Whole, ...], msgspec.Meta(max_length=64)]]
    ties: dict[str, str]
    files: dict[str, StoredFile]
    dropped: list[str]
    versions: dict[str, str] = {}
    compared: bool = True
    stands: dict[str, PlaceholderJson] = {}
    probe: dict[str, Any] | None = None
    sha256: Digest | None = None


class LatencyJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``latency.json``, in milliseconds."""

    total: Milliseconds
    ops: dict[str, Milliseconds]
    sums: dict[str, Milliseconds]
    layers: dict[str, Milliseconds]


class AxisRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of ``axes.json``."""

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
    """A unit with massive activations."""

    unit: Count
    ratio: float | None = None
    share: float | None = None


class AxisScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scores of an axis; a number that was not finite is ``None``."""

    quantiles: list[float | None]
    kept_min: float | None = None
    dropped_max: float | None = None
    massive: list[MassiveUnit] = []


class ScoreSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``scores.json``."""

    metric: str
    axes: dict[str, AxisScores]


class Findings(msgspec.Struct, frozen=True):
    """``findings.json``; a method may add tables of its own."""

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
    """A constant under a root, as it was before a cut."""

    own: float | None
    value: float
    size: Count


class UndoStoreHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of ``attic.safetensors``."""

    format: Literal["regrow-attic/1"]
    shelves: list[str]
    born: dict[str, Count]
    gone: dict[str, list[Count]]
    means: dict[str, dict[Index, float]]
    constants: dict[str, ConstantJson]
    added: list[str]


class TensorsHeader(msgspec.Struct, frozen=True):
    """The header of a file of named tensors; what more it holds is of its kind."""

    names: list[str] | None
    sha256: Digest


class ProgressJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured while tasks were learned."""

    number: Count
    epoch: Count
    before: list[Any]
    step: Count = 0
    loss: float | None = None
    rows: list[list[Any]] = []
    events: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []


class CourseHeader(msgspec.Struct, frozen=True):
    """The header of ``course.safetensors``."""

    along: dict[str, tuple[list[Any], float | None]]
    values: dict[str, Any]
    numbers: dict[str, float]
    course: ProgressJson
    plans: list[dict[str, Any]] | Count
    logged: Count | None = None
    open: list[dict[str, Any]] = []


class StatisticsHeader(msgspec.Struct, frozen=True):
    """The header of the statistics of one shard of a source."""

    source: str
    shard: Count
    key: str
    tokens: Count
    moments: list[tuple[str, Count, Count]]
    gradients: list[str]


class RecoveryHeader(msgspec.Struct, frozen=True):
    """The header of ``recovery.safetensors``."""

    step: Count
    values: dict[str, Any]
    key: str = ""


class ProbeHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of ``probe.st``.

    Args:
        inputs: The positional and the named arguments; a tensor is ``{"tensor": number}``.
        patterns: For each tensor its dtype and shape where it is a pattern, ``None`` where its numbers are kept.
        outputs: The SHA-256 of each output tensor.
        exact: Whether the saved network's weights lay in memory as those of a loaded one do.
        conditions: What the last bits of an output depend on.
    """

    format: str
    names: list[str]
    sha256: str
    inputs: tuple[Any, Any]
    patterns: list[tuple[str, Shape] | None]
    outputs: list[str]
    exact: bool
    conditions: dict[str, str]
