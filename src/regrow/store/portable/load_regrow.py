"""Load an image network of changed shape with torch and torchvision alone.

``from load_regrow import load; net = load()`` builds it in eval mode from the files beside this one. Written by
regrow. Needs torch, torchvision and safetensors. Licence: Apache-2.0.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the file beside this one

from reshape_regrow import finish, reshape  # noqa: E402


def load() -> nn.Module:
    """Load the network of this file's folder, with weights, in eval mode; names are those of ``model.safetensors``."""
    made = json.loads((HERE / "network.json").read_text(encoding="utf-8"))
    net = get_model(made["builder"], weights=None, **made["settings"])
    reshape(net, made["regrow"])
    net.load_state_dict(load_file(HERE / "model.safetensors"), strict=True)
    finish(net, made["regrow"])
    return net.eval()
