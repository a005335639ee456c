"""regrow changes the shape of trained networks, exactly: it prunes them, grows them and searches them."""

from regrow.candidates import Candidates
from regrow.export.formats import exported
from regrow.plan import Fill, Plan
from regrow.runs import load
from regrow.runs.prune import prune
from regrow.surgery import Attic, aligned, apply, declare, fitted, verify
from regrow.tracing import trace, with_branches

__all__ = [
    "Attic",
    "Candidates",
    "Fill",
    "Plan",
    "aligned",
    "apply",
    "declare",
    "exported",
    "fitted",
    "load",
    "prune",
    "trace",
    "verify",
    "with_branches",
]
