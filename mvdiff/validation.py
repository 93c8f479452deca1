"""Sampling during training: figures and grids of validation objects, grids for every picture of a folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import dist
from common.log import Logger
from mvdiff.build import Frozen, domains_of
from mvdiff.camera import camera_angles, view_names
from mvdiff.clip import preprocess_pil
from mvdiff.dataset import camera_embedding
from mvdiff.eval import evaluate, generate, normals_first, picture
from mvdiff.pictures import picture_names, prepare_input

PICTURES = (".jpg", ".jpeg", ".png", ".bmp")


def input_pictures(cfg) -> list[tuple[str, np.ndarray]]:
    """(name, (3,R,R) in [0,1] on white) of every picture in `validation_dir`."""
    if not cfg.validation_dir:
        return []
    folder, out = Path(cfg.validation_dir), []
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not files:
        raise FileNotFoundError(f"validation_dir {folder}: no {', '.join(PICTURES)} in it")
    for path, name in zip(files, picture_names(files)):
        try:
            with Image.open(path) as image:
                crop = cfg.validation_crop_size if image.mode == "RGBA" else -1
                out.append((name, prepare_input(image, cfg.resolution, crop, "white", assume_foreground=True)[0]))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: {error}") from None
    return out


def draw_inputs(unet, frozen: Frozen, inputs: list, cfg, options: dict, device, dtype, log: Logger, step: int) -> None:
    """Sample from the pictures of `validation_dir`, shared out over the ranks, and log a grid of each."""
    domains = [cfg.pred_type] if cfg.pred_type in ("color", "normal") else list(domains_of(cfg))
    angles = torch.from_numpy(camera_angles(cfg.condition_view, view_names(cfg.num_views)))[None]
    camera = camera_embedding(angles, torch.tensor([[d == "normal" for d in domains]]), options["camera_flags"])
    drawn = []
    for i in range(dist.rank(), len(inputs), dist.world_size()):
        name, rgb = inputs[i]
        pixels = preprocess_pil((rgb.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8), frozen.clip.image_size)
        image, pixels = (torch.from_numpy(x)[None].to(device) for x in (rgb, pixels))
        for scale in cfg.validation_guidance_scales:
            dist.at(step, "sample")
            sampler = (cfg.validation_steps_ddim, scale, cfg.validation_eta, dtype, cfg.scale_input_latents)
            images = generate(unet, frozen, image * 2 - 1, pixels, camera.to(device), [cfg.seed], *sampler)
            shown = picture(image[0], images[0], None, normals_first(domains))
            drawn.append((f"inputs/{name}_cfg{scale:.1f}", shown.permute(1, 2, 0).cpu().numpy()))
    for tag, image in (pair for part in dist.gather(drawn) for pair in part):
        log.image(step, tag, image)


def validate(unet, frozen, sets: dict, inputs, cfg, options, device, dtype, log, step: int, score: bool, draw: bool) -> None:
    """Sample the validation sets ({tag: dataset}) with every guidance scale: log their figures (`score`: all objects) and grids
    (`draw`: the first objects, and every picture of `validation_dir`)."""
    training = unet.training
    unet.eval()
    for tag, dataset in sets.items():
        for scale in cfg.validation_guidance_scales:
            result = evaluate(
                unet, frozen, dataset, device, options, scale, cfg.validation_steps_ddim, cfg.validation_eta, cfg.seed,
                cfg.validation_batch_size, dtype, cfg.scale_input_latents, limit=None if score else cfg.validation_pictures,
                pictures=cfg.validation_pictures if draw else 0, say=log.text,
            )  # fmt: skip
            if score:
                log.scalars(step, {f"{tag}_cfg{scale:.1f}/{key}": value for key, value in result["mean"].items()})
                log.text(f"step {step}: {tag}, guidance {scale:g}: " + "  ".join(f"{k} {v:.3f}" for k, v in result["mean"].items()))
            if result["pictures"]:
                log.image(step, f"{tag}/cfg{scale:.1f}", np.concatenate(result["pictures"]))
    if draw:
        draw_inputs(unet, frozen, inputs, cfg, options, device, dtype, log, step)
    unet.train(training)
