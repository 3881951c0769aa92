"""Training losses of DCMPNet: dehazing and depth estimation promote each other.

u clear, ũ hazy, u* restored, M the depth network, D the depth of u; a and e are the difference
weights of :mod:`.difference_perception`:

    L_depth    = L1(M(u*), D) + L1(a·M(u*), a·D)
    L_dehazing = L1(u*, u) + L1(e·u*, e·u) + 0.1·L1(M(u*), D) + contrastive(u*, u, ũ)

In mode "difference_perception" L_depth sees the restored image detached and L_dehazing sees M with
frozen weights: their gradients never meet, and one backward pass of the sum gives each network the
gradient of its own loss. In mode "official" M(u*) is computed once, L_dehazing has no weighted
term, and the sum trains both networks through each other. Either way a training step is

    terms = loss(restored, hazy, clear, depth_network, depth)
    terms["total"].backward()
    dehazing_optimizer.step(); depth_optimizer.step()

Images are [B, 3, H, W] in [-1, 1]; depth [B, 1, H, W] in [0, 1], 1 nearest.
"""

from __future__ import annotations

from os import PathLike

import torch
import torch.nn.functional as F
from torch import nn

from ..modules._checks import check_map
from ..ops._checks import check_shape
from .contrastive import ContrastiveLoss
from .difference_perception import auxiliary_loss, check_mode, primary_loss, through_frozen


class DCMPNetLoss(nn.Module):
    """Losses of the dehazing network and of the depth network it is trained with.

    Without a depth network and depth the depth terms are left out (and with them L_depth).

    Args:
        mode: "difference_perception", the paper's alternation, or "official", what the published
            training program computes. The latter also sets the mode of the contrastive term.
        depth_weight: of L1(M(u*), D) in the loss of the dehazing network.
        contrastive_weight: of the contrastive term; 0 leaves it out, and needs no VGG-19 weights.
        vgg_weights: path of torchvision's VGG-19 weights; None fetches them on first use.

    Raises:
        ValueError: an unknown mode or a negative weight.
        FileNotFoundError, CheckpointError, RuntimeError: no usable weights of VGG-19, see
            :func:`~mitnet_fast.losses.contrastive.load_vgg19`.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), alternative implementation with difference
    perception.
    """

    def __init__(
        self,
        mode: str = "difference_perception",
        *,
        depth_weight: float = 0.1,
        contrastive_weight: float = 1.0,
        vgg_weights: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode)
        for name, weight in (("depth_weight", depth_weight), ("contrastive_weight", contrastive_weight)):
            if not weight >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {weight!r}")
        self.mode = mode
        self.depth_weight = depth_weight
        self.contrastive_weight = contrastive_weight
        contrastive_mode = "official" if mode == "official" else "default"
        self.contrastive = ContrastiveLoss(vgg_weights, mode=contrastive_mode) if contrastive_weight else None

    def forward(
        self,
        restored: torch.Tensor,
        hazy: torch.Tensor,
        clear: torch.Tensor,
        depth_network: nn.Module | None = None,
        depth: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Both losses and their terms.

        Args:
            restored: u*, of the dehazing network, [B, 3, H, W] in [-1, 1].
            hazy: ũ, its input.
            clear: u, the truth.
            depth_network: M, from images in [-1, 1] to maps of at least [B, 1, H, W], of which the
                top left H×W counts. None together with ``depth`` leaves the depth terms out.
            depth: D, the depth of ``clear``, [B, 1, H, W] in [0, 1], 1 nearest.

        Returns:
            Scalars: "total" = "dehazing_loss" + "depth_loss", which are L_dehazing and L_depth
            ("depth_loss" only with depth), and the terms before their weights: "restored",
            "restored_weighted" (difference perception with depth only), "depth", "depth_weighted"
            (both with depth only) and "contrastive" (unless left out).

        Raises:
            ValueError: shapes do not fit, or only one of ``depth_network`` and ``depth`` is given.
        """
        self._check(restored, clear, hazy, depth_network, depth)
        if depth is None:
            terms = self.dehazing(restored, hazy, clear)
            dehazing = terms.pop("total")
            return {"total": dehazing, "dehazing_loss": dehazing, **terms}
        if self.mode == "official":
            estimate = self._estimate(depth_network(restored), depth)
            dehazing_terms = self._dehazing(restored, hazy, clear, estimate, depth)
            depth_terms = self._depth(restored, clear, estimate, depth)
        else:
            dehazing_terms = self.dehazing(restored, hazy, clear, depth_network, depth)
            depth_terms = self.depth(restored, clear, depth_network, depth)
        dehazing, depth_loss = dehazing_terms.pop("total"), depth_terms.pop("total")
        return {
            "total": dehazing + depth_loss,
            "dehazing_loss": dehazing,
            "depth_loss": depth_loss,
            **dehazing_terms,
            **depth_terms,
        }

    def dehazing(
        self,
        restored: torch.Tensor,
        hazy: torch.Tensor,
        clear: torch.Tensor,
        depth_network: nn.Module | None = None,
        depth: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """L_dehazing alone, for training that alternates: no gradient into the depth network's weights.

        Args:
            restored, hazy, clear, depth_network, depth: as in ``forward``.

        Returns:
            "total" = L_dehazing, and its terms as in ``forward``.

        Raises:
            ValueError: shapes do not fit, or only one of ``depth_network`` and ``depth`` is given.
        """
        self._check(restored, clear, hazy, depth_network, depth)
        if depth is None:
            terms = {"restored": F.l1_loss(restored, clear)}
            return self._with_contrastive({"total": terms["restored"], **terms}, restored, hazy, clear)
        estimate = self._estimate(through_frozen(depth_network, restored), depth)
        return self._dehazing(restored, hazy, clear, estimate, depth)

    def depth(
        self, restored: torch.Tensor, clear: torch.Tensor, depth_network: nn.Module, depth: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """L_depth alone, for training that alternates: no gradient into the restored image.

        Args:
            restored, clear, depth_network, depth: as in ``forward``.

        Returns:
            "total" = L_depth, and its terms "depth" and "depth_weighted".

        Raises:
            ValueError: shapes do not fit, or ``depth_network`` or ``depth`` is None.
        """
        self._check(restored, clear, None, depth_network, depth)
        if depth is None:
            raise ValueError("depth_network, depth: got None, but the loss of the depth network needs both")
        restored = restored.detach()
        return self._depth(restored, clear, self._estimate(depth_network(restored), depth), depth)

    def _dehazing(
        self,
        restored: torch.Tensor,
        hazy: torch.Tensor,
        clear: torch.Tensor,
        estimate: torch.Tensor,
        depth: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        terms = primary_loss(restored, clear, estimate, depth, mode=self.mode, auxiliary_weight=self.depth_weight)
        names = {"primary": "restored", "primary_weighted": "restored_weighted", "auxiliary": "depth"}
        named = {names.get(name, name): value for name, value in terms.items()}
        return self._with_contrastive(named, restored, hazy, clear)

    def _depth(
        self, restored: torch.Tensor, clear: torch.Tensor, estimate: torch.Tensor, depth: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        terms = auxiliary_loss(restored, clear, estimate, depth, mode=self.mode)
        return {name.replace("auxiliary", "depth"): value for name, value in terms.items()}

    def _with_contrastive(
        self, terms: dict[str, torch.Tensor], restored: torch.Tensor, hazy: torch.Tensor, clear: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self.contrastive is not None:
            terms["contrastive"] = self.contrastive(restored, clear, hazy)
            terms["total"] = terms["total"] + self.contrastive_weight * terms["contrastive"]
        return terms

    @staticmethod
    def _estimate(output: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """The part of the depth network's output that belongs to the image."""
        return output[..., : depth.shape[2], : depth.shape[3]]

    @staticmethod
    def _check(
        restored: torch.Tensor,
        clear: torch.Tensor,
        hazy: torch.Tensor | None,
        depth_network: nn.Module | None,
        depth: torch.Tensor | None,
    ) -> None:
        check_map("restored", restored, 3)
        check_shape("clear", clear, tuple(restored.shape), "of restored")
        if hazy is not None:
            check_shape("hazy", hazy, tuple(restored.shape), "of restored")
        if (depth_network is None) != (depth is None):
            given, missing = ("depth", "depth_network") if depth_network is None else ("depth_network", "depth")
            raise ValueError(f"{missing}: got None, but {given} is given; the depth terms need both, or neither")
        if depth is not None:
            check_shape("depth", depth, (restored.shape[0], 1, *restored.shape[2:]), "[B, 1, H, W]")
