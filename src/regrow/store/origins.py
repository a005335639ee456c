"""How a network that is given without a record was built, as far as it says."""

import inspect

from torch import nn

from regrow.nets import Origin
from regrow.nets.language import origin_of
from regrow.references import names_code
from regrow.store.pretrained import is_pretrained


def describe_origin(model: nn.Module) -> Origin:
    """Return how an architecture is built, as far as the network says.

    Args:
        model: The network; its ``origin`` if it has one.

    >>> describe_origin(nn.Linear(1, 2)).reference
    ''
    """
    if isinstance(known := getattr(model, "origin", None), Origin):
        return known
    if is_pretrained(model):
        return origin_of(model, type(model).__name__)
    kind = type(model)
    reference = f"{kind.__module__}:{kind.__qualname__}"
    needed = (one for one in inspect.signature(kind).parameters.values() if one.default is one.empty)
    named = [one for one in needed if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    own = kind.__module__.partition(".")[0] not in ("__main__", "torch", "torchvision")
    return Origin("callable", reference if own and not named and names_code(reference) else "", {}, kind.__name__)
