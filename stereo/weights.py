"""Published weights: reading their layouts, choosing the model they belong to, loading them by name.

Files are dicts with the weights under `model` (beside optimizer state), under `state_dict`, or bare, perhaps with a common
prefix `module.`. Read them with torch.load(..., weights_only=True).
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

VIT_SIZES = {384: "vits", 768: "vitb", 1024: "vitl"}
PATCH_KERNEL = "feature.dino.depth_anything.pretrained.patch_embed.proj.weight"
LOOKUP_KERNEL = "update_block.encoder.convc1.weight"
OPTIONS = ("vit_size", "max_disp", "corr_levels", "corr_radius", "hidden_dims", "n_gru_layers", "volume_dim", "low_memory")
OPTIONS += ("legacy_head_attention",)
NO_EFFECT = ("feature_type", "correlation_implementation", "feature_channels", "test_mode", "slow_fast_gru")


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the common prefix `module.`."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    state = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if not state:
        raise ValueError(f"no weights in the checkpoint: it holds {sorted(map(str, checkpoint))[:10]}")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def model_options(config: Mapping, state: Mapping[str, Tensor] | None = None) -> tuple[dict, list[str]]:
    """Constructor arguments of FoundationStereo from a published `cfg.yaml` or a config's model section, and notes to print.

    Other keys are ignored; those that look as if they mattered get a note. `state`: weights that will be loaded; they decide
    `vit_size`, and a lookup that does not fit them is an error.
    """
    notes = [f"model.{key} has no effect" for key in NO_EFFECT if key in config]
    options = {key: config[key] for key in OPTIONS if key in config}
    if config.get("n_downsample", 2) != 2:
        raise ValueError(f"n_downsample {config['n_downsample']}: the network works at a quarter of the size, only 2 is possible")
    if state is None:
        return options, notes
    options["vit_size"] = VIT_SIZES[state[PATCH_KERNEL].shape[0]] if PATCH_KERNEL in state else None
    if config.get("vit_size", options["vit_size"]) != options["vit_size"]:
        notes.append(f"model.vit_size {config['vit_size']} gives way to the checkpoint's {options['vit_size']}")
    levels, radius = options.get("corr_levels", 2), options.get("corr_radius", 4)
    per_level = (2 * radius + 1) * (options.get("volume_dim", 28) + 1)
    stored, wanted = state[LOOKUP_KERNEL].shape[1], levels * per_level
    if stored != wanted:
        fitting = stored / per_level
        hint = f"checkpoint has corr_levels={fitting:.0f}" if fitting.is_integer() else f"checkpoint has {stored} lookup channels"
        raise ValueError(f"corr_levels={levels}, corr_radius={radius} give {wanted} lookup channels: {hint}")
    return options, notes


def load_by_name(module: nn.Module, state: Mapping[str, Tensor], ignore: str = "", strict: bool = True) -> tuple[list, list]:
    """Load `state` into `module`; returns (missing, unexpected) names.

    ignore: pattern of names in `state` that are dropped. Shapes must agree; if `strict` names must, too: RuntimeError
    listing everything that does not fit.
    """
    own = module.state_dict()
    state = {k: v for k, v in state.items() if not (ignore and re.match(ignore, k))}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differ = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in differ]
    if shapes or (strict and (missing or unexpected)):
        raise RuntimeError(
            f"weights do not fit the model: missing {missing}, unexpected {unexpected}, other shapes {shapes}"
        )
    module.load_state_dict(state, strict=False)
    return missing, unexpected


def load_stereo(model: nn.Module, checkpoint: Mapping, strict: bool = True) -> tuple[list, list]:
    """Load a FoundationStereo checkpoint, published or ours."""
    return load_by_name(model, unwrap(checkpoint), strict=strict)


def load_depth_anything(model: nn.Module, checkpoint: Mapping) -> None:
    """Load `depth_anything_v2_{vits,vitb,vitl}.pth` (names pretrained.*, depth_head.*) into the monocular branch."""
    load_by_name(model.feature.dino.depth_anything, unwrap(checkpoint))


def load_edgenext(model: nn.Module, checkpoint: Mapping) -> None:
    """Load the ImageNet weights "edgenext_small.usi_in1k" (names stem.*, stages.*, head.*) into the convolutional pyramid."""
    pyramid = nn.ModuleDict({"stem": model.feature.stem, "stages": model.feature.stages})
    load_by_name(pyramid, unwrap(checkpoint), ignore=r"head\.")
