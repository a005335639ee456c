"""Prune an image network with images that a CSV file lists."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.models import resnet18

import regrow

rows = [("path", "label"), *((f"image-{i}.png", ("cat", "dog")[i % 2]) for i in range(32))]
for name, _ in rows[1:]:  # images of yours
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(name)
with Path("images.csv").open("w", newline="") as file:
    csv.writer(file).writerows(rows)
net, plan = regrow.prune(resnet18(num_classes=2), "images.csv", keep=0.5)
print(regrow.evaluate(net, "images.csv")["data"])
