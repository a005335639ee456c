"""Export to ONNX: a graph for onnxruntime and many other tools."""

from regrow.exporters.onnx.writer import OPSET, write

__all__ = ["OPSET", "write"]
