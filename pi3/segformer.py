"""SegFormer-B0 (Xie et al., arXiv 2105.15203) for ADE20K: tells which pixels are sky.

Names are those of the official `segformer.b0.512x512.ade.160k.pth`, which loads strictly. The network is only ever evaluated, so
dropout and drop path are left out.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKY = 2  # class index in ADE20K
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DOWNLOAD = "https://github.com/NVlabs/SegFormer (trained models: segformer.b0.512x512.ade.160k.pth)"


class PatchEmbed(nn.Module):
    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, h, w, D)


class Attention(nn.Module):
    """Queries from every position, keys and values from a grid that a strided convolution made `reduction` times smaller."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads, self.reduction = num_heads, reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        context = x
        if self.reduction > 1:
            context = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        heads = lambda t: t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, tokens, d)
        k, v = self.kv(context).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(heads(self.q(x)), heads(k), heads(v))
        return self.proj(out.transpose(1, 2).flatten(2).view_as(x))


class DepthwiseConv(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MixTransformer(nn.Module):
    """The B0 encoder: images (B, 3, H, W) -> features (B, C, H/4.., W/4..) at 1/4, 1/8, 1/16, 1/32 (sizes rounded up)."""

    def __init__(self, dims=(32, 64, 160, 256), heads=(1, 2, 5, 8), reductions=(8, 4, 2, 1), depths=(2, 2, 2, 2)):
        super().__init__()
        for i, dim in enumerate(dims):
            embed = PatchEmbed(dims[i - 1], dim, 3, 2) if i else PatchEmbed(3, dim, 7, 4)
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(Block(dim, heads[i], reductions[i]) for _ in range(depths[i])))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.stages = len(dims)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for i in range(1, self.stages + 1):
            x = self.get_submodule(f"patch_embed{i}")(x)
            for block in self.get_submodule(f"block{i}"):
                x = block(x)
            x = self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2)
            features.append(x)
        return features


class LinearEmbed(nn.Module):
    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Fuse(nn.Module):
    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class DecodeHead(nn.Module):
    def __init__(self, in_dims=(32, 64, 160, 256), dim: int = 256, classes: int = 150):
        super().__init__()
        for i, in_dim in enumerate(in_dims):
            self.add_module(f"linear_c{i + 1}", LinearEmbed(in_dim, dim))
        self.linear_fuse = Fuse(len(in_dims) * dim, dim)
        self.linear_pred = nn.Conv2d(dim, classes, 1)
        self.conv_seg = nn.Conv2d(128, classes, 1)  # in the official file, used by nothing

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        maps = [self.get_submodule(f"linear_c{i + 1}")(f) for i, f in enumerate(features)]
        maps = [maps[0], *(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])]
        return self.linear_pred(self.linear_fuse(torch.cat(maps[::-1], 1)))


class SegFormer(nn.Module):
    """Normalised images (B, 3, H, W) -> class logits (B, 150, H/4, W/4) (sizes rounded up). Always in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.backbone = MixTransformer()
        self.decode_head = DecodeHead()
        for name, values in (("mean", MEAN), ("std", STD)):  # not in the official file
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        return super().train(False)  # batch statistics must not move, whatever the module that contains this one does

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))

    @torch.no_grad()
    def sky(self, images: Tensor, normalise: bool = True, chunk: int = 8) -> Tensor:
        """Mask (..., H, W) of the sky in images (..., 3, H, W), RGB in [0, 1], `chunk` images at a time.

        normalise=False feeds the images as they are, as the official code does; the weights were trained with normalised ones.
        """
        x = images.flatten(0, -4)
        if normalise:
            x = (x - self.mean) / self.std
        size = images.shape[-2:]
        resize = lambda logits: F.interpolate(logits, size, mode="bilinear", align_corners=False)
        masks = [resize(self(part)).argmax(1) == SKY for part in x.split(chunk)]
        return torch.cat(masks).view(*images.shape[:-3], *size)


def load_segformer(path: str | Path) -> SegFormer:
    """The network with the official weights (a file whose `state_dict` holds them). Errors name the file and where to get it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the sky model of stage conf is not there; get it from {DOWNLOAD} or set sky.ckpt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise many types
        raise ValueError(f"{path}: not a readable checkpoint ({error}); get it from {DOWNLOAD}") from error
    model = SegFormer()
    try:
        model.load_state_dict(state.get("state_dict", state))
    except RuntimeError as error:
        raise ValueError(f"{path}: these are not the weights of SegFormer-B0: {error}") from error
    return model
