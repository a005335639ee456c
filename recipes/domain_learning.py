"""SmolLM2-135M learns four text domains, one after the other: new neurons and blocks against LoRA, Laplace and replay.

    python recipes/domain_learning.py rates --texts FOLDER [--arm full lora]    three rates, one order, two domains
    python recipes/domain_learning.py main --texts FOLDER [--arm full lora]    the best rate, four domains, three orders
    python recipes/domain_learning.py main --show

100 steps of AdamW per domain on four windows of 128 tokens, from the calibration halves of news, code, manual and talk.
None is read more than twice, so talk, which has 62 windows, has 32 steps. Each domain is tested on 16 windows of 256
tokens of its evaluation half, and so is Wikipedia, which is never learned; ``rates`` measures on other windows.

``full`` trains all weights; ``replay`` puts one window of an earlier domain into a fifth of its steps; ``laplace``
guards what earlier domains learned by their Kronecker factors. What arms keep of earlier domains, beside the network,
is compressed to a quarter of its bytes. The others train 7 million weights a domain, and no old
ones: ``lora`` (merged after each domain), ``projected_lora`` (inputs are turned away from those of earlier domains, and
only outputs are trained), ``neurons`` (every MLP gains 136, in random directions), ``data_neurons`` (by data of the
domain, away from earlier inputs) and ``blocks`` (two copied decoder layers that add nothing at first, as in LLaMA-Pro).

``new``: nats per token on a domain right after it was learned. ``forgotten``: how much that rose by the end, mean over
all but the last domain. ``rates`` chooses by the mean loss on both domains at the end. A row is written per run.
"""

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import corpora
import torch
from harness import Row, add, arguments, rows, table
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regrow import Plan, apply, trace
from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import NEXT_TOKEN
from regrow.core.plan import Fill
from regrow.core.process_memory import return_memory
from regrow.core.tasks import Examples, Task
from regrow.data import Half, windows
from regrow.evaluation import perplexity
from regrow.nets import load
from regrow.nets.devices import autocasting, choose_precision
from regrow.nets.loaded import Loaded
from regrow.protection.factors import Factors, add_factors
from regrow.protection.guards import Guards, apply_guards, build_guards
from regrow.protection.low_rank import compress_factors, expand_factors
from regrow.surgery.new_units import new_units, split_entries
from regrow.training.hooks import copy_parameters
from regrow.training.learner import Context

OUT = Path(__file__).parent / "results" / "domain_learning.jsonl"
ORDERS = (("news", "code", "manual", "talk"), ("code", "talk", "news", "manual"), ("talk", "manual", "code", "news"))
OLD = "wiki"
BATCH, SEQ_LEN, RANK, NEURONS, BLOCKS = 4, 128, 23, 136, 2
GUARDED, EVERY, RIDGE = 64, 4, 15.0  # windows of a domain for factors, steps between guards, strength of projections
LIMIT = 0.25  # bytes of factors, or of moments of inputs, as a multiple of the network's
RIVALS = ("lora", "projected_lora")  # whom the others are compared with
KEYS = ("table", "arm", "rate", "order", "seed")


@dataclass
class Run:
    """The network, and what an arm carries from domain to domain."""

    loaded: Loaded
    model: Any
    axes: AxisGraph
    rate: float
    seed: int
    precision: str
    number: int = 0  # of the domain that is learned
    step: int = 0
    train: list[Tensor] = field(default_factory=list)  # its batches, ``[BATCH, SEQ_LEN]`` each
    seen: list[Tensor] = field(default_factory=list)  # batches of earlier domains
    trained: dict[str, Tensor | None] = field(default_factory=dict)  # name → which entries are trained; `None`: all
    hooks: list[RemovableHandle] = field(default_factory=list)  # of changes of low rank
    moments: Factors = field(default_factory=dict)  # ``LAYER inputs``: Σ x xᵀ of earlier domains
    factors: Factors = field(default_factory=dict)
    guards: Guards = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the decoder by name."""
        return {name: m for name, m in self.model.model.named_modules() if isinstance(m, nn.Linear)}

    def compress(self, factors: Factors) -> Factors:
        """Return factors in as many bytes as an arm may keep."""
        return compress_factors(factors, LIMIT * sum(p.nbytes for p in self.model.parameters()))

    def random(self) -> torch.Generator:
        """Return the random stream of the present domain."""
        return torch.Generator().manual_seed(100 * self.seed + self.number)


def train_all(run: Run) -> None:
    """Train every parameter."""
    run.trained = dict.fromkeys(dict(run.model.named_parameters()))


@torch.no_grad()
def read_moments(run: Run, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """Return Σ x xᵀ of the inputs of linear layers on the present domain, divided by its mean diagonal.

    ``ends``: the ends of their names.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add_products(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False):  # else the product is in bfloat16
                found[name] = found.get(name, 0) + x.T @ x

        return add_products

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in run.layers.items() if name.endswith(ends)]
    with autocasting(run.model, run.precision):
        for batch in run.train[: GUARDED // BATCH]:
            run.model(batch)
    for hook in hooks:
        hook.remove()
    return {name: total / total.diagonal().mean() for name, total in found.items()}


def add_moments(run: Run, ends: tuple[str, ...] = ("",)) -> None:
    """Count the inputs of a domain that was learned, of the layers that an arm projects."""
    moments = expand_factors(run.moments)
    for key, total in ((f"{name} inputs", total) for name, total in read_moments(run, ends).items()):
        before = moments.get(key)
        moments[key] = AxisTensor(total if before is None else before.values + total, tuple(total.shape))
    run.moments = run.compress(moments)


def project(run: Run, name: str, directions: Tensor) -> Tensor:
    """Return directions, ``[n, inputs]``, turned away from earlier inputs: (1 + s A)⁻¹ x, of length 1."""
    own = expand_factors({key: kept for key, kept in run.moments.items() if key.startswith(f"{name} ")})
    for kept in own.values():
        moments = kept.values / run.number
        directions = torch.linalg.solve(torch.eye(len(moments)) + RIDGE * moments, directions.T).T
    return directions / directions.norm(dim=1, keepdim=True)


class LowRank(nn.Module):
    """A change of a linear layer's output by B A x, with B = 0 at first."""

    def __init__(self, inputs: Tensor, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Parameter(inputs), nn.Parameter(torch.zeros(outputs, len(inputs)))

    def forward(self, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the changed output."""
        return output + given[0] @ self.inputs.T @ self.outputs.T


def add_lora(run: Run, *, projected: bool = False) -> None:
    """Give every linear layer of the decoder a change of low rank; projected: as many weights, all of outputs."""
    random = run.random()
    for name, layer in run.layers.items():
        rank = round(RANK * (layer.in_features + layer.out_features) / layer.out_features) if projected else RANK
        inputs = torch.randn(rank, layer.in_features, generator=random)
        inputs = project(run, name, inputs) if projected else inputs / layer.in_features**0.5
        layer.low_rank = LowRank(inputs, layer.out_features)
        run.hooks.append(layer.register_forward_hook(layer.low_rank))
    kinds = ("low_rank.outputs",) if projected else ("low_rank.inputs", "low_rank.outputs")
    run.trained = dict.fromkeys(name for name, _ in run.model.named_parameters() if name.endswith(kinds))


@torch.no_grad()
def merge_lora(run: Run) -> None:
    """Add the change of every layer to its weight."""
    while run.hooks:
        run.hooks.pop().remove()
    for layer in run.layers.values():
        layer.weight += layer.low_rank.outputs @ layer.low_rank.inputs
        del layer.low_rank


@torch.no_grad()
def add_neurons(run: Run, *, by_data: bool = False) -> None:
    """Widen every MLP by neurons whose outgoing weights are 0, and train these alone."""
    keys = [axis.key for axis in run.axes.units() if "mlp" in axis.key and axis.key.endswith(":0")]
    plan = Plan.growing(run.axes, dict.fromkeys(keys, NEURONS), Fill("zero_out", seed=100 * run.seed + run.number))
    run.model, run.axes = apply(run.model, run.axes, plan)
    incoming, outgoing = split_entries(run.model, run.axes, new_units(run.model, run.axes, plan))
    parameters, random, inputs = dict(run.model.named_parameters()), run.random(), dict[str, Tensor]()
    if by_data:
        inputs = read_rows(run)
    run.trained = {}
    for entries in (*incoming, *outgoing):
        mask = run.trained.setdefault(entries.name, torch.zeros_like(parameters[entries.name]))
        assert mask is not None
        mask.index_fill_(entries.dim, torch.tensor(entries.where), 1.0)
        layer = entries.name.removeprefix("model.").removesuffix(".weight")
        if layer in inputs and entries.dim == 0:
            old = parameters[entries.name][list(entries.old)].norm(dim=1).mean()
            pairs = torch.randperm(len(inputs[layer]), generator=random)[: 2 * len(entries.where)]
            first, second = inputs[layer][pairs].chunk(2)
            entries.set(run.model, old * project(run, layer, first - second))


@torch.no_grad()
def read_rows(run: Run) -> dict[str, Tensor]:
    """Return what the MLPs' first layers read of a batch of the present domain, ``[tokens, inputs]``."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs: found.update({name: inputs[0].flatten(0, -2).float()})

    layers = {name: layer for name, layer in run.layers.items() if name.endswith(FIRST)}
    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with autocasting(run.model, run.precision):
        run.model(run.train[0])
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def add_blocks(run: Run) -> None:
    """Insert copies of decoder layers that add nothing at first, evenly spaced, and train these alone."""
    old, every = [*run.model.model.layers], len(run.model.model.layers) // BLOCKS
    new, layers = [], []
    for i, layer in enumerate(old):
        layers.append(layer)
        if (i + 1) % every == 0 and len(new) < BLOCKS:
            new.append(copy.deepcopy(layer))
            for linear in (new[-1].self_attn.o_proj, new[-1].mlp.down_proj):
                linear.weight.zero_()
            layers.append(new[-1])
    run.model.model.layers = nn.ModuleList(layers)
    run.model.config.num_hidden_layers = len(layers)
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    own = {id(p) for layer in new for p in layer.parameters()}
    run.trained = dict.fromkeys(name for name, p in run.model.named_parameters() if id(p) in own)


def guard(run: Run) -> None:
    """Train every parameter, and guard what earlier domains learned."""
    train_all(run)
    if run.factors:
        context = describe(run, run.number)
        run.guards = build_guards(expand_factors(run.factors), context, copy_parameters(context), 0.1)
        return_memory()


def count_factors(run: Run) -> None:
    """Add the factors of a domain that was learned."""
    run.guards = {}
    factors = add_factors(expand_factors(run.factors), describe(run, run.number), GUARDED)
    run.factors = run.compress(factors)
    return_memory()


def describe(run: Run, number: int) -> Context:
    """Return the network and its present domain, after ``number`` others."""
    ids = torch.cat(run.train)
    task = Task("", Examples(ids, ids), Examples(ids, ids), (0,))
    return Context(run.model, run.axes, task, number, seed=run.seed, objective=NEXT_TOKEN)


def shrink(run: Run, strength: float = 0.5, gate: float = 2.0) -> None:
    """Apply the guards to the change of some steps."""
    if run.guards and run.step % EVERY == 0:
        apply_guards(run.guards, run.model, pull=run.rate * EVERY * strength, gate=gate)


def mix_in(run: Run, batch: Tensor) -> Tensor:
    """Return a batch in which an earlier domain has a window in a fifth of the steps: 5 % of all tokens."""
    if not run.seen or run.step % 5:
        return batch
    random = torch.Generator().manual_seed(1000 * run.seed + 500 * run.number + run.step)
    other = run.seen[int(torch.randint(len(run.seen), (), generator=random))]
    return torch.cat([batch[:-1], other[:1]])


def leave(run: Run) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Arm:
    """How an arm begins and ends a domain, and what it does after each step and with each batch."""

    rates: tuple[float, ...]
    begin: Callable[[Run], None]
    end: Callable[[Run], None] = leave
    after_step: Callable[[Run], None] = leave
    batch: Callable[[Run, Tensor], Tensor] = lambda run, batch: batch


def _end_projected(run: Run) -> None:
    merge_lora(run)
    add_moments(run)


FIRST = ("gate_proj", "up_proj")  # the first layers of an MLP
ALL, FEW, NEW, FAST = (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
ARMS: Mapping[str, Arm] = {
    "full": Arm(ALL, train_all),
    "replay": Arm(ALL, train_all, batch=mix_in),
    "laplace": Arm(ALL, guard, count_factors, shrink),
    "lora": Arm(FEW, add_lora, merge_lora),
    "projected_lora": Arm(FEW, lambda run: add_lora(run, projected=True), _end_projected),
    "neurons": Arm(NEW, add_neurons),
    "data_neurons": Arm(FAST, lambda run: add_neurons(run, by_data=True), lambda run: add_moments(run, FIRST)),
    "blocks": Arm(ALL, add_blocks),
}


def learn(run: Run, arm: Arm, batches: list[Tensor], steps: int) -> int:
    """Learn a domain in place; return the number of trained weights."""
    run.train = batches
    arm.begin(run)
    parameters = dict(run.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in run.trained)
    own = [parameters[name] for name in run.trained]
    optimizer = torch.optim.AdamW(own, lr=run.rate, weight_decay=0.0)
    masks = [(parameters[name], mask) for name, mask in run.trained.items() if mask is not None]
    for run.step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * min(1.0, run.step / 10)
        ids = arm.batch(run, batches[(run.step - 1) % len(batches)])
        with autocasting(run.model, run.precision):
            loss = run.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        for parameter, mask in masks:
            assert parameter.grad is not None
            parameter.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        arm.after_step(run)
        if run.step % 25 == 0:
            print(f"  step {run.step}: {float(loss.detach()):.3f}", flush=True)
    counts = [mask.sum() if mask is not None else parameters[name].numel() for name, mask in run.trained.items()]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    del optimizer, own, masks
    arm.end(run)
    run.seen += batches[:: max(1, len(batches) // 20)]
    run.number += 1
    return int(sum(counts))


def compute(args: Namespace, point: Row, texts: Mapping[str, Any], loaded: Loaded) -> Row:
    """Return the row of a run: losses on all domains before, and after each one."""
    model, start = copy.deepcopy(loaded.model), time.perf_counter()
    axes = trace(model, *loaded.example.args, **loaded.example.kwargs)
    run = Run(loaded, model, axes, point["rate"], point["seed"], choose_precision(model))
    order = ORDERS[point["order"]][: 2 if point["table"] == "rates" else 4]
    options: dict[str, Any] = {"seq_len": 256, "n": 32, "half": Half.EVALUATION, "batch_size": 8}
    part = slice(2, None) if point["table"] == "rates" else slice(2)  # validation, test
    sources = {name: windows(texts[name](), loaded.tokenizer, **options) for name in (*order, OLD)}
    tests = {name: replace(source, batches=source.batches[part]) for name, source in sources.items()}

    def measure() -> dict[str, float]:
        with autocasting(run.model, run.precision), torch.no_grad():
            return {name: round(perplexity(run.model, test).mean, 4) for name, test in tests.items()}

    losses, trained = [measure()], 0
    for name in order:
        source = windows(
            texts[name](), loaded.tokenizer, n=args.steps * BATCH, seq_len=SEQ_LEN, seed=point["seed"], batch_size=BATCH
        )
        batches = [batch.args[0] for batch in source]
        trained = learn(run, ARMS[point["arm"]], batches, min(args.steps, 2 * len(batches)))
        losses.append(measure())
        print(f"{point['arm']}, rate {point['rate']}, {name}: {losses[-1]}", flush=True)
    size = sum(p.numel() for p in run.model.parameters())
    row = {"losses": losses, "trained": trained, "parameters": size, "precision": run.precision}
    replayed = sum(batch.nbytes for batch in run.seen) if point["arm"] == "replay" else 0
    row["kept"] = replayed + sum(one.values.nbytes for one in (*run.factors.values(), *run.moments.values()))
    return {**point, **row, "seconds": round(time.perf_counter() - start)}


def points(args: Namespace) -> Iterator[Row]:
    """Yield what is to be computed."""
    known = rows(args.out)
    for name, order, seed in product(args.arm, (0,) if args.table == "rates" else args.order, args.seeds):
        rates = ARMS[name].rates if args.table == "rates" else [best_rate(known, name)]
        for rate in rates:
            yield dict(zip(KEYS, (args.table, name, rate, order, seed), strict=True))


def best_rate(known: list[Row], arm: str) -> float:
    """Return the rate with the least mean loss on both domains at the end."""
    own = [row for row in known if row["table"] == "rates" and row["arm"] == arm]
    if len(own) < len(ARMS[arm].rates):
        raise SystemExit(f"{arm} has {len(own)} of {len(ARMS[arm].rates)} rates; run rates first")
    rate: float = min(own, key=lambda row: fmean(row["losses"][-1][name] for name in ORDERS[0][:2]))["rate"]
    return rate


def summarise(row: Row) -> tuple[float, float, float, float]:
    """Return nats: of new domains, forgotten, of all learned domains at the end, and Wikipedia's change."""
    losses, names = row["losses"], ORDERS[row["order"]][: len(row["losses"]) - 1]
    new = [losses[i + 1][name] for i, name in enumerate(names)]
    forgotten = [losses[-1][name] - new[i] for i, name in enumerate(names[:-1])]
    final = fmean(losses[-1][name] for name in names)
    return fmean(new), fmean(forgotten), final, losses[-1][OLD] - losses[0][OLD]


def interpolate(points: list[tuple[float, ...]], forgotten: float) -> float | None:
    """Return the loss of new domains at some forgetting, on straight lines between rates; outside of these `None`.

    Rates that forget more than another one and learn less are left out.
    """
    curve = list[tuple[float, float]]()
    for point in sorted((point[1], point[0]) for point in points):
        if not curve or point[1] < curve[-1][1]:
            curve.append(point)
    for (before, high), (after, low) in pairwise(curve):
        if before <= forgotten <= after:
            return high + (low - high) * (forgotten - before) / (after - before)
    return None


def show(args: Namespace) -> Iterator[str]:
    """Yield a table: mean and standard deviation over orders; last, what the arm's new domains lose to LoRA's.

    ``rates`` compares at equal forgetting, ``main`` order by order, at the chosen rates.
    """
    own = [row for row in rows(args.out) if row["table"] == args.table]
    runs: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(own, key=lambda row: ([*ARMS].index(row["arm"]), row["rate"], row["order"])):
        runs.setdefault((row["arm"], row["rate"]), []).append(row)
    lines = []
    for (arm, rate), same in runs.items():
        found = [*map(summarise, same)]
        cells = [spread_of(values) for values in zip(*found, strict=True)]
        for rival in RIVALS:
            others = [row for row in own if row["arm"] == rival != arm]
            if args.table == "rates":
                level = interpolate([*map(summarise, others)], found[0][1])
                gaps = [] if level is None else [found[0][0] - level]
            else:
                there = {row["order"]: summarise(row)[0] for row in others}
                gaps = [
                    one[0] - there[row["order"]] for one, row in zip(found, same, strict=True) if row["order"] in there
                ]
            cells.append(spread_of(gaps, sign="+"))
        sizes = [f"{same[-1][key] / 1e6:.1f}" for key in ("trained", "parameters")]
        sizes.append(f"{max(row['kept'] / row['parameters'] / 4 for row in same):.0%}")
        lines.append([arm, rate, len(same), *cells, *sizes, round(fmean(row["seconds"] for row in same))])
    columns = [
        "arm",
        "rate",
        "runs",
        "new",
        "forgotten",
        "all at the end",
        "Wikipedia",
        *(f"to {one}" for one in RIVALS),
    ]
    yield from table([*columns, "trained, M", "size, M", "kept", "s"], lines)


def spread_of(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard deviation as text; of no values, a dash."""
    if not values:
        return "–"
    return f"{fmean(values):{sign}.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    """Compute, or print the table."""
    which: dict[str, Any] = {"arm": tuple(ARMS), "order": [0, 1, 2], "seeds": [0], "steps": 100}
    args = arguments(__doc__, OUT, {"table": ("rates", "main")}, texts=Path("texts"), **which)
    if args.show:
        print(*show(args), sep="\n")
        return
    loaded, texts = load("smollm2-135m"), corpora.texts(args.texts)
    loaded.model.set_attn_implementation("eager")  # twice as fast as fused attention on short windows on a CPU
    for point in points(args):
        if not any(all(row[key] == point[key] for key in KEYS) for row in rows(args.out)):
            add(args.out, compute(args, point, texts, loaded))
            return_memory()


if __name__ == "__main__":
    main()
