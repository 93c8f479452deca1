"""Every command of lbm/README.md, in small form."""

import ast
import pickle
import shutil

import cv2
import numpy as np
import pytest
import torch
from runs import ROOT, generated, readme_commands, run, run_small

SMALL = [
    "--T",
    "4",
    "--N",
    "16",
    "--input_size",
    "[64,96]",
    "--min_points",
    "4",
    "--max_steps",
    "1",
    "--workers",
    "1",
    "--validate_videos",
    "1",
    "--num_layers",
    "2",
    "--memory_size",
    "4",
    "--eval_memory_size",
    "4",
    "--augment",
    "false",
    "--amp",
    "off",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything the README's commands name, small: data, a trained tiny model, a video, points."""
    clips, here = (
        generated(tmp_path_factory, "lbm", "--scenes", "5", "--size", "64x96", "--frames", "6", "--points", "64"),
        tmp_path_factory.mktemp("readme"),
    )
    shutil.copytree(clips / "movi_f", here / "kubric_lbm")
    shutil.copy(clips / "tapvid_davis.pkl", here / "tapvid_davis.pkl")
    (here / "tapvid_davis").mkdir()
    shutil.copy(clips / "tapvid_davis.pkl", here / "tapvid_davis")
    (here / "tapvid_kinetics").mkdir()
    elements = list(pickle.loads((clips / "tapvid_davis.pkl").read_bytes()).values())
    (here / "tapvid_kinetics" / "0000_of_0010.pkl").write_bytes(pickle.dumps(elements[:1]))
    frames = here / "my_clips" / "one" / "frames"
    frames.mkdir(parents=True)
    writer = cv2.VideoWriter(str(here / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (96, 64))
    for t in range(24):
        picture = cv2.imread(str(clips / "movi_f" / "0000" / "frames" / f"{t % 6:03d}.png"))
        cv2.imwrite(str(frames / f"{t:03d}.png"), picture)
        writer.write(picture)
    writer.release()
    tracks = np.random.default_rng(0).uniform(0, 60, (24, 20, 2)).astype(np.float32)
    names = np.array([f"{t:03d}.png" for t in range(24)])
    np.savez(here / "my_clips" / "one" / "tracks.npz", frames=names, tracks=tracks, visible=np.ones((24, 20), bool))
    (here / "points.csv").write_text("0, 10, 20\n")
    run(
        "lbm/train.py",
        "--config",
        "lbm/configs/tiny.yaml",
        *SMALL,
        "--movi_f_root",
        here / "kubric_lbm",
        "--tapvid_root",
        here / "tapvid_davis.pkl",
        "--workspace",
        here / "workspace" / "lbm_tiny",
    )
    shutil.copy(here / "workspace" / "lbm_tiny" / "checkpoint" / "best_aj.pt", here / "lbm.pt")
    return here


def test_every_command_runs(place):
    paths = {
        "data/kubric_lbm": place / "kubric_lbm",
        "data/tapvid_davis/": f"{place}/",
        "data/tapvid_davis": place / "tapvid_davis",
        "data/tapvid_kinetics": place / "tapvid_kinetics",
        "data/tiny/lbm/movi_f": place / "kubric_lbm",
        "data/tiny/lbm": place,
        "workspace/lbm_tiny": place / "workspace" / "lbm_tiny",
        "my_clips": place / "my_clips",
        "data/my_set": place / "set",
        "data/packed": place / "packed",
        "check.png": place / "check.png",
        "lbm.pt": place / "lbm.pt",
        "clip.mp4": place / "clip.mp4",
        "points.csv": place / "points.csv",
        "--out tracks": f"--out {place}/tracks",
        "per_video.csv": place / "per_video.csv",
        "lbm_run": place / "lbm_run",
        "released.pt": place / "released.pt",
    }
    commands = readme_commands(ROOT / "lbm" / "README.md")
    assert len(commands) >= 14
    for number, text in enumerate(commands):
        extra = []
        if "-m synth" in text:
            text, extra = (
                text.replace("data/tiny/lbm", str(place / "generated")),
                ["--scenes", "1", "--val_scenes", "1", "--frames", "2"],
            )
        elif "lbm/train.py" in text:
            extra = [*SMALL, "--movi_f_root", place / "kubric_lbm", "--workspace", place / f"run{number}", "--bs", "1"]
            extra += ["--tapvid_root", place / "tapvid_davis.pkl"] if "tiny.yaml" in text else []
        elif "lbm/eval.py" in text:
            extra = ["--limit", "1", "--memory_size", "4"]
        elif "lbm/infer.py" in text:
            extra = ["--memory_size", "4"]
        run_small(text, extra, paths)
    assert set(torch.load(place / "released.pt", weights_only=True)) == {"model"}
    assert (place / "check.png").exists() and (place / "packed").is_dir() and (place / "set" / "kubric").is_dir()


def test_help_lists_every_key():
    text = run("lbm/train.py", "--help")
    from common.config import read

    for key in read(ROOT / "lbm" / "configs" / "default.yaml"):
        assert f"\n{key}: " in text, key


def test_messages_quoted_in_the_readme_are_ours():
    trees = [ast.parse(path.read_text()) for folder in ("lbm", "common") for path in (ROOT / folder).glob("*.py")]
    raised = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]  # messages quote values
    sources = "".join(part.value for node in raised for part in node.values if isinstance(part, ast.Constant))
    for words in (
        "bad sample replaced",
        "were unreadable",
        "check tapvid_root",
        "did you mean",
        "trying the checkpoint before it",
        "is in use by another run",
        "steps in a row had a non-finite loss or gradient",
        "its position embedding is for input_size",
        "no sequence folder",
        "no such folder",
    ):
        assert words in (ROOT / "lbm" / "README.md").read_text() and words in sources, words
