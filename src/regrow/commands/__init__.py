"""Runs: folders that hold what was done, and models that can be built again."""

from regrow.commands.attics import read_attic, write_attic
from regrow.commands.checkpoints import fingerprint
from regrow.commands.folder import RunFolder
from regrow.ledger import Ledger, replay
from regrow.store import StoreError, load, save

__all__ = ["Ledger", "RunFolder", "StoreError", "fingerprint", "load", "read_attic", "replay", "save", "write_attic"]
