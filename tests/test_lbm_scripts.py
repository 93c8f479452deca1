"""lbm/train.py, eval.py, infer.py and tools/convert.py in this process: wrong input, foreign files, videos without truth."""

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import ROOT

from common import config
from common.checkpoint import Checkpoints
from lbm.model import LBM

CPU = torch.device("cpu")
SHAPE = {"input_size": (64, 96), "num_layers": 2, "num_neighbors": 2}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend("")  # they replace the first entry
    from lbm import eval, infer, train
    from lbm.tools import convert

    return SimpleNamespace(eval=eval, infer=infer, train=train, convert=convert)


def settings(train, *words):
    small = ("--input_size", "[64,96]", "--num_neighbors", "2", "--top_k_regions", "9", "--memory_size", "3")
    words = ("--config", ROOT / "lbm/configs/tiny.yaml", *small, "--tapvid_root", "null", *words)
    return config.parse([*map(str, words)], "", train.REFERENCE)


@pytest.mark.parametrize(
    "key, value",
    [("T", 1), ("N", 0), ("bs", 0), ("max_steps", -1), ("log_every", -1), ("vis_every", -1), ("grad_clip", -1), ("epoch_num", 0)]
    + [("validate_videos", 0), ("eval_memory_size", 0), ("eval_dataset", "davos"), ("validation", "true")],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused_by_name(scripts, key, value):
    scripts.train.check(settings(scripts.train))
    with pytest.raises(SystemExit, match=key):
        scripts.train.check(settings(scripts.train, f"--{key}", value))


def resumed(train, folder, *words):
    """(result, optimizer, log lines) of train.resume in a new run."""
    cfg, lines = settings(train, *words), []
    model = train.build_model(cfg)
    optimizer, scaler = train.build_optimizer(model, cfg), torch.amp.GradScaler("cpu", enabled=False)
    start = train.resume(cfg, Checkpoints(folder / "run"), model, optimizer, scaler, SimpleNamespace(text=lines.append))
    return start, optimizer, lines


def test_official_file_of_another_memory_size_goes_on(scripts, tmp_path):
    """With its optimizer, whose moments fit the parameters again; with and without a count of epochs."""
    model = LBM(**SHAPE, memory_size=5)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    for content, epoch in (({"epoch": 2}, 2), ({}, 0)):
        torch.save({"model": state, "optimizer": optimizer.state_dict(), **content}, tmp_path / "official.pt")
        start, mine, lines = resumed(scripts.train, tmp_path, "--checkpoint", tmp_path / "official.pt")
        assert (start["step"], start["epoch"]) == (0, epoch) and f"at epoch {epoch}" in lines[-1] and "from 5 to 3" in lines[0]
        for p, moments in mine.state.items():
            assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape


def test_validation_of_nothing_is_refused(scripts, tmp_path):
    words = ("--validation", "--tapvid_root", tmp_path)
    with pytest.raises(SystemExit, match=r"no checkpoint in .*run; name one as checkpoint, or weights as init"):
        resumed(scripts.train, tmp_path, *words)
    torch.save({"model": LBM(**SHAPE, memory_size=3).state_dict()}, tmp_path / "lbm.pt")
    assert "weights from" in resumed(scripts.train, tmp_path, *words, "--init", tmp_path / "lbm.pt")[2][-1]


def element(frames=4, points=3, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)
    return {"video": video, "points": rng.random((points, frames, 2)), "occluded": np.zeros((points, frames), bool)}


@pytest.mark.parametrize("query_mode", ["first", "strided"])
def test_videos_without_ground_truth_are_left_out_and_counted(scripts, tmp_path, query_mode):
    unseen = element(seed=1)
    unseen["occluded"][:] = True
    videos = {"a": element(), "b": unseen, "c": element(points=0)}
    (tmp_path / "tapvid_davis.pkl").write_bytes(pickle.dumps(videos))
    model = LBM(**SHAPE, memory_size=3)
    found = scripts.eval.evaluate(model, tmp_path, "davis", CPU, query_mode, memory_size=2)
    alone = scripts.eval.evaluate(model, tmp_path, "davis", CPU, query_mode, memory_size=2, limit=1)
    assert (found["videos"], found["skipped"]) == (3, 2) and [row["points"] for row in found["per_video"]] == [3, 0, 0]
    assert math.isfinite(found["aj"]) and all(found[name] == alone[name] for name in scripts.eval.COLUMNS)


def test_spatial_penalty_reaches_the_tracker(scripts):
    torch.manual_seed(0)
    model, sample = LBM(**SHAPE, memory_size=3).eval(), element(points=8)
    queries = np.column_stack([np.zeros(8), sample["points"][:, 0] * (48, 32)]).astype(np.float32)
    track = lambda **options: scripts.eval.tracker(model, CPU, **options)(sample["video"], queries)[0]
    free, near = track(), track(spatial_penalty=0.2)
    assert np.abs(track(spatial_penalty=1e6) - free).max() < 1e-2 < np.abs(near - free).max()


def test_weights_of_gpu_training_load_on_a_cpu(scripts, tmp_path):
    """The kernel of a checkpoint's config may not work here."""
    stored = SHAPE | {"input_size": [64, 96], "memory_size": 3, "msda": "mmcv"}
    torch.save({"model": LBM(**SHAPE, memory_size=3).state_dict(), "config": stored}, tmp_path / "best_aj.pt")
    assert scripts.eval.load_model(tmp_path / "best_aj.pt", CPU).msda_name() == "torch"


def test_convert_keeps_the_weights_of_any_shape(scripts, tmp_path, monkeypatch):
    state = LBM(input_size=(64, 32), num_layers=4, memory_size=24).state_dict()
    official = {"model": {f"module.{name}": value for name, value in state.items()}, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(official, tmp_path / "in.pt")
    monkeypatch.setattr("sys.argv", ["convert.py", "-i", str(tmp_path / "in.pt"), "-o", str(tmp_path / "out.pt")])
    scripts.convert.main()
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out.keys() == {"model"} and out["model"].keys() == state.keys()
    assert all(torch.equal(out["model"][name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "script, words",
    [("eval", w) for w in ("--limit 0", "--chunk -3", "--memory_size 0", "--vis_threshold 2", "--out /no/such/folder/x.csv")]
    + [("infer", w) for w in ("--grid -2", "--grid 0", "--max_frames -1", "--memory_size 0", "--spatial_penalty 0")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(scripts, monkeypatch, capsys, script, words):
    needed = {"eval": ["--data", "x"], "infer": ["--video", "x", "--out", "x"]}[script]
    monkeypatch.setattr("sys.argv", [script, "--checkpoint", "x", *[w for w in needed if w not in words.split()], *words.split()])
    with pytest.raises(SystemExit, match="2"):
        getattr(scripts, script).main()
    assert words.split()[0] in capsys.readouterr().err


def test_points_lie_in_whole_frames_of_the_video(scripts, tmp_path):
    path = tmp_path / "points.csv"
    for text, message in (("0, 1, 2\n1.5, 3, 4", "whole numbers from 0 to 5"), ("6, 1, 2", "outside"), ("0, nan, 2", "outside")):
        path.write_text(text)
        with pytest.raises(SystemExit, match=rf"points\.csv.*{message}"):
            scripts.infer.read_points(path, (6, 10, 20, 3))
