"""Look at instances of a data set: pictures of depth, mask and normals, a contact sheet, and a PLY point cloud.

    python moge/vis_data.py INSTANCE --ply [-o OUT]      INSTANCE: an instance, or a folder of any depth with instances in it

Written next to the data, or into OUT/INSTANCE: depth_vis.png (disparity: near is red, far is blue, unknown black, infinitely
far white), mask.png (white where depth is known and finite, grey where infinite), normal_vis.png (of the depth map), sheet.png
(all of them beside the image) and, with --ply, pointcloud.ply (axes as in OpenGL: x right, y up, z backward).
"""

import argparse
import math
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import torch

from common.io import at_height, contact_sheet, write_image, write_ply
from moge.augment import depth_normals
from moge.draw import depth_picture, normal_picture
from moge.geometry import depth_to_points
from moge.io import read_instance

COLUMNS = 4


def pictures(instance: dict) -> dict[str, np.ndarray]:
    """Pictures (H, W, 3) uint8 of an instance's depth map by file name."""
    depth = instance["depth"]
    disparity, infinite = depth_picture(depth), np.isinf(depth)
    disparity[infinite] = 255
    mask = np.where(np.isfinite(depth), 255, np.where(infinite, 128, 0)).astype(np.uint8)
    normal = normal_picture(depth_normals(depth, instance["intrinsics"]))
    return {"depth_vis.png": disparity, "mask.png": np.repeat(mask[..., None], 3, -1), "normal_vis.png": normal}


def instance_row(instance: dict, name: str, made: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
    """The image, labelled, and the `pictures` of an instance, within 320 x 240: a row of a contact sheet of COLUMNS."""
    row = [instance["image"], *(made or pictures(instance)).values()]
    row = [at_height(picture, min(240, round(320 * picture.shape[0] / picture.shape[1]))) for picture in row]
    for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(row[0], name[-40:], (5, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, width, cv2.LINE_AA)
    return row


def point_cloud(instance: dict, max_depth: float = math.inf, infinite: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) float32 in OpenGL camera axes, in units of the depth, and colours (N, 3) uint8 of an instance's pixels.

    max_depth: leaves out what is further than this times the least depth. infinite: puts the infinitely far pixels at twice the
    greatest depth.
    """
    depth, image = instance["depth"], instance["image"]
    finite = np.isfinite(depth) & (depth > 0)
    near, far = (depth[finite].min(), depth[finite].max()) if finite.any() else (1, 1)
    keep = finite & (depth <= near * max_depth)
    if infinite:
        keep, depth = keep | np.isinf(depth), np.where(np.isinf(depth), np.float32(2 * far), depth)
    points = depth_to_points(torch.from_numpy(depth), torch.from_numpy(instance["intrinsics"])).numpy()
    if image.shape[:2] != depth.shape:
        image = cv2.resize(image, depth.shape[::-1], interpolation=cv2.INTER_AREA)
    return points[keep] * np.array([1, -1, -1], np.float32), image[keep]


def main(argv: list[str] | None = None) -> int:
    """Draw every instance below the given folders; the exit code is 1 when one cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="INSTANCE", help="folders; every one below them with a meta.json")
    parser.add_argument("-o", "--output", type=Path, help="folder for the pictures; without it they go next to the data")
    parser.add_argument("--ply", action="store_true", help="write the point cloud")
    parser.add_argument("--max_depth", type=float, default=math.inf, help="points: leave out depth above this times the least")
    parser.add_argument("--depth", default="depth.png", help="name of the depth map")
    parser.add_argument("--inf", action="store_true", help="points: put infinitely far pixels at twice the greatest depth")
    for flag in ("--depth_vis", "--fov", "--version", "--show"):
        parser.add_argument(flag, action="store_true", help="accepted: the depth picture is always written, no viewer is opened")
    args = parser.parse_args(argv)

    found, bad = [(path, meta.parent) for path in args.paths for meta in sorted(path.rglob("meta.json"))], 0
    if not found:
        print(f"{', '.join(map(str, args.paths))}: no instance (a folder with a meta.json) in it", file=sys.stderr)
        return 1
    base = Path(os.path.commonpath([path.resolve() for path in args.paths]))  # names below it tell A/0000 from B/0000
    for path, folder in found:
        try:
            instance = read_instance(folder, args.depth)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            bad += 1
            continue
        inside = (path.resolve() / folder.relative_to(path)).relative_to(base)
        name = str(inside) if inside.parts else base.name
        out, made, K = (args.output / name if args.output else folder), pictures(instance), instance["intrinsics"]
        for file, picture in made.items():
            write_image(out / file, picture)
        write_image(out / "sheet.png", contact_sheet(instance_row(instance, name, made), COLUMNS))
        fov = [math.degrees(2 * math.atan(0.5 / f)) for f in (K[0, 0], K[1, 1])]
        known = instance["depth"][np.isfinite(instance["depth"])]
        text = f"depth {known.min():.4g}..{known.max():.4g}" if known.size else "no finite depth"
        text += f", {100 * known.size / instance['depth'].size:.0f} % of the pixels, field of view {fov[0]:.1f} x {fov[1]:.1f} degrees"
        if args.ply:
            points, colors = point_cloud(instance, args.max_depth, args.inf)
            write_ply(out / "pointcloud.ply", points, colors)
            text += f", {len(points)} points"
        print(f"{out}: {text}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
