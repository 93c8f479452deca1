"""FoundationStereo (Wen et al., arXiv 2501.09898): disparity of the left image from a rectified pair.

Images are RGB, float, 0..255 (not 0..1), (B, 3, H, W) with H and W multiples of 32 (`pad_to_multiple`). Disparities are in
pixels of the full image; `init` and `init_disp` are at quarter resolution in quarter pixels (full-size value / 4). Left
pixel x matches right pixel x - disparity.
"""


import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from stereo.aggregation import Classifier, FeatureGate, Hourglass
from stereo.blocks import ConvBlock
from stereo.context import ChannelAttention, ContextNet, SpatialAttention
from stereo.cost_volume import CostLookup, CostStem, group_correlation, soft_argmin
from stereo.features import DetailStem, FeatureNet
from stereo.gru import UpdateBlock

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GROUPS, CONCAT_DIM, DETAIL_DIM = 8, 12, 32  # channel groups, projected channels per view, width of the detail stem


class UpsampleStem(nn.Module):
    """Mask features at 1/4 and detail features at 1/2 -> features at 1/2 for the upsampling weights.

    conv2 is linear in its concatenated input: `prepare` makes the part of the detail features once for all iterations.
    """

    def __init__(self, dim: int, detail_dim: int):
        super().__init__()
        self.conv1 = ConvBlock(nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1, bias=False), None)
        self.conv2 = ConvBlock(nn.Conv2d(dim + detail_dim, dim + detail_dim, 3, padding=1, bias=False), None)

    def prepare(self, detail: Tensor) -> Tensor:
        return F.conv2d(detail, self.conv2.conv.weight[:, -detail.shape[1] :], padding=1)

    def forward(self, mask: Tensor, prepared: Tensor) -> Tensor:
        x = self.conv1(mask)
        x = F.conv2d(x, self.conv2.conv.weight[:, : x.shape[1]], padding=1) + prepared
        return F.leaky_relu_(x, 0.01)


def convex_upsample(disp: Tensor, logits: Tensor) -> Tensor:
    """Disparity at four times the size, each pixel a convex combination of the 3x3 neighbours of its quarter pixel.

    disp: (B, 1, h, w) in quarter pixels. logits: (B, 9, 4h, 4w), neighbours row by row; outside the map they count as 0.
    Returns (B, 1, 4h, 4w) float32 in full pixels.
    """
    B, _, h, w = disp.shape
    weights = logits.float().softmax(1).view(B, 9, h, 4, w, 4)
    neighbours = F.unfold(4 * disp.float(), 3, padding=1).view(B, 9, h, 1, w, 1)
    return (weights * neighbours).sum(1).view(B, 1, 4 * h, 4 * w)


class FoundationStereo(nn.Module):
    """The network. Defaults are the published ViT-L model.

    vit_size: "vits", "vitb", "vitl", or None for a network without the monocular branch (small enough for a CPU).
    max_disp: largest disparity of the cost volume in full pixels, a multiple of 32.
    corr_levels, corr_radius: pyramid levels and taps (2r + 1) of the lookup.
    hidden_dims: width of the GRUs per level, all equal (128 published); context and update networks scale with it.
    n_gru_layers: 3, or 2 without the level at 1/16.
    volume_dim: channels of the cost volume (28 published), a multiple of 4.
    low_memory: in inference keep the volume in 16 bit and recompute the all-pairs correlation.
    legacy_head_attention: see `DisparityTransformer`.
    checkpointing: recompute iterations and convolution units in the backward pass (`set_checkpointing`).
    bn_frozen: batch norms keep their statistics in train mode, their scale and shift stay trainable.
    Precision: run under autocast as a whole; correlation, lookup, soft-argmin, upsampling and the disparity stay float32.
    """

    def __init__(
        self,
        vit_size: str | None = "vitl",
        max_disp: int = 416,
        corr_levels: int = 2,
        corr_radius: int = 4,
        hidden_dims: tuple[int, ...] = (128, 128, 128),
        n_gru_layers: int = 3,
        volume_dim: int = 28,
        low_memory: bool = False,
        legacy_head_attention: bool = False,
        checkpointing: bool = False,
        bn_frozen: bool = False,
    ):
        super().__init__()
        dim = hidden_dims[0]
        if max_disp % 32 or max_disp <= 0:
            raise ValueError(f"max_disp {max_disp} must be a positive multiple of 32")
        if len(set(hidden_dims)) > 1 or dim % 16:
            raise ValueError(f"hidden_dims {list(hidden_dims)} must be equal multiples of 16")
        if n_gru_layers not in (2, 3) or volume_dim % 4:
            raise ValueError(f"n_gru_layers {n_gru_layers} must be 2 or 3, volume_dim {volume_dim} a multiple of 4")
        self.max_disp, self.corr_levels, self.corr_radius = max_disp, corr_levels, corr_radius
        self.low_memory, self.checkpointing, self.bn_frozen = bool(low_memory), checkpointing, bn_frozen
        cost_dim = corr_levels * (2 * corr_radius + 1) * (volume_dim + 1)
        self.feature = FeatureNet(vit_size)
        feature_dims = self.feature.dims
        self.proj_cmb = nn.Conv2d(feature_dims[0], CONCAT_DIM, 1)
        self.corr_stem = CostStem(GROUPS, CONCAT_DIM, volume_dim)
        self.corr_feature_att = FeatureGate(volume_dim, feature_dims[0])
        self.cost_agg = Hourglass(volume_dim, feature_dims, legacy_head_attention)
        self.classifier = Classifier(volume_dim)
        self.cnet = ContextNet(dim, self.feature.mono_dim, n_gru_layers)
        self.cam, self.sam = ChannelAttention(dim), SpatialAttention()
        self.update_block = UpdateBlock(cost_dim, dim, n_gru_layers)
        self.stem_2 = DetailStem(3, DETAIL_DIM)
        self.spx_2_gru = UpsampleStem(dim // 4, DETAIL_DIM)
        self.spx_gru = nn.Sequential(nn.ConvTranspose2d(dim // 4 + DETAIL_DIM, 9, 4, stride=2, padding=1))
        # in the published weights, never used: frozen, so that neither an optimizer nor DDP waits for their gradients
        self.stem_4 = DetailStem(DETAIL_DIM, 48).requires_grad_(False)
        self.context_zqr_convs = nn.ModuleList(nn.Conv2d(dim, 3 * dim, 3, padding=1) for _ in range(3)).requires_grad_(False)
        self.register_buffer("image_mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.set_checkpointing(checkpointing)

    def set_checkpointing(self, on: bool) -> None:
        for m in self.modules():
            if hasattr(m, "checkpointing"):
                m.checkpointing = on

    def compile_step(self, **options) -> None:
        """torch.compile the part that runs in every iteration, in place (before DDP wraps the model); names stay as they are.

        options: of torch.compile, such as `backend`.
        """
        self.update_block.compile(dynamic=False, **options)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.bn_frozen:
            for m in self.modules():
                if isinstance(m, _BatchNorm):
                    m.eval()
        return self

    def normalise(self, image: Tensor) -> Tensor:
        """RGB 0..255 -> ImageNet-normalised."""
        return (image / 255 - self.image_mean) / self.image_std

    def filtered_volume(self, features: list[Tensor]) -> Tensor:
        """Feature pyramid of [left; right] -> filtered volume (B, volume_dim, D, h, w) of the left view."""
        left = [f.chunk(2)[0] for f in features]
        f4_left, f4_right = features[0].chunk(2)
        correlation = group_correlation(f4_left, f4_right, self.max_disp // 4, GROUPS)
        volume = self.corr_stem(correlation, self.proj_cmb(f4_left), self.proj_cmb(f4_right))
        return self.cost_agg(self.corr_feature_att(volume, left[0]), left)

    def recurrent_inputs(self, left: Tensor, mono: Tensor | None):
        """Left image -> initial hidden states, prepared contexts, attentions; lists from 1/4 to 1/16."""
        net, contexts, attentions = [], [], []
        for hidden, context in self.cnet(left, mono):
            net.append(hidden.tanh())
            context = F.relu(context)
            context = self.cam(context) * context
            contexts.append(context)
            attentions.append(self.sam(context))
        return net, self.update_block.prepare(contexts), attentions

    def forward(
        self,
        left: Tensor,
        right: Tensor,
        iters: int = 22,
        init_disp: Tensor | None = None,
        every_iteration: bool | None = None,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Disparity of the left image.

        left, right: (B, 3, H, W) RGB 0..255, H and W multiples of 32 (ValueError otherwise).
        iters: GRU iterations (22 in training, 32 in evaluation in the paper).
        init_disp: (B, 1, H/4, W/4) start in quarter pixels, instead of the soft-argmin of the volume.
        every_iteration: upsample after every iteration, not only after the last one (default: in train mode).
        Returns init (B, 1, H/4, W/4) in quarter pixels, and preds, a list of (B, 1, H, W) in full pixels; all float32.
        """
        H, W = left.shape[-2:]
        if left.shape != right.shape or H % 32 or W % 32:
            raise ValueError(f"images of {tuple(left.shape)} and {tuple(right.shape)}: need one size, a multiple of 32")
        if iters < 1:
            raise ValueError(f"iters {iters} must be at least 1")
        every_iteration = self.training if every_iteration is None else every_iteration
        left, right = self.normalise(left), self.normalise(right)
        features, mono = self.feature(torch.cat([left, right]))
        volume = self.filtered_volume(features)
        disp = soft_argmin(self.classifier(volume).squeeze(1)) if init_disp is None else init_disp.float()
        net, prepared, attentions = self.recurrent_inputs(left, None if mono is None else mono.chunk(2)[0])
        detail = self.spx_2_gru.prepare(self.stem_2(left))
        with torch.autocast(left.device.type, enabled=False):
            lookup = CostLookup(volume, *features[0].chunk(2), self.corr_levels, self.corr_radius, self.low_memory)

        def iterate(net, disp, upsample: bool):
            disp = disp.detach()
            net, mask, delta = self.update_block(net, prepared, lookup(disp), disp, attentions)
            disp = disp + delta.float()
            return net, disp, self.upsample(disp, mask, detail) if upsample else None

        init, preds = disp, []
        for i in range(iters):
            upsample = every_iteration or i == iters - 1
            if self.checkpointing and torch.is_grad_enabled():
                net, disp, pred = checkpoint(
                    iterate, net, disp, upsample, use_reentrant=False, preserve_rng_state=False
                )
            else:
                net, disp, pred = iterate(net, disp, upsample)
            if upsample:
                preds.append(pred)
        return {"init": init, "preds": preds}

    def upsample(self, disp: Tensor, mask: Tensor, detail: Tensor) -> Tensor:
        return convex_upsample(disp, self.spx_gru(self.spx_2_gru(mask, detail)))


def padding(H: int, W: int, multiple: int = 32, force_square: bool = False) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) pixels that bring both sides to the next multiple, half on each side, the odd one right
    and below. force_square: both sides to the next multiple above the larger one."""
    side = -(-max(H, W) // multiple) * multiple
    pad_h, pad_w = (side - H, side - W) if force_square else (-H % multiple, -W % multiple)
    return pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2


def pad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Replicate the border of (B, C, H, W); `pads` from `padding`."""
    return F.pad(x, pads, mode="replicate") if any(pads) else x


def unpad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    left, right, top, bottom = pads
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def predict(model: FoundationStereo, left: Tensor, right: Tensor, iters: int = 32, init_disp: Tensor | None = None) -> Tensor:
    """Disparity (B, 1, H, W) in pixels of images of any size (B, 3, H, W), RGB 0..255; pads and crops."""
    pads = padding(*left.shape[-2:])
    out = model(pad(left, pads), pad(right, pads), iters, init_disp, every_iteration=False)
    return unpad(out["preds"][-1], pads)


def hierarchical(
    model: FoundationStereo, left: Tensor, right: Tensor, iters: int = 32, small_ratio: float = 0.5, pad_fix: bool = False
) -> Tensor:
    """Coarse-to-fine inference for large images: the disparity at `small_ratio` of the size starts the full-size pass.

    left, right: (B, 3, H, W) RGB 0..255 of any size. Returns (B, 1, H, W) in pixels.
    pad_fix: the public code adds the left padding to the start, though it moves both views alike; that is kept for equal
    results unless `pad_fix`. No difference where nothing is padded.
    """
    H, W = left.shape[-2:]
    small = [F.interpolate(x, scale_factor=small_ratio, mode="bilinear", align_corners=False) for x in (left, right)]
    disp = predict(model, *small, iters)
    disp = F.interpolate(disp, size=(H, W), mode="bilinear", align_corners=True).div(small_ratio).clamp(min=0)
    pads = padding(H, W)
    disp = pad(disp, pads) + (0 if pad_fix else pads[0])
    init = 0.25 * F.interpolate(disp, scale_factor=0.25, mode="bilinear", align_corners=True)
    return predict(model, left, right, iters, init)
