"""Prune a detection model and fine-tune it on its own losses."""

import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large as build

import regrow

model = build(weights=None, weights_backbone=None, num_classes=5)
image, box = torch.rand(3, 320, 320), torch.tensor([[20.0, 30, 200, 220]])
batches = [([image, image.flip(-1)], [{"boxes": box, "labels": torch.tensor([1])}] * 2)] * 4
model, plan = regrow.prune(model, example=([image],), method="magnitude", keep=0.7)
regrow.finetune(model, batches, epochs=1, lr=0.001)
print(regrow.evaluate(model, {"train": batches})["train"])
