"""Operations that reduce over the channels: sums, means, norms, softmax. A plain cut of most of them is wrong."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import STEM, along_channels
from zoo.facts import C, Frozen, Has, Noted, NotNeutral
from zoo.networks import conv


def _cbam(m: Any, x: Tensor) -> Tensor:
    seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * m.look(seen).sigmoid()


CHANNEL_REDUCTIONS = (
    along_channels("cbam", _cbam, NotNeutral(STEM), parts=lambda: {"look": conv(2, 1)}),
    along_channels(
        "softmax_gate",
        lambda m, x: x * m.gate(x.mean((2, 3))).softmax(1)[:, :, None, None],
        Has(8, (*STEM, "gate.weight:0", "gate.weight:1", "last.weight:1"), (C,)),
        parts=lambda: {"gate": nn.Linear(8, 8)},
    ),
    along_channels(
        "group_norm",
        lambda m, x: m.group(x).relu(),
        NotNeutral((*STEM, "group.weight:0"), 12),
        NotNeutral((*STEM, "group.weight:0"), 4),
        width=12,
        parts=lambda: {"group": nn.GroupNorm(3, 12)},
    ),
    along_channels(
        "group_norm_one",
        lambda m, x: m.group(x).relu(),
        NotNeutral((*STEM, "group.weight:0"), 8),
        parts=lambda: {"group": nn.GroupNorm(1, 8)},
    ),
    along_channels("deviation", lambda m, x: x / (x.std(dim=1, keepdim=True, correction=0) + 1), NotNeutral(STEM)),
    along_channels("renorm", lambda m, x: x.transpose(0, 1).renorm(2, 0, 0.5).transpose(0, 1), Has(8, STEM)),
    along_channels("mean_over_all", lambda m, x: x - x.mean((1, 2, 3), keepdim=True), NotNeutral(STEM)),
    along_channels(
        "norm_over_all",
        lambda m, x: m.whole(x),
        NotNeutral(STEM),
        parts=lambda: {"whole": nn.LayerNorm((8, 5, 4))},
    ),
    along_channels(
        "max_norm", lambda m, x: x / (1 + torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True)), Frozen(STEM)
    ),
    along_channels("order_one", lambda m, x: x / (1 + x.norm(1, 1, keepdim=True)), zeros="producers"),
    along_channels("log_sum", lambda m, x: x - x.logsumexp(1, keepdim=True), NotNeutral(STEM)),
    along_channels("minimum", lambda m, x: x - x.amin(1, keepdim=True), NotNeutral(STEM)),
    along_channels("cosine", lambda m, x: x * F.cosine_similarity(x, x.sigmoid(), dim=1)[:, None], zeros="nowhere"),
    along_channels("distance", lambda m, x: x * torch.cdist(x.flatten(2), x.flatten(2)).mean(2)[:, :, None, None]),
    along_channels(
        "softmax_parameter",
        lambda m, x: x * m.share.softmax(0)[:, None, None],
        NotNeutral(STEM),
        parts=lambda: {"share": nn.Parameter(torch.zeros(8))},
    ),
    along_channels(
        "mean_of_parameter",
        lambda m, x: x * (m.share / m.share.mean())[:, None, None],
        NotNeutral(STEM),
        parts=lambda: {"share": nn.Parameter(torch.zeros(8))},
    ),
    along_channels(
        "channel_weights",
        lambda m, x: x * (x * m.share[:, None, None]).sum(1, keepdim=True),
        parts=lambda: {"share": nn.Parameter(torch.zeros(8))},
        zeros="producers",
    ),
    along_channels("mean_over_channels", lambda m, x: x - x.mean(1, keepdim=True), NotNeutral(STEM)),
    along_channels(
        "mean_of_sigmoid", lambda m, x: x - x.sigmoid().mean(1, keepdim=True), NotNeutral(STEM), zeros="nowhere"
    ),
    along_channels("energy", lambda m, x: x * x.square().sum(1, keepdim=True), Has(8, STEM), zeros="producers"),
    along_channels("variance", lambda m, x: x / (x.var(1, keepdim=True) + 1), NotNeutral(STEM)),
    along_channels("maximum", lambda m, x: x - x.amax(1, keepdim=True), NotNeutral(STEM)),
    along_channels("product_over_channels", lambda m, x: x + x.prod(1, keepdim=True), NotNeutral(STEM)),
    along_channels("unit_length", lambda m, x: F.normalize(x, dim=1), zeros="producers"),
    along_channels("response_norm", lambda m, x: F.local_response_norm(x, 3, alpha=1.0), Frozen(STEM)),
    along_channels("count_zeros", lambda m, x: x * (x > 0).sum(1, keepdim=True), zeros="producers"),
    along_channels("any_over_channels", lambda m, x: x * (x > 1).any(1, keepdim=True), zeros="producers"),
    along_channels("argmax", lambda m, x: x * x.argmax(1, keepdim=True), Frozen(STEM)),
    along_channels("median", lambda m, x: x - x.median(1, keepdim=True).values, Frozen(STEM)),
    along_channels("fft", lambda m, x: torch.fft.fft(x, dim=1).real, Frozen(STEM, "to fft_fft"), Noted("fft")),
)
