# %% [markdown]
# # Learn tasks one after the other
#
# A network learns the digits, then the same digits with their pixels permuted. SparseGrow widens it for each new task
# and protects the weights that earlier tasks use.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn

import regrow

torch.manual_seed(0)
digits = load_digits()
pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


def make_task(order: torch.Tensor) -> tuple:
    """Return training and test data whose pixels are in another order."""
    permuted = pixels[:, order]
    return (permuted[:1400], labels[:1400]), (permuted[1400:], labels[1400:])


tasks = {
    "digits": make_task(torch.arange(64)),
    "permuted": make_task(torch.randperm(64)),
}


def build() -> nn.Module:
    """Return a new network."""
    hidden = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(32, 10))


# %% [markdown]
# ## Plain training forgets
#
# `method="naive"` trains on one task after the other. A line of the result is the accuracy on each task, after one more
# task.

# %%
print(regrow.learn(build(), tasks, method="naive", epochs=8, lr=0.05))

# %% [markdown]
# ## SparseGrow grows
#
# Compare the accuracy on the first task after the second one. The printed network is wider than the one it began as.

# %%
settings = {"grow": "always"}
net = build()
training = {"epochs": 8, "lr": 0.05}
print(regrow.learn(net, tasks, method="sparsegrow", settings=settings, **training))
print(net)

# %% [markdown]
# `regrow learn` does the same on the command line, can be stopped and resumed, and writes a report:
# [learning](../learning.md).
