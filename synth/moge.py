"""Monocular geometry: single images with metric depth, intrinsics, normals and segmentation.

OUT/.index.txt and .train.txt        training instances, one folder name per line;  OUT/.val.txt  those of another random stream
OUT/train/0000/image.jpg             RGB
OUT/train/0000/depth.png             16-bit logarithmic z-depth, text chunks `near` and `far`: 0 unknown, 65535 infinite (sky),
                                     1..65534: near^(1-t) * far^t metres with t = (code - 1) / 65533
OUT/train/0000/meta.json             intrinsics normalised by the image's width and height (image = [0, 1] x [0, 1])
OUT/train/0000/normal.png            16-bit RGB: n * (0.5, -0.5, -0.5) + 0.5 of the normal in OpenCV camera axes; 0, 0, 0 for sky
OUT/train/0000/segmentation.png      16-bit body numbers (0 = sky) with the text chunk `labels`: {"name": number}
"""

import json
from pathlib import Path

import numpy as np

from common.io import write_png16
from synth import output
from synth.scene import render
from synth.world import make_view

SIZE = (128, 160)


def encode_depth(depth: np.ndarray) -> tuple[np.ndarray, dict]:
    """Depth (H, W) float32 metres, nan unknown, inf sky -> codes uint16 and the chunks near and far. The range is at most 1e5."""
    finite = depth[np.isfinite(depth)]
    near = np.float32(max(finite.min(initial=np.inf), 1e-5)) if finite.size else np.float32(1)
    far = np.float32(max(1.1 * near, min(finite.max(), near * 1e5))) if finite.size else np.float32(1.1)
    with np.errstate(invalid="ignore"):
        share = np.log(np.clip(depth, near, far) / near) / np.log(far / near)
        codes = np.where(np.isfinite(depth), 1 + np.rint(65533 * np.clip(share, 0, 1)), np.where(np.isnan(depth), 0, 65535))
    return codes.astype(np.uint16), {"near": str(near), "far": str(far)}


def encode_normals(normals: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Unit normals (H, W, 3) in OpenCV camera axes -> uint16 RGB; 0 where not `known` (H, W) bool."""
    code = np.clip(normals * np.array([0.5, -0.5, -0.5]) + 0.5, 0, 1) * 65535
    return np.where(known[..., None], code, 0).astype(np.uint16)


def view(seed: int, index: int, size: tuple[int, int], unknown: float = 0.0, stream: int = 20) -> dict:
    """A frame (scene.render) with `intrinsics` (3, 3) normalised, `depth_known` (its depth with nan in a share `unknown` of small
    discs) and the scene.
    """
    scene, camera, rng = make_view(seed, index, size, fov=(40, 95), stream=stream, open_air=0.5)
    frame = render(scene, camera)
    depth, (h, w) = frame["depth"].copy(), size
    rows, columns = np.mgrid[:h, :w]
    radius = 0.02 * max(size)
    for _ in range(round(unknown * h * w / (np.pi * radius**2))):
        y, x = rng.uniform(0, h), rng.uniform(0, w)
        depth[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = np.nan
    return {**frame, "depth_known": depth, "intrinsics": np.diag([1 / w, 1 / h, 1]) @ camera.K, "scene": scene, "camera": camera}


def write_instance(folder: Path, v: dict) -> None:
    """One instance folder from a view."""
    output.write_image(folder / "image.jpg", v["rgb"])
    write_png16(folder / "depth.png", *encode_depth(v["depth_known"]))
    output.write_image(folder / "normal.png", encode_normals(v["normals_cam"], v["ids"] > 0))
    labels = {"sky": 0, **{f"body_{i}": int(i) for i in np.unique(v["ids"]) if i}}
    write_png16(folder / "segmentation.png", v["ids"].astype(np.uint16), {"labels": json.dumps(labels, separators=(",", ":"))})
    meta = {"intrinsics": v["intrinsics"].tolist(), "cam_to_world": v["cam_to_world"].tolist()}
    output.write_file(folder / "meta.json", json.dumps(meta).encode())


def _instance(out: Path, seed, size, unknown, split, stream, index: int) -> str:
    name = f"{split}/{index:04d}"
    output.write_folder(out, name, lambda folder: write_instance(folder, view(seed, index, size, unknown, stream)))
    return name


def arguments(parser) -> None:
    parser.add_argument("--scenes", type=int, default=72, help="training images, each of another scene")
    parser.add_argument("--val_scenes", type=int, default=12, help="validation images")
    parser.add_argument("--unknown", type=float, default=0.01, help="share of pixels whose depth is marked unknown")


def write(out: Path, args) -> None:
    """Write the whole data set (module docstring). Finished instances are kept when called again."""
    output.stamp(out, {"kind": "moge", "seed": args.seed, "size": args.size, "unknown": args.unknown})
    splits = ((20, "train", args.scenes, (".index.txt", ".train.txt")), (21, "val", args.val_scenes, (".val.txt",)))
    for stream, split, count, lists in splits:
        names = output.over(_instance, range(count), args.workers, split, out, args.seed, args.size, args.unknown, split, stream)
        for file in lists:
            output.write_file(out / file, "".join(f"{n}\n" for n in names).encode())
