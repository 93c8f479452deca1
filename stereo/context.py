"""Context network of the left image, and the two attentions that select between GRU kernels.

RAFT-Stereo's multi-level context (Lipson et al., arXiv 2109.07547) with the monocular map mixed in; channel and spatial
attention after Selective-Stereo (Wang et al., arXiv 2403.00486).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stereo.blocks import BatchResidual, ConvBlock, apply, conv_bn


class ContextNet(nn.Module):
    """forward(normalised left image (B, 3, H, W), monocular map at 1/4 or None) -> [(hidden, context)] at 1/4, 1/8, 1/16.

    Each map has `dim` channels; the trunk is dim/2 (full size), 3/4 dim (1/2), dim (1/4) wide, 64, 96, 128 as published.
    levels: 2 leaves 1/16 out.
    """

    def __init__(self, dim: int, mono_dim: int, levels: int, checkpointing: bool = False):
        super().__init__()
        self.levels, self.checkpointing = levels, checkpointing
        d1, d2 = dim // 2, dim * 3 // 4
        self.conv1, self.norm1 = nn.Conv2d(3, d1, 7, padding=3), nn.BatchNorm2d(d1)
        stage = lambda i, o, stride: nn.Sequential(BatchResidual(i, o, stride), BatchResidual(o, o))
        self.layer1, self.layer2, self.layer3 = stage(d1, d1, 1), stage(d1, d2, 2), stage(d2, dim, 2)
        self.layer4 = stage(dim, dim, 2)
        self.conv2 = ConvBlock(nn.Conv2d(dim + mono_dim, dim, 3, padding=1, bias=False))
        conv = lambda: nn.Conv2d(dim, dim, 3, padding=1)
        head = lambda: nn.Sequential(BatchResidual(dim, dim), conv())
        self.outputs04 = nn.ModuleList([head(), head()])
        self.outputs08 = nn.ModuleList([head(), head()])
        if levels > 2:
            self.layer5 = stage(dim, dim, 2)
            self.outputs16 = nn.ModuleList([conv(), conv()])
        # in the published weights, never used
        self.down = nn.Sequential(nn.Conv2d(dim, dim, 4, stride=4), nn.BatchNorm2d(dim)).requires_grad_(False)
        self.norm = nn.BatchNorm2d(2 * dim).requires_grad_(False)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu_(conv_bn(self.conv1, self.norm1, x))

    def forward(self, x: Tensor, mono: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        x = self.stem(x)
        for layer in (self.layer1, self.layer2, self.layer3):
            x = apply(layer, x, checkpointing=self.checkpointing)
        x = self.conv2(x if mono is None else torch.cat([x, mono.to(x.dtype)], 1))
        outputs = [tuple(apply(head, x, checkpointing=self.checkpointing) for head in self.outputs04)]
        x = apply(self.layer4, x, checkpointing=self.checkpointing)
        outputs.append(tuple(apply(head, x, checkpointing=self.checkpointing) for head in self.outputs08))
        if self.levels > 2:
            x = apply(self.layer5, x, checkpointing=self.checkpointing)
            outputs.append(tuple(head(x) for head in self.outputs16))
        return outputs


class ChannelAttention(nn.Module):
    """(B, C, h, w) -> weights in (0, 1) per channel (B, C, 1, 1), from its mean and its maximum over the image."""

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Conv2d(dim, dim // reduction, 1, bias=False), nn.ReLU(), nn.Conv2d(dim // reduction, dim, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x.mean((2, 3), keepdim=True)) + self.fc(x.amax((2, 3), keepdim=True))).sigmoid()


class SpatialAttention(nn.Module):
    """(B, C, h, w) -> weights in (0, 1) per pixel (B, 1, h, w), from the mean and the maximum over its channels."""

    def __init__(self, kernel: int = 7):
        super().__init__()
        self.samconv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.samconv(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)).sigmoid()
