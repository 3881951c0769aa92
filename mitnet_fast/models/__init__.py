"""The published networks, complete, and their checkpoints."""

from .dcmpnet import DCMPNet, DCMPNetOutput
from .depthnet import DepthNet
from .mitnet import MITNet, MITNetOutput
from .official import CheckpointError

__all__ = ["CheckpointError", "DCMPNet", "DCMPNetOutput", "DepthNet", "MITNet", "MITNetOutput"]
