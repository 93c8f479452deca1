"""Convolution units shared by the parts of the network, and recomputation of a unit in the backward pass."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

CONVOLUTION = {  # (spatial axes, transposed) -> function
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


@contextmanager
def scratch_statistics(module: nn.Module):
    """Let the batch norms of `module` write their running statistics into scratch copies."""
    kept = [(m, dict(m._buffers)) for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    for m, buffers in kept:
        m._buffers.update({k: v if v is None else v.clone() for k, v in buffers.items()})
    try:
        yield
    finally:
        for m, buffers in kept:
            m._buffers.update(buffers)


def recompute(module: nn.Module, *args: Tensor, preserve_rng_state: bool = False) -> Tensor:
    """module(*args), keeping only `args` for the backward pass, which runs the module once more.

    The second run must not update running statistics again, hence the scratch copies.
    """
    contexts = lambda: (nullcontext(), scratch_statistics(module))
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, context_fn=contexts)


def apply(module: nn.Module, *args: Tensor, checkpointing: bool) -> Tensor:
    """Run a unit, under `recompute` where a graph is built and checkpointing is on."""
    return recompute(module, *args) if checkpointing and torch.is_grad_enabled() else module(*args)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution with kernels of one pixel, (B, C, ..., W) -> (B, C', ..., W), as a plain two-dimensional one.

    The strided and the three-dimensional forms write out of bounds in the backward pass of oneDNN (CPU, torch 2.11) where there
    are few channels.
    """
    y = F.conv2d(x.flatten(2, -2), weight.view(*weight.shape[:2], 1, 1), bias)
    return y.view(*y.shape[:2], *x.shape[2:])


def convolve(conv: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run `conv` (2-D or 3-D, transposed or not) with another kernel and bias."""
    function = CONVOLUTION[len(conv.kernel_size), conv.transposed]
    if conv.transposed:
        return function(x, weight, bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    if max(conv.kernel_size) == 1 and conv.groups == 1:
        return pointwise(x[(..., *(slice(None, None, step) for step in conv.stride))], weight, bias)
    return function(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def folded(conv: nn.Module, bn: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Kernel and bias of `conv`, in eval mode of the norm with its fixed scale and shift folded in."""
    if bn.training:
        return conv.weight, conv.bias
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = bn.bias - bn.running_mean * scale
    axis = 1 if conv.transposed else 0  # of the output channels
    weight = conv.weight * scale.view([-1 if i == axis else 1 for i in range(conv.weight.dim())])
    return weight, shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)


def conv_bn(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    """bn(conv(x)); with fixed statistics in one pass, which keeps nothing between the two."""
    y = convolve(conv, x, *folded(conv, bn))
    return bn(y) if bn.training else y


class _LeanMlp(torch.autograd.Function):
    """Linear, GELU, Linear that keeps its input alone; the hidden layer, four times as wide, is made again in backward."""

    @staticmethod
    def forward(ctx, x, up_weight, up_bias, down_weight, down_bias):
        ctx.save_for_backward(x, up_weight, up_bias, down_weight)
        return F.linear(F.gelu(F.linear(x, up_weight, up_bias)), down_weight, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        x, up_weight, up_bias, down_weight = (t.to(grad.dtype) for t in saved)
        x, shape, grad = x.flatten(0, -2), x.shape, grad.flatten(0, -2)
        hidden = F.linear(x, up_weight, up_bias)
        down = (grad.T @ F.gelu(hidden), grad.sum(0))
        grad = torch.ops.aten.gelu_backward(grad @ down_weight, hidden)
        grads = ((grad @ up_weight).view(shape), grad.T @ x, grad.sum(0), *down)
        return tuple(g.to(t.dtype) for g, t in zip(grads, (*saved, saved[2])))


def lean_mlp(up: nn.Linear, down: nn.Linear, x: Tensor) -> Tensor:
    """down(gelu(up(x)))"""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # what is kept is then half as large
    return _LeanMlp.apply(x, up.weight, up.bias, down.weight, down.bias)


class ConvBlock(nn.Module):
    """conv -> norm -> LeakyReLU(0.01); `norm` is "batch" (parameters `bn.*`), "instance" (no parameters) or None."""

    def __init__(self, conv: nn.Module, norm: str | None = "batch"):
        super().__init__()
        self.conv, self.instance_norm = conv, norm == "instance"
        if norm == "batch":
            self.bn = (nn.BatchNorm2d if len(conv.kernel_size) == 2 else nn.BatchNorm3d)(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "bn"):
            x = conv_bn(self.conv, self.bn, x)
        else:
            x = F.instance_norm(self.conv(x)) if self.instance_norm else self.conv(x)
        return F.leaky_relu_(x, 0.01)


class ConvBN(nn.Sequential):
    """conv -> batch norm, with parameters `0.*` and `1.*`."""

    def __init__(self, conv: nn.Module):
        super().__init__(conv, (nn.BatchNorm2d if len(conv.kernel_size) == 2 else nn.BatchNorm3d)(conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return conv_bn(self[0], self[1], x)


class InstanceResidual(nn.Module):
    """relu(x + N(conv2(relu(N(conv1 x))))), N instance norm without parameters.

    inner_relu: one more ReLU on the branch before the sum, as in `conv4` (where the convolutions also have a bias).
    """

    def __init__(self, dim: int, bias: bool, inner_relu: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=bias)
        self.inner_relu = inner_relu

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(F.instance_norm(self.conv1(x)))
        y = F.instance_norm(self.conv2(y))
        return F.relu_(x + (F.relu_(y) if self.inner_relu else y))


class BatchResidual(nn.Module):
    """relu(shortcut(x) + BN(conv2(relu(BN(conv1 x))))) in two dimensions, all convolutions with bias.

    shortcut: identity, or a strided 1x1 convolution with its own norm. That norm bears two names in the published
    weights (`norm3` and `downsample.1`) and is one module here, too.
    """

    def __init__(self, dim_in: int, dim: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        if stride != 1 or dim_in != dim:
            downsample = ConvBN(nn.Conv2d(dim_in, dim, 1, stride=stride))
            self.norm3 = downsample[1]
            self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(conv_bn(self.conv1, self.norm1, x))
        y = F.relu_(conv_bn(self.conv2, self.norm2, y))
        return F.relu_(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class BatchResidual3d(nn.Module):
    """relu(x + BN(conv2(relu(BN(conv1 x))))) in three dimensions, no bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv3d(dim, dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(dim)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(conv_bn(self.conv1, self.bn1, x))
        return F.relu_(conv_bn(self.conv2, self.bn2, y) + x)
