"""Quality of generated views: PSNR, SSIM, angular error of normals, foreground overlap; and of point sets and occupancy grids."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor


def psnr(prediction: Tensor, truth: Tensor, cap: float = 100.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (N,3,H,W) in [0,1] -> (N,); identical images give `cap`."""
    error = (prediction.double() - truth.double()).square().mean(dim=(1, 2, 3))
    return (-10 * error.clamp(min=1e-30).log10()).clamp(max=cap)


def ssim(prediction: Tensor, truth: Tensor, window: str = "gaussian") -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (N,C,H,W) in [0,1] -> (N,); K1 0.01, K2 0.03, per channel.

    "gaussian": 11 x 11 window, sigma 1.5, biased covariances. "uniform": 7 x 7, sample covariances. Only windows that lie inside
    the image count. ValueError where the image is smaller than the window.
    """
    size = {"gaussian": 11, "uniform": 7}[window]
    n, c, h, w = prediction.shape
    if min(h, w) < size:
        raise ValueError(f"images of {h} x {w} are smaller than the SSIM window of {size}")
    if window == "gaussian":
        line = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * 1.5**2))
        line, unbias = (line / line.sum()).to(prediction.device), 1.0
    else:
        line, unbias = torch.full((size,), 1 / size, dtype=torch.float64, device=prediction.device), size**2 / (size**2 - 1)

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    p, t = (x.double().reshape(n * c, 1, h, w) for x in (prediction, truth))
    mean_p, mean_t = smooth(p), smooth(t)
    var_p, var_t = unbias * (smooth(p * p) - mean_p**2), unbias * (smooth(t * t) - mean_t**2)
    covariance = unbias * (smooth(p * t) - mean_p * mean_t)
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_p * mean_t + c1) * (2 * covariance + c2) / ((mean_p**2 + mean_t**2 + c1) * (var_p + var_t + c2))
    return value.mean(dim=(1, 2, 3)).view(n, c).mean(dim=1)


def normal_angular_error(prediction: Tensor, truth: Tensor, mask: Tensor) -> dict[str, float] | None:
    """Degrees between vectors (3,H,W) of any length over mask (H,W) bool: mean, median, shares within 11.25, 22.5, 30, count.

    A predicted vector shorter than 1e-6 counts as 90 degrees. None where the mask is empty.
    """
    p, t = prediction.double()[:, mask], truth.double()[:, mask]  # (3,P)
    if p.shape[1] == 0:
        return None
    length = p.norm(dim=0)
    cosine = (p * t).sum(0) / (length * t.norm(dim=0)).clamp(min=1e-30)
    degrees = torch.rad2deg(cosine.clamp(-1, 1).acos())
    degrees = torch.where(length < 1e-6, torch.full_like(degrees, 90.0), degrees)
    result = {"mean": degrees.mean().item(), "median": degrees.quantile(0.5).item()}
    result |= {f"within_{limit}": (degrees < limit).double().mean().item() for limit in (11.25, 22.5, 30.0)}
    return {**result, "count": degrees.numel()}


def foreground(images: Tensor, background: Tensor | float = 1.0, threshold: float = 0.1) -> Tensor:
    """Foreground masks (N,H,W) of images (N,3,H,W) in [0,1]: farther than `threshold` from the background colour, after a 3 x 3
    opening, which removes single pixels."""
    background = torch.as_tensor(background, device=images.device, dtype=images.dtype).expand(3)
    far = ((images - background[:, None, None]).norm(dim=1, keepdim=True) > threshold).float()  # (N,1,H,W)
    eroded = -F.max_pool2d(F.pad(-far, (1, 1, 1, 1), value=-1.0), 3, stride=1)  # outside the image counts as foreground
    return F.max_pool2d(eroded, 3, stride=1, padding=1)[:, 0] > 0


def foreground_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks (N,H,W) bool -> (N,) fp64; two empty masks agree: 1."""
    both, either = (a & b).sum(dim=(1, 2)).double(), (a | b).sum(dim=(1, 2)).double()
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either))


def chamfer(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean distance to the nearest neighbour from points a (N,3) to b (M,3), from b to a, and the mean of both."""
    to_b, to_a = cKDTree(b).query(a)[0].mean(), cKDTree(a).query(b)[0].mean()
    return float(to_b), float(to_a), float((to_b + to_a) / 2)


def volume_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two occupancy grids of the same shape, bool; two empty grids agree: 1."""
    either = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / either) if either else 1.0
