"""Saved networks of the zoo, loaded by another process, which writes down what they answer."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.nets import Origin
from regrow.nets.language import origin_of
from regrow.store import load
from zoo import ZOO

TESTS = Path(__file__).parents[1]
BUILT_BY_THE_CALLER = {"conv_residual"}
"""Networks of which no file says how they are built."""


def origin(name: str, model: nn.Module) -> Origin | None:
    """Where a network comes from, for its folder."""
    return None if name in BUILT_BY_THE_CALLER else origin_of(model, name)


def answers(model: nn.Module, name: str) -> list[Tensor]:
    """What a network of the zoo answers to its example."""
    args, kwargs = ZOO[name].example()
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def answers_in_a_fresh_process(folders: Mapping[str, Path], place: Path) -> dict[str, list[Tensor]]:
    """Load each network in one new process; give its answers by name.

    Args:
        folders: Name in the zoo → the folder of the saved network.
        place: A folder for the answers.
    """
    code = "import sys; from store.fresh import write_answers; write_answers(sys.argv[1], sys.argv[2:])"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    words = [f"{name}={folder}" for name, folder in folders.items()]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(place), *words], env=environment, check=True, timeout=240
    )
    found = {name: load_file(place / f"{name}.answers") for name in folders}
    return {name: [tensors[str(i)] for i in range(len(tensors))] for name, tensors in found.items()}


def write_answers(place: str, words: list[str]) -> None:
    """What the fresh process does."""
    for word in words:
        name, _, folder = word.partition("=")
        torch.manual_seed(99)  # random numbers of a builder must not matter
        model = load(folder, model=ZOO[name].build if name in BUILT_BY_THE_CALLER else None)
        tensors = {str(i): tensor.contiguous() for i, tensor in enumerate(answers(model, name))}
        save_file(tensors, f"{place}/{name}.answers")


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal bit for bit."""
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
