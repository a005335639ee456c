"""Insert blocks into a newly built network and drop modules from it, as the record of a saved network says."""

from collections.abc import Mapping

from torch import nn

from regrow.core.branches import Placeholder, lies_in
from regrow.core.insertion import Insertion
from regrow.store.errors import StoreError
from regrow.tracing.block_copies import StackError, insert_copies
from regrow.tracing.placeholder import insert_placeholders


def insert(fresh: nn.Module, inserted: Mapping[str, tuple[Insertion, ...]]) -> None:
    """Insert copies of blocks into a newly built network, in place."""
    for path, one in ((path, one) for path, several in inserted.items() for one in several):
        try:
            insert_copies(fresh, path, one)
        except StackError as error:
            raise StoreError(f"{error}; it was built by other code or settings") from None


def drop(fresh: nn.Module, placeholders: Mapping[str, Placeholder]) -> None:
    """Replace modules of a newly built network by placeholders, in place."""
    known = dict(fresh.named_modules())
    for path in placeholders:
        nested = any(lies_in(path, other) for other in placeholders if other != path)
        if not path or path not in known or nested:
            raise StoreError(f"the architecture has no module {path!r} to drop; it was built by other code or settings")
    insert_placeholders(fresh, placeholders)
