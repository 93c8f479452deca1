"""Pi3X, the successor of Pi3 by the same authors: convolutional heads without grid artefacts, and metric scale.

Same encoder, decoder and camera branch as Pi3; inference from images alone. The published weights load strictly: the tensors that
take optional known depth, rays and poses are held, but such conditions are not used here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi3.attention import Block, token_positions
from pi3.dinov2 import REGISTERS, DINOv2
from pi3.geometry import rescale_poses, transform
from pi3.heads import ContextTransformer, HeadTransformer
from pi3.model import NUM_REGISTERS, PATCH, Pi3

INJECT_AFTER = (1, 9, 17, 25, 33)  # decoder blocks behind which the published model takes in known poses


def view_plane_uv(h: int, w: int, aspect: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Coordinates (2, h, w) of pixel centres on a view plane whose corners lie at (+-aspect, +-1) / sqrt(1 + aspect^2)."""
    span = (1 + aspect**2) ** -0.5
    u = torch.linspace(-1, 1, w, device=device, dtype=dtype) * (aspect * span * (w - 1) / w)
    v = torch.linspace(-1, 1, h, device=device, dtype=dtype) * (span * (h - 1) / h)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"))


def with_uv(x: Tensor, aspect: float) -> Tensor:
    """Append the two coordinate channels to a map (B, C, h, w)."""
    uv = view_plane_uv(*x.shape[-2:], aspect, x.device, x.dtype)
    return torch.cat([x, uv.expand(len(x), -1, -1, -1)], 1)


class ResidualConv(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode="replicate")
        self.layers = nn.Sequential(
            nn.GroupNorm(1, dim),
            nn.ReLU(),
            conv(dim, 2 * dim),
            nn.GroupNorm(2 * dim // 32, 2 * dim),
            nn.ReLU(),
            conv(2 * dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvHead(nn.Module):
    """Tokens (B, h*w, dim) -> one map (B, channels, H, W) for each entry of `outputs`: three upsampling stages, then a resize."""

    def __init__(self, dim: int, outputs: tuple[int, ...], widths: tuple[int, ...] = (256, 128, 64), last: int = 32):
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode="replicate")
        stages = zip((dim, *widths[:-1]), widths)
        self.upsample_blocks = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.ConvTranspose2d(i + 2, o, 2, 2), conv(o, o)), ResidualConv(o), ResidualConv(o))
            for i, o in stages
        )
        self.output_block = nn.ModuleList(
            nn.Sequential(conv(widths[-1] + 2, last), nn.ReLU(), nn.Conv2d(last, channels, 1)) for channels in outputs
        )

    def forward(self, tokens: Tensor, h: int, w: int, chunk: int = 64) -> list[Tensor]:
        aspect, H, W = w / h, h * PATCH, w * PATCH
        parts = []
        for x in tokens.split(chunk):  # the full-size maps of many views at once would not fit
            x = x.transpose(1, 2).unflatten(2, (h, w))  # (b, h*w, dim) -> (b, dim, h, w)
            for block in self.upsample_blocks:
                x = block(with_uv(x, aspect))
            x = with_uv(F.interpolate(x, (H, W), mode="bilinear", align_corners=False), aspect)
            parts.append([block(x) for block in self.output_block])
        return [torch.cat(maps) for maps in zip(*parts)]


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, PATCH, PATCH)


class Pi3X(Pi3):
    """The published Pi3X, 1,360,032,433 parameters. The widths are Pi3's; metric_dim, metric_heads: the metric branch's."""

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
        metric_dim: int = 512,
        metric_heads: int = 8,
    ):
        super().__init__(
            enc_dim=enc_dim, enc_depth=enc_depth, enc_heads=enc_heads, dec_dim=dec_dim, dec_depth=dec_depth, dec_heads=dec_heads,
            head_dim=head_dim, head_depth=head_depth, head_heads=head_heads, point_out=point_out, camera_dim=camera_dim,
            pos_img_size=pos_img_size,
        )  # fmt: skip
        self.point_head = ConvHead(point_out, (2, 1))
        self.conf_decoder = HeadTransformer(2 * dec_dim, head_dim, head_depth, head_heads, point_out)
        self.conf_head = ConvHead(point_out, (1,))
        self.metric_token = nn.Parameter(torch.empty(1, 1, 2 * dec_dim))
        nn.init.normal_(self.metric_token, std=1e-6)
        sizes = (2 * dec_dim, metric_dim, head_depth, metric_heads, metric_dim)
        self.metric_decoder = ContextTransformer(*sizes, self_attention=False)
        self.metric_head = nn.Linear(metric_dim, 1)
        # inputs of optional conditions: held for strict loading, frozen
        self.depth_encoder = DINOv2(pos_img_size, PATCH, enc_dim, enc_depth, enc_heads, mask_token=False, **REGISTERS)
        self.depth_encoder.patch_embed = PatchEmbed(2, enc_dim)
        self.depth_emb = nn.Parameter(torch.zeros(1, 1, enc_dim))
        self.ray_embed = PatchEmbed(2, enc_dim)
        blocks = (Block(dec_dim, dec_heads, qk_norm=True, layer_scale=0.01) for _ in INJECT_AFTER)
        self.pose_inject_blk = nn.ModuleList(blocks)
        for unused in (self.depth_encoder, self.ray_embed, self.pose_inject_blk, self.depth_emb):
            unused.requires_grad_(False)

    def forward(self, imgs: Tensor) -> dict[str, Tensor | None]:
        """As `Pi3.forward`, in metres, and `rays` (B, N, H, W, 3): unit viewing directions; `metric` (B): the scale found."""
        B, N, _, H, W = imgs.shape
        h, w = H // PATCH, W // PATCH
        tokens = self.encode(imgs)
        positions = token_positions(h, w, NUM_REGISTERS, imgs.device)
        hidden = self.decode(tokens, N, positions)
        rope = self.rope(positions, self.head_head_dim)
        patches = lambda decoder: decoder(hidden, rope)[:, NUM_REGISTERS:].float()
        point_tokens, camera_tokens = patches(self.point_decoder), patches(self.camera_decoder)
        conf_tokens = patches(self.conf_decoder)
        every = hidden.view(B, -1, hidden.shape[-1])  # (B, N*L, 2C): the metric token looks at all views
        metric_token = self.metric_decoder(self.metric_token.expand(B, -1, -1), every).float()
        with torch.autocast(imgs.device.type, enabled=False):
            maps = lambda x: x.permute(0, 2, 3, 1).unflatten(0, (B, N))  # (B*N, C, H, W) -> (B, N, H, W, C)
            xy, log_z = (maps(x) for x in self.point_head(point_tokens, h, w))
            z, directions = log_z.clamp(max=15).exp(), torch.cat([xy, torch.ones_like(log_z)], -1)
            metric = self.metric_head(metric_token)[:, 0, 0].exp()  # (B,)
            local_points = directions * z * metric[:, None, None, None, None]
            poses = rescale_poses(self.camera_head(camera_tokens).unflatten(0, (B, N)), metric)
            return {
                "local_points": local_points,
                "camera_poses": poses,
                "points": transform(poses, local_points),
                "conf": maps(self.conf_head(conf_tokens, h, w)[0]),
                "global_points": None,
                "rays": F.normalize(directions, dim=-1),
                "metric": metric,
            }
