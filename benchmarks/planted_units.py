"""Units planted in the MLPs of a widened language model, and how many of them a pruner treats right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.core.sources import Batch

KEPT, LARGE = 16, 3.0


@dataclass(frozen=True)
class Planted:
    """What was planted in one MLP, as positions of its units.

    Args:
        duplicates: (old unit, its copy), ``[n, 2]``.
        pairs: The two units that cancel, ``[n, 2]``.
        inactive: Units whose activation is 0, ``[n]``.
        keep: Old units that are active in the unseen domain alone, ``[KEPT]``.
    """

    duplicates: Tensor
    pairs: Tensor
    inactive: Tensor
    keep: Tensor

    def single(self, units: int) -> Tensor:
        """Return the old units without a duplicate, of an MLP with so many units."""
        new = torch.cat([self.duplicates.flatten(), self.pairs.flatten(), self.inactive])
        return torch.ones(units, dtype=torch.bool).index_fill(0, new, False).nonzero()[:, 0]


def record_inputs(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the inputs of the projections of every MLP, one row per position, by name of the module."""
    rows: dict[str, list[Tensor]] = {}
    names = [name for name, _ in model.named_modules() if name.endswith(("mlp.gate_proj", "mlp.down_proj"))]

    def add(name: str, value: Tensor) -> None:
        rows.setdefault(name, []).append(value.flatten(0, -2))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(*batch.args, **batch.kwargs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each) for name, each in rows.items()}


def plant(model: nn.Module, old: int, seen: Sequence[Batch], unseen: Sequence[Batch], seed: int) -> list[Planted]:
    """Replace the weights of the new units of every MLP; the outputs of the network stay."""
    generator = torch.Generator().manual_seed(seed)
    mlps = [layer.mlp for layer in model.model.layers]
    here, away = record_inputs(model, seen), record_inputs(model, unseen)
    result = []
    with torch.no_grad():
        for number, mlp in enumerate(mlps):
            entry, inside = f"model.layers.{number}.mlp.gate_proj", f"model.layers.{number}.mlp.down_proj"
            rows = here[entry].double()
            active, foreign = (one[inside][:, :old].double().square().mean(0) for one in (here, away))
            gate, up, down = (one.weight for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            n = (gate.shape[0] - old) // 3 // 2 * 2
            new = torch.arange(old, gate.shape[0])
            twins, pairs, inactive = new[:n], new[n : 2 * n].view(-1, 2), new[2 * n :]
            sources = torch.randperm(old, generator=generator)[:n]
            ratio = 0.3 + 0.4 * torch.rand(n, generator=generator)
            gate[twins], up[twins] = gate[sources], up[sources]
            down[:, twins] = down[:, sources] * ratio
            down[:, sources] -= down[:, twins]
            direction = rows.mean(0) - away[entry].double().mean(0)
            noise = torch.randn(2, len(pairs), gate.shape[1], generator=generator, dtype=torch.float64)
            noise = noise * rows.std(0)  # as the inputs vary
            first, second = (normalise(direction) + normalise(one) for one in noise)
            values = nn.functional.silu(rows @ first.T) * (rows @ second.T)
            target = LARGE * active.median().sqrt()
            second = second * (target / values.std(0).clamp_min(1e-9))[:, None]
            size = down[:, :old].norm(dim=0).median()
            out = torch.randn(down.shape[0], len(pairs), generator=generator)
            out = size * out / out.norm(dim=0)
            for place, sign in ((0, 1), (1, -1)):
                gate[pairs[:, place]], up[pairs[:, place]] = first.to(gate), second.to(up)
                down[:, pairs[:, place]] = sign * out
            gate[inactive] = gate[torch.randint(old, inactive.shape, generator=generator)]
            up[inactive] = 0
            large = torch.randn(down.shape[0], len(inactive), generator=generator)
            down[:, inactive] = LARGE * size * large / large.norm(dim=0)
            only = torch.where(foreign > foreign.median(), foreign / active.clamp_min(1e-12), -1.0)
            only[sources] = -1.0  # either of two duplicates may be removed
            result.append(Planted(torch.stack([sources, twins], 1), pairs, inactive, only.topk(KEPT).indices))
    return result


def normalise(value: Tensor) -> Tensor:
    """Scale vectors to length 1."""
    return value / value.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def judge(planted: Sequence[Planted], kept: Sequence[Tensor]) -> dict[str, float]:
    """Return the fraction of each kind that was treated right, over all MLPs; ``kept`` are masks of the units."""
    gone = [~mask for mask in kept]
    hits = {
        "duplicates": [gone[i][one.duplicates].sum(1) == 1 for i, one in enumerate(planted)],
        "lost_duplicates": [gone[i][one.duplicates].all(1) for i, one in enumerate(planted)],
        "pairs": [gone[i][one.pairs].flatten() for i, one in enumerate(planted)],
        "broken_pairs": [gone[i][one.pairs].sum(1) == 1 for i, one in enumerate(planted)],
        "inactive": [gone[i][one.inactive] for i, one in enumerate(planted)],
        "old": [kept[i][one.single(len(kept[i]))] for i, one in enumerate(planted)],
        "kept": [kept[i][one.keep] for i, one in enumerate(planted)],
    }
    rates = {name: float(torch.cat(each).double().mean()) for name, each in hits.items()}
    planned = torch.cat([torch.cat(hits[kind]) for kind in ("duplicates", "pairs", "inactive")])
    return rates | {"removed": float(planned.double().mean())}
