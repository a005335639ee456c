"""The proof on every change: what ``apply`` refuses, with the line that does it, and what it checks in float64."""

import copy
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laws
from regrow.core.axes import AxisGraph
from regrow.core.plan import Fill, Plan, PlanError
from regrow.surgery import UndoStore, apply, compensate
from regrow.surgery.carry import ProposedChange, prepare
from regrow.surgery.proof import _Pair, select_blocks
from regrow.tracing import trace
from store.saved import small
from zoo import Wired, randomise, trace_zoo

KEY = "a.weight:0"


def branch_on_a_factor(m: Any, h: Tensor) -> Tensor:
    return h * (2.0 if h.shape[-1] >= 12 else 1.0)


def least_of_width_and_number(m: Any, h: Tensor) -> Tensor:
    return h * min(h.shape[-1], 8)


def branch_on_a_weight(m: Any, h: Tensor) -> Tensor:
    if m.a.weight.shape[0] > 6:
        h = h.sigmoid()
    return h


def factor_by_a_weight(m: Any, h: Tensor) -> Tensor:
    return h * (2.0 if m.a.weight.shape[0] > 6 else 1.0)


def largest_of_width_and_number(m: Any, h: Tensor) -> Tensor:
    return h / max(h.shape[-1], 12)


def width_divided_without_rest(m: Any, h: Tensor) -> Tensor:
    return h * (h.shape[-1] // 10)


def loop_over_a_share_of_the_width(m: Any, h: Tensor) -> Tensor:
    for _ in range(-(-h.shape[-1] // 8)):
        h = h.sigmoid()
    return h


def table_by_size(m: Any, h: Tensor) -> Tensor:
    return h + (0.5, 1.0)[h.shape[-1] > 10]


def slice_of_a_constant(m: Any, h: Tensor) -> Tensor:
    return h * m.table[h.shape[-1] // 10 : h.shape[-1] // 10 + 1]


def one_of_two_values(m: Any, h: Tensor) -> Tensor:
    one, other = h.sigmoid(), h.tanh()
    return one if h.shape[-1] > 10 else other


def one_of_two_parameters(m: Any, h: Tensor) -> Tensor:
    return h * m.scales[h.shape[-1] // 10]


def word_by_size(m: Any, h: Tensor) -> Tensor:
    return nn.functional.gelu(h, approximate="tanh" if h.shape[-1] > 10 else "none")


def shift_of_rows(m: Any, h: Tensor) -> Tensor:
    return h + h.roll(h.shape[-1] // 10, 0)


def numbers_that_start_at_a_size(m: Any, h: Tensor) -> Tensor:
    return h + torch.arange(h.shape[-1] // 10, h.shape[-1] // 10 + 3)[:, None]


def tensor_of_a_size(m: Any, h: Tensor) -> Tensor:
    return h * torch.tensor(min(h.shape[-1], 12))


def whole_number_filled_in(m: Any, h: Tensor) -> Tensor:
    return h * torch.full((1,), h.shape[-1] // 10)


def mean_without_a_fold(m: Any, h: Tensor) -> Tensor:
    return h * (1 / h.shape[-1])


SIZED: Mapping[Callable[[Any, Tensor], Tensor], str] = {
    branch_on_a_factor: "return h * (2.0 if h.shape[-1] >= 12 else 1.0)",
    least_of_width_and_number: "return h * min(h.shape[-1], 8)",
    branch_on_a_weight: "m.b(wire(m, m.a(x).relu()))",  # what runs instead of the branch
    factor_by_a_weight: "return h * (2.0 if m.a.weight.shape[0] > 6 else 1.0)",
    largest_of_width_and_number: "return h / max(h.shape[-1], 12)",
    width_divided_without_rest: "return h * (h.shape[-1] // 10)",
    loop_over_a_share_of_the_width: "m.b(wire(m, m.a(x).relu()))",  # what runs instead of the next turn
    table_by_size: "return h + (0.5, 1.0)[h.shape[-1] > 10]",
    slice_of_a_constant: "return h * m.table[h.shape[-1] // 10 : h.shape[-1] // 10 + 1]",
    one_of_two_values: "m.b(wire(m, m.a(x).relu()))",  # where what it chose is read
    one_of_two_parameters: "return h * m.scales[h.shape[-1] // 10]",
    word_by_size: 'return nn.functional.gelu(h, approximate="tanh" if h.shape[-1] > 10 else "none")',
    shift_of_rows: "return h + h.roll(h.shape[-1] // 10, 0)",
    numbers_that_start_at_a_size: "return h + torch.arange(h.shape[-1] // 10, h.shape[-1] // 10 + 3)[:, None]",
    tensor_of_a_size: "return h * torch.tensor(min(h.shape[-1], 12))",
    whole_number_filled_in: "return h * torch.full((1,), h.shape[-1] // 10)",
    mean_without_a_fold: "return h * (1 / h.shape[-1])",
}
"""Networks whose Python looks at a width, and the line of the operation that differs."""


def net(wire: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, AxisGraph]:
    """A network of two linear layers, 4 → 16 → 3, with something in between, and its axes."""
    model = Wired(lambda m, x: m.b(wire(m, m.a(x).relu())), a=nn.Linear(4, 16), b=nn.Linear(16, 3))
    model.register_buffer("table", torch.tensor([1.0, 2.0, 3.0]))
    model.scales = nn.ParameterList([nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))])
    randomise(model)
    return model, trace(model, torch.randn(3, 4))


@pytest.mark.parametrize("wire", SIZED, ids=lambda wire: wire.__name__)
def test_code_that_looks_at_a_width_is_refused_with_its_line(wire: Callable[[Any, Tensor], Tensor]) -> None:
    model, axes = net(wire)
    with laws.untouched(model), pytest.raises(PlanError) as refused:
        apply(model, axes, Plan.keeping(axes, {KEY: range(6)}))
    said = str(refused.value)
    assert "\n" not in said
    assert "test_proof.py:" in said and SIZED[wire] in said


@pytest.fixture
def busy_collector() -> Iterator[None]:
    """Garbage is collected all the time, and Python code is called each time, as Hypothesis does."""
    before, calls = gc.get_threshold(), count()

    def called(phase: str, info: Mapping[str, int]) -> None:
        for _ in range(next(calls) % 3):
            pass

    gc.callbacks.append(called)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(called)


@pytest.mark.parametrize("wire", [branch_on_a_factor, one_of_two_values], ids=lambda wire: wire.__name__)
def test_the_line_is_found_whatever_a_garbage_collection_calls(
    wire: Callable[[Any, Tensor], Tensor], busy_collector: None
) -> None:
    model, axes = net(wire)
    with pytest.raises(PlanError) as refused:
        apply(model, axes, Plan.keeping(axes, {KEY: range(6)}))
    assert SIZED[wire] in str(refused.value)


def test_what_is_the_same_at_another_width_is_no_reason_to_refuse() -> None:
    model, axes = net(least_of_width_and_number)
    small, _ = apply(model, axes, Plan.keeping(axes, {KEY: range(9)}))
    assert small.a.out_features == 9


def test_growth_past_a_branch_is_refused_with_its_line() -> None:
    model, axes = net(lambda m, h: h * (2.0 if h.shape[-1] > 16 else 1.0))
    with laws.untouched(model), pytest.raises(PlanError, match=r"test_proof\.py:\d+: .*2\.0 if h\.shape"):
        apply(model, axes, Plan.growing(axes, {KEY: 2}))


def test_a_trained_path_that_looks_at_a_width_is_refused_after_an_earlier_cut() -> None:
    """The comparison is with the network as it is, whatever was done to it before."""
    model, axes = net(branch_on_a_factor)
    model, axes = apply(model, axes, Plan.keeping(axes, {KEY: range(13)}))
    model, axes = model.double(), replace(axes, example=laws.in_double(axes.example))
    with laws.untouched(model), pytest.raises(PlanError, match=r"2\.0 if h\.shape"):
        apply(model, axes, Plan.keeping(axes, {KEY: range(6)}))


def test_constants_that_folds_precision_and_compensation_change_are_no_reason_to_refuse() -> None:
    """Cut of a folded axis, then another precision, then compensation, twice."""
    model, axes = trace_zoo("llama")
    model, left = copy.deepcopy(model), axes
    folded = next(axis.key for axis in axes.free() if axis.mark == "folded")
    model, left = apply(model, left, Plan.keeping(left, {folded: range(0, axes[folded].size, 2)}))
    model = model.to(torch.bfloat16)
    for units in (range(1, 11), range(1, 8)):
        key = next(axis.key for axis in left.free() if "mlp" in axis.key)
        reader = next(slot.name for slot in left[key].slots if slot.role == "consumes")
        gone = [unit for unit in range(left[key].size) if unit not in units]
        model, left = apply(model, left, Plan.keeping(left, {key: units}, means={reader: dict.fromkeys(gone, 0.1)}))
    model, left = apply(model, left, Plan.keeping(left, {folded: range(2, left[folded].size)}))
    assert left[folded].size == -(-axes[folded].size // 2) - 2


# --- the check in float64 ---------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Tensor], Tensor], str], None]]:
    """Have surgery make something else of the tensors whose names end in some way, for every caller."""
    real = compensate.resize

    def spoil(change: Callable[[Tensor], Tensor], ending: str) -> None:
        def carried(name: str, *more: Any) -> Tensor:
            made = real(name, *more)
            return change(made) if name.endswith(ending) else made

        monkeypatch.setattr(compensate, "resize", carried)

    yield spoil


def mlp_axis(axes: AxisGraph, layer: int = 0) -> str:
    """The neurons of a layer of the tiny Llama."""
    return next(axis.key for axis in axes.free() if f"layers.{layer}.mlp" in axis.key)


@pytest.mark.parametrize("name", ["llama", "mlp", "resnet18"])
def test_a_wrong_cut_is_refused_and_changes_nothing(name: str, spoiled: Any) -> None:
    """With blocks, and as a whole where there are none."""
    model, axes = trace_zoo(name)
    axis = [axis for axis in axes.free() if axis.mark == "neutral" and axis.size > 3 and not axis.count][-1]
    produced = next(slot for slot in axis.slots if slot.role == "produces")
    plan = Plan.keeping(axes, {axis.key: range(1, axis.size)})
    spoiled(lambda x: x.roll(1, produced.dim), produced.name)
    with laws.untouched(model), pytest.raises(PlanError, match=r"differs by .* from the masked network"):
        apply(model, axes, plan)


@pytest.mark.parametrize("grow", [0, 2])
def test_weights_that_are_not_finite_are_named_as_the_cause(grow: int) -> None:
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    axes = trace(model, torch.randn(2, 4))
    model[2].weight.data[0, 0] = torch.nan
    plan = Plan.growing(axes, {"0.weight:0": grow}) if grow else Plan.keeping(axes, {"0.weight:0": range(3)})
    with pytest.raises(PlanError, match="not finite; check"):
        apply(model, axes, plan)


@pytest.mark.parametrize("rule", ["zero_out", "split"])
def test_newborn_units_that_are_heard_are_refused(rule: str, spoiled: Any) -> None:
    model, axes = trace_zoo("llama")
    spoiled(lambda x: x + 0.01, "down_proj.weight")
    with laws.untouched(model), pytest.raises(PlanError, match="differs by"):
        apply(model, axes, Plan.growing(axes, {mlp_axis(axes): 2}, Fill(rule)))


@pytest.mark.parametrize(
    ("net", "spoilt", "says"),
    [("llama", "down_proj.weight", "what it leaves differs"), ("small", "own.bias", "cut otherwise than in float64")],
    ids=["selected", "worked out"],
)
def test_tensors_that_are_not_those_checked_are_refused(
    net: str, spoilt: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put into the network is what was checked, be it selected or worked out."""

    def spoiling(*given: Any, **more: Any) -> Any:
        ready = prepare(*given, **more)
        next(value for name, value in ready.values.items() if name.endswith(spoilt)).mul_(1.001)
        return ready

    if net == "llama":
        model, axes = trace_zoo("llama")
        plan = Plan.keeping(axes, {mlp_axis(axes): range(5)})
    else:
        model = small()
        axes = trace(model, torch.ones(2, 6))
        plan = Plan.keeping(axes, {"rise.weight:0": range(9)}, means={"own.weight": {9: 0.5}})
    monkeypatch.setattr(sys.modules[apply.__module__], "prepare", spoiling)
    with laws.untouched(model), pytest.raises(PlanError, match=says):
        apply(model, axes, plan)


def test_means_for_a_weight_that_two_modules_share_are_refused() -> None:
    model = small()
    axes = trace(model, torch.ones(2, 6))
    plan = Plan.keeping(axes, {"rise.weight:0": range(9)}, means={"fall.weight": {9: 0.5}})
    with laws.untouched(model), pytest.raises(PlanError, match=r"fall\.weight, which again holds too"):
        apply(model, axes, plan)


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_what_is_restored_is_the_network_unmasked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, axes = trace_zoo(name)
    axis = [axis for axis in axes.free() if axis.mark == "neutral" and axis.size > 3 and not axis.count][-1]
    undo, model = UndoStore(), copy.deepcopy(model)
    model, left = apply(model, axes, Plan.keeping(axes, {axis.key: range(2, axis.size)}), undo=undo)
    back = Plan.restoring(left, undo.restorable)

    def spoiling(*given: Any, **more: Any) -> Any:
        ready = prepare(*given, **more)
        for slot in axis.slots:  # a kept unit is not what it was
            ready.values[slot.name].select(slot.dim, axis.size - 1).mul_(1.5)
        return ready

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[apply.__module__], "prepare", spoiling)
        with laws.untouched(model), pytest.raises(PlanError, match="differs by"):
            apply(model, left, back, undo=undo)
    laws.same_network(apply(model, left, back, undo=undo)[0], trace_zoo(name)[0])


def test_the_narrowest_and_the_widest_block_are_checked() -> None:
    """Of six blocks of one class four, the extremes among them; none of a class that the plan leaves alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=6, **sizes)).eval()
    axes = trace(model, input_ids=torch.arange(5)[None])
    keep = dict(enumerate((9, 12, 4, 15, 7, 11)))
    plan = Plan.keeping(axes, {mlp_axis(axes, layer): range(n) for layer, n in keep.items()})
    change = ProposedChange(prepare(model, axes, plan), axes.recording, axes.recording.capture)
    paths = {block.path for block in select_blocks(change)}
    assert len(paths) == 4 and {"model.layers.2", "model.layers.3"} <= paths <= {f"model.layers.{i}" for i in range(6)}


def test_blocks_that_hold_are_not_run_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(pair: Any) -> None:
        raise AssertionError("the whole network was run")

    monkeypatch.setattr(_Pair, "run_whole", whole)
    model, axes = trace_zoo("llama")
    apply(copy.deepcopy(model), axes, laws.random_plan(axes, torch.Generator().manual_seed(0)))


def test_a_model_without_numbers_is_cut_by_its_constants_alone() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        axes = trace(model, torch.ones(1, 4))
    small, _ = apply(model, axes, Plan.keeping(axes, {"0.weight:0": range(3)}))
    assert small[0].weight.shape == (3, 4)


def shifted_block() -> nn.Module:
    """A residual block that takes an input and positions."""
    return Wired(lambda m, x, p: x + m.down(m.up(x + p).relu()), up=nn.Linear(8, 12), down=nn.Linear(12, 8))


def shifted(m: Any, x: Tensor) -> Tensor:
    """Two blocks that read positions which were written in place."""
    positions = torch.arange(8.0)
    positions.add_(1.0).mul_(0.1)
    return m.second(m.first(x, positions), positions)


def test_blocks_read_what_is_written_in_place_without_parameters() -> None:
    model = randomise(Wired(shifted, first=shifted_block(), second=shifted_block()))
    axes = trace(model, torch.randn(2, 8))
    assert len(axes.recording.blocks) > 1
    small, _ = apply(copy.deepcopy(model), axes, Plan.keeping(axes, {"first.up.weight:0": range(5)}))
    assert small.first.up.out_features == 5
