"""Networks with attention, written by hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.facts import Has, NotNeutral
from zoo.networks import network, vectors


def _attend(m: Any, x: Tensor) -> Tensor:
    def split(y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], m.heads, -1).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(split(m.query(x)), split(m.key(x)), split(m.value(x)))
    return mixed.transpose(1, 2).flatten(2)


ATTENTION = (
    network(
        "einsum_attention",
        lambda m, x: m.out(torch.einsum("bij,bkj->bik", m.one(x), m.two(x)).softmax(-1) @ m.three(x)),
        lambda: {"one": nn.Linear(6, 5), "two": nn.Linear(6, 5), "three": nn.Linear(6, 7), "out": nn.Linear(7, 3)},
        vectors(2, 4, 6),
        Has(7, ("three.weight:0", "out.weight:1")),
        zeros="producers",
    ),
    network(
        "multihead",
        lambda m, x: m.fc2(F.gelu(m.fc1(m.mix(h := m.fc(x), h, h, need_weights=False)[0]))),
        lambda: {
            "fc": nn.Linear(6, 12),
            "mix": nn.MultiheadAttention(12, 3, batch_first=True),
            "fc1": nn.Linear(12, 10),
            "fc2": nn.Linear(10, 3),
        },
        vectors(2, 4, 6),
        Has(10, ("fc1.weight:0", "fc2.weight:1")),
    ),
    network(
        "attention",
        lambda m, x: m.out(_attend(m, x)),
        lambda: {
            "heads": 3,
            "query": nn.Linear(10, 12),
            "key": nn.Linear(10, 12),
            "value": nn.Linear(10, 21),
            "out": nn.Linear(21, 6),
        },
        vectors(2, 5, 10),
        Has(3, ("query.weight:0", "key.weight:0", "value.weight:0", "out.weight:1")),
        Has(7, ("value.weight:0", "out.weight:1")),
    ),
    network(
        "attention_unscaled",
        lambda m, x: m.out(torch.bmm(torch.bmm(m.query(x), m.key(x).transpose(1, 2)).softmax(-1), m.value(x))),
        lambda: {
            "query": nn.Linear(10, 6),
            "key": nn.Linear(10, 6),
            "value": nn.Linear(10, 7),
            "out": nn.Linear(7, 4),
        },
        vectors(2, 5, 10),
        Has(7, ("value.weight:0", "out.weight:1")),
        Has(6, ("query.weight:0", "key.weight:0")),
        zeros="producers",
    ),
    network(
        "dot_scaled",
        lambda m, x: (m.query(x) @ m.key(x).mT / m.query.out_features**0.5).softmax(-1) @ x,
        lambda: {"query": nn.Linear(10, 6), "key": nn.Linear(10, 6)},
        vectors(2, 5, 10),
        NotNeutral(("query.weight:0",)),
        zeros="producers",
    ),
)
