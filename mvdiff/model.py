"""Assembly: the networks built from weights folders, one denoising prediction for training, and the sampler.

The rows of a batch are (domain, object, view) with views fastest: see unet.py. An input picture is encoded once per object and
its encoding spread over the object's rows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mvdiff.clip import CLIPVision
from mvdiff.diffusion import Diffusion
from mvdiff.loss import draw_rows
from mvdiff.unet import UNet
from mvdiff.vae import AutoencoderKL, rename_old_attention
from mvdiff.weights import part_folder, read_json, read_state, write_part

# Options of the published config files that have one supported value. Anything unknown but null and false is an error.
UNET_FIXED = {
    "act_fn": "silu", "center_input_sample": False, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "downsample_padding": 1, "dropout": 0.0, "dual_cross_attention": False, "mid_block_scale_factor": 1,
    "only_cross_attention": False, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "upcast_attention": False,
    "attention_type": "default",
}  # fmt: skip
UNET_ARGUMENTS = (
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim",
    "norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift", "transformer_layers_per_block", "use_linear_projection",
    "projection_class_embeddings_input_dim", "num_views", "cd_attention_mid", "cd_attention_last", "multiview_attention",
    "sparse_mv_attention",
)  # fmt: skip
UNET_IGNORED = {
    "sample_size", "scale_input_latents", "mvcd_attention", "cross_domain_attention", "joint_attention", "joint_attention_twice",
    "addition_embed_type_num_heads", "down_block_types", "mid_block_type", "up_block_types", "class_embed_type",
}  # fmt: skip
VAE_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
VAE_ARGUMENTS = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
    "scaling_factor",
)  # fmt: skip
CLIP_ARGUMENTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "projection_dim", "layer_norm_eps",
)  # fmt: skip
DIFFUSION_ARGUMENTS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample", "clip_sample_range",
)  # fmt: skip
RENAMED = {
    ".attn_joint.": ".attn_joint_last.", ".norm_joint.": ".norm_joint_last.",
    ".attn_joint_twice.": ".attn_joint_mid.", ".norm_joint_twice.": ".norm_joint_mid.",
}  # fmt: skip


# ---- configs ---------------------------------------------------------------------------------------------------------


def _check(config: dict, arguments: tuple, fixed: dict, ignored: set, what: str) -> dict:
    """The arguments that `config` holds; ValueError for an option whose value is not supported."""
    for key, value in config.items():
        known = key in arguments or key in ignored or key.startswith("_")
        if known or value is None or (value is False and key not in fixed) or fixed.get(key) == value:
            continue
        supported = f"only {fixed[key]!r} is" if key in fixed else "the option is not"
        raise ValueError(f"{what}: {key} = {value!r}: {supported} supported")
    return {key: config[key] for key in arguments if config.get(key) is not None}


def unet_arguments(config: dict) -> dict:
    """Arguments of `UNet` from a unet/config.json. Plain Stable Diffusion block types and the multi-view ones mean the same."""
    arguments = _check(config, UNET_ARGUMENTS, UNET_FIXED, UNET_IGNORED, "unet config")
    plain = [str(name).replace("MV2D", "2D") for name in config.get("down_block_types") or ()]
    if plain:
        up = [str(name).replace("MV2D", "2D") for name in config.get("up_block_types") or ()]
        mirrored = [name.replace("Down", "Up") for name in reversed(plain)]
        if set(plain) - {"CrossAttnDownBlock2D", "DownBlock2D"} or (up and up != mirrored):
            raise ValueError(f"unet config: block types {plain}, {up} are not supported")
        arguments["attention"] = tuple(name.startswith("CrossAttn") for name in plain)
    if str(config.get("mid_block_type") or "UNetMidBlock2DCrossAttn").replace("MV2D", "2D") != "UNetMidBlock2DCrossAttn":
        raise ValueError(f"unet config: mid_block_type = {config['mid_block_type']!r} is not supported")
    if config.get("class_embed_type") not in (None, "projection"):
        raise ValueError(f"unet config: class_embed_type = {config['class_embed_type']!r}: only 'projection' is supported")
    if config.get("class_embed_type") is None:
        arguments["projection_class_embeddings_input_dim"] = None
    context = arguments.get("cross_attention_dim")
    if isinstance(context, list):
        if len(set(context)) > 1:
            raise ValueError(f"unet config: cross_attention_dim = {context}: there is one context, so all entries must be equal")
        arguments["cross_attention_dim"] = context[0]
    arguments.setdefault("cd_attention_mid", bool(config.get("joint_attention_twice")))  # its name in older files
    arguments.setdefault("cd_attention_last", False)
    return arguments


def vae_arguments(config: dict) -> dict:
    """Arguments of `AutoencoderKL` from a vae/config.json."""
    ignored = {"sample_size", "down_block_types", "up_block_types", "force_upcast"}
    types = {*(config.get("down_block_types") or ()), *(config.get("up_block_types") or ())}
    if types - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise ValueError(f"vae config: block types {sorted(types)} are not supported")
    return _check(config, VAE_ARGUMENTS, VAE_FIXED, ignored, "vae config")


def clip_arguments(config: dict) -> dict:
    """Arguments of `CLIPVision` from an image_encoder/config.json, in which they may lie under `vision_config`."""
    inner = config.get("vision_config") or {}
    merged = {**config, **{k: v for k, v in inner.items() if v is not None}}
    if merged.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"image encoder config: hidden_act = {merged['hidden_act']!r}: only 'quick_gelu' is supported")
    return {key: merged[key] for key in CLIP_ARGUMENTS if key in merged}


def diffusion_arguments(config: dict) -> dict:
    """Arguments of `Diffusion` from a scheduler_config.json of any scheduler class; only the numbers are taken."""
    if config.get("thresholding"):
        raise ValueError("scheduler config: thresholding = true is not supported")
    return {key: config[key] for key in DIFFUSION_ARGUMENTS if config.get(key) is not None}


# ---- weights ---------------------------------------------------------------------------------------------------------


def rename_old_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the cross-domain layers in older files, turned into today's."""
    out = {}
    for name, tensor in state.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


def new_kind(name: str) -> str | None:
    """Which of the parts that weights may lack as a whole a parameter belongs to, if any."""
    return next((kind for kind in ("joint_mid", "joint_last", "class_embedding") if f"{kind}." in name), None)


def is_joint(name: str) -> bool:
    """Whether a parameter belongs to the cross-domain layers."""
    return new_kind(name) in ("joint_mid", "joint_last")


def init_unet(unet: UNet, state: dict[str, Tensor], zero_init_conv_in: bool = True) -> dict[str, list[str]]:
    """Copy weights into a UNet that may have more: camera embedding, cross-domain layers, input channels for the picture.

    A `conv_in` with fewer input channels fills the first ones; the others become zero (`zero_init_conv_in`), else stay as
    initialised. New layers keep their initialisation. Returns {"new": names that the weights lack, "changed": names whose shape
    grew}. Raises ValueError for any other difference, and for a part of which the weights have some names only.
    """
    own, state, changed = unet.state_dict(), dict(state), []
    weight, wider = state.get("conv_in.weight"), own["conv_in.weight"]
    if weight is not None and len(weight) == len(wider) and weight.shape[1] < wider.shape[1]:
        grown = torch.zeros_like(wider) if zero_init_conv_in else wider.clone()
        grown[:, : weight.shape[1]] = weight
        state["conv_in.weight"], changed = grown, ["conv_in.weight"]
    new = sorted(own.keys() - state.keys())
    lacking = {new_kind(name) for name in new} - {new_kind(name) for name in state} - {None}
    faults = {
        "missing": [name for name in new if new_kind(name) not in lacking],
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{k} {tuple(v.shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape],
    }
    if any(faults.values()):
        lines = [f"{len(names)} {what}: {', '.join(names[:8])}" for what, names in faults.items() if names]
        raise ValueError("the weights do not fit the UNet's config:\n  " + "\n  ".join(lines))
    unet.load_state_dict(state, strict=False)
    return {"new": new, "changed": changed}


def load_unet(
    root: str | Path,
    config: dict | None = None,
    overrides: dict | None = None,
    variant: str | None = None,
    training: bool = False,
    zero_init_conv_in: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[UNet, dict]:
    """UNet and its config from a folder (or its unet/ sub-folder). `config` wins over the folder's, `overrides` over both.

    `training`: layers that the file lacks (camera embedding, cross-domain layers) are created, and named through `say`. Otherwise
    a file without any cross-domain layer is run without them, as some releases need, and anything else missing is an error.
    """
    folder = part_folder(root, "unet")
    config = {**(config if config is not None else read_json(folder / "config.json")), **(overrides or {})}
    state = rename_old_unet(read_state(folder, "unet", variant))
    wants_joint = unet_arguments(config)["cd_attention_mid"] or unet_arguments(config)["cd_attention_last"]
    if wants_joint and not training and not any(map(is_joint, state)):
        say(f"WARNING: {folder} holds no cross-domain layers though its config names them: running without")
        config = {**config, "cd_attention_mid": False, "cd_attention_last": False}
    unet = UNet(**unet_arguments(config))
    try:
        report = init_unet(unet, state, zero_init_conv_in)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if not training and (report["new"] or report["changed"]):
        lacks = report["new"] + report["changed"]
        raise ValueError(f"{folder}: the weights lack {len(lacks)} tensors of the config: {', '.join(lacks[:6])}")
    if report["new"] or report["changed"]:
        kinds = {"cross-domain layers": [n for n in report["new"] if is_joint(n)], "input channels": report["changed"]}
        kinds["camera embedding"] = [n for n in report["new"] if not is_joint(n)]
        some = lambda names: ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        what = [f"{len(names)} tensors of {kind} are new ({some(names)})" for kind, names in kinds.items() if names]
        say(f"{folder}: " + ", ".join(what))
    return unet, config


def _load(module: nn.Module, state: dict[str, Tensor], folder: Path) -> nn.Module:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit the config: {error}") from None
    return module.requires_grad_(False).eval()


def load_vae(root: str | Path, variant: str | None = None) -> AutoencoderKL:
    """The frozen autoencoder of a folder (or its vae/ sub-folder), with today's or older names."""
    folder = part_folder(root, "vae")
    vae = AutoencoderKL(**vae_arguments(read_json(folder / "config.json")))
    return _load(vae, rename_old_attention(read_state(folder, "vae", variant)), folder)


def load_clip(root: str | Path, variant: str | None = None) -> CLIPVision:
    """The frozen image encoder of a folder (or its image_encoder/ sub-folder)."""
    folder = part_folder(root, "image_encoder")
    state = read_state(folder, "image_encoder", variant)
    state.pop("vision_model.embeddings.position_ids", None)  # an integer buffer of older files
    return _load(CLIPVision(**clip_arguments(read_json(folder / "config.json"))), state, folder)


def load_diffusion(root: str | Path, **overrides) -> Diffusion:
    """The noise schedule of a folder (or its scheduler/ sub-folder); `overrides` replace entries of its config."""
    config = read_json(part_folder(root, "scheduler") / "scheduler_config.json")
    return Diffusion(**diffusion_arguments({**config, **overrides}))


def save_unet(root: str | Path, unet: UNet, config: dict, state: dict[str, Tensor] | None = None, part: str = "unet") -> Path:
    """Write root/unet (or root/unet_ema): `state` in place of the network's own weights where given."""
    return write_part(root, part, config, unet.state_dict() if state is None else state)


# ---- rows ------------------------------------------------------------------------------------------------------------


def to_rows(per_object: Tensor, domains: int, views: int) -> Tensor:
    """(B,...) -> (domains * B * views,...): the same for every view and domain of an object."""
    return per_object[None, :, None].expand(domains, -1, views, *per_object.shape[1:]).flatten(0, 2)


def target_rows(targets: Tensor) -> Tensor:
    """(B,D,V,...), as the loader gives it -> (D * B * V,...)."""
    return targets.transpose(0, 1).flatten(0, 2)


@torch.no_grad()
def encode_condition(vae: AutoencoderKL, clip: CLIPVision, image: Tensor, pixels: Tensor, scale: bool = True) -> tuple[Tensor, Tensor]:
    """Latent (B,4,h,w) and embedding (B,E), fp32, of input pictures: image (B,3,H,W) in [-1,1], pixels (B,3,S,S) made for CLIP.

    The latent is the posterior's mode; `scale` False leaves it unscaled.
    """
    return vae.encode(image)[0] * (vae.scaling_factor if scale else 1), clip(pixels).float()


@torch.no_grad()
def frozen_work(
    vae: AutoencoderKL, clip: CLIPVision, targets: Tensor, image: Tensor, pixels: Tensor, chunk: int = 0
) -> dict[str, Tensor]:
    """All that the frozen encoders have to say about a batch, fp32: what a cache stores.

    targets (N,3,H,W) and input pictures image (B,3,H,W) in [-1,1], pixels (B,3,S,S) made for CLIP -> mean, std (N,4,h,w),
    condition_mean, condition_std (B,4,h,w), all unscaled, and embedding (B,E). `chunk` bounds the images per pass.
    """
    mean, std = vae.encode(targets, chunk)
    condition_mean, condition_std = vae.encode(image, chunk)
    embedding = clip(pixels).float()
    return {"mean": mean, "std": std, "condition_mean": condition_mean, "condition_std": condition_std, "embedding": embedding}


def predict(
    unet: Callable[..., Tensor], x: Tensor, t: Tensor, latent: Tensor, embedding: Tensor, camera: Tensor, views: int,
    keep_latent: Tensor | None = None, keep_embedding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The UNet's output for the rows x (N,4,h,w) at t (N,), given latent (B,4,h,w) and embedding (B,E) of the input pictures and
    camera (N,10). keep_* (N,) 0/1 drop a condition of a row: it becomes zero."""
    domains = len(x) // (len(latent) * views)
    latent, embedding = to_rows(latent, domains, views), to_rows(embedding, domains, views)
    if keep_latent is not None:
        latent = latent * keep_latent[:, None, None, None]
    if keep_embedding is not None:
        embedding = embedding * keep_embedding[:, None]
    return unet(torch.cat([x, latent], dim=1), t, embedding[:, None], camera)


# ---- sampling --------------------------------------------------------------------------------------------------------


class ObjectNoise:
    """Normal noise of a sampler, drawn per object from its own seed on the CPU: an object's result does not depend on what
    else is in the batch, nor on the device. Call it for the next (D * B * V, 4, h, w)."""

    def __init__(self, seeds: list[int], domains: int, views: int, shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape, self.device = (domains, views, *shape), device

    def __call__(self, *_) -> Tensor:
        return draw_rows(torch.randn, self.generators, *self.shape).to(self.device)


@torch.no_grad()
def sample(
    unet: Callable[..., Tensor],
    diffusion: Diffusion,
    latent: Tensor,
    embedding: Tensor,
    camera: Tensor,
    start: Tensor,
    views: int,
    steps: int = 50,
    guidance: float = 1.0,
    eta: float = 1.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents (N,4,h,w), scaled, fp32, of all views of B objects, by DDIM from `start` (N,4,h,w), normal noise.

    latent (B,4,h,w), embedding (B,E): the input pictures. camera (N,10). `noise(k)` gives the noise of step k, where eta > 0.
    With guidance other than 1 the prediction is extrapolated from one without conditions (arXiv 2207.12598). The unconditional
    rows join the batch as further objects, so that domain halves stay halves, whatever the number of objects.
    """
    objects, copies = len(latent), 1
    domains = len(start) // (objects * views)
    if guidance != 1:
        copies = 2
        latent = torch.cat([torch.zeros_like(latent), latent])
        embedding = torch.cat([torch.zeros_like(embedding), embedding])

    def repeat(rows: Tensor) -> Tensor:  # (D*B*V,...) -> (D*copies*B*V,...)
        split = rows.view(domains, 1, objects * views, *rows.shape[1:])
        return split.expand(-1, copies, *split.shape[2:]).flatten(0, 2)

    x, camera = start.float(), repeat(camera)
    for k, t in enumerate(diffusion.timesteps(steps)):
        rows = repeat(x)
        output = predict(unet, rows, torch.full((len(rows),), t, device=x.device), latent, embedding, camera, views).float()
        output = output.view(domains, copies, objects * views, *output.shape[1:])
        free = output[:, 0]
        output = (free if copies == 1 else free + guidance * (output[:, 1] - free)).flatten(0, 1)
        x = diffusion.step(output, t, x, steps, eta, noise(k) if eta > 0 else None)
    return x


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, chunk: int = 8) -> Tensor:
    """Images (N,3,8h,8w) fp32 in [0,1] of scaled latents (N,4,h,w)."""
    images = vae.decode(latents / vae.scaling_factor, chunk)
    return (images.float() / 2 + 0.5).clamp(0, 1)
