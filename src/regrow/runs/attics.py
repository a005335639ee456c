"""An attic on the disk: one safetensors file, whole or not at all."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regrow.plan import PlanError
from regrow.runs.checkpoints import digest
from regrow.store.atomic import StoreError, written
from regrow.surgery import Attic


def write_attic(path: Path, attic: Attic) -> None:
    """Write what cuts have taken out of a network.

    Args:
        path: The file to make or replace; its folder must exist.
        attic: What to write.

    Raises:
        StoreError: If the disk is full or does not let us write; the old file stands.
    """
    named = attic.tensors()
    tensors = {f"t{i}": tensor.contiguous() for i, tensor in enumerate(named.values())}
    header = {"attic": attic.record(), "tensors": list(named), "sha256": digest(tensors)}
    with written(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "regrow": json.dumps(header)})


def read_attic(path: Path) -> Attic:
    """What was written there.

    Raises:
        StoreError: If there is no such file, it is no attic, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as content:
            header = json.loads((content.metadata() or {}).get("regrow", "null"))
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        if digest(tensors) != header["sha256"]:
            raise PlanError("its numbers were changed")
        named = {name: tensors[f"t{i}"] for i, name in enumerate(header["tensors"])}
        return Attic.read(header["attic"], named)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())[:120]
        raise StoreError(f"{path} holds no attic that can be used ({why}); restore the file") from None
