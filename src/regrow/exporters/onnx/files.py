"""ONNX files: open them in onnxruntime and compare with torch, quantise them to int8, and move them into place.

Int8 quantisation is dynamic: weights in 8 bits, activations rounded to 8 bits at run time. There is one scale per
column of a weight, and one per input tensor. Where one number of an input is far larger than the others (the massive
activations of large language models), all others would be rounded to 0; such layers stay in float32.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.data import Half, text, windows
from regrow.exporters import ExportError
from regrow.exporters.onnx.calls import ExportedCall
from regrow.store.atomic import LockedError, leftovers, lock, sync

Checked = dict[str, float | int | str]

OUTLIER = 100.0  # a layer is quantised if the largest magnitude in its input is at most this many times the mean
WINDOWS, TOKENS = 16, 64
_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter notes the modules that a node comes from


class OnnxSession:
    """An ONNX file opened in onnxruntime on the CPU, with the call of the network that it was written from."""

    def __init__(self, path: Path, call: ExportedCall) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime cannot open the file ({str(error)[:200]})") from None
        self.call = call
        self.takes = {entry.name for entry in self.session.get_inputs()}

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the file and return its outputs, in the order of the call's outputs."""
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items() if name in self.takes}
        try:
            return [torch.from_numpy(output) for output in self.session.run(list(self.call.outputs), arrays)]
        except Exception as error:
            raise ExportError(f"onnxruntime fails on the file ({str(error)[:200]})") from None

    def run_torch(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the network in torch and return its outputs."""
        with torch.no_grad():
            return [*self.call.run(*inputs.values())]

    def compare(self, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return the largest output difference between file and network, and the network's largest output.

        Positions that an ``attention_mask`` hides (padding) do not count.
        """
        gaps, sizes = [0.0], [0.0]
        mask = inputs.get("attention_mask")
        for name, ours, theirs in zip(self.call.outputs, self.run(inputs), self.run_torch(inputs), strict=True):
            if ours.shape != theirs.shape:
                raise ExportError(f"{name} has the shape {[*ours.shape]} in onnxruntime, {[*theirs.shape]} in torch")
            gap, size = (ours.double() - theirs.double()).abs(), theirs.double().abs()
            gap[ours == theirs] = 0  # two infinities as well
            if mask is not None and name == "logits":
                counted = mask[:, -theirs.shape[1] :].bool()
                gap, size = gap[counted], size[counted]
            gaps.append(_largest(gap))
            sizes.append(_largest(size[size.isfinite()]))
        return _largest(torch.tensor(gaps)), max(sizes)


def compare_predictions(session: OnnxSession, tokenizer: object, lengths: Mapping[str, int]) -> Checked:
    """Compare next-token predictions and log-likelihoods of file and network on text."""
    tokens, differ, margin, nats = 0, 0, 0.0, torch.zeros(2, dtype=torch.float64)
    rows, text_name = _token_rows(session.call, tokenizer, lengths)
    for row in rows:
        inputs = start_inputs(session.call, row)
        ours, theirs = session.run(inputs)[0], session.run_torch(inputs)[0]
        first, second = theirs.argmax(-1), ours.argmax(-1)
        gap = (theirs.gather(-1, first[..., None]) - theirs.gather(-1, second[..., None])).squeeze(-1)
        tokens += first.numel()
        differ += int((first != second).sum())
        margin = max(margin, _largest(gap))
        for i, logits in enumerate((theirs, ours)):
            chances = logits[:, :-1].double().log_softmax(-1)
            nats[i] -= chances.gather(-1, row[:, 1:, None]).sum() / (row.numel() - len(row))
    result: Checked = {"next_tokens": tokens, "next_tokens_differ": differ}
    result |= {"next_tokens_margin": margin, "next_tokens_on": text_name}
    if tokenizer is not None:
        result |= {"nats_torch": float(nats[0]) / len(rows), "nats_onnx": float(nats[1]) / len(rows)}
    return result


def start_inputs(call: ExportedCall, tokens: Tensor) -> dict[str, Tensor]:
    """Return the inputs for texts ``[batch, sequence]`` from their beginning: no padding, and an empty cache."""
    result = {}
    for name, tensor in call.inputs.items():
        if name.startswith("past_key_values"):
            result[name] = tensor.new_zeros(len(tokens), tensor.shape[1], 0, tensor.shape[3])
        else:
            result[name] = torch.ones_like(tokens) if name == "attention_mask" else tokens
    return result


def _token_rows(call: ExportedCall, tokenizer: Any, lengths: Mapping[str, int]) -> tuple[list[Tensor], str]:
    batch, length = lengths.get("batch", 1), lengths.get("sequence", min(TOKENS, call.max_length or TOKENS))
    n = max(2, WINDOWS // batch) * batch
    if tokenizer is None:
        known = next(iter(call.inputs.values())).flatten()
        drawn = torch.randint(len(known), (n, length), generator=torch.Generator().manual_seed(0))
        return list(known[drawn].split(batch)), "drawn tokens"
    domain = text("manual")
    source = windows(domain, tokenizer, n=n, seq_len=length, half=Half.EVALUATION, batch_size=batch)
    return [row.args[0] for row in source if len(row.args[0]) == batch], domain.origin


def _largest(values: Tensor) -> float:
    """Return the largest of some numbers; NaN if one is NaN, 0 if there are none."""
    return float(values.max()) if values.numel() else 0.0


def quantise(path: Path, to: Path, call: ExportedCall, largest: int) -> str:
    """Write an ONNX file again with linear layers in int8, and return a note that says which."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    to.parent.mkdir()
    size = path.stat().st_size + sum(data.stat().st_size for data in path.parent.glob("*.data"))
    graph = onnx.load(path, load_external_data=False).graph
    wide = {f"'{name}'" for name, ratio in _spread(call).items() if ratio > OUTLIER}
    excluded = []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.name:
            scopes = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
            if any(name in scope for scope in scopes for name in wide):
                excluded.append(node.name)
    quantize_dynamic(
        path,
        to,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # with signed weights, sums overflow 16 bits on processors without VNNI
        nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],  # what becomes of a Gemm
        use_external_data_format=size > largest,
    )
    operations = [node.op_type for node in onnx.load(to, load_external_data=False).graph.node]
    if not (quantised := operations.count("MatMulInteger")):
        raise ExportError("no linear layer of the network can be written in 8 bits; write it in float32")
    note = f"int8: {quantised} linear layers multiply in 8 bits"
    if excluded:
        note += f"; {len(excluded)} stay in float32, for their inputs have numbers {OUTLIER:g} times as large as usual"
    if convolutions := operations.count("Conv"):
        note += f"; {convolutions} convolutions stay in float32"
    return f"{note}; what it costs is under int8_… in what was checked, and on your own data only you can tell"


def _spread(call: ExportedCall) -> dict[str, float]:
    """Return path of each linear layer → largest magnitude in its input over the mean magnitude, on the example."""
    result: dict[str, float] = {}

    def measure(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].float().abs()
        result[name] = max(result.get(name, 0.0), float(values.max() / values.mean().clamp(min=1e-30)))

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in call.run.named_modules():
            if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_pre_hook(partial(measure, name)).remove)
        call.run(*call.inputs.values())
    return result


def place_file(path: Path, stage: Path, out: Path) -> int:
    """Move a new ONNX file, and the weights beside it if any, into place atomically; return their size in bytes.

    The weights get an unused name; then the new file replaces the old one, and the weights of the old one are deleted.
    Nothing else is replaced or deleted.
    """
    weights, old = path.with_name(f"{path.name}.data"), _weights_of(out)
    size = 0
    if weights.exists():
        size = weights.stat().st_size
        names = (f"{out.name}.{n}.data" if n else f"{out.name}.data" for n in count())
        unused = next(name for name in names if not os.path.lexists(out.with_name(name)))
        if unused != weights.name:
            _rename_weights(path, unused)
        sync(weights)
        try:
            os.link(weights, out.with_name(unused))
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            weights.replace(out.with_name(unused))
        sync(out.parent)
    for number, file in enumerate(old):
        with contextlib.suppress(OSError):
            os.link(file, stage / f"old-{number}.data", follow_symlinks=False)
    sync(path)
    size += path.stat().st_size
    path.replace(out)
    sync(out.parent)
    for file in old:
        file.unlink(missing_ok=True)
    return size


def clear_abandoned(out: Path) -> None:
    """Delete weights that a killed process left beside an ONNX file, recognised by its temporary folder."""
    for stage in leftovers(out):
        with contextlib.suppress(LockedError, OSError), lock(stage) as owner:
            left = [file for file in stage.rglob("*.data") if file.is_file() and not file.is_symlink()]
            if not left or owner.handle is None:
                continue
            used = _weights_of(out)
            for file in out.parent.iterdir():
                if _is_weights(file.name, out) and file not in used and any(file.samefile(other) for other in left):
                    file.unlink()


def _is_weights(name: str, out: Path) -> bool:
    """Whether a file beside an ONNX file has a name that :func:`place_file` gives to its weights."""
    return re.fullmatch(rf"{re.escape(out.name)}(\.\d+)?\.data", name) is not None


def _weights_of(out: Path) -> list[Path]:
    """Return the external weight files that an ONNX file refers to; none if it does not exist."""
    import onnx

    names: set[str] = set()
    with contextlib.suppress(Exception):  # whatever else the file is, it is replaced
        for tensor in onnx.load(out, load_external_data=False).graph.initializer:
            names |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return [out.with_name(name) for name in sorted(names) if _is_weights(name, out)]


def _rename_weights(path: Path, name: str) -> None:
    """Make an ONNX file refer to its external weights by another name."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(model, path)
