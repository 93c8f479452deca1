"""Every command of pi3/README.md, in small form, in the order of the README: the three stages start from one another."""

import re
import shlex
import shutil

import cv2
import pytest
from runs import ROOT, generated, readme_commands, run
from test_pi3_data import write_co3d, write_folder, write_scannet
from test_pi3_train import NET, run_here

SMALL = (*NET, "train.max_img_per_gpu=4", "train.image_num_range=[2,3]", "test_dataset.image_num=2", "max_steps=1", "workers=0",
         "log_every=1", "train.iters_per_epoch=4")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything the README's commands name, small."""
    here = tmp_path_factory.mktemp("readme")
    shutil.copytree(generated(tmp_path_factory, "pi3", "--scenes", "2", "--val_scenes", "1", "--frames", "3"), here / "tartanair")
    write_scannet(here / "scannet")
    write_co3d(here / "co3d")
    shutil.copy(here / "co3d" / "apple_train.jgz", here / "co3d" / "apple_test.jgz")
    write_folder(here / "my_sequences" / "one")
    shutil.copytree(here / "tartanair" / "scene000" / "scene000" / "Easy" / "P000" / "image_left", here / "photos")
    writer = cv2.VideoWriter(str(here / "walk.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (96, 64))
    for i in range(25):
        writer.write(cv2.resize(cv2.imread(str(here / "photos" / f"{i % 3:06d}_left.png")), (96, 64)))
    writer.release()
    from pi3.segformer import SegFormer
    import torch

    torch.save({"state_dict": SegFormer().state_dict()}, here / "segformer.pth")
    return here


def test_every_command_runs(place, monkeypatch):
    named = ("check.png", "my_sequences", "photos", "walk.mp4", "per_sequence.csv", "pi3.safetensors")
    paths = {f"data/{name}": place / name for name in ("tartanair", "scannet", "co3d")} | {name: place / name for name in named}
    paths |= dict.fromkeys(("data/tiny/pi3", "data/pi3_96"), place / "tartanair") | {"model.safetensors": "outputs/pi3_conf"}
    paths |= {f"workspace/{name}": f"outputs/{name}" for name in ("pi3_tiny", "pi3_96", "pi3_overfit")}
    paths |= {"--pictures pictures": f"--pictures {place}/pictures"}
    paths |= {"outputs/": f"{place}/outputs/", "--save_path scene": f"--save_path {place}/scene"}
    monkeypatch.chdir(ROOT)
    names = iter(["pi3_tiny", "pi3_lowres", "pi3_highres", "pi3_conf", "pi3_two_nodes", "pi3_96", "pi3_overfit"])
    commands = readme_commands(ROOT / "pi3" / "README.md")
    kinds = {"synth": 0, "train.py": 0, "eval.py": 0, "infer.py": 0, "dataset.py": 0, "weights.py": 0}
    for text in commands:
        kind = next(kind for kind in kinds if kind in text)
        kinds[kind] += 1
        if kind == "synth":  # the data above was made by it
            continue
        for old, new in paths.items():
            text = text.replace(old, str(new))
        words = shlex.split(text)
        words, extra = words[words.index(next(word for word in words if word.endswith(".py"))) :], []
        if kind == "train.py":
            name = next(names)
            extra = [*SMALL, f"workspace={place / 'outputs' / name}", f"sky.ckpt={place / 'segformer.pth'}"]
            if "lowres" in text or "tiny" in text:
                extra += ["train.resolution=[56,42]", "model.load_vggt=false"]
            elif "overfit" in text:
                extra += ["train.resolution=[56,42]", "test_dataset.samples.folder=1"]
            else:
                extra += ["train.pixel_count_range=[1500,3200]", "test_dataset.resolution=[56,42]"]
            if "tiny" in text:
                extra += [f"data.tartanair.root={place / 'tartanair'}", f"data.tartanair.test_root={place / 'tartanair' / 'val'}"]
                extra += ["test_dataset.samples.tartanair=2"]
            elif "overfit" not in text:
                extra += ["test_dataset.samples.scannet=1", "test_dataset.samples.co3d=1"]
        elif kind == "eval.py":
            extra = ["--width", "56", "--max_points", "500", "--min_frames", "2"]
        elif kind == "infer.py":
            extra = ["--pixel_limit", "3000"] + (["--chunk", "2", "--overlap", "1"] if "--chunk" in text else [])
        run_here(words[0], *words[1:], *extra)
    assert kinds["train.py"] == 7 and kinds["eval.py"] >= 6 and kinds["infer.py"] >= 3 and kinds["synth"] >= 1 and kinds["dataset.py"] >= 1
    for file in re.findall(r"\]\((docs/\S+)\)", (ROOT / "pi3" / "README.md").read_text()):
        assert (ROOT / "pi3" / file).exists(), file
    made = ("check.png", "per_sequence.csv", "pi3.safetensors", "scene/points.ply", "scene/cameras.npz", "pictures/one_map.png")
    for file in (*made, "outputs/pi3_conf/checkpoint/00000001.pt"):
        assert (place / file).exists(), file


def test_help_lists_every_key():
    text = run("pi3/train.py", "--help")
    from common.config import _flatten, read

    for key in _flatten(read(ROOT / "pi3" / "configs" / "default.yaml")):
        assert f"{key.split('.')[-1]}:" in text, key


def test_messages_quoted_in_the_readme_are_ours():
    sources = "".join(p.read_text() for folder in ("pi3", "common") for p in (ROOT / folder).glob("*.py"))
    quoted = """bad sample replaced|did you mean|trying the checkpoint before it|is in use by another run|is not there: get VGGT from
        steps in a row had a non-finite loss or gradient|the sky model of stage conf is not there|the weights do not fit the model: missing
        stage conf trains the confidence branch of a trained network|a sample has at least|is not set: give the folder of this data set"""
    for words in (part.strip() for line in quoted.splitlines() for part in line.split("|")):
        assert words in (ROOT / "pi3" / "README.md").read_text() and words in sources, words
