"""Geometry of stereo augmentations on numpy arrays."""

import numpy as np


def right_view_disparity(left_disp: np.ndarray) -> np.ndarray:
    """Disparity of the right view by forward warping the left one: (H, W) -> (H, W) of the same dtype, 0 = unknown.

    Left pixel (y, x) with disparity d > 0 is seen at right column floor(x - d + 1/2); where several land the nearest
    surface, the largest disparity, wins. Targets outside the row are dropped.
    """
    y, x = np.nonzero(np.isfinite(left_disp) & (left_disp > 0))
    d = left_disp[y, x]
    target = np.floor(x - d.astype(np.float64) + 0.5).astype(np.int64)
    inside = target >= 0  # d > 0: never beyond the right edge
    right = np.zeros_like(left_disp)
    np.maximum.at(right, (y[inside], target[inside]), d[inside])
    return right
