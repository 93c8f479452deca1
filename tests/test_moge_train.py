"""moge/train.py, eval.py and infer.py as a user runs them: real processes, real signals, generated images."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, checkpoint, difference, generated, metrics, run, run_until_sigterm, same_end

from common import config
from common.io import read_image
from moge.draw import depth_picture, error_picture, normal_picture, panel
from moge.eval import evaluate, list_samples, read_sample, summary
from moge.io import write_depth
from moge.loss import total_loss
from moge.metrics import boundary_f1, delta1_depth
from moge.model import build
from moge.optimization import update_ema

NET = {
    "encoder": "dinov2_vits14",
    "encoder_options": {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 56},
    "intermediate_layers": [0, 1],  # the third block does not run
    "dim_proj": 32,
    "dim_upsample": [32],
    "remap_output": "exp",
    "num_tokens_range": [12, 20],
}
SMALL = ("--model", json.dumps(NET), "--data.image_sizes", "[[56,42]]", "--batch_size_forward", "1", "--log_every", "1", "--vis_every", "0")
TINY = ("moge/train.py", "--config", "moge/configs/tiny.yaml", *SMALL, "--data.val_datasets", "[]")
STRAIGHT = ("--gradient_accumulation_steps", "2", "--save_every", "2", "--keep_last", "9")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return generated(tmp_path_factory, "moge", "--scenes", "6", "--val_scenes", "2", "--size", "64x80")


@pytest.fixture
def tiny(images, tmp_path):
    """Arguments of a small run into tmp_path / name."""
    return lambda name, *more: (*TINY, "--data.datasets.0.path", images, "--workspace", tmp_path / name, *more)


@pytest.fixture(scope="session")
def straight(images, tmp_path_factory):
    """A run of 4 steps of 2 images on one process without a stop, saved every 2 steps: what every other run is compared with."""
    folder = tmp_path_factory.mktemp("straight")
    run(*TINY, "--data.datasets.0.path", images, "--workspace", folder, *STRAIGHT, "--max_steps", "4")
    return folder


def test_stopped_and_resumed_run_is_bit_identical(tiny, tmp_path, straight):
    args = tiny("resumed", *STRAIGHT, "--max_steps", "4")
    run_until_sigterm(tmp_path / "resumed", *args)
    assert "resumed at step" in run(*args, "--workers", "0")
    same_end(tmp_path / "resumed", straight, 4)
    names = {path.name for path in (straight / "checkpoint").iterdir()}
    assert names == {"latest.pt", *(f"0000000{n}{part}.pt" for n in (2, 4) for part in ("", "_optimizer", "_ema"))}
    last, early = checkpoint(straight, 4), checkpoint(straight, 2)
    assert last["model_config"] == NET and checkpoint(straight, 4, "optimizer")["ema_updates"] == 4
    assert "lr_lambda" in checkpoint(straight, 4, "optimizer")["lr_scheduler"]["params"]
    averaged, plain = checkpoint(straight, 4, "ema")["model"], last["model"]
    weight = "head.projects.0.weight"
    assert averaged.keys() == plain.keys() and not torch.equal(averaged[weight], plain[weight])
    drift = (averaged[weight] - early["model"][weight]).norm() / (plain[weight] - early["model"][weight]).norm()
    assert drift < 0.5  # the average lags behind: a resume has not replaced it
    assert torch.equal(plain["backbone.blocks.2.mlp.fc1.weight"], early["model"]["backbone.blocks.2.mlp.fc1.weight"])


def test_two_ranks_train_on_the_samples_of_one_and_back(tiny, tmp_path, straight):
    """1 a rank x 2 ranks are the 2 micro-batches of one rank: only the patches' anchors differ."""
    output = run(*tiny("two", "--max_steps", "2"), ranks=2)
    assert "1 a rank x 1 micro-batches x 2 ranks = 2 images a step" in output
    a, b = metrics(straight)[1], metrics(tmp_path / "two")[1]
    for name in ("global", "global.delta", "normal", "mask_l2"):  # the mean over images, in whatever process
        assert a[f"loss/{name}"] == pytest.approx(b[f"loss/{name}"], rel=1e-4), name
    assert a["loss/loss"] == pytest.approx(b["loss/loss"], rel=0.1) and a["train/grad_norm"] != b["train/grad_norm"]
    assert "resumed at step 2" in run(*tiny("two", "--gradient_accumulation_steps", "2", "--max_steps", "3"))


def test_users_command_pictures_and_tensorboard(images, tmp_path):
    """The document's command and configuration on two ranks, and what the run leaves behind."""
    folder = tmp_path / "v1"
    entry = {"path": str(images), "weight": 1}
    datasets = [
        {**entry, "name": "exact", "label_type": "synthetic", "index": ".train.txt", "fov_range_relative": [0.5, 1.0]},
        {**entry, "name": "sparse", "label_type": "lidar", "depth": "depth"},
    ]
    flags = "--checkpoint latest --gradient_accumulation_steps 2 --batch_size_forward 2 --enable_gradient_checkpointing True"
    output = run(
        *("moge/train.py", "--config", "moge/configs/v1.json", "--workspace", folder, *flags.split()),
        *("--vis_every", "2", "--enable_mlflow", "True", "--num_vis_images", "2", "--allow_random_backbone", "true"),
        *("--data.datasets", json.dumps(datasets), "--data.image_sizes", "[[56,42],[42,56]]", "--max_steps", "2", "--workers", "1"),
        *("--model", json.dumps(NET), "--log_every", "1", "--enable_mixed_precision", "True", "--validate_every", "2"),
        *("--data.val_datasets", f"[{{name: val, path: {images}, split: .val.txt, width: 56, height: 42}}]", "--validate_images", "1"),
        ranks=2,
    )
    for line in ("MoGe v1", "= 8 images a step", "steps 0..2 of 1000000", "amp bfloat16", "logging to TensorBoard"):
        assert output.count(line) == 1, line
    row = metrics(folder)[2]
    wanted = {"loss/loss", "loss/global", "loss/patch_4", "loss/mask_l2", "loss/global.delta", "loss/monitoring.std", "val/fov_x_mae"}
    assert wanted | {"val/points_affine_invariant_rel", "train/grad_norm", "train/skipped", "time/data", "mem/peak_gb"} <= row.keys()
    assert row["train/lr"] == 1e-4 and row["train/lr_1"] == 0  # the backbone waits 1000 steps
    assert "step 2: points_affine_invariant" in output
    first, second = checkpoint(folder, 2)["model"], metrics(folder)[1]
    assert second["loss/loss"] > 0 and first.keys() == checkpoint(folder, 2, "ema")["model"].keys()
    info = json.loads((folder / "vis/gt/0001/info.json").read_text())
    assert info["label_type"] in ("synthetic", "lidar") and len(info["intrinsics"]) == 3
    for step in (1, 2):  # the first and every second
        for name in ("image.jpg", "depth_vis.png", "normal_vis.png", "mask.png"):
            assert (folder / f"vis/step_{step:08d}/0001" / name).stat().st_size > 0
    shapes = [np.load(folder / "vis" / name / "0001" / "points.npy").shape for name in ("gt", "step_00000002")]
    assert shapes[0] == shapes[1] == read_image(folder / "vis/gt/0001/normal.png").shape
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb")).Reload()
    assert {"loss/loss", "loss/global", "train/lr", "time/step", "val/depth_scale_invariant_rel"} <= set(events.Tags()["scalars"])
    assert "vis/image_truth_depth_normals_error_mask" in events.Tags()["images"]
    assert [e.step for e in events.Scalars("loss/loss")] == [1, 2]


def test_backward_pass_of_a_waiting_encoder_can_be_left_out(images, tiny, tmp_path):
    """Head and encoder end as without the option while the encoder waits, and it trains from its turn on, on two ranks."""
    groups = [{"params": {"include": ["*"], "exclude": ["*backbone.*"]}, "lr": 1e-3}, {"params": {"include": ["*backbone.*"]}, "lr": 1e-3}]
    more = ("--optimizer.params", json.dumps(groups), "--lr_scheduler.params.lr_lambda", json.dumps(["1", "min(max(epoch - 1, 0), 1)"]))
    more += ("--grad_clip", "1e9", "--save_every", "1", "--keep_last", "9", "--max_steps", "3", "--workers", "0")
    run(*tiny("all", *more), ranks=2)
    run(*tiny("less", *more, "--skip_zero_lr_backward", "true"), ranks=2)
    for step in (1, 2):
        assert difference(checkpoint(tmp_path / "all", step)["model"], checkpoint(tmp_path / "less", step)["model"]) == []
    before, after = (checkpoint(tmp_path / "less", step)["model"]["backbone.blocks.0.attn.qkv.weight"] for step in (2, 3))
    assert not torch.equal(before, after)
    assert len(checkpoint(tmp_path / "all", 2, "optimizer")["optimizer"]["state"]) > len(
        checkpoint(tmp_path / "less", 2, "optimizer")["optimizer"]["state"]
    )


V2 = {
    "encoder": {
        "backbone": "dinov2_vits14",
        "intermediate_layers": [0, 2],
        "dim_out": 32,
        "encoder_options": NET["encoder_options"],
    },
    "neck": {"dim_in": [34, 2], "dim_out": None, "dim_res_blocks": [32, 32], "num_res_blocks": [0, 1], "resamplers": "bilinear"},
    **{
        head: {"dim_in": [32, 32], "dim_out": [None, c], "dim_res_blocks": [32, 32], "num_res_blocks": 0, "resamplers": "bilinear"}
        for head, c in (("points_head", 3), ("normal_head", 3), ("mask_head", 1))
    },
    "scale_head": {"dims": [48, 16, 1]},
    "remap_output": "exp",
    "num_tokens_range": [12, 20],
}


def test_version_2_trains_and_is_fine_tuned_with_another_head(images, tmp_path):
    """The published MoGe-2 losses, metric data; `init` takes what fits and names what does not."""
    entry = {"name": "metric", "path": str(images), "label_type": "synthetic", "depth_unit": 1.0}
    args = ["moge/train.py", "--config", "moge/configs/v2.json", "--data.datasets", json.dumps([entry]), *SMALL, "--max_steps", "1"]
    args += ["--allow_random_backbone", "true", "--loss.synthetic.patch_64.params.num_patches", "64", "--workers", "0"]
    run(*args, "--model", json.dumps(V2), "--workspace", tmp_path / "a", ranks=2)
    row = metrics(tmp_path / "a")[1]
    assert {"loss/normal_map", "loss/metric_scale", "loss/mask", "loss/patch_64"} <= row.keys() and row["loss/metric_scale"] > 0
    start_from = tmp_path / "a" / "checkpoint" / "00000001.pt"
    less = json.dumps({k: v for k, v in V2.items() if k != "normal_head"})
    output = run(*args, "--model", less, "--workspace", tmp_path / "b", "--init", start_from, code=None)
    assert "does not fit this model" in output and "unexpected normal_head" in output
    args += ["--loss.synthetic.normal_map.weight", "0", "--loss.synthetic.normal_map.function", "normal_loss"]
    output = run(*args, "--model", less, "--workspace", tmp_path / "b", "--init", start_from, "--init_allow", "['normal_head.*']")
    assert "model differs from the config's: normal_head" in output and "weights: unexpected normal_head" in output
    output = run("moge/eval.py", "--checkpoint", start_from, "--data", images, "--split", ".val.txt", "--limit", "1", "--depth_unit", "1",
                 "--width", "56", "--height", "42", "--segmentation", "--sharp", "--json", tmp_path / "r.json")  # fmt: skip
    for name in ("depth_metric rel", "points_metric delta1", "boundary radius1_f1", "fov_x mae"):
        assert name in output
    assert json.loads((tmp_path / "r.json").read_text())["results"][images.name]["00000001"]["depth_metric"]["rel"] > 0


def test_copied_out_folder_trains(tiny, tmp_path):
    """moge/ and common/ side by side are enough."""
    for name in ("moge", "common"):
        shutil.copytree(ROOT / name, tmp_path / "elsewhere" / name)
    never = ("--log_every", "0", "--save_every", "0", "--validate_every", "0")  # but at the end
    run(*tiny("run", "--max_steps", "1", *never), cwd=tmp_path / "elsewhere", PYTHONPATH="")
    assert (tmp_path / "run" / "checkpoint" / "00000001.pt").exists()


WRONG = [
    ("--data.datasets.0.path no/such/folder", "no/such/folder"),
    ("--data.datasets []", "no data set with a weight above 0"),
    ("--data.datasets.0.wieght 2", "did you mean 'weight'"),
    ("--data.datasets.0.label_type depth", "label type 'depth' is not in the loss table"),
    ("--data.image_augmentation [blur]", "unknown image_augmentation 'blur'"),
    ("--num_iteration 3", "num_iterations"),
    ("--batch_size_forward many", "batch_size_forward"),
    ("--loss.synthetic.global.function l7", "unknown function 'l7'; one of affine_invariant_global_loss"),
    ("--loss.synthetic.global.wight 2", "needs function and weight"),
    ("--lr_scheduler.type Magic", "lr_scheduler 'Magic'"),
    ("--lr_scheduler.params.lr_lambda __import__('os')", "is not allowed"),
    ("--optimizer.type Magic", "optimizer type 'Magic'"),
    ("--optimizer.params.0.params.include [nothing*]", "are in no optimizer group"),
    ("--model.remap_output cube", "unknown remap_output 'cube'"),
    ("--model.encoder dinov2_vitx14", "no DINOv2 variant named"),
    ("--model_version v2", "describes MoGe v1, but v2 was asked for"),
    ("--enable_gradient_checkpointing some", "none, backbone, head or all"),
    ("--allow_random_backbone false", "give --backbone_weights dinov2_vits14_pretrain.pth, --init"),
    ("--backbone_weights no/such.pth", "no/such.pth"),
    ("--amp fp8", "amp must be"),
    ("--checkpoint no/such.pt", "no/such.pt"),
    ("--checkpoint 77", "77"),
    ("--init no/such.pt", "no/such.pt"),
    ("--init WIDER", "head.projects.0.bias is (32,), not (64,)"),
    ("--data.val_datasets [{path:nowhere,split:.val.txt}]", "nowhere"),
    ("--data.val_datasets [{path:PATH,splits:.val.txt}]", "unknown key 'splits'"),
    ("--data.val_datasets [{path:PATH,width:wide}]", "width must be a whole number from 14 on, not 'wide'"),
    ("--data.datasets [generated]", "must be keys and values"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0"),
    ("--loss.synthetic.mask_l2.function mask_bce_loss", "mask_bce_loss needs mask_logit"),
    ("--lr_scheduler.params.lr_lamda 1", "'lr_lamda' is unknown"),
    ("--init PATH/val/0000/image.jpg", "image.jpg is no MoGe checkpoint"),
]


def test_wrong_input_is_named(tiny, images, tmp_path, straight):
    """All in one process, which tells what each command line comes to."""
    wider = f"{straight / 'checkpoint' / '00000004.pt'} --model.dim_proj 64"
    cases = []
    for number, (options, _) in enumerate(WRONG):
        words = [word.replace(":", ": ") if word[0] == "[" else word for word in options.replace("WIDER", wider).split()]
        words = [word.replace("PATH", str(images)) for word in words]
        cases.append([*map(str, tiny(f"bad{number}", "--max_steps", "1", "--workers", "0")[1:]), *words])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    code = (
        "import json, sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'moge'); import train\n"
        "for number, argv in enumerate(json.load(open(sys.argv[1]))):\n"
        "    sys.argv = ['train.py', *argv]\n"
        "    try:\n        train.main(); print(f'CASE {number}: ran')\n"
        "    except BaseException as error:\n"
        "        print(f'CASE {number}: {type(error).__name__} {error}'.replace(chr(10), ' '), flush=True)\n"
        "    sys.stderr.flush()\n"
    )
    output = run("-c", code, tmp_path / "cases.json")
    for number, (options, message) in enumerate(WRONG):
        before, after = output.split(f"CASE {number}: ", 1)
        lines = before.rsplit("CASE ", 1)[-1] + after.split("\n")[0]
        assert message in lines and f"CASE {number}: ran" not in output, f"{options}: {lines}"


def test_corrupt_images_are_replaced_counted_and_limited(images, tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(images, root)
    image = root / "train" / "0002" / "image.jpg"
    image.write_bytes(image.read_bytes()[:100])
    output = run(*tiny("run"), "--data.datasets.0.path", root, "--max_steps", "6", "--max_bad_fraction", "1.0")
    assert output.count("bad sample replaced") == 1 and str(image) in output
    assert metrics(tmp_path / "run")[6]["train/bad_samples"] >= 1
    for depth in (root / "train").glob("*/depth.png"):
        depth.unlink()
    assert "attempts failed" in run(*tiny("none", "--workers", "0"), "--data.datasets.0.path", root, "--max_steps", "1", code=None)


# ------------------------------------------------------------------------------------------------------------ parts of it


def make_batch(height: int = 42, width: int = 56) -> dict:
    g = torch.Generator().manual_seed(0)
    depth = 2 + torch.rand(2, height, width, generator=g)
    depth[:, :8, :9] = torch.inf
    K = torch.tensor([[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]]).expand(2, 3, 3)
    batch = {"image": torch.rand(2, 3, height, width, generator=g), "depth": depth, "intrinsics": K}
    batch |= {"depth_mask_fin": depth.isfinite(), "depth_mask_inf": depth.isinf(), "normal": torch.full((2, height, width, 3), 0.6)}
    return batch | {"label_type": ["a", "a"], "is_metric": [True, True]}


def gradients(model, table: dict) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    batch = make_batch()
    loss, _ = total_loss({"a": table}, model(batch["image"], 12), batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("section", [NET, V2], ids=["v1", "v2"])
def test_compiled_blocks_change_nothing(section):
    torch.manual_seed(0)
    model = build(section)
    table = dict(config.read(ROOT / "moge" / "configs" / ("v1.json" if section is NET else "v2.json")).loss.synthetic)
    table.pop("patch_64")
    if model.version == "v2":  # there, at random weights, a change of the weights by 1e-6 turns this loss's whole gradient
        table.pop("normal")
    plain = gradients(model, table)
    names = list(model.state_dict())
    model.compile_blocks()
    for mode in ("none", "all"):
        model.set_gradient_checkpointing(mode)
        compiled = gradients(model, table)
        assert torch.allclose(compiled[0], plain[0], rtol=1e-4) and (compiled[1] != 0).float().mean() > 0.9
        assert (compiled[1] - plain[1]).norm() < 1e-3 * plain[1].norm()
    assert list(model.state_dict()) == names


def test_averages_skip_bad_steps_and_go_on_after_a_resume():
    average, current = [torch.ones(3)], [torch.tensor([3.0, 3.0, 3.0])]
    assert update_ema(average, current, 5, 0.9, skip=torch.tensor(1.0)) == 6 and average[0].tolist() == [1, 1, 1]
    update_ema(average, current, 5, 0.9, skip=torch.tensor(0.0))
    assert torch.allclose(average[0], torch.full((3,), 1.2))
    update_ema(average, current, 0, 0.9, skip=torch.tensor(0.0))  # the first update copies
    assert average[0].tolist() == [3, 3, 3]


def test_published_configs_build_the_published_networks():
    """Parameter counts of the two ViT-L models, and the loss tables and schedules are sound."""
    from moge.loss import check_table
    from moge.optimization import lr_factors

    counts = {}
    for name in ("v1", "v2", "finetune"):
        cfg = config.read(ROOT / "moge" / "configs" / f"{name}.json")
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in build(dict(cfg.model), cfg.model_version).parameters())
        check_table(cfg.loss, [entry.label_type for entry in cfg.data.datasets])
        assert len(lr_factors(cfg.lr_scheduler, 1500, 2)) == 2
        assert cfg.loss.invalid == {}
    assert counts == {"v1": 314_174_020, "v2": 330_901_544, "finetune": 314_174_020}
    assert lr_factors(config.read(ROOT / "moge/configs/v1.json").lr_scheduler, 1500, 2) == [1.0, 0.5]


def test_pictures_show_near_in_red_and_unknown_in_black():
    depth = np.tile(np.linspace(1, 10, 40, dtype=np.float32), (30, 1))
    depth[0, 0], depth[1, 1], depth[2, 2] = np.nan, np.inf, -1
    picture = depth_picture(depth)
    assert not picture[[0, 1, 2], [0, 1, 2]].any() and picture[5, 1, 0] > picture[5, 1, 2] and picture[5, 38, 2] > picture[5, 38, 0]
    normal = np.zeros((2, 2, 3), np.float32)
    normal[0, 0] = 0, 0, -1
    assert normal_picture(normal)[0, 0].tolist() == [127, 127, 255] and not normal_picture(normal)[1, 1].any()
    assert not error_picture(depth, depth, np.zeros_like(depth, bool)).any()
    points = np.stack([depth, depth, depth], -1)
    mask = np.zeros_like(depth, bool)  # nothing known: still a picture
    assert panel(np.zeros((30, 40, 3), np.uint8), depth, mask, {"depth": depth, "points": points, "mask": mask}).shape[1] > 6 * 40


def test_infer_writes_instances_and_names_what_it_cannot_use(images, straight, tmp_path, monkeypatch, capsys):
    """An image of a folder, a panorama; what is written is an instance of the data format."""
    from moge.io import read_instance

    weights = straight / "checkpoint" / "latest.pt"
    (tmp_path / "photos").mkdir()
    for i in range(2):
        shutil.copy(images / "val" / f"000{i}" / "image.jpg", tmp_path / "photos" / f"{i}.jpg")
    (tmp_path / "photos" / "0a.jpg").write_bytes(b"no image")
    args = ("moge/infer.py", "--pretrained", weights, "-i", tmp_path / "photos", "-o", tmp_path / "out", "--fov_x", "60")
    output = run(*args, "--device", "cpu", ranks=2, code=1)
    assert output.count("field of view 60.0 x") == 2 and output.count("0a.jpg: not a readable image") == 1  # each image by one rank
    folder = tmp_path / "out" / "1"
    made, points = read_instance(folder), np.load(folder / "points.npy")
    depth, mask = np.load(folder / "depth.npy"), read_image(folder / "mask.png")[..., 0] > 0
    assert points.shape == (64, 80, 3) and (np.isfinite(depth) == mask).all() and np.allclose(points[mask][:, 2], depth[mask])
    assert np.allclose(made["depth"][mask], depth[mask], rtol=1e-3) and np.isnan(made["depth"][~mask]).all()
    assert made["intrinsics"][0, 0] == pytest.approx(0.5 / np.tan(np.pi / 6), rel=1e-5)
    assert (folder / "pointcloud.ply").read_bytes().startswith(b"ply") and json.loads((folder / "fov.json").read_text())["fov_x"] == 60
    wide = np.tile(read_image(images / "val/0000/image.jpg"), (1, 2, 1))[:, :128]
    from common.io import write_image

    write_image(tmp_path / "panorama.png", wide)
    output = run("moge/infer.py", "--pretrained", weights, "-i", tmp_path / "panorama.png", "-o", tmp_path / "out", "--panorama")
    args = ("moge/infer.py", "--pretrained", weights, "-i", images / "val/0000/image.jpg", "-o", tmp_path / "out", "--panorama")
    assert "80 x 64 pixels are no panorama" in run(*args, code=1)
    assert "panorama, " in output and np.load(tmp_path / "out/panorama/distance.npy").shape == wide.shape[:2]
    assert "no such image" in run("moge/infer.py", "--pretrained", weights, "-i", tmp_path / "x.jpg", "-o", tmp_path / "out", code=None)
    from moge import infer

    for words in ("--fov_x 200", "--fov_x 0", "--num_tokens -5", "--num_tokens 1", "--resolution_level 100", "--resize -5"):
        monkeypatch.setattr(sys, "argv", ["infer.py", "--checkpoint", "m.pt", "-i", "x", "-o", "y", *words.split()])
        with pytest.raises(SystemExit):
            infer.main()
        assert f"error: {words.split()[0]}" in capsys.readouterr().err
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 not whole")
    output = run("moge/infer.py", "--pretrained", tmp_path / "half.pt", "-i", tmp_path / "photos", "-o", tmp_path / "out", code=None)
    assert "half.pt" in output and "Traceback" not in output


def test_eval_shares_the_images_out_and_writes_rows_and_protocol(images, straight, tmp_path):
    weights = straight / "checkpoint" / "00000004_ema.pt"
    common = ("moge/eval.py", "--checkpoint", weights, "--data", images, "--split", ".val.txt", "--width", "56", "--height", "42")
    output = run(
        *common, "--baselines", "--out", tmp_path / "rows.csv", "--json", tmp_path / "r.json", "--pictures", tmp_path / "pictures", ranks=2
    )
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 and "constant plane" in output and "points_affine_invariant rel %" in output
    result = json.loads((tmp_path / "r.json").read_text())
    assert (
        "64 x 64" in result["protocol"] and result["sets"][images.name]["width"] == 56 and len(list((tmp_path / "pictures").iterdir())) == 2
    )
    mine = result["mean"]["00000004_ema"]
    assert mine["fov_x"]["mae"] > 0 and mine["points_affine_invariant"]["rel"] <= mine["points_scale_invariant"]["rel"] + 0.05
    poor = tmp_path / "poor"
    shutil.copytree(images, poor)
    write_depth(poor / "val/0000/depth.png", np.full((64, 80), np.nan, np.float32))
    (poor / "val/0001/image.jpg").write_bytes(b"no image")
    (poor / ".val.txt").write_text("val/0000\nval/0001\ntrain/0000\n")
    sets = {
        "val": {"path": str(poor), "split": ".val.txt", "width": 56, "height": 42, "include_normal": True},
        "train": {"path": str(images), "width": 56, "height": 42},
    }
    (tmp_path / "sets.json").write_text("# mine\n" + json.dumps(sets))
    (tmp_path / "flat.py").write_text(
        "import torch\nclass Baseline:\n    def __call__(self, image, K):\n"
        "        return {'depth_affine_invariant': torch.ones(image.shape[:2])} if K is None else 0\n"
    )
    args = ("moge/eval.py", "--config", tmp_path / "sets.json", "--baseline", tmp_path / "flat.py", "--limit", "3")
    both = run(*args, "--fov_augmentation", "3", "--json", tmp_path / "both.json", "--dump_pred", "--dump_gt", code=1)
    assert "mean of the 2 sets" in both and "val: mean of 1 images; left out: 1 without depth, 1 unreadable" in both
    result = json.loads((tmp_path / "both.json").read_text())
    assert result["images"]["val"]["flat"]["depth_affine_invariant"] == {"rel": 1, "delta1": 1}
    assert result["left_out"]["val"].keys() == {"val/0000", "val/0001"} and result["left_out"]["train"] == {}
    assert np.load(tmp_path / "both/val/train/0000/flat.npz")["depth_affine_invariant"].shape == (42, 56)
    assert np.load(tmp_path / "both/val/train/0000/gt.npz")["points"].shape == (42, 56, 3)
    assert "no-such" in run(*common[:3], "--data", tmp_path / "no-such", code=None)


def test_eval_that_breaks_off_leaves_the_means_so_far(images, tmp_path, monkeypatch):
    from moge import eval as command

    (images / ".long.txt").write_text("val/0000\n" * 101)

    def evaluate(methods, samples, *rest):
        if len(samples) < 100:
            raise OSError("no more")
        return [{"set": "s", "image": "i", "method": "constant plane", "seconds": 1.0, "depth.rel": 0.5}]

    monkeypatch.setattr(command, "evaluate", evaluate)
    words = ["--data", str(images), "--split", ".long.txt", "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    with pytest.raises(SystemExit, match="no more"):
        command.main()
    assert json.loads((tmp_path / "r.json").read_text())["mean"]["constant plane"] == {"depth": {"rel": 0.5}}


WRONG_SETS = [
    ("a list", "keys and values"),
    ({"split": ".val.txt"}, "needs a path"),
    ({"width": "640"}, "width must be a whole number"),
    ({"height": -5}, "height must be"),
    ({"subset": 0}, "subset must be a whole number from 1 on"),
    ({"depth_unit": 0}, "depth_unit must be a number above 0"),
    ({"depth_unit": -1.0}, "depth_unit must be"),
    ({"drop_max_depth": "far"}, "drop_max_depth must be"),
    ({"splits": 1}, "unknown key 'splits'"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG_SETS, ids=[message for _, message in WRONG_SETS])
def test_wrong_evaluation_sets_are_named(images, entry, message):
    if isinstance(entry, dict) and "split" not in entry:
        entry = {"path": str(images)} | entry
    with pytest.raises(ValueError, match=message):
        list_samples(entry)


def test_metrics_of_absurd_predictions():
    """Negative depth is never right, NaN is no edge, and an infinite error stays in the mean, which only NaN leaves."""
    assert delta1_depth(torch.tensor([-1.0, 1.0]), torch.ones(2)) == 0.5
    gt, nan = torch.ones(12, 12), torch.full((12, 12), torch.nan)
    gt[:, 6:] = 2
    assert boundary_f1(gt, gt, gt > 0, 1) == pytest.approx(1) and boundary_f1(nan, gt, gt > 0, 1) == 0
    rows = [{"method": "a", "seconds": 1.0, "depth.rel": value} for value in (1.0, np.nan, np.inf)]
    found = summary([*rows[:2], {"method": "a", "left_out": "no depth"}], "a")
    assert found["mean"] == {"depth": {"rel": 1.0}} and found["images"] == {"depth": {"rel": 1}}
    assert summary(rows, "a")["mean"]["depth"]["rel"] == np.inf and summary(rows[1:2], "a")["mean"] == {}


def test_oracle_knows_the_camera_and_a_perfect_prediction_scores_zero(images):
    samples = list_samples({"path": str(images), "split": ".val.txt", "width": 56, "height": 42, "depth_unit": 1.0})
    truth = {name: read_sample(sample) for name, sample in enumerate(samples)}
    assert all(gt["depth_mask"].float().mean() > 0.3 for gt in truth.values())

    def perfect(image, intrinsics):
        gt = next(gt for gt in truth.values() if np.array_equal(gt["image"], image))
        return {"points_metric": gt["points"], "depth_metric": gt["depth"], "intrinsics": gt["intrinsics"]}

    mean = summary(evaluate({"perfect": perfect}, samples), "perfect")["mean"]
    for name in ("depth_metric", "points_metric", "points_affine_invariant", "depth_affine_invariant"):
        assert mean[name]["rel"] < 1e-4 and mean[name]["delta1"] > 0.9999, name
    assert mean["fov_x"]["mae"] == 0
