"""Random scenes: standing and tumbling bodies in a room or in the open, and smooth camera paths, from (seed, index) alone."""

from dataclasses import dataclass, replace

import numpy as np

from synth import shapes, texture
from synth.scene import Body, Camera, Scene, look_at, turn

ZERO = np.zeros(3)


def rng_of(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Generator of one scene. `stream` separates uses that must not share scenes: ten for each writer, even ones for training,
    odd ones for validation.
    """
    return np.random.default_rng((seed, stream, index))


def random_parts(rng: np.random.Generator, size: float) -> tuple[list, float]:
    """Parts of one random object, simple or compound, about `size` metres large; and the height of its origin above its foot."""
    h = size / 2
    u = lambda low, high: float(rng.uniform(low, high))
    at = lambda part, *place: replace(part, offset=np.array(place) * h)
    kind = rng.integers(12)
    if kind == 0:
        half = h * rng.uniform(0.4, 1.0, 3)
        return [shapes.box(half)], half[2]
    if kind == 1:
        axes = h * rng.uniform(0.55, 1.0, 3)
        return [shapes.ellipsoid(axes)], axes[2]
    if kind == 2:
        r, half = h * u(0.4, 0.9), h * u(0.4, 1.0)
        return [shapes.cylinder(r, half)], half
    if kind == 3:
        half = h * u(0.5, 1.0)
        return [shapes.frustum(h * u(0.5, 1.0), h * u(0.1, 0.5), half)], half
    if kind == 4:
        half = h * u(0.4, 1.0)
        return [shapes.prism(int(rng.integers(3, 8)), h * u(0.5, 0.8), half)], half
    if kind == 5:
        n = int(rng.integers(8, 16))
        return [shapes.gem(rng.normal(size=(n, 3)), h * rng.uniform(0.55, 0.85, n), 0.85 * h)], 0.85 * h
    if kind == 6:                                                # table
        x, y = u(0.6, 1.0), u(0.5, 0.9)
        legs = [at(shapes.cylinder(0.08 * h, 0.45 * h), 0.85 * x * i, 0.85 * y * j, -0.05) for i in (-1, 1) for j in (-1, 1)]
        return [at(shapes.box([x * h, y * h, 0.08 * h]), 0, 0, 0.48)] + legs, h / 2
    if kind == 7:                                                # dumb-bell
        r = u(0.3, 0.45)
        ends = [at(shapes.ellipsoid([r * h] * 3), 0, 0, s * (1 - r)) for s in (-1, 1)]
        return [shapes.cylinder(0.12 * h, (1 - r) * h)] + ends, h
    if kind == 8:                                                # snowman
        return [at(shapes.ellipsoid([r * h] * 3), 0, 0, z) for r, z in ((0.5, -0.5), (0.36, 0.2), (0.25, 0.7))], h
    if kind == 9:                                                # house
        x, y, wall = u(0.5, 0.8), u(0.4, 0.6), u(0.35, 0.55)
        return [at(shapes.box([x * h, y * h, wall * h]), 0, 0, wall - 1),
                at(shapes.roof([1.1 * x * h, 1.2 * y * h, 0.5 * h]), 0, 0, 2 * wall - 1)], h
    if kind == 10:                                               # mushroom
        stem, cap = u(0.15, 0.3), u(0.55, 0.95)
        return [at(shapes.frustum(1.2 * stem * h, stem * h, 0.5 * h), 0, 0, -0.5), shapes.dome([cap * h, cap * h, 0.6 * h])], h
    arm = u(0.15, 0.3)                                           # three crossed beams
    return [shapes.box(h * np.where(np.arange(3) == axis, 1, arm)) for axis in range(3)], h


class Builder:
    """Collects bodies and materials of a scene."""

    def __init__(self, rng):
        self.rng, self.bodies, self.materials = rng, [], []

    def material(self, size, **kind) -> int:
        self.materials.append(texture.random_material(self.rng, size, **kind))
        return len(self.materials) - 1

    def body(self, parts, start=ZERO, velocity=ZERO, sway=ZERO, rate=0.5, phase=ZERO, spin=ZERO, attitude=None) -> Body:
        start, velocity, sway, phase, spin = (np.asarray(v, float) for v in (start, velocity, sway, phase, spin))
        body = Body(parts, start, velocity, sway, rate, phase, spin, np.eye(3) if attitude is None else attitude)
        self.bodies.append(body)
        return body

    def paint(self, parts, size):
        """One material for the object, now and then another for a part."""
        main = self.material(size)
        for part in parts:
            own = self.material(size) if self.rng.random() < 0.35 else main
            part.materials = np.full(part.faces, own)
        return parts

    def room(self, half, height):
        """Box seen from inside: own materials for floor, ceiling and walls; |x|, |y| <= half (2,), 0 <= z <= height."""
        part = shapes.box([half[0], half[1], height / 2])
        part.hollow, part.offset, part.radius = True, np.array([0, 0, height / 2]), np.inf
        wall = [self.material(self.rng.uniform(0.6, 1.6), vivid=0.8) for _ in range(4)]
        floor, ceiling = self.material(self.rng.uniform(0.5, 1.2), vivid=0.8), self.material(1.5, kind="cloud", vivid=0.4)
        part.materials = np.array([*wall, floor, ceiling])
        self.body([part])

    def ground(self):
        """A flat disc of 60 m: beyond it lies the sky, so that depths stay finite or infinite, never nearly so."""
        disc = shapes.cylinder(60.0, 1.0)
        colours = np.full(3, self.material(self.rng.uniform(0.8, 2.5), vivid=0.8))
        self.body([shapes.Part(disc.planes, disc.quadric, np.inf, offset=np.array([0, 0, -1.0]), materials=colours)])

    def scene(self) -> Scene:
        rng = self.rng
        azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.3)
        sun = np.array([np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)])
        ambient = rng.uniform(0.5, 0.7)
        blue = np.array([[0.75, 0.82, 0.9], [0.25, 0.45, 0.8], [0.95, 0.95, 0.95]]) + rng.uniform(-0.1, 0.1, (3, 3))
        diffuse, tint = rng.uniform(0.6, 0.8), 1 + rng.uniform(-0.08, 0.08, 3)
        return Scene(self.bodies, self.materials, sun, ambient, diffuse, tint, blue.clip(0, 1).astype(np.float32))


@dataclass
class Path:
    """Smooth camera path about the scene's middle: values at time 0, their change over one unit of time, and a slow wobble."""

    azimuth: np.ndarray                                          # (start, change) radians
    distance: np.ndarray                                         # (start, change) metres from the target, along the ground
    height: np.ndarray                                           # (start, change) metres above the ground
    target: np.ndarray                                           # (2, 3) start and change
    wobble: np.ndarray                                           # (3, 2) amplitude in metres and phase
    roll: np.ndarray                                             # (start, change) radians

    def pose(self, time: float) -> np.ndarray:
        """cam_to_world (4, 4)."""
        azimuth, distance, height, roll = (a[0] + a[1] * time for a in (self.azimuth, self.distance, self.height, self.roll))
        target = self.target[0] + self.target[1] * time
        eye = np.array([target[0] + distance * np.cos(azimuth), target[1] + distance * np.sin(azimuth), height])
        eye += self.wobble[:, 0] * np.sin(2 * np.pi * time + self.wobble[:, 1])
        eye[2] = max(eye[2], 0.25)
        return look_at(eye, target, roll)


def random_path(rng: np.random.Generator, distance=(2.8, 4.5), sweep: float = 0.5) -> Path:
    """A path whose azimuth changes by up to `sweep` radians over a unit of time."""
    start = rng.uniform(*distance)
    return Path(azimuth=np.array([rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.0) * sweep * rng.choice([-1, 1])]),
                distance=np.array([start, rng.uniform(-0.2, 0.15) * start]),
                height=np.array([rng.uniform(0.7, 2.4), rng.uniform(-0.4, 0.4)]),
                target=np.stack([rng.uniform([-0.4, -0.4, 0.3], [0.4, 0.4, 0.9]), rng.uniform(-0.3, 0.3, 3)]),
                wobble=np.stack([rng.uniform(0, 0.08, 3), rng.uniform(0, 6.28, 3)], 1),
                roll=rng.uniform(-0.05, 0.05, 2))


def make_camera(size: tuple[int, int], fov: float, cam_to_world: np.ndarray) -> Camera:
    """Centred pinhole camera with square pixels; size (H, W) pixels, `fov` the angle of the longer side in radians."""
    focal = max(size) / 2 / np.tan(fov / 2)
    return Camera(size[1], size[0], focal, focal, size[1] / 2, size[0] / 2, cam_to_world)


def make_scene(rng: np.random.Generator, path: Path, count=(9, 15), moving: float = 0.6, open_air: float = 0.35,
               spread: float = 2.2, size=(0.5, 1.7)) -> Scene:
    """A room or (with probability `open_air`) open ground with `count` (low, high) bodies about the origin, a share `moving` of
    which move over time 0..1.

    Bodies keep clear of the camera along its path (times 0..1).
    """
    b = Builder(rng)
    eyes = np.stack([path.pose(t)[:3, 3] for t in np.linspace(0, 1, 9)])
    if rng.random() < open_air:
        b.ground()
    else:
        need = np.abs(eyes[:, :2]).max(0) + 0.5
        b.room(np.maximum(need, rng.uniform(3.0, 5.0, 2)), max(rng.uniform(2.6, 4.5), eyes[:, 2].max() + 0.4))
    for _ in range(int(rng.integers(*count))):
        for _ in range(20):                                      # a few tries to stay out of the camera's way
            body = _random_body(b, rng, rng.random() < moving, spread, size)
            times = np.linspace(0, 1, 9)
            clear = min(np.linalg.norm(body.pose(t)[1] - eye) for t, eye in zip(times, eyes)) - body.radius
            if clear > 0.8:
                break
            b.bodies.pop()
    for body in b.bodies[1:]:
        b.paint(body.parts, float(np.clip(body.radius * rng.uniform(0.4, 0.9), 0.15, 0.8)))
    return b.scene()


def _random_body(b: Builder, rng, moves: bool, spread: float, size) -> Body:
    """A body that stands still, slides and turns on the floor, or tumbles in the air."""
    parts, foot = random_parts(rng, rng.uniform(*size))
    place = np.array([*rng.uniform(-spread, spread, 2), foot])
    attitude = turn([0, 0, rng.uniform(0, 2 * np.pi)])
    if not moves:
        return b.body(parts, place, attitude=attitude)
    velocity, sway = rng.uniform(-1.2, 1.2, 3), rng.uniform(-0.4, 0.4, 3)
    if rng.random() < 0.45:                                      # on the floor
        flat = np.array([1.0, 1.0, 0.0])
        rate, phase, spin = rng.uniform(0.4, 1.0), rng.uniform(0, 6.28, 3), [0, 0, rng.uniform(-2, 2)]
        return b.body(parts, place, velocity * flat, sway * flat, rate, phase, spin, attitude)
    radius = max(float(np.linalg.norm(p.offset)) + p.radius for p in parts)
    place[2] = radius + rng.uniform(0.1, 1.2)
    axis = rng.normal(size=3)
    spin = axis / np.linalg.norm(axis) * rng.uniform(0.5, 3.0)
    attitude, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    attitude *= np.sign(np.linalg.det(attitude))
    velocity[2] *= 0.3
    return b.body(parts, place, velocity, sway * [1, 1, 0.5], rng.uniform(0.4, 1.0), rng.uniform(0, 6.28, 3), spin, attitude)


def make_clip(seed: int, index: int, size: tuple[int, int], frames: int, stream: int = 0) -> tuple[Scene, list, list]:
    """A dynamic scene seen by a moving camera: scene, cameras (frames), times (frames) over 0..1."""
    rng = rng_of(seed, index, stream)
    path = random_path(rng)
    scene = make_scene(rng, path)
    fov = np.deg2rad(rng.uniform(45, 75))
    times = [i / max(frames - 1, 1) for i in range(frames)]
    return scene, [make_camera(size, fov, path.pose(t)) for t in times], times


def make_view(seed: int, index: int, size: tuple[int, int], fov=(45, 75), stream: int = 0,
              **scene) -> tuple[Scene, Camera, np.random.Generator]:
    """A scene at time 0 and one camera whose field of view (longer side) is drawn from `fov` degrees; the generator, for further
    draws. `scene`: see make_scene.
    """
    rng = rng_of(seed, index, stream)
    path = random_path(rng, distance=(1.8, 5.0))
    made = make_scene(rng, path, **{"count": (10, 20), "spread": 2.6, **scene})
    return made, make_camera(size, np.deg2rad(rng.uniform(*fov)), path.pose(0.0)), rng
