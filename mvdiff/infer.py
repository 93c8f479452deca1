"""Colour and normal views of the object in a picture: writes a PNG for every view and domain, and a grid.

python mvdiff/infer.py --weights workspace/mvdiff_joint/pipeline --image owl.png --out views
python mvdiff/infer.py --weights wonder3d-v1.0 --image pictures --out views --guidance 3 --steps 50      # every picture of a folder

The picture needs an alpha channel that cuts the object out (--assume_foreground takes it as it is). Written are, for each picture,
OUT/<name>/rgb_000_<view>.png and normals_000_<view>.png, RGBA, normals in the axes of the picture's camera, and OUT/<name>/grid.png.
Their alpha is where the sampled normal map differs from its background. --published_folders writes them as the published sampler
does, for its mesh step: OUT/cropsize-<size>-cfg<guidance>/<name>/ with normals/ (RGB) and masked_colors/ (RGBA) in it.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of mvdiff/

import numpy as np
import torch
from PIL import Image

from common import dist
from common.config import number
from mvdiff.build import check_sizes
from mvdiff.camera import camera_angles, sampler_angles, view_names
from mvdiff.clip import preprocess_pil, to_uint8
from mvdiff.dataset import FILES, camera_embedding
from mvdiff.eval import generate, has_domain_flags, image_size, load_generator, picture, scales_latents
from mvdiff.metrics import foreground
from mvdiff.pictures import background_color, picture_names, prepare_input, round_uint8

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DOMAINS = ("normal", "color")


def list_pictures(path: Path) -> list[Path]:
    """The picture, or every picture of a folder. FileNotFoundError where there is none."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"{path}: no such picture" if not path.is_dir() else f"{path}: no {', '.join(SUFFIXES)} in it")
    return files


def write_views(
    folder: Path, condition: torch.Tensor, images: torch.Tensor, views: tuple[str, ...], background: np.ndarray, published: bool = False
) -> None:  # fmt: skip
    """Write images (2,V,3,R,R) in [0,1], normals first, of the input picture condition (3,R,R), as RGBA; `published`: as RGB too,
    and in the published sampler's folders."""
    masked = {"normal": folder, "color": folder / "masked_colors" if published else folder}
    plain = {"normal": folder / "normals", "color": folder} if published else {}
    for place in (*masked.values(), *plain.values()):
        place.mkdir(parents=True, exist_ok=True)
    alpha = foreground(images[0], torch.from_numpy(background).to(images.device))  # (V,R,R)
    for d, domain in enumerate(DOMAINS):
        for v, view in enumerate(views):
            rgba = torch.cat([round_uint8(images[d, v]), alpha[v][None].to(torch.uint8) * 255])
            shown, name = Image.fromarray(rgba.permute(1, 2, 0).cpu().numpy()), f"{FILES[domain]}_000_{view}.png"
            shown.save(masked[domain] / name)
            if published:
                shown.convert("RGB").save(plain[domain] / name)
    grid = picture(condition, images, None, [0, 1]).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(grid).save(folder / "grid.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="weights folder with unet/ vae/ image_encoder/ scheduler/")
    parser.add_argument("--unet", help="another UNet: a folder, or checkpoint/{step}.pt of a run")
    parser.add_argument("--variant", help="'fp16' where the files are named so")
    parser.add_argument("--image", required=True, type=Path, help="picture with alpha, or a folder of them")
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    parser.add_argument("--resolution", type=number(int, 1), help="side of the images; default: that of the UNet's config")
    parser.add_argument("--crop_size", type=int, help="pixels to frame the object to; default: 3/4 of the side; -1: as it is")
    inclusive = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--crop_inclusive", **inclusive, help="keep the box's last row and column; the published sampler does not")
    parser.add_argument("--quantise", action="store_true", help="round the input down to 8 bits, as the published sampler does")
    parser.add_argument("--bg_color", default="white", help="white, gray, black or a number in [0,1]")
    parser.add_argument("--assume_foreground", action="store_true", help="accept pictures without alpha")
    parser.add_argument("--sampler_cameras", action="store_true", help="the published sampler's rounded camera table")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=number(int, 1), default=50)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--published_folders", action="store_true", help="write the published sampler's folders")
    parser.add_argument("--batch", type=number(int, 1), default=4, help="pictures at a time; the result does not depend on it")
    parser.add_argument("--amp", default="on", choices=["off", "on", "bf16", "fp16"], help="on a GPU only")
    args = parser.parse_args()

    device = dist.init()
    try:
        unet, config, frozen = load_generator(args.weights, args.unet, args.variant)
        size, files, inputs = image_size(config, frozen, args.resolution), list_pictures(args.image), []
        check_sizes(frozen, size, args.steps)
        crop = args.crop_size if args.crop_size is not None else round(0.75 * size)
        for file in files:
            try:
                with Image.open(file) as image:
                    rgb = prepare_input(image, size, crop, args.bg_color, args.crop_inclusive, args.assume_foreground)[0]
                inputs.append(to_uint8(torch.from_numpy(rgb)).numpy() / np.float32(255) if args.quantise else rgb)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{file}: {error}") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    dtype = dist.autocast_dtype(args.amp, device) if device.type == "cuda" else None
    unet, frozen, views = unet.to(device), frozen.to(device, dtype), view_names(unet.num_views)
    angles = sampler_angles(len(views)) if args.sampler_cameras else camera_angles("front", views)
    camera = camera_embedding(torch.from_numpy(angles)[None], torch.tensor([[1, 0]]), has_domain_flags(config)).to(device)  # (1,2,V,10)
    out, names = args.out, picture_names(files)
    if args.published_folders:
        out = out / f"cropsize-{crop}-cfg{args.guidance:.1f}"
    for at in range(0, len(files), args.batch):
        rgb = inputs[at : at + args.batch]
        pixels = [preprocess_pil((x.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8), frozen.clip.image_size) for x in rgb]
        image, pixels = (torch.from_numpy(np.stack(x)).to(device) for x in (rgb, pixels))
        seeds = [args.seed + at + i for i in range(len(rgb))]
        cameras = camera.expand(len(rgb), -1, -1, -1)
        sampler = (args.steps, args.guidance, args.eta, dtype, scales_latents(config))
        images = generate(unet, frozen, image * 2 - 1, pixels, cameras, seeds, *sampler)
        for i, shown in enumerate(images):
            folder = out / names[at + i]
            write_views(folder, image[i], shown, views, background_color(args.bg_color), args.published_folders)
            print(f"{folder}: {2 * len(views)} views of {size} x {size}, and grid.png", flush=True)
    dist.shutdown()


if __name__ == "__main__":
    main()
