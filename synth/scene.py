"""A small ray-caster: rigid bodies of closed-form shapes, solid textures, a sun with shadows, a moving camera, and exact truth.

Everything is a pure function of (seed, index). Conventions, everywhere in this folder:
- Camera axes are OpenCV's: x right, y down, z forward. `cam_to_world` (4, 4) takes camera to world coordinates; the world's z
  is up. Metres.
- Pixel coordinates are continuous: pixel (row i, column j) covers [j, j+1) x [i, i+1), its centre is at (j + 0.5, i + 0.5), the
  image is [0, W] x [0, H]. Intrinsics are in these units (a camera that looks through the image's middle has cx = W / 2).
- Depth is z-depth; the sky has depth inf. Time is a number; a clip of T frames is rendered at T times.

Truth for tests: `render` (depth, points, normals, ids), `tracks` (places and occlusion of points that ride on the bodies),
`visible`, `cast`.
"""

from dataclasses import dataclass

import numpy as np

from synth import shapes, texture

RENDERER = 1  # raise when the same (seed, index) gives other pictures: folders written before are then stale
BLOCK = 8192                                                     # rays traced together: the working set stays in the cache


@dataclass
class Camera:
    """Pinhole camera (or orthographic, where fx, fy are pixels per metre). Sizes and intrinsics in pixels (convention above)."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    cam_to_world: np.ndarray                                     # (4, 4) float64
    orthographic: bool = False

    @property
    def K(self) -> np.ndarray:
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    def rays(self, uv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World rays through uv (N, 2): origin (1, 3) or (N, 3) and direction (N, 3); the ray parameter is the z-depth."""
        x, y = (uv[:, 0] - self.cx) / self.fx, (uv[:, 1] - self.cy) / self.fy
        rotation, centre = self.cam_to_world[:3, :3], self.cam_to_world[None, :3, 3]
        if self.orthographic:
            return centre + np.stack([x, y, 0 * x], 1) @ rotation.T, np.broadcast_to(rotation[:, 2], (len(uv), 3)).copy()
        return centre, np.stack([x, y, np.ones_like(x)], 1) @ rotation.T

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points (N, 3) -> image places (N, 2) and z-depth (N,). Places are meaningless where the depth is not positive."""
        p = (points - self.cam_to_world[:3, 3]) @ self.cam_to_world[:3, :3]
        z = np.where(np.abs(p[:, 2]) < 1e-9, 1e-9, p[:, 2])
        scale = 1.0 if self.orthographic else z
        return np.stack([self.fx * p[:, 0] / scale + self.cx, self.fy * p[:, 1] / scale + self.cy], 1), p[:, 2]


    def pixel_size(self, depth: np.ndarray) -> np.ndarray:
        """Width of a pixel in metres at z-depths (N,)."""
        return (np.ones_like(depth) if self.orthographic else depth) / np.sqrt(self.fx * self.fy)


@dataclass
class Body:
    """A rigid body: parts, and its motion  x_world = rotation(time) x + position(time).

    position(time) = start + velocity*time + sway*sin(2 pi time*rate + phase) (elementwise);
    rotation(time) = turn by spin*time (axis * radians) after `attitude`.
    """

    parts: list
    start: np.ndarray
    velocity: np.ndarray
    sway: np.ndarray
    rate: float
    phase: np.ndarray
    spin: np.ndarray
    attitude: np.ndarray

    @property
    def moving(self) -> bool:
        return bool(np.any(self.velocity) or np.any(self.sway) or np.any(self.spin))

    @property
    def radius(self) -> float:
        return max(float(np.linalg.norm(part.offset)) + part.radius for part in self.parts)

    def pose(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Body-to-world rotation (3, 3) and position (3,)."""
        swing = self.sway * (np.sin(2 * np.pi * time * self.rate + self.phase) - np.sin(self.phase))
        return turn(self.spin * time) @ self.attitude, self.start + self.velocity * time + swing


@dataclass
class Scene:
    """Bodies (index 0 is the room or the ground), materials, light and sky. `sun` points from the ground to the sun."""

    bodies: list
    materials: list
    sun: np.ndarray
    ambient: float
    diffuse: float
    tint: np.ndarray                                             # colour of the sun light (3,)
    sky: np.ndarray                                              # colours at the horizon, at the zenith and of the clouds (3, 3)


def turn(vector) -> np.ndarray:
    """Rotation matrix of an axis * angle vector (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle == 0:
        return np.eye(3)
    x, y, z = np.asarray(vector) / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def look_at(eye, target, roll: float = 0.0) -> np.ndarray:
    """cam_to_world (4, 4) of a camera at `eye` that looks at `target`, world z up, rolled about its axis by `roll` radians."""
    forward = np.asarray(target, float) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    out = np.eye(4)
    out[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1) @ turn([0, 0, roll])
    out[:3, 3] = eye
    return out


@dataclass
class Posed:
    """A part at one moment: part to world, and the ball about its whole body (None for rooms and unbounded ground)."""

    part: shapes.Part
    rotation: np.ndarray                                         # (3, 3)
    position: np.ndarray                                         # (3,)
    body: int
    ball: tuple | None                                           # (centre (3,), radius); one object for all parts of a body


def posed_parts(scene: Scene, time: float) -> list[Posed]:
    """All parts at a time."""
    out = []
    for index, body in enumerate(scene.bodies):
        rotation, position = body.pose(time)
        ball = None if np.isinf(body.radius) else (position, body.radius)
        out += [Posed(p, rotation @ p.rotation, rotation @ p.offset + position, index, ball) for p in body.parts]
    return out


def _through_ball(centre, radius, origins, columns, length2):
    """Which rays (columns) pass through a ball in front of their origin: row numbers. origins (3, 1) or (3, N), columns (3, N)
    directions, length2 (N,).
    """
    c = centre[:, None] - origins
    along = columns[0] * c[0] + columns[1] * c[1] + columns[2] * c[2]
    gap2 = c[0] * c[0] + c[1] * c[1] + c[2] * c[2] - radius * radius
    return np.flatnonzero((gap2 * length2 <= along * along) & ((along > 0) | (gap2 < 0)))


def cast(parts: list[Posed], origin: np.ndarray, direction: np.ndarray, limit=np.inf, solids_only=False):
    """First hit of rays origin + t direction with 0 < t < limit: t (N,) float64 (inf: none), part index (N,) int16 (-1: none),
    face (N,) int16.

    origin (1, 3) or (N, 3), direction (N, 3) of any length; limit scalar or (N,). solids_only leaves rooms and unbounded ground
    out (shadows).
    """
    n = len(direction)
    best, which, face = np.full(n, limit, float), np.full(n, -1, np.int16), np.zeros(n, np.int16)
    origins, columns = np.ascontiguousarray(origin.T), np.ascontiguousarray(direction.T)  # one row per coordinate: fast in numpy
    length2 = columns[0] ** 2 + columns[1] ** 2 + columns[2] ** 2
    ball, o, d, rows = None, origins, columns, np.arange(n)
    for index, p in enumerate(parts if n else ()):
        if p.ball is None and solids_only:
            continue
        if p.ball is not ball:                                   # a new body: keep the rays that come near it
            ball = p.ball
            rows = np.arange(n) if ball is None else _through_ball(*ball, origins, columns, length2)
            d, o = columns[:, rows], origins[:, rows] if len(origin) > 1 else origins
        if not len(rows):
            continue
        own = slice(None) if p.ball is None else _through_ball(p.position, p.part.radius, o, d, length2[rows])
        oo = o[:, own] if len(origin) > 1 else o
        t, f = shapes.intersect(p.part, p.rotation.T @ (oo - p.position[:, None]), p.rotation.T @ d[:, own])
        hit = rows[own]
        closer = t < best[hit]
        hit = hit[closer]
        best[hit], which[hit], face[hit] = t[closer], index, f[closer]
    return np.where(which < 0, np.inf, best), which, face


def surface(parts: list, points: np.ndarray, which: np.ndarray, face: np.ndarray):
    """At hits: unit world normals (N, 3), places in body coordinates (N, 3) float32, material index (N,); zeros and -1 where
    nothing was hit.
    """
    normal, local, material = np.zeros_like(points), np.zeros(points.shape, np.float32), np.full(len(points), -1)
    for index in np.unique(which[which >= 0]):
        p = parts[index]
        rows = np.flatnonzero(which == index)
        x = (points[rows] - p.position) @ p.rotation
        normal[rows] = shapes.normals(p.part, x, face[rows]) @ p.rotation.T
        local[rows] = x @ p.part.rotation.T + p.part.offset
        material[rows] = p.part.materials[face[rows]]
    return normal, local, material


def shade(scene: Scene, parts: list, origin, direction, t, which, face, camera: Camera, shadows: bool):
    """Colours (N, 3) float32 in [0, 1], world points (N, 3) and normals (N, 3) of the camera's rays that `cast` has traced."""
    hit = which >= 0
    points = origin + direction * np.where(hit, t, 0.0)[:, None]
    normal, local, material = surface(parts, points, which, face)
    facing = np.abs(np.einsum("nk,nk->n", normal, direction)) / np.linalg.norm(direction, axis=1)
    size = camera.pixel_size(np.where(hit, t, 1.0)) / np.sqrt(facing.clip(0.04))   # of the pixel, on the surface
    colour = np.zeros((len(t), 3), np.float32)
    colour[~hit] = sky_colour(scene, direction[~hit])
    for m in np.unique(material[hit]):
        rows = np.flatnonzero(material == m)
        colour[rows] = texture.albedo(scene.materials[m], local[rows], size[rows].astype(np.float32))
    sunny = np.clip(normal @ scene.sun, 0, None)
    if shadows:
        lit = np.flatnonzero(sunny > 0)
        toward_sun = np.broadcast_to(scene.sun, (len(lit), 3))
        blocked = cast(parts, points[lit] + 1e-4 * normal[lit], toward_sun, solids_only=True)[1] >= 0
        sunny[lit[blocked]] = 0
    # Sky light from above, and a little light back from the side opposite to the sun.
    soft = 0.85 + 0.15 * normal[:, 2:] - 0.2 * (normal @ scene.sun)[:, None]
    light = scene.ambient * soft + scene.diffuse * sunny[:, None] * scene.tint
    colour[hit] *= light[hit].astype(np.float32)
    return np.clip(colour, 0, 1), points, normal


def sky_colour(scene: Scene, direction: np.ndarray) -> np.ndarray:
    """Colour of the sky (N, 3) float32 along world directions (N, 3): horizon to zenith, with clouds."""
    d = (direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)
    height = np.sqrt(d[:, 2:].clip(0))
    q = (d / (d[:, 2:].clip(0) + 0.25) * 2).T
    cloud = texture.noise(q)[0] + 0.5 * texture.noise(2.1 * q + 7)[0] + 0.25 * texture.noise(4.3 * q + 3)[0]
    cover = np.clip(cloud[:, None] * 1.2, 0, 1) * np.clip(4 * d[:, 2:], 0, 1)
    colour = scene.sky[0] + height * (scene.sky[1] - scene.sky[0])
    return (colour + cover * (scene.sky[2] - colour)).astype(np.float32)


def pixel_centres(camera: Camera) -> np.ndarray:
    """(H*W, 2) float64, row by row."""
    return np.stack(np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5), -1).reshape(-1, 2)


def render(scene: Scene, camera: Camera, time: float = 0.0, shadows: bool = True, antialias: bool = True) -> dict:
    """One frame with its truth at pixel centres. Only colours are antialiased: four more rays where the surface changes.

    Returns rgb (H, W, 3) uint8; depth (H, W) float32 z-depth, inf for sky; points (H, W, 3) float64 world, nan for sky; normals
    (H, W, 3) float32 world and normals_cam (OpenCV camera axes), unit, towards the camera, 0 for sky; ids (H, W) int32: 0 sky,
    1 + body index; surfaces (H, W) int32: 0 sky, else another number for each face of each part;
    K (3, 3), cam_to_world (4, 4) float64.
    """
    h, w = camera.height, camera.width
    parts = posed_parts(scene, time)
    body_of = np.array([p.body for p in parts] + [-1])             # index -1 (sky) -> -1
    uv = pixel_centres(camera)
    blocks = []
    for i in range(0, h * w, BLOCK):
        origin, direction = camera.rays(uv[i:i + BLOCK])
        hits = cast(parts, origin, direction)
        colour, points, normal = shade(scene, parts, origin, direction, *hits, camera, shadows)
        points[hits[1] < 0] = np.nan
        blocks.append((colour, *hits, points, normal))
    colour, depth, which, face, points, normal = (np.concatenate(b) for b in zip(*blocks))
    surfaces = np.where(which < 0, 0, 1 + which.astype(np.int32) * 64 + face).reshape(h, w)
    if antialias:
        changes = np.zeros((h, w), bool)
        sideways, downward = surfaces[:, 1:] != surfaces[:, :-1], surfaces[1:] != surfaces[:-1]
        changes[:, 1:] |= sideways
        changes[:, :-1] |= sideways
        changes[1:] |= downward
        changes[:-1] |= downward
        rows = np.flatnonzero(changes)
        for i in range(0, len(rows), BLOCK // 4):
            some = rows[i:i + BLOCK // 4]
            shift = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])
            origin, direction = camera.rays((uv[some, None] + shift).reshape(-1, 2))
            fine = shade(scene, parts, origin, direction, *cast(parts, origin, direction), camera, shadows)[0]
            colour[some] = fine.reshape(-1, 4, 3).mean(1)
    image = lambda x, dtype: x.reshape(h, w, -1).astype(dtype)
    return {"rgb": (image(colour, np.float32) * 255 + 0.5).astype(np.uint8),
            "depth": depth.reshape(h, w).astype(np.float32), "points": points.reshape(h, w, 3),
            "normals": image(normal, np.float32), "normals_cam": image(normal @ camera.cam_to_world[:3, :3], np.float32),
            "ids": (body_of[which] + 1).reshape(h, w).astype(np.int32), "surfaces": surfaces,
            "K": camera.K, "cam_to_world": camera.cam_to_world}


def visible(parts: list, camera: Camera, points: np.ndarray, normal: np.ndarray | None = None) -> np.ndarray:
    """Which world points (N, 3) the camera sees: in front of it, inside the image, facing it (where normals are given), nothing
    nearer on the ray: (N,) bool.
    """
    uv, z = camera.project(points)
    seen = (z > 0) & (uv[:, 0] >= 0) & (uv[:, 0] < camera.width) & (uv[:, 1] >= 0) & (uv[:, 1] < camera.height)
    origin, direction = camera.rays(uv[seen])                    # ray parameter = z-depth
    if normal is not None:
        seen[seen] = facing = np.einsum("nk,nk->n", normal[seen], direction) < 0
        origin, direction = (origin if len(origin) == 1 else origin[facing]), direction[facing]
    limit = z[seen] * (1 - 1e-6) - 1e-6                          # the point's own surface does not hide it
    seen[seen] = cast(parts, origin, direction, limit)[1] < 0
    return seen


def poses_of(scene: Scene, time: float, body: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (N, 3, 3) and positions (N, 3), body to world, of the bodies with index body (N,)."""
    rotation, position = zip(*(b.pose(time) for b in scene.bodies))
    return np.stack(rotation)[body], np.stack(position)[body]


def sample_points(scene: Scene, cameras: list, times: list, count: int, rng: np.random.Generator,
                  first: float = 0.7, on_moving: float = 0.5):
    """Points on surfaces that are seen somewhere in the clip: body (P,) int, local (P, 3), normal (P, 3) in body coordinates;
    P = count (0 if nothing is seen).

    A share `first` is drawn from what frame 0 shows, the rest from any frame; a share `on_moving` lies on moving bodies where
    that many can be had.
    """
    frames = np.where(rng.random(6 * count) < first, 0, rng.integers(0, len(times), 6 * count))
    found = []
    for frame in np.unique(frames):
        camera, parts = cameras[frame], posed_parts(scene, times[frame])
        origin, direction = camera.rays(rng.random((int((frames == frame).sum()), 2)) * [camera.width, camera.height])
        t, which, face = cast(parts, origin, direction)
        hit = which >= 0
        points = (origin + direction * np.where(hit, t, 0)[:, None])[hit]
        normal = surface(parts, points, which[hit], face[hit])[0]
        body = np.array([p.body for p in parts])[which[hit]]
        rotation, position = poses_of(scene, times[frame], body)
        found.append((body, np.einsum("nji,nj->ni", rotation, points - position), np.einsum("nji,nj->ni", rotation, normal)))
    body, local, normal = (np.concatenate(f) for f in zip(*found))
    if not len(body):
        return body, local, normal
    order = rng.permutation(len(body))
    moving = np.array([b.moving for b in scene.bodies])[body[order]]
    live, still = order[moving], order[~moving]
    wanted = round(on_moving * count)
    n = min(len(live), max(wanted, count - len(still)))
    chosen = np.concatenate([live[:n], still[:count - n]])
    chosen = rng.permutation(np.resize(chosen, count))           # repeats only where the scene shows too little
    return body[chosen], local[chosen], normal[chosen]


def tracks(scene: Scene, cameras: list, times: list, body, local, normal) -> dict:
    """Exact tracks of points that ride on the bodies (arguments as `sample_points` returns them).

    Returns coords (P, T, 2) float64 pixels, depth (P, T) float64 z-depth, occluded (P, T) bool, points (P, T, 3) world.
    """
    coords, depth, hidden, world = [], [], [], []
    for camera, time in zip(cameras, times):
        rotation, position = poses_of(scene, time, body)
        points = np.einsum("nij,nj->ni", rotation, local) + position
        uv, z = camera.project(points)
        hidden.append(~visible(posed_parts(scene, time), camera, points, np.einsum("nij,nj->ni", rotation, normal)))
        coords.append(uv)
        depth.append(z)
        world.append(points)
    stack = lambda frames: np.stack(frames, 1)
    return {"coords": stack(coords), "depth": stack(depth), "occluded": stack(hidden), "points": stack(world)}
