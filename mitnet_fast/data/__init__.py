"""Images and data sets: reading and writing, the published sets' layouts, pairs for training, haze, depth maps."""

from __future__ import annotations

from .depth import find_depth, read_depth, write_card, write_depth
from .haze import HazeParameters, depth_from_disparity, sample_haze, synthesise_haze
from .images import ImageError, ImageFile, read_image, read_size, to_float, write_image
from .layouts import LAYOUTS, DataError, Pair, Problem, Recognised, Report, check, recognise
from .paired import PairedImages
from .teacher import estimate_depth, load_teacher
from .transforms import AUGMENTATIONS, Geometry

__all__ = [
    "AUGMENTATIONS",
    "LAYOUTS",
    "DataError",
    "Geometry",
    "HazeParameters",
    "ImageError",
    "ImageFile",
    "Pair",
    "PairedImages",
    "Problem",
    "Recognised",
    "Report",
    "check",
    "depth_from_disparity",
    "estimate_depth",
    "find_depth",
    "load_teacher",
    "read_depth",
    "read_image",
    "read_size",
    "recognise",
    "sample_haze",
    "synthesise_haze",
    "to_float",
    "write_card",
    "write_depth",
    "write_image",
]
