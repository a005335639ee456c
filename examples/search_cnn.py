"""Search the widths of a network of one's own for half its multiply–accumulates, in a run folder that resumes."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import regrow

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2),
                    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))  # fmt: skip
labels = torch.randint(4, (512,))
images = torch.randn(512, 3, 16, 16) + labels.view(-1, 1, 1, 1) / 2
result = regrow.search(net, TensorDataset(images, labels), target="macs=50%", epochs=8, out="runs/searched")
print(net[0], net[3], result, sep="\n")
