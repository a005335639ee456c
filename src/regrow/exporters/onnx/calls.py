"""Call an exported network in torch and in onnxruntime, compare the two, and quantise its file to int8.

Int8 quantisation is dynamic: weights in 8 bits, activations rounded to 8 bits at run time. There is one scale per
column of a weight, and one per input tensor. Where one number of an input is far larger than the others (the massive
activations of large language models), all others would be rounded to 0; such layers stay in float32.
"""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_leaves, tree_unflatten

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.core.sources import Batch, logits_in
from regrow.data import Half, text, windows
from regrow.exporters import ExportError, Results

BATCH, SEQUENCE = "batch", "sequence"  # names of dynamic sizes
Labels = Mapping[str, Mapping[int, str]]  # name of an input → dimension → name of its dynamic size

OUTLIER = 100.0  # a layer is quantised if the largest magnitude in its input is at most this many times the mean
PREDICTED_WINDOWS, PREDICTED_TOKENS = 16, 64  # of text on which next tokens are compared: windows, tokens in each
_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter notes the modules that a node comes from


@dataclass(frozen=True)
class ExportedCall:
    """A network as a function of named tensors, with an example of its inputs and the names of its outputs."""

    run: nn.Module  # takes the inputs in their order and returns a tuple of tensors
    inputs: Mapping[str, Tensor]  # name → the example's tensor
    outputs: tuple[str, ...]  # their names, in order
    text: bool = False  # whether it is a language model that predicts the next token
    max_length: int = 0  # the most tokens of a sequence; 0 if unknown


class Flat(nn.Module):  # exporters write the name of the class into the file
    """Wraps a network so that it takes and returns tensors alone; its other arguments are those of an example.

    ``leaves``, ``spec``: the example's (args, kwargs), flattened by ``torch.utils._pytree``.
    """

    def __init__(self, model: nn.Module, leaves: Sequence[object], spec: TreeSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the network's output; ``tensors``: those of the example's arguments, in their order."""
        return tuple(self.run_named(tensors).values())

    def run_named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run the network on its input tensors; return its output tensors by name: only the logits if there are any."""
        leaves = list(self.leaves)
        for index, tensor in zip(self.indices, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        output = Batch(args, kwargs).run(self.model)
        if isinstance(output, Tensor):
            return {"output": output}
        if isinstance(output, Mapping):
            if isinstance(output.get("logits"), Tensor):
                return {"logits": logits_in(output)}
            return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
        return {f"output_{i}": leaf for i, leaf in enumerate(tree_leaves(output)) if isinstance(leaf, Tensor)}


def describe_call(model: nn.Module, example: Example) -> ExportedCall:
    """Run a network on an example and describe the call; raise ExportError if it fails or gives no tensor."""
    parameters = inspect.signature(model.forward).parameters
    args, kwargs = example.args, dict(example.kwargs)
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_POSITIONAL]
    tokens = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if tokens is not None and (tokens.dim() != 2 or tokens.is_floating_point()):
        tokens = None  # the first input is no text
    if tokens is not None and "attention_mask" in parameters and "attention_mask" not in [*names[: len(args)], *kwargs]:
        kwargs["attention_mask"] = torch.ones_like(tokens)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", 0)
    max_length = positions if type(positions) is int else 0
    pairs, spec = tree_flatten_with_path((args, kwargs))
    leaves, inputs = [], {}
    for path, leaf in pairs:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu()
            leaf = leaf.float() if leaf.is_floating_point() else leaf
            inputs[_name_argument(path, names)] = leaf
        leaves.append(leaf)
    run = Flat(model, leaves, spec)
    if len(inputs) < len(run.indices) or not inputs:
        counts = f"{len(run.indices)} tensors go into the network under {len(inputs)} names"
        raise ExportError(f"{counts}; give another example")
    try:
        with torch.no_grad():
            outputs = run.run_named([*inputs.values()])
    except Exception as error:
        problem = f"the network does not take the example ({first_line(error)})"
        raise ExportError(f"{problem}; give one that it takes") from None
    if not outputs:
        raise ExportError("the network gives no tensor for the example; nothing can be written")
    text = tokens is not None and "logits" in outputs and outputs["logits"].shape[:-1] == tokens.shape
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)  # else it labels tokens
    text = text and vocabulary in (None, outputs["logits"].shape[-1])
    return ExportedCall(run, inputs, tuple(outputs), text, max_length)


def label_sizes(call: ExportedCall, dynamic: tuple[str, ...]) -> Labels:
    """Return input → dimension → name of its size, for the sizes that ``dynamic`` names (``batch``, ``sequence``).

    Dimension 0 is the batch if it has one size in all inputs. Dimension 1 of an integer matrix is the sequence; in
    inputs of a decoder it is called ``decoder sequence``.

    >>> label_sizes(ExportedCall(nn.Identity(), {"x": torch.zeros(2, 3)}, ("output",)), ("batch", "sequence"))
    {'x': {0: 'batch'}}
    """
    batch = {tensor.shape[0] for tensor in call.inputs.values() if tensor.dim()}
    result: dict[str, dict[int, str]] = {}
    for name, tensor in call.inputs.items():
        labels = {0: BATCH} if tensor.dim() and len(batch) == 1 else {}
        if tensor.dim() == 2 and not tensor.is_floating_point():
            # The inputs of a decoder need not be as long as those of its encoder.
            labels[1] = f"decoder {SEQUENCE}" if name.startswith("decoder") else SEQUENCE
        result[name] = {dim: label for dim, label in labels.items() if label.removeprefix("decoder ") in dynamic}
    return result


def sizes_of(call: ExportedCall, labels: Labels) -> dict[str, int]:
    """Return name of a dynamic size → its value in the example."""
    return {label: call.inputs[name].shape[dim] for name, dims in labels.items() for dim, label in dims.items()}


def resize_inputs(call: ExportedCall, labels: Labels, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the example's inputs at other sizes; entries are repeated, and then differ along the batch.

    ``labels``: which sizes are dynamic; ``sizes``: name of such a size → new value; others stay. The last row of a new
    ``attention_mask`` hides its last third.
    """
    result = {}
    for name, tensor in call.inputs.items():
        for dim, label in labels[name].items():
            if (size := sizes.get(label)) is not None:
                tensor = tensor.index_select(dim, torch.arange(size) % max(tensor.shape[dim], 1))
        if BATCH in labels[name].values() and name != "attention_mask":
            tensor = torch.stack([_vary(row, i) for i, row in enumerate(tensor)])
        result[name] = tensor
    mask = result.get("attention_mask")
    if mask is not None and mask.dim() == 2 and len(mask) > 1 and mask.shape[1] > 2:
        result["attention_mask"] = torch.ones_like(mask)
        result["attention_mask"][-1, -mask.shape[1] // 3 :] = 0  # a shorter text, filled up on the right
    return result


def _vary(row: Tensor, number: int) -> Tensor:
    """Return ``row`` made different from rows of other ``number``: floats scaled, integers rolled; as it is for 0."""
    if not number or row.dtype == torch.bool:
        return row
    if row.is_floating_point():
        return row * (1 - 0.1 * number)
    return row.roll(number, -1) if row.dim() else row


def _name_argument(path: tuple[Any, ...], names: list[str]) -> str:
    """Return an input's name by its path in (args, kwargs): ``(0, 1, …)`` is ``names[1]``, ``(1, "x", …)`` is x."""
    args_or_kwargs, first, *rest = [getattr(key, "idx", getattr(key, "key", key)) for key in path]
    if args_or_kwargs == 0:
        first = names[first] if first < len(names) else f"input_{first}"
    return "_".join(map(str, [first, *rest]))


class OnnxSession:
    """An ONNX file opened in onnxruntime on the CPU, and the call from which it was written; ExportError if damaged."""

    def __init__(self, path: Path, call: ExportedCall) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime cannot open the file ({str(error)[:200]})") from None
        self.call = call
        self.input_names = {entry.name for entry in self.session.get_inputs()}

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the file in onnxruntime on name → tensor; return outputs as ``call.outputs`` has them; or ExportError."""
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items() if name in self.input_names}
        try:
            return [torch.from_numpy(output) for output in self.session.run(list(self.call.outputs), arrays)]
        except Exception as error:
            raise ExportError(f"onnxruntime fails on the file ({str(error)[:200]})") from None

    def run_torch(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the network in torch without gradients on ``inputs``; return outputs as ``call.outputs`` has them."""
        with torch.no_grad():
            return [*self.call.run(*inputs.values())]

    def compare(self, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return (largest difference of outputs between file and network, largest finite output of the network).

        Both are absolute; positions that an ``attention_mask`` hides (padding) do not count. Raises ExportError if the
        file fails or its outputs have other shapes.
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
                gap, size = gap[counted], size[counted]  # the last positions: a cache may hold earlier ones
            gaps.append(_largest(gap))
            sizes.append(_largest(size[size.isfinite()]))
        return _largest(torch.tensor(gaps)), max(sizes)


def compare_predictions(session: OnnxSession, tokenizer: object, lengths: Mapping[str, int]) -> Results:
    """Return how many predicted tokens file and network were compared in and differ in, and the nats per token of both.

    ``tokenizer``: of transformers; ``None``: random tokens of the example are the text, and nats are left out.
    ``lengths``: ``batch`` and ``sequence`` → size, where the file fixes them.
    """
    tokens, differ, nats = 0, 0, torch.zeros(2, dtype=torch.float64)
    batches, text_name = _read_batches(session.call, tokenizer, lengths)
    for ids in batches:
        fixed = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        inputs = {name: fixed.get(name, ids) for name in session.call.inputs}
        ours, theirs = session.run(inputs)[0], session.run_torch(inputs)[0]
        tokens += ids.numel()
        differ += int((theirs.argmax(-1) != ours.argmax(-1)).sum())
        for i, logits in enumerate((theirs, ours)):
            log_probabilities = logits[:, :-1].double().log_softmax(-1)
            nats[i] -= log_probabilities.gather(-1, ids[:, 1:, None]).sum() / (ids.numel() - len(ids))
    result: Results = {"next_tokens": tokens, "next_tokens_differ": differ, "next_tokens_on": text_name}
    if tokenizer is not None:
        result |= {"nats_torch": float(nats[0]) / len(batches), "nats_onnx": float(nats[1]) / len(batches)}
    return result


def _read_batches(call: ExportedCall, tokenizer: Any, lengths: Mapping[str, int]) -> tuple[list[Tensor], str]:
    """Return (batches of token ids, ``[batch, tokens]``; name of their text) for :func:`compare_predictions`."""
    batch = lengths.get(BATCH, 1)
    length = lengths.get(SEQUENCE, min(PREDICTED_TOKENS, call.max_length or PREDICTED_TOKENS))
    n = max(2, PREDICTED_WINDOWS // batch) * batch
    if tokenizer is None:
        ids = next(iter(call.inputs.values())).flatten()
        indices = torch.randint(len(ids), (n, length), generator=torch.Generator().manual_seed(0))
        return list(ids[indices].split(batch)), "drawn tokens"
    domain = text("manual")
    source = windows(domain, tokenizer, n=n, seq_len=length, half=Half.EVALUATION, batch_size=batch)
    return [part.args[0] for part in source if len(part.args[0]) == batch], domain.origin  # not the last, if smaller


def _largest(values: Tensor) -> float:
    """Return the largest of some numbers; NaN if one is NaN, 0 if there are none."""
    return float(values.max()) if values.numel() else 0.0


def quantise(path: Path, to: Path, call: ExportedCall, largest: int) -> str:
    """Write the ONNX file ``path`` to ``to`` with linear layers in int8; return a note for the user that says how many.

    The folder of ``to`` is made here. ``call``: the call that the file was written from; ``largest``: weights of more
    bytes go to a file beside ``to``. Raise ExportError if no layer can be quantised.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    to.parent.mkdir()
    size = path.stat().st_size + sum(data.stat().st_size for data in path.parent.glob("*.data"))
    graph = onnx.load(path, load_external_data=False).graph
    with_outliers = {f"'{name}'" for name, ratio in _outlier_ratios(call).items() if ratio > OUTLIER}
    excluded = []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.name:
            scopes = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
            if any(name in scope for scope in scopes for name in with_outliers):
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
    quantised = operations.count("MatMulInteger")
    if not quantised:
        raise ExportError("no linear layer of the network can be written in 8 bits; write it in float32")
    note = f"int8: {quantised} linear layers multiply in 8 bits"
    if excluded:
        note += f"; {len(excluded)} stay in float32, for their inputs have numbers {OUTLIER:g} times as large as usual"
    if convolutions := operations.count("Conv"):
        note += f"; {convolutions} convolutions stay in float32"
    return f"{note}; what it costs is under int8_… in what was checked, and on your own data only you can tell"


def _outlier_ratios(call: ExportedCall) -> dict[str, float]:
    """Return path of a linear layer in ``call.run`` → largest over mean magnitude of its input, on the example."""
    result: dict[str, float] = {}

    def measure(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Note the ratio of a layer's input, the largest of all calls: a forward pre-hook."""
        values = args[0].float().abs()
        result[name] = max(result.get(name, 0.0), float(values.max() / values.mean().clamp(min=1e-30)))

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in call.run.named_modules():
            if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_pre_hook(partial(measure, name)).remove)
        call.run(*call.inputs.values())
    return result
