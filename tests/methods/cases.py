"""One row per method: its settings in the conformance suite, and the laws that do not apply to it, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.methods import MethodKind


@dataclass(frozen=True)
class Case:
    """A method in the conformance suite."""

    kind: MethodKind
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return " ".join((self.name, *(f"{key}={value}" for key, value in self.settings.items())))


PERMUTED = "permuted units give the permuted plan"

STAGED = {"measure": "nonzero", "stages": (0, 1), "share": 0.4, "warm": 1, "every": 1, "regrow": 0.5}

CASES = (
    Case(MethodKind.PRUNING, "random", exempt={PERMUTED: "its scores are random numbers by index"}),
    Case(MethodKind.PRUNING, "magnitude"),
    Case(MethodKind.PRUNING, "magnitude", {"allocation": "ranked"}),
    Case(MethodKind.PRUNING, "wanda_sp"),
    Case(MethodKind.PRUNING, "wanda_sp", {"allocation": "ranked"}),
    Case(MethodKind.PRUNING, "flap"),
    Case(MethodKind.PRUNING, "flap", {"allocation": "uniform"}),
    Case(MethodKind.PRUNING, "llm_pruner"),
    Case(MethodKind.PRUNING, "llm_pruner", {"allocation": "ranked"}),
    Case(MethodKind.PRUNING, "fisher"),
    Case(MethodKind.PRUNING, "fisher", {"allocation": "ranked", "compensate": False}),
    Case(MethodKind.PRUNING, "fisher", {"allocation": "measured", "compensate": False}),
    Case(MethodKind.PRUNING, "obs"),
    Case(MethodKind.PRUNING, "obs", {"allocation": "ranked", "ridge": 0.01, "compensate": False}),
    Case(MethodKind.PRUNING, "depth"),
    Case(MethodKind.PRUNING, "gprune", {"steps": 4, "every": 2, "shards": 2}),
    Case(MethodKind.PRUNING, "gprune", {"steps": 0, "shards": 2, "base": "wanda_sp"}),
    Case(MethodKind.CONTINUAL, "naive"),
    Case(MethodKind.CONTINUAL, "naive", {"keep": "data"}),
    Case(MethodKind.CONTINUAL, "naive", {"keep": "network"}),
    Case(MethodKind.CONTINUAL, "ewc"),
    Case(MethodKind.CONTINUAL, "si"),
    Case(MethodKind.CONTINUAL, "laplace", {"gate": 0.0}),
    Case(MethodKind.CONTINUAL, "laplace", {"grow": "start", "directions": "projected"}),
    Case(MethodKind.CONTINUAL, "laplace", {"boundaries": "detected"}),
    Case(MethodKind.CONTINUAL, "laplace", {"grow": "late", "limit": 0.5}),
    Case(MethodKind.CONTINUAL, "ncl"),
    Case(MethodKind.CONTINUAL, "gpm"),
    Case(MethodKind.CONTINUAL, "lwf"),
    Case(MethodKind.CONTINUAL, "replay", {"memory": 40}),
    Case(MethodKind.CONTINUAL, "replay", {"memory": 40, "logit_weight": 0.5}),
    Case(MethodKind.CONTINUAL, "packnet"),
    Case(MethodKind.CONTINUAL, "packnet", {"use_task_id": True}),
    Case(MethodKind.CONTINUAL, "wsn"),
    Case(MethodKind.CONTINUAL, "wsn", {"use_task_id": True}),
    Case(MethodKind.CONTINUAL, "sparsegrow", {"multiple": 1, "late_phase": 0.5}),
    Case(MethodKind.CONTINUAL, "sparsegrow", {"multiple": 1, "gate": "hard", "threshold": "adaptcl"}),
    Case(MethodKind.CONTINUAL, "sparsegrow", {"multiple": 1, "gate": "none", "memory": 40}),
    Case(MethodKind.CONTINUAL, "sparsegrow", {"multiple": 1, "pull": 1.0, "directions": "projected"}),
    Case(MethodKind.SEARCH, "blind"),
    Case(MethodKind.SEARCH, "blind", {"what": "filters"}),
    Case(MethodKind.SEARCH, "mgas", {"levels": ("operations", "filters"), "warm": 1, "every": 1}),
    Case(MethodKind.SEARCH, "mgas", STAGED),
    Case(MethodKind.SEARCH, "darts"),
    Case(MethodKind.SEARCH, "trials", {"trial_steps": 2}),
    Case(MethodKind.RECOVERY, "refit"),
    Case(MethodKind.RECOVERY, "lora", {"passes": 2, "checks": 2, "windows": 1}),
    Case(MethodKind.RECOVERY, "distil", {"passes": 2, "checks": 2, "windows": 1}),
)
