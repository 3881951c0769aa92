"""Structural similarity of two images, one value per image.

    SSIM = (2·μx·μy + c1)·(2·σxy + c2) / ((μx² + μy² + c1)·(σx² + σy² + c2)),
    c1 = (0.01·range)², c2 = (0.03·range)²

with means, variances and covariance under a Gaussian window around every pixel, averaged over
pixels and channels. Images are [B, C, H, W].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops._checks import check_shape, check_tensor, without_autocast


def ssim(
    x: torch.Tensor,
    y: torch.Tensor,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "zero",
) -> torch.Tensor:
    """Mean structural similarity of each image of a batch.

    Args:
        x: [B, C, H, W]. Half precision is computed in float32.
        y: the same shape.
        window: side of the Gaussian window in pixels, odd.
        sigma: standard deviation of the window in pixels.
        data_range: largest minus smallest possible value.
        padding: "zero" continues the images by zeros and averages over all pixels, "valid" averages
            over the pixels whose window lies inside.

    Returns:
        [B], 1 for equal images; float32, or float64 if either image is.

    Raises:
        TypeError: an image is no floating-point tensor.
        ValueError: shapes differ, an option is out of its range, or an image is smaller than the
            window with "valid".

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity",
    2004, equation 13.
    """
    check_tensor("x", x, "[B, C, H, W]")
    check_tensor("y", y, "[B, C, H, W]")
    check_shape("y", y, tuple(x.shape), "that of x")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window: expected an odd number of pixels, got {window!r}")
    for name, value in (("sigma", sigma), ("data_range", data_range)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    if padding not in ("zero", "valid"):
        raise ValueError(f"padding: got {padding!r}, allowed are 'zero' and 'valid'")
    if padding == "valid" and min(x.shape[2:]) < window:
        raise ValueError(f"x: 'valid' needs at least {window}×{window} pixels, got {x.shape[2]}×{x.shape[3]}")
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    offset = torch.arange(window, dtype=dtype, device=x.device) - window // 2
    gaussian = torch.softmax(-(offset**2) / (2 * sigma**2), 0)
    pad = window // 2 if padding == "zero" else 0
    with without_autocast(x):
        x, y = x.to(dtype), y.to(dtype)
        moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]  # [5·B·C, 1, H, W]
        moments = F.conv2d(moments, gaussian.view(1, 1, -1, 1), padding=(pad, 0))
        moments = F.conv2d(moments, gaussian.view(1, 1, 1, -1), padding=(0, pad))
        mean_x, mean_y, square_x, square_y, product = moments.view(5, x.shape[0], -1)
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        variances = square_x - mean_x**2 + square_y - mean_y**2
        covariance = product - mean_x * mean_y
        similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
        return similarity.mean(1)
