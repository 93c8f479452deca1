"""Disparity of a rectified pair, or of two folders of images, with a trained FoundationStereo: maps, pictures and point clouds.

  python stereo/infer.py --checkpoint model_best_bp2.pth --left left.png --right right.png --out out/ --intrinsics K.txt
  python stereo/infer.py --checkpoint model_best_bp2.pth --left left/rgb --right right/rgb --out out/ --format npz

For each pair NAME: NAME.pfm (or NAME.png, 16 bits, disparity * 256; NAME.npz), NAME_disparity.jpg; with a calibration also
NAME_depth.npy (metres, 0: none) and NAME.ply. Calibration: a text file with the nine numbers of K on the first line and the
baseline in metres on the second, a calib.txt of Middlebury, or a JSON with fx, cx, cy, baseline and perhaps doffs.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of stereo/

import cv2
import numpy as np
from scipy.spatial import cKDTree
from tqdm import tqdm

from common import config, dist
from common.io import contact_sheet, write_image, write_ply, write_png16
from stereo.codec import encode_kitti, encode_pfm
from stereo.draw import disparity_picture
from stereo.eval import load_model, predictor
from stereo.formats import Pair, read_calibration, read_views, stems


def image_pairs(left: Path, right: Path) -> list[Pair]:
    """One pair, or the pairs of two folders by equal names. SystemExit names what is missing."""
    for path in (left, right):
        if not path.exists():
            raise SystemExit(f"{path}: no such image or folder")
    if left.is_file() and right.is_file():
        return [Pair(left.stem, left, right)]
    if left.is_file() or right.is_file():
        raise SystemExit(f"{left} and {right}: give two images or two folders")
    lefts, rights = stems(left), stems(right)
    if not (names := sorted(lefts.keys() & rights.keys())):
        raise SystemExit(f"{left} and {right}: no image has the same name in both")
    return [Pair(name, lefts[name], rights[name]) for name in names]


def look_swapped(left: np.ndarray, right: np.ndarray) -> bool:
    """True where blocks of the left image are found better to the right of their place on the right image than to the left of it:
    the views are exchanged, or the pair is not rectified. left, right: (H, W, 3) uint8."""
    size = (160, max(16, round(160 * left.shape[0] / left.shape[1])))
    left, right = (cv2.resize(cv2.cvtColor(v, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for v in (left, right))
    wide = cv2.copyMakeBorder(right, 0, 0, 40, 40, cv2.BORDER_REPLICATE)  # disparities up to a quarter of the width
    cost = lambda d: cv2.blur(cv2.absdiff(left, wide[:, 40 - d : 200 - d]).astype(np.float32), (9, 9))
    right_way, wrong_way = (np.min([cost(sign * d) for d in range(1, 41)], 0)[:, 40:-40].mean() for sign in (1, -1))
    return bool(wrong_way < 0.8 * right_way)


def depth_map(disparity: np.ndarray, camera: dict[str, float]) -> np.ndarray:
    """Depth (H, W) float32 in metres of disparities in pixels; 0 where the disparity is not positive or unknown."""
    shifted = disparity + camera["doffs"]
    good = np.isfinite(shifted) & (shifted > 1e-3)
    return np.where(good, camera["fx"] * camera["baseline"] / np.where(good, shifted, 1), 0).astype(np.float32)


def point_cloud(
    depth: np.ndarray,
    image: np.ndarray,
    camera: dict[str, float],
    z_far: float = np.inf,
    neighbours: int = 0,
    radius: float = 0.03,
) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) float32 in metres (x right, y down, z forward), colours (N, 3) uint8; of a depth map (H, W), 0: none.

    z_far: farthest depth kept. neighbours: points with fewer others within `radius` metres are dropped; 0: none are.
    """
    v, u = np.nonzero((depth > 0) & (depth <= z_far))
    z = depth[v, u]
    H, W = depth.shape
    cx, cy, fy = camera.get("cx", (W - 1) / 2), camera.get("cy", (H - 1) / 2), camera.get("fy", camera["fx"])
    points = np.stack([(u - cx) * z / camera["fx"], (v - cy) * z / fy, z], 1).astype(np.float32)
    colours = image[v, u]
    if neighbours and len(points):
        count = cKDTree(points).query_ball_point(points, radius, return_length=True) - 1  # itself
        points, colours = points[count >= neighbours], colours[count >= neighbours]
    return points, colours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", "--ckpt_dir", required=True, help="weights: ours or published (cfg.yaml beside it)")
    parser.add_argument("--left", "--left_file", required=True, type=Path, help="left image, or a folder of images")
    parser.add_argument("--right", "--right_file", required=True, type=Path, help="right image, or a folder with the same names")
    parser.add_argument("--out", "--out_dir", required=True, type=Path, help="output folder")
    parser.add_argument("--format", default="pfm", choices=["pfm", "png", "npz"], help="of the disparity map")
    parser.add_argument("--iters", "--valid_iters", type=config.number(int, 1), default=32, help="recurrent iterations")
    parser.add_argument("--scale", type=config.number(float, 0.01), default=1.0, help="shrink the images first; maps are brought back")
    parser.add_argument("--hiera", type=int, default=0, help="1: coarse to fine, for images wider than about 1000 pixels")
    parser.add_argument("--max_disp", type=int, help="range of the cost volume, where it shall differ from the checkpoint's")
    parser.add_argument("--low_memory", type=int, default=0, help="1: volume in 16 bit, correlation recomputed")
    parser.add_argument("--x_offset", type=config.number(int, 0), default=0, help="pixels by which disparities may be negative")
    parser.add_argument("--amp", default="on", choices=["off", "on", "bf16", "fp16"], help="on a GPU only")
    parser.add_argument("--intrinsics", "--intrinsic_file", type=Path, help="calibration: write depth and point cloud")
    parser.add_argument("--get_pc", type=int, default=1, help="0: no point cloud")
    parser.add_argument("--z_far", type=float, default=10.0, help="farthest point of the cloud, metres")
    parser.add_argument("--remove_invisible", type=int, default=1, help="1: no depth where the match is outside the right image")
    parser.add_argument("--denoise_cloud", type=int, default=0, help="1: drop points with few neighbours")
    parser.add_argument("--denoise_nb_points", type=int, default=30, help="... fewer than this")
    parser.add_argument("--denoise_radius", type=float, default=0.03, help="... within so many metres")
    args = parser.parse_args()

    device = dist.init()
    pairs = image_pairs(args.left, args.right)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out}: not a folder that can be written ({error})") from None
    overrides = {"low_memory": bool(args.low_memory)} | ({"max_disp": args.max_disp} if args.max_disp else {})
    dtype = dist.autocast_dtype(args.amp, device) if device.type == "cuda" else None
    model = load_model(args.checkpoint, device, **overrides)
    run = predictor(model, device, args.iters, bool(args.hiera), args.scale, dtype, args.x_offset)
    for pair in tqdm(pairs[dist.rank() :: dist.world_size()], desc="infer", unit="pair", disable=len(pairs) < 2):
        try:
            left, right = read_views(pair)
            if args.x_offset >= left.shape[1]:
                raise ValueError(f"--x_offset {args.x_offset}: {pair.left} is {left.shape[1]} pixels wide")
            camera = read_calibration(args.intrinsics, pair.name) if args.intrinsics else None
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from None
        if not args.x_offset and look_swapped(left, right):
            print(f"WARNING: {pair.name}: matches lie to the right: are left and right exchanged?")
        disparity = run(left, right)
        visible = np.arange(left.shape[1]) - disparity >= 0
        base, written = args.out / pair.name, np.maximum(disparity, 0) if args.x_offset == 0 else disparity
        if args.format == "npz":
            np.savez_compressed(f"{base}.npz", disparity=written, visible=visible)
        elif args.format == "png":
            write_png16(f"{base}.png", encode_kitti(written))
        else:
            Path(f"{base}.pfm").write_bytes(encode_pfm(written))
        write_image(f"{base}_disparity.jpg", contact_sheet([left, disparity_picture(written)], columns=2))
        if camera:
            depth = depth_map(np.where(visible, disparity, np.nan) if args.remove_invisible else disparity, camera)
            np.save(f"{base}_depth.npy", depth)
            if args.get_pc:
                few = args.denoise_nb_points if args.denoise_cloud else 0
                write_ply(f"{base}.ply", *point_cloud(depth, left, camera, args.z_far, few, args.denoise_radius))
        known = f"{np.percentile(disparity, 1):.1f}..{np.percentile(disparity, 99):.1f} px"
        print(f"{pair.name}: disparity {known}, {base}.{args.format}" + (f", {base}.ply" if camera and args.get_pc else ""))
    dist.shutdown()


if __name__ == "__main__":
    main()
