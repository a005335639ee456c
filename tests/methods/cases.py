"""One row per method: its settings in the conformance suite, and the laws that do not apply to it, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.methods import Kind


@dataclass(frozen=True)
class Case:
    """A method in the conformance suite."""

    kind: Kind
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return " ".join((self.name, *(f"{key}={value}" for key, value in self.settings.items())))


PERMUTED = "permuted units give the permuted plan"

CASES = (
    Case(Kind.PRUNING, "random", exempt={PERMUTED: "its scores are random numbers by index"}),
    Case(Kind.PRUNING, "magnitude"),
    Case(Kind.PRUNING, "magnitude", {"form": "group", "allocation": "ranked"}),
    Case(Kind.PRUNING, "wanda_sp"),
    Case(Kind.PRUNING, "wanda_sp", {"allocation": "ranked"}),
    Case(Kind.PRUNING, "flap"),
    Case(Kind.PRUNING, "flap", {"allocation": "uniform", "form": "sequence"}),
    Case(Kind.PRUNING, "llm_pruner"),
    Case(Kind.PRUNING, "llm_pruner", {"form": "vector", "allocation": "ranked"}),
    Case(Kind.PRUNING, "gprune", {"steps": 4, "every": 2, "shards": 2}),
    Case(Kind.PRUNING, "gprune", {"steps": 0, "shards": 2, "base": "wanda_sp"}),
    Case(Kind.CONTINUAL, "naive"),
    Case(Kind.CONTINUAL, "naive", {"keep": "data"}),
    Case(Kind.CONTINUAL, "naive", {"keep": "network"}),
    Case(Kind.CONTINUAL, "ewc"),
    Case(Kind.CONTINUAL, "si"),
    Case(Kind.CONTINUAL, "lwf"),
    Case(Kind.CONTINUAL, "replay", {"memory": 40}),
    Case(Kind.CONTINUAL, "replay", {"memory": 40, "answers": 0.5, "own": True}),
    Case(Kind.CONTINUAL, "packnet"),
    Case(Kind.CONTINUAL, "packnet", {"named": True}),
    Case(Kind.CONTINUAL, "wsn"),
    Case(Kind.CONTINUAL, "wsn", {"named": True}),
    Case(Kind.CONTINUAL, "sparsegrow", {"multiple": 1, "late": 0.5}),
    Case(Kind.CONTINUAL, "sparsegrow", {"multiple": 1, "gate": "hard", "threshold": "adaptcl"}),
    Case(Kind.CONTINUAL, "sparsegrow", {"multiple": 1, "gate": "soft", "memory": 40}),
)
