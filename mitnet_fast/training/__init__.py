"""Training of MITNet and DCMPNet: configuration, systems, one loop for both, checkpoints that resume exactly."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import PRESETS, ConfigError, Configuration, load_changes, load_config, to_yaml
from .systems import DCMPNetSystem, MITNetSystem, System, TrainingDiverged, build_system
from .trainer import RunFolderError, TrainingResult, train

__all__ = [
    "PRESETS",
    "ConfigError",
    "Configuration",
    "DCMPNetSystem",
    "MITNetSystem",
    "RunFolderError",
    "System",
    "TrainingDiverged",
    "TrainingResult",
    "build_system",
    "load_changes",
    "load_checkpoint",
    "load_config",
    "save_checkpoint",
    "to_yaml",
    "train",
]
