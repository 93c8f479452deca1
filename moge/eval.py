"""Evaluate a MoGe checkpoint on data in the MoGe format: depth, points and camera under the alignments of the published protocol.

python moge/eval.py --checkpoint model.pt --data data/my_set --split .val.txt --baselines --out images.csv
torchrun --nproc_per_node 4 moge/eval.py --checkpoint model.pt --config moge/configs/eval.json --json results.json
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of moge/

import numpy as np
import torch
from tqdm import tqdm

from common import config, data, dist
from common.io import safe_join, write_image
from moge.augment import prepare_evaluation
from moge.draw import panel
from moge.geometry import depth_to_points
from moge.io import read_index, read_instance
from moge.metrics import compute_metrics
from moge.model import MoGe, load

KEYS = {  # of a benchmark in --config, and their values where it does not name them
    "path": None,  # root of the data set
    "name": None,
    "split": ".index.txt",  # index file in the root
    "depth": "depth.png",
    "width": None,  # size that images are brought to; null: their own
    "height": None,
    "depth_unit": None,  # metres per unit: its presence makes the depth metric
    "drop_max_depth": 1000.0,  # depth beyond this times the 1 % quantile is not counted
    "include_segmentation": False,  # also score every segment by itself
    "max_segments": 100,
    "min_seg_area": 1000,
    "has_sharp_boundary": False,  # also score occlusion edges
    "subset": 1,  # every so many images
}


def list_samples(**benchmark) -> list[dict]:
    """The images of a benchmark (KEYS) in the order of its index: the benchmark's entries and "folder", "instance". ValueError or
    OSError where an entry or the index is wrong.
    """
    if unknown := sorted(set(benchmark) - set(KEYS)):
        raise ValueError(f"unknown key '{unknown[0]}' of an evaluation set; there are {', '.join(KEYS)}")
    if not benchmark.get("path"):
        raise ValueError("an evaluation set needs a path")
    entry = {**KEYS, **benchmark}
    names = read_index(entry["path"], entry["split"])[:: entry["subset"]]
    return [{**entry, "instance": name, "folder": safe_join(entry["path"], name)} for name in names]


def read_sample(sample: dict, rng: np.random.Generator | None = None) -> dict:
    """The evaluation sample of `moge.augment.prepare_evaluation`, its arrays as tensors but the image; rng: a random crop."""
    instance = read_instance(sample["folder"], sample["depth"], segmentation=sample["include_segmentation"])
    height, width = (sample[key] or side for key, side in zip(("height", "width"), instance["image"].shape))
    options = {key: sample[key] for key in ("depth_unit", "drop_max_depth", "max_segments", "min_seg_area")}
    made = prepare_evaluation(instance, width, height, **options, rng=rng)
    made = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) and k != "image" else v for k, v in made.items()}
    return made | {"has_sharp_boundary": sample["has_sharp_boundary"]}


def predictor(
    model: MoGe, resolution_level: float = 9, num_tokens: int | None = None, oracle: bool = False, half: bool = False
) -> Callable:
    """A function (image (H, W, 3) uint8, intrinsics (3, 3)) -> prediction for `compute_metrics`, with mask, as tensors on the CPU.

    oracle: the model is told the field of view; it looks at the intrinsics only then. half: 16-bit network on a GPU.
    """
    device = next(model.parameters()).device

    def run(image: np.ndarray, intrinsics: torch.Tensor) -> dict:
        batch = torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255
        fov = 2 * np.degrees(np.arctan(0.5 / float(intrinsics[0, 0]))) if oracle else None
        out = model.infer(batch, fov, resolution_level, num_tokens, apply_mask=False, use_fp16=half)
        kind = "metric" if model.version == "v2" and hasattr(model, "scale_head") else "scale_invariant"
        named = {f"points_{kind}": out["points"], f"depth_{kind}": out["depth"], "intrinsics": out["intrinsics"]}
        named |= {key: out[key] for key in ("mask", "normal") if key in out}
        return {key: value.cpu() for key, value in named.items()}

    return run


def constant_plane(image: np.ndarray, intrinsics: torch.Tensor) -> dict:
    """The guess to beat: a plane that faces the camera, seen at 60 degrees."""
    height, width = image.shape[:2]
    focal = 0.5 / np.tan(np.pi / 6)
    K = torch.tensor([[focal, 0, 0.5], [0, focal * width / height, 0.5], [0, 0, 1]], dtype=torch.float32)
    depth = torch.ones(height, width)
    return {"points_scale_invariant": depth_to_points(depth, K), "depth_scale_invariant": depth, "intrinsics": K}


def evaluate(
    predictors: dict[str, Callable],
    samples: list[dict],
    device: torch.device | str = "cpu",
    fov_augmentation: int | None = None,
    pictures: Path | None = None,
    bar: bool = False,
) -> dict[str, dict]:
    """Metrics of each predictor over the samples, which are shared out over the ranks.

    device: where the alignments are solved. fov_augmentation: seed of random crops. pictures: folder for one picture a sample.
    Returns {name: {"mean": {metric: {kind: mean over the images, NaN left out}}, "rows": [{"set", "image", "method", "metric.kind":
    value}] of all ranks in order, "seconds": mean time of a prediction}}.
    """
    mine = []
    for number in tqdm(range(dist.rank(), len(samples), dist.world_size()), desc="evaluate", unit="image", disable=not bar):
        sample = samples[number]
        dist.at(0, f"evaluate {sample['instance']}")
        rng = None if fov_augmentation is None else data.rng(fov_augmentation, number)
        gt = read_sample(sample, rng)
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in gt.items()}
        for name, run in predictors.items():
            start = time.perf_counter()
            pred = run(gt["image"], gt["intrinsics"])
            seconds = time.perf_counter() - start
            metrics, _ = compute_metrics({k: v.to(device) for k, v in pred.items()}, on_device)
            flat = {f"{metric}.{kind}": value for metric, kinds in metrics.items() for kind, value in kinds.items()}
            about = {"set": sample["name"] or Path(sample["path"]).name, "image": sample["instance"], "method": name}
            mine.append((number, about | {"seconds": seconds} | flat))
            if pictures and "mask" in pred:
                out = {kind.split("_")[0]: value.numpy() for kind, value in pred.items()}
                row = panel(gt["image"], gt["depth"].numpy(), gt["depth_mask"].numpy(), out)
                write_image(pictures / f"{about['set']}_{sample['instance'].replace('/', '_')}.jpg", row)
    rows = [row for _, row in sorted((pair for part in dist.gather(mine) for pair in part), key=lambda pair: pair[0])]
    return {name: summary([row for row in rows if row["method"] == name]) for name in predictors}


def summary(rows: list[dict]) -> dict:
    """Means of rows: {"mean": {metric: {kind: value}}, "rows", "seconds"}."""
    mean: dict[str, dict] = {}
    for tag in dict.fromkeys(tag for row in rows for tag in row if "." in tag):
        values = np.array([row[tag] for row in rows if tag in row], np.float64)
        metric, kind = tag.split(".")
        if np.isfinite(values).any():
            mean.setdefault(metric, {})[kind] = float(values[np.isfinite(values)].mean())
    return {"mean": mean, "rows": rows, "seconds": float(np.mean([row["seconds"] for row in rows])) if rows else 0.0}


def table(results: dict[str, dict]) -> str:
    """A text table: a line for each metric, a column for each method; relative errors, shares and F1 in percent, angles in degrees."""
    tags = dict.fromkeys((metric, kind) for result in results.values() for metric in result["mean"] for kind in result["mean"][metric])
    lines = [f"{'':36}" + "".join(f"{name[:18]:>20}" for name in results)]
    for metric, kind in tags:
        values = [result["mean"].get(metric, {}).get(kind, float("nan")) for result in results.values()]
        unit, factor = ("degrees", 1) if metric == "fov_x" else ("%", 100)
        lines.append(f"{f'{metric} {kind} {unit}':36}" + "".join(f"{factor * value:20.2f}" for value in values))
    return "\n".join(lines)


def load_model(path: str, device: torch.device, version: str | None = None) -> MoGe:
    """The network of a checkpoint in eval mode, ours or published; a run's latest.pt stands for its last averaged weights (plain
    ones where it keeps no average). SystemExit names what is wrong.
    """
    path = Path(path)
    try:
        if path.stem == "latest":
            own = path.with_name(f"{torch.load(path, map_location='cpu', weights_only=True)['step']:08d}.pt")
            path = own.with_stem(f"{own.stem}_ema") if own.with_stem(f"{own.stem}_ema").exists() else own
        return load(path, version).to(device)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint") from None
    except Exception as error:  # a damaged archive raises anything
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise SystemExit(text if str(path) in text else f"{path}: not a checkpoint that can be used: {text}") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", "--pretrained", help="weights, ours or published; left out: only the baseline")
    parser.add_argument("--version", choices=["v1", "v2"], help="insist on this version of the model")
    parser.add_argument("--data", help="root of a data set; or --config")
    parser.add_argument("--config", help="JSON with benchmarks {name: {path, width, height, split, ...}}, as moge/configs/eval.json")
    parser.add_argument("--split", default=KEYS["split"], help="index file of --data")
    parser.add_argument("--width", type=int, help="size that the images of --data are brought to; default: their own")
    parser.add_argument("--height", type=int)
    parser.add_argument("--depth_unit", type=float, help="metres per unit of --data: also score metric depth")
    parser.add_argument("--segmentation", action="store_true", help="also score every segment by itself")
    parser.add_argument("--sharp", action="store_true", help="also score occlusion edges")
    parser.add_argument("--resolution_level", type=float, default=9, help="0 (fast) to 9 (fine)")
    parser.add_argument("--num_tokens", type=int, help="instead of the level")
    parser.add_argument("--oracle", action="store_true", help="tell the model the true field of view")
    parser.add_argument("--fp16", action="store_true", help="half-precision network on a GPU")
    parser.add_argument("--fov_augmentation", type=int, metavar="SEED", help="random crops of half to all of the field of view")
    parser.add_argument("--baselines", action="store_true", help="also score a plane that faces the camera")
    parser.add_argument("--limit", type=int, help="only the first so many images of each set")
    parser.add_argument("--out", type=Path, help="CSV file with a row for each image and method")
    parser.add_argument("--json", "--output", type=Path, help="JSON file with the protocol and the means")
    parser.add_argument("--pictures", type=Path, help="folder for pictures: image, truth, prediction, normals, error, mask")
    args = parser.parse_args()
    if bool(args.data) == bool(args.config):
        parser.error("give either --data or --config")
    return args


def main() -> None:
    args = parse_arguments()
    device = dist.init()
    methods = {"constant plane": constant_plane} if args.baselines or not args.checkpoint else {}
    if args.checkpoint:
        model = load_model(args.checkpoint, device, args.version)
        methods[Path(args.checkpoint).stem] = predictor(model, args.resolution_level, args.num_tokens, args.oracle, args.fp16)
    own = {"path": args.data, "split": args.split, "width": args.width, "height": args.height, "depth_unit": args.depth_unit}
    own |= {"include_segmentation": args.segmentation, "has_sharp_boundary": args.sharp}
    results = {}
    try:
        sets = config.read(args.config) if args.config else {Path(args.data).name: own}
        lists = {name: list_samples(**{"name": name, **entry})[: args.limit] for name, entry in sets.items()}
        for name, samples in lists.items():
            results[name] = evaluate(methods, samples, device, args.fov_augmentation, args.pictures, dist.is_main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if dist.is_main():
        for name, result in results.items():
            print(f"\n{name}: mean of {len(lists[name])} images\n{table(result)}")
            print(", ".join(f"{method} {r['seconds']:.2f} s an image" for method, r in result.items()))
        whole = {method: over_sets([result[method]["mean"] for result in results.values()]) for method in methods}
        if len(results) > 1:
            print(f"\nmean of the {len(results)} sets\n{table(whole)}")
        report(args, sets, results, whole)
    dist.shutdown()


def over_sets(means: list[dict]) -> dict:
    """{"mean"} over the sets that have an entry."""
    tags = dict.fromkeys((metric, kind) for mean in means for metric in mean for kind in mean[metric])
    out: dict[str, dict] = {}
    for metric, kind in tags:
        out.setdefault(metric, {})[kind] = float(np.mean([mean[metric][kind] for mean in means if kind in mean.get(metric, {})]))
    return {"mean": out}


def report(args, sets: dict, results: dict, whole: dict) -> None:
    """Write what --out and --json ask for."""
    rows = [row for result in results.values() for method in result.values() for row in method["rows"]]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(tag for row in rows for tag in row)))
            writer.writeheader()
            writer.writerows(rows)
        print(f"per image: {args.out}")
    if args.json:
        protocol = (
            "alignments: weighted L1 on 64 x 64 mask-aware samples, weights 1 / depth or 1 / distance; disparity: least squares on all "
        )
        protocol += "pixels; means over images, then over sets; the mask of the model is not applied"
        told = {key: getattr(args, key) for key in ("resolution_level", "num_tokens", "oracle", "fov_augmentation", "limit")}
        content = {"protocol": protocol, "options": told, "sets": {name: {**KEYS, **entry} for name, entry in sets.items()}}
        content["results"] = {name: {method: r["mean"] for method, r in result.items()} for name, result in results.items()}
        content["mean"] = {method: r["mean"] for method, r in whole.items()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1, default=str))
        print(f"means and protocol: {args.json}")


if __name__ == "__main__":
    main()
