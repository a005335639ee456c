"""The settings of ``regrow export``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from regrow.core.errors import InputError
from regrow.settings.declaration import Setting
from regrow.settings.shared import Input


@dataclass(frozen=True)
class Format:
    """An export format, written by the module of its name in ``regrow.exporters``: its dtypes, inputs and suffix."""

    # The dtypes in which it stores weights, of which the first is the default; empty text: as they are
    dtypes: tuple[str, ...]
    arguments: tuple[str, ...]  # keyword arguments of its `write`: of `dtype`, `example`, `weights` and `card`
    suffix: str = ""  # the suffix of the file, such as `.gguf`; empty if a folder is written


FORMATS: Mapping[str, Format] = {
    "transformers": Format(("", "float32", "bfloat16", "float16"), ("dtype", "example", "card")),
    "gguf": Format(("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), ("dtype", "weights"), ".gguf"),
    "onnx": Format(("float32", "int8"), ("dtype", "example"), ".onnx"),
    "torchvision": Format(("",), ("card",)),
}


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow export``: the model, and how it is written; each field has its help text."""

    # fmt: off
    model: Annotated[str, Setting(
        "A run folder, or any model that `regrow prune` takes.",
        argument=True, code=True, example="RUN --to gguf --out model.gguf",
    )]
    to: Annotated[str, Setting(
        "The format: transformers, gguf, onnx or torchvision.", metavar="FORMAT", example="gguf",
    )]
    dtype: Annotated[str, Setting("Number format of the weights; see below.", metavar="DTYPE")] = ""
    input: Input = ""
    # fmt: on

    def __post_init__(self) -> None:
        """Check the format and its dtype, and complete the dtype."""
        if self.to not in FORMATS:
            raise InputError(f"there is no format {self.to!r}; known: {', '.join(FORMATS)}")
        dtypes = FORMATS[self.to].dtypes
        if self.dtype and self.dtype not in dtypes:
            stored = ", ".join(filter(None, dtypes)) or "weights as they are"
            raise InputError(f"{self.to} does not store {self.dtype!r}; it stores {stored}")
        object.__setattr__(self, "dtype", self.dtype or dtypes[0])
