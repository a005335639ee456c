"""What the configuration files of a transformers model may name: classes of transformers, and no other code."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from regrow.nets.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("eager", "sdpa")
"""The attention implementations that need no code but torch's."""
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

MODELS = r"models\.(?!auto\.)\w+\.modeling_\w+"
TOKENIZERS = r"models\.(?!auto\.)\w+\.tokenization_\w+|tokenization_utils_\w+"
_FETCHING = frozenset({"use_pretrained_backbone", "use_kernels"})
_IGNORED = frozenset({"auto_map", "custom_pipelines"})
_MOST = 10_000


def library_class(name: str, modules: str) -> type | None:
    """Return the class of transformers that a file names, or ``None`` if transformers has none of this name.

    Args:
        name: The name in the file; it is looked up in the package's own list of classes before anything is imported.
        modules: Pattern of the modules of transformers that it may lie in: :data:`MODELS` or :data:`TOKENIZERS`.
    """
    import transformers

    place = getattr(transformers, "_class_to_module", {}).get(name)
    if not isinstance(place, str) or not re.fullmatch(modules, place):
        return None
    kind = getattr(transformers, name, None)
    inside = isinstance(kind, type) and kind.__module__.startswith("transformers.")
    return kind if inside else None


def model_class(name: str) -> "type[PreTrainedModel] | None":
    """Return the model class of transformers that a file names, or ``None`` if there is none of this name.

    Args:
        name: The name in the file.
    """
    import transformers

    kind = library_class(name, MODELS)
    return kind if kind is not None and issubclass(kind, transformers.PreTrainedModel) else None


def check_settings(config: Mapping[str, object], *, automatic: bool = False) -> None:
    """Raise ModelError if a setting of a configuration, nested or not, would load code or fetch files.

    Args:
        config: A configuration as plain data.
        automatic: Whether entries that name code (``auto_map``) are tolerated, as other tools write them; they are not
            followed.

    Raises:
        ModelError: If there is such a setting; names it, its value and the remedy.
    """
    for key, value in settings_of(config):
        if key in _IGNORED and automatic:
            continue
        attention = key in ("attn_implementation", "_attn_implementation", "experts_implementation")
        if (attention and value not in (None, *ATTENTION)) or (key in ("quantization_config", *_IGNORED) and value):
            raise ModelError(f"the setting {key!r} ({value!s:.60}) would load other code; take it out")
        if key in _FETCHING and value:
            raise ModelError(f"the setting {key!r} ({value!s:.60}) would fetch files or code; take it out")
        if key in ("dtype", "torch_dtype") and value not in (None, "auto", *DTYPES):
            raise ModelError(f"the setting {key!r} is {value!s:.60}; known dtypes: {', '.join(DTYPES)}")


def check_tokenizer(settings: Mapping[str, object]) -> None:
    """Raise ModelError unless a tokenizer's settings name a transformers class and no files elsewhere.

    Args:
        settings: The contents of ``tokenizer_config.json``.

    Raises:
        ModelError: If a setting is not allowed; names it, its value and the remedy.
    """
    named = settings.get("tokenizer_class")
    if named is not None and (not isinstance(named, str) or library_class(named, TOKENIZERS) is None):
        raise ModelError(f"'tokenizer_class' is {named!s:.60}, which is no tokenizer of transformers; take it out")
    if away := next((key for key, value in settings.items() if leads_away(key, value)), ""):
        raise ModelError(f"{away!r} leads out of the folder ({settings[away]!s:.60}); take that line out")


def leads_away(key: str, value: object) -> bool:
    """Whether a setting names a file outside the folder.

    Args:
        key: The name of the setting.
        value: Its value.

    >>> leads_away("vocab_file", "../vocab.json"), leads_away("vocab_file", "vocab.json")
    (True, False)
    """
    return key.endswith("_file") and isinstance(value, str) and ("/" in value or "\\" in value)


def settings_of(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield every setting of a configuration, those of nested ones too.

    Args:
        config: The configuration as plain data.

    Raises:
        ModelError: If there are too many.
    """
    waiting: list[Any] = [config]
    for _ in range(_MOST):
        if not waiting:
            return
        one = waiting.pop()
        for key, value in one.items() if isinstance(one, Mapping) else (("", part) for part in one):
            if key:
                yield key, value
            if isinstance(value, Mapping | list):
                waiting.append(value)
    raise ModelError(f"the configuration has more than {_MOST} nested settings; restore it")
