"""Objects from six views with alpha and normals, generated or from textured meshes.

OUT/objects.json                               list of object names (uids)
OUT/<uid[:3]>/<uid>/rgb_000_<view>.png         RGBA; view: front (the condition view), front_right, right, back, left, front_left
OUT/<uid[:3]>/<uid>/mask_000_<view>.png        8-bit alpha
OUT/<uid[:3]>/<uid>/normals_000_<view>.png     RGBA: (n + 1) / 2 * 255, truncated, n in the view's own camera axes
                                               (x right, y up, z to the viewer)
OUT/<uid[:3]>/<uid>/depth_000_<view>.png       16 bit: z-depth / 10 * 65535; 65535 where there is no object
OUT/<uid[:3]>/<uid>/000_<view>_RT.txt          3x4 world to camera [R|t], camera axes as above
Orthographic cameras on a ring, 1.35 units wide; the object's bounding box has diagonal 1. The whole ring is turned at random
about the object (azimuth within 60 degrees, elevation -15 to 30 degrees); `front` is at azimuth 0 of the ring, `right` at 90.
"""

import json
from pathlib import Path

import numpy as np

from synth import output, raster, shapes
from synth.scene import Camera, Posed, Scene, cast, render, turn
from synth.world import Builder, random_parts, rng_of

SIZE = (128, 128)
VIEWS = {"front": 0, "front_right": 45, "right": 90, "back": 180, "left": 270, "front_left": 315}  # azimuth on the ring, degrees
ORTHO_SCALE, DISTANCE = 1.35, 1.3


def ring(azimuth: float, elevation: float) -> np.ndarray:
    """Axes of the front camera (3, 3), columns x right, y up, z to the viewer, in the z-up world; angles in radians."""
    z = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    x = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    return np.stack([x, np.cross(z, x), z], 1)


def ring_camera(front: np.ndarray, degrees: float, pixels: int) -> Camera:
    """Orthographic camera of a view: the front camera's axes turned about its own y by `degrees`; `pixels` a side."""
    axes = front @ turn([0, np.deg2rad(degrees), 0])
    pose = np.eye(4)
    pose[:3, :3] = axes * [1, -1, -1]                             # to OpenCV axes
    pose[:3, 3] = DISTANCE * axes[:, 2]
    focal = pixels / ORTHO_SCALE
    return Camera(pixels, pixels, focal, focal, pixels / 2, pixels / 2, pose, orthographic=True)


def bounds(parts: list[Posed], reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounding box (low, high) of parts inside |x| <= reach, to about reach / 50: parallel rays from the six sides."""
    grid = np.stack(np.meshgrid(*[np.linspace(-reach, reach, 100)] * 2), -1).reshape(-1, 2)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for axis in range(3):
        for sign in (-1, 1):
            origin, direction = np.zeros((len(grid), 3)), np.zeros((len(grid), 3))
            origin[:, [k for k in range(3) if k != axis]] = grid
            origin[:, axis], direction[:, axis] = -2 * sign * reach, sign
            t, which, _ = cast(parts, origin, direction)
            x = (origin + direction * np.where(which >= 0, t, 0)[:, None])[which >= 0]
            low, high = np.minimum(low, x.min(0, initial=np.inf)), np.maximum(high, x.max(0, initial=-np.inf))
    return low, high


def generated_object(seed: int, index: int) -> Scene:
    """A scene that holds one random object alone, centred, bounding-box diagonal 1."""
    rng = rng_of(seed, index, 40)
    builder = Builder(rng)
    parts = builder.paint(random_parts(rng, 1.0)[0], 0.35)
    posed = [Posed(p, p.rotation, p.offset, 0, (np.zeros(3), 2.0)) for p in parts]
    low, high = bounds(posed, 1.2)
    scale = 1 / np.linalg.norm(high - low)
    for p in parts:
        shapes.rescale(p, scale)
        p.offset = p.offset - scale * (low + high) / 2
    builder.body(parts)
    return builder.scene()


def views(seed: int, index: int, size: int, mesh: raster.Mesh | None = None, random_pose: bool = True) -> dict:
    """All six views: {view: dict of rgba (R, R, 4) uint8, alpha (R, R) in [0, 1], normals (R, R, 3) float32 in the view's
    axes (x right, y up, z to the viewer), depth (R, R) float32 with inf, RT (3, 4) world to camera}; rendered at twice the size
    and averaged over what is covered."""
    rng = rng_of(seed, index, 41)
    front = ring(rng.uniform(-1, 1) * np.pi / 3, np.deg2rad(rng.uniform(-15, 30))) if random_pose else ring(0.0, 0.0)
    sun = front @ np.array([-0.35, 0.6, 0.72])                    # over the front camera's shoulder
    scene = generated_object(seed, index) if mesh is None else None
    if scene:
        scene.sun, scene.ambient, scene.diffuse = sun, 0.75, 0.5
    out = {}
    for view, degrees in VIEWS.items():
        camera = ring_camera(front, degrees, 2 * size)
        if scene:
            frame = render(scene, camera, shadows=False, antialias=False)
        else:
            frame = raster.render_mesh(mesh, camera, sun, 0.75, 0.5)
        axes = camera.cam_to_world[:3, :3] * [1, -1, -1]
        out[view] = {**average(frame, size), "RT": np.concatenate([axes.T, -axes.T @ camera.cam_to_world[:3, 3:]], 1)}
    return out


def average(frame: dict, size: int) -> dict:
    """A frame of twice the size -> rgba, alpha, normals and depth of (size, size), each averaged over the covered quarters of a
    pixel.
    """
    covered = frame["ids"] > 0
    quarters = lambda x: np.where(covered[..., None], x, 0).astype(np.float64).reshape(size, 2, size, 2, -1).sum((1, 3))
    count = quarters(np.ones((*covered.shape, 1)))
    mean = lambda x: quarters(x) / count.clip(1)
    alpha = count[..., 0] / 4
    normal = mean(frame["normals_cam"] * [1, -1, -1])
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True).clip(1e-9)
    depth = np.where(alpha > 0, mean(frame["depth"][..., None])[..., 0], np.inf)
    rgba = np.concatenate([mean(frame["rgb"]), 255 * alpha[..., None]], -1)
    return {"rgba": (rgba + 0.5).astype(np.uint8), "alpha": alpha, "normals": normal.astype(np.float32),
            "depth": depth.astype(np.float32)}


def write_object(folder: Path, seen: dict) -> None:
    """The files of one object from its views."""
    for view, v in seen.items():
        mask = v["rgba"][..., 3]
        normals = np.where(mask[..., None] > 0, (v["normals"] + 1) / 2 * 255, 0).astype(np.uint8)
        depth = np.where(np.isfinite(v["depth"]), v["depth"] / 10 * 65535, 65535).clip(0, 65535).astype(np.uint16)
        output.write_image(folder / f"rgb_000_{view}.png", v["rgba"])
        output.write_image(folder / f"mask_000_{view}.png", mask)
        output.write_image(folder / f"normals_000_{view}.png", np.concatenate([normals, mask[..., None]], -1))
        output.write_image(folder / f"depth_000_{view}.png", depth)
        np.savetxt(folder / f"000_{view}_RT.txt", v["RT"], fmt="%.9g")


def _object(out: Path, seed, size, random_pose, item) -> str:
    uid, file, index = item
    mesh = raster.fit(raster.read_obj(file)) if file else None
    output.write_folder(out, f"{uid[:3]}/{uid}", lambda folder: write_object(folder, views(seed, index, size, mesh, random_pose)))
    return uid


def arguments(parser) -> None:
    parser.add_argument("--scenes", type=int, default=12,
                        help="objects; with --mesh, random positions of the camera ring for each mesh")
    parser.add_argument("--mesh", type=Path, nargs="+", default=[], metavar="FILE.obj",
                        help="render these textured meshes instead of generated objects")
    parser.add_argument("--fixed_pose", action="store_true", help="do not turn the ring at random")


def write(out: Path, args) -> None:
    """Write the whole data set (module docstring). Finished objects are kept when called again."""
    if args.size[0] != args.size[1]:
        raise SystemExit("mvdiff: the views are square, e.g. --size 128x128")
    for file in args.mesh:
        if not file.is_file():
            raise SystemExit(f"mvdiff: no such mesh: {file}")
    output.stamp(out, {"kind": "mvdiff", "seed": args.seed, "size": args.size, "mesh": [f.name for f in args.mesh],
                       "fixed_pose": args.fixed_pose})
    items = [(f"{f.stem}_{i:03d}", f, i) for f in args.mesh for i in range(args.scenes)]
    items = items or [(f"{i:05d}", None, i) for i in range(args.scenes)]
    names = output.over(_object, items, args.workers, "objects", out, args.seed, args.size[0], not args.fixed_pose)
    output.write_file(out / "objects.json", json.dumps(names, indent=0).encode())
