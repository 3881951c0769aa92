"""One file of random VGG-19 weights for all tests of the losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import vgg19


@pytest.fixture(scope="session")
def vgg_state() -> dict[str, torch.Tensor]:
    return vgg19.random_state()


@pytest.fixture(scope="session")
def vgg_path(vgg_state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(vgg_state, path)
    return path
