"""Find the modules that can be dropped whole, because they only add to a value that exists without them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from regrow.core.axes import AxisGraph, Example
from regrow.core.axes.operations import Branch, Placeholder, lies_in
from regrow.core.candidates import Candidates, candidate_paths
from regrow.core.errors import first_line
from regrow.tracing.capture import Capture, capture, in_eval_mode, silence_torch
from regrow.tracing.effects import BranchError, Effects, Site, locate_branches, outermost, tensor_forms
from regrow.tracing.meta_copy import cast_example, fake_copy
from regrow.tracing.model_state import preserve_state, state_of
from regrow.tracing.nodes import op_name
from regrow.tracing.repeated_calls import NUMBER


class PlaceholderModule(nn.Module):
    """Replaces a dropped module so that the code around it still runs: it returns zeros, its own input, or ``None``.

    Plain attributes of the module ``replaced`` are copied, since code around it may read them.

    >>> PlaceholderModule(Placeholder("zero", 0))(torch.ones(3))
    tensor([0., 0., 0.])
    """

    def __init__(self, placeholder: Placeholder, replaced: nn.Module | None = None) -> None:
        super().__init__()
        self.placeholder = placeholder
        for name, value in vars(replaced).items() if replaced is not None else ():
            if type(value) in (bool, int, float, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """Return zeros like an input, or that input, in the form of the dropped module's output; or ``None``."""
        placeholder = self.placeholder
        if placeholder.gives == "nothing":
            return None
        value = args[placeholder.takes] if isinstance(placeholder.takes, int) else kwargs[placeholder.takes]
        if placeholder.gives == "zero":
            value = torch.zeros_like(value)
        if not placeholder.of:  # the output is one tensor
            return value
        return tuple(value if i == placeholder.at else None for i in range(placeholder.of))


def insert_placeholders(model: nn.Module, placeholders: Mapping[str, Placeholder]) -> dict[str, nn.Module]:
    """Replace modules by placeholders, in place; return path → the replaced module."""
    dropped = {path: model.get_submodule(path) for path in placeholders}
    set_modules(model, {path: PlaceholderModule(placeholders[path], module) for path, module in dropped.items()})
    return dropped


def set_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules at their paths (path → module), in place."""
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def find_placeholders(model: nn.Module) -> dict[str, Placeholder]:
    """Return path → placeholder of every dropped module of a network."""
    return {path: module.placeholder for path, module in model.named_modules() if isinstance(module, PlaceholderModule)}


@dataclass(frozen=True)
class ModuleCall:
    """One recorded call of a module: its arguments and its output."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    output: object


def with_branches(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return a copy of the axes that has, for each module that runs, whether it can be dropped whole, or why not.

    It takes about as long as recording the network once more, so :func:`regrow.trace` does not do it.

    Args:
        model: The traced network; it is left unchanged.
        axes: Its axes.

    >>> from regrow.tracing import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> axes = with_branches(net, trace(net, torch.ones(1, 4)))
    >>> axes.branches["1"].reason
    'linear in 2 reads it, which is no addition'
    """
    with preserve_state(model, entries=True):
        recorded = capture(model, axes.example, axes.decisions, tracer=axes.tracer)
    return replace(axes, branches=find_branches(model, recorded, axes.example) | list_candidates(model))


def list_candidates(model: nn.Module) -> dict[str, Branch]:
    """Return path → branch of every operation of a :class:`regrow.Candidates`; these need no analysis."""
    return {
        path: Branch(path, {path: Placeholder("nothing", 0)})
        for parent, paths in candidate_paths(model).items()
        for path in paths
        if type(model.get_submodule(parent)).forward is Candidates.forward
        and not isinstance(model.get_submodule(path), PlaceholderModule)
    }


def find_branches(
    model: nn.Module, recorded: Capture, example: Example, known: Mapping[str, Branch] | None = None
) -> dict[str, Branch]:
    """Return path → branch of every module that runs, with the reason if it cannot be dropped.

    {} if data decide which operations run, or the network does not run without numbers. ``known``: those before some
    were dropped; one that was free then is so too where another takes the same parameters away now.
    """
    if recorded.decisions is not None:
        return {}
    copy, fake = fake_copy(model, cast_example(example, model))
    try:
        calls, output = record_calls(copy, fake)
    except Exception:  # the network does not run on tensors without numbers
        return {}
    search = _Search(Effects(recorded), copy, fake, calls, output)
    result = {path: search.examine(path) for path, _ in copy.named_modules() if path in calls}
    earlier = {path for path, branch in (known or {}).items() if branch.free}
    result |= {path: branch for path, branch in search.find_repetitions(result).items() if path not in earlier}
    result |= search.find_failing(result)
    return result | (search.find_scalable(result) if known is None else {})


def record_calls(model: nn.Module, example: Example) -> tuple[dict[str, list[ModuleCall]], object]:
    """Run a network on an example in evaluation mode; return submodule's path → calls, and the network's output."""
    calls: dict[str, list[ModuleCall]] = {}

    def make_hook(path: str) -> Any:
        """Return a forward hook that adds a call to those of a path."""
        return lambda module, args, kwargs, output: calls.setdefault(path, []).append(ModuleCall(args, kwargs, output))

    hooks = [m.register_forward_hook(make_hook(p), with_kwargs=True) for p, m in model.named_modules() if p]
    try:
        with in_eval_mode(model), torch.no_grad(), silence_torch():
            return calls, model(*example.args, **example.kwargs)
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Search:
    """Search for branches in a recording, and in runs of a copy without numbers."""

    effects: Effects  # of the recording
    model: nn.Module  # the copy without numbers, which is changed on trial and restored
    example: Example  # without numbers, too
    calls: Mapping[str, list[ModuleCall]]  # path of a submodule → its calls, with nothing dropped
    output: object  # of the network then

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """Name of a module or tensor → all of its names."""
        by_id: dict[int, list[str]] = {}
        pairs = [*self.model.named_modules(remove_duplicate=False), *state_of(self.model).items()]
        for name, value in pairs:
            by_id.setdefault(id(value), []).append(name)
        return {name: by_id[id(value)] for name, value in pairs}

    def examine(self, path: str) -> Branch:
        """Return a module as a branch: with placeholders, or with the reason why it cannot be dropped."""
        try:
            if isinstance(self.model.get_submodule(path), PlaceholderModule):
                raise BranchError("it is dropped already")
            site = self.effects.find_site(path)
            dead = self.effects.dead(site)
            live = next((node for node in self.effects.inside[path] if node not in dead), None)
            if live is not None:
                raise BranchError(f"{op_name(live)} in it is used elsewhere too")
            top = outermost(name for name, nodes in self.effects.inside.items() if dead.issuperset(nodes))
            if path not in top:
                raise BranchError(f"it goes with {next(name for name in top if lies_in(path, name))}")
            return Branch(path, self._make_placeholders(path, top, site, dead))
        except BranchError as error:
            return Branch(path, reason=str(error))

    def _make_placeholders(self, path: str, top: list[str], site: Site, dead: set[Node]) -> dict[str, Placeholder]:
        """Return path → placeholder of a branch and of the modules in ``top`` that go with it, or raise BranchError.

        ``site``: as :meth:`Effects.find_site` returns it; ``dead``: the operations that go with the branch.
        """
        placeholders = {path: self._make_placeholder(path, site)}
        for name in sorted({*top} - {path}):
            try:
                placeholders[name] = self._make_placeholder(name, None)
            except BranchError as error:
                module = self.model.get_submodule(name)
                if any(True for _ in (*module.parameters(), *module.buffers())):
                    raise BranchError(f"{name} would go with it, but {error}") from None
        self._check_names(placeholders, dead)
        for name in self.first_numbered:
            if any(lies_in(name, other) for other in placeholders):
                raise BranchError(
                    f"{name} is the first of its kind, and a cache of keys and values counts tokens by it"
                )
        return placeholders

    def _make_placeholder(self, path: str, site: Site | None) -> Placeholder:
        """Return what replaces a droppable module (at ``site``), or one whose output only that uses (``None``)."""
        calls = self.calls.get(path, [])
        if len(calls) != 1 and (site is not None or not calls):
            raise BranchError(f"it runs {len(calls)} times")
        form = None if site is None else site[0].meta["val"]
        of, part = self._locate_output(calls[0].output, form)
        arguments: list[tuple[int | str, object]] = [*enumerate(calls[0].args), *calls[0].kwargs.items()]
        tensors = [(name, x) for name, x in arguments if isinstance(x, Tensor)]
        if not tensors:
            raise BranchError("it is given no tensor")
        fitting = [name for name, x in tensors if form is not None and (x.shape, x.dtype) == (form.shape, form.dtype)]
        takes = fitting[0] if fitting else tensors[0][0]
        return Placeholder("zero" if site is None or site[1] is None else "input", takes, of, part)

    @staticmethod
    def _locate_output(output: object, form: Tensor | None) -> tuple[int, int]:
        """Return (number of parts of an output, 0: one tensor; index of that like ``form``), or raise BranchError."""
        if isinstance(output, Tensor):
            return 0, 0
        parts = output if type(output) is tuple else ()
        fitting = [i for i, x in enumerate(parts) if isinstance(x, Tensor) and (form is None or x.shape == form.shape)]
        if len(fitting) != 1 or any(x is not None and not isinstance(x, Tensor) for x in parts):
            raise BranchError("which part of its answer is used is not clear")
        return len(parts), fitting[0]

    def _check_names(self, placeholders: Mapping[str, Placeholder], dead: set[Node]) -> None:
        """Raise BranchError if something dropped is used elsewhere, or a kept tensor by ``dead`` operations alone."""

        def is_dropped(name: str) -> bool:
            """Whether a tensor or module lies in a dropped module."""
            return any(lies_in(name, path) for path in placeholders)

        for name, all_names in self.names.items():
            other = next((other for other in all_names if not is_dropped(other)), "")
            if is_dropped(name) and other:
                raise BranchError(f"{name} is {other}, too")
        for node, name in self.effects.capture.states.items():
            users = self.effects.users.get(node, [])
            user = next((user for user in users if user not in dead), None)
            if is_dropped(name) and user is not None:
                raise BranchError(f"{name} is read elsewhere too, by {op_name(user)}")
            if users and not is_dropped(name) and dead.issuperset(users):
                raise BranchError(f"{name} would be left, and nothing would use it")

    @cached_property
    def first_numbered(self) -> list[str]:
        """The paths of the first numbered module of each class and settings."""
        result: dict[Any, tuple[int, str]] = {}
        for path, module in self.model.named_modules():
            if type(number := vars(module).get(NUMBER)) is int:
                kind = _class_and_settings(module)
                result[kind] = min(result.get(kind, (number, path)), (number, path))
        return [path for _, path in result.values()]

    def find_repetitions(self, branches: Mapping[str, Branch]) -> dict[str, Branch]:
        """Return path → branches that remove the same parameters as a better one, now with that as the reason."""
        result: dict[str, Branch] = {}
        numel = {name: x.numel() for name, x in self.model.named_parameters()}
        by_parameters: dict[frozenset[str], list[Branch]] = {}
        for branch in branches.values():
            parameters = frozenset(filter(branch.holds, numel))
            if branch.free and parameters:
                by_parameters.setdefault(parameters, []).append(branch)
        for parameters, members in by_parameters.items():
            inside = {b.module: sum(numel[name] for name in parameters if lies_in(name, b.module)) for b in members}
            # the one that passes its input on, and that holds most of the parameters itself
            best = max(members, key=lambda branch: (branch.gives == "input", inside[branch.module]))
            reason = f"it takes away what {best.module} does"
            result |= {b.module: Branch(b.module, reason=reason) for b in members if b is not best}
        return result

    def find_scalable(self, branches: Mapping[str, Branch]) -> dict[str, Branch]:
        """Return path → branch with its ``scales``, of the innermost branches that can all be dropped together."""
        parameters, found = dict(self.model.named_parameters()), dict[str, tuple[Branch, frozenset[str]]]()
        for path, branch in branches.items():
            held = frozenset(filter(branch.holds, parameters))
            names = self.effects.find_scales(*self.effects.find_site(path)) if branch.free else None
            if names and held.issuperset(names):
                found[path] = replace(branch, scales=tuple(dict.fromkeys(names))), held
        inner = [branch for branch, held in found.values() if not any(other < held for _, other in found.values())]
        if not self._go_together(inner):
            chosen = list[Branch]()
            for branch in inner:
                chosen += [branch] if self._go_together([*chosen, branch]) else []
            inner = chosen
        return {branch.module: branch for branch in inner}

    def _go_together(self, branches: Sequence[Branch]) -> bool:
        """Whether branches can be dropped at once: each sum keeps a summand, and what they leave is used."""
        placeholders = {path: placeholder for branch in branches for path, placeholder in branch.placeholders.items()}
        try:
            live = self.effects.live(locate_branches(self.effects, branches))
            self._check_names(placeholders, {*self.effects.calls} - live)
        except BranchError:
            return False
        return len(placeholders) == sum(len(branch.placeholders) for branch in branches)

    def find_failing(self, branches: Mapping[str, Branch]) -> dict[str, Branch]:
        """Return path → branches that fail on trial, with the reason; equally named ones are first tried together."""
        classes: dict[tuple[str, str], list[Branch]] = {}
        for path, branch in branches.items():
            if branch.free:
                classes.setdefault((re.sub(r"\d+", "#", path), branch.gives), []).append(branch)
        result: dict[str, Branch] = {}
        for members in classes.values():
            for branch in members if self.try_without(members) else ():
                if problem := self.try_without([branch]):
                    result[branch.module] = Branch(branch.module, reason=problem)
        return result

    def try_without(self, members: Sequence[Branch]) -> str:
        """Run the network without some branches; return what is wrong, empty if nothing is. The network is restored."""
        placeholders = {path: placeholder for branch in members for path, placeholder in branch.placeholders.items()}
        dropped = insert_placeholders(self.model, {path: placeholders[path] for path in outermost(placeholders)})
        try:
            calls, output = record_calls(self.model, self.example)
        except Exception as error:
            return f"the network does not run without it: {first_line(error)}"
        finally:
            set_modules(self.model, dropped)
        for branch in members:
            before, placeholder = self.calls[branch.module][0].output, branch.placeholders[branch.module]
            if placeholder.of and isinstance(before, tuple):
                before = before[placeholder.at]
            after = calls[branch.module][0].output if branch.module in calls else before
            if tensor_forms(after)[:1] != tensor_forms(before)[:1]:
                return "what takes its place would have another shape"
        return "" if tensor_forms(output) == tensor_forms(self.output) else "the network would answer in another shape"


def _class_and_settings(module: nn.Module) -> tuple[Any, ...]:
    """Return the class of a module, its words and flags, and which of its attributes are ``None``."""
    settings = sorted((name, value) for name, value in vars(module).items() if isinstance(value, str | bool))
    none = sorted(name for name, value in vars(module).items() if value is None and not name.startswith("_"))
    return type(module), tuple(settings), tuple(none)
