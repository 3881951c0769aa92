"""The operators that the networks spend their time in, one public function each.

Every function takes ``backend``: None chooses the best that can run, a name forces one or raises
with the reasons why it cannot run.
"""

from ._amplitude_phase import amplitude_and_phase, amplitude_phase_conv, half_spectrum, recombine
from ._backends import BACKENDS
from ._dynamic_filter import dynamic_filter, predicted_dynamic_filter
from ._window_attention import window_attention

__all__ = [
    "BACKENDS",
    "amplitude_and_phase",
    "amplitude_phase_conv",
    "dynamic_filter",
    "half_spectrum",
    "predicted_dynamic_filter",
    "recombine",
    "window_attention",
]
