"""Prune a ViT of transformers to half its multiply–accumulates, fine-tune it, and load it with transformers alone."""

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import regrow

config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=32)
model = ViTForImageClassification(config).eval()
batches = [{"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.randint(2, (8,))} for _ in range(4)]
model, plan = regrow.prune(model, batches, target="macs=50%")
regrow.finetune(model, batches, epochs=1)
print(regrow.evaluate(model, batches))
regrow.export(model, "vit-small", format="transformers")
again = AutoModelForImageClassification.from_pretrained("vit-small", trust_remote_code=True)
print(again(pixel_values=batches[0]["pixel_values"]).logits.shape)
