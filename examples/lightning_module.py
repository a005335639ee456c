"""Prune a LightningModule, and train it on with its Trainer."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import regrow


class Classifier(lightning.LightningModule):
    """A small classifier."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


loader = DataLoader(TensorDataset(torch.randn(64, 16), torch.randint(3, (64,))), batch_size=16)
model, plan = regrow.prune(Classifier(), loader, smaller="50%")
lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, loader)
print(plan, regrow.evaluate(model, loader), sep="\n")
