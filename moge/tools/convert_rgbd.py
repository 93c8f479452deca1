"""Convert RGB-D folders (colour images, 16-bit depth, intrinsics in pixels) to the MoGe format of moge/io.py, with its index.

    python moge/tools/convert_rgbd.py SOURCE [SOURCE ...] -o OUT

A SOURCE is of one of these forms, or a folder of such folders:

    color/NAME.jpg|png, depth/NAME.png, intrinsics.txt (3 x 3)
    NAME.rgb.jpg|png, NAME.depth.png, camera.json {"fx", "fy", "cx", "cy", and "depth_scale", units of depth per metre}

Depth must be z depth aligned with the colour image; 0 and 65535 mean no reading. It is written in metres, so `depth_unit` is 1 in
a training config. Intrinsics hold for the colour image, with pixel centres at whole numbers unless --half_pixel says otherwise.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import cv2
import numpy as np
from tqdm import tqdm

from common.io import read_image, read_png16
from moge.io import write_instance

IMAGES = (".jpg", ".jpeg", ".png")


def find_frames(folder: Path) -> list[tuple[str, Path, Path]]:
    """(name, image, depth) of every frame of a folder of either form, sorted. ValueError for an image without its depth."""
    if (folder / "color").is_dir():
        images = {f.stem: f for f in sorted((folder / "color").iterdir()) if f.suffix.lower() in IMAGES}
        frames = [(name, image, folder / "depth" / f"{name}.png") for name, image in images.items()]
    else:
        images = {f.name.removesuffix(f".rgb{f.suffix}"): f for f in sorted(folder.glob("*.rgb.*")) if f.suffix.lower() in IMAGES}
        frames = [(name, image, folder / f"{name}.depth.png") for name, image in images.items()]
    for _, image, depth in frames:
        if not depth.is_file():
            raise ValueError(f"{depth}: not there, and {image} needs it; remove the image or add its depth")
    return frames


def find_folders(root: Path) -> list[Path]:
    """The root itself, or the folders below it that hold frames."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found = [folder for folder in (root, *sorted(f for f in root.iterdir() if f.is_dir())) if find_frames(folder)]
    if not found:
        forms = "neither color/NAME.jpg with depth/NAME.png, nor NAME.rgb.jpg with NAME.depth.png, nor folders of such"
        raise FileNotFoundError(f"{root}: {forms}")
    return found


def read_camera(folder: Path, file: Path | None = None) -> tuple[np.ndarray, float | None]:
    """Intrinsics (3, 3) in pixels and, where the file tells it, the units of depth per metre. ValueError names the file."""
    files = [file] if file else [folder / "camera.json", folder / "intrinsics.txt"]
    path = next((f for f in files if f.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{' or '.join(map(str, files))}: not there; --intrinsics names a file with the camera matrix")
    scale = None
    try:
        if path.suffix == ".json":
            camera = json.loads(path.read_text())
            K = np.array([[camera["fx"], 0, camera["cx"]], [0, camera["fy"], camera["cy"]], [0, 0, 1]], np.float64)
            scale = float(camera["depth_scale"]) if "depth_scale" in camera else None
        else:
            K = np.loadtxt(path)[:3, :3]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: no camera in pixels ({type(error).__name__}: {error}); fx, fy, cx, cy or a 3 x 3 matrix") from None
    if K.shape != (3, 3) or not np.isfinite(K).all() or min(K[0, 0], K[1, 1]) < 10:
        raise ValueError(f"{path}: {K.tolist()} is no camera matrix in pixels")
    if scale is not None and not 0 < scale < np.inf:
        raise ValueError(f"{path}: depth_scale {scale} must be positive: units of depth per metre")
    return K, scale


def normalise(K: np.ndarray, width: int, height: int, half_pixel: bool = False) -> np.ndarray:
    """Normalised intrinsics (3, 3), of pixel centres at half-integers, from those in pixels of an image.

    half_pixel: the first pixel's centre is at 0.5 in K already, not at 0.
    """
    K = np.array([[K[0, 0], 0, K[0, 2]], [0, K[1, 1], K[1, 2]], [0, 0, 1]], np.float64)
    K[:2, 2] += 0.0 if half_pixel else 0.5
    return K / np.array([[width], [height], [1]])


def convert_depth(path: Path, scale: float, max_depth: float, border: int) -> np.ndarray:
    """Depth (H, W) float32 in metres, NaN unknown: no reading, above max_depth, or within `border` pixels of the edge."""
    codes, _ = read_png16(path)
    if codes.dtype != np.uint16 or codes.ndim != 2:
        raise ValueError(f"{path}: {codes.ndim}-dimensional {codes.dtype} pixels; depth must be one 16-bit plane")
    depth = codes.astype(np.float32) / np.float32(scale)
    known = (codes > 0) & (codes < 65535) & (depth <= max_depth)
    if border:
        inside = np.zeros_like(known)
        inside[border:-border, border:-border] = True
        known &= inside
    if not known.any():
        raise ValueError(f"{path}: no depth is left")
    return np.where(known, depth, np.float32(np.nan))


def colour_of(path: Path, quality: int) -> tuple[bytes, tuple[int, int]]:
    """A JPEG file's own bytes, or those of another image as JPEG with colours in full resolution; and (width, height)."""
    image = read_image(path)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return path.read_bytes(), image.shape[1::-1]
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", image[..., ::-1], flags)[1].tobytes(), image.shape[1::-1]


def convert(sources: list[Path], out: Path, args: argparse.Namespace) -> list[str]:
    """Write every frame of the sources as out/[folder/]name, and the index files. Returns the names."""
    folders, names = [folder for source in sources for folder in find_folders(source)], []
    labels = [folder.resolve().name for folder in folders]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"two folders are named {twice[0]}: convert them into two data sets, or rename one")
    for folder, label in zip(folders, labels):
        K, scale = read_camera(folder, args.intrinsics)
        scale = args.depth_scale or scale or 1000.0
        for name, image, depth in tqdm(find_frames(folder), desc=label, unit="frame", disable=not sys.stderr.isatty()):
            data, size = colour_of(image, args.quality)
            metres = convert_depth(depth, scale, args.max_depth, args.border)
            names.append(f"{label}/{name}")
            write_instance(out / names[-1], data, metres, normalise(K, *size, args.half_pixel), source=f"{label}/{image.name}")
    split = len(names) - args.val
    if split <= 0:
        raise ValueError(f"--val {args.val}: only {len(names)} frames are there")
    lists = {".index.txt": names} | ({".train.txt": names[:split], ".val.txt": names[split:]} if args.val else {})
    for file, lines in lists.items():
        (out / file).write_text("".join(f"{line}\n" for line in lines))
    return names


def main(argv: list[str] | None = None) -> int:
    """Convert; the exit code is 1 when something could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="root of the data set to be written")
    parser.add_argument("--depth_scale", type=float, help="units of depth per metre; default camera.json's, else 1000: millimetres")
    parser.add_argument("--intrinsics", type=Path, help="camera file for all frames, in place of the folders' own")
    parser.add_argument("--half_pixel", action="store_true", help="in the intrinsics, the first pixel's centre is at 0.5, not at 0")
    parser.add_argument("--max_depth", type=float, default=float("inf"), help="metres from which on depth is unknown")
    parser.add_argument("--border", type=int, default=0, help="width of a frame of pixels without depth (NYU: 8)")
    parser.add_argument("--quality", type=int, default=97, help="of the JPEG, where the image is none")
    parser.add_argument("--val", type=int, default=0, help="write the last so many frames to .val.txt and the others to .train.txt")
    args = parser.parse_args(argv)
    try:
        names = convert(args.sources, args.output, args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(names)} instances written to {args.output}; depth is in metres")
    return 0


if __name__ == "__main__":
    sys.exit(main())
