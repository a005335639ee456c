"""The data of a run: halves of its sources, and text that its model generates; the same for all of its processes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from regrow import data
from regrow.core.errors import InputError
from regrow.core.names import GENERATED, check_evaluation_sources
from regrow.core.sources import Batch, Source
from regrow.core.tasks import Task, first_examples, first_tensor
from regrow.data import Half
from regrow.data.text import find_bos_tokens, find_separator_token, token_windows
from regrow.data.vision import digits, images
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_record, broadcast_tensors, checksum, everywhere
from regrow.evaluation.generation import check_generation, describe_generated, generate_tokens
from regrow.jobs.models import find_input_shape
from regrow.jobs.recording import ActiveRun
from regrow.nets import Loaded
from regrow.nets.loaded import longest_input
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.statistics import fingerprint, parameter_sums
from regrow.store.tensors import read_tensors, write_tensors
from regrow.streaming.weights import StoredWeights

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The file in a run folder: a folder of its own, since loaders of models read all weights beside a configuration.
GENERATED_FILE = "generated/windows.safetensors"
GENERATED_FORMAT = "regrow-generated/1"
# Settings that may name another folder on another host: what they lead to is compared.
_PATH_SETTINGS = ("model", "run", "sources", "unseen", "input")
# How many examples of each part of a task are compared.
COMPARED_EXAMPLES = 256


@dataclass(frozen=True)
class SourceSpecs:
    """The sources of a run, and how much of each is used; of image sources, numbers of tokens are those of images."""

    eval_tokens: int  # evaluation tokens of each source
    seq_len: int  # tokens per window of text
    sources: tuple[str, ...] = ()  # for calibration and evaluation, as `--source` takes them
    unseen: tuple[str, ...] = ()  # for evaluation only
    tokens: int = 0  # calibration tokens of each source
    seed: int = 0  # of the choice of calibration windows or images, and of generated text
    generated_tokens: int = 0  # calibration tokens of text that the model generates

    @property
    def generated_windows(self) -> int:
        """How many windows of ``seq_len`` tokens of generated text are used."""
        return count_windows(self.generated_tokens, self.seq_len)


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
    if GENERATED in names and GENERATED not in all_specs:
        raise InputError(f"source {GENERATED!r} is text that the model generates; give {GENERATED}=PATH another name")
    calibration = (
        _make_generated_source(specs, loaded)
        if spec == GENERATED
        else _read_source(specs, loaded, spec, Half.CALIBRATION, specs.tokens)
        for spec in specs.sources
    )
    evaluated = (spec for spec in all_specs if spec != GENERATED)
    evaluation = (_read_source(specs, loaded, spec, Half.EVALUATION, specs.eval_tokens) for spec in evaluated)
    return SourceHalves(tuple(calibration), tuple(evaluation))


def _read_source(specs: SourceSpecs, loaded: Loaded, spec: str, half: Half, amount: int) -> Source:
    """Return a half of a source; ``spec``: as ``--source`` takes it; ``amount``: a number of tokens or images."""
    seed = specs.seed if half is Half.CALIBRATION else 0
    if loaded.tokenizer is not None:
        if specs.seq_len > (most := longest_input(loaded.model)):
            raise InputError(f"--seq-len {specs.seq_len}: the model takes at most {most} tokens; give {most} or less")
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
        test = None if spec == GENERATED else next(tests)
        parts = {"calibration": calibration, "evaluation": test}
        name = next(source.name for source in (test, calibration) if source is not None)
        origin = "; ".join(f"{half}: {source.origin}" for half, source in parts.items() if source is not None)
        counts = {f"{half}_tokens": source.tokens if source else 0 for half, source in parts.items()}
        rows.append({"name": name, "spec": spec, "origin": origin, **counts})
    return rows


def _make_generated_source(specs: SourceSpecs, loaded: Loaded, tokens: Tensor | None = None) -> Source:
    """Return the source of generated text: ``tokens``, ``[windows, tokens]``, or ``None``: its windows are pending."""
    if loaded.tokenizer is None:
        raise InputError(
            f"source {GENERATED!r} is text that the model generates, and this model has no tokenizer; name a language "
            "model, or another source"
        )
    check_generation(loaded.model)
    find_separator_token(loaded.tokenizer)
    n = specs.generated_windows
    if tokens is None:
        return Source(GENERATED, PendingWindows(n))
    origin = describe_generated(n, specs.seq_len, specs.seed)
    return token_windows(GENERATED, tokens, find_bos_tokens(loaded.tokenizer), origin)


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
    tokens = _make_pending_tokens(specs, loaded)
    if run.ranks.leads:
        header = _make_header(specs, loaded, weights)
        _fill_stored_windows(tokens, (*others, *([folder] if folder else [])), header)

        def store() -> None:
            if folder is not None:
                with explain_os_errors(folder / GENERATED_FILE):
                    (folder / GENERATED_FILE).parent.mkdir(exist_ok=True)
                write_tensors(folder / GENERATED_FILE, {"tokens": tokens}, header, GENERATED_FORMAT)

        if (tokens < 0).any():
            separator = find_separator_token(loaded.tokenizer)
            generate_tokens(loaded.model, tokens, separator, specs.seed, progress=run.progress, store=store)
        store()
    broadcast_tensors(run.ranks, [tokens])
    calibration = (
        _make_generated_source(specs, loaded, tokens) if isinstance(source.batches, PendingWindows) else source
        for source in halves.calibration
    )
    return replace(halves, calibration=tuple(calibration))


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


def _make_pending_tokens(specs: SourceSpecs, loaded: Loaded) -> Tensor:
    """Return the tokens of the windows to generate, ``[windows, tokens]``, each -1: not generated yet."""
    return torch.full((specs.generated_windows, specs.seq_len - len(find_bos_tokens(loaded.tokenizer))), -1)


def check_generated_stored(
    specs: SourceSpecs, loaded: Loaded, folders: Sequence[Path], weights: Sequence[float]
) -> None:
    """Raise InputError unless run folders hold all generated text that ``specs`` ask for.

    For a network read block by block, which cannot generate; ``weights`` are the sums of its parameters.
    """
    tokens = _make_pending_tokens(specs, loaded)
    _fill_stored_windows(tokens, folders, _make_header(specs, loaded, weights))
    if missing := int((tokens < 0).any(1).sum()):
        raise InputError(
            f"source 'generated' lacks {missing} of {len(tokens)} windows, and a network that is read one block at a "
            "time cannot generate them; give more --memory, or fewer --tokens"
        )


def _make_header(specs: SourceSpecs, loaded: Loaded, weights: Sequence[float] | None) -> dict[str, object]:
    """Return the header of the file of generated text: the seed, first token, vocabulary and weights it depends on."""
    return {
        "seed": specs.seed,
        "separator": find_separator_token(loaded.tokenizer),
        "vocabulary": len(cast(Any, loaded.model).get_input_embeddings().weight),
        "weights": parameter_sums(loaded.model) if weights is None else list(weights),
    }


def _fill_stored_windows(tokens: Tensor, folders: Sequence[Path], header: Mapping[str, object]) -> None:
    """Set windows of ``tokens``, in place, to those of the same length and ``header`` that run folders hold."""
    for folder in folders:
        stored = _read_windows(folder / GENERATED_FILE, header)
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
    if not _are_same(ranks, fingerprint(Source("", ()), values, memory)):
        raise InputError("the processes have different settings; start all with the same command")


def check_same_inputs(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights], halves: SourceHalves) -> None:
    """Raise InputError on every rank unless all have the same weights (of networks, or in their files) and data."""
    if ranks.several:
        _check_weights(ranks, networks)
        sources = [*halves.calibration, *halves.evaluation]
        sources = [source for source in sources if not isinstance(source.batches, PendingWindows)]  # rank 0 generates
        _check_data(ranks, [source.name for source in sources], [fingerprint(source) for source in sources])


def check_same_tasks(ranks: ProcessRank, model: nn.Module, tasks: Sequence[Task]) -> None:
    """Raise InputError on every rank unless all have the same weights, and tasks that start with the same examples."""
    if ranks.several:
        _check_weights(ranks, [model])
        parts = (first_examples(part, COMPARED_EXAMPLES) for task in tasks for part in (task.train, task.test))
        sums = [[checksum(first_tensor(part.inputs)), checksum(part.labels)] for part in parts]
        _check_data(ranks, [task.name for task in tasks], sums)


def _check_weights(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights]) -> None:
    """Raise InputError on every rank unless all have networks of the same weights."""
    sums = []
    for network in networks:
        if isinstance(network, nn.Module):
            sums += [checksum(value) for value in network.state_dict().values() if isinstance(value, Tensor)]
        else:  # it runs one block at a time: one tensor is in memory
            sums += [checksum(network[name]) for name, _ in network.places()]
    if not _are_same(ranks, sums):
        raise InputError(
            "the processes have models of different weights; seed the function that builds it, or copy the same folder "
            "to all hosts"
        )


def _check_data(ranks: ProcessRank, names: Sequence[str], sums: Sequence[object]) -> None:
    """Raise InputError on every rank unless all have the same names and checksums of data."""
    if not _are_same(ranks, [*names, *sums]):
        listed = ", ".join(dict.fromkeys(names))
        raise InputError(f"the processes read different data for {listed}; copy the same files to all hosts")


def _are_same(ranks: ProcessRank, record: object) -> bool:
    """Whether all ranks have the same JSON data as rank 0; all must call this."""
    return not ranks.several or everywhere(ranks, broadcast_record(ranks, record) == record)
