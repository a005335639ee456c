"""Choose dropped operations to revive in a search, sampled by gradient and importance (MG-DARTS, MGAS)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def sample_operations(
    dead: Sequence[str],
    alive: Sequence[str],
    drift: Mapping[str, float],
    weight: Mapping[str, float],
    many: int,
    generator: torch.Generator,
) -> list[str]:
    """Sample at most ``many`` dropped operations to revive, by the regrowth rule of MGAS's code.

    For each cell i and kind j, with G the mean drift and A the mean importance over the active operations of that kind
    (half of the least in the cell if none is active), both normalised over j:  p_ij = (G + A) / 2. A cell's share q_i
    is the mean of its normalised drift and importance per active operation. Each of ``many`` draws picks (i, j) with
    probability q_i · p_ij and revives one dropped operation of kind j in cell i; if there is none, the draw is lost.

    Args:
        dead: Paths of the dropped operations that could come back.
        alive: Paths of the operations that are active.
        drift: Path → how fast its importance logit α changes (the magnitude of its gradient, averaged over steps).
        weight: Path → its importance.
        many: How many draws.
        generator: The random number generator.

    Source: the authors' code (train_search.py), read; the normalisations as there.
    """
    cells = [*dict.fromkeys(map(cell_of, (*alive, *dead)))]
    kinds = [*dict.fromkeys(map(kind_of, (*alive, *dead)))]
    chance = torch.zeros(len(cells), len(kinds), dtype=torch.float64)
    share = torch.zeros(len(cells), 2, dtype=torch.float64)
    for i, cell in enumerate(cells):
        own = [path for path in alive if cell_of(path) == cell]
        for k, values in enumerate((drift, weight)):
            each = [[values[path] for path in own if kind_of(path) == kind] for kind in kinds]
            least = min((sum(one) / len(one) for one in each if one), default=0.0) / 2
            row = torch.tensor([sum(one) / len(one) if one else least for one in each], dtype=torch.float64)
            share[i, k] = row.sum() / max(1, len(own))
            chance[i] += _normal(row) / 2
    q = (_normal(share[:, 0]) + _normal(share[:, 1])) / 2
    places = (q[:, None] * chance).flatten().cumsum(0)
    left, result = list(dead), []
    for one in torch.rand(many, generator=generator, dtype=torch.float64).tolist():
        at = min(int(torch.searchsorted(places, one)), len(places) - 1)
        fit = [p for p in left if cell_of(p) == cells[at // len(kinds)] and kind_of(p) == kinds[at % len(kinds)]]
        if fit:
            before = float(places[at - 1]) if at else 0.0
            inside = (one - before) / max(float(places[at]) - before, 1e-12)
            chosen = fit[min(int(inside * len(fit)), len(fit) - 1)]
            left.remove(chosen)
            result.append(chosen)
    return result


def kind_of(path: str) -> str:
    """Return the kind of an operation: the last part of its path without the number of its source.

    Args:
        path: The operation's path.

    >>> kind_of("cells.1.nodes.0.ops.sep3_2"), cell_of("cells.1.nodes.0.ops.sep3_2")
    ('sep3', 'cells.1')
    """
    leaf = path.rpartition(".")[2]
    name, _, source = leaf.rpartition("_")
    return name if source.isdigit() and name else leaf


def cell_of(path: str) -> str:
    """Return the path of the cell that an operation lies in.

    That is what comes before its node, or the sum of candidates itself where there are no nodes.

    Args:
        path: The operation's path.

    >>> cell_of("blocks.3.ops.skip")
    'blocks.3'
    """
    total = path.rpartition(".ops.")[0]
    return total.rpartition(".nodes.")[0] or total


def _normal(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / len(values))
