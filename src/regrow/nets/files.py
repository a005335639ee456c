"""Check model files before loading: that they are complete, of plausible size, fit into memory, and name no code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.core.errors import first_line
from regrow.core.limits import MAX_LAYERS, MAX_WIDTH, check_memory, check_regular, read_json
from regrow.nets.loaded import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("eager", "sdpa")  # the attention implementations that need no code but torch's
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

MODELS = r"models\.(?!auto\.)\w+\.modeling_\w+"
TOKENIZERS = r"models\.(?!auto\.)\w+\.tokenization_\w+|tokenization_utils_\w+"
_FETCHING = frozenset({"use_pretrained_backbone", "use_kernels"})
_IGNORED = frozenset({"auto_map", "custom_pipelines"})
_SIZES = re.compile(r"(size|dim|dims|width|widths|heads?|hidden|channels|embd|experts|inner|positions|groups|labels)$")
_READ = frozenset({".json", ".jsonl", ".jinja", ".txt", ".model", ".safetensors"})
_LAYERS = re.compile(r"(layers?|blocks|depths?)$")
_MOST_SETTINGS = 10_000
_BYTES = {"F64": 8, "F32": 4, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def check_safetensors(file: Path) -> dict[str, int]:
    """Raise ModelError unless a safetensors file is complete; return its number of entries per dtype."""
    from safetensors import SafetensorError, safe_open

    counts: dict[str, int] = {}
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (it is no dictionary)
                part = content.get_slice(name)
                if not is_possible(part.get_shape()):
                    raise ModelError(f"{file}: {name!r:.60} has the shape {part.get_shape()!s:.60}; download it again")
                counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + prod(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged ({first_line(error)}); copy or download it again") from None
    return counts


def is_possible(shape: Sequence[int]) -> bool:
    """Whether a tensor can have a shape: an empty one whose other sizes exceed any memory cannot be made.

    >>> is_possible([3, 0]), is_possible([2**59, 2**59, 0])
    (True, False)
    """
    return prod(max(1, size) for size in shape) < 2**59


def check_files(folder: Path) -> None:
    """Raise ModelError unless the settings, tokenizer and weight files of a folder are regular files in it."""
    real = folder.resolve()
    within = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            check_regular(path)
            if path.resolve().parent not in within:
                raise ModelError(f"{path} leads out of the folder; put the file itself there")


def check_weight_names(folder: Path, config: Mapping[str, object], name: str) -> None:
    """Raise ModelError if the configuration or an index of a folder names weights that do not lie in it."""
    named = config.get("transformers_weights") or ""
    if not isinstance(named, str) or Path(named).name != named:
        raise ModelError(f"{name}: config.json names the weights {named!r:.60}, which is no file beside it; restore it")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        read_shards(index)


def read_shards(index: Path) -> dict[str, str]:
    """Return tensor → the name of the file beside an index that holds it."""
    data = read_json(index)
    named = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files; copy or download it again")
    for file in sorted(set(named.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            problem = f"names the file {file!r:.60}, which is no .safetensors file beside it"
            raise ModelError(f"{index} {problem}; restore it")
    return named


def check_weights(files: list[Path], name: str, width: int | None) -> None:
    """Raise an error unless weight files are complete and fit into memory."""
    needed = 0
    for file in files:
        for kind, many in check_safetensors(file).items():
            stored = _BYTES.get(kind, 1)
            needed += many * (width if width and "F" in kind else stored)
    check_memory(needed, f"loading {name}", "take a smaller model, or --dtype bfloat16")


def check_config(path: Path, name: str) -> dict[str, object]:
    """Read a ``config.json`` and raise ModelError unless its sizes are ones that a network can have."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{name}: config.json is a {type(config).__name__}, not an object; restore it")
    for key, value in settings_of(config):
        for number in value if isinstance(value, list) else [value]:
            most = MAX_LAYERS if _LAYERS.search(key) else MAX_WIDTH if _SIZES.search(key) else 2**63 - 1
            if type(number) is int and not -most <= number <= most:
                raise ModelError(f"{name}: config.json says {key} = {number:,}, at most {most:,} is built; restore it")
    return config


def read_gguf_sizes(path: Path, name: str) -> dict[str, int]:
    """Return tensor → number of entries of a GGUF file; raise an error unless it is whole and fits into memory."""
    import gguf

    class Reader(gguf.GGUFReader):
        """Refuses to read behind the end, where the package goes on with nothing, as often as a damaged file says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:
                raise ValueError("it ends too early")
            return values

    check_regular(path)
    try:
        tensors = Reader(path).tensors
        if odd := [tensor.name for tensor in tensors if not is_possible(tensor.shape.tolist())]:
            raise ValueError(f"no memory holds the tensor {odd[0]!r:.60}")
    except Exception as error:  # a damaged header may raise anything
        raise ModelError(f"{name}: no whole GGUF file ({first_line(error)}); download it again") from None
    sizes = {tensor.name: int(tensor.n_elements) for tensor in tensors}
    check_memory(4 * sum(sizes.values()), f"loading {name} as float32", "take a smaller model")
    return sizes


def library_class(name: str, modules: str) -> type | None:
    """Return the class of transformers that a file names, or ``None`` if transformers has none of this name."""
    import transformers

    place = getattr(transformers, "_class_to_module", {}).get(name)
    if not isinstance(place, str) or not re.fullmatch(modules, place):
        return None
    kind = getattr(transformers, name, None)
    inside = isinstance(kind, type) and kind.__module__.startswith("transformers.")
    return kind if inside else None


def model_class(name: str) -> "type[PreTrainedModel] | None":
    """Return the model class of transformers that a file names, or ``None`` if there is none of this name."""
    import transformers

    kind = library_class(name, MODELS)
    return kind if kind is not None and issubclass(kind, transformers.PreTrainedModel) else None


def check_settings(config: Mapping[str, object], *, automatic: bool = False) -> None:
    """Raise ModelError if a setting of a configuration, nested or not, would load code or fetch files."""
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
    """Raise ModelError unless a tokenizer's settings name a transformers class and no files elsewhere."""
    named = settings.get("tokenizer_class")
    if named is not None and (not isinstance(named, str) or library_class(named, TOKENIZERS) is None):
        raise ModelError(f"'tokenizer_class' is {named!s:.60}, which is no tokenizer of transformers; take it out")
    if away := next((key for key, value in settings.items() if leads_away(key, value)), ""):
        raise ModelError(f"{away!r} leads out of the folder ({settings[away]!s:.60}); take that line out")


def leads_away(key: str, value: object) -> bool:
    """Whether a setting names a file outside the folder."""
    return key.endswith("_file") and isinstance(value, str) and ("/" in value or "\\" in value)


def settings_of(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield every setting of a configuration, those of nested ones too."""
    waiting: list[Any] = [config]
    for _ in range(_MOST_SETTINGS):
        if not waiting:
            return
        nested = waiting.pop()
        for key, value in nested.items() if isinstance(nested, Mapping) else (("", part) for part in nested):
            if key:
                yield key, value
            if isinstance(value, Mapping | list):
                waiting.append(value)
    raise ModelError(f"the configuration has more than {_MOST_SETTINGS} nested settings; restore it")
