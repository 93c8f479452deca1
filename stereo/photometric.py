"""Colour changes of a stereo pair: jitter and erased patches, on uint8 images. Geometry and ground truth stay as they are."""

import cv2
import numpy as np

# brightness, contrast and gamma: factors; saturation: factor; hue: share of the colour circle
PRESETS = {
    "mild": {"brightness": (0.8, 1.2), "contrast": (0.8, 1.2), "saturation": (0, 1.4), "hue": (-0.05, 0.05), "gamma": (0.8, 1.2)},
    "raft": {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0, 1.4), "hue": (-0.5 / np.pi, 0.5 / np.pi)},
    "raft_sparse": {
        "brightness": (0.7, 1.3),
        "contrast": (0.7, 1.3),
        "saturation": (0.7, 1.3),
        "hue": (-0.3 / np.pi, 0.3 / np.pi),
    },
}
ASYMMETRIC = {"mild": 0.2, "raft": 0.2, "raft_sparse": 0.0}  # probability that the two views get different factors
LEVELS = np.arange(256, dtype=np.float32)


def table(values: np.ndarray) -> np.ndarray:
    return np.rint(values.clip(0, 255)).astype(np.uint8)


def adjust(image: np.ndarray, kind: str, factor: float) -> np.ndarray:
    """One change of an RGB image (H, W, 3) uint8, saturating."""
    if kind == "brightness":
        return cv2.LUT(image, table(LEVELS * factor))
    if kind == "gamma":
        return cv2.LUT(image, table(255 * (LEVELS / 255) ** factor))
    if kind == "contrast":  # about the mean grey level
        mean = np.dot(cv2.mean(image)[:3], (0.299, 0.587, 0.114))
        return cv2.LUT(image, table(mean + factor * (LEVELS - mean)))
    if kind == "saturation":
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(image, factor, grey, 1 - factor, 0)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * factor) % 256)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def jitter(left: np.ndarray, right: np.ndarray, rng: np.random.Generator, preset: str = "mild") -> tuple[np.ndarray, np.ndarray]:
    """Change brightness, contrast, saturation, hue and gamma of both views, mostly by the same factors.

    "mild": in this order. "raft" (RAFT-Stereo's): stronger, in random order; "raft_sparse": its form for sparse ground truth.
    """
    ranges = PRESETS[preset]
    order = list(ranges) if preset == "mild" else list(rng.permutation(list(ranges)))
    draw = lambda: {kind: rng.uniform(*ranges[kind]) for kind in ranges}
    factors, other, apart = draw(), draw(), rng.random() < ASYMMETRIC[preset]
    if not apart:  # as one picture: the same map of colours for both
        both = np.concatenate([left, right])
        for kind in order:
            both = adjust(both, kind, factors[kind])
        return both[: len(left)], both[len(left) :]
    for kind in order:
        left, right = adjust(left, kind, factors[kind]), adjust(right, kind, other[kind])
    return left, right


def erase(right: np.ndarray, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """A copy of the right view with one or two rectangles in its mean colour, sides of 50 to 99 pixels times `scale`."""
    right, mean = right.copy(), np.rint(cv2.mean(right)[:3]).astype(np.uint8)
    for _ in range(rng.integers(1, 3)):
        x, y = rng.integers(0, right.shape[1]), rng.integers(0, right.shape[0])
        width, height = np.maximum(1, rng.integers(50, 100, 2) * scale).astype(int)
        right[y : y + height, x : x + width] = mean
    return right
