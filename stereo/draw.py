"""Pictures of disparities, errors and samples."""

import json

import numpy as np

from common.io import colorize, contact_sheet, write_image


def disparity_picture(disparity: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """(H, W) disparity, 0 or not finite where unknown, -> (H, W, 3) uint8: far is blue, near is red, unknown is black."""
    known = np.isfinite(disparity) & (disparity > 0)
    if known.any() and (low is None or high is None):
        low, high = np.percentile(disparity[known], (1, 99))
    return colorize(np.where(known, disparity, np.nan), low or 0.0, high or 1.0)


def error_picture(pred: np.ndarray, truth: np.ndarray, mask: np.ndarray, limit: float = 4.0) -> np.ndarray:
    """|pred - truth| in pixels from blue (0) to red (`limit` and more), black where there is no truth."""
    return colorize(np.where(mask, np.abs(pred - truth), np.nan), 0.0, limit)


def panel(left: np.ndarray, right: np.ndarray, truth: np.ndarray, mask: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Left, right, truth, prediction (one colour scale) and error side by side. Images (H, W, 3) uint8, maps (H, W)."""
    known = truth[mask]
    low, high = np.percentile(known, (1, 99)) if known.size else (0.0, 1.0)
    maps = [disparity_picture(np.where(mask, truth, 0), low, high), disparity_picture(np.maximum(pred, 1e-3), low, high)]
    return contact_sheet([left, right, *maps, error_picture(pred, truth, mask)], columns=5)


def draw_samples(run, samples: list[dict], log, step: int) -> None:
    """Predictions of fixed training samples (dicts of `StereoDataset.sample`) by run(left, right) -> disparity.

    Written under the log's folder: once vis/gt/N/ (both images, truth, mask, info.json), each time vis/step_{step}/N/; and to
    TensorBoard a panel of left, right, truth, prediction and error.
    """
    rows = []
    for number, sample in enumerate(samples):
        left, right, truth, mask = (sample[key] for key in ("left_image", "right_image", "disparity", "disparity_mask"))
        low, high = np.percentile(truth[mask], (1, 99))
        pred, gt = run(left, right), log.folder / "vis" / "gt" / f"{number:04d}"
        out = log.folder / "vis" / f"step_{step:08d}" / f"{number:04d}"
        for folder in (gt, out):
            write_image(folder / "left_image.jpg", left)
            write_image(folder / "right_image.jpg", right)
        write_image(out / "pred_disparity_vis.png", disparity_picture(np.maximum(pred, 1e-3), low, high))
        write_image(gt / "disparity_vis.png", disparity_picture(truth, low, high))
        write_image(gt / "mask.png", np.uint8(mask) * 255)
        (gt / "info.json").write_text(json.dumps({"name": sample["name"], "position": sample["position"]}))
        rows.append(panel(left, right, truth, mask, pred))
    log.image(step, "vis/left_right_truth_prediction_error", contact_sheet(rows[:8], columns=1))
