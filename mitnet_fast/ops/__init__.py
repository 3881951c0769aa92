"""The operators that the networks spend their time in, one public function each.

The kernel functions take ``backend``: None chooses the best that can run, a name
("reference", "cpp", "triton") forces one or raises with every reason why it cannot run. A context,
:func:`use_backend`, or the variable ``MITNET_FAST_BACKEND`` forces one for all calls.
"""

from ._amplitude_phase import amplitude_phase_conv
from ._backends import BACKENDS, BackendError, use_backend
from ._dynamic_filter import dynamic_filter, predicted_dynamic_filter
from ._feature_mixing import (
    conv_relu,
    dense_block,
    local_global_mixing,
    local_mixing,
    normalized_qkv,
    pointwise_mlp,
    residual_conv,
)
from ._image_spectrum import amplitude_and_phase, half_spectrum, recombine
from ._window_attention import window_attention

__all__ = [
    "BACKENDS",
    "BackendError",
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
    "use_backend",
    "window_attention",
]
