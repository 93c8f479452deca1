"""Geometry of images with a trained MoGe: depth, points, normals, mask, field of view, point cloud and pictures.

python moge/infer.py --checkpoint model.pt -i photo.jpg -o out
python moge/infer.py --checkpoint model.pt -i photos/ -o out --fov_x 60
python moge/infer.py --checkpoint model.pt -i panorama.jpg -o out --panorama

Each image becomes a folder OUT/NAME: image.jpg, depth.png and meta.json (an instance of the data format, moge/io.py), depth.npy and
points.npy (float32, infinite where masked), mask.png, normal.npy, fov.json, depth_vis.png, normal_vis.png, pointcloud.ply.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of moge/

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common import dist
from common.io import read_image, write_image, write_ply
from moge.draw import depth_picture, map_normals, mask_picture, normal_picture
from moge.eval import device_of, load_model, parse
from moge.geometry import depth_edge
from moge.io import write_depth, write_instance
from moge.panorama import infer_panorama

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
OPENGL = np.array([1, -1, -1], np.float32)  # x right, y up, z backward


def find_images(path: Path) -> list[Path]:
    """The image itself, or those of a folder in the order of their names. SystemExit where there is none."""
    if path.is_file():
        return [path]
    found = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGES) if path.is_dir() else []
    if not found:
        raise SystemExit(f"{path}: no such image, nor a folder with {', '.join(IMAGES)} files")
    return found


def out_folders(images: list[Path], out: Path) -> list[Path]:
    """A folder for each image, by its name; with its suffix where two share the name."""
    stems = [image.stem for image in images]
    return [out / (image.stem if stems.count(image.stem) == 1 else image.name.replace(".", "_")) for image in images]


def shrink(image: np.ndarray, longest: int | None) -> np.ndarray:
    """(H, W, 3), made smaller where its longer side exceeds `longest`."""
    height, width = image.shape[:2]
    factor = min(1.0, (longest or np.inf) / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def infer_image(model, image: np.ndarray, **options) -> dict[str, np.ndarray]:
    """points (H, W, 3), depth (H, W), both infinite where masked, mask, normal (H, W, 3; 0 where masked), intrinsics (3, 3)."""
    device = next(model.parameters()).device
    out = model.infer(torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255, **options)
    out = {key: value.cpu().numpy() for key, value in out.items()}
    out.setdefault("mask", np.isfinite(out["depth"]))
    if "normal" not in out:
        out["normal"] = map_normals(out["points"], out["mask"])
    return out


def write_image_result(folder: Path, image: np.ndarray, out: dict[str, np.ndarray], threshold: float, maps: bool, ply: bool) -> str:
    """Write the files of an image; returns a line about it."""
    depth, mask, K = out["depth"], out["mask"], out["intrinsics"]
    write_instance(folder, image, np.where(mask, depth, np.nan), K)
    fov = {f"fov_{axis}": round(float(2 * np.degrees(np.arctan(0.5 / f))), 2) for axis, f in zip("xy", (K[0, 0], K[1, 1]))}
    (folder / "fov.json").write_text(json.dumps(fov))
    write_image(folder / "depth_vis.png", depth_picture(np.where(mask, depth, np.nan)))
    write_image(folder / "normal_vis.png", normal_picture(out["normal"]))
    write_image(folder / "mask.png", mask_picture(mask))
    if maps:
        for name in ("depth", "points", "normal"):
            np.save(folder / f"{name}.npy", out[name].astype(np.float32))
    text = f"field of view {fov['fov_x']} x {fov['fov_y']} degrees, {mask.mean():.0%} valid"
    if mask.any():
        text += f", depth {depth[mask].min():.3g}..{depth[mask].max():.3g}"
    if ply:
        edge = depth_edge(torch.from_numpy(np.where(mask, depth, 1)), torch.from_numpy(mask), rtol=threshold).numpy()
        keep = mask & ~edge  # pixels astride an edge would hang between its sides
        write_ply(folder / "pointcloud.ply", out["points"][keep] * OPENGL, image[keep], out["normal"][keep] * OPENGL)
        text += f", {keep.sum()} points"
    return text


def write_panorama(folder: Path, image: np.ndarray, out: dict[str, np.ndarray], maps: bool, ply: bool) -> str:
    """Write the files of a panorama (no camera, distances along the rays); returns a line about it."""
    distance, mask = out["distance"], out["mask"]
    write_image(folder / "image.jpg", image)
    write_depth(folder / "distance.png", np.where(mask, distance, np.nan).astype(np.float32))
    write_image(folder / "distance_vis.png", depth_picture(np.where(mask, distance, np.nan)))
    write_image(folder / "mask.png", mask_picture(mask))
    if maps:
        for name in ("distance", "points"):
            np.save(folder / f"{name}.npy", out[name].astype(np.float32))
    if ply:
        write_ply(folder / "pointcloud.ply", out["points"][mask].astype(np.float32), image[mask])
    return f"panorama, {mask.mean():.0%} valid" + (f", {mask.sum()} points" if ply else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", "--pretrained", required=True, help="weights, ours or published")
    parser.add_argument("-i", "--input", required=True, type=Path, help="image, or folder of images")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--panorama", action="store_true", help="the images are equirectangular, 2 : 1")
    parser.add_argument("--fov_x", type=float, help="horizontal field of view in degrees, where known; otherwise it is estimated")
    parser.add_argument("--resize", type=int, help="make images smaller whose longer side exceeds this")
    parser.add_argument("--threshold", type=float, default=0.04, help="relative depth step of an edge: its pixels leave the point cloud")
    parser.add_argument("--no_maps", action="store_true", help="leave out the .npy files")
    parser.add_argument("--no_ply", action="store_true", help="leave out the point cloud")
    parser.add_argument("--fp32", action="store_true", help="single-precision network on a GPU; default: half")
    for flag in ("--fp16", "--maps", "--ply", "--glb", "--show"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)  # of old command lines: written anyway, or not offered
    args = parse(parser)
    if args.fov_x is not None and not 0 < args.fov_x < 180:
        parser.error("--fov_x lies between 0 and 180 degrees")
    if args.resize is not None and args.resize < 14:
        parser.error("--resize must be at least 14 pixels")

    model = load_model(args.checkpoint, device_of(args.device), args.version)
    images, bad = find_images(args.input), 0
    mine = [*zip(images, out_folders(images, args.output))][dist.rank() :: dist.world_size()]
    options = {"resolution_level": args.resolution_level, "num_tokens": args.num_tokens, "use_fp16": not args.fp32}
    for path, folder in tqdm(mine, unit="image", disable=len(images) == 1):
        try:
            image = read_image(path)
            if args.panorama and abs(image.shape[1] / image.shape[0] - 2) > 0.02:
                raise ValueError(f"{path}: {image.shape[1]} x {image.shape[0]} pixels are no panorama, which is 2 : 1")
        except (OSError, ValueError) as error:
            tqdm.write(str(error), file=sys.stderr)
            bad += 1
            continue
        image = shrink(image, args.resize)
        if args.panorama:
            text = write_panorama(folder, image, infer_panorama(model, image, **options), not args.no_maps, not args.no_ply)
        else:
            out = infer_image(model, image, fov_x=args.fov_x, **options)
            text = write_image_result(folder, image, out, args.threshold, not args.no_maps, not args.no_ply)
        tqdm.write(f"{folder}: {text}")
    dist.shutdown()
    sys.exit(int(bad > 0))


if __name__ == "__main__":
    main()
