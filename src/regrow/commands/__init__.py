"""Runs of the commands, without printing: run folders that record what was done, and models rebuilt from them."""

from regrow.commands.checkpoints import fingerprint
from regrow.commands.folder import RunFolder
from regrow.commands.undo_stores import read_undo_store, write_undo_store
from regrow.ledger import Ledger, replay
from regrow.store import StoreError, load, save

__all__ = [
    "Ledger",
    "RunFolder",
    "StoreError",
    "fingerprint",
    "load",
    "read_undo_store",
    "replay",
    "save",
    "write_undo_store",
]
