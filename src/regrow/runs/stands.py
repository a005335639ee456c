"""How far a recovery has got, on the disk: a run that is killed goes on where it was, bit for bit."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regrow.recovery import Stand
from regrow.runs.checkpoints import digest
from regrow.store.atomic import telling, written

FORMAT = "regrow-recovery/1"


def write_stand(path: Path, stand: Stand, key: str) -> None:
    """Write how far a recovery has got.

    Args:
        path: The file to make or replace; its folder is made if need be.
        stand: What to keep.
        key: What it depends on; it will not be taken for the stand of another recovery.

    Raises:
        StoreError: If the disk is full or does not let us write.
    """
    names = list(stand.tensors)
    tensors = {f"t{i}": stand.tensors[name].detach().cpu().contiguous().clone() for i, name in enumerate(names)}
    header = {
        "format": FORMAT,
        "key": key,
        "step": stand.step,
        "tensors": names,
        "values": dict(stand.values),
        "sha256": digest(tensors),
    }
    with telling(path.parent):
        path.parent.mkdir(exist_ok=True)
    with written(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "regrow": json.dumps(header)})


def read_stand(path: Path, key: str) -> Stand | None:
    """How far a recovery had got; ``None`` if there is none, or it is of something else, or damaged."""
    try:
        with safe_open(path, framework="pt") as content:
            header = json.loads((content.metadata() or {}).get("regrow", "null"))
            if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("key") != key:
                return None
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        if digest(tensors) != header["sha256"]:
            return None
        named = {name: tensors[f"t{i}"] for i, name in enumerate(header["tensors"])}
        return Stand(int(header["step"]), named, dict(header["values"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
