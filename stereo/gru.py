"""Recurrent refinement: motion encoder, selective ConvGRUs at three scales, disparity head.

FoundationStereo (arXiv 2501.09898), section 3.3; selective recurrent unit of Wang et al., arXiv 2403.00486. Whatever does
not change between iterations (the response to the context, kernels that run together) is made once by `prepare`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stereo.blocks import lean_mlp


class MotionEncoder(nn.Module):
    """(disparity (B, 1, h, w), lookup features (B, cost_dim, h, w)) -> (B, dim, h, w); the last channel is the disparity."""

    def __init__(self, cost_dim: int, dim: int):
        super().__init__()
        self.convc1 = nn.Conv2d(cost_dim, 2 * dim, 1)
        self.convc2 = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1)
        self.convd1 = nn.Conv2d(1, dim // 2, 7, padding=3)
        self.convd2 = nn.Conv2d(dim // 2, dim // 2, 3, padding=1)
        self.conv = nn.Conv2d(2 * dim + dim // 2, dim - 1, 3, padding=1)

    def forward(self, disp: Tensor, cost: Tensor) -> Tensor:
        cost = F.relu_(self.convc2(F.relu_(self.convc1(cost))))
        motion = F.relu_(self.convd2(F.relu_(self.convd1(disp))))
        motion = F.relu_(self.conv(torch.cat([cost, motion], 1)))
        return torch.cat([motion, disp.to(motion.dtype)], 1)


class ConvGRU(nn.Module):
    """Holds the parameters of one kernel size; `SelectiveGRU` runs them."""

    def __init__(self, dim: int, dim_in: int, kernel: int):
        super().__init__()
        self.convz, self.convr, self.convq = (
            nn.Conv2d(dim + dim_in, dim, kernel, padding=kernel // 2) for _ in range(3)
        )


class Prepared(NamedTuple):
    """What a SelectiveGRU does not have to make in every iteration."""

    context: Tensor  # response of conv0 to the context, bias included: (B, X, h, w)
    weight: Tensor  # rest of conv0's kernel
    small_zr: tuple[Tensor, Tensor]  # kernel and bias of both gates, 1x1
    large_zr: tuple[Tensor, Tensor]  # the same, 3x3


class SelectiveGRU(nn.Module):
    """Two GRUs, with 1x1 and with 3x3 kernels, on the same input, blended per pixel by `attention`.

    dim: hidden width. dim_in: width of the whole input, the context first.
    """

    def __init__(self, dim: int, dim_in: int):
        super().__init__()
        self.conv0 = nn.Sequential(nn.Conv2d(dim_in, dim_in, 3, padding=1), nn.ReLU())
        self.conv1 = nn.Sequential(nn.Conv2d(dim_in + dim, dim_in + dim, 3, padding=1), nn.ReLU())
        self.small_gru, self.large_gru = ConvGRU(dim, dim_in, 1), ConvGRU(dim, dim_in, 3)

    def prepare(self, context: Tensor) -> Prepared:
        weight, bias, n = self.conv0[0].weight, self.conv0[0].bias, context.shape[1]
        response = F.conv2d(context, weight[:, :n], bias, padding=1)
        cast = lambda t: t.to(response.dtype)  # once, instead of by autocast in every iteration
        gates = []
        for gru in (self.small_gru, self.large_gru):
            pair = (gru.convz, gru.convr)
            gates.append((cast(torch.cat([c.weight for c in pair])), cast(torch.cat([c.bias for c in pair]))))
        return Prepared(response, cast(weight[:, n:]).contiguous(), *gates)

    def forward(self, attention: Tensor, h: Tensor, prepared: Prepared, *inputs: Tensor) -> Tensor:
        """(B, 1, h, w), (B, dim, h, w), `prepare(context)`, inputs after the context -> new hidden state."""
        x = torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]
        x = F.relu_(F.conv2d(x, prepared.weight, padding=1) + prepared.context)
        hx = F.relu_(self.conv1[0](torch.cat([x, h], 1)))
        states = []
        for gru, (weight, bias) in ((self.small_gru, prepared.small_zr), (self.large_gru, prepared.large_zr)):
            z, r = F.conv2d(hx, weight, bias, padding=gru.convz.padding).sigmoid().chunk(2, 1)
            q = gru.convq(torch.cat([r * h, x], 1)).tanh()
            states.append(torch.lerp(h, q, z))  # (1 - z) h + z q
        small, large = states
        return torch.lerp(large, small, attention)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution and channel MLP with layer scale, without a norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        y = self.gamma * lean_mlp(self.pwconv1, self.pwconv2, y)
        return x + y.permute(0, 3, 1, 2)


class DisparityHead(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(inplace=True),
            ConvNeXtBlock(dim),
            ConvNeXtBlock(dim),
            nn.Conv2d(dim, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def shrink(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class UpdateBlock(nn.Module):
    """One iteration over `levels` scales, coarse to fine.

    forward(hidden states, `prepare`d contexts, lookup features, disparity, attentions)
        -> new hidden states, mask features (B, dim/4, h, w), disparity update (B, 1, h, w).
    Lists are ordered fine to coarse: 1/4, 1/8, 1/16.
    """

    def __init__(self, cost_dim: int, dim: int, levels: int):
        super().__init__()
        self.levels = levels
        self.encoder = MotionEncoder(cost_dim, dim)
        if levels > 2:
            self.gru16 = SelectiveGRU(dim, 2 * dim)
        self.gru08 = SelectiveGRU(dim, 3 * dim if levels > 2 else 2 * dim)
        self.gru04 = SelectiveGRU(dim, 3 * dim)
        self.disp_head = DisparityHead(dim)
        self.mask = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, dim // 4, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def grus(self) -> list[SelectiveGRU]:
        return [self.gru04, self.gru08] + ([self.gru16] if self.levels > 2 else [])

    def prepare(self, contexts: list[Tensor]) -> list[Prepared]:
        return [gru.prepare(context) for gru, context in zip(self.grus(), contexts)]

    def forward(self, net, prepared, cost: Tensor, disp: Tensor, attention):
        net = list(net)
        coarse = []
        if self.levels > 2:
            net[2] = self.gru16(attention[2], net[2], prepared[2], shrink(net[1]))
            coarse = [enlarge(net[2], net[1])]
        net[1] = self.gru08(attention[1], net[1], prepared[1], shrink(net[0]), *coarse)
        motion = self.encoder(disp, cost)
        net[0] = self.gru04(attention[0], net[0], prepared[0], motion, enlarge(net[1], net[0]))
        return net, 0.25 * self.mask(net[0]), self.disp_head(net[0])
