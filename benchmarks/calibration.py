"""Calibration through the command line, beside plain forward passes and the published procedures of FLAP and Wanda-sp.

    python benchmarks/calibration.py                     # SmolLM2-135M, bfloat16 and float32; about 7 minutes when idle
    python benchmarks/calibration.py --dtype bfloat16

All in turns in one process, in CPU seconds on one thread, on the same windows in the same precision: the stage
"calibrate" of ``regrow prune --method flap`` (digest of the data and storing of the statistics included); the whole
network's forward pass, at the batch size at which that is fastest, which ``--batch-size`` takes too; and the published
procedures. The forward pass without the head is what calibration would take if its statistics cost nothing; what the
published procedures take, divided by that, is the most by which calibration can be faster than they are. They run each
layer twice, so it is 2 where one window at a time is as fast as several, and more by what their statistics cost. They
are written here from the papers' description: layer by layer, every window passes through the layer once with hooks on
the inputs of its projections, which sum in float32, and once more for the inputs of the next layer; one window at a
time.
A ratio is the median over rounds of the ratios within a round. Rows go to
benchmarks/results/calibration.jsonl.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from shared import Row, add, arguments
from torch import Tensor, nn

from regrow import data
from regrow.core.sources import Batch
from regrow.data.batch_streams import join_batches
from regrow.jobs import prune
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.recording import ActiveRun, Invocation
from regrow.settings.prune import Settings
from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "calibration.jsonl"
MODEL, SEQ = "smollm2-135m", 256
TOKENS = {"bfloat16": 8192, "float32": 2048}
SIZES = (1, 2, 4, 8, 16)
BARE = "plain, without the head"
RATIOS = {
    "regrow_over_plain": ("regrow", "plain"),
    "one_window_over_plain": ("regrow, one window at a time", "plain"),
    "regrow_over_plain_without_head": ("regrow", BARE),
    "flap_over_plain_without_head": ("FLAP as published", BARE),
    "wanda_sp_over_plain_without_head": ("Wanda-sp as published", BARE),
    "flap_over_regrow": ("FLAP as published", "regrow"),
    "wanda_sp_over_regrow": ("Wanda-sp as published", "regrow"),
}
"""Field of a row → what is divided by what."""


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def plain(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Run all batches."""
    with torch.no_grad():
        for batch in batches:
            model(*batch.args, **batch.kwargs)


def planned(dtype: str, batch_size: int) -> tuple[float, float]:
    """CPU seconds of the stages "calibrate" and "plan" of ``regrow prune --method flap``."""
    seconds, true_stage = {"calibrate": 0.0, "plan": 0.0}, ActiveRun.stage

    @contextmanager
    def stage(clock: ActiveRun, name: str) -> Iterator[None]:
        start = time.process_time()
        with true_stage(clock, name):
            yield
        seconds[name] = seconds.get(name, 0) + time.process_time() - start
        if name == "plan":
            raise InterruptedError

    ActiveRun.stage = stage  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as place, suppress(InterruptedError):
            settings = Settings(
                MODEL, "flap", keep=0.7, sources=("news",), tokens=TOKENS[dtype], seq_len=SEQ, eval_tokens=SEQ,
                dtype=dtype, undo=False, batch_size=batch_size,
            )  # fmt: skip
            prune.run(settings, Invocation(Path(place) / "flap"))
    finally:
        ActiveRun.stage = true_stage  # type: ignore[method-assign]
    return seconds["calibrate"], seconds["plan"]


class Fluctuation:
    """FLAP's statistics of a layer's input: running mean and variance of each channel, in float32."""

    def __init__(self) -> None:
        self.count, self.mean, self.spread = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add one window, ``[channels, tokens]``."""
        old, self.count = self.mean, self.count + 1
        self.mean = old * ((self.count - 1) / self.count) + rows.mean(1) / self.count
        if self.count > 1:
            moved = (rows - self.mean.unsqueeze(1)) * (rows - old.unsqueeze(1))
            self.spread = self.spread * ((self.count - 2) / (self.count - 1)) + moved.sum(1) / (self.count - 1)


class Norm:
    """Wanda-sp's statistics of a layer's input: the squared norm of each channel, in float32."""

    def __init__(self) -> None:
        self.count, self.square = 0, torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add one window, ``[channels, tokens]``."""
        self.count += 1
        self.square = self.square * ((self.count - 1) / self.count) + rows.norm(p=2, dim=1) ** 2 / self.count


def published(model: Any, batches: Sequence[Batch], kind: type[Fluctuation] | type[Norm]) -> None:
    """Measure layer by layer, each window twice: with hooks, and for the inputs of the next layer."""
    layers, inputs, layer_kwargs = model.model.layers, [], {}

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        layer_kwargs.update(kwargs)
        raise InterruptedError

    def watch(layer: nn.Module, name: str) -> Any:
        sums = kind()
        return layer.get_submodule(name).register_forward_hook(
            lambda module, args, out: sums.add(args[0].reshape(-1, args[0].shape[-1]).T.float())
        )

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            with suppress(InterruptedError):
                model(*batch.args, **batch.kwargs)
        handle.remove()
        for layer in layers:
            hooks = [watch(layer, name) for name in ("self_attn.o_proj", "mlp.down_proj")]
            for x in inputs:
                layer(x, **layer_kwargs)
            for hook in hooks:
                hook.remove()
            inputs = [first(layer(x, **layer_kwargs)) for x in inputs]


def first(value: Any) -> Tensor:
    """The hidden states in what a layer returns."""
    return value if isinstance(value, Tensor) else value[0]


def measure(dtype: str, rounds: int) -> Row:
    """Measure in one precision and return the row."""
    loaded = load_model(ModelSpec(MODEL, dtype, "cpu", "", ()), lambda done, total, what: None, "")
    windows = data.windows(data.text("news"), loaded.tokenizer, n=TOKENS[dtype] // SEQ, seq_len=SEQ)
    joined = {size: list(join_batches(windows, size)) for size in SIZES if size <= len(windows)}
    model, trunk = loaded.model, loaded.model.get_submodule("model")
    plain(model, joined[1][:1])
    first_round = {size: cpu(lambda batches=batches: plain(model, batches)) for size, batches in joined.items()}
    best = min(first_round, key=lambda size: first_round[size])
    seconds: dict[str, list[float]] = {}

    def timed(name: str, size: int) -> float:
        calibration, plan = planned(dtype, size)
        seconds.setdefault(name, []).append(calibration + plan)
        return calibration

    for _ in range(rounds):
        for name, work in {
            "plain": lambda: cpu(lambda: plain(model, joined[best])),
            BARE: lambda: cpu(lambda: plain(trunk, joined[best])),
            "regrow": lambda: timed("plan", best),
            "regrow, one window at a time": lambda: timed("plan, one window at a time", 1),
            "plain, one window at a time": lambda: cpu(lambda: plain(model, joined[1])),
            "FLAP as published": lambda: cpu(lambda: published(model, joined[1], Fluctuation)),
            "Wanda-sp as published": lambda: cpu(lambda: published(model, joined[1], Norm)),
        }.items():
            seconds.setdefault(name, []).append(work())
            print(dtype, name, round(seconds[name][-1], 3), flush=True)

    def ratio(above: str, below: str) -> dict[str, float]:
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        return {name: round(f(ratios), 3) for name, f in (("median", statistics.median), ("low", min), ("high", max))}

    row = {"model": MODEL, "dtype": dtype, "tokens": TOKENS[dtype], "seq_len": SEQ, "batch_size": best}
    row["plain_by_batch_size"] = {size: round(value, 3) for size, value in first_round.items()}
    row |= {name: ratio(*pair) for name, pair in RATIOS.items()}
    return row | {"cpu_seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()}}


def main() -> None:
    """Measure and append the rows."""
    args = arguments(__doc__, dtype=(*TOKENS,), rounds=3)
    torch.set_num_threads(1)
    for dtype in args.dtype:
        row = measure(dtype, args.rounds) | {"versions": versions(), "threads": 1, "processor": platform.machine()}
        print(json.dumps(add(OUT, row), indent=1))


if __name__ == "__main__":
    main()
