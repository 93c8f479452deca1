"""Pure geometry on tensors: view-plane coordinates, unprojection, normals, depth edges, mask-aware resizing, focal and shift.

Conventions: OpenCV cameras (x right, y down, z forward); intrinsics K are normalised (fx in image widths, fy in image heights,
cx and cy in 0..1) for pixel centres at half-integers, so a pixel (i, j) of an H x W map stands at u = (j + 0.5) / W, v = (i +
0.5) / H. Depth is z depth.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moge.alignment import nearest_index


def view_plane_uv(width: int, height: int, aspect: float | None = None, device=None) -> Tensor:
    """Coordinates (height, width, 2) on a view plane whose half diagonal is 1 (MoGe, section 3.1).

    The outer corners of the image lie at distance 1 from the centre. aspect: width / height of the image; default that of the
    map.
    """
    aspect = width / height if aspect is None else aspect
    span_x, span_y = aspect / (1 + aspect**2) ** 0.5, 1 / (1 + aspect**2) ** 0.5
    u = torch.linspace(-span_x * (width - 1) / width, span_x * (width - 1) / width, width, device=device)
    v = torch.linspace(-span_y * (height - 1) / height, span_y * (height - 1) / height, height, device=device)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def image_uv(width: int, height: int, device=None) -> Tensor:
    """Pixel centres (height, width, 2) as (u, v) in 0..1."""
    u = (torch.arange(width, device=device) + 0.5) / width
    v = (torch.arange(height, device=device) + 0.5) / height
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def depth_to_points(depth: Tensor, K: Tensor) -> Tensor:
    """Points (..., H, W, 3) = depth * K^-1 (u, v, 1) from depth (..., H, W) and normalised K (..., 3, 3); not finite where
    depth is not.
    """
    H, W = depth.shape[-2:]
    u, v = image_uv(W, H, depth.device).unsqueeze(-2).unbind(-1)  # (H, W, 1)
    inverse = torch.linalg.inv_ex(K)[0][..., None, None, :, :]  # unchecked: does not wait for the device
    ray = inverse[..., 0] * u + inverse[..., 1] * v + inverse[..., 2]  # (..., H, W, 3); no matrix product, which autocast would round
    return ray * depth[..., None]


def focal_from_intrinsics(K: Tensor) -> Tensor:
    """Focal length (...) in units of the image diagonal from normalised K (..., 3, 3)."""
    return 1 / (1 / K[..., 0, 0] ** 2 + 1 / K[..., 1, 1] ** 2).sqrt()


def intrinsics_from_focal(focal: Tensor, aspect: float) -> Tensor:
    """Normalised K (..., 3, 3) with centre (0.5, 0.5) from a focal length (...) in units of half the diagonal; aspect = width /
    height.
    """
    fx, fy = focal / 2 * (1 + aspect**2) ** 0.5 / aspect, focal / 2 * (1 + aspect**2) ** 0.5
    zero, half, one = torch.zeros_like(fx), torch.full_like(fx, 0.5), torch.ones_like(fx)
    return torch.stack([fx, zero, half, zero, fy, half, zero, zero, one], -1).unflatten(-1, (3, 3))


def weighted_mean(x: Tensor, w: Tensor, dim=None, keepdim: bool = False) -> Tensor:
    """mean(x w) / (mean(w) + 1e-7) over `dim` (default: all)."""
    dim = tuple(range(x.ndim)) if dim is None else dim
    return (x * w).mean(dim, keepdim) / (w.mean(dim, keepdim) + 1e-7)


def harmonic_mean(x: Tensor, w: Tensor, dim=None, keepdim: bool = False) -> Tensor:
    """Weighted harmonic mean over `dim` (default: all): 1 / (weighted_mean(1 / (x + 1e-7), w) + 1e-7)."""
    return 1 / (weighted_mean(1 / (x + 1e-7), w, dim, keepdim) + 1e-7)


def points_to_normal(points: Tensor, mask: Tensor, max_angle: float | None = None) -> tuple[Tensor, Tensor]:
    """Normals (..., H, W, 3) towards the camera and their mask (..., H, W) from points (..., H, W, 3), mask (..., H, W) bool.

    Mean of the unit normals of the four triangles that a pixel forms with its neighbours up-left, left-down, down-right,
    right-up. max_angle (degrees): leave out a triangle whose normal is further than this from the pixel's viewing ray. Zero
    outside the returned mask. Not finite beside a neighbour that is not: a normal is known only where all four neighbours
    inside the image are.
    """
    p = points.movedim(-1, 0).contiguous()  # (3, ..., H, W): one plane per coordinate is several times faster than triples
    rows, cols = F.pad(p.diff(dim=-2), (0, 0, 1, 1)), F.pad(p.diff(dim=-1), (1, 1))  # steps down and right, 0 across the border
    row_ok, col_ok = F.pad(mask[..., 1:, :] & mask[..., :-1, :], (0, 0, 1, 1)), F.pad(mask[..., 1:] & mask[..., :-1], (1, 1))
    total, valid = torch.zeros_like(p), torch.zeros_like(mask)
    if max_angle is not None:
        ray, least = p / _length(p), math.cos(math.radians(max_angle))
    for r, r_ok in ((rows[..., :-1, :], row_ok[..., :-1, :]), (rows[..., 1:, :], row_ok[..., 1:, :])):
        for c, c_ok in ((cols[..., :-1], col_ok[..., :-1]), (cols[..., 1:], col_ok[..., 1:])):
            n = torch.stack([r[1] * c[2] - r[2] * c[1], r[2] * c[0] - r[0] * c[2], r[0] * c[1] - r[1] * c[0]])
            n = n / (_length(n) + 1e-12)
            use = r_ok & c_ok
            if max_angle is not None:
                use = use & ((n[0] * ray[0] + n[1] * ray[1] + n[2] * ray[2]).abs() > least)
            total = total + n * use.to(n.dtype)  # times zero, not left out: keeps what is not finite
            valid = valid | use
    return torch.where(valid, total / (_length(total) + 1e-12), 0.0).movedim(0, -1), valid


def _length(p: Tensor) -> Tensor:
    return (p[0] * p[0] + p[1] * p[1] + p[2] * p[2]).sqrt()


def depth_edge(depth: Tensor, mask: Tensor, kernel: int = 3, rtol: float | None = None, ltol: float | None = None) -> Tensor:
    """Pixels (..., H, W) at depth discontinuities; depth (..., H, W), mask (..., H, W) bool, windows of kernel x kernel valid
    pixels.

    rtol: the depths in the window spread by more than rtol times the pixel's depth. ltol: the relative deviation of the
    disparity from its window mean exceeds ltol at one pixel of the window and falls below -ltol at another, so that slopes,
    where the deviation is small and smooth, are not edges.
    """
    shape, pad = depth.shape, kernel // 2
    depth, mask = depth.reshape(-1, 1, *shape[-2:]), mask.reshape(-1, 1, *shape[-2:])

    def highest(x: Tensor, known: Tensor) -> Tensor:
        return _windows_of(F.pad(torch.where(known, x, -torch.inf), (pad,) * 4, value=-torch.inf), kernel, torch.maximum)

    if rtol is not None:
        high, low = highest(depth, mask), -highest(-depth, mask)
        edge = (high - low) / depth > rtol
    else:
        disparity = torch.where(mask, 1 / depth, 0.0)
        total = _windows_of(F.pad(disparity, (pad,) * 4, mode="replicate"), kernel, torch.add)
        mean = total / _windows_of(F.pad(mask.to(depth.dtype), (pad,) * 4, mode="replicate"), kernel, torch.add)
        deviation = (disparity - mean) / disparity
        known = mask & deviation.isfinite()
        edge = (highest(deviation, known) > ltol) & (highest(-deviation, known) > ltol)
    return edge.reshape(shape)


def _windows_of(x: Tensor, kernel: int, combine) -> Tensor:
    """Combine the kernel x kernel windows of a padded x (..., H, W), one direction after the other, by shifted slices."""
    h, w = x.shape[-2] - kernel + 1, x.shape[-1] - kernel + 1
    x = functools.reduce(combine, [x[..., i : i + h, :] for i in range(kernel)])
    return functools.reduce(combine, [x[..., j : j + w] for j in range(kernel)])


def masked_nearest_resize(mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Nearest-neighbour resize that skips invalid pixels: mask (..., H, W) bool -> new mask (..., h, w) and source index (...,
    h, w).

    Each target pixel looks through the window of source pixels that it covers (at least one) for the valid one nearest to its
    centre, first in row-major order among equals; index = row * W + column, int64, 0 where the new mask is False.
    """
    (H, W), (h, w) = mask.shape[-2:], size
    row, row_far = _windows(H, h, mask.device)
    col, col_far = _windows(W, w, mask.device)
    flat = (row[:, None, :, None] * W + col[None, :, None, :]).flatten(2)  # (h, w, window) candidates
    far = (row_far[:, None, :, None] + col_far[None, :, None, :]).flatten(2)
    found = mask.flatten(-2)[..., flat.reshape(-1)].unflatten(-1, flat.shape)
    nearest, first = torch.where(found, far, torch.inf).min(dim=-1)
    new = nearest.isfinite()
    index = flat.expand(found.shape).gather(-1, first[..., None])[..., 0]
    return new, torch.where(new, index, 0)


def _windows(n: int, size: int, device) -> tuple[Tensor, Tensor]:
    """Per target pixel: indices (size, k) of the source pixels in its window, squared distances from its centre, inf outside
    the source.
    """
    extent = max(1.0, n / size)
    centre = torch.linspace(0.5 / size, 1 - 0.5 / size, size, device=device) * n
    index = torch.round(centre - extent / 2).long()[:, None] + torch.arange(math.ceil(extent), device=device)
    far = torch.where((index >= 0) & (index < n), (index + 0.5 - centre[:, None]).square(), torch.inf)
    return index.clamp(0, n - 1), far


def solve_focal_shift(xy: Tensor, z: Tensor, uv: Tensor, weight: Tensor, focal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Focal f (B,) and shift t (B,) that minimise sum_i weight_i |f xy_i / (z_i + t) - uv_i|^2 (MoGe, section 3.1).

    xy, uv: (B, N, 2), z, weight: (B, N). f is eliminated (for a given t it is a linear least-squares problem), so one unknown
    is left: Levenberg-Marquardt from t = 0 in double precision, all samples at once. focal (B,): known, only t is sought. Fewer
    than two samples of positive weight: f = 1 (or the given one), t = 0.
    """
    xy, z, uv, w = xy.double(), z.double(), uv.double(), weight.double()
    given = None if focal is None else focal.double()

    def residual(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f (B,), residuals and their derivatives by t (B, N, 2), and the objective (B,)."""
        depth = z + t[:, None]
        q = xy / torch.where(depth.abs() < 1e-9, 1e-9, depth)[..., None]
        dq = -q / torch.where(depth.abs() < 1e-9, 1e-9, depth)[..., None]
        a, b = (w[..., None] * q * uv).sum((1, 2)), (w[..., None] * q * q).sum((1, 2)).clamp_min(1e-30)
        if given is None:
            da, db = (w[..., None] * dq * uv).sum((1, 2)), 2 * (w[..., None] * q * dq).sum((1, 2))
            f, df = a / b, (da - a / b * db) / b
        else:
            f, df = given, torch.zeros_like(given)
        r = f[:, None, None] * q - uv
        return f, r, f[:, None, None] * dq + df[:, None, None] * q, (w[..., None] * r * r).sum((1, 2))

    low = torch.where(w > 0, z, torch.inf).amin(1)
    low = torch.where(low.isfinite(), low, 0.0)
    best_t, best_cost, best_f = torch.zeros_like(low), torch.full_like(low, torch.inf), torch.ones_like(low)
    for start in (torch.zeros_like(low), (-low).clamp_min(0) + 0.1 * (z.abs() * w).sum(1) / w.sum(1).clamp_min(1e-30)):
        t, damping = start, torch.full_like(start, 1e-3)
        f, r, dr, cost = residual(t)
        for _ in range(30):
            g, h = (w[..., None] * dr * r).sum((1, 2)), (w[..., None] * dr * dr).sum((1, 2)).clamp_min(1e-30)
            step = t - g / (h * (1 + damping))
            f1, r1, dr1, cost1 = residual(step)
            better = cost1 < cost
            t, cost, f = torch.where(better, step, t), torch.where(better, cost1, cost), torch.where(better, f1, f)
            r, dr = torch.where(better[:, None, None], r1, r), torch.where(better[:, None, None], dr1, dr)
            damping = torch.where(better, damping / 10, damping * 10).clamp(1e-9, 1e9)
        front = (w * (z + t[:, None] > 0)).sum(1) > 0.5 * w.sum(1)  # a solution behind the camera is none
        take = front & (best_cost == torch.inf)
        best_t, best_f = torch.where(take, t, best_t), torch.where(take, f, best_f)
        best_cost = torch.where(take, cost, best_cost)
    some = ((w > 0).sum(1) >= 2) & best_cost.isfinite()
    f = torch.where(some, best_f, 1.0) if given is None else given
    return f, torch.where(some, best_t, 0.0)


def recover_focal_shift(
    points: Tensor, mask: Tensor | None = None, focal: Tensor | None = None, size: int = 64
) -> tuple[Tensor, Tensor]:
    """Focal (B,) in units of half the image diagonal, and z shift (B,), of points (B, H, W, 3) known up to scale and z shift.

    Solved on size x size nearest samples, mask (B, H, W) bool picking those that count. focal (B,): known (same units).
    """
    B, H, W, _ = points.shape
    i, j = nearest_index(H, size, points.device), nearest_index(W, size, points.device)
    p = points.float()[:, i[:, None], j].flatten(1, 2)  # (B, size*size, 3)
    uv = view_plane_uv(W, H, device=points.device)[i[:, None], j].flatten(0, 1)
    w = torch.ones_like(p[..., 0]) if mask is None else mask[:, i[:, None], j].flatten(1, 2).to(p.dtype)
    ok = p.isfinite().all(-1)
    f, t = solve_focal_shift(
        torch.where(ok[..., None], p[..., :2], 0.0), torch.where(ok, p[..., 2], 1.0), uv.expand(B, -1, -1), w * ok, focal
    )
    return f.float(), t.float()
