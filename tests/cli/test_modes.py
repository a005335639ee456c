"""Each command does the same in all of its modes: as a command, in Python, one block at a time, and in two processes.

A cell is a command in a mode. It is compared with the command in one process and the whole network in memory: the
settings and defaults in ``run.json``, the plans, the weights bit for bit, and the measurements without times. In Python
the calibration and evaluation halves that the command makes of a source are ``data`` and ``validation``; the settings
that say which data a command reads, and how many, are left out there. Two processes that train on the rows of a batch
add gradients in another order: what they give is compared within a tolerance.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regrow
from distributed.processes import finish, start
from regrow.cli import run_command
from regrow.jobs import memory_needs
from regrow.jobs.inputs import SourceHalves, SourceSpecs, read_sources
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.pruning_inputs import make_source_specs, read_pruning_settings
from regrow.jobs.recording import Invocation
from regrow.jobs.search_inputs import read_search_data
from regrow.jobs.starting import TaskSpecs, find_space_start, read_tasks
from regrow.settings.search import Settings as SearchSettings
from regrow.store.run_folder import RunFolder
from regrow.streaming import requirements

WORDS = ("--source", "news", "--source", "code", "--tokens", "256", "--eval-tokens", "128", "--seq-len", "32")
DIGITS = ("--source", "digits", "--tokens", "256", "--eval-tokens", "128")
LEARN = ("learn", "split:digits:2", "--model", "toys:classifier", "--epochs", "2", "--train", "200", "--test", "100")
SEARCH = ("search", "toys:residual", "--data", "digits", "--target", "macs=60%", "--train", "200", "--test", "50")
SEARCH = (*SEARCH, "--epochs", "3", "--retrain", "0", "--set", "augment=false")
MISSING: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("prune --reconstruct", "two ranks"): ("prune", "toys:residual", "--reconstruct", *DIGITS),
    ("prune --reconstruct", "streamed"): ("prune", "llama", "--keep", "0.7", "--reconstruct", "--memory", "1GiB"),
    ("prune", "Python, streamed"): (),
    ("grow", "streamed"): (),
    ("grow", "two ranks"): ("grow", "toys:residual", "--mlp", "+4"),
    ("recover", "Python, streamed"): (),
    ("recover lora and distil", "streamed"): ("recover", "pruned", "--by", "distil", "--memory", "1MiB"),
    ("recover refit", "two ranks"): ("recover", "pruned", "--by", "refit"),
    ("learn", "streamed"): (),
    ("search", "streamed"): (),
    ("evaluate", "two ranks"): ("evaluate", "toys:residual", "--source", "digits"),
    ("all", "Python, two ranks"): (),
}
"""A command and a mode that it does not have → the words by which the command refuses it, if it has them."""
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "prune text": ("prune", "llama", "--method", "flap", "--keep", "0.7", *WORDS),
    "prune images": ("prune", "toys:residual", "--method", "flap", "--target", "macs=60%", *DIGITS),
    "prune obs": ("prune", "llama", "--keep", "0.7", "--method", "obs", *WORDS),
    "prune reconstruct": ("prune", "llama", "--method", "flap", "--keep", "0.7", "--reconstruct", *WORDS),
    "grow text": ("grow", "llama", "--mlp", "+25%", "--blocks", "+1", *WORDS[:4], *WORDS[6:]),
    "grow images": ("grow", "toys:residual", "--mlp", "+4", "--on", *DIGITS[1:], "--steps", "3"),
    "recover refit": ("recover", "pruned", "--by", "refit", "--tokens", "512"),
    "recover distil": ("recover", "pruned", "--by", "distil", "--tokens", "512", "--set", "windows=2"),
    "learn naive": (*LEARN, "--method", "naive"),
    "learn sparsegrow": (*LEARN, "--method", "sparsegrow"),
    "search": SEARCH,
    "evaluate text": ("evaluate", "llama", *WORDS[:4], *WORDS[6:]),
    "evaluate images": ("evaluate", "toys:residual", *DIGITS[:2], *DIGITS[4:]),
}
"""The command of each row of the table of cells."""
STREAMED = ("prune text", "prune obs", "recover refit", "evaluate text")
RANKED = ("prune text", "prune images", "prune obs", "recover distil", "learn naive", "learn sparsegrow", "search")
CELLS = (
    *((name, "Python") for name in COMMANDS),
    *((name, "streamed") for name in STREAMED),
    *((name, "two ranks") for name in RANKED),
    *((name, "streamed by two ranks") for name in ("prune text", "prune obs")),
    ("evaluate text", "Python, streamed"),
)
ASPECTS = ("settings", "plans", "weights", "rows")
PRUNED = "Python does not know the run that pruned: keep, method, run and pruning are those of the defaults of prune"
BLOCKWISE = "verify counts blocks, without float32_diff, rounding, argmax_flips, positions and unproven"
FAILS: Mapping[tuple[str, str, str], str] = {
    **{(name, "Python", "settings"): PRUNED for name in COMMANDS if name.startswith("recover")},
    **{(name, mode, "rows"): BLOCKWISE for name, mode in CELLS if name.startswith("prune") and "streamed" in mode},
}
"""A command, a mode and what is not equal in them → the difference."""
BLOCKS = """
import sys
from regrow.cli import run_command
from regrow.streaming import requirements
requirements.WHOLE_COPIES = 1e9
sys.exit(run_command(sys.argv[1:]))
"""
SHARED_ROWS = 1e-4
"""The tolerance, relative and absolute, for weights and measurements of two processes that learn or search."""
TIMES = frozenset(("seconds", "ms", "memory", "whole", "found"))
READ = frozenset(("sources", "on", "tokens", "eval_tokens", "seq_len", "tasks", "data", "train", "test"))
"""Settings that say which data a command reads, which Python is given."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_language_model: Path) -> Path:
    """A folder with a language model and a pruned one."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "llama").symlink_to(tiny_language_model)
    with chdir(folder):
        assert run_command(["prune", "llama", "--keep", "0.7", "--method", "magnitude", *WORDS, "--out", "pruned"]) == 0
    return folder


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def run(name: str, mode: str) -> Path:
    """Run a command in a mode, if it did not run before; returns the folder or file that it wrote."""
    out = Path(f"{name}, {mode}")
    if out.exists():
        return out
    words = [*COMMANDS[name], "--json" if name.startswith("evaluate") else "--out", str(out)]
    words += ["--memory", "64GiB"] if "streamed" in mode else []
    if "two ranks" in mode:
        results = finish(start(*(("-c", BLOCKS) if "streamed" in mode else ("-m", "regrow")), *words, cwd=Path()))
        assert [code for *_, code in results] == [0, 0], results
        return out
    with pytest.MonkeyPatch.context() as patch:
        if "streamed" in mode:
            patch.setattr(requirements, "WHOLE_COPIES", 1e9)
            patch.setattr(memory_needs, "SPARE_BYTES", 2**40)
        if mode.startswith("Python"):
            PYTHON[name.split()[0]](name, out, "64GiB" if "streamed" in mode else "")
        else:
            assert run_command(words) == 0
    return out


def read(words: tuple[str, ...]) -> SourceHalves:
    """Read the data that a command reads."""
    amounts = {"--tokens": 256, "--eval-tokens": 128, "--seq-len": 256}
    amounts |= {word: int(words[words.index(word) + 1]) for word in amounts if word in words}
    sources = tuple(words[i + 1] for i, word in enumerate(words) if word in ("--source", "--on"))
    specs = SourceSpecs(amounts["--eval-tokens"], amounts["--seq-len"], sources, (), amounts["--tokens"])
    return read_sources(specs, load_model(ModelSpec(words[1])))


def python_prune(name: str, out: Path, memory: str) -> None:
    words = COMMANDS[name]
    halves = read(words)
    settings: dict[str, Any] = {"keep": 0.7} if words[1] == "llama" else {"target": "macs=60%"}
    settings |= {"method": "obs" if name.endswith("obs") else "flap"}
    regrow.prune(
        words[1],
        halves.calibration,
        validation=halves.evaluation,
        reconstruct="--reconstruct" in words,
        out=out,
        **settings,
    )


def python_grow(name: str, out: Path, memory: str) -> None:
    words = COMMANDS[name]
    halves = read(words)
    amounts: dict[str, Any] = {"mlp": "+25%", "blocks": "+1"} if words[1] == "llama" else {"mlp": "+4", "steps": 3}
    data = halves.calibration if "steps" in amounts else None
    regrow.grow(words[1], data=data, validation=halves.evaluation, out=out, **amounts)


def python_recover(name: str, out: Path, memory: str) -> None:
    cut, by = RunFolder.open("pruned"), name.split()[1]
    loaded, dense = (load_model(ModelSpec(one)) for one in ("pruned", "llama"))
    halves = read_sources(make_source_specs(read_pruning_settings(cut.read_record()["settings"], ""), 512), loaded)
    data = {"data": halves.calibration, "validation": halves.evaluation}
    data |= {"tokenizer": dense.tokenizer, "example": dense.example}
    settings = {"windows": 2} if by == "distil" else {}
    (plan,) = cut.own_ledger.plans()
    regrow.recover(loaded.model, dense.model, plan, **data, by=by, settings=settings, out=out)


def python_learn(name: str, out: Path, memory: str) -> None:
    tasks = read_tasks(TaskSpecs(("split:digits:2",), 200, 100, shape=(1, 8, 8)))
    more = {"method": name.split()[1], "epochs": 2}
    regrow.learn("toys:classifier", tasks, out=out, **more)


def python_search(name: str, out: Path, memory: str) -> None:
    settings = SearchSettings("toys:residual", "digits", "macs=60%", train=200, test=50)
    parts = read_search_data(settings, find_space_start("toys:residual", "digits", "", Invocation()))
    data = {
        part: (torch.as_tensor(one.inputs), torch.as_tensor(one.labels))
        for part, one in (("data", parts.search.train), ("validation", parts.search.test), ("test", parts.test))
    }
    more = {"epochs": 3, "batch_size": 96, "lr": 0.025, "weight_decay": 3e-4}
    regrow.search("toys:residual", **data, target="macs=60%", settings={"augment": False}, out=out, **more)


def python_evaluate(name: str, out: Path, memory: str) -> None:
    words = COMMANDS[name]
    rows = []
    for one in regrow.evaluate(words[1], read(words).evaluation, memory=memory).values():
        quality = {"accuracy": one.score, "images": one.count}
        rows.append(
            {"source": one.source} | ({"ppl": one.perplexity, "tokens": one.count} if one.perplexity else quality)
        )
    out.write_text(json.dumps({"perplexity" if "ppl" in rows[0] else "accuracy": rows}))


PYTHON: Mapping[str, Callable[[str, Path, str], None]] = {
    "prune": python_prune,
    "grow": python_grow,
    "recover": python_recover,
    "learn": python_learn,
    "search": python_search,
    "evaluate": python_evaluate,
}


def settings_of(out: Path) -> Mapping[str, Any]:
    run = RunFolder.open(out).read_record()
    return {**run["settings"], "defaults": run.get("defaults")}


def compare(aspect: str, first: Path, second: Path, tolerance: float = 0.0) -> list[str]:
    """Return what differs in an aspect of two runs."""
    if first.is_file():
        ours, theirs = (json.loads(one.read_text()) for one in (first, second))
        return [] if aspect != "rows" else compare_results(ours, theirs)
    if aspect == "settings":
        ours, theirs = settings_of(first), settings_of(second)
        return [
            f"{name}: {ours.get(name)!r:.80} / {theirs.get(name)!r:.80}"
            for name in sorted({*ours, *theirs} - (READ if "Python" in second.name else frozenset()))
            if ours.get(name) != theirs.get(name)
        ]
    runs = RunFolder.open(first), RunFolder.open(second)
    if aspect == "plans":
        ours, theirs = ([plan.to_json() for plan in one.own_ledger.plans()] for one in runs)
        if ours == theirs:
            return []
        changes = [[json.dumps(json.loads(plan)["changes"]) for plan in plans] for plans in (ours, theirs)]
        return ["origin" if changes[0] == changes[1] else f"changes of {len(ours)} / {len(theirs)} plans"]
    if aspect == "weights":
        one, other = (load_file(run.path / "model.safetensors") for run in runs)
        if one.keys() != other.keys():
            return ["names"]
        shapes = [name for name in one if one[name].shape != other[name].shape]
        near = {"rtol": tolerance, "atol": tolerance}
        differ = [name for name in one if name not in shapes and not torch.allclose(one[name], other[name], **near)]
        largest = max((float((one[name].double() - other[name].double()).abs().max()) for name in differ), default=0.0)
        return [f"shapes {shapes[:3]}"] * bool(shapes) + [f"{len(differ)} of {len(one)}, by {largest:.1e}"] * bool(
            differ
        )
    return compare_rows(*(run.metrics() for run in runs), tolerance)


def same(one: object, other: object, tolerance: float) -> bool:
    """Whether two measurements are equal within a tolerance."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
    return one == other


def compare_rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Return how the measurements of two runs differ, kind by kind."""
    plain = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows] for rows in (ours, theirs)]
    if same(*plain, tolerance):
        return []
    differ = []
    for kind in dict.fromkeys(row["what"] for rows in plain for row in rows):
        one, other = ([row for row in rows if row["what"] == kind] for rows in plain)
        if len(one) != len(other):
            differ.append(f"{kind}: {len(one)} / {len(other)} rows")
        elif not same(one, other, tolerance):
            pairs = ((a, b, k) for a, b in zip(one, other, strict=True) for k in {*a, *b})
            fields = {k for a, b, k in pairs if not same(a.get(k), b.get(k), tolerance)}
            differ.append(f"{kind}: {', '.join(sorted(fields))}")
    return differ or ["order"]


def compare_results(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return how results of evaluations differ in what the second has."""
    differ = []
    for kind, rows in theirs.items():
        if not isinstance(rows, list):
            differ += [kind] if kind not in TIMES and rows != ours.get(kind) else []
            continue
        for one, other in zip(ours[kind], rows, strict=True):
            differ += [f"{kind}: {k}: {one.get(k)!r:.25} / {v!r:.25}" for k, v in other.items() if one.get(k) != v]
    return differ


@pytest.mark.parametrize(("name", "mode"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_modes(name: str, mode: str, work: Path) -> None:
    tolerance = SHARED_ROWS if mode == "two ranks" and name.split()[0] in ("learn", "search") else 0.0
    with chdir(work):
        command, other = run(name, "command"), run(name, mode)
        aspects = ASPECTS[-1:] if name.startswith("evaluate") else ASPECTS
        differ = {aspect: compare(aspect, command, other, tolerance) for aspect in aspects}
    known = {aspect for aspect in aspects if (name, mode, aspect) in FAILS}
    assert {aspect for aspect, found in differ.items() if found} == known, differ


@pytest.mark.parametrize(("name", "mode"), [cell for cell, words in MISSING.items() if words])
def test_a_mode_that_a_command_lacks_is_refused(
    name: str, mode: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "two ranks" in mode:
        for variable, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(variable, value)
    words = MISSING[name, mode]
    with chdir(work):
        assert run_command([*words, *(() if words[0] == "evaluate" else ("--out", "refused"))]) in (2, 4)
        assert not Path("refused").exists()
