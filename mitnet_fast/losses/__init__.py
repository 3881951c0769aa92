"""Training losses of both systems, and the parts that are useful alone."""

from .contrastive import ContrastiveLoss
from .dcmpnet import DCMPNetLoss
from .difference_perception import auxiliary_loss, difference_weights, primary_loss, through_frozen
from .mitnet import MITNetLoss
from .mutual_information import MutualInformation
from .ssim import ssim

__all__ = [
    "ContrastiveLoss",
    "DCMPNetLoss",
    "MITNetLoss",
    "MutualInformation",
    "auxiliary_loss",
    "difference_weights",
    "primary_loss",
    "ssim",
    "through_frozen",
]
