"""Torch-Pruning from its package, used as its own examples use it; runs in an environment of its own, without regrow.

Used by peers.py, which calls it once per network, in a process with limits.

How it is asked: ``BasePruner`` with the L2 norm of groups, half of everything, the layer that makes the output ignored,
heads named where a module has query, key and value layers (half of the heads, none of their sizes), and afterwards the
attributes of the attention set to the new number of heads, as its examples for BERT, ViT and Llama do; the channels of
``nn.MultiheadAttention`` in groups, and the heads of detectors ignored, as its example for torchvision does.

How it is judged, in float64: the same network, uncut, with the channels that the pruner itself says it removes masked.
A layer that reads removed channels gets zeros there; where no layer reads them (queries and keys), what makes them is
zeroed. Norms cannot be masked so: they get a second chance, in which the uncut network's norms run over kept channels.

* ``exact``: the pruned network answers what the masked one answers (within 1e-5 of the largest output).
* ``norms``: only with that second chance.
* ``other``: not even then: it computes something else.
"""

import copy
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from shared import Row, peak, tell
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import nets

VERSIONS = ("1.6.1", "1.5.2")
CLOSE = 1e-5
TRIPLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
FUSED = ("qkv", "qkv_proj", "query_key_value")
HEADS = ("num_heads", "num_attention_heads", "n_heads")


def opened(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A network of nets.py and its inputs, in float64."""
    net = next(net for net in nets.nets() if f"{net.kind}/{net.name}" == name)
    model = net.build()
    if getattr(getattr(model, "config", None), "_experts_implementation", None):
        model.set_experts_implementation("eager")  # the grouped product knows no float64, in which exactness is judged
    double = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    args, kwargs = tree_map(double, net.example())
    return model.double(), args, kwargs


def pruned(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Prune half of everything; tell each step's outcome as soon as it is known."""
    import torch_pruning as tp

    reference, outputs = copy.deepcopy(model), answers(model, args, kwargs)
    row: Row = {"version": version("torch-pruning"), "before": count(model)}
    names = {module: name for name, module in model.named_modules()}
    heads, wanted = attention(model), ignored(model, outputs)
    sizes = {module: rows_of(module) // n for module, n in heads.items()}
    shapes = {name: tuple(m.weight.shape) for name, m in layers(model).items()}
    row["heads_asked"] = len(heads)
    start, worked = time.perf_counter(), time.process_time()
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=kwargs or (args if len(args) > 1 else args[0]),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=wanted,
        num_heads=dict(heads),
        out_channel_groups={m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        output_transform=lambda answer: sum(x.sum() for x in nets.floats(answer)),
    )
    row["build_s"] = round(time.perf_counter() - start, 2)
    tell(row)
    record = Record(names, pruner.DG)
    for group in pruner.step(interactive=True):
        record.note(group)
        group.prune()
    restate(model, sizes)
    cpu = round(time.process_time() - worked, 4)
    row |= {"seconds": round(time.perf_counter() - start, 2), "after": count(model), "groups": record.groups}
    whole = [n for n, m in layers(model).items() if tuple(m.weight.shape) == shapes[n] and m not in wanted]
    row |= {"layers": len(shapes), "layers_left_whole": len(whole)}
    row["heads_left_whole"] = sum(rows_of(module) == shapes[names[module]][0] for module in heads)
    row |= {"peak_mib": peak(), "cpu_s": cpu}
    tell(row)
    try:
        after = answers(model, args, kwargs)
        row["runs"] = [x.shape for x in after] == [x.shape for x in outputs]
        if not row["runs"]:
            row["why"] = f"its output is {[tuple(x.shape) for x in after][:3]}"
    except Exception as error:
        row |= {"runs": False, "why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    tell(row)
    if row["runs"]:
        tell(row | record.judged(reference, args, kwargs, after))


def count(model: nn.Module) -> int:
    """How many parameters it has, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def answers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What it answers to its example."""
    with torch.no_grad():
        return nets.floats(model(*args, **kwargs))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and convolutions by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}


def ignored(model: nn.Module, outputs: list[Tensor]) -> list[nn.Module]:
    """The layers that make the first output: as wide as it is, and not as wide as anything that reads it on."""
    sizes = set(outputs[0].shape[1:])
    head = getattr(model, "get_output_embeddings", lambda: None)()
    made = [m for m in layers(model).values() if m.weight.shape[0] in sizes]
    inner = {m.weight.shape[1] for m in layers(model).values()}
    found = [m for m in made if m is head or m.weight.shape[0] not in inner]
    parts = ("head", "roi_heads", "rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn")
    detector = hasattr(model, "transform") and hasattr(model, "backbone")
    return found + [m for name, m in model.named_modules() if detector and name in parts]


def attention(model: nn.Module) -> dict[nn.Module, int]:
    """Query, key and value layers → how many heads each has."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        n = next((v for at in (module, config) for h in HEADS if isinstance(v := getattr(at, h, None), int)), None)
        if n and not isinstance(module, nn.MultiheadAttention):
            kv = next((v for at in (module, config) if (v := getattr(at, "num_key_value_heads", None))), n)
            for triple in TRIPLES:
                own = [getattr(module, part, None) for part in triple]
                if all(isinstance(part, nn.Linear) for part in own):
                    found |= dict(zip(own, (n, kv, kv), strict=True))
            found |= {part: n for name in FUSED if isinstance(part := getattr(module, name, None), nn.Linear)}
    return found


def rows_of(module: nn.Module) -> int:
    """How many rows its weight has now."""
    return module.weight.shape[0]


def restate(model: nn.Module, sizes: dict[nn.Module, int]) -> None:
    """Set what modules hold of their heads, whose sizes stayed, as the examples do after pruning."""
    for module in model.modules():
        for triple in TRIPLES:
            q, k = (getattr(module, part, None) for part in triple[:2])
            if not isinstance(q, nn.Linear) or q not in sizes:
                continue
            heads, kv = q.out_features // sizes[q], max(k.out_features // sizes[k], 1)
            new = dict.fromkeys(HEADS, heads) | {"num_key_value_heads": kv, "num_key_value_groups": heads // kv}
            new |= dict.fromkeys(("all_head_size", "inner_dim"), q.out_features)
            for name, value in new.items():
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, value)
    if hasattr(model, "conv_proj") and hasattr(model, "hidden_dim"):
        model.hidden_dim = model.conv_proj.out_channels


class Record:
    """What the pruner removes, in the numbering of the uncut network."""

    def __init__(self, names: dict[Any, str], graph: Any) -> None:
        self.names, self.graph, self.groups = names, graph, 0
        self.left: dict[tuple[str, str], list[int]] = {}
        self.gone: dict[tuple[str, str], set[int]] = {}
        self.lone: dict[str, set[int]] = {}

    def note(self, group: Any) -> None:
        """Take down a group before it is pruned."""
        self.groups += 1
        made: list[tuple[str, set[int]]] = []
        read = False
        for dep, idxs in group:
            module, name = dep.target.module, self.names.get(dep.target.module)
            if name is None or not isinstance(module, nn.Module):
                continue
            consumes = self.graph.is_in_channel_pruning_fn(dep.handler)
            depthwise = isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
            layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention)
            side = "in" if consumes and layer and not depthwise else "out"
            size = self.graph.get_in_channels(module) if side == "in" else self.graph.get_out_channels(module)
            if size is None:
                continue
            plain = [int(getattr(i, "idx", i)) for i in idxs]
            left = self.left.setdefault((name, side), list(range(size)))
            old = {left[i] for i in plain}
            self.left[name, side] = [i for i in left if i not in old]
            self.gone.setdefault((name, side), set()).update(old)
            read |= side == "in" or isinstance(module, nn.MultiheadAttention)
            if side == "out" and layer:
                made.append((name, old))
        if not read:
            for name, old in made:
                self.lone.setdefault(name, set()).update(old)

    def judged(self, reference: nn.Module, args: Any, kwargs: Any, after: list[Tensor]) -> Row:
        """Compare with the uncut network, masked; and again with its norms over kept channels."""
        modules = dict(reference.named_modules())
        for (name, side), gone in self.gone.items():
            module = modules[name]
            if side == "in" or isinstance(module, nn.MultiheadAttention):
                module.register_forward_pre_hook(_zeroing(module, gone), with_kwargs=True)
            if isinstance(module, nn.MultiheadAttention):
                _without_rows(module, gone)
        for name, gone in self.lone.items():
            module = modules[name]
            dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            module.register_forward_hook(lambda m, a, out, dim=dim, gone=gone: _zeroed(out, dim, gone))
        row = {"beyond_masking": nets.gap(after, answers(reference, args, kwargs))}
        norms = {n: kept for (n, _), kept in self.left.items() if "Norm" in type(modules[n]).__name__}
        for name, kept in {**norms, **_norms_read(self, modules)}.items():
            _over_kept(modules[name], kept)
        row["beyond_norms"] = nets.gap(after, answers(reference, args, kwargs))
        tried = (("exact", "beyond_masking"), ("norms", "beyond_norms"))
        row["verdict"] = next((word for word, key in tried if row[key] <= CLOSE), "other")
        return row


def _norms_read(record: Record, modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Norms that hold a bare parameter, which the pruner cuts without knowing the module."""
    found = {}
    for parameter, name in record.graph._param_to_name.items():
        owner = modules.get(name.rpartition(".")[0])
        if owner is None or "Norm" not in type(owner).__name__ or name.rpartition(".")[0] in dict(record.left):
            continue
        whole = owner.weight.shape[-1] if getattr(owner, "weight", None) is not None else 0
        if whole and parameter.shape[-1] < whole:
            same = [k for (n, s), k in record.left.items() if len(k) == parameter.shape[-1] and s == "in"]
            if same:
                found[name.rpartition(".")[0]] = same[0]
    return found


def _zeroing(module: nn.Module, gone: set[int]) -> Any:
    dim = -1 if isinstance(module, nn.Linear | nn.MultiheadAttention) else 1

    def hook(m: nn.Module, args: Any, kwargs: Any) -> Any:
        zero = lambda x: _zeroed(x, dim, gone) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        return tree_map(zero, args), {
            k: zero(v) if k in ("query", "key", "value", "input") else v for k, v in kwargs.items()
        }

    return hook


def _zeroed(x: Tensor, dim: int, gone: set[int]) -> Tensor:
    if x.dim() < abs(dim) + (dim > 0) or max(gone) >= x.shape[dim]:
        return x
    return x.index_fill(dim, torch.tensor(sorted(gone)), 0)


def _without_rows(module: nn.MultiheadAttention, gone: set[int]) -> None:
    width, index = module.embed_dim, torch.tensor(sorted(gone))
    with torch.no_grad():
        for part in range(3):
            module.in_proj_weight.index_fill_(0, index + part * width, 0)
            if module.in_proj_bias is not None:
                module.in_proj_bias.index_fill_(0, index + part * width, 0)


def _over_kept(norm: nn.Module, kept: list[int]) -> None:
    """Have a norm run over kept channels; the others become 0, which nothing reads."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return
    index, small, dim = torch.tensor(kept), copy.deepcopy(norm), 1 if "2d" in type(norm).__name__ else -1
    for name, parameter in list(small.named_parameters(recurse=False)):
        setattr(small, name, nn.Parameter(parameter.detach()[index]))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(kept),)

    def forward(x: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = small(x.index_select(dim, index), *rest, **more)
        return torch.zeros_like(x, dtype=out.dtype).index_copy(dim, index, out)

    norm.forward = forward


def main() -> None:
    """One network, in the peer's environment."""
    torch.set_num_threads(1)
    model, args, kwargs = opened(sys.argv[1])
    if hasattr(getattr(model, "config", None), "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    pruned(model, args, kwargs)


if __name__ == "__main__":
    main()
