"""Crops, resizes and photometric augmentation of one view. Images are (H, W, 3) uint8 RGB, sizes are (width, height).

Random draws and their application are separate: `draw_*` take a numpy Generator, the rest is deterministic.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

UPSAMPLING = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
GREY = np.array([0.2989, 0.587, 0.114])  # weights of red, green, blue


@dataclass(frozen=True)
class Crop:
    """How an image becomes a training view: cut `box`, resize it to `resized`, cut `size` at `corner`. K is the result's."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the source
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    K: np.ndarray  # (3, 3) float32


def draw_crop(rng: np.random.Generator, aug_focal: float, aug_crop: int) -> tuple[float, int]:
    """(zoom in aug_focal..1, enlargement of the target in pixels); aug_focal or aug_crop 0 turns its part off."""
    zoom = aug_focal + (1 - aug_focal) * rng.beta(0.5, 0.5) if aug_focal else 1.0
    return zoom, int(rng.integers(0, aug_crop)) if aug_crop else 0


def plan_crop(source: tuple[int, int], K: np.ndarray, size: tuple[int, int], zoom: float = 1.0, enlarge: int = 0) -> Crop:
    """The crop of a `source` image with intrinsics K (pixel centres at whole numbers) to exactly `size`.

    First the largest window centred on the principal point, of that the central part `zoom`, then a resize that just covers
    `size` plus `enlarge`, then the centre. ValueError if the principal point is within a fifth of the image from a border.
    """
    W, H = source
    K = np.array(K, np.float32)
    cx, cy = np.round(K[:2, 2]).astype(int)
    mx, my = min(cx, W - cx), min(cy, H - cy)
    if not (mx > W / 5 and my > H / 5):
        raise ValueError(f"principal point ({K[0, 2]:.1f}, {K[1, 2]:.1f}) is too close to the border of a {W}x{H} image")
    left, top, w, h = cx - mx, cy - my, 2 * mx, 2 * my
    zw, zh = math.floor(w * zoom), math.floor(h * zoom)
    left, top = left + (w - zw) // 2, top + (h - zh) // 2
    K[:2, 2] -= (left, top)
    scale = max((size[0] + enlarge) / zw, (size[1] + enlarge) / zh) + 1e-8
    rw, rh = math.floor(zw * scale), math.floor(zh * scale)
    # pixel centres lie at +0.5 while scaling; flooring the size then moves the centre by half of what it cut off
    lost = np.array([zw * scale - rw, zh * scale - rh]) / 2
    K[:2, 2] += 0.5
    K[:2] *= scale
    K[:2, 2] -= 0.5 + lost
    corner = np.round(np.array([rw - size[0], rh - size[1]]) / 2).astype(int)
    K[:2, 2] -= corner
    box = tuple(int(v) for v in (left, top, left + zw, top + zh))
    return Crop(box, (rw, rh), (int(corner[0]), int(corner[1])), size, K)


def crop_image(image: np.ndarray, crop: Crop) -> np.ndarray:
    """Apply a crop: Lanczos when shrinking, bicubic when enlarging."""
    left, top, right, bottom = crop.box
    (x, y), (w, h) = crop.corner, crop.size
    shrinks = crop.resized[0] < right - left or crop.resized[1] < bottom - top
    method = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    return np.asarray(part.resize(crop.resized, method))[y : y + h, x : x + w]


def crop_map(values: np.ndarray, crop: Crop) -> np.ndarray:
    """Apply a crop to a depth map or mask (H, W) by nearest neighbour: reads only the pixels it needs (also of a memory map)."""
    left, top, right, bottom = crop.box
    pick = lambda start, stop, resized, corner, n: start + np.minimum(
        np.floor(np.arange(corner, corner + n) * (1 / (resized / (stop - start)))).astype(int), stop - start - 1
    )
    columns = pick(left, right, crop.resized[0], crop.corner[0], crop.size[0])
    rows = pick(top, bottom, crop.resized[1], crop.corner[1], crop.size[1])
    return values[rows[:, None], columns]


def jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, gamma: float) -> np.ndarray:
    """Colour jitter in this order, clamped to 0..1 after each step; hue in turns (-0.5..0.5), gamma an exponent.

    Brightness and contrast act on single values, so they go through a table; contrast mixes with the image's mean grey.
    """
    table = np.clip(np.arange(256, dtype=np.float32) * np.float32(brightness / 255), 0, 1)
    histogram = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
    mean_grey = sum(w * (table @ counts) for w, counts in zip(GREY, histogram)) / (image.shape[0] * image.shape[1])
    table = np.clip(contrast * table + (1 - contrast) * mean_grey, 0, 1).astype(np.float32)
    x = cv2.LUT(image, table)
    mix = saturation * np.eye(3) + (1 - saturation) * GREY  # every output is a mix of its channel and the grey value
    x = cv2.transform(x, mix)
    x = np.clip(x, 0, 1, out=x)
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)  # hue in degrees
    h = hsv[..., 0] + 360 * hue
    hsv[..., 0] = h - 360 * np.floor(h / 360)
    x = np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), 0, 1)
    x = cv2.pow(x, gamma)
    return (x * 255).astype(np.uint8)  # truncated, as torchvision converts


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Encode and decode as JPEG."""
    coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.cvtColor(cv2.imdecode(coded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def blur(image: np.ndarray, ratio: float, method: int) -> np.ndarray:
    """Shrink by `ratio` with Lanczos, enlarge with filter number `method` of `UPSAMPLING`."""
    h, w = image.shape[:2]
    small = Image.fromarray(image).resize((int(w * ratio), int(h * ratio)), Image.Resampling.LANCZOS)
    return np.asarray(small.resize((w, h), UPSAMPLING[method]))


def draw_photometric(rng: np.random.Generator) -> dict:
    """Parameters of the training augmentation: jitter always, JPEG and blur (None: left out) half of the time each."""
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, 3)
    return {
        "jitter": (brightness, contrast, saturation, rng.uniform(-0.1, 0.1), rng.uniform(0.7, 1.3)),
        "jpeg": int(rng.integers(20, 100)) if rng.random() < 0.5 else None,
        "blur": (rng.uniform(0.25, 1), int(rng.integers(len(UPSAMPLING)))) if rng.random() < 0.5 else None,
    }


def photometric(image: np.ndarray, parameters: dict) -> np.ndarray:
    """Apply what `draw_photometric` drew."""
    image = jitter(image, *parameters["jitter"])
    if parameters["jpeg"] is not None:
        image = jpeg(image, parameters["jpeg"])
    return image if parameters["blur"] is None else blur(image, *parameters["blur"])


def inference_size(size: tuple[int, int], pixel_limit: int = 255_000, patch: int = 14) -> tuple[int, int]:
    """(width, height) in multiples of `patch` that keeps the aspect ratio and has at most `pixel_limit` pixels.

    Small images are enlarged to the limit.
    """
    W, H = size
    scale = (pixel_limit / (W * H)) ** 0.5
    k, m = round(W * scale / patch), round(H * scale / patch)
    while patch * patch * k * m > pixel_limit:
        if k / m > W / H:
            k -= 1
        else:
            m -= 1
    return patch * max(1, k), patch * max(1, m)
