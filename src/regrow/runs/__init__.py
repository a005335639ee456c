"""Runs: folders that hold what was done, and models that can be built again."""

from regrow.runs.attics import read_attic, write_attic
from regrow.runs.checkpoints import fingerprint
from regrow.runs.folder import RunFolder
from regrow.runs.ledger import Ledger, replay
from regrow.store import StoreError, load, save

__all__ = ["Ledger", "RunFolder", "StoreError", "fingerprint", "load", "read_attic", "replay", "save", "write_attic"]
