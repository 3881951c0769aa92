"""Networks that are small enough to try many things with."""

SMALL_DCMPNET = {
    "widths": (4, 4, 4),
    "depths": (1, 1, 1, 1, 1),
    "heads": (1, 1, 1, 1, 1),
    "prior_widths": (2, 2, 4, 4, 4),
    "depth_widths": (4,),
    "growth": 2,
}
