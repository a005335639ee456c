"""Forms told at once are those that fake tensors tell."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from regrow.core.axes.operations import Tracer
from regrow.tracing import record
from regrow.tracing.capture import capture, capture_in_training, complete_example
from regrow.tracing.meta_copy import infer_result
from zoo import ZOO

aten = torch.ops.aten


def form(value: Any) -> list[Any]:
    """Shapes, precisions, devices, and how each tensor lies in memory where a dimension has more than one entry."""
    return [
        (x.shape, x.dtype, x.device, [s for s, n in zip(x.stride(), x.shape, strict=True) if n != 1])
        for x in tree_leaves(value)
        if isinstance(x, Tensor)
    ]


def fake(*shapes: tuple[int, ...]) -> tuple[FakeTensorMode, list[Tensor]]:
    """Fake tensors of some shapes."""
    mode = FakeTensorMode()
    return mode, [mode.from_tensor(torch.ones(shape)) for shape in shapes]


@pytest.mark.parametrize("name", [name for name, net in ZOO.items() if not net.heavy])
def test_what_is_told_is_what_fake_tensors_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, precision, device and memory of every result in a network, and whether it is a tensor that was given.

    Evaluated, and in training, where norms take the statistics of the batch.
    """
    asked: Counter[str] = Counter()

    def checked(func: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
        found = infer_result(func, args, kwargs, mode)
        if found is not NotImplemented:
            asked[str(func)] += 1
            compare(found, func, args, kwargs, mode)
        return found

    monkeypatch.setattr(record, "infer_result", checked)
    args, kwargs = ZOO[name].example()
    model = ZOO[name].build()
    example = complete_example(model, args, kwargs)
    capture(model, example, tracer=Tracer.RECORD)
    assert asked
    asked.clear()
    capture_in_training(model, example)
    assert asked


def compare(found: Any, func: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> None:
    """Compare an operation's result with that of fake tensors."""
    with mode:
        expected = func(*args, **kwargs)
    given = {id(x) for x in tree_leaves((args, kwargs))}
    assert form(found) == form(expected), func
    assert [id(x) in given for x in tree_leaves(found)] == [id(x) in given for x in tree_leaves(expected)], func


@pytest.mark.parametrize(
    ("func", "shapes", "more"),
    [
        (aten.linear.default, ((2, 3), (4, 5)), ()),
        (aten.linear.default, ((2, 3), (4, 3), (5,)), ()),
        (aten.add.Tensor, ((2, 3), (2, 4)), ()),
        (aten.add_.Tensor, ((2, 1), (2, 4)), ()),
        (aten.conv2d.default, ((1, 3, 5, 5), (4, 2, 3, 3)), ()),
        (aten.conv2d.default, ((1, 3, 2, 2), (4, 3, 3, 3)), ()),
        (aten.batch_norm.default, ((2, 3), (4,), (3,), (3,), (3,)), (False, 0.1, 1e-5, False)),
        (aten.batch_norm.default, ((2, 3), (4,), (3,), (3,), (3,)), (True, 0.1, 1e-5, False)),
        (aten.addmm.default, ((4,), (2, 3), (5, 4)), ()),
        (aten.view.default, ((2, 3),), ([4],)),
    ],
)
def test_what_does_not_fit_is_left_to_fake_tensors(func: Any, shapes: Any, more: Any) -> None:
    """A cut that leaves two sizes apart must fail, with what torch says of it."""
    mode, given = fake(*shapes)
    assert infer_result(func, (*given, *more), {}, mode) is NotImplemented


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 5), (2, 3, 4, 5), (0, 3, 4, 5), (2, 3, 1, 1)])
def test_a_norm_keeps_the_form_of_its_input(shape: tuple[int, ...], training: bool) -> None:
    """With statistics of its own and without."""
    mode, (x, weight, bias, mean, variance) = fake(shape, *[(3,)] * 4)
    more = (training, 0.1, 1e-5, False)
    given: list[tuple[Any, ...]] = [(x, weight, bias, mean, variance, *more), (x, None, None, mean, variance, *more)]
    for one in given:
        with mode:
            expected = aten.batch_norm.default(*one)
        assert form(infer_result(aten.batch_norm.default, one, {}, mode)) == form(expected)


def test_other_devices_precisions_and_casts_are_left_to_fake_tensors() -> None:
    """What depends on more than forms is not told."""
    mode, (x, y) = fake((2, 3), (2, 3))
    assert form(infer_result(aten.add.Tensor, (x, y), {}, mode)) == form(x)
    elsewhere = FakeTensor(mode, torch.empty(2, 3, device="meta"), torch.device("meta"))
    assert infer_result(aten.add.Tensor, (x, elsewhere), {}, mode) is NotImplemented
    assert infer_result(aten.relu.default, (x,), {}, FakeTensorMode()) is NotImplemented
    assert infer_result(aten.nonzero.default, (x,), {}, mode) is NotImplemented
    with torch.autocast("cpu", torch.bfloat16):
        assert infer_result(aten.relu.default, (x,), {}, mode) is NotImplemented
