"""DINOv2 vision transformer (Oquab et al., arXiv 2304.07193; registers: Darcet et al., arXiv 2309.16588).

Parameter names and shapes are those of the published weights (`dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth`), which load
strictly. The file stands byte-identical in `stereo/`, `moge/` and `pi3/`; `python tests/test_copies.py --fix FILE` copies it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PLAIN = {"num_register_tokens": 0, "interpolate_offset": 0.1, "interpolate_antialias": False}
REGISTERS = {"num_register_tokens": 4, "interpolate_offset": 0.0, "interpolate_antialias": True}
SIZES = {
    "vits": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vitb": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vitl": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vitg": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn_layer": "swiglufused"},
}


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, head_dim); never builds the T x T matrix
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # two thirds, rounded up to a multiple of 8: as many weights as an Mlp
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block. Under autocast the residual stream stays float32: LayerScale promotes each branch."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, ffn_layer: str):
        super().__init__()
        ffn = {"mlp": Mlp, "swiglufused": SwiGLU}[ffn_layer]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn(dim, int(mlp_ratio * dim))
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """ViT encoder. Images are (B, 3, H, W), ImageNet-normalised, H and W multiples of `patch_size`.

    img_size: side of the training images; fixes the grid of `pos_embed`, other sizes are interpolated.
    interpolate_offset, interpolate_antialias: belong to the variant, are not stored in any checkpoint (see `PLAIN`, `REGISTERS`).
    mask_token: register the (frozen, unused) token of masked pre-training, so that official weights load strictly.
    checkpointing: recompute each block in the backward pass (may be set at any time).
    """

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        ffn_layer: str = "mlp",
        num_register_tokens: int = 0,
        interpolate_offset: float = 0.1,
        interpolate_antialias: bool = False,
        mask_token: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.patch_size, self.embed_dim, self.num_register_tokens = patch_size, embed_dim, num_register_tokens
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.checkpointing = checkpointing
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        if mask_token:  # frozen: it never receives a gradient, and DDP would wait for one
            self.mask_token = nn.Parameter(torch.zeros(1, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, ffn_layer) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        for name, p in self.named_parameters():
            if name.endswith("_token") or name == "register_tokens":
                nn.init.zeros_(p) if name == "mask_token" else nn.init.normal_(p, std=1e-6)
            elif name == "pos_embed":
                nn.init.trunc_normal_(p, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def interpolate_pos_embed(self, h: int, w: int) -> Tensor:
        """Positional embedding (1, 1 + h*w, D) for a grid of h x w patches: bicubic, in float32.

        Variants without registers hand the resize a scale factor that is off by `interpolate_offset`, which moves the
        sampling positions by up to a percent of the embedding; variants with registers resize to a size with antialiasing.
        """
        M = math.isqrt(self.pos_embed.shape[1] - 1)
        if h == w == M:
            return self.pos_embed
        pos = self.pos_embed.float()
        grid = pos[:, 1:].reshape(1, M, M, -1).permute(0, 3, 1, 2)  # (1, M*M, D) -> (1, D, M, M)
        if self.interpolate_offset:
            size = {"scale_factor": ((h + self.interpolate_offset) / M, (w + self.interpolate_offset) / M)}
        else:
            size = {"size": (h, w)}
        grid = F.interpolate(grid, mode="bicubic", antialias=self.interpolate_antialias, **size)
        if grid.shape[-2:] != (h, w):
            raise ValueError(f"positional embedding came out as {tuple(grid.shape[-2:])}, expected {(h, w)}")
        return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + registers + h*w, D): [cls, registers, patches]; registers carry no position."""
        B, _, H, W = x.shape
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image of {H}x{W} pixels: both sides must be multiples of {self.patch_size}")
        x = torch.cat([self.cls_token.expand(B, -1, -1), self.patch_embed(x)], 1)
        x = x + self.interpolate_pos_embed(H // self.patch_size, W // self.patch_size).to(x.dtype)
        if self.num_register_tokens:
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], 1)
        return x

    def run_blocks(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Outputs of the `wanted` blocks in block order; the blocks after the last wanted one are not run."""
        outputs = []
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            if self.checkpointing and torch.is_grad_enabled():  # no randomness inside, hence no RNG state to keep
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
            if i in wanted:
                outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Final tokens: x_norm_clstoken (B, D), x_norm_regtokens (B, R, D), x_norm_patchtokens (B, h*w, D), all after the
        last LayerNorm, and x_prenorm (B, 1 + R + h*w, D) before it."""
        x = self.run_blocks(self.prepare_tokens(x), [len(self.blocks) - 1])[0]
        normed, R = self.norm(x), self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1 : 1 + R],
            "x_norm_patchtokens": normed[:, 1 + R :],
            "x_prenorm": x,
        }

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the normalised class token (B, D)."""
        return self.forward_features(x)["x_norm_clstoken"]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after chosen blocks, in block order whatever the order of `n`.

        n: the last n blocks, or zero-based block indices (ValueError if one is repeated or does not exist).
        reshape: patches as (B, D, h, w) (channels-last in memory) instead of (B, h*w, D).
        return_class_token: pairs (patches, class token (B, D)).
        norm: pass each through the final LayerNorm.
        """
        depth = len(self.blocks)
        wanted = list(range(depth - n, depth)) if isinstance(n, int) else sorted(n)
        if not wanted or len(set(wanted)) < len(wanted) or wanted[0] < 0 or wanted[-1] >= depth:
            raise ValueError(f"blocks {n} requested of an encoder with blocks 0..{depth - 1}, each at most once")
        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        outputs = self.run_blocks(self.prepare_tokens(x), wanted)
        if norm:
            outputs = [self.norm(o) for o in outputs]
        patches = [o[:, 1 + self.num_register_tokens :] for o in outputs]
        if reshape:
            patches = [p.unflatten(1, (h, w)).permute(0, 3, 1, 2) for p in patches]  # (B, h*w, D) -> (B, D, h, w)
        if return_class_token:
            return tuple((p, o[:, 0]) for p, o in zip(patches, outputs))
        return tuple(patches)


def dinov2(name: str, **options) -> DINOv2:
    """Encoder by its published name, e.g. `dinov2_vitl14_reg`, with random weights. `options` override the variant's."""
    match = re.fullmatch(r"dinov2_(vit[sblg])14(_reg)?", name)
    if not match:
        raise ValueError(f"no DINOv2 variant named {name!r}: expected dinov2_vit{{s,b,l,g}}14, with _reg for registers")
    return DINOv2(**{**SIZES[match[1]], **(REGISTERS if match[2] else PLAIN), **options})


def load_weights(
    model: DINOv2, source: str | Path | Mapping[str, Tensor], strict: bool = True, resize_pos_embed: bool = False
) -> tuple[list[str], list[str]]:
    """Load DINOv2 weights into `model` and return the (missing, unexpected) names.

    source: a file, or a state dict, bare or under `model`, `state_dict` or `teacher`; prefixes `module.`, `backbone.`,
        `encoder.` and the block chunks of training runs (`blocks.CHUNK.INDEX.`) are taken away.
    strict: raise RuntimeError that lists missing, unexpected and misshapen tensors. Shapes must agree in either case.
    resize_pos_embed: bicubically resize a positional grid of another size (never done silently).
    """
    origin = str(source) if isinstance(source, (str, Path)) else "the given state dict"
    state = torch.load(source, map_location="cpu", weights_only=True) if isinstance(source, (str, Path)) else source
    for key in ("model", "state_dict", "teacher"):
        state = state[key] if isinstance(state.get(key), Mapping) else state
    state = {re.sub(r"^(?:(?:module|backbone|encoder)\.)+", "", k): v for k, v in state.items()}
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in state.items()}
    own = model.state_dict()
    if resize_pos_embed and "pos_embed" in state and state["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        pos = state["pos_embed"].float()
        M, new = math.isqrt(pos.shape[1] - 1), math.isqrt(own["pos_embed"].shape[1] - 1)
        grid = pos[:, 1:].reshape(1, M, M, -1).permute(0, 3, 1, 2)  # (1, M*M, D) -> (1, D, M, M)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=new < M)
        state["pos_embed"] = torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differ = [k for k in own if k in state and state[k].shape != own[k].shape]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in differ]
    if shapes or (strict and (missing or unexpected)):
        raise RuntimeError(
            f"{origin} does not fit this DINOv2 variant: missing {missing}, unexpected {unexpected}, other shapes {shapes}"
        )
    model.load_state_dict(state, strict=False)
    return missing, unexpected
