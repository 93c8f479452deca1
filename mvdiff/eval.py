"""Evaluate a multi-view diffusion model on rendered objects: sample all views of each and compare them with the renderings.

python mvdiff/eval.py --weights workspace/mvdiff_joint/pipeline --data data/mvdiff --num_validation_samples 32
torchrun --nproc_per_node 4 mvdiff/eval.py --weights wonder3d-v1.0 --data data/mvdiff --guidance 1 3 --out objects.csv

The figures do not depend on the batch size or the number of processes: every object has a seed of its own.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of mvdiff/

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import dist
from common.config import number
from common.data import stack
from common.io import write_image
from mvdiff.build import Frozen, check_sizes, load_frozen
from mvdiff.dataset import MultiViewDataset, finish, list_objects, split_objects
from mvdiff.metrics import foreground, foreground_iou, normal_angular_error, psnr, ssim
from mvdiff.model import ObjectNoise, decode, encode_condition, load_unet, sample, target_rows, unet_arguments
from mvdiff.pictures import grid, round_uint8
from mvdiff.unet import UNet

COLUMNS = (
    *("psnr", "psnr_unseen", "ssim", "normal_deg", "normal_median", "within_11.25", "within_22.5", "within_30"),
    *("empty_masks", "iou_color", "iou_normal", "agreement"),
)


@torch.no_grad()
def generate(
    unet: nn.Module, frozen: Frozen, image: Tensor, pixels: Tensor, camera: Tensor, seeds: list[int],
    steps: int = 50, guidance: float = 1.0, eta: float = 1.0, dtype: torch.dtype | None = None, scale: bool = True,
) -> Tensor:  # fmt: skip
    """Images (B,D,V,3,R,R) in [0,1] of B objects from input pictures image (B,3,R,R) in [-1,1] and pixels (B,3,S,S) made for
    CLIP; camera (B,D,V,10). Object i draws its noise from seeds[i]."""
    b, d, v = camera.shape[:3]
    side = image.shape[-1] // frozen.factor
    latent, embedding = encode_condition(frozen.vae, frozen.clip, image, pixels, scale=scale)
    noise = ObjectNoise(seeds, d, v, (frozen.latent_channels, side, side), image.device)
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        rows = sample(
            unet, frozen.diffusion, latent, embedding, target_rows(camera), noise(), v, steps, guidance, eta, noise
        )  # (D*B*V,4,h,w)
    images = decode(frozen.vae, rows)
    return images.view(d, b, v, *images.shape[1:]).transpose(0, 1)


def object_metrics(images: Tensor, truth: Tensor, alpha: Tensor, domains: list[str], seen: int) -> dict[str, float]:
    """Means over the views of one object: images and truth (D,V,3,R,R) in [0,1] on white, alpha (V,R,R) bool; `seen` is the view
    that was the input picture. Degrees for normals, shares in [0,1]; empty_masks counts the views whose normals cannot be judged,
    since alpha is empty; what a model does not make is left out."""
    out, masks = {}, {}
    for d, domain in enumerate(domains):
        masks[domain] = foreground(images[d])
        out[f"iou_{domain}"] = foreground_iou(masks[domain], alpha).mean().item()
    if "color" in domains:
        d = domains.index("color")
        quality = psnr(images[d], truth[d])
        unseen = [v for v in range(len(quality)) if v != seen] or [seen]
        out |= {"psnr": quality.mean().item(), "psnr_unseen": quality[unseen].mean().item()}
        out["ssim"] = ssim(images[d], truth[d]).mean().item()
    if "normal" in domains:
        d = domains.index("normal")
        errors = [normal_angular_error(*(2 * x[d, v] - 1 for x in (images, truth)), alpha[v]) for v in range(len(alpha))]
        keys = {"normal_deg": "mean", "normal_median": "median"}
        keys |= {"within_11.25": "within_11.25", "within_22.5": "within_22.5", "within_30": "within_30.0"}
        out["empty_masks"] = errors.count(None)
        out |= {name: float(np.mean([e[k] for e in errors if e])) if any(errors) else float("nan") for name, k in keys.items()}
    if len(domains) == 2:
        out["agreement"] = foreground_iou(masks["color"], masks["normal"]).mean().item()
    return out


def picture(condition: Tensor, images: Tensor, truth: Tensor | None, normals_first: list[int]) -> Tensor:
    """One object, (3,H,W) uint8: its input picture (3,R,R), then a row of views for each domain, normals first, of images
    (D,V,3,R,R), and below the same of the truth."""
    blank = torch.ones_like(condition)
    rows = [x[d] for x in (images, truth) if x is not None for d in normals_first]
    first = [condition] + [blank] * (len(rows) - 1)
    cells = torch.cat([torch.cat([c[None], row]) for c, row in zip(first, rows)])
    return round_uint8(grid(cells, 1 + images.shape[1]))


def normals_first(domains: list[str]) -> list[int]:
    """Indices of the domains, normals before colours."""
    return sorted(range(len(domains)), key=lambda d: domains[d] != "normal")


def read_objects(data: MultiViewDataset, indices: list[int], options: dict, say) -> tuple[list[int], dict, dict] | None:
    """(indices that could be read, their batch as loaded, and finished); None where none could."""
    samples, good = [], []
    for index in indices:
        try:
            samples.append(data.load(index, np.random.default_rng(0)))
            good.append(index)
        except (OSError, ValueError) as error:
            say(f"WARNING: object left out: {error}")
    if not samples:
        return None
    batch = stack(samples)
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    return good, batch, finish(tensors, **options)


def evaluate(
    unet: nn.Module, frozen: Frozen, data: MultiViewDataset, device: torch.device, options: dict, guidance: float = 1.0,
    steps: int = 50, eta: float = 1.0, seed: int = 42, batch: int = 4, dtype: torch.dtype | None = None, scale: bool = True,
    limit: int | None = None, pictures: int = 0, maker=None, say=print, bar: bool = False,
) -> dict:  # fmt: skip
    """Sample the objects of `data`, shared out over the ranks; object i has seed + i.

    Returns, on every rank, {"mean", "error" (standard error of the mean): {column: value}, "objects": a row of figures each,
    "pictures": uint8 (H,W,3) of the first `pictures` objects}. `maker` (batch, finished) -> images takes the place of the model.
    """
    rows, drawn, world = [], [], dist.world_size()
    mine = list(range(dist.rank(), min(len(data), limit or len(data)), world))
    domains = list(data.domains) if data.pred_type == "joint" else [data.pred_type]
    for at in tqdm(range(0, len(mine), batch), desc=f"sample, guidance {guidance:g}", disable=not bar):
        if (read := read_objects(data, mine[at : at + batch], options, say)) is None:
            continue
        good, loaded, done = read
        done = {key: value.to(device) for key, value in done.items()}
        dist.at(at, "sample")
        if maker is None:
            condition = done["image_cond_vae"], done["image_cond_CLIP"], done["camera_embed"]
            images = generate(unet, frozen, *condition, [seed + i for i in good], steps, guidance, eta, dtype, scale)
        else:
            images = maker(done)
        truth = (done["target_vae"] / 2 + 0.5).clamp(0, 1)
        alpha = loaded["rgba"][:, 0, ..., 3].to(device) > 127  # (B,V,R,R); the alpha of the first domain
        for i, index in enumerate(good):
            values = object_metrics(images[i], truth[i], alpha[i], domains, data.views.index(data.condition_view))
            rows.append({"index": index, "object": data.objects[index], **values})
            if index < pictures:
                shown = done["image_cond"][i].float() / 255, images[i], truth[i]
                drawn.append((index, picture(*shown, normals_first(domains)).permute(1, 2, 0).cpu().numpy()))
    first = lambda pair: pair[0]
    rows = sorted(((row["index"], row) for part in dist.gather(rows) for row in part), key=first)
    drawn = sorted((pair for part in dist.gather(drawn) for pair in part), key=first)
    return {**summary([row for _, row in rows]), "objects": [row for _, row in rows], "pictures": [image for _, image in drawn]}


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Mean and standard error over objects, of every column that they have."""
    columns = {key: np.array([row[key] for row in rows if np.isfinite(row[key])]) for key in COLUMNS if rows and key in rows[0]}
    columns = {key: values for key, values in columns.items() if len(values)}
    mean = {key: float(values.mean()) for key, values in columns.items()}
    return {"mean": mean, "error": {k: float(v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else 0.0 for k, v in columns.items()}}


def table(results: dict[str, dict]) -> str:
    """A text table of named results: mean and standard error."""
    columns = [key for key in COLUMNS if any(key in result["mean"] for result in results.values())]
    lines = [f"{'':26}" + "".join(f"{column:>16}" for column in columns)]
    for name, result in results.items():
        cells = [f"{result['mean'][k]:.3f} ± {result['error'][k]:.3f}" if k in result["mean"] else "" for k in columns]
        lines.append(f"{name:26}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def read_checkpoint(path: Path, *keys: str) -> dict:
    """A checkpoint's file that holds these keys. FileNotFoundError, or ValueError with the remedy."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path}: unreadable checkpoint: {type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(state, dict) or set(keys) - state.keys():
        raise ValueError(f"{path}: no UNet in it: give a folder, or checkpoint/{{step}}.pt of a run")
    return state


def load_generator(weights: str, unet: str | None = None, variant: str | None = None, say=print) -> tuple[UNet, dict, Frozen]:
    """(UNet in eval mode, its config, frozen networks) of a weights folder; `unet`: another folder for the UNet, or a training
    checkpoint {step}.pt, whose moving average is taken where {step}_ema.pt lies beside it."""
    frozen = load_frozen({"init": weights}, variant)
    if unet is None or Path(unet).is_dir():
        network, config = load_unet(unet or weights, variant=variant, say=say)
        return network.eval().requires_grad_(False), config, frozen
    path = Path(unet)
    state = read_checkpoint(path, "model", "config", "step")
    average = path.with_name(f"{path.stem}_ema.pt")
    if average.exists():
        state["model"] |= read_checkpoint(average, "shadows")["shadows"]
    network = UNet(**unet_arguments(state["config"]))
    network.load_state_dict(state["model"])
    say(f"{path}: {'moving average' if average.exists() else 'weights'} of step {state['step']}")
    return network.eval().requires_grad_(False), state["config"], frozen


def image_size(config: dict, frozen: Frozen, given: int | None = None) -> int:
    """Side of the images that a UNet was trained for, unless given."""
    return given or (config.get("sample_size") or 32) * frozen.factor


def has_domain_flags(config: dict) -> bool:
    """Whether a UNet's camera embedding holds the domain's flags: 10 numbers, else 6."""
    return (config.get("projection_class_embeddings_input_dim") or 10) == 10


def scales_latents(config: dict) -> bool:
    """Whether a UNet was trained with the latent of the input picture scaled, as published ones are."""
    return config.get("scale_input_latents", True)


def baseline_makers(frozen: Frozen) -> dict:
    """What needs no model: the input picture in every view, and the truth through the autoencoder, which bounds what a model
    can reach. Functions of a finished batch -> images (B,D,V,3,R,R)."""

    def repeated(done: dict) -> Tensor:
        return (done["image_cond_vae"] / 2 + 0.5)[:, None, None].expand_as(done["target_vae"])

    def autoencoded(done: dict) -> Tensor:
        images = done["target_vae"]
        rows = frozen.vae.encode(images.flatten(0, 2), 8)[0]
        return decode(frozen.vae, rows * frozen.vae.scaling_factor).view_as(images)

    return {"input in every view": repeated, "truth, autoencoded": autoencoded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="weights folder with unet/ vae/ image_encoder/ scheduler/")
    parser.add_argument("--unet", help="another UNet: a folder, or checkpoint/{step}.pt of a run")
    parser.add_argument("--variant", help="'fp16' where the files are named so")
    parser.add_argument("--data", required=True, help="folder of rendered objects")
    parser.add_argument("--object_list", help="JSON list of the objects to take")
    parser.add_argument("--num_validation_samples", type=number(int, 1), help="only the last so many, which training leaves out")
    parser.add_argument("--limit", type=number(int, 1), help="only the first so many")
    parser.add_argument("--resolution", type=number(int, 1), help="side of the images; default: that of the UNet's config")
    parser.add_argument("--condition_view", default="front")
    parser.add_argument("--domain", default="joint", choices=["joint", "color", "normal"])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--steps", type=number(int, 1), default=50)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch", type=number(int, 1), default=4, help="objects at a time")
    parser.add_argument("--amp", default="off", choices=["off", "on", "bf16", "fp16"])
    parser.add_argument("--baselines", action="store_true", help="also score the input picture, and the autoencoder alone")
    parser.add_argument("--out", help="CSV file with one row per object and guidance")
    parser.add_argument("--json", help="JSON file with the means")
    parser.add_argument("--tb", help="TensorBoard folder for the table")
    parser.add_argument("--pictures", type=int, default=0, help="draw the first so many objects into --picture_dir")
    parser.add_argument("--picture_dir", default="mvdiff_eval", help="folder for them")
    args = parser.parse_args()

    device = dist.init()
    try:
        unet, config, frozen = load_generator(args.weights, args.unet, args.variant)
        if args.domain != "joint" and unet.joint:
            raise ValueError(f"--domain {args.domain}: the network has cross-domain attention, which needs both: use joint")
        names = list_objects(args.data, args.object_list)
        if args.num_validation_samples:
            names = split_objects(names, args.num_validation_samples, validation=True)
        size = image_size(config, frozen, args.resolution)
        check_sizes(frozen, size, args.steps)
        shape = {"resolution": size, "clip_size": frozen.clip.image_size, "condition_view": args.condition_view}
        shape |= {"pred_type": args.domain, "domains": ("normal", "color"), "bg_color": "white"}
        data = MultiViewDataset(args.data, names, unet.num_views, **shape)
        for path in filter(None, (args.out, args.json)):  # known to be writable before the hours of sampling
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    dtype = dist.autocast_dtype(args.amp, device)
    unet, frozen = unet.to(device), frozen.to(device, dtype)
    options = {"camera_flags": has_domain_flags(config)}
    shared = {"device": device, "options": options, "batch": args.batch, "limit": args.limit, "bar": dist.is_main()}
    shared["scale"] = scales_latents(config)
    runs = {name: {"maker": maker} for name, maker in baseline_makers(frozen).items()} if args.baselines else {}
    sampler = {"steps": args.steps, "eta": args.eta, "seed": args.seed, "dtype": dtype, "pictures": args.pictures}
    runs |= {f"guidance {g:g}": {"guidance": g, **sampler} for g in args.guidance}
    results = {}
    for name, run in runs.items():
        results[name] = evaluate(unet, frozen, data, **shared, **run)
        if not results[name]["objects"]:
            raise SystemExit(f"error: {args.data}: not one of {min(len(data), args.limit or len(data))} objects could be read")
        if results[name]["pictures"] and dist.is_main():
            write_image(Path(args.picture_dir) / f"{name.replace(' ', '_')}.png", np.concatenate(results[name]["pictures"]))
    if dist.is_main():
        print(table(results))
        count = len(results[name]["objects"])
        print(f"{count} objects, {unet.num_views} views of {size} x {size}, {args.steps} steps, eta {args.eta:g}, seed {args.seed}")
        if args.out:
            with open(args.out, "w", newline="") as file:
                writer = csv.DictWriter(file, ["run", "index", "object", *COLUMNS], restval="")
                writer.writeheader()
                writer.writerows({"run": name, **row} for name, result in results.items() for row in result["objects"])
            print(f"per object: {args.out}")
        if args.json:
            Path(args.json).write_text(json.dumps({k: {"mean": r["mean"], "error": r["error"]} for k, r in results.items()}, indent=1))
        if args.tb:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            with SummaryWriter(args.tb) as board:
                board.add_text("evaluation", "    " + table(results).replace("\n", "\n    "))  # indented: kept as it is
    dist.shutdown()


if __name__ == "__main__":
    main()
