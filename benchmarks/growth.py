"""Growth of networks of full size: how much their outputs change, and how long it takes.

    python benchmarks/growth.py [--net NAME …]

SmolLM2-135M has its trained weights; networks of the shapes of Qwen2-0.5B and GPT-2 are built from their configurations
with fewer layers and random weights, as are ResNet-50 (BatchNorm statistics drawn so that they matter) and ViT-B/16
of torchvision. The change is the largest difference of an output before and after, relative to the largest output: of
the network itself in its own precision, and in float64 (`regrow.verify`).
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shared import Row, arguments, tell, today, write
from torch import nn

from regrow import apply, trace, verify
from regrow.core.axes import Example
from regrow.jobs.forward_outputs import measure_change, outputs_of
from regrow.jobs.grow import plan_growth
from regrow.nets import load
from regrow.settings.grow import Settings
from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "growth.json"


def smollm2() -> tuple[nn.Module, Example]:
    """SmolLM2-135M, with its trained weights."""
    loaded = load("smollm2-135m")
    return loaded.model, loaded.example


def qwen2() -> tuple[nn.Module, Example]:
    """A network of Qwen2-0.5B's shape with six layers and a smaller vocabulary."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    torch.manual_seed(0)
    net = Qwen2ForCausalLM(Qwen2Config(vocab_size=4096, num_hidden_layers=6, tie_word_embeddings=True, **sizes))
    return net.eval(), Example((torch.randint(4096, (2, 16)),))


def gpt2() -> tuple[nn.Module, Example]:
    """A network of GPT-2's shape with six layers and a smaller vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_layer=6, **tokens)).eval()
    return net, Example((torch.randint(4096, (2, 16)),))


def image_net(name: str) -> tuple[nn.Module, Example]:
    """A torchvision network with random weights, and BatchNorm statistics that matter."""
    torch.manual_seed(0)
    loaded = load(name)
    with torch.no_grad():
        for module in loaded.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        heads = [module for module in loaded.model.modules() if isinstance(module, nn.Linear)]
        heads[-1].weight.normal_(0, 0.02)  # a ViT's begins at 0
    return loaded.model.eval(), Example((torch.randn(1, 3, 224, 224),))


NETS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "smollm2-135m": smollm2,
    "qwen2-like": qwen2,
    "gpt2-like": gpt2,
    "resnet50": lambda: image_net("resnet50"),
    "vit_b_16": lambda: image_net("vit_b_16"),
}
TEXT = (
    {"mlp": "+25%"},
    {"mlp": "+25%", "fill": "split"},
    {"heads": "+1"},
    {"blocks": "+2"},
    {"mlp": "+25%", "heads": "+1", "blocks": "+2"},
)
GROWTHS: dict[str, tuple[Row, ...]] = {
    "smollm2-135m": TEXT,
    "qwen2-like": TEXT,
    "gpt2-like": TEXT,
    "resnet50": ({"channels": "+25%"}, {"channels": "+32", "fill": "split"}, {"blocks": "+1"}),
    "vit_b_16": ({"mlp": "+25%"}, {"heads": "+1"}, {"blocks": "+2"}),
}


def row(name: str, amounts: Row) -> Row:
    """Grow one network in one way."""
    model, example = NETS[name]()
    parameters = sum(one.numel() for one in model.parameters())
    start = time.perf_counter()
    axes = trace(model, *example.args, **example.kwargs)
    traced = time.perf_counter() - start
    before = outputs_of(model, axes.example)
    start = time.perf_counter()
    blocks = (amounts["blocks"],) if "blocks" in amounts else ()
    plan, notes = plan_growth(model, axes, Settings(name, **{**amounts, "blocks": blocks}))
    planned = time.perf_counter() - start
    exact = verify(model, axes, plan)
    gc.collect()
    start = time.perf_counter()
    apply(model, axes, plan)
    seconds = time.perf_counter() - start
    change, size = measure_change(before, outputs_of(model, axes.example))
    return {
        "net": name,
        **amounts,
        "parameters": [parameters, sum(one.numel() for one in model.parameters())],
        "axes": len(plan.changes),
        "blocks_inserted": sum(len(one.copies) for one in plan.insert.values()),
        "change_float64": exact.max_abs_diff / size,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "change": change / size,
        "seconds": {"trace": round(traced, 1), "plan": round(planned, 1), "apply": round(seconds, 1)},
        "notes": list(notes),
    }


def main() -> None:
    """Run all rows, or those of some networks, and write them."""
    given = arguments(__doc__, net=(*NETS,), out=OUT)
    rows = []
    for name in given.net:
        for amounts in GROWTHS[name]:
            rows.append(row(name, amounts))
            tell(rows[-1])
            gc.collect()
    write(given.out, {"date": today(), "threads": torch.get_num_threads(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
