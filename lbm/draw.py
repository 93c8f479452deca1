"""Pictures of tracks."""

import cv2
import numpy as np


def colours(tracks: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return (N, 3) uint8 RGB, a hue for each point by the height at which it is first seen: neighbours look alike."""
    first = visible.argmax(axis=0)  # (N,)
    rank = np.nan_to_num(tracks[first, np.arange(len(first)), 1]).argsort().argsort()
    hue = (rank * 230 / max(len(rank), 1)).astype(np.uint8)  # of 256: the ends of the circle stay apart
    hsv = np.stack([hue, np.full_like(hue, 210), np.full_like(hue, 255)], axis=-1)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB_FULL)[0] if len(rank) else np.zeros((0, 3), np.uint8)


def draw_tracks(frames: np.ndarray, tracks: np.ndarray, visible: np.ndarray, trail: int = 12) -> np.ndarray:
    """Draw each point as a dot (a ring where it is hidden) with the fading trail of its last `trail` frames.

    frames: (T, H, W, 3) uint8 RGB, tracks: (T, N, 2) pixels, NaN where there is nothing to draw, visible: (T, N) bool. Returns
    new frames of the same shape.
    """
    height, width = frames.shape[1:3]
    unit = max(1.0, min(height, width) / 256)  # line width, so that pictures of any size look alike
    bits = 4  # OpenCV takes fixed-point places; its pixel centres are whole numbers
    places = np.clip(np.nan_to_num(tracks) - 0.5, -width - height, 2 * (width + height))
    places = np.rint(places * 2**bits).astype(int).tolist()
    known = np.isfinite(tracks).all(-1)
    visible, paint = np.asarray(visible, bool) & known, colours(tracks, visible).tolist()
    layer, opacity = np.zeros_like(frames[0]), np.zeros((height, width), np.float32)
    out = np.empty_like(frames)
    for t, frame in enumerate(frames):
        fresh = np.zeros((height, width), np.uint8)
        for n in np.flatnonzero(visible[t] & visible[t - 1]) if t and trail else ():
            cv2.line(layer, places[t - 1][n], places[t][n], paint[n], round(unit) + 2, cv2.LINE_8, bits)
            cv2.line(fresh, places[t - 1][n], places[t][n], 255, round(unit), cv2.LINE_AA, bits)
        opacity = np.maximum(opacity * 0.1 ** (1 / max(trail, 1)), fresh / np.float32(255))
        image = np.rint(frame + (layer - frame.astype(np.float32)) * opacity[..., None]).astype(np.uint8)
        for n in np.flatnonzero(known[t]):
            place, radius = places[t][n], round(1.6 * unit * 2**bits)
            if visible[t, n]:
                cv2.circle(image, place, radius + 2**bits // 2, (0, 0, 0), -1, cv2.LINE_AA, bits)  # a dark rim
                cv2.circle(image, place, radius, paint[n], -1, cv2.LINE_AA, bits)
            else:
                cv2.circle(image, place, radius, paint[n], 1, cv2.LINE_AA, bits)
        out[t] = image
    return out
