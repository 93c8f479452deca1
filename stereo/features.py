"""Feature extractor: an EdgeNeXt pyramid, its decoder to 1/4, and the monocular map mixed in ("side-tuning adapter").

FoundationStereo (Wen et al., arXiv 2501.09898), section 3.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stereo.blocks import ConvBlock, InstanceResidual, apply
from stereo.depth_anything import VARIANTS, FrozenDepthAnything
from stereo.edgenext import DEPTHS, DIMS, Stage, edgenext_pyramid, edgenext_stem


class UpFuse(nn.Module):
    """Transposed convolution to twice the size, concatenation with the skip, residual block."""

    def __init__(self, dim_in: int, dim_skip: int):
        super().__init__()
        self.conv1 = ConvBlock(nn.ConvTranspose2d(dim_in, dim_skip, 4, stride=2, padding=1, bias=False), "instance")
        self.conv2 = InstanceResidual(2 * dim_skip, bias=False, inner_relu=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv2(torch.cat([self.conv1(x), skip], 1))


class FeatureNet(nn.Module):
    """forward(normalised images (B, 3, H, W)) -> [f4, f8, f16, f32], monocular map at 1/4 or None.

    Channels: f4 96 + `mono_dim`, f8 192, f16 320, f32 304.
    """

    def __init__(self, vit_size: str | None, checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = edgenext_stem()
        self.stages = nn.ModuleList(Stage(i) for i in range(len(DEPTHS)))
        self.mono_dim = VARIANTS[vit_size][2] // 2 if vit_size else 0
        if vit_size:
            self.dino = FrozenDepthAnything(vit_size)
        self.deconv32_16 = UpFuse(DIMS[3], DIMS[2])
        self.deconv16_8 = UpFuse(2 * DIMS[2], DIMS[1])
        self.deconv8_4 = UpFuse(2 * DIMS[1], DIMS[0])
        self.dims = (2 * DIMS[0] + self.mono_dim, 2 * DIMS[1], 2 * DIMS[2], DIMS[3])
        self.conv4 = nn.Sequential(
            ConvBlock(nn.Conv2d(self.dims[0], self.dims[0], 3, padding=1, bias=False), "instance"),
            InstanceResidual(self.dims[0], bias=True, inner_relu=True),
            InstanceResidual(self.dims[0], bias=True, inner_relu=True),
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        mono = self.dino(x) if self.mono_dim else None
        x4, x8, x16, x32 = edgenext_pyramid(self.stem, self.stages, x, self.checkpointing)
        f16 = apply(self.deconv32_16, x32, x16, checkpointing=self.checkpointing)
        f8 = apply(self.deconv16_8, f16, x8, checkpointing=self.checkpointing)
        f4 = apply(self.deconv8_4, f8, x4, checkpointing=self.checkpointing)
        if mono is not None:
            f4 = torch.cat([f4, mono.to(f4.dtype)], 1)
        return [apply(self.conv4, f4, checkpointing=self.checkpointing), f8, f16, x32], mono


class DetailStem(nn.Sequential):
    """Features of the left image at half size, for the convex upsampling: (B, 3, H, W) -> (B, dim, H/2, W/2)."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__(
            ConvBlock(nn.Conv2d(dim_in, dim, 3, stride=2, padding=1, bias=False), "instance"),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(F.instance_norm(self[1](self[0](x))))
