"""Bytes against nats: SmolLM2-135M and pruned runs of it as GGUF files of 16 to 4 bits, and as int8 elsewhere.

    python recipes/quantised.py --texts FOLDER --runs dense RUN RUN2      # FOLDER: the files of corpora.py
    python recipes/quantised.py … --dtypes torchao onnx                   # needs torchao and onnxruntime
    python recipes/quantised.py --show

Each file is written, its weights are read back into the network, and that is measured in bfloat16 on the text of
``unseen.py``. SmolLM2-135M comes from a 4-bit file (Q4_1), which the same grid stores without loss. So networks are
also measured with other weights of the same function. *rescaled*: channels that norms or linear layers feed are
multiplied by random factors from 0.7 to 1.4, what feeds them is divided. *rotated*: gains of norms are multiplied into
the next layers, and the residual stream is turned by a random orthogonal matrix. That needs a head of its own; it is
counted once with its embedding, as in the other files. ``head``: the type of both.

``torchao`` is its ``Int8WeightOnlyConfig``: all linear layers, head included, get integers of 8 bits, and what is left
counts as float16. ``onnx`` is ``regrow export --to onnx`` with ``dtype="int8"``, which also rounds inputs of layers and
leaves some layers in float32. Both are measured in float32.

``lost``: nats per token more than the dense network in f16, with the standard error over domains. ``beside``: the best
dense file of such weights that is at most 1.5 % larger, and how many nats more the row loses, paired by domain.
"""

import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import corpora
import gguf
import torch
from harness import Row, add, arguments, rows, table
from torch import Tensor, nn, no_grad
from torch.nn.functional import cross_entropy
from unseen import DOMAINS

from regrow import export, load
from regrow.core.sources import Batch, Source
from regrow.data import Half, windows
from regrow.evaluation import perplexity
from regrow.exporters import gguf as exporter
from regrow.exporters.gguf.llama_cpp import PARTS, describe_decoder
from regrow.nets import load as load_named
from regrow.nets.devices import autocasting
from regrow.nets.language import ATTENTION_LAYERS
from regrow.store.run_folder import RunFolder

OUT = Path(__file__).parent / "results" / "quantised.jsonl"
DTYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16")


@no_grad()
def rescale(model: Any, seed: int = 0) -> None:
    """Multiply channels of a Llama-like network by random factors, and divide what feeds them; its function stays."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = 2 ** (torch.rand(len(norm.weight), generator=generator) - 0.5)
            norm.weight.div_(factors)
            for linear in readers:
                linear.weight.mul_(factors)
        groups = attention.num_key_value_groups
        for linear, reader, repeats in ((mlp.up_proj, mlp.down_proj, 1), (attention.v_proj, attention.o_proj, groups)):
            factors = 2 ** (torch.rand(len(linear.weight), generator=generator) - 0.5)
            linear.weight.div_(factors[:, None])
            heads = factors.view(-1, attention.head_dim if repeats > 1 else 1)
            reader.weight.mul_(heads.repeat_interleave(repeats, 0).flatten())


@no_grad()
def rotate(model: Any, seed: int = 0) -> None:
    """Turn the residual stream of a Llama-like network by a random orthogonal matrix; its function stays."""
    width = model.config.hidden_size
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double())[0]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    readers = [(model.model.norm, [model.lm_head])]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        readers.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(turn.T @ linear.weight.double())
            if linear.bias is not None:
                linear.bias.copy_(linear.bias.double() @ turn)
    for norm, linears in readers:
        for linear in linears:
            linear.weight.copy_(linear.weight.double() * norm.weight.double() @ turn)
        norm.weight.fill_(1)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(embedding.double() @ turn)


WEIGHTS: dict[str, Callable[[Any], object]] = {"stored": lambda model: None, "rescaled": rescale, "rotated": rotate}


@no_grad()
def quantise(model: Any, dtype: str, head: str, folder: Path) -> tuple[Any, int]:
    """Return a network with the weights of its GGUF file, and the bytes of that file with one embedding."""
    exporter.HEADS, path = {exporter.TYPES[dtype]: head}, folder / "model.gguf"
    exporter.write(model, path, dtype=dtype)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    size = path.stat().st_size

    def read(name: str) -> Tensor:
        tensor = tensors[f"{name}.weight"]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())

    changed = deepcopy(model)
    for i, layer in enumerate(describe_decoder(changed).layers):
        heads = dict(zip(ATTENTION_LAYERS, (layer.heads, layer.kv_heads), strict=False))
        for part, linear in layer.linear.items():
            weight = read(f"blk.{i}.{PARTS[part]}")
            if part in heads:  # the exporter's order of rows, undone
                weight = weight.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
            linear.weight.copy_(weight)
    if "output.weight" in tensors:
        changed.lm_head.weight.copy_(read("output"))
        size -= tensors["token_embd.weight"].n_bytes
        kind = tensors["output.weight"].tensor_type
        values = gguf.quants.quantize(changed.model.embed_tokens.weight.numpy(), kind)
        changed.model.embed_tokens.weight.copy_(torch.from_numpy(gguf.quants.dequantize(values, kind)))
    else:
        changed.model.embed_tokens.weight.copy_(read("token_embd"))
    return changed, size


def measure_torchao(model: Any, sources: Mapping[str, Source], folder: Path) -> tuple[dict[str, float], int]:
    """Return nats per token of each domain with 8-bit weights by torchao, and bytes."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    changed = deepcopy(model)
    quantize_(changed, Int8WeightOnlyConfig())
    size = 0
    for weight in changed.parameters():
        if hasattr(weight, "qdata"):
            size += weight.qdata.numel() + weight.scale.numel() * weight.scale.element_size()
        else:
            size += 2 * weight.numel()
    return {name: round(perplexity(changed, source).mean, 4) for name, source in sources.items()}, size


def measure_onnx(model: Any, sources: Mapping[str, Source], folder: Path) -> tuple[dict[str, float], int]:
    """Return nats per token of each domain with 8-bit weights and inputs in onnxruntime, and bytes."""
    import onnxruntime

    path = folder / "model.onnx"
    export(model, path, format="onnx", dtype="int8")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def read(batch: Batch) -> float:
        (ids,) = batch.args
        logits = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})[0]
        return float(cross_entropy(torch.from_numpy(logits[0, :-1]), ids[0, 1:]))

    nats = {name: round(fmean(read(batch) for batch in source), 4) for name, source in sources.items()}
    return nats, path.stat().st_size


Measure = Callable[[Any, Mapping[str, Source], Path], tuple[dict[str, float], int]]
OTHERS: dict[str, Measure] = {"torchao": measure_torchao, "onnx": measure_onnx}


def summarise(row: Row, known: list[Row]) -> list[object]:
    """Return the cells of a row of the table."""

    def compare(a: Row, b: Row) -> str:
        gaps = [a["nats"][name] - b["nats"][name] for name in DOMAINS]
        return f"{fmean(gaps):.3f} ± {stdev(gaps) / 2:.3f}"

    dense = [other for other in known if other["command"] == "dense" and other is not row]
    whole = next((other for other in dense if other["dtype"] == "f16"), row)
    smaller = [b for b in dense if b["weights"] == row["weights"] and b["bytes"] <= 1.015 * row["bytes"]]
    best = min(smaller, key=lambda other: sum(other["nats"].values()), default=None)
    cells = [row["command"], row["weights"], row["dtype"], row["head"], f"{row['bytes'] / 1e6:.1f}"]
    beside = f"{best['dtype']}, {best['head']}: {compare(row, best)}" if best else ""
    return [*cells, compare(row, whole), beside]


def main() -> None:
    """Measure what has no row yet."""
    args = arguments(__doc__, OUT, texts=Path, runs=["dense"], dtypes=[*DTYPES], heads=["Q5_0"], weights=(*WEIGHTS,))
    known = rows(args.out)
    if args.texts and not args.show:
        loaded, texts = load_named("smollm2-135m"), corpora.texts(args.texts)
        options = {"n": 16, "seq_len": 512, "seed": 0, "half": Half.EVALUATION}
        sources = {name: windows(texts[name](), loaded.tokenizer, **options) for name in DOMAINS}
        for weights, run in product(args.weights, args.runs):
            model = deepcopy(loaded.model) if run == "dense" else load(run)
            command = run if run == "dense" else RunFolder.open(run).read_record()["command"].split(" --out")[0]
            WEIGHTS[weights](model)
            for dtype, head in product(args.dtypes, args.heads):
                head = head if dtype.startswith(("q4", "q5")) else "" if dtype in OTHERS else dtype.upper()
                kinds = {"weights": weights, "dtype": dtype, "head": head}
                if any(row["command"] == command and kinds.items() <= row.items() for row in known):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    if dtype in OTHERS:
                        nats, size = OTHERS[dtype](model, sources, Path(folder))
                    else:
                        changed, size = quantise(model, dtype, head, Path(folder))
                        with no_grad(), autocasting(changed, "bfloat16"):
                            nats = {name: round(perplexity(changed, one).mean, 4) for name, one in sources.items()}
                known.append(add(args.out, {"command": command, **kinds, "bytes": size, "nats": nats}))
                print(known[-1], flush=True)
    columns = ["network", "weights", "dtype", "head", "MB", "lost", "beside"]
    known.sort(key=lambda row: (row["weights"], row["bytes"]))
    print(*table(columns, [summarise(row, known) for row in known]), sep="\n")


if __name__ == "__main__":
    main()
