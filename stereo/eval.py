"""Evaluate a FoundationStereo checkpoint on folders of stereo pairs with ground truth, in any of the known forms.

python stereo/eval.py --checkpoint model_best_bp2.pth --data data/middlebury --dataset middlebury --baselines --out pairs.csv
torchrun --nproc_per_node 4 stereo/eval.py --checkpoint model_best_bp2.pth --data data/kitti_2015 --dataset kitti15
"""

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of stereo/

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import config, dist
from common.checkpoint import apply_weights, load_weights
from stereo import baselines
from stereo.formats import LISTS, Pair, list_pairs, read_disparity, read_mask, read_views
from stereo.metrics import NAMES, DisparityMetrics, error_table, means
from stereo.model import FoundationStereo, hierarchical, predict
from stereo.weights import model_options, stored_config

# dataset: (form of the folder, mask of the usual protocol, its number). sceneflow counts truth below 192 px only
PROTOCOLS = {kind: (kind, "all", "epe") for kind in ("auto", *LISTS)}
PROTOCOLS |= {
    "middlebury": ("middlebury", "noc", "bp2"),
    "eth3d": ("eth3d", "noc", "bp1"),
    "kitti12": ("kitti", "all", "d1_kitti"),
}
PROTOCOLS |= {"kitti15": ("kitti", "all", "d1_kitti")}
COLUMNS = ("epe", "bp1", "bp2", "bp3", "d1_kitti", "rmse")


def predictor(
    model: FoundationStereo,
    device: torch.device,
    iters: int = 32,
    hiera: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    x_offset: int = 0,
):
    """A function (left, right: (H, W, 3) uint8 RGB) -> disparity (H, W) float32 px of the given images.

    hiera: coarse to fine, for large images. scale: shrink the images first. x_offset: pixels by which disparities may be negative
    (the right view is moved by so much beforehand).
    """

    @torch.inference_mode()
    def run(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        right = cv2.copyMakeBorder(right, 0, 0, 0, x_offset, cv2.BORDER_REPLICATE)[:, x_offset:] if x_offset else right
        views = [torch.from_numpy(v.transpose(2, 0, 1)[None].astype(np.float32, order="C")).to(device) for v in (left, right)]
        size = views[0].shape[-2:]
        if scale != 1:
            small = [max(32, round(side * scale)) for side in size]
            views = [F.interpolate(v, small, mode="bilinear", antialias=True) for v in views]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            disp = hierarchical(model, *views, iters, pad_fix=True) if hiera else predict(model, *views, iters)
        if scale != 1:
            disp = F.interpolate(disp.float(), size, mode="bilinear") * (size[1] / small[1])
        return disp[0, 0].float().cpu().numpy() - x_offset

    return run


def read_truth(pair: Pair, shape: tuple[int, ...], mask_kind: str, max_disparity: float) -> tuple[np.ndarray, np.ndarray]:
    """(truth (H, W), mask (H, W)) of a pair: known, below max_disparity, and with "noc" non-occluded where the set tells."""
    truth = read_disparity(pair.disparity, pair.codec, pair.hidden)
    if truth.shape != shape[:2]:
        raise ValueError(f"{pair.disparity}: {truth.shape[1]}x{truth.shape[0]}, but the images are {shape[1]}x{shape[0]}")
    mask = (truth > 0) & (truth < max_disparity)
    noc = read_mask(pair) if mask_kind == "noc" else None
    return truth, mask if noc is None else mask & noc


def evaluate(
    predictors: dict,
    pairs: list[Pair],
    mask_kind: str = "all",
    max_disparity: float = np.inf,
    bar: bool = False,
    step: int | None = None,
) -> dict[str, dict]:
    """Metrics of each predictor over the pairs, which are shared out over the ranks.

    predictors: {name: function(left, right, truth, mask) -> disparity (H, W)}. Returns {name: {"per_image": {...}, "per_pixel":
    {...}, "count": {...}, "rows": this rank's rows, "seconds": mean time, "bad": {name of a pair that cannot be read: reason}}}.
    step: of a training run, for its watch on hangs.
    """
    metrics = {name: DisparityMetrics() for name in predictors}
    rows, seconds, bad = {name: [] for name in predictors}, dict.fromkeys(predictors, 0.0), {}
    for pair in tqdm(pairs[dist.rank() :: dist.world_size()], desc="evaluate", unit="pair", disable=not bar):
        if step is not None or dist.world_size() > 1:  # one rank alone waits for nobody, however long an image takes
            dist.at(step or 0, f"evaluate {pair.name}")
        try:
            left, right = read_views(pair)
            truth, mask = read_truth(pair, left.shape, mask_kind, max_disparity)
        except (ValueError, OSError) as error:
            bad[pair.name] = str(error)
            continue
        for name, run in predictors.items():
            start = time.perf_counter()
            pred = run(left, right, truth, mask)
            seconds[name] += time.perf_counter() - start
            maps = [torch.from_numpy(np.ascontiguousarray(m))[None] for m in (pred, truth, mask)]
            metrics[name].update(*maps)
            sums, count = error_table(*maps)
            values = dict(zip(NAMES, means(sums, count)[0].tolist()))
            rows[name].append({"pair": pair.name, "method": name, "pixels": int(count)} | values)
    out, bad = {}, {name: reason for part in dist.gather(bad) for name, reason in part.items()}
    for name, own in metrics.items():
        flat = own.state.flatten()
        total = dist.all_sum({f"{i:03d}": flat[i] for i in range(len(flat))} | {"seconds": seconds[name]})
        own.state = torch.tensor([total[f"{i:03d}"] for i in range(len(flat))], dtype=torch.float64).view_as(own.state)
        out[name] = own.compute() | {"rows": rows[name], "seconds": total["seconds"] / max(1, len(pairs) - len(bad)), "bad": bad}
    return out


def load_model(path: str, device: torch.device, **overrides) -> FoundationStereo:
    """The network of a checkpoint in eval mode: ours, or a published one, shaped by its tensors and the cfg.yaml beside it.

    A run's latest.pt stands for its last averaged weights (plain ones where it keeps no average). SystemExit names what is wrong.
    """
    path = Path(path)
    try:
        if path.stem == "latest":
            own = path.with_name(f"{torch.load(path, map_location='cpu', weights_only=True)['step']:08d}.pt")
            path = own.with_stem(f"{own.stem}_ema") if own.with_stem(f"{own.stem}_ema").exists() else own
        state = load_weights(path)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except Exception as error:  # a damaged archive raises anything
        raise SystemExit(f"{path}: not a checkpoint of tensors ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    try:
        options, notes = model_options(stored_config(path), state)
        model = FoundationStereo(**options | overrides)
        apply_weights(model, state)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from None
    for note in notes:
        print(note, file=sys.stderr)
    return model.to(device).eval()


def table(results: dict[str, dict], mean: str = "per_image") -> str:
    """A text table of the means of named results."""
    lines = [f"{'':28}" + "".join(f"{column:>10}" for column in COLUMNS)]
    for name, result in results.items():
        lines.append(f"{name[:28]:28}" + "".join(f"{result[mean][column]:10.3f}" for column in COLUMNS))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", help="weights: ours ({step}.pt, {step}_ema.pt) or published; left out: only the baselines"
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of pairs")
    parser.add_argument("--dataset", default="auto", choices=sorted(PROTOCOLS), help="form of the folder, protocol of the set")
    parser.add_argument("--codec", default="", help="how the disparities are coded, where it is not the form's own way")
    parser.add_argument(
        "--mask", choices=["all", "noc"], help="noc: non-occluded pixels where the set tells; default: its protocol"
    )
    parser.add_argument(
        "--max_disparity", type=config.number(float, 1), help="count truth below this only; default: 192 for sceneflow, else all"
    )
    parser.add_argument("--iters", type=config.number(int, 1), default=32, help="recurrent iterations")
    parser.add_argument("--hiera", type=int, default=0, help="1: coarse to fine, for large images")
    parser.add_argument(
        "--scale", type=config.number(float, 0.01), default=1.0, help="shrink the images first; disparities are brought back"
    )
    parser.add_argument("--max_disp", type=int, help="range of the cost volume, where it shall differ from the checkpoint's")
    parser.add_argument("--low_memory", type=int, default=0, help="1: volume in 16 bit, correlation recomputed")
    parser.add_argument("--amp", default="off", choices=["off", "on", "bf16", "fp16"])
    parser.add_argument("--baselines", action="store_true", help="also the best constant and OpenCV's SGBM (told the true range)")
    parser.add_argument("--limit", type=config.number(int, 1), help="only the first so many pairs")
    parser.add_argument("--out", type=Path, help="CSV file with a row for each pair and method")
    parser.add_argument("--exclude", type=Path, help="write the names of bad training pairs here, for `exclude` of a data set")
    parser.add_argument("--exclude_above", type=float, default=60.0, help="a pair is bad above this bp2")
    args = parser.parse_args()

    device = dist.init()
    form, mask_kind, number = PROTOCOLS[args.dataset]
    mask_kind = args.mask or mask_kind
    max_disparity = args.max_disparity or (192 if args.dataset == "sceneflow" else np.inf)
    methods, dtype = {}, dist.autocast_dtype(args.amp, device)
    try:
        for path in [path for path in (args.out, args.exclude) if path]:  # before the work, not after it
            path.parent.mkdir(parents=True, exist_ok=True)
            open(path, "a").close()
        split = "test" if args.dataset == "sceneflow" else "all"
        pairs = list_pairs(args.data, form, args.codec, split=split)[: args.limit]
        unmasked = sum(pair.mask is None for pair in pairs) if mask_kind == "noc" else 0
        if args.mask == "noc" and unmasked == len(pairs):
            raise ValueError(f"{args.data}: no pair has a mask of its non-occluded pixels: --mask all")
        if args.baselines or not args.checkpoint:
            methods["best constant"] = lambda left, right, truth, mask: baselines.constant(truth, mask)
            methods["SGBM (OpenCV)"] = lambda left, right, truth, mask: baselines.sgbm(
                left, right, truth[mask].max(initial=16) + 1
            )
        if args.checkpoint:
            overrides = {"low_memory": bool(args.low_memory)} | ({"max_disp": args.max_disp} if args.max_disp else {})
            model = load_model(args.checkpoint, device, **overrides)
            run = predictor(model, device, args.iters, bool(args.hiera), args.scale, dtype)
            methods[Path(args.checkpoint).stem] = lambda left, right, truth, mask: run(left, right)
        results = evaluate(methods, pairs, mask_kind, max_disparity, dist.is_main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    unread = results[next(iter(methods))]["bad"]
    rows = [row for name in methods for part in dist.gather(results[name]["rows"]) for row in part]
    if dist.is_main():
        for row in rows[:100]:
            values = "  ".join(f"{column} {row[column]:.3f}" for column in COLUMNS)
            print(f"{row['pair'][:40]:40} {row['method'][:20]:20} {values}")
        images = results[next(iter(methods))]["count"]["images"]
        print(f"\nmean of the images ({images} with ground truth)\n{table(results)}")
        print(f"\nall pixels together\n{table(results, 'per_pixel')}")
        lacking = f" ({unmasked} of {len(pairs)} pairs have none: all their pixels count)" if unmasked else ""
        used = f"mask {mask_kind}{lacking}, truth below {max_disparity:g} px; the usual number of this set is {number}"
        print(f"\n{used}; " + ", ".join(f"{name} {result['seconds']:.2f} s a pair" for name, result in results.items()))
        if args.out:
            with open(args.out, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=["pair", "method", "pixels", *NAMES])
                writer.writeheader()
                writer.writerows(rows)
            print(f"per pair: {args.out}")
        if args.exclude:
            bad = [row["pair"] for row in rows if row["method"] == list(methods)[-1] and not row["bp2"] <= args.exclude_above]
            bad += unread
            args.exclude.write_text("".join(f"{name}\n" for name in bad))
            print(f"{len(bad)} of {len(pairs)} pairs cannot be read or have bp2 above {args.exclude_above:g}: {args.exclude}")
        if unread:
            print("\n".join([*unread.values(), f"{len(unread)} of {len(pairs)} pairs could not be read and are left out"]))
    dist.shutdown()
    sys.exit(int(bool(unread)))


if __name__ == "__main__":
    main()
