"""Prune a recurrent network that classifies sequences."""

import torch
from torch import nn

import regrow


class Classifier(nn.Module):
    """A class for each sequence of 12 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(12, 64, batch_first=True), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of sequences ``[N, steps, 12]``."""
        return self.head(self.gru(x)[0][:, -1])


data = torch.randn(128, 20, 12), torch.randint(4, (128,))
net, plan = regrow.prune(Classifier(), data, method="magnitude", keep=0.5)
print(net.gru, regrow.evaluate(net, {"train": data})["train"])
