"""Convex closed-form shapes, each the intersection of half-spaces and at most one quadric: a ray meets it in one interval.

A shape's surfaces ("faces") are numbered: plane k is face k, the quadric is the face after the last plane. Coordinates are the
part's own, in metres.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Part:
    """One convex shape placed in a rigid body.

    planes (K, 4) float64: rows (n, d), the inside is n.x <= d with |n| = 1.
    quadric None or (a (3,), b (3,), c): the inside is sum(a x^2) + b.x + c <= 0.
    radius: bounding sphere about the part's origin, metres (inf where unbounded).  hollow: seen from inside (a room).
    rotation (3, 3), offset (3,): part to body.
    materials: one index per face (K planes, then the quadric), into the scene's materials.
    """

    planes: np.ndarray
    quadric: tuple | None
    radius: float
    hollow: bool = False
    rotation: np.ndarray = field(default_factory=lambda: np.eye(3))
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))
    materials: np.ndarray | None = None

    @property
    def faces(self) -> int:
        return len(self.planes) + (self.quadric is not None)


def slab(axis: int, low: float, high: float) -> np.ndarray:
    """The two planes low <= x[axis] <= high, (2, 4)."""
    planes = np.zeros((2, 4))
    planes[0, axis], planes[0, 3] = -1.0, -low
    planes[1, axis], planes[1, 3] = 1.0, high
    return planes


NO_PLANES = np.zeros((0, 4))


def box(half) -> Part:
    """Cuboid of half sides `half` (3,)."""
    half = np.asarray(half, float)
    return Part(np.concatenate([slab(k, -half[k], half[k]) for k in range(3)]), None, float(np.linalg.norm(half)))


def ellipsoid(axes) -> Part:
    """Ellipsoid of semi-axes `axes` (3,); a sphere where they are equal."""
    axes = np.asarray(axes, float)
    return Part(NO_PLANES, (axes**-2.0, np.zeros(3), -1.0), float(axes.max()))


def dome(axes) -> Part:
    """Upper half (z >= 0) of an ellipsoid."""
    return Part(np.array([[0.0, 0.0, -1.0, 0.0]]), ellipsoid(axes).quadric, float(np.max(axes)))


def cylinder(radius: float, half: float) -> Part:
    """Cylinder about z, |z| <= half."""
    return Part(slab(2, -half, half), (np.array([1.0, 1.0, 0.0]), np.zeros(3), -(radius**2)), float(np.hypot(radius, half)))


def frustum(bottom: float, top: float, half: float) -> Part:
    """Truncated cone about z: radius `bottom` at z = -half and `top` at z = +half, both positive."""
    middle, slope = (bottom + top) / 2, (top - bottom) / (2 * half)         # x^2 + y^2 <= (middle + slope z)^2
    quadric = (np.array([1.0, 1.0, -(slope**2)]), np.array([0.0, 0.0, -2 * middle * slope]), -(middle**2))
    return Part(slab(2, -half, half), quadric, float(np.hypot(max(bottom, top), half)))


def prism(sides: int, radius: float, half: float) -> Part:
    """Regular prism about z with `sides` side faces that touch the cylinder of `radius`."""
    angle = 2 * np.pi * np.arange(sides) / sides
    walls = np.stack([np.cos(angle), np.sin(angle), 0 * angle, np.full(sides, radius)], 1)
    return Part(np.concatenate([walls, slab(2, -half, half)]), None, float(np.hypot(radius / np.cos(np.pi / sides), half)))


def gem(normals: np.ndarray, distances: np.ndarray, half: float) -> Part:
    """Convex polyhedron n_k.x <= d_k inside the cube of half side `half`."""
    cut = np.concatenate([normals / np.linalg.norm(normals, axis=1, keepdims=True), distances[:, None]], 1)
    return Part(np.concatenate([cut, box([half] * 3).planes]), None, half * 3**0.5)


def roof(half) -> Part:
    """Gable roof over the rectangle |x| <= half[0], |y| <= half[1], ridge along x at z = half[2], floor at z = 0."""
    hx, hy, hz = half
    slope = np.array([[0.0, hz, hy, hy * hz], [0.0, -hz, hy, hy * hz]]) / np.hypot(hy, hz)
    return Part(np.concatenate([slab(0, -hx, hx), slope, [[0.0, 0.0, -1.0, 0.0]]]), None, float(np.linalg.norm(half)))


def intersect(part: Part, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays first meet the part's surface from outside (from inside, where the part is hollow).

    origin (3, 1) or (3, N), direction (3, N) in part coordinates, any length; float64.
    Returns t (N,) with inf where there is no hit at t > 0, and face (N,) int.
    """
    n, k = direction.shape[1], len(part.planes)
    near, far, face = np.full(n, -np.inf), np.full(n, np.inf), np.full(n, k)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if k:
            slope = part.planes[:, :3] @ direction                                       # (K, N)
            gap = part.planes[:, 3:] - part.planes[:, :3] @ origin                       # (K, 1 or N), >= 0 inside
            t = gap / slope
            missed = (slope == 0) & (gap < 0)                                            # parallel to a face and outside it
            leave = np.where(slope > 0, t, np.where(missed, -np.inf, np.inf))
            far = leave.min(0)
            if part.hollow:
                return np.where((far > 0) & np.isfinite(far), far, np.inf), leave.argmin(0)
            enter = np.where(slope < 0, t, -np.inf)
            near, face = enter.max(0), enter.argmax(0)
        if part.quadric is not None:
            low, high = _quadric_interval(part.quadric, origin, direction, near, far)
            face = np.where(low > near, k, face)
            near, far = np.maximum(near, low), np.minimum(far, high)
    return np.where((near < far) & (near > 0), near, np.inf), face


def _quadric_interval(quadric, origin, direction, near, far):
    """The part of [near, far] inside the quadric, as (low, high); low > high where there is none."""
    a, b, c = quadric
    qa = a @ (direction * direction)                                                     # qa t^2 + 2 qb t + qc <= 0
    ox, oy, oz = origin * a[:, None] + b[:, None] / 2
    qb = ox * direction[0] + oy * direction[1] + oz * direction[2]
    qc = a @ (origin * origin) + b @ origin + c
    root = qb * qb - qa * qc
    real = root >= 0
    root = np.sqrt(np.where(real, root, 0.0))
    q = -(qb + np.copysign(root, qb))  # the root without cancellation, then its partner
    r0, r1 = q / qa, qc / q
    low, high = np.minimum(r0, r1), np.maximum(r0, r1)
    if (qa > 0).all():
        return np.where(real, low, np.inf), np.where(real, high, -np.inf)
    # A steep ray and a cone, or a ray along a cylinder's axis: the inside is t <= low or t >= high (everything where there
    # is no root). Between the caps the solid is convex, so at most one of the two pieces survives.
    first = np.minimum(far, low) > near
    open_low = np.where(real & ~first, high, -np.inf)
    open_high = np.where(real & first, low, np.inf)
    outside = (qa == 0) & (qb == 0) & (np.broadcast_to(qc, qa.shape) > 0)
    line = (qa == 0) & (qb != 0)
    cut = -qc / (2 * qb)
    open_low = np.where(line, np.where(qb < 0, cut, -np.inf), np.where(outside, np.inf, np.where(qa == 0, -np.inf, open_low)))
    open_high = np.where(line, np.where(qb > 0, cut, np.inf), np.where(qa == 0, np.inf, open_high))
    closed = qa > 0
    low = np.where(closed, np.where(real, low, np.inf), open_low)
    return low, np.where(closed, np.where(real, high, -np.inf), open_high)


def normals(part: Part, points: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Unit normals (N, 3) at surface points (N, 3), in part coordinates; they point to the side that is seen."""
    out = np.zeros_like(points)
    flat = face < len(part.planes)
    if part.quadric is not None:
        a, b, _ = part.quadric
        gradient = 2 * a * points + b
        out = gradient / np.linalg.norm(gradient, axis=1, keepdims=True).clip(1e-12)
    if flat.any():
        out[flat] = part.planes[face[flat], :3]
    return -out if part.hollow else out


def rescale(part: Part, scale: float) -> None:
    """Make a part (its size and its offset in the body) `scale` times as large, in place."""
    part.planes = part.planes * [1, 1, 1, scale]
    if part.quadric is not None:
        a, b, c = part.quadric
        part.quadric = (a, b * scale, c * scale**2)
    part.radius, part.offset = part.radius * scale, part.offset * scale
