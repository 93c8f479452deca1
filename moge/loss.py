"""Training losses of MoGe (arXiv 2410.19115, section 3.3 and supplement) and MoGe-2 (arXiv 2507.02546), batched over images and
patches.

Every function returns one value per image (B,), differentiable, in float32; metrics are detached, (B,), NaN where there is
nothing to measure. Masks are explicit; an image without valid pixels gives zero with a graph. `total_loss` evaluates the table
of a config.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moge.alignment import align_scale_xyz_shift, align_scale_z_shift
from moge.geometry import depth_to_points, focal_from_intrinsics, harmonic_mean, masked_nearest_resize, weighted_mean


def _planes(points: Tensor) -> Tensor:
    """(B, H, W, 3) -> (B, 3, H, W) float32, contiguous."""
    return points.float().movedim(-1, 1).contiguous()


def _valid_planes(gt_points: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """True points as planes (B, 3, H, W), 1 where unknown, and their validity (B, H, W)."""
    g = _planes(gt_points)
    valid = g.isfinite().all(1)
    valid = valid if mask is None else valid & mask
    return torch.where(valid[:, None], g, 1.0), valid


def _smooth(error: Tensor, beta: float) -> Tensor:
    """Huber-like: e^2 / (2 beta) below beta, e - beta / 2 above; plain e for beta = 0."""
    return error if beta == 0 else torch.where(error < beta, error.square() / (2 * beta), error - beta / 2)


def _pick(planes: Tensor, index: Tensor) -> Tensor:
    """planes (B, 3, N), index (B, n) -> (B, n, 3)."""
    return planes.gather(2, index[:, None].expand(-1, 3, -1)).transpose(1, 2)


def affine_invariant_global_loss(
    pred_points: Tensor,
    gt_points: Tensor,
    mask: Tensor | None = None,
    align_resolution: int = 64,
    beta: float = 0.0,
    trunc: float | None = 1.0,
    sparsity_aware: bool = False,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """L1 error of the whole point map after the best scale and z shift (section 3.3, L_G), relative to depth.

    pred_points, gt_points (B, H, W, 3), mask (B, H, W) bool (default: finite truth). The alignment is solved on
    align_resolution^2 mask-aware samples with errors cut off at trunc; scale and shift depend on the prediction, so gradient
    flows through them. A negative best scale gives loss 0 without gradient. sparsity_aware: divide by how much denser the
    samples are than the mask. Returns loss (B,), metrics {truncated_error, delta}, scale (B,; 0 where there is none; detached).
    """
    p, (g, valid) = _planes(pred_points), _valid_planes(gt_points, mask)
    small, index = masked_nearest_resize(valid, (align_resolution, align_resolution))
    small, index = small.flatten(1), index.flatten(1)
    q = _pick(g.flatten(2), index)
    s, t = align_scale_z_shift(_pick(p.flatten(2), index), q, small / q[..., 2].clamp_min(0.01), trunc)
    ok = s > 0
    s, t = torch.where(ok, s, 0.0), torch.where(ok[:, None], t, 0.0)

    error = s[:, None, None, None] * p + t[..., None, None] - g  # (B, 3, H, W)
    with torch.no_grad():
        omega = (valid & ok[:, None, None]) / g[:, 2].clamp_min(1e-5)
        omega = torch.minimum(omega, 10 * weighted_mean(omega, valid.float(), (1, 2), keepdim=True))
        distance = error.square().sum(1).sqrt() / g[:, 2]
        metrics = {
            "truncated_error": weighted_mean(distance.clamp_max(1), valid.float(), (1, 2)),
            "delta": weighted_mean((distance < 1).float(), valid.float(), (1, 2)),
        }
        metrics = {k: torch.where(valid.any(2).any(1), v, torch.nan) for k, v in metrics.items()}
    loss = _smooth(error.abs() * omega[:, None], beta).mean((1, 2, 3))
    if sparsity_aware:
        loss = loss / (valid.float().mean((1, 2)) / small.float().mean(1).clamp_min(1e-30) + 1e-7)
    return loss, metrics, s.detach()


def anchor_weights(points: Tensor, mask: Tensor, radius_3d: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Sampling weight (B, H, W) of each pixel as a patch centre: the inverse of how many valid points lie near it.

    points (B, H, W, 3), mask (B, H, W) bool, radius_3d (B, H, W). The number is estimated from the pixels at the offsets rows,
    cols: (K,), the same for all pixels (far cheaper: shifted maps instead of gathers), or (H, W, K). Favours thin structures.
    Sums to 1.
    """
    H, W = mask.shape[1:]
    p = torch.where(mask[..., None], points, torch.nan).movedim(-1, 1).contiguous()  # NaN is near nothing
    limit, count = radius_3d.square(), torch.zeros_like(radius_3d)
    if rows.ndim == 1:
        for i, j in zip(rows.tolist(), cols.tolist()):
            if abs(i) < H and abs(j) < W:
                to = (..., slice(max(-i, 0), H - max(i, 0)), slice(max(-j, 0), W - max(j, 0)))
                at = (..., slice(max(i, 0), H + min(i, 0)), slice(max(j, 0), W + min(j, 0)))
                d = p[at] - p[to]
                count[to] += d.mul_(d).sum(1) <= limit[to]
    else:
        for i, j in zip(rows.unbind(-1), cols.unbind(-1)):
            i, j = i + torch.arange(H, device=p.device)[:, None], j + torch.arange(W, device=p.device)
            inside = (i >= 0) & (i < H) & (j >= 0) & (j < W)
            d = p[..., i.clamp(0, H - 1), j.clamp(0, W - 1)] - p
            count += (d.mul_(d).sum(1) <= limit) & inside
    weight = mask / count.clamp_min(1)
    return weight / (weight.sum((1, 2), keepdim=True) + 1e-7)


def sample_anchors(
    points: Tensor, mask: Tensor, radius_3d: Tensor, radius_2d: int, num_patches: int, importance: bool, num_offsets: int = 64
) -> Tensor:
    """Patch centres (B, num_patches, 2) as (row, column), drawn with replacement from the valid pixels; arguments as
    `anchor_weights`.
    """
    B, H, W = mask.shape
    if importance:  # offsets on the CPU: they become slices
        rows, cols = torch.randint(-radius_2d, radius_2d + 1, (2, num_offsets), device="cpu")
        weight = anchor_weights(points, mask, radius_3d, rows, cols)
    else:
        weight = mask.float()
    total = weight.flatten(1).double().cumsum(1)  # inverse transform sampling: nothing to synchronise, no limit on H * W
    drawn = torch.rand(B, num_patches, dtype=torch.double, device=mask.device) * total[:, -1:]
    index = torch.searchsorted(total, drawn, right=True).clamp_max(H * W - 1)
    return torch.stack([index // W, index % W], -1)


def affine_invariant_local_loss(
    pred_points: Tensor,
    gt_points: Tensor,
    mask: Tensor | None,
    focal: Tensor,
    global_scale: Tensor | None,
    level: int,
    align_resolution: int = 32,
    num_patches: int = 16,
    beta: float = 0.0,
    trunc: float | None = 1.0,
    sparsity_aware: bool = False,
    anchor_sampling: str = "importance",
    anchors: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 error within balls around anchor points, each after its own best scale and shift (section 3.3, L_S).

    pred_points, gt_points (B, H, W, 3), mask (B, H, W) bool or None; focal (B,) in image diagonals; global_scale (B,), to
    reject patches whose own scale differs by a factor of 10 or more (None: only positive scales count). A ball around a point
    at depth z has the radius z / (2 level focal), about 1 / level of the image. anchor_sampling: "importance" (see
    `anchor_weights`) or "uniform", as in the paper; anchors (B, num_patches, 2): take these (row, column) instead. Patches of
    fewer than 32 pixels are dropped. Returns loss (B,), the sum over patches divided by num_patches, and metrics
    {truncated_error, delta} relative to the ball's radius.
    """
    p, (g, valid) = _planes(pred_points), _valid_planes(gt_points, mask)
    B, _, H, W = p.shape
    radius_2d = math.ceil(0.5 / level * math.hypot(H, W))
    radius_3d = 0.5 / level / focal[:, None, None] * g[:, 2]  # (B, H, W)
    if anchors is None:
        if anchor_sampling not in ("importance", "uniform"):
            raise ValueError(f"anchor_sampling {anchor_sampling!r}: importance or uniform")
        with torch.no_grad():
            importance = anchor_sampling == "importance"
            anchors = sample_anchors(g.movedim(1, -1), valid, radius_3d, radius_2d, num_patches, importance)
    least_z = 0.1 * harmonic_mean(g[:, 2], valid.float(), (1, 2))  # (B,)

    image = torch.arange(B, device=p.device).repeat_interleave(anchors.shape[1])  # (M,) the image of each patch
    anchors = anchors.reshape(-1, 2)
    pixel, gp, near = _patches(g, valid, radius_3d, image, anchors, radius_2d)
    keep = near.sum(1) >= 32
    if not p.is_cuda:  # on CUDA they stay, with empty masks: sizes must not depend on values
        image, anchors, pixel, gp, near = image[keep], anchors[keep], pixel[keep], gp[:, keep], near[keep]
        keep = keep[keep]
    near = near & keep[:, None]
    pp = p.transpose(0, 1).reshape(3, -1).gather(1, pixel.reshape(1, -1).expand(3, -1)).view_as(gp)  # (3, M, K)

    side, r3 = 2 * radius_2d + 1, radius_3d[image, anchors[:, 0], anchors[:, 1]]
    small, index = masked_nearest_resize(near.unflatten(1, (side, side)), (align_resolution, align_resolution))
    small, index = small.flatten(1), index.flatten(1)
    lr_p, lr_g = (v.gather(2, index.expand(3, -1, -1)).permute(1, 2, 0) for v in (pp, gp))  # (M, n, 3)
    s, t = align_scale_xyz_shift(lr_p, lr_g, small / (r3[:, None] + 1e-7), trunc)
    if global_scale is None:
        ok = s > 0
    else:
        whole = global_scale[image]
        ok = (s > 0.1 * whole) & (s < 10 * whole) & (whole > 0)
    s, t = torch.where(ok, s, 0.0), torch.where(ok[:, None], t, 0.0)
    near = near & ok[:, None]

    error = s[:, None] * pp + t.T[:, :, None] - gp  # (3, M, K)
    omega = near / torch.maximum(gp[2], least_z[image][:, None])
    per_patch = _smooth(error.abs() * omega, beta).mean((0, 2))
    if sparsity_aware:
        per_patch = per_patch / (near.float().mean(1) / small.float().mean(1).clamp_min(1e-30) + 1e-7)
    loss = torch.zeros_like(p[:, 0, 0, 0]).index_add(0, image, per_patch) / num_patches

    with torch.no_grad():
        distance = error.square().sum(0).sqrt() / r3[:, None]
        sums = torch.stack(
            [(distance.clamp_max(1) * near).mean(1), ((distance < 1) & near).float().mean(1), near.float().mean(1)], 1
        )
        count = p.new_zeros(B).index_add(0, image, keep.float())
        sums = p.new_zeros(B, 3).index_add(0, image, sums) / count[:, None]  # no patch: 0 / 0 = NaN
        metrics = {"truncated_error": sums[:, 0] / (sums[:, 2] + 1e-7), "delta": sums[:, 1] / (sums[:, 2] + 1e-7)}
    return loss, metrics


def _patches(
    g: Tensor, valid: Tensor, radius_3d: Tensor, image: Tensor, anchors: Tensor, radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Square of 2 radius + 1 pixels around each anchor, K in all: pixel index into the batch (M, K), true points (3, M, K),
    ball (M, K).
    """
    H, W = g.shape[2:]
    step = torch.arange(-radius, radius + 1, device=g.device)
    rows, cols = anchors[:, :1] + step, anchors[:, 1:] + step  # (M, side)
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((cols >= 0) & (cols < W))[:, None]
    pixel = (image[:, None] * H + rows.clamp(0, H - 1))[:, :, None] * W + cols.clamp(0, W - 1)[:, None]
    pixel, inside = pixel.flatten(1), inside.flatten(1)
    flat = g.transpose(0, 1).reshape(3, -1)  # (3, B*H*W)
    gp = flat[:, pixel.reshape(-1)].view(3, *pixel.shape)
    centre = (image * H + anchors[:, 0]) * W + anchors[:, 1]
    distance = (gp - flat[:, centre][:, :, None]).square().sum(0).sqrt()
    near = inside & valid.reshape(-1)[pixel] & (distance <= radius_3d.reshape(-1)[centre][:, None])
    return pixel, gp, near


def _angle(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Angle between vectors given as three planes each: atan2(|a x b| + 1e-12, a . b)."""
    x, y, z = a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
    sine = (x * x + y * y + z * z).clamp_min(1e-30).sqrt()  # clamped: the root has no gradient at 0
    return torch.atan2(sine + 1e-12, a[0] * b[0] + a[1] * b[1] + a[2] * b[2])


def _cross(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.unbind(1), b.unbind(1)
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _angle_loss(angle: Tensor, lowest_degrees: float) -> Tensor:
    """Huber-like with beta = 3 degrees on angles clamped to [lowest, 90] degrees (no gradient outside)."""
    return _smooth(angle.clamp(math.radians(lowest_degrees), math.radians(90)), math.radians(3))


def normal_loss(pred_points: Tensor, gt_points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Angles between the normals of the predicted and of the true point map (section 3.3, L_N); (B, H, W, 3), mask (B, H, W) ->
    (B,).

    Four triangles per cell of 2 x 2 pixels, each valid when its corners are; angles below 1 degree or above 90 carry no
    gradient.
    """
    p, (g, valid) = _planes(pred_points), _valid_planes(gt_points, mask)
    H, W = valid.shape[1:]

    def normals(x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        rows, cols = x.diff(dim=2), x.diff(dim=3)  # steps down (B, 3, H-1, W) and right (B, 3, H, W-1)
        top, bottom, left, right = cols[:, :, :-1], cols[:, :, 1:], rows[..., :-1], rows[..., 1:]
        return [_cross(right, bottom), _cross(top, right), _cross(left, top), _cross(bottom, left)]

    lu, ru, ld, rd = valid[:, :-1, :-1], valid[:, :-1, 1:], valid[:, 1:, :-1], valid[:, 1:, 1:]
    corners = [ru & ld & rd, lu & rd & ru, ld & ru & lu, rd & lu & ld]
    total = sum(_angle_loss(_angle(a, b), 1) * ok for a, b, ok in zip(normals(p), normals(g), corners))
    return total.mean((1, 2)) / (4 * max(H, W))


def edge_loss(pred_points: Tensor, gt_points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Angles between predicted and true differences of neighbouring points (MoGe-2); (B, H, W, 3), mask (B, H, W) -> (B,)."""
    p, (g, valid) = _planes(pred_points), _valid_planes(gt_points, mask)
    total = 0
    for dim in (2, 3):
        n = valid.shape[dim - 1] - 1
        ok = valid.narrow(dim - 1, 0, n) & valid.narrow(dim - 1, 1, n)
        angle = _angle(p.diff(dim=dim).unbind(1), g.diff(dim=dim).unbind(1))
        total = total + (_angle_loss(angle, 0.1) * ok).mean((1, 2))
    return total / (2 * max(valid.shape[1:]))


def mask_l2_loss(pred_mask: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Mean of (1 - m)^2 where positive, m^2 where negative; all (B, H, W), m the raw mask of v1 -> (B,)."""
    m = pred_mask.float()
    return (negative * m.square() + positive * (1 - m).square()).mean((1, 2))


def mask_bce_loss(pred_mask: Tensor, positive: Tensor, negative: Tensor, logit: bool = False) -> Tensor:
    """Binary cross-entropy where positive or negative is set; pred_mask a probability or, more exact, a logit (B, H, W) ->
    (B,).
    """
    target = positive.float()
    if logit:
        error = F.binary_cross_entropy_with_logits(pred_mask.float(), target, reduction="none")
    else:
        error = F.binary_cross_entropy(pred_mask.float(), target, reduction="none")
    return (error * (positive | negative)).mean((1, 2))


def metric_scale_loss(pred_scale: Tensor, gt_scale: Tensor) -> Tensor:
    """(log pred - log gt)^2 where gt > 0, else 0; (B,), (B,) -> (B,). gt: scale of the global alignment of metric truth."""
    known = gt_scale > 0
    error = pred_scale.float().log() - torch.where(known, gt_scale, 1.0).log()
    return error.square() * known


def normal_map_loss(pred_normal: Tensor, gt_normal: Tensor) -> Tensor:
    """Mean squared angle (radians) between unit normals (B, H, W, 3), over all pixels, zero where the truth is not finite ->
    (B,).
    """
    g = _planes(gt_normal)
    valid = g.isfinite().all(1)
    a = F.normalize(_planes(pred_normal), dim=1, eps=1e-8)
    b = F.normalize(torch.where(valid[:, None], g, 1.0), dim=1, eps=1e-8)
    cosine = (a * b).sum(1)
    sine = torch.minimum(_norm(b - a * cosine[:, None]), _norm(a - b * cosine[:, None]))
    return (valid * torch.atan2(sine + 1e-8, cosine).square()).mean((1, 2))


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(1).clamp_min(1e-30).sqrt()


FUNCTIONS = {  # what of the model's output each needs, and its parameters
    "affine_invariant_global_loss": ("points", ("align_resolution", "beta", "trunc", "sparsity_aware")),
    "affine_invariant_local_loss": (
        "points",
        ("level", "align_resolution", "num_patches", "beta", "trunc", "sparsity_aware", "anchor_sampling"),
    ),
    "normal_loss": ("points", ()),
    "edge_loss": ("points", ()),
    "mask_l2_loss": ("mask", ()),
    "mask_bce_loss": ("mask_logit", ()),  # the raw mask of v1 is no probability
    "metric_scale_loss": ("points", ()),  # left out where the model has no such head
    "normal_map_loss": ("normal", ()),
}


def _number(value, low: float = 0, kinds: tuple = (int, float)) -> bool:
    return type(value) in kinds and low <= value < math.inf


PARAMS = {  # what each parameter may be
    **dict.fromkeys(("level", "align_resolution", "num_patches"), lambda v: _number(v, 1, (int,))),
    "beta": _number,
    "trunc": lambda v: v is None or (_number(v) and v > 0),
    "sparsity_aware": lambda v: type(v) is bool,
    "anchor_sampling": lambda v: v in ("importance", "uniform"),
}


def check_table(table: dict[str, dict], label_types: Sequence[str] = (), outputs: Sequence[str] | None = None) -> None:
    """ValueError for what is wrong in a loss table, for label types that have no losses in it, and for losses of these that need
    what is not among a model's outputs.
    """
    for label, entries in table.items():
        if not isinstance(entries, dict):
            raise ValueError(f"loss {label} must be {{name: {{function, weight, params}}}}, not {entries!r}")
        for name, entry in entries.items():
            where, keys = f"loss {label}.{name}", entry if isinstance(entry, dict) else {}
            function, weight, given = keys.get("function"), keys.get("weight"), keys.get("params") or {}
            if not keys.keys() <= {"function", "weight", "params"} or not _number(weight) or not isinstance(given, dict):
                raise ValueError(f"{where} needs function and weight, a number, and may have a section params; it is {entry}")
            if function not in FUNCTIONS:
                raise ValueError(f"{where}: unknown function {function!r}; one of {', '.join(FUNCTIONS)}")
            need, known = FUNCTIONS[function]
            for key in given:
                if key not in known or not PARAMS[key](given[key]):
                    raise ValueError(f"{where}: {function} takes no params {key}: {given[key]!r}, but {', '.join(known) or 'none'}")
            if "level" in known and "level" not in given:
                raise ValueError(f"{where}: params need a level")
            if outputs is not None and label in label_types and need not in outputs:
                raise ValueError(f"{where}: {function} needs {need}, and the model gives {', '.join(outputs)}")
    for label in label_types:
        if not table.get(label):
            raise ValueError(f"label type {label!r} is not in the loss table, or has no losses there; it has {sorted(table)}")


def total_loss(table: dict[str, dict], output: dict[str, Tensor], batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss of a batch by the table {label_type: {name: {"function", "weight", "params"}}} of a config.

    output: points (B, H, W, 3), mask (B, H, W), and mask_logit, normal, metric_scale (B,) where the model has them. batch:
    depth (B, H, W; NaN unknown, inf infinitely far), intrinsics (B, 3, 3), depth_mask_fin, depth_mask_inf (B, H, W; bool),
    normal (B, H, W, 3; NaN unknown), label_type (list of str), is_metric (list of bool). Labels not in the table, as "invalid",
    count as zero; a metric_scale_loss only where the model has the head and the depth is metric. Returns the mean over all
    images of the weighted sum, and logs {name: (B,), name.metric: (B,)}, NaN for images without that entry. Entries that agree
    in function and parameters are evaluated together for all images, whatever their label types.
    """
    points = depth_to_points(batch["depth"], batch["intrinsics"])
    zero = (
        sum(v.float().sum() for k, v in output.items() if k != "mask_logit") * 0.0
    )  # every output takes part, whatever the labels
    parts: list[list[Tensor]] = [[] for _ in batch["label_type"]]  # weighted losses of each image
    logs: dict[str, list] = {}
    scales: list[Tensor | None] = [None] * len(parts)
    for function, params, users in _group(table, batch["label_type"], "metric_scale" in output, batch["is_metric"]):
        images = sorted({i for i, _, _ in users})
        if function in ("affine_invariant_local_loss", "metric_scale_loss"):
            _complete_scales(scales, images, output["points"], points)
        loss, metrics = _evaluate(function, params, images, output, batch, points, scales)
        for i, name, weight in users:
            at = images.index(i)
            parts[i].append(weight * loss[at])
            for tag, value in ((name, loss.detach()), *((f"{name}.{k}", v) for k, v in metrics.items())):
                logs.setdefault(tag, [torch.full_like(zero, torch.nan)] * len(parts))[i] = value[at]
    total = (zero + sum(p for part in parts for p in part)) / len(parts)
    return total, {k: torch.stack(v).detach() for k, v in logs.items()}


def _group(table: dict, labels: Sequence[str], has_scale: bool, is_metric: Sequence[bool]) -> list[tuple[str, dict, list]]:
    """What to evaluate: (function, params, users [(image, name, weight)]), global losses first, since others need their scale."""
    groups: dict[str, tuple[str, dict, list]] = {}
    for i, label in enumerate(labels):
        for name, entry in table.get(label, {}).items():
            function, params = entry["function"], entry.get("params") or {}
            if function != "metric_scale_loss" or (has_scale and is_metric[i]):
                key = f"{function} {sorted(params.items())}"
                groups.setdefault(key, (function, params, []))[2].append((i, name, entry["weight"]))
    return sorted(groups.values(), key=lambda group: group[0] != "affine_invariant_global_loss")


def _take(x: Tensor, images: list[int]) -> Tensor:
    """Some images of a batch, by indices on the host (so that nothing is copied to the device)."""
    return x if len(images) == len(x) else torch.stack([x[i] for i in images])


def _complete_scales(scales: list, images: list[int], pred_points: Tensor, gt_points: Tensor) -> None:
    """Align the images whose table has no global loss; its value is not counted."""
    missing = [i for i in images if scales[i] is None]
    if missing:
        with torch.no_grad():
            scale = affine_invariant_global_loss(_take(pred_points, missing), _take(gt_points, missing), align_resolution=32)[2]
        for at, i in enumerate(missing):
            scales[i] = scale[at]


def _evaluate(
    function: str, params: dict, images: list[int], output: dict, batch: dict, gt_points: Tensor, scales: list
) -> tuple[Tensor, dict[str, Tensor]]:
    """One loss on some images: (n,), metrics (n,). A global loss also stores its scales."""
    if function == "metric_scale_loss":
        return metric_scale_loss(_take(output["metric_scale"], images), torch.stack([scales[i] for i in images])), {}
    if function == "normal_map_loss":
        return normal_map_loss(_take(output["normal"], images), _take(batch["normal"], images)), {}
    if function in ("mask_l2_loss", "mask_bce_loss"):
        masks = _take(batch["depth_mask_fin"], images), _take(batch["depth_mask_inf"], images)
        if function == "mask_l2_loss":
            return mask_l2_loss(_take(output["mask"], images), *masks), {}
        logit = "mask_logit" in output
        return mask_bce_loss(_take(output["mask_logit" if logit else "mask"], images), *masks, logit=logit), {}
    pred, true = _take(output["points"], images), _take(gt_points, images)
    if function == "affine_invariant_global_loss":
        loss, metrics, scale = affine_invariant_global_loss(pred, true, **params)
        for at, i in enumerate(images):
            scales[i] = scale[at] if scales[i] is None else scales[i]
        return loss, metrics
    if function == "affine_invariant_local_loss":
        focal = focal_from_intrinsics(_take(batch["intrinsics"], images))
        return affine_invariant_local_loss(pred, true, None, focal, torch.stack([scales[i] for i in images]), **params)
    return (normal_loss if function == "normal_loss" else edge_loss)(pred, true), {}
