"""ResNet-18 learns the tasks of a benchmark shaped like those of Avalanche, with a replay buffer."""

from types import SimpleNamespace

import torch
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

import regrow


def experience(task: int) -> SimpleNamespace:
    """Images of three new classes: one colour is brighter, by more in the second task."""
    labels = torch.arange(48) % 3
    images = torch.rand(48, 3, 32, 32) + (0.5 + task) * torch.eye(3)[labels][:, :, None, None]
    return SimpleNamespace(dataset=TensorDataset(images, labels + 3 * task))


benchmark = SimpleNamespace(train_stream=[experience(0), experience(1)], test_stream=[experience(0), experience(1)])
print(regrow.learn(resnet18(num_classes=6), benchmark, method="replay", scenario="class", epochs=3, batch_size=16))
