"""The eager record: networks whose own data decide what they do."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import EXACT, gap, in_double, masked_equals_shrunk, outputs, random_plan, shrunk, smallest_plan, zeroed
from regrow.core.axes import AxisGraph, Example, Mark, RecordedStep, Slot, size_of
from regrow.core.axes.operations import Tracer
from regrow.core.plan import Plan
from regrow.surgery import verify
from regrow.surgery.carry import apply_unchecked
from regrow.tracing import TraceError, trace
from regrow.tracing.capture import capture, complete_example
from regrow.tracing.graph import assemble
from regrow.tracing.rules import walk
from regrow.tracing.steps import list_symbolic_steps
from zoo import ZOO, Wired, randomise


class Block(nn.Module):
    """A residual block: 4 → 7 → 4."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``x + down(relu(up(x)))``."""
        return x + self.down(self.up(x).relu())


@dataclass
class Found:
    """An answer that is no tuple, list or dictionary."""

    rows: Tensor


def traced(wire: Callable[..., Any], **parts: nn.Module) -> tuple[nn.Module, AxisGraph]:
    """A network of two linear layers, 4 → 6 → 3, with other parts if given, and its axes."""
    model = Wired(wire)
    for name, part in ({"one": nn.Linear(4, 6), "two": nn.Linear(6, 3)} | parts).items():
        setattr(model, name, part)
    randomise(model)
    return model, trace(model, torch.randn(5, 4))


def lawful(model: nn.Module, axes: AxisGraph, *plans: Plan) -> None:
    """Masked = shrunk by ``verify``, and with decisions of their own by zeros in the uncut network."""
    for plan in plans or (smallest_plan(axes), random_plan(axes, torch.Generator().manual_seed(1))):
        masked_equals_shrunk(model, axes, plan)
        double = in_double(model)
        expected = outputs(zeroed(double, axes, plan), axes)
        assert all(len(value) for value in expected), "nothing was found, so nothing is compared"
        assert gap(outputs(shrunk(double, axes, plan)[0], axes), expected) <= EXACT


def rows(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A network that goes on with the rows of its hidden layer that a mask picks."""

    def wire(m: Any, x: Tensor) -> Tensor:
        hidden = m.one(x).relu()
        return m.two(hidden[mask(x)])

    return wire


PICKING = {
    "a mask": rows(lambda x: x[:, 0] > 0),
    "positions": rows(lambda x: torch.where(x[:, 0] > 0)[0]),
    "the rows seen so far": rows(lambda x: x[:, 0].round().unique(return_inverse=True)[1].unique()),
    "numbers": rows(lambda x: torch.tensor([i for i, value in enumerate(x[:, 0].tolist()) if value > 0])),
}


@pytest.mark.parametrize("name", PICKING)
def test_rows_that_data_pick_leave_the_columns_free(name: str) -> None:
    """How many rows there are is up to the data; what a row is made of is not."""
    model, axes = traced(PICKING[name])
    assert axes.recorded == "eager" and "torch.export refuses" in axes.notes[0]
    if name == "numbers":  # Python code saw them, and could have done anything with what it handles
        assert "data decide what is done with it" in axes["one.weight:0"].reason
    else:
        assert [axis.key for axis in axes.free()] == ["one.weight:0"]
        lawful(model, axes)


def refuse(*args: Any, **kwargs: Any) -> None:
    """Instead of what records on fake data, to have the eager record show what it can."""
    raise RuntimeError("out of order")


def dry(model: nn.Module, example: Example, tracer: Tracer) -> tuple[AxisGraph, tuple[RecordedStep, ...]]:
    """What a record on fake data says, ours or an export: axes before any trial, and what the network does."""
    recorded = capture(model, example, tracer=tracer)
    assert recorded.tracer == tracer
    w = walk(recorded)
    axes, names = assemble(model, w, example)
    return axes, list_symbolic_steps(w, names)


@pytest.mark.parametrize("name", [name for name, net in ZOO.items() if not net.heavy])
def test_our_record_on_fake_data_is_that_of_an_export(name: str) -> None:
    """Operation by operation; what is traced from the one is what is traced from the other, to the last name."""
    model = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    (ours, mine), (theirs, other) = (
        dry(model, complete_example(model, args, kwargs), one) for one in (Tracer.RECORD, Tracer.EXPORT)
    )
    assert mine == other
    assert list(ours.axes) == list(theirs.axes) and ours.shapes == theirs.shapes and ours.ties == theirs.ties
    assert ours.unreached == theirs.unreached and ours.notes == theirs.notes and ours.folds == theirs.folds
    assert [replace(a, count="") for a in ours] == [replace(a, count="") for a in theirs]  # a count is but a label


def test_what_asks_or_reads_what_it_kept_is_not_ours_to_record_on_fake_data() -> None:
    """We record on fake data only what asks nothing of them and reads nothing that they left; a real run does else."""

    def keeps(m: Any, x: Tensor) -> Tensor:
        m.hidden = m.one(x)
        return m.two(m.hidden)

    def reads(m: Any, x: Tensor) -> Tensor:
        if not hasattr(m, "scale"):
            m.scale = torch.linspace(1, 2, 6)
        return m.two(m.one(x) * m.scale)

    for wire, real in ((keeps, False), (reads, True), (lambda m, x: m.two(m.one(x)) * x.sum().item(), True)):
        model = randomise(Wired(wire, one=nn.Linear(4, 6), two=nn.Linear(6, 3)))
        found = capture(model, Example((torch.ones(2, 4),)), tracer=Tracer.RECORD)
        assert (found.decisions is not None) == real


def test_a_network_that_asks_whether_it_is_exported_is_traced_as_it_runs() -> None:
    """Our recording answers as an export does; where that changes the outputs, the axes are those of a run."""
    import torch.compiler as asked

    def wire(m: Any, x: Tensor) -> Tensor:
        hidden = m.one(x)
        return m.two(hidden.relu() if asked.is_exporting() and asked.is_compiling() else hidden.flip(1))

    model = randomise(Wired(wire, one=nn.Linear(4, 6), two=nn.Linear(6, 3)))
    example = Example((torch.ones(2, 4),))
    assert dry(model, example, Tracer.RECORD)[1] == dry(model, example, Tracer.EXPORT)[1]
    axes = trace(model, torch.ones(2, 4))
    assert axes.tracer == Tracer.PLAIN and "flip" in axes["one.weight:0"].reason
    assert not asked.is_exporting() and not asked.is_compiling()


def walked(model: nn.Module, example: Example) -> set[tuple[Mark, frozenset[Slot]]]:
    """The free axes of a record: marks and places."""
    axes, _ = assemble(model, walk(capture(model, example)), example)
    return {(axis.mark, frozenset(axis.slots)) for axis in axes.free()}


@pytest.mark.parametrize("name", [name for name, net in ZOO.items() if not net.heavy])
def test_an_eager_record_says_what_an_export_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations at the same level: no rule can tell how a network was recorded."""
    model = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    example = complete_example(model, args, kwargs)
    expected = walked(model, example)
    monkeypatch.setattr(import_module("regrow.tracing.capture"), "_capture_on_fake_data", refuse)
    assert walked(model, example) == expected


@pytest.mark.parametrize(
    "name", ["conv_residual", "attention", "channel_shuffle", "size_constant", "llama", "gpt2", "vit"]
)
def test_the_trial_cut_of_an_eager_record_is_as_strict(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``torch.export``, the same axes stay free and the same ones are frozen by their trial."""
    model = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    expected = trace(model, *args, **kwargs)
    monkeypatch.setattr(import_module("regrow.tracing.capture"), "_capture_on_fake_data", refuse)
    axes = trace(model, *args, **kwargs)
    assert "refuses: out of order" in axes.notes[0]
    assert {(a.mark, frozenset(a.slots)) for a in axes} == {(a.mark, frozenset(a.slots)) for a in expected}
    masked_equals_shrunk(model, axes, smallest_plan(axes))


def test_what_is_decided_on_is_frozen() -> None:
    """A mask over the units themselves: which of them there are changes what is found."""
    _, axes = traced(lambda m, x: m.two(m.one(x).relu())[m.one(x).relu()[:, :3] > 0.1])
    assert not axes.free()
    _, axes = traced(lambda m, x: (m.two(m.one(x)), m.one(x)[m.one(x) > 0]))
    assert "data decide on it" in axes["one.weight:0"].reason


def test_a_branch_freezes_what_its_code_hands_on_and_no_more() -> None:
    """The other branch was not seen: what the deciding code handles could go anywhere; inside a block nothing could."""
    model, axes = traced(
        lambda m, x: m.block(m.two(m.one(x).relu() if x.sum() > -1e9 else m.one(x).flip(1)).repeat(1, 2)[:, :4]),
        block=Block(),
    )
    assert [axis.key for axis in axes.free()] == ["block.up.weight:0"]
    assert "`aten.is_nonzero.default` in the model" in axes["one.weight:0"].reason
    lawful(model, axes)


def test_a_number_made_of_a_size_follows_it() -> None:
    """Only answers of data are given again: what is made of sizes alone is made anew, and found out."""

    def by_size(m: Any, x: Tensor) -> Tensor:
        hidden = m.one(x)
        scale = torch.tensor(float(hidden.shape[-1])).sqrt().item()
        return m.two(hidden / scale)[x[:, 0] > 0]

    assert "depends on the size" in traced(by_size)[1]["one.weight:0"].reason


def test_an_entry_of_a_row_of_numbers_is_no_question_to_data() -> None:
    _, axes = traced(lambda m, x: m.two(m.one(x)) * (torch.arange(4) + 1)[2].item())
    assert axes.decisions is None and axes.tracer != Tracer.EXPORT
    assert axes["one.weight:0"].mark is not Mark.FROZEN


def test_other_questions_at_another_size_are_found_out() -> None:
    """A network that asks its data only while it is wide cannot be given the answers when it is not."""

    def asks_while_wide(m: Any, x: Tensor) -> Tensor:
        hidden = m.one(x)
        picked = x[x[:, 0] > 0] if hidden.shape[1] > 5 else x
        return m.two(hidden).sum() + picked.sum()

    _, axes = traced(asks_while_wide)
    assert axes["one.weight:0"].reason.startswith("the network")


def test_constants_are_filled_by_number() -> None:
    """An empty table whose width is read off a tensor is filled row by row: its columns are the tensor's."""

    def scatter(m: Any, x: Tensor) -> Tensor:
        hidden = m.one(x).relu()
        table = torch.zeros(len(x), hidden.shape[1], dtype=x.dtype)
        for sign in (x[:, 0] > 0, x[:, 0] <= 0):
            table[sign] = hidden[sign]
        return m.two(table)

    model, axes = traced(scatter)
    assert [axis.key for axis in axes.free()] == ["one.weight:0"]
    lawful(model, axes)


def test_answers_of_any_form_are_outputs() -> None:
    """What stands in an object of the network's own is an output too."""

    def wire(m: Any, x: Tensor) -> Any:
        hidden = m.one(x)
        m.two(hidden)
        return [Found(hidden[x[:, 0] > 0])]

    assert traced(wire)[1]["one.weight:0"].reason == "it is an output of the model"


def test_the_example_is_left_as_it_was() -> None:
    """The network runs on copies, also where it writes into its input."""
    model = Wired(lambda m, x: m.two(m.one(x.add_(1.0)))[x[:, 0] > 0])
    model.one, model.two = nn.Linear(4, 6), nn.Linear(6, 3)
    given = torch.zeros(5, 4)
    axes = trace(model, given)
    assert verify(model, axes, smallest_plan(axes)).ok
    assert not given.any()


def test_what_data_are_written_into_is_data() -> None:
    """A table of zeros is a constant until something of the input stands in it, and so are its views."""

    def wire(m: Any, x: Tensor) -> Tensor:
        table = torch.zeros(2, dtype=x.dtype)
        row = table[1:]
        row.copy_(x[0, :1].abs() + 1)
        return m.two(m.one(x)) if table.sum().item() > 1 else m.one(x)

    _, axes = traced(wire)
    assert "data decide" in axes["one.weight:0"].reason
    assert [decision.answer > 1 for decision in axes.decisions or ()] == [True]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_verify_holds_scores_against_each_other_that_find_nothing(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is found the answers are empty, and a cut that spoils the scores must not pass for that."""
    model, axes = traced(lambda m, x: x[m.two(m.one(x).relu())[:, 0] > 1e9])
    plan = smallest_plan(axes)
    report = verify(model, axes, plan)
    assert report.ok and report.bound > 0

    def spoiling(net: nn.Module, *more: Any) -> Any:
        cut = apply_unchecked(net, *more)
        with torch.no_grad():
            net.two.weight.mul_(factor)
        return cut

    monkeypatch.setattr(import_module("regrow.surgery.verify"), "apply_unchecked", spoiling)
    assert not verify(model, axes, plan).ok


@pytest.mark.parametrize("sort", [lambda s: s.sort()[1], lambda s: s.argsort(), lambda s: s.topk(len(s))[1]])
def test_equal_scores_may_lie_in_any_order(sort: Callable[[Tensor], Tensor]) -> None:
    """Each score is there twice, up to rounding, which decides their order and differs between masked and cut."""

    def wire(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        score = m.two(m.one(x).relu()).flatten()
        both = torch.cat([score, score * 3 / 3 + 0.1 - 0.1])
        place = torch.arange(len(both), dtype=x.dtype)[sort(both)]
        return place, x[x[:, 0] > 0]

    model = Wired(wire)
    model.one, model.two = nn.Linear(4, 64), nn.Linear(64, 1)
    randomise(model)
    axes = trace(model, torch.randn(300, 4))
    assert axes.recorded == "eager"
    assert verify(model, axes, random_plan(axes, torch.Generator().manual_seed(1))).ok


def test_without_numbers_data_cannot_decide() -> None:
    """On meta there are no data: an error in words."""
    with torch.device("meta"), pytest.raises(TraceError, match="refuses Wired: "):
        traced(rows(lambda x: x[:, 0] > 0))


def test_a_detector(capsys: pytest.CaptureFixture[str]) -> None:
    """Backbone and heads of a real detector are free, and cut by any plan it finds what the masked one finds."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, score_thresh=0.0, detections_per_img=20
    )
    randomise(model)
    axes = trace(model, [torch.rand(3, 64, 96), torch.rand(3, 80, 64)])
    assert axes.recorded == "eager" and capsys.readouterr() == ("", "")
    plan = smallest_plan(axes)
    sizes = plan.sizes(axes)
    left, whole = (
        sum(prod(size_of(dim, some) for dim in axes.shapes[name]) for name in axes.parameters)
        for some in (sizes, axes.sizes())
    )
    assert left < 0.01 * whole
    lawful(model, axes, plan)
