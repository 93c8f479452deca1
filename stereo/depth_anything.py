"""The frozen monocular branch: Depth Anything V2 (Yang et al., arXiv 2406.09414), a DPT decoder on a DINOv2 encoder.

Its map before the last two layers goes into the stereo features (FoundationStereo, arXiv 2501.09898, section 3.1).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stereo.dinov2 import dinov2

# vit_size -> (embedding, taps of the encoder, decoder width, widths of the four projections)
VARIANTS = {
    "vits": (384, (2, 5, 8, 11), 64, (48, 96, 192, 384)),
    "vitb": (768, (2, 5, 8, 11), 128, (96, 192, 384, 768)),
    "vitl": (1024, (4, 11, 17, 23), 256, (256, 512, 1024, 1024)),
}


def vit_input_size(H: int, W: int, multiple: int = 112, limit: int = 1344) -> tuple[int, int]:
    """Size (height, width) at which the encoder sees an H x W image.

    Both sides are rounded up to a multiple of 112 (of the patch, 14, and of the decoder's 16). If one then exceeds 1344
    the larger one becomes 1344 and the other follows in proportion, rounded up again.
    """
    H, W = -(-H // multiple) * multiple, -(-W // multiple) * multiple
    if max(H, W) <= limit:
        return H, W
    if W >= H:
        return -(-(H * limit) // (W * multiple)) * multiple, limit
    return limit, -(-(W * limit) // (H * multiple)) * multiple


@lru_cache(maxsize=64)
def two_resizes(size: int, middle: int, target: int, device: torch.device) -> Tensor:
    """(target, size) float32 matrix: a bilinear resize (align_corners) of a line to `middle`, then to `target` samples."""
    with torch.inference_mode(False):
        line = torch.eye(size, dtype=torch.float64)[None]  # (1, size, size): every unit vector is a channel
        for n in (middle, target):
            line = F.interpolate(line, size=n, mode="linear", align_corners=True)
        return line[0].T.float().contiguous().to(device)


class ResidualConvUnit(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu_(self.conv1(F.relu(x))))


class FeatureFusion(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        self.resConfUnit1 = ResidualConvUnit(dim)
        self.resConfUnit2 = ResidualConvUnit(dim)

    def forward(self, x: Tensor, skip: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Add the skip, refine, and resize to `size` (twice the size where it is None)."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x)
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        # the 1x1 convolution commutes with the interpolation (weights sum to 1) but is left where the raw output is defined
        return self.out_conv(F.interpolate(x, size=size, mode="bilinear", align_corners=True))


class DPTHead(nn.Module):
    """Dense prediction transformer decoder up to `output_conv1`; `output_conv2` only exists in the weights."""

    def __init__(self, embed_dim: int, dim: int, widths: tuple[int, ...]):
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(embed_dim, w, 1) for w in widths)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )
        scratch = {f"layer{i + 1}_rn": nn.Conv2d(w, dim, 3, padding=1, bias=False) for i, w in enumerate(widths)}
        scratch |= {f"refinenet{i}": FeatureFusion(dim) for i in (1, 2, 3, 4)}
        scratch["output_conv1"] = nn.Conv2d(dim, dim // 2, 3, padding=1)
        scratch["output_conv2"] = nn.ModuleList(
            [nn.Conv2d(dim // 2, 32, 3, padding=1), nn.Identity(), nn.Conv2d(32, 1, 1)]
        )
        self.scratch = nn.ModuleDict(scratch)

    def forward(self, taps: tuple[Tensor, ...]) -> Tensor:
        """Four (B, embed_dim, p, q) token maps -> (B, dim/2, 8p, 8q)."""
        s = self.scratch
        maps = [resize(project(t)) for t, project, resize in zip(taps, self.projects, self.resize_layers)]
        one, two, three, four = (s[f"layer{i + 1}_rn"](m) for i, m in enumerate(maps))
        path = s["refinenet4"](four, size=three.shape[-2:])
        path = s["refinenet3"](path, three, size=two.shape[-2:])
        path = s["refinenet2"](path, two, size=one.shape[-2:])
        return s["output_conv1"](s["refinenet1"](path, one))


class DepthAnything(nn.Module):
    """forward(normalised image (B, 3, H, W)) -> feature map (B, dim/2, H/4, W/4)."""

    def __init__(self, vit_size: str):
        super().__init__()
        embed_dim, self.taps, dim, widths = VARIANTS[vit_size]
        self.pretrained = dinov2(f"dinov2_{vit_size}14")
        self.depth_head = DPTHead(embed_dim, dim, widths)

    def forward(self, image: Tensor) -> Tensor:
        H, W = image.shape[-2:]
        size = vit_input_size(H, W)
        resized = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
        x = self.depth_head(self.pretrained.get_intermediate_layers(resized, self.taps, reshape=True))
        # The reference enlarges the map to the encoder's input size and then shrinks it to a quarter of the image, both
        # bilinear: per axis that is one matrix, and the full-size map is never made.
        rows = two_resizes(x.shape[-2], size[0], H // 4, x.device).to(x.dtype)
        columns = two_resizes(x.shape[-1], size[1], W // 4, x.device).to(x.dtype)
        return rows @ (x @ columns.T)


class FrozenDepthAnything(nn.Module):
    """Never trained, always in eval mode, never in a graph (section 3.1: unfreezing it makes results worse)."""

    def __init__(self, vit_size: str):
        super().__init__()
        self.depth_anything = DepthAnything(vit_size).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return self.depth_anything(image)
