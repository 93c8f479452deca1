"""Every command of mvdiff/README.md, in small form."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from runs import ROOT, generated, readme_commands, run, run_small

from common.config import read

TRAIN = {
    "resolution": 32, "num_validation_samples": 1, "max_train_samples": 4, "validation_train_samples": 0, "train_batch_size": 1,
    "gradient_accumulation_steps": 1, "max_steps": 1, "workers": 0, "amp": "off", "validation_steps_ddim": 1,
    "validation_guidance_scales": "[1.0]", "gradient_checkpointing": "false", "num_views": 2,
}  # fmt: skip
SMALL = [f"--{key}={value}" for key, value in TRAIN.items()]
LOOK = ["--steps", 1, "--resolution", 32]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the README's commands name, small: objects, weights, pictures, a mesh."""
    here = tmp_path_factory.mktemp("readme")
    renders = generated(tmp_path_factory, "mvdiff", "--scenes", "5", "--size", "32x32")
    shutil.copytree(renders, here / "data")
    shutil.copytree(ROOT / "mvdiff" / "tiny", here / "tiny")
    start = ["mvdiff/train.py", "--config", "mvdiff/configs/tiny.yaml", *SMALL, "--train_data_dir", here / "data"]
    run(*start, "--unet_from_pretrained_kwargs.cd_attention_mid=false", "--pred_type=mix", "--workspace", here / "one")
    shutil.copytree(here / "one" / "pipeline", here / "weights")  # stands for image-variation weights
    (here / "pictures").mkdir()
    shutil.copy(renders / "000" / "00001" / "rgb_000_front.png", here / "pictures" / "owl.png")
    Image.new("RGB", (4, 4), (200, 40, 40)).save(here / "red.png")
    (here / "spot.mtl").write_text("newmtl a\nmap_Kd red.png\n")
    corners = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
    faces = "f 1/1 3/3 2/2\nf 1/1 2/2 4/3\nf 1/1 4/3 3/2\nf 2/1 3/2 4/3\n"
    for name in ("spot", "avocado"):
        (here / f"{name}.obj").write_text(f"mtllib spot.mtl\n{corners}usemtl a\n{faces}")
    return here


def small_form(text: str, place: Path, number: int) -> tuple[str, list]:
    """The command with this test's paths, and what makes it small."""
    paths = {
        "weights/sd-image-variations": "weights", "workspace/mvdiff_tiny_": "run_tiny_", "workspace/mvdiff_tiny": "run_tiny",
        "workspace/mvdiff_joint": "run_joint", "data/tiny/mvdiff/000": "data/000", "data/tiny/mvdiff": "data",
        "data/mvdiff_packed": "packed", "data/mvdiff": "data", "data/latents": "latents", "data/meshes": "meshes",
        "--image owl.png": "--image pictures/owl.png", "--out views": f"--out views{number}", "00020000.pt": "00000001.pt",
    }  # fmt: skip
    for old, new in paths.items():
        text = text.replace(old, new)
    words = []
    for word in text.split():
        word = word if word != "pictures" else str(place / "pictures")
        heads = ("weights", "run_joint", "data", "packed", "latents", "meshes", "pictures")
        local = word.split("/")[0] in heads or word.startswith("run_tiny")
        own = word in (f"views{number}", "check.png", "spot.obj", "avocado.obj", "objects.csv", "scores.json")
        words.append(str(place / word) if local or own else word)
    if "-m synth" in text:
        return " ".join(words).replace(str(place / "data"), str(place / f"made{number}")), ["--size", "32x32", "--scenes", "1"]
    if "train.py" in text or "--cache" in text:
        extra = list(SMALL)
        if "joint.yaml" in text:
            extra += ["--init", place / "one" / "pipeline", "--workspace", place / "run_joint"]
        elif "--workspace" not in text and "tiny.yaml" in text:
            extra += ["--workspace", place / "run_tiny"]
        elif "--workspace" not in text:
            extra += ["--workspace", place / f"run{number}"]
        if "--config mvdiff/configs/tiny.yaml" in text:
            extra += ["--train_data_dir", place / "data"]
        return " ".join(words), extra
    if "eval.py" in text:
        return " ".join(words), [*LOOK, "--limit", 1, "--num_validation_samples", 2, "--picture_dir", place]
    return " ".join(words), LOOK if "infer.py" in text else ["--resolution", 32]


@pytest.mark.slow
def test_every_command_runs(place):
    commands = readme_commands(ROOT / "mvdiff" / "README.md")
    assert len(commands) >= 18
    for number, text in enumerate(commands):
        run_small(*small_form(text, place, number))
    assert (place / "check.png").exists() and (place / "packed" / "pack.json").exists() and list(place.glob("latents/*/*.npz"))
    assert json.loads((place / "scores.json").read_text()) and (place / "meshes" / "spo" / "spot_000").is_dir()
    assert len(list(place.glob("views*/*/normals_000_*.png"))) >= 6


def test_help_lists_every_key():
    text = run("mvdiff/train.py", "--help")
    for key in read(ROOT / "mvdiff" / "configs" / "default.yaml"):
        assert f"\n{key}: " in text or f"\n{key}:\n" in text or f"\n{key}:  " in text, key


def test_messages_quoted_in_the_readme_are_ours():
    sources = "".join(p.read_text() for folder in ("mvdiff", "common") for p in (ROOT / folder).glob("*.py"))
    table = (ROOT / "mvdiff" / "README.md").read_text().split("## Troubleshooting")[1]
    quoted = [word for line in table.splitlines() if line.startswith("| `") for word in line.split("|")[1].split("`")[1::2]]
    assert len(quoted) >= 14
    for words in quoted:
        for part in words.replace("max_bad_fraction is 0.01", "").replace("000_front.png", "{group}_front.png").split(" ... "):
            pieces = [piece.strip() for piece in part.replace("no weights for vae", "no weights for ").split(", ") if piece.strip()]
            assert all(piece.replace("000", "{group}") in sources or piece in sources for piece in pieces), part
