"""Losses of a predicted disparity against the ground truth.

Maps are (..., H, W) float in pixels of their own grid, masks are bool of the same shape. Every mean runs over the valid pixels of
the whole batch; an empty mask gives 0 that still has a graph. Invalid pixels of the ground truth may hold anything, NaN too.
Each loss returns (scalar, dict of detached scalars to log).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Result = tuple[Tensor, dict[str, Tensor]]


def masked_mean(values: Tensor, mask: Tensor, per_sample: bool = False) -> Tensor:
    """Mean of `values` where `mask`; 0 for an empty mask.

    per_sample: mean over the first axis of the means of the samples, of those that have a valid pixel.
    """
    values = torch.where(mask, values, 0.0)
    if not per_sample:
        return values.sum() / mask.sum().clamp(min=1)
    count = mask.flatten(1).sum(1)
    means = values.flatten(1).sum(1) / count.clamp(min=1)
    return means.sum() / (count > 0).sum().clamp(min=1)


def absolute_error(pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
    """|pred - gt| in float32; at invalid pixels the ground truth is taken as 0, so that NaN cannot reach a gradient."""
    return (pred.float() - torch.where(mask, gt, 0.0).float()).abs()


def smooth_l1(error: Tensor, beta: float) -> Tensor:
    """Huber form of an absolute error: error^2 / (2 beta) below beta, error - beta / 2 above; beta 0 is the plain error."""
    return torch.where(error < beta, 0.5 * error.square() / beta, error - 0.5 * beta) if beta > 0 else error


def _prepare(pred, gt, mask, max_disparity, clamp_prediction, scale=1.0):
    """Restrict the mask to gt < max_disparity; or clamp the prediction and leave the mask, as the reference code does."""
    if max_disparity is None:
        return pred, mask
    if clamp_prediction:
        return pred.clamp(0, scale * max_disparity), mask
    return pred, mask & (gt < scale * max_disparity)


@torch.no_grad()
def error_rates(error: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """epe, share of errors above 3 px (`d1_error`) and above 1 px (`d3_error`), thresholds times `scale`."""
    return {
        "epe": masked_mean(error, mask),
        "d1_error": masked_mean((error > 3 * scale).float(), mask),
        "d3_error": masked_mean((error > scale).float(), mask),
    }


def disparity_smooth_l1_loss(
    pred: Tensor,
    gt: Tensor,
    mask: Tensor,
    beta: float = 1.0,
    max_disparity: float | None = None,
    clamp_prediction: bool = False,
    per_sample_mean: bool = False,
) -> Result:
    """Mean smooth L1 error.

    max_disparity: ground truth from there on is left out. With `clamp_prediction` (as in the users' former code) instead the
    prediction is clamped to [0, max_disparity], which has no gradient outside, and the mask is taken as it is.
    """
    pred, mask = _prepare(pred, gt, mask, max_disparity, clamp_prediction)
    error = absolute_error(pred, gt, mask)
    return masked_mean(smooth_l1(error, beta), mask, per_sample_mean), error_rates(error, mask)


def disparity_l1_loss(pred: Tensor, gt: Tensor, mask: Tensor, **options) -> Result:
    """Mean absolute error; options of `disparity_smooth_l1_loss` except beta."""
    return disparity_smooth_l1_loss(pred, gt, mask, beta=0.0, **options)


disparity_epe_loss = disparity_l1_loss  # the end-point error of a one-dimensional flow is its absolute error


def disparity_pyramid(disp: Tensor, factors: tuple[int, ...] = (4, 2, 1)) -> list[Tensor]:
    """Average-pooled copies of (B, H, W), coarse first, each in pixels of its own grid: the levels of `multi_scale_loss`."""
    return [disp if f == 1 else F.avg_pool2d(disp.unsqueeze(1), f).squeeze(1) / f for f in factors]


def _nearest(values: Tensor, shape: torch.Size) -> Tensor:
    """(..., H, W) -> float32 of `shape` (..., h, w) by nearest neighbour."""
    flat = values.reshape(-1, 1, *values.shape[-2:]).float()
    return F.interpolate(flat, size=shape[-2:], mode="nearest").view(shape)


def multi_scale_loss(
    preds: list[Tensor],
    gt: Tensor,
    mask: Tensor,
    weights: list[float],
    loss_type: str = "smooth_l1",
    beta: float = 1.0,
    max_disparity: float | None = None,
    clamp_prediction: bool = False,
) -> Result:
    """sum_i weights_i * mean loss of level i; gt (B, H, W) and mask are taken down to each level by nearest neighbour.

    preds: maps of their own size and in their own pixels (`disparity_pyramid`), or one full-size map per iteration.
    loss_type: "smooth_l1", "l1" or "epe". The logged rates are weighted means, with thresholds scaled to the level.
    """
    if len(weights) != len(preds):
        raise ValueError(f"multi_scale_loss: {len(weights)} weights for {len(preds)} maps")
    if loss_type not in ("smooth_l1", "l1", "epe"):
        raise ValueError(f"multi_scale_loss: loss_type {loss_type!r} must be smooth_l1, l1 or epe")
    total, logged = 0.0, {}
    for pred, weight in zip(preds, weights):
        factor = pred.shape[-1] / gt.shape[-1]
        level_gt, level_mask = factor * _nearest(gt, pred.shape), _nearest(mask, pred.shape) > 0.5
        pred, level_mask = _prepare(pred, level_gt, level_mask, max_disparity, clamp_prediction, factor)
        error = absolute_error(pred, level_gt, level_mask)
        total = total + weight * masked_mean(smooth_l1(error, beta if loss_type == "smooth_l1" else 0.0), level_mask)
        for key, value in error_rates(error, level_mask, factor).items():
            logged[f"multi_scale_{key}"] = logged.get(f"multi_scale_{key}", 0.0) + weight / sum(weights) * value
    return total, logged


def gradient_loss(pred: Tensor, gt: Tensor, mask: Tensor, signed: bool = False) -> Result:
    """Half the mean difference of the forward differences along the rows plus the same along the columns.

    Pairs count where both pixels are valid. By default the magnitudes of the differences are compared, so that a wrong
    sign goes unseen (the users' former loss); `signed` compares the differences themselves.
    """
    pred, gt, terms = pred.float(), torch.where(mask, gt, 0.0).float(), []
    for axis in (-1, -2):
        n = pred.shape[axis] - 1
        both = mask.narrow(axis, 1, n) & mask.narrow(axis, 0, n)
        dp, dg = pred.diff(dim=axis), gt.diff(dim=axis)
        difference = dp - dg if signed else dp.abs() - dg.abs()
        terms.append(masked_mean(difference.abs(), both))
    x, y = terms
    return 0.5 * (x + y), {"gradient_loss_x": x.detach(), "gradient_loss_y": y.detach()}


def sequence_weights(n: int, gamma: float = 0.9, mode: str = "plain") -> list[float]:
    """Weights of n iterations, rising to 1: gamma^(n-k) ("plain", the paper), or gamma^(15/(n-1)) as the base
    ("adjusted", RAFT-Stereo and IGEV: the first weight does not depend on n)."""
    if mode not in ("plain", "adjusted"):
        raise ValueError(f"gamma_mode {mode!r} must be plain or adjusted")
    base = gamma ** (15 / (n - 1)) if mode == "adjusted" and n > 1 else gamma
    return [base ** (n - 1 - i) for i in range(n)]


def foundation_stereo_loss(
    init: Tensor,
    preds: list[Tensor],
    gt: Tensor,
    valid: Tensor,
    max_disparity: float,
    gamma: float = 0.9,
    gamma_mode: str = "plain",
    per_sample_mean: bool = False,
    init_weight: float = 1.0,
) -> Result:
    """Sequence loss of FoundationStereo, equation (8): smooth L1 of the initial disparity plus weighted L1 of every iteration.

    init: (B, 1, H/4, W/4) in quarter pixels, enlarged bilinearly (the paper does not say how it meets the ground truth).
    preds: list of (B, 1, H, W). gt, valid: (B, 1, H, W) or (B, H, W). Counted: valid and 0 < gt < max_disparity; the truth
    is never clipped into that range. The dict holds the unweighted means `init`, `iter_k`, and `n_valid`.
    init_weight: 1 in the paper. A larger one helps a network that starts from nothing: the recurrent part has nothing to refine
    before the volume matches, and its gradients hide the volume's.
    """
    gt, valid = gt.view(preds[0].shape), valid.view(preds[0].shape)
    mask = valid & (gt > 0) & (gt < max_disparity)
    full = 4 * F.interpolate(init.float(), size=gt.shape[-2:], mode="bilinear", align_corners=False)
    start = masked_mean(smooth_l1(absolute_error(full, gt, mask), 1.0), mask, per_sample_mean)
    parts, loss = {"n_valid": mask.sum(), "init": start.detach()}, init_weight * start
    for k, (pred, weight) in enumerate(zip(preds, sequence_weights(len(preds), gamma, gamma_mode))):
        term = masked_mean(absolute_error(pred, gt, mask), mask, per_sample_mean)
        parts[f"iter_{k}"] = term.detach()
        loss = loss + weight * term
    return loss, parts
