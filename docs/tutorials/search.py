# %% [markdown]
# # Search a network within a size
#
# The search trains a network while it learns which filters to remove, and ends within the target:
# here half of the multiply–accumulates. Targets may also be parameters, bytes or milliseconds.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn

import regrow

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train = (images[:1400], labels[:1400])
test = (images[1400:], labels[1400:])
net = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 3 * 3, 10),
)

# %%
result = regrow.search(net, train, target="macs=50%", epochs=8)
print(result)

# %% [markdown]
# ## Train it further
#
# The found network is an ordinary module. With `out="FOLDER"` a search can be stopped and resumed, and has a report.

# %%
regrow.finetune(result.model, train, epochs=4)
print(result.model)
print(regrow.evaluate(result.model, {"test": test})["test"])

# %% [markdown]
# `regrow search` searches built-in spaces with several operations per layer: [searching](../searching.md).
