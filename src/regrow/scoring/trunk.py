"""The part of a network that measuring some weights has to run."""

import inspect
from collections.abc import Sequence

from torch import nn

from regrow.core.sources import Batch


def trunk_of(model: nn.Module, batch: Batch, names: Sequence[str]) -> nn.Module:
    """Return the smallest part of a network to run: without the head, if no measured weight lies in it.

    That part is transformers' ``base_model``: a submodule that takes the same inputs. It may leave out weights that the
    whole network uses (an encoder, a head).

    Args:
        model: The network.
        batch: Its inputs.
        names: The weights that are measured.
    """
    base = getattr(model, "base_model", None)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    if not isinstance(base, nn.Module) or not prefix:
        return model
    try:
        inspect.signature(base.forward).bind(*batch.args, **batch.kwargs)
    except TypeError:
        return model
    return base if all(name.startswith(f"{prefix}.") for name in names) else model
