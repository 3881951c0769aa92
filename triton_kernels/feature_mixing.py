"""Feature mixing, forward and backward: the parts of a LEGM block that are one operator each.

    pointwise MLP    y = x + weight2·ReLU(weight1·x + bias1) + bias2
    local mixing     y = x + rescale ⊙ (proj·m + proj_bias) + rebias,   m = local * value + local_bias + attended
    normalized QKV   value, query_key = weight·n + bias,   n = norm_weight ⊙ x̂ + norm_bias,   x̂ = (x − μ)/σ

local * value is the depthwise 5×5 convolution of a map that is continued by reflection. Local mixing comes
without attention, with value = value_weight·x + value_bias computed here, no attended map, rescale 1 and
rebias 0, or with attention and all of them given. With g the gradient of y, hidden layers computed again:

    MLP      ∂hidden = weight2ᵀ·g where ReLU lets through,   ∂x = g + weight1ᵀ·∂hidden
    mixing   ∂m = projᵀ·(rescale ⊙ g),   ∂attended = ∂m
             ∂value(q) = Σ_taps local(tap) ⊙ ∂m(r − tap), over all places r that continue the map by pixel q

Maps are contiguous or channels_last, which differ in strides alone; tiles are [pixels, channels]. Value, ∂m and
∂value lie in memory once, since the first two are read at 25 taps, channels_last where they are our own; hidden
layers, m and n exist as tiles only. Gradients of weights are sums over pixels of products of two tiles, in
float32 in a fixed order, in two stages, without atomics; several gradients come out of one such product:

    mixing   G = Σ g·mᵀ and Σ g of each sample: ∂proj = Σ_samples rescale ⊙ G, ∂rescale = Σ_k proj ⊙ G + …
    QKV      S = Σ ∂(value, query_key)·x̂ᵀ and T = Σ ∂(value, query_key) of each sample:
             ∂weight = Σ_samples S ⊙ norm_weightᵀ + T·norm_biasᵀ,  ∂norm_weight = Σ_rows weight ⊙ S,
             and with a = norm_weight ⊙ ∂n, the means over a sample of a and of a ⊙ x̂ in
             ∂x = (a − mean(a) − x̂·mean(a ⊙ x̂))/σ + (∂μ + x̂·∂σ)/elements

μ and σ come from the mean and the squared distances from it of every part of a sample, joined by each program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    load_matrix,
    load_tile,
    offset_type,
    operand_type,
    power_of_two,
    precision,
    product_kind,
    reflected,
    store_tile,
    strides,
)

FAMILY = "feature_mixing"
MAX_CHANNELS = 128  # of a tile, which a program has on chip
SIDE = tl.constexpr(5)  # of the depthwise convolution, pixels
TAPS = tl.constexpr(25)
NORM_EPS = tl.constexpr(1e-5)


@triton.jit
def _vector(ptr, i, SIZE: tl.constexpr):
    """Elements ``i`` of a vector as float32, zeros outside."""
    return tl.load(ptr + i, mask=i < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _load(
    ptr, n, p, c, has_pixel, stride_n, stride_c, STRIDE_P: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr
):
    """Tile [pixels p, channels c] of sample ``n``."""
    return load_tile(
        ptr + n * stride_n, p.to(OFFSET) * STRIDE_P, c.to(OFFSET) * stride_c, has_pixel, c < CHANNELS, STRIDE_P
    )


@triton.jit
def _store(
    ptr, n, p, c, has_pixel, tile, stride_n, stride_c, STRIDE_P: tl.constexpr, OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write a tile [pixels p, channels c] of sample ``n``."""
    store_tile(
        ptr + n * stride_n, p.to(OFFSET) * STRIDE_P, c.to(OFFSET) * stride_c, has_pixel, c < CHANNELS, tile, STRIDE_P
    )


@triton.jit
def _hidden(
    x, weight1_ptr, bias1_ptr, h, c, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """weight1·x + bias1 [pixels, hidden], before the ReLU, and the tile [hidden, channels] of weight1."""
    weight1 = load_matrix(weight1_ptr, h, c, HIDDEN, CHANNELS).to(OPERAND)
    hidden = tl.dot(x.to(OPERAND), tl.trans(weight1), input_precision=PRECISION)
    return hidden + _vector(bias1_ptr, h, HIDDEN)[None, :], weight1


@triton.jit
def _mlp_kernel(
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    y_ptr,
    pixels,
    x_stride_n,
    x_stride_c,
    y_stride_n,
    y_stride_c,
    X_STRIDE_P: tl.constexpr,
    Y_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y of the pointwise MLP.

    Grid: batch × pixel tiles, tiles fastest. A program owns BLOCK_P pixels of all channels and goes through
    the hidden ones block by block; both products are accumulated in float32.
    """
    tiles = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    own = p < pixels
    c = tl.arange(0, BLOCK_C)
    x = _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS)
    y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        hidden, _ = _hidden(x, weight1_ptr, bias1_ptr, h, c, CHANNELS, HIDDEN, OPERAND, PRECISION)
        hidden = tl.maximum(hidden, 0.0).to(x.dtype).to(OPERAND)
        weight2 = load_matrix(weight2_ptr, c, h, CHANNELS, HIDDEN).to(OPERAND)
        y = tl.dot(hidden, tl.trans(weight2), y, input_precision=PRECISION)
    y += x.to(tl.float32) + _vector(bias2_ptr, c, CHANNELS)[None, :]
    _store(y_ptr, n, p, c, own, y, y_stride_n, y_stride_c, Y_STRIDE_P, OFFSET, CHANNELS)


@triton.jit
def _mlp_grad_x_kernel(
    grad_ptr,
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    grad_x_ptr,
    pixels,
    grad_stride_n,
    grad_stride_c,
    x_stride_n,
    x_stride_c,
    grad_x_stride_n,
    grad_x_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    GRAD_X_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """∂x of the pointwise MLP. Grid and ownership as in :func:`_mlp_kernel`; accumulated in float32."""
    tiles = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    own = p < pixels
    c = tl.arange(0, BLOCK_C)
    x = _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS)
    grad = _load(grad_ptr, n, p, c, own, grad_stride_n, grad_stride_c, GRAD_STRIDE_P, OFFSET, CHANNELS)
    grad_x = grad.to(tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        hidden, weight1 = _hidden(x, weight1_ptr, bias1_ptr, h, c, CHANNELS, HIDDEN, OPERAND, PRECISION)
        weight2 = load_matrix(weight2_ptr, c, h, CHANNELS, HIDDEN).to(OPERAND)
        grad_hidden = tl.dot(grad.to(OPERAND), weight2, input_precision=PRECISION)
        grad_hidden = tl.where(hidden > 0, grad_hidden, 0.0).to(x.dtype).to(OPERAND)
        grad_x = tl.dot(grad_hidden, weight1, grad_x, input_precision=PRECISION)
    _store(
        *(grad_x_ptr, n, p, c, own, grad_x, grad_x_stride_n, grad_x_stride_c),
        *(GRAD_X_STRIDE_P, OFFSET, CHANNELS),
    )


@triton.jit(do_not_specialize=["batch", "samples", "splits", "tiles_per_split"])
def _mlp_sums_kernel(
    grad_ptr,
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    grad_x_ptr,
    sums_ptr,
    bias2_sums_ptr,
    batch,
    pixels,
    samples,
    splits,
    tiles_per_split,
    grad_stride_n,
    grad_stride_c,
    x_stride_n,
    x_stride_c,
    grad_x_stride_n,
    grad_x_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    GRAD_X_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NEEDS_X: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """First sums of the gradients of the MLP's weights and biases; of a network of one hidden block also ∂x.

    Grid: parts × hidden blocks, blocks fastest. A part is either ``tiles_per_split`` pixel tiles of one sample
    (``samples`` = 1) or all of ``samples`` samples (``splits`` = 1). Writes rows of a block for each part: sums
    [parts, HIDDEN, 2·CHANNELS + 1] of weight1, of weight2 transposed and of bias1, and with the first block
    bias2_sums [parts, CHANNELS]; float32, as everything is accumulated.
    """
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    part = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    first_sample = part // splits * samples
    first_tile = (part % splits).to(tl.int32) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(pixels, BLOCK_P))
    weight1_sums = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    weight2_sums = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    bias1_sums = tl.zeros((BLOCK_H,), tl.float32)
    bias2_sums = tl.zeros((BLOCK_C,), tl.float32)
    n = first_sample
    for _ in range(tl.minimum(samples, batch - first_sample)):
        for tile in range(first_tile, last_tile):
            p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            own = p < pixels
            x = _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS)
            grad = _load(grad_ptr, n, p, c, own, grad_stride_n, grad_stride_c, GRAD_STRIDE_P, OFFSET, CHANNELS)
            hidden, weight1 = _hidden(x, weight1_ptr, bias1_ptr, h, c, CHANNELS, HIDDEN, OPERAND, PRECISION)
            weight2 = load_matrix(weight2_ptr, c, h, CHANNELS, HIDDEN).to(OPERAND)
            grad_hidden = tl.dot(grad.to(OPERAND), weight2, input_precision=PRECISION)
            grad_hidden = tl.where(hidden > 0, grad_hidden, 0.0)
            bias1_sums += tl.sum(grad_hidden, 0)
            bias2_sums += tl.sum(grad.to(tl.float32), 0)
            grad_hidden = grad_hidden.to(x.dtype).to(OPERAND)
            if NEEDS_X:
                grad_x = tl.dot(grad_hidden, weight1, grad.to(tl.float32), input_precision=PRECISION)
                _store(
                    *(grad_x_ptr, n, p, c, own, grad_x, grad_x_stride_n, grad_x_stride_c),
                    *(GRAD_X_STRIDE_P, OFFSET, CHANNELS),
                )
            hidden = tl.maximum(hidden, 0.0).to(x.dtype).to(OPERAND)
            weight1_sums = tl.dot(tl.trans(x.to(OPERAND)), grad_hidden, weight1_sums, input_precision=PRECISION)
            weight2_sums = tl.dot(tl.trans(grad.to(OPERAND)), hidden, weight2_sums, input_precision=PRECISION)
        n += 1
    ROW: tl.constexpr = 2 * CHANNELS + 1
    rows = sums_ptr + part * (HIDDEN * ROW) + h * ROW
    both = (c < CHANNELS)[:, None] & (h < HIDDEN)[None, :]
    tl.store(rows[None, :] + c[:, None], weight1_sums, mask=both)
    tl.store(rows[None, :] + (CHANNELS + c)[:, None], weight2_sums, mask=both)
    tl.store(rows + 2 * CHANNELS, bias1_sums, mask=h < HIDDEN)
    tl.store(bias2_sums_ptr + part * CHANNELS + c, bias2_sums, mask=c < tl.where(block == 0, CHANNELS, 0))


@triton.jit
def _product_kernel(
    x_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    x_stride_n,
    x_stride_c,
    residual_stride_n,
    residual_stride_c,
    y_stride_n,
    y_stride_c,
    X_STRIDE_P: tl.constexpr,
    RESIDUAL_STRIDE_P: tl.constexpr,
    Y_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weight·x + bias; with TRANSPOSED, weightᵀ·(scale ⊙ x) + residual, scale [batch, CHANNELS].

    Grid: batch × pixel tiles, tiles fastest. A program owns BLOCK_P pixels of all channels and goes through
    those of x block by block; the product is accumulated in float32.
    """
    tiles = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    own = p < pixels
    c = tl.arange(0, BLOCK_C)
    y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, CHANNELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = _load(x_ptr, n, p, k, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS)
        if HAS_SCALE:
            x = (x.to(tl.float32) * _vector(scale_ptr + n * CHANNELS, k, CHANNELS)[None, :]).to(x.dtype)
        if TRANSPOSED:
            weight = load_matrix(weight_ptr, k, c, CHANNELS, CHANNELS)
        else:
            weight = tl.trans(load_matrix(weight_ptr, c, k, CHANNELS, CHANNELS))
        y = tl.dot(x.to(OPERAND), weight.to(OPERAND), y, input_precision=PRECISION)
    if not TRANSPOSED:
        y += _vector(bias_ptr, c, CHANNELS)[None, :]
    if HAS_RESIDUAL:
        residual = _load(
            *(residual_ptr, n, p, c, own, residual_stride_n, residual_stride_c),
            *(RESIDUAL_STRIDE_P, OFFSET, CHANNELS),
        )
        y += residual.to(tl.float32)
    _store(y_ptr, n, p, c, own, y, y_stride_n, y_stride_c, Y_STRIDE_P, OFFSET, CHANNELS)


@triton.jit
def _pixels(tile, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Row and column of the pixels of a tile of BLOCK_H×BLOCK_W, and which of them exist."""
    columns = tl.cdiv(width, BLOCK_W)
    i = tl.arange(0, BLOCK_H * BLOCK_W)
    h = tile // columns * BLOCK_H + i // BLOCK_W
    w = tile % columns * BLOCK_W + i % BLOCK_W
    return h, w, (h < height) & (w < width)


@triton.jit
def _mixing_kernel(
    x_ptr,
    value_ptr,
    attended_ptr,
    local_weight_ptr,
    local_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    rescale_ptr,
    rebias_ptr,
    y_ptr,
    height,
    width,
    x_stride_n,
    x_stride_c,
    value_stride_n,
    value_stride_c,
    attended_stride_n,
    attended_stride_c,
    y_stride_n,
    y_stride_c,
    X_STRIDE_P: tl.constexpr,
    VALUE_STRIDE_P: tl.constexpr,
    ATTENDED_STRIDE_P: tl.constexpr,
    Y_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_ATTENTION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y of local mixing, from x and value.

    Grid: batch × tiles of BLOCK_H×BLOCK_W pixels, tiles fastest. A program owns the pixels of a tile with
    all channels, and mixes and projects those of value block by block, accumulated in float32.
    """
    tiles = tl.cdiv(height, BLOCK_H) * tl.cdiv(width, BLOCK_W)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    h, w, own = _pixels(tl.program_id(0) % tiles, height, width, BLOCK_H, BLOCK_W)
    p = h * width + w
    c = tl.arange(0, BLOCK_C)
    value_ptr += n * value_stride_n
    y = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    for first in range(0, CHANNELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        has_channel = k < CHANNELS
        channels = k.to(OFFSET) * value_stride_c
        weights = local_weight_ptr + k * TAPS
        mixed = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_K), tl.float32) + _vector(local_bias_ptr, k, CHANNELS)[None, :]
        for row in range(SIDE):
            first_of_row = reflected(h + (row - SIDE // 2), height) * width
            for column in tl.static_range(SIDE):
                pixels = (first_of_row + reflected(w + (column - SIDE // 2), width)).to(OFFSET) * VALUE_STRIDE_P
                value = load_tile(value_ptr, pixels, channels, own, has_channel, VALUE_STRIDE_P).to(tl.float32)
                weight = tl.load(weights + (row * SIDE + column), mask=has_channel, other=0.0).to(tl.float32)
                mixed += weight[None, :] * value
        if HAS_ATTENTION:
            attended = _load(
                *(attended_ptr, n, p, k, own, attended_stride_n, attended_stride_c),
                *(ATTENDED_STRIDE_P, OFFSET, CHANNELS),
            )
            mixed += attended.to(tl.float32)
        proj_weight = load_matrix(proj_weight_ptr, c, k, CHANNELS, CHANNELS).to(OPERAND)
        mixed = mixed.to(proj_weight_ptr.dtype.element_ty).to(OPERAND)
        y = tl.dot(mixed, tl.trans(proj_weight), y, input_precision=PRECISION)
    y += _vector(proj_bias_ptr, c, CHANNELS)[None, :]
    if HAS_ATTENTION:
        y *= _vector(rescale_ptr + n * CHANNELS, c, CHANNELS)[None, :]
        y += _vector(rebias_ptr + n * CHANNELS, c, CHANNELS)[None, :]
    y += _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS).to(tl.float32)
    _store(y_ptr, n, p, c, own, y, y_stride_n, y_stride_c, Y_STRIDE_P, OFFSET, CHANNELS)


@triton.jit(do_not_specialize=["splits", "tiles_per_split"])
def _mixing_sums_kernel(
    grad_ptr,
    grad_mixed_ptr,
    value_ptr,
    attended_ptr,
    local_weight_ptr,
    local_bias_ptr,
    sums_ptr,
    height,
    width,
    splits,
    tiles_per_split,
    grad_stride_n,
    grad_stride_c,
    grad_mixed_stride_n,
    grad_mixed_stride_c,
    value_stride_n,
    value_stride_c,
    attended_stride_n,
    attended_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    GRAD_MIXED_STRIDE_P: tl.constexpr,
    VALUE_STRIDE_P: tl.constexpr,
    ATTENDED_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_ATTENTION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First sums for the gradients of the local and the projection's weights, of rescale and of rebias.

    Grid: batch × splits × channel blocks, blocks fastest. A program owns ``tiles_per_split`` tiles of
    BLOCK_H×BLOCK_W pixels of a sample, computes BLOCK_K channels of m again and keeps its sums in registers.
    Writes sums [batch, splits, CHANNELS, CHANNELS + 27] in float32, rows of Σ g·mᵀ, Σ g, Σ ∂m and, for each tap,
    Σ ∂m ⊙ value: the block's columns of the first, its rows of the last two.
    """
    BLOCK_T: tl.constexpr = 32  # of the taps
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    part = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    n = part // splits
    first_tile = (part % splits).to(tl.int32) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(height, BLOCK_H) * tl.cdiv(width, BLOCK_W))
    value_ptr += n * value_stride_n
    has_channel = k < CHANNELS
    channels = k.to(OFFSET) * value_stride_c
    weights = local_weight_ptr + k * TAPS
    product_sums = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    grad_sums = tl.zeros((BLOCK_C,), tl.float32)
    grad_mixed_sums = tl.zeros((BLOCK_K,), tl.float32)
    local_sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for tile in range(first_tile, last_tile):
        h, w, own = _pixels(tile, height, width, BLOCK_H, BLOCK_W)
        p = h * width + w
        grad_mixed = _load(
            *(grad_mixed_ptr, n, p, k, own, grad_mixed_stride_n, grad_mixed_stride_c),
            *(GRAD_MIXED_STRIDE_P, OFFSET, CHANNELS),
        ).to(tl.float32)
        grad_mixed_sums += tl.sum(grad_mixed, 0)
        mixed = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_K), tl.float32) + _vector(local_bias_ptr, k, CHANNELS)[None, :]
        for row in range(SIDE):
            first_of_row = reflected(h + (row - SIDE // 2), height) * width
            for column in range(SIDE):  # not unrolled: each tap needs many registers
                pixels = (first_of_row + reflected(w + (column - SIDE // 2), width)).to(OFFSET) * VALUE_STRIDE_P
                value = load_tile(value_ptr, pixels, channels, own, has_channel, VALUE_STRIDE_P).to(tl.float32)
                weight = tl.load(weights + (row * SIDE + column), mask=has_channel, other=0.0).to(tl.float32)
                mixed += weight[None, :] * value
                of_tap = tl.sum(grad_mixed * value, 0)[None, :]
                local_sums += tl.where((t == row * SIDE + column)[:, None], of_tap, 0.0)
        if HAS_ATTENTION:
            attended = _load(
                *(attended_ptr, n, p, k, own, attended_stride_n, attended_stride_c),
                *(ATTENDED_STRIDE_P, OFFSET, CHANNELS),
            )
            mixed += attended.to(tl.float32)
        grad = _load(grad_ptr, n, p, c, own, grad_stride_n, grad_stride_c, GRAD_STRIDE_P, OFFSET, CHANNELS)
        grad_sums += tl.sum(grad.to(tl.float32), 0)
        mixed = mixed.to(grad.dtype).to(OPERAND)
        product_sums = tl.dot(tl.trans(grad.to(OPERAND)), mixed, product_sums, input_precision=PRECISION)
    ROW: tl.constexpr = CHANNELS + 2 + TAPS
    sums_ptr += part * (CHANNELS * ROW)
    products = sums_ptr + c[:, None] * ROW + k[None, :]
    tl.store(products, product_sums, mask=(c < CHANNELS)[:, None] & has_channel[None, :])
    tl.store(sums_ptr + c * ROW + CHANNELS, grad_sums, mask=c < tl.where(block == 0, CHANNELS, 0))
    tl.store(sums_ptr + k * ROW + (CHANNELS + 1), grad_mixed_sums, mask=has_channel)
    taps = sums_ptr + k[None, :] * ROW + (CHANNELS + 2 + t)[:, None]
    tl.store(taps, local_sums, mask=(t < TAPS)[:, None] & has_channel[None, :])


@triton.jit
def _source(i, step, size):
    """Where on an axis a value's gradient comes from, by the ``step``-th of nine ways, by which tap, and whether.

    Steps 0 and 1 lead through the pixel's mirror image before the first pixel, 2 to 6 through the pixel itself,
    7 and 8 through its mirror image behind the last one.
    """
    tap = step - tl.where(step < 2, 0, tl.where(step < 7, 2, 4))
    place = tl.where(step < 2, -i, tl.where(step < 7, i, 2 * (size - 1) - i))
    is_mirrored = ((step >= 2) | (i > 0)) & ((step < 7) | (i < size - 1))
    source = place - (tap - SIDE // 2)
    return source, tap, is_mirrored & (source >= 0) & (source < size)


@triton.jit
def _grad_value_kernel(
    grad_mixed_ptr,
    local_weight_ptr,
    grad_value_ptr,
    height,
    width,
    grad_mixed_stride_n,
    grad_mixed_stride_c,
    grad_value_stride_n,
    grad_value_stride_c,
    GRAD_MIXED_STRIDE_P: tl.constexpr,
    GRAD_VALUE_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """∂value, gathered from ∂m.

    Grid: batch × channel groups × tiles of BLOCK_H×BLOCK_W pixels, tiles fastest. A program owns the pixels of
    a tile and BLOCK_C channels, and adds up in float32 what comes to them by 25 taps, and near an edge by those
    of their mirror images too.
    """
    columns = tl.cdiv(width, BLOCK_W)
    tiles = tl.cdiv(height, BLOCK_H) * columns
    groups: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    plane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = (plane // groups).to(tl.int64)
    c = plane % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    h, w, own = _pixels(tile, height, width, BLOCK_H, BLOCK_W)
    top = tile // columns * BLOCK_H
    left = tile % columns * BLOCK_W
    grad_mixed_ptr += n * grad_mixed_stride_n
    has_channel = c < CHANNELS
    channels = c.to(OFFSET) * grad_mixed_stride_c
    weights = local_weight_ptr + c * TAPS
    grad_value = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    # steps through mirror images only where a pixel of the tile has some
    for row in range(tl.where(top > 2, 2, 0), tl.where(top + BLOCK_H < height - 2, 7, 9)):
        source_h, tap_row, has_row = _source(h, row, height)
        first_of_row = source_h * width
        has_row &= own
        for column in range(tl.where(left > 2, 2, 0), tl.where(left + BLOCK_W < width - 2, 7, 9)):
            source_w, tap_column, has_source = _source(w, column, width)
            pixels = (first_of_row + source_w).to(OFFSET) * GRAD_MIXED_STRIDE_P
            has_source &= has_row
            grad_mixed = load_tile(grad_mixed_ptr, pixels, channels, has_source, has_channel, GRAD_MIXED_STRIDE_P)
            weight = tl.load(weights + (tap_row * SIDE + tap_column), mask=has_channel, other=0.0).to(tl.float32)
            grad_value += weight[None, :] * grad_mixed.to(tl.float32)
    _store(
        *(grad_value_ptr, n, h * width + w, c, own, grad_value, grad_value_stride_n, grad_value_stride_c),
        *(GRAD_VALUE_STRIDE_P, OFFSET, CHANNELS),
    )


@triton.jit(do_not_specialize=["splits", "tiles_per_split"])
def _moments_kernel(
    x_ptr,
    moments_ptr,
    pixels,
    splits,
    tiles_per_split,
    x_stride_n,
    x_stride_c,
    X_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared distances from it of a part of a sample, moments [batch, splits, 2] float32.

    Grid: batch × splits, splits fastest. A program owns ``tiles_per_split`` tiles of BLOCK_P pixels of all
    channels; it follows mean and squares of every place of a tile in float32 and joins them at its end. It counts
    from its first value, so that a mean far from zero costs no bits.
    """
    n = (tl.program_id(0) // splits).to(tl.int64)
    first_tile = tl.program_id(0) % splits * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(pixels, BLOCK_P))
    c = tl.arange(0, BLOCK_C)
    origin = tl.load(x_ptr + n * x_stride_n + first_tile.to(tl.int64) * BLOCK_P * X_STRIDE_P).to(tl.float32)
    means = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(first_tile, last_tile):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        own = p < pixels
        x = _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS).to(tl.float32) - origin
        distance = tl.where(own[:, None] & (c < CHANNELS)[None, :], x - means, 0.0)
        means += distance * (1.0 / (tile - first_tile + 1))
        squares += distance * (x - means)
    p = (last_tile - 1) * BLOCK_P + tl.arange(0, BLOCK_P)
    counts = tl.where(p < pixels, last_tile - first_tile, last_tile - first_tile - 1).to(tl.float32)
    counts = tl.where((c < CHANNELS)[None, :], counts[:, None], 0.0)
    elements = tl.sum(counts)
    mean = tl.sum(counts * means) / elements
    distance = means - mean
    tl.store(moments_ptr + 2 * tl.program_id(0), origin + mean)
    tl.store(moments_ptr + 2 * tl.program_id(0) + 1, tl.sum(squares + counts * distance * distance))


@triton.jit
def _mean_and_deviation(
    moments_ptr, n, pixels, splits, pixels_per_split, CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """μ and σ of sample ``n`` from the moments of its parts."""
    s = tl.arange(0, BLOCK_S)
    present = s < splits
    parts = moments_ptr + (n * splits + s) * 2
    means = tl.load(parts, mask=present, other=0.0)
    squares = tl.load(parts + 1, mask=present, other=0.0)
    counts = tl.where(present, tl.minimum(pixels - s * pixels_per_split, pixels_per_split), 0).to(tl.float32)
    origin = tl.load(moments_ptr + n * splits * 2)
    mean = origin + tl.sum((means - origin) * counts) / pixels
    distance = means - mean
    variance = (tl.sum(squares) / CHANNELS + tl.sum(counts * distance * distance)) / pixels
    return mean, tl.sqrt_rn(variance + NORM_EPS)


@triton.jit(do_not_specialize=["splits", "tiles_per_split", "moment_splits", "pixels_per_split"])
def _product_sums_kernel(
    grad_ptr,
    x_ptr,
    moments_ptr,
    sums_ptr,
    pixels,
    splits,
    tiles_per_split,
    moment_splits,
    pixels_per_split,
    grad_stride_n,
    grad_stride_c,
    x_stride_n,
    x_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """First sums of Σ g·xᵀ and Σ g for the weight and bias of a product of x whose gradient is g; of x̂ if NORMALIZED.

    Grid: batch × splits × output blocks, blocks fastest. A program owns ``tiles_per_split`` pixel tiles of a
    sample and BLOCK_O of the OUTPUTS channels of g. Writes OUTPUTS rows of sums [batch, splits, ROWS,
    CHANNELS + 1], float32 as what is accumulated, from where ``sums_ptr`` points.
    """
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    part = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o = tl.program_id(0) % BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    n = part // splits
    first_tile = (part % splits).to(tl.int32) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(pixels, BLOCK_P))
    if NORMALIZED:
        mean, deviation = _mean_and_deviation(
            moments_ptr, n, pixels, moment_splits, pixels_per_split, CHANNELS, BLOCK_S
        )
        inverse = 1.0 / deviation
    product_sums = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    grad_sums = tl.zeros((BLOCK_O,), tl.float32)
    for tile in range(first_tile, last_tile):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        own = p < pixels
        grad = _load(grad_ptr, n, p, o, own, grad_stride_n, grad_stride_c, GRAD_STRIDE_P, OFFSET, OUTPUTS)
        x = _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS)
        if NORMALIZED:
            x = ((x.to(tl.float32) - mean) * inverse).to(x.dtype)
        product_sums = tl.dot(tl.trans(grad.to(OPERAND)), x.to(OPERAND), product_sums, input_precision=PRECISION)
        grad_sums += tl.sum(grad.to(tl.float32), 0)
    ROW: tl.constexpr = CHANNELS + 1
    rows = sums_ptr + part * (ROWS * ROW) + o * ROW
    tl.store(rows[:, None] + c[None, :], product_sums, mask=(o < OUTPUTS)[:, None] & (c < CHANNELS)[None, :])
    tl.store(rows + CHANNELS, grad_sums, mask=o < OUTPUTS)


@triton.jit
def _project(
    x, weight_ptr, bias_ptr, result_ptr, n, p, c, own, stride_n, stride_c, STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Write weight·x + bias of a tile [pixels, channels], a block of OUTPUTS channels after the other."""
    for first in range(0, OUTPUTS, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        weight = load_matrix(weight_ptr, o, c, OUTPUTS, CHANNELS).to(OPERAND)
        result = tl.dot(x, tl.trans(weight), input_precision=PRECISION) + _vector(bias_ptr, o, OUTPUTS)[None, :]
        _store(result_ptr, n, p, o, own, result, stride_n, stride_c, STRIDE_P, OFFSET, OUTPUTS)


@triton.jit
def _add_transposed_product(
    result, grad_ptr, weight_ptr, n, p, c, own, stride_n, stride_c, STRIDE_P: tl.constexpr, OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """result + weightᵀ·grad of a tile [pixels, channels], a block of OUTPUTS channels after the other."""
    for first in range(0, OUTPUTS, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        grad = _load(grad_ptr, n, p, o, own, stride_n, stride_c, STRIDE_P, OFFSET, OUTPUTS)
        weight = load_matrix(weight_ptr, o, c, OUTPUTS, CHANNELS)
        result = tl.dot(grad.to(OPERAND), weight.to(OPERAND), result, input_precision=PRECISION)
    return result


@triton.jit(do_not_specialize=["splits", "pixels_per_split"])
def _normalized_qkv_kernel(
    x_ptr,
    moments_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    value_weight_ptr,
    value_bias_ptr,
    query_key_weight_ptr,
    query_key_bias_ptr,
    value_ptr,
    query_key_ptr,
    mean_ptr,
    deviation_ptr,
    pixels,
    splits,
    pixels_per_split,
    x_stride_n,
    x_stride_c,
    value_stride_n,
    value_stride_c,
    query_key_stride_n,
    query_key_stride_c,
    X_STRIDE_P: tl.constexpr,
    VALUE_STRIDE_P: tl.constexpr,
    QUERY_KEY_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """value, query_key, μ and σ.

    Grid: batch × pixel tiles, tiles fastest. A program owns BLOCK_P pixels of all channels, normalises them
    once and projects them block by block; a sample's first one also writes μ and σ. Accumulated in float32.
    """
    tiles = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    own = p < pixels
    c = tl.arange(0, BLOCK_C)
    mean, deviation = _mean_and_deviation(moments_ptr, n, pixels, splits, pixels_per_split, CHANNELS, BLOCK_S)
    tl.store(mean_ptr + n, mean.to(mean_ptr.dtype.element_ty), mask=tile == 0)
    tl.store(deviation_ptr + n, deviation.to(deviation_ptr.dtype.element_ty), mask=tile == 0)
    x = _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS)
    scale = _vector(norm_weight_ptr, c, CHANNELS) / deviation
    normalized = (x.to(tl.float32) - mean) * scale[None, :] + _vector(norm_bias_ptr, c, CHANNELS)[None, :]
    normalized = normalized.to(x.dtype).to(OPERAND)
    _project(
        *(normalized, value_weight_ptr, value_bias_ptr, value_ptr, n, p, c, own, value_stride_n, value_stride_c),
        *(VALUE_STRIDE_P, OFFSET, CHANNELS, CHANNELS, OPERAND, PRECISION, BLOCK_C if BLOCK_C < BLOCK_O else BLOCK_O),
    )
    _project(
        *(normalized, query_key_weight_ptr, query_key_bias_ptr, query_key_ptr, n, p, c, own),
        *(query_key_stride_n, query_key_stride_c, QUERY_KEY_STRIDE_P, OFFSET),
        *(CHANNELS, 2 * CHANNELS, OPERAND, PRECISION, BLOCK_O),
    )


@triton.jit(do_not_specialize=["splits", "pixels_per_split"])
def _normalized_qkv_grad_x_kernel(
    grad_value_ptr,
    grad_query_key_ptr,
    grad_mean_ptr,
    grad_deviation_ptr,
    x_ptr,
    moments_ptr,
    norm_sums_ptr,
    norm_weight_ptr,
    value_weight_ptr,
    query_key_weight_ptr,
    grad_x_ptr,
    pixels,
    splits,
    pixels_per_split,
    grad_value_stride_n,
    grad_value_stride_c,
    grad_query_key_stride_n,
    grad_query_key_stride_c,
    x_stride_n,
    x_stride_c,
    grad_x_stride_n,
    grad_x_stride_c,
    GRAD_VALUE_STRIDE_P: tl.constexpr,
    GRAD_QUERY_KEY_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    GRAD_X_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """∂x of the normalized QKV, from norm_sums [batch, 2, CHANNELS], a sample's sums of ∂n ⊙ x̂ and of ∂n.

    Grid: batch × pixel tiles, tiles fastest. A program owns BLOCK_P pixels of all channels and goes through
    those of value and query_key block by block; ∂n is accumulated in float32.
    """
    tiles = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    own = p < pixels
    c = tl.arange(0, BLOCK_C)
    grad_n = _add_transposed_product(
        *(tl.zeros((BLOCK_P, BLOCK_C), tl.float32), grad_value_ptr, value_weight_ptr, n, p, c, own),
        *(grad_value_stride_n, grad_value_stride_c, GRAD_VALUE_STRIDE_P, OFFSET),
        *(CHANNELS, CHANNELS, OPERAND, PRECISION, BLOCK_C if BLOCK_C < BLOCK_O else BLOCK_O),
    )
    grad_n = _add_transposed_product(
        *(grad_n, grad_query_key_ptr, query_key_weight_ptr, n, p, c, own),
        *(grad_query_key_stride_n, grad_query_key_stride_c, GRAD_QUERY_KEY_STRIDE_P, OFFSET),
        *(CHANNELS, 2 * CHANNELS, OPERAND, PRECISION, BLOCK_O),
    )
    mean, deviation = _mean_and_deviation(moments_ptr, n, pixels, splits, pixels_per_split, CHANNELS, BLOCK_S)
    inverse = 1.0 / deviation
    norm_weight = _vector(norm_weight_ptr, c, CHANNELS)
    norm_sums_ptr += n * (2 * CHANNELS)
    of_weight = tl.sum(norm_weight * _vector(norm_sums_ptr, c, CHANNELS))
    of_bias = tl.sum(norm_weight * _vector(norm_sums_ptr + CHANNELS, c, CHANNELS))
    elements = 1.0 * pixels * CHANNELS
    same = (tl.load(grad_mean_ptr + n).to(tl.float32) - of_bias * inverse) / elements
    slope = (tl.load(grad_deviation_ptr + n).to(tl.float32) - of_weight * inverse) / elements
    x = _load(x_ptr, n, p, c, own, x_stride_n, x_stride_c, X_STRIDE_P, OFFSET, CHANNELS)
    standardized = (x.to(tl.float32) - mean) * inverse
    grad_x = grad_n * (norm_weight * inverse)[None, :] + (standardized * slope + same)
    _store(
        *(grad_x_ptr, n, p, c, own, grad_x, grad_x_stride_n, grad_x_stride_c),
        *(GRAD_X_STRIDE_P, OFFSET, CHANNELS),
    )


def pointwise_mlp_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    tf32: bool,
) -> torch.Tensor:
    """y [B, C, H, W] of x, weights [Ch, C] and [C, Ch] and their biases.

    ``tf32`` lets the products of float32 tensors run in TF32, here and below.
    """
    _check(x)
    batch, channels, height, width = x.shape
    inputs, y = as_map(x), empty_map(x)
    blocks = _configuration("mlp_forward", x, tf32, BLOCK_H=len(weight1))
    launch(
        _mlp_kernel,
        batch * triton.cdiv(height * width, blocks["BLOCK_P"]),
        *(inputs.data, *_contiguous(weight1, bias1, weight2, bias2), y.data, height * width),
        *strides(inputs, y),
        X_STRIDE_P=inputs.stride_p,
        Y_STRIDE_P=y.stride_p,
        OFFSET=offset_type(inputs, y),
        CHANNELS=channels,
        HIDDEN=len(weight1),
        **_product_options(x, tf32),
        **blocks,
    )
    return y.data


def pointwise_mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    needs: Sequence[bool],
    tf32: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight1, bias1, weight2 and bias2, None for one that is not needed."""
    _check(x)
    batch, channels, height, width = x.shape
    hidden = len(weight1)
    grads, inputs, grad_x = as_map(grad), as_map(x), empty_map(x) if needs[0] else None
    weights = _contiguous(weight1, bias1, weight2)
    totals: Sequence[torch.Tensor | None] = [None] * 4
    blocks = _configuration("mlp_sums", x, tf32, BLOCK_H=hidden)
    groups = triton.cdiv(hidden, blocks["BLOCK_H"])
    sums_give_x = needs[0] and any(needs[1:]) and groups == 1
    if needs[0] and not sums_give_x:
        blocks_of_x = _configuration("mlp_grad_x", x, tf32, BLOCK_H=hidden)
        launch(
            _mlp_grad_x_kernel,
            batch * triton.cdiv(height * width, blocks_of_x["BLOCK_P"]),
            *(grads.data, inputs.data, *weights, grad_x.data, height * width),
            *strides(grads, inputs, grad_x),
            GRAD_STRIDE_P=grads.stride_p,
            X_STRIDE_P=inputs.stride_p,
            GRAD_X_STRIDE_P=grad_x.stride_p,
            OFFSET=offset_type(grads, inputs, grad_x),
            CHANNELS=channels,
            HIDDEN=hidden,
            **_product_options(x, tf32),
            **blocks_of_x,
        )
    if any(needs[1:]):
        written = grad_x if sums_give_x else None
        wanted, longest = blocks.pop("programs") / groups, PIXELS_IN_SEQUENCE // blocks["BLOCK_P"]
        parts = divide(batch, triton.cdiv(height * width, blocks["BLOCK_P"]), wanted, longest)
        sums = x.new_empty(parts.count, hidden, 2 * channels + 1, dtype=torch.float32)
        bias2_sums = x.new_empty(parts.count, channels, dtype=torch.float32)
        launch(
            _mlp_sums_kernel,
            parts.count * groups,
            *(grads.data, inputs.data, *weights, written and written.data, sums, bias2_sums),
            *(batch, height * width, parts.samples, parts.splits, parts.tiles),
            *strides(grads, inputs, written),
            GRAD_STRIDE_P=grads.stride_p,
            X_STRIDE_P=inputs.stride_p,
            GRAD_X_STRIDE_P=_stride_p(written),
            OFFSET=offset_type(grads, inputs, written),
            CHANNELS=channels,
            HIDDEN=hidden,
            NEEDS_X=sums_give_x,
            **_product_options(x, tf32),
            **blocks,
        )
        grad_weight1, grad_weight2, grad_bias1 = sums.sum(0).split((channels, channels, 1), 1)
        totals = grad_weight1, grad_bias1, grad_weight2.t(), bias2_sums.sum(0)
    return grad_x and grad_x.data, *_rounded(totals, (weight1, bias1, weight2, bias2), needs[1:])


def local_mixing_forward(
    x: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    tf32: bool,
) -> torch.Tensor:
    """y [B, C, H, W] of x, value_weight [C, C], local_weight [C, 5, 5], proj_weight [C, C] and their biases."""
    _check(x)
    inputs = as_map(x)
    value = _product(inputs, value_weight, _workspace(x), tf32, bias=value_bias)
    return _mixing(inputs, value, None, (local_weight, local_bias, proj_weight, proj_bias), (None, None), tf32)


def local_mixing_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    needs: Sequence[bool],
    tf32: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the forward's tensors in their order, None for one that is not needed."""
    _check(x)
    channels = x.shape[1]
    needs_value, needs_rest = any(needs[1:3]), any(needs[3:])
    grads, inputs, grad_x = as_map(grad), as_map(x), empty_map(x) if needs[0] else None
    totals: list[torch.Tensor | None] = [None] * 6
    if any(needs):
        grad_mixed = _product(grads, proj_weight, _workspace(x), tf32, transposed=True)
    if needs[0] or needs_value:
        grad_value = _grad_value(grad_mixed, local_weight, _workspace(x))
        if needs[0]:
            _product(grad_value, value_weight, grad_x, tf32, transposed=True, residual=grads)
        if needs_value:
            totals[:2] = _sums_of_product([grad_value], inputs, None, tf32).sum(0).split((channels, 1), 1)
    if needs_rest:
        value = _product(inputs, value_weight, _workspace(x), tf32, bias=value_bias)
        sums = _mixing_sums(grads, grad_mixed, value, None, local_weight, local_bias, tf32).sum((0, 1))
        of_proj, grad_local_bias, grad_local_weight = sums.split((channels + 1, 1, TAPS.value), 1)
        totals[2:] = grad_local_weight, grad_local_bias, *of_proj.split((channels, 1), 1)
    tensors = value_weight, value_bias, local_weight, local_bias, proj_weight, proj_bias
    return grad_x and grad_x.data, *_rounded(totals, tensors, needs[1:])


def local_global_mixing_forward(
    x: torch.Tensor,
    value: torch.Tensor,
    attended: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    rescale: torch.Tensor,
    rebias: torch.Tensor,
    tf32: bool,
) -> torch.Tensor:
    """y [B, C, H, W] of three maps, weights as in :func:`local_mixing_forward`, rescale and rebias [B, C]."""
    _check(x)
    weights = local_weight, local_bias, proj_weight, proj_bias
    return _mixing(as_map(x), as_map(value), as_map(attended), weights, (rescale, rebias), tf32)


def local_global_mixing_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    value: torch.Tensor,
    attended: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    rescale: torch.Tensor,
    rebias: torch.Tensor,
    needs: Sequence[bool],
    tf32: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the forward's tensors in their order, None for one that is not needed and for x.

    x is only added: its gradient is the incoming one.
    """
    _check(x)
    channels = x.shape[1]
    _, needs_value, needs_attended, *needs_rest = needs
    grads, grad_value = as_map(grad), empty_map(value) if needs_value else None
    totals: Sequence[torch.Tensor | None] = [None] * 6
    if any(needs):
        grad_mixed = _product(grads, proj_weight, empty_map(attended), tf32, scale=rescale, transposed=True)
    if needs_value:
        _grad_value(grad_mixed, local_weight, grad_value)
    if any(needs_rest):
        maps = grads, grad_mixed, as_map(value), as_map(attended)
        sums = _mixing_sums(*maps, local_weight, local_bias, tf32).sum(1)
        products, *of_local = sums.split((channels + 1, 1, TAPS.value), 2)
        grad_local_bias, grad_local_weight = (of_samples.sum(0) for of_samples in of_local)
        of_proj = (rescale[..., None] * products).sum(0)
        grad_rescale = (torch.cat([proj_weight, proj_bias[:, None]], 1) * products).sum(2)
        totals = grad_local_weight, grad_local_bias, *of_proj.split((channels, 1), 1), grad_rescale, products[..., -1]
    tensors = local_weight, local_bias, proj_weight, proj_bias, rescale, rebias
    grad_attended = grad_mixed.data if needs_attended else None
    return None, grad_value and grad_value.data, grad_attended, *_rounded(totals, tensors, needs_rest)


def normalized_qkv_forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    query_key_weight: torch.Tensor,
    query_key_bias: torch.Tensor,
    tf32: bool,
) -> tuple[torch.Tensor, ...]:
    """value [B, C, H, W], query and key [B, 2C, H, W], μ and σ [B] of x, norm_weight and norm_bias [C] and so on."""
    _check(x)
    batch, channels, height, width = x.shape
    inputs, value, query_key = as_map(x), empty_map(x), empty_map(x, 2 * channels)
    mean, deviation = x.new_empty(batch), x.new_empty(batch)
    moments = _moments(inputs)
    weights = norm_weight, norm_bias, value_weight, value_bias, query_key_weight, query_key_bias
    blocks = _configuration("qkv_forward", x, tf32, BLOCK_O=2 * channels)
    launch(
        _normalized_qkv_kernel,
        batch * triton.cdiv(height * width, blocks["BLOCK_P"]),
        *(inputs.data, moments.data, *_contiguous(*weights), value.data, query_key.data, mean, deviation),
        *(height * width, moments.splits, moments.pixels),
        *strides(inputs, value, query_key),
        X_STRIDE_P=inputs.stride_p,
        VALUE_STRIDE_P=value.stride_p,
        QUERY_KEY_STRIDE_P=query_key.stride_p,
        OFFSET=offset_type(inputs, value, query_key),
        CHANNELS=channels,
        **_product_options(x, tf32),
        **blocks,
        BLOCK_S=triton.next_power_of_2(moments.splits),
    )
    return value.data, query_key.data, mean, deviation


def normalized_qkv_backward(
    grad_value: torch.Tensor,
    grad_query_key: torch.Tensor,
    grad_mean: torch.Tensor,
    grad_deviation: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    query_key_weight: torch.Tensor,
    query_key_bias: torch.Tensor,
    needs: Sequence[bool],
    tf32: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the forward's tensors in their order, None for one that is not needed."""
    _check(x)
    batch, channels, height, width = x.shape
    grad_x = empty_map(x) if needs[0] else None
    totals: Sequence[torch.Tensor | None] = [None] * 6
    if any(needs):
        inputs, of_value, of_query_key = as_map(x), as_map(grad_value), as_map(grad_query_key)
        moments = _moments(inputs)
        products, grads = _sums_of_product([of_value, of_query_key], inputs, moments, tf32).split((channels, 1), 2)
        projection = torch.cat([value_weight, query_key_weight])
        norm_sums = torch.stack([(projection * products).sum(1), (projection * grads).sum(1)], 1)
    if needs[0]:
        blocks = _configuration("qkv_grad_x", x, tf32, BLOCK_O=2 * channels)
        launch(
            _normalized_qkv_grad_x_kernel,
            batch * triton.cdiv(height * width, blocks["BLOCK_P"]),
            *(of_value.data, of_query_key.data, *_contiguous(grad_mean, grad_deviation), inputs.data, moments.data),
            *(norm_sums, *_contiguous(norm_weight, value_weight, query_key_weight), grad_x.data),
            *(height * width, moments.splits, moments.pixels),
            *strides(of_value, of_query_key, inputs, grad_x),
            GRAD_VALUE_STRIDE_P=of_value.stride_p,
            GRAD_QUERY_KEY_STRIDE_P=of_query_key.stride_p,
            X_STRIDE_P=inputs.stride_p,
            GRAD_X_STRIDE_P=grad_x.stride_p,
            OFFSET=offset_type(of_value, of_query_key, inputs, grad_x),
            CHANNELS=channels,
            **_product_options(x, tf32),
            **blocks,
            BLOCK_S=triton.next_power_of_2(moments.splits),
        )
    if any(needs[1:]):
        products, grads = products.sum(0), grads.sum(0)
        grad_norm_weight, grad_norm_bias = norm_sums.sum(0)
        of_weights, of_biases = (
            of_projection.split((channels, 2 * channels))
            for of_projection in (norm_weight * products + norm_bias * grads, grads)
        )
        totals = grad_norm_weight, grad_norm_bias, of_weights[0], of_biases[0], of_weights[1], of_biases[1]
    tensors = norm_weight, norm_bias, value_weight, value_bias, query_key_weight, query_key_bias
    return grad_x and grad_x.data, *_rounded(totals, tensors, needs[1:])


class Moments(NamedTuple):
    """Of parts of every sample, from which its mean and deviation follow.

    Attributes:
        data: mean and sum of squared distances from it, [B, splits, 2] float32.
        splits: parts of a sample.
        pixels: of a part; the last one may have fewer.
    """

    data: torch.Tensor
    splits: int
    pixels: int


def _moments(x: Map) -> Moments:
    """First stage of mean and deviation of every sample."""
    batch, channels, height, width = x.data.shape
    blocks = _elementwise_configuration("moments", x)
    blocks["BLOCK_C"] = power_of_two(channels, at_most=MAX_CHANNELS)
    tiles = triton.cdiv(height * width, blocks["BLOCK_P"])
    parts = divide(batch, tiles, max(batch, blocks.pop("programs")), tiles)
    moments = x.data.new_empty(batch, parts.splits, 2, dtype=torch.float32)
    launch(
        _moments_kernel,
        parts.count,
        *(x.data, moments, height * width, parts.splits, parts.tiles),
        *strides(x),
        X_STRIDE_P=x.stride_p,
        OFFSET=offset_type(x),
        CHANNELS=channels,
        **blocks,
    )
    return Moments(moments, parts.splits, parts.tiles * blocks["BLOCK_P"])


def _sums_of_product(grads: Sequence[Map], x: Map, moments: Moments | None, tf32: bool) -> torch.Tensor:
    """Σ g·xᵀ and Σ g of each sample, float32 [B, channels of all grads g, C + 1]; with moments, of x̂ in place of x."""
    batch, channels, height, width = x.data.shape
    rows = [grad.data.shape[1] for grad in grads]
    blocks = _configuration("product_sums", x.data, tf32, BLOCK_O=max(rows))
    tiles = triton.cdiv(height * width, blocks["BLOCK_P"])
    wanted = blocks.pop("programs") / triton.cdiv(max(rows), blocks["BLOCK_O"])
    parts = divide(batch, tiles, max(batch, wanted), PIXELS_IN_SEQUENCE // blocks["BLOCK_P"])
    sums = x.data.new_empty(batch, parts.splits, sum(rows), channels + 1, dtype=torch.float32)
    for grad, own_sums in zip(grads, sums.split(rows, 2), strict=True):
        outputs = grad.data.shape[1]
        block = power_of_two(outputs, at_most=blocks["BLOCK_O"])
        launch(
            _product_sums_kernel,
            parts.count * triton.cdiv(outputs, block),
            *(grad.data, x.data, moments and moments.data, own_sums, height * width, parts.splits, parts.tiles),
            *((moments.splits, moments.pixels) if moments else (0, 0)),
            *strides(grad, x),
            GRAD_STRIDE_P=grad.stride_p,
            X_STRIDE_P=x.stride_p,
            OFFSET=offset_type(grad, x),
            CHANNELS=channels,
            OUTPUTS=outputs,
            ROWS=sum(rows),
            NORMALIZED=moments is not None,
            **_product_options(x.data, tf32),
            **blocks | {"BLOCK_O": block, "BLOCK_S": triton.next_power_of_2(moments.splits) if moments else 1},
        )
    return sums.sum(1)


def _product(
    x: Map,
    weight: torch.Tensor,
    result: Map,
    tf32: bool,
    *,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    scale: torch.Tensor | None = None,
    residual: Map | None = None,
) -> Map:
    """``result``, to which weight·x + bias is written; ``transposed``: weightᵀ·(scale ⊙ x) + residual."""
    batch, channels, height, width = x.data.shape
    blocks = _configuration("product", x.data, tf32, BLOCK_K=channels)
    launch(
        _product_kernel,
        batch * triton.cdiv(height * width, blocks["BLOCK_P"]),
        *(x.data, *_contiguous(scale, weight, bias), residual and residual.data, result.data, height * width),
        *strides(x, residual, result),
        X_STRIDE_P=x.stride_p,
        RESIDUAL_STRIDE_P=_stride_p(residual),
        Y_STRIDE_P=result.stride_p,
        OFFSET=offset_type(x, residual, result),
        CHANNELS=channels,
        TRANSPOSED=transposed,
        HAS_SCALE=scale is not None,
        HAS_RESIDUAL=residual is not None,
        **_product_options(x.data, tf32),
        **blocks,
    )
    return result


def _grad_value(grad_mixed: Map, local_weight: torch.Tensor, result: Map) -> Map:
    """``result``, to which ∂value is written."""
    batch, channels, height, width = result.data.shape
    blocks = _elementwise_configuration("grad_value", grad_mixed)
    launch(
        _grad_value_kernel,
        batch * triton.cdiv(channels, blocks["BLOCK_C"]) * _tiles(result.data, blocks),
        *(grad_mixed.data, local_weight.contiguous(), result.data, height, width),
        *strides(grad_mixed, result),
        GRAD_MIXED_STRIDE_P=grad_mixed.stride_p,
        GRAD_VALUE_STRIDE_P=result.stride_p,
        OFFSET=offset_type(grad_mixed, result),
        CHANNELS=channels,
        **blocks,
    )
    return result


def _mixing(
    x: Map,
    value: Map,
    attended: Map | None,
    weights: Sequence[torch.Tensor],
    affine: tuple[torch.Tensor | None, torch.Tensor | None],
    tf32: bool,
) -> torch.Tensor:
    """y of local mixing: the local and the projection's weights and biases, rescale and rebias."""
    y = empty_map(x.data)
    blocks = _configuration("mixing_forward", x.data, tf32, BLOCK_K=x.data.shape[1])
    launch(
        _mixing_kernel,
        len(x.data) * _tiles(x.data, blocks),
        *(x.data, value.data, attended and attended.data, *_contiguous(*weights, *affine), y.data, *x.data.shape[2:]),
        *strides(x, value, attended, y),
        X_STRIDE_P=x.stride_p,
        VALUE_STRIDE_P=value.stride_p,
        ATTENDED_STRIDE_P=_stride_p(attended),
        Y_STRIDE_P=y.stride_p,
        OFFSET=offset_type(x, value, attended, y),
        CHANNELS=x.data.shape[1],
        HAS_ATTENTION=attended is not None,
        **_product_options(x.data, tf32),
        **blocks,
    )
    return y.data


def _mixing_sums(
    grad: Map,
    grad_mixed: Map,
    value: Map,
    attended: Map | None,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    tf32: bool,
) -> torch.Tensor:
    """First sums of the gradients of all weights behind value, [B, splits, C, C + 27] in float32."""
    batch, channels, height, width = value.data.shape
    blocks = _configuration("mixing_sums", value.data, tf32, BLOCK_K=channels)
    groups = triton.cdiv(channels, blocks["BLOCK_K"])
    longest = PIXELS_IN_SEQUENCE // (blocks["BLOCK_H"] * blocks["BLOCK_W"])
    wanted = blocks.pop("programs") / groups
    parts = divide(batch, _tiles(value.data, blocks), max(batch, wanted), longest)
    sums = value.data.new_empty(batch, parts.splits, channels, channels + 2 + TAPS.value, dtype=torch.float32)
    launch(
        _mixing_sums_kernel,
        parts.count * groups,
        *(grad.data, grad_mixed.data, value.data, attended and attended.data),
        *(*_contiguous(local_weight, local_bias), sums, height, width, parts.splits, parts.tiles),
        *strides(grad, grad_mixed, value, attended),
        GRAD_STRIDE_P=grad.stride_p,
        GRAD_MIXED_STRIDE_P=grad_mixed.stride_p,
        VALUE_STRIDE_P=value.stride_p,
        ATTENDED_STRIDE_P=_stride_p(attended),
        OFFSET=offset_type(grad, grad_mixed, value, attended),
        CHANNELS=channels,
        HAS_ATTENTION=attended is not None,
        **_product_options(value.data, tf32),
        **blocks,
    )
    return sums


def _check(x: torch.Tensor) -> None:
    check_pixels("x", x)
    if x.shape[1] > MAX_CHANNELS:
        raise ValueError(f"x: the Triton kernels take at most {MAX_CHANNELS} channels, got {x.shape[1]}")


def _configuration(kernel: str, x: torch.Tensor, tf32: bool, **sides: int) -> dict[str, int]:
    """Tiles of a kernel: all channels of ``x``, and no block longer than one of ``sides`` needs."""
    found = configuration(x.device, FAMILY, kernel, product_kind(x, tf32), x.shape[1])
    blocks = {block: power_of_two(side, at_most=found[block]) for block, side in sides.items()}
    return found | blocks | {"BLOCK_C": power_of_two(x.shape[1], at_most=MAX_CHANNELS)}


def _elementwise_configuration(kernel: str, map: Map) -> dict[str, int]:
    """Tile of a kernel that multiplies no matrices: along pixels or channels, whichever are neighbours."""
    layout = "contiguous" if map.stride_p <= 1 else "channels_last"
    return configuration(map.data.device, FAMILY, kernel, layout, map.data.shape[1])


def _product_options(x: torch.Tensor, tf32: bool) -> dict[str, Any]:
    """How a kernel multiplies matrices."""
    return {"OPERAND": operand_type(x), "PRECISION": precision(x, tf32)}


def _tiles(x: torch.Tensor, blocks: dict[str, int]) -> int:
    """Tiles of BLOCK_H×BLOCK_W pixels in one sample."""
    return triton.cdiv(x.shape[2], blocks["BLOCK_H"]) * triton.cdiv(x.shape[3], blocks["BLOCK_W"])


def _workspace(x: torch.Tensor) -> Map:
    """A channels_last map like ``x``: what lies together at a tap are all channels of a pixel."""
    return as_map(torch.empty_like(x, memory_format=torch.channels_last))


def _stride_p(map: Map | None) -> int:
    return 0 if map is None else map.stride_p


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _rounded(
    totals: Sequence[torch.Tensor | None], tensors: Sequence[torch.Tensor], needs: Sequence[bool]
) -> Iterator[torch.Tensor | None]:
    """Gradients of ``tensors``, in their dtypes and memory of their own, from float32 sums; None where not needed."""
    for total, tensor, needed in zip(totals, tensors, needs, strict=True):
        gradient = torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
        yield gradient.copy_(total.reshape(tensor.shape)) if needed else None
