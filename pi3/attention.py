"""Transformer blocks with a two-dimensional rotary position embedding (RoPE; Su et al., arXiv 2104.09864, applied per axis).

Tensor names are those of the published Pi3 weights. Attention over the tokens of one view and over the tokens of all views is
the same block: only the shape of its input differs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi3.dinov2 import LayerScale, Mlp

Rope = tuple[Tensor, Tensor]  # cosines and signed sines, each (L, 1, head_dim)


def token_positions(h: int, w: int, registers: int, device: torch.device | None = None) -> Tensor:
    """Integer (y, x) of every token of a view, (registers + h*w, 2): registers at (0, 0), patches from (1, 1), row-major."""
    rows, columns = torch.arange(1, h + 1, device=device), torch.arange(1, w + 1, device=device)
    grid = torch.cartesian_prod(rows, columns)  # (h*w, 2)
    return F.pad(grid, (0, 0, registers, 0))


def rope_tables(
    positions: Tensor, head_dim: int, base: float = 100.0, dtype: torch.dtype = torch.float32, angles: str = "float32"
) -> Rope:
    """Tables for `positions` (L, 2) of (y, x): cosines, and sines with the sign of the rotation, each (L, 1, head_dim).

    The first half of the channels turns with y, the second with x; within a half, channel j pairs with j + head_dim/4.
    angles: "float32" computes them exactly; "activation" rounds the angles to `dtype` first, as the official code does (in
        bfloat16 an angle of 37 is then off by up to 0.125 rad).
    """
    if angles not in ("float32", "activation"):
        raise ValueError(f"rope_angles is {angles!r}: expected float32 or activation")
    if head_dim % 4:
        raise ValueError(f"a head of {head_dim} channels cannot be split into pairs for two axes: use a multiple of 4")
    n = head_dim // 4
    frequency = base ** (-torch.arange(n, device=positions.device, dtype=torch.float32) / n)
    angle = positions[:, :, None] * frequency  # (L, 2, n)
    if angles == "activation":
        angle = angle.to(dtype)
    cos, sin = angle.cos(), angle.sin()
    tables = torch.stack((cos, cos), 2), torch.stack((-sin, sin), 2)  # (L, 2, 2, n)
    return tuple(t.view(-1, 1, head_dim).to(dtype) for t in tables)


def rotate(t: Tensor, rope: Rope) -> Tensor:
    """Rotate t (..., L, heads, head_dim) by the tables of its L positions."""
    cos, sin = rope
    partner = t.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)  # the other member of each pair
    return torch.addcmul(t * cos, partner, sin)


class Attention(nn.Module):
    """Self-attention on (B, L, C) with RoPE and, optionally, LayerNorm of queries and keys per head (eps 1e-5)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each (B, L, heads, d)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast LayerNorm returns float32
        q, k = rotate(q, rope), rotate(k, rope)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, heads, L, d) -> (B, L, C)


class CrossAttention(nn.Module):
    """Attention of x (B, L, C) to a context (B, M, C), RoPE on both where tables are given."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None = None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))  # (B, L or M, heads, d)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block. Decoder blocks have q/k norm and LayerScale (init 0.01); blocks of the heads have neither."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, layer_scale: float | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim)
        if layer_scale is not None:
            nn.init.constant_(self.ls1.gamma, layer_scale)
            nn.init.constant_(self.ls2.gamma, layer_scale)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class CrossBlock(nn.Module):
    """Self-attention, attention to a context, MLP. Without self-attention (`self_attention=False`) norm1 and attn are absent."""

    def __init__(self, dim: int, num_heads: int, self_attention: bool = True):
        super().__init__()
        if self_attention:
            self.norm1 = nn.LayerNorm(dim, eps=1e-6)
            self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.norm_y = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.self_attention = self_attention

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None = None) -> Tensor:
        if self.self_attention:
            x = x + self.attn(self.norm1(x), rope)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(context), rope)
        return x + self.mlp(self.norm3(x))
