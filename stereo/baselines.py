"""What a stereo network has to beat: the best constant disparity, and OpenCV's semi-global matching."""

import cv2
import numpy as np


def constant(truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The median of the ground truth everywhere: no constant has a smaller mean error. truth, mask: (H, W)."""
    return np.full(truth.shape, np.median(truth[mask]) if mask.any() else 0, np.float32)


def fill(disparity: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Fill unknown pixels of each row with the smaller (farther) of the nearest known values to the left and right."""

    def carry(values, known):  # the last known value of the row up to here, inf before the first
        last = np.maximum.accumulate(np.where(known, np.arange(values.shape[1]), -1), axis=1)
        return np.where(last >= 0, np.take_along_axis(values, last.clip(0), 1), np.inf)

    both = np.minimum(carry(disparity, known), carry(disparity[:, ::-1], known[:, ::-1])[:, ::-1])
    return np.where(known, disparity, np.where(np.isfinite(both), both, 0)).astype(np.float32)


def sgbm(left: np.ndarray, right: np.ndarray, max_disparity: float) -> np.ndarray:
    """Disparity (H, W) float32 px by cv2.StereoSGBM (full 8 directions, 5x5 blocks, left-right check), holes filled by `fill`.

    left, right: (H, W, 3) uint8 RGB. The search range is max_disparity rounded up to a multiple of 16.
    """
    count, block = max(16, -(-int(np.ceil(max_disparity)) // 16) * 16), 5
    small = {"P1": 24 * block**2, "P2": 96 * block**2, "disp12MaxDiff": 1, "uniquenessRatio": 10}
    matcher = cv2.StereoSGBM_create(0, count, block, speckleWindowSize=100, speckleRange=2, mode=cv2.STEREO_SGBM_MODE_HH, **small)
    padded = [cv2.copyMakeBorder(view, 0, 0, count, 0, cv2.BORDER_REPLICATE) for view in (left, right)]  # it leaves a strip out
    disparity = matcher.compute(*padded)[:, count:].astype(np.float32) / 16
    return fill(disparity, disparity > 0)
