"""Make a vision transformer 30 % smaller, counted in all parameters."""

import torch
from torchvision.models.vision_transformer import VisionTransformer

import regrow

model = VisionTransformer(64, 16, 4, 4, 128, 512, num_classes=10).eval()
before = sum(p.numel() for p in model.parameters())
images = torch.randn(64, 3, 64, 64)
model, plan = regrow.prune(model, images, smaller="30%")
print(f"{before:,} → {sum(p.numel() for p in model.parameters()):,} parameters")
regrow.save(model, "vit-small", example=images[:1])
