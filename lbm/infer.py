"""Track points through a video with a trained LBM: writes tracks (.npz), a drawn video (.mp4) and a picture (.png).

python lbm/infer.py --checkpoint lbm.pt --video clip.mp4 --grid 10 --out tracks/
python lbm/infer.py --checkpoint lbm.pt --video frames/ --points points.csv --out tracks/     # lines: frame, x, y
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of lbm/

import cv2
import numpy as np
import torch

from common import config, dist
from common.io import contact_sheet, read_image, write_image
from lbm.draw import draw_tracks
from lbm.eval import load_model
from lbm.model import point_grid

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def read_video(path: Path, max_frames: int | None) -> tuple[np.ndarray, float]:
    """Frames (T, H, W, 3) uint8 RGB and frames per second (25 for a folder of images, taken in name order)."""
    frames, fps = [], 25.0
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGES)[:max_frames]
        frames = [read_image(f) for f in files]
        if len({f.shape for f in frames}) > 1:
            raise SystemExit(f"{path}: the images differ in size: {sorted({f.shape[:2] for f in frames})}; a video has one size")
    elif path.is_file():
        video = cv2.VideoCapture(str(path))
        fps = video.get(cv2.CAP_PROP_FPS) or fps
        while len(frames) < (max_frames or len(frames) + 1):
            ok, frame = video.read()
            if not ok:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        video.release()
    else:
        raise SystemExit(f"{path}: no such video file or folder of frames")
    if not frames:
        raise SystemExit(
            f"{path}: no frame could be read; give a video that OpenCV opens or a folder of {', '.join(sorted(IMAGES))}"
        )
    return np.stack(frames), fps


def read_points(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Query points (N, 3) float32 (frame, x, y) from a text file with three numbers a line (comma or space), or an .npy array."""
    try:
        text = None if path.suffix == ".npy" else path.read_text().replace(",", " ")
        points = np.load(path, allow_pickle=False) if text is None else np.loadtxt(text.splitlines(), ndmin=2)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot read points: {error}; expected lines 'frame, x, y'") from error
    frames, height, width = shape[:3]
    if points.ndim != 2 or points.shape[1] != 3:
        raise SystemExit(f"{path}: points have shape {points.shape}, expected (N, 3) with columns frame, x, y")
    if not (points[:, 0] == np.round(points[:, 0])).all():
        raise SystemExit(f"{path}: the first column holds frames, which are whole numbers from 0 to {frames - 1}")
    inside = (points >= 0).all(1) & (points[:, 0] < frames) & (points[:, 1] <= width) & (points[:, 2] <= height)
    if not inside.all():
        raise SystemExit(
            f"{path}: point {points[~inside][0].tolist()} lies outside the video ({frames} frames of {width}x{height})"
        )
    return points.astype(np.float32)


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 RGB frames as mp4."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames.shape[2:0:-1])
    if not writer.isOpened():
        raise SystemExit(f"{path}: this OpenCV cannot write mp4; the .npz and the .png are complete")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="weights: ours, released lbm.pt, or an official training file")
    parser.add_argument("--video", required=True, type=Path, help="video file or folder of frames")
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    parser.add_argument(
        "--grid", type=config.number(int, 1), default=10, help="track a grid of so many x so many points of the first frame"
    )
    parser.add_argument(
        "--points", type=Path, help="track these points instead: lines 'frame, x, y' in pixels, or an (N, 3) .npy"
    )
    parser.add_argument("--config", help="config with the model's shape, where the checkpoint does not hold it")
    parser.add_argument("--memory_size", type=config.number(int, 1), default=20, help="memory slots; default 20")
    parser.add_argument(
        "--vis_threshold", type=config.number(float, 0, 1), help="a point is visible above this probability; default: the checkpoint's"
    )
    parser.add_argument(
        "--spatial_penalty", type=config.number(float, 1e-3), help="correlations decay over so many cells from the last position"
    )
    parser.add_argument("--max_frames", type=config.number(int, 1), help="stop after so many frames")
    parser.add_argument("--amp", default="on", choices=["off", "on", "bf16", "fp16"], help="on a GPU only")
    args = parser.parse_args()

    device = dist.init()
    video, fps = read_video(args.video, args.max_frames)
    frames, height, width = video.shape[:3]
    if args.points:
        queries = read_points(args.points, video.shape)
    else:
        grid = point_grid(args.grid, height, width)[0].numpy()  # (grid^2, 2)
        queries = np.concatenate([np.zeros_like(grid[:, :1]), grid], 1)
    model = load_model(args.checkpoint, device, args.config).with_memory_size(args.memory_size)
    if args.vis_threshold is not None:
        model.visibility_threshold = args.vis_threshold
    dtype = dist.autocast_dtype(args.amp, device) if device.type == "cuda" else None
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        out = model.inference(
            torch.from_numpy(video).permute(0, 3, 1, 2)[None].to(device),
            torch.from_numpy(queries)[None].to(device),
            args.spatial_penalty,
        )
    tracks, visible, uncertainty = (out[key][0].float().cpu().numpy() for key in ("points", "visibility", "uncertainty"))
    started = np.arange(frames)[:, None] >= queries[:, 0]  # (T, N): before its query a point has no track
    visible = (visible > 0) & started
    tracks[~started] = uncertainty[~started] = np.nan

    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.out / "tracks.npz", tracks=tracks, visible=visible, uncertainty=uncertainty, queries=queries, fps=fps
    )
    drawn = draw_tracks(video, tracks, visible)
    write_image(
        args.out / "tracks.png",
        contact_sheet([drawn[t] for t in np.linspace(0, frames - 1, min(6, frames)).astype(int)], columns=3),
    )
    write_video(args.out / "tracks.mp4", drawn, fps)
    print(f"{len(queries)} points through {frames} frames; {visible.sum() / max(started.sum(), 1):.0%} visible")
    print(f"{args.out / 'tracks.npz'}: tracks (T, N, 2) px, visible (T, N), uncertainty (T, N), queries (N, 3) frame, x, y")
    print(f"{args.out / 'tracks.mp4'}, {args.out / 'tracks.png'}")
    dist.shutdown()


if __name__ == "__main__":
    main()
