"""Pi3: permutation-equivariant visual geometry (Wang et al., arXiv 2507.13347).

A frozen DINOv2 encoder, a decoder that alternates attention within each view and over all views, and three heads: points in
each camera's frame, camera poses, confidence. No view is special: permuting the views permutes the outputs. Tensor names are
those of the published `model.safetensors`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pi3.attention import Block, Rope, rope_tables, token_positions
from pi3.dinov2 import REGISTERS, DINOv2
from pi3.geometry import transform
from pi3.heads import CameraHead, ContextTransformer, DenseHead, HeadTransformer, points_from_raw, run_block

PATCH = 14
NUM_REGISTERS = 5  # learned tokens in front of the patches of every view, beside those of DINOv2, which are dropped
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pi3(nn.Module):
    """The defaults are the published `large` model: 958,696,732 parameters with the confidence branch.

    enc_*, dec_*: width, depth and heads of encoder and decoder; the widths must agree. head_*: the transformers of the heads.
    point_out: output width of the point and confidence transformers; camera_dim: of the camera's.
    pos_img_size: side of the image whose patches the encoder's positional embedding was trained for.
    train_conf: build the confidence branch. use_global_points: build the head of points in the first view's frame, which
        makes the first view special.
    num_dec_blk_not_to_checkpoint: in training, decoder blocks with this index or a higher one are recomputed in the backward
        pass: a larger number means more memory and more speed (default 4). num_dec_blk_to_checkpoint says the same from the other
        end, a larger number means less memory; giving both is a ValueError. checkpoint_heads: recompute the heads' blocks too.
    rope_base: base frequency of the rotary embedding (`rope100`). rope_angles: "float32", or "activation" to round the
        angles as the official code does.
    """

    def __init__(
        self,
        *,
        enc_dim: int = 1024,
        enc_depth: int = 24,
        enc_heads: int = 16,
        dec_dim: int = 1024,
        dec_depth: int = 36,
        dec_heads: int = 16,
        head_dim: int = 1024,
        head_depth: int = 5,
        head_heads: int = 16,
        point_out: int = 1024,
        camera_dim: int = 512,
        pos_img_size: int = 518,
        train_conf: bool = False,
        use_global_points: bool = False,
        num_dec_blk_not_to_checkpoint: int | None = None,
        num_dec_blk_to_checkpoint: int | None = None,
        checkpoint_heads: bool = False,
        rope_base: float = 100.0,
        rope_angles: str = "float32",
    ):
        super().__init__()
        if enc_dim != dec_dim:
            raise ValueError(f"enc_dim {enc_dim} and dec_dim {dec_dim} differ: nothing projects one to the other")
        widths = ("enc", enc_dim, enc_heads, 1), ("dec", dec_dim, dec_heads, 4), ("head", head_dim, head_heads, 4)
        for part, dim, heads, unit in widths:  # rotary embedding takes four channels of a head at a time
            if heads < 1 or dim % (unit * heads):
                raise ValueError(f"{part}_dim {dim} does not divide into {part}_heads {heads} of a multiple of {unit} channels each")
        if dec_depth < 2 or dec_depth % 2:
            raise ValueError(f"dec_depth is {dec_depth}: blocks come in pairs (within views, over all views)")
        if num_dec_blk_to_checkpoint is not None:
            if num_dec_blk_not_to_checkpoint is not None:
                raise ValueError("num_dec_blk_to_checkpoint and num_dec_blk_not_to_checkpoint say the same: give one of them")
            num_dec_blk_not_to_checkpoint = max(0, dec_depth - num_dec_blk_to_checkpoint)
        self.num_dec_blk_not_to_checkpoint = 4 if num_dec_blk_not_to_checkpoint is None else num_dec_blk_not_to_checkpoint
        self.dec_head_dim, self.head_head_dim = dec_dim // dec_heads, head_dim // head_heads
        self.rope_base, self.rope_angles = rope_base, rope_angles
        self.encoder = DINOv2(pos_img_size, PATCH, enc_dim, enc_depth, enc_heads, mask_token=False, **REGISTERS)
        self.register_token = nn.Parameter(torch.empty(1, 1, NUM_REGISTERS, dec_dim))
        nn.init.normal_(self.register_token, std=1e-6)
        self.decoder = nn.ModuleList(Block(dec_dim, dec_heads, qk_norm=True, layer_scale=0.01) for _ in range(dec_depth))
        head = lambda out: HeadTransformer(2 * dec_dim, head_dim, head_depth, head_heads, out, checkpoint_heads)
        self.point_decoder, self.point_head = head(point_out), DenseHead(point_out, 3, PATCH)
        self.camera_decoder, self.camera_head = head(camera_dim), CameraHead(camera_dim)
        self.conf_decoder = self.conf_head = self.global_points_decoder = None
        if train_conf:
            self.conf_decoder, self.conf_head = head(point_out), DenseHead(point_out, 1, PATCH)
        if use_global_points:
            self.global_points_decoder = ContextTransformer(
                2 * dec_dim, head_dim, head_depth, head_heads, point_out, checkpointing=checkpoint_heads
            )
            self.global_point_head = DenseHead(point_out, 3, PATCH)
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))

    def rope(self, positions: Tensor, head_dim: int) -> Rope:
        """Tables for `positions` (L, 2), in the type that attention computes in."""
        device = positions.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.register_token.dtype
        return rope_tables(positions, head_dim, self.rope_base, dtype, self.rope_angles)

    def encode(self, imgs: Tensor) -> Tensor:
        """Images (B, N, 3, H, W) -> DINOv2 patch tokens (B*N, h*w, enc_dim). A frozen encoder leaves no graph."""
        x = (imgs.flatten(0, 1) - self.image_mean) / self.image_std
        return self.encoder.forward_features(x)["x_norm_patchtokens"]

    def decode(self, tokens: Tensor, views: int, positions: Tensor) -> Tensor:
        """Patch tokens (B*N, h*w, C) -> outputs of the last two blocks side by side (B*N, L, 2C), L = registers + h*w."""
        x = torch.cat([self.register_token[0].expand(len(tokens), -1, -1), tokens], 1)  # (B*N, L, C)
        BN, L, C = x.shape
        per_view = self.rope(positions, self.dec_head_dim)
        over_views = tuple(t.repeat(views, 1, 1) for t in per_view)  # the same positions in every view
        last_two = []
        for i, block in enumerate(self.decoder):
            x, rope = (x.view(BN // views, views * L, C), over_views) if i % 2 else (x.view(BN, L, C), per_view)
            x = run_block(block, x, rope, recompute=self.training and i >= self.num_dec_blk_not_to_checkpoint)
            if i >= len(self.decoder) - 2:
                last_two.append(x.view(BN, L, C))
        return torch.cat(last_two, -1)

    def forward(self, imgs: Tensor) -> dict[str, Tensor | None]:
        """imgs (B, N, 3, H, W), RGB in [0, 1], H and W multiples of 14 -> dict of float32 tensors:

        local_points (B, N, H, W, 3): points in each camera's frame, up to one scale per batch element.
        camera_poses (B, N, 4, 4): camera-to-world, up to one similarity per batch element.
        points (B, N, H, W, 3): the poses applied to local_points.
        conf (B, N, H, W, 1): confidence logits, or None. global_points (B, N, H, W, 3), or None.
        """
        B, N, _, H, W = imgs.shape
        h, w = H // PATCH, W // PATCH
        tokens = self.encode(imgs)
        positions = token_positions(h, w, NUM_REGISTERS, imgs.device)
        hidden = self.decode(tokens, N, positions)
        rope = self.rope(positions, self.head_head_dim)
        patches = lambda decoder, *context: decoder(hidden, *context, rope)[:, NUM_REGISTERS:].float()
        point_tokens, camera_tokens = patches(self.point_decoder), patches(self.camera_decoder)
        conf_tokens = patches(self.conf_decoder) if self.conf_decoder is not None else None
        global_tokens = None
        if self.global_points_decoder is not None:
            first = hidden.view(B, N, *hidden.shape[1:])[:, :1].expand(-1, N, -1, -1).flatten(0, 1)
            global_tokens = patches(self.global_points_decoder, first)
        with torch.autocast(imgs.device.type, enabled=False):  # the last layers and all geometry stay float32
            maps = lambda head, t: None if t is None else head(t, h, w).unflatten(0, (B, N))
            local_points = points_from_raw(maps(self.point_head, point_tokens))
            camera_poses = self.camera_head(camera_tokens).unflatten(0, (B, N))
            return {
                "local_points": local_points,
                "camera_poses": camera_poses,
                "points": transform(camera_poses, local_points),
                "conf": maps(self.conf_head, conf_tokens),
                "global_points": None if global_tokens is None else maps(self.global_point_head, global_tokens),
            }


def freeze(model: Pi3, encoder: bool = True, all_but_conf: bool = False) -> None:
    """Choose what trains by `requires_grad`; frozen parts leave no graph. Stages lowres and highres freeze the encoder, stage
    conf (`all_but_conf`) everything but conf_decoder and conf_head."""
    for name, p in model.named_parameters():
        frozen = not name.startswith("conf_") if all_but_conf else encoder and name.startswith("encoder.")
        p.requires_grad_(not frozen)


def from_vggt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a VGGT-1B checkpoint under Pi3's names.

    VGGT's patch embedding is the encoder; its frame and global blocks become the even and odd decoder blocks. Everything else
    (camera and register tokens, heads, tracker) has no counterpart.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("aggregator.patch_embed."):
            renamed["encoder." + name.removeprefix("aggregator.patch_embed.")] = tensor
        elif match := re.fullmatch(r"aggregator\.(frame|global)_blocks\.(\d+)\.(.+)", name):
            renamed[f"decoder.{2 * int(match[2]) + (match[1] == 'global')}.{match[3]}"] = tensor
    return renamed


def other_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Descriptions of the tensors that are in both and differ in shape."""
    both = ((k, state[k].shape, t.shape) for k, t in own.items() if k in state)
    return [f"{k} {tuple(theirs)} for {tuple(ours)}" for k, theirs, ours in both if theirs != ours]


def load_vggt(model: Pi3, state: Mapping[str, Tensor]) -> str:
    """Initialise encoder and decoder from a VGGT-1B state dict; returns a one-line report.

    VGGT has more blocks than are used. Raises ValueError if a tensor of encoder or decoder gets no value or has another shape.
    """
    own, renamed = model.state_dict(), from_vggt(state)
    wanted = [k for k in own if k.startswith(("encoder.", "decoder."))]
    missing = [k for k in wanted if k not in renamed]
    differ = other_shapes(renamed, {k: own[k] for k in wanted})
    if missing or differ:
        raise ValueError(f"VGGT weights do not fill encoder and decoder: missing {missing[:8]}, other shapes {differ[:8]}")
    model.load_state_dict({k: renamed[k] for k in wanted}, strict=False)
    fresh, ignored = len(own) - len(wanted), len(state) - len(wanted)
    return f"VGGT: {len(wanted)} tensors mapped, {fresh} of the model start fresh, {ignored} of the file ignored"


def load_pretrained(model: Pi3, state: Mapping[str, Tensor], conf_may_start_fresh: bool = False) -> str:
    """Load a flat Pi3 state dict (official release or a training run); returns a one-line report.

    Only `conf_*` may be missing, and only if `conf_may_start_fresh`; `conf_*` in the file is ignored by a model without that
    branch. Raises ValueError naming every other missing, unexpected or misshapen tensor.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    fresh = [k for k in missing if conf_may_start_fresh and k.startswith("conf_")]
    ignored = [k for k in unexpected if model.conf_head is None and k.startswith("conf_")]
    missing, unexpected = sorted({*missing} - {*fresh}), sorted({*unexpected} - {*ignored})
    differ = other_shapes(state, own)
    if missing or unexpected or differ:
        raise ValueError(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}, other shapes {differ}")
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    used, new = len(own) - len(fresh), len(fresh)
    return f"{used} tensors loaded, {new} of the confidence branch start fresh, {len(ignored)} of the file ignored"


def conf_from_points(model: Pi3) -> None:
    """Start the confidence transformer from the point transformer's weights (its final layer stays as initialised)."""
    model.conf_decoder.load_state_dict(model.point_decoder.state_dict())
