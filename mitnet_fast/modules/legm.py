"""Local feature-embedded global extraction (LEGM): the blocks of DCMPNet that window attention lives in.

A LEGM is a stack of blocks on maps [B, C, H, W]; its last blocks have attention, all are residual:

    with attention     x ← x + rescale·mix(norm(x)) + rebias
    without            x ← x + mix(x)
    then               x ← x + mlp(x)

    V, QK = conv1×1(x)                                             of norm(x), with attention
    mix(x) = proj(depthwise5×5(V) + window_attention(QK, V))       without attention only the local part

Without attention, x + mix(x) is one fused operator, and so is x + mlp(x); with it, everything before
the attention is one, and everything behind it. The norm is per sample over C, H and W, and hands what
it removed to the end of the residual branch: rescale and rebias are affine in σ and μ, one pair of
weights per channel. The bias of the attention scores comes from a small network of the query's offset
from the key; it runs on the (2w−1)² offsets that exist, not on all w²×w² pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import local_global_mixing, local_mixing, normalized_qkv, pointwise_mlp, window_attention
from ._checks import check_counts, check_map


def relative_offsets(window_size: int) -> torch.Tensor:
    """Offsets of a query from a key in a w×w window on the scale sign(Δ)·log(1 + |Δ|).

    Args:
        window_size: w ≥ 1.

    Returns:
        float32 [(2w−1)², 2], row and column; row (dy + w − 1)·(2w − 1) + dx + w − 1 holds
        Δ = (dy, dx), the order of the bias table of :func:`mitnet_fast.ops.window_attention`.
    """
    axis = torch.arange(1 - window_size, window_size, dtype=torch.float32)
    offsets = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return offsets.sign() * offsets.abs().log1p()


def smallest_side(window_size: int, shifted: bool) -> int:
    """Side from which reflection can pad every map to whole windows.

    A pad must be smaller than the side: more than half a window is needed, and more than three
    quarters of it where windows are shifted by half of their size.

    Args:
        window_size: w ≥ 1.
        shifted: whether the map passes blocks with a shift of w//2.
    """
    return (2 * window_size - window_size // 2 if shifted else window_size) // 2 + 1


def matrix(convolution: nn.Conv2d) -> torch.Tensor:
    """The weight [Co, C] of a 1×1 convolution."""
    return convolution.weight.flatten(1)


class RescaleNorm(nn.Module):
    """Layer norm over C, H and W of each sample that also predicts how to undo itself.

    n = (x − μ)/σ·weight + bias, rescale = conv1×1(σ), rebias = conv1×1(μ). The 1×1 convolutions that follow
    the norm are computed with it, so that n is not stored.

    Args:
        channels: C.

    Raises:
        ValueError: a channel count below 1.

    Source: DehazeFormer (arXiv 2204.03883), RescaleNorm; DCMPNet (arXiv 2403.01105).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_counts(channels=channels)
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.rescale = nn.Conv2d(1, channels, 1)
        self.rebias = nn.Conv2d(1, channels, 1)
        for layer, bias in ((self.rescale, 1.0), (self.rebias, 0.0)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, bias)

    def forward(
        self, x: torch.Tensor, value: nn.Conv2d, query_key: nn.Conv2d
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and project.

        Args:
            x: [B, channels, H, W].
            value: 1×1 convolution to ``channels`` channels.
            query_key: 1×1 convolution to twice as many.

        Returns:
            value(n) [B, channels, H, W] and query_key(n) [B, 2·channels, H, W]; rescale and rebias, [B, channels].

        Raises:
            ValueError: the channels do not fit.
        """
        check_map("x", x, self.channels)
        projections = matrix(value), value.bias, matrix(query_key), query_key.bias
        *maps, mean, deviation = normalized_qkv(x, self.weight.view(-1), self.bias.view(-1), *projections)
        rescale, rebias = (
            F.linear(number[:, None], layer.weight.flatten(1), layer.bias)
            for layer, number in ((self.rescale, deviation), (self.rebias, mean))
        )
        return *maps, rescale, rebias


class RelativePositionBias(nn.Module):
    """Bias table of window attention, predicted from the offset of query and key.

    Args:
        heads: columns of the table.
        window_size: w.
        hidden: width of the hidden layer.

    Raises:
        ValueError: a count below 1.

    Source: DehazeFormer (arXiv 2204.03883), after Swin Transformer V2 (arXiv 2111.09883), log-spaced
    continuous position bias.
    """

    def __init__(self, heads: int, window_size: int = 8, hidden: int = 256) -> None:
        super().__init__()
        check_counts(heads=heads, window_size=window_size, hidden=hidden)
        self.meta = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, heads))
        self.register_buffer("offsets", relative_offsets(window_size), persistent=False)

    def forward(self) -> torch.Tensor:
        """The table [(2w−1)², heads], rows as in :func:`relative_offsets`."""
        return self.meta(self.offsets)


class LocalGlobalMixing(nn.Module):
    """x + proj(depthwise5×5(V) + window attention of (QK, V)): local features embedded in global ones.

    Args:
        channels: C.
        heads: attention heads, a divisor of C; 0 for the local part alone.
        window_size: w of the attention.
        shift: of its windows, 0 ≤ shift < w.

    Raises:
        ValueError: ``heads`` does not divide the channels, or a count is out of range.

    Source: DCMPNet (arXiv 2403.01105), local feature-embedded global extraction.
    """

    def __init__(self, channels: int, heads: int = 0, window_size: int = 8, shift: int = 0) -> None:
        super().__init__()
        check_counts(channels=channels, window_size=window_size)
        if heads < 0 or (heads and channels % heads):
            raise ValueError(f"heads: must divide the {channels} channels, or be 0, got {heads}")
        if not 0 <= shift < window_size:
            raise ValueError(f"shift: must be at least 0 and below window_size = {window_size}, got {shift}")
        self.channels = channels
        self.heads = heads
        self.window_size = window_size
        self.shift = shift
        self.value = nn.Conv2d(channels, channels, 1)
        self.local = nn.Conv2d(channels, channels, 5, padding=2, padding_mode="reflect", groups=channels)
        self.proj = nn.Conv2d(channels, channels, 1)
        if heads:
            self.query_key = nn.Conv2d(channels, 2 * channels, 1)
            self.position_bias = RelativePositionBias(heads, window_size)

    def forward(self, x: torch.Tensor, norm: RescaleNorm | None = None) -> torch.Tensor:
        """Mix.

        Args:
            x: [B, channels, H, W].
            norm: with attention, of what is mixed; else None, and x itself is.

        Returns:
            The same shape.

        Raises:
            ValueError: the channels do not fit, or the map is too small to be padded by reflection.
        """
        check_map("x", x, self.channels)
        weights = self.local.weight.flatten(0, 1), self.local.bias, matrix(self.proj), self.proj.bias
        if not self.heads:
            return local_mixing(x, matrix(self.value), self.value.bias, *weights)
        value, query_key, rescale, rebias = norm(x, self.value, self.query_key)
        attended = window_attention(
            query_key,
            value,
            self.position_bias(),
            num_heads=self.heads,
            window_size=self.window_size,
            shift=self.shift,
        )
        return local_global_mixing(x, value, attended, *weights, rescale, rebias)


class LEGMBlock(nn.Module):
    """One block of a LEGM, see the module's equations.

    Args:
        channels: C.
        heads: attention heads, 0 for a block without attention (and then without a norm).
        mlp_ratio: hidden channels of the pointwise network, as a multiple of C.
        window_size: w of the attention.
        shift: of its windows.
        network_depth: number of blocks in the whole network; sets the scale of the initial weights,
            std = (8·network_depth)^-¼·√(2/(fan_in + fan_out)), cut at ±2, without the first factor
            for the queries and keys.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 0,
        mlp_ratio: float = 4.0,
        window_size: int = 8,
        shift: int = 0,
        network_depth: int = 1,
    ) -> None:
        super().__init__()
        check_counts(channels=channels, network_depth=network_depth)
        hidden = round(channels * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio: must leave at least one of {channels} channels, got {mlp_ratio!r}")
        self.norm = RescaleNorm(channels) if heads else None
        self.mix = LocalGlobalMixing(channels, heads, window_size, shift)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1))
        for part in (self.mix, self.mlp):
            for name, layer in part.named_modules():
                if isinstance(layer, nn.Conv2d):
                    taps = layer.kernel_size[0] * layer.kernel_size[1]
                    std = math.sqrt(2 / (layer.weight[0].numel() + layer.out_channels * taps))
                    gain = 1.0 if name == "query_key" else (8 * network_depth) ** -0.25
                    nn.init.trunc_normal_(layer.weight, std=gain * std)
                    nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] → the same shape."""
        x = self.mix(x, self.norm)
        expand, _, reduce = self.mlp
        return pointwise_mlp(x, matrix(expand), expand.bias, matrix(reduce), reduce.bias)


class LEGM(nn.Module):
    """Local feature-embedded global extraction: a stack of blocks, the last of them with attention.

    Blocks alternate between windows that are not shifted and windows shifted by w//2.

    Args:
        channels: C.
        depth: number of blocks.
        heads: attention heads, a divisor of C.
        mlp_ratio: hidden channels of the pointwise network, as a multiple of C.
        attention_ratio: share of the blocks, counted from the last, that have attention, in [0, 1];
            round(attention_ratio·depth) blocks.
        window_size: w ≥ 2.
        network_depth: blocks in the whole network, for the initial weights (see
            :class:`LEGMBlock`); ``depth`` when None.

    Raises:
        ValueError: an argument outside its range.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), local feature-embedded global feature extraction.
    """

    def __init__(
        self,
        channels: int,
        depth: int = 4,
        heads: int = 1,
        *,
        mlp_ratio: float = 4.0,
        attention_ratio: float = 1.0,
        window_size: int = 8,
        network_depth: int | None = None,
    ) -> None:
        super().__init__()
        check_counts(channels=channels, depth=depth, heads=heads, window_size=window_size)
        if window_size < 2:
            raise ValueError(f"window_size: must be at least 2, got {window_size}")
        if not 0 <= attention_ratio <= 1:
            raise ValueError(f"attention_ratio: expected a number in [0, 1], got {attention_ratio!r}")
        self.channels = channels
        first = depth - round(attention_ratio * depth)
        self.blocks = nn.Sequential(
            *(
                LEGMBlock(
                    channels,
                    heads if index >= first else 0,
                    mlp_ratio,
                    window_size,
                    window_size // 2 if index % 2 else 0,
                    depth if network_depth is None else network_depth,
                )
                for index in range(depth)
            )
        )

    @property
    def smallest_side(self) -> int:
        """Height and width from which every map can be padded by reflection."""
        sides = [smallest_side(b.mix.window_size, b.mix.shift > 0) for b in self.blocks if b.mix.heads]
        return max([3, *sides])  # the depthwise 5×5 convolution reflects two pixels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Extract features.

        Args:
            x: [B, channels, H, W].

        Returns:
            The same shape.

        Raises:
            ValueError: the channels do not fit, or the map is smaller than ``smallest_side``.
        """
        check_map("x", x, self.channels)
        if min(x.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"x: reflection needs at least {self.smallest_side}×{self.smallest_side} pixels, "
                f"got {x.shape[2]}×{x.shape[3]}"
            )
        return self.blocks(x)
