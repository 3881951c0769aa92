"""Random weights in the format of torchvision's VGG-19, and the network they belong to, layer by layer."""

from __future__ import annotations

import torch
from torch import nn

# configuration E of the VGG paper up to conv5_1; M is a pooling
CONFIGURATION = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", 512)
LAST_OF_LEVEL = (1, 6, 11, 20, 29)  # relu1_1, relu2_1, relu3_1, relu4_1, relu5_1 in the list of layers


def layers() -> nn.Sequential:
    built: list[nn.Module] = []
    channels = 3
    for width in CONFIGURATION:
        if width == "M":
            built.append(nn.MaxPool2d(2))
        else:
            built += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*built)


def random_state() -> dict[str, torch.Tensor]:
    """Weights that keep the features' variance, and two entries of the layers that nobody uses here."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in layers().state_dict().items():
        scale = (2 / value[0].numel()) ** 0.5 if value.dim() == 4 else 0.1
        state[f"features.{name}"] = torch.randn(value.shape, generator=generator) * scale
    return state | {"features.30.bias": torch.zeros(512), "classifier.6.bias": torch.zeros(1000)}


def features(state: dict[str, torch.Tensor], image: torch.Tensor) -> list[torch.Tensor]:
    """The five features of an image, in the image's dtype."""
    network = layers()
    network.load_state_dict(
        {n.removeprefix("features."): v for n, v in state.items() if n.startswith("features.") and "30" not in n}
    )
    network.to(image.dtype)
    found = []
    for index, layer in enumerate(network):
        image = layer(image)
        if index in LAST_OF_LEVEL:
            found.append(image)
    return found
