"""Disparity metrics. Errors e = |prediction - truth| in pixels over a mask; rates in percent.

epe: mean e. rmse: root of the mean of e^2. bpT ("bad-T"): share of e > T. d1_kitti: share of e > 3 and e > 5 % of the truth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = (0.5, 1, 2, 3, 4, 5)
NAMES = ("epe", "rmse", *(f"bp{t}" for t in THRESHOLDS), "d1_kitti")


@torch.no_grad()
def error_table(pred: Tensor, gt: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per image, sums over the valid pixels: (B, len(NAMES)) float64 in the order of NAMES (squares for rmse, percents for
    the rates), and the number of valid pixels (B,). pred, gt, mask: (B, H, W); gt may hold anything where invalid."""
    gt = torch.where(mask, gt, 0.0).float()
    error = (torch.where(mask, pred, 0.0).float() - gt).abs()
    terms = [error, error.square()] + [100.0 * ~(error <= t) for t in THRESHOLDS]  # a NaN counts as wrong
    terms.append(100.0 * ~((error <= 3) | (error <= 0.05 * gt)))
    sums = torch.stack([torch.where(mask, t, 0.0).double().flatten(1).sum(1) for t in terms], 1)
    return sums, mask.flatten(1).sum(1)


def means(sums: Tensor, count: Tensor) -> Tensor:
    """(..., len(NAMES)) sums and (...) counts -> means, with the root taken for rmse; NaN where the count is 0."""
    values = sums / count.unsqueeze(-1)
    root = NAMES.index("rmse")
    values[..., root] = values[..., root].sqrt()
    return values


class DisparityMetrics:
    """Running sums for both ways of averaging over images; images without a valid pixel do not count.

    `state` is one float64 tensor: sum it over ranks (all-reduce) before `compute`.
    per_image: mean of the images' values (Middlebury, ETH3D). per_pixel: all pixels pooled (KITTI D1).
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.state = torch.zeros(2, len(NAMES) + 1, dtype=torch.float64, device=device)

    def update(self, pred: Tensor, gt: Tensor, mask: Tensor) -> None:
        """pred, gt, mask: (B, H, W)."""
        sums, count = error_table(pred, gt, mask)
        seen = count > 0
        values = torch.where(seen.unsqueeze(1), means(sums, count.clamp(min=1)), 0.0)
        self.state[0] += torch.cat([values.sum(0), seen.sum().view(1)])
        self.state[1] += torch.cat([sums.sum(0), count.sum().view(1)])

    def compute(self) -> dict[str, dict[str, float]]:
        """{"per_image": {name: value}, "per_pixel": {name: value}, "count": {"images", "pixels"}}."""
        state = self.state.cpu()
        per_image = state[0, :-1] / state[0, -1]
        per_pixel = means(state[1, :-1], state[1, -1])
        return {
            "per_image": dict(zip(NAMES, per_image.tolist())),
            "per_pixel": dict(zip(NAMES, per_pixel.tolist())),
            "count": {"images": int(state[0, -1]), "pixels": int(state[1, -1])},
        }


def step_metrics(pred: Tensor, gt: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Metrics of a training batch as detached scalars on its device, pooled over its pixels; 0 for an empty mask.

    All of NAMES, and the names of the users' document: `D1` is the share of errors above 3 px (= bp3), `D3` that of errors
    above 1 px (= bp1). That is the document's meaning; elsewhere "D1" mostly is KITTI's (`d1_kitti`).
    """
    sums, count = error_table(pred, gt, mask)
    values = dict(zip(NAMES, means(sums.sum(0), count.sum().clamp(min=1)).float().unbind()))
    return {**values, "D1": values["bp3"], "D3": values["bp1"]}


def batch_metrics(final: Tensor, start: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """`step_metrics` of the final disparity under the tags metric/*, and metric/init_epe of the initial one.

    final, truth, mask: (B, H, W). start: (B, 1, H/4, W/4) in quarter pixels.
    """
    full = 4 * F.interpolate(start.float(), truth.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
    values = step_metrics(final, truth, mask) | {"init_epe": step_metrics(full, truth, mask)["epe"]}
    return {f"metric/{name}": value for name, value in values.items()}
