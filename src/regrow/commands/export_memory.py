"""Open a model for an export that reads its tensors one by one, within a limit of memory."""

from regrow.amounts import format_bytes, parse_bytes
from regrow.errors import ResourceError
from regrow.process_memory import read_resident
from regrow.streaming.opening import OpenedNetwork, open_network

SPARE = 2**27
"""Bytes that the interpreter and the writer need besides one tensor: parts of it that are compared."""
COPIES = 2.5
"""The float32 copies of the largest tensor that there are at a time: its numbers, and what they become."""


def open_export(name: str, memory: str) -> tuple[OpenedNetwork, int, int]:
    """Open a model without its weights, check its recorded output, and predict what an export needs.

    Args:
        name: The folder, or the name of a packaged model.
        memory: The limit, such as ``4GiB``.

    Returns:
        The model, the limit and the predicted peak in bytes.

    Raises:
        InputError: If the model is not read tensor by tensor.
        ResourceError: If the largest tensor does not fit; names an amount that is enough.
        StoreError: If the model is a saved one and gives another output than the recorded one.
    """
    limit = parse_bytes(memory)
    opened = open_network(name)
    network = opened.network()
    for key, value in (("origin", opened.loaded.origin), ("tokenizer", opened.loaded.tokenizer)):
        if value is not None and not hasattr(opened.loaded.model, key):
            setattr(opened.loaded.model, key, value)
    largest = max(one.numel() for one in opened.loaded.model.parameters())
    size = {key: network.weights.bytes_of(key) for key in network.weights.stored}
    block = max(sum(size[key] for key in one.names) for one in network.blocks)
    checked = sum(size[key] for key in network.outer) + block if opened.probe else 0
    needed = read_resident() + SPARE + max(int(4 * COPIES * largest), checked)
    if needed > limit:
        raise ResourceError(
            f"exporting {name} within {format_bytes(limit)} of memory is impossible, even one tensor at a time; use "
            f"--memory {format_bytes(int(1.05 * needed)).replace(' ', '')}"
        )
    opened.check_output()
    return opened, limit, needed
