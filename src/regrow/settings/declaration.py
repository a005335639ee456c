"""Declaration of a command's settings: a frozen dataclass whose fields carry help, option, choices and range.

>>> from typing import Annotated
>>> @dataclass(frozen=True)
... class Settings:
...     tasks: Annotated[tuple[str, ...], Setting("What is learned.", argument=True, example="digits")]
...     epochs: Annotated[int, Setting("Passes over each task.", range=Range(1, 100))] = 5
>>> check_settings(Settings(("digits",), epochs=0))
Traceback (most recent call last):
regrow.core.errors.InputError: --epochs must be 1 to 100, got 0; for example --epochs 5
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

import msgspec

from regrow.core.errors import InputError
from regrow.settings.constraints import Range

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The largest number of tokens, images or examples.
MAX_COUNT = 2**31 - 1

_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
SEED = Range(0, 2**63 - 1)


@dataclass(frozen=True)
class Setting:
    """The command-line form of one setting: help text, option name, allowed values."""

    help: str
    # The option's name; empty: the field's name with dashes (`--eval-tokens`). The option of a setting that is on by
    # default turns it off
    option: str = ""
    argument: bool = False  # it is a positional argument, without option
    metavar: str = ""  # what stands for the value in `--help`; empty: a word for its type
    group: str = ""  # the heading of `--help` under which it is listed; empty: `Options`
    common: bool = False  # `--help` lists it; of a command with many options, the others are left to `--help-all`
    range: Range | None = None
    choices: tuple[str, ...] = ()
    example: str = ""  # a value for error messages; empty: the default
    path: bool = False  # its value names files, in which `~` is expanded
    source: bool = False  # its value names sources of data, `NAME` or `NAME=PATH`
    code: bool = False  # its value may name the user's own code, `pkg.mod:NAME`, which no file may
    hidden: bool = False  # it has no option: only `run.json` has it
    always_shown: bool = False  # printed command lines state it even if it has its default
    exclusive_group: str = ""  # the name of a group of settings of which exactly one must be given


@dataclass(frozen=True)
class DeclaredSetting:
    """A field of a command's settings: its name, type, default and command-line form."""

    name: str
    hint: object  # its type without the `Setting`, such as `int` or `tuple[str, ...]`
    default: Any  # the value itself, of a `default_factory` too; `MISSING` if the setting is required
    setting: Setting

    @property
    def option(self) -> str:
        """The name in messages and command lines: ``--eval-tokens``, or ``MODEL`` for a positional argument."""
        if self.setting.argument:
            return self.name.upper()
        return self.setting.option or f"--{self.name.replace('_', '-')}"

    @property
    def negated(self) -> str:
        """The name, without dashes, of the option that turns a switch off: ``no-reconstruct``."""
        return f"no-{self.option.removeprefix('--')}"

    @property
    def is_required(self) -> bool:
        """Whether the setting has no default and must be given."""
        return self.default is MISSING

    @property
    def is_repeated(self) -> bool:
        """Whether the setting holds several values, in a tuple."""
        return get_origin(self.hint) is tuple

    @property
    def is_mapping(self) -> bool:
        """Whether the setting holds a mapping of names to values, given as ``NAME=VALUE`` several times."""
        return get_origin(self.hint) not in (None, tuple, UnionType)

    @property
    def type(self) -> type:
        """The type of one value, of several too: ``str``, ``int``, ``float`` or ``bool``; of a mapping ``str``."""
        if self.is_mapping:
            return str
        return cast(type, get_args(self.hint)[0] if get_origin(self.hint) else self.hint)

    @property
    def example(self) -> str:
        """The setting as typed on the command line, ``--keep 0.8``: with its example, else first choice or default."""
        if self.type is bool and not self.setting.argument:
            return self.option
        value = self.setting.example or (self.setting.choices[0] if self.setting.choices else self.default)
        return f"{value}" if self.setting.argument else f"{self.option} {value}"

    def check(self, value: Any) -> None:
        """Raise InputError unless a value has the setting's type, is among its choices and lies in its range.

        Of a repeated setting, ``value`` is the tuple of all values. The default is always a choice.
        """
        self._convert(value, self.hint)
        if value is None:
            return
        choices, interval = self.setting.choices, self.setting.range
        for text in value if self.is_repeated else (value,):
            if choices and text not in choices and text != self.default:
                raise InputError(
                    f"{self.option} must be one of {', '.join(choices)}, got {text!r:.60}; for example {self.example}"
                )
        if interval and not interval.allows(value):
            raise InputError(f"{self.option} must be {interval}, got {value}; for example {self.example}")

    def parse(self, text: str) -> Any:
        """Return one checked value from its text on the command line (``80%`` is 0.8); of a mapping the text itself."""
        if self.is_mapping:
            return text
        is_percentage = self.type is float and text.endswith("%")
        value = self._convert(text.removesuffix("%") if is_percentage else text, self.type, strict=False)
        value = value / 100 if is_percentage else value
        self.check((value,) if self.is_repeated else value)
        return value

    def _convert(self, value: object, hint: Any, *, strict: bool = True) -> Any:
        """Return a value in the type ``hint``, or raise InputError; unless ``strict``, ``"3"`` is converted to 3."""
        try:
            return msgspec.convert(value, hint, strict=strict)
        except msgspec.ValidationError:
            name = _TYPE_NAMES[self.type]
            raise InputError(f"{self.option} must be {name}, got {value!r:.60}; for example {self.example}") from None


@cache
def list_declared(settings_class: "type[DataclassInstance]") -> Mapping[str, DeclaredSetting]:
    """Return field name → declaration of a command's settings, in the order of the dataclass."""
    hints = get_type_hints(settings_class, include_extras=True)
    fields_by_name = {}
    for field in fields(settings_class):
        hint, setting = get_args(hints[field.name])
        default = field.default if field.default_factory is MISSING else field.default_factory()
        fields_by_name[field.name] = DeclaredSetting(field.name, hint, default, setting)
    return fields_by_name


def list_options(settings_class: "type[DataclassInstance]") -> list[DeclaredSetting]:
    """Return the settings that the command line takes (no hidden ones), positional arguments first."""
    options = [field for field in list_declared(settings_class).values() if not field.setting.hidden]
    return sorted(options, key=lambda field: not field.setting.argument)


def check_settings(settings: "DataclassInstance") -> None:
    """Raise InputError unless every setting has its type, is among its choices and lies in its range."""
    for field in list_declared(type(settings)).values():
        field.check(getattr(settings, field.name))
