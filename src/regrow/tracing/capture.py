"""Record a model run on an example as a graph of ATen operations, with the name of each parameter and buffer."""

import inspect
import logging
import sys
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_unflatten

from regrow.core.axes import Decision, Example
from regrow.core.axes.operations import Tracer
from regrow.core.errors import first_line, keep_interrupts
from regrow.tracing.interception import RecordableCalls, as_exporting, follow_modules, without_garbage_collection
from regrow.tracing.meta_copy import fake_copy, leaves_in, map_tensors
from regrow.tracing.model_state import OutputError, copy_tensor, describe_state, preserve_state, select_state, state_of
from regrow.tracing.nodes import shapes_of
from regrow.tracing.record import DivergedError, Recorder
from regrow.tracing.repeated_calls import copy_repeats


class TraceError(ValueError):
    """Raised for a network that cannot be traced, with the reason."""


@dataclass(frozen=True)
class Capture:
    """A recording of one run: its ATen operations as a graph, and what the placeholders of the graph are."""

    graph: Graph  # its placeholders are parameters, buffers, constants and inputs
    states: dict[Node, str]  # placeholder → name of the parameter or buffer
    unused: tuple[str, ...]  # names of parameters that no operation reads
    constants: dict[Node, Tensor]  # placeholder → its value, where that is neither a parameter, a buffer nor an input
    decisions: tuple[Decision, ...] | None = None  # of an eager run; None where fake data were enough
    refusal: str = ""  # why fake data were not enough
    values: tuple[Tensor, ...] = ()  # of an eager run on real tensors: its outputs, and what decisions were based on
    tracer: Tracer = Tracer.RECORD  # how it was recorded, on fake data
    root: nn.Module = field(default_factory=nn.Module)  # the module that holds the attributes named in the graph

    @cached_property
    def inputs(self) -> list[Node]:
        """The placeholders of the network's inputs, in the order of :func:`leaves_in`."""
        known = self.states.keys() | self.constants.keys()
        return [node for node in self.graph.nodes if node.op == "placeholder" and node not in known]


def complete_example(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """Return arguments of a call as an example, with ``use_cache=False`` if the model takes that and none is given."""
    accepts = inspect.signature(model.forward).parameters
    named = dict(kwargs)
    if "use_cache" in accepts:
        named.setdefault("use_cache", False)
    return Example(tuple(args), named)


def capture(
    model: nn.Module,
    example: Example,
    decisions: tuple[Decision, ...] | None = None,
    orders: Iterable[Tensor] = (),
    tracer: Tracer | None = None,
) -> Capture:
    """Run a model once and record its operations: on fake data, or on the example where data decide which ones run.

    On fake data regrow records by itself, in a fraction of the time of ``torch.export``, which is used if that fails;
    a given ``tracer`` is the only one tried. ``decisions`` of an earlier eager run are replayed in a new one; an empty
    tuple runs eagerly too, and lets the data decide. ``orders``: results of its sorting operations, as in
    :func:`record_run`. The state of the model is restored. Raises :class:`TraceError` if the model cannot be recorded.
    """
    with in_mode(model, training=False), _prepare_recording(model):
        refused: Exception | None = None
        if decisions is None:
            try:
                return _capture_on_fake_data(model, example, tracer)
            except Exception as error:
                if isinstance(error, OutputError) or not holds_numbers(model, example):
                    raise _refusal(model, error) from error
                refused = error
        try:
            recorded = _to_capture(model, record_run(model, example, decisions or (), orders))
        except Exception as error:
            raise _refusal(model, refused or error) from error
        if refused is None:
            return recorded
        return replace(_repeat_on_fake_data(model, example, recorded), refusal=first_line(refused))


def capture_in_training(model: nn.Module, example: Example) -> Capture:
    """Record a model in training mode on fake data, where some networks use more parameters; may raise TraceError."""
    with in_mode(model, training=True), _prepare_recording(model):
        try:
            return _capture_on_fake_data(model, example, None)
        except Exception as error:
            raise _refusal(model, error) from error


@contextmanager
def _prepare_recording(model: nn.Module) -> Iterator[None]:
    """Context manager of a recording: gradients enabled, torch silent, no garbage collection; state is restored."""
    with torch.enable_grad(), silence_torch(), without_garbage_collection(), preserve_state(model, outside=True):
        yield


_READS_CACHED = "it reads what it kept when it ran before"  # the message of _CachedStateError


class _CachedStateError(RuntimeError):
    """Raised for a network that reads state of an earlier run, which fake data do not show."""


def _capture_on_fake_data(model: nn.Module, example: Example, tracer: Tracer | None) -> Capture:
    """Record a run on fake data by ``tracer``, or by RECORD or else EXPORT; raises where data would decide."""
    if tracer != Tracer.EXPORT:
        try:
            return _record_on_fake_data(model, example, tracer or Tracer.RECORD)
        except Exception as error:
            if tracer is not None or isinstance(error, _CachedStateError | OutputError):
                raise
            if isinstance(error.__context__, DynamicOutputShapeException):
                raise error.__context__ from None  # as torch.export would, for the same reason
    return _record_by_export(model, example)


def _record_on_fake_data(model: nn.Module, example: Example, tracer: Tracer) -> Capture:
    """Record a run of a fake copy by :func:`record_run`; raises RuntimeError if it reads tensors cached before.

    ``tracer``: RECORD (in export mode, repeated modules are copied) or PLAIN (neither).
    """
    leaves = leaves_in(example)
    if unknown := next((x for x in leaves if not isinstance(x, Tensor) and type(x) not in _EXAMPLE_TYPES), None):
        raise RuntimeError(f"it is given a {type(unknown).__name__}")
    is_real = holds_numbers(model, example)
    if not any(isinstance(x, FakeTensor) for x in (*model.parameters(), *model.buffers(), *leaves)):
        model, example = fake_copy(model, example)
    with torch.no_grad() if tracer == Tracer.PLAIN else as_exporting():
        recorder = record_run(model, example, copying=tracer == Tracer.RECORD)
    if is_real and any(isinstance(x, FakeTensor) for x in recorder.constants.values()):
        raise _CachedStateError(_READS_CACHED)
    return replace(_to_capture(model, recorder), decisions=None, tracer=tracer)


# Types that an example may have besides tensors.
_EXAMPLE_TYPES = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))


def _record_by_export(model: nn.Module, example: Example) -> Capture:
    """Record a model by ``torch.export``; raises if the run changes the model's state or data decide a size."""
    before = describe_state(model)
    with keep_interrupts(), tracing(TracingContext(_make_refusing_mode())), preserve_state(model):
        program = torch.export.export(model, example.args, dict(example.kwargs), strict=False)
        if describe_state(model) != before:
            raise _CachedStateError(_READS_CACHED)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in program.graph.nodes:
        shapes_of(node)  # raises for a size that only the data know
    states = {node: names[node.name] for node in placeholders if node.name in names}
    return Capture(
        graph=program.graph,
        states=states,
        unused=_unused_parameters(states, {*signature.inputs_to_parameters.values()}),
        constants={node: program.constants[lifted[node.name]] for node in placeholders if node.name in lifted},
        tracer=Tracer.EXPORT,
        root=program.graph_module,
    )


def _make_refusing_mode() -> FakeTensorMode:
    """Return the mode of an export that fails as soon as data would decide a size, not only where that is used.

    No rule can read such a size, and a detector asks for hundreds before ``torch.export`` itself gives up.
    """
    sizes = ShapeEnv(tracked_fakes=[], allow_dynamic_output_shape_ops=False, trace_asserts=True)
    with config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        return FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True, export=True)


def _to_capture(model: nn.Module, recorder: Recorder) -> Capture:
    """Return what a recorder holds after a run of the model as a :class:`Capture`."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unused = _unused_parameters(recorder.states, parameters)
    decisions, values = tuple(recorder.decisions), tuple(recorder.values)
    return Capture(recorder.graph, recorder.states, unused, recorder.constants, decisions, values=values)


def _unused_parameters(states: Mapping[Node, str], parameters: Container[str]) -> tuple[str, ...]:
    """Return the names of those placeholders (``states``) that no operation reads and that are in ``parameters``."""
    return tuple(name for node, name in states.items() if not node.users and name in parameters)


def _repeat_on_fake_data(model: nn.Module, example: Example, recorded: Capture) -> Capture:
    """Repeat an eager run (``recorded``) with its decisions on fake data, as cut copies are recorded, to be comparable.

    If the network does not run on fake data, no copy will, and the real run is returned.
    """
    try:
        copy, fake = fake_copy(model, example)
        again = _to_capture(copy, record_run(copy, fake, recorded.decisions or ()))
        return replace(again, values=recorded.values)
    except Exception:
        return recorded


def _refusal(model: nn.Module, error: Exception) -> TraceError:
    """Return the TraceError to raise for a model whose recording raised ``error``."""
    return TraceError(
        f"torch.export refuses {type(model).__name__}: {first_line(error)}. "
        "Check that the example input is what the model's forward takes"
    )


def holds_numbers(model: nn.Module, example: Example) -> bool:
    """Whether all tensors of a model and an example have values: none is fake or on the meta device."""
    tensors = [*model.parameters(), *model.buffers(), *leaves_in(example)]
    return not any(isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta) for x in tensors)


@contextmanager
def silence_torch() -> Iterator[None]:
    """Context manager that silences torch's logs, warnings and all of stderr; the caller reports a failure itself."""
    with ExitStack() as stack:
        for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"):
            logger = logging.getLogger(name)
            stack.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
        stack.enter_context(redirect_stderr(StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def in_eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager in which the model is in evaluation mode; each module gets its own mode back."""
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Context manager in which the model is in training or evaluation mode, uncompiled; modes are restored."""
    compiled = "torch._dynamo" in sys.modules  # set_stance would load it, where nothing is compiled
    with keep_modes(model), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        model.train(training)
        yield


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Context manager that restores whether each module is in training mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def record_run(
    model: nn.Module,
    example: Example,
    answers: tuple[Decision, ...] = (),
    orders: Iterable[Tensor] = (),
    copying: bool = True,
) -> Recorder:
    """Run a network, on real or on fake tensors, and record its operations; its second run, if the first caches.

    ``answers`` are decisions of an earlier run; after them the data decide (on fake tensors: DivergedError).
    ``orders``: the positions that each sorting operation is to return, in order of the calls, as two networks may
    order equal values differently. ``copying``: copy the operations of repeated modules, on fake tensors. A tied tensor
    is a placeholder under each of its names, and used under the last, as in ``torch.export``.
    """
    leaves, spec = tree_flatten((example.args, dict(example.kwargs)))
    tensors = (*model.parameters(), *model.buffers(), *leaves)
    fake = next((x.fake_mode for x in tensors if isinstance(x, FakeTensor)), None)
    names = [*state_of(model)]
    before, orders = describe_state(model), list(orders)

    def run() -> Recorder:
        """Run the network once with a new recorder, and return that."""
        inputs = [copy_tensor(x) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(inputs, spec)
        with keep_interrupts(), follow_modules(model) as running:
            recorder = Recorder(answers, orders, running, fake)
            with torch._C.DisableTorchFunction():
                for name, tensor in select_state(model, names).items():
                    recorder.states[recorder.placeholder(tensor)] = name
                for value in inputs:
                    recorder.placeholder(value)
            repeated = copy_repeats(model, recorder) if copying and fake is not None else nullcontext()
            with RecordableCalls(), enable_python_dispatcher(), repeated, recorder:
                result = model(*args, **kwargs)
        recorder.end(result)
        return recorder

    if fake is None and not answers:  # on real tensors the first run is not recorded: it may fill caches
        with torch.no_grad():
            inputs = map_tensors(example, copy_tensor)
            model(*inputs.args, **inputs.kwargs)
        return run()
    try:
        recorder = run()
    except DivergedError:
        if describe_state(model) == before:
            raise
        return run()  # the first run has cached something, so that the second decides otherwise
    return recorder if describe_state(model) == before else run()
