"""AutoencoderKL of Stable Diffusion 1.x (arXiv 2112.10752): images in [-1,1] to latents of an eighth of the side, and back.

Names of parameters and their shapes are those of the published checkpoints. The model is never trained here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdiff.layers import Downsample, ResnetBlock, Upsample, conv2d, group_norm, norm_conv2d

EPS = 1e-6  # of every norm of the autoencoder; the UNet has 1e-5


class Attention(nn.Module):
    """Single-head self-attention over the pixels of x (N,C,H,W), + x; unlike the UNet's with biases and its own norm."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = group_norm(x, self.group_norm).permute(0, 2, 3, 1).reshape(n, 1, h * w, c)  # one head
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(out).view(n, h, w, c).permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets of one resolution, then a sampler ("down", "up" or None)."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, sampler: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, None, groups, EPS) for i in range(layers)
        )
        self.sampler = sampler
        if sampler == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)])
        elif sampler == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.sampler == "down":
            return self.downsamplers[0](x)
        return self.upsamplers[0](x) if self.sampler == "up" else x


class Encoder(nn.Module):
    """(N,3,H,W) -> (N,2 * latent_channels,H/8,W/8), with four levels."""

    def __init__(self, in_channels: int, out_channels: int, widths: list[int], layers: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        samplers = ["down"] * (len(widths) - 1) + [None]
        self.down_blocks = nn.ModuleList(Level(i, o, layers, groups, s) for i, o, s in zip(before, widths, samplers))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(x, self.conv_in)
        for level in self.down_blocks:
            x = level(x)
        return norm_conv2d(self.mid_block(x), self.conv_norm_out, self.conv_out)


class Decoder(nn.Module):
    """(N,latent_channels,h,w) -> (N,3,8h,8w), with four levels."""

    def __init__(self, in_channels: int, out_channels: int, widths: list[int], layers: int, groups: int):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        before = [widths[0], *widths[:-1]]
        samplers = ["up"] * (len(widths) - 1) + [None]
        self.up_blocks = nn.ModuleList(Level(i, o, layers + 1, groups, s) for i, o, s in zip(before, widths, samplers))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(conv2d(x, self.conv_in))
        for level in self.up_blocks:
            x = level(x)
        return norm_conv2d(x, self.conv_norm_out, self.conv_out)


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, fp32, of the latents from the moments (N,2C,h,w); log variance clamped to [-30, 20]."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


class AutoencoderKL(nn.Module):
    """`encode` gives the posterior of the latents, `decode` an image. Latents here are unscaled: the network that denoises
    sees them times `scaling_factor`."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
    ):
        super().__init__()
        widths = list(block_out_channels)
        self.encoder = Encoder(in_channels, 2 * latent_channels, widths, layers_per_block, norm_num_groups)
        self.decoder = Decoder(latent_channels, out_channels, widths, layers_per_block, norm_num_groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.scaling_factor = scaling_factor

    def encode(self, images: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and deviation (N,4,H/8,W/8), fp32, of images (N,3,H,W) in [-1,1]; `chunk` > 0 bounds the images per pass."""
        parts = images.split(chunk) if chunk else (images,)
        dtype = self.quant_conv.weight.dtype
        return posterior(torch.cat([self.quant_conv(self.encoder(part.to(dtype))) for part in parts]))

    def decode(self, latents: Tensor, chunk: int = 0) -> Tensor:
        """Images (N,3,8h,8w), about [-1,1], of unscaled latents (N,4,h,w)."""
        parts = latents.split(chunk) if chunk else (latents,)
        dtype = self.post_quant_conv.weight.dtype
        return torch.cat([self.decoder(self.post_quant_conv(part.to(dtype))) for part in parts])


def rename_old_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of older files, query/key/value/proj_attn and (C,C,1,1) matrices, turned into today's."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for name, tensor in state.items():
        head, _, last = name.rpartition(".")
        head, _, module = head.rpartition(".")
        if ".attentions." in name and module in names:
            name = f"{head}.{names[module]}.{last}"
        if ".attentions." in name and tensor.ndim == 4 and math.prod(tensor.shape[2:]) == 1:
            tensor = tensor[:, :, 0, 0]
        out[name] = tensor
    return out
