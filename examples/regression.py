"""Prune a network that predicts values, by a loss of one's own."""

import torch
from torch import nn

import regrow

net = nn.Sequential(nn.Linear(8, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1))
inputs = torch.randn(512, 8)
data = inputs, inputs.square().sum(1, keepdim=True)
regrow.finetune(net, data, epochs=20, lr=0.01)
net, plan = regrow.prune(net, data, method="llm_pruner", keep=0.5, loss=nn.SmoothL1Loss())
regrow.finetune(net, data, epochs=20, lr=0.01)
print(regrow.evaluate(net, {"train": data})["train"], net[0].out_features, net[2].out_features)
