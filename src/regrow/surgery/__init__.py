"""Apply plans to models: cut, widen, drop and restore, with a proof that each change does what the plan says."""

from regrow.surgery.apply import apply
from regrow.surgery.new_units import fit_new_units
from regrow.surgery.undo_store import UndoStore
from regrow.surgery.verify import Verification, verify

__all__ = ["UndoStore", "Verification", "apply", "fit_new_units", "verify"]
