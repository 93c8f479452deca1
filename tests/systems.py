"""The five trainers in their tiniest form: the data, the command line, and what each calls the things that a drill turns.

A run of 6 steps of 2 samples a step takes a few CPU seconds. Options come in a dictionary of dotted keys, so that a drill can
put its own over them.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import runs

EVERY = {"log_every": 1, "workers": 1, "vis_every": 1000, "keep_last": 99, "save_every": 2, "max_steps": 6, "max_bad_fraction": 1.0}


@dataclass(frozen=True)
class System:
    """name.synth: options of the generator. data: keys that hold paths below the generated folder.

    options: the tiny network and recipe. validate: what switches validation on, after every second step. one, two: 2 samples a
    step on one rank and on two. samples: glob of what one training sample is made from; images: glob of the training pictures.
    rate, wider: overrides that change the learning rate, and the architecture. init: key for weights to start from.
    """

    name: str
    synth: dict
    data: dict
    options: dict
    validate: dict
    samples: str
    images: str
    rate: dict
    wider: dict
    init: str
    one: dict
    two: dict = field(default_factory=dict)
    ema: bool = False
    tolerance: float = 1e-3  # of the losses between one rank and two: batch norms take their statistics per rank

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a checkpoint."""
        return ("", "optimizer", "ema") if self.ema else ("", "optimizer")

    def words(self, data: Path, workspace: Path, *overrides: dict) -> list[str]:
        """The command line after `python` or `torchrun`, on the data generated in `data`; later overrides win."""
        options = {**EVERY, **self.options, **{key: f"{data}/{path}" for key, path in self.data.items()}, "workspace": workspace}
        for override in overrides:
            options |= override
        options = {key: value.replace("{data}", str(data)) if isinstance(value, str) else value for key, value in options.items()}
        return [f"{self.name}/train.py", "--config", f"{self.name}/configs/tiny.yaml", *(f"{k}={v}" for k, v in options.items())]

    def generate(self, folder: Path) -> Path:
        """Write the tiny data set, unless it is there."""
        if not (folder / "done").exists():
            runs.run("-m", "synth", self.name, folder, *(f"--{key}={value}" for key, value in self.synth.items()))
            (folder / "done").touch()
        return folder

    def pruned(self, data: Path, folder: Path, keep: int) -> Path:
        """A copy of a generated data set with `keep` training samples: some are left out, or copied under new names."""
        shutil.copytree(data, folder)
        samples = sorted(folder.glob(self.samples))
        for sample in samples[keep:]:
            remove(sample)
        for index in (folder / ".index.txt", folder / ".train.txt"):
            if index.exists():
                index.write_text("".join(f"{line}\n" for line in index.read_text().split() if (folder / line).is_dir()))
        for number in range(len(samples), keep):  # folders, whose content may bear their name too
            name = f"{samples[0].name[:-2]}{50 + number}"
            shutil.copytree(samples[0], folder / name)
            for inner in (folder / name).glob(f"{samples[0].name}*"):
                inner.rename(inner.with_name(inner.name.replace(samples[0].name, name)))
        return folder


def remove(sample: Path) -> None:
    """Delete a sample that is a folder, or all files of its name."""
    if sample.is_dir():
        shutil.rmtree(sample)
    else:
        for file in [file for file in sample.parents[2].rglob(f"{sample.stem}.*") if file.is_file()]:
            file.unlink()


MOGE = {"encoder": "dinov2_vits14", "encoder_options": {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 56}, "dim_proj": 32,
        "intermediate_layers": 2, "dim_upsample": [32], "remap_output": "exp", "num_tokens_range": [12, 12]}  # fmt: skip
SYSTEMS = {
    "lbm": System(
        "lbm",
        synth={"scenes": 7, "size": "64x64", "frames": 3, "points": 48, "val_scenes": 1, "val_frames": 4, "val_points": 8},
        data={"movi_f_root": "movi_f"},
        options={"T": 2, "N": 8, "input_size": "[64,64]", "memory_size": 2, "eval_memory_size": 2, "min_points": 4,
                 "top_k_regions": 2, "num_neighbors": 2, "dropout": 0.1, "random_memory_mask_drop": 0.1, "tapvid_root": "null"},
        validate={"tapvid_root": "{data}/tapvid_davis.pkl", "validate_every": 2},
        samples="movi_f/*",
        images="movi_f/*/frames/*.png",
        rate={"lr": 0.0002},
        wider={"num_layers": 3},
        init="init",
        one={"bs": 2},
        two={"bs": 1},
        tolerance=0.2,
    ),
    "stereo": System(
        "stereo",
        synth={"scenes": 7, "val_scenes": 1, "size": "64x96"},
        data={"data.datasets.0.path": "train"},
        options={"model.max_disp": 32, "model.hidden_dims": "[16,16,16]", "train_iters": 1, "valid_iters": 1, "vis_every": 0,
                 "data.image_sizes": "[[64,64]]", "batch_size_forward": 1, "data.val_datasets": "[]"},
        validate={"data.val_datasets": "[{name: val, path: {data}/val}]", "validate_every": 2},
        samples="train/left/rgb/*.jpg",
        images="train/left/rgb/*.jpg",
        rate={"optimizer.params.0.lr": 0.0002},
        wider={"model.hidden_dims": "[32,32,32]"},
        init="init",
        one={"gradient_accumulation_steps": 2},
        two={"gradient_accumulation_steps": 1},
        ema=True,
        tolerance=0.1,
    ),
    "pi3": System(
        "pi3",
        synth={"scenes": 3, "val_scenes": 1, "frames": 2},
        data={"data.tartanair.root": ".", "data.tartanair.test_root": "val"},
        options={"model.enc_dim": 48, "model.enc_depth": 1, "model.enc_heads": 3, "model.dec_dim": 48, "model.dec_depth": 2,
                 "model.dec_heads": 3, "model.head_dim": 48, "model.head_depth": 1, "model.head_heads": 3, "model.point_out": 32,
                 "model.camera_dim": 32, "model.pos_img_size": 28, "train.resolution": "[42,28]", "train.image_num_range": "[2,2]",
                 "train.max_img_per_gpu": 2, "test_dataset.samples.tartanair": 0, "test_dataset.image_num": 2},
        validate={"test_dataset.samples.tartanair": 1, "validate_every": 2},
        samples="scene*",
        images="scene*/scene*/Easy/P000/image_left/*.png",
        rate={"train.optimizer.lr": 0.0002},
        wider={"model.enc_depth": 2},
        init="model.ckpt",
        one={"train.gradient_accumulation_steps": 2},
        two={"train.gradient_accumulation_steps": 1},
    ),
    "moge": System(
        "moge",
        synth={"scenes": 7, "val_scenes": 1, "size": "48x64"},
        data={"data.datasets.0.path": "."},
        options={"model": json.dumps(MOGE), "data.image_sizes": "[[56,42]]", "batch_size_forward": 1, "vis_every": 0,
                 "data.val_datasets": "[]"},
        validate={"data.val_datasets": "[{name: val, path: {data}, split: .val.txt, width: 56, height: 42}]", "validate_every": 2},
        samples="train/*",
        images="train/*/image.jpg",
        rate={"optimizer.params.0.lr": 0.0002},
        wider={"model": json.dumps(MOGE | {"dim_proj": 48})},
        init="init",
        one={"gradient_accumulation_steps": 2},
        two={"gradient_accumulation_steps": 1},
        ema=True,
    ),
    "mvdiff": System(
        "mvdiff",
        synth={"scenes": 7, "size": "32x32"},
        data={"train_data_dir": "."},
        options={"resolution": 32, "num_views": 4, "num_validation_samples": 0, "validation_train_samples": 0, "train_batch_size": 1,
                 "lr_warmup_steps": 1, "validation_steps_ddim": 2, "validation_guidance_scales": "[2.0]"},
        validate={"num_validation_samples": 1, "validate_every": 2},
        samples="000/*",
        images="000/*/rgb_000_*.png",
        rate={"learning_rate": 0.0002},
        wider={"unet_from_pretrained_kwargs.cd_attention_mid": "false"},
        init="",  # a folder of weights: tests/test_mvdiff_model.py
        one={"gradient_accumulation_steps": 2},
        two={"gradient_accumulation_steps": 1},
        ema=True,
    ),
}  # fmt: skip
NAMES = tuple(os.environ.get("SYSTEMS", " ".join(SYSTEMS)).split())
