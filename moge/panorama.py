"""Panoramas: an equirectangular image is split into 12 perspective views, and their distances are merged into one distance map.

u runs once around, v from the top: theta = (1 - u) 2 pi, phi = v pi, direction (sin phi cos theta, sin phi sin theta, cos phi),
so z is up. Cameras are OpenCV with normalised intrinsics; images and maps are numpy arrays.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix, vstack
from scipy.sparse.linalg import lsmr


def panorama_cameras() -> tuple[np.ndarray, np.ndarray]:
    """Twelve world-to-camera matrices (12, 4, 4) that look at the vertices of an icosahedron, z up, and K (3, 3) of 90 x 90
    degrees.
    """
    a = (1 + 5**0.5) / 2
    ends = [(0, 1, a), (0, -1, a), (0, 1, -a), (0, -1, -a)]
    ends += [(1, a, 0), (-1, a, 0), (1, -a, 0), (-1, -a, 0)]
    ends += [(a, 0, 1), (a, 0, -1), (-a, 0, 1), (-a, 0, -1)]
    extrinsics = np.tile(np.eye(4), (12, 1, 1))
    for matrix, end in zip(extrinsics, np.array(ends, np.float64)):
        forward = end / np.linalg.norm(end)
        right = np.cross(forward, (0, 0, 1))
        right /= np.linalg.norm(right)
        matrix[:3, :3] = right, np.cross(forward, right), forward
    return extrinsics.astype(np.float32), np.array([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]], np.float32)


def equirectangular_directions(width: int, height: int) -> np.ndarray:
    """Unit directions (height, width, 3) of the pixels of a panorama."""
    theta = (1 - (np.arange(width) + 0.5) / width) * 2 * np.pi
    phi = ((np.arange(height) + 0.5) / height * np.pi)[:, None]
    x, y = np.sin(phi) * np.cos(theta), np.sin(phi) * np.sin(theta)
    return np.stack([x, y, np.broadcast_to(np.cos(phi), x.shape)], -1).astype(np.float32)


def directions_to_uv(directions: np.ndarray) -> np.ndarray:
    """(u, v) in 0..1 (..., 2) on the panorama of directions (..., 3) of any length."""
    x, y, z = np.moveaxis(np.asarray(directions, np.float64), -1, 0)
    u = 1 - np.mod(np.arctan2(y, x) / (2 * np.pi), 1)
    v = np.arctan2(np.hypot(x, y), z) / np.pi
    return np.stack([np.mod(u, 1), v], -1).astype(np.float32)


def view_directions(extrinsics: np.ndarray, K: np.ndarray, size: int) -> np.ndarray:
    """World directions (size, size, 3), z = 1 in the camera, of the pixels of a view."""
    c = (np.arange(size) + 0.5) / size
    u, v = np.meshgrid(c, c)
    return np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T @ extrinsics[:3, :3]  # rows times R = R^T times columns


def split_panorama(image: np.ndarray, extrinsics: np.ndarray, K: np.ndarray, size: int = 512) -> list[np.ndarray]:
    """Views (size, size, 3) of a panorama (H, W, 3) uint8."""
    H, W = image.shape[:2]
    image = np.concatenate([image[:, -2:], image, image[:, :2]], 1)  # so that interpolation goes on across the seam
    views = []
    for matrix in extrinsics:
        uv = directions_to_uv(view_directions(matrix, K, size))
        x, y = uv[..., 0] * W - 0.5 + 2, uv[..., 1] * H - 0.5
        views.append(
            cv2.remap(image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        )
    return views


def merge_panorama(
    width: int, height: int, distances: Sequence[np.ndarray], masks: Sequence[np.ndarray], extrinsics: np.ndarray, K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge distances along the rays (size, size), each known up to its own factor, with masks, into a panorama: distance and
    mask (H, W).

    Least squares in log distance: gradients and Laplacians of the result should equal those of the views, averaged over the
    views that see the pixels, so that neither the factors nor small disagreements show. Coarse to fine. The overall factor is
    free.
    """
    start = None
    if max(width, height) > 256:
        coarse, _ = merge_panorama(width // 2, height // 2, distances, masks, extrinsics, K)
        start = cv2.resize(np.log(coarse), (width, height), interpolation=cv2.INTER_LINEAR).reshape(-1)
    directions = equirectangular_directions(width, height)
    logs, seen = [], []
    for distance, mask, matrix in zip(distances, masks, extrinsics):
        p = directions @ (K @ matrix[:3, :3]).T
        front = p[..., 2] > 0
        uv = p[..., :2] / np.where(front, p[..., 2], 1)[..., None]
        h, w = distance.shape
        x, y = (uv[..., 0] * w - 0.5).astype(np.float32), (uv[..., 1] * h - 0.5).astype(np.float32)
        filled = np.log(np.where(mask, distance, 1)).astype(np.float32)
        logs.append(cv2.remap(filled, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
        known = cv2.remap(mask.astype(np.uint8), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE) > 0
        seen.append(front & (uv >= 0).all(-1) & (uv <= 1).all(-1) & known)
    logs, seen = np.stack(logs), np.stack(seen)  # (V, H, W)

    index = np.arange(width * height).reshape(height, width)
    systems = [_operator(logs, seen, index, stencil) for stencil in (((0, 0, -1), (0, 1, 1)), ((0, 0, -1), (1, 0, 1)))]
    systems.append(_operator(logs, seen, index, ((0, 0, -4), (0, 1, 1), (0, -1, 1), (1, 0, 1), (-1, 0, 1))))
    matrix, target = vstack([m for m, _ in systems]), np.concatenate([t for _, t in systems])
    solution = lsmr(matrix, target, atol=1e-5, btol=1e-5, x0=start)[0]
    return np.exp(solution).reshape(height, width).astype(np.float32), seen.any(0)


def infer_panorama(
    model, image: np.ndarray, batch_size: int = 4, view_size: int = 512, merge_width: int = 1920, **options
) -> dict:
    """Geometry of a panorama (H, W, 3) uint8 by a MoGe model: its views are inferred with their known camera and merged.

    merge_width: the merge is solved at this width at most, then enlarged. options: further arguments of `model.infer`.
    Returns float32 distance (H, W) along the rays, points (H, W, 3) with z up, both up to one factor, and mask (H, W) bool.
    """
    H, W = image.shape[:2]
    cameras, K = panorama_cameras()
    views = np.stack(split_panorama(image, cameras, K, view_size))
    device, distances, masks = next(model.parameters()).device, [], []
    for part in torch.from_numpy(views).split(batch_size):
        part = part.to(device).permute(0, 3, 1, 2).float() / 255
        out = model.infer(part, fov_x=90.0, apply_mask=False, **options)
        distances += list(out["points"].norm(dim=-1).cpu().numpy())
        masks += list(out["mask"].cpu().numpy())
    width = min(W, merge_width)
    distance, mask = merge_panorama(width, max(1, round(width * H / W)), distances, masks, cameras, K)
    distance = cv2.resize(distance, (W, H), interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask.astype(np.uint8), (W, H), interpolation=cv2.INTER_NEAREST) > 0
    return {"distance": distance, "points": distance[..., None] * equirectangular_directions(W, H), "mask": mask}


def _operator(logs: np.ndarray, seen: np.ndarray, index: np.ndarray, stencil: tuple) -> tuple[csr_matrix, np.ndarray]:
    """Equations "stencil of the solution = mean stencil of the views": sparse rows, right-hand side. Stencil: (row, column,
    factor).
    """
    height = index.shape[0]
    top, bottom = max(0, -min(i for i, _, _ in stencil)), height - max(i for i, _, _ in stencil)

    def moved(a: np.ndarray, i: int, j: int) -> np.ndarray:
        return np.roll(a, -j, axis=-1)[..., top + i : bottom + i, :]  # columns wrap around

    values = sum(f * moved(logs, i, j) for i, j, f in stencil)
    valid = np.all([moved(seen, i, j) for i, j, _ in stencil], axis=0)  # (V, rows, W)
    count = valid.sum(0)
    use = count > 0
    target = (values * valid).sum(0)[use] / count[use]
    rows = np.tile(np.arange(use.sum()), len(stencil))
    columns = np.concatenate([moved(index, i, j)[use] for i, j, _ in stencil])
    factors = np.repeat([float(f) for _, _, f in stencil], use.sum())
    return coo_matrix((factors, (rows, columns)), (use.sum(), index.size)).tocsr(), target
