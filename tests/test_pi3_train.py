"""pi3/train.py, eval.py, infer.py and dataset.py as a user runs them: real processes, real signals, generated sequences."""

import os
import runpy
import shutil
import signal
import sys
from unittest import mock

import golden
import numpy as np
import pytest
import torch
from runs import ROOT, checkpoint, generated, metrics, run, run_until_sigterm, same_end
from test_pi3_data import write, write_folder

from common import config, data, dist
from common.dist import checksum
from common.guard import StepGuard
from common.io import read_image
from pi3 import eval as evaluation
from pi3 import infer as inference
from pi3.dataset import Mixture, read_sample, unpack
from pi3.eval import permutation_difference, predict, sample_scores, validate_samples
from pi3.geometry import complete, nearest_rotation, rescale_poses, transform, unproject
from pi3.loss import pi3_loss
from pi3.model import Pi3
from pi3.readers import RGBDFolder, TartanAir
from pi3.schedule import lr_at, parameter_groups
from pi3.train import ALIASES, REFERENCE, build_model, build_optimizer, train_step, validate
from pi3.weights import load_model


def run_here(script: str, *words) -> None:
    """Run a script of the repository in this process, as `python script words`: saves the seconds that imports take."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    path, tf32 = sys.path[0], (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    sys.path.insert(0, "")  # the scripts replace the first entry
    try:
        with mock.patch.object(sys, "argv", [script, *map(str, words)]):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
    finally:
        dist.shutdown()  # ends the watch on progress
        sys.path.remove(str(ROOT)) if sys.path[0] != path else None
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refusal(script: str, *words) -> str:
    """The message that a script ends with, run in this process: what a user reads last."""
    with pytest.raises((Exception, SystemExit)) as caught:
        run_here(script, *words)
    return str(caught.value)


NET = ("model.enc_dim=48", "model.enc_depth=1", "model.enc_heads=3", "model.dec_dim=48", "model.dec_depth=2", "model.dec_heads=3",
       "model.head_dim=48", "model.head_depth=1", "model.head_heads=3", "model.point_out=32", "model.camera_dim=32",
       "model.pos_img_size=28")  # fmt: skip
WIDTHS = {word.split(".")[1].split("=")[0]: int(word.split("=")[1]) for word in NET}
SMALL = (*NET, "train.max_img_per_gpu=6", "test_dataset.samples.tartanair=2", "test_dataset.image_num=2",
         "log_every=1", "workers=1", "vis_every=1000", "validate_every=1000")  # fmt: skip
QUIET = ("test_dataset.samples.tartanair=0",)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return generated(tmp_path_factory, "pi3", "--scenes", "2", "--val_scenes", "1", "--frames", "3")


@pytest.fixture(scope="session")
def make(scenes):
    """Arguments of a small run into a folder."""

    def args(folder, *more, config: str = "tiny"):
        data = (f"data.tartanair.root={scenes}", f"data.tartanair.test_root={scenes / 'val'}")
        data += ("train.resolution=[56,42]",) if config in ("tiny", "train_pi3_lowres") else ()
        return ("pi3/train.py", "--config", f"pi3/configs/{config}.yaml", *SMALL, *data, f"workspace={folder}", *more)

    return args


FOUR = ("train.gradient_accumulation_steps=4", "save_every=2", "keep_last=9", *QUIET)


@pytest.fixture(scope="session")
def straight(make, tmp_path_factory):
    """A run of 4 steps of four micro-batches on one process without a stop: what every other run is compared with."""
    folder = tmp_path_factory.mktemp("straight")
    run(*make(folder, *FOUR, "max_steps=4"))
    return folder


def test_stopped_and_resumed_run_is_bit_identical(make, tmp_path, straight):
    """Stopped by SIGTERM; it goes on with another number of workers."""
    args = make(tmp_path, *FOUR)
    run_until_sigterm(tmp_path, *args, "max_steps=4")
    assert "resumed at step" in run(*args, "max_steps=4", "workers=0")
    same_end(tmp_path, straight, 4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_see_the_samples_of_one_and_give_its_losses(make, scenes, tmp_path, straight, parallel):
    """Two ranks of two micro-batches equal one rank of four, split or not; either's checkpoint goes on in the other form and alone."""
    args = make(tmp_path, "save_every=2", "keep_last=9", *QUIET, f"parallel={parallel}", "train.gradient_accumulation_steps=2")
    output = run(*args, "max_steps=4", ranks=2)
    assert f"{parallel}, amp" in output and "x 2 micro-batches x 2 ranks = 24 images a step" in output
    a, b = metrics(tmp_path), metrics(straight)
    for step in range(1, 5):
        for key in ("loss/loss", "loss/local_pts_loss", "loss/trans_loss", "loss/rot_loss", "train/grad_norm"):
            assert a[step][key] == pytest.approx(b[step][key], rel=2e-4, abs=1e-6), (step, key)
    moments = [checkpoint(folder, 4, "optimizer")["optimizer"]["state"] for folder in (tmp_path, straight)]
    assert max((moments[0][i]["exp_avg"] - moments[1][i]["exp_avg"]).abs().max() for i in moments[1]) < 1e-5  # the largest is 0.01
    ours, theirs = checkpoint(tmp_path, 4)["model"], checkpoint(straight, 4)["model"]
    assert ours.keys() == theirs.keys()
    for name in ours:  # a common shift of all cameras has no gradient but rounding, which Adam makes a whole step of
        assert name == "camera_head.fc_t.bias" or (ours[name] - theirs[name]).abs().mean() < 5e-6, name
    if parallel == "fsdp":  # stopped and resumed, with validations in between: as without them
        shutil.copytree(tmp_path, tmp_path / "again")
        for file in (tmp_path / "again" / "checkpoint").glob("00000004*"):
            file.unlink()
        more = ("test_dataset.samples.tartanair=3", "validate_every=1", f"workspace={tmp_path / 'again'}", "checkpoint=2")
        assert "resumed at step 2" in run(*args, "max_steps=4", *more, ranks=2)
        same_end(tmp_path / "again", tmp_path, 4, but=(".best",))  # only one of the two runs has a best score
        source = Mixture([TartanAir(scenes / "val")], [1.0], seed=0, train=False)
        model = load_model(tmp_path / "again" / "checkpoint" / "00000004.pt", torch.device("cpu"))
        scores = validate_samples(model, source, 3, 2, (56, 42), 2, torch.device("cpu"))  # in one process, in other batches
        for name in ("loss", "rot_loss", "auc@30", "point_error"):
            assert metrics(tmp_path / "again")[4][f"val/{name}"] == pytest.approx(scores[name], rel=1e-4)
        assert torch.load(tmp_path / "again" / "checkpoint" / "best.pt", weights_only=True)["scores"]["loss"] > 0
    # and back on one process
    assert "resumed at step 4" in run(*args, FOUR[0], "parallel=ddp", "max_steps=5")


def test_three_stages_in_sequence(make, tmp_path):
    """lowres, highres, conf by the users' commands, small, each from the one before; the sky model from its official file name."""
    stage = lambda name: (f"name=pi3_{name}", "model.load_vggt=false", "train_dataset.weights={tartanair: 1, scannet: 0, co3d: 0}",
                          "test_dataset.samples={tartanair: 2, scannet: 0, co3d: 0}", "train.iters_per_epoch=2", "train.num_epoch=1",
                          "amp=off")  # fmt: skip
    run_of = lambda name, *more: make(tmp_path / name, *stage(name), *more, config=f"train_pi3_{name}")
    low = run(*run_of("lowres"), ranks=2)
    assert "1 sizes 56x42..56x42; steps 0..2 of 2" in low and "auc@30" in low
    sizes = ("train.pixel_count_range=[1500,3200]", "test_dataset.resolution=[56,42]")
    assert "huggingface.co/facebook/VGGT-1B" in refusal(*run_of("highres", *sizes, "model.load_vggt=true", f"workspace={tmp_path}/vggt"))
    assert "WARNING: a stage with varying sizes" in (tmp_path / "vggt" / "log.txt").read_text()
    high = run(*run_of("highres", *sizes, f"model.ckpt={tmp_path / 'lowres'}", "model.num_dec_blk_to_checkpoint=1"), ranks=2)
    assert "tensors loaded" in high and "sizes 28x56" in high and "checkpointing decoder blocks 1..1" in high
    pixels = {row["train/pixels"] for row in metrics(tmp_path / "highres").values() if "train/pixels" in row}
    assert all(1500 <= p <= 3200 for p in pixels)

    conf = run_of("conf", *sizes, f"sky.ckpt={tmp_path / 'ckpts' / 'segformer.b0.512x512.ade.160k.pth'}")
    message = refusal(*conf, f"model.ckpt={tmp_path / 'highres'}", f"workspace={tmp_path / 'no_sky'}")
    assert "segformer.b0.512x512.ade.160k.pth" in message and "github.com/NVlabs/SegFormer" in message
    from pi3.segformer import SegFormer

    shapes = {name: list(t.shape) for name, t in SegFormer().state_dict().items() if t.is_floating_point()}
    (tmp_path / "ckpts").mkdir()
    torch.save({"meta": {}, "state_dict": golden.filled(shapes)}, tmp_path / "ckpts" / "segformer.b0.512x512.ade.160k.pth")
    assert "give model.ckpt=PATH of the highres run" in refusal(*conf, "model.ckpt=null", f"workspace={tmp_path / 'no_weights'}")
    output = run(*conf, f"model.ckpt={tmp_path / 'highres' / 'checkpoint' / '00000002.pt'}", "model.conf_init=point_decoder",
                 "train.iters_per_epoch=3", "validate_every=1", "max_steps=2", ranks=2)  # fmt: skip
    assert "of the confidence branch start fresh" in output and "copy of the point transformer" in output
    before, after = checkpoint(tmp_path / "highres", 2)["model"], checkpoint(tmp_path / "conf", 2)["model"]
    assert all(torch.equal(after[name], before[name]) for name in before) and len(after) > len(before)
    assert not torch.equal(after["conf_decoder.linear_out.weight"], before["point_decoder.linear_out.weight"])
    one, two = (metrics(tmp_path / "conf")[step] for step in (1, 2))
    assert two["loss/local_conf_loss"] > 0 and two["val/local_conf_loss"] > 0 and one["val/loss"] != two["val/loss"]
    assert two["val/local_pts_loss"] == one["val/local_pts_loss"]  # what is frozen does not move


def test_users_keys_validation_pictures_tensorboard_and_inference(make, scenes, tmp_path):
    """The memory knobs and upstream names; best weights; the event file read back; eval.py and infer.py on the result; permuted inputs."""
    folder = tmp_path / "run"
    output = run(*make(folder, "train.max_img_per_gpu=4", "train.image_num_range=[2,9]", "model.num_dec_blk_not_to_checkpoint=0",
                       "train.num_workers=1", "log.max_checkpoints=1", "max_steps=3", "validate_every=1",
                       "save_every=1", "vis_every=2", "amp=bf16"))  # fmt: skip
    assert "4 images at most a rank x 1 micro-batches x 1 ranks = 4 images a step, in samples of 2..4 views" in output
    assert "checkpointing decoder blocks 0..1" in output and "amp bfloat16" in output and output.count("auc@30") == 3
    assert not (folder / "checkpoint" / "00000001.pt").exists()
    assert torch.load(folder / "checkpoint" / "best.pt", weights_only=True)["step"] in (1, 2, 3)
    assert read_image(folder / "vis" / "step_00000002" / "train_image_truth_depth.png").any()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb")).Reload()
    assert {"loss/loss", "loss/normal_loss", "train/lr", "train/grad_norm", "time/data", "time/step", "mem/peak_gb", "val/auc@30",
            "val/point_error", "val/loss"} <= set(events.Tags()["scalars"])  # fmt: skip
    assert "train/image_truth_depth" in events.Tags()["images"] and [e.step for e in events.Scalars("loss/loss")] == [1, 2, 3]
    assert (folder / "config.yaml").exists() and "images a step" in (folder / "log.txt").read_text()

    images = scenes / "scene000" / "scene000" / "Easy" / "P000" / "image_left"
    output = run("pi3/infer.py", "--ckpt", folder, "--data_path", images, "--save_path", tmp_path / "out", "--pixel_limit", "3000",
                 "--edge", "none", "--chunk", "2", "--overlap", "1")  # fmt: skip
    assert "3 images of 70x42" in output
    stored = np.load(tmp_path / "out" / "cameras.npz")
    assert stored["camera_to_world"].shape == (3, 4, 4) and stored["intrinsics"].shape == (3, 3, 3) and stored["keep"].any()
    R = stored["camera_to_world"][:, :3, :3]
    assert np.abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max() < 1e-4
    head = (tmp_path / "out" / "points.ply").read_bytes()[:200].split(b"end_header")[0].decode()
    assert f"element vertex {stored['keep'].sum()}" in head and "property uchar red" in head
    assert len(list((tmp_path / "out" / "depth").iterdir())) == 3 and (read_image(tmp_path / "out" / "cameras.png") < 255).any()
    output = run("pi3/eval.py", "--ckpt", folder / "checkpoint" / "best.pt", "--kind", "tartanair", "--data", scenes, "--width", "56",
                 "--out", tmp_path / "rows.csv", "--max_points", "2000", "--permutation", "--pictures", tmp_path / "pictures",
                 ranks=2)  # fmt: skip
    assert "2 sequences" in output and "AUC@30" in output and "ate" in output and "abs_rel" in output and "nc" in output
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
    assert "median of the pairs: rotation" in output
    message = refusal("pi3/eval.py", "--ckpt", folder, "--kind", "tartanair", "--data", scenes, "--min_frames", "4")
    assert "no sequence of at least 4 usable frames" in message
    assert all(len(list((tmp_path / "pictures").glob(f"*_{kind}.png"))) == 2 for kind in ("depth", "map"))
    assert float(output.split("largest relative difference")[1].split()[0]) < 1e-4  # the order of the views does not matter


def settings(*words):
    return config.parse(["--config", str(ROOT / "pi3/configs/tiny.yaml"), *NET, *words], "", REFERENCE, aliases=ALIASES)


def test_wild_micro_batches_and_clipping(scenes):
    """Above clip_loss a micro-batch contributes nothing; clip_grad bounds the norm, 0 does not."""

    def step(*words):
        cfg = settings(*words)
        torch.manual_seed(0)
        model = build_model(cfg.model)
        before = checksum(model.parameters())
        optimizer = build_optimizer(model, cfg.train)
        batch = data.stack([read_sample(TartanAir(scenes), 0, np.random.default_rng(0), 2, (56, 42))])
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        out = train_step(model, None, [batch], optimizer, scaler, StepGuard(model), cfg, None, 0, 100)
        moved = sum(state["exp_avg"].square().sum() for state in optimizer.state.values()).sqrt() / (1 - 0.85)
        return out["grad_norm"], out["logged"], moved, checksum(model.parameters()) != before

    norm, logged, used, moved = step("train.clip_grad=0.1")
    assert norm > 0.2 and logged["clipped"] == 0 and used == pytest.approx(0.1, rel=0.01) and moved
    for none in ("0", "null"):
        assert step(f"train.clip_grad={none}")[2] == pytest.approx(float(norm), rel=0.01)
    norm, logged, used, _ = step("train.clip_loss=1e-3")
    assert norm == 0 and logged["clipped"] == 1 and used == 0 and "global_pts_loss" not in logged
    assert step("model.use_global_points=true")[1]["global_pts_loss"] > 0


def test_validation_counts_batches_names_bad_samples_and_scores_confidence(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    broken = tmp_path / "data/scene001/scene001/Easy/P000/image_left"
    for frame in broken.iterdir():
        frame.write_bytes(b"cut")
    torch.manual_seed(0)
    lines, bad, model = [], data.BadSamples(say=lambda line: lines.append(line)), Pi3(**WIDTHS, train_conf=True)
    sets = lambda count: [("tartanair", Mixture([TartanAir(tmp_path / "data")], [1.0], seed=0, train=False), count)]
    sky = lambda imgs: torch.ones(imgs[:, :, 0].shape, dtype=torch.bool)

    def scores(count: int, *words, sky=sky):
        cfg = settings("train.resolution=[56,42]", "train.max_img_per_gpu=2", "test_dataset.image_num=2", "workers=0", *words)
        return validate(model, sky, cfg, sets(count), torch.device("cpu"), None, bad)

    all_, first, two = scores(4), scores(4, "test.iters_per_test=2"), scores(2)
    assert first == two and all_ != two
    assert lines and len(set(lines)) == len(lines) and all(str(broken) in line for line in lines)
    soft, without = scores(2, "model.conf_target=exp"), scores(2, sky=None)
    assert soft["local_conf_loss"] != two["local_conf_loss"] and "local_conf_loss" not in without
    assert two["loss"] == pytest.approx(without["loss"] + 0.05 * two["local_conf_loss"])
    with torch.no_grad():
        model.conf_head.proj.bias += 1
    assert scores(2)["loss"] != two["loss"]


# whole sequences and inference


def evaluate(root, capsys, *words, code: int = 0):
    """What eval.py prints, in this process, for a run's folder and plain sequences."""
    with mock.patch.object(sys, "argv", ["eval.py", "--data", str(root), "--width", "56", *map(str, words)]):
        if code:
            with pytest.raises(SystemExit) as stop:
                evaluation.main()
            assert stop.value.code == code
        else:
            evaluation.main()
    return capsys.readouterr().out


@pytest.fixture
def sequences(tmp_path, monkeypatch):
    """Three plain sequences, and a network that knows nothing in place of the one that eval.py and infer.py would load."""
    torch.manual_seed(0)
    network = Pi3(**WIDTHS, train_conf=True).eval()
    for script in (evaluation, inference):
        monkeypatch.setattr(script, "load_model", lambda path, device: network)
    monkeypatch.setattr(dist, "init", lambda: torch.device("cpu"))
    for name in "abc":
        write_folder(tmp_path / "data" / name)
    return tmp_path / "data"


def test_evaluation_names_what_it_leaves_out(sequences, tmp_path, monkeypatch, capsys):
    words = "--ckpt", "none", "--metrics", "pose", "depth"
    monkeypatch.setattr(dist, "gather", lambda value: [value[1:], value[:1]])  # two ranks, the second had the first sequence
    (sequences / "b/color/001.jpg").write_bytes(b"cut")
    output = evaluate(sequences, capsys, *words, "--out", tmp_path / "new/rows.csv", code=1)
    assert "b/color/001.jpg" in output and "2 sequences" in output
    rows = (tmp_path / "new/rows.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["sequence", "a", "c"]
    shutil.rmtree(sequences / "b")
    for i in range(4):
        write(sequences / f"a/depth/{i:03d}.png", np.zeros((96, 128), np.uint16))
    output = evaluate(sequences, capsys, *words, "--metrics", "depth")
    assert "a: depth left out: no valid depth" in output and "abs_rel" in output
    write(sequences / "a/depth/001.png", np.full((48, 64), 2000, np.uint16))
    assert "image (96, 128) and depth (48, 64) differ in size" in evaluate(sequences, capsys, *words, code=1)
    for flag, value in (("--views", 1), ("--stride", 0), ("--min_frames", 1)):
        evaluate(sequences, capsys, *words, flag, value, code=f"{flag} {value}: must be at least {max(1, 2 - (flag == '--stride'))}")


def test_depth_options_of_the_evaluation(sequences, capsys):
    """Truth: 2 m, one frame 5 m; the network predicts about 1 m everywhere."""
    write(sequences / "a/depth/000.png", np.full((96, 128), 5000, np.uint16))

    def scored(*words) -> dict[str, float]:
        output = evaluate(sequences / "a", capsys, "--ckpt", "none", "--metrics", "depth", *words)
        names = output.split("depth  ")[1].split()
        return dict(zip(names[::2], map(float, names[1::2])))

    metric, near, median = scored("--align", "metric"), scored("--align", "metric", "--max_depth", "4"), scored("--align", "median")
    assert metric["rmse"] > near["rmse"] + 0.1 and median["abs_rel"] < metric["abs_rel"] - 0.1
    assert scored("--align", "metric", "--clip", "0.01")["abs_rel"] == pytest.approx(1, abs=0.01)
    assert scored("--align_lr", "0.5") != scored()


def test_evaluation_draws_and_resizes_as_the_official_protocol(sequences, monkeypatch, capsys):
    drawn, read = [], evaluation.read_views
    monkeypatch.setattr(evaluation, "read_views", lambda *args: drawn.append(args[2]) or read(*args))
    evaluate(sequences, capsys, "--ckpt", "none", "--metrics", "pose", "--views", "3")
    rng = np.random.RandomState(42)
    assert drawn == [rng.choice(4, 3, replace=False).tolist() for _ in "abc"]
    truth = read(RGBDFolder(sequences), 0, [0, 1], 66)  # 128x96, asked for 66 x 49.5
    assert truth["imgs"].shape == (1, 2, 3, 56, 56) and truth["measured"][0].shape == (96, 128)


class Parts(torch.nn.Module):
    """Gives the true points of images whose brightness is their number, every call in a frame and scale of its own."""

    def __init__(self, points, poses, conf):
        super().__init__()
        self.points, self.poses, self.conf, self.calls = points, poses, conf, 0

    def forward(self, imgs):
        which, g = (imgs[0, :, 0, 0, 0] * 255).round().long(), torch.Generator().manual_seed(self.calls)
        c = 1 + self.calls
        move = complete(torch.cat([nearest_rotation(torch.randn(3, 3, generator=g)), torch.randn(3, 1, generator=g)], 1))
        self.calls += 1
        local, poses = c * self.points[which], move @ rescale_poses(self.poses[which][None], torch.tensor([float(c)]))[0]
        out = {"local_points": local, "camera_poses": poses, "points": transform(poses, local), "conf": self.conf[which]}
        bad = self.conf[which][..., 0] < -5  # what is not sure is nonsense
        out["points"][bad & (bad.cumsum(-1) % 2 == 0)] = torch.nan
        out["points"][bad & (bad.cumsum(-1) % 2 == 1)] += torch.randn(3, generator=g)
        return {key: value[None] for key, value in out.items()}


@pytest.mark.parametrize("unsure", ["none", "half", "all"])
def test_parts_of_a_long_sequence_are_joined(unsure):
    """By the similarity between them, from the points that are sure; where all are unsure, from the surest tenth."""
    g = torch.Generator().manual_seed(9)
    depth = 2 + 0.2 * torch.rand(9, 1, 1, generator=g) + 0.02 * torch.rand(9, 14, 28, generator=g)
    points = unproject(depth, torch.tensor([[20.0, 0, 14], [0, 20, 7], [0, 0, 1]]))
    poses = complete(torch.cat([nearest_rotation(torch.randn(9, 3, 3, generator=g)), torch.randn(9, 3, 1, generator=g)], 2))
    conf = torch.full((9, 14, 28, 1), 2.0)
    conf[:, :7] = {"none": 2.0, "half": -9.0, "all": -4.0}[unsure]  # a logit of -4: unsure, and yet the surest there are
    conf[:, 7:] = {"none": 2.0, "half": 2.0, "all": -9.0}[unsure]
    images = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(14, 1).repeat(28, 2).repeat(3, 3)
    whole = inference.predict_chunks(Parts(points, poses, conf), images, 9, 1, torch.device("cpu"), None)
    merged = inference.predict_chunks(Parts(points, poses, conf), images, 4, 2, torch.device("cpu"), None)
    assert whole.keys() == merged.keys()
    for name in ("local_points", "camera_poses"):
        assert torch.allclose(merged[name], whole[name], atol=1e-4), name
    nothing = Parts(points * torch.nan, poses, conf)  # no point to go by: the parts stay as they come
    assert inference.predict_chunks(nothing, images, 4, 2, torch.device("cpu"), None)["camera_poses"].isfinite().all()


def test_inference_options(sequences, tmp_path):
    out = tmp_path / "out"

    def infer(*words) -> str:
        words = "--ckpt", "none", "--data_path", sequences / "a" / "color", "--save_path", out, "--pixel_limit", "2000", *words
        with mock.patch.object(sys, "argv", ["infer.py", *map(str, words)]):
            inference.main()
        return sorted(path.stem for path in (out / "depth").iterdir())

    (out / "depth").mkdir(parents=True)
    (out / "depth" / "mine.png").write_bytes(b"")
    assert infer("--conf", "0", "--edge", "none") == [*(f"{i:03d}" for i in range(6)), "mine"]
    most = np.load(out / "cameras.npz")["keep"].sum()
    head, body = (out / "points.ply").read_bytes().split(b"end_header\n")
    assert b"property float nz" in head and len(body) == most * 27
    assert infer("--interval", "4", "--conf", "0", "--edge", "none") == ["000", "004", "mine"]  # none of the earlier run, but yours
    assert infer("--conf", "0.9999", "--edge", "none") and np.load(out / "cameras.npz")["keep"].sum() < most
    for flag, value in (("--interval", 0), ("--interval", -1), ("--pixel_limit", 0)):
        with pytest.raises(SystemExit, match=f"{flag} {value}: must be at least"):
            infer(flag, value)


class FirstIsSpecial(torch.nn.Module):
    """A network whose first view is not like the others."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, imgs):
        out = self.model(imgs)
        return out | {"camera_poses": torch.cat([out["camera_poses"][:, :1] * 1.01, out["camera_poses"][:, 1:]], 1)}


def test_overfitted_network_knows_poses_and_points_and_not_the_order_of_its_views(scenes):
    """120 steps on one sample: relative poses and points fall to small values; permuted views then give permuted outputs."""
    sample = read_sample(TartanAir(scenes), 0, np.random.default_rng(5), 3, (56, 42), train=False)
    assert len(set(sample["frames"])) == 3
    batch, normals = unpack(data.stack([sample]), "cpu"), torch.tensor([True])
    truth = [batch[name] for name in ("local_points", "poses", "mask")]
    torch.manual_seed(0)
    model = Pi3(**WIDTHS)
    optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, 4e-3, 0.05), fused=True)
    before = sample_scores(predict(model.eval(), batch["imgs"]), batch)
    model.train()
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, 120, group["base_lr"])
        optimizer.zero_grad()
        pi3_loss(model(batch["imgs"]), *truth, normals)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = sample_scores(predict(model.eval(), batch["imgs"]), batch)
    assert np.median(before["rotation"]) > 5 > 10 * np.median(after["rotation"]), (before, after)
    assert np.median(before["translation"]) > 20 > 4 * np.median(after["translation"]), (before, after)
    assert before["point_error"] > 0.9 and after["point_error"] < 0.4, (before, after)

    out, order = predict(model, batch["imgs"]), torch.tensor([2, 0, 1])
    turned = predict(model, batch["imgs"][:, order])
    for name in ("local_points", "camera_poses", "points"):
        assert (turned[name] - out[name][:, order]).abs().max() < 1e-5 * out[name].abs().max(), name
        assert (turned[name] - out[name]).abs().max() > 1e-2 * out[name].abs().max(), name  # the views do differ
    assert permutation_difference(model, batch["imgs"]) < 1e-5 < 1e-3 < permutation_difference(FirstIsSpecial(model), batch["imgs"])


def test_copied_out_folder_trains_and_a_broken_image_is_replaced(make, scenes, tmp_path):
    """pi3/ and common/ side by side are enough; a corrupt frame is named once, counted, and the limit ends the run."""
    for name in ("pi3", "common"):
        shutil.copytree(ROOT / name, tmp_path / "elsewhere" / name, ignore=shutil.ignore_patterns("__pycache__"))
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    frame = root / "scene001" / "scene001" / "Easy" / "P000" / "image_left" / "000001_left.png"
    frame.write_bytes(frame.read_bytes()[:100])
    args = make(tmp_path / "run", f"data.tartanair.root={root}", *QUIET, "max_bad_fraction=1.0", "max_steps=4")
    output = run(*args, cwd=tmp_path / "elsewhere", PYTHONPATH="")
    assert output.count("bad sample replaced") == 1 and str(frame) in output
    assert metrics(tmp_path / "run")[4]["train/bad_samples"] >= 1
    output = run("pi3/dataset.py", "--check", root, "--out", tmp_path / "check.png", code=1)
    assert str(frame) in output and "1 problems" in output and read_image(tmp_path / "check.png").shape[1] > 600


def test_damaged_checkpoint_falls_back(straight, make, tmp_path):
    shutil.copytree(straight, tmp_path / "cut")
    newest = tmp_path / "cut" / "checkpoint" / "00000004.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    output = run(*make(tmp_path / "cut", *FOUR, "max_steps=4"))
    assert "00000004.pt is damaged" in output and "resumed at step 2" in output
    same_end(tmp_path / "cut", straight, 4)


def wrong(tmp_path, **changes):
    """The message of train.py, run in this process: what a user reads last."""
    settings = {"workspace": tmp_path / "bad", "workers": 0} | changes
    words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return refusal("pi3/train.py", "--config", "pi3/configs/tiny.yaml", *NET, *words)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__tartanair__root": "no/such"}, "no/such: no TartanAir sequence"),
        ({"train_dataset__weights__scannet": 1}, "data.scannet.root is not set"),
        ({"test_dataset__samples__co3d": 1}, "set test_dataset.samples.co3d=0"),
        ({"parallel": "dp"}, "parallel 'dp': expected ddp or fsdp"),
        ({"model__ckpt": "no/such.pt"}, "weights no/such.pt do not exist"),
        ({"model__load_vggt": "true"}, "huggingface.co/facebook/VGGT-1B"),
        ({"model__decoder_size": "base"}, "only large was published"),
        ({"model__dec_dim": 96}, "enc_dim 48 and dec_dim 96 differ"),
        ({"model__num_dec_blk_to_checkpoint": 1, "model__num_dec_blk_not_to_checkpoint": 1}, "give one of them"),
        ({"train__max_img_per_gpu": 1}, "train.max_img_per_gpu is 1"),
        ({"train__resolution": "[50,42]"}, "train.resolution is [50, 42]: expected null, or width and height in multiples of 14"),
        ({"train__resolution": "[224]"}, "train.resolution is [224]"),
        ({"train": "{resolution: null, pixel_count_range: [10, 20]}"}, "no image size lies within both"),
        ({"train__image_num_range": "[1,4]"}, "train.image_num_range is [1, 4]: expected two numbers of views, at least 2"),
        ({"train__image_num_range": "[4,2]"}, "train.image_num_range is [4, 2]"),
        ({"test_dataset__image_num": 1}, "test_dataset.image_num is 1: expected 2 views or more"),
        ({"train__gradient_accumulation_steps": 0}, "train.gradient_accumulation_steps is 0: expected 1 or more"),
        ({"train__num_epoch": 0}, "train.num_epoch is 0: expected 1 or more"),
        ({"train__optimizer__betas": "[0.9]"}, "train.optimizer.betas is [0.9]: expected two numbers"),
        ({"train_dataset__aug_focal": 1.5}, "train_dataset.aug_focal is 1.5: expected 0 (off) to 1"),
        ({"train__clip_grad": -1}, "train.clip_grad is -1.0"),
        ({"model__enc_heads": 5}, "enc_dim 48 does not divide into enc_heads 5"),
        ({"checkpoint": 77}, "00000077.pt is missing"),
        ({"train__optimizer": "{lr: 1e30, encoder_lr: 1e30}", "max_bad_steps": 2}, "(sequences of this process: TarTanAir/scene00"),
    ],
)
def test_wrong_input_is_named(scenes, tmp_path, changes, message):
    data = {"data__tartanair__root": scenes, "data__tartanair__test_root": scenes / "val", "model__num_dec_blk_not_to_checkpoint": "null"}
    assert message in wrong(tmp_path, **(data | changes))


def test_official_names_of_keys():
    cfg = settings("train.random_reslution=5", "test.iters_per_test=3", "train.num_workers=2")
    assert (cfg.train.num_resolution, cfg.test_dataset.iters_per_test, cfg.workers) == (5, 3, 2)


def test_misspelt_keys_are_answered_with_the_nearest(tmp_path, capsys):
    wrong(tmp_path, train__max_img_per_gpus=3)
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.slow
def test_tiny_network_learns_and_compiles(make, scenes, tmp_path):
    """From scratch, on the sequences it is scored on: poses and points come out well above the start; compiled blocks give the same."""
    args = make(tmp_path / "run", f"data.tartanair.test_root={scenes}", "train_dataset.augment=false", "test_dataset.samples.tartanair=8",
                "train.num_epoch=3", "train.optimizer={lr: 2e-3, encoder_lr: 2e-3}", "validate_every=50", "log_every=50")  # fmt: skip
    run(*args, "max_steps=1")
    run(*args, "max_steps=300")
    start, end = (metrics(tmp_path / "run")[step] for step in (1, 300))
    assert end["val/auc@30"] > start["val/auc@30"] + 20 and end["val/point_error"] < 0.6 * start["val/point_error"], (start, end)
    one, two = (make(tmp_path / name, *QUIET, "max_steps=2", *more) for name, more in (("eager", ()), ("compiled", ("compile=true",))))
    run(*one)
    run(*two, timeout=600)
    assert metrics(tmp_path / "eager")[2]["loss/loss"] == pytest.approx(metrics(tmp_path / "compiled")[2]["loss/loss"], rel=1e-3)
