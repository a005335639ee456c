"""The settings of ``regrow prune``."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from regrow.core.amounts import Target
from regrow.core.errors import InputError
from regrow.core.names import DOMAINS, GENERATED
from regrow.settings import shared
from regrow.settings.constraints import OPEN_UNIT, Range
from regrow.settings.declaration import MAX_COUNT, SEED, Setting, list_declared
from regrow.settings.words import format_command_line

AMOUNT, WHERE, DATA, AFTER = "How much stays", "Where it is cut", "Data", "After the cut"


def make_reconstruction_settings(sources: Collection[str]) -> dict[str, object]:
    """Return the settings of the recovery ``refit`` (least squares) with which ``--reconstruct`` fits layers.

    ``sources``: the names of the calibration data. With ``"generated"`` among them, the target is ``residual``: layers
    are fitted to what the dense network has there, so that they make up for errors of earlier layers, if at least one
    writes to a residual stream directly. Otherwise it is ``auto``.

    >>> make_reconstruction_settings(["news", "generated"])["target"]
    'residual'
    """
    return {
        "choose_on": "left_out_source",
        "ridges": (0.03, 0.1, 0.3, 1.0, 3.0),
        "shrinkages": (0.5, 0.75, 1.0),
        "target": "residual" if GENERATED in sources else "auto",
    }


# What is chosen for language models, whatever the method.
_TEXT = {
    "method_settings": {"allocation": "measured"},
    "sources": DOMAINS,
    "round_to": 32,
    "reconstruct": True,
    "batch_size": 4,
}
# Kind of model and data → what is chosen for it where no method is named.
RECOMMENDED: Mapping[str, Mapping[str, Any]] = {
    "text": {"method": "fisher", **_TEXT},
    "text, fast": {"method": "flap", **_TEXT},
    "text, in parts": {"method": "flap", "sources": DOMAINS, "round_to": 32},
    "examples": {"method": "fisher", "reconstruct": True},
    "examples without labels": {"method": "flap", "reconstruct": True},
    "no data": {"method": "magnitude"},
}


# Settings of the recovery ``distil`` after a cut.
DISTILLATION = {"passes": 1, "windows": 2, "checks": 1, "held_out": 1 / 16}
# ``--time`` → tokens of text on which a cut language model is trained.
DISTILLED_TOKENS = {"quick": 0, "minutes": 2**14, "hour": 2**18, "night": 2**21}
# Seconds that the rest of a default run of a language model takes, per second of its calibration on two idle CPU cores:
# evaluating, reconstructing and saving together; and training, if it has as many tokens as calibration. By method.
REST_SECONDS: Mapping[str, tuple[float, float]] = {"fisher": (1.9, 1.7), "flap": (4.3, 5.5)}
# The most parameters of a language model that is trained without ``--method`` and ``--time``, which takes about nine
# times its memory, and whose units are selected by gradients.
MOST_SMALL = 300_000_000


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow prune``: everything that a pruning run depends on; ``run.json`` stores exactly this."""

    # fmt: off
    model: Annotated[str, Setting(
        shared.MODEL, argument=True, code=True, example="smollm2-135m --keep 0.9 --out RUN",
    )]
    method: Annotated[str, Setting(
        "The pruning method (`regrow methods` lists all). Without it, method, sources, rounding and reconstruction are "
        "chosen by the kind of model.",
        common=True, code=True, always_shown=True, example="flap",
    )] = ""
    method_settings: shared.MethodSettings = field(default_factory=dict)
    keep: Annotated[float | None, Setting(
        "The fraction of weights to keep, counted in the linear layers of a decoder (image models: in convolutions "
        "and linear layers).",
        metavar="FRACTION", group=AMOUNT, common=True, range=Range(0, 1, exclusive_minimum=True),
        exclusive_group="how much stays",
    )] = 0.8
    target: Annotated[str, Setting(
        "The largest allowed size, as an amount or a share of the model's: params=100M, macs=50%, bytes=200M, "
        "kv_cache=50M@4096 or ms=120 (measured on this device).",
        metavar="UNIT=AMOUNT", group=AMOUNT, common=True, example="bytes=200M", exclusive_group="how much stays",
    )] = ""
    smaller: Annotated[float | None, Setting(
        "How much smaller the model gets, as a share of all its parameters: 30% is --target params=70%.",
        metavar="SHARE", group=AMOUNT, common=True, range=OPEN_UNIT, example="30%",
        exclusive_group="how much stays",
    )] = None
    regular: Annotated[bool, Setting(
        "Give every block the same widths, as in an ordinary model; which units each block keeps is still its own.",
        group=AMOUNT,
    )] = False
    sources: Annotated[tuple[str, ...], Setting(
        "Text to calibrate and measure on: news, code, manual, talk, generated (by the model), or NAME=PATH; for image "
        "models digits or NAME=FOLDER. Repeatable.",
        option="--source", metavar="NAME[=PATH]", group=DATA, common=True, source=True,
    )] = ()
    unseen: Annotated[tuple[str, ...], Setting(
        "A text domain to evaluate on but not to calibrate on. Repeatable.",
        metavar="NAME[=PATH]", group=DATA, common=True, source=True,
    )] = ()
    only: Annotated[tuple[str, ...], Setting(
        "Cut only axes whose tensor names all match this pattern (mlp, layers.1*). Repeatable.",
        metavar="PATTERN", group=WHERE, common=True,
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
    round_to: Annotated[int | None, Setting(
        f"{shared.ROUND} "
        "Without --method, 32 in language models: quantised files store rows of other lengths in 16 bits.",
        option="--round", group=AMOUNT, range=Range(1, 2**20), example="8",
    )] = None
    seed: Annotated[int, Setting(
        "Random seed of the text windows and of the method; the same seed gives the same plan.",
        group=DATA, common=True, range=SEED,
    )] = 0
    dtype: shared.Dtype = ""
    device: shared.Device = "cpu"
    precision: shared.ForwardPrecision = ""
    input: shared.Input = ""
    tokens: Annotated[int, Setting(
        "Tokens (image models: images) per source to calibrate on; of generated text: --generated-tokens.",
        group=DATA, range=Range(1, MAX_COUNT),
    )] = 4096
    generated_tokens: Annotated[int, Setting(
        "Tokens of --source generated.",
        group=DATA, range=Range(1, MAX_COUNT),
    )] = 12288
    batch_size: Annotated[int | None, Setting(
        "Windows of text (image models: images) that run at a time; more are faster and take more memory. Methods that "
        "need gradients of weights run one at a time. Without --method, 4 windows of text; else 1.",
        group=DATA, range=Range(1, 2**16), example="8",
    )] = None
    eval_tokens: shared.EvalTokens = 2048
    seq_len: shared.SeqLen = 256
    finetune: Annotated[int, Setting(
        "Epochs of fine-tuning after pruning (image models).",
        group=AFTER, common=True, range=Range(0, 10**6), example="1",
    )] = 0
    reconstruct: Annotated[bool | None, Setting(
        "After the cut, fit every layer that reads cut units to its dense output by least squares. On without "
        "--method.",
        group=AFTER,
    )] = None
    time: Annotated[str, Setting(
        "How much work goes into the result, in fixed amounts: a cut language model is trained on 0, 16384, 262144 or "
        "2097152 tokens.",
        group=AFTER, common=True, choices=tuple(DISTILLED_TOKENS),
    )] = "minutes"
    distil: Annotated[int | None, Setting(
        "Tokens of the sources, over all together, on which the cut language model is trained to predict what the "
        "model before the cut predicts.",
        group=AFTER, range=Range(0, MAX_COUNT),
    )] = None
    undo: shared.Undo = True
    # fmt: on

    def __post_init__(self) -> None:
        """Restate ``smaller`` as the target that is recorded, and check it."""
        if self.method_settings and not self.method:
            names = ", ".join(self.method_settings)
            raise InputError(f"{names} is a setting of a method, and none is named; name it, such as --method flap")
        target, unit = self.target, ""
        if self.smaller is not None:
            list_declared(Settings)["smaller"].check(self.smaller)
            target = str(Target.smaller(self.smaller))
        if target and isinstance(target, str):
            try:
                unit = Target.parse(target).measure
            except ValueError as error:
                raise InputError(f"--target: {error}") from None
            for name, value in (("target", target), ("keep", None), ("smaller", None)):
                object.__setattr__(self, name, value)
        shared.check_formats(self.precision, dtype=self.dtype, measure=unit)


def explain_training(settings: Settings) -> str:
    """Return the option by which the user asks that the cut language model is trained; empty: none."""
    asked = {f"--time {settings.time}": settings.time in ("hour", "night"), "--distil": settings.distil}
    return next((option for option, given in asked.items() if given), "")


def choose_defaults(settings: Settings, kind: str, parameters: int = 0) -> Settings:
    """Return settings with what was left open: ``RECOMMENDED`` of a kind, or nothing to a named method."""
    if kind == "text" and (parameters > MOST_SMALL or settings.time == "quick"):
        kind = "text, fast"
    chosen, option = {} if settings.method else RECOMMENDED[kind], explain_training(settings)
    if option and not kind.startswith("text"):
        raise InputError(f"{option} trains language models; leave it out, and train after the cut, as by --finetune")
    trains = option or (chosen and kind == "text")
    tokens = DISTILLED_TOKENS[settings.time] if trains else 0
    defaults = {"round_to": 1, "reconstruct": False, "precision": "float32", "distil": tokens or None, **chosen}
    left_open = {name: value for name, value in defaults.items() if getattr(settings, name) in (None, "", (), {})}
    return replace(settings, **left_open)


def describe_choice(asked: Settings, chosen: Settings) -> str:
    """Return what was chosen where no method was named, as options; empty: one was."""
    if asked.method:
        return ""
    words = format_command_line(replace(chosen, model="", keep=asked.keep, target=asked.target)).split()[2:]
    return f"chosen: {' '.join(words)}"
