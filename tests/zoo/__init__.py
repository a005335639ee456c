"""A zoo of networks: what each is built of, what it is called with, and which axes it must turn out to have.

Sizes differ wherever they can, so that no two dimensions match by luck; one net, ``coincidence``, has them all alike.
Weights, running statistics, gains and biases are random, so that no wrong cut hides behind a 1 or a 0.
"""

from functools import cache

from torch import nn

from regrow.core.axes import AxisGraph
from regrow.tracing import trace
from zoo.attention import ATTENTION
from zoo.channel_order import CHANNEL_ORDER
from zoo.channel_reductions import CHANNEL_REDUCTIONS
from zoo.channels import CHANNELS
from zoo.convolution import CONVOLUTION
from zoo.facts import Fact, Hoped, lying_at
from zoo.language import GROUPED, LANGUAGE, SMALL
from zoo.linear import LINEAR
from zoo.networks import Net, Wired, images, randomise
from zoo.recurrent import RECURRENT
from zoo.vision import VISION

__all__ = [
    "GROUPED",
    "NETS",
    "SMALL",
    "ZOO",
    "Fact",
    "Hoped",
    "Net",
    "Wired",
    "images",
    "lying_at",
    "randomise",
    "trace_zoo",
]

NETS: tuple[Net, ...] = (
    *LINEAR,
    *CONVOLUTION,
    *ATTENTION,
    *CHANNELS,
    *CHANNEL_REDUCTIONS,
    *CHANNEL_ORDER,
    *RECURRENT,
    *LANGUAGE,
    *VISION,
)
ZOO: dict[str, Net] = {net.name: net for net in NETS}


@cache
def trace_zoo(name: str) -> tuple[nn.Module, AxisGraph]:
    """A network of the zoo and its axes; made once, so tests must not change it."""
    net = ZOO[name]
    model = net.build()
    args, kwargs = net.example()
    return model, trace(model, *args, **kwargs)
