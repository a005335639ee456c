"""What the settings of a pruning run say about its model, its sources, its budget and its method."""

from collections.abc import Mapping
from typing import Any

from regrow.core.amounts import Measure, Target
from regrow.core.axes import Mark
from regrow.core.budget import Budget
from regrow.core.errors import InputError
from regrow.core.names import names_code
from regrow.jobs.inputs import SourceSpecs
from regrow.jobs.models import ModelSpec
from regrow.methods import MethodKind, find_method
from regrow.nets.load import check_code
from regrow.settings.prune import RECONSTRUCTION, Settings, complete_reconstruction
from regrow.store.run_record import convert_settings


def read_pruning_settings(values: Mapping[str, object], code: str = "") -> Settings:
    """Return the settings recorded in the ``run.json`` of a pruning run."""
    if names_code(str(values.get("model"))):
        check_code(str(values.get("model")), True, code)
        values = {**values, "model": code}
    if not isinstance(values.get("model"), str):
        raise InputError("the settings of the run name no model; restore run.json")
    return convert_settings(values, Settings)


def model_spec(settings: Settings) -> ModelSpec:
    """Return which model a run prunes, and how it is loaded."""
    sources = (*settings.sources, *settings.unseen)
    return ModelSpec(settings.model, settings.dtype, settings.device, settings.input, sources)


def source_specs(settings: Settings, recovery_tokens: int = 0) -> SourceSpecs:
    """Return which sources a run reads, and how much of each."""
    tokens = recovery_tokens // max(1, len(settings.sources)) if recovery_tokens else settings.tokens
    amounts = settings.eval_tokens, settings.seq_len
    generated = 0 if recovery_tokens else settings.generated_tokens
    return SourceSpecs(*amounts, settings.sources, settings.unseen, tokens, settings.seed, generated)


def budget_of(settings: Settings) -> Budget:
    """Return the budget of a run: how much may stay, and which axes may be cut."""
    marks = frozenset(map(Mark, settings.marks))
    target = Target.parse(settings.target) if settings.target else None
    keep = 1.0 if settings.keep is None else settings.keep
    rest = settings.only, settings.exclude, marks, settings.round_to, settings.regular, target
    return Budget(keep, Measure(settings.measure), *rest)


def record_defaults(settings: Settings) -> dict[str, Any]:
    """Return the defaults of the method, and of the reconstruction and the recovery after it."""
    taken = find_method(MethodKind.PRUNING, settings.method).defaults({*settings.method_settings, "seed"})
    more = find_method(MethodKind.RECOVERY, settings.recover).defaults({"seed"}) if settings.recover else {}
    more = {f"{settings.recover} {name}": value for name, value in more.items()}
    return taken | more | _record_reconstruction(settings)


def _record_reconstruction(settings: Settings) -> dict[str, Any]:
    if not settings.reconstruct:
        return {}
    given = settings.reconstruct_settings
    defaults = find_method(MethodKind.RECOVERY, RECONSTRUCTION).defaults(given)
    defaults |= complete_reconstruction({}, settings.sources)
    return {f"reconstruct {name}": value for name, value in defaults.items() if name not in given}


def seeded_settings(settings: Settings) -> dict[str, Any]:
    """Return the method's settings; a method with a seed gets the run's, unless it was given its own."""
    has_seed = "seed" in getattr(find_method(MethodKind.PRUNING, settings.method).settings, "__dataclass_fields__", {})
    return {**({"seed": settings.seed} if has_seed else {}), **settings.method_settings}
