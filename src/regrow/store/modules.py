"""Insert blocks into a newly built network and drop modules from it, as the record of a saved network says."""

from collections.abc import Mapping

from torch import nn

from regrow.core.branches import Placeholder, lies_in
from regrow.core.change import Insertion
from regrow.store.errors import StoreError
from regrow.tracing.branches import insert_placeholders
from regrow.tracing.stacks import StackError, insert_copies


def insert(fresh: nn.Module, inserted: Mapping[str, tuple[Insertion, ...]]) -> None:
    """Insert copies of blocks into a newly built network, in place.

    Args:
        fresh: The newly built network.
        inserted: Path of a stack of blocks → the insertions into it, in order.

    Raises:
        StoreError: If the network has no such stack.
    """
    for path, one in ((path, one) for path, several in inserted.items() for one in several):
        try:
            insert_copies(fresh, path, one)
        except StackError as error:
            raise StoreError(f"{error}; it was built by other code or settings") from None


def drop(fresh: nn.Module, placeholders: Mapping[str, Placeholder]) -> None:
    """Replace modules of a newly built network by placeholders, in place.

    Args:
        fresh: The newly built network.
        placeholders: Path of each module to drop → its placeholder.

    Raises:
        StoreError: If the network has no such module.
    """
    known = dict(fresh.named_modules())
    for path in placeholders:
        nested = any(lies_in(path, other) for other in placeholders if other != path)
        if not path or path not in known or nested:
            raise StoreError(f"the architecture has no module {path!r} to drop; it was built by other code or settings")
    insert_placeholders(fresh, placeholders)
