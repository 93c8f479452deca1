"""Point tracking: Kubric MOVi-F layout for training and a TAP-Vid style pickle for validation.

OUT/movi_f/0000/frames/000.png ...   RGB, 8 bit
OUT/movi_f/0000/depths/000.png ...   16 bit: depth = low + value * (high - low) / 65535, (low, high) = depth_range; sky: high
OUT/movi_f/0000/0000.npy             dict: coords (P, T, 2) float32 pixels (x, y) in [0, W] x [0, H];
                                     visibility (P, T) bool, TRUE WHERE OCCLUDED (Kubric's habit);
                                     depth_range (2,) float32 metres
OUT/tapvid_davis.pkl                 dict name -> {video (T, H, W, 3) uint8, points (N, T, 2) float32 in [0, 1] as (x, y),
                                     occluded (N, T) bool}; scenes that training never sees (another random stream)
Training reads OUT/movi_f, where every folder is a sequence.
"""

import pickle
from pathlib import Path

import numpy as np

from synth import output
from synth.scene import render, sample_points, tracks
from synth.world import make_clip, rng_of


def clip(seed: int, index: int, size: tuple[int, int], frames: int, points: int, stream: int = 0, first: float = 0.7) -> dict:
    """A rendered clip with exact tracks.

    Returns video (T, H, W, 3) uint8, depth (T, H, W) float32 (inf: sky), coords (P, T, 2) float64 pixels, occluded (P, T) bool,
    track_depth (P, T), and the scene, cameras and times it was made from. `first`: share of points that frame 0 shows.
    """
    scene, cameras, times = make_clip(seed, index, size, frames, stream)
    shown = [render(scene, camera, time) for camera, time in zip(cameras, times)]
    chosen = sample_points(scene, cameras, times, points, rng_of(seed, index, stream + 100), first)
    followed = tracks(scene, cameras, times, *chosen)
    return {"video": np.stack([f["rgb"] for f in shown]), "depth": np.stack([f["depth"] for f in shown]),
            "coords": followed["coords"], "occluded": followed["occluded"], "track_depth": followed["depth"],
            "scene": scene, "cameras": cameras, "times": times}


def write_sequence(folder: Path, name: str, c: dict) -> None:
    """One Kubric sequence from a clip."""
    finite = c["depth"][np.isfinite(c["depth"])]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    code = np.clip((c["depth"] - low) / max(high - low, 1e-6), 0, 1) * 65535
    for kind in ("frames", "depths"):
        (folder / kind).mkdir()
    for t, (rgb, depth) in enumerate(zip(c["video"], np.rint(code).astype(np.uint16))):
        output.write_image(folder / "frames" / f"{t:03d}.png", rgb)
        output.write_image(folder / "depths" / f"{t:03d}.png", depth)
    truth = {"coords": c["coords"].astype(np.float32), "visibility": c["occluded"],
             "depth_range": np.array([low, high], np.float32)}
    np.save(folder / f"{name}.npy", truth)


def _sequence(out: Path, seed, size, frames, points, index: int) -> bool:
    name = f"{index:04d}"
    fill = lambda folder: write_sequence(folder, name, clip(seed, index, size, frames, points))
    return output.write_folder(out, f"movi_f/{name}", fill)


def _validation(seed, size, frames, points, index: int) -> dict:
    c = clip(seed, index, size, frames, points, stream=1, first=0.8)
    fraction = c["coords"] / [size[1], size[0]]
    return {"video": c["video"], "points": fraction.astype(np.float32), "occluded": c["occluded"]}


def arguments(parser) -> None:
    parser.add_argument("--scenes", type=int, default=60, help="training sequences")
    parser.add_argument("--frames", type=int, default=8, help="frames of a sequence (the published recipe expects 24)")
    parser.add_argument("--points", type=int, default=256, help="tracks of a sequence")
    parser.add_argument("--val_scenes", type=int, default=6, help="clips in the validation file")
    parser.add_argument("--val_frames", type=int, default=16, help="frames of a validation clip")
    parser.add_argument("--val_points", type=int, default=64, help="tracks of a validation clip")


SIZE = (96, 128)


def write(out: Path, args) -> None:
    """Write the whole data set (module docstring). Finished sequences are kept when called again."""
    output.stamp(out, {"kind": "lbm", "seed": args.seed, "size": args.size, "frames": args.frames, "points": args.points,
                       "val_scenes": args.val_scenes, "val_frames": args.val_frames, "val_points": args.val_points})
    output.over(_sequence, range(args.scenes), args.workers, "sequences", out, args.seed, args.size, args.frames, args.points)
    if args.val_scenes and not (out / "tapvid_davis.pkl").exists():
        settings = (args.seed, args.size, args.val_frames, args.val_points)
        clips = output.over(_validation, range(args.val_scenes), args.workers, "validation", *settings)
        output.write_file(out / "tapvid_davis.pkl", pickle.dumps({f"clip_{i:02d}": c for i, c in enumerate(clips)}, protocol=4))
