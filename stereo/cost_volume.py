"""Cost volume between the two feature maps, and its lookup around a disparity (FoundationStereo, sections 3.2, 3.3).

Everything is at quarter resolution: h = H/4, w = W/4, disparities d in quarter pixels, left pixel x matches right pixel
x - d. Volumes are (B, C, D, h, w) with plane i holding disparity i.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stereo.blocks import BatchResidual3d, ConvBlock, apply, pointwise


def shifted_planes(right: Tensor, n_disp: int) -> Tensor:
    """(B, C, h, w) -> (B, C, n_disp, h, w): plane i is `right` moved i pixels to the right, 0 where nothing comes in."""
    padded = F.pad(right, (n_disp - 1, 0))
    windows = padded.unfold(-1, right.shape[-1], 1)  # (B, C, h, n_disp, w), the largest shift first
    return windows.flip(3).transpose(2, 3)


def group_correlation(left: Tensor, right: Tensor, n_disp: int, groups: int) -> Tensor:
    """Group-wise correlation (B, groups, n_disp, h, w), float32: cosine of left(x) and right(x - i) in every channel group.

    left, right: (B, C, h, w). Zero for x < i. One matrix product per row gives all pairs, of which the diagonals are taken;
    nothing but the two normalised maps is kept for the backward pass. Without one it goes by blocks of rows: all pairs of a
    whole map need some twenty times the memory of the result.
    """
    B, C, h, w = left.shape
    if not torch.is_grad_enabled() and h > (rows := max(1, 2**22 // (groups * w * w))):
        parts = zip(left.split(rows, 2), right.split(rows, 2))
        return torch.cat([group_correlation(*part, n_disp, groups) for part in parts], 3)
    with torch.autocast(left.device.type, enabled=False):
        left, right = (F.normalize(f.float().view(B, groups, C // groups, h, w), dim=2) for f in (left, right))
        pairs = left.permute(0, 1, 3, 4, 2) @ right.permute(0, 1, 3, 2, 4)  # (B, G, h, w, w): left x, right x'
        # With n_disp - 1 zeros before each row of length w and rows of one element more, entry (x, j) of the new view is
        # entry (x, x + j) of the padded rows: right pixel x' = x + j - (n_disp - 1), so j counts the disparities backwards.
        rows = F.pad(pairs, (n_disp - 1, 0)).flatten(3)
        band = F.pad(rows, (0, w)).view(B, groups, h, w, w + n_disp)[..., :n_disp]
        return band.flip(4).permute(0, 1, 4, 2, 3).contiguous()


class CostStem(nn.Sequential):
    """First 3-D convolutions on [group correlation, left, shifted right], without building the concatenation.

    Its first layer is a 1x1x1 convolution: applied to the three inputs apart, in two dimensions where they are flat, it
    gives the same sum with only its output in three dimensions.
    """

    def __init__(self, groups: int, concat_dim: int, dim: int, checkpointing: bool = False):
        super().__init__(
            nn.Conv3d(groups + 2 * concat_dim, dim, 1),
            ConvBlock(nn.Conv3d(dim, dim, 3, padding=1, bias=False)),
            BatchResidual3d(dim),
            BatchResidual3d(dim),
        )
        self.groups, self.checkpointing = groups, checkpointing

    def forward(self, correlation: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """(B, groups, D, h, w), (B, concat_dim, h, w), the same -> (B, dim, D, h, w)."""
        weight = self[0].weight.flatten(1)  # (dim, groups + 2 concat_dim)
        g, c = self.groups, left.shape[1]
        flat = F.conv2d(left, weight[:, g : g + c, None, None], self[0].bias)
        moving = F.conv2d(right, weight[:, g + c :, None, None])
        x = pointwise(correlation, weight[:, :g])
        x = x + flat.unsqueeze(2) + shifted_planes(moving, correlation.shape[2])
        for unit in list(self)[1:]:
            x = apply(unit, x, checkpointing=self.checkpointing)
        return x


def soft_argmin(logits: Tensor) -> Tensor:
    """Expected disparity (B, 1, h, w), float32, of the softmax over the planes of (B, D, h, w)."""
    probability = logits.float().softmax(1)
    planes = torch.arange(logits.shape[1], dtype=torch.float32, device=logits.device).view(1, -1, 1, 1)
    return (probability * planes).sum(1, keepdim=True)


class _Collect(torch.autograd.Function):
    """Identity whose gradient is what the lookups of all iterations have added up in `box`."""

    @staticmethod
    def forward(ctx, volume: Tensor, box: list) -> Tensor:
        ctx.box, ctx.dtype = box, volume.dtype
        ctx.set_materialize_grads(False)
        return volume.view_as(volume)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (ctx.box.pop().to(ctx.dtype) if ctx.box else grad), None


class _Taps(torch.autograd.Function):
    """Values of a volume at 2r+1 positions around `position` along its planes, linearly interpolated, 0 outside.

    The positions of one pixel share their fraction, so 2r+2 neighbours are fetched once and blended. The gradient of the
    volume goes into one float32 buffer for all calls (`box`), instead of a dense volume of zeros per call.
    """

    @staticmethod
    def neighbours(position: Tensor, n: int, radius: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clamped indices and validity (B, 1, 2r+2, h, w) of the neighbours, and the fraction (B, 1, 1, h, w)."""
        position = position.clamp(-radius - 2, n + radius + 1)  # beyond these every tap is outside anyway
        base = position.floor()
        offset = torch.arange(-radius, radius + 2, device=position.device).view(1, 1, -1, 1, 1)
        index = base.long().unsqueeze(2) + offset
        return index.clamp(0, n - 1), (index >= 0) & (index < n), (position - base).unsqueeze(2)

    @staticmethod
    def forward(ctx, volume: Tensor, position: Tensor, radius: int, box: list) -> Tensor:
        B, C, n, h, w = volume.shape
        index, valid, fraction = _Taps.neighbours(position, n, radius)
        values = volume.gather(2, index.expand(B, C, -1, h, w)).float() * valid
        ctx.save_for_backward(position)
        ctx.shape, ctx.radius, ctx.box = volume.shape, radius, box
        return torch.lerp(values[:, :, :-1], values[:, :, 1:], fraction)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (position,), (B, C, n, h, w) = ctx.saved_tensors, ctx.shape
        if not ctx.box:
            ctx.box.append(torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device))
        index, valid, fraction = _Taps.neighbours(position, n, ctx.radius)
        values = F.pad(grad, (0, 0, 0, 0, 0, 1)).mul_(1 - fraction)
        values[:, :, 1:].addcmul_(grad, fraction)
        ctx.box[0].scatter_add_(2, index.expand(B, C, -1, h, w), values.mul_(valid))
        return None, None, None, None


def taps(volume: Tensor, position: Tensor, radius: int, box: list) -> Tensor:
    """(B, C, n, h, w), (B, 1, h, w) -> (B, C, 2r+1, h, w) float32; `volume` must come from `collect(volume, box)`."""
    return _Taps.apply(volume, position, radius, box)


def collect(volume: Tensor, box: list) -> Tensor:
    return _Collect.apply(volume, box)


def halve_planes(volume: Tensor) -> Tensor:
    """Mean of neighbouring planes: (B, C, n, h, w) -> (B, C, n // 2, h, w) float32."""
    n = volume.shape[2] // 2 * 2
    return (volume[:, :, 0:n:2].float() + volume[:, :, 1:n:2]) * 0.5


def all_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of every left with every right pixel of a row: normalised (B, C, h, w) maps -> (B, 1, w', h, w)."""
    pairs = right.permute(0, 2, 3, 1) @ left.permute(0, 2, 1, 3)  # (B, h, w', w)
    return pairs.transpose(1, 2).unsqueeze(1)


class CostLookup:
    """Pyramid lookup into the filtered volume and into the all-pairs correlation: lookup(disp) -> features, float32.

    volume: (B, C, D, h, w). left, right: feature maps (B, C4, h, w), normalised here.
    Levels halve the disparity axis (the right-pixel axis); level i is sampled at disp / 2^i (at (x - disp) / 2^i) and the
    2r+1 positions one apart around it. Output (B, levels * (2r+1) * (C+1), h, w): per level the volume, channel-major,
    then the correlation.
    low_memory: only where no gradient is asked for; the volume in 16 bit, the correlation made anew per block of rows.
    """

    def __init__(self, volume: Tensor, left: Tensor, right: Tensor, levels: int, radius: int, low_memory: bool = False):
        shortest = min(volume.shape[2], left.shape[-1]) >> (levels - 1)
        if shortest < 2:
            raise ValueError(
                f"{levels} lookup levels need at least {2**levels} disparity planes and columns at quarter resolution, "
                f"got {volume.shape[2]} and {left.shape[-1]}: raise max_disp or the image width, or lower corr_levels"
            )
        self.levels, self.radius = levels, radius
        self.low_memory = low_memory and not torch.is_grad_enabled()
        left, right = (F.normalize(f.float(), dim=1) for f in (left, right))
        half = volume.dtype if volume.dtype != torch.float32 else torch.float16
        self.columns = torch.arange(left.shape[-1], dtype=torch.float32, device=left.device)
        self.volumes = self._pyramid(volume.to(half) if self.low_memory else volume)
        if self.low_memory:
            self.left, self.right = left.to(half), right.to(half)
        else:
            self.correlations = self._pyramid(all_pairs(left, right))

    def _pyramid(self, volume: Tensor) -> list[tuple[Tensor, list]]:
        """[(level, box of its gradient)]; a level has the dtype of `volume` where memory is short, else float32 means."""
        pyramid = []
        for i in range(self.levels):
            if i:
                volume = halve_planes(volume).to(volume.dtype if self.low_memory else torch.float32)
            box = []
            pyramid.append((collect(volume, box), box))
        return pyramid

    def __call__(self, disp: Tensor) -> Tensor:
        """disp: (B, 1, h, w) float32, no gradient goes into it."""
        with torch.autocast(disp.device.type, enabled=False):
            if not self.low_memory:
                return self._features(disp, self.volumes, self.correlations)
            rows = max(1, 2**22 // self.left.shape[-1] ** 2)  # blocks of about 4 million pairs
            blocks = []
            for y in range(0, disp.shape[2], rows):
                block = slice(y, y + rows)
                volumes = [(v[:, :, :, block], box) for v, box in self.volumes]
                pairs = self._pyramid(all_pairs(self.left[:, :, block], self.right[:, :, block]))
                blocks.append(self._features(disp[:, :, block], volumes, pairs))
            return torch.cat(blocks, 2)

    def _features(self, disp: Tensor, volumes: list, correlations: list) -> Tensor:
        features, right_x = [], self.columns - disp
        for i, (volume, correlation) in enumerate(zip(volumes, correlations)):
            features.append(taps(volume[0], disp / 2**i, self.radius, volume[1]).flatten(1, 2))
            features.append(taps(correlation[0], right_x / 2**i, self.radius, correlation[1]).flatten(1, 2))
        return torch.cat(features, 1)
