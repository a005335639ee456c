"""Schemas of plans as JSON: in ledgers, plan files and checkpoints; placeholders and insertions also in shapes.json."""

from typing import Annotated, Any, Literal

import msgspec

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


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
    remove: dict[str, InsertionJson] = {}
