"""Prune a network of one's own to a budget of multiply–accumulates."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regrow

net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2),
                    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))  # fmt: skip
data = TensorDataset(torch.randn(256, 3, 32, 32), torch.randint(10, (256,)))
loader = DataLoader(data, batch_size=32)
net, plan = regrow.prune(net, loader, target="macs=1.5M")
regrow.finetune(net, loader, epochs=1, recalibrate=True)
print(net[0], net[3], regrow.evaluate(net, {"train": loader})["train"], sep="\n")
