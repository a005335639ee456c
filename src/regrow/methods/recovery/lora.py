"""LoRA: train low-rank changes of the linear layers on next tokens and merge them, so the model stays plain.

W′ = W + (α / r) · B A,  A: [r, in] random, B: [out, r] zero at first

Hu et al., LoRA (arXiv 2106.09685), through the package peft. LLM-Pruner (arXiv 2305.11627) uses it for recovery.
"""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from regrow.core.axes import AxisGraph
from regrow.methods.recovery import Recovery, RecoveryTask, fit_recovery
from regrow.nets.loaded import missing_package
from regrow.settings.constraints import CheckedSettings, Count, OpenFraction
from regrow.tracing.branches import set_modules
from regrow.training.hooks import freeze

CITATION = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``lora``: learning rate, rank and scale of the adapters, and evaluation on held-out text.

    Args:
        lr: The peak learning rate.
        rank: r, the rank of every adapter.
        alpha: α; the change of a weight is scaled by α / r.
        passes: The number of passes over the training batches.
        windows: Batches per step.
        checks: The number of evaluations on the held-out part of the text; the best evaluated network is kept.
        held_out: The fraction of the text that is held out.
    """

    lr: float = 1e-3
    rank: int = 16
    alpha: float = 32.0
    passes: Count = 1
    windows: Count = 4
    checks: Count = 4
    held_out: OpenFraction = 0.125


def build(settings: Settings) -> Recovery:
    """Return the recovery that trains and merges LoRA adapters; raise ModelError if peft is not installed."""
    if find_spec("peft") is None:
        raise missing_package("recover", "peft")
    return partial(lora, settings=settings)


def lora(task: RecoveryTask, settings: Settings) -> dict[str, object]:
    """Train float32 adapters on the linear layers of the cut network, and merge them into its weights, in place.

    Return a summary as JSON data. If training fails or is interrupted, the weights are unchanged.
    """
    with freeze(task.model):
        adapters = add_adapters(task.model, find_linear_layers(task.model, task.axes), settings, task.seed)
        try:
            summary = fit_recovery(task, adapters, lambda task, b: task.compute_loss(b.run(task.model), b), settings)
        except BaseException:
            remove_adapters(task.model, merge=False)
            raise
        remove_adapters(task.model, merge=True)
    return {**summary, "trained": sum(p.numel() for p in adapters.values())}


def find_linear_layers(model: nn.Module, axes: AxisGraph) -> list[str]:
    """Return the paths of the linear layers in ``axes.counted``: not embeddings and tied output layers.

    Raise ValueError if there are none.
    """
    paths = [name.removesuffix(".weight") for name in axes.counted if name.endswith(".weight")]
    modules = dict(model.named_modules())
    # transformers' Conv1D is a linear map under another name.
    chosen = [p for p in paths if isinstance(modules.get(p), nn.Linear) or type(modules.get(p)).__name__ == "Conv1D"]
    if not chosen:
        raise ValueError("the network has no linear layer for lora to adapt; recover by refit or distil")
    return chosen


def add_adapters(model: nn.Module, paths: list[str], settings: Settings, seed: int = 0) -> dict[str, nn.Parameter]:
    """Put an adapter around each layer in ``paths``, in place; return name → the adapters' parameters.

    ``settings`` has rank and scale; ``seed``: of the initial values; the global random state is unchanged.
    """
    import peft

    before = {id(parameter) for parameter in model.parameters()}
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=paths, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    return {name: p for name, p in model.named_parameters() if id(p) not in before}


def remove_adapters(model: nn.Module, *, merge: bool) -> None:
    """Remove all adapters from a network, in place; ``merge``: first add their changes to the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for layer in layers.values():
        if merge:
            layer.merge(safe_merge=True)
    set_modules(model, {name: layer.get_base_layer() for name, layer in layers.items()})
    if "peft_config" in vars(model):
        del model.peft_config
