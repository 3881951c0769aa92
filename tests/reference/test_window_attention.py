"""The reference window attention against attention written out pixel by pixel."""

import numpy as np
import pytest
import torch

from mitnet_fast import ops
from mitnet_fast.reference.window_attention import table_rows


def reflected(index, size):
    """Where reflection padding reads from, edges not repeated."""
    period = 2 * (size - 1)
    index = index % period if period else 0
    return index if index < size else period - index


def written_out(qk, v, table, heads, window, shift):
    batch, channels, height, width = v.shape
    d = channels // heads
    y = np.zeros_like(v)
    for b, head, row, column in np.ndindex(batch, heads, height, width):
        of_head = slice(head * d, (head + 1) * d)
        query = qk[b, :channels][of_head, row, column]
        top = (row + shift) // window * window - shift
        left = (column + shift) // window * window - shift
        scores, values = [], []
        for i, j in np.ndindex(window, window):
            r, q = reflected(top + i, height), reflected(left + j, width)
            delta = (row - (top + i) + window - 1) * (2 * window - 1) + column - (left + j) + window - 1
            key = qk[b, channels:][of_head, r, q]
            scores.append(query @ key / np.sqrt(d) + table[delta, head])
            values.append(v[b, of_head, r, q])
        weights = np.exp(np.array(scores) - max(scores))
        y[b, of_head, row, column] = weights @ np.array(values) / weights.sum()
    return y


@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (8, 0), (8, 4), (7, 3)])
@pytest.mark.parametrize("size", [(9, 12), (16, 8), (11, 7)])
def test_equals_attention_pixel_by_pixel(size, window, shift):
    random = np.random.default_rng(0)
    heads, channels = 2, 6
    qk, v = random.standard_normal((1, 2 * channels, *size)), random.standard_normal((1, channels, *size))
    table = random.standard_normal(((2 * window - 1) ** 2, heads))
    y = ops.window_attention(
        *map(torch.from_numpy, (qk, v, table)), num_heads=heads, window_size=window, shift=shift, backend="reference"
    )
    np.testing.assert_allclose(y.numpy(), written_out(qk, v, table, heads, window, shift), rtol=0, atol=1e-12)


def test_table_rows_are_query_minus_key():
    rows = table_rows(3)
    assert rows.shape == (9, 9)
    assert rows[4, 4] == 2 * 5 + 2  # Δ = (0, 0)
    assert rows[8, 0] == 4 * 5 + 4  # Δ = (2, 2)
    assert rows[0, 8] == 0  # Δ = (−2, −2)
    assert rows[1, 0] == 2 * 5 + 3  # Δ = (0, 1)


@pytest.mark.parametrize("shift", [0, 2])
def test_gradients_are_those_of_finite_differences(shift):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 8, 5, 6), (1, 4, 5, 6), (49, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(*tensors):
        return ops.window_attention(*tensors, num_heads=2, window_size=4, shift=shift, backend="reference")

    assert torch.autograd.gradcheck(run, inputs)
