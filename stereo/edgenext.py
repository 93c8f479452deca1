"""EdgeNeXt-small (Maaz et al., arXiv 2206.10589), the convolutional half of the feature extractor.

Parameter names are those of the published stereo weights, and of the ImageNet weights "edgenext_small.usi_in1k" without
their `head.*`.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stereo.blocks import apply, lean_mlp

DIMS, DEPTHS, KERNELS, SCALES = (48, 96, 160, 304), (3, 3, 9, 3), (3, 5, 7, 9), (1, 2, 3, 4)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return lean_mlp(self.fc1, self.fc2, x)


class ConvEncoder(nn.Module):
    """Depthwise convolution, then a channel MLP with layer scale, around a shortcut."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def fourier_features(H: int, W: int, device: torch.device) -> Tensor:
    """(1, 64, H, W) float32: interleaved sine and cosine of 32 frequencies of the row, then of the column."""
    with torch.inference_mode(False):  # the cached tensor may serve a training step later
        j = torch.arange(32, device=device)
        wavelength = 10000 ** (2 * torch.div(j, 2, rounding_mode="floor") / 32)

        def encode(n: int) -> Tensor:
            position = torch.arange(1, n + 1, dtype=torch.float32, device=device) / (n + 1e-6) * (2 * math.pi)
            angle = position[:, None] / wavelength  # (n, 32)
            return torch.where(j % 2 == 0, angle.sin(), angle.cos()).T  # (32, n)

        rows, columns = encode(H), encode(W)
        return torch.cat([rows[:, :, None].expand(-1, H, W), columns[:, None, :].expand(-1, H, W)])[None]


class PositionalEncoding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.token_projection = nn.Conv2d(64, dim, 1)

    def forward(self, H: int, W: int) -> Tensor:
        return self.token_projection(fourier_features(H, W, self.token_projection.weight.device))  # (1, dim, H, W)


class CrossCovarianceAttention(nn.Module):
    """Attention between channels: the map is (C/heads, C/heads), linear in the number of tokens."""

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # each (B, heads, C/heads, N)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((attention @ v).permute(0, 3, 1, 2).reshape(B, N, C))


class SplitTransposeEncoder(nn.Module):
    """Channel groups with growing receptive field, then cross-covariance attention, then the channel MLP."""

    def __init__(self, dim: int, scales: int, positional: bool):
        super().__init__()
        self.width = -(-dim // scales)
        self.convs = nn.ModuleList(
            nn.Conv2d(self.width, self.width, 3, padding=1, groups=self.width) for _ in range(scales - 1)
        )
        if positional:
            self.pos_embd = PositionalEncoding(dim)
        self.norm_xca = nn.LayerNorm(dim, eps=1e-6)
        self.gamma_xca = nn.Parameter(1e-6 * torch.ones(dim))
        self.xca = CrossCovarianceAttention(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.split(self.width, dim=1)
        parts, part = [], chunks[0]
        for i, conv in enumerate(self.convs):
            part = conv(part if i == 0 else part + chunks[i])
            parts.append(part)
        y = torch.cat([*parts, chunks[-1]], 1)
        B, C, H, W = y.shape
        if hasattr(self, "pos_embd"):
            y = y + self.pos_embd(H, W)
        t = y.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        t = t + self.gamma_xca * self.xca(self.norm_xca(t))
        t = self.gamma * self.mlp(self.norm(t))
        return x + t.transpose(1, 2).view(B, C, H, W)


class Stage(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        dim, scales = DIMS[index], SCALES[index]
        if index:
            self.downsample = nn.Sequential(LayerNorm2d(DIMS[index - 1]), nn.Conv2d(DIMS[index - 1], dim, 2, stride=2))
        blocks = [ConvEncoder(dim, KERNELS[index]) for _ in range(DEPTHS[index])]
        if scales > 1:
            blocks[-1] = SplitTransposeEncoder(dim, scales, positional=index == 1)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x) if hasattr(self, "downsample") else x)


def edgenext_stem() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, DIMS[0], 4, stride=4), LayerNorm2d(DIMS[0]))


def edgenext_pyramid(stem: nn.Module, stages: nn.ModuleList, x: Tensor, checkpointing: bool) -> list[Tensor]:
    """(B, 3, H, W) -> maps of 48, 96, 160, 304 channels at 1/4, 1/8, 1/16, 1/32."""
    x, pyramid = stem(x), []
    for stage in stages:
        x = apply(stage, x, checkpointing=checkpointing)
        pyramid.append(x)
    return pyramid
