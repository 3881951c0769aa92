"""Amplitude / phase convolution: two 1×1 convolutions on one polar half of the spectrum, forward and backward.

    X = rfft2(x) = A·exp(iP),   M(V) = weight2·leaky(weight1·V + bias1) + bias2
    amplitude: Y = M(A)·X/A     phase: Y = A·exp(i·M(P))
    y = irfft2(output_weight·Y) + output_bias     or irfft2(output_weight·[X, Y]) + output_bias

The transforms are PyTorch's, unscaled; everything between them is one kernel, 1/HW included. Half
spectra are [B, C, H, W//2 + 1, 2] and contiguous; a tile is [channels, bins], with all channels. The
self-conjugate columns, 0 and W/2 (even W), have tiles of their own: there Y(ky) and conj Y(−ky) are
both computed and averaged, so that nothing depends on which half an inverse transform reads. The bias
is added to the mean of the image, bin (0, 0) over HW; its gradient is that bin of rfft2(grad).

With u = X/A, v = exp(i·M(P)), Mᵀ the adjoint of M and G = output_weightᵀ·rfft2(grad)/HW:

    amplitude: g_a = Mᵀ(Re ūG), g_θ = M(A)·Im ūG    phase: g_a = Re v̄G, g_θ = Mᵀ(A·Im v̄G)
    ∂x = irfft2 of u·(g_a + i·g_θ/A), made Hermitian where Y is, unscaled; that of output_weight·[X, Y]
    has the product of its left half with rfft2(grad)/HW too

rfft2(grad) weighs interior columns of ∂Y twice; rfft2's adjoint halves them again, so that the factor
is left in the gradients of the weights alone. Those are summed in float32 in a fixed order, in two
stages. The backward starts from x: nothing of the forward is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import check_pixels, configuration, divide, launch, power_of_two

FAMILY = "amplitude_phase"
MAX_CHANNELS = 256  # of a tile, which a program has on chip
BINS_IN_SEQUENCE = 8192  # at most so many are summed one after another, which bounds the rounding error


@triton.jit
def _bins(tile, height, width, BLOCK_P: tl.constexpr):
    """Row and column of the bins of a tile, which of them exist, and whether they are self-conjugate columns'."""
    edges = tl.minimum(2 - width % 2, width)
    interior = width // 2 + 1 - edges
    edge_tiles = tl.cdiv(height * edges, BLOCK_P)
    edge = tile < edge_tiles
    columns = tl.where(edge, edges, tl.maximum(interior, 1))
    i = tl.where(edge, tile, tile - edge_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = i // columns
    column = tl.where(edge, i % columns * (width // 2), 1 + i % columns)
    return row, column, row < height, edge


@triton.jit
def _tiles(height, width, BLOCK_P: tl.constexpr):
    """Tiles of one sample: of the self-conjugate columns, then of the others."""
    edges = tl.minimum(2 - width % 2, width)
    return tl.cdiv(height * edges, BLOCK_P) + tl.cdiv(height * (width // 2 + 1 - edges), BLOCK_P)


@triton.jit
def _offsets(n, c, row, column, height, width, CHANNELS: tl.constexpr):
    """Offsets [channels, bins, 2] of real and imaginary parts."""
    columns = width // 2 + 1
    planes = (n * CHANNELS + c.to(tl.int64)) * height * columns
    bins = row * columns + column
    return (planes[:, None] + bins[None, :])[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]


@triton.jit
def _load_bins(pointer, n, c, row, column, present, height, width, CHANNELS: tl.constexpr):
    """Real and imaginary part [channels, bins], zeros outside."""
    mask = (c < CHANNELS)[:, None] & present[None, :]
    pairs = tl.load(pointer + _offsets(n, c, row, column, height, width, CHANNELS), mask=mask[:, :, None], other=0.0)
    return tl.split(pairs)


@triton.jit
def _store_bins(pointer, real, imaginary, n, c, row, column, present, height, width, CHANNELS: tl.constexpr):
    mask = (c < CHANNELS)[:, None] & present[None, :]
    offsets = _offsets(n, c, row, column, height, width, CHANNELS)
    tl.store(pointer + offsets, tl.join(real, imaginary), mask=mask[:, :, None])


@triton.jit
def _load_spectrum(pointer, n, c, row, column, present, edge, height, width, CHANNELS: tl.constexpr):
    """X = A·u as (A, Re u, Im u) with A = 0, u = 1 where |X| counts as zero.

    Bins that are real for every real image get an imaginary part of +0.
    """
    real, imaginary = _load_bins(pointer, n, c, row, column, present, height, width, CHANNELS)
    is_real = edge & (2 * row % height == 0)
    imaginary = tl.where(is_real[None, :], 0.0, imaginary)
    largest = tl.maximum(tl.abs(real), tl.abs(imaginary))
    # powers of two bring the squares into float32's range and change no bit of a quotient
    scale = tl.where(largest > 1.15e18, 8.271806125530277e-25, tl.where(largest < 9.1e-13, 1.2089258196146292e24, 1.0))
    unscale = tl.where(
        largest > 1.15e18, 1.2089258196146292e24, tl.where(largest < 9.1e-13, 8.271806125530277e-25, 1.0)
    )
    scaled_real = real * scale
    scaled_imaginary = imaginary * scale
    length = tl.sqrt_rn(scaled_real * scaled_real + scaled_imaginary * scaled_imaginary)
    is_zero = length * unscale < 1e-30
    inverse = tl.div_rn(1.0, tl.where(is_zero, 1.0, length))
    amplitude = tl.where(is_zero, 0.0, length * unscale)
    cosine = tl.where(is_zero, 1.0, scaled_real * inverse)
    sine = tl.where(is_zero, 0.0, scaled_imaginary * inverse)
    return amplitude, cosine, sine


@triton.jit
def _arctangent2(y, x):
    """atan2 to about 1.5 ulp; the sign of y, also of ±0, is that of the result. Not both are zero."""
    tall = tl.abs(y) > tl.abs(x)
    t = tl.div_rn(tl.where(tall, tl.abs(x), tl.abs(y)), tl.where(tall, tl.abs(y), tl.abs(x)))
    s = t * t
    p = 0.0029206876643002033
    p = p * s - 0.01636791042983532
    p = p * s + 0.04321183264255524
    p = p * s - 0.07552212476730347
    p = p * s + 0.10666003823280334
    p = p * s - 0.14211055636405945
    p = p * s + 0.19993773102760315
    p = p * s - 0.33333152532577515
    angle = t * s * p + t
    # π/2 and π as float32 and what that leaves out
    angle = tl.where(tall, (1.5707963705062866 - angle) - 4.371139000186243e-08, angle)
    angle = tl.where(x < 0, (3.1415927410125732 - angle) - 8.742278000372485e-08, angle)
    sign = y.to(tl.int32, bitcast=True) & -0x80000000
    return (angle.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _cosine_and_sine(angle):
    """Both to about 1 ulp of 1. The argument is reduced in float64, which takes phases of any network."""
    quarters = angle.to(tl.float64) * 0.6366197723675814
    whole = tl.floor(quarters)
    whole = tl.where(quarters - whole > 0.5, whole + 1.0, whole)
    quadrant = (whole - 4.0 * tl.floor(whole * 0.25)).to(tl.int32)
    r = ((quarters - whole) * 1.5707963267948966).to(tl.float32)
    z = r * r
    sine = ((-0.0001951463200384751 * z + 0.008332155644893646) * z - 0.16666655242443085) * (r * z) + r
    cosine = ((2.443241282890085e-05 * z - 0.0013887309469282627) * z + 0.04166664555668831) * z - 0.5
    cosine = cosine * z + 1.0
    swapped = quadrant & 1 == 1
    new_cosine = tl.where(swapped, sine, cosine)
    new_sine = tl.where(swapped, cosine, sine)
    new_cosine = tl.where((quadrant + 1) & 2 == 2, -new_cosine, new_cosine)
    return new_cosine, tl.where(quadrant & 2 == 2, -new_sine, new_sine)


@triton.jit
def _matrix(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a contiguous [ROWS, COLUMNS] matrix, zeros outside."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _output_weight(
    pointer, o, c, OF_X: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, SKIP: tl.constexpr
):
    """A tile of what output_weight [OUTPUTS, CHANNELS], with SKIP [OUTPUTS, 2·CHANNELS], has for Y or for X."""
    columns: tl.constexpr = 2 * CHANNELS if SKIP else CHANNELS
    first: tl.constexpr = CHANNELS if SKIP and not OF_X else 0
    mask = (o < OUTPUTS)[:, None] & (c < CHANNELS)[None, :]
    return tl.load(pointer + o[:, None] * columns + first + c[None, :], mask=mask, other=0.0)


@triton.jit
def _hidden(
    values, weight1_ptr, bias1_ptr, c, h, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr
):
    """weight1·values + bias1 [hidden, bins], before the LeakyReLU."""
    weight1 = _matrix(weight1_ptr, h, c, HIDDEN, CHANNELS)
    bias1 = tl.load(bias1_ptr + h, mask=h < HIDDEN, other=0.0)
    return tl.dot(weight1, values, input_precision=PRECISION) + bias1[:, None]


@triton.jit
def _map(
    values,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    c,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """M(values) [channels, bins], a block of hidden channels after the other."""
    bias2 = tl.load(bias2_ptr + c, mask=c < CHANNELS, other=0.0)
    result = tl.zeros_like(values) + bias2[:, None]
    for first in range(0, HIDDEN, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        hidden = _hidden(values, weight1_ptr, bias1_ptr, c, h, CHANNELS, HIDDEN, PRECISION)
        hidden = tl.where(hidden > 0, hidden, NEGATIVE_SLOPE * hidden)
        weight2 = _matrix(weight2_ptr, c, h, CHANNELS, HIDDEN)
        result = tl.dot(weight2, hidden, result, input_precision=PRECISION)
    return result


@triton.jit
def _adjoint(
    grad,
    values,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    c,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Mᵀ(grad) [channels, bins] at the values that M was given."""
    result = tl.zeros_like(values)
    for first in range(0, HIDDEN, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        hidden = _hidden(values, weight1_ptr, bias1_ptr, c, h, CHANNELS, HIDDEN, PRECISION)
        weight2 = tl.trans(_matrix(weight2_ptr, c, h, CHANNELS, HIDDEN))
        grad_hidden = tl.dot(weight2, grad, input_precision=PRECISION)
        grad_hidden = tl.where(hidden > 0, grad_hidden, NEGATIVE_SLOPE * grad_hidden)
        weight1 = tl.trans(_matrix(weight1_ptr, h, c, HIDDEN, CHANNELS))
        result = tl.dot(weight1, grad_hidden, result, input_precision=PRECISION)
    return result


@triton.jit
def _mapped(
    spectrum_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    n,
    c,
    row,
    column,
    present,
    edge,
    height,
    width,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PHASE: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Real and imaginary part of Y [channels, bins]."""
    amplitude, cosine, sine = _load_spectrum(spectrum_ptr, n, c, row, column, present, edge, height, width, CHANNELS)
    values = _arctangent2(sine, cosine) if PHASE else amplitude
    values = _map(
        *(values, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, c),
        *(CHANNELS, HIDDEN, NEGATIVE_SLOPE, PRECISION, BLOCK_H),
    )
    if PHASE:
        cosine, sine = _cosine_and_sine(values)
    else:
        amplitude = values
    return amplitude * cosine, amplitude * sine


@triton.jit
def _load_gradient(
    grad_ptr,
    output_weight_ptr,
    OF_X: tl.constexpr,
    n,
    c,
    row,
    column,
    present,
    height,
    width,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_OUTPUT_WEIGHT: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Real and imaginary part of output_weightᵀ·rfft2(grad) [channels, bins], of its half for Y or for X."""
    if HAS_OUTPUT_WEIGHT:
        real = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        imaginary = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for first in range(0, OUTPUTS, BLOCK_O):
            o = first + tl.arange(0, BLOCK_O)
            grad_real, grad_imaginary = _load_bins(grad_ptr, n, o, row, column, present, height, width, OUTPUTS)
            weight = tl.trans(_output_weight(output_weight_ptr, o, c, OF_X, CHANNELS, OUTPUTS, SKIP))
            real = tl.dot(weight, grad_real, real, input_precision=PRECISION)
            imaginary = tl.dot(weight, grad_imaginary, imaginary, input_precision=PRECISION)
    else:
        real, imaginary = _load_bins(grad_ptr, n, c, row, column, present, height, width, CHANNELS)
    return real, imaginary


@triton.jit
def _forward_kernel(
    spectrum_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    output_weight_ptr,
    output_bias_ptr,
    result_ptr,
    height,
    width,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_OUTPUT_WEIGHT: tl.constexpr,
    HAS_OUTPUT_BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    PHASE: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """The spectrum of y, over HW, from that of x.

    Grid: batch × tiles, tiles fastest. A program owns BLOCK_P bins of all channels (BLOCK_C ≥ CHANNELS);
    for those of self-conjugate columns it also computes Y at their mirror images.
    """
    tiles = _tiles(height, width, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    row, column, present, edge = _bins(tl.program_id(0) % tiles, height, width, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    real = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    imaginary = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for mirrored in range(tl.where(edge, 2, 1)):
        source = tl.where(mirrored == 1, (height - row) % height, row)
        mapped_real, mapped_imaginary = _mapped(
            *(spectrum_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr),
            *(n, c, source, column, present, edge, height, width),
            *(CHANNELS, HIDDEN, PHASE, NEGATIVE_SLOPE, PRECISION, BLOCK_H),
        )
        real += mapped_real
        imaginary += tl.where(mirrored == 1, -mapped_imaginary, mapped_imaginary)
    if SKIP:
        x_real = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        x_imaginary = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for mirrored in range(tl.where(edge, 2, 1)):
            source = tl.where(mirrored == 1, (height - row) % height, row)
            part_real, part_imaginary = _load_bins(
                *(spectrum_ptr, n, c, source, column, present, height, width, CHANNELS)
            )
            x_real += part_real
            x_imaginary += tl.where(mirrored == 1, -part_imaginary, part_imaginary)
    scale = tl.where(edge, 0.5, 1.0) / (height * width)
    if HAS_OUTPUT_WEIGHT:
        for first in range(0, OUTPUTS, BLOCK_O):
            o = first + tl.arange(0, BLOCK_O)
            weight = _output_weight(output_weight_ptr, o, c, False, CHANNELS, OUTPUTS, SKIP)
            product_real = tl.dot(weight, real, input_precision=PRECISION)
            product_imaginary = tl.dot(weight, imaginary, input_precision=PRECISION)
            if SKIP:
                weight = _output_weight(output_weight_ptr, o, c, True, CHANNELS, OUTPUTS, SKIP)
                product_real = tl.dot(weight, x_real, product_real, input_precision=PRECISION)
                product_imaginary = tl.dot(weight, x_imaginary, product_imaginary, input_precision=PRECISION)
            product_real *= scale
            product_imaginary *= scale
            if HAS_OUTPUT_BIAS:
                bias = tl.load(output_bias_ptr + o, mask=o < OUTPUTS, other=0.0)
                product_real += tl.where((row + column == 0)[None, :], bias[:, None], 0.0)
            _store_bins(result_ptr, product_real, product_imaginary, n, o, row, column, present, height, width, OUTPUTS)
    else:
        _store_bins(result_ptr, real * scale, imaginary * scale, n, c, row, column, present, height, width, CHANNELS)


@triton.jit
def _grad_spectrum_kernel(
    grad_ptr,
    spectrum_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    output_weight_ptr,
    grad_spectrum_ptr,
    height,
    width,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_OUTPUT_WEIGHT: tl.constexpr,
    SKIP: tl.constexpr,
    PHASE: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """∂X, whose unscaled irfft2 is ∂x, from rfft2(grad) and X. Grid and ownership as in the forward."""
    tiles = _tiles(height, width, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    row, column, present, edge = _bins(tl.program_id(0) % tiles, height, width, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    real = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    imaginary = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for mirrored in range(tl.where(edge, 2, 1)):
        source = tl.where(mirrored == 1, (height - row) % height, row)
        amplitude, cosine, sine = _load_spectrum(
            spectrum_ptr, n, c, source, column, present, edge, height, width, CHANNELS
        )
        values = _arctangent2(sine, cosine) if PHASE else amplitude
        mapped = _map(
            *(values, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, c),
            *(CHANNELS, HIDDEN, NEGATIVE_SLOPE, PRECISION, BLOCK_H),
        )
        grad_real, grad_imaginary = _load_gradient(
            *(grad_ptr, output_weight_ptr, False, n, c, source, column, present, height, width),
            *(CHANNELS, OUTPUTS, HAS_OUTPUT_WEIGHT, SKIP, PRECISION, BLOCK_P, BLOCK_C, BLOCK_O),
        )
        if PHASE:
            turned_cosine, turned_sine = _cosine_and_sine(mapped)
            radial = turned_cosine * grad_real + turned_sine * grad_imaginary
            angular = amplitude * (turned_cosine * grad_imaginary - turned_sine * grad_real)
        else:
            radial = cosine * grad_real + sine * grad_imaginary
            angular = mapped * (cosine * grad_imaginary - sine * grad_real)
        grad_values = _adjoint(
            *(angular if PHASE else radial, values, weight1_ptr, bias1_ptr, weight2_ptr, c),
            *(CHANNELS, HIDDEN, NEGATIVE_SLOPE, PRECISION, BLOCK_H),
        )
        if PHASE:
            angular = grad_values
        else:
            radial = grad_values
        is_zero = amplitude == 0
        radial = tl.where(is_zero, 0.0, radial)
        angular = tl.where(is_zero, 0.0, tl.div_rn(angular, tl.where(is_zero, 1.0, amplitude)))
        grad_x_real = cosine * radial - sine * angular
        grad_x_imaginary = sine * radial + cosine * angular
        if SKIP:
            skip_real, skip_imaginary = _load_gradient(
                *(grad_ptr, output_weight_ptr, True, n, c, source, column, present, height, width),
                *(CHANNELS, OUTPUTS, HAS_OUTPUT_WEIGHT, SKIP, PRECISION, BLOCK_P, BLOCK_C, BLOCK_O),
            )
            grad_x_real += skip_real
            grad_x_imaginary += skip_imaginary
        real += grad_x_real
        imaginary += tl.where(mirrored == 1, -grad_x_imaginary, grad_x_imaginary)
    scale = tl.where(edge, 0.5, 1.0) / (height * width)
    _store_bins(
        *(grad_spectrum_ptr, real * scale, imaginary * scale, n, c, row, column, present, height, width, CHANNELS)
    )


@triton.jit(do_not_specialize=["batch", "samples", "splits", "tiles_per_split"])
def _grad_map_kernel(
    grad_ptr,
    spectrum_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    output_weight_ptr,
    weight1_sums_ptr,
    bias1_sums_ptr,
    weight2_sums_ptr,
    bias2_sums_ptr,
    batch,
    height,
    width,
    samples,
    splits,
    tiles_per_split,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_OUTPUT_WEIGHT: tl.constexpr,
    SKIP: tl.constexpr,
    PHASE: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """First stage of the gradients of M's weights and biases: sums over the bins of one program.

    Grid: parts × hidden blocks, blocks fastest. A part is either ``tiles_per_split`` tiles of one sample
    (``samples`` = 1) or all of ``samples`` samples (``splits`` = 1). Writes rows of a block for each part:
    weight1_sums [parts, HIDDEN, CHANNELS], bias1_sums [parts, HIDDEN], weight2_sums [parts, CHANNELS,
    HIDDEN], and with the first block bias2_sums [parts, CHANNELS].
    """
    blocks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    part = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    first_sample = part // splits * samples
    first_tile = (part % splits).to(tl.int32) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, _tiles(height, width, BLOCK_P))
    weight1_sums = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    weight2_sums = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    bias1_sums = tl.zeros((BLOCK_H,), tl.float32)
    bias2_sums = tl.zeros((BLOCK_C,), tl.float32)
    n = first_sample
    for _ in range(tl.minimum(samples, batch - first_sample)):
        for tile in range(first_tile, last_tile):
            row, column, present, edge = _bins(tile, height, width, BLOCK_P)
            amplitude, cosine, sine = _load_spectrum(
                spectrum_ptr, n, c, row, column, present, edge, height, width, CHANNELS
            )
            grad_real, grad_imaginary = _load_gradient(
                *(grad_ptr, output_weight_ptr, False, n, c, row, column, present, height, width),
                *(CHANNELS, OUTPUTS, HAS_OUTPUT_WEIGHT, SKIP, PRECISION, BLOCK_P, BLOCK_C, BLOCK_O),
            )
            if PHASE:
                values = _arctangent2(sine, cosine)
                mapped = _map(
                    *(values, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, c),
                    *(CHANNELS, HIDDEN, NEGATIVE_SLOPE, PRECISION, BLOCK_H),
                )
                cosine, sine = _cosine_and_sine(mapped)
                grad = amplitude * (cosine * grad_imaginary - sine * grad_real)
            else:
                values = amplitude
                grad = cosine * grad_real + sine * grad_imaginary
            grad *= tl.where(edge, 1.0, 2.0) / (height * width)
            hidden = _hidden(values, weight1_ptr, bias1_ptr, c, h, CHANNELS, HIDDEN, PRECISION)
            weight2 = tl.trans(_matrix(weight2_ptr, c, h, CHANNELS, HIDDEN))
            grad_hidden = tl.dot(weight2, grad, input_precision=PRECISION)
            grad_hidden = tl.where(hidden > 0, grad_hidden, NEGATIVE_SLOPE * grad_hidden)
            hidden = tl.where(hidden > 0, hidden, NEGATIVE_SLOPE * hidden)
            weight1_sums = tl.dot(grad_hidden, tl.trans(values), weight1_sums, input_precision=PRECISION)
            weight2_sums = tl.dot(grad, tl.trans(hidden), weight2_sums, input_precision=PRECISION)
            bias1_sums += tl.sum(grad_hidden, axis=1)
            bias2_sums += tl.sum(grad, axis=1)
        n += 1
    has_hidden = h < HIDDEN
    has_channel = c < CHANNELS
    both = part * HIDDEN * CHANNELS + h[:, None] * CHANNELS + c[None, :]
    tl.store(weight1_sums_ptr + both, weight1_sums, mask=has_hidden[:, None] & has_channel[None, :])
    tl.store(bias1_sums_ptr + part * HIDDEN + h, bias1_sums, mask=has_hidden)
    both = part * CHANNELS * HIDDEN + c[:, None] * HIDDEN + h[None, :]
    tl.store(weight2_sums_ptr + both, weight2_sums, mask=has_channel[:, None] & has_hidden[None, :])
    owned = tl.where(tl.program_id(0) % blocks == 0, CHANNELS, 0)
    tl.store(bias2_sums_ptr + part * CHANNELS + c, bias2_sums, mask=c < owned)


@triton.jit(do_not_specialize=["batch", "samples", "splits", "tiles_per_split"])
def _grad_output_weight_kernel(
    grad_ptr,
    spectrum_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    output_weight_sums_ptr,
    batch,
    height,
    width,
    samples,
    splits,
    tiles_per_split,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SKIP: tl.constexpr,
    PHASE: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """First stage of ∂output_weight = Σ Re(rfft2(grad)·Ȳ), or of [X̄, Ȳ]: sums over the bins of one program.

    Grid: parts × output blocks, blocks fastest; parts as in :func:`_grad_map_kernel`. Writes
    output_weight_sums [parts, OUTPUTS, CHANNELS], or [parts, OUTPUTS, 2·CHANNELS] with SKIP.
    """
    blocks: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    part = (tl.program_id(0) // blocks).to(tl.int64)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    first_sample = part // splits * samples
    first_tile = (part % splits).to(tl.int32) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, _tiles(height, width, BLOCK_P))
    sums = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    x_sums = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    n = first_sample
    for _ in range(tl.minimum(samples, batch - first_sample)):
        for tile in range(first_tile, last_tile):
            row, column, present, edge = _bins(tile, height, width, BLOCK_P)
            real, imaginary = _mapped(
                *(spectrum_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr),
                *(n, c, row, column, present, edge, height, width),
                *(CHANNELS, HIDDEN, PHASE, NEGATIVE_SLOPE, PRECISION, BLOCK_H),
            )
            scale = tl.where(edge, 1.0, 2.0) / (height * width)
            grad_real, grad_imaginary = _load_bins(grad_ptr, n, o, row, column, present, height, width, OUTPUTS)
            grad_real *= scale
            grad_imaginary *= scale
            sums = tl.dot(grad_real, tl.trans(real), sums, input_precision=PRECISION)
            sums = tl.dot(grad_imaginary, tl.trans(imaginary), sums, input_precision=PRECISION)
            if SKIP:
                real, imaginary = _load_bins(spectrum_ptr, n, c, row, column, present, height, width, CHANNELS)
                x_sums = tl.dot(grad_real, tl.trans(real), x_sums, input_precision=PRECISION)
                x_sums = tl.dot(grad_imaginary, tl.trans(imaginary), x_sums, input_precision=PRECISION)
        n += 1
    columns: tl.constexpr = 2 * CHANNELS if SKIP else CHANNELS
    mask = (o < OUTPUTS)[:, None] & (c < CHANNELS)[None, :]
    offsets = (part * OUTPUTS + o[:, None]) * columns + c[None, :]
    if SKIP:
        tl.store(output_weight_sums_ptr + offsets, x_sums, mask=mask)
    tl.store(output_weight_sums_ptr + offsets + (columns - CHANNELS), sums, mask=mask)


def amplitude_phase_conv_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    output_weight: torch.Tensor | None,
    output_bias: torch.Tensor | None,
    phase: bool,
    negative_slope: float,
    tf32: bool,
) -> torch.Tensor:
    """y [B, Co, H, W] (C channels without output_weight) of x, weights [Ch, C] and [C, Ch] and their biases.

    output_weight is [Co, C] or [Co, 2C], output_bias [Co]. ``tf32`` lets the products with the weights run
    in TF32; the transforms never do.
    """
    check_pixels("x", x)
    outputs = x.shape[1] if output_weight is None else output_weight.shape[0]
    if x.numel() == 0:  # FFT libraries refuse an empty batch
        return _like(x.new_empty(x.shape[0], outputs, *x.shape[2:]), x)
    spectrum = _half_spectrum(x)
    result = spectrum.new_empty(x.shape[0], outputs, *spectrum.shape[2:])
    call = _Call(x, weight1, output_weight, phase, negative_slope, tf32)
    blocks = call.blocks("forward")
    launch(
        _forward_kernel,
        x.shape[0] * call.tiles(blocks["BLOCK_P"]),
        *(spectrum, weight1.contiguous(), bias1.contiguous(), weight2.contiguous(), bias2.contiguous()),
        *(None if tensor is None else tensor.contiguous() for tensor in (output_weight, output_bias)),
        *(result, *x.shape[2:]),
        HAS_OUTPUT_BIAS=output_bias is not None,
        **call.constants,
        **blocks,
    )
    return _like(_inverse(result, x), x)


def amplitude_phase_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    output_weight: torch.Tensor | None,
    output_bias: torch.Tensor | None,
    phase: bool,
    negative_slope: float,
    tf32: bool,
    needs_x: bool,
    needs_weight1: bool,
    needs_bias1: bool,
    needs_weight2: bool,
    needs_bias2: bool,
    needs_output_weight: bool,
    needs_output_bias: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weights and biases in the order of the arguments, None for one that is not needed."""
    check_pixels("x", x)
    needs_map = needs_weight1, needs_bias1, needs_weight2, needs_bias2
    if x.numel() == 0:
        weights = weight1, bias1, weight2, bias2, output_weight, output_bias
        pairs = zip(weights, (*needs_map, needs_output_weight, needs_output_bias), strict=True)
        zeros = (torch.zeros_like(tensor) if needed else None for tensor, needed in pairs)
        return _like(torch.empty_like(x), x) if needs_x else None, *zeros
    call = _Call(x, weight1, output_weight, phase, negative_slope, tf32)
    spectrum, grad_result = _half_spectrum(x), _half_spectrum(grad)
    weights = [tensor.contiguous() for tensor in (weight1, bias1, weight2, bias2)]
    dense_output_weight = None if output_weight is None else output_weight.contiguous()
    grad_x = grad_output_weight = None
    grad_map = [None] * 4
    if needs_x:
        grad_spectrum = torch.empty_like(spectrum)
        blocks = call.blocks("grad_spectrum")
        launch(
            _grad_spectrum_kernel,
            x.shape[0] * call.tiles(blocks["BLOCK_P"]),
            *(grad_result, spectrum, *weights, dense_output_weight, grad_spectrum, *x.shape[2:]),
            **call.constants,
            **blocks,
        )
        grad_x = _like(_inverse(grad_spectrum, x), x)
    if any(needs_map):
        blocks = call.blocks("grad_map")
        groups = triton.cdiv(weight1.shape[0], blocks["BLOCK_H"])
        parts = call.parts(blocks, groups)
        sums = [tensor.new_empty(parts.count, *tensor.shape) for tensor in weights]
        launch(
            _grad_map_kernel,
            parts.count * groups,
            *(grad_result, spectrum, *weights, dense_output_weight, *sums, x.shape[0], *x.shape[2:]),
            *(parts.samples, parts.splits, parts.tiles),
            **call.constants,
            **blocks,
        )
        grad_map = [total.sum(0) if needed else None for total, needed in zip(sums, needs_map, strict=True)]
    if needs_output_weight:
        blocks = call.blocks("grad_output_weight")
        groups = triton.cdiv(output_weight.shape[0], blocks["BLOCK_O"])
        parts = call.parts(blocks, groups)
        sums = output_weight.new_empty(parts.count, *output_weight.shape)
        constants = {name: value for name, value in call.constants.items() if name != "HAS_OUTPUT_WEIGHT"}
        launch(
            _grad_output_weight_kernel,
            parts.count * groups,
            *(grad_result, spectrum, *weights, sums, x.shape[0], *x.shape[2:]),
            *(parts.samples, parts.splits, parts.tiles),
            **constants,
            **blocks,
        )
        grad_output_weight = sums.sum(0)
    grad_output_bias = grad_result[:, :, 0, 0, 0].sum(0) if needs_output_bias else None
    return grad_x, *grad_map, grad_output_weight, grad_output_bias


def amplitude_phase_conv_spectrum(x: torch.Tensor) -> torch.Tensor:
    """The half spectrum [B, C, H, W//2 + 1, 2] from which the kernels compute, for tests."""
    height, width = x.shape[-2:]
    if x.numel() == 0:
        return x.new_empty(*x.shape[:3], width // 2 + 1, 2)
    spectrum = _half_spectrum(x)
    rows, columns = (slice(None, None, side // 2) if side % 2 == 0 else slice(1) for side in (height, width))
    spectrum[:, :, rows, columns, 1] = 0.0
    return spectrum


class _Call:
    """Sizes and options that the kernels of one call share."""

    def __init__(
        self,
        x: torch.Tensor,
        weight1: torch.Tensor,
        output_weight: torch.Tensor | None,
        phase: bool,
        negative_slope: float,
        tf32: bool,
    ) -> None:
        if x.shape[1] > MAX_CHANNELS:
            raise ValueError(f"x: the Triton kernels take at most {MAX_CHANNELS} channels, got {x.shape[1]}")
        self.x = x
        self.sides = {
            "BLOCK_C": x.shape[1],
            "BLOCK_H": weight1.shape[0],
            "BLOCK_O": x.shape[1] if output_weight is None else output_weight.shape[0],
        }
        self.constants = {
            "CHANNELS": self.sides["BLOCK_C"],
            "HIDDEN": self.sides["BLOCK_H"],
            "OUTPUTS": self.sides["BLOCK_O"],
            "HAS_OUTPUT_WEIGHT": output_weight is not None,
            "SKIP": output_weight is not None and output_weight.shape[1] == 2 * x.shape[1],
            "PHASE": phase,
            "NEGATIVE_SLOPE": negative_slope,
            "PRECISION": "tf32" if tf32 else "ieee",
        }

    def blocks(self, kernel: str) -> dict[str, int]:
        """Tiles of a kernel: all channels, and no hidden or output block wider than its size needs."""
        channels = self.sides["BLOCK_C"]
        found = configuration(self.x.device, FAMILY, kernel, self.constants["PRECISION"], channels)
        sides = {block: power_of_two(self.sides[block], at_most=found[block]) for block in ("BLOCK_H", "BLOCK_O")}
        return found | sides | {"BLOCK_C": power_of_two(channels, at_most=triton.next_power_of_2(channels))}

    def tiles(self, block: int) -> int:
        """Tiles of one sample: of the self-conjugate columns, then of the others."""
        height, width = self.x.shape[2:]
        edges = min(2 - width % 2, width)
        return triton.cdiv(height * edges, block) + triton.cdiv(height * (width // 2 + 1 - edges), block)

    def parts(self, blocks: dict[str, int], groups: int):
        """Division of all bins among programs, of which there are ``groups`` for each part."""
        tiles = self.tiles(blocks["BLOCK_P"])
        return divide(
            self.x.shape[0], tiles, blocks.pop("programs") / groups, max(1, BINS_IN_SEQUENCE // blocks["BLOCK_P"])
        )


def _half_spectrum(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W//2 + 1, 2], contiguous."""
    return torch.view_as_real(torch.fft.rfft2(x.contiguous()).contiguous())


def _inverse(spectrum: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Unscaled irfft2 to the size of x."""
    return torch.fft.irfft2(torch.view_as_complex(spectrum), s=x.shape[2:], norm="forward")


def _like(result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``result`` laid out as x is: channels_last or contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
