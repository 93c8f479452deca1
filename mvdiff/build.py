"""What a configuration names: its objects, its frozen networks, its noise schedule, the config of its UNet."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import config
from mvdiff.clip import MEAN, STD, CLIPVision
from mvdiff.dataset import MultiViewDataset, NoiseDataset, list_objects, split_objects
from mvdiff.diffusion import Diffusion
from mvdiff.model import diffusion_arguments, load_clip, load_vae
from mvdiff.optim import SCHEDULES
from mvdiff.pictures import background_color
from mvdiff.vae import AutoencoderKL
from mvdiff.weights import part_folder, read_json, write_json, write_part

REFERENCE = Path(__file__).parent / "configs" / "default.yaml"
ALIASES = {
    "train_dir": "train_data_dir",
    "output_dir": "workspace",
    "resume_from_checkpoint": "checkpoint",
    "mixed_precision": "amp",
    "dataloader_num_workers": "workers",
    "checkpointing_steps": "save_every",
    "checkpoints_total_limit": "keep_last",
    "validation_steps": "validate_every",
    "pretrained_model_name_or_path": "init",
    "pretrained_unet_path": "pretrained_weight_path_unet",
    "latent_cache": "latent_cache_dir",
    "center_crop": "crop",
    "p_uncond": "condition_drop_rate",
    "input_pertubation": "input_perturbation",
    "drop_unit": "drop_type",
}
WITHOUT_EFFECT = (
    *("revision", "non_ema_revision", "cache_dir", "pretrained_path_feature_extractor", "logging_dir", "report_to"),
    *("tracker_project_name", "wandb_args", "local_rank", "enable_xformers_memory_efficient_attention", "validation_epochs"),
    *("last_global_step", "hub_token", "hub_model_id", "vis_dir", "validation_grid_nrow", "validation_train_batch_size", "pipe_kwargs"),
    "debug_distributed",
)
REFUSED = {
    "use_8bit_adam": "8-bit Adam needs a package that is not used here; AdamW is fused",
    "push_to_hub": "nothing is uploaded: the finished weights lie in WORKSPACE/pipeline",
}
AT_LEAST = {
    "num_validation_samples": 0, "max_train_samples": 1, "vae_chunk": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1,
    "lr_warmup_steps": 0, "validation_train_samples": 0, "validation_batch_size": 1, "workers": 0, "log_every": 0, "save_every": 0,
    "validate_every": 0, "vis_every": 0, "ema_decay": 0, "max_grad_norm": 0,
}  # fmt: skip
DROP_TYPES = {"object": "drop_as_a_whole", "pair": "drop_joint", "row": "drop_independent"}


def parse(argv: list[str], doc: str) -> config.Config:
    """The configuration of a command line; SystemExit where it asks for what is not done."""
    cfg = config.parse(argv, doc, REFERENCE, aliases=ALIASES)
    for key, why in REFUSED.items():
        if cfg[key]:
            raise SystemExit(f"error: {key}: {why}")
    kwargs = cfg.unet_from_pretrained_kwargs
    if kwargs.zero_init_camera_projection:
        raise SystemExit("error: zero_init_camera_projection: zeros there cost the control of view and domain; leave it false")
    for name in {cfg.camera_embedding_type, kwargs.camera_embedding_type} - {"e_de_da_sincos"}:
        raise SystemExit(f"error: camera_embedding_type {name}: only e_de_da_sincos is known")
    if kwargs.num_views not in (None, cfg.num_views):
        raise SystemExit(f"error: unet_from_pretrained_kwargs.num_views {kwargs.num_views}: num_views is {cfg.num_views}")
    if (kwargs.cd_attention_mid or kwargs.cd_attention_last) and cfg.pred_type != "joint":
        raise SystemExit(f"error: cross-domain attention joins colours and normals: it needs pred_type joint, not {cfg.pred_type}")
    choices = {
        "row_order": ("normal_first", "color_first"),
        "timestep_sharing": ("group", "row", "object"),
        "drop_rule": ("separate", "both"),
        "drop_type": tuple(DROP_TYPES.values()),
        "cond_latent": ("mode", "sample"),
        "pred_type": ("mix", "joint", "color", "normal"),
        "prediction_type": (None, "epsilon", "v_prediction", "sample"),
        "clip_resize": ("pil", "tensor", "tensor_noaa"),
        "snr_rule": ("seed", "paper", "wonder3d"),
        "lr_scheduler": SCHEDULES,
    }
    cfg.drop_type = DROP_TYPES.get(cfg.drop_type, cfg.drop_type)
    cfg.amp = "off" if cfg.amp == "no" else cfg.amp
    cfg.crop = {True: "center", False: "random"}.get(cfg.crop, cfg.crop)
    for key, values in choices.items():
        if cfg[key] not in values:
            raise SystemExit(f"error: {key} '{cfg[key]}' must be one of {', '.join(map(str, values))}")
    cfg.vis_every = cfg.validate_every if cfg.vis_every is None else cfg.vis_every
    for key, least in AT_LEAST.items():
        if cfg[key] is not None and not (isinstance(cfg[key], (int, float)) and cfg[key] >= least):
            raise SystemExit(f"error: {key} {cfg[key]!r} must be a number of at least {least}")
    if cfg.ema_decay > 1:
        raise SystemExit(f"error: ema_decay {cfg.ema_decay} must be between 0 and 1")
    try:
        background_color(cfg.bg_color, np.random.default_rng(0))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if isinstance(cfg.trainable_modules, str):
        cfg.trainable_modules = [name.strip() for name in cfg.trainable_modules.split(",")]
    cfg.validation_eta = (cfg.pipe_validation_kwargs or {}).get("eta", cfg.validation_eta)
    for scale in [cfg.validation_guidance_scale] * (cfg.validation_guidance_scale is not None):
        cfg.validation_guidance_scales = [float(scale)]
    return cfg


def unused(cfg) -> list[str]:
    """Keys that the user has set though they have no effect here."""
    reference = config.read(REFERENCE)
    return [key for key in WITHOUT_EFFECT if cfg[key] != reference[key]]


# ---- objects ---------------------------------------------------------------------------------------------------------


def domains_of(cfg) -> tuple[str, str]:
    """The two domains in the order of a batch's halves."""
    return ("color", "normal") if cfg.row_order == "color_first" else ("normal", "color")


def object_names(cfg) -> tuple[list[str], list[str]]:
    """(objects to train on, objects to validate on; the latter in validation_data_dir where that is set)."""
    names = list_objects(cfg.train_data_dir, cfg.object_list, cfg.invalid_list)
    held_out = 0 if cfg.validation_data_dir else cfg.num_validation_samples
    train = split_objects(names, held_out, num_samples=cfg.max_train_samples)
    if cfg.validation_data_dir:
        return train, list_objects(cfg.validation_data_dir)[: cfg.num_validation_samples or None]
    return train, split_objects(names, held_out, validation=True) if held_out else []


def data_options(cfg, clip_size: int) -> dict:
    """What training and validation data have in common."""
    keys = ("num_views", "resolution", "seed", "condition_view", "read_mask", "subscene_tag", "suffix")
    return {**{key: cfg[key] for key in keys}, "domains": domains_of(cfg), "clip_size": clip_size}


def build_dataset(
    cfg, names: list[str], clip_size: int, kind: type[MultiViewDataset] = MultiViewDataset
) -> MultiViewDataset | NoiseDataset:
    """The training objects, a pure function of (seed, position), read by a dataset of this kind."""
    if cfg.debug:
        if cfg.pred_type != "joint":
            raise ValueError(f"debug makes noise of both domains: it goes with pred_type joint, not {cfg.pred_type}")
        return NoiseDataset(cfg.num_views, cfg.resolution, cfg.seed, clip_size)
    return kind(
        cfg.train_data_dir,
        names,
        bg_color=cfg.bg_color,
        pred_type=cfg.pred_type,
        augment_data=cfg.augment_data,
        crop=cfg.crop,
        random_flip=cfg.random_flip,
        **data_options(cfg, clip_size),
    )


def build_evaluation(cfg, root: str | Path, names: list[str], clip_size: int) -> MultiViewDataset:
    """Objects to sample: on white, from the condition view; both domains unless the network knows one alone."""
    pred_type = cfg.pred_type if cfg.pred_type in ("color", "normal") else "joint"
    crop = "center" if cfg.crop else None
    return MultiViewDataset(root, names, bg_color="white", pred_type=pred_type, crop=crop, **data_options(cfg, clip_size))


def finish_options(cfg) -> dict:
    """Arguments of `dataset.finish`."""
    numbers = cfg.unet_from_pretrained_kwargs.projection_class_embeddings_input_dim
    if numbers not in (6, 10):
        raise ValueError(f"projection_class_embeddings_input_dim {numbers}: 10, or 6 for a network without the domain in its input")
    options = {"clip_resize": cfg.clip_resize, "camera_flags": numbers == 10}
    return options | {"normals_renormalise": cfg.normals_renormalise, "clamp": cfg.normals_clamp}


# ---- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Frozen:
    """What is not trained: autoencoder, image encoder, noise schedule, and their config files."""

    vae: AutoencoderKL
    clip: CLIPVision
    diffusion: Diffusion
    configs: dict[str, dict]

    @property
    def latent_channels(self) -> int:
        return self.vae.post_quant_conv.in_channels

    @property
    def factor(self) -> int:
        """Pixels of an image per pixel of its latent."""
        return 2 ** (len(self.vae.encoder.down_blocks) - 1)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Frozen":
        """Move; encoders take `dtype`. The decoder stays fp32, since it overflows in fp16."""
        self.vae.to(device)
        for module in (self.vae.encoder, self.vae.quant_conv, self.clip.to(device)):
            module.to(dtype or torch.float32)
        self.diffusion.to(device)
        return self


def load_frozen(roots: dict[str, str | None], variant: str | None = None, **schedule) -> Frozen:
    """Read vae, image_encoder and scheduler, each from roots[part] or, where that is null, from roots["init"]."""
    where = {}
    for part in ("vae", "image_encoder", "scheduler"):
        where[part] = roots.get(part) or roots["init"]
        if not where[part]:
            raise ValueError(f"no weights for {part}: give --init FOLDER, with unet/ vae/ image_encoder/ scheduler/ in it")
    folders = {part: part_folder(root, part) for part, root in where.items()}
    configs = {part: read_json(folders[part] / "config.json") for part in ("vae", "image_encoder")}
    configs["scheduler"] = read_json(folders["scheduler"] / "scheduler_config.json")
    configs["scheduler"] |= {key: value for key, value in schedule.items() if value is not None}
    vae, clip = load_vae(where["vae"], variant), load_clip(where["image_encoder"], variant)
    return Frozen(vae, clip, Diffusion(**diffusion_arguments(configs["scheduler"])), configs)


def check_sizes(frozen: Frozen, resolution: int, steps: int) -> None:
    """ValueError where the networks cannot take images of this side, or the schedule cannot be sampled in so many steps."""
    if resolution < 1 or resolution % frozen.factor:
        raise ValueError(f"resolution {resolution} is no multiple of {frozen.factor}, which the autoencoder divides it by")
    frozen.diffusion.timesteps(steps)


def load_frozen_of(cfg) -> Frozen:
    """The frozen networks of a training configuration."""
    roots = {part: cfg[f"pretrained_path_{part}"] for part in ("vae", "image_encoder", "scheduler")}
    return load_frozen({"init": cfg.init, **roots}, cfg.variant, prediction_type=cfg.prediction_type)


def write_frozen(folder: Path, frozen: Frozen) -> None:
    """Write all of a pipeline folder but the UNet: vae/, image_encoder/, scheduler/, feature_extractor/, model_index.json."""
    write_part(folder, "vae", frozen.configs["vae"], frozen.vae.state_dict())
    write_part(folder, "image_encoder", frozen.configs["image_encoder"], frozen.clip.state_dict())
    size = {"shortest_edge": frozen.clip.image_size}
    pixels = {"size": size, "crop_size": {"height": frozen.clip.image_size, "width": frozen.clip.image_size}, "resample": 3}
    flags = {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")}
    preprocessor = {**pixels, **flags, "image_mean": list(MEAN), "image_std": list(STD), "rescale_factor": 1 / 255}
    classes = {"vae": ["diffusers", "AutoencoderKL"], "unet": ["mvdiffusion", "UNetMV2DConditionModel"]}
    classes |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "scheduler": ["diffusers", "DDIMScheduler"]}
    classes["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index = {"_class_name": "MVDiffusionImagePipeline", "_diffusers_version": "0.19.3", **classes}
    schedule = {**frozen.configs["scheduler"], "_class_name": "DDIMScheduler"}
    extractor = {**preprocessor, "image_processor_type": "CLIPImageProcessor"}
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    write_json(folder / "feature_extractor" / "preprocessor_config.json", extractor)
    write_json(folder / "model_index.json", index)


def unet_changes(cfg, latent_channels: int) -> dict:
    """What the configuration changes in the UNet's config: views, attentions, camera numbers, channels for the input picture."""
    kwargs = cfg.unet_from_pretrained_kwargs
    keys = ("projection_class_embeddings_input_dim", "cd_attention_mid", "cd_attention_last")
    changes = {key: kwargs[key] for key in (*keys, "multiview_attention", "sparse_mv_attention")}
    channels = {"in_channels": 2 * latent_channels, "out_channels": latent_channels, "class_embed_type": "projection"}
    return {**changes, **channels, "num_views": cfg.num_views}


def unet_config(cfg, latent_channels: int) -> dict:
    """The UNet's config: of `pretrained_config_path_unet`, else of the weights folder, with the configuration's changes."""
    path = cfg.pretrained_config_path_unet
    if path and Path(path).is_file():
        stored = read_json(path)
    else:
        root = path or cfg.pretrained_weight_path_unet or cfg.init
        if not root:
            raise ValueError("no weights for unet: give --init FOLDER, with unet/ vae/ image_encoder/ scheduler/ in it")
        stored = read_json(part_folder(root, "unet") / "config.json")
    return {**stored, **unet_changes(cfg, latent_channels)}
