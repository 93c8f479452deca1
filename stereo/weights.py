"""Published weights: choosing the model they belong to, and loading those of its branches. common.checkpoint reads the files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import apply_weights
from common.config import read

VIT_SIZES = {384: "vits", 768: "vitb", 1024: "vitl"}
PATCH_KERNEL = "feature.dino.depth_anything.pretrained.patch_embed.proj.weight"
LOOKUP_KERNEL = "update_block.encoder.convc1.weight"
OPTIONS = ("vit_size", "max_disp", "corr_levels", "corr_radius", "hidden_dims", "n_gru_layers", "volume_dim", "low_memory")
OPTIONS += ("legacy_head_attention",)
NO_EFFECT = ("feature_type", "correlation_implementation", "feature_channels", "test_mode", "slow_fast_gru")


def stored_config(path) -> dict:
    """The model section in one of our checkpoints; of another file the `cfg.yaml` beside it; {} where there is neither."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # the tensors are not read
        if section := content.get("model_config"):
            return section
    except Exception:  # a form that `load_weights` knows, and that is none of ours
        pass
    beside = Path(path).parent / "cfg.yaml"
    return read(beside) if beside.is_file() else {}


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
    if LOOKUP_KERNEL not in state:
        remedy = "Depth Anything's weights go to vit_checkpoint, EdgeNeXt's to cnn_checkpoint"
        raise ValueError(f"not a FoundationStereo checkpoint, it lacks {LOOKUP_KERNEL}; {remedy}")
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


def load_depth_anything(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `depth_anything_v2_{vits,vitb,vitl}.pth` (names pretrained.*, depth_head.*) into the monocular branch."""
    apply_weights(model.feature.dino.depth_anything, state)


def load_edgenext(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the ImageNet weights "edgenext_small.usi_in1k" (names stem.*, stages.*, head.*) into the convolutional pyramid."""
    pyramid = nn.ModuleDict({"stem": model.feature.stem, "stages": model.feature.stages})
    apply_weights(pyramid, {name: value for name, value in state.items() if not name.startswith("head.")})
