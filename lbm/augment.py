"""Clip augmentations for point tracking (numpy and OpenCV): occluders, colour, blur, and a moving, zooming crop.

The recipe is CoTracker's (Karaev et al. 2023, section 4), with which LBM is trained. Frames stay uint8 throughout and only the
pixels that are needed are touched: colour jitter of the pasted patches alone, one resize per frame. Every draw comes from the
numpy Generator that is passed in. Lengths in pixels are meant for 512 x 512 frames; `scale` multiplies them.
Coordinates are pixel-edge ones: x in [0, W], the centre of the first pixel is at 0.5.
"""

from typing import NamedTuple

import cv2
import numpy as np

JITTER = (0.2, 0.2, 0.2, 0.25 / 3.14)  # brightness, contrast, saturation (each a factor of 1 +- value), hue (turns, +- value)


class View(NamedTuple):
    """Where the crop lies in each frame."""

    pad: tuple[int, int, int, int]  # zero rows and columns: top, bottom, left, right
    sizes: np.ndarray  # (T, 2) int, width and height of the padded frame after the resize
    factors: np.ndarray  # (T, 2) float, tracks are multiplied by these
    starts: np.ndarray  # (T, 2) int, left and top of the crop
    flips: tuple[bool, bool]  # left-right, top-bottom


# ------------------------------------------------------------------------------------------------------------------ colour


def jitter_parameters(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw for each of `count` frames the order of the four colour operations (count, 4) and their values (count, 4)."""
    draws = rng.random((count, 8))
    values = (2 * draws[:, 4:] - 1) * JITTER + (1, 1, 1, 0)
    return draws[:, :4].argsort(axis=1), values


def colour_jitter(image: np.ndarray, order: np.ndarray, values: np.ndarray, reference: int | None = None) -> np.ndarray:
    """Change brightness, contrast, saturation and hue in the given order, in uint8 after each as torchvision does.

    image: (h, w, 3) uint8 RGB. Contrast turns about the mean grey level of the first `reference` columns (all if None): a set of
    patches can so be treated as its whole frame would be, given a thumbnail of that frame as its first columns.
    """
    levels = np.arange(256, dtype=np.float32)
    for operation in order:
        value = float(values[operation])
        if operation == 0:
            image = cv2.LUT(image, (value * levels).clip(0, 255).astype(np.uint8))
        elif operation == 1:
            mean = int(cv2.mean(cv2.cvtColor(image[:, :reference], cv2.COLOR_RGB2GRAY))[0] + 0.5)
            image = cv2.LUT(image, (mean + value * (levels - mean)).clip(0, 255).astype(np.uint8))
        elif operation == 2:
            grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            image = cv2.addWeighted(image, value, grey, 1 - value, 0)
        else:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # the hue circle has 256 steps: uint8 wraps round as it should
            hsv[..., 0] += np.uint8(int(value * 255) % 256)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image


# --------------------------------------------------------------------------------------------------------------- occlusion


def draw_rectangle(rng: np.random.Generator, height: int, width: int, scale: float = 1.0) -> tuple[int, int, int, int]:
    """Draw x0, y0, x1, y1 of a rectangle with sides in [2, 100) about a uniform centre, cut off at the image border."""
    top = max(3, round(100 * scale))
    xc, yc = rng.integers(0, width), rng.integers(0, height)
    dx, dy = rng.integers(2, top), rng.integers(2, top)
    x0, x1 = (round(min(max(xc + side, 0), width - 1)) for side in (-dx / 2, dx / 2))
    y0, y1 = (round(min(max(yc + side, 0), height - 1)) for side in (-dy / 2, dy / 2))
    return x0, y0, x1, y1


def hide(visible: np.ndarray, tracks: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Make the points (P, 2) inside x0 <= x < x1, y0 <= y < y1 invisible, in place on visible (P,)."""
    x0, y0, x1, y1 = box
    x, y = tracks[:, 0], tracks[:, 1]
    visible &= ~((x >= x0) & (x < x1) & (y >= y0) & (y < y1))


def erase(frames: np.ndarray, tracks: np.ndarray, visible: np.ndarray, rng: np.random.Generator, scale: float = 1.0) -> None:
    """Fill 1 to 10 rectangles of every second frame (not the first) with their mean colour; works in place.

    frames (T, H, W, 3) uint8, tracks (T, P, 2), visible (T, P) bool.
    """
    height, width = frames.shape[1:3]
    for t in range(1, len(frames)):
        if rng.random() >= 0.5:
            continue
        for _ in range(rng.integers(1, 11)):
            x0, y0, x1, y1 = box = draw_rectangle(rng, height, width, scale)
            if x0 < x1 and y0 < y1:
                patch = frames[t, y0:y1, x0:x1]
                patch[:] = np.asarray(cv2.mean(patch)[:3]).astype(np.uint8)
                hide(visible[t], tracks[t], box)


def replace(frames: np.ndarray, tracks: np.ndarray, visible: np.ndarray, rng: np.random.Generator, scale: float = 1.0) -> None:
    """Paste 1 to 10 patches, taken anywhere in the clip and jittered in colour twice, into every second frame; in place.

    Arguments as of `erase`. All patches of one source frame get the same jitter. They are cut out before anything is pasted.
    """
    length, height, width = frames.shape[:3]
    jitters = [jitter_parameters(rng, length) for _ in range(2)]
    pastes = []  # (target frame, box, source frame, patch)
    for t in range(1, length):
        if rng.random() >= 0.5:
            continue
        for _ in range(rng.integers(1, 11)):
            x0, y0, x1, y1 = box = draw_rectangle(rng, height, width, scale)
            y, x = rng.integers(0, height - (y1 - y0)), rng.integers(0, width - (x1 - x0))
            source = int(rng.integers(0, length))
            if x0 < x1 and y0 < y1:
                pastes.append((t, box, source, frames[source, y : y + y1 - y0, x : x + x1 - x0].reshape(1, -1, 3)))

    coloured = {}
    for source in {paste[2] for paste in pastes}:  # per source frame one row of pixels: a thumbnail, then all its patches
        thumbnail = frames[source, ::8, ::8].reshape(1, -1, 3)
        pixels = np.concatenate([thumbnail, *(paste[3] for paste in pastes if paste[2] == source)], axis=1)
        for order, values in jitters:
            pixels = colour_jitter(pixels, order[source], values[source], reference=thumbnail.shape[1])
        coloured[source] = pixels[0, thumbnail.shape[1] :]
    for t, box, source, _ in pastes:
        x0, y0, x1, y1 = box
        count = (y1 - y0) * (x1 - x0)
        frames[t, y0:y1, x0:x1] = coloured[source][:count].reshape(y1 - y0, x1 - x0, 3)
        coloured[source] = coloured[source][count:]
        hide(visible[t], tracks[t], box)


def photometric(
    frames: np.ndarray, tracks: np.ndarray, visible: np.ndarray, rng: np.random.Generator, scale: float = 1.0
) -> None:
    """Erase, replace, then with probability 1/4 each jitter the colours and blur every frame by its own draw; in place.

    frames (T, H, W, 3) uint8, tracks (T, P, 2) pixels, visible (T, P) bool. The first frame gets no occluder.
    """
    erase(frames, tracks, visible, rng, scale)
    replace(frames, tracks, visible, rng, scale)
    if rng.random() < 0.25:
        for frame, order, values in zip(frames, *jitter_parameters(rng, len(frames))):
            frame[:] = colour_jitter(frame, order, values)
    if rng.random() < 0.25:
        for frame, sigma in zip(frames, 0.1 + 1.9 * rng.random(len(frames))):
            frame[:] = cv2.GaussianBlur(frame, (11, 11), float(sigma) * scale, borderType=cv2.BORDER_REFLECT_101)


# ---------------------------------------------------------------------------------------------------------------- geometry


def draw_view(
    frame_size: tuple[int, int],
    tracks: np.ndarray,
    visible: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int] = (384, 512),
    scale: float = 1.0,
) -> View:
    """Draw padding, a zoom that drifts from frame to frame, a crop of `size` that wanders, and two flips.

    frame_size and size are (height, width); tracks (T, P, 2) pixels, visible (T, P). The crop starts centred on the points that
    are visible in the first frame. A zoom never makes a frame smaller than the crop and a margin of 10 pixels.
    """
    length, crop = len(tracks), np.array(size[::-1])
    left, right, top, bottom = (int(rng.integers(0, max(1, round(25 * scale)))) for _ in range(4))
    padded = np.array([frame_size[1] + left + right, frame_size[0] + top + bottom])  # width, height

    zoom = np.full(2, rng.uniform(0.75, 1.25))
    drift, sizes, factors = np.zeros(2), [], []
    for t in range(length):
        if t > 0:
            push = np.array([rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)])
            drift = push if t == 1 else 0.8 * drift + 0.2 * push
        zoom = zoom + drift
        zoom = ((zoom + zoom.mean()) / 2).clip(0.2, 2)  # halfway back to equal zoom in x and y
        sizes.append(np.maximum((padded * zoom).astype(int), crop + round(10 * scale)))
        zoom = (sizes[-1] - 1) / (padded - 1)  # CoTracker's ratio; W'/W would be exact, the gap is under 0.5 px
        factors.append(zoom)

    seen = ((tracks[0] + (left, top)) * factors[0])[visible[0]]
    start = ((seen.mean(axis=0) if len(seen) else crop) - crop // 2).astype(int)
    reach = max(1, round(15 * scale))
    shift, starts = np.zeros(2, int), []
    for t in range(length):
        if t > 0:
            push = np.array([rng.integers(-reach, reach + 1), rng.integers(-reach, reach + 1)])
            shift = push if t == 1 else (0.8 * shift + 0.2 * push).astype(int)
        start = (start + shift).clip(0, sizes[t] - crop - 1)
        starts.append(start)
    flips = (bool(rng.random() < 0.5), bool(rng.random() < 0.5))
    return View((top, bottom, left, right), np.stack(sizes), np.stack(factors), np.stack(starts), flips)


def move_tracks(tracks: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """Return tracks (T, P, 2) of the frames as float32 coordinates of the crops of `size` (height, width)."""
    moved = (tracks + (view.pad[2], view.pad[0])) * view.factors[:, None] - view.starts[:, None]
    return np.where(view.flips, size[::-1] - moved, moved).astype(np.float32)


def crop_frames(frames: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """Pad, zoom, crop and flip frames (T, H0, W0, 3) uint8 to (T, H, W, 3); values are interpolated in uint8, to within 0.8."""
    height, width = size
    out = np.empty((len(frames), height, width, 3), np.uint8)
    mirror = {(False, False): None, (True, False): 1, (False, True): 0, (True, True): -1}[view.flips]
    for t, frame in enumerate(frames):
        x, y = view.starts[t]
        zoomed = cv2.resize(cv2.copyMakeBorder(frame, *view.pad, cv2.BORDER_CONSTANT), view.sizes[t].tolist())
        window = zoomed[y : y + height, x : x + width]
        out[t] = window if mirror is None else cv2.flip(window, mirror)
    return out


def centre_crop(frames: np.ndarray, tracks: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cut the middle (H, W) out of frames (T, H0, W0, 3) and move the tracks (T, P, 2) with it."""
    y, x = ((have - want) // 2 for have, want in zip(frames.shape[1:3], size))
    return frames[:, y : y + size[0], x : x + size[1]], tracks - np.float32([x, y])
