from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from mitnet_fast.losses.ssim import ssim
from tests import golden


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = golden.tensor("x", shape, dtype=dtype)
    return x, (0.7 * x + 0.3 * golden.tensor("y", shape, dtype=dtype)).to(dtype)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
@pytest.mark.parametrize("size", [(16, 23), (11, 11), (40, 12)])
def test_valid_equals_scikit_image(size, data_range):
    x, y = pair((3, 3, *size))
    expected = [
        structural_similarity(
            a.numpy() * data_range,
            b.numpy() * data_range,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=data_range,
        )
        for a, b in zip(x, y, strict=True)
    ]
    actual = ssim(x * data_range, y * data_range, data_range=data_range, padding="valid")
    assert golden.relative_error(actual, np.array(expected)) < 1e-13


@pytest.mark.parametrize(("window", "sigma"), [(11, 1.5), (7, 2.0), (1, 1.0)])
@pytest.mark.parametrize("size", [(16, 23), (3, 5), (1, 1)])
def test_zero_equals_gaussian_filters_of_the_image_continued_by_zeros(size, window, sigma):
    x, y = pair((2, 3, *size))

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigma, mode="constant", radius=window // 2, axes=(-2, -1))

    a, b = x.numpy(), y.numpy()
    mean_a, mean_b = mean(a), mean(b)
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    structure = (2 * (mean(a * b) - mean_a * mean_b) + 0.03**2) / (variances + 0.03**2)
    actual = ssim(x, y, window=window, sigma=sigma)
    assert golden.relative_error(actual, (luminance * structure).mean((1, 2, 3))) < 1e-13


def test_equal_images_score_one_each_and_the_order_does_not_matter():
    x, y = pair((2, 3, 20, 20))
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(ssim(x, y), ssim(y, x))
    assert (ssim(x, y) < 0.99).all()


def test_images_of_a_batch_do_not_mix():
    x, y = pair((3, 3, 14, 17))
    alone = torch.cat([ssim(a[None], b[None]) for a, b in zip(x, y, strict=True)])
    assert golden.relative_error(ssim(x, y), alone) < 1e-14


@pytest.mark.parametrize("padding", ["zero", "valid"])
def test_gradient(padding):
    x, y = (image.requires_grad_() for image in pair((1, 2, 6, 5)))
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b, window=5, padding=padding), (x, y))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float32_also_under_autocast(dtype, autocast):
    x, y = pair((2, 3, 16, 16), dtype)
    with torch.autocast("cpu", enabled=autocast):
        actual = ssim(x, y)
    assert actual.dtype == torch.float32
    # E[x²] − E[x]² loses about eps; the smallest denominator, c2, magnifies it
    allowed = 8 * torch.finfo(torch.float32).eps / 0.03**2
    assert golden.relative_error(actual, ssim(x.double(), y.double())) < allowed


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 3, 8, 8), (1, 3, 8, 9)), {}, r"y: expected shape that of x = \[1, 3, 8, 8\], got \[1, 3, 8, 9\]"),
        (((3, 8, 8), (3, 8, 8)), {}, r"x: expected shape \[B, C, H, W\], got \[3, 8, 8\]"),
        (((1, 3, 8, 8),) * 2, {"window": 10}, "window: expected an odd number of pixels, got 10"),
        (((1, 3, 8, 8),) * 2, {"sigma": 0}, "sigma: expected a positive number, got 0"),
        (((1, 3, 8, 8),) * 2, {"data_range": -1.0}, "data_range: expected a positive number, got -1.0"),
        (((1, 3, 8, 8),) * 2, {"padding": "same"}, "padding: got 'same', allowed are 'zero' and 'valid'"),
        (((1, 3, 8, 12),) * 2, {"padding": "valid"}, "x: 'valid' needs at least 11×11 pixels, got 8×12"),
    ],
)
def test_names_what_is_wrong(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        ssim(*(torch.zeros(shape) for shape in shapes), **options)


def test_refuses_integers():
    with pytest.raises(TypeError, match="x: dtype uint8 is not supported"):
        ssim(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16))
