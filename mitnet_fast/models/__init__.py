"""The published networks, complete, and their checkpoints."""

from .dcmpnet import DCMPNet, DCMPNetOutput, DepthSharingDCMPNet
from .depthnet import DepthNet
from .mitnet import MITNet, MITNetOutput
from .official import CheckpointError

__all__ = ["CheckpointError", "DCMPNet", "DCMPNetOutput", "DepthNet", "DepthSharingDCMPNet", "MITNet", "MITNetOutput"]
