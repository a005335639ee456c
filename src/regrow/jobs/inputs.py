"""The data of a run: halves of its sources, and text that its model generates; the same for all of its processes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from regrow import data
from regrow.core.errors import InputError
from regrow.core.names import CHAT, GENERATED, GENERATED_TEXT, check_evaluation_sources
from regrow.core.sources import Batch, Source
from regrow.data import Half
from regrow.data.text import find_bos_tokens, find_chat_start, find_separator_token, token_windows
from regrow.data.vision import digits, images
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_tensors, broadcasts_same, checksum
from regrow.evaluation.generation import (
    check_generation,
    describe_generated,
    generate_tokens,
    make_pending_tokens,
)
from regrow.jobs.models import find_input_shape
from regrow.jobs.recording import ActiveRun
from regrow.nets import Loaded
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.statistics import fingerprint, parameter_sums
from regrow.store.tensors import read_tensors, write_tensors
from regrow.streaming.weights import StoredWeights

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Files in a run folder: a folder of their own, since loaders of models read all weights beside a configuration.
GENERATED_FILES = {GENERATED: "generated/windows.safetensors", CHAT: "generated/chats.safetensors"}
GENERATED_FORMAT = "regrow-generated/1"
# Settings that may name another folder on another host: what they lead to is compared.
_PATH_SETTINGS = ("model", "run", "sources", "unseen", "input")


@dataclass(frozen=True)
class SourceSpecs:
    """The sources of a run, and how much of each is used; of image sources, numbers of tokens are those of images."""

    eval_tokens: int  # evaluation tokens of each source
    seq_len: int  # tokens per window of text
    sources: tuple[str, ...] = ()  # for calibration and evaluation, as `--source` takes them
    unseen: tuple[str, ...] = ()  # for evaluation only
    tokens: int = 0  # calibration tokens of each source
    seed: int = 0  # of the choice of calibration windows or images, and of generated text
    generated_tokens: int = 0  # calibration tokens of the source `generated`

    def count_generated(self, name: str) -> int:
        """Return how many windows of ``seq_len`` tokens the model generates for a source; 0 if it does not."""
        tokens = {GENERATED: self.generated_tokens, CHAT: self.tokens}.get(name)
        return 0 if tokens is None else count_windows(tokens, self.seq_len)

    @property
    def generated_windows(self) -> int:
        """How many windows of ``seq_len`` tokens the model generates, over all sources."""
        return sum(map(self.count_generated, self.sources))


@dataclass(frozen=True)
class SourceHalves:
    """The sources of a run: calibration halves; evaluation halves of the same but generated text, then unseen ones."""

    calibration: tuple[Source, ...]
    evaluation: tuple[Source, ...]

    @property
    def calibration_names(self) -> frozenset[str]:
        """The names of the calibration sources."""
        return frozenset(source.name for source in self.calibration)

    @property
    def evaluates_on_calibration(self) -> bool:
        """Whether both halves are one tuple, not a copy; labels of the calibration data need not fit the network."""
        return self.evaluation is self.calibration

    @property
    def has_pending_text(self) -> bool:
        """Whether a calibration source is text that the model is still to generate."""
        return any(isinstance(source.batches, PendingWindows) for source in self.calibration)


@dataclass(frozen=True)
class PendingWindows(Sequence[Batch]):
    """Windows that the model is still to generate: only their number is known, and reading one is a RuntimeError."""

    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: object) -> NoReturn:
        """Raise RuntimeError: there is nothing to read."""
        raise RuntimeError(f"window {index} is read before it is generated")


def count_windows(tokens: int, seq_len: int) -> int:
    """Return how many windows of ``seq_len`` tokens are read of a text source: at least one.

    >>> count_windows(100, 32), count_windows(20, 32)
    (3, 1)
    """
    return max(1, tokens // seq_len)


def read_sources(specs: SourceSpecs, loaded: Loaded) -> SourceHalves:
    """Read the halves of every named source, but leave generated text pending; ValueError for data that do not fit."""
    check_evaluation_sources(specs.unseen)
    all_specs = (*specs.sources, *specs.unseen)
    names = [spec.partition("=")[0] for spec in all_specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are named {name!r}; give each its own name: NAME=PATH")
    for name in GENERATED_TEXT:
        if name in names and name not in all_specs:
            raise InputError(f"source {name!r} is text that the model generates; give {name}=PATH another name")
    calibration = (
        _make_generated_source(specs, loaded, spec)
        if spec in GENERATED_TEXT
        else _read_source(specs, loaded, spec, Half.CALIBRATION, specs.tokens)
        for spec in specs.sources
    )
    evaluated = (spec for spec in all_specs if spec not in GENERATED_TEXT)
    evaluation = (_read_source(specs, loaded, spec, Half.EVALUATION, specs.eval_tokens) for spec in evaluated)
    return SourceHalves(tuple(calibration), tuple(evaluation))


def _read_source(specs: SourceSpecs, loaded: Loaded, spec: str, half: Half, amount: int) -> Source:
    """Return a half of a source; ``spec``: as ``--source`` takes it; ``amount``: a number of tokens or images."""
    seed = specs.seed if half is Half.CALIBRATION else 0
    if loaded.tokenizer is not None:
        n = count_windows(amount, specs.seq_len)
        return data.windows(data.text(spec), loaded.tokenizer, n=n, seq_len=specs.seq_len, seed=seed, half=half)
    _, channels, size, _ = _require_image_shape(loaded, spec)
    if spec == "digits":
        return digits(n=amount, size=size, channels=channels, seed=seed, half=half)
    name, _, path = spec.partition("=")
    if not name.strip() or not path.strip():
        raise InputError(
            f"source {spec!r} names no images, which this model takes; write digits, or NAME=FOLDER of class folders"
        )
    shift = loaded.origin.normalised_images
    return images(name, Path(path), n=amount, size=size, channels=channels, seed=seed, half=half, normalised=shift)


def _require_image_shape(loaded: Loaded, spec: str) -> torch.Size:
    """Return the shape ``[N, C, H, W]`` of the images that a model takes; InputError if it does not take ``spec``."""
    shape = find_input_shape(loaded)
    dtype = next(loaded.model.parameters()).dtype
    takes_channels = len(shape) == 4 and (spec == "digits" or shape[1] in (1, 3))  # digits have any number
    if not takes_channels or shape[2] != shape[3] or dtype != torch.float32:
        raise InputError(
            f"source {spec!r} gives square images of 1 or 3 channels in float32, and the model takes inputs of shape "
            f"{list(shape)} in {str(dtype)[6:]}; leave --source out, or use regrow.prune in Python with your own data"
        )
    return shape


def describe_sources(specs: SourceSpecs, halves: SourceHalves) -> list[dict[str, object]]:
    """Return the rows of ``run.json`` about the sources, in the order of ``specs``: name, spec, origin, tokens used."""
    tests, rows = iter(halves.evaluation), []
    for i, spec in enumerate((*specs.sources, *specs.unseen)):
        calibration = halves.calibration[i] if i < len(halves.calibration) else None
        test = None if spec in GENERATED_TEXT else next(tests)
        parts = {"calibration": calibration, "evaluation": test}
        name = next(source.name for source in (test, calibration) if source is not None)
        origin = "; ".join(f"{half}: {source.origin}" for half, source in parts.items() if source is not None)
        counts = {f"{half}_tokens": source.tokens if source else 0 for half, source in parts.items()}
        rows.append({"name": name, "spec": spec, "origin": origin, **counts})
    return rows


def _make_generated_source(specs: SourceSpecs, loaded: Loaded, name: str, tokens: Tensor | None = None) -> Source:
    """Return a source of generated text: ``tokens``, ``[windows, tokens]``, or ``None``: its windows are pending."""
    if loaded.tokenizer is None:
        problem = f"source {name!r} is text that the model generates, and this model has no tokenizer"
        raise InputError(f"{problem}; name a language model, or another source")
    check_generation(loaded.model)
    if tokens is None:
        return Source(name, PendingWindows(len(_make_pending_tokens(specs, loaded, name))))
    origin = describe_generated(len(tokens), specs.seq_len, specs.seed)
    return token_windows(name, tokens, find_bos_tokens(loaded.tokenizer), origin)


def fill_generated(
    halves: SourceHalves,
    specs: SourceSpecs,
    loaded: Loaded,
    folder: Path | None = None,
    *,
    others: Sequence[Path] = (),
    weights: Sequence[float] | None = None,
    run: ActiveRun | None = None,
) -> SourceHalves:
    """Return the halves with the text that the model generates, read from run folders as far as these hold it.

    ``folder``: of the run, where the text is written; ``others``: of other runs. ``weights``: a sum of each parameter,
    for a model without numbers (which cannot generate); ``run`` ``None``: a single process. All ranks call this.
    """
    run = run or ActiveRun()
    calibration = []
    for source in halves.calibration:
        if isinstance(source.batches, PendingWindows):
            name, tokens = source.name, _make_pending_tokens(specs, loaded, source.name)
            if run.ranks.leads:
                header = _make_header(specs, loaded, name, weights)
                files = [path / GENERATED_FILES[name] for path in (*others, folder) if path]
                _fill_stored_windows(tokens, files, header)
                store = partial(_store_windows, files[-1] if folder else None, tokens, header)
                if (tokens < 0).any():
                    separator = find_separator_token(loaded.tokenizer)
                    generate_tokens(loaded.model, tokens, separator, specs.seed, progress=run.progress, store=store)
                store()
            broadcast_tensors(run.ranks, [tokens])
            source = _make_generated_source(specs, loaded, name, tokens)
        calibration.append(source)
    return replace(halves, calibration=tuple(calibration))


def _store_windows(path: Path | None, tokens: Tensor, header: Mapping[str, object]) -> None:
    """Write windows of generated text and their header to a file; nothing without a path, or if it holds them."""
    if path is not None:
        stored = _read_windows(path, header)
        if stored is not None and torch.equal(stored[: len(tokens)], tokens):  # it may hold more
            return
        with explain_os_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_tensors(path, {"tokens": tokens}, header, GENERATED_FORMAT)


def complete_data(
    run: ActiveRun,
    halves: SourceHalves,
    specs: SourceSpecs | None,
    loaded: Loaded,
    *,
    others: Sequence[Path] = (),
    weights: Sequence[float] | None = None,
) -> SourceHalves:
    """Return the data with generated text by :func:`fill_generated`, and record the sources of ``specs``, if any."""
    if specs is None:
        return halves
    if halves.has_pending_text:
        folder = run.record.path if run.record.is_kept else None
        with run.stage("generate"):
            halves = fill_generated(halves, specs, loaded, folder, others=others, weights=weights, run=run)
    run.record.update(sources=describe_sources(specs, halves))
    return halves


def _make_pending_tokens(specs: SourceSpecs, loaded: Loaded, name: str) -> Tensor:
    """Return the windows to generate for a source, by :func:`make_pending_tokens`."""
    return make_pending_tokens(loaded.tokenizer, specs.count_generated(name), specs.seq_len, name)


def check_generated_stored(
    specs: SourceSpecs, loaded: Loaded, folders: Sequence[Path], weights: Sequence[float]
) -> None:
    """Raise InputError unless run folders hold the generated text of a network that is read by block."""
    for name in [name for name in specs.sources if name in GENERATED_TEXT]:
        tokens, header = _make_pending_tokens(specs, loaded, name), _make_header(specs, loaded, name, weights)
        _fill_stored_windows(tokens, [folder / GENERATED_FILES[name] for folder in folders], header)
        if missing := int((tokens < 0).any(1).sum()):
            raise InputError(
                f"source {name!r} lacks {missing} of {len(tokens)} windows, and a network that is read one block at a "
                "time cannot generate them; give more --memory, or fewer --tokens"
            )


def _make_header(specs: SourceSpecs, loaded: Loaded, name: str, weights: Sequence[float] | None) -> dict[str, object]:
    """Return the header of a file of generated text: the seed, first tokens, vocabulary and weights it depends on."""
    return {
        **({"start": find_chat_start(loaded.tokenizer)} if name == CHAT else {}),
        "seed": specs.seed,
        "separator": find_separator_token(loaded.tokenizer),
        "vocabulary": len(cast(Any, loaded.model).get_input_embeddings().weight),
        "weights": parameter_sums(loaded.model) if weights is None else list(weights),
    }


def _fill_stored_windows(tokens: Tensor, files: Sequence[Path], header: Mapping[str, object]) -> None:
    """Set windows of ``tokens``, in place, to those of the same length and ``header`` that files hold."""
    for file in files:
        stored = _read_windows(file, header)
        if stored is not None and stored.shape[1] == tokens.shape[1]:
            n = min(len(tokens), len(stored))
            tokens[:n] = torch.where(stored[:n] >= 0, stored[:n], tokens[:n])


def _read_windows(path: Path, header: Mapping[str, object]) -> Tensor | None:
    """Return stored windows, ``[windows, tokens]``, -1: not generated; ``None`` if unusable or of another header."""
    try:
        recorded, tensors = read_tensors(path, GENERATED_FORMAT)
    except StoreError:
        return None
    tokens = tensors.get("tokens")
    if tokens is None or tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
        return None
    valid = int(tokens.min()) >= -1 and int(tokens.max()) < int(str(header["vocabulary"]))
    return tokens if valid and all(recorded.get(name) == value for name, value in header.items()) else None


def check_same_settings(ranks: ProcessRank, settings: "DataclassInstance", memory: str = "") -> None:
    """Raise InputError on every rank unless all have the same settings (but paths) and ``memory``, the limit."""
    values = {name: value for name, value in asdict(settings).items() if name not in _PATH_SETTINGS}
    if not broadcasts_same(ranks, fingerprint(Source("", ()), values, memory)):
        raise InputError("the processes have different settings; start all with the same command")


def check_same_inputs(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights], halves: SourceHalves) -> None:
    """Raise InputError on every rank unless all have the same weights (of networks, or in their files) and data."""
    if ranks.several:
        check_weights(ranks, networks)
        sources = [*halves.calibration, *halves.evaluation]
        sources = [source for source in sources if not isinstance(source.batches, PendingWindows)]  # rank 0 generates
        check_data(ranks, [source.name for source in sources], [fingerprint(source) for source in sources])


def check_weights(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights]) -> None:
    """Raise InputError on every rank unless all have networks of the same weights."""
    sums = []
    for network in networks:
        if isinstance(network, nn.Module):
            sums += [checksum(value) for value in network.state_dict().values() if isinstance(value, Tensor)]
        else:  # it runs one block at a time: one tensor is in memory
            sums += [checksum(network[name]) for name, _ in network.places()]
    if not broadcasts_same(ranks, sums):
        problem = "the processes have models of different weights"
        raise InputError(f"{problem}; seed the function that builds it, or copy the same folder to all hosts")


def check_data(ranks: ProcessRank, names: Sequence[str], sums: Sequence[object]) -> None:
    """Raise InputError on every rank unless all have the same names and checksums of data."""
    if not broadcasts_same(ranks, [*names, *sums]):
        listed = ", ".join(dict.fromkeys(names))
        raise InputError(f"the processes read different data for {listed}; copy the same files to all hosts")
