"""Scaling, cropping, flipping and mis-rectifying a stereo pair in one resampling, and the disparity of the result.

A `View` maps pixels of the crop to pixels of the source, both counted from 0 at the centre of the first pixel. Both images go
through the same horizontal map, so that a point at (x, y) on the left of the crop still is at (x - d, y) on the right, d scaled
with the width.
"""

from typing import NamedTuple

import cv2
import numpy as np


class View(NamedTuple):
    """source x = x_scale * x + x_start, source y likewise; negative scales mirror. `swapped`: the views are exchanged, as a
    horizontal mirror asks for. Imperfect rectification: the right image is read `shift` + `slope` * (x - centre) rows lower."""

    x_scale: float
    x_start: float
    y_scale: float
    y_start: float
    swapped: bool = False
    shift: float = 0.0
    slope: float = 0.0


def draw_scale(
    rng: np.random.Generator, source: tuple[int, int], crop: tuple[int, int], stretch: bool, sparse: bool
) -> tuple[float, float]:
    """Magnification (sx, sy) of a source (H, W) from which `crop` (h, w) is cut; it always fits.

    stretch (RAFT-Stereo): 2^U(-0.2, 0.4), and with probability 0.8 each axis by 2^U(-0.2, 0.2) more. Sparse ground truth: one
    factor for both axes, with probability 0.8. Without `stretch` 1, or what makes a smaller image fit.
    """
    (H, W), (h, w) = source, crop
    if not stretch or (sparse and rng.random() >= 0.8):
        fit = max(h / H, w / W, 1.0)
        return fit, fit
    sx = sy = 2 ** rng.uniform(-0.2, 0.4)
    if not sparse and rng.random() < 0.8:
        sx, sy = sx * 2 ** rng.uniform(-0.2, 0.2), sy * 2 ** rng.uniform(-0.2, 0.2)
    least = max((h + 8) / H, (w + 8) / W)
    return max(sx, least), max(sy, least)


def draw_view(
    rng: np.random.Generator,
    source: tuple[int, int],
    crop: tuple[int, int],
    scale: tuple[float, float],
    mirror: bool = False,
    upside_down: bool = False,
    shift: float = 0.0,
    slope: float = 0.0,
    centre: bool = False,
) -> View:
    """A view of `crop` (h, w) at a random place (the middle with `centre`) of a source (H, W) magnified by (sx, sy)."""
    (H, W), (h, w), (sx, sy) = source, crop, scale
    place = [0.5, 0.5] if centre else rng.random(2)
    x0, y0 = (np.floor(place[i] * (max(side, 0) + 1 - 1e-9)) for i, side in enumerate((round(W * sx) - w, round(H * sy) - h)))
    x_start, y_start = (x0 + 0.5) / sx - 0.5, (y0 + 0.5) / sy - 0.5
    x_scale, y_scale = 1 / sx, 1 / sy
    if mirror:
        x_scale, x_start = -x_scale, W - 1 - x_start
    if upside_down:
        y_scale, y_start = -y_scale, H - 1 - y_start
    return View(x_scale, x_start, y_scale, y_start, mirror, shift, slope)


def warp_image(image: np.ndarray, view: View, crop: tuple[int, int], right: bool = False) -> np.ndarray:
    """The crop (h, w, 3) of an image (H, W, 3) uint8, bilinear; `right` applies the imperfect rectification."""
    h, w = crop
    shift, slope = (view.shift, view.slope) if right else (0.0, 0.0)
    whole = (
        (abs(view.x_scale), abs(view.y_scale)) == (1, 1) and float(view.x_start).is_integer() and float(view.y_start).is_integer()
    )
    if whole and not shift and not slope:  # no resampling: exact
        cut = image[cut_slice(view.y_start, view.y_scale, h), cut_slice(view.x_start, view.x_scale, w)]
        return np.ascontiguousarray(cut)
    row = [view.y_scale * slope, view.y_scale, view.y_start + view.y_scale * (shift - slope * (w - 1) / 2)]
    matrix = np.float64([[view.x_scale, 0, view.x_start], row])
    return cv2.warpAffine(image, matrix, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)


def cut_slice(start: float, step: float, count: int) -> slice:
    """start, start + step, ... as a slice, for steps of 1 or -1."""
    stop = int(start + step * count)
    return slice(int(start), stop if stop >= 0 else None, int(step))


def nearest(view: View, source: tuple[int, int], crop: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows (h,) and columns (w,) of the source pixels nearest to the crop's."""
    rows = np.floor(view.y_scale * np.arange(crop[0]) + view.y_start + 0.5).astype(np.intp)
    columns = np.floor(view.x_scale * np.arange(crop[1]) + view.x_start + 0.5).astype(np.intp)
    return rows.clip(0, source[0] - 1), columns.clip(0, source[1] - 1)


def scatter_disparity(disparity: np.ndarray, view: View, crop: tuple[int, int]) -> np.ndarray:
    """Sparse disparity (H, W), 0 = none, moved point by point to the nearest pixel of the crop; the nearer surface wins."""
    y, x = np.nonzero(disparity)
    values = disparity[y, x] / np.float32(abs(view.x_scale))
    x = np.floor((x - view.x_start) / view.x_scale + 0.5).astype(np.intp)
    y = np.floor((y - view.y_start) / view.y_scale + 0.5).astype(np.intp)
    inside = (x >= 0) & (x < crop[1]) & (y >= 0) & (y < crop[0])
    out = np.zeros(crop, np.float32)
    np.maximum.at(out, (y[inside], x[inside]), values[inside])
    return out
