"""The settings of ``regrow grow``."""

from dataclasses import dataclass
from typing import Annotated

from regrow.core.amounts import Increase
from regrow.core.errors import InputError
from regrow.settings import shared
from regrow.settings.constraints import Range
from regrow.settings.declaration import MAX_COUNT, SEED, Setting

AMOUNT, NEW, DATA, TRAINING = "What grows", "New units", shared.DATA, shared.TRAINING


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow grow``: everything that a growth run depends on; ``run.json`` stores exactly this."""

    # fmt: off
    model: Annotated[str, Setting(
        shared.MODEL, argument=True, code=True, example="smollm2-135m --mlp +25% --out RUN",
    )]
    mlp: Annotated[str, Setting(
        "Hidden neurons that every MLP gains: +25% of its width, rounded up, or +32.",
        metavar="AMOUNT", group=AMOUNT, common=True, example="+25%",
    )] = ""
    heads: Annotated[str, Setting(
        "Attention heads that every attention gains; where query heads share keys and values, whole groups of them.",
        metavar="AMOUNT", group=AMOUNT, common=True, example="+1",
    )] = ""
    channels: Annotated[str, Setting(
        "Channels that the convolutions inside of blocks gain.",
        metavar="AMOUNT", group=AMOUNT, common=True, example="+32",
    )] = ""
    blocks: Annotated[tuple[str, ...], Setting(
        "Copies of residual blocks that every stack of blocks gains, evenly among its blocks; STACK=AMOUNT for one "
        "stack (layer3=+1). Repeatable.",
        metavar="[STACK=]AMOUNT", group=AMOUNT, common=True, example="+2",
    )] = ()
    axis: Annotated[tuple[str, ...], Setting(
        "Units that one axis gains, by its key or a pattern of keys (`regrow show` lists them). Repeatable.",
        metavar="KEY=AMOUNT", group=AMOUNT, common=True, example="'*.mlp.*=+64'",
    )] = ()
    fill: Annotated[str, Setting(
        "zero_out: random weights that make new units, 0 that read them; split: copies of old units, which share their "
        "outgoing weights.",
        group=NEW, choices=("zero_out", "split"),
    )] = "zero_out"
    sources: Annotated[tuple[str, ...], Setting(
        shared.EVALUATED, option="--source", metavar="NAME[=PATH]", group=DATA, common=True, source=True,
    )] = ()
    eval_tokens: shared.EvalTokens = 2048
    seq_len: shared.SeqLen = 256
    seed: Annotated[int, Setting("Seed of the weights of new units.", group=NEW, common=True, range=SEED)] = 0
    dtype: shared.Dtype = ""
    device: shared.Device = "cpu"
    precision: shared.ForwardPrecision = "float32"
    input: shared.Input = ""
    on: Annotated[tuple[str, ...], Setting(
        "Train on this after the growth: a source, as for --source, which is also measured. Repeatable.",
        metavar="NAME[=PATH]", group=TRAINING, common=True, source=True,
    )] = ()
    steps: Annotated[int, Setting("Training steps, of one window of text or one batch of images each.",
        group=TRAINING, common=True, range=Range(0, MAX_COUNT), example="200",
    )] = 0
    train: Annotated[str, Setting(
        "What is trained: the new parameters alone (the others stay bit for bit), or all.",
        group=TRAINING, common=True, choices=("new", "all"),
    )] = "new"
    lr: Annotated[float, Setting(
        "Learning rate of AdamW, which falls to 0.", group=TRAINING, common=True, range=shared.RATES,
    )] = 1e-3
    tokens: Annotated[int, Setting(
        "Training tokens per source; or images.", group=TRAINING, range=Range(1, MAX_COUNT),
    )] = 65536
    undo: shared.Undo = True
    # fmt: on

    def __post_init__(self) -> None:
        shared.check_formats(self.precision, dtype=self.dtype)
        if self.precision != "float32" and not (self.on or self.sources):
            raise InputError(
                f"--precision {self.precision} is for passes over data, and there are none; leave it out, or add --on"
            )
        self.parse_parts(), self.parse_axes(), self.parse_stacks()  # raise InputError for an amount that cannot be read

    def check_growth(self) -> None:
        """Raise InputError if nothing grows, there are steps without data, or data without steps."""
        if not any((self.mlp, self.heads, self.channels, self.blocks, self.axis)):
            raise InputError(
                "nothing grows: give --mlp, --heads, --channels, --blocks or --axis, for example --mlp +25%"
            )
        if bool(self.on) != bool(self.steps):
            has, lacks = ("--on", "--steps 200") if self.on else ("--steps", "--on news")
            raise InputError(f"{has} trains the grown model and needs the other, too; add {lacks}")

    def parse_parts(self) -> dict[str, Increase]:
        """Return part (``mlp``, ``heads``, ``channels``) → what each of its axes gains, for the parts that grow."""
        amounts = {"mlp": self.mlp, "heads": self.heads, "channels": self.channels}
        return {part: _parse_increase(f"--{part}", amount) for part, amount in amounts.items() if amount}

    def parse_axes(self) -> dict[str, Increase]:
        """Return axis key or pattern of keys → what each such axis gains; InputError for a text without key."""
        increases = {}
        for text in self.axis:
            key, _, amount = text.rpartition("=")
            if not key.strip():
                raise InputError(f"--axis takes KEY=AMOUNT, got {text!r:.60}; for example --axis '*.mlp.*=+64'")
            increases[key] = _parse_increase(f"--axis {key}", amount)
        return increases

    def parse_stacks(self) -> dict[str, Increase]:
        """Return path or pattern of a stack of blocks → how many copied blocks it gains; ``"*"``: every stack."""
        pairs = (text.rpartition("=") for text in self.blocks)
        return {stack or "*": _parse_increase("--blocks", amount) for stack, _, amount in pairs}


def _parse_increase(option: str, amount: str) -> Increase:
    """Parse an increase, ``+25%`` or ``+32``, above 0; raise InputError, which names the ``option``, otherwise."""
    try:
        return Increase.parse(amount)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from None
