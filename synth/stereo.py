"""Stereo: rectified pairs with disparity of both views.

OUT/train, OUT/val (scenes of another random stream), each with
  left/rgb/0000.jpg  right/rgb/0000.jpg
  left/disparity/0000.png  right/disparity/0000.png   three 8-bit digits in base 255:
                                                      disparity = (R*65025 + G*255 + B) / 1000 pixels; 0 = none (sky)
  left/occlusion/0000.png  right/occlusion/0000.png   255 where the other view does not see the place, else 0
  calib.json                                          per pair fx (pixels), baseline (metres): depth = fx * baseline / disparity
The point at (x, y) on the left is at (x - d_left, y) on the right; the point at (x, y) on the right is at (x + d_right, y) on
the left.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from synth import output
from synth.scene import posed_parts, render, visible
from synth.world import make_view

SIZE = (128, 160)


def encode_disparity(disparity: np.ndarray) -> np.ndarray:
    """Disparity (H, W) in pixels -> RGB uint8 (H, W, 3): thousandths rounded half up, three digits in base 255; 0 where not
    finite or not positive.
    """
    known = np.isfinite(disparity) & (disparity > 0)
    q = np.floor(1000 * np.where(known, disparity, 0.0).astype(np.float64) + 0.5).astype(np.int64).clip(0, 255**3 - 1)
    return np.stack([q // 65025, q // 255 % 255, q % 255], -1).astype(np.uint8)


def pair(seed: int, index: int, size: tuple[int, int], near=(0.06, 0.2), stream: int = 10) -> dict:
    """A pair with exact truth: the baseline is drawn so that the nearest percent of the left image has a disparity of
    near[0]..near[1] image widths.

    Returns left and right (frames of scene.render), disparity_left / disparity_right (H, W) float32 pixels (0: sky), seen_left /
    seen_right (H, W) bool: the other camera sees this place; fx pixels, baseline metres, and the scene and both cameras.
    """
    scene, camera, rng = make_view(seed, index, size, stream=stream)
    left = render(scene, camera)
    depth = left["depth"][np.isfinite(left["depth"])]
    close = float(np.percentile(depth, 1)) if depth.size else 1.0
    baseline = rng.uniform(*near) * size[1] * close / camera.fx
    pose = camera.cam_to_world.copy()
    pose[:3, 3] += baseline * pose[:3, 0]
    other = replace(camera, cam_to_world=pose)
    right = render(scene, other)
    parts = posed_parts(scene, 0.0)

    def seen(frame, viewer):
        hit = frame["ids"] > 0
        out = np.zeros(hit.shape, bool)
        out[hit] = visible(parts, viewer, frame["points"][hit], frame["normals"][hit].astype(np.float64))
        return out

    disparity = lambda frame: (camera.fx * baseline / frame["depth"]).astype(np.float32)      # 0 at infinity
    return {"left": left, "right": right, "disparity_left": disparity(left), "disparity_right": disparity(right),
            "seen_left": seen(left, other), "seen_right": seen(right, camera), "fx": camera.fx, "baseline": float(baseline),
            "scene": scene, "cameras": (camera, other)}


def _pair(out: Path, seed, size, near, stream, index: int) -> dict:
    name = f"{index:04d}"
    note = out / ".calib" / f"{name}.json"                        # written last: the pair is whole
    if not note.exists():
        p = pair(seed, index, size, near, stream)
        for side in ("left", "right"):
            output.write_image(out / side / "rgb" / f"{name}.jpg", p[side]["rgb"])
            hidden = ~p[f"seen_{side}"] & (p[side]["ids"] > 0)
            output.write_image(out / side / "occlusion" / f"{name}.png", 255 * hidden.astype(np.uint8))
            output.write_image(out / side / "disparity" / f"{name}.png", encode_disparity(p[f"disparity_{side}"]))
        output.write_file(note, json.dumps({"fx": p["fx"], "baseline": p["baseline"]}).encode())
    return json.loads(note.read_text())


def arguments(parser) -> None:
    parser.add_argument("--scenes", type=int, default=40, help="training pairs, each of another scene")
    parser.add_argument("--val_scenes", type=int, default=8, help="validation pairs")
    parser.add_argument("--near", type=float, nargs=2, default=(0.06, 0.2), metavar=("LOW", "HIGH"),
                        help="disparity of the nearest surfaces as a share of the image's width, drawn per pair")


def write(out: Path, args) -> None:
    """Write the whole data set (module docstring). Finished pairs are kept when called again."""
    output.stamp(out, {"kind": "stereo", "seed": args.seed, "size": args.size, "near": list(args.near)})
    for stream, split, count in ((10, "train", args.scenes), (11, "val", args.val_scenes)):
        if count:
            settings = (out / split, args.seed, args.size, tuple(args.near), stream)
            notes = dict(enumerate(output.over(_pair, range(count), args.workers, split, *settings)))
            calibration = json.dumps({f"{i:04d}": note for i, note in notes.items()}, indent=1)
            output.write_file(out / split / "calib.json", calibration.encode())
