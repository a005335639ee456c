"""Reconstruction in a pruning run: layers that read cut units are fitted to the dense network, which is still there."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.source_names import GENERATED
from regrow.core.sources import Source
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.recording import Record
from regrow.jobs.recovering import work_in
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import Recovery, RecoveryTask
from regrow.methods.recovery import task as recovery
from regrow.methods.recovery.task import REFIT_FIELDS, StreamedPair
from regrow.settings.prune import RECONSTRUCTION, Settings, complete_reconstruction
from regrow.store.statistics import fingerprint, parameter_sums
from regrow.store.tensors import open_checkpoint

LEAST = 8192
"""The fewest tokens of text to fit on, unless another number is asked for."""


def check_reconstruction(settings: Settings, *, several: bool = False) -> None:
    """Raise ValueError, before a run starts, if the reconstruction that is asked for cannot be done.

    Args:
        settings: The settings of the run.
        several: Whether several processes share the run.

    Raises:
        ValueError: If a setting is unknown or of no use, or several processes share the run.
    """
    if not settings.reconstruct:
        return
    build_reconstruction(settings.reconstruct_settings, settings.sources)
    if several:
        raise InputError("--reconstruct runs in one process; leave out --reconstruct, or start without torchrun")
    if settings.recover == "bias":
        raise InputError("--reconstruct fits the biases that --recover bias would change again; leave out one of them")


def build_reconstruction(given: Mapping[str, object], sources: Collection[str]) -> Recovery:
    """Return the least squares with the defaults of a reconstruction.

    Args:
        given: The settings that differ from these: name → value.
        sources: The names of the data.

    Raises:
        ValueError: If a setting is unknown or of no use.
    """
    work: Recovery = find_method(MethodKind.RECOVERY, RECONSTRUCTION).made(
        RECONSTRUCTION, complete_reconstruction(given, sources)
    )
    return work


def count_tokens(settings: Settings, text: bool) -> int:
    """Return how many tokens or images a run reconstructs on, over all sources together.

    >>> count_tokens(Settings("m", sources=("news", "code")), True)
    8192

    Args:
        settings: The settings of the run.
        text: Whether the model takes text.
    """
    calibration = count_calibration(settings)
    return settings.reconstruct_tokens or (max(LEAST, calibration) if text else calibration)


def count_calibration(settings: Settings) -> int:
    """Return how many tokens or images a run calibrates on, over all sources together.

    >>> count_calibration(Settings("m", sources=("news", "generated"), tokens=4096, generated_tokens=12288))
    16384

    Args:
        settings: The settings of the run.
    """
    generated = settings.generated_tokens or settings.tokens
    return sum(generated if name == GENERATED else settings.tokens for name in settings.sources)


def check_amount(
    settings: Settings, data: SourceHalves, read: Callable[[int, Tensor | None], Sequence[Source]], *, text: bool
) -> None:
    """Raise ValueError, before a run folder is made, if there is too little data to reconstruct on.

    Args:
        settings: The settings of the run.
        data: The data of the run.
        read: Returns calibration data of another amount.
        text: Whether the model takes text.

    Raises:
        ValueError: As :func:`check_batches`.
    """
    given = settings.reconstruct_settings
    if settings.reconstruct and not data.calibration:
        raise InputError("reconstruct fits on data, and there are none; give --source news, or data= in Python")
    if settings.reconstruct and _holds_out(given, len(data.calibration)):
        check_batches(choose_sources(settings, data, read, text=text), given)


def choose_sources(
    settings: Settings, data: SourceHalves, read: Callable[[int, Tensor | None], Sequence[Source]], *, text: bool
) -> Sequence[Source]:
    """Return the data that a run reconstructs on: the calibration data, unless another amount is wanted.

    Args:
        settings: The settings of the run.
        data: The data of the run.
        read: Returns calibration data of another amount.
        text: Whether the model takes text.
    """
    tokens = count_tokens(settings, text)
    return data.calibration if tokens == count_calibration(settings) else read(tokens, data.generated)


def check_batches(sources: Sequence[Source], given: Mapping[str, object]) -> None:
    """Raise ValueError, before anything is cut, if a batch must be held out of a source that has no other.

    Args:
        sources: The data to fit on.
        given: Settings that differ from the defaults of a reconstruction.

    Raises:
        ValueError: If a source has a single batch, and the ridge is not chosen on left-out sources.
    """
    few = next((one for one in sources if len(one) < 2), None) if _holds_out(given, len(sources)) else None
    if few is not None:
        raise InputError(
            f"source {few.name!r} has {len(few)} batches, and reconstruct holds one out; give more data (a larger "
            "--reconstruct-tokens), or a second source"
        )


def _holds_out(given: Mapping[str, object], sources: int) -> bool:
    """Whether the ridge is chosen on a held-out part of each source, not on left-out sources."""
    return sources < 2 or complete_reconstruction(given, ())["choose_on"] != "left_out_source"


def keep_dense(model: nn.Module) -> nn.Module:
    """Return a copy of a network that stays as it is when the network is cut; weights are shared, vectors are copied.

    A cut makes new weights and leaves the old ones as they are; a reconstruction changes weights that the cut made, and
    biases.

    Args:
        model: The network.
    """
    from regrow.tracing.meta_copy import copy_model

    def share(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() > 1 else tensor.detach().clone()

    return copy_model(model, share)


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    sources: Sequence[Source],
    given: Mapping[str, object],
    record: Record | None = None,
    progress: Progress = silent,
    streamed: StreamedPair | None = None,
) -> dict[str, Any]:
    """Fit every layer that reads cut units by least squares, in place, and log a ``reconstruction`` row.

    An interrupted reconstruction in a run folder is resumed.

    Args:
        model: The network after the cut; changed in place.
        dense: The network before the cut.
        axes: The axes of the dense network.
        plan: The plan of the cut.
        sources: The data to fit on; layers are judged on each of them in turn, left out of the fit.
        given: Settings of ``recover --by refit`` that differ from the defaults of a reconstruction.
        record: The run, whose folder gets the checkpoint, and which gets the row; ``None``: nothing is written.
        progress: Called with (steps done, steps in all, what is being done).
        streamed: The two networks one block at a time, where they are larger than memory; the tensors that change are
            kept in its files, and ``model`` has no numbers.

    Returns:
        What :func:`regrow.methods.recovery.refit.refit` returns, with ``tokens`` and ``seconds``.

    Raises:
        ValueError: If a setting is of no use, the data are too few, or no layer can be fitted.
    """
    names = [source.name for source in sources]
    work, spent, path, start = build_reconstruction(given, names), 0.0, None, time.perf_counter()
    seconds = lambda: spent + time.perf_counter() - start  # noqa: E731
    key = ""
    if record is not None and record.kept:
        texts = [fingerprint(source) for source in sources]
        if streamed is None:
            sums = [parameter_sums(net) for net in (model, dense)]
        else:
            sums = [net.weights.sums() for net in (streamed.model, streamed.dense)]
        key = fingerprint(Source("", ()), "reconstruct", complete_reconstruction(given, names), texts, sums)
        path = record.path / "statistics" / "reconstruction.safetensors"
        spent = float(open_checkpoint(path, key, recovery.FORMAT).get("seconds", 0))
        if streamed is not None:
            streamed.changed.open(key, REFIT_FIELDS)
    header = lambda: {"key": key, "seconds": seconds()}  # noqa: E731
    more: Any = {"checkpoint": path, "header": header, "progress": progress, "streamed": streamed}
    task = RecoveryTask(model, dense, axes, plan, sources, **more)
    outcome = work_in("float32", RECONSTRUCTION, work, task)
    row = {"tokens": sum(source.tokens for source in sources), "seconds": round(seconds(), 1), **outcome}
    if record is not None:
        record.log("reconstruction", **row)
        if "note" in row:
            record.update(notes=[*record.run().get("notes", ()), f"reconstruction: {row['note']}"])
    return row
