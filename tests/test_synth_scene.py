"""The ray-caster against itself and against brute force: its truth is what the tests of every system lean on."""

import time as clock

import numpy as np
import pytest

from synth import shapes
from synth.scene import cast, pixel_centres, posed_parts, render, sample_points, tracks, turn, visible
from synth.world import make_camera, make_clip, random_parts, rng_of

SIZE = (72, 96)


@pytest.fixture(scope="module")
def clips():
    """Three clips (a room and the open among them) of five frames, rendered."""
    out = []
    for index in (0, 1, 5):
        scene, cameras, times = make_clip(0, index, SIZE, 5)
        out.append((scene, cameras, times, [render(scene, c, t) for c, t in zip(cameras, times)]))
    assert any(np.isinf(f[0]["depth"]).any() for *_, f in out) and any(np.isfinite(f[0]["depth"]).all() for *_, f in out)
    return out


def random_rays(rng, n):
    origin = rng.normal(size=(n, 3))
    origin *= 3 / np.linalg.norm(origin, axis=1, keepdims=True)
    return origin, rng.uniform(-0.8, 0.8, (n, 3)) - origin


def inside(part, x):
    """Is x (3, ...) inside the part, by its definition? The value is negative inside."""
    limits = part.planes[:, 3].reshape(-1, *[1] * (x.ndim - 1))
    value = np.max(np.tensordot(part.planes[:, :3], x, 1) - limits, 0, initial=-np.inf)
    if part.quadric is not None:
        a, b, c = part.quadric
        value = np.maximum(value, np.tensordot(a, x * x, 1) + np.tensordot(b, x, 1) + c)
    return value


@pytest.mark.parametrize("name", ["box", "ellipsoid", "dome", "cylinder", "frustum", "prism", "gem", "roof"])
def test_hits_against_marching(name):
    """The closed form finds the first sign change of the implicit function along the ray, and its normal is that function's
    gradient.
    """
    rng = np.random.default_rng(3)
    part = {"box": lambda: shapes.box([0.5, 0.7, 0.3]), "ellipsoid": lambda: shapes.ellipsoid([0.4, 0.8, 0.6]),
            "dome": lambda: shapes.dome([0.7, 0.5, 0.6]), "cylinder": lambda: shapes.cylinder(0.4, 0.7),
            "frustum": lambda: shapes.frustum(0.8, 0.2, 0.6), "prism": lambda: shapes.prism(5, 0.5, 0.6),
            "gem": lambda: shapes.gem(rng.normal(size=(9, 3)), rng.uniform(0.4, 0.6, 9), 0.7),
            "roof": lambda: shapes.roof([0.7, 0.6, 0.5])}[name]()
    origin, direction = random_rays(rng, 400)
    direction[:50, :2] = origin[:50, :2] = 0                                           # straight along the axis
    origin[:25, 2], origin[25:50, 2], direction[:25, 2], direction[25:50, 2] = 3, -3, -1, 1
    t, face = shapes.intersect(part, origin.T, direction.T)
    steps = np.linspace(0, 4, 2001)
    path = origin.T[:, :, None] + direction.T[:, :, None] * steps                      # (3, N, S)
    within = inside(part, path) < 0
    assert within[:, 0].sum() == 0
    marched = np.where(within.any(1), steps[within.argmax(1)], np.inf)
    both = np.isfinite(t) & np.isfinite(marched)
    assert both.sum() > 100 and (np.isfinite(t) == np.isfinite(marched)).mean() > 0.985      # a march may step over a corner
    assert not (np.isinf(t) & np.isfinite(marched)).any()
    late = marched[both] - t[both]
    assert (late >= -1e-9).all() and (late <= 0.0021).all()
    hit = np.isfinite(t)
    x = origin[hit] + direction[hit] * t[hit, None]
    n = shapes.normals(part, x, face[hit])
    assert np.abs(inside(part, x.T)).max() < 1e-9
    assert (inside(part, (x + 1e-5 * n).T) > 0).all() and (np.einsum("nk,nk->n", n, direction[hit]) < 0).all()
    np.testing.assert_allclose(np.linalg.norm(n, axis=1), 1, atol=1e-12)
    assert (np.linalg.norm(x, axis=1) <= part.radius + 1e-9).all()


def test_every_random_object_fits_its_ball_and_stands_on_its_foot():
    for seed in range(60):
        rng = rng_of(seed, 0)
        parts, foot = random_parts(rng, 1.0)
        origin, direction = random_rays(np.random.default_rng(seed), 300)
        lowest = np.inf
        for part in parts:
            t, _ = shapes.intersect(part, part.rotation.T @ (origin - part.offset).T, part.rotation.T @ direction.T)
            hit = np.isfinite(t)
            x = origin[hit] + direction[hit] * t[hit, None]
            assert (np.linalg.norm(x - part.offset, axis=1) <= part.radius + 1e-9).all()
            lowest = min(lowest, x[:, 2].min(initial=np.inf))
        assert -foot - 1e-9 <= lowest < -0.3 * foot


def test_culling_changes_nothing():
    """The bounding balls are only there for speed: casting against each part alone gives the same hits."""
    scene, cameras, times = make_clip(0, 3, SIZE, 2)
    parts = posed_parts(scene, times[1])
    origin, direction = cameras[1].rays(pixel_centres(cameras[1]))
    t, which, _ = cast(parts, origin, direction)
    one = lambda p: shapes.intersect(p.part, p.rotation.T @ (origin - p.position).T, p.rotation.T @ direction.T)[0]
    alone = np.stack([one(p) for p in parts])
    np.testing.assert_array_equal(t, alone.min(0))
    np.testing.assert_array_equal(which, alone.argmin(0))
    many = cast(parts, np.repeat(origin, len(direction), 0), direction)
    np.testing.assert_allclose(many[0], t, rtol=1e-12)


def test_depth_unprojects_to_the_world_points(clips):
    for *_, frames in clips:
        for f in frames:
            h, w = f["depth"].shape
            v, u = np.mgrid[:h, :w] + 0.5                                               # pixel centres
            hit = np.isfinite(f["depth"])
            rays = np.linalg.inv(f["K"]) @ np.stack([u, v, np.ones_like(u)])[:, hit]
            world = (f["cam_to_world"][:3, :3] @ (rays * f["depth"][hit]) + f["cam_to_world"][:3, 3:]).T
            np.testing.assert_allclose(world, f["points"][hit], atol=1e-5, rtol=1e-6)    # depth is float32
            assert ((f["ids"] > 0) == hit).all() and ((f["surfaces"] > 0) == hit).all() and np.isnan(f["points"][~hit]).all()
            assert (f["depth"][hit] > 0).all()


def test_normals_agree_with_the_depth_and_face_the_camera(clips):
    for *_, frames in clips:
        f = frames[2]
        p, n = f["points"], f["normals"].astype(float)
        s = f["surfaces"]
        same = (s[:, :-2] == s[:, 2:]) & (s[:, 1:-1] == s[:, 2:]) & (s[:, 1:-1] > 0)
        chord = p[:, 2:] - p[:, :-2]  # along the surface, on both sides of the pixel
        slope = np.abs((chord * n[:, 1:-1]).sum(-1) / np.linalg.norm(chord, axis=-1))[same]
        assert np.percentile(slope, 95) < 0.05 and np.median(slope) < 1e-6              # planes exactly, curved ones nearly
        hit = f["ids"] > 0
        np.testing.assert_allclose(np.linalg.norm(n[hit], axis=-1), 1, atol=1e-5)
        ray = p[hit] - f["cam_to_world"][:3, 3]
        assert ((ray * n[hit]).sum(-1) < 1e-6).all()
        np.testing.assert_allclose(f["normals_cam"][hit] @ f["cam_to_world"][:3, :3].T, n[hit], atol=1e-5)
        assert (f["normals"][~hit] == 0).all()


def test_poses_are_rigid_and_look_the_right_way():
    camera = make_camera((40, 60), 1.0, make_clip(0, 0, SIZE, 2)[1][0].cam_to_world)
    r = camera.cam_to_world[:3, :3]
    np.testing.assert_allclose(r @ r.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(r) > 0 and r[2, 1] < 0  # the image's y axis points down in the world
    middle, z = camera.project(camera.cam_to_world[:3, 3] + 2 * r[:, 2:3].T)
    np.testing.assert_allclose(middle, [[30, 20]])
    np.testing.assert_allclose(z, [2])
    right, _ = camera.project(camera.cam_to_world[:3, 3] + 2 * r[:, 2:3].T + 0.1 * r[:, 0:1].T)
    assert right[0, 0] > 30 and abs(right[0, 1] - 20) < 1e-9
    uv = np.random.default_rng(0).uniform(0, 40, (50, 2))
    origin, direction = camera.rays(uv)
    back, depth = camera.project(origin + 3.0 * direction)
    np.testing.assert_allclose(back, uv, atol=1e-9)
    np.testing.assert_allclose(depth, 3.0)
    np.testing.assert_allclose(turn([0, 0, np.pi / 2]) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_tracks_agree_with_the_depth_maps(clips):
    """Where a track is visible, the depth map at its pixel is its depth; where it is hidden inside the image, something nearer is
    there.
    """
    for scene, cameras, times, frames in clips:
        body, local, normal = sample_points(scene, cameras, times, 300, rng_of(9, 0))
        tr = tracks(scene, cameras, times, body, local, normal)
        assert tr["coords"].shape == (300, 5, 2) and 0.02 < tr["occluded"].mean() < 0.7
        for k, f in enumerate(frames):
            xy, z, hidden = tr["coords"][:, k], tr["depth"][:, k], tr["occluded"][:, k]
            inside_image = (z > 0) & (xy >= 0).all(1) & (xy[:, 0] < SIZE[1]) & (xy[:, 1] < SIZE[0])
            assert (inside_image | hidden).all()
            origin, direction = cameras[k].rays(xy[inside_image])
            parts = posed_parts(scene, times[k])
            first, which, _ = cast(parts, origin, direction)
            seen = ~hidden[inside_image]
            np.testing.assert_allclose(first[seen], z[inside_image][seen], rtol=1e-6)
            assert (np.array([parts[w].body for w in which[seen]]) == body[inside_image][seen]).all()
            col, row = np.floor(xy[inside_image][seen]).astype(int).T
            near = f["ids"][row, col] == 1 + body[inside_image][seen]
            assert near.mean() > 0.8
            relative = np.abs(f["depth"][row, col] - z[inside_image][seen])[near] / z[inside_image][seen][near]
            assert np.median(relative) < 0.01
            nearer = first[~seen] < z[inside_image][~seen] * (1 - 1e-6) - 1e-6
            rotation = np.stack([scene.bodies[b].pose(times[k])[0] for b in body])
            world_normal = np.einsum("nij,nj->ni", rotation, normal)[inside_image][~seen]
            facing_away = (world_normal * direction[~seen]).sum(1) >= 0
            assert (nearer | facing_away).all()


def test_points_ride_on_their_bodies(clips):
    """Rigid: distances within a body stay; points of what stands still stay; points of what moves move."""
    for scene, cameras, times, _ in clips:
        body, local, normal = sample_points(scene, cameras, times, 200, rng_of(4, 1))
        world = tracks(scene, cameras, times, body, local, normal)["points"]
        travelled = np.linalg.norm(world[:, -1] - world[:, 0], axis=1)
        moving = np.array([scene.bodies[b].moving for b in body])
        assert moving.any() and (travelled[~moving] < 1e-9).all() and (travelled[moving] > 1e-3).mean() > 0.95
        for b in np.unique(body):
            x = world[body == b]
            d = np.linalg.norm(x[:, None] - x[None], axis=-1)                          # (n, n, T)
            np.testing.assert_allclose(d, np.broadcast_to(d[..., :1], d.shape), atol=1e-9)


def test_textures_ride_on_their_bodies(clips):
    """On moving bodies, the colour at a track is the same in all frames that show it, but for light; at shuffled tracks not."""
    first, later = [], []
    for scene, cameras, times, frames in clips:
        body, local, normal = sample_points(scene, cameras, times, 400, rng_of(5, 1), on_moving=1.0)
        tr = tracks(scene, cameras, times, body, local, normal)
        moving = np.array([b.moving for b in scene.bodies])[body]
        both = ~tr["occluded"][:, 0] & ~tr["occluded"][:, 2] & moving
        at = lambda k, f=frames, t=tr, b=both: f[k]["rgb"][tuple(np.floor(t["coords"][b, k]).astype(int).T[::-1])].astype(float)
        for colours, k in ((first, 0), (later, 2)):
            colours.append(at(k) - at(k).mean(0))
    a, b = np.concatenate(first), np.concatenate(later)
    cosine = lambda a, b: (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert len(a) > 300 and cosine(a, b) > 0.75 and abs(cosine(a, np.roll(b, 7, 0))) < 0.4


def test_visible_knows_frame_and_back_side(clips):
    scene, cameras, times, frames = clips[0]
    parts, camera, f = posed_parts(scene, times[0]), cameras[0], frames[0]
    hit = f["ids"] > 0
    points, normal = f["points"][hit], f["normals"][hit].astype(float)
    assert visible(parts, camera, points, normal).mean() > 0.999
    assert not visible(parts, camera, points, -normal).any()
    behind = camera.cam_to_world[:3, 3] - (points - camera.cam_to_world[:3, 3])
    assert not visible(parts, camera, behind).any()


def test_pure_function_of_seed_and_index():
    def picture(seed, index, stream=0):
        scene, cameras, times = make_clip(seed, index, (40, 56), 2, stream)
        f = render(scene, cameras[1], times[1])
        return f["rgb"], f["depth"]
    np.random.seed(1)  # global state must not matter  # noqa: NPY002
    a = picture(3, 4)
    np.random.seed(2)  # noqa: NPY002
    b = picture(3, 4)
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    for other in (picture(3, 5), picture(4, 4), picture(3, 4, 1)):
        assert (a[0] != other[0]).mean() > 0.5


def test_same_scene_at_two_resolutions():
    """The camera's continuous pixel convention: a frame of twice the size, averaged 2x2, is the frame; its depth at shared rays
    is the same.
    """
    scene, small, _ = make_clip(0, 5, (48, 64), 2)
    large = make_clip(0, 5, (96, 128), 2)[1]
    a, b = render(scene, small[0], 0.0), render(scene, large[0], 0.0)
    mean = b["rgb"].reshape(48, 2, 64, 2, 3).astype(float).mean((1, 3))
    shifted = lambda shift: np.abs(np.roll(a["rgb"].astype(float), shift, (0, 1)) - mean)[4:-4, 4:-4].mean()
    shifts = {(i, j): shifted((i, j)) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert min(shifts, key=shifts.get) == (0, 0) and shifts[0, 0] < 6


def test_speed(clips, capsys):
    """Printed, not asserted: frames per second of one core at 128x160."""
    scene, cameras, times = make_clip(0, 0, (128, 160), 4)
    start = clock.process_time()
    for camera, moment in zip(cameras, times):
        render(scene, camera, moment)
    with capsys.disabled():
        print(f"\nray-caster: {4 / (clock.process_time() - start):.1f} frames/s per core at 128x160")
