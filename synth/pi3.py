"""Camera sequences of static scenes in TartanAir's layout, 640x480, fx = fy = 320.

OUT/scene000/scene000/Easy/P000/image_left/000000_left.png
OUT/scene000/scene000/Easy/P000/depth_left/000000_left_depth.npy     float32 z-depth in metres; the sky is 10000
OUT/scene000/scene000/Easy/P000/pose_left.txt                        per frame: tx ty tz qx qy qz qw, camera to world, NED
OUT/val/scene000/...                                                 the same, scenes of another random stream
NED: x forward (north), y right (east), z down, for the camera and for the world. TartanAir's pixel centres lie at whole numbers,
its centre is (320, 240).
"""

from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from synth import output
from synth.scene import Camera, render
from synth.world import make_scene, random_path, rng_of

SIZE = (480, 640)
SKY = 10000.0
NED_FROM_WORLD = np.diag([1.0, -1.0, -1.0])                       # our world has z up
NED_FROM_CAMERA = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])   # forward, right, down from OpenCV's right, down, forward


def sequence(seed: int, index: int, frames: int, stream: int = 30) -> tuple:
    """A static scene and the cameras of a walk around it: scene, cameras (frames)."""
    rng = rng_of(seed, index, stream)
    path = random_path(rng, sweep=1.2)
    scene = make_scene(rng, path, count=(10, 18), moving=0.0)
    # TartanAir's centre (320, 240) where pixel centres are whole numbers is (320.5, 240.5) here.
    camera = lambda pose: Camera(SIZE[1], SIZE[0], 320.0, 320.0, 320.5, 240.5, pose)
    return scene, [camera(path.pose(i / max(frames - 1, 1))) for i in range(frames)]


def ned_pose(cam_to_world: np.ndarray) -> np.ndarray:
    """(7,) tx ty tz qx qy qz qw in NED axes from an OpenCV camera-to-world matrix (4, 4) in our z-up world."""
    rotation = NED_FROM_WORLD @ cam_to_world[:3, :3] @ NED_FROM_CAMERA.T
    return np.concatenate([NED_FROM_WORLD @ cam_to_world[:3, 3], Rotation.from_matrix(rotation).as_quat()])


def _fill(folder: Path, seed, frames, stream, index: int) -> None:
    scene, cameras = sequence(seed, index, frames, stream)
    (folder / "depth_left").mkdir()
    for i, camera in enumerate(cameras):
        frame = render(scene, camera)
        output.write_image(folder / "image_left" / f"{i:06d}_left.png", frame["rgb"])
        depth = np.where(np.isfinite(frame["depth"]), frame["depth"], np.float32(SKY))
        np.save(folder / "depth_left" / f"{i:06d}_left_depth.npy", depth)
    np.savetxt(folder / "pose_left.txt", np.stack([ned_pose(c.cam_to_world) for c in cameras]), fmt="%.10g")


def _sequence(out: Path, seed, frames, split, stream, index: int) -> bool:
    name = f"{split}scene{index:03d}/scene{index:03d}/Easy/P000"
    return output.write_folder(out, name, lambda folder: _fill(folder, seed, frames, stream, index))


def arguments(parser) -> None:
    parser.add_argument("--scenes", type=int, default=3, help="training sequences")
    parser.add_argument("--val_scenes", type=int, default=1, help="validation sequences")
    parser.add_argument("--frames", type=int, default=6, help="frames of a sequence")


def write(out: Path, args) -> None:
    """Write the whole data set (module docstring). Finished sequences are kept when called again."""
    if tuple(args.size) != SIZE:
        raise SystemExit("pi3: TartanAir's intrinsics are fixed, so its images are always 480x640; leave --size out.")
    output.stamp(out, {"kind": "pi3", "seed": args.seed, "frames": args.frames})
    output.over(_sequence, range(args.scenes), args.workers, "sequences", out, args.seed, args.frames, "", 30)
    output.over(_sequence, range(args.val_scenes), args.workers, "validation", out, args.seed, args.frames, "val/", 31)
