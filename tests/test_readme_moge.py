"""Every command of moge/README.md, in small form, one after the other."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from runs import ROOT, generated, readme_commands, run, run_small

from common.io import read_image, write_image

NET = {
    "encoder": "dinov2_vits14",
    "encoder_options": {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 56},
    "intermediate_layers": 2,
    "dim_proj": 32,
    "dim_upsample": [32],
    "remap_output": "exp",
    "num_tokens_range": [12, 20],
}
SMALL = (
    "--data.image_sizes [[56,42]] --batch_size_forward 1 --gradient_accumulation_steps 1 --max_steps 1 --workers 0 --vis_every 0 "
    "--data.val_datasets []"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the README's commands name, small: data, an RGB-D folder, photos, a panorama, weights."""
    images, here = (
        generated(tmp_path_factory, "moge", "--scenes", "6", "--val_scenes", "2", "--size", "64x80"),
        tmp_path_factory.mktemp("moge"),
    )
    shutil.copytree(images, here / "my_set")
    (here / "photos").mkdir()
    shutil.copy(images / "val" / "0000" / "image.jpg", here / "photos" / "a.jpg")
    write_image(here / "panorama.jpg", np.tile(read_image(images / "val/0001/image.jpg"), (1, 2, 1))[:, :128])
    for name in ("color", "depth"):
        (here / "my_rgbd" / name).mkdir(parents=True)
    shutil.copy(images / "val" / "0000" / "image.jpg", here / "my_rgbd" / "color" / "000.jpg")
    cv2.imwrite(str(here / "my_rgbd" / "depth" / "000.png"), np.full((64, 80), 1500, np.uint16))
    np.savetxt(here / "my_rgbd" / "intrinsics.txt", [[70, 0, 39.5], [0, 70, 31.5], [0, 0, 1]])
    return here


def adapt(text: str, place) -> tuple[str, list]:
    """A command on small data with a small network, and its further arguments."""
    text = text.replace("--backbone_weights dinov2_vitl14_pretrain.pth", "--allow_random_backbone true")
    if "moge/train.py" not in text:
        extra = {"-m synth": ["--scenes", "2", "--val_scenes", "1", "--size", "32x40"], "eval.py": ["--limit", "1"]}
        if "--panorama" in text or "infer.py" in text:
            extra["infer.py"] = ["--num_tokens", "12"]
        if "--config" in text:
            text = text.replace("moge/configs/eval.json", str(place / "eval.json"))
        return text, next((words for part, words in extra.items() if part in text), [])
    entry = {"path": str(place / "my_set"), "label_type": "synthetic"}
    net = NET if "v2.json" not in text else None
    extra = SMALL.split() + ["--data.datasets", json.dumps([entry])]
    if net:
        extra += ["--model", json.dumps(net)]
    else:  # the published network of version 2 on the smallest encoder
        options = json.dumps(NET["encoder_options"])
        extra += [
            "--model.encoder.backbone",
            "dinov2_vits14",
            "--model.encoder.encoder_options",
            options,
            "--model.scale_head.dims",
            "[48,16,1]",
        ]
        extra += ["--model.encoder.intermediate_layers", "[0,1]", "--model.num_tokens_range", "[12,12]", "--enable_ema", "false"]
        extra += ["--loss.synthetic.patch_64.params.num_patches", "64"]
    return text, extra


@pytest.mark.slow
def test_every_command_runs(place):
    """In the README's order: what a command needs, an earlier one has made."""
    images, names = (
        str(place / "my_set"),
        ["my_rgbd", "check.png", "look", "images.csv", "results.json", "photos", "panorama.jpg", "geometry"],
    )
    (place / "eval.json").write_text(json.dumps({"mine": {"path": images, "split": ".val.txt", "width": 56, "height": 42}}))
    commands = readme_commands(ROOT / "moge" / "README.md")
    assert len(commands) >= 14
    for text in commands:
        small, extra = adapt(text, place)
        paths = {
            "data/my_set": images,
            "data/my_rgbd -o " + images: f"{place}/my_rgbd -o {place}/converted",
            "data/tiny/moge": place / "tiny",
        }
        paths |= {"workspace/": f"{place}/workspace/"}
        paths |= {f" {name}": f" {place}/{name}" for name in names} | {" model.pt": f" {place}/model.pt"}
        if "-m synth" not in text and "tiny.yaml" not in text:
            paths["data/tiny/moge"] = images
        if "tiny.yaml" in text:
            extra += ["--workspace", place / "workspace" / "moge_tiny"]
        run_small(small, extra, paths)
        if "tiny.yaml" in text:  # stands for the published weights from here on
            shutil.copy(place / "workspace/moge_tiny/checkpoint/00000001.pt", place / "model.pt")
    assert (place / "workspace/debug/checkpoint/00000001_ema.pt").exists() and (place / "workspace/finetune/checkpoint/latest.pt").exists()
    assert set(torch.load(place / "workspace/v2/checkpoint/00000001.pt", weights_only=True)) >= {"model", "model_config"}
    assert (place / "images.csv").exists() and "protocol" in json.loads((place / "results.json").read_text())
    assert (place / "geometry/a/pointcloud.ply").exists() and (place / "geometry/panorama/distance.npy").exists()
    assert (place / "check.png").exists() and list((place / "look").rglob("pointcloud.ply")) and (place / "converted/.index.txt").exists()


def test_help_lists_every_key():
    from common.config import read

    text = run("moge/train.py", "--help")
    reference = read(ROOT / "moge" / "configs" / "default.yaml")
    for key in [*reference, *(f"  {name}" for name in reference.data)]:
        assert f"\n{key}:" in text, key


def test_messages_quoted_in_the_readme_are_ours():
    table = (ROOT / "moge" / "README.md").read_text().split("## Troubleshooting")[1]
    sources = "".join(path.read_text() for folder in ("moge", "common") for path in (ROOT / folder).glob("*.py"))
    quoted = """would start from random weights; is not in the loss table; unknown function; no such index; no depth map there
        intrinsics are not normalised; no key 'intrinsics'; leaves its root; does not fit this model; this model section describes MoGe
        are in no optimizer group; bad sample replaced; were unreadable; steps in a row had a non-finite loss or gradient
        is in use by another run; five views in a row show no depth; takes no params; and the model gives; has no parameters"""
    for words in (words.strip() for line in quoted.split("\n") for words in line.split(";")):
        assert words in table and words in sources, words
