"""Metrics of the MoGe evaluation protocol: depth, points, local points, field of view and boundaries, each after its alignment.

A prediction names what it claims to know: points_metric > points_scale_invariant > points_affine_invariant, likewise depth_*,
and disparity_affine_invariant; intrinsics. A claim is also scored under every weaker alignment. Alignments are weighted L1 fits
(see `moge.alignment`) on 64 x 64 mask-aware samples, weighted by 1 / depth (points: 1 / distance); disparity: least squares on
all pixels.
"""

import math

import torch
from torch import Tensor

from moge.alignment import (
    affine_lstsq,
    align_depth_affine,
    align_depth_scale,
    align_scale,
    align_scale_xyz_shift,
    align_xyz_shift,
)
from moge.geometry import masked_nearest_resize

EPS = 1e-6


def rel_depth(pred: Tensor, gt: Tensor) -> float:
    """Mean |pred - gt| / (gt + eps); (N,)."""
    return ((pred - gt).abs() / (gt + EPS)).mean().item()


def delta1_depth(pred: Tensor, gt: Tensor) -> float:
    """Share of max(gt / pred, pred / gt) < 1.25, a prediction at or below 0 never; (N,)."""
    return ((torch.maximum(gt / pred, pred / gt) < 1.25) & (pred > 0)).float().mean().item()


def rel_point(pred: Tensor, gt: Tensor) -> float:
    """Mean |pred - gt| / (|gt| + eps); (N, 3)."""
    return ((pred - gt).norm(dim=-1) / (gt.norm(dim=-1) + EPS)).mean().item()


def delta1_point(pred: Tensor, gt: Tensor) -> float:
    """Share of |pred - gt| < 0.25 min(|gt|, |pred|); (N, 3)."""
    return ((pred - gt).norm(dim=-1) < 0.25 * torch.minimum(gt.norm(dim=-1), pred.norm(dim=-1))).float().mean().item()


def boundary_f1(pred: Tensor, gt: Tensor, mask: Tensor, radius: int) -> float:
    """F1 of occlusion edges (after Depth Pro, arXiv 2410.02073) between depth maps pred, gt (H, W), mask (H, W) bool.

    An edge is a pair (centre, neighbour within `radius` pixels) whose depth ratio exceeds 1 + t; F1 for ten t in 0.05..0.25,
    averaged with weights t. Centres closer than `radius` to the border of the image are left out.
    """
    H, W = gt.shape
    thresholds = torch.linspace(0.05, 0.25, 10, device=gt.device)
    joint = torch.zeros(11 * 11, dtype=torch.double, device=gt.device)  # pairs by how many thresholds either ratio exceeds
    inner = slice(radius, H - radius), slice(radius, W - radius)
    for i in range(-radius, radius + 1):
        for j in range(-radius, radius + 1):
            if (i, j) != (0, 0) and i * i + j * j <= radius * radius + 1e-5:
                moved = slice(radius + i, H - radius + i), slice(radius + j, W - radius + j)
                both = mask[inner] & mask[moved]
                ratios = ((d[moved] / d[inner])[both].nan_to_num(0) for d in (pred, gt))  # NaN: no edge
                p, g = (torch.bucketize(ratio, 1 + thresholds) for ratio in ratios)
                joint += torch.bincount(p * 11 + g, minlength=121)
    above = joint.view(11, 11).flip(0, 1).cumsum(0).cumsum(1).flip(0, 1)  # [a, b]: pairs that exceed at least a and b thresholds
    hits, predicted, true = above.diagonal()[1:], above[1:, 0], above[0, 1:]
    precision, recall = hits / predicted.clamp_min(1), hits / true.clamp_min(1)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return ((f1 * thresholds).sum() / thresholds.sum()).item()


def _samples(mask: Tensor, size: int = 64) -> Tensor:
    """Flat indices (n,) of the valid pixels that a size x size mask-aware resize picks."""
    new, index = masked_nearest_resize(mask, (size, size))
    return index[new]


def _strongest(pred: dict, kinds: tuple[str, ...]) -> Tensor | None:
    return next((pred[k] for k in kinds if k in pred), None)


def _affine_points(pred: Tensor, gt: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """target (..., 3) moved by the scale and shift that best maps pred (n, 3) to gt (n, 3)."""
    s, t = align_scale_xyz_shift(pred, gt, weight)
    return s * target + t


def compute_metrics(pred: dict[str, Tensor], gt: dict) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """All metrics of one sample that the prediction allows.

    pred: maps (H, W), points (H, W, 3) under the names above, intrinsics (3, 3; normalised). gt: depth (H, W), points (H, W,
    3), depth_mask (H, W) bool, intrinsics (3, 3), is_metric, has_sharp_boundary (bool), and optionally segmentation (H, W) with
    labels {name: id}. Returns ({metric: {rel, delta1, ...}}, the aligned maps, for pictures).
    """
    mask = gt["depth_mask"]
    index = _samples(mask)
    metrics, aligned = {}, {}
    _depth_metrics(metrics, aligned, pred, gt, mask, index)
    _point_metrics(metrics, aligned, pred, gt, mask, index)
    if "segmentation" in gt:
        local = _local_points(pred, gt, mask)
        if local:
            metrics["local_points"] = local
    if "intrinsics" in pred:
        fov_pred, fov_true = (2 * math.degrees(math.atan(0.5 / float(K[0, 0]))) for K in (pred["intrinsics"], gt["intrinsics"]))
        metrics["fov_x"] = {"mae": abs(fov_pred - fov_true), "deviation": fov_pred - fov_true}
    names = ("depth_scale_invariant", "depth_affine_invariant", "disparity_affine_invariant")
    sharp = _strongest(aligned, names) if gt.get("has_sharp_boundary") else None
    if sharp is not None:
        metrics["boundary"] = {f"radius{r}_f1": boundary_f1(sharp, gt["depth"], mask, r) for r in (1, 2, 3)}
    return metrics, aligned


def _depth_metrics(metrics: dict, aligned: dict, pred: dict, gt: dict, mask: Tensor, index: Tensor) -> None:
    true, sample = gt["depth"][mask], gt["depth"].flatten()[index]

    def score(name: str, depth: Tensor) -> None:
        aligned.setdefault(name, depth)
        metrics[name] = {"rel": rel_depth(depth[mask], true), "delta1": delta1_depth(depth[mask], true)}

    if "depth_metric" in pred and gt.get("is_metric"):
        score("depth_metric", pred["depth_metric"])
    depth = _strongest(pred, ("depth_metric", "depth_scale_invariant"))
    if depth is not None:
        score("depth_scale_invariant", depth * align_depth_scale(depth.flatten()[index], sample, 1 / sample))
    depth = _strongest(pred, ("depth_metric", "depth_scale_invariant", "depth_affine_invariant"))
    if depth is not None:
        s, t = align_depth_affine(depth.flatten()[index], sample, 1 / sample)
        score("depth_affine_invariant", s * depth + t)
    disparity = pred.get("disparity_affine_invariant")
    if disparity is None and (full := _strongest(pred, ("depth_metric", "depth_scale_invariant"))) is not None:
        disparity = 1 / full
    if disparity is not None:
        a, b = affine_lstsq(disparity[mask], 1 / true)
        fitted = a * disparity + b
        aligned["disparity_affine_invariant"] = 1 / fitted  # not clamped: for the boundaries
        score("disparity_affine_invariant", 1 / fitted.clamp_min((1 / true.max()).item()))


def _point_metrics(metrics: dict, aligned: dict, pred: dict, gt: dict, mask: Tensor, index: Tensor) -> None:
    true, sample = gt["points"][mask], gt["points"].flatten(0, 1)[index]
    weight = 1 / sample.norm(dim=-1)

    def score(name: str, points: Tensor) -> None:
        aligned[name] = points
        metrics[name] = {"rel": rel_point(points[mask], true), "delta1": delta1_point(points[mask], true)}

    if "points_metric" in pred and gt.get("is_metric"):
        points = pred["points_metric"]
        score("points_metric", points + align_xyz_shift(points.flatten(0, 1)[index], sample, weight))
    points = _strongest(pred, ("points_metric", "points_scale_invariant"))
    if points is not None:
        score("points_scale_invariant", points * align_scale(points.flatten(0, 1)[index], sample, weight))
    points = _strongest(pred, ("points_metric", "points_scale_invariant", "points_affine_invariant"))
    if points is not None:
        score("points_affine_invariant", _affine_points(points.flatten(0, 1)[index], sample, weight, points))


def _local_points(pred: dict, gt: dict, mask: Tensor) -> dict[str, float]:
    """Error of each labelled segment after its own scale and shift, relative to its diameter, averaged over the segments."""
    points = _strongest(pred, ("points_metric", "points_scale_invariant", "points_affine_invariant"))
    if points is None:
        return {}
    index = _samples(mask)
    flat_pred, flat_gt, segments = points.flatten(0, 1), gt["points"].flatten(0, 1), gt["segmentation"].flatten()
    rel, delta = [], []
    for i in gt["labels"].values():
        inside = (gt["segmentation"] == i) & mask
        chosen = index[segments[index] == i]
        if len(chosen) < 10:
            continue
        true = gt["points"][inside]
        diameter = (true.amax(0) - true.amin(0)).max()
        weight = torch.full_like(flat_gt[chosen, 0], 1 / diameter.item())
        error = (_affine_points(flat_pred[chosen], flat_gt[chosen], weight, points[inside]) - true).norm(dim=-1)
        rel.append((error / diameter).mean().item())
        delta.append((error < 0.25 * diameter).float().mean().item())
    return {"rel": sum(rel) / len(rel), "delta1": sum(delta) / len(delta)} if rel else {}
