"""Dynamic filter and predicted dynamic filter, forward and backward.

    y[c, p] = Σ_k filters[c, k](p) · x[c](p + offset_k)  (+ x[c](p)),
    filters[c, k](p) = Σ_f weight[c, k, f] · features[f](p) + bias[c, k]

with zeros outside the image. With g the gradient of y and D[c, k](p) = g[c](p) · x[c](p + offset_k):

    ∂x[c](p)        = Σ_k filters[c, k](p − offset_k) · g[c](p − offset_k)  (+ g[c](p))
    ∂filters        = D
    ∂features[f]    = Σ_c,k weight[c, k, f] · D[c, k]
    ∂weight[c, k, f] = Σ_p D[c, k](p) · features[f](p),   ∂bias[c, k] = Σ_p D[c, k](p)

Predicted filters and D exist as tiles only. Pixels are counted through the whole image, p = h·W + w,
so that narrow images fill their tiles; maps are contiguous or channels_last, which differ in strides
alone. ∂x is the forward with offsets negated and filters taken where g is, hence one kernel for both.
Sums run in float32 in a fixed order, without atomics.
"""

from __future__ import annotations

from math import isqrt

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

FAMILY = "dynamic_filter"


@triton.jit
def _filter_kernel(
    x_ptr,
    filters_ptr,
    y_ptr,
    height,
    width,
    x_stride_n,
    x_stride_c,
    filters_stride_n,
    filters_stride_c,
    y_stride_n,
    y_stride_c,
    X_STRIDE_P: tl.constexpr,
    FILTERS_STRIDE_P: tl.constexpr,
    Y_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y from x and given filters; with TRANSPOSED, ∂x from g in the place of x.

    Grid: batch × channel groups × pixel tiles, tiles fastest. A program owns BLOCK_P pixels of BLOCK_C
    channels and sums over the taps in float32.
    """
    DILATION: tl.constexpr = -1 if TRANSPOSED else 1
    tiles = tl.cdiv(height * width, BLOCK_P)
    groups: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    plane = tl.program_id(0) // tiles
    n = (plane // groups).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h = p // width
    w = p % width
    c = plane % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    has_channel = (c < CHANNELS)[None, :]
    own = (p < height * width)[:, None] & has_channel
    p_offsets = p.to(OFFSET)[:, None]
    c_offsets = c.to(OFFSET)[None, :]
    x_ptr += n * x_stride_n
    x_offsets = p_offsets * X_STRIDE_P + c_offsets * x_stride_c
    filters_ptr += n * filters_stride_n
    filters_offsets = p_offsets * FILTERS_STRIDE_P + c_offsets * KERNEL * KERNEL * filters_stride_c
    y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if RESIDUAL:
        y += tl.load(x_ptr + x_offsets, mask=own, other=0.0).to(tl.float32)
    for row in range(KERNEL):
        for column in tl.static_range(KERNEL):
            distance, inside = neighbour(h, w, row * KERNEL + column, height, width, KERNEL, DILATION, OFFSET)
            inside = inside[:, None] & has_channel
            neighbours = tl.load(x_ptr + distance * X_STRIDE_P + x_offsets, mask=inside, other=0.0)
            if TRANSPOSED:
                filters = tl.load(filters_ptr + distance * FILTERS_STRIDE_P + filters_offsets, mask=inside, other=0.0)
            else:
                filters = tl.load(filters_ptr + filters_offsets, mask=own, other=0.0)
            filters_ptr += filters_stride_c
            y += filters.to(tl.float32) * neighbours.to(tl.float32)
    y_offsets = p_offsets * Y_STRIDE_P + c_offsets * y_stride_c
    tl.store(y_ptr + n * y_stride_n + y_offsets, y.to(y_ptr.dtype.element_ty), mask=own)


@triton.jit
def _grad_filters_kernel(
    grad_ptr,
    x_ptr,
    grad_filters_ptr,
    height,
    width,
    grad_stride_n,
    grad_stride_c,
    x_stride_n,
    x_stride_c,
    grad_filters_stride_n,
    grad_filters_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    GRAD_FILTERS_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """∂filters. Grid and ownership as in :func:`_filter_kernel`; nothing is accumulated."""
    tiles = tl.cdiv(height * width, BLOCK_P)
    groups: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    plane = tl.program_id(0) // tiles
    n = (plane // groups).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h = p // width
    w = p % width
    c = plane % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    has_channel = (c < CHANNELS)[None, :]
    own = (p < height * width)[:, None] & has_channel
    p_offsets = p.to(OFFSET)[:, None]
    c_offsets = c.to(OFFSET)[None, :]
    grad_offsets = p_offsets * GRAD_STRIDE_P + c_offsets * grad_stride_c
    grad = tl.load(grad_ptr + n * grad_stride_n + grad_offsets, mask=own, other=0.0).to(tl.float32)
    x_ptr += n * x_stride_n
    x_offsets = p_offsets * X_STRIDE_P + c_offsets * x_stride_c
    grad_filters_ptr += n * grad_filters_stride_n
    grad_filters_offsets = p_offsets * GRAD_FILTERS_STRIDE_P + c_offsets * KERNEL * KERNEL * grad_filters_stride_c
    for row in range(KERNEL):
        for column in tl.static_range(KERNEL):
            distance, inside = neighbour(h, w, row * KERNEL + column, height, width, KERNEL, 1, OFFSET)
            x_ptrs = x_ptr + distance * X_STRIDE_P + x_offsets
            neighbours = tl.load(x_ptrs, mask=inside[:, None] & has_channel, other=0.0)
            product = grad * neighbours.to(tl.float32)
            product = product.to(grad_filters_ptr.dtype.element_ty)
            tl.store(grad_filters_ptr + grad_filters_offsets, product, mask=own)
            grad_filters_ptr += grad_filters_stride_c


@triton.jit
def _predicted_filter_kernel(
    x_ptr,
    features_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    x_stride_n,
    x_stride_c,
    features_stride_n,
    features_stride_c,
    bias_stride_n,
    y_stride_n,
    y_stride_c,
    X_STRIDE_P: tl.constexpr,
    FEATURES_STRIDE_P: tl.constexpr,
    Y_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """y from x and the features that predict the filters; with TRANSPOSED, ∂x from g in the place of x.

    Grid: batch × pixel tiles × channel groups, groups fastest, since they share the features. A program
    owns BLOCK_P pixels of BLOCK_C channels. Per tap it multiplies features [BLOCK_P, FEATURES] with that
    tap's weight [FEATURES, BLOCK_C] and weighs the neighbours with the product, all sums in float32.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    DILATION: tl.constexpr = -1 if TRANSPOSED else 1
    tiles = tl.cdiv(height * width, BLOCK_P)
    groups: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pixel_tile = tl.program_id(0) // groups
    n = (pixel_tile // tiles).to(tl.int64)
    p = pixel_tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h = p // width
    w = p % width
    c = tl.program_id(0) % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    in_image = (p < height * width)[:, None]
    has_channel = (c < CHANNELS)[None, :]
    p_offsets = p.to(OFFSET)[:, None]
    c_offsets = c.to(OFFSET)[None, :]
    x_ptr += n * x_stride_n
    x_offsets = p_offsets * X_STRIDE_P + c_offsets * x_stride_c
    features_ptr += n * features_stride_n
    y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if RESIDUAL:
        y += tl.load(x_ptr + x_offsets, mask=in_image & has_channel, other=0.0).to(tl.float32)
    for tap in range(TAPS):
        distance, inside = neighbour(h, w, tap, height, width, KERNEL, DILATION, OFFSET)
        filters = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for first in range(0, FEATURES, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            has_feature = f < FEATURES
            features_offsets = p_offsets * FEATURES_STRIDE_P + f.to(OFFSET)[None, :] * features_stride_c
            if TRANSPOSED:
                features_ptrs = features_ptr + distance * FEATURES_STRIDE_P + features_offsets
                features = tl.load(features_ptrs, mask=inside[:, None] & has_feature[None, :], other=0.0)
            else:
                features = tl.load(features_ptr + features_offsets, mask=in_image & has_feature[None, :], other=0.0)
            weight_ptrs = weight_ptr + tap * FEATURES + c[None, :] * (TAPS * FEATURES) + f[:, None]
            weight = tl.load(weight_ptrs, mask=has_channel & has_feature[:, None], other=0.0)
            filters = tl.dot(features.to(OPERAND), weight.to(OPERAND), filters, input_precision=PRECISION)
        if HAS_BIAS:
            bias_ptrs = bias_ptr + n * bias_stride_n + c * TAPS + tap
            filters += tl.load(bias_ptrs, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]
        x_ptrs = x_ptr + distance * X_STRIDE_P + x_offsets
        neighbours = tl.load(x_ptrs, mask=inside[:, None] & has_channel, other=0.0)
        y += filters * neighbours.to(tl.float32)
    y_offsets = p_offsets * Y_STRIDE_P + c_offsets * y_stride_c
    tl.store(y_ptr + n * y_stride_n + y_offsets, y.to(y_ptr.dtype.element_ty), mask=in_image & has_channel)


@triton.jit
def _grad_features_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    grad_features_ptr,
    height,
    width,
    grad_stride_n,
    grad_stride_c,
    x_stride_n,
    x_stride_c,
    grad_features_stride_n,
    grad_features_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    GRAD_FEATURES_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    KERNEL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """∂features = Dᵀ·weight, D built one tap at a time and rounded to the dtype of x.

    Grid: batch × pixel tiles × feature groups, groups fastest. A program owns BLOCK_P pixels of BLOCK_F
    features and sums over channels and taps in float32.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    tiles = tl.cdiv(height * width, BLOCK_P)
    groups: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    pixel_tile = tl.program_id(0) // groups
    n = (pixel_tile // tiles).to(tl.int64)
    p = pixel_tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h = p // width
    w = p % width
    f = tl.program_id(0) % groups * BLOCK_F + tl.arange(0, BLOCK_F)
    p_offsets = p.to(OFFSET)[:, None]
    in_image = (p < height * width)[:, None]
    has_feature = (f < FEATURES)[None, :]
    grad_ptr += n * grad_stride_n
    x_ptr += n * x_stride_n
    grad_features = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        has_channel = (c < CHANNELS)[None, :]
        c_offsets = c.to(OFFSET)[None, :]
        grad_ptrs = grad_ptr + p_offsets * GRAD_STRIDE_P + c_offsets * grad_stride_c
        grad = tl.load(grad_ptrs, mask=in_image & has_channel, other=0.0).to(tl.float32)
        x_offsets = p_offsets * X_STRIDE_P + c_offsets * x_stride_c
        for tap in range(TAPS):
            distance, inside = neighbour(h, w, tap, height, width, KERNEL, 1, OFFSET)
            x_ptrs = x_ptr + distance * X_STRIDE_P + x_offsets
            neighbours = tl.load(x_ptrs, mask=inside[:, None] & has_channel, other=0.0)
            products = (grad * neighbours.to(tl.float32)).to(x_ptr.dtype.element_ty)
            weight_ptrs = weight_ptr + tap * FEATURES + c[:, None] * (TAPS * FEATURES) + f[None, :]
            weight = tl.load(weight_ptrs, mask=(c < CHANNELS)[:, None] & has_feature, other=0.0)
            grad_features = tl.dot(products.to(OPERAND), weight.to(OPERAND), grad_features, input_precision=PRECISION)
    grad_features_ptr += n * grad_features_stride_n
    offsets = p_offsets * GRAD_FEATURES_STRIDE_P + f.to(OFFSET)[None, :] * grad_features_stride_c
    grad_features = grad_features.to(grad_features_ptr.dtype.element_ty)
    tl.store(grad_features_ptr + offsets, grad_features, mask=in_image & has_feature)


@triton.jit(do_not_specialize=["batch", "samples", "splits", "tiles_per_split"])
def _grad_weight_kernel(
    grad_ptr,
    x_ptr,
    features_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
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
    features_stride_n,
    features_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    X_STRIDE_P: tl.constexpr,
    FEATURES_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    KERNEL: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """First stage of ∂weight and ∂bias: sums over the pixels of one program.

    The pairs (channel, tap) are rows of D [rows, pixels]; ∂weight is its product with features
    [pixels, FEATURES]. Grid: parts × row groups × feature groups, feature groups fastest. A part is
    either ``tiles_per_split`` pixel tiles of one sample (``samples`` = 1) or all of ``samples`` samples
    (``splits`` = 1). Writes weight_sums [parts, CHANNELS·K², FEATURES] and
    bias_sums [batch, splits, CHANNELS·K²], both float32.

    CHANNEL_MAJOR orders the rows as the weight has them, so that a group reads few channels (contiguous
    maps); otherwise neighbouring rows are neighbouring channels (channels_last maps).
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    row_groups: tl.constexpr = (CHANNELS * TAPS + BLOCK_R - 1) // BLOCK_R
    feature_groups: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    feature_group = tl.program_id(0) % feature_groups
    part = tl.program_id(0) // (feature_groups * row_groups)
    split = part % splits
    row = tl.program_id(0) // feature_groups % row_groups * BLOCK_R + tl.arange(0, BLOCK_R)
    if CHANNEL_MAJOR:
        c = row // TAPS
        tap = row % TAPS
    else:
        c = row % CHANNELS
        tap = row // CHANNELS
    has_row = row < CHANNELS * TAPS
    f = feature_group * BLOCK_F + tl.arange(0, BLOCK_F)
    has_feature = (f < FEATURES)[None, :]
    grad_offsets = c.to(OFFSET)[None, :] * grad_stride_c
    x_offsets = c.to(OFFSET)[None, :] * x_stride_c
    features_offsets = f.to(OFFSET)[None, :] * features_stride_c
    first_sample = part // splits * samples
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(height * width, BLOCK_P))
    weight_sums = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    n = first_sample.to(tl.int64)
    for _ in range(tl.minimum(samples, batch - first_sample)):
        bias_sums = tl.zeros((BLOCK_R,), tl.float32)
        for tile in range(first_tile, last_tile):
            p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            h = p // width
            w = p % width
            p_offsets = p.to(OFFSET)[:, None]
            in_image = (p < height * width)[:, None]
            grad_ptrs = grad_ptr + n * grad_stride_n + p_offsets * GRAD_STRIDE_P + grad_offsets
            grad = tl.load(grad_ptrs, mask=in_image & has_row[None, :], other=0.0)
            distance, inside = neighbour(h[:, None], w[:, None], tap[None, :], height, width, KERNEL, 1, OFFSET)
            x_ptrs = x_ptr + n * x_stride_n + (p_offsets + distance) * X_STRIDE_P + x_offsets
            neighbours = tl.load(x_ptrs, mask=inside & has_row[None, :], other=0.0)
            products = grad.to(tl.float32) * neighbours.to(tl.float32)
            if NEEDS_BIAS:
                bias_sums += tl.sum(products, axis=0)
            if NEEDS_WEIGHT:
                features_ptrs = features_ptr + n * features_stride_n + p_offsets * FEATURES_STRIDE_P + features_offsets
                features = tl.load(features_ptrs, mask=in_image & has_feature, other=0.0)
                products = tl.trans(products.to(x_ptr.dtype.element_ty).to(OPERAND))
                weight_sums = tl.dot(products, features.to(OPERAND), weight_sums, input_precision=PRECISION)
        if NEEDS_BIAS:
            bias_sums_ptrs = bias_sums_ptr + (n * splits + split) * (CHANNELS * TAPS) + c * TAPS + tap
            tl.store(bias_sums_ptrs, bias_sums, mask=row < tl.where(feature_group == 0, CHANNELS * TAPS, 0))
        n += 1
    if NEEDS_WEIGHT:
        rows = part.to(tl.int64) * (CHANNELS * TAPS) + c * TAPS + tap
        weight_sums_ptrs = weight_sums_ptr + rows[:, None] * FEATURES + f[None, :]
        tl.store(weight_sums_ptrs, weight_sums, mask=has_row[:, None] & has_feature)


def dynamic_filter_forward(x: torch.Tensor, filters: torch.Tensor, residual: bool) -> torch.Tensor:
    """y [B, C, H, W] of x and filters [B, C·K², H, W]."""
    return _filter(x, filters, residual, transposed=False)


def dynamic_filter_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    filters: torch.Tensor,
    residual: bool,
    needs_x: bool,
    needs_filters: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and filters, None for one that is not needed."""
    grad_x = _filter(grad, filters, residual, transposed=True, like=x) if needs_x else None
    return grad_x, _grad_filters(grad, x, filters) if needs_filters else None


def predicted_dynamic_filter_forward(
    x: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: bool,
    tf32: bool,
) -> torch.Tensor:
    """y [B, C, H, W] of x, features [B, Cf, H, W], weight [C·K², Cf] and bias [C·K²] or [B, C·K²].

    ``tf32`` lets the product of float32 features and weight run in TF32.
    """
    return _predicted_filter(x, features, weight, bias, residual, tf32, transposed=False)


def predicted_dynamic_filter_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: bool,
    tf32: bool,
    needs_x: bool,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, features, weight and bias, None for one that is not needed."""
    grad_x = grad_features = grad_weight = grad_bias = None
    if needs_x:
        grad_x = _predicted_filter(grad, features, weight, bias, residual, tf32, transposed=True, like=x)
    if needs_features:
        grad_features = _grad_features(grad, x, features, weight, tf32)
    if needs_weight or needs_bias:
        weight_sums, bias_sums = _grad_weight(grad, x, features, weight, tf32, needs_weight, needs_bias)
        if needs_weight:
            grad_weight = weight_sums.sum(0).to(weight.dtype)
        if needs_bias:
            grad_bias = bias_sums.sum((0, 1) if bias.dim() == 1 else 1).to(bias.dtype)
    return grad_x, grad_features, grad_weight, grad_bias


def _filter(
    x: torch.Tensor, filters: torch.Tensor, residual: bool, *, transposed: bool, like: torch.Tensor | None = None
) -> torch.Tensor:
    """y; ``transposed``: the gradient of x, laid out as ``like``, from that of y in the place of x."""
    check_pixels("x", x)
    batch, channels, height, width = x.shape
    inputs, taps, y = as_map(x), as_map(filters), empty_map(x if like is None else like)
    blocks = _elementwise_configuration("filter", taps, channels)
    launch(
        _filter_kernel,
        batch * triton.cdiv(height * width, blocks["BLOCK_P"]) * triton.cdiv(channels, blocks["BLOCK_C"]),
        *(inputs.data, taps.data, y.data, height, width),
        *strides(inputs, taps, y),
        X_STRIDE_P=inputs.stride_p,
        FILTERS_STRIDE_P=taps.stride_p,
        Y_STRIDE_P=y.stride_p,
        OFFSET=offset_type(inputs, taps, y),
        CHANNELS=channels,
        KERNEL=isqrt(filters.shape[1] // channels),
        TRANSPOSED=transposed,
        RESIDUAL=residual,
        **blocks,
    )
    return y.data


def _grad_filters(grad: torch.Tensor, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Gradient of given filters."""
    check_pixels("x", x)
    batch, channels, height, width = x.shape
    grads, inputs, grad_filters = as_map(grad), as_map(x), empty_map(filters)
    blocks = _elementwise_configuration("grad_filters", grad_filters, channels)
    launch(
        _grad_filters_kernel,
        batch * triton.cdiv(height * width, blocks["BLOCK_P"]) * triton.cdiv(channels, blocks["BLOCK_C"]),
        *(grads.data, inputs.data, grad_filters.data, height, width),
        *strides(grads, inputs, grad_filters),
        GRAD_STRIDE_P=grads.stride_p,
        X_STRIDE_P=inputs.stride_p,
        GRAD_FILTERS_STRIDE_P=grad_filters.stride_p,
        OFFSET=offset_type(grads, inputs, grad_filters),
        CHANNELS=channels,
        KERNEL=isqrt(filters.shape[1] // channels),
        **blocks,
    )
    return grad_filters.data


def _elementwise_configuration(kernel: str, filters: Map, channels: int) -> dict[str, int]:
    """Tile of a kernel that multiplies no matrices: along pixels or channels, whichever are neighbours."""
    layout = "contiguous" if filters.stride_p == 1 else "channels_last"
    return configuration(filters.data.device, FAMILY, kernel, layout, channels)


def _predicted_filter(
    x: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: bool,
    tf32: bool,
    *,
    transposed: bool,
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """y; ``transposed``: the gradient of x, laid out as ``like``, from that of y in the place of x."""
    check_pixels("x", x)
    batch, channels, height, width = x.shape
    inputs, predictors, y = as_map(x), as_map(features), empty_map(x if like is None else like)
    kernel = "grad_x" if transposed else "forward"
    blocks = _product_configuration(kernel, x, weight, tf32, BLOCK_C=channels, BLOCK_F=features.shape[1])
    bias = None if bias is None else bias.contiguous()
    launch(
        _predicted_filter_kernel,
        batch * triton.cdiv(height * width, blocks["BLOCK_P"]) * triton.cdiv(channels, blocks["BLOCK_C"]),
        *(inputs.data, predictors.data, weight.contiguous(), bias, y.data, height, width),
        *strides(inputs, predictors),
        bias.stride(0) if bias is not None and bias.dim() == 2 else 0,
        *strides(y),
        X_STRIDE_P=inputs.stride_p,
        FEATURES_STRIDE_P=predictors.stride_p,
        Y_STRIDE_P=y.stride_p,
        OFFSET=offset_type(inputs, predictors, y),
        CHANNELS=channels,
        FEATURES=features.shape[1],
        KERNEL=isqrt(weight.shape[0] // channels),
        HAS_BIAS=bias is not None,
        TRANSPOSED=transposed,
        RESIDUAL=residual,
        OPERAND=operand_type(x),
        PRECISION=precision(x, tf32),
        **blocks,
    )
    return y.data


def _grad_features(
    grad: torch.Tensor, x: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, tf32: bool
) -> torch.Tensor:
    """Gradient of the features."""
    check_pixels("x", x)
    batch, channels, height, width = x.shape
    grads, inputs, grad_features = as_map(grad), as_map(x), empty_map(features)
    blocks = _product_configuration("grad_features", x, weight, tf32, BLOCK_C=channels, BLOCK_F=features.shape[1])
    launch(
        _grad_features_kernel,
        batch * triton.cdiv(height * width, blocks["BLOCK_P"]) * triton.cdiv(features.shape[1], blocks["BLOCK_F"]),
        *(grads.data, inputs.data, weight.contiguous(), grad_features.data, height, width),
        *strides(grads, inputs, grad_features),
        GRAD_STRIDE_P=grads.stride_p,
        X_STRIDE_P=inputs.stride_p,
        GRAD_FEATURES_STRIDE_P=grad_features.stride_p,
        OFFSET=offset_type(grads, inputs, grad_features),
        CHANNELS=channels,
        FEATURES=features.shape[1],
        KERNEL=isqrt(weight.shape[0] // channels),
        OPERAND=operand_type(x),
        PRECISION=precision(x, tf32),
        **blocks,
    )
    return grad_features.data


def _grad_weight(
    grad: torch.Tensor,
    x: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    tf32: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Float32 partial sums of the gradients of weight [parts, C·K², Cf] and bias [B, splits, C·K²]."""
    check_pixels("x", x)
    batch, channels, height, width = x.shape
    rows, feature_channels = weight.shape
    grads, inputs, predictors = as_map(grad), as_map(x), as_map(features)
    blocks = _product_configuration("grad_weight", x, weight, tf32, BLOCK_R=rows, BLOCK_F=feature_channels)
    groups = triton.cdiv(rows, blocks["BLOCK_R"]) * triton.cdiv(feature_channels, blocks["BLOCK_F"])
    tiles = triton.cdiv(height * width, blocks["BLOCK_P"])
    parts = divide(batch, tiles, blocks.pop("programs") / groups, PIXELS_IN_SEQUENCE // blocks["BLOCK_P"])
    weight_sums = x.new_empty(parts.count, rows, feature_channels, dtype=torch.float32) if needs_weight else None
    bias_sums = x.new_empty(batch, parts.splits, rows, dtype=torch.float32) if needs_bias else None
    launch(
        _grad_weight_kernel,
        parts.count * groups,
        *(grads.data, inputs.data, predictors.data, weight_sums, bias_sums, batch, height, width),
        *(parts.samples, parts.splits, parts.tiles),
        *strides(grads, inputs, predictors),
        GRAD_STRIDE_P=grads.stride_p,
        X_STRIDE_P=inputs.stride_p,
        FEATURES_STRIDE_P=predictors.stride_p,
        OFFSET=offset_type(grads, inputs, predictors),
        CHANNELS=channels,
        FEATURES=feature_channels,
        KERNEL=isqrt(rows // channels),
        CHANNEL_MAJOR=inputs.stride_p == 1,
        NEEDS_WEIGHT=needs_weight,
        NEEDS_BIAS=needs_bias,
        OPERAND=operand_type(x),
        PRECISION=precision(x, tf32),
        **blocks,
    )
    return weight_sums, bias_sums


def _product_configuration(
    kernel: str, x: torch.Tensor, weight: torch.Tensor, tf32: bool, **sides: int
) -> dict[str, int]:
    """Tiles of a kernel that multiplies matrices; none of ``sides`` is longer than its size needs."""
    size = max(x.shape[1], weight.shape[1])
    found = configuration(x.device, FAMILY, kernel, product_kind(x, tf32), size)
    return found | {block: power_of_two(side, at_most=found[block]) for block, side in sides.items()}
