"""lbm/train.py, eval.py and infer.py as a user runs them: real processes, real signals, generated clips."""

import csv
import os
import shutil
import socket

import numpy as np
import pytest
import torch
from runs import ROOT, checkpoint, command, generated, metrics, run, run_until_sigterm, same_end, start

TINY = (
    "lbm/train.py",
    "--config",
    "lbm/configs/tiny.yaml",
    "--T",
    "4",
    "--N",
    "16",
    "--input_size",
    "[64, 96]",
    "--memory_size",
    "4",
    "--log_every",
    "1",
    "--min_points",
    "4",
    "--workers",
    "1",
    "--vis_every",
    "1000",
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return generated(tmp_path_factory, "lbm", "--scenes", "5", "--size", "64x96", "--frames", "6", "--points", "64")


@pytest.fixture
def tiny(clips, tmp_path):
    """Arguments of a small run into tmp_path / name."""

    def args(name: str, *more, validate: bool = False):
        root = ("--tapvid_root", clips / "tapvid_davis.pkl") if validate else ("--tapvid_root", "null")
        return (*TINY, "--movi_f_root", clips / "movi_f", *root, "--workspace", tmp_path / name, *more)

    return args


@pytest.fixture(scope="session")
def straight(clips, tmp_path_factory):
    """A run of 6 steps on one process without a stop, saved every 2 steps: what every other run is compared with."""
    folder = tmp_path_factory.mktemp("straight")
    args = (*TINY, "--movi_f_root", clips / "movi_f", "--tapvid_root", "null", "--workspace", folder, "--bs", "2")
    run(*args, "--max_steps", "6", "--save_every", "2", "--keep_last", "9")
    return folder


def test_stopped_and_resumed_run_is_bit_identical(tiny, tmp_path, straight):
    args = tiny("resumed", "--bs", "2", "--save_every", "100", "--keep_last", "9", "--max_steps", "6")
    output = run_until_sigterm(tmp_path / "resumed", *args, "--checkpoint", "none")
    assert "the same command with --checkpoint latest goes on from here" in output
    assert "resumed at step" in run(*args, "--workers", "0")
    same_end(tmp_path / "resumed", straight, 6)


def test_two_ranks_see_the_samples_of_one(tiny, tmp_path, straight):
    """The first loss of 2 x 1 clips is near that of 1 x 2 (BatchNorm takes its statistics per rank); back on one rank it resumes."""
    one, two = (
        (*tiny(name, "--max_steps", "2", "--dropout", "0.0", "--random_memory_mask_drop", "0.0"), "--bs", bs)
        for name, bs in (("one", 2), ("two", 1))
    )
    run(*one)
    output = run(*two, ranks=2)
    assert "1 a rank x 2 ranks = 2 clips a step" in output
    a, b = metrics(tmp_path / "one")[1], metrics(tmp_path / "two")[1]
    assert abs(a["loss/visibility_loss"] - b["loss/visibility_loss"]) < 0.2 * a["loss/visibility_loss"]
    # and back on one rank: the checkpoint is that of two ranks
    assert "resumed at step 2" in run(*one[:-1], 2, "--workspace", tmp_path / "two", "--max_steps", "3")


def test_two_nodes_on_the_loopback_address(tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [str(a) for a in tiny("nodes", "--max_steps", "2", "--bs", "1")]
    nodes = []
    for number in range(2):
        launcher = command(*args, ranks=1)
        at = launcher.index("--standalone")
        launcher[at : at + 1] = [
            "--nnodes",
            "2",
            "--node_rank",
            str(number),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(port),
        ]
        nodes.append(start(*launcher[1:]))
    outputs = [process.communicate(timeout=180)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert "1 a rank x 2 ranks" in outputs[0] and checkpoint(tmp_path / "nodes", 2)["step"] == 2


def test_users_command_validation_best_checkpoints_and_tensorboard(clips, tmp_path):
    """The document's flags; validation with best-of-metric files; the event file read back by TensorBoard's own reader."""
    folder = tmp_path / "lbm"
    output = run(
        "lbm/train.py",
        "--config_path",
        "lbm/configs/tiny.yaml",
        "--movi_f_root",
        clips / "movi_f",
        "--tapvid_root",
        clips / "tapvid_davis.pkl",
        "--eval_dataset",
        "davis",
        "--epoch_num",
        "150",
        "--lr",
        "5e-4",
        "--wd",
        "1e-5",
        "--bs",
        "1",
        "--model_save_path",
        folder,
        "--N",
        "16",
        "--amp",
        "--T",
        "4",
        "--input_size",
        "[64,96]",
        "--min_points",
        "4",
        "--max_steps",
        "2",
        "--validate_every",
        "2",
        "--validate_videos",
        "2",
        "--vis_every",
        "2",
        "--log_every",
        "1",
        ranks=2,
    )
    assert "amp bfloat16" in output and "AJ" in output
    for name in ("best_aj.pt", "best_delta.pt", "best_oa.pt"):
        assert torch.load(folder / "checkpoint" / name, weights_only=True)["step"] == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb")).Reload()
    assert {"loss/loss", "train/lr", "train/grad_norm", "time/data", "time/step", "mem/peak_gb", "val/aj"} <= set(
        events.Tags()["scalars"]
    )
    assert "train/tracks" in events.Tags()["images"] and [e.step for e in events.Scalars("loss/loss")] == [1, 2]
    assert (folder / "config.yaml").exists() and (folder / "log.txt").read_text().count("clips a step") == 1

    output = run(
        "lbm/eval.py",
        "--checkpoint",
        folder / "checkpoint" / "best_aj.pt",
        "--dataset",
        "davis",
        "--data",
        clips / "tapvid_davis.pkl",
        "--baselines",
        "--limit",
        "2",
        "--memory_size",
        "8",
        "--out",
        tmp_path / "videos.csv",
        ranks=2,
    )
    assert (
        "points never move" in output
        and "Lucas-Kanade" in output
        and len((tmp_path / "videos.csv").read_text().splitlines()) == 3
    )
    rows, logged = list(csv.DictReader((tmp_path / "videos.csv").open())), metrics(folder)[2]
    for name in ("oa", "delta_avg"):  # the scores are those of the weights saved with them: on all ranks, those of the first
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(logged[f"val/{name}"], abs=1e-9), name

    frames = clips / "movi_f" / "0000" / "frames"
    (tmp_path / "points.csv").write_text("0, 10.5, 20\n2, 30, 40\n")
    run(
        "lbm/infer.py",
        "--checkpoint",
        folder / "checkpoint" / "00000002.pt",
        "--video",
        frames,
        "--points",
        tmp_path / "points.csv",
        "--out",
        tmp_path / "out",
    )
    stored = np.load(tmp_path / "out" / "tracks.npz")
    assert (
        stored["tracks"].shape == (6, 2, 2)
        and not stored["visible"][:2, 1].any()
        and np.isnan(stored["tracks"][:2, 1]).all()
        and np.isnan(stored["uncertainty"][:2, 1]).all()
        and np.isfinite(stored["tracks"][2:]).all()
        and (tmp_path / "out" / "tracks.mp4").stat().st_size > 0
    )
    again = run(
        "lbm/infer.py",
        "--checkpoint",
        folder / "checkpoint" / "00000002.pt",
        "--video",
        tmp_path / "out" / "tracks.mp4",
        "--grid",
        "3",
        "--out",
        tmp_path / "b",
    )
    assert "9 points through 6 frames" in again


def test_copied_out_folder_trains(tiny, tmp_path):
    """lbm/ and common/ side by side are enough."""
    for name in ("lbm", "common"):
        shutil.copytree(ROOT / name, tmp_path / "elsewhere" / name)
    run(*tiny("run", "--max_steps", "1"), cwd=tmp_path / "elsewhere", PYTHONPATH="")
    assert (tmp_path / "run" / "checkpoint" / "00000001.pt").exists()


def test_tiny_datasets_and_last_rank(clips, tiny, tmp_path):
    """One sequence on two ranks: the same number of steps on both."""
    shutil.copytree(clips / "movi_f" / "0001", tmp_path / "one" / "0001")
    output = run(*tiny("run", "--movi_f_root", tmp_path / "one", "--max_steps", "3"), ranks=2)
    assert "1 clips" in output and sorted(metrics(tmp_path / "run")) == [1, 2, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--movi_f_root", "no/such/folder"), "no/such/folder"),
        (("--epoch_nun", "3"), "epoch_num"),
        (("--bs", "many"), "bs"),
        (("--msda", "fast"), "msda"),
        (("--tapvid_root", "no/such.pkl"), "no/such.pkl"),
        (("--checkpoint", "no/such.pt"), "no/such.pt"),
        (("--checkpoint", "77"), "00000077.pt is missing"),
        (("--init", "no/such.pt"), "no/such.pt"),
    ],
)
def test_wrong_input_is_named(tiny, arguments, message):
    assert message in run(*tiny("bad"), *arguments, code=None)


def test_corrupt_frames_are_replaced_counted_and_limited(clips, tiny, tmp_path):
    root = tmp_path / "movi_f"
    shutil.copytree(clips / "movi_f", root)
    frame = root / "0002" / "frames" / "001.png"
    frame.write_bytes(frame.read_bytes()[:100])
    output = run(*tiny("run", "--movi_f_root", root, "--max_steps", "6", "--max_bad_fraction", "1.0"))
    assert output.count("bad sample replaced") == 1 and str(frame) in output
    assert metrics(tmp_path / "run")[6]["train/bad_samples"] >= 1
    for sequence in root.iterdir():
        for picture in (sequence / "frames").iterdir():
            picture.write_bytes(b"")
    assert "attempts failed" in run(*tiny("none", "--movi_f_root", root, "--max_steps", "6"), code=None)


def test_damaged_checkpoint_falls_back_and_explicit_one_is_an_error(straight, tiny, tmp_path):
    for quarter in range(4):
        folder = tmp_path / f"cut{quarter}"
        shutil.copytree(straight, folder)
        newest = folder / "checkpoint" / "00000006.pt"
        os.truncate(newest, newest.stat().st_size * quarter // 4)
        if quarter in (0, 2):
            output = run(*tiny(f"cut{quarter}", "--bs", "2", "--max_steps", "6", "--save_every", "2", "--keep_last", "9"))
            assert "00000006.pt is damaged" in output and "resumed at step 4" in output
            same_end(folder, straight, 6)
            continue
        assert "00000006.pt" in run(*tiny(f"cut{quarter}", "--bs", "2", "--max_steps", "6", "--checkpoint", "6"), code=None)
