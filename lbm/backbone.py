"""Frames to features: the ResNet-18 backbone of LBM, its pyramid, and the tokens of queried points."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lbm.deform_attn import recompute

STRIDE, DIM, LEVELS = 4, 256, 4  # fixed by the stages below


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


class BasicBlock(nn.Module):
    """Residual block of ResNet-18 (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        else:
            self.downsample = None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class MaxPool(nn.Module):
    """3x3, stride 2; the int64 places of the maxima, half as large as the input, are found again in the backward pass."""

    def forward(self, x):
        return recompute(lambda x: F.max_pool2d(x, 3, 2, 1), x)


class Backbone(nn.Module):
    """Frames -> features of stride 4: three ResNet-18 stages fused by 1x1 convolutions, plus a learned position embedding."""

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, input_size: tuple[int, int]):
        super().__init__()
        self.input_size = tuple(input_size)
        h, w = input_size[0] // STRIDE, input_size[1] // STRIDE
        self.frame_pos_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, DIM, h, w), std=0.02))
        stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), MaxPool())
        self.layer1 = nn.Sequential(*stem, nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64)))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256))
        self.proj1, self.proj2, self.proj3 = (nn.Conv2d(c, 64, 1) for c in (64, 128, 256))
        self.fusion = nn.Sequential(nn.Conv2d(192, DIM, 1), nn.BatchNorm2d(DIM), nn.GELU())
        scale = 1 / (255 * torch.tensor(self.STD))
        shift = torch.tensor(self.MEAN) / torch.tensor(self.STD)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)

    def forward(self, frames: torch.Tensor, checkpointing: bool = False) -> torch.Tensor:
        """frames (F, 3, h0, w0) uint8 or float, RGB 0..255 -> features (F, h, w, C) float32.

        With batch statistics all F frames form one batch. `checkpointing` keeps the outputs of the stages only.
        """
        x = frames.float()
        if x.shape[-2:] != self.input_size:
            x = F.interpolate(x, size=self.input_size, mode="bilinear", align_corners=False)
        x = (x * self.scale - self.shift).to(compute_dtype(x.device), memory_format=torch.channels_last)
        run = self._checkpointed if checkpointing and torch.is_grad_enabled() else lambda f, *a: f(*a)
        c1 = run(self.layer1, x)
        c2 = run(self.layer2, c1)
        c3 = run(self.layer3, c2)
        return run(self._fuse, c1, c2, c3).float() + self.frame_pos_embedding.permute(0, 2, 3, 1).contiguous()

    def _fuse(self, c1, c2, c3):
        # With channels last a 1x1 convolution is a linear layer.
        linear = lambda conv, x: F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
        fine, *coarse = (linear(proj, c) for proj, c in zip((self.proj1, self.proj2, self.proj3), (c1, c2, c3)))
        coarse = (F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=False) for x in coarse)
        x = linear(self.fusion[0], torch.cat((fine, *coarse), 1))
        return self.fusion[1:](x).permute(0, 2, 3, 1)

    def _checkpointed(self, function, *inputs):
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self._spare_statistics()))

    @contextmanager
    def _spare_statistics(self):
        """For the second pass of a checkpoint: running statistics are updated once per step, so this pass updates copies."""
        kept = [(m._buffers, dict(m._buffers)) for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for buffers, own in kept:
            buffers.update({name: buffer.clone() for name, buffer in own.items()})
        try:
            yield
        finally:
            for buffers, own in kept:
                buffers.update(own)


def pool_pyramid(f: torch.Tensor) -> torch.Tensor:
    """f (F, h, w, C) and its 2x2, 4x4, 8x8 means, fine to coarse: (F, S, C). Odd last rows and columns are left out."""
    levels = [f]
    for _ in range(LEVELS - 1):
        n, h, w, c = (size // (1, 2, 2, 1)[i] for i, size in enumerate(levels[-1].shape))
        rows = levels[-1][:, : 2 * h, : 2 * w].reshape(n, h, 2, 2 * w, c).sum(2)  # sums keep no input, unlike avg_pool2d
        levels.append(rows.reshape(n, h, w, 2, c).sum(3) / 4)
    return torch.cat([x.flatten(1, 2) for x in levels], 1)


class _InverseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        inverse = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12).reciprocal()
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        x, inverse = ctx.saved_tensors
        return x * (grad * -(inverse**3)).to(x.dtype)[..., None]


def inverse_norm(x: torch.Tensor) -> torch.Tensor:
    """1 / max(|x|, 1e-12) over the last axis in float32. Its gradient is one pass over x."""
    return _InverseNorm.apply(x)


def sample_tokens(f: torch.Tensor, queries: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear features at queries (B, N, 3) = (t, x, y) px of an image of `size` (H, W); f (T, B, h, w, C) -> (B, N, C) float32.

    Cell centres lie at (x / stride - 0.5), places beyond the outermost centres read the border. Reads four rows per query.
    """
    t_max, b, h, w, c = f.shape
    n = queries.shape[1]
    t, x, y = queries.unbind(-1)
    x = (x * (w / size[1]) - 0.5).clamp(0, w - 1)
    y = (y * (h / size[0]) - 0.5).clamp(0, h - 1)
    x0, y0 = x.floor().clamp(max=w - 2), y.floor().clamp(max=h - 2)
    fx, fy = x - x0, y - y0
    weight = torch.stack(((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy), -1)  # (B, N, 4)
    frame = t.long().clamp(0, t_max - 1) * b + torch.arange(b, device=f.device)[:, None]
    first = (frame * h + y0.long()) * w + x0.long()  # (B, N): row of the upper left corner
    rows = torch.stack((first, first + 1, first + w, first + w + 1), -1)
    corners = f.reshape(-1, c).index_select(0, rows.flatten()).view(b, n, 4, c)
    return (corners.float() * weight[..., None]).sum(2)
