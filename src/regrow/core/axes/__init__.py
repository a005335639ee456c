"""Axes of a network: sets of tensor dimensions that must be cut or widened together.

Some dimensions of a network's tensors always change together: the output of one layer is the input of the next. An
:class:`Axis` is one such set of dimensions, a *unit* is one index of it (a neuron, a filter, a group of heads), and an
:class:`AxisGraph` holds the axes of a network and every tensor's shape written in them: plain data, made by tracing.
"""

from regrow.core.axes.axis import Axis, Example, Mark, Role, Slot
from regrow.core.axes.graph import AxisGraph, matches
from regrow.core.dims import Cache, Dim, Product, Sum, axes_in, size_of
from regrow.core.operations import Decision, Fold, RecordedStep, Work

__all__ = [
    "Axis",
    "AxisGraph",
    "Cache",
    "Decision",
    "Dim",
    "Example",
    "Fold",
    "Mark",
    "Product",
    "RecordedStep",
    "Role",
    "Slot",
    "Sum",
    "Work",
    "axes_in",
    "matches",
    "size_of",
]
