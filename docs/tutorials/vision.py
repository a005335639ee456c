# %% [markdown]
# # Prune a vision network of your own
#
# A small convolutional network is trained on the digits of scikit-learn, cut to half of its multiply–accumulates,
# and fine-tuned. Any `nn.Module` that `torch.export` can record will do.

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
    nn.Conv2d(1, 32, 3, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(64 * 3 * 3, 10),
)
regrow.finetune(net, train, epochs=8)
print(regrow.evaluate(net, {"test": test})["test"])

# %% [markdown]
# ## Which dimensions can be cut
#
# An axis is a set of dimensions that must change together: the filters of a convolution, its BatchNorm, and the
# inputs of the next layer. [Axes](../axes.md) explains how they are found.

# %%
print(regrow.trace(net, images[:2]))

# %% [markdown]
# ## Prune and fine-tune

# %%
net, plan = regrow.prune(net, train, target="macs=50%")
print(regrow.evaluate(net, {"test": test})["test"])
regrow.finetune(net, train, epochs=4, recalibrate=True)
print(net)
print(regrow.evaluate(net, {"test": test})["test"])

# %% [markdown]
# The network is an ordinary module. `regrow.save(net, "digits", example=images[:1])` writes it to a folder, and
# `regrow.export("digits", "digits.onnx", format="onnx")` a file for onnxruntime.
