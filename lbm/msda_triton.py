"""Triton kernels for the reading step of multi-scale deformable attention, forward and backward.

One program per (batch item, query, head) reads all candidates and levels of that head. Values may be fp16, bf16 or fp32;
positions, weights and sums are fp32. TRITON_INTERPRET=1, set before the import, runs them on a CPU.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _corner(x0, y0, fx, fy, dx: tl.constexpr, dy: tl.constexpr, h, w, live):
    """Corner (dx, dy) of the cells that hold the points: index, weight along x and y, and whether it lies on the map."""
    x = x0 + dx
    y = y0 + dy
    inside = live & (x >= 0) & (x < w) & (y >= 0) & (y < h)
    wx = fx if dx == 1 else 1 - fx
    wy = fy if dy == 1 else 1 - fy
    index = tl.where(inside, y, 0).to(tl.int32) * w + tl.where(inside, x, 0).to(tl.int32)
    return index, wx, wy, inside


@triton.jit
def _points(offsets, attention, reference, sample, ref, l, h, w, point, live):
    """Integer and fractional part of the K positions on level l, and their attention weights."""
    ox = tl.load(offsets + (sample + point) * 2, mask=live, other=0.0)
    oy = tl.load(offsets + (sample + point) * 2 + 1, mask=live, other=0.0)
    a = tl.load(attention + sample + point, mask=live, other=0.0)
    x = tl.load(reference + (ref + l) * 2) * w - 0.5 + ox
    y = tl.load(reference + (ref + l) * 2 + 1) * h - 0.5 + oy
    x0 = tl.floor(x)
    y0 = tl.floor(y)
    return x0, y0, x - x0, y - y0, a


@triton.jit
def _forward(
    value, offsets, attention, reference, hw, start, out,
    N, S, k: tl.constexpr, H: tl.constexpr, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)  # b * N + n
    head = tl.program_id(1)
    base = (query // N).to(tl.int64) * S
    point = tl.arange(0, KP)
    channel = tl.arange(0, DP)
    live = point < K
    for c in range(k):
        total = tl.zeros([DP], dtype=tl.float32)
        for l in tl.static_range(L):
            h = tl.load(hw + 2 * l).to(tl.int32)
            w = tl.load(hw + 2 * l + 1).to(tl.int32)
            first = base + tl.load(start + l)
            sample = ((query * H + head) * L + l) * K
            x0, y0, fx, fy, a = _points(offsets, attention, reference, sample, (query * k + c) * L, l, h, w, point, live)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    index, wx, wy, inside = _corner(x0, y0, fx, fy, dx, dy, h, w, live)
                    address = ((first + index) * H + head) * D
                    mask = inside[:, None] & (channel < D)[None, :]
                    v = tl.load(value + address[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                    total += tl.sum((a * wx * wy)[:, None] * v, 0)
        tl.store(out + ((query * k + c) * H + head) * D + channel, total, mask=channel < D)


@triton.jit
def _backward(
    value, offsets, attention, reference, hw, start, grad, grad_value, grad_offsets, grad_attention, grad_reference,
    N, S, k: tl.constexpr, H: tl.constexpr, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    head = tl.program_id(1)
    base = (query // N).to(tl.int64) * S
    point = tl.arange(0, KP)
    channel = tl.arange(0, DP)
    live = point < K
    for l in tl.static_range(L):
        h = tl.load(hw + 2 * l).to(tl.int32)
        w = tl.load(hw + 2 * l + 1).to(tl.int32)
        first = base + tl.load(start + l)
        sample = ((query * H + head) * L + l) * K
        sum_a = tl.zeros([KP], dtype=tl.float32)
        sum_x = tl.zeros([KP], dtype=tl.float32)
        sum_y = tl.zeros([KP], dtype=tl.float32)
        for c in range(k):
            row = (query * k + c) * H + head
            g = tl.load(grad + row * D + channel, mask=channel < D, other=0.0).to(tl.float32)
            x0, y0, fx, fy, a = _points(offsets, attention, reference, sample, (query * k + c) * L, l, h, w, point, live)
            dx_here = tl.zeros([KP], dtype=tl.float32)
            dy_here = tl.zeros([KP], dtype=tl.float32)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    index, wx, wy, inside = _corner(x0, y0, fx, fy, dx, dy, h, w, live)
                    address = ((first + index) * H + head) * D
                    mask = inside[:, None] & (channel < D)[None, :]
                    v = tl.load(value + address[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                    read = tl.sum(v * g[None, :], 1)  # (KP,), 0 outside the map
                    sum_a += wx * wy * read
                    dx_here += (2 * dx - 1) * wy * read
                    dy_here += (2 * dy - 1) * wx * read
                    into = (a * wx * wy)[:, None] * g[None, :]
                    tl.atomic_add(grad_value + address[:, None] + channel[None, :], into, mask=mask, sem="relaxed")
            dx_here = dx_here * a
            dy_here = dy_here * a
            sum_x += dx_here
            sum_y += dy_here
            tl.store(grad_reference + (row * L + l) * 2, tl.sum(dx_here, 0) * w)
            tl.store(grad_reference + (row * L + l) * 2 + 1, tl.sum(dy_here, 0) * h)
        tl.store(grad_attention + sample + point, sum_a, mask=live)
        tl.store(grad_offsets + (sample + point) * 2, sum_x, mask=live)
        tl.store(grad_offsets + (sample + point) * 2 + 1, sum_y, mask=live)


def _sizes(value, offsets, reference) -> dict[str, int]:
    _, s, heads, d = value.shape
    _, n, k, levels, _ = reference.shape
    points = offsets.shape[4]
    padded = {"KP": triton.next_power_of_2(points), "DP": triton.next_power_of_2(d)}
    return dict(N=n, S=s, k=k, H=heads, L=levels, K=points, D=d, **padded)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, offsets, attention, reference, hw, start):
        sizes = _sizes(value, offsets, reference)
        b, n, k = reference.shape[:3]
        out = value.new_empty((b, n, k, *value.shape[2:]), dtype=torch.float32)
        _forward[(b * n, sizes["H"])](value, offsets, attention, reference, hw, start, out, num_warps=2, **sizes)
        ctx.save_for_backward(value, offsets, attention, reference, hw, start)
        return out

    @staticmethod
    def backward(ctx, grad):
        value, offsets, attention, reference, hw, start = ctx.saved_tensors
        sizes = _sizes(value, offsets, reference)
        b, n, k, levels = reference.shape[:4]
        grad_value = torch.zeros_like(value, dtype=torch.float32)  # summed by atomics
        grad_offsets, grad_attention = torch.empty_like(offsets), torch.empty_like(attention)
        grad_reference = reference.new_empty((b, n, k, sizes["H"], levels, 2))
        _backward[(b * n, sizes["H"])](
            value, offsets, attention, reference, hw, start, grad.contiguous(),
            grad_value, grad_offsets, grad_attention, grad_reference, num_warps=2, **sizes,
        )  # fmt: skip
        return grad_value.to(value.dtype), grad_offsets, grad_attention, grad_reference.sum(3), None, None


def sample_triton(value, offsets, attention, reference, levels) -> torch.Tensor:
    """As `lbm.deform_attn.sample_torch`, with one value map per head: (B, N, k, H, D) float32."""
    small = (t.float().contiguous() for t in (offsets, attention, reference))
    return _Sample.apply(value.contiguous(), *small, levels.hw, levels.start)
