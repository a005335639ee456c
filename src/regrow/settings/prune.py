"""The settings of ``regrow prune``."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from regrow.core.amounts import Measure, Target
from regrow.core.errors import InputError
from regrow.core.names import GENERATED
from regrow.settings import shared
from regrow.settings.constraints import Range
from regrow.settings.declaration import MANY, SEED, Setting, declared

AMOUNT, WHERE, DATA, AFTER = "How much stays", "Where it is cut", "Data", "After the cut"

RECONSTRUCTION = "refit"
"""The recovery by which ``--reconstruct`` fits layers."""
RECONSTRUCTION_DEFAULTS: Mapping[str, object] = {
    "choose_on": "left_out_source",
    "ridges": (0.03, 0.1, 0.3, 1.0, 3.0),
    "shrinkages": (0.5, 0.75, 1.0),
}
"""The defaults of ``--reconstruct`` that differ from those of ``recover --by refit``."""


def complete_reconstruction(changed: Mapping[str, object], sources: Collection[str]) -> dict[str, object]:
    """Return settings of ``--reconstruct`` with its defaults.

    With text that the model generates among the data, layers are fitted to what the dense network has there, so that
    they make up for the errors of earlier layers, if at least one writes to a residual stream directly (``residual``);
    the two are measured together.

    >>> complete_reconstruction({}, ["news", "generated"])["target"]
    'residual'
    """
    target = {"target": "residual"} if GENERATED in sources else {}
    return {**RECONSTRUCTION_DEFAULTS, **target, **changed}


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow prune``: everything that a pruning run depends on; ``run.json`` stores exactly this."""

    # fmt: off
    model: Annotated[str, Setting(
        "A run folder of any command, a transformers folder or hub id, a .gguf file, smollm2-135m or gemma3-270m (from "
        "their PyPI packages), a torchvision name (resnet18), or a Python callable pkg.mod:fn.",
        argument=True, code=True, example="smollm2-135m --keep 0.9 --out RUN",
    )]
    method: Annotated[str, Setting(
        "The pruning method; `regrow methods` lists all.",
        code=True, shown=True,
    )] = "flap"
    method_settings: shared.MethodSettings = field(default_factory=dict)
    keep: Annotated[float | None, Setting(
        "The fraction of weights to keep, counted in the linear layers of a decoder (image models: in convolutions "
        "and linear layers).",
        metavar="FRACTION", group=AMOUNT, range=Range(0, 1, above=True), one_of="how much stays",
    )] = 0.8
    measure: Annotated[str, Setting(
        "The quantity of which --keep is a fraction: weights (of linear and convolution layers; of a language model, "
        "of its decoder's linear layers), params (all parameters), macs, bytes, kv_cache or ms.",
        group=AMOUNT, choices=("weights", "params", "macs", "bytes", "kv_cache", "ms"),
    )] = "weights"
    target: Annotated[str, Setting(
        "The largest allowed size, instead of --keep: params=100M (all parameters), macs=2G (of one example), "
        "bytes=200M (of the weight file, in the dtype given by --dtype), kv_cache=50M@4096 (bytes of the key-value "
        "cache at 4096 tokens), ms=120 or ms=120@512 (a forward pass, of 512 tokens, measured on this device); or a "
        "share of what the model has: params=70%, macs=50%.",
        metavar="UNIT=AMOUNT", group=AMOUNT, example="bytes=200M", one_of="how much stays",
    )] = ""
    smaller: Annotated[float | None, Setting(
        "How much smaller the model gets, as a share of all its parameters: 30% is --target params=70%.",
        metavar="SHARE", group=AMOUNT, range=Range(0, 1, above=True, below=True), example="30%",
        one_of="how much stays",
    )] = None
    regular: Annotated[bool, Setting(
        "Give every block the same widths, as in an ordinary model; which units each block keeps is still its own.",
        group=AMOUNT,
    )] = False
    sources: Annotated[tuple[str, ...], Setting(
        "A text domain: news, code, manual or talk (included), NAME=PATH for your own file or folder of text, or "
        "generated: text of the model itself, to calibrate on. For image models: digits, or NAME=FOLDER with a folder "
        "per class. Repeatable: a model calibrated on several domains loses less on text of others.",
        option="--source", metavar="NAME[=PATH]", group=DATA, source=True,
    )] = ()
    unseen: Annotated[tuple[str, ...], Setting(
        "A text domain to evaluate on but not to calibrate on. Repeatable.",
        metavar="NAME[=PATH]", group=DATA, source=True,
    )] = ()
    only: Annotated[tuple[str, ...], Setting(
        "Cut only axes whose tensor names all match this pattern (mlp, layers.1*). Repeatable.",
        metavar="PATTERN", group=WHERE,
    )] = ()
    exclude: Annotated[tuple[str, ...], Setting(
        "Leave uncut every axis with a tensor name that matches this pattern. Repeatable.",
        metavar="PATTERN", group=WHERE,
    )] = ()
    marks: Annotated[tuple[str, ...], Setting(
        "Cut axes with this mark instead of neutral ones (`regrow show` lists marks); folded includes the residual "
        "width. Repeatable: --mark neutral --mark folded cuts both.",
        option="--mark", group=WHERE, choices=("neutral", "competed", "folded", "restated"),
    )] = ("neutral",)
    round_to: Annotated[int, Setting(
        "Make widths multiples of this number (8, 64) where an axis has that many units; the budget still holds.",
        option="--round", group=AMOUNT, range=Range(1, 2**20), example="8",
    )] = 1
    seed: Annotated[int, Setting(
        "Random seed of the text windows and of the method; the same seed gives the same plan.",
        group=DATA, range=SEED,
    )] = 0
    dtype: shared.Dtype = ""
    device: shared.Device = "cpu"
    precision: shared.ForwardPrecision = "float32"
    input: shared.Input = ""
    tokens: Annotated[int, Setting(
        "Tokens (image models: images) per source to calibrate on; of generated text: --generated-tokens.",
        group=DATA, range=Range(1, MANY),
    )] = 4096
    generated_tokens: Annotated[int, Setting(
        "Tokens of --source generated; 0: as many as of other sources.",
        group=DATA, range=Range(0, MANY), example="8192",
    )] = 12288
    batch_size: Annotated[int, Setting(
        "Windows of text (image models: images) that calibration runs at a time; 8 is faster than 1 and takes more "
        "memory. Methods that need gradients of weights run one at a time.",
        group=DATA, range=Range(1, 2**16), example="8",
    )] = 1
    eval_tokens: shared.EvalTokens = 2048
    seq_len: shared.SeqLen = 256
    finetune: Annotated[int, Setting(
        "Epochs of fine-tuning after pruning (image models).",
        group=AFTER, range=Range(0, 10**6), example="1",
    )] = 0
    reconstruct: Annotated[bool, Setting(
        "After the cut, fit every layer that reads cut units to its dense output by least squares; the ridge is judged "
        "on each source in turn, left out of the fit (of a single source: on held-out text).",
        group=AFTER,
    )] = False
    reconstruct_tokens: Annotated[int, Setting(
        "Tokens (image models: images) that --reconstruct fits on, over all sources together. Default: those of the "
        "calibration; of text at least 8192.",
        group=AFTER, range=Range(0, MANY), example="16384",
    )] = 0
    reconstruct_settings: Annotated[Mapping[str, Any], Setting(
        "A setting of --reconstruct; `regrow methods refit` lists them. Repeatable.",
        option="--reconstruct-set", metavar="NAME=VALUE", group=AFTER,
    )] = field(default_factory=dict)
    proof: Annotated[bool, Setting(
        "Skip the check that the cut model computes what the masked one computes (16 bytes per parameter of a block).",
        option="--no-verify", group=AFTER,
    )] = True
    undo: shared.Undo = True
    # fmt: on

    def __post_init__(self) -> None:
        """Restate ``smaller``, and a ``keep`` of all parameters, as the target that is recorded, and check it."""
        if not self.reconstruct and (self.reconstruct_tokens or self.reconstruct_settings):
            option = "--reconstruct-tokens" if self.reconstruct_tokens else "--reconstruct-set"
            raise InputError(f"{option} says how --reconstruct fits layers, which is off; add --reconstruct")
        target, measure = self.target, self.measure
        if self.smaller is not None:
            declared(Settings)["smaller"].check(self.smaller)
            target = str(Target.smaller(self.smaller))
            object.__setattr__(self, "smaller", None)
        elif measure == "params" and self.keep and not target:
            declared(Settings)["keep"].check(self.keep)
            target = str(Target(Measure.PARAMETERS, share=self.keep))
        if target and isinstance(target, str):
            try:
                unit = str(Target.parse(target).measure)
            except ValueError as error:
                raise InputError(f"--target: {error}") from None
            if unit == "nonzero":
                raise InputError(
                    "--target nonzero counts weights that a search masks; pruning removes units: use params"
                )
            if measure not in ("weights", unit):
                raise InputError(
                    f"--measure {measure} says what --keep counts, and the target counts {unit}; leave out --measure"
                )
            measure = unit
            for name, value in (("target", target), ("keep", None), ("measure", unit)):
                object.__setattr__(self, name, value)
        shared.check_combination(self.precision, dtype=self.dtype, measure=measure)


def folder_name(settings: Settings) -> str:
    """Return the name of a run's folder among those of other methods and fractions.

    >>> folder_name(Settings("m", "wanda_sp", keep=0.55)), folder_name(Settings("m", target="bytes=2G"))
    ('wanda_sp-0.55', 'flap-bytes=2G')
    """
    if not settings.method.isidentifier():
        raise InputError(f"several plans are made by methods of regrow; prune with {settings.method} alone")
    if settings.keep is None:
        return f"{settings.method}-{settings.target}"
    short = f"{settings.keep:g}"
    return f"{settings.method}-{short if float(short) == settings.keep else repr(settings.keep)}"


def name_folders(runs: Iterable[Settings]) -> dict[str, Settings]:
    """Return the name of each run's folder among the others → its settings.

    >>> list(name_folders(Settings("m", keep=keep) for keep in (0.3333333, 0.3333334, 0.8)))
    ['flap-0.3333333', 'flap-0.3333334', 'flap-0.8']
    """
    folders: dict[str, Settings] = {}
    for settings in runs:
        name = folder_name(settings)
        if name in folders:
            raise InputError(f"two plans have the name {name}; leave out one of their values of --keep")
        folders[name] = settings
    return folders
