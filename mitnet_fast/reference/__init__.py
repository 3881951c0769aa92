"""The operators in plain PyTorch: the formulas as they are written, and the truth for every kernel.

Nothing here checks its arguments (``mitnet_fast.ops`` does) and nothing here is fast on purpose.
Every function is differentiable by autograd and works in any floating-point dtype and layout.
"""

from .amplitude_phase import amplitude_and_phase, amplitude_phase_conv, half_spectrum, recombine
from .dynamic_filter import dynamic_filter, predicted_dynamic_filter
from .feature_mixing import (
    conv_relu,
    dense_block,
    local_global_mixing,
    local_mixing,
    normalized_qkv,
    pointwise_mlp,
    residual_conv,
)
from .window_attention import window_attention

__all__ = [
    "amplitude_and_phase",
    "amplitude_phase_conv",
    "conv_relu",
    "dense_block",
    "dynamic_filter",
    "half_spectrum",
    "local_global_mixing",
    "local_mixing",
    "normalized_qkv",
    "pointwise_mlp",
    "predicted_dynamic_filter",
    "recombine",
    "residual_conv",
    "window_attention",
]
