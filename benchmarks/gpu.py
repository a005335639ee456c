"""A check of a real card: every function on the device against the CPU, and time, memory and waits of a large run.

    python benchmarks/gpu.py --device cuda >> benchmarks/results/gpu.jsonl    # a random Llama of 8B, 16 GB
    python benchmarks/gpu.py --device cpu --small                              # anywhere, in a minute

One JSON line per finding; a function that fails is a finding too.
"""

import copy
import platform
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from shared import arguments, tell, today
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import regrow
from regrow.core.scores import Need
from regrow.core.sources import Batch, Source
from regrow.methods import LEARNERS, METHODS, RECOVERIES
from regrow.nets.devices import choose_device
from regrow.scoring.collect import collect

SMALL, LARGE = (64, 192, 4, 4, 512), (4096, 14336, 32, 32, 128256)
"""Width, hidden neurons, layers, heads and vocabulary."""
QUICK = {"gprune": {"steps": 2, "every": 2, "shards": 2}, "lora": {"passes": 1}, "distil": {"passes": 1}}


def main() -> None:
    """Run all checks on the device that is named."""
    args = arguments(__doc__, device="auto", small=False)
    device = choose_device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    tell({"step": "card", "device": str(device), "card": card, "torch": torch.__version__, "date": today()})
    check_functions(device)
    measure_run(device, SMALL if args.small else LARGE)


@contextmanager
def step(name: str, device: torch.device, **more: Any) -> Iterator[dict[str, Any]]:
    """Report the seconds, the peak memory and the failure of what is done inside."""
    cuda, row = device.type == "cuda", {"step": name, **more}
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        yield row
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "regrow" in frame.filename]
        places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames[-2:]]
        row |= {"failed": type(error).__name__, "why": str(error)[:200], "at": places}
    if cuda:
        torch.cuda.synchronize(device)
        row["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    tell({**row, "seconds": round(time.perf_counter() - start, 2)})


def check_functions(device: torch.device) -> None:
    """Run every function on the device, and compare the units that stay with those of the CPU."""
    sources = [text(SMALL[-1], 4, 32, seed) for seed in range(3)]
    for method in METHODS:
        with step("prune", device, method=method) as row:
            plans = []
            for place in (torch.device("cpu"), device):
                model = llama(SMALL, place, torch.float32)
                more = {"method": method, "keep": 0.7, "settings": QUICK.get(method)}
                plans.append(regrow.prune(model, sources, **more)[1])
            same = [len({*one.keep} & {*plans[1].changes[key].keep}) for key, one in plans[0].changes.items()]
            row["same_units"] = sum(same) / sum(len(one.keep) for one in plans[0].changes.values())
    dense = llama(SMALL, device, torch.float32)
    axes = regrow.trace(dense, input_ids=tokens(SMALL[-1], 16).to(device))
    small, plan = regrow.prune(copy.deepcopy(dense), sources[:1], method="flap", keep=0.7)
    with step("verify", device) as row:
        row["ok"] = regrow.verify(dense, axes, plan).ok
    for by in RECOVERIES:
        with step("recover", device, by=by):
            regrow.recover(copy.deepcopy(small), dense, plan, sources[:1], by=by, settings=QUICK.get(by))
    with step("evaluate", device) as row:
        row["loss"] = regrow.evaluate(small, sources[:1])["text 0"].loss
    with step("grow", device):
        regrow.grow(copy.deepcopy(dense), mlp="+25%", example={"input_ids": tokens(SMALL[-1], 16)})
    inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    tasks = [(inputs, (inputs[:, i] > 0).long()) for i in (0, 1)]
    for method in LEARNERS:
        for precision in ("float32", "bfloat16"):
            with step("learn", device, method=method, precision=precision) as row:
                net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
                learned = regrow.learn(net, tasks, method=method, epochs=2, device=device, precision=precision)
                row["average"] = learned.scores.average


def measure_run(device: torch.device, shape: tuple[int, ...]) -> None:
    """Measure a pruning run stage by stage in bfloat16."""
    source = text(shape[-1], 8, 512 if shape is LARGE else 128, 0)
    with step("build", device) as row:
        model = llama(shape, device, torch.bfloat16)
        row["parameters"] = sum(one.numel() for one in model.parameters())
    with step("trace", device):
        axes = regrow.trace(model, input_ids=tokens(shape[-1], 16).to(device))

    def run_plain() -> None:
        with torch.no_grad():
            for batch in source:
                model.model(**batch.to(device).kwargs)

    def measure() -> None:
        collect(model, axes, [source], {Need.ACTIVATIONS})

    for name, run in (("plain passes", run_plain), ("measuring passes", measure)):
        run()
        with step(name, device):
            for _ in range(3):
                run()
    if device.type == "cuda":
        with step("waits of a measuring pass", device) as row, warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            measure()
            torch.cuda.set_sync_debug_mode("default")
            row["waits"] = len(waits)
    with step("prune", device, method="flap"):
        regrow.prune(model, source, method="flap", axes=axes, keep=0.8, only=("mlp",))


def llama(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a Llama with random weights."""
    width, hidden, layers, heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    if shape is not LARGE:
        return LlamaForCausalLM(config).to(device, dtype).eval()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary.to(device)
    return model.eval()


def tokens(vocabulary: int, n: int, seed: int = 1) -> torch.Tensor:
    """Return random tokens ``[1, n]``."""
    return torch.randint(0, vocabulary, (1, n), generator=torch.Generator().manual_seed(seed))


def text(vocabulary: int, batches: int, n: int, seed: int) -> Source:
    """Return random text with its labels."""
    rows = [tokens(vocabulary, n + 1, 100 * seed + i) for i in range(batches)]
    inputs = [{"input_ids": row[:, :-1], "use_cache": False} for row in rows]
    return Source(f"text {seed}", [Batch((), one, row[:, 1:]) for one, row in zip(inputs, rows, strict=True)])


if __name__ == "__main__":
    main()
