"""Filtering of the cost volume: gates, axial-planar convolutions, disparity transformer, hourglass, classifier.

FoundationStereo (arXiv 2501.09898), section 3.2, "attentive hybrid cost filtering". Volumes are (B, C, D, h, w).
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stereo.blocks import BatchResidual3d, ConvBlock, ConvBN, apply, conv_bn, folded, recompute


class FeatureGate(nn.Module):
    """Multiply a volume by a sigmoid of the left image features, the same for all disparities."""

    def __init__(self, dim: int, feature_dim: int):
        super().__init__()
        hidden = feature_dim // 2
        self.feat_att = nn.Sequential(
            ConvBlock(nn.Conv2d(feature_dim, hidden, 1, bias=False)), nn.Conv2d(hidden, dim, 1)
        )

    def forward(self, volume: Tensor, feature: Tensor) -> Tensor:
        return volume * self.feat_att(feature).sigmoid().unsqueeze(2)


class AxialPlanarConv(nn.Module):
    """A 3x3 convolution in the image plane, then one of 17 taps along the disparity, each with batch norm and ReLU."""

    def __init__(self, dim: int, taps: int = 17):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(dim))
        self.conv2 = nn.Sequential(nn.Conv3d(dim, dim, (taps, 1, 1), padding=(taps // 2, 0, 0)), nn.BatchNorm3d(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(conv_bn(*self.conv1, x))
        conv, bn = self.conv2
        weight, bias = folded(conv, bn)  # (C, C, taps, 1, 1)
        middle = conv.kernel_size[0] // 2
        reach = min(middle, x.shape[2] - 1)  # taps farther out only ever meet the zero padding
        weight = weight[:, :, middle - reach : middle + reach + 1, 0]
        y = F.conv2d(x.flatten(3), weight, bias, padding=(reach, 0)).view(x.shape)  # one image of D rows and h*w columns
        return F.relu_(bn(y) if bn.training else y)


@lru_cache(maxsize=64)
def sinusoid(length: int, dim: int, device: torch.device) -> Tensor:
    """(1, length, dim): sine in the even, cosine in the odd channels, wavelengths from 2 pi to 10000 * 2 pi."""
    with torch.inference_mode(False):
        position = torch.arange(length, dtype=torch.float32, device=device)[:, None]
        frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10000.0) / dim))
        angle = position * frequency  # (length, dim / 2)
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None]


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, over_heads: bool):
        super().__init__()
        self.heads, self.over_heads = heads, over_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        N, T, C = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        size = C // self.heads
        qkv = F.linear(x, weight, bias).view(N, T, 3, self.heads, size)
        q, k, v = (t if self.over_heads else t.transpose(1, 2) for t in qkv.unbind(2))  # (N, heads, T, size) by default
        if x.is_cuda and size % 8:  # the fused kernels want multiples of 8; zero channels change nothing but the scale
            q, k, v = (F.pad(t, (0, -size % 8)) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]
        return self.out_proj((x if self.over_heads else x.transpose(1, 2)).reshape(N, T, C))


class TransformerLayer(nn.Module):
    """Post-norm layer with a hidden width equal to the model width."""

    def __init__(self, dim: int, heads: int, dropout: float, over_heads: bool):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads, over_heads)
        self.linear1, self.linear2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        y = self.linear2(self.dropout(F.gelu(self.linear1(x))))
        return self.norm2(x + self.dropout(y))


class DisparityTransformer(nn.Module):
    """Transformer along the disparity axis, one sequence per pixel: (B, C, D, h, w) -> the same shape.

    over_heads: attend over the heads at every disparity instead. It is what the public code has computed since its
    attention kernel was exchanged without transposing; the published weights were trained with the default.
    """

    def __init__(self, dim: int, layers: int = 4, heads: int = 4, dropout: float = 0.1, over_heads: bool = False):
        super().__init__()
        self.sa = nn.ModuleList(TransformerLayer(dim, heads, dropout, over_heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        B, C, D, h, w = x.shape
        t = x.permute(0, 3, 4, 2, 1).reshape(B * h * w, D, C)
        t = t + sinusoid(D, C, x.device)
        for layer in self.sa:
            t = layer(t)
        return t.view(B, h, w, D, C).permute(0, 4, 3, 1, 2)


class Hourglass(nn.Module):
    """3-D encoder-decoder over three scales, gated by image features, beside a transformer on a coarse patch volume.

    forward(volume (B, dim, D, h, w), [f4, f8, f16, f32] of the left image) -> (B, dim, D, h, w). D, h, w multiples of 8.
    feature_dims: channels of the four maps.
    """

    def __init__(self, dim: int, feature_dims: tuple[int, ...], legacy_head_attention: bool, checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        down = lambda i, o: nn.Sequential(
            ConvBlock(nn.Conv3d(i, o, 3, stride=2, padding=1, bias=False)), AxialPlanarConv(o)
        )
        up = lambda i, o: ConvBlock(nn.ConvTranspose3d(i, o, 4, stride=2, padding=1, bias=False))
        fuse = lambda i, o: nn.Sequential(
            ConvBlock(nn.Conv3d(i, o, 1, bias=False)), AxialPlanarConv(o), AxialPlanarConv(o)
        )
        c2, c4, c6 = 2 * dim, 4 * dim, 6 * dim
        self.conv1, self.conv2, self.conv3 = down(dim, c2), down(c2, c4), down(c4, c6)
        self.conv3_up, self.conv2_up, self.conv1_up = up(c6, c4), up(c4, c2), up(c2, dim)
        self.agg_0, self.agg_1 = fuse(2 * c4, c4), fuse(2 * c2, c2)
        self.conv_out = nn.Sequential(AxialPlanarConv(dim), AxialPlanarConv(dim))
        self.conv_patch = ConvBN(nn.Conv3d(dim, dim, 4, stride=4, groups=dim))
        self.atts = nn.ModuleDict({"4": DisparityTransformer(dim, over_heads=legacy_head_attention)})
        self.feature_att_8, self.feature_att_up_8 = FeatureGate(c2, feature_dims[1]), FeatureGate(c2, feature_dims[1])
        self.feature_att_16, self.feature_att_up_16 = FeatureGate(c4, feature_dims[2]), FeatureGate(c4, feature_dims[2])
        self.feature_att_32 = FeatureGate(c6, feature_dims[3])

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        """A sequence of units, each recomputed in the backward pass under checkpointing."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return module(x)
        for unit in module:
            x = recompute(unit, x)
        return x

    def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
        _, f8, f16, f32 = features
        x8 = self.feature_att_8(self._run(self.conv1, x), f8)
        x16 = self.feature_att_16(self._run(self.conv2, x8), f16)
        x32 = self.feature_att_32(self._run(self.conv3, x16), f32)
        x16 = torch.cat([self.conv3_up(x32), x16], 1)
        x16 = self.feature_att_up_16(self._run(self.agg_0, x16), f16)
        x8 = torch.cat([self.conv2_up(x16), x8], 1)
        x8 = self.feature_att_up_8(self._run(self.agg_1, x8), f8)
        patch, transformer = self.conv_patch(x), self.atts["4"]
        if self.checkpointing and torch.is_grad_enabled():
            patch = recompute(transformer, patch, preserve_rng_state=True)  # the only unit with dropout
        else:
            patch = transformer(patch)
        patch = F.interpolate(patch, scale_factor=4, mode="trilinear", align_corners=False)
        x = apply(self.conv1_up, x8, checkpointing=self.checkpointing)
        return self._run(self.conv_out, x + patch.to(x.dtype))


class Classifier(nn.Sequential):
    """Logits over the disparity planes: (B, dim, D, h, w) -> (B, 1, D, h, w)."""

    def __init__(self, dim: int, checkpointing: bool = False):
        super().__init__(
            ConvBlock(nn.Conv3d(dim, dim // 2, 3, padding=1, bias=False)),
            BatchResidual3d(dim // 2),
            nn.Conv3d(dim // 2, 1, 7, padding=3),
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for unit in list(self)[:2]:
            x = apply(unit, x, checkpointing=self.checkpointing)
        return self[2](x)
