"""MoGe networks: one image -> affine-invariant point map and mask (v1, Wang et al., arXiv 2410.19115), and in v2 (Wang et al.,
arXiv 2507.02546) also normals and the metric scale. A DINOv2 encoder and a convolutional decoder.

Parameter names are those of the published checkpoints, {"model_config": constructor arguments, "model": state dict}, which `load`
reads; ours holds the same two entries. Points are (x, y, z) in OpenCV camera axes, z up to one shift; all up to one scale.
"""

import math
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moge.dinov2 import dinov2
from moge.geometry import depth_to_points, intrinsics_from_focal, recover_focal_shift, view_plane_uv

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "silu": nn.SiLU, "elu": nn.ELU}
NORMS = {
    "group_norm": lambda c: nn.GroupNorm(c // 32, c),
    "layer_norm": lambda c: nn.GroupNorm(1, c),
    "instance_norm": nn.InstanceNorm2d,
    "none": lambda c: nn.Identity(),
}


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode="replicate")


class ResidualBlock(nn.Module):
    """Pre-activation: x + conv(act(norm(conv(act(norm(x)))))), width c -> hidden -> c."""

    def __init__(
        self, c: int, hidden: int, in_norm: str = "layer_norm", hidden_norm: str = "group_norm", activation: str = "relu"
    ):
        super().__init__()
        if hidden_norm == "group_norm" and hidden % 32:
            raise ValueError(f"group_norm needs hidden widths that are multiples of 32, not {hidden}")
        act = ACTIVATIONS[activation]
        self.layers = nn.Sequential(
            NORMS[in_norm](c), act(), conv3x3(c, hidden), NORMS[hidden_norm](hidden), act(), conv3x3(hidden, c)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def resampler(kind: str, c_in: int, c_out: int) -> nn.Sequential:
    """Layers that change the size by 2 (up; avg_pool, max_pool, pixel_unshuffle: down) and the width from c_in to c_out."""
    if kind == "conv_transpose":
        up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        with torch.no_grad():
            up.weight.copy_(
                up.weight[:, :, :1, :1].expand_as(up.weight)
            )  # starts as nearest-neighbour upsampling: no checkerboard
        return nn.Sequential(up, conv3x3(c_out, c_out))
    if kind in ("bilinear", "nearest"):
        return nn.Sequential(nn.Upsample(scale_factor=2, mode=kind), conv3x3(c_in, c_out))
    if kind == "pixel_shuffle":
        wide = conv3x3(c_in, 4 * c_out)
        with torch.no_grad():
            wide.weight.copy_(wide.weight[::4].repeat_interleave(4, 0))
            wide.bias.copy_(wide.bias[::4].repeat_interleave(4, 0))
        return nn.Sequential(wide, nn.PixelShuffle(2), conv3x3(c_out, c_out))
    if kind == "pixel_unshuffle":
        return nn.Sequential(nn.PixelUnshuffle(2), conv3x3(4 * c_in, c_out))
    if kind in ("avg_pool", "max_pool"):
        return nn.Sequential(conv3x3(c_in, c_out), nn.AvgPool2d(2) if kind == "avg_pool" else nn.MaxPool2d(2))
    raise ValueError(
        f"unknown resampler {kind!r}: conv_transpose, bilinear, nearest, pixel_shuffle, pixel_unshuffle, avg_pool or max_pool"
    )


def remap_points(points: Tensor, mode: str) -> Tensor:
    """Map the network's raw output (..., 3) to points: linear, sinh, exp (z = e^z, x and y times z) or sinh_exp."""
    if mode == "linear":
        return points
    if mode == "sinh":
        return points.sinh()
    xy, z = points.split([2, 1], dim=-1)
    z = z.exp()
    if mode == "exp":
        return torch.cat([xy * z, z], -1)
    if mode == "sinh_exp":
        return torch.cat([xy.sinh(), z], -1)
    raise ValueError(f"unknown remap_output {mode!r}: linear, sinh, exp or sinh_exp")


def uv_planes(x: Tensor, width: int, height: int, aspect: float) -> Tensor:
    """View-plane coordinates as two planes (B, 2, height, width) in x's dtype, B and device from x."""
    uv = view_plane_uv(width, height, aspect, x.device).to(x.dtype)
    return uv.permute(2, 0, 1).expand(x.shape[0], -1, -1, -1)


def check_range(tokens: Sequence[int]) -> list[int]:
    """num_tokens_range as a list; ValueError unless it is two whole numbers, the lower first."""
    if not isinstance(tokens, Sequence) or [type(n) for n in tokens] != [int, int] or not 0 < tokens[0] <= tokens[1]:
        raise ValueError(f"num_tokens_range {tokens} must be two whole numbers of tokens, the lower first")
    return list(tokens)


class MoGe(nn.Module):
    """What both versions share: inference and gradient checkpointing. `config` is what the model was built from."""

    version: str
    config: dict
    num_tokens_range: Sequence[int]
    mask_threshold: float = 0.5
    checkpoint_head: bool = False  # recompute each block of the decoder in the backward pass

    @property
    def outputs(self) -> list[str]:
        """Names in the result of `forward`."""
        if self.version == "v1":
            return ["points", "mask"]
        heads = {"points_head": "points", "normal_head": "normal", "mask_head": "mask", "scale_head": "metric_scale"}
        return [name for head, name in heads.items() if hasattr(self, head)] + ["mask_logit"] * hasattr(self, "mask_head")

    def set_gradient_checkpointing(self, mode: str | bool) -> None:
        """none (False), backbone, head, or all (True): which blocks are recomputed in the backward pass to save memory."""
        mode = {True: "all", False: "none"}.get(mode, mode)
        if mode not in ("none", "backbone", "head", "all"):
            raise ValueError(f"gradient checkpointing {mode!r}: none, backbone, head or all")
        self.encoder_network.checkpointing = mode in ("backbone", "all")
        self.checkpoint_head = mode in ("head", "all")

    def compile_blocks(self) -> None:
        """torch.compile of the transformer blocks, for any size; names and results stay.

        Not of the decoder's: in torch 2.11 the compiled backward pass of replicate padding expects another memory layout.
        """
        for block in self.encoder_network.blocks:
            block.compile(dynamic=True)

    @property
    def encoder_network(self) -> nn.Module:
        return self.backbone if self.version == "v1" else self.encoder.backbone

    def tokens_at(self, resolution_level: float) -> int:
        """Number of tokens at a resolution level 0 (fast) .. 9 (fine)."""
        low, high = self.num_tokens_range
        return int(low + resolution_level / 9 * (high - low))

    @torch.inference_mode()
    def infer(
        self,
        image: Tensor,
        fov_x: float | Tensor | None = None,
        resolution_level: float = 9,
        num_tokens: int | None = None,
        apply_mask: bool = True,
        force_projection: bool = True,
        use_fp16: bool = True,
    ) -> dict[str, Tensor]:
        """Geometry of image (B, 3, H, W) or (3, H, W) in 0..1; see `postprocess` for the arguments and the result.

        num_tokens: default from resolution_level. use_fp16: half-precision network on CUDA; the rest is float32.
        """
        batched = image.ndim == 4
        image = image if batched else image[None]
        half = use_fp16 and image.is_cuda and next(self.parameters()).dtype == torch.float32
        with torch.autocast(image.device.type, torch.float16, enabled=half):
            out = self(image.to(next(self.parameters()).dtype), num_tokens or self.tokens_at(resolution_level))
        result = postprocess(
            out["points"],
            out.get("mask"),
            out.get("normal"),
            out.get("metric_scale"),
            fov_x=fov_x,
            force_projection=force_projection,
            apply_mask=apply_mask,
            version=self.version,
            threshold=self.mask_threshold,
        )
        return result if batched else {k: v[0] for k, v in result.items()}


class HeadV1(nn.Module):
    """Decoder of v1: projects the encoder's layers, sums them, and upsamples by 8, then two output blocks at full size."""

    def __init__(
        self,
        num_layers: int,
        dim_in: int,
        dim_proj: int,
        dim_upsample: Sequence[int],
        dim_times_res_block_hidden: int,
        num_res_blocks: int,
        res_block_norm: str,
        last_res_blocks: int,
        last_conv_channels: int,
        last_conv_size: int,
    ):
        super().__init__()

        def residual(c: int) -> ResidualBlock:
            return ResidualBlock(c, dim_times_res_block_hidden * c, hidden_norm=res_block_norm)

        self.projects = nn.ModuleList(nn.Conv2d(dim_in, dim_proj, 1) for _ in range(num_layers))
        widths = [dim_proj, *dim_upsample]
        self.upsample_blocks = nn.ModuleList(
            nn.Sequential(resampler("conv_transpose", a + 2, b), *(residual(b) for _ in range(num_res_blocks)))
            for a, b in pairwise(widths)
        )
        self.output_block = nn.ModuleList(
            nn.Sequential(
                conv3x3(widths[-1] + 2, last_conv_channels),
                *(residual(last_conv_channels) for _ in range(last_res_blocks)),
                nn.ReLU(),
                nn.Conv2d(last_conv_channels, c, last_conv_size, padding=last_conv_size // 2, padding_mode="replicate"),
            )
            for c in (3, 1)
        )

    def forward(self, features: Sequence[Tensor], height: int, width: int, recompute: bool = False) -> list[Tensor]:
        """features: (B, D, ph, pw) each -> points (B, 3, height, width) and mask (B, 1, height, width), both raw."""
        x = sum(project(f) for project, f in zip(self.projects, features))
        for block in self.upsample_blocks:
            x = torch.cat([x, uv_planes(x, x.shape[-1], x.shape[-2], width / height)], 1)
            for layer in block:
                x = run(layer, x, recompute)
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        x = torch.cat([x, uv_planes(x, width, height, width / height)], 1)
        return [run(block, x, recompute) for block in self.output_block]


def run(module: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """module(x); with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)  # nothing random inside
    return module(x)


class MoGeV1(MoGe):
    """MoGe-1. Constructor arguments are the `model` section of a config or checkpoint; unknown ones are named in a warning."""

    version = "v1"

    def __init__(
        self,
        encoder: str = "dinov2_vitb14",
        intermediate_layers: int | Sequence[int] = 4,
        dim_proj: int = 512,
        dim_upsample: Sequence[int] = (256, 128, 128),
        dim_times_res_block_hidden: int = 1,
        num_res_blocks: int = 1,
        remap_output: str = "linear",
        res_block_norm: str = "group_norm",
        num_tokens_range: Sequence[int] = (1200, 2500),
        last_res_blocks: int = 0,
        last_conv_channels: int = 32,
        last_conv_size: int = 1,
        mask_threshold: float = 0.5,
        trained_area_range: Sequence[float] | None = None,
        encoder_options: dict | None = None,
        **unknown,
    ):
        """intermediate_layers: the last n blocks, or block indices. num_tokens_range: of training, spanned by the resolution
        levels. trained_area_range: older name of num_tokens_range, in pixels. encoder_options: arguments of `dinov2.DINOv2` that
        differ from the named variant's, for small networks (embed_dim, depth, num_heads, img_size).
        """
        super().__init__()
        if unknown:
            warnings.warn(f"MoGe v1 does not know {sorted(unknown)}: ignored", stacklevel=2)
        if trained_area_range is not None:
            num_tokens_range = [int(a // 196) for a in trained_area_range]
        remap_points(torch.zeros(3), remap_output)  # an unknown name should fail now
        self.intermediate_layers, self.remap_output = intermediate_layers, remap_output
        self.num_tokens_range, self.mask_threshold = check_range(num_tokens_range), mask_threshold
        self.backbone = dinov2(encoder, **(encoder_options or {}))
        self.head = HeadV1(
            intermediate_layers if isinstance(intermediate_layers, int) else len(intermediate_layers),
            self.backbone.embed_dim,
            dim_proj,
            dim_upsample,
            dim_times_res_block_hidden,
            num_res_blocks,
            res_block_norm,
            last_res_blocks,
            last_conv_channels,
            last_conv_size,
        )
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor, num_tokens: int) -> dict[str, Tensor]:
        """image (B, 3, H, W) in 0..1 -> points (B, H, W, 3) and mask (B, H, W), raw (about 1 valid, 0 not), both float32."""
        H, W = image.shape[-2:]
        factor = math.sqrt(num_tokens * 196 / (H * W))
        h, w = max(14, int(H * factor)), max(14, int(W * factor))  # a patch, however thin the image
        image = F.interpolate(image, (h, w), mode="bicubic", antialias=True, align_corners=False)
        image = (image - self.image_mean) / self.image_std
        patches = F.interpolate(image, (h // 14 * 14, w // 14 * 14), mode="bilinear", antialias=True, align_corners=False)
        features = self.backbone.get_intermediate_layers(patches, self.intermediate_layers, reshape=True)
        points, mask = self.head(features, h, w, self.checkpoint_head)
        points = F.interpolate(points.float(), (H, W), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        mask = F.interpolate(mask.float(), (H, W), mode="bilinear", align_corners=False)[:, 0]
        return {"points": remap_points(points, self.remap_output), "mask": mask}


class EncoderV2(nn.Module):
    """DINOv2 with one projection per requested layer, summed."""

    def __init__(
        self, backbone: str, intermediate_layers: int | Sequence[int], dim_out: int, encoder_options: dict | None = None
    ):
        super().__init__()
        self.intermediate_layers = intermediate_layers
        self.backbone = dinov2(backbone, **(encoder_options or {}))
        count = intermediate_layers if isinstance(intermediate_layers, int) else len(intermediate_layers)
        self.output_projections = nn.ModuleList(nn.Conv2d(self.backbone.embed_dim, dim_out, 1) for _ in range(count))
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in 0..1 -> features (B, dim_out, rows, cols) and the class token (B, D) of the last layer."""
        image = F.interpolate(image, (14 * rows, 14 * cols), mode="bilinear", antialias=True, align_corners=False)
        image = (image - self.image_mean) / self.image_std
        layers = self.backbone.get_intermediate_layers(image, self.intermediate_layers, reshape=True, return_class_token=True)
        return sum(project(f) for project, (f, _) in zip(self.output_projections, layers)), layers[-1][1]


class ConvStack(nn.Module):
    """Coarse-to-fine stack over a pyramid: at each level an input is projected and added, then residual blocks, an output, a
    resampler.

    Every argument after `dim_in` may be a list with one entry per level (resamplers: one fewer) or one value for all; a dim of
    None means that the level has no projection.
    """

    def __init__(
        self,
        dim_in: Sequence[int | None],
        dim_res_blocks: Sequence[int],
        dim_out: Sequence[int | None] | int | None,
        resamplers: Sequence[str] | str,
        dim_times_res_block_hidden: int | Sequence[int] = 1,
        num_res_blocks: int | Sequence[int] = 1,
        res_block_in_norm: str | Sequence[str] = "layer_norm",
        res_block_hidden_norm: str | Sequence[str] = "group_norm",
        activation: str = "relu",
        **unknown,
    ):
        super().__init__()
        if unknown:
            warnings.warn(f"MoGe v2 decoders do not know {sorted(unknown)}: ignored", stacklevel=2)
        n = len(next(v for v in (dim_res_blocks, dim_in, dim_out) if isinstance(v, (list, tuple))))

        def per_level(value, count=n):
            return list(value) if isinstance(value, (list, tuple)) else [value] * count

        dims, dim_in, dim_out = per_level(dim_res_blocks), per_level(dim_in), per_level(dim_out)
        kinds = per_level(resamplers, n - 1)
        factors, counts = per_level(dim_times_res_block_hidden), per_level(num_res_blocks)
        in_norms, hidden_norms = per_level(res_block_in_norm), per_level(res_block_hidden_norm)
        self.input_blocks = nn.ModuleList(nn.Conv2d(c, d, 1) if c is not None else nn.Identity() for c, d in zip(dim_in, dims))
        self.resamplers = nn.ModuleList(resampler(k, a, b) for k, (a, b) in zip(kinds, pairwise(dims)))
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(d, f * d, a, b, activation) for _ in range(count)))
            for d, f, count, a, b in zip(dims, factors, counts, in_norms, hidden_norms)
        )
        self.output_blocks = nn.ModuleList(nn.Conv2d(d, c, 1) if c is not None else nn.Identity() for d, c in zip(dims, dim_out))

    def forward(self, pyramid: Sequence[Tensor], recompute: bool = False) -> list[Tensor]:
        """One map per level in, one out."""
        outputs, x = [], None
        for i, y in enumerate(pyramid):
            y = self.input_blocks[i](y)
            x = y if x is None else x + y
            for block in self.res_blocks[i]:
                x = run(block, x, recompute)
            outputs.append(self.output_blocks[i](x))
            if i < len(self.resamplers):
                x = run(self.resamplers[i], x, recompute)
        return outputs


class MoGeV2(MoGe):
    """MoGe-2. encoder {backbone, intermediate_layers, dim_out[, encoder_options as in MoGeV1]}, neck and heads {ConvStack
    arguments}, scale_head {dims}; each head may be absent. Unknown arguments are named in a warning.
    """

    version = "v2"

    def __init__(
        self,
        encoder: dict,
        neck: dict,
        points_head: dict | None = None,
        mask_head: dict | None = None,
        normal_head: dict | None = None,
        scale_head: dict | None = None,
        remap_output: str = "linear",
        num_tokens_range: Sequence[int] = (1200, 3600),
        **unknown,
    ):
        super().__init__()
        if unknown:
            warnings.warn(f"MoGe v2 does not know {sorted(unknown)}: ignored", stacklevel=2)
        remap_points(torch.zeros(3), remap_output)  # an unknown name should fail now
        self.remap_output, self.num_tokens_range = remap_output, check_range(num_tokens_range)
        self.encoder = EncoderV2(
            encoder["backbone"], encoder["intermediate_layers"], encoder["dim_out"], encoder.get("encoder_options")
        )
        self.neck = ConvStack(**neck)
        for name, head in (("points_head", points_head), ("mask_head", mask_head), ("normal_head", normal_head)):
            if head is not None:
                setattr(self, name, ConvStack(**head))
        if scale_head is not None:
            layers = [m for a, b in pairwise(scale_head["dims"]) for m in (nn.Linear(a, b), nn.ReLU())]
            self.scale_head = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor, num_tokens: int) -> dict[str, Tensor]:
        """image (B, 3, H, W) in 0..1 -> of those whose head is there, all float32: points (B, H, W, 3), mask (B, H, W) as a
        probability and mask_logit, normal (B, H, W, 3) of unit length, metric_scale (B,).
        """
        H, W = image.shape[-2:]
        aspect = W / H
        rows, cols = max(1, round(math.sqrt(num_tokens / aspect))), max(1, round(math.sqrt(num_tokens * aspect)))
        x, cls = self.encoder(image, rows, cols)
        uv = [uv_planes(x, cols * 2**i, rows * 2**i, aspect) for i in range(len(self.neck.res_blocks))]
        maps = self.neck([torch.cat([x, uv[0]], 1), *uv[1:]], self.checkpoint_head)

        def full_size(head: nn.Module) -> Tensor:
            raw = head(maps, self.checkpoint_head)[-1].float()
            return F.interpolate(raw, (H, W), mode="bilinear", align_corners=False)

        out = {}
        if hasattr(self, "points_head"):
            out["points"] = remap_points(full_size(self.points_head).permute(0, 2, 3, 1), self.remap_output)
        if hasattr(self, "normal_head"):
            out["normal"] = F.normalize(full_size(self.normal_head).permute(0, 2, 3, 1), dim=-1, eps=1e-12)
        if hasattr(self, "mask_head"):
            out["mask_logit"] = full_size(self.mask_head)[:, 0]
            out["mask"] = out["mask_logit"].sigmoid()
        if hasattr(self, "scale_head"):
            out["metric_scale"] = self.scale_head(cls)[:, 0].float().exp()
        return out


def build(config: dict, version: str | None = None) -> MoGe:
    """Model with random weights from the `model` section of a config or a checkpoint's model_config.

    version: "v1" or "v2"; by default told by the config (the encoder of v2 is a dict). Raises ValueError where the two disagree.
    """
    found = "v2" if isinstance(config.get("encoder"), dict) else "v1"
    if version not in (None, found):
        raise ValueError(f"this model section describes MoGe {found}, but {version} was asked for")
    model = MoGeV2(**config) if found == "v2" else MoGeV1(**config)
    model.config = dict(config)
    return model


def load(path: str | Path, version: str | None = None, overrides: dict | None = None, allow: Sequence[str] = ()) -> MoGe:
    """Model from a checkpoint {"model_config", "model"}, published or ours, in eval mode.

    overrides: entries that replace those of model_config. allow: patterns of names that may be missing or left over; every other
    difference raises RuntimeError.
    """
    held = read_checkpoint(path)
    model = build({**held["model_config"], **(overrides or {})}, version)
    load_weights(model, held["model"], allow, str(path))
    return model.eval()


def read_checkpoint(path: str | Path) -> dict:
    """What a file {"model_config", "model"} holds, on the CPU; RuntimeError for any other, OSError where there is none."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a foreign or damaged file raises anything
        raise RuntimeError(f"{path} is no MoGe checkpoint, or damaged: {(str(error).splitlines() or [''])[0]}") from None
    if not isinstance(held, dict) or not all(isinstance(held.get(key), dict) for key in ("model", "model_config")):
        raise RuntimeError(f"{path} is no MoGe checkpoint: it should hold model_config and model")
    return held


def load_weights(model: MoGe, state: dict[str, Tensor], allow: Sequence[str] = (), origin: str = "the state dict") -> list[str]:
    """Copy weights into a model by name and return the names that differ; they must match patterns in `allow`, else
    RuntimeError.
    """
    own, state = model.state_dict(), {k: v for k, v in state.items() if isinstance(v, Tensor)}
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape
    ]
    bad = [line for line in wrong if " is " in line or not any(fnmatch(line.split(" ")[1], pattern) for pattern in allow)]
    if bad:
        raise RuntimeError(f"{origin} does not fit this model ({len(bad)} names): " + "; ".join(bad[:8]))
    model.load_state_dict(state, strict=False)
    return wrong


def postprocess(
    points: Tensor,
    mask: Tensor | None = None,
    normal: Tensor | None = None,
    metric_scale: Tensor | None = None,
    fov_x: float | Tensor | None = None,
    force_projection: bool = True,
    apply_mask: bool = True,
    version: str = "v2",
    threshold: float = 0.5,
) -> dict[str, Tensor]:
    """From the network's output to a camera, depth and points in that camera (MoGe, section 3.1).

    points (B, H, W, 3), mask (B, H, W): v1 raw, v2 probability, valid above `threshold`; normal (B, H, W, 3), metric_scale
    (B,). fov_x: horizontal field of view in degrees, a number or (B,), where known. force_projection: points are the depth
    unprojected with K, otherwise the network's own with the shift added. apply_mask: points and depth are infinite, normals 0,
    outside the mask. Returns float32 points (B, H, W, 3), depth (B, H, W), intrinsics (B, 3, 3; normalised), and mask (B, H, W;
    bool), normal where given.
    """
    points = points.float()
    B, H, W, _ = points.shape
    aspect = W / H
    mask = None if mask is None else mask.float() > threshold
    focal = None
    if fov_x is not None:
        fov = torch.as_tensor(fov_x, dtype=torch.float32, device=points.device).deg2rad().expand(B)
        focal = aspect / (1 + aspect**2) ** 0.5 / torch.tan(fov / 2)
    focal, shift = recover_focal_shift(points, mask, focal)
    K = intrinsics_from_focal(focal, aspect)
    depth = points[..., 2] + shift[:, None, None]
    if version == "v2":
        mask = depth > 0 if mask is None else mask & (depth > 0)
    points = depth_to_points(depth, K) if force_projection else torch.cat([points[..., :2], depth[..., None]], -1)
    if metric_scale is not None:
        scale = metric_scale.float()[:, None, None]
        points, depth = points * scale[..., None], depth * scale
    out = {"points": points, "depth": depth, "intrinsics": K}
    if mask is not None:
        out["mask"] = mask
    if normal is not None:
        out["normal"] = normal.float()
    if apply_mask and mask is not None:
        out["points"] = torch.where(mask[..., None], points, torch.inf)
        out["depth"] = torch.where(mask, depth, torch.inf)
        if normal is not None:
            out["normal"] = torch.where(mask[..., None], out["normal"], 0.0)
    return out
