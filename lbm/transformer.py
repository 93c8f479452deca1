"""The transformer of LBM: memories, correlation, refinement at the best cells, and the heads. One frame per call.

B batch, N points, C = 256 channels, M memory slots, P = h * w cells of stride 4, S cells of all four levels, k candidates.
Points never interact. Positions are pixel-edge coordinates (x, y) in pixels of input_size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lbm import loss
from lbm.backbone import DIM, LEVELS, STRIDE, compute_dtype, inverse_norm
from lbm.deform_attn import DeformableAttention, Levels, recompute, resolve_msda


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(h) * keep * gain): of the wide activations only h and the mask are kept; gelu is evaluated again backwards."""

    @staticmethod
    def forward(ctx, h, keep, gain, weight, bias):
        ctx.save_for_backward(h, keep, weight)
        ctx.gain = gain
        a = F.gelu(h)
        a = a if keep is None else torch.where(keep, a * gain, 0.0)
        return F.linear(a, weight.to(h.dtype), bias.to(h.dtype))

    @staticmethod
    def backward(ctx, grad):
        h, keep, weight = ctx.saved_tensors
        a, grad_a = F.gelu(h), grad @ weight.to(grad.dtype)
        if keep is not None:
            a, grad_a = torch.where(keep, a * ctx.gain, 0.0), torch.where(keep, grad_a * ctx.gain, 0.0)
        grad = grad.flatten(0, -2)
        grad_weight, grad_bias = grad.mT @ a.flatten(0, -2), grad.sum(0, dtype=weight.dtype)
        return torch.ops.aten.gelu_backward(grad_a, h), None, None, grad_weight.to(weight.dtype), grad_bias


def keep_mask(shape, p: float, device: torch.device) -> torch.Tensor:
    """bool of the given shape, True with probability 1 - p."""
    if device.type == "cuda":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p)
    return torch.rand(shape, device=device) >= p  # twice as fast on a CPU


class MLP(nn.Module):
    """Linear, GELU, dropout, Linear, dropout."""

    def __init__(self, inputs: int, outputs: int, expansion: int = 4, dropout: float = 0.0):
        super().__init__()
        hidden = inputs * expansion
        self.p = dropout
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, outputs), nn.Dropout(dropout)
        )

    def forward(self, x):
        h = self.net[0](x)
        keep = keep_mask(h.shape, self.p, h.device) if self.training and self.p > 0 else None
        return self.net[4](_GeluLinear.apply(h, keep, 1 / (1 - self.p), self.net[3].weight, self.net[3].bias))


class Upsample(nn.Module):
    """sum_l up(a_l): bilinear enlargement (align_corners False) of coarse maps to the finest level, as matrix products.

    Bilinear resizing is linear and separable: up(a) = R a C^T. The row matrices of all levels stand side by side, so that the sum
    over levels is one product. Unlike the library's resizing its gradient is deterministic.
    """

    def __init__(self, shapes: tuple[tuple[int, int], ...]):
        super().__init__()
        (self.h, self.w), *coarse = shapes
        self.coarse = coarse
        resize = lambda n, m: F.interpolate(torch.eye(n)[None], size=m, mode="linear", align_corners=False)[0].T  # (m, n)
        self.register_buffer("rows", torch.cat([resize(h, self.h) for h, _ in coarse], 1), persistent=False)
        for i, (_, w) in enumerate(coarse):
            self.register_buffer(f"columns{i}", resize(w, self.w).T.contiguous(), persistent=False)

    def forward(self, base, coarse, gain):
        """base (B, N, P), coarse maps (B, N, h_l * w_l), gain (number of coarse maps,) -> base + sum gain_l up(coarse_l)."""
        b, n, _ = base.shape
        wide = [
            x.reshape(b * n, h, w) @ (getattr(self, f"columns{i}") * gain[i])
            for i, (x, (h, w)) in enumerate(zip(coarse, self.coarse))
        ]  # (B * N, h_l, w)
        rows = self.rows.expand(b * n, -1, -1)
        return torch.baddbmm(base.reshape(b * n, self.h, self.w), rows, torch.cat(wide, 1)).view(b, n, -1)


class _MatmulFloat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        if a.dtype != torch.float32 and a.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():  # PyTorch 2.8, CUDA only
            return torch.bmm(a, b.mT, out_dtype=torch.float32)
        return a.float() @ b.float().mT

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return torch.bmm(grad, b), torch.bmm(grad.mT, a)


def matmul_float(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (B, N, C) @ b (B, S, C)^T -> (B, N, S), for 16-bit factors too accumulated and returned in float32."""
    return _MatmulFloat.apply(a, b)


def attend(q, slot_keys, ignore, keep, *entries, heads: int):
    """One query per point over its own slots.

    q (B, N, C); entries: per slot keys and values (B, N, 2C), oldest first; slot_keys (slots, C) are added to the keys, or None;
    ignore (B, N, slots) bool or None; keep (B, N, slots, heads): dropout factors of the attention weights, or None.
    Returns (B, N, C) in q's dtype. If all slots are ignored the result is finite and means nothing.
    """
    key, value = torch.stack(entries, 2).float().chunk(2, -1)  # (B, N, slots, C)
    key = key if slot_keys is None else key + slot_keys
    q_scaled = q.float() * (q.shape[-1] // heads) ** -0.5
    score = (q_scaled[:, :, None] * key).unflatten(-1, (heads, -1)).sum(-1)  # (B, N, slots, heads)
    score = score if ignore is None else score.masked_fill(ignore[..., None], -1e9)
    weight = score.softmax(2)
    weight = weight if keep is None else weight * keep
    return (weight[..., None] * value.unflatten(-1, (heads, -1))).sum(2).flatten(-2).to(q.dtype)


class AttentionWeights(NamedTuple):
    """One attention of a layer in the compute dtype, made once per clip."""

    query: tuple[torch.Tensor, torch.Tensor]  # weight (C, C), bias
    entry: tuple[torch.Tensor, torch.Tensor]  # weight (2C, C), bias: key and value of an entry, projected once in its life
    now: torch.Tensor | None = None  # (C,) time embedding of the present; this and the next for the memories only
    slot_keys: torch.Tensor | None = None  # (M, C): what the time embeddings of the slots add to the keys


class Layer(nn.Module):
    """One transformer layer: read the memories, correlate, refine at the k best cells."""

    def __init__(self, k: int, heads: int, points: int, memory_size: int, dropout: float):
        super().__init__()
        self.k, self.heads, self.p = k, heads, dropout
        embedding = lambda: nn.Parameter(nn.init.trunc_normal_(torch.empty(1, memory_size + 1, DIM), std=0.02))
        attention = lambda: nn.MultiheadAttention(DIM, heads, dropout, batch_first=True)  # holds the weights; see `attend`
        self.collision_time_emb, self.stream_time_emb = embedding(), embedding()
        self.collision_attention, self.collision_norm = attention(), nn.LayerNorm(DIM)
        self.collision_ffn, self.collision_norm2 = MLP(DIM, DIM, dropout=dropout), nn.LayerNorm(DIM)
        self.stream_attention, self.stream_norm = attention(), nn.LayerNorm(DIM)
        self.stream_ffn, self.stream_norm2 = MLP(DIM, DIM, dropout=dropout), nn.LayerNorm(DIM)
        self.corr_conv = nn.Conv2d(LEVELS, 1, 1)
        self.lattice_attention, self.lattice_norm = DeformableAttention(DIM, heads, LEVELS, points, dropout), nn.LayerNorm(DIM)
        self.lattice_ffn, self.lattice_norm2 = MLP(DIM, DIM, dropout=dropout), nn.LayerNorm(DIM)
        self.lattice_update, self.lattice_update_norm = attention(), nn.LayerNorm(DIM)
        self.lattice_update_ffn, self.lattice_update_norm2 = MLP(DIM, DIM, dropout=dropout), nn.LayerNorm(DIM)
        self.reference_rho = nn.Linear(DIM, 1)

    def attention_weights(self) -> dict[str, AttentionWeights]:
        """Weights of the attentions "collision", "stream" and "lattice_update" for `forward` and for projecting new entries."""
        cut = lambda t: (t[:DIM], t[DIM:])  # of the query, of key and value
        weights = {}
        for name, attention in (
            ("collision", self.collision_attention), ("stream", self.stream_attention), ("lattice_update", self.lattice_update)
        ):  # fmt: skip
            dtype = compute_dtype(attention.in_proj_weight.device)
            both = zip(cut(attention.in_proj_weight.to(dtype)), cut(attention.in_proj_bias.to(dtype)))
            weights[name] = AttentionWeights(*both)
        for name, emb in (("collision", self.collision_time_emb), ("stream", self.stream_time_emb)):
            key = getattr(self, f"{name}_attention").in_proj_weight[DIM : 2 * DIM]
            with torch.autocast(emb.device.type, enabled=False):
                slot_keys = emb[0, :-1] @ key.T  # the last row of the embedding is now, the others are the slots
            weights[name] = weights[name]._replace(now=emb[0, -1], slot_keys=slot_keys)
        return weights

    def _drop(self, x):
        return F.dropout(x, self.p, self.training)

    def _attend(self, attention, x, weights: AttentionWeights, ignore, entries):
        keep, slot_keys = None, weights.slot_keys
        if slot_keys is not None:
            slot_keys = slot_keys[-len(entries) :]
        q = F.linear(x, *weights.query)
        if self.training and self.p > 0:
            keep = F.dropout(torch.ones(*q.shape[:2], len(entries), self.heads, device=q.device), self.p)
        run = lambda *args: attend(*args, heads=self.heads)
        return attention.out_proj(recompute(run, q, slot_keys, ignore, keep, *entries))

    def _recall(self, name, x, ignore, entries, weights: AttentionWeights):
        """Attention over one memory, then the feed-forward net; the residual carries the time embedding of the present."""
        attention, norm, ffn, norm2 = (getattr(self, f"{name}_{part}") for part in ("attention", "norm", "ffn", "norm2"))
        x = x + weights.now
        x = norm(x + self._drop(self._attend(attention, x, weights, ignore, entries)))
        return norm2(x + ffn(x))

    def correlate(self, x, feat, inv_norm, upsample: Upsample, target=None):
        """Cosine similarity of the tokens with all cells, mixed over the levels: (B, N, P) float32; with `target` cells (B, N)
        also the two numbers of the classification loss.

        The 1x1 convolution over the levels is linear, so the maps are summed instead of stacked; nothing of size (N, P) is kept.
        """
        q = F.normalize(x.float(), dim=-1, eps=1e-12).to(feat.dtype)
        sizes = [upsample.h * upsample.w, *(h * w for h, w in upsample.coarse)]

        def run(q, feat, inv_norm, weight, bias):
            fine, *coarse = (matmul_float(q, feat) * inv_norm[:, None]).split(sizes, -1)
            gain = weight.flatten()
            corr = upsample(fine * (1 + gain[0]) + bias, coarse, gain[1:])
            return (corr, *loss.log_partition(corr, target)) if target is not None else (corr,)

        return recompute(run, q, feat, inv_norm, self.corr_conv.weight, self.corr_conv.bias)

    def forward(self, x, feat, inv_norm, ignore, target, prior, weights, lattice, *entries):
        """x (B, N, C) float32 tokens, feat (B, S, C) pyramid, inv_norm (B, S) its cells' 1 / length, ignore (B, N, slots) bool,
        target (B, N) true cells or None, prior (B, N, P) factor on the correlation or None, weights from `attention_weights`;
        entries: projected entries (B, N, 2C), first those of collision, then those of stream, each oldest first.

        Returns x, candidates (B, N, k, 2) px, their rho logits (B, N, k), corr (B, N, P), log_sum (B, N), logit (B, N).
        """
        if entries:
            half = len(entries) // 2
            dead = ignore.all(-1, keepdim=True)  # no live slot: the token stays as it is
            y = self._recall("collision", x, ignore, entries[:half], weights["collision"])
            y = self._recall("stream", y, ignore, entries[half:], weights["stream"])
            x = torch.where(dead, x, y)

        corr, *numbers = self.correlate(x, feat, inv_norm, lattice.upsample, target)
        corr = corr if prior is None else corr * prior
        candidates = loss.cell_center(corr.detach().topk(self.k).indices, lattice.size, STRIDE)  # (B, N, k, 2)

        reference = lattice.relative(candidates)
        y = self.lattice_attention(x, reference, feat, lattice.levels, lattice.kernel)
        y = self.lattice_norm(x[:, :, None] + self._drop(y))  # (B, N, k, C)
        y = self.lattice_norm2(y + self.lattice_ffn(y)).to(compute_dtype(y.device))
        rho = self.reference_rho(y).squeeze(-1)

        update = weights["lattice_update"]
        entries = F.linear(y, *update.entry).unbind(2)  # k times (B, N, 2C)
        x = self.lattice_update_norm(x + self._drop(self._attend(self.lattice_update, x, update, None, entries)))
        x = self.lattice_update_norm2(x + self.lattice_update_ffn(x))
        return x, candidates, rho, corr, *(numbers or (None, None))


class Lattice(NamedTuple):
    """Geometry that the layers and heads share."""

    size: tuple[int, int]  # (H, W) px
    levels: Levels
    upsample: Upsample
    kernel: str

    def relative(self, points: torch.Tensor) -> torch.Tensor:
        """Points (..., 2) px -> (..., 1, 2) in [0, 1], the same for all levels."""
        x, y = points.unbind(-1)
        return torch.stack((x / self.size[1], y / self.size[0]), -1).clamp(0, 1).unsqueeze(-2)


class Transformer(nn.Module):
    """Layers and heads: one frame per call."""

    def __init__(self, input_size, num_layers, num_heads, num_neighbors, top_k_regions, dropout, memory_size):
        super().__init__()
        self.run_layer, self.run_heads = Layer.forward, Transformer.heads  # or compiled forms of them
        self.input_size = tuple(input_size)
        self.shapes = tuple((input_size[0] // s, input_size[1] // s) for s in (4, 8, 16, 32))
        hw = torch.tensor(self.shapes)
        self.register_buffer("spatial_shapes", hw)
        self.register_buffer("start_levels", torch.cat((torch.zeros(1, dtype=torch.int64), hw.prod(1).cumsum(0)[:-1])))
        candidates = [top_k_regions] + [4] * (num_layers - 2) + [1]
        self.layers = nn.ModuleList(Layer(k, num_heads, num_neighbors, memory_size, dropout) for k in candidates)
        attention = lambda points: DeformableAttention(DIM, num_heads, LEVELS, points, dropout)
        for name in ("offset", "vis"):
            setattr(self, f"{name}_layer", attention(num_neighbors))
            setattr(self, f"{name}_norm", nn.LayerNorm(DIM))
            setattr(self, f"{name}_ffn", MLP(DIM, DIM, dropout=dropout))
            setattr(self, f"{name}_norm2", nn.LayerNorm(DIM))
            setattr(self, f"{name}_head", MLP(DIM, 2, expansion=1))
        self.collision_mem_layer, self.collision_mem_norm = attention(4), nn.LayerNorm(DIM)
        self.collision_mem_ffn, self.collision_mem_norm2 = MLP(DIM, DIM, dropout=dropout), nn.LayerNorm(DIM)
        self.upsample = Upsample(self.shapes)
        self.p = dropout
        # The last layer's candidate is scored by the visibility head instead; a frozen weight keeps DDP simple.
        self.layers[-1].reference_rho.requires_grad_(False)

    def lattice(self, msda: str) -> Lattice:
        """The shared geometry, with the kernel of the deformable attentions resolved for the weights' device."""
        kernel = resolve_msda(msda, self.spatial_shapes.device)
        return Lattice(self.input_size, Levels(self.shapes, self.spatial_shapes, self.start_levels), self.upsample, kernel)

    def _look(self, name, x, reference, feat, lattice):
        """One head's trunk: read the frame at the reference, then the feed-forward net. (B, N, C)."""
        attention, norm, ffn, norm2 = (getattr(self, f"{name}_{part}") for part in ("layer", "norm", "ffn", "norm2"))
        read = attention(x, lattice.relative(reference)[:, :, None], feat, lattice.levels, lattice.kernel).squeeze(2)
        z = norm(x + F.dropout(read, self.p, self.training))
        return norm2(z + ffn(z))

    def heads(self, x, cell, feat, token, queried, lattice):
        """x (B, N, C) after the layers, cell (B, N, 2) px -> offset (B, N, 2) px, visibility and rho logits (B, N),
        collision entry (B, N, C)."""
        offset = self._look("offset", x, cell, feat, lattice)
        vis = self._look("vis", x, cell, feat, lattice)
        with torch.autocast(x.device.type, enabled=False):  # positions and logits are read off in float32
            offset = STRIDE * torch.tanh(self.offset_head(offset.float()))
            visible, rho = self.vis_head(vis.float()).unbind(-1)
        collision = self._look("collision_mem", x, cell + offset, feat, lattice)
        return offset, visible, rho, torch.where(queried[..., None], collision, token)

    def forward(
        self, token, feat, queried, memory, weights, lattice, target=None, prior=None, mask_drop=0.0, checkpointing=False
    ):
        """Track through one frame.

        token (B, N, C) float32, feat (B, S, C), queried (B, N) bool: the point's query frame is reached;
        memory: list of entries of the frames before, oldest first, each {"ignore" (B, N) bool, "collision", "stream": per layer
        (B, N, 2C)}; weights: per layer those of `attention_weights`; target (B, N) true cells or None; prior (B, N, P) or None;
        mask_drop: probability that a memory slot is ignored, drawn anew for every layer.
        Returns a dict: offset (B, N, 2) px, vis, rho logits (B, N), collision and stream (B, N, C), and per layer the lists
        candidates (B, N, k, 2) px, candidate_rho (B, N, k), corr (B, N, P), log_sum and logit (B, N).
        """
        if checkpointing and torch.is_grad_enabled():
            run = lambda f, *a: checkpoint(f, *a, use_reentrant=False)
        else:
            run = lambda f, *a: f(*a)
        out = {"candidates": [], "candidate_rho": [], "corr": [], "log_sum": [], "logit": []}
        ignore = torch.stack([entry["ignore"] for entry in memory], -1) if memory else None
        inv_norm = inverse_norm(feat)  # shared by the layers; scaling products by it spares a normalised copy of the pyramid
        x = token
        for i, layer in enumerate(self.layers):
            drop = ignore
            if memory and mask_drop > 0:
                drop = ignore | (torch.rand(ignore.shape, device=x.device) < mask_drop)
            entries = [entry[name][i] for name in ("collision", "stream") for entry in memory]
            x, *rest = run(self.run_layer, layer, x, feat, inv_norm, drop, target, prior, weights[i], lattice, *entries)
            for key, value in zip(out, rest):
                out[key].append(value)
        heads = run(self.run_heads, self, x, out["candidates"][-1].squeeze(2), feat, token, queried, lattice)
        return dict(zip(("offset", "vis", "rho", "collision"), heads), stream=x, **out)

    def remember(self, out: dict, ignore: torch.Tensor, weights) -> dict:
        """The memory entry of a frame from its output: keys and values for every layer, projected once."""
        entry = {"ignore": ignore}
        for name in ("collision", "stream"):
            x = out[name].to(compute_dtype(ignore.device))
            entry[name] = [F.linear(x, *layer[name].entry) for layer in weights]
        return entry
