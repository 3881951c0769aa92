"""Training loss of MITNet.

    L = L1(out_1, G1) + L1(out_2, G)
      + 0.05·[L1(|rfft2(out_1)|, |rfft2(G)|) + L1(rfft2(out_2), rfft2(G))]
      + 0.001·Σ over levels of the mutual information regulariser of (p_i, d_i)
      + w·[(1 − SSIM(out_1, G)) + (1 − SSIM(out_2, G))]        (w = 1 on the real-world sets, else 0)

G is the clear image, G1 = irfft2(|rfft2(G)|·exp(i·angle(rfft2(I)))) has its amplitude and the hazy
image's phase: all that stage 1 can be expected to restore. Every L1 is a mean, over real and
imaginary parts for the spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..models.mitnet import MITNetOutput
from ..modules._checks import check_counts, check_map
from ..ops import amplitude_and_phase, half_spectrum, recombine
from .mutual_information import MutualInformation
from .ssim import ssim


class MITNetLoss(nn.Module):
    """Loss of both stages of MITNet in image, spectrum and feature space.

    With ``mutual_information="scalable"`` the loss has parameters, which are meant to be optimised
    together with the network's; those of "official" are frozen.

    Args:
        width: of the network.
        depth: of the network.
        spectral_weight: of the two spectral terms.
        mutual_information_weight: of the regulariser; 0 leaves it out.
        ssim_weight: of the two structural similarity terms; 0 leaves them out. The published
            training has them, with weight 1, on Dense-Haze and NH-HAZE only.
        mutual_information: mode of :class:`MutualInformation`.

    Raises:
        ValueError: a negative weight, or an argument outside its range.

    Source: MITNet (arXiv 2308.06998), loss functions.
    """

    def __init__(
        self,
        width: int = 20,
        depth: int = 4,
        *,
        spectral_weight: float = 0.05,
        mutual_information_weight: float = 0.001,
        ssim_weight: float = 0.0,
        mutual_information: str = "scalable",
    ) -> None:
        super().__init__()
        check_counts(width=width, depth=depth)
        weights = {
            "spectral_weight": spectral_weight,
            "mutual_information_weight": mutual_information_weight,
            "ssim_weight": ssim_weight,
        }
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {weight!r}")
        self.spectral_weight = spectral_weight
        self.mutual_information_weight = mutual_information_weight
        self.ssim_weight = ssim_weight
        self.mutual_information = nn.ModuleList(
            MutualInformation(width * 2**level, mutual_information)
            for level in range(depth - 1 if mutual_information_weight else 0)
        )

    def forward(
        self,
        output: MITNetOutput,
        hazy: torch.Tensor,
        clear: torch.Tensor,
        noise: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss and its terms.

        Args:
            output: of the network for ``hazy``.
            hazy: [B, C, H, W], the network's input, in [0, 1].
            clear: the same shape, the truth, in [0, 1].
            noise: per level, the noise of :meth:`MutualInformation.forward`; drawn if None.
            generator: for the draw.

        Returns:
            "total", the weighted sum, and each term before its weight: "stage1" and "restored" (L1
            of the images), "stage1_amplitude" and "restored_spectrum", "mutual_information" (unless
            left out), "stage1_ssim" and "restored_ssim" (1 − SSIM, unless left out). Scalars.

        Raises:
            ValueError: shapes do not fit.
        """
        batch, channels = output.restored.shape[:2]
        for name, image in (("hazy", hazy), ("clear", clear)):
            check_map(name, image, channels, output.restored.shape[2:], batch)
        levels = len(self.mutual_information)
        if levels and len(output.phase_features) != levels:
            raise ValueError(
                f"output: expected features of {levels} levels (depth {levels + 1}), got {len(output.phase_features)}"
            )
        if noise is not None and len(noise) != levels:
            raise ValueError(f"noise: expected one pair for each of {levels} levels, got {len(noise)}")
        with torch.no_grad():
            clear_with_hazy_phase = recombine(clear, hazy)
            clear_amplitude, _ = amplitude_and_phase(clear)
        terms = {
            "stage1": F.l1_loss(output.stage1, clear_with_hazy_phase),
            "restored": F.l1_loss(output.restored, clear),
            "stage1_amplitude": F.l1_loss(output.stage1_amplitude, clear_amplitude),
            "restored_spectrum": half_spectrum(output.restored - clear).abs().mean(),  # linear: one transform
        }
        total = terms["stage1"] + terms["restored"]
        total = total + self.spectral_weight * (terms["stage1_amplitude"] + terms["restored_spectrum"])
        if levels:
            features = zip(self.mutual_information, output.phase_features, output.amplitude_features, strict=True)
            terms["mutual_information"] = sum(
                regulariser(phase, amplitude, None if noise is None else noise[level], generator)
                for level, (regulariser, phase, amplitude) in enumerate(features)
            )
            total = total + self.mutual_information_weight * terms["mutual_information"]
        if self.ssim_weight:
            terms["stage1_ssim"] = 1 - ssim(output.stage1, clear).mean()
            terms["restored_ssim"] = 1 - ssim(output.restored, clear).mean()
            total = total + self.ssim_weight * (terms["stage1_ssim"] + terms["restored_ssim"])
        return {"total": total, **terms}
