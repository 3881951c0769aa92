"""Window attention, forward and backward.

    S = d^-½·Q·Kᵀ + bias_table[Δ],  P = softmax(S),  y = P·V   per window of w×w tokens and per head

on a map that is padded by reflection to whole windows, with s more rows and columns at the top left
for a shift s. With g the gradient of y, zero where a token is padding:

    ∂V = Pᵀ·g,  dS = P ∘ (g·Vᵀ − rowsum(P ∘ (g·Vᵀ))),
    ∂Q = d^-½·dS·K,  ∂K = d^-½·dSᵀ·Q,  ∂bias_table[Δ] = Σ over windows and pairs of tokens Δ apart of dS

Nothing is copied: tokens are pixels of the maps [B, 2C, H, W] and [B, C, H, W] by index arithmetic,
contiguous or channels_last, and results are written where the pixels lie. Scores exist as tiles only;
the backward recomputes them. Q carries d^-½·log₂e and the table log₂e, so that exp2 serves; the output
is normalised, not P. Products run on tensor cores, heads padded to a power of two by zeros; softmax and
sums are float32.

A pixel near an edge is the key and value of up to nine tokens, its own and its reflections. Tokens of
these bands along the edges leave their gradients in float32 in a buffer of their own, from which
a second kernel adds up each pixel's in a fixed order. The table's gradient is summed by every program
over its windows, then over programs, then over pairs. No atomics.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    Map,
    as_map,
    check_pixels,
    configuration,
    empty_map,
    launch,
    offset_type,
    operand_type,
    power_of_two,
    precision,
    product_kind,
    strides,
)

FAMILY = "window_attention"
MAX_WINDOW = 16
BIAS_ROWS = 16
PADDING = ["shift", "bottom", "right", "band_rows", "band_columns"]
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _reflected(i, size):
    """Coordinate of the pixel that lies at coordinate ``i`` of a map continued by reflection."""
    i = tl.where(i < 0, -i, i)
    return tl.where(i < size, i, 2 * (size - 1) - i)


@triton.jit
def _coordinates(window, token, rows, columns, shift, WINDOW: tl.constexpr):
    """Row and column of a window's tokens, before reflection."""
    h = window // columns % rows * WINDOW + token // WINDOW - shift
    w = window % columns * WINDOW + token % WINDOW - shift
    return h, w


@triton.jit
def _in_band(i, size, before, after):
    """Whether pixels at coordinate ``i`` of an axis padded by (before, after) may have reflections."""
    return (i < before + tl.minimum(before, 1)) | (i >= size - after - tl.minimum(after, 1))


@triton.jit
def _band_index(h, w, height, width, shift, bottom, right, band_rows, band_columns):
    """Place of token (h, w) in the buffer of the bands: whole rows first, then the columns of all rows."""
    padded_height = shift + height + bottom
    padded_width = shift + width + right
    before = shift + tl.minimum(shift, 1)
    row = tl.where(h < before, h + shift, h + shift - padded_height + band_rows)
    column = tl.where(w < before, w + shift, w + shift - padded_width + band_columns)
    in_row = row * padded_width + w + shift
    in_column = band_rows * padded_width + (h + shift) * band_columns + column
    return tl.where(_in_band(h, height, shift, bottom), in_row, in_column)


@triton.jit
def _load(ptr, pixels, channels, has_pixel, has_channel, STRIDE_P: tl.constexpr):
    """Tile [tokens, channels] of a map, zero where there is none; lanes run along what lies together."""
    if STRIDE_P <= 1:
        mask = has_channel[:, None] & has_pixel[None, :]
        tile = tl.trans(tl.load(ptr + (channels[:, None] + pixels[None, :]), mask=mask, other=0.0))
    else:
        mask = has_pixel[:, None] & has_channel[None, :]
        tile = tl.load(ptr + (pixels[:, None] + channels[None, :]), mask=mask, other=0.0)
    return tile


@triton.jit
def _store(ptr, pixels, channels, has_pixel, has_channel, tile, STRIDE_P: tl.constexpr):
    """Write a tile [tokens, channels] to a map."""
    tile = tile.to(ptr.dtype.element_ty)
    if STRIDE_P <= 1:
        mask = has_channel[:, None] & has_pixel[None, :]
        tl.store(ptr + (channels[:, None] + pixels[None, :]), tl.trans(tile), mask=mask)
    else:
        tl.store(ptr + (pixels[:, None] + channels[None, :]), tile, mask=has_pixel[:, None] & has_channel[None, :])


@triton.jit
def _bias(bias_table_ptr, query, key, head, HEADS: tl.constexpr, WINDOW: tl.constexpr):
    """log₂e·bias [queries, keys] of a head; −∞ for keys that no window has."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    dy = (query // WINDOW)[:, None] - (key // WINDOW)[None, :] + (WINDOW - 1)
    dx = (query % WINDOW)[:, None] - (key % WINDOW)[None, :] + (WINDOW - 1)
    mask = (query < TOKENS)[:, None] & (key < TOKENS)[None, :]
    bias = tl.load(bias_table_ptr + (dy * (2 * WINDOW - 1) + dx) * HEADS + head, mask=mask, other=0.0)
    return tl.where((key < TOKENS)[None, :], bias.to(tl.float32) * LOG2E, float("-inf"))


@triton.jit(do_not_specialize=["windows", "rows", "columns", "shift"])
def _window_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_table_ptr,
    y_ptr,
    windows,
    rows,
    columns,
    height,
    width,
    shift,
    qk_stride_n,
    qk_stride_c,
    v_stride_n,
    v_stride_c,
    y_stride_n,
    y_stride_c,
    QK_STRIDE_P: tl.constexpr,
    V_STRIDE_P: tl.constexpr,
    Y_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """y. Grid: runs of BLOCK_W neighbouring windows × query blocks × heads, heads fastest.

    A program owns BLOCK_Q queries of one head in each window of its run, one window after another: they
    share cache lines, and the bias, which stays in registers. All BLOCK_K keys of a window meet in one
    tile of scores; scores, softmax and y are float32.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_Q - 1) // BLOCK_Q
    head = tl.program_id(0) % HEADS
    query = tl.program_id(0) // HEADS % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_K)
    bias = _bias(bias_table_ptr, query, key, head, HEADS, WINDOW)
    d = tl.arange(0, BLOCK_D)
    has_channel = d < HEAD
    c = (head * HEAD + d).to(OFFSET)
    first = tl.program_id(0) // (HEADS * BLOCKS) * BLOCK_W
    for window in range(first, tl.minimum(first + BLOCK_W, windows)):
        n = (window // (rows * columns)).to(tl.int64)
        h, w = _coordinates(window, query, rows, columns, shift, WINDOW)
        own = (query < TOKENS) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixels = (h * width + w).to(OFFSET)
        q = _load(q_ptr + n * qk_stride_n, pixels * QK_STRIDE_P, c * qk_stride_c, own, has_channel, QK_STRIDE_P)
        h, w = _coordinates(window, key, rows, columns, shift, WINDOW)
        key_pixels = (_reflected(h, height) * width + _reflected(w, width)).to(OFFSET)
        k = _load(
            k_ptr + n * qk_stride_n, key_pixels * QK_STRIDE_P, c * qk_stride_c, key < TOKENS, has_channel, QK_STRIDE_P
        )
        scores = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision=PRECISION)
        scores = scores * (HEAD**-0.5 * LOG2E) + bias
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        v = _load(
            v_ptr + n * v_stride_n, key_pixels * V_STRIDE_P, c * v_stride_c, key < TOKENS, has_channel, V_STRIDE_P
        )
        y = tl.dot(p.to(v.dtype).to(OPERAND), v.to(OPERAND), input_precision=PRECISION) / tl.sum(p, 1)[:, None]
        _store(y_ptr + n * y_stride_n, pixels * Y_STRIDE_P, c * y_stride_c, own, has_channel, y, Y_STRIDE_P)


@triton.jit(do_not_specialize=["windows", "rows", "columns", *PADDING, "run"])
def _window_attention_backward_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_table_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    key_band_ptr,
    value_band_ptr,
    bias_sums_ptr,
    windows,
    rows,
    columns,
    height,
    width,
    shift,
    bottom,
    right,
    band_rows,
    band_columns,
    run,
    grad_stride_n,
    grad_stride_c,
    qk_stride_n,
    qk_stride_c,
    v_stride_n,
    v_stride_c,
    grad_qk_stride_n,
    grad_qk_stride_c,
    grad_v_stride_n,
    grad_v_stride_c,
    band_stride_n,
    band_stride_c,
    GRAD_STRIDE_P: tl.constexpr,
    QK_STRIDE_P: tl.constexpr,
    V_STRIDE_P: tl.constexpr,
    GRAD_QK_STRIDE_P: tl.constexpr,
    GRAD_V_STRIDE_P: tl.constexpr,
    BAND_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    REFLECTS: tl.constexpr,
    NEEDS_QK: tl.constexpr,
    NEEDS_V: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """∂Q, ∂K, ∂V and first sums of ∂bias_table, whichever are needed.

    Grid: runs of ``run`` neighbouring windows × query parts × heads, heads fastest. A program owns
    QUERY_BLOCKS blocks of BLOCK_Q queries of one head in each window of its run, one after another:
    all of the window's where ∂K or ∂V is needed, one block where ∂bias_table is, whose sum over the
    windows [BLOCK_Q, BLOCK_K] stays in registers and goes to bias_sums [runs, heads, queries, BLOCK_K].
    Small windows are one block, and one launch does it all. With REFLECTS, the gradients of keys and
    values in the bands go to the bands' buffers. Everything is accumulated in float32.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    PARTS: tl.constexpr = (TOKENS + QUERY_BLOCKS * BLOCK_Q - 1) // (QUERY_BLOCKS * BLOCK_Q)
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    index = tl.program_id(0) // (HEADS * PARTS)
    key = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    has_channel = d < HEAD
    c = (head * HEAD + d).to(OFFSET)
    bias_sums = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    if QUERY_BLOCKS == 1:
        bias = _bias(bias_table_ptr, part * BLOCK_Q + tl.arange(0, BLOCK_Q), key, head, HEADS, WINDOW)
    for window in range(index * run, tl.minimum(index * run + run, windows)):
        n = (window // (rows * columns)).to(tl.int64)
        key_h, key_w = _coordinates(window, key, rows, columns, shift, WINDOW)
        key_pixels = (_reflected(key_h, height) * width + _reflected(key_w, width)).to(OFFSET)
        k = _load(
            k_ptr + n * qk_stride_n, key_pixels * QK_STRIDE_P, c * qk_stride_c, key < TOKENS, has_channel, QK_STRIDE_P
        )
        v = _load(
            v_ptr + n * v_stride_n, key_pixels * V_STRIDE_P, c * v_stride_c, key < TOKENS, has_channel, V_STRIDE_P
        )
        grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for block in range(QUERY_BLOCKS):
            query = (part * QUERY_BLOCKS + block) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            h, w = _coordinates(window, query, rows, columns, shift, WINDOW)
            own = (query < TOKENS) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            pixels = (h * width + w).to(OFFSET)
            q = _load(q_ptr + n * qk_stride_n, pixels * QK_STRIDE_P, c * qk_stride_c, own, has_channel, QK_STRIDE_P)
            if QUERY_BLOCKS > 1:
                bias = _bias(bias_table_ptr, query, key, head, HEADS, WINDOW)
            scores = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision=PRECISION)
            scores = scores * (HEAD**-0.5 * LOG2E) + bias
            p = tl.exp2(scores - tl.max(scores, 1)[:, None])
            p *= (1.0 / tl.sum(p, 1))[:, None]
            grad = _load(
                grad_ptr + n * grad_stride_n,
                pixels * GRAD_STRIDE_P,
                c * grad_stride_c,
                own,
                has_channel,
                GRAD_STRIDE_P,
            )
            if NEEDS_V:
                p_transposed = tl.trans(p.to(v.dtype).to(OPERAND))
                grad_v = tl.dot(p_transposed, grad.to(OPERAND), grad_v, input_precision=PRECISION)
            if NEEDS_QK or NEEDS_BIAS:
                grad_p = tl.dot(grad.to(OPERAND), tl.trans(v.to(OPERAND)), input_precision=PRECISION)
                grad_scores = p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
                if NEEDS_BIAS:
                    bias_sums += grad_scores
                if NEEDS_QK:
                    grad_scores = grad_scores.to(k.dtype).to(OPERAND)
                    grad_q = tl.dot(grad_scores, k.to(OPERAND), input_precision=PRECISION) * HEAD**-0.5
                    _store(
                        grad_q_ptr + n * grad_qk_stride_n,
                        pixels * GRAD_QK_STRIDE_P,
                        c * grad_qk_stride_c,
                        own,
                        has_channel,
                        grad_q,
                        GRAD_QK_STRIDE_P,
                    )
                    grad_k = tl.dot(tl.trans(grad_scores), q.to(OPERAND), grad_k, input_precision=PRECISION)
        own_keys = (key < TOKENS) & (key_h >= 0) & (key_h < height) & (key_w >= 0) & (key_w < width)
        if REFLECTS:
            in_band = _in_band(key_h, height, shift, bottom) | _in_band(key_w, width, shift, right)
            index_in_band = _band_index(key_h, key_w, height, width, shift, bottom, right, band_rows, band_columns).to(
                OFFSET
            )
            own_keys &= in_band == 0
            in_band = in_band & (key < TOKENS)
        if NEEDS_QK:
            grad_k *= HEAD**-0.5
            _store(
                grad_k_ptr + n * grad_qk_stride_n,
                key_pixels * GRAD_QK_STRIDE_P,
                c * grad_qk_stride_c,
                own_keys,
                has_channel,
                grad_k,
                GRAD_QK_STRIDE_P,
            )
            if REFLECTS:
                _store(
                    key_band_ptr + n * band_stride_n,
                    index_in_band * BAND_STRIDE_P,
                    c * band_stride_c,
                    in_band,
                    has_channel,
                    grad_k,
                    BAND_STRIDE_P,
                )
        if NEEDS_V:
            _store(
                grad_v_ptr + n * grad_v_stride_n,
                key_pixels * GRAD_V_STRIDE_P,
                c * grad_v_stride_c,
                own_keys,
                has_channel,
                grad_v,
                GRAD_V_STRIDE_P,
            )
            if REFLECTS:
                _store(
                    value_band_ptr + n * band_stride_n,
                    index_in_band * BAND_STRIDE_P,
                    c * band_stride_c,
                    in_band,
                    has_channel,
                    grad_v,
                    BAND_STRIDE_P,
                )
    if NEEDS_BIAS:
        query = part * BLOCK_Q + tl.arange(0, BLOCK_Q)
        sums = (index * HEADS + head).to(tl.int64) * (PARTS * BLOCK_Q) + query
        tl.store(bias_sums_ptr + sums[:, None] * BLOCK_K + key[None, :], bias_sums)


@triton.jit(do_not_specialize=PADDING)
def _gather_bands_kernel(
    band_ptr,
    grad_ptr,
    height,
    width,
    shift,
    bottom,
    right,
    band_rows,
    band_columns,
    band_stride_n,
    band_stride_c,
    grad_stride_n,
    grad_stride_c,
    BAND_STRIDE_P: tl.constexpr,
    GRAD_STRIDE_P: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """∂K or ∂V of the pixels in the bands: the sum over a pixel's own token and its reflections.

    Grid: batch × channel groups × tiles of the bands, tiles fastest. A program owns BLOCK_P places of
    the bands, of BLOCK_C channels, and adds up the pixels among them in float32, row by row.
    """
    padded_height = shift + height + bottom
    padded_width = shift + width + right
    places = band_rows * padded_width + padded_height * band_columns
    tiles = tl.cdiv(places, BLOCK_P)
    groups: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    plane = tl.program_id(0) // tiles
    n = (plane // groups).to(tl.int64)
    c = plane % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    has_channel = c < CHANNELS
    place = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)

    in_rows = place < band_rows * padded_width
    in_columns = place - band_rows * padded_width
    column_divisor = tl.maximum(band_columns, 1)
    row = tl.where(in_rows, place // padded_width, 0)
    column = tl.where(in_rows, 0, in_columns % column_divisor)
    before = 2 * shift + tl.minimum(shift, 1)
    row += tl.where(row < before, 0, padded_height - band_rows)
    column += tl.where(column < before, 0, padded_width - band_columns)
    h = tl.where(in_rows, row, in_columns // column_divisor) - shift
    w = tl.where(in_rows, place % padded_width, column) - shift
    own = (place < places) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    own &= in_rows | (_in_band(h, height, shift, bottom) == 0)

    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    c_offsets = c.to(OFFSET)
    for up in tl.static_range(3):  # above the map, in it, below it
        token_h = h if up == 1 else (-h if up == 0 else 2 * (height - 1) - h)
        has_row = (token_h >= -shift) & (token_h < height + bottom) & ((token_h != h) | (up == 1))
        for left in tl.static_range(3):
            token_w = w if left == 1 else (-w if left == 0 else 2 * (width - 1) - w)
            has_token = has_row & (token_w >= -shift) & (token_w < width + right) & ((token_w != w) | (left == 1))
            index = _band_index(token_h, token_w, height, width, shift, bottom, right, band_rows, band_columns)
            total += _load(
                band_ptr + n * band_stride_n,
                index.to(OFFSET) * BAND_STRIDE_P,
                c_offsets * band_stride_c,
                own & has_token,
                has_channel,
                BAND_STRIDE_P,
            )
    _store(
        grad_ptr + n * grad_stride_n,
        (h * width + w).to(OFFSET) * GRAD_STRIDE_P,
        c_offsets * grad_stride_c,
        own,
        has_channel,
        total,
        GRAD_STRIDE_P,
    )


@triton.jit
def _grad_bias_table_kernel(
    bias_sums_ptr,
    grad_bias_table_ptr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """∂bias_table from the gradient of the bias [heads, ROWS, BLOCK_K] (queries, keys).

    Grid: blocks of table rows × heads, heads fastest. A program owns BLOCK_R rows of a head and adds up
    the pairs of tokens that have the row's distance, in float32.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    SIDE: tl.constexpr = 2 * WINDOW - 1
    head = tl.program_id(0) % HEADS
    row = tl.program_id(0) // HEADS * BLOCK_R + tl.arange(0, BLOCK_R)
    key = tl.arange(0, BLOCK_K)
    h = (key // WINDOW)[None, :] + (row // SIDE - (WINDOW - 1))[:, None]
    w = (key % WINDOW)[None, :] + (row % SIDE - (WINDOW - 1))[:, None]
    pair = (key < TOKENS)[None, :] & (h >= 0) & (h < WINDOW) & (w >= 0) & (w < WINDOW)
    ptrs = bias_sums_ptr + (head * ROWS + h * WINDOW + w) * BLOCK_K + key[None, :]
    total = tl.sum(tl.load(ptrs, mask=pair, other=0.0), 1)
    total = total.to(grad_bias_table_ptr.dtype.element_ty)
    tl.store(grad_bias_table_ptr + row * HEADS + head, total, mask=row < SIDE * SIDE)


class Padding(NamedTuple):
    """How a map is padded by reflection to whole windows; fields as the kernels take them.

    Attributes:
        shift: rows and columns reflected at the top left.
        bottom: rows reflected at the bottom.
        right: columns reflected at the right.
        band_rows: padded rows, top and bottom together, whose pixels may have reflections.
        band_columns: padded columns, left and right together, whose pixels may have reflections.
    """

    shift: int
    bottom: int
    right: int
    band_rows: int
    band_columns: int


def _windows(v: torch.Tensor, window_size: int, shift: int) -> tuple[int, int, Padding]:
    """Rows of windows, columns of windows, and the padding that makes them whole."""
    rows, columns = (ceil((size + shift) / window_size) for size in v.shape[-2:])
    after = rows * window_size - shift - v.shape[-2], columns * window_size - shift - v.shape[-1]
    bands = (
        min(padded, sum(2 * size + 1 for size in (shift, end) if size))
        for padded, end in zip((rows * window_size, columns * window_size), after, strict=True)
    )
    return rows, columns, Padding(shift, *after, *bands)


def window_attention_forward(
    qk: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor,
    num_heads: int,
    window_size: int,
    shift: int,
    tf32: bool,
) -> torch.Tensor:
    """y [B, C, H, W] of qk [B, 2C, H, W], v [B, C, H, W] and bias_table [(2w−1)², heads].

    ``tf32`` lets the products of float32 tensors run in TF32.
    """
    _check(v, num_heads, window_size)
    batch, _, height, width = v.shape
    rows, columns, _ = _windows(v, window_size, shift)
    products, values, y = as_map(qk), as_map(v), empty_map(v)
    constants = _constants(v, num_heads, window_size, tf32)
    blocks = _configuration("forward", v, window_size, tf32, constants)
    query_blocks = ceil(window_size**2 / blocks["BLOCK_Q"])
    launch(
        _window_attention_kernel,
        ceil(batch * rows * columns / blocks["BLOCK_W"]) * query_blocks * num_heads,
        *(*_halves(products), values.data, bias_table.contiguous(), y.data),
        *(batch * rows * columns, rows, columns, height, width, shift),
        *strides(products, values, y),
        QK_STRIDE_P=products.stride_p,
        V_STRIDE_P=values.stride_p,
        Y_STRIDE_P=y.stride_p,
        OFFSET=offset_type(products, values, y),
        **constants,
        **blocks,
    )
    return y.data


def window_attention_backward(
    grad: torch.Tensor,
    qk: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor,
    num_heads: int,
    window_size: int,
    shift: int,
    tf32: bool,
    needs_qk: bool,
    needs_v: bool,
    needs_bias_table: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of qk, v and bias_table, None for one that is not needed."""
    _check(v, num_heads, window_size)
    batch, channels, height, width = v.shape
    rows, columns, padding = _windows(v, window_size, shift)
    windows = batch * rows * columns
    grads, products, values = as_map(grad), as_map(qk), as_map(v)
    grad_qk = empty_map(qk) if needs_qk else None
    grad_v = empty_map(v) if needs_v else None
    reflects = padding.band_rows + padding.band_columns > 0
    key_band = _empty_bands(v, rows, columns, window_size, padding) if needs_qk and reflects else None
    value_band = _empty_bands(v, rows, columns, window_size, padding) if needs_v and reflects else None
    constants = _constants(v, num_heads, window_size, tf32)
    blocks = _configuration("backward", v, window_size, tf32, constants)
    query_blocks = ceil(window_size**2 / blocks["BLOCK_Q"])
    wanted, longest_run = blocks.pop("programs"), blocks.pop("BLOCK_W")

    def launch_for(qk: bool, v: bool, bias: bool, *, blocks_of_program: int) -> torch.Tensor | None:
        """Compute these gradients; the sums of ∂bias of every run, if that is among them."""
        parts = query_blocks // blocks_of_program
        run = max(1, min(ceil(windows * parts * num_heads / wanted), longest_run))
        runs = ceil(windows / run)
        queries = query_blocks * blocks["BLOCK_Q"]
        bias_sums = (
            grad.new_empty(runs, num_heads, queries, constants["BLOCK_K"], dtype=torch.float32) if bias else None
        )
        launch(
            _window_attention_backward_kernel,
            runs * parts * num_heads,
            *(grads.data, *_halves(products), values.data, bias_table.contiguous()),
            *(_halves(grad_qk) if qk else (None, None)),
            *(grad_v.data if v else None, key_band.data if qk and reflects else None),
            *(value_band.data if v and reflects else None, bias_sums),
            *(windows, rows, columns, height, width, *padding, run),
            *strides(grads, products, values),
            *strides(grad_qk, grad_v, key_band or value_band),
            GRAD_STRIDE_P=grads.stride_p,
            QK_STRIDE_P=products.stride_p,
            V_STRIDE_P=values.stride_p,
            GRAD_QK_STRIDE_P=grad_qk.stride_p if qk else 0,
            GRAD_V_STRIDE_P=grad_v.stride_p if v else 0,
            BAND_STRIDE_P=(key_band or value_band).stride_p if (qk or v) and reflects else 0,
            OFFSET=offset_type(
                *(map for map in (grads, products, values, grad_qk, grad_v, key_band, value_band) if map)
            ),
            REFLECTS=reflects,
            NEEDS_QK=qk,
            NEEDS_V=v,
            NEEDS_BIAS=bias,
            QUERY_BLOCKS=blocks_of_program,
            **constants,
            **blocks,
        )
        return bias_sums

    if query_blocks == 1:
        bias_sums = launch_for(needs_qk, needs_v, needs_bias_table, blocks_of_program=1)
    else:
        if needs_qk or needs_v:
            launch_for(needs_qk, needs_v, False, blocks_of_program=query_blocks)
        bias_sums = launch_for(False, False, True, blocks_of_program=1) if needs_bias_table else None
    if key_band is not None:
        _gather_bands(key_band, grad_qk._replace(data=grad_qk.data[:, channels:]), padding)
    if value_band is not None:
        _gather_bands(value_band, grad_v, padding)
    grad_bias_table = None if bias_sums is None else _grad_bias_table(bias_sums, bias_table, window_size)
    return grad_qk and grad_qk.data, grad_v and grad_v.data, grad_bias_table


def _check(v: torch.Tensor, num_heads: int, window_size: int) -> None:
    check_pixels("v", v)
    if window_size > MAX_WINDOW:
        raise ValueError(f"window_size: the Triton kernels take at most {MAX_WINDOW}, got {window_size}")
    head, most = v.shape[1] // num_heads, 64 if window_size <= 8 else 32  # a window's keys share one program's memory
    if head > most:
        raise ValueError(
            f"num_heads: the Triton kernels take at most {most} channels per head with window_size {window_size}, "
            f"got {head}"
        )


def _configuration(
    kernel: str, v: torch.Tensor, window_size: int, tf32: bool, constants: Mapping[str, Any]
) -> dict[str, int]:
    """Tiles of a kernel, by the size of a window's keys; no block of queries is longer than a window."""
    size = constants["BLOCK_K"] * constants["BLOCK_D"]
    found = configuration(v.device, FAMILY, kernel, product_kind(v, tf32), size)
    return found | {"BLOCK_Q": power_of_two(window_size**2, at_most=found["BLOCK_Q"])}


def _constants(v: torch.Tensor, num_heads: int, window_size: int, tf32: bool) -> dict[str, Any]:
    """What the kernels of both directions are specialised for."""
    head = v.shape[1] // num_heads
    return {
        "HEADS": num_heads,
        "HEAD": head,
        "WINDOW": window_size,
        "OPERAND": operand_type(v),
        "PRECISION": precision(v, tf32),
        "BLOCK_K": power_of_two(window_size**2, at_most=MAX_WINDOW**2),
        "BLOCK_D": power_of_two(head, at_most=64),
    }


def _halves(map: Map) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys."""
    return map.data.chunk(2, 1)


def _empty_bands(v: torch.Tensor, rows: int, columns: int, window_size: int, padding: Padding) -> Map:
    """Float32 buffer [B, C, tokens in the bands, 1], laid out as ``v``."""
    tokens = padding.band_rows * columns * window_size + rows * window_size * padding.band_columns
    layout = torch.contiguous_format if as_map(v).stride_p == 1 else torch.channels_last
    return as_map(torch.empty(*v.shape[:2], tokens, 1, dtype=torch.float32, device=v.device, memory_format=layout))


def _gather_bands(band: Map, grad: Map, padding: Padding) -> None:
    """Write the gradient of the pixels in the bands."""
    batch, channels, height, width = grad.data.shape
    layout = "contiguous" if grad.stride_p == 1 else "channels_last"
    blocks = configuration(grad.data.device, FAMILY, "gather_bands", layout, channels)
    launch(
        _gather_bands_kernel,
        batch * ceil(channels / blocks["BLOCK_C"]) * ceil(band.data.shape[2] / blocks["BLOCK_P"]),
        *(band.data, grad.data, height, width, *padding),
        *strides(band, grad),
        BAND_STRIDE_P=band.stride_p,
        GRAD_STRIDE_P=grad.stride_p,
        OFFSET=offset_type(band, grad),
        CHANNELS=channels,
        **blocks,
    )


def _grad_bias_table(bias_sums: torch.Tensor, bias_table: torch.Tensor, window_size: int) -> torch.Tensor:
    """Gradient of the table from the sums [runs, heads, queries, keys]."""
    _, heads, queries, keys = bias_sums.shape
    grad_bias_table = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
    launch(
        _grad_bias_table_kernel,
        heads * ceil(len(bias_table) / BIAS_ROWS),
        *(bias_sums.sum(0), grad_bias_table),
        HEADS=heads,
        WINDOW=window_size,
        ROWS=queries,
        BLOCK_R=BIAS_ROWS,
        BLOCK_K=keys,
    )
    return grad_bias_table
