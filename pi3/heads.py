"""Heads of Pi3: transformers per view, and the layers that turn their tokens into points, confidence and camera poses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi3.attention import Block, CrossBlock, Rope
from pi3.geometry import complete, nearest_rotation


def run_block(block: nn.Module, *args, recompute: bool) -> Tensor:
    """A block's output; `recompute` its activations in the backward pass instead of keeping them."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return block(*args)


class HeadTransformer(nn.Module):
    """Transformer over the tokens of each view alone: (B*N, L, in_dim) -> (B*N, L, out_dim). No final norm."""

    def __init__(self, in_dim: int, dim: int, depth: int, num_heads: int, out_dim: int, checkpointing: bool = False):
        super().__init__()
        self.projects = nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.linear_out = nn.Linear(dim, out_dim)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = self.projects(x)
        for block in self.blocks:
            x = run_block(block, x, rope, recompute=self.checkpointing and self.training)
        return self.linear_out(x)


class ContextTransformer(nn.Module):
    """Transformer of x (B, L, in_dim) with attention to a context (B, M, in_dim) in every block: (B, L, out_dim)."""

    def __init__(
        self, in_dim: int, dim: int, depth: int, num_heads: int, out_dim: int, self_attention: bool = True, checkpointing: bool = False
    ):
        super().__init__()
        self.projects_x = nn.Linear(in_dim, dim)
        self.projects_y = nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads, self_attention) for _ in range(depth))
        self.linear_out = nn.Linear(dim, out_dim)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None = None) -> Tensor:
        x, context = self.projects_x(x), self.projects_y(context)
        for block in self.blocks:
            x = run_block(block, x, context, rope, recompute=self.checkpointing and self.training)
        return self.linear_out(x)


class DenseHead(nn.Module):
    """One linear layer and a pixel shuffle: tokens (B, h*w, dim) -> maps (B, h*patch, w*patch, channels)."""

    def __init__(self, dim: int, channels: int, patch: int = 14):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.proj = nn.Linear(dim, channels * patch * patch)

    def forward(self, tokens: Tensor, h: int, w: int) -> Tensor:
        B, c, p = tokens.shape[0], self.channels, self.patch
        x = self.proj(tokens).view(B, h, w, c, p, p)  # output channel = c*p*p + dy*p + dx
        return x.permute(0, 1, 4, 2, 5, 3).reshape(B, h * p, w * p, c)


def points_from_raw(raw: Tensor) -> Tensor:
    """Raw (..., 3) = (x/z, y/z, log z) -> points (..., 3) in the camera's frame."""
    xy, log_z = raw.split((2, 1), -1)
    z = log_z.exp()
    return torch.cat((xy * z, z), -1)


class ResidualMlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.res_conv1 = nn.Linear(dim, dim)
        self.res_conv2 = nn.Linear(dim, dim)
        self.res_conv3 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.res_conv3(F.relu(self.res_conv2(F.relu(self.res_conv1(x))))))


class CameraHead(nn.Module):
    """Patch tokens of each view (B, h*w, dim), float32 -> camera-to-world pose (B, 4, 4), float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.res_conv = nn.ModuleList(ResidualMlp(dim) for _ in range(2))
        self.more_mlps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t = nn.Linear(dim, 3)
        self.fc_rot = nn.Linear(dim, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.res_conv:
            tokens = block(tokens)
        x = self.more_mlps(tokens.mean(1))
        R, t = rotation_from_raw(self.fc_rot(x)), self.fc_t(x)
        return complete(torch.cat([R, t[..., None]], -1))


def rotation_from_raw(raw: Tensor) -> Tensor:
    """Nine numbers (..., 9) -> the rotation (..., 3, 3) nearest to the matrix of their normalised rows."""
    return nearest_rotation(F.normalize(raw.unflatten(-1, (3, 3)), dim=-1, eps=1e-12))
