"""Find stacks of residual blocks, and the parameters of a block that make a copy compute nothing when they are 0."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.axes import AxisGraph, Product, RecordedStep, Role, axes_in
from regrow.core.branches import lies_in
from regrow.core.change import Stack
from regrow.tracing.block_copies import StackError, stack_at
from regrow.tracing.branches import ModuleCall, record_calls
from regrow.tracing.capture import TraceError, first_line
from regrow.tracing.meta_copy import cast_example, fake_example, meta_copy
from regrow.tracing.nodes import ALIASES

_KEEP = ALIASES | {
    *("dropout", "relu", "hardtanh", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze"),
    *("unsqueeze", "roll", "slice", "getitem", "narrow", "contiguous"),
}
"""Operations between a sum and the output of a block, or between the sum and what is added, that only move entries."""


def find_stacks(model: nn.Module, axes: AxisGraph) -> dict[str, Stack]:
    """Return path → stack, for every container with two or more modules of one class, of which some can be copied.

    A module can be copied if it runs once, gives a tensor of the form of its first input, to which it has added
    something (a rectifier may follow), and parameters write what is added. Of stacks in stacks, the innermost count.

    Args:
        model: The traced network; it is left unchanged.
        axes: Its axes.

    Raises:
        TraceError: If the network does not run on tensors without numbers.
    """
    copy, mode = meta_copy(model, {})
    try:
        calls, _ = record_calls(copy, fake_example(cast_example(axes.example, model), mode))
    except Exception as error:
        raise TraceError(f"the network does not run on tensors without numbers: {first_line(error)}") from None
    blocks = _Blocks(axes, calls)
    result: dict[str, Stack] = {}
    for path, module in model.named_modules():
        if path and isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
            try:
                stack_at(model, path, len(module))
            except StackError:
                continue
            kinds = [type(one) for one in module]
            zeros = {
                i: names
                for i, name in enumerate(module._modules)
                if kinds.count(kinds[i]) > 1 and (names := blocks.zeros(f"{path}.{name}"))
            }
            if zeros:
                result[path] = Stack(len(module), zeros)
    return {path: one for path, one in result.items() if not any(lies_in(o, path) and o != path for o in result)}


@dataclass(frozen=True)
class _Blocks:
    """Shared state of the search for blocks that can be copied."""

    axes: AxisGraph
    calls: Mapping[str, list[ModuleCall]]

    def zeros(self, path: str) -> tuple[str, ...]:
        """Return the names, within a module, of the parameters that are 0 in a copy; empty if it cannot be copied."""
        calls = self.calls.get(path, [])
        if len(calls) != 1 or not _keeps_form(calls[0]):
            return ()
        inside = {i for i, step in enumerate(self.axes.steps) if lies_in(step.module, path)}
        outputs = [i for i in inside if not inside.issuperset(self.users.get(i, ())) or i not in self.users]
        names = self._written(outputs[0], inside) if len(outputs) == 1 else ()
        within = all(lies_in(name, path) and name in self.axes.parameters for name in names)
        return tuple(name.removeprefix(f"{path}.") for name in names) if within else ()

    def _written(self, output: int, inside: set[int]) -> tuple[str, ...]:
        """Return the parameters of the last operations before the sums that make an output; empty without a sum."""
        ask, seen, sums, passed = [output], {output}, 0, False
        names: dict[str, None] = {}
        for number in ask:  # which grows
            step = self.axes.steps[number]
            before = [one for one in step.operands if isinstance(one, int)]
            if number not in inside:
                passed = True
            elif step.op in _KEEP or (step.op == "add" and before):
                sums += step.op == "add" and len(before) > 1
                names |= dict.fromkeys(_names(step))
                ask += [one for one in before if one not in seen]
                seen |= {*before}
            else:
                found = [*_names(step)] or self._makers(number, inside, output)
                if not found:
                    return ()
                names |= dict.fromkeys(found)
        own = [name for name in names if name in self.axes.parameters]
        return tuple(own) if passed and sums else ()

    def _makers(self, number: int, inside: set[int], output: int) -> list[str]:
        """Return the nearest parameters before an operation, in a block, that make units of the output's axes."""
        out = {key for dims in self.axes.steps[output].shapes for key in axes_in(Product(dims or ()))}
        makes = {s.name for key in out for s in self.axes[key].slots if s.role in (Role.PRODUCES, Role.SHIFTS)}
        ask, seen = [number], {number}
        found: list[str] = []
        for one in ask:  # which grows
            own = [name for name in _names(self.axes.steps[one]) if name in makes]
            found += own
            before = [i for i in self.axes.steps[one].operands if isinstance(i, int) and i in inside and i not in seen]
            ask += before if not own else []
            seen |= {*before}
        return found

    @cached_property
    def users(self) -> dict[int, list[int]]:
        """Operation → the operations that read its result."""
        result: dict[int, list[int]] = {}
        for i, step in enumerate(self.axes.steps):
            for operand in step.operands:
                if isinstance(operand, int):
                    result.setdefault(operand, []).append(i)
        return result


def _names(step: RecordedStep) -> Iterable[str]:
    return (operand for operand in step.operands if isinstance(operand, str))


def _keeps_form(call: ModuleCall) -> bool:
    given = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
    made = next((x for x in tree_leaves(call.answer) if isinstance(x, Tensor)), None)
    return given is not None and made is not None and (given.shape, given.dtype) == (made.shape, made.dtype)
