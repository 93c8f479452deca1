"""Evaluate an LBM checkpoint on a TAP-Vid set.

python lbm/eval.py --checkpoint lbm.pt --dataset davis --data tapvid_davis.pkl [--query_mode strided] [--memory_size 20]
torchrun --nproc_per_node 4 lbm/eval.py --checkpoint lbm.pt --dataset kinetics --data tapvid_kinetics/
"""

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of lbm/

import torch
from tqdm import tqdm

from common import config, dist
from lbm import baselines
from lbm.metrics import add_video, new_sums, summary, video_metrics
from lbm.model import LBM, load_checkpoint
from lbm.tapvid import MEMORY_SIZE, tapvid

# The constructor arguments of the network among the keys of a config.
MODEL_KEYS = [
    *("input_size", "num_layers", "num_heads", "num_neighbors", "top_k_regions", "dropout", "memory_size"),
    *("random_memory_mask_drop", "visibility_threshold", "loss_after_query", "msda", "checkpointing"),
    *("lambda_cls", "lambda_vis", "lambda_reg", "lambda_unc", "lambda_ref"),
]
COLUMNS = ("aj", "delta_avg", "oa", "delta_1", "delta_2", "delta_4", "delta_8", "delta_16")


def tracker(
    model: LBM,
    device: torch.device,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    spatial_penalty: float | None = None,
):
    """A function (video uint8 (T, H, W, 3), queries (N, 3) (t, x, y)) -> tracks (T, N, 2), visible (T, N), as numpy arrays."""

    def track(video, queries):
        frames = torch.from_numpy(video).to(device).permute(0, 3, 1, 2)[None]  # (1, T, 3, H, W)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = model.inference(frames, torch.from_numpy(queries).float()[None].to(device), spatial_penalty, chunk)
        return out["points"][0].float().cpu().numpy(), out["visibility"][0].cpu().numpy()

    return track


def score(track, root: str, dataset: str, query_mode: str = "first", limit: int | None = None, bar: bool = False) -> dict:
    """Mean TAP-Vid metrics (x100) of `track` over this dataset, videos shared out over the ranks.

    Returns the keys of `lbm.metrics.summary`, "fps" (frames per second of this rank) and "per_video" (this rank's rows).
    """
    sums, rows, frames, seconds = new_sums(), [], 0, 0.0
    videos = tapvid(root, dataset, query_mode, dist.rank(), dist.world_size(), limit)
    for name, sample in tqdm(videos, desc=f"evaluate {dataset}", unit="video", disable=not bar):
        dist.at(len(rows), f"evaluate {name}")
        start = time.perf_counter()
        points, visible = track(sample["video"], sample["queries"][:, [0, 2, 1]])
        seconds += time.perf_counter() - start
        frames += len(sample["video"])
        result = video_metrics(
            points, visible, sample["tracks"], sample["visible"], sample["queries"], query_mode, known=sample["known"]
        )
        add_video(sums, result)
        rows.append({"video": name, "points": len(sample["queries"])} | {key: 100 * result[key] for key in COLUMNS})
    return summary(dist.all_sum(sums)) | {"fps": frames / max(seconds, 1e-9), "per_video": rows}


def evaluate(
    model: LBM,
    root: str,
    dataset: str,
    device: torch.device,
    query_mode: str = "first",
    memory_size: int | None = None,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    bar: bool = False,
    spatial_penalty: float | None = None,
) -> dict:
    """`score` of a copy of the model with its memory extended (null: the set's usual size). The model itself is left as it is."""
    net = model.with_memory_size(memory_size or MEMORY_SIZE[dataset])
    return score(tracker(net, device, dtype, chunk, spatial_penalty), root, dataset, query_mode, limit, bar)


def table(results: dict[str, dict]) -> str:
    """A text table of named results."""
    lines = [f"{'':24}" + "".join(f"{column:>11}" for column in COLUMNS)]
    for name, result in results.items():
        lines.append(f"{name:24}" + "".join(f"{result[column]:11.2f}" for column in COLUMNS))
    return "\n".join(lines)


def stored_config(path: str | Path) -> dict:
    """The constructor arguments that a checkpoint of ours records; {} for an official one and for what cannot be read."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {key: value for key, value in stored.get("config", {}).items() if key in MODEL_KEYS}
    except Exception:
        return {}


def load_model(path: str, device: torch.device, config_file: str | None = None) -> LBM:
    """The network of a checkpoint in eval mode; shaped by the config file, else as the checkpoint records, else as published."""
    if config_file:
        cfg = config.parse(["--config", config_file], __doc__, Path(__file__).parent / "configs" / "default.yaml")
        shape = {key: cfg[key] for key in MODEL_KEYS}
    else:
        shape = stored_config(path) | {"msda": "auto"}  # the kernel it was trained with may not work here
    model = LBM(**shape)
    for note in load_checkpoint(model, path)["notes"]:
        print(note, file=sys.stderr)
    return model.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="weights: ours, released lbm.pt, or an official training file")
    parser.add_argument("--data", required=True, help="pickle file (davis, rgb_stacking) or folder (kinetics, robotap)")
    parser.add_argument("--dataset", default="davis", choices=sorted(MEMORY_SIZE))
    parser.add_argument("--config", help="config with the model's shape, where the checkpoint does not hold it")
    parser.add_argument("--query_mode", default="first", choices=["first", "strided"])
    parser.add_argument(
        "--memory_size", type=config.number(int, 1), help="memory slots; default 20 davis and rgb_stacking, 36 kinetics, 60 robotap"
    )
    parser.add_argument(
        "--vis_threshold", type=config.number(float, 0, 1), help="a point is visible above this probability; default: the checkpoint's"
    )
    parser.add_argument(
        "--spatial_penalty", type=config.number(float, 1e-3), help="correlations decay over so many cells from the last position"
    )
    parser.add_argument("--amp", default="off", choices=["off", "on", "bf16", "fp16"])
    parser.add_argument("--limit", type=config.number(int, 1), help="only the first so many videos")
    parser.add_argument("--chunk", type=config.number(int, 1), help="track at most so many points at a time, to bound memory")
    parser.add_argument("--baselines", action="store_true", help="also score 'points never move' and pyramidal Lucas-Kanade")
    parser.add_argument("--out", help="CSV file with one row per video")
    args = parser.parse_args()
    if args.out and not Path(args.out).parent.is_dir():
        parser.error(f"--out {args.out}: no such folder to write to")

    device = dist.init()
    model = load_model(args.checkpoint, device, args.config)
    if args.vis_threshold is not None:
        model.visibility_threshold = args.vis_threshold
    dtype = dist.autocast_dtype(args.amp, device)
    bar = dist.is_main()
    results = {}
    if args.baselines:
        results["points never move"] = score(baselines.still, args.data, args.dataset, args.query_mode, args.limit)
        results["Lucas-Kanade (OpenCV)"] = score(baselines.lucas_kanade, args.data, args.dataset, args.query_mode, args.limit)
    how = (args.query_mode, args.memory_size, args.limit, dtype, args.chunk, bar, args.spatial_penalty)
    mine = evaluate(model, args.data, args.dataset, device, *how)
    results[Path(args.checkpoint).stem] = mine
    rows = dist.gather(mine["per_video"])
    if dist.is_main():
        print(table(results))
        print(
            f"{mine['videos']:.0f} videos ({mine['skipped']:.0f} without a scored point), {mine['fps']:.1f} frames/s on this rank"
        )
        if args.out:
            with open(args.out, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=["video", "points", *COLUMNS])
                writer.writeheader()
                writer.writerows(row for part in rows for row in part)
            print(f"per video: {args.out}")
    dist.shutdown()


if __name__ == "__main__":
    main()
