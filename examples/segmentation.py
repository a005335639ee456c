"""Prune a segmentation network with images and masks, and write it as ONNX."""

import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import regrow

model = lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=4).eval()
images, masks = torch.randn(4, 3, 96, 96), torch.randint(4, (4, 96, 96))
model, plan = regrow.prune(model, (images, masks), target="macs=60%", batch_size=2)
regrow.finetune(model, (images, masks), epochs=1, batch_size=2)
print(plan, regrow.evaluate(model, (images, masks)), sep="\n")
print(regrow.export(model, "segmentation.onnx", format="onnx", example=images[:1]).checked)
