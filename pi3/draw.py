"""Pictures: cameras and points from above, training views beside truth, overlap of views."""

import cv2
import numpy as np

from common.io import colorize, contact_sheet


def label(image: np.ndarray, text: str) -> np.ndarray:
    """A copy of an image with a line of text in its upper left corner."""
    out = np.ascontiguousarray(image)
    for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(out, text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, width, cv2.LINE_AA)
    return out


def depth_pictures(depth: np.ndarray, mask: np.ndarray | None = None) -> list[np.ndarray]:
    """Depth maps (N, H, W) in one colour scale over log depth, near is red; black off the mask and where depth is not above 0."""
    ok = np.isfinite(depth) & (depth > 0)
    ok = ok if mask is None else ok & mask
    logs = -np.log(np.where(ok, depth, 1))
    low, high = np.percentile(logs[ok], (2, 98)) if ok.any() else (0, 1)
    return [colorize(np.where(m, d, np.nan), low, high) for d, m in zip(logs, ok)]


def _plan(poses: np.ndarray) -> np.ndarray:
    """Rows (2, 3): directions right and forward of a map from above, above being where the cameras' tops point on average."""
    down = poses[:, :3, 1].mean(0)
    down /= max(np.linalg.norm(down), 1e-9)
    forward = poses[:, :3, 2].mean(0)
    forward -= down * (forward @ down)
    if np.linalg.norm(forward) < 0.05:  # they look all around: any direction will do
        forward = np.cross(down, np.eye(3)[np.abs(down).argmin()])
    forward /= np.linalg.norm(forward)
    return np.stack([np.cross(down, forward), forward])


def top_down(
    poses: np.ndarray, points: np.ndarray, colors: np.ndarray, size: int = 480, truth: np.ndarray | None = None
) -> np.ndarray:
    """Cameras (first blue, last red) and points from above, (size, size, 3) uint8.

    poses: (N, 4, 4) camera-to-world; points (n, 3), colors (n, 3) uint8; truth: further poses, in grey, in the same frame.
    """
    plan, every = _plan(poses), poses if truth is None else np.concatenate([poses, truth])
    centres, flat = every[:, :3, 3] @ plan.T, points @ plan.T
    low, high = (np.percentile(flat, (2, 98), axis=0) if len(flat) else (centres.min(0), centres.max(0)))
    low, high = np.minimum(low, centres.min(0)), np.maximum(high, centres.max(0))
    span = max((high - low).max() * 1.15, 1e-6)
    to_pixels = lambda xy: (np.array([0.5, 0.5]) + (xy - (low + high) / 2) / span * [1, -1]) * (size - 1)
    image = np.full((size, size, 3), 255, np.uint8)
    at = np.rint(to_pixels(flat)).astype(int)
    inside = ((at >= 0) & (at < size)).all(1)
    order = np.argsort(points[inside] @ np.cross(plan[1], plan[0]))  # the highest last, on top
    image[at[inside, 1][order], at[inside, 0][order]] = colors[inside][order]
    shades = colorize(np.linspace(0, 1, len(poses))[None], 0, 1)[0].tolist()
    for pose, colour in [(p, [130, 130, 130]) for p in (truth if truth is not None else [])] + list(zip(poses, shades)):
        R, t = pose[:3, :3], pose[:3, 3]
        reach = 0.05 * span
        corners = np.stack([t, t + reach * (R[:, 2] + 0.6 * R[:, 0]), t + reach * (R[:, 2] - 0.6 * R[:, 0])]) @ plan.T
        corners = np.rint(to_pixels(corners) * 16).astype(np.int32)
        cv2.polylines(image, [corners], True, colour, 2, cv2.LINE_AA, 4)
        cv2.circle(image, tuple(int(v) for v in corners[0]), 3 * 16, colour, -1, cv2.LINE_AA, 4)
    return image


def training_picture(images: np.ndarray, depth: np.ndarray, mask: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3), true depth with its mask and predicted depth (N, H, W), brought to the truth's median: three rows."""
    both = mask & (predicted > 0)
    scale = np.median(depth[both]) / np.median(predicted[both]) if both.any() else 1.0
    maps = depth_pictures(np.concatenate([depth, predicted * scale]), np.concatenate([mask, np.ones_like(mask)]))
    return contact_sheet([*images, *maps], columns=len(images))


def overlap_picture(images: np.ndarray, seen: np.ndarray, names: list[str]) -> np.ndarray:
    """Views (N, H, W, 3), and below each the same view with the pixels that `seen` (N, N, H, W) other views see in colour.

    The last cell is the matrix of shares: row i, column j is the part of view i that view j sees.
    """
    n, h, w = images.shape[:3]
    grey = images.mean(-1, keepdims=True).repeat(3, -1) * 0.35
    others = (seen & ~np.eye(n, dtype=bool)[:, :, None, None]).sum(1) / max(n - 1, 1)  # (N, H, W) share of the other views
    tint = np.stack([colorize(o, 0, 1) for o in others])
    lower = np.where(others[..., None] > 0, 0.5 * images + 0.5 * tint, grey).astype(np.uint8)
    share = seen.mean((2, 3))
    cell = max(1, min(h, w) // n)
    matrix = cv2.resize(colorize(share, 0, 1), (cell * n, cell * n), interpolation=cv2.INTER_NEAREST)
    for i in range(n):
        for j in range(n):
            place = (j * cell + cell // 2 - 9, i * cell + cell // 2 + 4)
            text = f"{100 * share[i, j]:.0f}"
            cv2.putText(matrix, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.35, (255, 255, 255), 1, cv2.LINE_AA)
    upper, white = [label(image, name) for image, name in zip(images, names)], np.full((1, 1, 3), 255, np.uint8)
    return contact_sheet([*upper, white, *lower, matrix], columns=n + 1)
