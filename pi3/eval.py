"""Evaluate Pi3 on sequences with known poses and depth.

  python pi3/eval.py --ckpt model.safetensors --kind folder --data my_sequences
  torchrun --nproc_per_node 4 pi3/eval.py --ckpt outputs/pi3_conf --kind scannet --data data/scannet --metrics pose trajectory

pose: 10 random views of a sequence; share of the view pairs whose relative rotation (RRA) and direction of translation (RTA) are
  right within 5, 15, 30 degrees, and the area under that curve for the larger of the two errors (AUC), in per cent.
trajectory, points, depth: every --stride-th frame of a sequence in one pass. ATE and RPE after a similarity alignment; accuracy,
  completeness and normal consistency after similarity and ICP; depth errors after one alignment per sequence.
--permutation passes the views of `pose` a second time in reversed order and reports the largest difference of the outputs.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import data, dist
from common.io import write_image
from pi3 import metrics
from pi3.augment import inference_size
from pi3.dataset import Mixture, unpack
from pi3.draw import top_down, training_picture
from pi3.geometry import inverse_se3, transform, unproject, valid_depth
from pi3.loss import has_normals, pi3_loss
from pi3.model import PATCH, Pi3
from pi3.readers import CO3D, RGBDFolder, ScanNet, TartanAir, read_frame, sequence_name
from pi3.weights import load_model

THRESHOLDS = (5, 15, 30)
METRICS = ("pose", "trajectory", "points", "depth")
ALIGNMENTS = ("l1_scale", "l1_scale_shift", "median", "lstsq", "metric")


@torch.no_grad()
def predict(model: Pi3, imgs: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The network's output for imgs (B, N, 3, H, W) in [0, 1] under autocast to `dtype`; all of it float32."""
    with torch.autocast(imgs.device.type, dtype, enabled=dtype is not None):
        return model(imgs)


def permutation_difference(model: Pi3, imgs: Tensor, dtype: torch.dtype | None = None) -> float:
    """Largest difference between the outputs for imgs (B, N, 3, H, W) and those for the same views in reversed order, put back.

    In units of each output's largest value: rounding, for a network to which no view is special.
    """
    out, turned = predict(model, imgs, dtype), predict(model, imgs.flip(1), dtype)
    names = [name for name in ("local_points", "camera_poses", "points", "conf") if out.get(name) is not None]
    return max(float((turned[name].flip(1) - out[name]).abs().max() / out[name].abs().max()) for name in names)


def point_error(points: Tensor, target: Tensor, mask: Tensor, most: int = 20_000) -> float:
    """Mean distance of points (N, H, W, 3) to their true places after a similarity alignment, in units of the points' spread.

    The spread is the mean distance of the true points from their centre: guessing one place for all gives 1. At most `most` evenly
    spaced points count. nan with fewer than three of them.
    """
    p, t = (v[mask].double().cpu().numpy() for v in (points, target))
    if len(p) < 3:
        return float("nan")
    chosen = np.linspace(0, len(p) - 1, min(most, len(p))).astype(int)
    p, t = p[chosen], t[chosen]
    c, R, shift = metrics.umeyama(p, t)
    return float(np.linalg.norm(c * p @ R.T + shift - t, axis=1).mean() / np.linalg.norm(t - t.mean(0), axis=1).mean())


def sample_scores(pred: dict[str, Tensor], truth: dict[str, Tensor]) -> dict:
    """Pair errors and point error of a batch of one: {"rotation": list of degrees, "translation": list, "point_error": float}."""
    views = [inverse_se3(p[0].double()).cpu().numpy() for p in (pred["camera_poses"], truth["poses"])]
    rotation, translation = metrics.relative_pose_errors(*views)
    world = transform(truth["poses"], truth["local_points"])[0]
    error = point_error(pred["points"][0], world, truth["mask"][0])
    return {"rotation": rotation.tolist(), "translation": translation.tolist(), "point_error": error}


def validate_samples(
    model: Pi3, source: Mixture, count: int, views: int, size: tuple[int, int], batch: int, device: torch.device,
    dtype: torch.dtype | None = None, workers: int = 0, max_batches: int | None = None,
    sky: Callable[[Tensor], Tensor] | None = None, conf_target: str = "threshold",
) -> dict:  # fmt: skip
    """Mean losses, point_error, pooled pose accuracy and median pair errors (degrees) over `count` fixed samples of `source`;
    "samples", their number, and "bad", why any were replaced by others.

    The samples are shared out over the ranks. Each counts once and by itself, so the result depends neither on the batch size nor
    on the number of ranks. sky: images (B, N, 3, H, W) to the mask (B, N, H, W) of their sky, where the confidence is scored too.
    """
    rank, world = dist.rank(), dist.world_size()
    mine = list(range(rank, count, world))
    rounds = -(-count // (world * batch))  # the same on all ranks: a model that is split among them needs all in every pass
    rounds = min(rounds, max_batches or rounds)
    parts = [mine[i * batch : (i + 1) * batch] or [0] for i in range(rounds)]  # [0]: a rank that has run out goes along, unscored
    scored = [bool(mine[i * batch : (i + 1) * batch]) for i in range(rounds)]
    keys = ([(k, views, *size) for k in part] for part in parts)
    rows, sums, bad = [], {}, []
    for number, loaded in enumerate(data.loader(data.Guarded(source.read), keys, workers)):
        dist.at(number, "validate")
        truth, normals = unpack(loaded, device), has_normals(loaded["dataset"]).to(device)
        pred = predict(model, truth["imgs"], dtype)
        truth["sky"] = None if sky is None else sky(truth["imgs"])
        bad += loaded["bad"]
        for i in range(len(normals) if scored[number] else 0):
            one = slice(i, i + 1)
            p, t = ({key: None if value is None else value[one] for key, value in d.items()} for d in (pred, truth))
            terms = pi3_loss(p, t["local_points"], t["poses"], t["mask"], normals[one], t["sky"], conf_target)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
            rows.append(sample_scores(p, t))
    rows = [row for part in dist.gather(rows) for row in part]
    sums = [part for part in dist.gather({name: float(value) for name, value in sums.items()}) if part]
    rotation, translation = (np.concatenate([row[key] for row in rows]) for key in ("rotation", "translation"))
    losses = {name: sum(part[name] for part in sums) / len(rows) for name in sums[0]}
    pairs = {"rot_deg": float(np.median(rotation)), "trans_deg": float(np.median(translation))}
    pairs |= metrics.pose_accuracy(rotation, translation, THRESHOLDS)
    error = float(np.nanmean([row["point_error"] for row in rows]))
    return losses | pairs | {"point_error": error, "samples": len(rows), "bad": [line for part in dist.gather(bad) for line in part]}


# whole sequences


def read_view(reader, item: int, number, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]:
    """A frame resized as a whole to (width, height): image (3, H, W) in [0, 1], depth (H, W), K (3, 3), pose (4, 4), float32; and its
    depth before that (h, w), 0 where it is unknown or too far."""
    frame = read_frame(reader, item, number)
    H, W = frame.depth.shape
    image = np.array(Image.fromarray(frame.image).resize(size, Image.Resampling.LANCZOS))
    rows, columns = ((np.arange(n) * m // n) for n, m in zip(size[::-1], (H, W)))  # nearest
    depth = reader.decode_depth(np.asarray(frame.depth)).astype(np.float32)
    depth = np.where(np.isfinite(depth) & (depth > 0) & (depth < (reader.z_far or np.inf)), depth, 0)
    scale = np.array([size[0] / W, size[1] / H])[:, None]
    K = np.array(frame.K, np.float64)
    K[:2] = K[:2] * scale
    K[:2, 2:] += (scale - 1) / 2  # pixel centres lie at whole numbers
    image = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    resized = torch.from_numpy(depth[rows[:, None], columns])
    return image, resized, torch.from_numpy(K.astype(np.float32)), torch.from_numpy(frame.pose.astype(np.float32)), depth


def read_views(reader, item: int, numbers: list, width: int) -> dict:
    """Frames of a sequence as a batch of one, as `unpack` gives it, `width` pixels wide (0: see --width), their depth (1, N, H, W),
    and as "measured" their depth maps (h, w) in the size they are stored in."""
    H, W = reader.frame(item, numbers[0]).depth.shape
    # the official size: the height follows from the width asked for, which is then cut to whole patches
    patches = (width // PATCH, round(H * width / W / PATCH))
    size = tuple(max(1, n) * PATCH for n in patches) if width else inference_size((W, H))
    *views, measured = zip(*(read_view(reader, item, number, size) for number in numbers))
    imgs, depth, K, poses = (torch.stack(values)[None] for values in views)
    local_points = unproject(depth, K)
    mask = valid_depth(depth, transform(poses, local_points))
    return {"imgs": imgs, "local_points": local_points, "poses": poses, "mask": mask, "depth": depth, "measured": measured}


def evaluate_pairs(model: Pi3, reader, item: int, numbers: list, args, device, dtype) -> dict:
    """Pair errors of the frames `numbers` of a sequence as `sample_scores` gives them, and what their order changes."""
    truth, row = read_views(reader, item, numbers, args.width), {}
    imgs = truth["imgs"].to(device)
    if "pose" in args.metrics:
        row |= sample_scores({k: v.cpu() for k, v in predict(model, imgs, dtype).items() if v is not None}, truth)
    return row | ({"permutation": permutation_difference(model, imgs, dtype)} if args.permutation else {})


def evaluate_sequence(model: Pi3, reader, item: int, numbers: list, args, device, dtype) -> dict[str, float]:
    """Trajectory, point and depth scores of the frames `numbers` of a sequence, seen in one pass. What cannot be scored is left out."""
    truth = read_views(reader, item, numbers, args.width)
    pred = {k: v[0].cpu() for k, v in predict(model, truth["imgs"].to(device), dtype).items() if v is not None}
    mask, world, row = truth["mask"][0], transform(truth["poses"], truth["local_points"])[0], {}

    def depth() -> dict[str, float]:  # the prediction is brought to the size of the truth
        pairs = zip(pred["local_points"][..., 2].numpy(), truth["measured"])
        p = np.concatenate([cv2.resize(z, g.shape[::-1], interpolation=cv2.INTER_CUBIC).ravel() for z, g in pairs])
        g = np.concatenate([g.ravel() for g in truth["measured"]])
        errors = metrics.depth_errors(p, g, args.align, args.max_depth, args.clip, args.align_lr)
        if not errors["valid_pixels"]:
            raise ValueError("no valid depth")
        return errors

    def points() -> dict[str, float]:
        p, t = pred["points"][mask].numpy(), world[mask].numpy()
        chosen = np.linspace(0, len(t) - 1, min(len(t), args.max_points or len(t))).astype(int)
        errors = metrics.evaluate_reconstruction(p[chosen], t[chosen], args.max_distance)
        return errors | {"point_error": point_error(pred["points"], world, mask)}

    for name, score in (
        ("trajectory", lambda: metrics.trajectory_errors(pred["camera_poses"].numpy(), truth["poses"][0].numpy())),
        ("points", points),
        ("depth", depth),
    ):
        try:
            row |= score() if name in args.metrics else {}
        except ValueError as error:  # fewer than three frames, a camera that stands still, no depth
            print(f"{sequence_name(reader, item)}: {name} left out: {error}", flush=True)
    if args.pictures and mask.sum() >= 3:
        draw_sequence(Path(args.pictures) / sequence_name(reader, item).replace("/", "_"), pred, truth)
    return row


def draw_sequence(path: Path, pred: dict[str, Tensor], truth: dict[str, Tensor], most: int = 6) -> None:
    """Write `path`_depth.png: images, true and predicted depth of at most `most` views; `path`_map.png: predicted cameras and points
    from above after a similarity alignment, true cameras in grey. `pred` without a batch axis, `truth` with one. Needs 3 valid pixels."""
    mask, world = truth["mask"][0].numpy(), transform(truth["poses"], truth["local_points"])[0].numpy()
    images = (truth["imgs"][0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    shown = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)
    maps = truth["depth"][0].numpy(), mask, pred["local_points"][..., 2].numpy()
    write_image(path.with_name(path.name + "_depth.png"), training_picture(images[shown], *(values[shown] for values in maps)))
    chosen = np.flatnonzero(mask)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), 50_000)).astype(int)]
    points, target = (values.reshape(-1, 3)[chosen] for values in (pred["points"].numpy(), world))
    c, R, t = metrics.umeyama(points, target)
    poses = pred["camera_poses"].numpy().astype(np.float64)
    poses[:, :3] = np.concatenate([R @ poses[:, :3, :3], (c * poses[:, :3, 3] @ R.T + t)[..., None]], 2)
    picture = top_down(poses, c * points @ R.T + t, images.reshape(-1, 3)[chosen], truth=truth["poses"][0].numpy())
    write_image(path.with_name(path.name + "_map.png"), picture)


def make_reader(kind: str, root: str, split: str = "test", depth_scale: float = 1000.0):
    """The reader of a data set's layout."""
    if kind == "folder":
        return RGBDFolder(root, depth_scale)
    if kind == "scannet":
        return ScanNet(root, split)
    return CO3D(root, split, mask_bg=False) if kind == "co3d" else TartanAir(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="weights: a run's folder, a file of ours, model.safetensors of Pi3 or Pi3X")
    parser.add_argument("--data", required=True, help="root folder of the data set")
    parser.add_argument("--kind", default="folder", choices=["tartanair", "scannet", "co3d", "folder"], help="its layout")
    parser.add_argument("--split", default="test", choices=["train", "test"], help="of scannet and co3d")
    parser.add_argument("--metrics", nargs="+", default=METRICS, choices=METRICS, help="default: all")
    parser.add_argument("--views", type=int, default=10, help="pose: random views of a sequence, or all where it has fewer")
    parser.add_argument("--stride", type=int, default=1, help="the other metrics: every so many frames")
    parser.add_argument("--max_frames", type=int, default=200, help="the other metrics: at most the first so many of those")
    parser.add_argument("--width", type=int, default=518, help="of the images, cut to multiples of 14; 0: at most 255,000 pixels")
    parser.add_argument("--max_distance", type=float, default=0.1, help="points: ICP matches within this, in the data's units")
    parser.add_argument("--max_points", type=int, help="points: at most so many, evenly spaced; default all")
    parser.add_argument("--align", default="l1_scale_shift", choices=ALIGNMENTS, help="depth: how it is brought to the truth's scale")
    parser.add_argument("--max_depth", type=float, help="depth: truth beyond does not count")
    parser.add_argument("--clip", type=float, help="depth: aligned predictions are cut to this (Sintel: 70)")
    parser.add_argument("--align_lr", type=float, default=1e-4, help="depth: step size of l1_scale_shift (NYU-v2: 1e-3)")
    parser.add_argument("--depth_scale", type=float, default=1000.0, help="folder: units of the 16-bit depth per metre")
    parser.add_argument("--min_frames", type=int, default=2, help="leave out sequences with fewer usable frames; CO3D's protocol: 50")
    parser.add_argument("--limit", type=int, help="only the first so many sequences")
    parser.add_argument("--amp", default="on", choices=["off", "on", "bf16", "fp16"], help="on a GPU only")
    parser.add_argument("--permutation", action="store_true", help="how much the outputs depend on the order of the views")
    parser.add_argument("--pictures", help="folder for pictures of each sequence: true and predicted depth, cameras from above")
    parser.add_argument("--out", help="CSV file with one row per sequence")
    args = parser.parse_args()

    for key, least in (("views", 2), ("min_frames", 2), ("stride", 1), ("max_frames", 1), ("width", 0), ("limit", 1), ("max_points", 3)):
        if (value := getattr(args, key)) is not None and value < least:
            raise SystemExit(f"--{key} {value}: must be at least {least}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    device = dist.init()
    dtype = dist.autocast_dtype(args.amp, device) if device.type == "cuda" else None
    reader = make_reader(args.kind, args.data, args.split, args.depth_scale)
    model = load_model(args.ckpt, device)
    items, failed = {}, []  # {sequence: its usable frames}
    for item in range(len(reader)):
        try:
            items[item] = reader.numbers(item)
        except (OSError, ValueError) as error:
            failed.append(str(error))
    items = dict([(item, numbers) for item, numbers in items.items() if len(numbers) >= args.min_frames][: args.limit])
    if not items:
        raise SystemExit("\n".join([f"{args.data}: no sequence of at least {args.min_frames} usable frames", *failed]))
    # the official draw; the same on all ranks
    rng, rows = np.random.RandomState(42), []
    drawn = {item: [numbers[i] for i in rng.permutation(len(numbers))[: args.views]] for item, numbers in items.items()}
    for item in tqdm([*items][dist.rank() :: dist.world_size()], desc="sequences", disable=None if dist.is_main() else True):
        dist.at(item, f"evaluate {sequence_name(reader, item)}")
        try:
            row = {"sequence": sequence_name(reader, item)}
            if "pose" in args.metrics or args.permutation:
                row |= evaluate_pairs(model, reader, item, drawn[item], args, device, dtype)
            if {"trajectory", "points", "depth"} & set(args.metrics) or args.pictures:
                chosen = items[item][:: args.stride][: args.max_frames]
                row |= evaluate_sequence(model, reader, item, chosen, args, device, dtype) | {"frames": len(chosen)}
            rows.append((item, row))
        except (OSError, ValueError) as error:  # a frame that cannot be read
            failed.append(str(error))
    rows = [row for _, row in sorted(pair for part in dist.gather(rows) for pair in part)]
    failed = list(dict.fromkeys(line for part in dist.gather(failed) for line in part))
    if dist.is_main():
        print("".join(f"left out: {line}\n" for line in failed), end="")
        if rows:
            report(rows, args.out)
    dist.shutdown()
    if failed:
        sys.exit(1)


def report(rows: list[dict], out: str | None) -> None:
    """Print pooled pose accuracy and the means over the sequences (depth: over pixels); write one row per sequence to `out`."""
    print(f"{len(rows)} sequences")
    if "rotation" in rows[0]:
        pairs = [np.concatenate([row[key] for row in rows]) for key in ("rotation", "translation")]
        pooled = metrics.pose_accuracy(*pairs, THRESHOLDS)
        print("pose        " + "  ".join(f"{name.upper()} {value:.2f}" for name, value in pooled.items()))
        turn, direction = map(np.median, pairs)
        print(f"            median of the pairs: rotation {turn:.2f} degrees, direction of translation {direction:.2f} degrees")
        for row in rows:
            errors = [np.array(row.pop(key)) for key in ("rotation", "translation")]
            row |= metrics.pose_accuracy(*errors, THRESHOLDS)
    for title, names in (
        ("trajectory", ("ate", "rpe_trans", "rpe_rot_deg")),
        ("points", ("acc", "acc_med", "comp", "comp_med", "nc", "nc_med", "point_error")),
    ):
        if scored := [row for row in rows if names[0] in row]:
            print(f"{title:12}" + "  ".join(f"{name} {np.mean([row[name] for row in scored]):.4f}" for name in names))
    names = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta1", "delta2", "delta3", "valid_pixels")
    if scored := [{name: row[name] for name in names} for row in rows if "abs_rel" in row]:
        pooled = metrics.pool_depth_errors(scored)
        print("depth       " + "  ".join(f"{name} {pooled[name]:.4f}" for name in names[:-1]))
    if "permutation" in rows[0]:
        print(f"permutation largest relative difference {max(row['permutation'] for row in rows):.1e}")
    if out:
        with open(out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        print(f"per sequence: {out}")


if __name__ == "__main__":
    main()
