"""Kinds of modules that other libraries make of plain ones: traced exactly, or refused in one line with a remedy."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat, quantize_dynamic
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from laws import masked_equals_shrunk, random_plan, smallest_plan
from regrow.core.plan import PlanError
from regrow.surgery import apply
from regrow.surgery.verify import verify
from regrow.tracing import TraceError, trace, with_branches

X = torch.randn(2, 4)


def mlp() -> nn.Sequential:
    """4 → 8 → 6 → 3."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def altered(change: Callable[[nn.Sequential], Any], run: bool = False) -> nn.Module:
    """The network after a change in place, or what the change makes of it; it may have run in training since."""
    model = mlp()
    made = change(model)
    model = made if isinstance(made, nn.Module) and made is not model[0] and made is not model[2] else model
    if run:
        model(X)
    return model.eval()


class Cache:
    """Holds what it is given."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}


class Keeps(nn.Module):
    """Stores activations in every place that a module has."""

    common: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
        self.recent: deque[Tensor] = deque(maxlen=2)
        self.every: list[Tensor] = []
        self.cache = Cache()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        """4 → 8 → 3."""
        self.runs += 1
        self.last = self.one(x).relu()
        self.register_buffer("seen", self.last.mean(0), persistent=False)
        self.recent.append(self.last)
        self.every.append(self.last)
        self.cache.rows["last"] = self.last
        self.cache.found = (self.last, [self.last])  # type: ignore[attr-defined]
        type(self).common = self.last
        return self.two(self.last)


def hooked() -> nn.Module:
    """Hooks that store what they see in a variable, that change what is computed, and that see gradients."""
    model, seen = mlp(), []
    model[1].register_forward_hook(lambda module, given, out: seen.append(out))
    model[2].register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    model[3].register_forward_hook(lambda module, given, out: out * 2)
    model[4].register_full_backward_hook(lambda *given: None)
    model.seen = seen  # type: ignore[assignment]
    return model


def patched() -> nn.Module:
    """A forward of one's own on an instance, as wrappers of other libraries set it."""
    model = mlp()

    def doubled(self: nn.Module, before: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return before(x) * 2

    model[2].forward = MethodType(partial(doubled, before=model[2].forward), model[2])  # type: ignore[method-assign]
    model[2].forward = partial(doubled, model[2], model[2].forward.__func__.keywords["before"])
    return model


def leaking() -> nn.Module:
    """It holds what an export elsewhere left behind."""
    model = mlp()
    with FakeTensorMode():
        model.last = torch.ones(3)  # type: ignore[assignment]
    return model


TRACED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "state on self": (Keeps, 1),
    "state on self, after a run": (lambda: (model := Keeps(), model(X))[0], 1),
    "old weight_norm": (lambda: altered(lambda m: weight_norm(m[0])), 2),
    "old weight_norm, after a run": (lambda: altered(lambda m: weight_norm(m[0]), run=True), 2),
    "old weight_norm of inputs": (lambda: altered(lambda m: weight_norm(m[2], dim=1)), 1),
    "old weight_norm of all": (lambda: altered(lambda m: weight_norm(m[0], dim=None)), 1),
    "new weight_norm": (lambda: altered(lambda m: parametrizations.weight_norm(m[0])), 2),
    "old spectral_norm": (lambda: altered(lambda m: spectral_norm(m[0]), run=True), 1),
    "new spectral_norm": (lambda: altered(lambda m: parametrizations.spectral_norm(m[0])), 1),
    "orthogonal": (lambda: altered(lambda m: parametrizations.orthogonal(m[0])), 1),
    "pruned entries": (lambda: altered(lambda m: prune.l1_unstructured(m[2], "weight", 0.5)), 2),
    "pruned rows": (lambda: altered(lambda m: prune.ln_structured(m[0], "weight", 0.5, 2, 0), run=True), 2),
    "pruned twice": (lambda: altered(lambda m: [prune.random_unstructured(m[2], "weight", 0.3) for _ in "ab"]), 2),
    "compiled": (lambda: altered(torch.compile), 2),
    "compiled inside": (lambda: altered(lambda m: m.__setitem__(0, torch.compile(m[0]))), 2),
    "compiled in place": (lambda: altered(lambda m: m.compile()), 2),
    "hooked": (hooked, 2),
    "patched": (patched, 2),
    "data parallel": (lambda: altered(nn.DataParallel), 2),
    "data parallel inside": (lambda: altered(lambda m: m.__setitem__(2, nn.DataParallel(m[2]))), 2),
    "holding a fake tensor": (leaking, 2),
    "averaged": (lambda: altered(torch.optim.swa_utils.AveragedModel), 2),
}
"""What is made → how to make it, and how many axes it has."""


@pytest.mark.parametrize("kind", TRACED)
def test_it_is_traced_and_cut_exactly(kind: str) -> None:
    """What hooks and parametrisations compute follows; the network that was cut answers what the masked one does."""
    make, free = TRACED[kind]
    model = make()
    before = held(model)
    axes = trace(model, X)
    assert len(axes.free()) == free, [(axis.key, axis.reason) for axis in axes]
    for plan in (smallest_plan(axes), random_plan(axes, torch.Generator().manual_seed(0))):
        masked_equals_shrunk(model, axes, plan)
    assert held(model) == before, "tracing and verifying leave what it holds as it was"
    narrow, _ = apply(model, axes, plan)
    assert held(model).keys() == before.keys()
    assert all(not isinstance(x, FakeTensor) or kind == "holding a fake tensor" for x in objects(narrow))
    weights = [x.weight for x in narrow.modules() if isinstance(x, nn.Linear)]
    assert all(one.shape[0] == two.shape[1] for one, two in pairwise(weights)), "hooks' too"
    narrow(X).sum().backward()


def held(model: nn.Module) -> dict[str, int]:
    """Path of a tensor that can be reached from a network → which it is."""
    return {path: id(x) for path, x in walked(model, "", set())}


def objects(model: nn.Module) -> list[Tensor]:
    """Every tensor that can be reached from a network."""
    return [x for _, x in walked(model, "", set())]


def walked(one: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Attributes, entries, classes and variables of functions, by a walk that shares nothing with ours."""
    if id(one) in seen or len(path) > 400:
        return
    seen.add(id(one))
    if isinstance(one, Tensor):
        yield path, one
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(one, dict):
        parts = [(f"[{key!r}]", value) for key, value in one.items()]
    elif isinstance(one, list | tuple | set | frozenset | deque):
        parts = [(f"[{i}]", value) for i, value in enumerate(one)]
    elif callable(one) and getattr(one, "__closure__", None):
        parts = [(f"<{i}>", cell.cell_contents) for i, cell in enumerate(one.__closure__)]
    elif hasattr(one, "__dict__") and not isinstance(one, type):
        parts = [(f".{name}", value) for name, value in vars(one).items()]
        if isinstance(one, Keeps):
            parts.append(("~", type(one).common))
    for step, part in parts:
        yield from walked(part, path + step, seen)


@lru_cache
def table(size: int) -> Tensor:
    """Computed once per size."""
    return torch.linspace(0, 1, size)


TABLES: dict[int, Tensor] = {}


class Cached(nn.Module):
    """Functions and the Python module that it is defined in keep what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """4 → 8 → 3."""
        if len(x) not in TABLES:
            TABLES[len(x)] = torch.arange(len(x)) * 0.5
        return self.two(self.one(x)) * TABLES[len(x)][:, None] + table(len(x))[:, None]


def test_what_functions_keep_is_not_left_to_later_runs() -> None:
    """A cached function and a dictionary of the Python module hold no tensors without numbers afterwards."""
    model = Cached()
    expected = model(X)
    table.cache_clear()
    TABLES.clear()
    axes = trace(model, X)
    assert verify(model, axes, random_plan(axes, torch.Generator().manual_seed(0))).ok
    assert not any(isinstance(x, FakeTensor) for x in TABLES.values())
    assert torch.equal(model(X), expected)


class Counts(nn.Module):
    """Writes into its buffer, draws numbers, and asks its data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("runs", torch.zeros(1))
        self.kept = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """4 → 8 → 3."""
        self.runs += 1
        self.kept[:] = self.two(self.one(x)) + torch.rand(()) * 0
        return self.kept * (2 if x.sum() > 100 else 1)


def test_entries_and_chance_are_as_they_were_after_a_real_run() -> None:
    """A network whose data decide runs on real tensors; nothing of that is seen afterwards."""
    model = Counts().eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    axes = trace(model, X)
    assert axes.recorded == "eager"
    with_branches(model, axes)
    assert torch.equal(torch.rand(2), expected)
    verify(model, axes, random_plan(axes, torch.Generator().manual_seed(0)))
    assert model.runs == 0 and not model.kept.any()


def test_a_network_that_fails_keeps_nothing_either() -> None:
    """Not when it is refused halfway."""

    class Fails(Keeps):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("out of order")

    model = Fails()
    before = held(model)
    with pytest.raises(TraceError, match="out of order"):
        trace(model, X)
    assert held(model) == before


class Later(nn.Module):
    """Makes a table at its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.table = nn.Linear(4, 8), nn.Linear(8, 3), None

    def forward(self, x: Tensor) -> Tensor:
        """4 → 8 → 3."""
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[0])[:, None]
        return self.two(self.one(x)) * self.table


@pytest.mark.parametrize("first", [False, True])
def test_a_table_made_at_the_first_run_is_none_of_the_trace(first: bool) -> None:
    """Traced before its first run or after it: what it does from then on counts, and the table is made by itself."""
    model = Later()
    if first:
        model(X)
    axes = trace(model, X)
    assert (model.table is None) != first
    assert [axis.key for axis in axes.free()] == ["one.weight:0"]
    model(X)
    apply(model, axes, random_plan(axes, torch.Generator().manual_seed(0)))


def quantised() -> nn.Module:
    """Weights of 8 bits, packed."""
    return quantize_dynamic(mlp(), {nn.Linear})


def preparing() -> nn.Module:
    """Quantisation simulated in training."""
    model = mlp().train()
    model.qconfig = get_default_qat_qconfig("x86")  # type: ignore[assignment]
    return prepare_qat(model)


def sharing() -> nn.Module:
    """Two parameters of one memory."""
    model = mlp()
    model[4].weight.data = model[2].weight.data.view(-1)[:18].view(3, 6)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantised": (quantised, r"^0 is a Linear: .*quantised"),
    "prepared": (preparing, r"weight_fake_quant is a .*convert it after the cut$"),
    "scripted": (lambda: torch.jit.script(mlp()), r"RecursiveScriptModule: scripted.*trace the plain module"),
    "traced by torch.jit": (lambda: torch.jit.trace(mlp(), X), r"TopLevelTracedModule: scripted"),
    "exported": (lambda: torch.export.export(mlp(), (X,)).module(), r"GraphModule: scripted, exported"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"^0.weight has no shape yet; run the model once"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_one_line(kind: str) -> None:
    """By name, with what to do instead."""
    make, message = REFUSED[kind]
    with pytest.raises(TraceError, match=message) as caught:
        trace(make(), X)
    assert "\n" not in str(caught.value)


class Fourier(nn.Module):
    """An operation that no rule reads."""

    def forward(self, x: Tensor) -> Tensor:
        """The real part of the Fourier transform."""
        return torch.fft.fft(x).real


FROZEN: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "old weight_norm": (lambda: altered(lambda m: weight_norm(m[2])), "0.weight:0", "_weight_norm"),
    "old spectral_norm": (lambda: altered(lambda m: spectral_norm(m[2])), "0.weight:0", "a spectral norm of 2 divides"),
    "new spectral_norm": (
        lambda: altered(lambda m: parametrizations.spectral_norm(m[2])),
        "0.weight:0",
        "a spectral norm of 2 divides",
    ),
    "no rule": (lambda: nn.Sequential(nn.Linear(4, 8), Fourier(), nn.Linear(8, 3)), "0.weight:0", "matters to fft_fft"),
    "shared memory": (sharing, "0.weight:0", ""),
    "shared memory, seen": (sharing, "2.weight:0", "it shares memory with "),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_what_cannot_be_cut_exactly_stays_and_says_what_to_remove(kind: str) -> None:
    """A norm over a weight's inputs would change with them."""
    make, key, reason = FROZEN[kind]
    axes = trace(make(), X)
    axis = next(axis for axis in axes if any(f"{slot.name}:{slot.dim}" == key for slot in axis.slots))
    assert not axis.free
    assert reason in axis.reason


class Scale(nn.Module):
    """Takes a scale of the width at its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(4, 8), nn.Linear(8, 3), None

    def forward(self, x: Tensor) -> Tensor:
        """4 → 8 → 3."""
        h = self.one(x).relu()
        if self.scale is None:
            self.scale = torch.tensor(h.shape[-1] ** -0.5)
        return self.two(h * self.scale)


def test_a_scale_of_the_width_that_a_first_run_takes_is_not_cut_before_it() -> None:
    """Cut before its first run it would take another scale; after it the scale stays as it is."""
    model = Scale()
    axes = trace(model, X)
    plan = random_plan(axes, torch.Generator().manual_seed(1))
    with pytest.raises(PlanError, match=r"is not known yet; run the network once on the example input$"):
        apply(model, axes, plan)
    model(X)
    masked_equals_shrunk(model, axes, plan)
    apply(model, axes, plan)
