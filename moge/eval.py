"""Evaluate a MoGe checkpoint on data in the MoGe format: depth, points and camera under the alignments of the published protocol.

python moge/eval.py --checkpoint model.pt --data data/my_set --split .val.txt --baselines --out images.csv
torchrun --nproc_per_node 4 moge/eval.py --checkpoint model.pt --config moge/configs/eval.json --json results.json
"""

import argparse
import csv
import importlib.util
import json
import math
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
IGNORED = ("include_normal", "depth_to_normal", "depth_interpolation")  # of published configs, without effect there as well
NO_DEPTH = "no depth"


def list_samples(benchmark: dict) -> list[dict]:
    """The images of a benchmark (KEYS) in the order of its index: the benchmark's entries and "instance", "folder", "number".
    ValueError or OSError where an entry or the index is wrong.
    """
    if not isinstance(benchmark, dict) or not benchmark.get("path"):
        raise ValueError(f"an evaluation set is keys and values and needs a path; it is {benchmark!r}")
    entry = {key: value for key, value in {**KEYS, **benchmark}.items() if key not in IGNORED}
    if unknown := sorted(set(entry) - set(KEYS)):
        raise ValueError(f"unknown key '{unknown[0]}' of an evaluation set; there are {', '.join(KEYS)}")
    for key, low in (("width", 14), ("height", 14), ("subset", 1), ("max_segments", 1), ("min_seg_area", 1)):
        if entry[key] != KEYS[key] and not (type(entry[key]) is int and entry[key] >= low):
            raise ValueError(f"evaluation set {entry['path']}: {key} must be a whole number from {low} on, not {entry[key]!r}")
    for key in ("depth_unit", "drop_max_depth"):
        if entry[key] != KEYS[key] and not (type(entry[key]) in (int, float) and 0 < entry[key] < math.inf):
            raise ValueError(f"evaluation set {entry['path']}: {key} must be a number above 0, not {entry[key]!r}")
    names = read_index(entry["path"], entry["split"])[:: entry["subset"]]
    return [{**entry, "instance": name, "folder": safe_join(entry["path"], name), "number": i} for i, name in enumerate(names)]


def read_sample(sample: dict, rng: np.random.Generator | None = None) -> dict:
    """The evaluation sample of `moge.augment.prepare_evaluation`, its arrays as tensors but the image; rng: a random crop."""
    instance = read_instance(sample["folder"], sample["depth"], segmentation=sample["include_segmentation"])
    height, width = (sample[key] or side for key, side in zip(("height", "width"), instance["image"].shape))
    options = {key: sample[key] for key in ("depth_unit", "drop_max_depth", "max_segments", "min_seg_area")}
    made = prepare_evaluation(instance, width, height, **options, rng=rng)
    made = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) and k != "image" else v for k, v in made.items()}
    return made | {"has_sharp_boundary": sample["has_sharp_boundary"]}


def write_arrays(path: Path, values: dict) -> None:
    """The tensors and arrays among the values, as a .npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{k: np.asarray(v) for k, v in values.items() if isinstance(v, np.ndarray | torch.Tensor)})


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


def load_baseline(path: str, oracle: bool) -> Callable:
    """The predictor of a Python file of the user's: its class `Baseline`, made without arguments, is called with the image (H, W, 3)
    uint8 and the intrinsics, None without `oracle`, and returns tensors on the CPU under the names of `moge.metrics`.
    """
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise SystemExit(f"--baseline {path}: no such Python file")
    spec = importlib.util.spec_from_file_location("baseline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "Baseline"):
        raise SystemExit(f"--baseline {path}: there is no class Baseline in it")
    baseline = module.Baseline()
    return lambda image, intrinsics: baseline(image, intrinsics if oracle else None)


def evaluate(
    predictors: dict[str, Callable],
    samples: list[dict],
    device: torch.device | str = "cpu",
    fov_augmentation: int | None = None,
    pictures: Path | None = None,
    dump_pred: Path | None = None,
    dump_gt: Path | None = None,
    bar: tqdm | None = None,
) -> list[dict]:
    """Metrics of each predictor for each of the samples, which are shared out over the ranks.

    device: where the alignments are solved. fov_augmentation: seed of random crops. pictures: folder for one picture a sample;
    dump_pred, dump_gt: for SET/IMAGE/METHOD.npz and gt.npz. Returns the rows {"set", "image", "method", "seconds", "metric.kind":
    value} of all ranks in order; of an image that cannot be read (then also said on stderr) or has no depth, "left_out": why.
    """
    mine = []
    for at in range(dist.rank(), len(samples), dist.world_size()):
        sample = samples[at]
        dist.at(0, f"evaluate {sample['instance']}")
        about, left_out = {"set": sample["name"] or Path(sample["path"]).name, "image": sample["instance"]}, None
        if bar is not None:
            bar.update(min(dist.world_size(), len(samples) - at))
        try:
            gt = read_sample(sample, None if fov_augmentation is None else data.rng(fov_augmentation, sample["number"]))
            left_out = None if gt["has_depth"] else NO_DEPTH
        except (OSError, ValueError) as error:
            left_out = str(error)
            tqdm.write(f"left out: {error}", file=sys.stderr)
        if left_out:
            mine += [(at, {**about, "method": name, "left_out": left_out}) for name in predictors]
            continue
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in gt.items()}
        if dump_gt:
            write_arrays(dump_gt / about["set"] / about["image"] / "gt.npz", gt)
        for name, run in predictors.items():
            start = time.perf_counter()
            pred = run(gt["image"], gt["intrinsics"])
            seconds = time.perf_counter() - start
            metrics, _ = compute_metrics({k: v.to(device) for k, v in pred.items()}, on_device)
            flat = {f"{metric}.{kind}": value for metric, kinds in metrics.items() for kind, value in kinds.items()}
            mine.append((at, {**about, "method": name, "seconds": seconds} | flat))
            if dump_pred:
                write_arrays(dump_pred / about["set"] / about["image"] / f"{name}.npz", pred)
            if pictures and "mask" in pred:
                out = {kind.split("_")[0]: value.numpy() for kind, value in pred.items()}
                row = panel(gt["image"], gt["depth"].numpy(), gt["depth_mask"].numpy(), out)
                write_image(pictures / f"{about['set']}_{sample['instance'].replace('/', '_')}.jpg", row)
    return [row for _, row in sorted((pair for part in dist.gather(mine) for pair in part), key=lambda pair: pair[0])]


def summary(rows: list[dict], method: str) -> dict:
    """Of a method's rows: {"mean": {metric: {kind: mean over the images, NaN left out}}, "images": {metric: {kind: how many}},
    "seconds": mean time of a prediction}.
    """
    rows = [row for row in rows if row["method"] == method and "left_out" not in row]
    mean: dict[str, dict] = {}
    images: dict[str, dict] = {}
    for tag in dict.fromkeys(tag for row in rows for tag in row if "." in tag):
        values = np.array([row[tag] for row in rows if tag in row], np.float64)
        metric, kind = tag.split(".")
        if known := int((~np.isnan(values)).sum()):
            mean.setdefault(metric, {})[kind] = float(np.nanmean(values))
            images.setdefault(metric, {})[kind] = known
    return {"mean": mean, "images": images, "seconds": float(np.mean([row["seconds"] for row in rows])) if rows else 0.0}


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


def device_of(text: str | None) -> torch.device:
    """This rank's device, a GPU where there is one, or the one that `--device` names; SystemExit where there is none such."""
    own = dist.init()
    try:
        return torch.empty(0, device=text).device if text else own
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {text}: {str(error).splitlines()[0]}") from None


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with the options of a model that `eval.py` and `infer.py` share."""
    parser.add_argument("--version", choices=["v1", "v2"], help="insist on this version of the model")
    parser.add_argument("--resolution_level", type=float, default=9, help="0 (fast) to 9 (fine)")
    parser.add_argument("--num_tokens", type=int, help="instead of the level")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU where there is one")
    args = parser.parse_args()
    if not 0 <= args.resolution_level <= 9:
        parser.error("--resolution_level goes from 0 to 9")
    if args.num_tokens is not None and args.num_tokens < 4:
        parser.error("--num_tokens must be at least 4")
    return args


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", "--pretrained", help="weights, ours or published; left out: only the baseline")
    parser.add_argument("--data", help="root of a data set; or --config")
    parser.add_argument("--config", help="JSON with benchmarks {name: {path, width, height, split, ...}}, as moge/configs/eval.json")
    parser.add_argument("--split", default=KEYS["split"], help="index file of --data")
    parser.add_argument("--width", type=int, help="size that the images of --data are brought to; default: their own")
    parser.add_argument("--height", type=int)
    parser.add_argument("--depth_unit", type=float, help="metres per unit of --data: also score metric depth")
    parser.add_argument("--segmentation", action="store_true", help="also score every segment by itself")
    parser.add_argument("--sharp", action="store_true", help="also score occlusion edges")
    parser.add_argument("--oracle", action="store_true", help="tell the model the true field of view")
    parser.add_argument("--fp16", action="store_true", help="half-precision network on a GPU")
    parser.add_argument("--fov_augmentation", type=int, metavar="SEED", help="random crops of half to all of the field of view")
    parser.add_argument("--baselines", action="store_true", help="also score a plane that faces the camera")
    parser.add_argument("--baseline", metavar="FILE.py", help="also score the class Baseline of this file")
    parser.add_argument("--limit", type=int, help="only the first so many images of each set")
    parser.add_argument("--out", type=Path, help="CSV file with a row for each image and method")
    parser.add_argument("--json", "--output", type=Path, help="JSON file with the protocol and the means, renewed every 100 images")
    parser.add_argument("--dump_pred", action="store_true", help="also write the predictions: JSON/SET/IMAGE/METHOD.npz")
    parser.add_argument("--dump_gt", action="store_true", help="also write the truth: JSON/SET/IMAGE/gt.npz")
    parser.add_argument("--pictures", type=Path, help="folder for pictures: image, truth, prediction, normals, error, mask")
    args = parse(parser)
    if bool(args.data) == bool(args.config):
        parser.error("give either --data or --config")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if (args.dump_pred or args.dump_gt) and not args.json:
        parser.error("--dump_pred and --dump_gt write beside the file of --json")
    return args


def main() -> None:
    args = parse_arguments()
    device = device_of(args.device)
    methods = {"constant plane": constant_plane} if args.baselines or not (args.checkpoint or args.baseline) else {}
    if args.baseline:
        methods[Path(args.baseline).stem] = load_baseline(args.baseline, args.oracle)
    if args.checkpoint:
        model = load_model(args.checkpoint, device, args.version)
        methods[Path(args.checkpoint).stem] = predictor(model, args.resolution_level, args.num_tokens, args.oracle, args.fp16)
    own = {"path": args.data, "split": args.split, "width": args.width, "height": args.height, "depth_unit": args.depth_unit}
    own |= {"include_segmentation": args.segmentation, "has_sharp_boundary": args.sharp}
    dumps = [args.json.with_suffix("") if wanted else None for wanted in (args.dump_pred, args.dump_gt)]
    rows, part = {}, 100 * dist.world_size()
    try:
        sets = config.read(args.config) if args.config else {Path(args.data).name: own}
        if not sets:
            raise ValueError(f"{args.config} names no evaluation set: {{NAME: {{path, ...}}}} is expected")
        sets = {name: {"name": name, **entry} if isinstance(entry, dict) else entry for name, entry in sets.items()}
        lists = {name: list_samples(entry)[: args.limit] for name, entry in sets.items()}
        for name, samples in lists.items():
            rows[name] = []
            with tqdm(total=len(samples), desc=name, unit="image", disable=not dist.is_main()) as bar:
                for first in range(0, len(samples), part):
                    chunk = samples[first : first + part]
                    rows[name] += evaluate(methods, chunk, device, args.fov_augmentation, args.pictures, *dumps, bar)
                    if dist.is_main():
                        report(args, sets, rows, list(methods))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    results = {name: {method: summary(found, method) for method in methods} for name, found in rows.items()}
    unreadable = 0
    for name, result in results.items():
        reasons = left_out(rows[name])
        without = sum(reason == NO_DEPTH for reason in reasons.values())
        unreadable += len(reasons) - without
        if dist.is_main():
            text = f"; left out: {without} without depth, {len(reasons) - without} unreadable" * bool(reasons)
            print(f"\n{name}: mean of {len(lists[name]) - len(reasons)} images{text}\n{table(result)}")
            print(", ".join(f"{method} {r['seconds']:.2f} s an image" for method, r in result.items()))
    if dist.is_main():
        if len(results) > 1:
            print(f"\nmean of the {len(results)} sets\n{table(over_sets(results))}")
        for kind, path in (("per image", args.out), ("means and protocol", args.json)):
            print(f"{kind}: {path}\n" * bool(path), end="")
    dist.shutdown()
    sys.exit(int(unreadable > 0))


def left_out(rows: list[dict]) -> dict[str, str]:
    """{image: why} of those that could not be scored."""
    return {row["image"]: row["left_out"] for row in rows if "left_out" in row}


def over_sets(results: dict[str, dict]) -> dict[str, dict]:
    """{method: {"mean"}} over the sets {name: {method: {"mean"}}} that have an entry."""
    out: dict[str, dict] = {}
    for method in next(iter(results.values())):
        means = [result[method]["mean"] for result in results.values()]
        out[method] = {"mean": {}}
        for metric, kind in dict.fromkeys((m, k) for mean in means for m in mean for k in mean[m]):
            values = [mean[metric][kind] for mean in means if kind in mean.get(metric, {})]
            out[method]["mean"].setdefault(metric, {})[kind] = float(np.mean(values))
    return out


def report(args, sets: dict, rows: dict[str, list[dict]], methods: list[str]) -> None:
    """Write what --out and --json ask for, of the rows so far."""
    if args.out:
        flat = [row for found in rows.values() for row in found]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(tag for row in flat for tag in row)))
            writer.writeheader()
            writer.writerows(flat)
    if args.json:
        results = {name: {method: summary(found, method) for method in methods} for name, found in rows.items()}
        protocol = (
            "alignments: weighted L1 on 64 x 64 mask-aware samples, weights 1 / depth or 1 / distance; disparity: least squares on all "
        )
        protocol += "pixels; means over images, then over sets; the mask of the model is not applied"
        told = {key: getattr(args, key) for key in ("resolution_level", "num_tokens", "oracle", "fov_augmentation", "limit")}
        content = {"protocol": protocol, "options": told, "sets": {name: {**KEYS, **entry} for name, entry in sets.items()}}
        for key, what in (("results", "mean"), ("images", "images")):
            content[key] = {name: {method: r[what] for method, r in result.items()} for name, result in results.items()}
        content["left_out"] = {name: left_out(found) for name, found in rows.items()}
        content["mean"] = {method: r["mean"] for method, r in over_sets(results).items()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1, default=str))


if __name__ == "__main__":
    main()
