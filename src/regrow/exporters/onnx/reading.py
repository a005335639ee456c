"""Compare an ONNX file in onnxruntime with the network in torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.data import Half, text, windows
from regrow.exporters.onnx.calls import ExportedCall
from regrow.exporters.written import ExportError

WINDOWS, TOKENS = 16, 64


class OnnxSession:
    """An ONNX file opened in onnxruntime on the CPU, with the network that it was written from.

    Args:
        path: The file.
        call: The description of the call that the file was written from.

    Raises:
        ExportError: If onnxruntime cannot open it.
    """

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
        self.takes = {one.name for one in self.session.get_inputs()}

    def says(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the ONNX file and return its outputs, in the order of the call's outputs.

        Args:
            inputs: Name → tensor.

        Raises:
            ExportError: If onnxruntime fails.
        """
        given = {name: one.contiguous().numpy() for name, one in inputs.items() if name in self.takes}
        try:
            return [torch.from_numpy(one) for one in self.session.run(list(self.call.outputs), given)]
        except Exception as error:
            raise ExportError(f"onnxruntime fails on the file ({str(error)[:200]})") from None

    def meant(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the network in torch and return its outputs.

        Args:
            inputs: Name → tensor.
        """
        with torch.no_grad():
            return [*self.call.run(*inputs.values())]


def difference(reading: OnnxSession, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the largest output difference between file and network, and the network's largest output.

    Positions that an ``attention_mask`` hides (padding) do not count.

    Args:
        reading: The opened file.
        inputs: Name → tensor.

    Raises:
        ExportError: If the file fails, or its outputs have other shapes.
    """
    gaps, sizes = [0.0], [0.0]
    mask = inputs.get("attention_mask")
    for name, said, meant in zip(reading.call.outputs, reading.says(inputs), reading.meant(inputs), strict=True):
        if said.shape != meant.shape:
            raise ExportError(f"{name} has the shape {list(said.shape)} in onnxruntime, {list(meant.shape)} in torch")
        gap, size = (said.double() - meant.double()).abs(), meant.double().abs()
        gap[said == meant] = 0  # two infinities as well
        if mask is not None and name == "logits":
            counts = mask[:, -meant.shape[1] :].bool()
            gap, size = gap[counts], size[counts]
        gaps, sizes = [*gaps, _most(gap)], [*sizes, _most(size[size.isfinite()])]
    return _most(torch.tensor(gaps)), max(sizes)


def compare_predictions(
    reading: OnnxSession, tokenizer: object, lengths: Mapping[str, int]
) -> dict[str, float | int | str]:
    """Compare next-token predictions and log-likelihoods of file and network on text.

    Args:
        reading: The opened file of a language model.
        tokenizer: Its tokenizer, to use real text (the evaluation half of Python's manual); ``None``: random tokens.
        lengths: ``batch`` and ``sequence``, if they are fixed.

    Returns:
        ``next_tokens`` (the number compared), ``next_tokens_differ``, ``next_tokens_margin`` (the largest gap, in
        torch's logits, between the two tokens where they differ), ``next_tokens_on`` (what text), and for real text
        ``nats_torch`` and ``nats_onnx`` per token.
    """
    many, differ, margin, nats = 0, 0, 0.0, torch.zeros(2, dtype=torch.float64)
    rows, text_name = _rows(reading.call, tokenizer, lengths)
    for row in rows:
        inputs = start_inputs(reading.call, row)
        said, meant = reading.says(inputs)[0], reading.meant(inputs)[0]
        first, second = meant.argmax(-1), said.argmax(-1)
        gap = (meant.gather(-1, first[..., None]) - meant.gather(-1, second[..., None])).squeeze(-1)
        many, differ, margin = many + first.numel(), differ + int((first != second).sum()), max(margin, _most(gap))
        for i, one in enumerate((meant, said)):
            chances = one[:, :-1].double().log_softmax(-1)
            nats[i] -= chances.gather(-1, row[:, 1:, None]).sum() / (row.numel() - len(row))
    result: dict[str, float | int | str] = {"next_tokens": many, "next_tokens_differ": differ}
    result |= {"next_tokens_margin": margin, "next_tokens_on": text_name}
    if tokenizer is not None:
        result |= {"nats_torch": float(nats[0]) / len(rows), "nats_onnx": float(nats[1]) / len(rows)}
    return result


def start_inputs(call: ExportedCall, tokens: Tensor) -> dict[str, Tensor]:
    """Return the inputs for texts from their beginning: no padding, and an empty cache.

    Args:
        call: The description of the call.
        tokens: The texts, ``[batch, sequence]`` int64.
    """
    result = {}
    for name, tensor in call.inputs.items():
        if name.startswith("past_key_values"):
            result[name] = tensor.new_zeros(len(tokens), tensor.shape[1], 0, tensor.shape[3])
        else:
            result[name] = torch.ones_like(tokens) if name == "attention_mask" else tokens
    return result


def _rows(call: ExportedCall, tokenizer: Any, lengths: Mapping[str, int]) -> tuple[list[Tensor], str]:
    batch, length = lengths.get("batch", 1), lengths.get("sequence", min(TOKENS, call.most or TOKENS))
    n = max(2, WINDOWS // batch) * batch
    if tokenizer is None:
        known = next(iter(call.inputs.values())).flatten()
        drawn = torch.randint(len(known), (n, length), generator=torch.Generator().manual_seed(0))
        return list(known[drawn].split(batch)), "drawn tokens"
    kind = text("manual")
    source = windows(kind, tokenizer, n=n, seq_len=length, half=Half.EVALUATION, batch_size=batch)
    rows = [one.args[0] for one in source if len(one.args[0]) == batch]
    return rows, kind.origin


def _most(values: Tensor) -> float:
    """Return the largest of some numbers; NaN if one is NaN, 0 if there are none."""
    return float(values.max()) if values.numel() else 0.0
