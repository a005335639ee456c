"""How the settings of a command are declared: a frozen dataclass whose fields carry help, option, choices and range.

>>> @dataclass(frozen=True)
... class Settings:
...     tasks: Annotated[tuple[str, ...], Setting("What is learned.", argument=True, example="digits")]
...     epochs: Annotated[int, Setting("Passes over each task.", range=Range(1, 100))] = 5
>>> check_settings(Settings(("digits",), epochs=0))
Traceback (most recent call last):
regrow.errors.InputError: --epochs must be 1 to 100, got 0; for example --epochs 5
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from regrow.amounts import parse_share
from regrow.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MANY = 2**31 - 1
"""The largest number of tokens, images or examples."""


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be.

    Args:
        least: The smallest.
        most: The largest.
        above: Whether ``least`` itself is left out.
        below: Whether ``most`` itself is left out.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in it; not-a-number and infinity never do."""
        lower = value > self.least if self.above else value >= self.least
        upper = value < self.most if self.below else value <= self.most
        return lower and upper

    def __str__(self) -> str:
        if self.above and self.below:
            return f"between {self.least:,g} and {self.most:,g}"
        return f"above {self.least:,g} and at most {self.most:,g}" if self.above else f"{self.least:,} to {self.most:,}"


SEED = Range(0, 2**63 - 1)


@dataclass(frozen=True)
class Setting:
    """How one setting is given on the command line, and which values it may have.

    Args:
        help: What it is; ``--help`` shows it.
        option: Its option; unless given, the field's name with dashes (``--eval-tokens``). The option of a setting that
            is on by default turns it off.
        argument: Whether it is given by position instead.
        metavar: How ``--help`` writes its value.
        group: The heading of ``--help`` under which it stands; empty: ``Options``.
        range: Which numbers it may be.
        choices: Which texts it may be.
        example: A value for error messages; the default, unless given.
        path: Whether it names files, for which ``~`` is replaced.
        source: Whether it names sources of data, ``NAME`` or ``NAME=PATH``.
        code: Whether it may name the user's own code, which a file never may.
        hidden: Whether it is no option: only ``run.json`` has it.
        shown: Whether command lines state it although it has its default.
        one_of: The name of a choice among several settings: exactly one of those with this name is given.
        absent: What its absence from a ``run.json`` means, if that is not the default; it is left out where it has
            this value. For settings that are younger than version 0.1.
        parts: For a mapping: options that set one entry, with the entry's name.
    """

    help: str
    option: str = ""
    argument: bool = False
    metavar: str = ""
    group: str = ""
    range: Range | None = None
    choices: tuple[str, ...] = ()
    example: str = ""
    path: bool = False
    source: bool = False
    code: bool = False
    hidden: bool = False
    shown: bool = False
    one_of: str = ""
    absent: Any = ...
    parts: tuple[tuple[str, "Setting"], ...] = ()


@dataclass(frozen=True)
class Declared:
    """A field of a command's settings.

    Args:
        name: Of the field.
        hint: Its type.
        default: Its default; ``MISSING`` if it has to be given.
        setting: How it is given.
    """

    name: str
    hint: Any
    default: Any
    setting: Setting

    @property
    def option(self) -> str:
        """How messages and command lines call it: ``--eval-tokens``, or ``MODEL``."""
        if self.setting.argument:
            return self.name.upper()
        return self.setting.option or f"--{self.name.replace('_', '-')}"

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.default is MISSING

    @property
    def key(self) -> str:
        """How a settings file calls it: ``eval_tokens``."""
        return self.option.removeprefix("--").replace("-", "_").lower()

    @property
    def repeated(self) -> bool:
        """Whether it is a list of values."""
        return get_origin(self.hint) is tuple

    @property
    def mapping(self) -> bool:
        """Whether it holds names and values."""
        return get_origin(self.hint) not in (None, tuple, UnionType)

    @property
    def type(self) -> type:
        """The type of one value: ``str``, ``int``, ``float`` or ``bool``."""
        inner = get_args(self.hint)[0] if self.repeated or isinstance(self.hint, UnionType) else self.hint
        return str if self.mapping else inner

    @property
    def example(self) -> str:
        """It and a value that may be right, as on the command line."""
        setting = self.setting
        value = setting.example or (setting.choices[0] if setting.choices else self.default)
        return f"{value}" if setting.argument else self.option if self.type is bool else f"{self.option} {value}"

    def check(self, value: Any) -> None:
        """Assert that a value is of the setting's type, among its choices and in its range.

        Raises:
            InputError: Naming the setting, the value, and what it may be.
        """
        if not _is(value, self.hint):
            raise InputError(f"{self.option} must be {words_of(self.hint)}, got {_short(value)}; correct it")
        if value is None:
            return
        choices, numbers = self.setting.choices, self.setting.range
        for one in value if self.repeated else (value,):
            if choices and one not in choices and one != self.default:
                raise InputError(
                    f"{self.option} must be one of {', '.join(choices)}, got {_short(one)}; for example {self.example}"
                )
        if numbers and not numbers.holds(value):
            raise InputError(f"{self.option} must be {numbers}, got {value}; for example {self.example}")

    def parse(self, text: str) -> Any:
        """One value, as it is typed; a flag has none.

        Raises:
            InputError: If it is no such value.
        """
        value: Any = text
        if self.mapping:
            return text
        if self.type is not str:
            try:
                value = parse_share(text) if self.type is float and text.endswith("%") else self.type(text)
            except ValueError:
                raise InputError(
                    f"{self.option} must be {words_of(self.type)}, got {_short(text)}; for example {self.example}"
                ) from None
        self.check((value,) if self.repeated else value)
        return value


@cache
def declared(kind: "type[DataclassInstance]") -> Mapping[str, Declared]:
    """The fields of a command's settings by name, in order."""
    hints = get_type_hints(kind, include_extras=True)
    fields_by_name = {}
    for field in fields(kind):
        hint, setting = hints[field.name], Setting("", hidden=True)
        if get_origin(hint) is Annotated:
            hint, setting = get_args(hint)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        fields_by_name[field.name] = Declared(field.name, hint, default, setting)
    return fields_by_name


def options_of(kind: "type[DataclassInstance]") -> list[Declared]:
    """The fields of a command's settings that the command line gives; arguments come first."""
    options = [one for one in declared(kind).values() if not one.setting.hidden]
    return sorted(options, key=lambda one: not one.setting.argument)


def check_settings(settings: "DataclassInstance") -> None:
    """Assert that every setting is of its type, among its choices and in its range.

    Args:
        settings: A command's settings; they may come from a command line or a file.

    Raises:
        InputError: If one is not; names it as an option, with its value and what it may be.
    """
    for one in declared(type(settings)).values():
        one.check(getattr(settings, one.name))


def record_settings(settings: "DataclassInstance") -> dict[str, Any]:
    """What ``run.json`` holds; settings that are younger than a run may be are there only where they are used."""
    known = declared(type(settings))
    values = asdict(settings)
    return {name: value for name, value in values.items() if value != known[name].setting.absent}


def complete_settings(values: Mapping[str, Any], kind: "type[DataclassInstance]") -> dict[str, Any]:
    """What a ``run.json`` holds, with what the absence of younger settings means."""
    absent = {name: one.setting.absent for name, one in declared(kind).items()}
    return {name: value for name, value in absent.items() if value is not ...} | dict(values)


def words_of(hint: Any) -> str:
    """A type in words."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    if isinstance(hint, UnionType):
        return " or ".join(map(words_of, get_args(hint)))
    return "a list of texts" if get_origin(hint) is tuple else names.get(hint, "an object of names and values")


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if isinstance(hint, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(hint)[0]) for one in value)
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
