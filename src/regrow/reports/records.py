"""Rows of a report as plain dictionaries that can be written as JSON, with the types of their values."""

from typing import Any, TypedDict

Values = list[float | None]
"""One value after each task, or on each task; ``None`` where it was not measured."""


class KeyNumber(TypedDict):
    """A number at the head of a page, with a line below it."""

    label: str
    value: str
    below: str


class FrozenAxes(TypedDict):
    """A reason for which axes are frozen, and the number of such axes."""

    reason: str
    count: int


class Operation(TypedDict):
    """An operation of a cell: its kind, its input, channels inside a ``sep``, and whether it has no weights."""

    kind: str
    source: int
    mid: int | None
    bare: bool


class Node(TypedDict):
    """A node of a cell: its width, and the operations that it sums."""

    width: int | None
    ops: list[Operation]


class CellRow(TypedDict):
    """A cell: whether it halves the resolution, the widths of its inputs inside it, and its nodes."""

    reduce: bool
    inputs: list[int | None]
    nodes: list[Node]


class KindCount(TypedDict):
    """How many operations of a kind each cell keeps, and all together."""

    kind: str
    cells: list[int]
    all: int


class NodeText(TypedDict):
    """What a node sums, in words."""

    name: str
    width: int | None
    sums: str


class CourseSize(TypedDict):
    """The network after a task: its size, the bytes stored beside it, and the seconds that the task took."""

    parameters: int | None
    nonzero: int | None
    macs: int | None
    remembered: int | None
    seconds: float | None


class GrowthRow(TypedDict):
    """One growth: when, how many new units, accuracy just before and after, and how the loss recovered."""

    task: int | None
    epoch: int | None
    grown: dict[str, int]
    logits_moved: float | None
    parameters: int | None
    newborn_gradient: float | None
    newborn_entries: float | None
    recovery: str
    before: float | None
    after: float | None


class Course(TypedDict):
    """The measurements of a continual-learning run.

    ``rows`` is the accuracy matrix, one row per task learned; ``before`` the accuracy of the untrained network;
    ``gone`` the tasks whose data are missing; ``widths``, ``owned`` and ``free`` map a name to its value after each
    task.
    """

    tasks: list[str]
    rows: list[Values]
    before: Values
    gone: list[str]
    figures: dict[str, float | None]
    sizes: list[CourseSize]
    widths: dict[str, Values]
    owned: dict[str, Values]
    free: dict[str, Values]
    events: list[GrowthRow]


class CourseCell(TypedDict):
    """A figure of a learning run in words, and whether no run with as few parameters has a better one."""

    value: str
    best: bool


class CourseLine(TypedDict):
    """A row of the table that compares learning runs."""

    label: str
    cells: list[CourseCell]
    parameters: int | None
    first: int | None
    growths: int
    shock: float | None
    owned: float | None
    known: Values
    seconds: float | None


class SearchLine(TypedDict):
    """A row of the table that compares searches."""

    label: str
    target: str
    test: float | None
    best: bool
    validation: float | None
    parameters: int | None
    nonzero: int | None
    seconds: float | None


class Pair(TypedDict):
    """A setting or a version in words."""

    name: str
    value: str


class StageTime(TypedDict):
    """The time that a stage of a run took."""

    stage: str
    seconds: float


class MissingFile(TypedDict):
    """A file that a run folder lacks, and what the report lacks without it."""

    file: str
    means: str


class BudgetFigures(TypedDict):
    """The quantity that a target counts: requested, before, after, and predicted (time only)."""

    asked: float
    before: float | None
    after: float
    predicted: float | None
    measure: str
    context: int


class MaskingCheck(TypedDict):
    """A check of masked = shrunk."""

    max_abs_diff: float | None
    bound: float | None
    dtype: str
    argmax_flips: int | None
    holds: bool | None


class FittedLayer(TypedDict):
    """A layer that least squares fitted after a cut: its relative errors, and what was chosen."""

    weight: str
    before: float | None
    after: float | None
    seen: float | None
    recovered: float | None
    recovered_seen: float | None
    ridge: float | None
    shrinkage: float | None


class ReconstructionTable(TypedDict):
    """The least squares after a cut: on how many tokens, to what, where it was judged, and the layers, also by kind."""

    tokens: int | None
    dense: bool
    where: str
    layers: list[FittedLayer]
    kinds: list[dict[str, Any]]
    recovered: dict[str, float | None]
    left_out: list[str]


class SourceRow(TypedDict):
    """A source of data, and how much of it was read."""

    name: str
    origin: str
    calibration_tokens: int | None
    evaluation_tokens: int | None


class StageRow(TypedDict):
    """A run among those that made a network; what is not known is ``None`` or empty."""

    name: str
    verb: str
    command: str
    changed: str
    before: int | None
    parameters: int | None


class Run(TypedDict):
    """What a report shows of one run; what is not known is ``None`` or empty."""

    name: str
    label: str
    verb: str
    command: str
    model: str
    method: str
    keep: float | None
    measure: str
    target: str
    regular: bool
    budget: BudgetFigures | None
    settings: list[Pair]
    method_settings: list[Pair]
    defaults: list[Pair]
    sources: list[SourceRow]
    versions: list[Pair]
    started: str
    finished: str
    seconds: list[StageTime]
    notes: list[str]
    perplexity: list[dict[str, Any]]
    outcome: str
    means: dict[str, dict[str, Any] | None]
    choice: list[dict[str, Any]]
    size: dict[str, dict[str, Any] | None]
    speed: dict[str, dict[str, Any] | None]
    verify: list[MaskingCheck]
    reconstruction: ReconstructionTable | None
    widths: list[dict[str, Any]]
    frozen: list[FrozenAxes]
    scores: dict[str, Any] | None
    findings: dict[str, Any] | None
    course: Course | None
    search: dict[str, Any] | None
    stages: list[StageRow]
    missing: list[MissingFile]
    problems: list[str]


class Summary(TypedDict):
    """Several runs, and the text domains on which all were evaluated."""

    format: str
    runs: list[Run]
    kinds: list[str]


def course_of(run: Run) -> Course:
    """Return the measurements of a continual-learning run.

    Args:
        run: A run of the summary.

    Raises:
        ValueError: If it is a run of another kind.
    """
    if run["course"] is None:
        raise ValueError(
            f"{run['name']} is a run of {run['verb']!r}, which has no accuracy matrix; give a run of 'learn'"
        )
    return run["course"]


def search_of(run: Run) -> dict[str, Any]:
    """Return the measurements of a search.

    Args:
        run: A run of the summary.

    Raises:
        ValueError: If it is a run of another kind.
    """
    if run["search"] is None:
        raise ValueError(f"{run['name']} is a run of {run['verb']!r}, not a search; give one of 'search'")
    return run["search"]
