"""Calls of the Python functions of regrow on toys, which ``seeded_runs.py`` runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import toys
from seeded_runs import without_times
from sklearn.datasets import load_digits

import regrow


def digits(start: int, stop: int) -> tuple[Any, Any]:
    """Return images of digits and their labels."""
    data = load_digits()
    images = torch.tensor(data.images[start:stop] / 16, dtype=torch.float32)
    return images[:, None], torch.tensor(data.target[start:stop])


def toy(name: str = "classifier") -> tuple[Any, Any]:
    """Return a toy network and its example."""
    return getattr(toys, name)()


def ids(seed: int) -> dict[str, Any]:
    """Return two windows of random tokens, which are labels, too."""
    tokens = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def python_prune(out: str) -> None:
    """Prune a network with BatchNorms, and fit its layers."""
    model, example = toy("residual")
    data = {"data": digits(0, 256), "validation": digits(256, 320)}
    regrow.prune(model, **data, method="fisher", target="macs=60%", example=example, reconstruct=True, out=out)


def python_prune_text(out: str) -> None:
    """Prune a language model."""
    regrow.prune("llama", {"a": [ids(0)], "b": [ids(1)]}, method="flap", keep=0.7, out=out)


def python_grow(out: str) -> None:
    """Grow a network and train it."""
    model, example = toy("residual")
    regrow.grow(model, mlp="+4", blocks="+1", data=digits(0, 256), steps=4, train="all", example=example, out=out)


def python_learn(out: str) -> None:
    """Learn two tasks with growth."""
    learned = regrow.learn(
        toy()[0], [(digits(0, 200), digits(200, 300)), (digits(300, 500), digits(500, 600))], epochs=2, lr=0.1, out=out
    )
    print(learned)


def python_search(out: str) -> None:
    """Search the widths of a network."""
    data = {"data": digits(0, 200), "validation": digits(200, 300)}
    print(regrow.search(toy("residual")[0], **data, target="macs=60%", epochs=4, out=out))


def python_recover(out: str) -> None:
    """Recover a network that was pruned without a folder."""
    dense, example = toy()
    model, plan = regrow.prune(toy()[0], digits(0, 256), method="flap", keep=0.6, example=example)
    print(sorted(without_times(regrow.recover(model, dense, plan, digits(0, 256), by="distil", out=out)).items()))


def python_evaluate(out: str) -> None:
    """Evaluate a network on images and another on text."""
    results = [regrow.evaluate(toy()[0], digits(0, 100)), regrow.evaluate("llama", {"a": [ids(0)], "b": [ids(1)]})]
    Path(out).write_text("\n".join(map(str, results)))


CALLS: dict[str, Callable[[str], None]] = {
    "Python prune": python_prune,
    "Python prune, text": python_prune_text,
    "Python grow": python_grow,
    "Python learn": python_learn,
    "Python search": python_search,
    "Python recover": python_recover,
    "Python evaluate": python_evaluate,
}
"""Name and folder of a run → the function that calls Python functions of regrow."""
