"""Layers that the UNet and the autoencoder share, written so that a training step keeps as little as it can.

Autograd keeps, for GroupNorm -> SiLU -> convolution, three copies of the activation (and under autocast two of them in fp32). The
functions here keep the norm's input alone, in the dtype that it came in. The arithmetic of the norms is fp32 whatever the
dtype of their input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """x (N,C,H,W) in fp32 and in the one memory format that the GroupNorm kernels take: NCHW, or on a CPU that of `like`."""
    nhwc = like.device.type == "cpu" and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return x.float().contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def _normalise(x: Tensor, norm: tuple, stats: tuple[Tensor, Tensor]) -> Tensor:
    """GroupNorm's result for x (N,C,H,W) fp32 once more, from its statistics (N,G) each."""
    (weight, bias, groups), (mean, rstd), (n, c) = norm, stats, x.shape[:2]
    scale = (rstd[:, :, None] * weight.float().view(1, groups, -1)).view(n, c)  # (N,G,1) * (1,G,C/G) -> (N,C)
    shift = bias.float() - (mean[:, :, None].expand(n, groups, c // groups).reshape(n, c)) * scale
    return torch.addcmul(shift[..., None, None], x, scale[..., None, None])


def _norm_backward(grad: Tensor, x: Tensor, norm: tuple, stats: tuple[Tensor, Tensor], wanted: list[bool]) -> tuple:
    """Gradients of GroupNorm with respect to x (N,C,H,W) fp32, weight and bias; None where not wanted."""
    (weight, _, groups), (n, c), pixels = norm, x.shape[:2], x[0, 0].numel()
    grad = _dense(grad, x)
    return torch.ops.aten.native_group_norm_backward(grad, x, *stats, weight.float(), n, c, pixels, groups, wanted)


class _GroupNorm(torch.autograd.Function):
    """GroupNorm that keeps its input, in the input's dtype, and the statistics."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(_dense(x, x), weight.float(), bias.float(), n, c, pixels, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups = groups
        return y if y.dtype == x.dtype else y.to(x.dtype)  # a cast that does nothing would cut the gradient in compiled code

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, *stats = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gx, gw, gb = _norm_backward(grad, _dense(x, x), (weight, bias, ctx.groups), stats, wanted)
        return (None if gx is None else gx.to(x.dtype)), gw, gb, None, None


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of x (N,C,H,W) with the parameters of `norm`. fp32 inside; the result has x's dtype."""
    return _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class _NormConv2d(torch.autograd.Function):
    """Convolution of silu(GroupNorm(x)). Keeps x and the norm's statistics; backward makes the convolution's input again, which
    costs little beside the convolution, and only where its weight is trained."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, groups: int, eps: float, weight, bias, stride: int, padding: int) -> Tensor:
        n, c, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(_dense(x, x), norm_weight.float(), norm_bias.float(), n, c, pixels, groups, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight)
        ctx.groups, ctx.stride, ctx.padding = groups, stride, padding
        return F.conv2d(F.silu(y).to(x.dtype), weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, norm_weight, norm_bias, mean, rstd, weight = ctx.saved_tensors
        norm, stats, x32 = (norm_weight, norm_bias, ctx.groups), (mean, rstd), _dense(x, x)
        need_x, need_w, need_b = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[5], ctx.needs_input_grad[6]
        with torch.autocast(grad.device.type, enabled=False):
            z = _normalise(x32, norm, stats)
            y = F.silu(z).to(grad.dtype)  # the convolution's input, in the precision that it ran in
            window = ([ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False, [0, 0], 1, [need_x, need_w, need_b])
            gy, gw, gb = torch.ops.aten.convolution_backward(grad, y, weight.to(grad.dtype), [len(weight)], *window)
            grads = (None, None, None)
            if need_x:
                gz = torch.ops.aten.silu_backward(_dense(gy, x32), z)
                grads = _norm_backward(gz, x32, norm, stats, list(ctx.needs_input_grad[:3]))
        gx = None if grads[0] is None else grads[0].to(x.dtype)
        gw, gb = (None if g is None else g.to(weight.dtype) for g in (gw, gb))
        return gx, grads[1], grads[2], None, None, gw, gb, None, None


def norm_conv2d(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """conv(silu(norm(x))) of x (N,C,H,W): GroupNorm in fp32, the convolution in the precision of x or of autocast."""
    given = (norm.weight, norm.bias, norm.num_groups, norm.eps, conv.weight, conv.bias)
    return _NormConv2d.apply(x, *given, conv.stride[0], conv.padding[0])


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm of x (...,C). fp32 inside; the result has x's dtype also under autocast."""
    return torch.native_layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)[0].to(x.dtype)


class _NormLinear(torch.autograd.Function):
    """Linear layers side by side on one LayerNorm(x). Keeps x and the statistics; backward makes the layers' input again."""

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, *parameters) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], norm_weight, norm_bias, eps)
        y = y.to(x.dtype)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, *weights)
        ctx.eps = eps
        return tuple(F.linear(y, weight, bias) for weight, bias in zip(weights, biases))

    @staticmethod
    def backward(ctx, *grads):
        x, norm_weight, norm_bias, mean, rstd, *weights = ctx.saved_tensors
        dtype, shape, norm, x32, out = grads[0].dtype, x.shape[-1:], (norm_weight, norm_bias), x.float(), []
        with torch.autocast(x.device.type, enabled=False):
            y = torch.native_layer_norm(x32, shape, *norm, ctx.eps)[0].to(dtype).flatten(0, -2)
            gy = None
            for i, (grad, weight) in enumerate(zip(grads, weights)):
                need_w, need_b = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
                flat = grad.flatten(0, -2)
                out.append((flat.T @ y).to(weight.dtype) if need_w else None)
                out.append(flat.sum(0).to(weight.dtype) if need_b else None)
                part = flat @ weight.to(dtype)
                gy = part if gy is None else gy + part
            wanted = list(ctx.needs_input_grad[:3])
            gy = gy.view(x.shape).float()
            gx, gw, gb = torch.ops.aten.native_layer_norm_backward(gy, x32, shape, mean, rstd, *norm, wanted)
        return (None if gx is None else gx.to(x.dtype)), gw, gb, None, *out


def norm_linear(x: Tensor, norm: nn.LayerNorm, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """linear(norm(x)) of every one of `linears`, for x (...,C). The norm in fp32; the rest in the precision of x or of autocast."""
    parameters = [p for linear in linears for p in (linear.weight, linear.bias)]
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, *parameters)


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


class _GEGLULinear(torch.autograd.Function):
    """Linear layer of value * gelu(gate), the two halves of the last axis. Keeps its input only."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        value, gate = x.chunk(2, dim=-1)
        return F.linear(value * F.gelu(gate), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        gx = gw = gb = None
        with torch.autocast(grad.device.type, enabled=False):
            gelu = F.gelu(gate)
            if ctx.needs_input_grad[0]:
                gy = grad @ weight.to(grad.dtype)
                gx = torch.cat([gy * gelu, torch.ops.aten.gelu_backward(gy * value, gate)], dim=-1)
            if ctx.needs_input_grad[1]:
                gw = (grad.flatten(0, -2).T @ (value * gelu).flatten(0, -2)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                gb = grad.flatten(0, -2).sum(0).to(weight.dtype)
        return gx, gw, gb


def geglu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """x (...,2C) -> (...,out): `linear` of the first half times gelu (erf form) of the second half."""
    return _GEGLULinear.apply(x, linear.weight, linear.bias)


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
        h = norm_conv2d(x, self.norm1, self.conv1)
        if silu_time is not None:
            h = h + self.time_emb_proj(silu_time)[:, :, None, None]
        h = norm_conv2d(h, self.norm2, self.conv2)
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
