"""Whole branches: what can be dropped, that it is the residual path alone which is left, and that it comes back."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laws
from regrow.allocation.cost import Cost
from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph, Example
from regrow.core.axes.operations import Branch, Placeholder
from regrow.core.plan import Plan, PlanError
from regrow.store.errors import StoreError
from regrow.store.ledger import read_plan
from regrow.surgery import UndoStore, apply, verify
from regrow.tracing import trace, with_branches
from zoo import ZOO, Wired, randomise, trace_zoo


def candidates() -> tuple[nn.Module, tuple[Any, ...]]:
    """A node of a cell: operations in sum, each with a weight out of a softmax over what was learned."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        shares = m.alpha.softmax(0)
        return m.head(sum(shares[i] * op(x) for i, op in enumerate(m.ops)).relu().mean((2, 3)))

    ops = nn.ModuleList(
        [
            nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(6, affine=False)),
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(6, 6, 5, padding=2),
        ]
    )
    model = Wired(run, stem=nn.Conv2d(3, 6, 3, padding=1), ops=ops, head=nn.Linear(6, 4))
    model.alpha = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.5]))
    return randomise(model), (torch.randn(2, 3, 8, 8),)


def windows() -> tuple[nn.Module, tuple[Any, ...]]:
    """Attention in shifted windows, with stochastic depth."""
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([4, 4], 12, [1, 2], [2, 3], [4, 4], stochastic_depth_prob=0.2, num_classes=5)
    return randomise(model), (torch.randn(2, 3, 32, 32),)


def own_scale() -> tuple[nn.Module, tuple[Any, ...]]:
    """A block after LayerScale and dropout, whose steps stand in the forward of the network."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.fall(m.rise(m.norm(x)).relu()).permute(0, 2, 1)
        x = x + m.drop(m.gamma * y.permute(0, 2, 1))
        return m.head(x)

    layers = {"stem": nn.Linear(5, 6), "norm": nn.LayerNorm(6), "rise": nn.Linear(6, 9), "fall": nn.Linear(9, 6)}
    model = Wired(run, **layers, drop=nn.Dropout(0.3), head=nn.Linear(6, 3))
    model.gamma = nn.Parameter(torch.rand(6) + 0.5)
    return randomise(model), (torch.randn(2, 4, 5),)


BUILT: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "candidates": candidates,
    "windows": windows,
    "own_scale": own_scale,
}


@cache
def traced(name: str) -> tuple[nn.Module, AxisGraph]:
    if name in ZOO:
        model, axes = trace_zoo(name)
        return model, with_branches(model, axes)
    torch.manual_seed(0)
    model, args = BUILT[name]()
    return model, with_branches(model, trace(model, *args))


def by_hand(model: nn.Module, branches: list[Branch]) -> nn.Module:
    """The whole network, with what each branch gives replaced as it comes out: it knows nothing of stands."""
    copy = deepcopy(model)

    def hook(stand: Placeholder) -> Callable[..., Any]:
        def replaced(module: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
            given = args[stand.takes] if isinstance(stand.takes, int) else kwargs[stand.takes]
            first = answer[0] if isinstance(answer, tuple) else answer
            other = first * 0 if stand.gives == "zero" else given
            return (other, *answer[1:]) if isinstance(answer, tuple) else other

        return replaced

    for branch in branches:
        stand = branch.placeholders[branch.module]
        copy.get_submodule(branch.module).register_forward_hook(hook(stand), with_kwargs=True)
    return copy


def holds(name: str, modules: list[str]) -> None:
    """Dropped = the network with that replaced by hand, verify agrees, and the axes are those of a new trace."""
    model, axes = traced(name)
    plan = read_plan(json.loads(Plan.dropping(axes, modules).to_json()))
    double = laws.in_double(model)
    expected = laws.outputs(by_hand(double, [axes.branches[module] for module in modules]), axes)
    small, _ = laws.shrunk(double, axes, plan)
    found = laws.outputs(small, axes)
    assert laws.gap(found, expected) <= 1e-12
    assert laws.gap(found, laws.outputs(double, axes)) > 1e-4, "the branch did nothing"
    with laws.untouched(model):
        report = verify(model, axes, plan)
    assert report.ok and report.max_abs_diff <= report.bound, report
    as_a_new_trace(model, axes, plan)


def as_a_new_trace(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """What apply says of the network afterwards is what tracing it anew finds."""
    small, left = laws.shrunk(model, axes, plan)
    fresh = with_branches(small, trace(small, *axes.example.args, **axes.example.kwargs))
    again = {laws.entries_of(axis): axis for axis in fresh}
    for axis in left.free():
        assert again[laws.entries_of(axis)].mark is axis.mark, axis.key
        assert again[laws.entries_of(axis)].narrow == axis.narrow, axis.key
    assert len(left) == len(fresh)
    assert left.shapes.keys() == fresh.shapes.keys() == laws.tensors(small).keys()
    assert left.parameters == fresh.parameters
    if not plan.changes:  # a fold changes constants
        assert left.steps == fresh.steps
    assert left.branches.keys() == fresh.branches.keys()
    for path, branch in left.branches.items():  # one that was free stays so beside one that does the same now
        repeated = axes.branches[path].free and fresh.branches[path].reason.startswith("it takes away what")
        assert branch.free if repeated else branch == fresh.branches[path]
    for field in ("work", "counted", "folds", "itemsize", "unreached", "ties"):
        assert getattr(left, field) == getattr(fresh, field), field
    if all(axis.free for axis in left if again[laws.entries_of(axis)].free):
        assert left.integers.keys() == fresh.integers.keys()


DROPS = [
    ("resnet18", ["layer2.1.bn2", "layer4.1.bn2"]),
    pytest.param("mobilenet_v2", ["features.3", "features.13"]),
    ("vit", ["encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_1.mlp"]),
    ("vit", ["encoder.layers.encoder_layer_0"]),
    ("convnext", ["features.3.0.block"]),
    ("convnext", ["features.3.0", "features.3.1"]),
    ("llama", ["model.layers.0.mlp", "model.layers.1.self_attn"]),
    ("llama_tied", ["model.layers.1"]),
    ("gpt2", ["transformer.h.0.mlp", "transformer.h.1.attn"]),
    ("mamba", ["backbone.layers.1"]),
    ("candidates", ["ops.0", "ops.2"]),
    ("candidates", ["ops.1"]),
    ("windows", ["features.1.0.attn", "features.3.1.mlp"]),
    ("own_scale", ["fall"]),
]


@pytest.mark.parametrize(("name", "modules"), DROPS)
def test_dropped_is_the_network_without_that_summand(name: str, modules: list[str]) -> None:
    holds(name, modules)


def test_what_goes_with_a_branch_is_what_nothing_else_uses() -> None:
    branches = traced("resnet18")[1].branches
    free = [path for path, branch in branches.items() if branch.free]
    assert free == [f"layer{n}.bn2" for n in ("1.0", "1.1", "2.1", "3.1", "4.1")]
    assert {*branches["layer3.1.bn2"].placeholders} == {f"layer3.1.{one}" for one in ("conv1", "bn1", "conv2", "bn2")}
    assert {*traced("own_scale")[1].branches["fall"].placeholders} == {"fall", "rise", "norm"}
    llama = traced("llama")[1].branches
    assert {*llama["model.layers.1.mlp"].placeholders} == {
        f"model.layers.1.{n}" for n in ("mlp", "post_attention_layernorm")
    }
    assert llama["model.layers.1"].gives == "input" and llama["model.layers.1.mlp"].gives == "zero"
    assert "goes with model.layers.1.mlp" in llama["model.layers.1.mlp.down_proj"].reason
    assert "takes away what features.3 does" in traced("mobilenet_v2")[1].branches["features.3.conv"].reason


def test_a_concatenation_and_a_changed_shape_say_so() -> None:
    dense = traced("densenet121")[1].branches
    assert not any(branch.free for branch in dense.values()) and all(branch.reason for branch in dense.values())
    assert "no addition" in dense["features.denseblock1.denselayer1"].reason
    residual = traced("resnet18")[1].branches
    assert "does not run without it" in residual["layer2.0.bn2"].reason
    assert "no addition" in residual["layer1.0"].reason  # the ReLU behind the sum is not the identity


# --- nets that fool ---------------------------------------------------------------------------------------------------


def fooling(run: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> tuple[nn.Module, AxisGraph]:
    torch.manual_seed(0)
    parts = {"stem": nn.Linear(5, 6), "body": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))} | more
    model = randomise(Wired(run, **parts, head=nn.Linear(6, 3)))
    return model, with_branches(model, trace(model, torch.randn(4, 5)))


class Both(nn.Module):
    """Gives its sum, and what it added."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return x + y, y


class Plus(nn.Module):
    """Its input, and something."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Inside(nn.Module):
    """Writes into what it is given, then adds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.relu_()) + x


FOOLS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], str, str]] = {
    "read elsewhere": (
        lambda m, x: m.head((x := m.stem(x)) + (y := m.body(x)) + y.sigmoid()),
        {},
        "body",
        "sigmoid in the model reads it",
    ),
    "multiplied": (lambda m, x: m.head((x := m.stem(x)) * m.body(x)), {}, "body", "multiplied with something"),
    "gated": (lambda m, x: m.head((x := m.stem(x)) + x * m.body(x)), {}, "body", "multiplied with something"),
    "sigmoid": (lambda m, x: m.head((x := m.stem(x)) + m.body(x).sigmoid()), {}, "body", "sigmoid in the model reads"),
    "a bias after": (
        lambda m, x: m.head((x := m.stem(x)) + m.last(m.body(x))),
        {"last": nn.Linear(6, 6)},
        "body",
        "linear in last reads it",
    ),
    "a shift after": (
        lambda m, x: m.head((x := m.stem(x)) + m.norm(m.body(x))),
        {"norm": nn.LayerNorm(6)},
        "body",
        "layer_norm in norm reads it",
    ),
    "a number after": (
        lambda m, x: m.head((x := m.stem(x)) + (m.body(x) + 1).relu()),
        {},
        "body",
        "nothing that depends",
    ),
    "alone": (lambda m, x: m.head(m.body(m.stem(x)) + m.head.weight.sum()), {}, "body", "nothing that depends"),
    "an answer": (lambda m, x: (m.head((x := m.stem(x)) + (y := m.body(x))), y), {}, "body", "it is an answer"),
    "twice": (lambda m, x: m.head((x := m.stem(x)) + m.body(x) + m.body(x + 1)), {}, "body", "several things"),
    "its weight read": (
        lambda m, x: m.head((x := m.stem(x)) + m.body(x) + m.body[2].bias * x),
        {},
        "body",
        "body.2.bias is read elsewhere too",
    ),
    "its middle read": (
        lambda m, x: m.head((x := m.stem(x)) + m.body[2](y := m.body[0](x)) + y.sum(-1, keepdim=True)),
        {},
        "body.0",
        "reads it",
    ),
    "a scale left": (
        lambda m, x: m.head((x := m.stem(x)) + m.body(m.scale.weight * x)),
        {"scale": nn.LayerNorm(6)},
        "body",
        "scale.weight would be left, and nothing would use it",
    ),
    "two answers alike": (lambda m, x: m.head(m.both(m.stem(x))[0]), {"both": Both()}, "both", "is not clear"),
    "its weight read, it goes through": (
        lambda m, x: m.head(m.plus(m.stem(x)).cos() * m.plus.body.bias),
        {"plus": Plus()},
        "plus",
        "plus.body.bias is read elsewhere too",
    ),
    "what it added is used": (
        lambda m, x: m.head((y := m.both(m.stem(x)))[0] * y[1]),
        {"both": Both()},
        "both",
        "several things",
    ),
    "writes into its input": (
        lambda m, x: m.head((x := m.stem(x)) + m.inside(x.view(-1, 6))),
        {"inside": Inside()},
        "inside",
        "in it is used elsewhere too",
    ),
    "written into afterwards": (
        lambda m, x: m.head((x := m.stem(x)).cos() + m.plus(x).sigmoid_() + x),
        {"plus": Plus()},
        "plus",
        "written into afterwards",
    ),
}


@pytest.mark.parametrize("name", FOOLS)
def test_what_is_more_than_a_summand_stays(name: str) -> None:
    """Each is refused, with the reason."""
    run, parts, module, reason = FOOLS[name]
    _, axes = fooling(run, **parts)
    branch = axes.branches[module]
    assert reason in branch.reason
    with pytest.raises(PlanError, match=f"{module} cannot be dropped"):
        Plan.dropping(axes, [module])


def test_tied_weights_do_not_go() -> None:
    torch.manual_seed(0)
    model = Wired(
        lambda m, x: m.head((x := m.stem(x)) + m.body(x) + m.other(x).sigmoid()),
        stem=nn.Linear(5, 6),
        body=nn.Linear(6, 6),
        other=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )
    model.other.weight = model.body.weight
    assert (
        "body.weight is other.weight, too"
        in with_branches(model, trace(model, torch.randn(2, 5))).branches["body"].reason
    )


def test_something_is_left_of_every_sum() -> None:
    _, axes = traced("candidates")
    everything = [path for path in axes.branches if axes.branches[path].free]
    assert everything == ["ops.0", "ops.1", "ops.2", "ops.3"]
    model = deepcopy(traced("candidates")[0])
    with laws.untouched(model), pytest.raises(PlanError, match=r"cannot be dropped: (nothing|linear|relu|mean)"):
        apply(model, axes, Plan.dropping(axes, everything))
    left = apply(model, axes, Plan.dropping(axes, everything[:3]))[1]
    assert not left.branches["ops.3"].free, "the last summand stays"
    assert left.branches["ops.0"].reason == "it is dropped already"


def test_the_first_attention_of_a_kind_stays_for_caches_count_by_it() -> None:
    model, axes = traced("llama")
    assert "cache" in axes.branches["model.layers.0.self_attn"].reason
    assert "cache" in axes.branches["model.layers.0"].reason
    small, _ = apply(deepcopy(model).double(), axes, Plan.dropping(axes, ["model.layers.1", "model.layers.0.mlp"]))
    ids = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = small(ids, use_cache=False).logits
        begun = small(ids[:, :5], use_cache=True)
        rest = small(ids[:, 5:], past_key_values=begun.past_key_values, use_cache=True).logits
    assert laws.gap([rest], [whole[:, 5:]]) <= 1e-12


# --- plans ------------------------------------------------------------------------------------------------------------


def test_units_and_branches_in_one_plan_or_one_after_the_other() -> None:
    model, axes = traced("llama")
    double = laws.in_double(model)
    mlp, other = "model.layers.0.mlp", "model.layers.1.mlp.gate_proj.weight:0"
    width = next(axis for axis in axes.free() if axis.size == 36)
    keep = {other: range(0, 56, 3), width.key: range(1, 36)}
    at_once = Plan.dropping(axes, [mlp], keep=keep)
    assert verify(model, axes, at_once).ok
    small, left = laws.shrunk(double, axes, at_once)
    first, between = laws.shrunk(double, axes, Plan.dropping(axes, [mlp]))
    second, end = laws.shrunk(first, between, Plan.keeping(between, keep))
    assert verify(laws.shrunk(model, axes, Plan.dropping(axes, [mlp]))[0], between, Plan.keeping(between, keep)).ok
    laws.same_network(small, second)
    laws.same_axes(left, end)
    cut, after = laws.shrunk(double, axes, Plan.keeping(axes, keep))
    third, last = laws.shrunk(cut, after, Plan.dropping(after, [mlp]))
    laws.same_network(small, third) if not axes.folds else None
    assert laws.gap(laws.outputs(third, axes), laws.outputs(small, axes)) <= 1e-12
    assert left.sizes() == last.sizes()
    as_a_new_trace(model, axes, at_once)


def test_a_network_is_widened_without_its_branch() -> None:
    """Zeros do not hide what a residual stream under root-mean-square norms needs."""
    model, axes = traced("llama")
    small, left = laws.shrunk(model, axes, Plan.dropping(axes, ["model.layers.1.mlp", "model.layers.1.self_attn"]))
    plan = laws.joint_growing_plan(left, "zero_out")
    assert {axis.size for axis in left.free() if axis.key in plan.changes} >= {36, 56}
    laws.widening_keeps_function(small, left, plan)


def test_plans_that_do_not_fit() -> None:
    model, axes = traced("llama")
    mlp = "model.layers.1.mlp"
    inner = f"{mlp}.gate_proj.weight:0"
    with pytest.raises(PlanError, match=r"axis '.*gate_proj.weight:0' goes with a branch that the plan drops"):
        Plan.dropping(axes, [mlp], keep={inner: range(3)})
    with pytest.raises(PlanError, match=r"model.layers.1.mlp goes with model.layers.1, which the plan drops too"):
        Plan.dropping(axes, ["model.layers.1", mlp])
    with pytest.raises(PlanError, match=r"no module 'model.layers.9'"):
        Plan.dropping(axes, ["model.layers.9"])
    with pytest.raises(PlanError, match=r"layer1.0 cannot be dropped: .* in it, layer1.0.bn2 can"):
        Plan.dropping(traced("resnet18")[1], ["layer1.0"])
    good = Plan.dropping(axes, [mlp])
    with pytest.raises(PlanError, match="compensates for it"):
        replace(good, means={f"{mlp}.down_proj.weight": {0: 1.0}}).check(axes)
    with pytest.raises(PlanError, match="not what the plan says"):
        replace(good, drop={mlp: Branch(mlp, {mlp: Placeholder("zero", 0)})}).check(axes)
    with pytest.raises(PlanError, match="make two"):
        replace(good, back=("model.layers.0",))
    _, left = laws.shrunk(model, axes, good)
    with pytest.raises(PlanError, match="dropped already"):
        good.check(left)


@pytest.mark.parametrize(
    "value",
    [{"gives": "all"}, {"takes": -1}, {"of": 1, "at": 1}, 3],
)
def test_a_damaged_branch_is_refused(value: Any) -> None:
    plan = json.loads(Plan.dropping(traced("own_scale")[1], ["fall"]).to_json())
    whole = {"gives": "zero", "takes": 0, "of": 0, "at": 0}
    plan["drop"]["fall"]["fall"] = whole | value if isinstance(value, dict) else value
    with pytest.raises((PlanError, StoreError)):
        read_plan(plan)


@pytest.mark.parametrize("stand", [Placeholder("input", 0), Placeholder("zero", 0, 2, 0), Placeholder("zero", 3)])
def test_a_wrong_placeholder_does_not_pass_the_proof(stand: Placeholder) -> None:
    """Whatever the axes claim, the exchanged network must compute what is left of the sum."""
    model, axes = traced("own_scale")
    forged = replace(axes.branches["fall"], placeholders={**axes.branches["fall"].placeholders, "fall": stand})
    wrong = replace(axes, branches={**axes.branches, "fall": forged})
    with laws.untouched(model), pytest.raises(PlanError, match="cannot be dropped"):
        apply(model, wrong, Plan.dropping(wrong, ["fall"]))


def test_all_or_nothing() -> None:
    """What fails after the branch is gone puts it back: a plan for units that cannot be carried out, an optimizer."""
    model, axes = deepcopy(traced("own_scale")[0]), traced("own_scale")[1]
    plan, optimizer = Plan.dropping(axes, ["fall"]), torch.optim.LBFGS(model.parameters())
    modules = dict(model.named_modules())
    with laws.untouched(model), pytest.raises(PlanError, match="LBFGS"):
        apply(model, axes, plan, optimizers=[optimizer])
    broken = replace(axes, example=Example((torch.randn(2, 4, 7),)))
    with laws.untouched(model), pytest.raises(PlanError):
        apply(model, broken, plan)
    assert dict(model.named_modules()) == modules


def test_cost_without_a_branch_is_that_of_the_network_without_it() -> None:
    for name, module in (("resnet18", "layer3.1.bn2"), ("gpt2", "transformer.h.1")):
        model, axes = traced(name)
        _, left = laws.shrunk(model, axes, Plan.dropping(axes, [module]))
        counted = {Measure.PARAMETERS, Measure.MACS, Measure.BYTES} | ({Measure.CACHE} if axes.caches else set())
        for measure in counted:
            before, after = Cost(axes, measure).total, Cost(left, measure).total
            assert after < before
            assert Cost(axes.without([axes.branches[module]]), measure).total == after


def test_optimizers_let_go_of_a_branch() -> None:
    model, axes = deepcopy(traced("own_scale")[0]), traced("own_scale")[1]
    model.train()
    optimizer = torch.optim.Adam([{"params": [*model.parameters()][:4]}, {"params": [*model.parameters()][4:]}])
    F.mse_loss(model(*axes.example.args), torch.zeros(2, 4, 3)).backward()
    optimizer.step()
    memory = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    apply(model, axes, Plan.dropping(axes, ["fall"]), optimizers=[optimizer])
    left = {id(p) for p in model.parameters()}
    assert (
        {id(p) for group in optimizer.param_groups for p in group["params"]} == left == {id(p) for p in optimizer.state}
    )
    assert all(torch.equal(optimizer.state[p]["exp_avg"], memory[id(p)]) for p in model.parameters())
    optimizer.zero_grad()
    F.mse_loss(model(*axes.example.args), torch.zeros(2, 4, 3)).backward()
    optimizer.step()


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", ["model.layers.1.self_attn", "model.layers.0.mlp"]),
        ("resnet18", ["layer2.1.bn2", "layer4.1.bn2"]),
        ("candidates", ["ops.1", "ops.3"]),
        ("vit", ["encoder.layers"]),
    ],
)
def test_brought_back_is_what_was_dropped(name: str, modules: list[str]) -> None:
    """Bit for bit, in whatever order, one by one or at once."""
    model, axes = traced(name)
    net, undo = deepcopy(model), UndoStore()
    net, left = apply(net, axes, Plan.dropping(axes, modules[:1]), undo=undo)
    if modules[1:]:
        net, left = apply(net, left, Plan.dropping(left, modules[1:]), undo=undo)
    for back in [modules[:1], modules[1:]]:
        plan = read_plan(json.loads(Plan(back=tuple(back)).to_json()))
        net, left = apply(net, left, plan, undo=undo)
    assert undo == UndoStore(next_ids=undo.next_ids)
    laws.same_network(net, model)
    laws.same_axes(left, axes)
    for field in fields_of(axes):
        assert getattr(left, field) == getattr(axes, field), field
    assert left.recording.reads == axes.recording.reads


def fields_of(axes: AxisGraph) -> list[str]:
    return [name for name in vars(axes) if name not in ("axes", "example", "decisions", "recording")]


def test_units_cut_inside_and_outside_come_back_after_the_branch() -> None:
    """Cut in the branch, drop it, cut elsewhere: what was cut elsewhere does not matter, and all can be undone."""
    model, axes = traced("llama")
    net, undo = deepcopy(model), UndoStore()
    mlp = "model.layers.1.mlp"
    inner, other = f"{mlp}.gate_proj.weight:0", "model.layers.0.mlp.gate_proj.weight:0"
    net, cut = apply(net, axes, Plan.keeping(axes, {inner: range(5, 40)}), undo=undo)
    halfway = deepcopy(net)
    net, left = apply(net, cut, Plan.dropping(cut, [mlp], keep={other: range(50)}), undo=undo)
    assert inner not in undo.next_ids and undo.restorable == {other: tuple(range(50, 56))}
    net, left = apply(net, left, Plan.keeping(left, {other: range(20)}), undo=undo)
    net, left = apply(net, left, Plan(back=(mlp,)), undo=undo)
    assert left[other].size == 20 and undo.restorable[inner] == cut_ids(axes, cut, inner)
    assert torch.equal(net.get_parameter(f"{mlp}.up_proj.weight"), halfway.get_parameter(f"{mlp}.up_proj.weight"))
    double = laws.in_double(net)
    laws.zeroed_equals_shrunk(double, left, Plan.keeping(left, {inner: range(9), other: range(7)}))
    net, left = apply(net, left, Plan.restoring(left, undo.restorable), undo=undo)
    laws.same_network(net, model)
    laws.same_axes(left, axes)


def cut_ids(before: AxisGraph, after: AxisGraph, key: str) -> tuple[int, ...]:
    return tuple(one for one in before[key].ids if one not in after[key].ids)


def test_a_branch_that_cannot_come_back_says_why() -> None:
    model, axes = traced("llama")
    net, undo = deepcopy(model), UndoStore()
    layer, mlp = "model.layers.1", "model.layers.1.mlp"
    width = next(axis.key for axis in axes.free() if axis.size == 36)
    net, left = apply(net, axes, Plan.dropping(axes, [mlp]), undo=undo)
    with laws.untouched(net), pytest.raises(PlanError, match="is in no undo store"):
        apply(net, left, Plan(back=(mlp,)))
    with laws.untouched(net), pytest.raises(PlanError, match="add_param_group"):
        apply(net, left, Plan(back=(mlp,)), undo=undo, optimizers=[torch.optim.SGD(net.parameters())])
    with laws.untouched(net), pytest.raises(PlanError, match="make two"):
        apply(net, left, replace(Plan.keeping(left, {width: range(30)}), back=(mlp,)), undo=undo)
    narrow, less = apply(deepcopy(net), left, Plan.keeping(left, {width: range(30)}), undo=(store := deepcopy(undo)))
    back, _ = apply(deepcopy(narrow), less, Plan(back=(mlp,)), undo=deepcopy(store))
    straight, _ = apply(deepcopy(model), axes, Plan.keeping(axes, {width: range(30)}))
    laws.same_network(back, straight)
    grown, more = apply(deepcopy(net), left, Plan.growing(left, {width: 2}), undo=(other := deepcopy(undo)))
    with laws.untouched(grown), pytest.raises(PlanError, match="has other units than when"):
        apply(grown, more, Plan(back=(mlp,)), undo=other)
    net, left = apply(net, left, Plan.dropping(left, [layer]), undo=undo)
    with laws.untouched(net), pytest.raises(PlanError, match="bring back what it lies in first"):
        apply(net, left, Plan(back=(mlp,)), undo=undo)
    net, left = apply(net, left, Plan(back=(layer,)), undo=undo)
    net, left = apply(net, left, Plan(back=(mlp,)), undo=undo)
    laws.same_network(net, model)
    laws.same_axes(left, axes)
