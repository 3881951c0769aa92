"""The networks' building blocks, each usable alone in other networks."""

from .amplitude_phase import AmplitudePhaseBlock
from .dilated_dense import DRDB
from .dynamic_filter import DynamicFilterBlock
from .legm import LEGM
from .modulation_fusion import MFM
from .msaam import MSAAM
from .supervised_attention import SupervisedAttention
from .triple_interaction import TripleInteraction
from .unet_prior import UNetPrior

__all__ = [
    "DRDB",
    "LEGM",
    "MFM",
    "MSAAM",
    "AmplitudePhaseBlock",
    "DynamicFilterBlock",
    "SupervisedAttention",
    "TripleInteraction",
    "UNetPrior",
]
