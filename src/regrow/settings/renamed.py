"""Old names of methods' settings, and settings that are gone, which ``run.json`` and ``--set`` of older versions have.

A run is recorded, compared and reported by the present names, so that a folder of an older version is the same run.
"""

import logging
from collections.abc import Mapping
from typing import Any

from regrow.errors import InputError

_log = logging.getLogger(__name__)

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "mgas": {"press": "sparsity_penalty", "floor": "min_cost", "pace": "filter_lr_ratio"},
    "gold_nas": {
        "low": "drop_below",
        "high": "keep_above",
        "each": "drops_per_epoch",
        "price": "cost_weight",
    },
    "sparsegrow": {
        "late": "late_phase",
        "short": "min_free",
        "young": "new_unit_penalty",
        "loud": "group_norm_damping",
        "silent": "project_new_units",
        "relief": "strength_factor",
        "own": "asymmetric_loss",
    },
    "replay": {"answers": "logit_weight", "labels": "label_weight", "own": "asymmetric_loss"},
    "packnet": {"named": "use_task_id"},
    "wsn": {"named": "use_task_id"},
}
"""Method → old name of a setting → present name, a field of the method's settings."""

REMOVED: Mapping[str, Mapping[str, Any]] = {
    "gprune": {"rank": "raw", "denoise": False, "bins": 4, "loss": "kl"},
}
"""Method → setting that is gone → the value that the method still acts by: a run with it is the same run."""


def rename_settings(renamed: Mapping[str, str], given: Mapping[str, Any], *, note: bool = False) -> dict[str, Any]:
    """Return a method's settings under their present names.

    Args:
        renamed: Old name → present name, as a row of :data:`SETTINGS`.
        given: Setting name, old or present → value.
        note: Whether every old name is logged, with the present one.

    Raises:
        InputError: If a setting is given by both of its names.

    >>> rename_settings(SETTINGS["mgas"], {"press": 0.1, "warm": 1})
    {'sparsity_penalty': 0.1, 'warm': 1}
    """
    for old, new in renamed.items():
        if old in given and new in given:
            raise InputError(f"{old} is the old name of {new}, and both are given; drop {old}")
        if old in given and note:
            _log.warning("note: the setting %s is now called %s", old, new)
    return {renamed.get(name, name): value for name, value in given.items()}


def rename_recorded(record: Mapping[str, Any], *, note: bool = False) -> dict[str, Any]:
    """Return the settings of a command, or a whole ``run.json``, with the present names, without :data:`REMOVED` ones.

    Args:
        record: The settings as a mapping: ``method`` and ``method_settings``, and in a run of ``regrow recover`` those
            of the pruning run under ``pruning``; or a ``run.json``, with ``settings`` and ``defaults``. Values that are
            not mappings stay as they are.
        note: Whether every old name is logged, with the present one.

    Raises:
        InputError: If a setting is given by both of its names.

    >>> rename_recorded({"settings": {"method": "mgas", "method_settings": {}}, "defaults": {"pace": 0.25}})
    {'settings': {'method': 'mgas', 'method_settings': {}}, 'defaults': {'filter_lr_ratio': 0.25}}
    """
    new, settings = dict(record), record.get("settings")
    for name in ("settings", "pruning"):
        if isinstance(inner := record.get(name), Mapping):
            new[name] = rename_recorded(inner, note=note)
    method = settings.get("method") if isinstance(settings, Mapping) else record.get("method")
    renamed, removed = (table.get(method, {}) if isinstance(method, str) else {} for table in (SETTINGS, REMOVED))
    for name in ("method_settings", "defaults"):
        if isinstance(own := record.get(name), Mapping):
            kept = {key: value for key, value in own.items() if key not in removed or removed[key] != value}
            new[name] = rename_settings(renamed, kept, note=note)
    return new
