"""Experiment trackers (TensorBoard, MLflow, Weights & Biases): they get the rows of a run's measurements, too."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.core.errors import InputError, ResourceError
from regrow.core.limits import reason

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from regrow.store.run_folder import RunFolder

TRACKERS = ("tensorboard", "mlflow", "wandb")
"""The trackers by name, which is also that of their package and of the extra that installs it."""
PROJECT = "regrow"
"""The experiment of MLflow, and the project of Weights & Biases, that runs belong to."""
_LABELS = ("model", "source", "task")
"""Fields whose texts tell series of one kind of row apart."""


def check_tracker(name: str, out: str | Path = "") -> None:
    """Raise an error unless a tracker is known and installed; imports nothing.

    >>> check_tracker("paper")
    Traceback (most recent call last):
    regrow.core.errors.InputError: track must be one of tensorboard, mlflow, wandb, got 'paper'
    """
    if name and name not in TRACKERS:
        raise InputError(f"track must be one of {', '.join(TRACKERS)}, got {name!r:.40}")
    if name == "tensorboard" and Path(out).name == name:
        raise InputError(f"{out} is where the files of TensorBoard go; give the run folder another name")
    if missing := [package for package in ("accelerate", name) if name and find_spec(package) is None]:
        raise ResourceError(f"tracking by {name} needs {' and '.join(missing)}: pip install 'regrow[{name}]'")


def scalars_of(row: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a row of measurements by the name of their series.

    >>> scalars_of({"what": "size", "model": "dense", "bytes": 8, "dtype": "float32"})
    {'size/dense/bytes': 8}
    >>> scalars_of({"what": "task", "accuracy": [0.9, 0.8]})
    {'task/accuracy/0': 0.9, 'task/accuracy/1': 0.8}
    """
    labels = [row["what"], *(row[name] for name in _LABELS if isinstance(row.get(name), str))]
    prefix = "/".join(re.sub(r"[^\w.-]", "_", str(label)) for label in labels)
    accuracy = row.get("accuracy")
    several = {f"accuracy/{i}": value for i, value in enumerate(accuracy)} if isinstance(accuracy, list) else {}
    return {
        f"{prefix}/{name}": value
        for name, value in {**row, **several}.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextmanager
def tracking(folder: "RunFolder", name: str) -> "Iterator[RunFolder]":
    """Write a run inside the ``with`` block, and give every new row of its measurements to a tracker as well.

    TensorBoard's files are in ``tensorboard/`` beside the run folder; MLflow and Weights & Biases follow their own
    settings. The run has the name of its folder, and the number of a row among its kind is its step. A resumed run goes
    on in the tracker's run, whose id is in ``run.json``. A tracker that fails gets nothing more, after one warning.
    """
    check_tracker(name, folder.out or folder.path)
    with folder:
        if not name:
            yield folder
            return
        with _process_state():
            tracker, run_id = _start(folder, name)
            steps, works = Counter(row["what"] for row in folder.metrics()), True

            def attempt(call: Callable[[], object]) -> None:
                nonlocal works
                try:
                    call()
                except Exception as error:  # of whatever kind: the run does not depend on its tracker
                    first, works = works, False
                    if first:
                        rest = f"all measurements are in metrics.jsonl of {folder.out or folder.path}"
                        warnings.warn(f"{name} failed and gets nothing more ({reason(error)}); {rest}", stacklevel=2)

            def send(row: Mapping[str, object]) -> None:
                # Weights & Biases refuses steps that do not rise from row to row, of whatever kind; it counts itself.
                step = None if name == "wandb" else steps[row["what"]]
                steps[row["what"]] += 1
                if works and (scalars := scalars_of(row)):
                    attempt(lambda: tracker.log(scalars, step=step))

            try:
                if run_id:
                    folder.update(trackers={**folder.run().get("trackers", {}), name: run_id})
                yield replace(folder, send=send)
            finally:
                attempt(tracker.finish)


@contextmanager
def _process_state() -> Iterator[None]:
    """Leave accelerate's record of the process, which its trackers make, as it was before the ``with`` block."""
    from accelerate import PartialState

    known = bool(PartialState._shared_state)
    try:
        yield
    finally:
        if not known:
            PartialState._reset_state()


def _start(folder: "RunFolder", name: str) -> "tuple[GeneralTracker, str]":
    """Start a tracker, or go on with its run; return it and the id of its run, empty if it has none."""
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    path, run = Path(folder.out or folder.path).resolve(), folder.run()
    known = run.get("trackers", {}).get(name)
    builders: Mapping[str, Any] = {
        "tensorboard": lambda: TensorBoardTracker(path.name, path.parent / "tensorboard"),
        "mlflow": lambda: MLflowTracker(PROJECT, run_name=path.name, run_id=known),
        "wandb": lambda: WandBTracker(PROJECT, name=path.name, **({"id": known, "resume": "allow"} if known else {})),
    }
    plain = {key: value for key, value in run["settings"].items() if isinstance(value, str | int | float)}
    tracker: GeneralTracker | None = None
    try:
        PartialState()  # without it accelerate's trackers cannot log
        tracker = builders[name]()
        tracker.start()
        if not (folder.resumed if name == "tensorboard" else known):
            tracker.store_init_configuration(plain)
        active = tracker.tracker
        run_id = active.info.run_id if name == "mlflow" else active.id if name == "wandb" else ""
        return tracker, str(run_id)
    except Exception as error:
        if tracker is not None:
            with suppress(Exception):
                tracker.finish()
        raise ResourceError(
            f"tracking by {name} cannot start ({reason(error)}); set {name} up, or leave tracking out"
        ) from error
