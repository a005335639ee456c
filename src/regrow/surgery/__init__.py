"""Apply plans to models: cut, widen, drop and restore, with a proof that each change does what the plan says."""

from regrow.surgery.apply import apply
from regrow.surgery.declare import DeclarationError, declare
from regrow.surgery.new_units import align_new_units, fit_new_units
from regrow.surgery.undo_store import UndoStore
from regrow.surgery.verify import Verification, verify

__all__ = [
    "DeclarationError",
    "UndoStore",
    "Verification",
    "align_new_units",
    "apply",
    "declare",
    "fit_new_units",
    "verify",
]
