"""Losses of Pi3 (arXiv 2507.13347, section 3.3), all in float32: scale-aligned points, normals, relative poses, confidence.

Pure functions of predictions and of a ground truth that `prepare_ground_truth` has brought to the first view's frame and to unit
scale. Every term is a masked mean; an empty mask gives zero, with a graph. Nothing here makes the host wait for the device.

Shapes: B scenes, N views, maps of H x W. Points (B, N, H, W, 3), poses (B, N, 4, 4) camera-to-world, masks (B, N, H, W) bool.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pi3.alignment import align_scale, nearest_index
from pi3.geometry import inverse_se3, rescale_poses, transform

ALIGN_SIZE = 4096  # points per scene that decide the scale
# data sets whose depth is good enough to supervise normals
SMOOTH_DEPTH = {
    "BlinkVision", "Game", "GameNew", "DynamicStereo", "FlyingThings3D", "GTA-sfm", "Hypersim", "MatrixCity", "MidAir", "Monkaa",
    "PointOdyssey", "Sintel", "Spring", "TarTanAir", "Unreal4k", "VirtualKitti", "Habitat", "BlendedMVG", "BlendedMVS", "DTU",
    "ETH3D", "ScanNet", "Scannetpp", "Taskonomy",
}  # fmt: skip


def has_normals(datasets: Sequence[str], device: torch.device | str | None = None) -> Tensor:
    """Mask (B,) of the scenes that come from a data set in `SMOOTH_DEPTH`."""
    return torch.tensor([name in SMOOTH_DEPTH for name in datasets], device=device)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the true entries of `mask` (which broadcasts to it); zero with a graph if there are none."""
    mask = mask.expand_as(values)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def mean_distance(points: Tensor, mask: Tensor) -> Tensor:
    """Mean length of the valid points of each scene, (B,); 1 for a scene without any."""
    count = mask.flatten(1).sum(1)
    total = torch.where(mask, points.norm(dim=-1), 0.0).flatten(1).sum(1)
    return torch.where(count > 0, total / (count + 1e-8), 1.0)


def prepare_ground_truth(local_points: Tensor, poses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Poses relative to the first view, poses and points in units of the mean distance of the valid points to that view.

    local_points: in each camera's frame, metric; values outside the mask may be anything. Returns (local points, poses).
    """
    local_points = local_points.nan_to_num(0.0, 0.0, 0.0)
    # the first camera's place is taken off before it is turned: far from the world's origin R^T t_i - R^T t_0 would cancel
    poses = poses - F.pad(poses[:, :1, :3, 3:], (3, 0, 0, 1))
    poses = inverse_se3(poses[:, :1]) @ poses
    factor = 1 / mean_distance(transform(poses, local_points), mask)
    return local_points * factor[:, None, None, None, None], rescale_poses(poses, factor)


def normalise_prediction(local_points: Tensor, poses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Points and poses in units of the mean distance of the valid points, each to its own camera (with gradient)."""
    factor = 1 / mean_distance(local_points, mask)
    return local_points * factor[:, None, None, None, None], rescale_poses(poses, factor)


def inverse_depth_weights(target: Tensor, mask: Tensor) -> Tensor:
    """Weights (B, N, H, W) = 1 / depth, the depth bounded below by a tenth of the view's mean."""
    z = target[..., 2]
    mean = torch.where(mask, z, 0.0).mean((-1, -2), keepdim=True) / (mask.float().mean((-1, -2), keepdim=True) + 1e-7)
    return 1 / (torch.maximum(z, 0.1 * mean) + 1e-6)


def evenly_spaced(mask: Tensor, size: int) -> Tensor:
    """Positions (B, size) of evenly spaced true entries of a mask (B, M), in range even if there are none."""
    rank = mask.cumsum(1, dtype=torch.int32)  # how many true entries up to here
    wanted = nearest_index(rank[:, -1], size).int() + 1
    return torch.searchsorted(rank, wanted).clamp(max=mask.shape[1] - 1)


@torch.no_grad()
def scale_to_target(points: Tensor, target: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """The scale (B,) that minimises sum w |s P - L| over evenly spaced valid points of each scene; 1 if there are none.

    A negative optimum is replaced by its absolute value.
    """
    mask = mask.flatten(1)
    chosen = evenly_spaced(mask, ALIGN_SIZE)[..., None]  # (B, ALIGN_SIZE, 1)
    pick = lambda t: t.flatten(1, 3).gather(1, chosen.expand(-1, -1, t.shape[-1]))
    scale = align_scale(pick(points), pick(target), pick(weights[..., None])[..., 0]).abs()
    return torch.where(mask.any(1), scale, 1.0)


def weighted_residual(points: Tensor, target: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """w |s P - L| per coordinate, (B, N, H, W, 3)."""
    return weights[..., None] * (points * scale[:, None, None, None, None] - target).abs()


def point_loss(points: Tensor, target: Tensor, weights: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Depth-weighted L1 of the aligned local points, over valid pixels and coordinates."""
    return masked_mean(weighted_residual(points, target, weights, scale), mask[..., None])


def smooth_surface(z: Tensor, rtol: float = 0.03) -> Tensor:
    """Mask (..., H, W) of pixels whose depth varies by at most `rtol` within the 3x3 window around them."""
    d = z.flatten(0, -3)[:, None]
    span = F.max_pool2d(d, 3, 1, 1) + F.max_pool2d(-d, 3, 1, 1)
    return ~((span / d).view_as(z) > rtol)


def _triangle_normals(points: Tensor) -> tuple[Tensor, ...]:
    """Cross products of the vertical and horizontal edges of all 2x2 cells: x, y, z, each (2, 2, B, N, H-1, W-1).

    First axis: left or right vertical edge; second: upper or lower horizontal edge. Each pair spans one of four triangles.
    """
    p = points.movedim(-1, 0).contiguous()  # (3, B, N, H, W)
    down, right = p[..., 1:, :] - p[..., :-1, :], p[..., 1:] - p[..., :-1]
    (ax, ay, az) = torch.stack((down[..., :-1], down[..., 1:]), 1)[:, :, None]  # each (2, 1, B, N, H-1, W-1)
    (bx, by, bz) = torch.stack((right[..., :-1, :], right[..., 1:, :]), 1)[:, None]  # each (1, 2, B, N, H-1, W-1)
    return ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx


def normal_loss(points: Tensor, target: Tensor, mask: Tensor, scenes: Tensor) -> Tensor:
    """Smooth-L1 (beta 3 degrees) of the angle, clamped to 1..90 degrees, between the normals of four triangles per 2x2 cell.

    points: aligned prediction. Triangles count where their corners are valid and off depth edges. scenes: mask (B,) of the scenes
    that take part. Sum over the four triangles, mean over all cells (an invalid triangle counts as zero), over 4 max(H, W).
    """
    H, W = mask.shape[-2:]
    mask = mask & smooth_surface(target[..., 2]) & scenes[:, None, None, None]
    m_down, m_right = mask[..., 1:, :] & mask[..., :-1, :], mask[..., 1:] & mask[..., :-1]
    m_down = torch.stack((m_down[..., :-1], m_down[..., 1:]))[:, None]  # (2, 1, B, N, H-1, W-1)
    m_right = torch.stack((m_right[..., :-1, :], m_right[..., 1:, :]))[None]  # (1, 2, B, N, H-1, W-1)
    ax, ay, az = _triangle_normals(points)
    with torch.no_grad():
        bx, by, bz = _triangle_normals(target)
    square = (ay * bz - az * by).square() + (az * bx - ax * bz).square() + (ax * by - ay * bx).square()
    # parallel normals have no defined direction of descent: the bound keeps their derivative at zero
    angle = torch.atan2(square.clamp(min=1e-38).sqrt() + 1e-12, ax * bx + ay * by + az * bz)
    beta = math.radians(3)
    angle = angle.clamp(math.radians(1), math.radians(90))
    error = torch.where(angle < beta, angle.square() / (2 * beta), angle - beta / 2)
    cells = scenes.sum() * mask.shape[1] * (H - 1) * (W - 1)
    return torch.where(m_down & m_right, error, 0.0).sum() / cells.clamp(min=1) / (4 * max(H, W))


def camera_loss(poses: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of the relative poses T_i^-1 T_j, all ordered pairs i != j, predicted translations multiplied by `scale` (B,).

    Returns (Huber of the translations with delta 0.1, mean over pairs and coordinates; mean rotation angle in radians). The
    cosine is clamped 1e-6 short of +-1, so that a perfect rotation gives 0.0014 and no gradient. ValueError below two views.
    """
    N = poses.shape[1]
    if N < 2:
        raise ValueError("the camera loss compares pairs of views: it needs at least 2")

    relative = lambda T: inverse_se3(T)[:, :, None] @ T[:, None]  # (B, N, N, 4, 4)
    rel, rel_true = relative(rescale_poses(poses, scale)), relative(target)
    pairs = ~torch.eye(N, dtype=torch.bool, device=poses.device)
    d = (rel - rel_true)[..., :3, 3].abs()
    huber = torch.where(d < 0.1, d.square() / 2, 0.1 * (d - 0.05))
    cosine = ((rel * rel_true)[..., :3, :3].sum((-1, -2)) - 1) / 2
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return masked_mean(huber, pairs[..., None]), masked_mean(angle, pairs)


def confidence_loss(logits: Tensor, residual: Tensor, mask: Tensor, sky: Tensor, target: str = "threshold") -> Tensor:
    """Cross-entropy of confidence `logits` (B, N, H, W, 1): on valid pixels against the quality of the points, on sky against 0.

    residual: `weighted_residual`, its mean over coordinates e decides. target "threshold": 1 where e < 0.02; "exp": exp(-50 e).
    sky: mask (B, N, H, W); valid pixels are taken out of it. Pixels that are neither are not supervised.
    """
    if target not in ("threshold", "exp"):
        raise ValueError(f"conf_target is {target!r}: expected threshold or exp")
    logits, e = logits[..., 0], residual.detach().mean(-1)
    good = (e < 0.02).to(logits.dtype) if target == "threshold" else torch.exp(-50 * e)
    entropy = lambda truth, where: masked_mean(F.binary_cross_entropy_with_logits(logits, truth, reduction="none"), where)
    return entropy(torch.where(mask, good, 0.0), mask) + entropy(torch.zeros_like(logits), sky & ~mask)


def pi3_loss(
    pred: Mapping[str, Tensor | None],
    local_points: Tensor,
    poses: Tensor,
    mask: Tensor,
    scenes_with_normals: Tensor,
    sky: Tensor | None = None,
    conf_target: str = "threshold",
) -> dict[str, Tensor]:
    """All terms, unweighted, and their weighted sum "loss".

    pred: output of `Pi3.forward`. local_points, poses, mask: ground truth as measured (metric, any world frame).
    scenes_with_normals: mask (B,), see `has_normals`. sky: mask (B, N, H, W) of the sky; if given, the confidence is trained.
    Returns local_pts_loss, normal_loss, trans_loss, rot_loss, loss, and global_pts_loss and local_conf_loss where they apply.
    """
    target, target_poses = prepare_ground_truth(local_points, poses, mask)
    weights = inverse_depth_weights(target, mask)
    points, pred_poses = normalise_prediction(pred["local_points"], pred["camera_poses"], mask)
    scale = scale_to_target(points, target, weights, mask)
    residual = weighted_residual(points, target, weights, scale)
    aligned = points * scale[:, None, None, None, None]
    terms = {
        "local_pts_loss": masked_mean(residual, mask[..., None]),
        "normal_loss": normal_loss(aligned, target, mask, scenes_with_normals),
    }
    terms["trans_loss"], terms["rot_loss"] = camera_loss(pred_poses, target_poses, scale)
    loss = terms["local_pts_loss"] + terms["normal_loss"] + 0.1 * (100 * terms["trans_loss"] + terms["rot_loss"])
    if pred.get("global_points") is not None:
        world = transform(target_poses, target)  # in the first view's frame
        factor = scale / mean_distance(pred["local_points"], mask)  # the global points share the scale of the local ones
        terms["global_pts_loss"] = point_loss(pred["global_points"], world, weights, mask, factor)
        loss = loss + terms["global_pts_loss"]
    if sky is not None:
        terms["local_conf_loss"] = confidence_loss(pred["conf"], residual, mask, sky, conf_target)
        loss = loss + 0.05 * terms["local_conf_loss"]
    return {**terms, "loss": loss}
