"""Pictures of depth, normals, masks and errors."""

import json
from pathlib import Path

import numpy as np
import torch

from common.io import colorize, contact_sheet, write_image
from moge.alignment import align_depth_scale
from moge.geometry import depth_to_points, masked_nearest_resize, points_to_normal


def depth_picture(depth: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """(H, W) depth -> (H, W, 3) uint8 by disparity: near is red, far is blue; unknown, infinite and not positive are black.

    low, high: the range of disparity; default its 0.1 % and 99 % quantiles.
    """
    known = np.isfinite(depth) & (depth > 0)
    disparity = 1 / np.where(known, depth, 1)
    if known.any() and (low is None or high is None):
        low, high = np.quantile(disparity[known], (0.001, 0.99))
    return colorize(np.where(known, disparity, np.nan), low or 0.0, high or 1.0)


def normal_picture(normal: np.ndarray) -> np.ndarray:
    """(H, W, 3) unit normals in camera axes -> (H, W, 3) uint8: right is red, up is green, towards the camera is blue; unknown black."""
    known = np.isfinite(normal).all(-1) & (np.abs(normal).max(-1) > 0)
    code = np.where(known[..., None], normal, 0) * (0.5, -0.5, -0.5) + 0.5
    return np.uint8(np.clip(code, 0, 1) * 255 * known[..., None])


def mask_picture(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W, 3) uint8, white where true."""
    return np.repeat(np.uint8(mask)[..., None] * 255, 3, -1)


def error_picture(pred: np.ndarray, truth: np.ndarray, mask: np.ndarray, limit: float = 0.25) -> np.ndarray:
    """|pred - truth| / truth from blue (0) to red (`limit` and more), black where there is no truth."""
    pred, truth = np.where(mask, pred, 1), np.where(mask, truth, 1)
    return colorize(np.where(mask, np.abs(pred - truth) / truth, np.nan), 0.0, limit)


def map_normals(points: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Normals (H, W, 3) of a point map (H, W, 3), 0 where unknown; mask (H, W)."""
    normal, known = points_to_normal(torch.from_numpy(np.where(mask[..., None], points, 0)), torch.from_numpy(mask))
    return torch.where(known[..., None], normal, 0).numpy()


def scale_to(pred: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Predicted depth (H, W) times the scale that fits the truth best (weighted L1 on 64 x 64 samples)."""
    if not mask.any():
        return pred
    small, index = masked_nearest_resize(torch.from_numpy(mask), (64, 64))
    p, g = (torch.from_numpy(np.float32(v)).flatten()[index[small]] for v in (pred, truth))
    return pred * align_depth_scale(p, g, 1 / g).item()


def panel(image: np.ndarray, truth: np.ndarray, mask: np.ndarray, out: dict[str, np.ndarray]) -> np.ndarray:
    """Image, true depth, predicted depth on the same scale, its normals, its error and mask side by side.

    image (H, W, 3) uint8; truth (H, W) depth, mask (H, W) where it counts; out: depth, points, mask and, where the model has
    them, normal, of `MoGe.infer` without its mask applied, as arrays.
    """
    depth = scale_to(out["depth"], truth, mask)
    low, high = np.quantile(1 / truth[mask], (0.001, 0.99)) if mask.any() else (None, None)
    normal = out["normal"] if "normal" in out else map_normals(out["points"], np.isfinite(out["depth"]))
    valid = out.get("mask", np.ones_like(mask))
    pictures = [depth_picture(np.where(mask, truth, np.nan), low, high), depth_picture(np.where(valid, depth, np.nan), low, high)]
    pictures += [normal_picture(np.where(valid[..., None], normal, 0)), error_picture(depth, truth, mask), mask_picture(valid)]
    return contact_sheet([image, *pictures], columns=6)


def draw_truth(samples: list[dict], folder: Path) -> None:
    """Write image.jpg, points.npy (float32), depth_vis.png, normal.png and info.json of training samples (dicts of
    `MoGeDataset.read`) into folder/NNNN.
    """
    for number, sample in enumerate(samples):
        to, depth, K = folder / f"{number:04d}", sample["depth"], sample["intrinsics"]
        points = depth_to_points(torch.from_numpy(depth), torch.from_numpy(K)).numpy()
        write_image(to / "image.jpg", sample["image"])
        write_image(to / "depth_vis.png", depth_picture(depth))
        write_image(to / "normal.png", normal_picture(map_normals(points, np.isfinite(depth))))
        np.save(to / "points.npy", points)
        info = {"name": sample["name"], "label_type": sample["label_type"], "intrinsics": K.tolist()}
        (to / "info.json").write_text(json.dumps(info))


def draw_samples(model, samples: list[dict], log, step: int) -> None:
    """Predictions of a model in eval mode for fixed training samples (dicts of `MoGeDataset.read`).

    Written under the log's folder: vis/step_{step}/NNNN/ (image, points.npy as float16, depth_vis, normal_vis, mask); and to
    TensorBoard panels of image, true depth, predicted depth, normals, error and mask.
    """
    rows, device = [], next(model.parameters()).device
    for number, sample in enumerate(samples):
        image, truth = sample["image"], sample["depth"]
        mask = np.isfinite(truth) & (truth > 0)
        batch = torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255
        out = {k: v.cpu().numpy() for k, v in model.infer(batch, num_tokens=model.num_tokens_range[0], apply_mask=False).items()}
        rows.append(panel(image, truth, mask, out))
        mine = log.folder / "vis" / f"step_{step:08d}" / f"{number:04d}"
        normal = out["normal"] if "normal" in out else map_normals(out["points"], np.isfinite(out["depth"]))
        pictures = {"depth_vis": depth_picture(out["depth"]), "normal_vis": normal_picture(normal), "mask": mask_picture(out["mask"])}
        write_image(mine / "image.jpg", image)
        for name, picture in pictures.items():
            write_image(mine / f"{name}.png", picture)
        np.save(mine / "points.npy", out["points"].astype(np.float16))
    log.image(step, "vis/image_truth_depth_normals_error_mask", contact_sheet(rows[:8], columns=1))
