"""Prune a network of timm to half its multiply–accumulates, save it, and load it again."""

import timm
import torch

import regrow

model = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
images, labels = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
model, plan = regrow.prune(model, (images, labels), target="macs=50%")
print(plan, regrow.evaluate(model, (images, labels)), sep="\n")
regrow.save(model, "mobilenet-half", example=images[:1])
again = regrow.load("mobilenet-half", model=lambda: timm.create_model("mobilenetv3_small_050", num_classes=10))
print((again(images) - model.eval()(images)).abs().max().item())
