"""Build a saved transformers model of any shape without the numbers of its parameters, which are read later."""

from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from regrow.nets import Loaded, ModelError
from regrow.nets.examples import guessed_example, text_example
from regrow.nets.files import check_files
from regrow.nets.skeleton import replacing_parameters
from regrow.store.building import build_checked
from regrow.store.errors import StoreError
from regrow.store.models import read_shapes
from regrow.store.pretrained import read_tokenizer
from regrow.store.shapes import DTYPES, Kind, Shapes
from regrow.store.state import restore
from regrow.store.weights import read_weights
from regrow.tracing.meta_copy import empty_parameters


def load_saved_skeleton(folder: Path, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> tuple[Loaded, Shapes]:
    """Build the model of a folder that regrow wrote, as :func:`regrow.store.load` does, with fake parameters.

    Buffers have their numbers. Neither the digests of parameters nor the recorded output are compared.

    Returns:
        The network in eval mode, its tokenizer, an example input and its origin; and the record of the folder.
    """
    shapes = read_shapes(folder)
    if shapes.origin.kind != "transformers":
        raise StoreError(f"{folder} holds no transformers model; leave out --memory, to load it whole")
    check_files(folder)
    with replacing_parameters(empty_parameters(mode)):
        net = build_checked(folder, shapes, None, dtype)
    tensors = read_weights(folder, shapes, kinds=[one for one in Kind if one is not Kind.PARAMETER])
    for name, one in shapes.tensors.items():
        if one.kind is Kind.PARAMETER:
            with mode:
                tensors[name] = torch.empty(one.shape, dtype=DTYPES[one.dtype])
        if dtype is not None and one.kind is not Kind.DERIVED and tensors[name].is_floating_point():
            tensors[name] = tensors[name].to(dtype)
    restore(net, shapes, tensors)
    tokenizer = read_tokenizer(folder)
    example = guessed_example(net) if tokenizer is None else text_example(net, len(tokenizer))
    if example is None:
        raise ModelError(f"{folder}: the model does not say what input it takes; leave out --memory")
    origin = replace(shapes.origin, name=folder.name)
    for name, value in (("origin", shapes.origin), ("tokenizer", tokenizer)):
        if value is not None and not hasattr(net, name):
            setattr(net, name, value)
    return Loaded(net.eval(), tokenizer, example, origin), shapes
