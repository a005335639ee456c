"""Decide per module whether its activation-based ranking is reliable, or a data-free one replaces it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.scoring.combine import percentile
from regrow.scoring.partition import Modules
from regrow.scoring.sensitivity import Sensitivity
from regrow.scoring.spaces import Space, within

SWITCHES = ("unreliable", "blend", "even", "never", "always", "reversed")


@dataclass(frozen=True)
class Reliability:
    """How far the activation-based metric is trusted in each module; all ``[modules]`` float64.

    Args:
        unreliability: U = S · (1 − A), with S the module's mean sensitivity and A the mean percentile of its scores,
            each scaled to 0..1 over the modules of one kind.
        trust: The weight of the activation-based ranking in the module: 1 uses it alone, 0 the data-free one alone.
    """

    unreliability: Tensor
    trust: Tensor


def reliability(
    how: str,
    among: Sequence[Space],
    modules: Modules,
    scores: Mapping[str, Tensor],
    sensitive: Sensitivity,
    *,
    most: float = 0.25,
) -> Reliability:
    """Compute how far the activation-based ranking of each module is trusted, by the rule ``how``.

    Modules of pooled spaces have too few units to be judged, and are always trusted.

    Args:
        how: ``unreliable``: not trusted where U is highest, in at most a share ``most`` of the units; ``blend``: trust
            1 − U; ``even``: the mean of that everywhere (does the place matter, or the mixture?); ``never`` and
            ``always`` switch; ``reversed``: the most reliable modules instead (a sign check).
        among: The ranking spaces of the modules.
        modules: The modules.
        scores: Axis key → the baseline's score on all sources, ``[size]``.
        sensitive: How much the ranks of units vary between sources.
        most: The largest fraction of the judged units that ``unreliable`` and ``reversed`` may switch.

    Raises:
        ValueError: If ``how`` is unknown.

    Source: GPrune-LLM (arXiv 2603.13418) names both factors; the formula is ours.
    """
    if how not in SWITCHES:
        raise ValueError(f"modules are switched by {', '.join(SWITCHES)}; got {how!r}")
    labels = [among[i].label for i in modules.spaces]
    s = _scaled(modules.mean(sensitive.sigma), labels)
    a = _scaled(modules.mean(within(scores, among, percentile)), labels)
    u = s * (1 - a)
    judged = torch.tensor([not among[i].pooled for i in modules.spaces])
    trust = torch.ones(len(modules), dtype=torch.float64)
    match how:
        case "unreliable" | "reversed":
            able = judged & (u > 0) if how == "unreliable" else judged
            trust = _most(
                u if how == "unreliable" else -u, _sizes(modules), able, most * float(_sizes(modules)[judged].sum())
            )
        case "blend":
            trust = 1 - u
        case "even":
            sizes = _sizes(modules)[judged].double()
            trust[:] = 1 - float((sizes * u[judged]).sum() / sizes.sum())
        case "always":
            trust[:] = 0
    return Reliability(u, torch.where(judged, trust, torch.ones_like(trust)))


def rank_in_modules(
    modules: Modules, trust: Tensor, scores: Mapping[str, Tensor], instead: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rank every unit within its module, (rank + ½) / n in (0, 1), lowest first; ties go by index.

    Args:
        modules: The modules.
        trust: ``Reliability.trust``, ``[modules]``.
        scores: Axis key → the activation-based scores, which order trusted modules.
        instead: Axis key → the data-free scores, which order the others; a trust between 0 and 1 blends both
            percentiles.
    """
    keys = list(modules.labels)
    sizes = [len(modules.labels[key]) for key in keys]
    labels, one, other = (torch.cat([values[key] for key in keys]) for values in (modules.labels, scores, instead))
    places = torch.empty(len(labels), dtype=torch.float64)
    for module in range(len(modules)):
        mine = labels == module
        t = float(trust[module])
        value = t * percentile(one[mine]) + (1 - t) * percentile(other[mine])
        rank = torch.empty(len(value), dtype=torch.float64)
        rank[torch.argsort(value, stable=True)] = torch.arange(len(value), dtype=torch.float64)
        places[mine] = (rank + 0.5) / len(value)
    return dict(zip(keys, places.split(sizes), strict=True))


def _scaled(values: Tensor, labels: Sequence[str]) -> Tensor:
    """Return each value scaled to 0..1 over the values of the same label."""
    result = torch.zeros_like(values)
    for label in set(labels):
        mine = torch.tensor([other == label for other in labels])
        low, high = values[mine].min(), values[mine].max()
        result[mine] = (values[mine] - low) / (high - low) if high > low else 0.0
    return result


def _sizes(modules: Modules) -> Tensor:
    return torch.bincount(torch.cat(list(modules.labels.values())), minlength=len(modules))


def _most(u: Tensor, sizes: Tensor, judged: Tensor, left: float) -> Tensor:
    """Set the trust of the modules with the highest ``u`` to 0, for at most ``left`` units in all."""
    trust = torch.ones(len(u), dtype=torch.float64)
    for module in torch.argsort(-u, stable=True).tolist():
        if judged[module]:
            if sizes[module] > left:
                break
            trust[module] = 0
            left -= float(sizes[module])
    return trust
