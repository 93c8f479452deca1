"""Geometry of point maps and cameras. Poses are camera-to-world, axes are OpenCV's (x right, y down, z forward), pixel centres
are at whole numbers. Everything here is torch, batched, differentiable where that makes sense and free of host syncs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def complete(top: Tensor) -> Tensor:
    """Rigid motions (..., 4, 4) of their upper rows (..., 3, 4)."""
    # the last row is made on the device: copying it there from a Python list would make the host wait
    return torch.cat([top, F.pad(torch.ones_like(top[..., :1, :1]), (3, 0))], -2)


def inverse_se3(pose: Tensor) -> Tensor:
    """Inverse of rigid motions (..., 4, 4) from R^T and t; the last row of the input is taken to be (0, 0, 0, 1)."""
    Rt = pose[..., :3, :3].transpose(-1, -2)
    return complete(torch.cat([Rt, -Rt @ pose[..., :3, 3:]], -1))


def transform(pose: Tensor, points: Tensor) -> Tensor:
    """Apply poses (..., 4, 4) to point maps (..., H, W, 3)."""
    flat = points.flatten(-3, -2)  # (..., H*W, 3): one matrix product per map
    return (flat @ pose[..., :3, :3].transpose(-1, -2) + pose[..., None, :3, 3]).view_as(points)


def rescale_poses(poses: Tensor, factor: Tensor) -> Tensor:
    """Multiply the translations of poses (B, N, 4, 4) by a factor (B,) per scene."""
    R, t = poses[..., :3], poses[..., 3:]
    scale = torch.cat([factor[:, None].expand(-1, 3), torch.ones_like(factor)[:, None]], 1)  # the last row stays (0, 0, 0, 1)
    return torch.cat([R, t * scale[:, None, :, None]], -1)


def unproject(depth: Tensor, K: Tensor) -> Tensor:
    """Depth along z (..., H, W) and intrinsics (..., 3, 3) to points in the camera's frame (..., H, W, 3)."""
    H, W = depth.shape[-2:]
    u = torch.arange(W, device=depth.device, dtype=depth.dtype)
    v = torch.arange(H, device=depth.device, dtype=depth.dtype)[:, None]
    fx, fy, cx, cy = (K[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return torch.stack(((u - cx) / fx * depth, (v - cy) / fy * depth, depth), -1)


def valid_depth(depth: Tensor, world_points: Tensor, z_far: Tensor | float = 0.0) -> Tensor:
    """Mask (..., H, W) of usable pixels: depth above 0 and below z_far (where that is above 0) and a finite world point."""
    z_far = torch.as_tensor(z_far, device=depth.device, dtype=depth.dtype)
    z_far = z_far.view(z_far.shape + (1,) * (depth.ndim - z_far.ndim))
    return (depth > 0) & ((depth < z_far) | (z_far <= 0)) & world_points.isfinite().all(-1)


def overlap(points: Tensor, depth: Tensor, K: Tensor, poses: Tensor, mask: Tensor, rtol: float = 0.05) -> Tensor:
    """Mask (N, N, H, W): entry [i, j] has the pixels of view i whose point view j sees, its depth there agreeing within `rtol`.

    points (N, H, W, 3) in each camera's frame, depth (N, H, W), K (N, 3, 3), poses (N, 4, 4) camera-to-world, mask (N, H, W).
    """
    N, H, W = depth.shape
    seen = torch.zeros(N, N, H, W, dtype=torch.bool, device=depth.device)
    world, to_camera = transform(poses, points), inverse_se3(poses)
    for j in range(N):
        local = transform(to_camera[j].expand(N, 4, 4), world)
        u, v, z = (local @ K[j].T).unbind(-1)
        x, y = (u / z).round().nan_to_num(-1, -1, -1), (v / z).round().nan_to_num(-1, -1, -1)
        inside = mask & (z > 0) & (x >= 0) & (y >= 0) & (x < W) & (y < H)
        index = y.clamp(0, H - 1).long(), x.clamp(0, W - 1).long()
        seen[:, j] = inside & mask[j][index] & ((depth[j][index] - z).abs() < rtol * z)
    return seen


def nearest_rotation(M: Tensor) -> Tensor:
    """The rotation nearest to each matrix M (..., 3, 3), float32: V diag(1, 1, det(V U^T)) U^T where M = V S U^T.

    Closed form instead of an SVD, which on a GPU would make the host wait: the unit quaternion of the rotation is the top
    eigenvector of Horn's symmetric 4x4 matrix, whose top eigenvalue s1 + s2 + sign(det M) s3 follows from the singular values.
    The derivative is attached by one linearised correction step, dR = R [ (tr(S) I - S)^-1 vee(R^T dM - dM^T R) ]_x with
    S = R^T M. It is finite also where two singular values coincide (the SVD's own derivative is not); where the rotation is
    truly ambiguous (s2 + sign s3 = 0) it is set to zero. Computed in float64: the matrices are few.
    """
    M = M.double()
    with torch.no_grad():
        A = M / M.flatten(-2).norm(dim=-1).clamp(min=1e-30)[..., None, None]
        R = _rotation_of(_top_quaternion(A))
    RtM = R.transpose(-1, -2) @ M
    # T = tr(S) I - S, symmetric: its inverse times the vector a, by cross products of the rows
    S = RtM.detach()
    T = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * torch.eye(3, device=M.device, dtype=M.dtype) - S
    r0, r1, r2 = T.unbind(-2)
    adjugate = torch.stack((r1.cross(r2, dim=-1), r2.cross(r0, dim=-1), r0.cross(r1, dim=-1)), -1)
    det = (r0 * adjugate[..., 0]).sum(-1)
    clear = det > 1e-12 * M.detach().flatten(-2).norm(dim=-1) ** 3
    inverse = torch.where(clear[..., None, None], adjugate / torch.where(clear, det, 1.0)[..., None, None], 0.0)
    a = torch.stack((RtM[..., 2, 1] - RtM[..., 1, 2], RtM[..., 0, 2] - RtM[..., 2, 0], RtM[..., 1, 0] - RtM[..., 0, 1]), -1)
    x, y, z = (inverse @ a[..., None])[..., 0].unbind(-1)  # zero up to rounding, but with the derivative of R
    zero = torch.zeros_like(x)
    skew = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))
    return (R + R @ skew).float()


def _top_quaternion(A: Tensor) -> Tensor:
    """Unit quaternion (w, x, y, z) that maximises tr(R(q)^T A) for A (..., 3, 3) of unit Frobenius norm, float64."""
    # eigenvalues e1 >= e2 of A^T A (trace 1) by the trigonometric formula
    third = torch.eye(3, device=A.device, dtype=A.dtype) / 3
    B = A.transpose(-1, -2) @ A - third
    p = (B.square().sum((-1, -2)) / 6).sqrt()
    b0, b1, b2 = (B / p.clamp(min=1e-30)[..., None, None]).unbind(-2)
    angle = ((b0 * b1.cross(b2, dim=-1)).sum(-1) / 2).clamp(-1, 1).acos() / 3
    e1 = 1 / 3 + 2 * p * angle.cos()
    e3 = 1 / 3 + 2 * p * (angle + 2 * torch.pi / 3).cos()
    s1, s2 = e1.sqrt(), (1 - e1 - e3).clamp(min=0).sqrt()
    a0, a1, a2 = A.unbind(-2)
    det = (a0 * a1.cross(a2, dim=-1)).sum(-1)
    top = (s1 + s2 + det / (s1 * s2).clamp(min=1e-30))[..., None, None]
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in (a0, a1, a2))
    wx, wy, wz, xy, xz, yz = m21 - m12, m02 - m20, m10 - m01, m01 + m10, m02 + m20, m12 + m21
    K = torch.stack(
        (m00 + m11 + m22, wx, wy, wz, wx, m00 - m11 - m22, xy, xz, wy, xy, m11 - m00 - m22, yz, wz, xz, yz, m22 - m00 - m11), -1
    ).unflatten(-1, (4, 4))
    # adj(top I - K) = const q q^T (Cayley-Hamilton; K has trace 0, its quadratic and linear coefficients are -2 and -8 det A)
    K2 = K @ K
    linear = top**3 - 2 * top - 8 * det[..., None, None]
    adjugate = K2 @ K + top * K2 + (top**2 - 2) * K + linear * torch.eye(4, device=A.device, dtype=A.dtype)
    best = adjugate.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*A.shape[:-2], 4, 1)
    return F.normalize(adjugate.gather(-1, best)[..., 0], dim=-1, eps=1e-30)


def _rotation_of(q: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in the order (w, x, y, z); a zero quaternion gives the identity."""
    w, x, y, z = q.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def depth_edge(
    depth: Tensor, atol: float | None = None, rtol: float | None = None, kernel: int = 3, mask: Tensor | None = None
) -> Tensor:
    """Mask (..., H, W) of pixels where depth varies, within a kernel x kernel window, by more than atol or rtol times the depth.

    mask: pixels outside it do not take part in the comparison (the result is not cleared there).
    """
    d = depth.flatten(0, -3)[:, None] if depth.ndim > 2 else depth[None, None]
    high = low = d
    if mask is not None:
        m = mask.view_as(d)
        high, low = torch.where(m, d, -torch.inf), torch.where(m, d, torch.inf)
    pool = lambda t: F.max_pool2d(t, kernel, stride=1, padding=kernel // 2)
    span = (pool(high) + pool(-low)).view_as(depth)
    edge = torch.zeros_like(depth, dtype=torch.bool)
    if atol is not None:
        edge |= span > atol
    if rtol is not None:
        edge |= (span / depth).nan_to_num() > rtol
    return edge


def point_normals(points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals of a point map (..., H, W, 3) and the mask (..., H, W) of where they are defined (zero elsewhere).

    The mean of the unit normals of up to four triangles around a pixel: up x left, left x down, down x right, right x up.
    A triangle counts if its three corners are inside the image and inside `mask`.
    """
    p = F.pad(points, (0, 0, 1, 1, 1, 1))
    m = F.pad(mask, (1, 1, 1, 1))
    centre = p[..., 1:-1, 1:-1, :]
    before, here, after = slice(None, -2), slice(1, -1), slice(2, None)
    shifts = ((before, here), (here, before), (after, here), (here, after))
    side = torch.stack([p[(..., *s, slice(None))] - centre for s in shifts])  # (4, ..., H, W, 3): up, left, down, right
    known = torch.stack([m[(..., *s)] for s in shifts]) & mask
    counts = known & known.roll(-1, 0)  # (4, ..., H, W)
    cross = F.normalize(torch.linalg.cross(side, side.roll(-1, 0)), dim=-1, eps=1e-12)
    total = torch.where(counts[..., None], cross, 0.0).sum(0)
    defined = counts.any(0)
    normal = F.normalize(total / counts.sum(0).clamp(min=1)[..., None], dim=-1, eps=1e-12)
    return torch.where(defined[..., None], normal, 0.0), defined


def normal_edge(normals: Tensor, mask: Tensor, degrees: float = 5.0) -> Tensor:
    """Mask (..., H, W) of pixels near a crease: within a 3x3 window of a pixel whose normal differs by more than `degrees` from
    one of its 3x3 neighbours, or of a pixel without a normal beside one with. No edge is reported outside `mask` (..., H, W)."""
    H, W = mask.shape[-2:]
    n = normals.reshape(-1, H, W, 3).movedim(-1, 1)  # (B, 3, H, W)
    m = mask.reshape(-1, 1, H, W)
    n_pad, m_pad = F.pad(n, (1, 1, 1, 1), mode="replicate"), F.pad(m.to(n.dtype), (1, 1, 1, 1), mode="replicate") > 0
    worst = torch.zeros_like(n[:, :1])
    for dy in range(3):
        for dx in range(3):
            other, known = n_pad[..., dy : dy + H, dx : dx + W], m_pad[..., dy : dy + H, dx : dx + W]
            angle = (n * other).sum(1, keepdim=True).clamp(-1, 1).acos()  # a centre without normal (zero) is at 90 degrees
            worst = torch.maximum(worst, torch.where(known, angle, 0.0))
    near = F.max_pool2d(worst, 3, stride=1, padding=1)
    return ((near > degrees * torch.pi / 180) & m).view(mask.shape)


def depth_normal_edge(points: Tensor, mask: Tensor | None = None, rtol: float = 0.03, degrees: float = 5.0) -> Tensor:
    """Mask (..., H, W) of flying pixels of a point map (..., H, W, 3): at a depth edge as well as at a crease of the normals."""
    z = points[..., 2]
    valid = points.isfinite().all(-1) & (z > 0)
    if mask is not None:
        valid = valid & mask
    normals, defined = point_normals(points, valid)
    return depth_edge(z, rtol=rtol, mask=valid) & normal_edge(normals, defined, degrees)


def intrinsics_from_points(points: Tensor, centred: bool = False, normalised: bool = False) -> Tensor:
    """Least-squares intrinsics (..., 3, 3) in pixels of point maps (..., H, W, 3) in their camera's frame.

    centred: force the principal point to ((W-1)/2, (H-1)/2). normalised: divide the first row by W and the second by H.
    """
    H, W = points.shape[-3:-1]
    x, y = (points[..., :2] / (points[..., 2:].abs() + 1e-10)).unbind(-1)
    u = torch.arange(W, device=points.device, dtype=points.dtype).expand(H, W)
    v = torch.arange(H, device=points.device, dtype=points.dtype)[:, None].expand(H, W)
    rows = []
    for ray, pixel, centre in ((x, u, (W - 1) / 2), (y, v, (H - 1) / 2)):
        if centred:
            focal = (ray * (pixel - centre)).sum((-1, -2)) / ray.square().sum((-1, -2))
            offset = torch.full_like(focal, centre)
        else:  # the line pixel = focal * ray + offset
            mean = ray.mean((-1, -2), keepdim=True)
            focal = ((ray - mean) * (pixel - centre)).sum((-1, -2)) / (ray - mean).square().sum((-1, -2))
            offset = centre - focal * mean[..., 0, 0]
        rows.append((focal, offset))
    (fx, cx), (fy, cy) = rows
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    K = torch.stack((fx, zero, cx, zero, fy, cy, zero, zero, one), -1).unflatten(-1, (3, 3))
    return K / K.new_tensor([[W], [H], [1.0]]) if normalised else K
