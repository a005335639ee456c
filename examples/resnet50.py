"""Cut ResNet-50, loaded from a safetensors checkpoint, to half its dense multiply–accumulates."""

import torch
from safetensors.torch import save_file
from torchvision.models import resnet50

import regrow
from regrow.evaluation import macs

save_file(resnet50().state_dict(), "resnet50.safetensors")  # stands for a checkpoint of yours
model, image = "torchvision:resnet50:resnet50.safetensors", torch.randn(1, 3, 224, 224)
small, plan = regrow.prune(model, example=image, method="magnitude", target="macs=50%")
regrow.save(small, "resnet50-half", example=image)
axes = regrow.trace(regrow.load("resnet50-half"), image)
print(f"{macs(axes) / 1e9:.2f} G multiply–accumulates of one image")
