"""Dynamic int8 quantisation of an ONNX file: weights in 8 bits, activations rounded to 8 bits at run time.

There is one scale per column of a weight, and one per input tensor. Where one number of an input is far larger than the
others (the massive activations of large language models), all others would be rounded to 0; such layers stay in
float32.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from regrow.exporters.onnx.calls import ExportedCall
from regrow.exporters.written import ExportError

OUTLIER = 100.0
"""A layer is quantised if the largest magnitude in its input is at most this many times the mean magnitude."""

_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter notes the modules that a node comes from


def quantise(path: Path, to: Path, call: ExportedCall, largest: int) -> str:
    """Write an ONNX file again with linear layers in int8, and return a note for its user.

    Args:
        path: The float32 file.
        to: The file to write.
        call: The description of the call that the file was written from.
        largest: Bytes of weights above which they are stored in a file beside it.

    Returns:
        A sentence that says which layers are in 8 bits and which are not.

    Raises:
        ExportError: If no layer can be written in 8 bits.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    to.parent.mkdir()
    size = path.stat().st_size + sum(one.stat().st_size for one in path.parent.glob("*.data"))
    graph = onnx.load(path, load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.name]
    wide = {name for name, ratio in spread(call).items() if ratio > OUTLIER}
    scopes = {node.name: {one.value for one in node.metadata_props if one.key == _SCOPES} for node in nodes}
    kept = [name for name, paths in scopes.items() if any(f"'{one}'" in text for text in paths for one in wide)]
    quantize_dynamic(
        path,
        to,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # with signed weights, sums overflow 16 bits on processors without VNNI
        nodes_to_exclude=[*kept, *(f"{name}_MatMul" for name in kept)],  # what becomes of a Gemm
        use_external_data_format=size > largest,
    )
    made = onnx.load(to, load_external_data=False).graph
    many = sum(node.op_type == "MatMulInteger" for node in made.node)
    convolutions = sum(node.op_type == "Conv" for node in made.node)
    if not many:
        raise ExportError("no linear layer of the network can be written in 8 bits; write it in float32, dtype=''")
    said = f"int8: {many} linear layers multiply in 8 bits"
    if kept:
        said += f"; {len(kept)} stay in float32, for their inputs have numbers {OUTLIER:g} times as large as is usual"
    if convolutions:
        said += f"; {convolutions} convolutions stay in float32"
    return f"{said}; what it costs is under int8_… in what was checked, and on your own data only you can tell"


def spread(call: ExportedCall) -> dict[str, float]:
    """Return path of each linear layer → largest magnitude in its input over the mean magnitude, on the example.

    Args:
        call: The description of the call.
    """
    result: dict[str, float] = {}

    def hook(name: str) -> object:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].float()
            ratio = float(values.abs().max() / values.abs().mean().clamp(min=1e-30))
            result[name] = max(result.get(name, 0.0), ratio)

        return look

    linear = [
        (name, module)
        for name, module in call.run.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, nn.Embedding)
    ]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linear]
    try:
        with torch.no_grad():
            call.run(*call.inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    return result
