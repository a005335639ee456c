"""Prune a detection model, fine-tune it on its own losses, save it, load it again, and export it."""

import torch

import regrow

image, box = torch.rand(3, 320, 320), torch.tensor([[20.0, 30, 200, 220]])
batches = [([image, image.flip(-1)], [{"boxes": box, "labels": torch.tensor([1])}] * 2)] * 4
name, example = "ssdlite320_mobilenet_v3_large", regrow.Example(([image],))
model, plan = regrow.prune(name, example=example, method="magnitude", keep=0.7)
regrow.finetune(model, batches, epochs=1, lr=0.001)
print(regrow.evaluate(model, {"train": batches})["train"])
regrow.save(model, "detector", example=example)
print(regrow.load("detector")([image])[0]["boxes"].shape)
print(regrow.export("detector", "exported", format="torchvision").checked)
