"""Cameras and points of a folder of images or a video: camera poses, a coloured point cloud, depth pictures, a map from above.

  python pi3/infer.py --ckpt model.safetensors --data_path photos --save_path scene
  python pi3/infer.py --ckpt outputs/pi3_conf --data_path walk.mp4 --interval 10 --chunk 64 --save_path scene
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import dist
from common.io import contact_sheet, read_image, write_image, write_ply
from pi3.augment import inference_size
from pi3.draw import depth_pictures, label, top_down
from pi3.eval import predict
from pi3.geometry import depth_edge, depth_normal_edge, intrinsics_from_points, rescale_poses, transform
from pi3.metrics import umeyama
from pi3.model import PATCH, Pi3
from pi3.weights import load_model

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def read_images(path: Path, interval: int | None, pixel_limit: int) -> tuple[np.ndarray, list[str]]:
    """Every interval-th image (default: all of a folder, every 10th frame of a video) and its name.

    All become the size that `inference_size` gives for the first one: (N, H, W, 3) uint8 RGB, sides in multiples of 14.
    """
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGES)[:: interval or 1]
        images, names = (read_image(f) for f in files), [f.stem for f in files]
    elif path.is_file():
        video, frames = cv2.VideoCapture(str(path)), []
        while video.grab():
            if len(frames) % (interval or 10) == 0:
                frames.append(cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB))
            else:
                frames.append(None)
        video.release()
        names = [f"{i:06d}" for i, frame in enumerate(frames) if frame is not None]
        images = (frame for frame in frames if frame is not None)
    else:
        raise SystemExit(f"{path}: no such folder of images or video")
    out, size = [], None
    for image in images:
        size = size or inference_size(image.shape[1::-1], pixel_limit)
        out.append(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)))
    if not out:
        raise SystemExit(f"{path}: no image could be read; give a video that OpenCV opens or a folder of {', '.join(sorted(IMAGES))}")
    return np.stack(out), names


def predict_chunks(model: Pi3, images: np.ndarray, chunk: int, overlap: int, device, dtype) -> dict[str, Tensor]:
    """Output for images (N, H, W, 3) uint8, on the CPU, without a batch axis. More than `chunk` images go through in overlapping parts.

    Each part is brought to frame and scale of those before it by the similarity between its points of the common images and theirs.
    """
    start, merged = 0, {}
    while True:
        part = torch.from_numpy(images[start : start + chunk]).to(device).permute(0, 3, 1, 2)[None].float() / 255
        out = {key: v[0].float().cpu() for key, v in predict(model, part, dtype).items() if v is not None and key != "metric"}
        if start:
            new, old = ({k: v[first:][:overlap] for k, v in d.items()} for d, first in ((out, 0), (merged, start)))
            common = alignable(new) & alignable(old)
            c, R, t = 1.0, np.eye(3), np.zeros(3)
            if common.sum() >= 10:
                c, R, t = umeyama(new["points"][common].numpy(), old["points"][common].numpy())
            motion = torch.eye(4)
            motion[:3, :3], motion[:3, 3] = torch.from_numpy(R), torch.from_numpy(t)
            out["camera_poses"] = motion @ rescale_poses(out["camera_poses"][None], torch.tensor([c], dtype=torch.float32))[0]
            out["local_points"] = out["local_points"] * c
            out["points"] = transform(out["camera_poses"], out["local_points"])
        keep = overlap if start else 0
        merged = {key: torch.cat([merged[key], value[keep:]]) if start else value for key, value in out.items()}
        if start + chunk >= len(images):
            return merged
        start += chunk - overlap


def usable(out: dict[str, Tensor], conf: float, edge: str) -> Tensor:
    """Mask (N, H, W) of the points worth keeping: sure enough, in front of the camera, not flying between two surfaces."""
    z = out["local_points"][..., 2]
    keep = out["points"].isfinite().all(-1) & (z > 0)
    if "conf" in out:
        keep &= out["conf"][..., 0].sigmoid() > conf
    if edge == "depth":
        return keep & ~depth_edge(z, rtol=0.03)
    return keep & ~depth_normal_edge(out["local_points"], keep) if edge == "depth_normal" else keep


def alignable(out: dict[str, Tensor]) -> Tensor:
    """Mask (N, H, W) of the points that two parts are aligned by: sure and off edges; where fewer than 10 are, the surest tenth."""
    keep = usable(out, 0.05, "depth")
    if keep.sum() >= 10:
        return keep
    conf = out["conf"][..., 0] if "conf" in out else torch.zeros(keep.shape)
    return out["points"].isfinite().all(-1) & (conf >= conf.flatten().topk(max(1, conf.numel() // 10)).values[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="weights: a run's folder, a file of ours, model.safetensors of Pi3 or Pi3X")
    parser.add_argument("--data_path", required=True, type=Path, help="folder of images (in name order) or video")
    parser.add_argument("--save_path", required=True, type=Path, help="output folder")
    parser.add_argument("--interval", type=int, help="take every so-manieth image; default 1 for a folder, 10 for a video")
    parser.add_argument("--conf", type=float, default=0.1, help="points need this confidence, where the network has a confidence branch")
    parser.add_argument("--edge", default="depth_normal", choices=["depth", "depth_normal", "none"], help="drop points at such edges")
    parser.add_argument("--pixel_limit", type=int, default=255_000, help="images are resized to at most so many pixels")
    parser.add_argument("--chunk", type=int, default=1000, help="images that go through the network together; more are merged in parts")
    parser.add_argument("--overlap", type=int, default=6, help="images that two parts have in common")
    parser.add_argument("--max_points", type=int, default=5_000_000, help="of the point cloud, evenly spaced")
    parser.add_argument("--device", help="cpu or cuda; default: what there is")
    parser.add_argument("--amp", default="on", choices=["off", "on", "bf16", "fp16"], help="on a GPU only")
    args = parser.parse_args()
    for key, least in (("interval", 1), ("pixel_limit", PATCH**2), ("max_points", 1)):
        if (value := getattr(args, key)) is not None and value < least:
            raise SystemExit(f"--{key} {value}: must be at least {least}")
    if not 0 < args.overlap < args.chunk:
        raise SystemExit(f"--overlap {args.overlap} must be at least 1 and below --chunk {args.chunk}")

    device = torch.device(args.device) if args.device else dist.init()
    dtype = dist.autocast_dtype(args.amp, device) if device.type == "cuda" else None
    images, names = read_images(args.data_path, args.interval, args.pixel_limit)
    out = predict_chunks(load_model(args.ckpt, device), images, args.chunk, args.overlap, device, dtype)
    keep, z = usable(out, args.conf, args.edge).numpy(), out["local_points"][..., 2].numpy()
    K, poses = intrinsics_from_points(out["local_points"], centred=True).numpy(), out["camera_poses"].numpy()
    points, colors = out["points"].numpy()[keep], images[keep]
    chosen = np.linspace(0, len(points) - 1, min(len(points), args.max_points)).astype(int)
    points, colors = points[chosen], colors[chosen]

    args.save_path.mkdir(parents=True, exist_ok=True)
    with suppress(Exception):  # there is no earlier run, or its file is damaged
        for name in np.load(args.save_path / "cameras.npz")["names"]:  # its pictures would stay among the new ones
            (args.save_path / "depth" / Path(f"{name}.png").name).unlink(missing_ok=True)
    write_ply(args.save_path / "points.ply", points, colors, np.zeros_like(points))
    np.savez_compressed(
        args.save_path / "cameras.npz", names=np.array(names), camera_to_world=poses, intrinsics=K, size=np.array(images.shape[2:0:-1]),
        depth=z.astype(np.float32), keep=keep,
    )  # fmt: skip
    maps = depth_pictures(z, keep)
    for name, picture in zip(names, maps):
        write_image(args.save_path / "depth" / f"{name}.png", picture)
    write_image(args.save_path / "cameras.png", top_down(poses, points, colors))
    shown = np.linspace(0, len(images) - 1, min(6, len(images))).astype(int)
    sheet = contact_sheet([label(images[i], names[i]) for i in shown] + [maps[i] for i in shown], columns=len(shown))
    write_image(args.save_path / "overview.jpg", sheet)
    print(f"{len(images)} images of {images.shape[2]}x{images.shape[1]}, {len(points)} points kept ({keep.mean():.0%} of the pixels)")
    print(f"{args.save_path / 'cameras.npz'}: camera_to_world (N, 4, 4), intrinsics (N, 3, 3) px, depth (N, H, W), keep (N, H, W), names")
    print(f"points.ply, depth/NAME.png, cameras.png (from above) and overview.jpg in {args.save_path}")
    print("lengths are in the unit of the network: up to scale with Pi3, metres with Pi3X")


if __name__ == "__main__":
    main()
