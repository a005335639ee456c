"""Networks of torchvision with random weights; each large one has a small relative, on which all laws are checked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.facts import Fact, Has, NotNeutral, Widths
from zoo.networks import Net, images, network, randomise


def vision(name: str, make: Callable[[Any], nn.Module], size: int, *expect: Fact, seed: int = 0, **more: Any) -> Net:
    """A network of torchvision with random weights."""

    def build() -> nn.Module:
        import torchvision

        torch.manual_seed(0)
        return randomise(make(torchvision.models), seed)

    return Net(name, build, images(3, size), expect, **more)


def _convnext(models: Any) -> nn.Module:
    settings = models.convnext.CNBlockConfig
    return models.ConvNeXt([settings(12, 18, 1), settings(18, 26, 2), settings(26, None, 1)], num_classes=7)


def _vit(models: Any) -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=34, num_classes=7
    )


def _small_mobilenet(models: Any) -> nn.Module:
    rows = [[1, 8, 1, 1], [3, 12, 2, 2], [2, 20, 1, 2]]
    return models.MobileNetV2(num_classes=7, inverted_residual_setting=rows, round_nearest=2, width_mult=1.0)


def _small_densenet(models: Any) -> nn.Module:
    return models.DenseNet(growth_rate=6, block_config=(2, 3), num_init_features=10, bn_size=2, num_classes=7)


def _small_efficientnet(models: Any) -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    rows = [MBConvConfig(1, 3, 1, 16, 8, 1, 1.0, 1.0), MBConvConfig(2, 5, 2, 8, 24, 1, 1.0, 1.0)]
    return EfficientNet(rows, dropout=0.2, num_classes=7, last_channel=40)


def _small_shufflenet(models: Any) -> nn.Module:
    return models.ShuffleNetV2([2, 1, 1], [8, 12, 20, 28, 36], num_classes=7)


def _inception() -> dict[str, Any]:
    from torchvision.models.googlenet import Inception

    return {
        "stem": nn.Conv2d(3, 6, 3, stride=2, padding=1),
        "one": Inception(6, 5, 4, 7, 3, 6, 4),
        "two": Inception(22, 3, 5, 6, 2, 4, 5),
        "aux": nn.Conv2d(22, 4, 1),
        "head": nn.Linear(18, 7),
    }


MOBILE = (32, 96, 144, 144, *(192,) * 3, *(384,) * 4, *(576,) * 3, *(960,) * 3, 16, 24, 32, 64, 96, 160, 320, 1280)


VISION = (
    vision(
        "resnet18",
        lambda models: models.resnet18(num_classes=7),
        64,
        Widths(tuple(width for width in (64, 128, 256, 512) for _ in range(3))),
        Has(64, ("layer1.0.conv1.weight:0", "layer1.0.bn1.running_var:0", "layer1.0.conv2.weight:1")),
        Has(128, ("layer2.0.downsample.0.weight:0", "layer2.1.conv2.weight:0", "layer3.0.downsample.0.weight:1")),
        heavy=True,
    ),
    vision(
        "mobilenet_v2",
        lambda models: models.mobilenet_v2(num_classes=7),
        64,
        Widths(MOBILE),
        Has(32, ("features.0.0.weight:0", "features.1.conv.0.0.weight:0", "features.1.conv.1.weight:1")),
        heavy=True,
        relative="small_mobilenet",
    ),
    vision(
        "densenet121",
        lambda models: models.densenet121(num_classes=7),
        64,
        Widths((64, 128, 256, 512, *(128,) * 58, *(32,) * 58)),
        Has(
            32,
            ("features.denseblock1.denselayer1.conv2.weight:0", "features.denseblock1.denselayer3.conv1.weight:1"),
        ),
        heavy=True,
        relative="small_densenet",
    ),
    vision(
        "efficientnet_b0",
        lambda models: models.efficientnet_b0(num_classes=7),
        64,
        Has(
            32,
            ("features.0.0.weight:0", "features.1.0.block.1.fc1.weight:1", "features.1.0.block.1.fc2.weight:0"),
        ),
        Has(8, ("features.1.0.block.1.fc1.weight:0", "features.1.0.block.1.fc2.weight:1"), alone=False),
        heavy=True,
        relative="small_efficientnet",
    ),
    vision(
        "convnext",
        _convnext,
        32,
        Widths((48, 72, 72, 104)),
        Has(48, ("features.1.0.block.3.weight:0", "features.1.0.block.5.weight:1")),
        NotNeutral(("features.0.0.weight:0", "features.1.0.layer_scale:0")),
    ),
    vision(
        "shufflenet",
        lambda models: models.shufflenet_v2_x0_5(num_classes=7),
        64,
        *(
            Has(size, (f"{unit}.branch2.0.weight:0", f"{unit}.branch2.3.weight:0", f"{unit}.branch2.5.weight:1"))
            for unit, size in (("stage2.0", 24), ("stage2.1", 24), ("stage3.0", 48), ("stage4.3", 96))
        ),
        Has(1024, ("conv5.0.weight:0", "fc.weight:1")),
        heavy=True,
        relative="small_shufflenet",
    ),
    vision(
        "googlenet",
        lambda models: models.googlenet(num_classes=7, init_weights=False, aux_logits=True),
        64,
        Has(96, ("inception3a.branch2.0.conv.weight:0", "inception3a.branch2.1.conv.weight:1")),
        Has(
            128,
            (
                "inception3a.branch2.1.conv.weight:0",
                *(
                    f"inception3b.branch{i}{p}:1"
                    for i, p in (
                        (1, ".conv.weight"),
                        (2, ".0.conv.weight"),
                        (3, ".0.conv.weight"),
                        (4, ".1.conv.weight"),
                    )
                ),
            ),
        ),
        Has(192, ("inception4a.branch1.conv.weight:0", "aux1.conv.conv.weight:1")),
        heavy=True,
        relative="inception",
    ),
    vision(
        "vit",
        _vit,
        32,
        *(
            Has(
                34, tuple(f"encoder.layers.encoder_layer_{i}.mlp.{p}" for p in ("0.weight:0", "0.bias:0", "3.weight:1"))
            )
            for i in (0, 1)
        ),
        NotNeutral(("conv_proj.weight:0", "class_token:2", "encoder.ln.weight:0")),
    ),
    vision(
        "small_mobilenet",
        _small_mobilenet,
        32,
        Has(32, ("features.0.0.weight:0", "features.1.conv.0.0.weight:0", "features.1.conv.1.weight:1")),
        Has(12, ("features.2.conv.2.weight:0", "features.3.conv.2.weight:0", "features.4.conv.0.0.weight:1")),
    ),
    vision(
        "small_densenet",
        _small_densenet,
        48,
        Widths((10, *(12,) * 5, *(6,) * 5, 11)),
        Has(6, ("features.denseblock1.denselayer1.conv2.weight:0", "features.denseblock1.denselayer2.conv1.weight:1")),
        seed=5,
    ),
    vision(
        "small_efficientnet",
        _small_efficientnet,
        32,
        Has(16, ("features.0.0.weight:0", "features.1.0.block.1.fc1.weight:1", "features.1.0.block.1.fc2.weight:0")),
        Has(4, ("features.1.0.block.1.fc1.weight:0", "features.1.0.block.1.fc2.weight:1"), alone=False),
    ),
    vision(
        "small_shufflenet",
        _small_shufflenet,
        64,
        *(
            Has(size, (f"{unit}.branch2.0.weight:0", f"{unit}.branch2.3.weight:0", f"{unit}.branch2.5.weight:1"))
            for unit, size in (("stage2.0", 6), ("stage2.1", 6), ("stage3.0", 10), ("stage4.0", 14))
        ),
        Has(36, ("conv5.0.weight:0", "fc.weight:1")),
    ),
    network(
        "inception",
        lambda m, x: m.head(m.two(h := m.one(m.stem(x).relu())).mean((2, 3))) + m.aux(h).mean((1, 2, 3))[:, None],
        _inception,
        images(3, 14, batch=3),
        Has(4, ("one.branch2.0.conv.weight:0", "one.branch2.1.conv.weight:1")),
        Has(
            7,
            (
                "one.branch2.1.conv.weight:0",
                *(f"two.branch{i}{p}.conv.weight:1" for i, p in ((1, ""), (2, ".0"), (3, ".0"), (4, ".1"))),
                "aux.weight:1",
            ),
        ),
        seed=1,
    ),
)
