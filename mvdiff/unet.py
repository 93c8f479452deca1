"""UNet of Stable Diffusion 1.x with multi-view and cross-domain attention (Wonder3D, arXiv 2310.15008, section 4.3).

Rows. A batch of N rows holds the latents of D domains (normal, colour), B objects and V views, views fastest:
row = (domain * B + object) * V + view. Multi-view attention joins the V rows of an object in one domain; cross-domain attention
joins row i of the first half with row i of the second half, which is the same view in the other domain.

Where this computes the same in less time than the published form: keys and values are not repeated per view (attention of every
view to all views is plain self-attention over the merged V * H * W tokens), and cross-attention to a single token is a broadcast
addition, because the softmax over one key is 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvdiff.layers import Downsample, ResnetBlock, Upsample, conv2d, geglu_linear, group_norm, layer_norm, norm_conv2d, norm_linear


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoids of the time steps t (N,) -> (N,dim) fp32; cosines first if `flip_sin_to_cos`."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angle = t.float()[:, None] * exponent.exp()[None]  # (N,half)
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return torch.cat(parts, dim=1)


class Embedding(nn.Module):
    """linear, silu, linear: of the time step's sinusoids, or of the camera and domain vector."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Attention(nn.Module):
    """Multi-head attention of x (G,T,C) to context (G,S,context_channels); or to x itself, in which groups its methods say."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.attend(self.to_q(x), self.to_k(context), self.to_v(context))

    def project(self, x: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (G,T,C), of its `norm` where there is one: then no normalised copy is kept."""
        linears = self.to_q, self.to_k, self.to_v
        return norm_linear(x, norm, *linears) if norm is not None else tuple(linear(x) for linear in linears)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (G,T,C), k and v (G,S,C), already projected -> (G,T,C)."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (G,heads,tokens,C/heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def single_token(self, context: Tensor) -> Tensor:
        """Attention to one token, context (N,1,context_channels) -> (N,1,C): the same for every query, so none is needed."""
        return self.to_out(self.to_v(context))

    def alone(self, x: Tensor, views: int, norm: nn.LayerNorm | None = None) -> Tensor:
        """x (N,T,C): every row attends to itself."""
        return self.attend(*self.project(x, norm))

    def multiview(self, x: Tensor, views: int, norm: nn.LayerNorm | None = None) -> Tensor:
        """x (N,T,C): every view of an object attends to the tokens of all its views."""
        n, t, c = x.shape
        return self.alone(x.reshape(n // views, views * t, c), views, norm).reshape(n, t, c)

    def sparse_multiview(self, x: Tensor, views: int, norm: nn.LayerNorm | None = None) -> Tensor:
        """x (N,T,C): every view attends to the first view of its object and to itself, in this order."""
        n, t, c = x.shape

        def with_first(y: Tensor) -> Tensor:
            y = y.view(n // views, views, t, c)
            return torch.cat([y[:, :1].expand_as(y), y], dim=2).view(n, 2 * t, c)

        q, k, v = self.project(x, norm)
        return self.attend(q, with_first(k), with_first(v))

    def cross_domain(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """x (N,T,C): row i of the first half and row i of the second half attend to the tokens of both."""
        n, t, c = x.shape
        pairs = x.view(2, n // 2, t, c).transpose(0, 1).reshape(n // 2, 2 * t, c)  # first domain's tokens, then the second's
        out = self.attend(*self.project(pairs, norm))
        return out.view(n // 2, 2, t, c).transpose(0, 1).reshape(n, t, c)


class GEGLU(nn.Module):
    """Holds the gated projection, (...,C) -> (...,2 * hidden)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FeedForward(nn.Module):
    """Gated feed-forward of width 4C. The empty slot is where others place dropout: it keeps the names `net.0`, `net.2`."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """x (N,T,C), normalised by `norm` first where given."""
        gated = norm_linear(x, norm, self.net[0].proj)[0] if norm is not None else self.net[0](x)
        return geglu_linear(gated, self.net[2])


class TransformerBlock(nn.Module):
    """Multi-view, cross-domain (mid), image-token attention, feed-forward, cross-domain (last); each with its own LayerNorm.

    x (N,T,C) in the row order of the module's docstring, context (N,S,context_channels) -> (N,T,C).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_channels: int,
        num_views: int = 6,
        multiview_attention: bool = True,
        sparse_mv_attention: bool = False,
        cd_attention_mid: bool = False,
        cd_attention_last: bool = False,
    ):
        super().__init__()
        self.num_views, self.multiview, self.sparse = num_views, multiview_attention, sparse_mv_attention
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.cd_mid, self.cd_last = cd_attention_mid, cd_attention_last
        if cd_attention_mid:
            self.attn_joint_mid, self.norm_joint_mid = Attention(channels, heads), nn.LayerNorm(channels)
            zero_output(self.attn_joint_mid)
        if cd_attention_last:
            self.attn_joint_last, self.norm_joint_last = Attention(channels, heads), nn.LayerNorm(channels)
            zero_output(self.attn_joint_last)

    def self_attention(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """attn1 of x (N,T,C), normalised by `norm` first where given, over the views that this block is set to join."""
        join = self.attn1.sparse_multiview if self.sparse else self.attn1.multiview
        return (join if self.multiview else self.attn1.alone)(x, self.num_views, norm)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attention(x, self.norm1)
        if self.cd_mid:
            x = x + self.attn_joint_mid.cross_domain(x, self.norm_joint_mid)
        if context.shape[1] == 1:
            x = x + self.attn2.single_token(context)
        else:
            x = x + self.attn2(layer_norm(x, self.norm2), context)
        x = x + self.ff(x, self.norm3)
        if self.cd_last:
            x = x + self.attn_joint_last.cross_domain(x, self.norm_joint_last)
        return x


def zero_output(attention: Attention) -> None:
    """Zero the output projection with its bias: a new joint layer then starts as the identity. (Published: a random bias.)"""
    nn.init.zeros_(attention.to_out[0].weight)
    nn.init.zeros_(attention.to_out[0].bias)


class Transformer2D(nn.Module):
    """GroupNorm (eps 1e-6), projection, `depth` transformer blocks over the H * W tokens, projection, + input."""

    def __init__(
        self, channels: int, heads: int, context_channels: int, groups: int, depth: int = 1, linear: bool = False, **block
    ):
        super().__init__()
        # The 1x1 convolutions and the linear layers differ in the shape of their weight only
        projection = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        blocks = [TransformerBlock(channels, heads, context_channels, **block) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = group_norm(x, self.norm).permute(0, 2, 3, 1).reshape(n, h * w, c)
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + tokens.view(n, h, w, c).permute(0, 3, 1, 2)  # (N,HW,C) -> (N,C,H,W)


class Block(nn.Module):
    """One level: resnets, each followed by a transformer where the level has attention; a sampler at its end."""

    def __init__(self, channels: list[tuple[int, int]], time_channels: int, groups: int, eps: float, attention: dict | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(i, o, time_channels, groups, eps) for i, o in channels)
        if attention is not None:
            self.attentions = nn.ModuleList(Transformer2D(o, groups=groups, **attention) for _, o in channels)
        self.has_attention = attention is not None
        self.checkpointing = False

    def run(self, module: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
        """module(x, condition), recomputed in backward if checkpointing is on."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, x, condition, use_reentrant=False, preserve_rng_state=False)
        return module(x, condition)

    def layer(self, i: int, x: Tensor, silu_time: Tensor, context: Tensor) -> Tensor:
        x = self.run(self.resnets[i], x, silu_time)
        return self.run(self.attentions[i], x, context) if self.has_attention else x


class DownBlock(Block):
    """Returns (output, skips): the output of every layer and of the downsampler."""

    def __init__(self, channels, *args, downsample: bool, **kwargs):
        super().__init__(channels, *args, **kwargs)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(channels[-1][1])])
        self.downsample = downsample

    def forward(self, x: Tensor, silu_time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, silu_time, context)
            skips.append(x)
        if self.downsample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """resnet, transformer, resnet; never checkpointed, being small."""

    def __init__(self, channels, time_channels, groups, eps, attention):
        super().__init__([channels, channels], time_channels, groups, eps, None)
        self.attentions = nn.ModuleList([Transformer2D(channels[1], groups=groups, **attention)])

    def forward(self, x: Tensor, silu_time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, silu_time), context)
        return self.resnets[1](x, silu_time)


class UpBlock(Block):
    """Takes the skips of the mirrored level, last one first; upsamples to the size of the next skip."""

    def __init__(self, channels, *args, upsample: bool, **kwargs):
        super().__init__(channels, *args, **kwargs)
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(channels[-1][1])])
        self.upsample = upsample

    def forward(self, x: Tensor, silu_time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), silu_time, context)
        return self.upsamplers[0](x, size=skips[-1].shape[2:]) if self.upsample else x


def per_level(value: int | tuple[int, ...] | list[int], levels: int, name: str) -> list[int]:
    """One value per level from one value or a list of them."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} entries for {levels} levels")
    return values


class UNet(nn.Module):
    """Predicts noise (or velocity) for all rows of a batch.

    Names of parameters and their shapes are those of the published checkpoints. Note `attention_head_dim`: for historical
    reasons it is the NUMBER of heads. It, `layers_per_block` and `transformer_layers_per_block` may be given per level.
    `attention` says per level whether it has transformers (default: all but the last).
    `projection_class_embeddings_input_dim` None: no camera and domain embedding (plain Stable Diffusion).
    """

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        attention_head_dim: int | tuple[int, ...] = 8,
        cross_attention_dim: int = 768,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        use_linear_projection: bool = False,
        projection_class_embeddings_input_dim: int | None = 10,
        attention: tuple[bool, ...] | None = None,
        num_views: int = 6,
        cd_attention_mid: bool = True,
        cd_attention_last: bool = False,
        multiview_attention: bool = True,
        sparse_mv_attention: bool = False,
    ):
        super().__init__()
        widths, levels, groups = list(block_out_channels), len(block_out_channels), norm_num_groups
        time_channels = 4 * widths[0]
        layers = per_level(layers_per_block, levels, "layers_per_block")
        heads = per_level(attention_head_dim, levels, "attention_head_dim")
        depths = per_level(transformer_layers_per_block, levels, "transformer_layers_per_block")
        attends = list(attention) if attention is not None else [True] * (levels - 1) + [False]
        self.num_views, self.joint = num_views, cd_attention_mid or cd_attention_last
        self.multiview_attention = multiview_attention
        self.sinusoids = {"dim": widths[0], "flip_sin_to_cos": flip_sin_to_cos, "freq_shift": freq_shift}

        block = {"context_channels": cross_attention_dim, "linear": use_linear_projection, "num_views": num_views}
        block |= {"multiview_attention": multiview_attention, "sparse_mv_attention": sparse_mv_attention}
        block |= {"cd_attention_mid": cd_attention_mid, "cd_attention_last": cd_attention_last}

        def transformer(level: int) -> dict:
            return {"heads": heads[level], "depth": depths[level], **block}

        common = (time_channels, groups, norm_eps)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time_channels)
        if projection_class_embeddings_input_dim is not None:
            self.class_embedding = Embedding(projection_class_embeddings_input_dim, time_channels)
        self.has_class_embedding = projection_class_embeddings_input_dim is not None

        self.down_blocks, skips, width = nn.ModuleList(), [widths[0]], widths[0]
        for level, out in enumerate(widths):
            channels = [(width if i == 0 else out, out) for i in range(layers[level])]
            last = level == levels - 1
            attn = transformer(level) if attends[level] else None
            self.down_blocks.append(DownBlock(channels, *common, attn, downsample=not last))
            skips += [out] * (layers[level] + (not last))
            width = out
        self.mid_block = MidBlock((width, width), *common, transformer(levels - 1))
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            channels = []
            for _ in range(layers[level] + 1):
                channels.append((width + skips.pop(), widths[level]))
                width = widths[level]
            attn = transformer(level) if attends[level] else None
            self.up_blocks.append(UpBlock(channels, *common, attn, upsample=level > 0))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute every resnet and transformer of the down and up blocks in backward instead of keeping what is inside."""
        for block in [*self.down_blocks, *self.up_blocks]:
            block.checkpointing = on

    def embed(self, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """silu of the sum of the embeddings of t (N,) and labels (N,10), fp32 -> (N, 4 * width of the first level)."""
        embedding = self.time_embedding(timestep_embedding(t, **self.sinusoids).to(dtype))
        if self.has_class_embedding:
            embedding = embedding + self.class_embedding(labels.to(dtype))
        return F.silu(embedding)  # the only form in which the resnets use it

    def forward(self, x: Tensor, t: Tensor, context: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict for x (N,in_channels,h,w) at time steps t (N,), given image tokens context (N,S,cross_attention_dim) and the
        camera and domain vectors labels (N,10) -> (N,out_channels,h,w), in the row order of the module's docstring.

        Raises ValueError where the rows do not make whole objects (or, with cross-domain layers, whole pairs of domains).
        """
        group = (self.num_views if self.multiview_attention else 1) * (2 if self.joint else 1)
        if x.shape[0] % group:
            raise ValueError(
                f"{x.shape[0]} rows are no multiple of {group}: {self.num_views} views per object"
                + (" and two domains, as the cross-domain layers need" if self.joint else "")
            )
        silu_time = self.embed(t, labels, x.dtype)
        x = conv2d(x, self.conv_in)
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, silu_time, context)
            skips += new
        x = self.mid_block(x, silu_time, context)
        for block in self.up_blocks:
            x = block(x, silu_time, context, skips)
        return norm_conv2d(x, self.conv_norm_out, self.conv_out)
