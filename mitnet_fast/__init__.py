"""MITNet and DCMPNet, complete, with custom kernels for their three costly operators."""

__version__ = "0.1.0"
