"""Surgery: the only place that changes a model."""

from regrow.surgery.align import aligned
from regrow.surgery.apply import apply
from regrow.surgery.declare import DeclarationError, declare
from regrow.surgery.fill import fitted
from regrow.surgery.undo_store import UndoStore
from regrow.surgery.verify import Verification, verify

__all__ = ["DeclarationError", "UndoStore", "Verification", "aligned", "apply", "declare", "fitted", "verify"]
