"""Run tasks of EleutherAI's lm-eval, or files of multiple-choice items, on a network in memory.

The data of a harness task are fetched by the harness. A file of items (:func:`regrow.evaluation.items_in`) becomes a
harness task through the task files in ``evaluation/tasks``, without fetching anything. On such a file ``acc`` is our
accuracy and ``acc_bytes`` our accuracy per byte, item by item; ``acc_norm`` divides by characters instead of bytes,
which is the same wherever the choices are ASCII.
"""

import contextlib
import difflib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regrow.core.errors import first_line
from regrow.core.progress import Progress, silent
from regrow.evaluation.choice import Item, items_in
from regrow.evaluation.measure import evaluating
from regrow.nets.loaded import needs

if TYPE_CHECKING:
    from datasets import DatasetDict

TASKS = Path(__file__).parent / "tasks"  # which can also be passed to lm_eval --include_path
_LOGITS = 2**19  # rows times vocabulary entries in one forward pass
_LONGEST = 2048


@dataclass(frozen=True)
class Harnessed:
    """The result of lm-eval on one task.

    Args:
        task: The task's name.
        items: The number of items.
        metrics: Metric, as the harness names it → value; standard errors too (``acc_stderr``).
        per_item: Metric → its value for each item, in the order of the items, if the harness keeps it.
        version: The version that the task states.
    """

    task: str
    items: int
    metrics: Mapping[str, float]
    per_item: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    version: str = ""

    def record(self) -> dict[str, object]:
        """Return the result as JSON-able data."""
        per_item = {name: list(values) for name, values in self.per_item.items()}
        return {**vars(self), "metrics": dict(self.metrics), "per_item": per_item}


def harness(
    model: nn.Module, tokenizer: Any, task: str, *, items: int | None = None, progress: Progress = silent
) -> list[Harnessed]:
    """Run a task of lm-eval on a network in memory, pruned or not.

    Args:
        model: A transformers language model.
        tokenizer: Its tokenizer.
        task: The name of a task, group or tag of the harness (``arc_easy``), or a file of items (``.jsonl``,
            ``.jsonl.gz``), which is run without network access.
        items: The number of items of each task; all if ``None``.
        progress: Called with (requests done, requests in all, description).

    Returns:
        One record per task; a group has several.

    Raises:
        ValueError: If lm-eval is not installed, knows no such task, cannot fetch its data, or fails on it.
    """
    try:
        from lm_eval import evaluator
    except ImportError:
        raise needs("harness", "lm-eval") from None
    if tokenizer is None or not hasattr(model, "config"):
        raise ValueError(f"harness task {task!r}: only language models of transformers, with a tokenizer, can run it")
    with _quiet(), evaluating(model):
        loaded = _load_tasks(task, items)
        try:
            results = evaluator.evaluate(_wrap(model, tokenizer, task, progress), loaded, limit=items, log_samples=True)
        except Exception as error:
            raise ValueError(f"harness task {task!r} failed: {type(error).__name__}: {first_line(error)}") from None
    name = Path(task).name.split(".")[0] if _is_file(task) else ""
    return [_read_result(key, results, name or key) for key in loaded["tasks"]]


def dataset(file: str, items: int | None = None, **_: object) -> "DatasetDict":
    """Return the items of a file as the data set of a task file; called by the harness."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list([_prepared(item) for item in items_in(Path(file), items)])})


def _prepared(item: Item) -> dict[str, Any]:
    """Return an item whose parts the harness joins to the text that :func:`regrow.evaluation.choices` scores."""
    if "continuation" in item:
        beginnings = [option.rstrip() for option in item["context_options"]]
        return {"context_options": beginnings, "continuation": item["continuation"].strip(), "gold": item["gold"]}
    endings = [choice.strip() for choice in item["choices"]]
    return {"query": item["query"].rstrip(" "), "choices": endings, "gold": item["gold"]}


def _load_tasks(task: str, items: int | None) -> dict[str, Any]:
    """Load the tasks of a name, or the one task of a file."""
    from lm_eval.tasks import TaskManager

    if _is_file(task):
        manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"file": task, "items": items})
        name, between = _form([_prepared(item) for item in items_in(Path(task), items)], task)
        loaded = manager.load([name])
        loaded["tasks"][name].set_config("target_delimiter", between)
        return loaded
    manager = _all_tasks()
    if task not in manager.all_tasks:
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lm_eval ls tasks lists them; a file of items ends in .jsonl"
        raise ValueError(f"lm-eval has no task {task!r}; {hint}")
    try:
        loaded = manager.load([task])
    except Exception as error:
        problem = f"harness task {task!r} cannot be loaded ({type(error).__name__}: {first_line(error)[:200]})"
        remedy = "it fetches its data from the network: connect, or give a file of items instead"
        raise ValueError(f"{problem}; {remedy}") from None
    for part in loaded["tasks"].values():
        if part.get_config("num_fewshot") is None:
            part.set_config("num_fewshot", 0)
        part.set_fewshot_seed(1234)  # the harness's own default
    return loaded


@functools.cache
def _all_tasks() -> Any:
    """Return all tasks that the harness has; reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _form(items: Sequence[Mapping[str, Any]], task: str) -> tuple[str, str]:
    """Return which task file fits the items, and the text between the parts that it joins."""
    forms = {"continuation" in item for item in items}
    between = {"" if item.get("query", ".")[-1:] in ("", "\n") else " " for item in items}
    if len(forms) > 1 or len(between) > 1:
        what = "one form" if len(forms) > 1 else "queries that all end with a line break, or none of them"
        raise ValueError(f"{task}: the harness wants items of {what}; split the file")
    return "regrow_contexts" if forms.pop() else "regrow_choice", between.pop()


def _wrap(model: nn.Module, tokenizer: Any, task: str, progress: Progress) -> Any:
    """Wrap the network as the harness's model class, with progress reports."""
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):
        done = total = 0

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            self.done, self.total = 0, len(requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            answer = super()._model_call(inps, attn_mask, labels)
            self.done = min(self.done + len(inps), self.total)
            progress(self.done, self.total, f"{Path(task).name} in lm-eval")
            return answer

    longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    rows = max(1, min(16, _LOGITS // len(tokenizer)))
    return Reporting(pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=min(_LONGEST, longest))


def _read_result(task: str, results: Mapping[str, Any], name: str) -> Harnessed:
    figures = {}
    for key, value in results["results"][task].items():
        metric, _, kept = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and kept:
            figures[metric if kept == "none" else key] = float(value)
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]] if samples else []
    per_item = {
        metric: tuple(float(sample[metric]) for sample in first)
        for metric in (first[0]["metrics"] if first else ())
        if all(isinstance(sample[metric], int | float) for sample in first)
    }
    return Harnessed(name, len(first), figures, per_item, str(results["versions"].get(task, "")))


def _is_file(task: str) -> bool:
    return task.endswith((".jsonl", ".jsonl.gz")) or Path(task).is_file()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log in the block, and restore the caller's random state."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        log.setLevel(level)
