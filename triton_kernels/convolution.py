"""The 3×3 convolutions of feature mixing: dense block and residual convolution, forward and backward, conv-ReLU.

All of their maps come from one kernel, a product of matrices whose contraction runs over taps and channels:

    y(p) = act(scale·Σ_tap weight(tap)·[x, joined](p + offset_tap) + bias)
           + side_scale·(side_weight·[side, side_joined](p) + side_bias)

with zeros outside the image, act(u) = max(u, 0) + negative_slope·min(u, 0), and every part but the first product
optional. A third map may be added, may decide what a gradient passes (y ⊙ act'(other)), or may be a gradient that y
decides on (other ⊙ act'(y)). The gradient of a convolution's maps is the convolution of the gradient with mirrored
taps and transposed weights. With h_k the layers of a dense block, f = [x, h_0 … h_4] and u the argument of a ReLU:

    h_k  = ReLU(conv(f_<k)),                      y = ReLU(P·f + b) + x
    ∂u_P = ∂y ⊙ ReLU'(u_P)
    ∂u_k = (convᵀ(∂u_k+1 … ∂u_4) + Pᵀ_k·∂u_P) ⊙ ReLU'(h_k),   from the last layer to the first
    ∂x   = convᵀ(∂u_0 … ∂u_4) + Pᵀ_x·∂u_P + ∂y

so that no gradient is read to be added to. A second kernel makes all gradients of weights and biases, in two stages:

    ∂weight(tap)[o, c] = Σ_p ∂u[o](p)·f[c](p + offset_tap),   ∂bias[o] = Σ_p ∂u[o](p)

Nothing is concatenated: a convolution reads two maps side by side. What lies between the layers is in the tensors'
dtype, channels innermost, the layers of a dense block side by side in one buffer. The backward computes features
again, but for the map that residual_conv may keep, in the layout of x. Pixels are counted through the whole image,
p = h·W + w. Sums run in float32 in a fixed order, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    PIXELS_IN_SEQUENCE,
    Map,
    as_map,
    check_pixels,
    configuration,
    divide,
    empty_map,
    launch,
    neighbour,
    offset_type,
    operand_type,
    power_of_two,
    precision,
    product_kind,
    strides,
)

FAMILY = "convolution"
DENSE_LAYERS = 5
DENSE_DILATION = 2
ALIGNED = 8  # channels: 16 bytes of bfloat16


@triton.jit
def _leaky(value, decides, NEGATIVE_SLOPE: tl.constexpr):
    """``value``, times NEGATIVE_SLOPE where ``decides`` is not positive: LeakyReLU, and its gradient."""
    below = tl.zeros_like(value) if NEGATIVE_SLOPE == 0 else NEGATIVE_SLOPE * value  # 0·∞ is NaN
    return tl.where(decides <= 0, below, value)


@triton.jit
def _add_products(
    y,
    x_ptr,
    weight_ptr,
    h,
    w,
    o,
    height,
    width,
    stride_c,
    STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    LEAD: tl.constexpr,
    WEIGHT_STRIDE_T: tl.constexpr,
    WEIGHT_STRIDE_C: tl.constexpr,
    WEIGHT_STRIDE_O: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y [pixels, outputs], and in float32 the products of one sample's map with its weights from channel LEAD on.

    The contraction goes over blocks of a tap's channels; all taps of few channels are one block.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    p_offsets = (h * width + w).to(OFFSET)[:, None]
    o_offsets = o[None, :] * WEIGHT_STRIDE_O
    has_output = (o < OUT)[None, :]
    if TAPS * CHANNELS <= BLOCK_C:
        row = tl.arange(0, BLOCK_C)
        tap = row // CHANNELS
        c = row % CHANNELS
        has_row = row < TAPS * CHANNELS
        distance, inside = neighbour(h[:, None], w[:, None], tap[None, :], height, width, KERNEL, DILATION, OFFSET)
        x_ptrs = x_ptr + (p_offsets + distance) * STRIDE_P + c.to(OFFSET)[None, :] * stride_c
        x = tl.load(x_ptrs, mask=inside & has_row[None, :], other=0.0)
        weight_ptrs = weight_ptr + (tap * WEIGHT_STRIDE_T + (LEAD + c) * WEIGHT_STRIDE_C)[:, None] + o_offsets
        weight = tl.load(weight_ptrs, mask=has_row[:, None] & has_output, other=0.0)
        y = tl.dot(x.to(OPERAND), weight.to(OPERAND), y, input_precision=PRECISION)
    else:
        BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
        for step in range(BLOCKS * TAPS):  # one loop, which the compiler pipelines; taps of a block share its pixels
            tap = step % TAPS
            c = step // TAPS * BLOCK_C + tl.arange(0, BLOCK_C)
            has_channel = c < CHANNELS
            distance, inside = neighbour(h, w, tap, height, width, KERNEL, DILATION, OFFSET)
            x_ptrs = x_ptr + (p_offsets + distance) * STRIDE_P + c.to(OFFSET)[None, :] * stride_c
            x = tl.load(x_ptrs, mask=inside[:, None] & has_channel[None, :], other=0.0)
            weight_ptrs = weight_ptr + tap * WEIGHT_STRIDE_T + (LEAD + c)[:, None] * WEIGHT_STRIDE_C + o_offsets
            weight = tl.load(weight_ptrs, mask=has_channel[:, None] & has_output, other=0.0)
            y = tl.dot(x.to(OPERAND), weight.to(OPERAND), y, input_precision=PRECISION)
    return y


@triton.jit
def _convolution_kernel(
    x_ptr,
    joined_ptr,
    side_ptr,
    side_joined_ptr,
    other_ptr,
    y_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    side_weight_ptr,
    side_bias_ptr,
    height,
    width,
    x_stride_n,
    x_stride_c,
    joined_stride_n,
    joined_stride_c,
    side_stride_n,
    side_stride_c,
    side_joined_stride_n,
    side_joined_stride_c,
    other_stride_n,
    other_stride_c,
    y_stride_n,
    y_stride_c,
    X_STRIDE_P: tl.constexpr,
    JOINED_STRIDE_P: tl.constexpr,
    SIDE_STRIDE_P: tl.constexpr,
    SIDE_JOINED_STRIDE_P: tl.constexpr,
    OTHER_STRIDE_P: tl.constexpr,
    Y_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    JOINED: tl.constexpr,
    LEAD: tl.constexpr,
    WEIGHT_STRIDE_T: tl.constexpr,
    WEIGHT_STRIDE_C: tl.constexpr,
    WEIGHT_STRIDE_O: tl.constexpr,
    SIDE: tl.constexpr,
    SIDE_JOINED: tl.constexpr,
    SIDE_WEIGHT_STRIDE_C: tl.constexpr,
    SIDE_WEIGHT_STRIDE_O: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    ACTIVATED: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    SIDE_SCALE: tl.constexpr,
    OTHER: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y of one map or of two side by side, as the module says.

    Grid: batch × pixel tiles × output groups, groups fastest, since they share the pixels. A program owns BLOCK_P
    pixels of BLOCK_O output channels and sums over taps and channels in float32, BLOCK_C channels at a time.
    OTHER says what the other map is: a "summand" of y; the "result" of an activation, y the gradient of that; or the
    "gradient" of an activation's result, y its argument.
    """
    tiles = tl.cdiv(height * width, BLOCK_P)
    groups: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    pixel_tile = tl.program_id(0) // groups
    n = (pixel_tile // tiles).to(tl.int64)
    p = pixel_tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h = p // width
    w = p % width
    o = tl.program_id(0) % groups * BLOCK_O + tl.arange(0, BLOCK_O)
    has_output = o < OUT
    own = (h < height)[:, None] & has_output[None, :]
    y = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    if CHANNELS:
        y = _add_products(
            *(y, x_ptr + n * x_stride_n, weight_ptr, h, w, o, height, width, x_stride_c),
            *(X_STRIDE_P, OFFSET, CHANNELS, OUT, KERNEL, DILATION),
            *(LEAD, WEIGHT_STRIDE_T, WEIGHT_STRIDE_C, WEIGHT_STRIDE_O, OPERAND, PRECISION, BLOCK_C),
        )
    if JOINED:
        y = _add_products(
            *(y, joined_ptr + n * joined_stride_n, weight_ptr, h, w, o, height, width, joined_stride_c),
            *(JOINED_STRIDE_P, OFFSET, JOINED, OUT, KERNEL, DILATION),
            *(LEAD + CHANNELS, WEIGHT_STRIDE_T, WEIGHT_STRIDE_C, WEIGHT_STRIDE_O, OPERAND, PRECISION, BLOCK_C),
        )
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + o, mask=has_output, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=has_output, other=0.0).to(tl.float32)[None, :]
    if ACTIVATED:
        y = _leaky(y, y, NEGATIVE_SLOPE)
    if SIDE:
        side = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        side = _add_products(
            *(side, side_ptr + n * side_stride_n, side_weight_ptr, h, w, o, height, width, side_stride_c),
            *(SIDE_STRIDE_P, OFFSET, SIDE, OUT, 1, 1),
            *(0, 0, SIDE_WEIGHT_STRIDE_C, SIDE_WEIGHT_STRIDE_O, OPERAND, PRECISION, BLOCK_C),
        )
        if SIDE_JOINED:
            side_joined_ptr += n * side_joined_stride_n
            side = _add_products(
                *(side, side_joined_ptr, side_weight_ptr, h, w, o, height, width, side_joined_stride_c),
                *(SIDE_JOINED_STRIDE_P, OFFSET, SIDE_JOINED, OUT, 1, 1),
                *(SIDE, 0, SIDE_WEIGHT_STRIDE_C, SIDE_WEIGHT_STRIDE_O, OPERAND, PRECISION, BLOCK_C),
            )
        if side_bias_ptr is not None:
            side += tl.load(side_bias_ptr + o, mask=has_output, other=0.0).to(tl.float32)[None, :]
        y += SIDE_SCALE * side
    p_offsets = p.to(OFFSET)[:, None]
    o_offsets = o.to(OFFSET)[None, :]
    if other_ptr is not None:
        other_ptrs = other_ptr + n * other_stride_n + p_offsets * OTHER_STRIDE_P + o_offsets * other_stride_c
        other = tl.load(other_ptrs, mask=own, other=0.0).to(tl.float32)
        if OTHER == "summand":
            y += other
        elif OTHER == "result":
            y = _leaky(y, other, NEGATIVE_SLOPE)
        else:
            y = _leaky(other, y, NEGATIVE_SLOPE)
    y_ptrs = y_ptr + n * y_stride_n + p_offsets * Y_STRIDE_P + o_offsets * y_stride_c
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["batch", "samples", "splits", "tiles_per_split"])
def _weight_sums_kernel(
    grad_ptr,
    x_ptr,
    sums_ptr,
    batch,
    height,
    width,
    samples,
    splits,
    tiles_per_split,
    grad_stride_n,
    grad_stride_c,
    x_stride_n,
    x_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """First stage of ∂weight and ∂bias: sums over the pixels of one program.

    The pairs (tap, channel) are rows of a matrix [rows, pixels], and a last row is of ones; the sums are its product
    with the gradient [pixels, outputs]. Grid: parts × row groups × output groups, output groups fastest. A part is
    either ``tiles_per_split`` pixel tiles of one sample (``samples`` = 1) or all of ``samples`` samples
    (``splits`` = 1). A program owns BLOCK_R rows and BLOCK_O outputs of a part and sums over its pixels in float32,
    BLOCK_P at a time. Writes sums [parts, K²·CHANNELS + 1, OUT], float32.
    """
    WEIGHTS: tl.constexpr = KERNEL * KERNEL * CHANNELS
    row_groups: tl.constexpr = (WEIGHTS + 1 + BLOCK_R - 1) // BLOCK_R
    groups: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    part = tl.program_id(0) // (groups * row_groups)
    row = tl.program_id(0) // groups % row_groups * BLOCK_R + tl.arange(0, BLOCK_R)
    c = row % CHANNELS
    tap = (row // CHANNELS)[None, :]
    is_weight = (row < WEIGHTS)[None, :]
    ones = tl.where(row == WEIGHTS, 1.0, 0.0)[None, :]
    o = tl.program_id(0) % groups * BLOCK_O + tl.arange(0, BLOCK_O)
    has_output = (o < OUT)[None, :]
    x_offsets = c.to(OFFSET)[None, :] * x_stride_c
    grad_offsets = o.to(OFFSET)[None, :] * grad_stride_c
    first_sample = part // splits * samples
    first_tile = part % splits * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(height * width, BLOCK_P))
    sums = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    n = first_sample.to(tl.int64)
    for _ in range(tl.minimum(samples, batch - first_sample)):
        for tile in range(first_tile, last_tile):
            p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            h = p // width
            w = p % width
            p_offsets = p.to(OFFSET)[:, None]
            distance, inside = neighbour(h[:, None], w[:, None], tap, height, width, KERNEL, DILATION, OFFSET)
            x_ptrs = x_ptr + n * x_stride_n + (p_offsets + distance) * X_STRIDE_P + x_offsets
            x = tl.load(x_ptrs, mask=inside & is_weight, other=ones)
            grad_ptrs = grad_ptr + n * grad_stride_n + p_offsets * GRAD_STRIDE_P + grad_offsets
            grad = tl.load(grad_ptrs, mask=(h < height)[:, None] & has_output, other=0.0)
            sums = tl.dot(tl.trans(x.to(OPERAND)), grad.to(OPERAND), sums, input_precision=PRECISION)
        n += 1
    rows = part.to(tl.int64) * (WEIGHTS + 1) + row
    sums_ptrs = sums_ptr + rows[:, None] * OUT + o[None, :]
    tl.store(sums_ptrs, sums, mask=(row <= WEIGHTS)[:, None] & has_output)


class Factors(NamedTuple):
    """What a product is made of.

    Attributes:
        weight: [taps, C, Co], any strides.
        maps: two at most, side by side. Their channels are the last of C; those before are not read.
    """

    weight: torch.Tensor
    maps: tuple[Map, ...]


def conv_relu_forward(
    x: torch.Tensor,
    joined: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    tf32: bool,
) -> torch.Tensor:
    """y [B, Co, H, W] of x, joined, weight [Co, C1 + C2, 3, 3], scale [Co] and shift [Co].

    ``tf32`` lets products of float32 run in TF32.
    """
    check_pixels("x", x)
    y = empty_map(x, len(weight))
    _convolve(
        y, Factors(_by_taps(weight).contiguous().mT, _maps(x, joined)), tf32, scale=scale, bias=shift, activated=True
    )
    return y.data


def residual_conv_forward(
    x: torch.Tensor,
    joined: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    identity_weight: torch.Tensor,
    identity_bias: torch.Tensor,
    identity_scale: float,
    negative_slope: float,
    keeps_hidden: bool,
    tf32: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s [B, Co, H, W] of x, joined, weight1 [Co, C1 + C2, 3, 3], weight2 [Co, Co, 3, 3], identity_weight [Co, C1 + C2].

    Biases are [Co]. ``tf32`` lets products of float32 run in TF32. The map between the convolutions comes along where
    it is to be kept.
    """
    check_pixels("x", x)
    convolve = partial(_convolve, tf32=tf32, activated=True, negative_slope=negative_slope)
    maps, s = _maps(x, joined), empty_map(x, len(weight1))
    hidden = empty_map(x, len(weight1)) if keeps_hidden else _buffer(x, len(weight1))
    convolve(hidden, Factors(_by_taps(weight1).contiguous().mT, maps), bias=bias1)
    convolve(
        s,
        Factors(_by_taps(weight2).contiguous().mT, (hidden,)),
        bias=bias2,
        side=Factors(identity_weight.T[None], maps),
        side_bias=identity_bias,
        side_scale=identity_scale,
    )
    return s.data, hidden.data if keeps_hidden else None


def residual_conv_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    hidden: torch.Tensor,
    x: torch.Tensor,
    joined: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    identity_weight: torch.Tensor,
    identity_bias: torch.Tensor,
    identity_scale: float,
    negative_slope: float,
    needs: Sequence[bool],
    tf32: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the tensors that :func:`residual_conv_forward` takes, None for one that is not needed.

    ``hidden`` has no elements where it was not kept. The result ``y`` is not read: it is rounded, so the second
    convolution is computed again for what its LeakyReLU has let through.
    """
    check_pixels("x", x)
    _, _, needs_weight1, needs_bias1, needs_weight2, needs_bias2, *needs_identity = needs
    convolve = partial(_convolve, tf32=tf32, negative_slope=negative_slope)
    found: list[torch.Tensor | None] = [None] * len(needs)
    maps, grads = _maps(x, joined), as_map(grad)
    if any(needs_identity):
        weight, bias = _weight_gradients(grads, maps, 1, 1, tf32)
        found[6:] = identity_scale * weight.flatten(1), identity_scale * bias
    if any(needs[:6]):
        first, second = (_by_taps(weight).contiguous() for weight in (weight1, weight2))
        if hidden.numel():
            between = as_map(hidden)
        else:
            between = _buffer(x, len(weight1))
            convolve(between, Factors(first.mT, maps), bias=bias1, activated=True)
        grad_second = _buffer(x, len(weight1))
        convolve(grad_second, Factors(second.mT, (between,)), bias=bias2, other=grads, other_is="gradient")
        if needs_weight2 or needs_bias2:
            found[4:6] = _weight_gradients(grad_second, (between,), 3, 1, tf32)
    if any(needs[:4]):
        grad_first = _buffer(x, len(weight1))
        convolve(grad_first, Factors(second, (grad_second,)), dilation=-1, other=between, other_is="result")
        if needs_weight1 or needs_bias1:
            found[2:4] = _weight_gradients(grad_first, maps, 3, 1, tf32)
        end = 0
        for place, map in enumerate(maps):
            start, end = end, end + map.data.shape[1]
            if needs[place]:
                result = empty_map(map.data)
                convolve(
                    result,
                    Factors(first[..., start:end], (grad_first,)),
                    dilation=-1,
                    side=Factors(identity_weight[None, :, start:end], (grads,)),
                    side_scale=identity_scale,
                )
                found[place] = result.data
    return _wanted(found, needs, x.dtype)


def dense_block_forward(
    x: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    fuse_weight: torch.Tensor,
    fuse_bias: torch.Tensor,
    tf32: bool,
) -> torch.Tensor:
    """y [B, C, H, W] of x, dense_weight [45·G·(C + 2·G)], dense_bias [5·G], fuse_weight [C, C + 5·G], fuse_bias [C].

    ``tf32`` lets products of float32 run in TF32.
    """
    block, y = _DenseBlock(x, dense_weight, dense_bias, tf32), empty_map(x)
    fusion = Factors(fuse_weight.T[None], (block.x, block.layers))
    _convolve(y, fusion, tf32, bias=fuse_bias, activated=True, other=block.x, other_is="summand")
    return y.data


def dense_block_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    fuse_weight: torch.Tensor,
    fuse_bias: torch.Tensor,
    needs: Sequence[bool],
    tf32: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the tensors that :func:`dense_block_forward` takes, None for one that is not needed."""
    needs_x, needs_dense_weight, needs_dense_bias, needs_fuse_weight, needs_fuse_bias = needs
    found: list[torch.Tensor | None] = [None] * len(needs)
    block, grads, grad_fused = _DenseBlock(x, dense_weight, dense_bias, tf32), as_map(grad), _buffer(x, x.shape[1])
    fusion = Factors(fuse_weight.T[None], (block.x, block.layers))
    _convolve(grad_fused, fusion, tf32, bias=fuse_bias, other=grads, other_is="gradient")
    if needs_fuse_weight or needs_fuse_bias:
        weight, found[4] = _weight_gradients(grad_fused, fusion.maps, 1, 1, tf32)
        found[3] = weight.flatten(1)
    if needs_x or needs_dense_weight or needs_dense_bias:
        fusion = Factors(fuse_weight[None], (grad_fused,))
        grad_layers = block.grad_layers(fusion)
        if needs_dense_weight or needs_dense_bias:
            found[1:3] = block.grad_weights(grad_layers, needs_dense_weight)
        if needs_x:
            found[0] = block.grad_x(grad_layers, fusion, grads)
    return _wanted(found, needs, x.dtype)


class _DenseBlock:
    """What both directions of a dense block share: its weights as the kernels read them, and its layers.

    Attributes:
        x: C channels.
        layers: h_0 … h_4 side by side, 5·G channels.
        places: of each layer in these channels.
        weight: [9, 5·G, start + 4·G], each layer's in rows of its own. The channels of x end at ``start``, a multiple
            of 8, where those of the layers begin.
        tf32: whether products of float32 may run in TF32.
    """

    def __init__(self, x: torch.Tensor, dense_weight: torch.Tensor, dense_bias: torch.Tensor, tf32: bool) -> None:
        check_pixels("x", x)
        channels, total = x.shape[1], len(dense_bias)
        growth = total // DENSE_LAYERS
        self.x, self.layers, self.tf32 = as_map(x), _buffer(x, total), tf32
        self.places = [slice(first, first + growth) for first in range(0, total, growth)]
        self.start = triton.cdiv(channels, ALIGNED) * ALIGNED
        self.weight = x.new_empty(9, total, self.start + total - growth)
        for own, weight in zip(self.places, _split(dense_weight, channels, growth), strict=True):
            rows = self.weight[:, own, : self.start + own.start]
            rows[..., self.start - channels :] = _by_taps(weight)
            _convolve(
                _part(self.layers, own),
                Factors(rows.mT, (self.x, _part(self.layers, slice(own.start)))),
                tf32,
                dilation=DENSE_DILATION,
                bias=dense_bias[own],
                activated=True,
            )

    def grad_layers(self, fusion: Factors) -> Map:
        """Gradients of what the layers' ReLUs are given, side by side as the layers, from the last to the first.

        ``fusion`` is the gradient of the fusion and its weights [1, C, C + 5·G].
        """
        grads = _buffer(self.layers.data, self.weight.shape[1])
        of_layers = fusion.weight[..., -self.weight.shape[1] :]
        for own in reversed(self.places):
            later = slice(own.stop, None)
            _convolve(
                _part(grads, own),
                Factors(self.weight[:, later, self.start :][..., own], (_part(grads, later),)),
                self.tf32,
                dilation=-DENSE_DILATION,
                side=Factors(of_layers[..., own], fusion.maps),
                other=_part(self.layers, own),
                other_is="result",
            )
        return grads

    def grad_x(self, grad_layers: Map, fusion: Factors, grad: Map) -> torch.Tensor:
        """Gradient of x; ``fusion`` as for :meth:`grad_layers`, ``grad`` that of the block's result."""
        channels = self.x.data.shape[1]
        grad_x = empty_map(self.x.data)
        _convolve(
            grad_x,
            Factors(self.weight[..., self.start - channels : self.start], (grad_layers,)),
            self.tf32,
            dilation=-DENSE_DILATION,
            side=Factors(fusion.weight[..., :channels], fusion.maps),
            other=grad,
            other_is="summand",
        )
        return grad_x.data

    def grad_weights(self, grad_layers: Map, needs_weight: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gradients of the layers' weights, if needed, and biases. A map is read once for all layers that read it."""
        channels, growth = self.x.data.shape[1], self.places[0].stop
        weight, bias = _weight_gradients(grad_layers, (self.x,), 3, DENSE_DILATION, self.tf32)
        if not needs_weight:
            return None, bias
        grad_weight = weight.new_empty(9 * growth * DENSE_LAYERS * (channels + growth * (DENSE_LAYERS - 1) // 2))
        of_layers = _split(grad_weight, channels, growth)
        for own, of_layer in zip(self.places, of_layers, strict=True):
            of_layer[:, :channels] = weight[own]
        for layer, own in enumerate(self.places[:-1]):
            later = _part(grad_layers, slice(own.stop, None))
            weight, _ = _weight_gradients(later, (_part(self.layers, own),), 3, DENSE_DILATION, self.tf32)
            for of_layer, part in zip(of_layers[layer + 1 :], weight.split(growth), strict=True):
                of_layer[:, channels:][:, own] = part
        return grad_weight, bias


def _split(dense_weight: torch.Tensor, channels: int, growth: int) -> list[torch.Tensor]:
    """The weights [G, C + k·G, 3, 3] of the layers k of a dense block."""
    shapes = [(growth, channels + layer * growth, 3, 3) for layer in range(DENSE_LAYERS)]
    weights = dense_weight.split([prod(shape) for shape in shapes])
    return [weight.view(shape) for weight, shape in zip(weights, shapes, strict=True)]


def _by_taps(weight: torch.Tensor) -> torch.Tensor:
    """[9, Co, C] of weights [Co, C, 3, 3]: neighbours in memory are then neighbours in a tile."""
    return weight.permute(2, 3, 0, 1).flatten(0, 1)


def _maps(x: torch.Tensor, joined: torch.Tensor | None) -> tuple[Map, ...]:
    """Both, or the one that is there."""
    return (as_map(x),) if joined is None else (as_map(x), as_map(joined))


def _buffer(like: torch.Tensor, channels: int) -> Map:
    """An uninitialised map of the size and dtype of ``like``, channels innermost."""
    batch, _, height, width = like.shape
    data = like.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return Map(data, data.stride(0), 1, channels)


def _part(map: Map, channels: slice) -> Map:
    """Neighbouring channels of a map, in place."""
    return map._replace(data=map.data[:, channels])


def _wanted(
    found: Sequence[torch.Tensor | None], needs: Sequence[bool], dtype: torch.dtype
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that are needed, in ``dtype``."""
    return tuple(gradient.to(dtype) if needed else None for gradient, needed in zip(found, needs, strict=True))


def _convolve(
    y: Map,
    factors: Factors,
    tf32: bool,
    *,
    dilation: int = 1,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activated: bool = False,
    negative_slope: float = 0.0,
    side: Factors | None = None,
    side_bias: torch.Tensor | None = None,
    side_scale: float = 1.0,
    other: Map | None = None,
    other_is: str = "",
) -> None:
    """Write y as the module says.

    Args:
        y: result.
        factors: of the convolution, whose taps are ``dilation`` pixels apart; negative, they are mirrored.
        tf32: whether products of float32 may run in TF32.
        dilation: pixels.
        scale: [Co].
        bias: [Co].
        activated: whether a LeakyReLU of ``negative_slope`` comes before the side product.
        negative_slope: of the LeakyReLU, also of one whose gradient is taken.
        side: factors of a product without neighbours, with weights of one tap.
        side_bias: [Co].
        side_scale: of the side product and its bias.
        other: map like y.
        other_is: a "summand" of y; the "result" of an activation, y the gradient of that; or the "gradient" of an
            activation's result, y its argument.
    """
    batch, out, height, width = y.data.shape
    x, joined = _two(factors)
    side_x, side_joined = _two(side)
    maps = {"X": x, "JOINED": joined, "SIDE": side_x, "SIDE_JOINED": side_joined, "OTHER": other, "Y": y}
    channels = [0 if map is None else map.data.shape[1] for map in (x, joined, side_x, side_joined)]
    blocks = configuration(y.data.device, FAMILY, "convolution", product_kind(y.data, tf32), out)
    taps, most = len(factors.weight), blocks["BLOCK_C"]
    rows = [taps * count if taps * count <= most else count for count in channels[:2]]
    blocks["BLOCK_C"] = power_of_two(max(*rows, *channels[2:]), at_most=most)
    blocks["BLOCK_O"] = power_of_two(out, at_most=blocks["BLOCK_O"])
    groups, programs = triton.cdiv(out, blocks["BLOCK_O"]), blocks.pop("programs")
    while blocks["BLOCK_P"] > 16 and batch * groups * triton.cdiv(height * width, blocks["BLOCK_P"]) < programs:
        blocks["BLOCK_P"] //= 2  # a small map is to occupy the whole GPU too
    weight, side_weight = factors.weight, None if side is None else side.weight
    launch(
        _convolution_kernel,
        batch * groups * triton.cdiv(height * width, blocks["BLOCK_P"]),
        *(None if map is None else map.data for map in maps.values()),
        *(weight, _contiguous(scale), _contiguous(bias), side_weight, _contiguous(side_bias), height, width),
        *strides(*maps.values()),
        **{f"{name}_STRIDE_P": 0 if map is None else map.stride_p for name, map in maps.items()},
        OFFSET=offset_type(*maps.values()),
        CHANNELS=channels[0],
        JOINED=channels[1],
        LEAD=weight.shape[1] - sum(channels[:2]),
        WEIGHT_STRIDE_T=weight.stride(0),
        WEIGHT_STRIDE_C=weight.stride(1),
        WEIGHT_STRIDE_O=weight.stride(2),
        SIDE=channels[2],
        SIDE_JOINED=channels[3],
        SIDE_WEIGHT_STRIDE_C=0 if side is None else side_weight.stride(1),
        SIDE_WEIGHT_STRIDE_O=0 if side is None else side_weight.stride(2),
        OUT=out,
        KERNEL=isqrt(len(weight)),
        DILATION=dilation,
        ACTIVATED=activated,
        NEGATIVE_SLOPE=negative_slope,
        SIDE_SCALE=side_scale,
        OTHER=other_is,
        OPERAND=operand_type(y.data),
        PRECISION=precision(y.data, tf32),
        **blocks,
    )


def _two(factors: Factors | None) -> tuple[Map | None, Map | None]:
    """The maps of a product, None for one that is not there or has no channels."""
    maps = [] if factors is None else [map for map in factors.maps if map.data.shape[1]]
    first, second, *_ = *maps, None, None
    return first, second


def _contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def _weight_gradients(
    grad: Map, maps: Sequence[Map], kernel: int, dilation: int, tf32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the weights [Co, C, K, K] with which maps side by side are read, and of the bias [Co], float32."""
    out = grad.data.shape[1]
    sums = [_weight_sums(grad, map, kernel, dilation, tf32) for map in maps]
    weights = [of_map[:-1].T.view(out, kernel, kernel, -1).permute(0, 3, 1, 2) for of_map in sums]
    return torch.cat(weights, 1), sums[0][-1]


def _weight_sums(grad: Map, x: Map, kernel: int, dilation: int, tf32: bool) -> torch.Tensor:
    """[K²·C + 1, Co] in float32: gradients of the weights of each tap and channel, and of the bias."""
    batch, channels, height, width = x.data.shape
    out, rows = grad.data.shape[1], kernel**2 * channels + 1
    blocks = configuration(x.data.device, FAMILY, "weight_sums", product_kind(x.data, tf32), out)
    blocks["BLOCK_R"] = power_of_two(rows, at_most=blocks["BLOCK_R"])
    blocks["BLOCK_O"] = power_of_two(out, at_most=blocks["BLOCK_O"])
    groups = triton.cdiv(rows, blocks["BLOCK_R"]) * triton.cdiv(out, blocks["BLOCK_O"])
    tiles = triton.cdiv(height * width, blocks["BLOCK_P"])
    parts = divide(batch, tiles, blocks.pop("programs") / groups, PIXELS_IN_SEQUENCE // blocks["BLOCK_P"])
    sums = x.data.new_empty(parts.count, rows, out, dtype=torch.float32)
    launch(
        _weight_sums_kernel,
        parts.count * groups,
        *(grad.data, x.data, sums, batch, height, width, parts.samples, parts.splits, parts.tiles),
        *strides(grad, x),
        GRAD_STRIDE_P=grad.stride_p,
        X_STRIDE_P=x.stride_p,
        OFFSET=offset_type(grad, x),
        CHANNELS=channels,
        OUT=out,
        KERNEL=kernel,
        DILATION=dilation,
        OPERAND=operand_type(x.data),
        PRECISION=precision(x.data, tf32),
        **blocks,
    )
    return sums.sum(0)
