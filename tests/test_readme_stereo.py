"""Every command of stereo/README.md, in small form, one after the other; and what eval.py and infer.py write."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from runs import ROOT, generated, readme_commands, run, run_small

from common.io import write_image
from stereo.codec import decode_pfm, encode_pfm
from stereo.formats import list_pairs, read_disparity, read_views

NET = "--model.vit_size null --model.max_disp 32 --model.hidden_dims [16,16,16] --model.volume_dim 8 --model.n_gru_layers 2"
SMALL = f"""{NET} --data.image_sizes [[64,64]] --gradient_accumulation_steps 1 --train_iters 2 --valid_iters 2 --max_steps 1
    --workers 0 --batch_size_forward 1 --data.val_datasets [] --vis_every 0""".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the README's commands name, small: data, weights, a pair, a calibration."""
    pairs, here = (
        generated(tmp_path_factory, "stereo", "--scenes", "4", "--val_scenes", "2", "--size", "96x128"),
        tmp_path_factory.mktemp("stereo"),
    )
    shutil.copytree(pairs / "val", here / "fsd")
    for number, pair in enumerate(list_pairs(pairs / "val")):  # the same pairs in Middlebury's form
        folder = here / "middlebury" / ("teddy", "cones")[number]
        truth = read_disparity(pair.disparity, pair.codec)
        for name, image in zip(("im0.png", "im1.png"), read_views(pair)):
            write_image(folder / name, image)
        (folder / "disp0.pfm").write_bytes(encode_pfm(np.where(truth > 0, truth, np.inf)))
        write_image(folder / "mask0nocc.png", np.where(truth > 3, 255, 128).astype(np.uint8))
    for side in ("left", "right"):
        shutil.copy(pairs / "val" / side / "rgb" / "0000.jpg", here / f"{side}.png")
    yaml = (ROOT / "stereo" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (here / "my_data.yaml").write_text(yaml.replace("data/", f"{here}/"))
    (here / "K.txt").write_text("100 0 63.5 0 100 47.5 0 0 1\n0.1\n")
    return here


def test_every_command_runs(place, tmp_path_factory):
    pairs = generated(tmp_path_factory, "stereo", "--scenes", "4", "--val_scenes", "2", "--size", "96x128")
    here = ("my_data.yaml", "check.png", "pairs.csv", "bad.txt", "left.png", "right.png", "K.txt")
    paths = {name: place / name for name in here} | {"data/tiny/stereo/val": pairs / "val", "workspace/stereo_tiny": place / "tiny"}
    sets = ("fsd", "middlebury", "converted", "textures", "stereo_200")
    paths |= {f"data/{name}": place / name for name in sets} | {"model_best_bp2.pth": place / "model.pth"}
    paths |= {f"--out {name}": f"--out {place}/{name}" for name in ("disparity", "cloud")} | {"workspace/": f"{place}/run_"}
    commands = readme_commands(ROOT / "stereo" / "README.md")
    assert len(commands) == 19
    outputs = []
    for text in commands:
        text, extra = re.sub(r"0000\d{4}(?=_ema|\.pt)", "00000001", text.replace("'", "")), []
        if "textures.py" in text:
            extra = ["--pairs", "2"]
        elif "-m synth" in text:
            text = text.replace("data/tiny/stereo", str(place / "generated"))
            extra = ["--scenes", "1", "--val_scenes", "1", "--size", "64x64"]
        elif "stereo/train.py" in text:
            extra = list(SMALL)
            text = text.replace("--vit_checkpoint depth_anything_v2_vitl.pth", "").replace("--cnn_checkpoint edgenext_small.pth", "")
            if text.startswith("torchrun") and "tiny.yaml" in text:
                extra += ["--data.datasets.0.path", pairs / "train", "--workspace", place / "tiny"]
            elif "v1.json" in text:
                extra += ["--data.datasets.0.path", pairs / "train"]
        elif "eval.py" in text or "infer.py" in text:
            extra = ["--iters", "1"]
        outputs.append(run_small(text, extra, paths))
        if text.startswith("torchrun") and "tiny.yaml" in text:  # stands for the published weights from here on
            (model,) = (place / "tiny" / "checkpoint").glob("00000001.pt")
            shutil.copy(model, place / "model.pth")
    assert "all " in outputs[6] and "tensors loaded" in outputs[6] and "batch norms frozen" in outputs[6]
    rows = list(csv.DictReader((place / "pairs.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} == {"best constant", "SGBM (OpenCV)", "model"} and len(rows) == 6
    mean = lambda method: np.mean([float(row["epe"]) for row in rows if row["method"] == method])
    assert mean("SGBM (OpenCV)") < mean("best constant") and f"{mean('best constant'):.3f}" in outputs[9]
    assert "mask noc" in outputs[9] and "bp2" in outputs[9] and (place / "bad.txt").exists()
    disparity = decode_pfm((place / "disparity" / "0001.pfm").read_bytes())
    assert disparity.shape == (96, 128) and disparity.min() >= 0 and (place / "disparity" / "0000_disparity.jpg").exists()
    stored, depth = np.load(place / "cloud" / "left.npz"), np.load(place / "cloud" / "left_depth.npy")
    known = stored["visible"] & (stored["disparity"] > 0.1)
    assert np.allclose(depth[known], 100 * 0.1 / stored["disparity"][known], rtol=1e-4) and (depth[~stored["visible"]] == 0).all()
    assert (place / "cloud" / "left.ply").read_bytes().startswith(b"ply")
    assert "2 pairs" in outputs[12] and all("tensors loaded" in outputs[n] for n in (15, 17))
    assert all(name in output for output in (outputs[16], outputs[18]) for name in ("best constant", "SGBM (OpenCV)", "latest"))
    assert (place / "check.png").exists() and len(list((place / "converted" / "left" / "disparity").iterdir())) == 2


def test_point_cloud_of_a_plane_and_its_outliers():
    from stereo.infer import depth_map, point_cloud

    camera = {"fx": 100.0, "cx": 31.5, "cy": 23.5, "baseline": 0.1, "doffs": 2.0}
    disparity = np.full((48, 64), 8.0, np.float32)
    disparity[0, 0], disparity[1, 1], disparity[2, 2] = np.nan, -5, 3
    depth = depth_map(disparity, camera)
    assert depth[10, 10] == pytest.approx(1.0) and depth[0, 0] == depth[1, 1] == 0 and depth[2, 2] == pytest.approx(2.0)
    image = np.zeros((48, 64, 3), np.uint8)
    points, colours = point_cloud(depth, image, camera)
    assert len(points) == 48 * 64 - 2 == len(colours)
    assert np.allclose(points[-1], [(63 - 31.5) / 100, (47 - 23.5) / 100, 1.0], atol=1e-6)
    assert np.allclose(point_cloud(depth, image, camera | {"fy": 50.0})[0][-1], [0.315, 0.47, 1.0], atol=1e-6)
    assert len(point_cloud(depth, image, camera, z_far=1.5)[0]) == len(points) - 1
    assert len(point_cloud(depth, image, camera, neighbours=3, radius=0.03)[0]) == len(points) - 1  # the lone point behind the plane


def test_help_lists_every_key():
    from common.config import read

    text = run("stereo/train.py", "--help")
    reference = read(ROOT / "stereo" / "configs" / "paper.yaml")
    for key in [*reference, *(f"  {name}" for section in ("data", "model") for name in reference[section])]:
        assert f"\n{key}:" in text, key


def test_messages_quoted_in_the_readme_are_ours():
    table = (ROOT / "stereo" / "README.md").read_text().split("## Troubleshooting")[1]
    sources = "".join(path.read_text() for folder in ("stereo", "common") for path in (ROOT / folder).glob("*.py"))
    quoted = """the monocular branch is frozen and needs trained weights; no such folder of stereo pairs; no pair in the form of
        left/disparity is missing or empty; but the views of a rectified pair have one size; too few pixels below max_disparity
        not the three-channel code; both must be multiples of 32; has no entry in; checkpoint has corr_levels=; bad sample replaced
        were unreadable; steps in a row had a non-finite loss or gradient; is in use by another run"""
    for words in (words.strip() for line in quoted.split("\n") for words in line.split(";")):
        assert words in table and words in sources, words


def test_averaged_weights_load_like_plain_ones(place, tmp_path):
    """{step}.pt and {step}_ema.pt have one form; a file of another kind is refused by name."""
    from stereo.eval import load_model

    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"other\.pt"):
        load_model(tmp_path / "other.pt", torch.device("cpu"))
    (tmp_path / "cfg.yaml").write_text("max_disp: [")
    with pytest.raises(SystemExit, match=r"cfg\.yaml"):
        load_model(tmp_path / "other.pt", torch.device("cpu"))
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(SystemExit, match=r"cannot read weights from .*half\.pt"):
        load_model(tmp_path / "half.pt", torch.device("cpu"))
