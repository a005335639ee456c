"""Networks to save and load again, with how each is cut; the fresh process of the tests imports this too."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow import Plan, apply, trace
from regrow.core.axes import AxisGraph
from regrow.nets import Origin
from regrow.nets.language import origin_of
from zoo import ZOO, images, randomise


class Small(nn.Module):
    """A net with a buffer that no state dict holds, and a tie."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.rise = nn.Linear(6, width)
        self.fall = nn.Linear(width, 4, bias=False)
        self.again = nn.Linear(width, 4, bias=False)
        self.again.weight = self.fall.weight
        self.own = nn.Linear(width, 4, bias=False)
        self.register_buffer("tilt", torch.linspace(0.5, 1.5, width), persistent=False)
        self.register_buffer("shift", torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.rise(x).relu() * self.tilt
        return self.fall(y) + self.again(y) + self.own(y) + self.shift


def small() -> nn.Module:
    torch.manual_seed(3)
    return Small().eval()


def normed() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 2)).eval()


def mobile() -> nn.Module:
    from torchvision.models import get_model

    return randomise(get_model("mobilenet_v2", weights=None))


def resnet() -> nn.Module:
    from torchvision.models import get_model

    return randomise(get_model("resnet18", weights=None))


def speech() -> nn.Module:
    return ZOO["gru_speech"].build()


@dataclass(frozen=True)
class Case:
    """A network, an input, where it comes from, and whether dropped units leave their means in a bias."""

    build: Callable[[], nn.Module]
    example: Callable[[], tuple]
    origin: Callable[[nn.Module], Origin | None]
    means: tuple[str, ...] = ()
    model: Callable[[], nn.Module] | None = None
    """What loading has to be given."""


def _language(name: str, *means: str) -> Case:
    net = ZOO[name]
    return Case(net.build, net.example, lambda model: origin_of(model, name), means)


def _vision(name: str, build: Callable[[], nn.Module]) -> Case:
    return Case(build, images(3, 64), lambda _: Origin("torchvision", name, {}, name))


def _rows() -> tuple[tuple, dict]:
    return (torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),), {}


CASES: dict[str, Case] = {
    "callable": Case(
        small, _rows, lambda _: Origin("callable", "store.saved:small", builder=small), ("own.weight",), small
    ),
    "object": Case(lambda: small(), _rows, lambda _: None, ("own.weight",), small),
    "recurrent": Case(
        speech,
        ZOO["gru_speech"].example,
        lambda _: Origin("callable", "store.saved:speech", builder=speech),
        (),
        speech,
    ),
    "resnet18": _vision("resnet18", resnet),
    "mobilenet_v2": _vision("mobilenet_v2", mobile),
    "llama_tied": _language("llama_tied", "mlp.down_proj.weight"),
    "llama_eager": _language("llama_eager", "mlp.down_proj.weight", "self_attn.o_proj.weight"),
    "gpt2": _language("gpt2", "mlp.c_proj.weight", "attn.c_proj.weight"),
    "gemma3": _language("gemma3", "mlp.down_proj.weight"),
}


def cut(case: Case, seed: int = 0) -> tuple[nn.Module, AxisGraph, Plan]:
    """The network of a case after an irregular plan over every free axis, the residual width too."""
    model, (args, kwargs) = case.build(), case.example()
    axes = trace(model, *args, **kwargs)
    plan = _irregular(axes, torch.Generator().manual_seed(seed))
    plan = replace(plan, means=dict(_means(case, axes, plan)))
    model, after = apply(model, axes, plan)
    return model, after, plan


def _irregular(axes: AxisGraph, generator: torch.Generator) -> Plan:
    """Cut every free axis by a random number of random units; those that must keep equal sizes, by as many entries."""
    keep: dict[str, list[int]] = {}
    left: dict[str, int] = {}
    for axis in axes.free():
        group = [other for other in axes if other.count == axis.count] if axis.count else [axis]
        if not all(other.free for other in group) or axis.size < 2:
            continue
        step = lcm(*(other.times * other.multiple for other in group))
        steps = axis.size * axis.times // step
        drawn = step * int(torch.randint((steps + 1) // 2, max(steps, 2), (), generator=generator))
        units = left.setdefault(axis.count or axis.key, drawn) // axis.times
        keep[axis.key] = torch.randperm(axis.size, generator=generator)[:units].tolist()
    return Plan.keeping(axes, keep)


def _means(case: Case, axes: AxisGraph, plan: Plan):
    for key, change in plan.changes.items():
        for slot in axes[key].consumers():
            if change.dropped and slot.name.endswith(case.means or ("-",)) and "again" not in slot.name:
                gone = slot.positions(change.size)[list(change.dropped)].flatten().tolist()
                others = [a for a in axes for s in a.consumers() if s.name == slot.name and a.key != key]
                if all(other.key not in plan.changes for other in others) or not others:
                    yield slot.name, {unit: 0.1 + 0.01 * unit for unit in gone}


def answers(model: nn.Module, case: Case) -> list[Tensor]:
    """What a network says to the input of its case."""
    args, kwargs = case.example()
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def load_all(folder: Path) -> None:
    """What the fresh process does: load every model and write down what it says."""
    from safetensors.torch import save_file

    from regrow.store import load

    for place in sorted(folder.iterdir()):
        case = CASES[place.name]
        torch.manual_seed(99)  # whatever a builder draws must not matter
        said = answers(load(place, model=case.model), case)
        save_file({str(i): tensor.contiguous() for i, tensor in enumerate(said)}, folder / f"{place.name}.answers")
