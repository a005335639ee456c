"""Surgery: the only place that changes a model."""

from regrow.surgery.align import aligned
from regrow.surgery.apply import apply
from regrow.surgery.attic import Attic
from regrow.surgery.fill import fitted
from regrow.surgery.verify import Verification, verify

__all__ = ["Attic", "Verification", "aligned", "apply", "fitted", "verify"]
