"""The reference dynamic filter against the sum written out pixel by pixel."""

import numpy as np
import pytest
import torch

from mitnet_fast import ops


def written_out(x, filters, residual):
    _, channels, height, width = x.shape
    taps = filters.shape[1] // channels
    size = int(taps**0.5)
    y = x.copy() if residual else np.zeros_like(x)
    for b, c, row, column in np.ndindex(*x.shape):
        for k in range(taps):
            r, q = row + k // size - size // 2, column + k % size - size // 2
            if 0 <= r < height and 0 <= q < width:
                y[b, c, row, column] += filters[b, c * taps + k, row, column] * x[b, c, r, q]
    return y


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (1, 2, 9, 2)])
def test_equals_the_sum_over_offsets(shape, kernel_size, residual):
    random = np.random.default_rng(0)
    batch, channels, height, width = shape
    x = random.standard_normal(shape)
    filters = random.standard_normal((batch, channels * kernel_size**2, height, width))
    y = ops.dynamic_filter(torch.from_numpy(x), torch.from_numpy(filters), residual=residual, backend="reference")
    np.testing.assert_allclose(y.numpy(), written_out(x, filters, residual), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias_shape", [None, (18,), (2, 18)])
def test_prediction_is_a_convolution_of_the_features(bias_shape):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, features, weight = normal(2, 2, 5, 6), normal(2, 4, 5, 6), normal(18, 4)
    bias = None if bias_shape is None else normal(*bias_shape)
    filters = torch.einsum("of,bfhw->bohw", weight, features)
    if bias is not None:
        filters = filters + bias.expand(2, 18)[:, :, None, None]
    expected = written_out(x.numpy(), filters.numpy(), residual=True)
    y = ops.predicted_dynamic_filter(x, features, weight, bias, backend="reference")
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 2, 3, 4), (2, 3, 3, 4), (18, 3), (2, 18)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: ops.predicted_dynamic_filter(*t, backend="reference"), inputs)
