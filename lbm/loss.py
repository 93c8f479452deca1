"""Losses of LBM (Zheng et al., Lattice Boltzmann Model for Learning Real-World Pixel Dynamicity, 2025) and cell geometry.

Positions are pixel-edge coordinates (x, y): x in [0, W], the cell (row r, column c) of a grid with stride s has its centre at
((c + 0.5) s, (r + 0.5) s). Loss terms have shape (B, T, N); masks are bool of the same shape. A mask without a True gives a
zero with a graph, so that a batch without a visible point is harmless. Everything is computed in float32.
"""

import torch
import torch.nn.functional as F

TEMPERATURE = 0.05  # of the softmax over cells
MISS_PX = 8.0  # beyond this error (in input_size pixels) a position counts as missed


def cell_index(points: torch.Tensor, size: tuple[int, int], stride: int) -> torch.Tensor:
    """Row-major index (int64, ...) of the cell that holds each point (..., 2) of an image of size (H, W); 0 outside the image."""
    height, width = size
    x, y = points.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cell = (y / stride).floor() * (width // stride) + (x / stride).floor()
    return torch.where(inside, cell, torch.zeros_like(cell)).long()


def cell_center(index: torch.Tensor, size: tuple[int, int], stride: int) -> torch.Tensor:
    """Centres (..., 2) float32 of the cells with the given row-major indices (...)."""
    columns = size[1] // stride
    row, column = torch.div(index, columns, rounding_mode="floor"), index % columns
    return torch.stack((column, row), -1).float() * stride + 0.5 * stride


def loss_masks(query_time, visible, valid=None, after_query: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(scored, scored and visible), both bool (B, T, N), from query_time (B, N), visible (B, T, N), valid (B, N).

    Scored: frames after the query's (all if not after_query) of points that are no padding.
    """
    time = torch.arange(visible.shape[1], device=visible.device)[:, None]  # (T, 1)
    scored = time > query_time[:, None] if after_query else torch.ones_like(visible)
    if valid is not None:
        scored = scored & valid[:, None]
    return scored, scored & visible


def masked_mean(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `value` over the True cells of `mask`, 0 (with a graph) if there is none; what is masked may be NaN."""
    return torch.where(mask, value.float(), 0.0).sum() / mask.sum().clamp(min=1)


def log_partition(corr: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two numbers of a cross-entropy over cells: log sum exp(corr / 0.05) and the true cell's logit, both (...).

    corr (..., P) float32, index (...) int64.
    """
    logits = corr / TEMPERATURE
    return logits.logsumexp(-1), logits.gather(-1, index[..., None]).squeeze(-1)


def classification_loss(log_sum: torch.Tensor, logit: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over cells of one layer, from the two numbers of `log_partition`."""
    return masked_mean(log_sum - logit, mask)


def visibility_loss(logit: torch.Tensor, visible: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the visibility logits."""
    return masked_mean(F.binary_cross_entropy_with_logits(logit.float(), visible.float(), reduction="none"), mask)


def regression_loss(offset, reference, target, mask, stride: int) -> torch.Tensor:
    """L1 distance between offset and target - reference (all (B, T, N, 2) px), summed over x and y.

    Clamped at 2 strides, which cuts the gradient where the chosen cell is wrong.
    """
    error = (offset.float() - (target - reference)).abs().sum(-1)
    return masked_mean(error.clamp(max=2 * stride), mask)


def uncertainty_loss(logit, position, target, visible, mask) -> torch.Tensor:
    """Binary cross-entropy of the logit that the position is missed (more than 8 px off) or the point hidden.

    logit (B, T, N), position and target (B, T, N, 2) px; for k candidates (B, T, N, k) and (B, T, N, k, 2), with an axis of
    length 1 in the place of k in the others.
    """
    with torch.no_grad():
        missed = (position.float() - target).norm(dim=-1) > MISS_PX
        missed = (missed | ~visible).float()
    return masked_mean(F.binary_cross_entropy_with_logits(logit.float(), missed, reduction="none"), mask.expand_as(logit))
