"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021, section 4.1) that keeps nothing large for backward.

Each query reads K points per level and head from a feature pyramid; where to read and with what weight are linear functions
of the query. The projected value map and the samples fill the memory of a straightforward implementation. Here both are
made again in the backward pass from the pyramid, which all calls share, so that a call keeps only its offsets and weights.

Three kernels do the reading (`msda: torch | triton | mmcv`); `resolve_msda` picks one.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Levels(NamedTuple):
    """The pyramid's layout: the levels lie one after another, fine to coarse, on one axis of S cells."""

    shapes: tuple[tuple[int, int], ...]  # (h, w) per level, Python integers
    hw: torch.Tensor  # the same as int64 (L, 2) on the device
    start: torch.Tensor  # int64 (L,): first cell of each level

    @property
    def sizes(self) -> list[int]:
        """Cells per level."""
        return [h * w for h, w in self.shapes]


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.run = run
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        device = next(t for t in tensors if t is not None).device.type
        with torch.autocast(device, enabled=False):
            return run(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:]
        tensors = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad():
            out = ctx.run(*tensors)
        out = out if isinstance(out, tuple) else (out,)
        used = [(o, g) for o, g in zip(out, grads) if g is not None]
        inputs = [t for t, n in zip(tensors, needed) if n]
        found = torch.autograd.grad([o for o, _ in used], inputs, [g for _, g in used], allow_unused=True) if used else ()
        found = iter(found)
        return None, *(next(found, None) if n else None for n in needed)


def recompute(run, *tensors):
    """`run(*tensors)`, keeping only `tensors` for the backward pass, where `run` is called again.

    `run` returns a tensor or a tuple of tensors, holds no random numbers and chooses its dtypes itself (it is called outside
    autocast). Lighter than torch.utils.checkpoint: no random state, no hooks. Inside torch.compile the latter is used, which
    the compiler understands.
    """
    if torch.compiler.is_compiling():
        device = next(t for t in tensors if t is not None).device.type

        def plain(*tensors):
            with torch.autocast(device, enabled=False):
                return run(*tensors)

        return checkpoint(plain, *tensors, use_reentrant=False, preserve_rng_state=False)
    return _Recompute.apply(run, *tensors)


# ---------------------------------------------------------------------------------------------------- kernels


class _Corners(torch.autograd.Function):
    """The four cells around every sampling point: cell (B, N, k, H, 4, L, K) int32 on the pyramid's axis, and weight, the same in
    float32: attention times bilinear weight, 0 outside the map. The gradient is written out, as autograd would take twice as many
    passes. At a whole-numbered position it is the right-hand one.
    """

    @staticmethod
    def forward(ctx, offsets, attention, reference, hw, start):
        attention = attention[:, :, None]  # (B, N, 1, H, L, K)
        size = hw.T.flip(0)[:, None, None, None, None, :, None].float()  # (2, 1, 1, 1, 1, L, 1): widths, heights
        shift = offsets.movedim(-1, 0)[:, :, :, None] - 0.5  # (2, B, N, 1, H, L, K)
        place = torch.addcmul(shift, reference.movedim(-1, 0)[:, :, :, :, None, :, None], size)  # (2, B, N, k, H, L, K)
        place = place.nan_to_num()  # NaN, as a diverged step has it, must not become an address outside the map
        low = place.floor()
        fraction = place - low
        high = low + 1
        cell_low, cell_high = (torch.minimum(x.clamp(min=0), size - 1) for x in (low, high))
        in_low, in_high = cell_low == low, cell_high == high
        none = place.new_zeros(())
        w_low, w_high = torch.where(in_low, 1 - fraction, none), torch.where(in_high, fraction, none)
        y_low, y_high = (torch.addcmul(start[:, None].float(), y, size[0]) for y in (cell_low[1], cell_high[1]))
        x_low, x_high = cell_low[0], cell_high[0]
        # In float32, exact up to 2^24 cells.
        cell = torch.stack((y_low + x_low, y_low + x_high, y_high + x_low, y_high + x_high), 4).int()
        a_low, a_high = attention * w_low[1], attention * w_high[1]
        weight = torch.stack((a_low * w_low[0], a_low * w_high[0], a_high * w_low[0], a_high * w_high[0]), 4)
        ctx.save_for_backward(attention, w_low, w_high, in_low, in_high, size)
        ctx.mark_non_differentiable(cell)
        return cell, weight

    @staticmethod
    def backward(ctx, _, grad):
        attention, w_low, w_high, in_low, in_high, size = ctx.saved_tensors
        g00, g01, g10, g11 = grad.unbind(4)  # (y, x)
        g_low, g_high = g00 * w_low[0] + g01 * w_high[0], g10 * w_low[0] + g11 * w_high[0]  # by the weights of y
        x_low, x_high = g00 * w_low[1] + g10 * w_high[1], g01 * w_low[1] + g11 * w_high[1]  # by the weights of x
        none = grad.new_zeros(())
        place = torch.where(in_high, torch.stack((x_high, g_high)), none) - torch.where(in_low, torch.stack((x_low, g_low)), none)
        place = place * attention  # (2, B, N, k, H, L, K)
        grad_reference = (place * size).sum((4, 6)).movedim(0, -1)
        grad_attention = (g_low * w_low[1] + g_high * w_high[1]).sum(2)
        return place.sum(3).movedim(0, -1), grad_attention, grad_reference, None, None


DENSE_CELLS = 512  # up to so many cells a level is read by a matrix product on a CPU


def sample_torch(value, offsets, attention, reference, levels: Levels):
    """Weighted bilinear reading in plain PyTorch: one embedding_bag whose rows are the corners of the sampling points.

    value (B, S, H, D), or (B, S, 1, D) if all heads read the same map; offsets (B, N, H, L, K, 2) in cells (x, y);
    attention (B, N, H, L, K); reference (B, N, k, L, 2) in [0, 1] (x, y). All are read as float32.
    A point lies at reference * (w, h) - 0.5 + offset in cell centres of its level; outside the map counts as zero.
    Returns the sums (B, N, k, H, D) float32 and the weight (B, N, k, H) that fell inside the map.
    """
    b, s, groups, d = value.shape
    n, k, heads = reference.shape[1], reference.shape[2], offsets.shape[2]
    value, offsets, attention, reference = (x.float() for x in (value, offsets, attention, reference))
    bags = n * k * heads
    # A coarse level is read so often per cell that the gathered sums cost more than a product with a dense matrix of weights.
    dense = groups == 1 and not value.is_cuda
    fine = sum(size > DENSE_CELLS for size in levels.sizes) if dense else len(levels.sizes)
    first = sum(levels.sizes[:fine])
    table, coarse = value.split((first, s - first), 1)
    out, mass = 0, 0
    for part, gather in ((slice(0, fine), True), (slice(fine, None), False)):
        if not levels.sizes[part]:
            continue
        cell, weight = _Corners.apply(
            offsets[:, :, :, part], attention[:, :, :, part], reference[:, :, :, part], levels.hw[part], levels.start[part]
        )
        mass = mass + weight.sum((4, 5, 6))
        weight = weight.view(b, bags, -1)
        if gather:
            row = cell + torch.arange(b, device=value.device, dtype=torch.int32).view(b, 1, 1, 1, 1, 1, 1) * first
            if groups > 1:
                row = row * heads + torch.arange(heads, device=value.device, dtype=torch.int32).view(heads, 1, 1, 1)
            row, table = row.view(b * bags, -1), table.reshape(-1, d)  # (B * S' * groups, D)
            out = F.embedding_bag(row, table, per_sample_weights=weight.flatten(0, 1), mode="sum").view(b, bags, d)
        else:
            matrix = weight.new_zeros(b, bags, s - first).scatter_add(2, (cell - first).view(b, bags, -1).long(), weight)
            out = out + matrix @ coarse[:, :, 0]
    return out.view(b, n, k, heads, d), mass


def sample_mmcv(value, offsets, attention, reference, levels: Levels):
    """The reading by mmcv's CUDA operator, in float32: it would cast the locations to the value's dtype."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    b, n, k = reference.shape[:3]
    size = levels.hw.flip(-1)[:, None].float()  # (L, 1, 2) as (w, h)
    location = reference.float()[:, :, :, None, :, None] + (offsets.float() / size)[:, :, None]  # (B, N, k, H, L, K, 2)
    weight = attention.float()[:, :, None].expand(-1, -1, k, -1, -1, -1)
    out = MultiScaleDeformableAttnFunction.apply(
        value.float().contiguous(), levels.hw, levels.start, location.flatten(1, 2), weight.flatten(1, 2).contiguous(), b
    )  # the last argument is the number of batch items per launch
    return out.view(b, n, k, value.shape[2], value.shape[3])


def sample(kernel: str, value, offsets, attention, reference, levels: Levels) -> torch.Tensor:
    """(B, N, k, H, D) in float32 by the named kernel; shapes as in `sample_torch`."""
    if kernel == "triton":
        from lbm.msda_triton import sample_triton

        return sample_triton(value, offsets, attention, reference, levels)
    if kernel == "mmcv":
        return sample_mmcv(value, offsets, attention, reference, levels)
    return sample_torch(value, offsets, attention, reference, levels)[0]


@functools.cache
def _works(kernel: str, device: torch.device) -> str:
    """Empty if a small forward and backward pass of the kernel runs on the device, else the reason why not."""
    try:
        levels = Levels(((2, 2),), torch.tensor([[2, 2]], device=device), torch.zeros(1, dtype=torch.int64, device=device))
        value = torch.ones(1, 4, 1, 16, device=device, requires_grad=True)
        points = torch.zeros(1, 1, 1, 1, 1, 2, device=device)
        with torch.enable_grad():
            out = sample(kernel, value, points, points[..., 0] + 1, points[:, :, 0] + 0.5, levels)
            (grad,) = torch.autograd.grad(out.sum(), value)
        return "" if abs(grad.sum().item() - 16) < 1e-3 else "wrong numbers"
    except Exception as error:  # a missing package, an old driver, a compiler that fails: any of them rules the kernel out
        return f"{type(error).__name__}: {error}".splitlines()[0]


def resolve_msda(choice: str, device: torch.device | str) -> str:
    """The kernel that `msda: auto | torch | triton | mmcv` stands for on a device; ValueError if a named one does not work.

    auto takes triton, else mmcv, else torch on CUDA (each is tried on a small example), and torch on everything else and where
    deterministic algorithms are asked for.
    """
    device = torch.device(device)
    if choice not in ("auto", "torch", "triton", "mmcv"):
        raise ValueError(f"msda: {choice!r} is not one of auto, torch, triton, mmcv")
    if choice == "auto":
        # The GPU kernels add up gradients in no fixed order.
        usable = ("triton", "mmcv") if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled() else ()
        return next((kernel for kernel in usable if not _works(kernel, device)), "torch")
    if choice != "torch" and _works(choice, device):
        raise ValueError(f"msda: {choice} does not work on {device} ({_works(choice, device)}); use msda: auto")
    return choice


# ----------------------------------------------------------------------------------------------------- module


class DeformableAttention(nn.Module):
    """Deformable attention of N queries at k places each, all places of a query sharing its offsets and weights.

    Returns dropout(output_proj(samples)) + query: the identity is inside, and callers add their own residual on top.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int, dropout: float):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self):
        """At first head j looks along the direction 2 pi j / heads, its points 1, 2, ... cells away, with equal weights."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)  # (H, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        offset = direction[:, None, None] * torch.arange(1, self.points + 1).view(1, 1, -1, 1)  # (H, 1, K, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offset.expand(-1, self.levels, -1, -1).reshape(-1))
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query, reference, feat, levels: Levels, kernel: str = "torch") -> torch.Tensor:
        """query (B, N, C), reference (B, N, k, L or 1, 2) in [0, 1] (x, y), feat (B, S, C) -> (B, N, k, C)."""
        shape = (self.heads, self.levels, self.points)
        # Places decide what is read: they and the weights stay in float32 under autocast (only N rows, so it costs nothing).
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            offsets = self.sampling_offsets(query).unflatten(-1, (*shape, 2))  # (B, N, H, L, K, 2)
            attention = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        reference = reference.float().expand(-1, -1, -1, self.levels, -1)
        tensors = (feat, self.value_proj.weight, self.value_proj.bias, offsets, attention, reference)
        if kernel == "torch" and feat.device.type == "cpu":
            read = self._read_then_project(levels, *tensors)
        else:
            read = recompute(functools.partial(self._project_then_read, levels, kernel), *tensors)
        return self.dropout(self.output_proj(read)) + query[:, :, None]

    def _project_then_read(self, levels, kernel, feat, weight, bias, offsets, attention, reference):
        value = F.linear(feat, weight.to(feat.dtype), bias.to(feat.dtype)).unflatten(-1, (self.heads, -1))  # (B, S, H, d)
        return sample(kernel, value, offsets, attention, reference, levels).flatten(-2).to(feat.dtype)

    def _read_then_project(self, levels, feat, weight, bias, offsets, attention, reference):
        """sum a (W v + b) = W (sum a v) + b sum a: the projection is linear, so it can follow the reading, head by head.

        Cheaper on a CPU, where projecting all cells costs more than reading wide features at a few places; keeps no samples.
        """
        raw, mass = sample_torch(feat.unsqueeze(2), offsets, attention, reference, levels)  # (B, N, k, H, C), (B, N, k, H)
        w, b = weight.float().unflatten(0, (self.heads, -1)), bias.float().unflatten(0, (self.heads, -1))  # (H, d, C), (H, d)
        out = torch.einsum("bnkhc,hdc->bnkhd", raw, w) + mass[..., None] * b
        return out.flatten(-2).to(feat.dtype)
