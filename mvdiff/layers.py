"""Layers that the UNet and the autoencoder share, written so that a training step keeps as little as it can.

Autograd keeps, for GroupNorm -> SiLU -> convolution, three copies of the activation (and under autocast two of them in fp32). The
functions here keep one each: the norm's input, in the dtype that it came in, and the convolution's input. The arithmetic
of the norms is fp32 whatever the dtype of their input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """x (N,C,H,W) in fp32 and in the one memory format that the GroupNorm kernels take: NCHW, or on a CPU that of `like`."""
    nhwc = like.device.type == "cpu" and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return x.float().contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


class _GroupNorm(torch.autograd.Function):
    """GroupNorm with an optional SiLU; keeps the input and the statistics, and recomputes the normalised values in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        n, c, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(_dense(x, x), weight.float(), bias.float(), n, c, pixels, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        # A SiLU in place, or a cast that does nothing, would cut the gradient in compiled code
        y = F.silu(y) if silu else y
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        n, c, pixels, groups = x.shape[0], x.shape[1], x[0, 0].numel(), ctx.groups
        x32, grad = _dense(x, x), _dense(grad, x)
        if ctx.silu:
            scale = (rstd[:, :, None] * weight.float().view(1, groups, -1)).view(n, c)  # (N,G,1) * (1,G,C/G) -> (N,C)
            shift = bias.float() - (mean[:, :, None].expand(n, groups, c // groups).reshape(n, c)) * scale
            grad = torch.ops.aten.silu_backward(grad, torch.addcmul(shift[..., None, None], x32, scale[..., None, None]))
        wanted = list(ctx.needs_input_grad[:3])
        gx, gw, gb = torch.ops.aten.native_group_norm_backward(
            grad, x32, mean, rstd, weight.float(), n, c, pixels, groups, wanted
        )
        return (None if gx is None else gx.to(x.dtype)), gw, gb, None, None, None


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool = False) -> Tensor:
    """GroupNorm of x (N,C,H,W) with the parameters of `norm`, then SiLU if asked. fp32 inside; the result has x's dtype."""
    return _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm of x (...,C). Statistics in fp32; the result has x's dtype also under autocast, which would keep fp32 copies."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return torch.native_layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)[0]


class _FrozenConv2d(torch.autograd.Function):
    """Convolution whose weight is not trained: keeps no input (autograd's own keeps it for a gradient that nobody wants)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            weight = weight.to(grad.dtype)
            return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, ctx.stride, ctx.padding), None, None, None, None


def conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution `conv` of x (N,C,H,W); a frozen one keeps nothing but its weight for backward."""
    if conv.weight.requires_grad or not torch.is_grad_enabled() or not x.requires_grad:
        return conv(x)
    return _FrozenConv2d.apply(x, conv.weight, conv.bias, conv.stride[0], conv.padding[0])


class _GEGLU(torch.autograd.Function):
    """value * gelu(gate) of the two halves of the last axis; keeps its input only."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)


def geglu(x: Tensor) -> Tensor:
    """(...,2C) -> (...,C): first half times gelu (erf form) of the second half."""
    return _GEGLU.apply(x)


class ResnetBlock(nn.Module):
    """norm, silu, conv, + time embedding, norm, silu, conv, + input; `time_channels` None: without the time embedding.

    (N,in_channels,H,W), (N,time_channels) -> (N,out_channels,H,W). The 1x1 shortcut exists only where the channels change.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_channels = in_channels != out_channels

    def forward(self, x: Tensor, silu_time: Tensor | None = None) -> Tensor:
        """x (N,C,H,W); silu_time (N,time_channels): silu of the embedding, computed once by the caller for all blocks."""
        h = conv2d(group_norm(x, self.norm1, silu=True), self.conv1)
        if silu_time is not None:
            h = h + self.time_emb_proj(silu_time)[:, :, None, None]
        h = conv2d(group_norm(h, self.norm2, silu=True), self.conv2)
        return h + (conv2d(x, self.conv_shortcut) if self.changes_channels else x)


class Downsample(nn.Module):
    """Convolution 3x3 of stride 2. `padding` 1 on all sides (UNet), or 0: one row and column of zeros right and below (VAE)."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding[0] == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return conv2d(x, self.conv)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, or to `size` (H,W) where given, then convolution 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return conv2d(F.interpolate(x, size=size, mode="nearest"), self.conv)
