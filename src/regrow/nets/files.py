"""Check model files before loading: that they are complete, of plausible size, fit into memory, and name no code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
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

# Patterns of the modules in transformers that hold classes of models, and of tokenizers.
MODELS = r"models\.(?!auto\.)\w+\.modeling_\w+"
TOKENIZERS = r"models\.(?!auto\.)\w+\.tokenization_\w+|tokenization_utils_\w+"
_FETCHING = frozenset({"use_pretrained_backbone", "use_kernels"})  # settings that fetch files or code
_IGNORED = frozenset({"auto_map", "custom_pipelines"})  # settings that name code, of which none is run
_SIZES = re.compile(r"(size|dim|dims|width|widths|heads?|hidden|channels|embd|experts|inner|positions|groups|labels)$")
# Suffixes of files that transformers reads.
_READ = frozenset({".json", ".jsonl", ".jinja", ".txt", ".model", ".safetensors"})
_LAYERS = re.compile(r"(layers?|blocks|depths?)$")
_MAX_SETTINGS = 10_000
_BYTES = {"F64": 8, "F32": 4, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def check_safetensors(file: Path) -> dict[str, int]:
    """Return dtype, such as ``BF16`` → number of entries of all its tensors; ModelError unless the file is complete."""
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
    """Whether torch can make a tensor of a shape: the product of its sizes, without zeros, is below 2⁵⁹.

    >>> is_possible([3, 0]), is_possible([2**59, 2**59, 0])
    (True, False)
    """
    return prod(max(1, size) for size in shape) < 2**59


def check_regular_files(folder: Path) -> None:
    """Raise InputError unless the settings, tokenizer and weight files of a folder are regular files in it."""
    real = folder.resolve()
    # The hub's cache has links in snapshots/COMMIT to files in blobs/.
    allowed = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            check_regular(path)
            if path.resolve().parent not in allowed:
                raise ModelError(f"{path} leads out of the folder; put the file itself there")


def check_weight_paths(folder: Path, config: Mapping[str, object], name: str) -> None:
    """Raise ModelError if config.json or a shard index names a weight file by a path, such as ``../x``.

    Whether the file exists is not checked. ``config``: the content of config.json; ``name``: the model's, in messages.
    """
    file = config.get("transformers_weights") or ""
    if not isinstance(file, str) or Path(file).name != file:
        raise ModelError(f"{name}: config.json names the weights {file!r:.60}, which is no file beside it; restore it")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        read_shards(index)


def read_shards(index: Path) -> dict[str, str]:
    """Return tensor → name of the file beside a shard index that holds it; InputError if the index is damaged."""
    data = read_json(index)
    file_of = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(file, str) for file in file_of.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files; copy or download it again")
    for file in sorted(set(file_of.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            problem = f"names the file {file!r:.60}, which is no .safetensors file beside it"
            raise ModelError(f"{index} {problem}; restore it")
    return file_of


def check_weights(files: list[Path], name: str, itemsize: int | None) -> None:
    """Raise ModelError unless weight files are complete, ResourceError unless they fit into memory together.

    ``name``: the model's, in messages; ``itemsize``: bytes of a float in memory; ``None``: those in the files.
    """
    needed = 0
    for file in files:
        for dtype, count in check_safetensors(file).items():
            needed += count * (itemsize if itemsize and "F" in dtype else _BYTES.get(dtype, 1))
    check_memory(needed, f"loading {name}", "take a smaller model, or --dtype bfloat16")


def check_config(path: Path, name: str) -> dict[str, object]:
    """Return the content of a ``config.json``; InputError if it is damaged, or a size is one that no network has.

    ``name``: the model's, in messages.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{name}: config.json is a {type(config).__name__}, not an object; restore it")
    for key, value in iterate_settings(config):
        for number in value if isinstance(value, list) else [value]:
            limit = MAX_LAYERS if _LAYERS.search(key) else MAX_WIDTH if _SIZES.search(key) else 2**63 - 1
            if type(number) is int and not -limit <= number <= limit:
                raise ModelError(f"{name}: config.json says {key} = {number:,}, at most {limit:,} is built; restore it")
    return config


@contextmanager
def parsed_gguf(path: Path, name: str) -> Iterator[dict[str, int]]:
    """Context manager in which ``gguf`` opens a file without parsing it again; gives tensor → number of entries.

    Parsing takes seconds, and transformers opens the file five times. ``name``: the model's, in messages. Raises
    ModelError unless the file is complete, ResourceError unless it fits into memory as float32.
    """
    import gguf

    class CheckedReader(gguf.GGUFReader):
        """Raises ValueError at the end of the file, where gguf's own reader goes on as often as a damaged file says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:
                raise ValueError("it ends too early")
            return values

    check_regular(path)
    try:
        reader = CheckedReader(path)
        if impossible := [tensor.name for tensor in reader.tensors if not is_possible(tensor.shape.tolist())]:
            raise ValueError(f"no memory holds the tensor {impossible[0]!r:.60}")
    except Exception as error:  # a damaged header may raise anything
        raise ModelError(f"{name}: no whole GGUF file ({first_line(error)}); download it again") from None
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    check_memory(4 * sum(sizes.values()), f"loading {name} as float32", "take a smaller model")
    original = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda file, *mode: reader if Path(file).samefile(path) else original[0](file, *mode)
    gguf.get_tensor_name_map = cache(original[1])
    try:
        yield sizes
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = original


def find_library_class(name: str, modules: str) -> type | None:
    """Return the class of this name in transformers; ``None`` if none of the modules that match has it.

    ``modules``: a regular expression for the module's name below ``transformers``, such as ``MODELS``. Names come from
    files: only transformers' own classes are found, without importing any other module.
    """
    import transformers

    module = getattr(transformers, "_class_to_module", {}).get(name)
    if not isinstance(module, str) or not re.fullmatch(modules, module):
        return None
    found = getattr(transformers, name, None)
    inside = isinstance(found, type) and found.__module__.startswith("transformers.")
    return found if inside else None


def find_model_class(name: str) -> "type[PreTrainedModel] | None":
    """Return the model class of this name in transformers; ``None`` if there is none."""
    import transformers

    found = find_library_class(name, MODELS)
    return found if found is not None and issubclass(found, transformers.PreTrainedModel) else None


def check_settings(config: Mapping[str, object], *, automatic: bool = False) -> None:
    """Raise ModelError if a setting of a configuration, nested or not, would load code or fetch files.

    ``automatic``: settings that name code are skipped, since the caller loads with ``trust_remote_code=False``.
    """
    for key, value in iterate_settings(config):
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
    """Raise ModelError if a tokenizer's settings name a class that is none of transformers, or a file elsewhere."""
    name = settings.get("tokenizer_class")
    if name is not None and (not isinstance(name, str) or find_library_class(name, TOKENIZERS) is None):
        raise ModelError(f"'tokenizer_class' is {name!s:.60}, which is no tokenizer of transformers; take it out")
    if key := next((key for key, value in settings.items() if leads_away(key, value)), ""):
        raise ModelError(f"{key!r} leads out of the folder ({settings[key]!s:.60}); take that line out")


def leads_away(key: str, value: object) -> bool:
    """Whether a tokenizer's setting (``…_file``) is a path with a slash, and so may lead out of its folder."""
    return key.endswith("_file") and isinstance(value, str) and ("/" in value or "\\" in value)


def iterate_settings(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield (key, value) of every setting of a configuration, nested ones too; ModelError if there are too many."""
    waiting: list[Any] = [config]
    for _ in range(_MAX_SETTINGS):
        if not waiting:
            return
        nested = waiting.pop()
        for key, value in nested.items() if isinstance(nested, Mapping) else (("", part) for part in nested):
            if key:
                yield key, value
            if isinstance(value, Mapping | list):
                waiting.append(value)
    raise ModelError(f"the configuration has more than {_MAX_SETTINGS} nested settings; restore it")
