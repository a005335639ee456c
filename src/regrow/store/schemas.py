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
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256


class ParentJson(msgspec.Struct, frozen=True):
    """The ``parent`` of ``run.json``: the model that a run started from."""

    name: str  # of its folder, or as the user named it
    weights: str  # SHA-256 of the digests of its tensors; empty if it is not saved by regrow
    parameters: Count  # how many it has
    plans: Count  # how many plans of its ledger the run begins with
    files: dict[str, dict[str, int]] = {}  # name of a file of weights → size, times and inode, if not saved by regrow


class CopiedFile(msgspec.Struct, frozen=True):
    """The size and digest of a file in ``before/``, the copy of the model that a run started from."""

    bytes: Count
    sha256: Digest


class SnapshotJson(msgspec.Struct, frozen=True):
    """The ``snapshot`` of ``run.json``: the files of ``before/``, to which the run can be undone."""

    bytes: Count  # of all files together
    files: dict[str, CopiedFile]  # path in before/ → record


class StageJson(msgspec.Struct, frozen=True):
    """An entry of ``stages`` in ``run.json``: an earlier run on the same network."""

    name: str  # of its folder
    verb: str  # as in RunJson
    command: str  # as in RunJson
    changed: str  # in words: "5 units cut"; "weights" if no shape changed
    before: Count  # the number of parameters before it; 0 if it began with a new network
    parameters: Count  # the number of parameters after it
    plans: Count  # how many plans it applied
    weights: Digest  # SHA-256 of the digests of the tensors after it


class SourceJson(msgspec.Struct, frozen=True):
    """An entry of ``sources`` in ``run.json``: a source of data, and how much of it was read."""

    name: str
    origin: str = ""  # where the data came from, in words
    calibration_tokens: Count | None = None  # labelled positions used to calibrate (images: their number)
    evaluation_tokens: Count | None = None  # labelled positions used to evaluate


class LatencyJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The times in the ``run.json`` of a search: measured milliseconds of modules at several widths."""

    # Module path → its size (of a layer: entries) and time, of ascending size
    curves: dict[str, Annotated[list[tuple[NonNegative, Milliseconds]], msgspec.Meta(min_length=1)]]


class RunJson(msgspec.Struct, frozen=True):
    """``run.json``: the settings, versions, times and notes of a run; it may have further fields."""

    format: Literal["regrow-run/2"]
    verb: str  # the command: "prune", "grow", …
    command: str  # the whole command line or Python call, as users repeat it
    settings: dict[str, Any]  # name → value; with verb and defaults they identify the run
    defaults: dict[str, Any]  # defaults of the method, by name
    versions: dict[str, str]  # package → version
    started: str  # time in UTC, ISO format
    finished: str | None = None  # the same; None: the run is not finished
    asked: dict[str, Any] | None = None  # the settings as they were given, if the run chooses what was left open
    notes: list[str] = []  # what readers of the results must know
    sources: list[SourceJson] = []
    seconds: dict[str, float] = {}  # part of the work → time that it took
    timing: dict[str, Any] | None = None  # core.budget.Timing, if a budget limits the time
    latency: LatencyJson | None = None
    memory: dict[str, int | None] = {}  # limit, prediction and peak in bytes, if memory was limited
    sequence: list[Any] = []  # of learn: per sequence of tasks, each one's name, input shape and classes
    extension: list[str] = []  # of learn: the sequences of tasks that the last call added
    parent: ParentJson | None = None  # None: it began with a new network
    snapshot: SnapshotJson | None = None  # None: no copy was made
    stages: list[StageJson] = []  # the earlier runs on the network, in order
    stage: StageJson | None = None  # this run


class LedgerJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ledger.json``: the plans that were applied to a network, in order."""

    format: Literal["regrow-ledger/2"]
    plans: list[Any]  # core.plan.Plan as JSON data, its unit numbers as intervals [first, last]


class AxisRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of ``axes.json``: one axis (core.axes.Axis), its size, its place, and the cost of one unit."""

    key: str
    size: Count  # how many units it has
    mark: str = ""  # how exactly it can be cut, a core.axes.Mark
    reason: str = ""  # why it has this mark
    label: str = ""  # what reports call it
    block: str = ""  # path of the numbered block in which all its tensors lie; empty if none
    inside: str = ""  # key of the axis whose units contain its units
    unit_params: Count = 0  # parameters that cutting a unit saves; 0 if it is frozen
    unit_macs: Count = 0  # multiply–accumulates that it saves
    tensors: Count = 0  # how many tensors have the axis


class AxisRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``axes.json``: the axes before and after a run."""

    before: list[AxisRow]  # in the order of the network
    after: list[AxisRow]


class ProgressJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The progress of continual learning: the present task and epoch, and what was measured so far."""

    number: Count  # finished tasks
    epoch: Count  # finished epochs of the current task
    step: Count  # finished steps of the current epoch
    before: list[Any]  # accuracy of the untrained network on every task
    rows: list[list[Any]] = []  # the accuracy matrix, one row per finished task
    events: list[dict[str, Any]] = []  # one row per change of shape
    sizes: list[dict[str, Any]] = []  # one row per finished task


class CourseHeader(msgspec.Struct, frozen=True):
    """The header of ``course.safetensors``, a checkpoint of training."""

    along: dict[str, tuple[list[Any], float | None]]  # tensor of the learner → dimensions, learning rate (None: fixed)
    values: dict[str, Any]  # field of the learner's state → JSON data
    numbers: dict[str, float]  # name of a number in the optimizers' state → its value
    course: ProgressJson
    plans: list[dict[str, Any]] | Count  # the plans applied so far, or how many of those in ledger.json
