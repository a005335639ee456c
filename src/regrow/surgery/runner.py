"""Run a recorded network operation by operation, with dropped units replaced wherever they are read."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

from regrow.core.axes import Dim, size_of
from regrow.core.axes.operations import Branch
from regrow.surgery.layout import Layout, lay_out
from regrow.tracing.capture import Capture
from regrow.tracing.effects import Effects, locate_branches
from regrow.tracing.model_state import output_tensors, state_of
from regrow.tracing.nodes import op_name, operands
from regrow.tracing.own_run import as_double, compute_grouped_product, made_in_double, widen_dtype
from regrow.tracing.readings import GraphBlock, ReadDim
from regrow.tracing.record import ORDERS
from regrow.tracing.steps import list_operations

# (name of a parameter or buffer, whether in float64) → the tensor
GetTensor = Callable[[str, bool], Tensor]

# Weights with more entries are cast to float64 in parts: computed ones above LARGE, stored ones above WIDE
LARGE, WIDE = 2**24, 2**18

# How many entries a part of a convolution's weight has, for each of which the input is unfolded, and of a matrix
PART, MATRIX_PART = 2**18, 2**16

_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
_READS_A_WEIGHT = _CONVOLUTIONS | {"embedding", "linear", "rms_norm"}

# A network's outputs, and values that are compared beside them; `None` for one that is not comparable
Results = list[Tensor | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Masking:
    """The replacements that mask dropped units and branches in a recorded network.

    Args:
        reads: Operation → its reads of dropped units: (dimension that is read, operand, mask of entries that stay).
        groups: For a norm inside groups: operation → how many groups stay.
        means: Name of a weight → index of an input → the value that replaces it where it is dropped.
        compared: Operation → (operand that is compared beside the outputs, whether none of its entries is dropped).
        branches: Output of a dropped branch → the value that replaces it, or ``None`` for zeros.
    """

    reads: Mapping[Node, list[tuple[ReadDim, Node, Tensor]]] = field(default_factory=dict)
    groups: Mapping[Node, int] = field(default_factory=dict)
    means: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    compared: Mapping[Node, list[tuple[Node, bool]]] = field(default_factory=dict)
    branches: Mapping[Node, Node | None] = field(default_factory=dict)


def make_masking(
    recorded: Capture,
    reads: Iterable[ReadDim],
    sizes: Mapping[str, int],
    keep: Mapping[str, tuple[int, ...]],
    means: Mapping[str, Mapping[int, float]],
    compared: Iterable[tuple[Node, Node, tuple[Dim, ...]]] = (),
    drop: Collection[Branch] = (),
) -> Masking:
    """Return the replacements that mask a recorded network to the kept units, and without branches (``drop``).

    ``sizes``: of all axes before the plan; ``keep``: axis key → positions of the kept units; ``means``: as in
    :class:`regrow.core.plan.Plan`; ``compared``: (operation, operand to compare too, its dimensions).
    """
    nodes = list_operations(recorded)
    masked: dict[Node, list[tuple[ReadDim, Node, Tensor]]] = {}
    groups: dict[Node, int] = {}
    units = {key: Layout.of(torch.tensor(kept, dtype=torch.long)) for key, kept in keep.items()}
    for read in reads:
        mask = _make_keep_mask(read.dim, sizes, units)
        if not bool(mask.all()):
            node = nodes[read.step]
            masked.setdefault(node, []).append((read, operands(node)[read.operand], mask))
            if read.fill is None:
                groups[node] = int(_make_keep_mask(read.groups, sizes, units).sum())
    operands_compared: dict[Node, list[tuple[Node, bool]]] = {}
    for node, operand, dims in compared:
        whole = all(bool(_make_keep_mask(dim, sizes, units).all()) for dim in dims)
        operands_compared.setdefault(node, []).append((operand, whole))
    branches = locate_branches(Effects(recorded), drop) if drop else {}
    return Masking(masked, groups, means, operands_compared, branches)


class Runner(Interpreter):
    """Interpreter of a recorded network that can be masked, run in float64 (``double``), and run block by block.

    ``leaves`` are the tensors of its inputs; ``exact`` says whether ``load`` returns the tensor of a name as the
    network stores it, to be cast in parts. Once it has run to the end, ``outputs`` has the outputs and values compared
    beside them, and ``orders`` the indices that sorting operations returned.
    """

    def __init__(
        self,
        recorded: Capture,
        leaves: Sequence[object],
        load: GetTensor,
        double: bool,
        masking: Masking | None = None,
        *,
        exact: Callable[[str], bool] = lambda name: False,
    ) -> None:
        super().__init__(recorded.root, garbage_collect_values=True, graph=recorded.graph)
        self.states, self.load, self.double, self.masking = recorded.states, load, double, masking or Masking()
        self.nodes = list_operations(recorded)
        self.exact = exact
        self.orders: list[Tensor] = []
        self.compared: Results = []
        self.outputs: Results = []
        self.loaded: dict[Node, Tensor] = {}
        self.writers = Effects(recorded).writers
        self.written = {node for node in self.writers if node in recorded.states}  # what is written is read later
        self.todo = [node for node in recorded.graph.nodes if node.op != "placeholder"]
        self.at = 0
        inputs = iter(leaves)
        for node in recorded.graph.nodes:
            if node.op == "placeholder" and node not in recorded.states:
                value = recorded.constants[node] if node in recorded.constants else next(inputs)
                self.env[node] = _copy_written(as_double(value) if double else value)

    def run_until(self, stop: Node | None = None) -> None:
        """Run on up to ``stop``, without it, or to the end; loaded parameters are released then."""
        with torch.no_grad(), made_in_double(self.double):
            while self.at < len(self.todo) and self.todo[self.at] is not stop:
                node = self.todo[self.at]
                self.at += 1
                self.env[node] = self.run_node(node)
                if not self.masking.branches:  # a branch's input may be read where nothing else reads it any more
                    for operand in self.user_to_last_uses.get(node, ()):
                        self.env.pop(operand, None)
        self.loaded.clear()

    def run_only(
        self, nodes: Iterable[Node], before: Mapping[Node, object] | None = None, outputs: Sequence[Node] = ()
    ) -> list[object]:
        """Run operations; return the values of ``outputs``.

        ``before``: node → value that they read; all values are forgotten then. ``None``: what was computed stays.
        """
        known = set(self.env)
        self.env.update(before or {})
        with torch.no_grad(), made_in_double(self.double):
            for node in nodes:
                self.env[node] = self.run_node(node)
        results = [self.env[node] for node in outputs]
        self.loaded.clear()
        if before is not None:
            self.env = {node: value for node, value in self.env.items() if node in known}
        return results

    def run_node(self, n: Node) -> object:
        """Run one operation, or return its replacement where a branch is dropped."""
        if self.double and op_name(n).startswith("_assert"):
            return None  # it asserts the precision that was recorded
        for operand, whole in self.masking.compared.get(n, ()):
            self.compared.append(self._tensor(operand).clone() if whole else None)  # a cut gives others another form
        if n in self.masking.branches:
            source = self.masking.branches[n]
            return torch.zeros_like(self._run(n)) if source is None else self._tensor(source).clone()
        norms = [(read, mask) for read, _, mask in self.masking.reads.get(n, ()) if read.fill is None]
        out = self._run_norm(n, *norms[0]) if norms else self._run(n)
        if n.target in ORDERS:
            self.orders.append(out if isinstance(out, Tensor) else out[1])
        if n.op == "output":
            self.outputs = [*float_outputs(out), *self.compared]
        return out

    def value(self, node: Node) -> object:
        """Return the present value of a node; a parameter or buffer is loaded, and kept until a run ends."""
        if node in self.env:
            return self.env[node]
        if node not in self.loaded:
            value = self.load(self.states[node], self.double)
            if node in self.written:
                self.env[node] = value = _copy_written(value)
            else:
                self.loaded[node] = value
            return value
        return self.loaded[node]

    def _tensor(self, node: Node) -> Tensor:
        """Return the present value of a node that is a tensor."""
        value = self.value(node)
        assert isinstance(value, Tensor)
        return value

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple, dict]:
        """Return the arguments of an operation, with dropped units replaced."""
        values: dict[Node, Any] = {operand: self.value(operand) for operand in n.all_input_nodes}
        for read, operand, mask in self.masking.reads.get(n, ()):
            if read.fill is not None:
                values[operand] = self._mask(values[operand], read, mask)

        def evaluate(argument: Any) -> Any:
            if isinstance(argument, Node):
                return values[argument]
            return widen_dtype(argument) if self.double else argument

        return map_aggregate((n.args, n.kwargs), evaluate)

    def _run(self, n: Node) -> Any:
        """Run one operation on its masked operands, in float64 if asked for; return its result."""
        if not self.double or n.op != "call_function":
            return super().run_node(n)
        name, target = op_name(n), cast(Callable[..., Any], n.target)
        operand: Sequence[Node] = operands(n) if name in _READS_A_WEIGHT else ()
        if name == "embedding" and operand[0] in self.states:
            table = self.load(self.states[operand[0]], False)
            return as_double(target(table, *(self.value(x) if isinstance(x, Node) else x for x in n.args[1:])))
        if len(operand) > 1 and self._needs_parts(n, name, operand[0], operand[1]):
            return self._run_in_parts(n, name, operand)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if name in ("_grouped_mm", "grouped_mm_fallback"):
            target = compute_grouped_product
        if name == "rms_norm" and (len(args) < 4 or args[3] is None):  # it takes the epsilon of its own precision
            args = (*args[:2], args[2] if len(args) > 2 else None, torch.finfo(operand[0].meta["val"].dtype).eps)
        return target(*args, **kwargs)

    def _needs_parts(self, n: Node, name: str, source: Node, weight: Node) -> bool:
        """Whether an operation is linear, or an ungrouped convolution, with a large weight to be cast in parts."""
        if name not in _CONVOLUTIONS | {"linear"} or weight not in self.states:
            return False
        stored, form = self.exact(self.states[weight]), weight.meta["val"]
        if form.numel() <= (WIDE if stored else LARGE):
            return False
        return name == "linear" or bool(
            stored
            and not n.kwargs
            and (n.args[6] if len(n.args) > 6 else 1) == 1
            and weight not in self.written
            and source.meta["val"].dim() == form.dim()
            and all(operand is source and read.fill is not None for read, operand, _ in self.masking.reads.get(n, ()))
        )

    def _run_in_parts(self, n: Node, name: str, operand: Sequence[Node]) -> Tensor:
        """Return an operation's result, its weight being cast to float64 some rows, or filters, at a time."""
        x = self._masked_input(n, operand[0])
        full, bias = self.load(self.states[operand[1]], False), self._tensor(operand[2]) if len(operand) > 2 else None
        if name == "linear":
            columns = x.reshape(-1, x.shape[-1]).mT
            parts = [as_double(part) @ columns for part in full.split(max(1, MATRIX_PART // full.shape[1]))]
            result = torch.cat(parts).mT.contiguous().view(*x.shape[:-1], len(full))
            return result if bias is None else result + bias
        options, target = map_aggregate(n.args[3:], widen_dtype), cast(Callable[..., Tensor], n.target)
        filters = full.split(max(1, PART // full[0].numel()))
        result = torch.cat([target(x, as_double(part), None, *options) for part in filters], 1)
        return result if bias is None else result + bias.view([-1, *(1 for _ in full.shape[2:])])

    def _masked_input(self, n: Node, source: Node) -> Tensor:
        """Return the operand ``source`` of an operation, with dropped units replaced."""
        value = self._tensor(source)
        for read, operand, mask in self.masking.reads.get(n, ()):
            value = self._mask(value, read, mask) if operand is source else value
        return value

    def _mask(self, value: Tensor, read: ReadDim, mask: Tensor) -> Tensor:
        """Return an operand with the entries that ``mask`` lacks replaced by the read's fill, or by means."""
        shape = [1] * value.dim()
        shape[read.axis] = -1
        assert read.fill is not None
        fill = torch.full((len(mask),), read.fill, dtype=value.dtype)
        for position, mean in self.masking.means.get(read.weight, {}).items():
            fill[position] = mean
        return torch.where(mask.view(shape).to(value.device), value, fill.view(shape).to(value.device))

    def _run_norm(self, n: Node, read: ReadDim, mask: Tensor) -> Any:
        """Run a layer or group norm over the kept units alone; return the result, 0 for the others."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, index = args[0], mask.nonzero().flatten().to(args[0].device)
        part = x.index_select(read.axis, index)
        rest = [a.index_select(0, index) if isinstance(a, Tensor) and a.dim() == 1 else a for a in args[1:]]
        rest[0] = [len(index)] if isinstance(rest[0], list | tuple) else self.masking.groups[n]
        out = n.target(part, *rest, **kwargs)  # type: ignore[operator]
        return torch.zeros_like(x, dtype=out.dtype).index_copy(read.axis, index, out)


def run_both(masked: Runner, shrunk: Runner, blocks: Sequence[GraphBlock]) -> None:
    """Run two recorded networks to their ends, block by block in turns, each block from the same random seed."""
    with preserve_generators():
        for block in blocks:
            for runner in (masked, shrunk):
                reseed(block.start)
                runner.run_until(runner.nodes[block.stop] if block.stop < len(runner.nodes) else None)
        masked.run_until()
        shrunk.run_until()


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Context manager that restores the state of torch's global random generators."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def reseed(seed: int) -> None:
    """Seed torch's global generators, faster than ``torch.manual_seed`` where CUDA is not in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def tensor_getter(model: nn.Module, others: Mapping[str, Tensor] | None = None) -> GetTensor:
    """Return a function (name, in float64?) → parameter or buffer of the network; ``others`` take precedence."""
    state = {**state_of(model), **(others or {})}

    def get(name: str, double: bool) -> Tensor:
        return as_double(state[name].detach()) if double else state[name].detach()

    return get


def float_outputs(value: object) -> Results:
    """Return the floating-point tensors in a network's output, complex ones as real; without any, all as float64."""
    tensors = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in output_tensors(value)]
    return [x for x in tensors if x.is_floating_point()] or [x.double() for x in tensors]


def _copy_written(value: T) -> T | Tensor:
    """Return a copy of a tensor, since operations may write into it; a parameter or other value is returned itself."""
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def _make_keep_mask(dim: Dim, sizes: Mapping[str, int], units: Mapping[str, Layout]) -> Tensor:
    """Return which entries of a dimension stay, ``[entries]`` bool, given the kept units of each axis."""
    mask = torch.zeros(size_of(dim, sizes), dtype=torch.bool)
    mask[lay_out(dim, sizes, units).source] = True
    return mask
