"""Evaluation metrics: relative poses, trajectories, reconstructed points, depth. Protocols follow arXiv 2507.13347, section 4.

Poses and points are numpy arrays and are handled in float64; depth maps are arrays or tensors of any device.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor


# relative poses (RealEstate10K, CO3Dv2)


def relative_pose_errors(pred: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles in degrees of rotation and translation direction between E_j E_i^-1 of prediction and truth, all pairs i < j.

    pred, target: world-to-camera matrices (N, 4, 4). Returns two arrays of N (N-1) / 2 values. The direction of the translation
    is taken without its sign, so that its error is at most 90 degrees.
    """
    i, j = np.triu_indices(len(pred), 1)
    pred, target = (E[j] @ np.linalg.inv(E[i]) for E in (np.asarray(pred, np.float64), np.asarray(target, np.float64)))
    sin2_half = np.square(pred[:, :3, :3] - target[:, :3, :3]).sum((1, 2)) / 8  # 1 - (product of the unit quaternions)^2
    rotation = np.arccos(1 - 2 * np.clip(sin2_half, 1e-15, 1))
    direction = lambda E: E[:, :3, 3] / np.maximum(np.linalg.norm(E[:, :3, 3], axis=1, keepdims=True), 1e-15)
    cosine = np.einsum("pa,pa->p", direction(pred), direction(target))
    translation = np.arccos(np.sqrt(1 - np.clip(1 - cosine**2, 1e-15, 1)))
    return np.degrees(rotation), np.degrees(translation)


def pose_accuracy(rotation: np.ndarray, translation: np.ndarray, thresholds: Sequence[int] = (5, 15, 30)) -> dict[str, float]:
    """RRA@t, RTA@t (percent of pairs below t degrees) and AUC@t (of the larger error, in 1-degree bins) of pooled pair errors."""
    worse, out = np.maximum(rotation, translation), {}
    for t in thresholds:
        out[f"rra@{t}"] = 100 * float(np.mean(rotation < t))
        out[f"rta@{t}"] = 100 * float(np.mean(translation < t))
        histogram = np.histogram(worse, bins=np.arange(t + 1))[0] / len(worse)
        out[f"auc@{t}"] = 100 * float(np.mean(np.cumsum(histogram)))
    return out


# alignment and trajectories (Sintel, TUM-dynamics, ScanNet)


def umeyama(source: np.ndarray, target: np.ndarray, with_scale: bool = True) -> tuple[float, np.ndarray, np.ndarray]:
    """Least-squares similarity target = c R source + t of points (n, 3) (Umeyama, 1991): (c, R (3, 3), t (3,)).

    R is a rotation, also for point sets that are mirror images. ValueError for fewer than three points or coinciding ones.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if len(source) < 3:
        raise ValueError(f"a similarity needs at least 3 pairs of points, got {len(source)}")
    mean_s, mean_t = source.mean(0), target.mean(0)
    s, t = source - mean_s, target - mean_t
    U, D, Vt = np.linalg.svd(t.T @ s / len(s))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(U) * np.linalg.det(Vt))])
    variance = (s**2).sum() / len(s)
    if not variance > 0:
        raise ValueError("a similarity needs points that do not coincide")
    R = U * sign @ Vt
    c = float((D * sign).sum() / variance) if with_scale else 1.0
    return c, R, mean_t - c * R @ mean_s


def trajectory_errors(pred: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """ATE and RPE of camera-to-world poses (N, 4, 4) after a similarity alignment of the positions.

    ate: RMSE of the positions. rpe_trans, rpe_rot_deg: RMSE of the relative motion between consecutive frames.
    """
    pred, target = np.array(pred, np.float64), np.asarray(target, np.float64)
    c, R, t = umeyama(pred[:, :3, 3], target[:, :3, 3])
    pred[:, :3, 3] = c * pred[:, :3, 3] @ R.T + t
    pred[:, :3, :3] = R @ pred[:, :3, :3]
    step = lambda T: np.linalg.inv(T[:-1]) @ T[1:]
    error = np.linalg.inv(step(target)) @ step(pred)
    cosine = (np.trace(error[:, :3, :3], axis1=1, axis2=2) - 1) / 2
    rmse = lambda values: float(np.sqrt(np.mean(np.square(values))))
    return {
        "ate": rmse(np.linalg.norm(pred[:, :3, 3] - target[:, :3, 3], axis=1)),
        "rpe_trans": rmse(np.linalg.norm(error[:, :3, 3], axis=1)),
        "rpe_rot_deg": rmse(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
    }


# reconstruction (7-Scenes, NRGBD, DTU, ETH3D)


def icp(
    source: np.ndarray,
    target: np.ndarray,
    max_distance: float,
    max_iterations: int = 30,
    relative_fitness: float = 1e-6,
    relative_rmse: float = 1e-6,
) -> tuple[np.ndarray, float, float]:
    """Rigid point-to-point ICP from the identity: (4x4 motion of `source` (n, 3), share of matched points, RMSE of the matches).

    A point matches its nearest target point if that is within `max_distance`. Stops when neither share nor RMSE changes by more
    than the given amounts.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    tree = cKDTree(target)

    def match(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
        distance, nearest = tree.query(points, distance_upper_bound=max_distance, workers=-1)
        hit = np.isfinite(distance)
        return hit, nearest[hit], float(hit.mean()), float(np.sqrt(np.mean(distance[hit] ** 2))) if hit.any() else 0.0

    motion, points = np.eye(4), source
    hit, nearest, fitness, rmse = match(points)
    for _ in range(max_iterations):
        if hit.sum() < 3:
            break
        _, R, t = umeyama(points[hit], target[nearest], with_scale=False)
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = R, t
        motion = step @ motion
        points = points @ R.T + t
        before = fitness, rmse
        hit, nearest, fitness, rmse = match(points)
        if abs(fitness - before[0]) < relative_fitness and abs(rmse - before[1]) < relative_rmse:
            break
    return motion, fitness, rmse


def estimate_normals(points: np.ndarray, neighbours: int = 30, chunk: int = 200_000) -> np.ndarray:
    """Unit normals (n, 3), up to sign, by PCA of the nearest `neighbours` points, the point itself included."""
    points = np.asarray(points, np.float64)
    tree, normals = cKDTree(points), np.empty_like(points)
    for start in range(0, len(points), chunk):
        part = slice(start, start + chunk)
        near = points[tree.query(points[part], k=min(neighbours, len(points)), workers=-1)[1]]  # (chunk, k, 3)
        near -= near.mean(1, keepdims=True)
        normals[part] = np.linalg.eigh(near.transpose(0, 2, 1) @ near)[1][..., 0]
    return normals


def reconstruction_errors(
    pred: np.ndarray, target: np.ndarray, pred_normals: np.ndarray, target_normals: np.ndarray
) -> dict[str, float]:
    """Accuracy (prediction to truth), completeness (truth to prediction) and normal consistency of point sets (n, 3), (m, 3).

    acc, comp: mean distance to the nearest point; nc1, nc2: mean |cosine| of the normals in the same two directions, nc: their
    mean. Each with `_med`, the median.
    """
    out = {}
    for distance, normal, a, b, na, nb in (
        ("acc", "nc1", pred, target, pred_normals, target_normals),
        ("comp", "nc2", target, pred, target_normals, pred_normals),
    ):
        d, nearest = cKDTree(b).query(a, workers=-1)
        cosine = np.abs(np.einsum("na,na->n", na, nb[nearest]))
        for name, values in ((distance, d), (normal, cosine)):
            out[name], out[f"{name}_med"] = float(np.mean(values)), float(np.median(values))
    return out | {"nc": (out["nc1"] + out["nc2"]) / 2, "nc_med": (out["nc1_med"] + out["nc2_med"]) / 2}


def evaluate_reconstruction(pred: np.ndarray, target: np.ndarray, max_distance: float = 0.1) -> dict[str, float]:
    """The whole protocol for corresponding points (n, 3): similarity, rigid ICP (max_distance 0.1; DTU 100), errors."""
    c, R, t = umeyama(pred, target)
    pred = c * np.asarray(pred, np.float64) @ R.T + t
    motion = icp(pred, target, max_distance)[0]
    pred = pred @ motion[:3, :3].T + motion[:3, 3]
    return reconstruction_errors(pred, target, estimate_normals(pred), estimate_normals(target))


# depth (Sintel, Bonn, KITTI, NYU-v2)


def align_depth(pred: Tensor, target: Tensor, method: str, lr: float = 1e-4) -> tuple[float, float]:
    """Scale and shift that bring `pred` (n,) to `target` (n,), both of valid pixels only.

    l1_scale: least absolute error, ten reweighted least-squares steps. l1_scale_shift: least absolute error by at most 1000 Adam
    steps of size `lr` (1e-4; NYU-v2 1e-3). median: ratio of the medians. lstsq: least squares. metric: 1 and 0.
    """
    ratio = float(target.median() / pred.median())  # for an even count, the lower of the two middle values each
    if method == "metric":
        return 1.0, 0.0
    if method == "median":
        return ratio, 0.0
    if method == "lstsq":
        p, g = pred.double(), target.double()
        s = ((p - p.mean()) * (g - g.mean())).sum() / (p - p.mean()).square().sum()
        return float(s), float(g.mean() - s * p.mean())
    if method == "l1_scale":
        s = target.mean() / pred.mean()
        for _ in range(10):
            w = 1 / ((s * pred - target).abs() + 1e-8)
            s = ((w * pred * target).sum() / (w * pred.square()).sum()).clamp(min=1e-3)
        return float(s), 0.0
    if method == "l1_scale_shift":
        x = torch.tensor([ratio, 0.0], device=pred.device)
        first, second, last = torch.zeros_like(x), torch.zeros_like(x), None
        for k in range(1, 1001):  # Adam on sum |s p + t - g|; the gradient is written out
            error = x[0] * pred + x[1] - target
            loss, sign = float(error.abs().sum()), error.sign()
            if last is not None and abs(last - loss) < 1e-6:
                break
            gradient, last = torch.stack(((sign * pred).sum(), sign.sum())), loss
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
            x = x - lr * (first / (1 - 0.9**k)) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
        return float(x[0]), float(x[1])
    raise ValueError(f"alignment {method!r} is not one of l1_scale, l1_scale_shift, median, lstsq, metric")


def depth_errors(
    pred: Tensor | np.ndarray,
    target: Tensor | np.ndarray,
    method: str = "l1_scale_shift",
    max_depth: float | None = None,
    clip: float | None = None,
    lr: float = 1e-4,
) -> dict[str, float]:
    """Depth metrics of one image or, with one common alignment, of one video, over pixels with 0 < target < max_depth.

    clip: upper bound put on the aligned prediction (Sintel 70). Returns abs_rel, sq_rel, rmse, log_rmse, delta1..3 and
    valid_pixels; all zero without a valid pixel.
    """
    pred, target = torch.as_tensor(pred).float(), torch.as_tensor(target).float()
    valid = target > 0 if max_depth is None else (target > 0) & (target < max_depth)
    p, g = pred[valid], target[valid]
    names = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta1", "delta2", "delta3")
    if not len(g):
        return dict.fromkeys(names, 0.0) | {"valid_pixels": 0}
    scale, shift = align_depth(p, g, method, lr)
    p = (scale * p + shift).double()
    p, g = p if clip is None else p.clamp(max=clip), g.double()
    ratio = torch.maximum(p / g, g / p)
    ratio = torch.where(p > 0, ratio, torch.inf)  # a prediction behind the camera is wrong at any threshold
    values = (
        ((p - g).abs() / g).mean(),
        ((p - g).square() / g).mean(),
        (p - g).square().mean().sqrt(),
        (p.clamp(min=1e-5).log() - g.log()).square().mean().sqrt(),
        *((ratio < 1.25**k).double().mean() for k in (1, 2, 3)),
    )
    return {name: float(value) for name, value in zip(names, values)} | {"valid_pixels": len(g)}


def pool_depth_errors(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of `depth_errors` results over images or videos, weighted by their valid pixels."""
    total = sum(r["valid_pixels"] for r in results)
    pooled = {k: sum(r[k] * r["valid_pixels"] for r in results) / max(total, 1) for k in results[0] if k != "valid_pixels"}
    return pooled | {"valid_pixels": total}
