"""Weights of a network in one file that says what they are, and the reading of all other kinds.

Ours are safetensors files whose header holds a card in JSON (under ``mitnet_fast``): system and
constructor arguments, from which :func:`load_weights` builds the network by itself, versions, and
whatever the writer knows about training data and scores. Read as well are the published
``.pt`` / ``.pth`` checkpoints, recognised by their names, and the checkpoints of our own training.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from . import __version__
from .data.files import atomic_write
from .models import CheckpointError, DCMPNet, DepthNet, DepthSharingDCMPNet, MITNet
from .models.official import load_tensors, read_official

CARD = "mitnet_fast"
SHARED = "dcmpnet-shared-depth"
CARD_VERSION = 1
TRAINING_CHECKPOINT = "mitnet_fast training checkpoint"
OWN_FIELDS = ("format", "system", "config", "width", "parameters", "versions")


class WeightsError(ValueError):
    """A file of weights that cannot be read or is not what it says."""


NETWORKS: dict[str, type[nn.Module]] = {
    "mitnet": MITNet,
    "dcmpnet": DCMPNet,
    "depthnet": DepthNet,
    SHARED: DepthSharingDCMPNet,
}
OFFICIAL = ("mitnet", "dcmpnet", "depthnet")


def save_weights(path: str | os.PathLike[str], model: nn.Module, card: Mapping[str, Any] | None = None) -> Path:
    """Write a network's weights and its card as safetensors; the file is whole or not there.

    Args:
        path: of the file; its folder is made if it is missing.
        model: a MITNet, DCMPNet, DepthNet or DepthSharingDCMPNet, on any device.
        card: what is known about the weights, as JSON: training data, ``demo`` for weights that only
            show that training works, scores by protocol, ….

    Returns:
        The path.

    Raises:
        TypeError: another kind of model, or a card that JSON cannot hold.
        ValueError: a card with a field that is written here.
    """
    taken = [field for field in OWN_FIELDS if field in (card or {})]
    if taken:
        raise ValueError(f"card: the fields {', '.join(taken)} are taken from the model, leave them out")
    whole = {
        "format": CARD_VERSION,
        **describe(model),
        "versions": versions(),
        **(card or {}),
    }
    try:
        text = json.dumps(whole, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"card: not JSON: {error}") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # every tensor with memory of its own, in the default layout: the format knows neither views nor strides
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    with atomic_write(path) as stream:
        stream.write(save(state, metadata={CARD: text}))
    return path


def load_weights(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that a file of weights belongs to, with its weights, in evaluation mode.

    Its weights are in channels_last, the memory format in which the networks restore fastest; what they compute
    follows it, whatever the format of an image.

    Args:
        path: safetensors with our card, a checkpoint of our training (averaged weights where there
            are some), or a published ``.pt`` / ``.pth`` of MITNet, DCMPNet or its depth network.
        device: where the network goes.

    Returns:
        The network and its card. ``system`` is always there.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: none of these files, damaged, of a newer version than this, or with values that are not finite.
        CheckpointError: a published checkpoint with missing, unknown or misshapen entries.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path}: a folder; expected a file of weights, such as best.safetensors in a run's folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    model, card = _load_safetensors(path) if _is_safetensors(path) else _load_torch(path)
    check_finite(model, path)
    return model.to(device, memory_format=torch.channels_last).eval(), card


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a safetensors file of ours, without its weights.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not safetensors, or without our card.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    return _load_card(path)


def check_finite(model: nn.Module, source: object) -> None:
    """Raise WeightsError unless all weights of ``model`` are finite; ``source`` is what the message names."""
    broken = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(
            f"{source}: {len(broken)} of its tensors hold values that are not finite, such as {broken[0]}: "
            "the training that wrote them had diverged"
        )


def system_of(model: nn.Module) -> str:
    """The name of a network's system: a key of :data:`NETWORKS`.

    Raises:
        TypeError: another kind of model.
    """
    for system, network in NETWORKS.items():
        if type(model) is network:
            return system
    allowed = ", ".join(network.__name__ for network in NETWORKS.values())
    raise TypeError(f"model: got {type(model).__name__}, allowed are {allowed}")


def describe(model: nn.Module) -> dict[str, Any]:
    """What a card says about the network itself.

    Returns:
        ``system``; ``config``, the constructor's arguments; ``width``, the channels at full size or, where
        the network has several widths, all of them; ``parameters``, their number.

    Raises:
        TypeError: another kind of model than in :data:`NETWORKS`.
    """
    system, config = system_of(model), model.config
    own = config["dehazing"] if system == SHARED else config
    return {
        "system": system,
        "config": config,
        "width": own["width"] if "width" in own else own["widths"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def versions() -> dict[str, str]:
    """Versions of what computes the numbers, for cards and run folders."""
    found = {
        "mitnet_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain string, not its subclass
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}
    return found


def build_network(system: object, config: object, source: Path) -> nn.Module:
    """A network from what a card says.

    Args:
        system: name of the network.
        config: its constructor's arguments.
        source: the file that said so, for messages.

    Raises:
        WeightsError: no such network, or not its arguments.
    """
    if not isinstance(system, str) or system not in NETWORKS:
        raise WeightsError(f"{source}: system is {system!r}, known are {', '.join(NETWORKS)}")
    try:
        return DepthSharingDCMPNet.from_config(**config) if system == SHARED else NETWORKS[system](**config)
    except Exception as error:  # a card may say anything
        raise WeightsError(f"{source}: its configuration does not fit {system}: {error}") from error


def _network_with(system: object, config: object, state: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    """The network that a card describes, with the weights beside it; memory is taken only once the two agree."""
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path}: its weights hold more than tensors")
    tensors, values = len(state), sum(value.numel() for value in state.values())
    # no network has more blocks than tensors, nor a U-Net that joins all pairs of its levels more pairs
    limits = {"depths": tensors, "depth": math.isqrt(tensors)}
    for name, number in _numbers(config):
        if not abs(number) <= limits.get(name, values):
            raise WeightsError(f"{path}: its configuration does not fit its {tensors} tensors: {name} is {number}")
    with torch.device("meta"):
        expected = {name: value.shape for name, value in build_network(system, config, path).state_dict().items()}
    problems = [f"missing: {name}" for name in expected if name not in state]
    problems += [f"unknown: {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(f"{path}: its tensors are not those of its configuration: {'; '.join(problems[:5])}{more}")
    model = build_network(system, config, path)
    model.load_state_dict(state, strict=True)
    return model


def _numbers(config: object, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a configuration, each under the innermost name above it."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _numbers(value, str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _numbers(value, name)
    elif isinstance(config, int | float):
        yield name, config


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and not head.startswith(b"PK")


def _load_card(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file: {error}") from error
    try:
        card = json.loads(metadata[CARD])
        version = card["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise WeightsError(f"{path}: safetensors without a card of mitnet_fast: what network is it?") from None
    if version != CARD_VERSION:
        raise WeightsError(f"{path}: card of format {version}, this version reads format {CARD_VERSION}")
    return card


def _load_safetensors(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    card = _load_card(path)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return _network_with(card.get("system"), card.get("config"), state, path), card


def _load_torch(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    try:
        content = load_tensors(path)
    except CheckpointError as error:
        raise WeightsError(f"{error} (nor is it a safetensors file)") from error
    if isinstance(content, Mapping) and content.get("format") == TRAINING_CHECKPOINT:
        weights = content.get("weights")
        whole = isinstance(weights, Mapping) and {"system", "config", "state"} <= weights.keys()
        if not whole or not isinstance(weights["state"], Mapping):
            raise WeightsError(f"{path}: a checkpoint of mitnet_fast's training without its weights")
        model = _network_with(weights["system"], weights["config"], weights["state"], path)
        return model, {key: value for key, value in weights.items() if key != "state"}
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a state dict, got {type(content).__name__}")
    try:
        return _load_official(content, path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _load_official(content: Mapping[str, Any], path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The published network with most names in common."""
    state = read_official(content)
    names = {system: _official_names(NETWORKS[system]) for system in OFFICIAL}
    shared = {system: len(known & state.keys()) / len(known | state.keys()) for system, known in names.items()}
    system = max(shared, key=shared.__getitem__)
    if not shared[system]:
        known = ", ".join(NETWORKS[name].__name__ for name in OFFICIAL)
        raise WeightsError(
            f"{path}: none of its {len(state)} names belongs to {known}; it begins with {', '.join(list(state)[:3])}"
        )
    model = NETWORKS[system].from_official(state)
    return model, {**describe(model), "source": "published checkpoint"}


@cache
def _official_names(network: type[nn.Module]) -> set[str]:
    with torch.device("meta"):
        return set(network().to_official())
