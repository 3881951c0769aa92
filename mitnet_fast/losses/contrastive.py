"""Contrastive regularisation: close to the clear image and far from the hazy one, in VGG-19's features.

    L = Σ_l w_l · L1(f_l(u*), f_l(u)) / (L1(f_l(u*), f_l(ũ)) + 1e-7)

u* restored, u clear, ũ hazy; f_l are the features after relu1_1, 2_1, 3_1, 4_1, 5_1 and
w = 1/32, 1/16, 1/8, 1/4, 1. Gradients flow through u* only. Images are [B, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..models.official import CheckpointError, read_official
from ..modules._checks import check_map
from ..ops._checks import check_shape

VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"

# convolutions by their index in torchvision's `features`: those before a pooling, then the one behind
# it, whose rectified output is the level's feature
LEVELS = (((), 0), ((2,), 5), ((7,), 10), ((12, 14, 16), 19), ((21, 23, 25), 28))
CHANNELS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256)}
CHANNELS |= dict.fromkeys((12, 14, 16), (256, 256)) | {19: (256, 512)} | dict.fromkeys((21, 23, 25, 28), (512, 512))
LEVEL_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


def load_vgg19(weights: str | PathLike[str] | None = None) -> dict[str, torch.Tensor]:
    """Read torchvision's VGG-19 up to conv5_1.

    Args:
        weights: path of ``vgg19-dcbb9e9d.pth`` or of another VGG-19 in its format; None fetches the
            published file (548 MB) on first use, into torch.hub's folder. A hash in the file's name
            (``-dcbb9e9d.pth``) is checked.

    Returns:
        The entries ``features.<index>.weight`` and ``.bias`` of the 13 convolutions.

    Raises:
        FileNotFoundError: no file at ``weights``.
        CheckpointError: the file does not hold VGG-19, or not what its name's hash promises.
        RuntimeError: the published file is not there and cannot be fetched; the message says what to
            do about it.
    """
    if weights is None:
        try:
            state = torch.hub.load_state_dict_from_url(
                VGG19_URL, map_location="cpu", check_hash=True, weights_only=True
            )
        except Exception as error:  # whatever the network, the disk or the unpickler raises
            raise RuntimeError(
                f"the contrastive term needs the weights of VGG-19 ({VGG19_URL}, 548 MB), which are not in "
                f"{torch.hub.get_dir()}/checkpoints and could not be fetched ({error}). Fetch the file elsewhere and "
                "pass its path as vgg_weights, or switch the term off with contrastive_weight=0."
            ) from error
    else:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"vgg_weights: no file {path}; the contrastive term needs {VGG19_URL}, or is switched off with "
                "contrastive_weight=0"
            )
        promised = re.search(r"-([0-9a-f]{8,})\.", path.name)
        if promised:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if not found.startswith(promised[1]):
                raise CheckpointError(
                    f"vgg_weights: {path} is damaged: its SHA-256 begins with {found[:8]}, not {promised[1]}"
                )
        state = read_official(path)
    return _select(state)


def _select(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries that are used, after a check that the checkpoint is VGG-19."""
    shapes = {}
    for index, (before, after) in CHANNELS.items():
        shapes[f"features.{index}.weight"] = (after, before, 3, 3)
        shapes[f"features.{index}.bias"] = (after,)
    behind = re.compile(r"(features\.(30|32|34)|classifier\.(0|3|6))\.(weight|bias)")
    missing = [name for name in shapes if name not in state]
    unknown = [name for name in state if name not in shapes and not behind.fullmatch(name)]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    listed = [
        f"{title}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", misshapen))
        if names
    ]
    if listed:
        raise CheckpointError("vgg_weights: not torchvision's VGG-19; " + "; ".join(listed))
    return {name: state[name] for name in shapes}


class VGG19Features(nn.Module):
    """Features of VGG-19 after relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.

    The weights are fixed and are not part of the state dict: a checkpoint of a training does not
    repeat the published file.

    Args:
        weights: see :func:`load_vgg19`.

    Raises:
        FileNotFoundError, CheckpointError, RuntimeError: see :func:`load_vgg19`.

    Source: "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv 1409.1556,
    configuration E.
    """

    smallest_side = 16  # four times pooled

    def __init__(self, weights: str | PathLike[str] | None = None) -> None:
        super().__init__()
        for name, value in load_vgg19(weights).items():
            self.register_buffer(name.replace(".", "_"), value.float(), persistent=False)

    def _convolve(self, index: int, x: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(self, f"features_{index}_weight"), getattr(self, f"features_{index}_bias")
        return F.relu(F.conv2d(x, weight, bias, padding=1), inplace=True)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Extract the features.

        Args:
            image: [B, 3, H, W], at least 16×16.

        Returns:
            Five maps [B, C_l, H/2^l, W/2^l], l = 0 … 4, of 64, 128, 256, 512 and 512 channels.

        Raises:
            ValueError: the shape does not fit.
        """
        check_map("image", image, 3)
        if min(image.shape[2:]) < self.smallest_side:
            raise ValueError(f"image: VGG-19 needs at least 16×16 pixels, got {image.shape[2]}×{image.shape[3]}")
        features = []
        x = image
        for before, behind in LEVELS:
            for index in before:
                x = self._convolve(index, x)
            if before:
                x = F.max_pool2d(x, 2)
            x = self._convolve(behind, x)
            features.append(x)
        return features


class ContrastiveLoss(nn.Module):
    """Ratio of the distances to the clear and to the hazy image in the features of VGG-19.

    Args:
        weights: see :func:`load_vgg19`.
        mode: "default" normalises the images as VGG-19 was trained (ImageNet's mean and deviation);
            "official" repeats the published training: images in [-1, 1] as they are, and the last
            level of each of the three images through a frozen random network of its own (conv1×1
            512 → 512, GELU, conv1×1 512 → 512), the same in every run.

    Raises:
        ValueError: an unknown mode.
        FileNotFoundError, CheckpointError, RuntimeError: see :func:`load_vgg19`.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), loss functions; contrastive regularisation of
    AECR-Net (CVPR 2021, arXiv 2104.09367).
    """

    def __init__(self, weights: str | PathLike[str] | None = None, *, mode: str = "default") -> None:
        super().__init__()
        if mode not in ("default", "official"):
            raise ValueError(f"mode: expected 'default' or 'official', got {mode!r}")
        self.mode = mode
        self.features = VGG19Features(weights)
        if mode == "default":
            for name, values in (("mean", (0.485, 0.456, 0.406)), ("deviation", (0.229, 0.224, 0.225))):
                self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        else:
            generator = torch.Generator().manual_seed(0)
            bound = 512**-0.5  # of PyTorch's default initialisation of a 1×1 convolution
            for image in ("restored", "clear", "hazy"):
                for layer in (1, 2):
                    for name, shape in (("weight", (512, 512, 1, 1)), ("bias", (512,))):
                        value = torch.empty(shape).uniform_(-bound, bound, generator=generator)
                        self.register_buffer(f"{image}_{name}{layer}", value, persistent=False)

    def forward(self, restored: torch.Tensor, clear: torch.Tensor, hazy: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            restored: [B, 3, H, W] in [-1, 1], at least 16×16.
            clear: the same shape; no gradient flows into it.
            hazy: the same shape; no gradient flows into it.

        Returns:
            A scalar.

        Raises:
            ValueError: shapes do not fit.
        """
        check_shape("clear", clear, tuple(restored.shape), "of restored")
        check_shape("hazy", hazy, tuple(restored.shape), "of restored")
        restored_features = self._extract(restored, ["restored"])[0]
        with torch.no_grad():
            clear_features, hazy_features = self._extract(torch.cat([clear, hazy]), ["clear", "hazy"])
        levels = zip(LEVEL_WEIGHTS, restored_features, clear_features, hazy_features, strict=True)
        return sum(
            weight * F.l1_loss(ours, positive) / (F.l1_loss(ours, negative) + 1e-7)
            for weight, ours, positive, negative in levels
        )

    def _extract(self, images: torch.Tensor, names: list[str]) -> list[list[torch.Tensor]]:
        """Features of a batch made of one or two kinds of images, kind by kind, at least float32."""
        if self.mode == "default":
            images = ((images + 1) / 2 - self.mean) / self.deviation
        features = self.features(images)
        kinds = [list(kind) for kind in zip(*(level.chunk(len(names)) for level in features), strict=True)]
        if self.mode == "official":
            for name, kind in zip(names, kinds, strict=True):
                kind[-1] = self._project(name, kind[-1])
        return [[level.to(torch.promote_types(level.dtype, torch.float32)) for level in kind] for kind in kinds]

    def _project(self, name: str, feature: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(F.conv2d(feature, getattr(self, f"{name}_weight1"), getattr(self, f"{name}_bias1")))
        return F.conv2d(hidden, getattr(self, f"{name}_weight2"), getattr(self, f"{name}_bias2"))
