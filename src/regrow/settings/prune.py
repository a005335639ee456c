"""The settings of ``regrow prune``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from regrow.amounts import Target
from regrow.errors import InputError
from regrow.settings.declaration import MANY, SEED, Range, Setting
from regrow.settings.loading import Device, Dtype, EvalTokens, Input, SeqLen, Sources

AMOUNT, WHERE, DATA, AFTER = "How much stays", "Where it is cut", "Data", "After the cut"


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow prune``: everything that a pruning run depends on; ``run.json`` stores exactly this."""

    # fmt: off
    model: Annotated[str, Setting(
        "A transformers folder or hub id, a .gguf file, smollm2-135m or gemma3-270m (from their PyPI packages), a "
        "torchvision name (resnet18), or a Python callable pkg.mod:fn.",
        argument=True, code=True, example="smollm2-135m --keep 0.9 --out RUN",
    )]
    method: Annotated[str, Setting("What decides: see `regrow methods`.", code=True, shown=True)] = "flap"
    method_settings: Annotated[Mapping[str, Any], Setting(
        "A setting of the method (`regrow methods NAME`).",
        option="--set", metavar="NAME=VALUE", parts=(("base", Setting(
            "What gprune wraps: flap (default), wanda_sp, llm_pruner or magnitude.",
            option="--base", metavar="METHOD",
        )),),
    )] = field(default_factory=dict)
    keep: Annotated[float | None, Setting(
        "The fraction that stays, of the weights of a decoder's linear layers (image models: convolutions and "
        "linear layers).",
        metavar="FRACTION", group=AMOUNT, range=Range(0, 1, above=True), one_of="how much stays",
    )] = 0.8
    measure: Annotated[str, Setting(
        "What --keep counts.",
        group=AMOUNT, choices=("params", "macs", "bytes", "kv_cache", "ms"),
    )] = "params"
    target: Annotated[str, Setting(
        "What stays at most, instead of --keep: params=100M (all parameters), macs=2G (dense, of one example), "
        "bytes=200M (of the file, in the dtype it is loaded in), kv_cache=50M@4096 (bytes of keys and values at "
        "4096 tokens), ms=120 or ms=120@512 (a pass of so many tokens, measured on this device).",
        metavar="UNIT=AMOUNT", group=AMOUNT, example="bytes=200M", one_of="how much stays", absent="",
    )] = ""
    regular: Annotated[bool, Setting(
        "One width per kind of axis in all blocks, as an ordinary model has; each block keeps its own best units.",
        group=AMOUNT, absent=False,
    )] = False
    sources: Sources = ()
    unseen: Annotated[tuple[str, ...], Setting(
        "A kind to evaluate on only.",
        metavar="NAME[=PATH]", group=DATA, source=True,
    )] = ()
    only: Annotated[tuple[str, ...], Setting(
        "Cut only where every tensor's name fits (mlp, layers.1*).",
        metavar="PATTERN", group=WHERE,
    )] = ()
    exclude: Annotated[tuple[str, ...], Setting(
        "Leave out where any tensor's name fits.",
        metavar="PATTERN", group=WHERE,
    )] = ()
    marks: Annotated[tuple[str, ...], Setting(
        "Cut axes of this kind (see `regrow show`); folded takes in a residual width. Repeat it for several.",
        option="--mark", group=WHERE, choices=("neutral", "competed", "folded", "restated"),
    )] = ("neutral",)
    round_to: Annotated[int, Setting(
        "Widths are multiples of this (8, 64), where an axis has so many units; the budget still holds.",
        option="--round", group=AMOUNT, range=Range(1, 2**20), example="8",
    )] = 1
    seed: Annotated[int, Setting(
        "Which windows are drawn, and the seed of methods that have one; the same seed, the same plan.",
        group=DATA, range=SEED,
    )] = 0
    dtype: Dtype = ""
    device: Device = "cpu"
    input: Input = ""
    tokens: Annotated[int, Setting(
        "Calibration tokens per source; or images.",
        group=DATA, range=Range(1, MANY),
    )] = 4096
    eval_tokens: EvalTokens = 2048
    seq_len: SeqLen = 256
    finetune: Annotated[int, Setting(
        "Epochs of fine-tuning after the cut (image models).",
        group=AFTER, range=Range(0, 10**6), example="1",
    )] = 0
    recover: Annotated[str, Setting(
        "Win back what was lost: bias, refit, lora or distil.",
        metavar="NAME", group=AFTER, code=True, absent="",
    )] = ""
    recover_tokens: Annotated[int, Setting(
        "Tokens (or images) that --recover learns from, of all sources together.",
        group=AFTER, range=Range(1, MANY), absent=32768,
    )] = 32768
    proof: Annotated[bool, Setting(
        "Skip the proof that masked = shrunk (it needs 16 bytes per parameter).",
        option="--no-verify", group=AFTER,
    )] = True
    # fmt: on

    def __post_init__(self) -> None:
        if not self.target or not isinstance(self.target, str):
            return
        try:
            unit = str(Target.parse(self.target).measure)
        except ValueError as error:
            raise InputError(f"--target: {error}") from None
        if unit == "nonzero":
            raise InputError("--target nonzero counts weights that a search masks; pruning removes units: use params")
        if self.measure not in ("params", unit):
            raise InputError(
                f"--measure {self.measure} says what --keep counts, and --target counts {unit}; leave out --measure"
            )
        object.__setattr__(self, "keep", None)
        object.__setattr__(self, "measure", unit)
