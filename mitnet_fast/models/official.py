"""Checkpoints of the published networks: reading them, and the names they use.

Each network keeps one table of ``(our pattern, official replacement)`` pairs of regular
expressions. Applied in order to a name of ours they give the official one; the way back is that
dictionary inverted. So what ``from_official`` accepts is exactly what ``to_official`` returns.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import nn

NameTable = Sequence[tuple[str, str]]

# the keys under which training scripts usually put a state dict
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "params_ema", "params", "network", "net", "generator", "weights"),
    *("netG", "net_g", "ema_state_dict", "model_ema", "ema"),
)
# what data-parallel training, torch.compile and modules around the network put before every name
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "generator.", "netG.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be what it is said to be; the message lists every difference."""


def load_tensors(path: str | PathLike[str]) -> object:
    """Read a file of ``torch.save`` without running any code that it may hold.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, no such file, or holds more than tensors and plain data.
    """
    try:
        with warnings.catch_warnings():  # what it does not know of a damaged file it takes for news
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        damaged = damaged_entry(path) if zipfile.is_zipfile(path) else None  # older files have no checksums
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load and zipfile raise whatever they meet
        forbidden = re.search(r"Unsupported (?:global|class)[:\s]+(?:GLOBAL )?([\w.]+)", str(error))
        if forbidden:
            reason = f"it holds {forbidden[1]}, which is more than tensors and could run code; it is not loaded"
        else:
            reason = "it is damaged, or not written by torch.save"
        raise CheckpointError(f"{path}: no checkpoint of tensors: {reason}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path}: damaged, or written without checksums: that of {damaged} does not fit. "
            "If you trust it, load it with torch.load and save it again with torch.save"
        )
    return content


def damaged_entry(path: str | PathLike[str]) -> str | None:
    """The first entry of a file of torch.save, a zip archive, that torch.load would misread without saying so.

    It looks at no checksum, and of an entry that is marked as a folder it reads nothing.
    """
    folder = 0x10  # among the attributes of MS-DOS, which are the lowest bits
    with zipfile.ZipFile(path) as archive:
        folders = (entry.filename for entry in archive.infolist() if entry.external_attr & folder)
        return next(folders, None) or archive.testzip()


def read_official(source: str | PathLike[str] | Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Read a published checkpoint into a plain state dict under the official names.

    Args:
        source: a ``.pt`` / ``.pth`` path, or a mapping already read. A state dict inside a
            dictionary (``state_dict``, ``model``, ``params``, …), prefixes of all names such as
            ``module.``, and the counter of averaged weights are unwrapped.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, or one that contains more than tensors.
    """
    if isinstance(source, Mapping):
        content: object = source
    else:
        content = load_tensors(source)
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"source: expected a state dict of tensors, got {type(content).__name__}")
    foreign = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise CheckpointError(f"source: a state dict holds tensors only, but these are none: {', '.join(foreign[:5])}")
    state = {str(key): value for key, value in content.items()}
    if len(state) > 1:
        state.pop("n_averaged", None)  # torch.optim.swa_utils counts beside the weights
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def official_name(own: str, names: NameTable) -> str:
    """The official name of one of our parameters."""
    for pattern, replacement in names:
        own = re.sub(pattern, replacement, own)
    return own


def load_official(
    module: nn.Module,
    source: str | PathLike[str] | Mapping[str, object],
    names: NameTable,
    constants: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Load a published checkpoint into ``module``, strictly.

    Args:
        module: the network; every entry of its state dict must be in the checkpoint.
        source: see :func:`read_official`.
        names: the network's table, ours to official.
        constants: official entries that the network computes itself, with their values: accepted
            when they agree to 1e-4 and then dropped, since another value means another network.

    Raises:
        CheckpointError: lists missing names, unknown names, wrong shapes and differing constants;
            nothing is loaded then.
    """
    state = read_official(source)
    constants = constants or {}
    own = {official_name(name, names): (name, value) for name, value in module.state_dict().items()}
    shapes = {name: value.shape for name, (_, value) in own.items()}
    shapes |= {name: value.shape for name, value in constants.items()}
    problems = {
        "missing": [name for name in shapes if name not in state],
        "unknown": [name for name in state if name not in shapes],
        "wrong shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in state and state[name].shape != shape
        ],
        "different constant": [
            name
            for name, value in constants.items()
            if name in state
            and state[name].shape == value.shape
            and not torch.allclose(state[name].double(), value.double(), rtol=0, atol=1e-4)
        ],
    }
    listed = [
        f"{title}: {', '.join(found[:20])}" + (f" and {len(found) - 20} more" if len(found) > 20 else "")
        for title, found in problems.items()
        if found
    ]
    if listed:
        raise CheckpointError(f"not an official {type(module).__name__} checkpoint; " + "; ".join(listed))
    module.load_state_dict({name: state[official] for official, (name, _) in own.items()}, strict=True)


def to_official(
    module: nn.Module, names: NameTable, constants: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The state of ``module`` under the official names, with the constants that it does not hold."""
    state = {official_name(name, names): value.detach().clone() for name, value in module.state_dict().items()}
    return state | dict(constants or {})


MITNET_NAMES: NameTable = (
    (r"^(phase_decoder\.\d+)\.filter\.", r"\1.afg."),
    (r"^amplitude_decoder\.(\d+)\.skip\.", r"skip_conv_1.\1."),
    (r"^amplitude_encoder\.", "down_path_1."),
    (r"^amplitude_decoder\.", "up_path_1."),
    (r"^phase_encoder\.", "down_path_2."),
    (r"^phase_decoder\.", "up_path_2."),
    (r"^(up_path_\d\.\d+)\.block\.", r"\1.conv_block."),
    (r"\.residual\.", ".resConv."),
    (r"\.spectral_in\.", ".fftConv2.0."),
    (r"\.spectral_out\.", ".fftConv2.2."),
    (r"\.from_encoder\.", ".csff_enc."),
    (r"\.from_decoder\.", ".csff_dec."),
    (r"\.spatial_attention\.", ".sekg.conv_sa."),
    (r"\.channel_attention\.", ".sekg.conv_ca."),
    (r"\.predictor\.", ".kernel."),
    (r"^amplitude_stem\.", "conv_01."),
    (r"^phase_stem\.", "conv_02."),
    (r"^stage_fusion\.", "cat12."),
    (r"^to_image\.", "last."),
    (r"^supervised_attention\.to_features\.", "sam12.conv1."),
    (r"^supervised_attention\.to_image\.", "sam12.conv2."),
    (r"^supervised_attention\.to_gate\.", "sam12.conv3."),
    (r"^triple_interaction\.phase\.(entry|resize|fusion)\.", r"fci.\1_pha."),
    (r"^triple_interaction\.amplitude\.(entry|resize|fusion)\.", r"fci.\1_amp."),
    (r"^fci\.entry_", "fci.conv_"),
    (r"(\d+)_to_(\d+)\.(\d+)\.", r"\1.\2.body.\3."),
    (r"\.doubling\.", ".bot.1."),
    (r"\.halving\.", ".bot.0."),
)

MUTUAL_INFORMATION_NAMES: NameTable = (
    (r"^phase\.convolutions\.0\.", "layer1."),
    (r"^phase\.convolutions\.2\.", "layer3."),
    (r"^amplitude\.convolutions\.0\.", "layer2."),
    (r"^amplitude\.convolutions\.2\.", "layer4."),
    (r"^phase\.mean\.", "fc1_rgb"),
    (r"^phase\.log_scale\.", "fc2_rgb"),
    (r"^amplitude\.mean\.", "fc1_depth"),
    (r"^amplitude\.log_scale\.", "fc2_depth"),
    (r"64\.(weight|bias)$", r"1.\1"),
    (r"32\.(weight|bias)$", r"2.\1"),
    (r"16\.(weight|bias)$", r"3.\1"),
)

DEPTHNET_NAMES: NameTable = (
    *((rf"^(dpn\.|)encoder\.{2 * level}\.", rf"\1DRDB_layer{level + 1}.") for level in range(5)),
    *((rf"^(dpn\.|)encoder\.{2 * level + 1}\.", rf"\1conv{level + 1}.") for level in range(4)),
    *((rf"^(dpn\.|)decoder\.{2 * level}\.", rf"\1up{level + 1}.") for level in range(4)),
    *((rf"^(dpn\.|)decoder\.{2 * level + 1}\.", rf"\1DRDB_layer{level + 6}.") for level in range(3)),
    (r"^(dpn\.|)to_depth\.", r"\1final_conv."),
    *((rf"\.dense\.{layer}\.", f".Dcov{layer + 1}.") for layer in range(5)),
    (r"\.fuse\.", ".conv."),
)

DCMPNET_NAMES: NameTable = (
    (r"^unused\.", ""),
    (r"^depth_branch\.", "dpn."),
    *DEPTHNET_NAMES,
    (r"^depth_block\.", "drdb."),
    (r"^prior\.encoder\.0\.", "Unet1.inc.conv."),
    (r"^prior\.encoder\.(\d)\.", r"Unet1.down\1.mpconv.1.conv."),
    *((rf"^prior\.decoder\.{level}\.", f"Unet1.up{level + 1}.conv.conv.") for level in range(4)),
    (r"^prior\.out\.", "Unet1.outc."),
    *((rf"^prior_projections\.{level}\.", f"d{level + 1}_conv.") for level in range(3)),
    (r"^embed\.", "patch_embed.proj."),
    (r"^merge(\d)\.", r"patch_merge\1.proj."),
    (r"^up(\d)\.0\.", r"patch_split\1.proj.0."),
    (r"^to_image\.", "patch_unembed.proj.0."),
    (r"^join(\d)\.", r"conv\1."),
    (r"^decode(\d)\.", r"conv_d\1."),
    (r"^msaam\.attention\.", "ca."),
    (r"^msaam\.fuse(\d)\.", r"fuse_conv\1.0."),
    (r"^msaam\.unused_full_size\.", "fuse_conv1.0."),
    (r"^(legm\d\.blocks\.\d+)\.norm\.rescale\.", r"\1.norm1.meta1."),
    (r"^(legm\d\.blocks\.\d+)\.norm\.rebias\.", r"\1.norm1.meta2."),
    (r"^(legm\d\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"^(legm\d\.blocks\.\d+)\.mlp\.", r"\1.mlp.mlp."),
    (r"^(legm\d\.blocks\.\d+)\.mix\.position_bias\.", r"\1.attn.attn."),
    (r"^(legm\d\.blocks\.\d+)\.mix\.value\.", r"\1.attn.V."),
    (r"^(legm\d\.blocks\.\d+)\.mix\.query_key\.", r"\1.attn.QK."),
    (r"^(legm\d\.blocks\.\d+)\.mix\.local\.", r"\1.attn.conv."),
    (r"^(legm\d\.blocks\.\d+)\.mix\.proj\.", r"\1.attn.proj."),
)
