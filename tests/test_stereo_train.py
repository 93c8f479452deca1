"""stereo/train.py, eval.py and infer.py as a user runs them: real processes, real signals, generated pairs."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import ROOT, checkpoint, generated, metrics, run, run_until_sigterm, same_end

from common import dist
from common.config import read
from common.io import read_image, write_image
from stereo import recipe
from stereo.codec import encode_pfm
from stereo.ema import make_ema, update_ema
from stereo.formats import list_pairs, read_disparity, read_views
from stereo.model import FoundationStereo

TINY = (
    "stereo/train.py",
    "--config",
    "stereo/configs/tiny.yaml",
    "--model.max_disp",
    "32",
    "--model.hidden_dims",
    "[16,16,16]",
    "--train_iters",
    "2",
    "--valid_iters",
    "2",
    "--data.image_sizes",
    "[[64,64]]",
    "--batch_size_forward",
    "1",
    "--log_every",
    "1",
    "--vis_every",
    "0",
    "--data.val_datasets",
    "[]",
)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return generated(tmp_path_factory, "stereo", "--scenes", "4", "--val_scenes", "2", "--size", "96x128")


@pytest.fixture
def tiny(pairs, tmp_path):
    """Arguments of a small run into tmp_path / name."""
    return lambda name, *more: (*TINY, "--data.datasets.0.path", pairs / "train", "--workspace", tmp_path / name, *more)


STRAIGHT = ("--gradient_accumulation_steps", "2", "--save_every", "2", "--keep_last", "9")


@pytest.fixture(scope="session")
def straight(pairs, tmp_path_factory):
    """A run of 4 steps of 2 pairs on one process without a stop, saved every 2 steps: what every other run is compared with."""
    folder = tmp_path_factory.mktemp("straight")
    run(*TINY, "--data.datasets.0.path", pairs / "train", "--workspace", folder, *STRAIGHT, "--max_steps", "4")
    return folder


def test_stopped_and_resumed_run_is_bit_identical(tiny, tmp_path, straight):
    args = tiny("resumed", *STRAIGHT, "--max_steps", "4")
    run_until_sigterm(tmp_path / "resumed", *args)
    assert "resumed at step" in run(*args, "--workers", "0")
    same_end(tmp_path / "resumed", straight, 4)
    names = {path.name for path in (straight / "checkpoint").iterdir()}
    assert names == {"latest.pt", *(f"0000000{n}{part}.pt" for n in (2, 4) for part in ("", "_optimizer", "_ema"))}
    last = checkpoint(straight, 4)
    assert last["model_config"]["max_disp"] == 32 and last["model_config"]["vit_size"] is None
    averaged, plain = checkpoint(straight, 4, "ema")["model"], last["model"]
    assert averaged.keys() == plain.keys()
    stats = [name for name in plain if name.endswith(("running_mean", "running_var"))]
    assert stats and all(torch.equal(averaged[name], plain[name]) for name in stats)  # buffers are copied, not averaged
    assert not torch.equal(averaged["spx_gru.0.weight"], plain["spx_gru.0.weight"])


def test_two_ranks_train_on_the_samples_of_one_and_back(tiny, tmp_path):
    """1 a rank x 2 ranks are the 2 micro-batches of one rank, where neither dropout nor the batch norms' statistics differ."""
    script, parts = tmp_path / "without_dropout.py", ("--gradient_accumulation_steps", "2")
    script.write_text(
        "import runpy, torch\ntorch.nn.Dropout.forward = lambda self, x: x\nrunpy.run_path('stereo/train.py', run_name='__main__')\n"
    )
    args = lambda name: (*tiny(name, "--max_steps", "2", "--bn", "frozen", "--enable_mixed_precision", "false")[1:], "--amp_dtype", "bf16")
    run(script, *args("one"), *parts)
    output = run(script, *args("two"), ranks=2)
    assert "1 a rank x 1 micro-batches x 2 ranks = 2 pairs a step" in output and "amp None" in output
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for step in (1, 2):
        keys = [key for key in one[step] if key.startswith(("loss/", "metric/", "train/grad_norm"))]
        assert len(keys) > 12 and {key: two[step][key] for key in keys} == pytest.approx({key: one[step][key] for key in keys}, rel=1e-5)
    output = run(*tiny("two", *parts, "--max_steps", "9", "--max_steps_per_run", "1"))
    assert "resumed at step 2" in output and max(metrics(tmp_path / "two")) == 3 == checkpoint(tmp_path / "two", 3, "optimizer")["step"]


def test_users_command_pictures_and_tensorboard(pairs, tmp_path):
    """The document's flags and configuration on two ranks, and what the run leaves behind."""
    folder = tmp_path / "v1"
    output = run(
        "stereo/train.py",
        "--config",
        "stereo/configs/stereo_v1.json",
        "--workspace",
        folder,
        "--checkpoint",
        "latest",
        "--batch_size_forward",
        "1",
        "--gradient_accumulation_steps",
        "2",
        "--enable_gradient_checkpointing",
        "true",
        "--enable_mixed_precision",
        "true",
        "--sync_bn",
        "true",
        "--enable_ema",
        "true",
        "--num_iterations",
        "2",
        "--save_every",
        "2",
        "--log_every",
        "1",
        "--vis_every",
        "2",
        "--num_vis_images",
        "2",
        "--enable_mlflow",
        "true",
        "--seed",
        "0",
        "--workers",
        "1",
        "--model.vit_size",
        "null",
        "--model.max_disp",
        "32",
        "--model.hidden_dims",
        "[16,16,16]",
        "--train_iters",
        "2",
        "--valid_iters",
        "2",
        "--data.datasets.0.path",
        pairs / "train",
        "--data.image_sizes",
        "[[64,64],[96,64]]",
        "--eval_every",
        "2",
        "--data.val_datasets",
        f"[{{name: val, path: {pairs / 'val'}}}]",
        ranks=2,
    )
    for line in (
        "model.feature_type has no effect",
        "model.test_mode has no effect",
        "= 4 pairs a step of 64x64, 96x64",
        "amp bfloat16",
        "logging to TensorBoard",
        "step 2: EPE",
    ):
        assert output.count(line) == 1, line
    row = metrics(folder)[2]
    assert {
        "loss/loss",
        "loss/disparity_l1",
        "loss/multi_scale",
        "metric/epe",
        "metric/D1",
        "metric/D3",
        "metric/d1_kitti",
        "metric/init_epe",
        "val/epe",
        "val/val/bp2",
        "train/lr",
    } <= row.keys()
    assert row["metric/D1"] == row["metric/bp3"] and row["metric/D3"] == row["metric/bp1"]
    assert row["train/lr"] == pytest.approx(1e-4 * 1 / 1000)  # the second update of the warm-up
    assert (folder / "vis/gt/0000/info.json").exists() and (folder / "vis/gt/0001/mask.png").exists()
    assert (folder / "vis/step_00000002/0001/pred_disparity_vis.png").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb")).Reload()
    assert {"loss/loss", "metric/epe", "time/step", "mem/peak_gb", "val/epe"} <= set(events.Tags()["scalars"])
    assert "vis/left_right_truth_prediction_error" in events.Tags()["images"]


def test_copied_out_folder_trains(tiny, tmp_path, straight):
    """stereo/ and common/ side by side are enough. Weights of no run, given as a checkpoint, are what --init takes."""
    state = {f"module.{name}": value for name, value in checkpoint(straight, 4)["model"].items()}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    for name in ("stereo", "common"):
        shutil.copytree(ROOT / name, tmp_path / "elsewhere" / name)
    given = ("--checkpoint", tmp_path / "published.pth", "--bn", "null", "--save_every", "0")
    output = run(*tiny("run", "--max_steps", "1", *given), cwd=tmp_path / "elsewhere", PYTHONPATH="")
    assert "tensors loaded" in output and "batch norms frozen" in output and "steps 0..1" in output
    assert (tmp_path / "run" / "checkpoint" / "00000001.pt").exists()


WRONG = [
    ("--data.datasets.0.path no/such/folder", "no/such/folder"),
    ("--data.datasets []", "no data set with a weight above 0"),
    ("--num_iteration 3", "num_iterations"),
    ("--batch_size_forward many", "batch_size_forward"),
    ("--data.image_sizes [[100,64]]", "multiples of 32"),
    ("--data.datasets.0.label_type depth", "label_type 'depth'"),
    ("--data.image_augmentation [blur]", "unknown augmentation 'blur'"),
    ("--loss.stereo.sequence.function l7", "function 'l7' must be one of"),
    ("--lr_scheduler.type Magic", "lr_scheduler.type 'Magic'"),
    ("--lr_scheduler.params.lr_lambda __import__('os')", "is not allowed"),
    ("--optimizer.type Magic", "optimizer.type 'Magic'"),
    ("--optimizer.params.0.params.include [nothing*]", "no trainable parameter matches"),
    ("--model.max_disp 50", "multiple of 32"),
    ("--model.vit_size vits", "needs trained weights: give --vit_checkpoint depth_anything_v2_vits.pth"),
    ("--model.vitsize vits", "did you mean 'vit_size'"),
    ("--amp fp8", "amp must be"),
    ("--amp_dtype fp8", "amp_dtype 'fp8' must be"),
    ("--optimizer.params.0.wd 1", "optimizer.params.0: unknown key 'wd'"),
    ("--optimizer.params.0.lr null", "optimizer.params.0: lr None must be a number"),
    ("--optimizer.weight_decay 1", "optimizer: unknown key 'weight_decay'"),
    ('--lr_scheduler {"type":"StepLR","params":{"gamma":0.5}}', "StepLR needs params.step_size"),
    ('--lr_scheduler.params {"lr_lamda":"1"}', "unknown key 'lr_lamda'; there are lr_lambda"),
    ('--lr_scheduler.params {"lr_lambda":["1","2"]}', "2 expressions for the 1 entries"),
    ("--lr_scheduler.params.lr_lambda sqrt(9-epoch)", "lr_scheduler: math domain error"),
    ('--loss.stereo.sequence.params {"gama":0.9}', "foundation_stereo_loss() got an unexpected keyword argument 'gama'"),
    ("--loss.stereo.sequence.params.gamma high", "loss.stereo.sequence: "),
    ("--loss.stereo.sequence l1", "loss.stereo.sequence: 'l1' must be a section"),
    ("--ema_decay 5", "ema_decay 5.0 must be from 0 to 1"),
    ("--data.flip_probability 7", "data.flip_probability 7.0 must be from 0 to 1"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps 0 must be 1 or more"),
    ("--log_every null", "log_every None must be 0 or more"),
    ("--keep_last 0", "keep_last 0 must be 1 or more"),
    ("--grad_clip -1", "grad_clip -1.0 must be 0 or more"),
    ("--data.image_sizes [64,64]", "must be a list of [width, height]"),
    ("--data.area_range [6000,9000]", "set image_sizes null"),
    ('--data.val_datasets [{"path":"no/such/val"}]', "no/such/val: no such folder"),
    ('--data.val_datasets [{"path":"x","frmat":"kitti"}]', "did you mean 'format'"),
    ("--init ANYTHING", "Depth Anything's weights go to vit_checkpoint"),
    ("--checkpoint no/such.pt", "no/such.pt"),
    ("--checkpoint 77", "77"),
    ("--init no/such.pt", "no/such.pt"),
    ("--init LEVELS", "checkpoint has corr_levels=2"),
    ("--init PARTIAL", "missing"),
]


def test_null_is_a_value_where_the_config_says_so():
    cfg = read(ROOT / "stereo/configs/paper.yaml")
    cfg |= dict.fromkeys(("grad_clip", "max_steps", "max_steps_per_run", "validate_pairs", "keep_last"))
    recipe.check_ranges(cfg)


def test_wrong_input_is_named(tiny, tmp_path, straight):
    """All in one process, which tells what each command line comes to."""
    whole = checkpoint(straight, 4)["model"]
    torch.save({"model": {name: value for name, value in whole.items() if "cnet" not in name}}, tmp_path / "partial.pth")
    torch.save({"pretrained.cls_token": torch.zeros(1)}, tmp_path / "anything.pth")
    cases = []
    for number, (options, _) in enumerate(WRONG):
        options = options.replace("LEVELS", f"{straight / 'checkpoint' / '00000004.pt'} --model.corr_levels 4").replace(
            "PARTIAL", str(tmp_path / "partial.pth")
        ).replace("ANYTHING", str(tmp_path / "anything.pth"))
        cases.append([*map(str, tiny(f"bad{number}", "--max_steps", "1", "--workers", "0")[1:]), *options.split()])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    code = (
        "import json, sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'stereo'); import train\n"
        "for number, argv in enumerate(json.load(open(sys.argv[1]))):\n"
        "    sys.argv = ['train.py', *argv]\n"
        "    try:\n        train.main(); print(f'CASE {number}: ran')\n"
        "    except BaseException as error:\n        print(f'CASE {number}: {type(error).__name__} {error}'.replace(chr(10), ' '), flush=True)\n"  # noqa: E501
        "    sys.stderr.flush()\n"
    )
    output = run("-c", code, tmp_path / "cases.json")
    for number, (options, message) in enumerate(WRONG):
        lines = (
            output[: output.index(f"CASE {number}: ")].rsplit("CASE ", 1)[-1]
            + output[output.index(f"CASE {number}: ") :].split("\n")[0]
        )
        assert message in lines and f"CASE {number}: ran" not in lines, f"{options}: {lines}"


def test_corrupt_images_are_replaced_counted_and_limited(pairs, tiny, tmp_path):
    root = tmp_path / "train"
    shutil.copytree(pairs / "train", root)
    image = root / "right" / "rgb" / "0002.jpg"
    image.write_bytes(image.read_bytes()[:100])
    validation = ("--data.val_datasets", f"[{{name: val, path: {root}}}]", "--validate_every", "3")
    output = run(*tiny("run"), "--data.datasets.0.path", root, "--max_steps", "5", "--max_bad_fraction", "1.0", *validation)
    assert output.count("bad sample replaced") == 1 and str(image) in output
    assert output.count("validation pair left out") == 1  # named once, and left out of both validations
    last = metrics(tmp_path / "run")[5]
    assert last["train/bad_samples"] >= 1 and last["val/bad_pairs"] == 1 and np.isfinite(last["val/epe"])
    for picture in (root / "left" / "rgb").iterdir():
        picture.write_bytes(b"")
    assert "attempts failed" in run(*tiny("none"), "--data.datasets.0.path", root, "--max_steps", "1", code=None)


# ------------------------------------------------------------------------------------------------------------ parts of it


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        self.temperature = torch.nn.Parameter(torch.ones(2, 1, 1))


def test_a_step_feeds_0_to_255_scores_the_last_map_and_gives_up_on_lasting_nan(pairs, tmp_path):
    """What the network is given, which map the loss looks at, and that bad steps change nothing and end the run."""
    from common.guard import NonFinite, StepGuard
    from stereo import train

    torch.manual_seed(0)
    model = FoundationStereo(vit_size=None, max_disp=32, hidden_dims=(16,) * 3, n_gru_layers=2, volume_dim=8).train()
    seen, outputs = [], []
    model.register_forward_pre_hook(lambda module, images: seen.append(images))
    model.register_forward_hook(lambda module, images, out: outputs.append(out))
    loss = {"stereo": {"l1": {"function": "disparity_l1_loss"}}}
    cfg = SimpleNamespace(loss=loss, train_iters=2, grad_clip=0, batch_size_forward=1, lr_scheduler=None, num_iterations=9)
    optimizer = recipe.make_optimizer(model, {"params": [{"lr": 1e-3}]})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sources = train.make_sources([{"path": pairs / "train"}])
    sample = train.StereoDataset(sources, 0, [[96, 64]], max_disparity=32).read((0, 0))
    keys = ("left_image", "right_image", "disparity", "disparity_mask")
    batch = {key: torch.from_numpy(sample[key])[None] for key in keys} | {"label": torch.tensor([0])}
    guard = StepGuard(model, 2, say=print)
    step = lambda number: train.train_step(model, model, None, [batch] * 2, optimizer, scaler, guard, cfg, None, number, 32)
    out = step(0)
    left, right = seen[0]
    assert left.shape == right.shape == (1, 3, 64, 96) and 100 < left.max() <= 255 and left.dtype == torch.float32
    for output, logged in zip(outputs, out["logs"], strict=True):  # two micro-batches, apart by dropout
        final, start = output["preds"][-1].squeeze(1), output["init"]
        assert final.shape == (1, 64, 96) and start.shape == (1, 1, 16, 24)
        assert torch.allclose(logged["loss/loss"], (final - batch["disparity"]).abs()[batch["disparity_mask"]].mean())
        assert torch.allclose(logged["metric/epe"], logged["loss/loss"]) and logged["metric/init_epe"] != logged["metric/epe"]
    batch["disparity"] = torch.full_like(batch["disparity"], torch.inf)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NonFinite):
        for number in range(1, 5):
            step(number)
    assert number == 3 and all(map(torch.equal, before, model.parameters()))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_published_files_load_by_name_whatever_their_size(tmp_path):
    """The dialect of the released folders: {"model": ...} and cfg.yaml with other keys, no vit_size for ViT-L."""
    from stereo.eval import load_model

    cases = ROOT / "tests" / "parity" / "cases" / "stereo"
    published = "corr_implementation: reg\nhidden_dims: [128, 128, 128]\nmax_disp: 416\nmixed_precision: true\nn_downsample: 2\n"
    for size in ("vits", "vitl"):
        table = json.loads((cases / f"state_dict_{size}.json").read_text())
        state = {f"module.{name}": torch.zeros(()).expand(shape) for name, shape in table.items()}
        (tmp_path / size).mkdir()
        torch.save({"model": state, "global_step": 200000, "epoch": 3}, tmp_path / size / "model_best_bp2.pth")
        (tmp_path / size / "cfg.yaml").write_text(published + (f"vit_size: {size}\n" if size == "vits" else ""))
        with torch.device("meta"):  # names and shapes; no memory
            model = load_model(tmp_path / size / "model_best_bp2.pth", torch.device("meta"))
        assert model.feature.mono_dim == {"vits": 32, "vitl": 128}[size] and model.max_disp == 416
        lacking = dict(list(state.items())[1:])
        torch.save({"model": lacking}, tmp_path / size / "model_best_bp2.pth")
        with torch.device("meta"), pytest.raises(SystemExit, match="1 missing"):
            load_model(tmp_path / size / "model_best_bp2.pth", torch.device("meta"))


def test_averages_follow_the_weights_and_skip_bad_steps():
    model = Net()
    ema = make_ema(model)
    assert ema.frozen.weight is model.frozen.weight and not ema.training
    before = ema.conv.weight.clone()
    with torch.no_grad():
        model.conv.weight += 1
        model.norm.running_mean += 2
    update_ema(ema, model, 0.9, skip=torch.tensor(1.0))
    assert torch.equal(ema.conv.weight, before)
    update_ema(ema, model, 0.9, skip=torch.tensor(0.0))
    assert torch.allclose(ema.conv.weight, before + 0.1) and torch.equal(ema.norm.running_mean, model.norm.running_mean)


def test_parameter_groups_first_match_wins_and_none_is_left_out():
    section = {
        "no_decay_1d": True,
        "params": [
            {"params": {"include": ["*conv*"], "exclude": ["*bias"]}, "lr": 1e-3, "weight_decay": 0.1},
            {"params": {"include": ["*"]}, "lr": 1e-4, "weight_decay": 0.1},
        ],
    }
    model = Net()
    groups = recipe.parameter_groups(model, section)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        ["conv.weight"],
        ["temperature", "conv.bias", "norm.weight", "norm.bias"],
    ]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-4, 0.0)]
    whole = recipe.parameter_groups(model, section | {"params": [section["params"][1] | {"lr": 1e-2}]})
    assert [(g["entry"], len(g["params"])) for g in whole] == [(0, 1), (0, 4)] and [g["entry"] for g in groups] == [0, 1]
    by_entry = {"type": "LambdaLR", "params": {"lr_lambda": ["1", "0.5"]}}
    assert [recipe.lr_factor(by_entry, 3, 1.0, g["entry"]) for g in groups] == [1, 0.5]
    with pytest.raises(ValueError, match=r"are in no group: .*norm\.weight"):
        recipe.parameter_groups(model, {"params": section["params"][:1]})


def test_learning_rates_of_the_configs():
    v1 = json.loads(
        "\n".join(
            line.split("//")[0].split("  #")[0] for line in (ROOT / "stereo/configs/stereo_v1.json").read_text().splitlines()
        )
    )
    factor = lambda step, **more: recipe.lr_factor(v1["lr_scheduler"] | more, step, 1e-4)
    assert [factor(s) for s in (0, 500, 1000, 21000, 200000)] == pytest.approx([0, 0.5, 1, 0.5, 0.1])
    restart = {"type": "SequentialLR", "params": v1["lr_scheduler"]["params"] | {"sequential_restart": True}}
    assert recipe.lr_factor(restart, 1000, 1e-4) == pytest.approx(0.5 ** (-1000 / 20000))  # as torch counts
    cfg, late = read(ROOT / "stereo/configs/paper.yaml"), {"type": "LambdaLR", "params": {"lr_lambda": "sqrt(1000 / epoch)"}}
    paper, params = cfg.lr_scheduler, {"schedulers": [cfg.lr_scheduler, late], "milestones": [1000]}
    recipe.check(cfg | {"lr_scheduler": {"type": "SequentialLR", "params": params}})  # the second part need not have a value at 0
    factors = [recipe.lr_factor(paper, s, 1e-4, steps=50000) for s in (0, 999, 39999, 40000)]
    assert factors == pytest.approx([1e-3, 1, 1, 0.1])  # the last fifth of the steps, however many there are
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    for kind, params in (
        ("StepLR", {"step_size": 3, "gamma": 0.5}),
        ("MultiStepLR", {"milestones": [2, 5]}),
        ("ExponentialLR", {"gamma": 0.9}),
        ("CosineAnnealingLR", {"T_max": 9, "eta_min": 0.03}),
        ("ConstantLR", {"factor": 0.2, "total_iters": 3}),
        ("LinearLR", {"start_factor": 0.1, "total_iters": 4}),
        ("PolynomialLR", {"total_iters": 6, "power": 2.0}),
        (
            "OneCycleLR",
            {"max_lr": 0.3, "total_steps": 12, "anneal_strategy": "linear", "pct_start": 0.3, "cycle_momentum": False},
        ),
    ):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = 0.3
        theirs = getattr(torch.optim.lr_scheduler, kind)(optimizer, **params)
        recipe.check_scheduler({"type": kind, "params": params}, 1)
        for step in range(9):
            assert 0.3 * recipe.lr_factor({"type": kind, "params": params}, step, 0.3) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-6
            ), (kind, step)
            optimizer.step()
            theirs.step()


def test_losses_of_label_types_count_by_their_share():
    g = torch.Generator().manual_seed(0)
    out = {
        "init": torch.rand(2, 1, 8, 16, generator=g).requires_grad_(),
        "preds": [torch.rand(2, 1, 32, 64, generator=g).requires_grad_() for _ in range(2)],
    }
    truth, mask, label = torch.rand(2, 32, 64, generator=g) + 1, torch.ones(2, 32, 64, dtype=torch.bool), torch.tensor([0, 1])
    l1 = {"l1": {"function": "disparity_l1_loss", "weight": 2.0}}
    loss, logs = recipe.total_loss(out, truth, mask, label, {"stereo": l1, "invalid": {}}, 64)
    want = (out["preds"][1][0, 0] - truth[0]).abs().mean()
    assert torch.allclose(loss, 2.0 * 0.5 * want) and torch.allclose(logs["l1"], want)
    loss.backward()
    assert (
        out["preds"][1].grad[1].abs().max() == 0 and out["init"].grad is not None
    )  # a graph to every output, whatever is scored
    nothing, _ = recipe.total_loss(out, truth, mask, torch.tensor([1, 1]), {"stereo": l1, "invalid": {}}, 64)
    assert nothing == 0 and nothing.requires_grad
    sequence = {
        "stereo": {
            "s": {"function": "foundation_stereo_loss"},
            "m": {"function": "multi_scale_loss", "params": {"weights": [0.5, 0.7, 1]}},
            "i": {"function": "multi_scale_loss", "params": {"weights": [0.5, 1]}},
            "g": {"function": "gradient_loss"},
        }
    }
    assert recipe.needs_all(sequence) and not recipe.needs_all({"stereo": l1}) and recipe.check_loss(sequence, 2) is None
    total, logs = recipe.total_loss(out, truth, mask, torch.tensor([0, 0]), sequence, 64)
    assert torch.allclose(total, logs["s"] + logs["m"] + logs["i"] + logs["g"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"loss.stereo.i: 2 weights; give 3 .* or 12"):
        recipe.check_loss(sequence, 12)


@pytest.fixture
def main(monkeypatch):
    """Run a script's main with these arguments in this process, on which no watch may lie; returns the exit code."""

    def call(module, *args):
        monkeypatch.setattr(dist, "at", lambda *_: pytest.fail("one process waits for nobody"))
        monkeypatch.setattr("sys.argv", ["script", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            module.main()
            sys.exit(0)
        return end.value.code

    return call


def test_evaluation_goes_on_without_a_bad_pair(main, pairs, tmp_path, capsys):
    from stereo import eval

    shutil.copytree(pairs / "train", tmp_path / "set")
    (tmp_path / "set/right/rgb/0002.jpg").write_bytes(b"")
    bad, out = tmp_path / "lists/bad.txt", tmp_path / "tables/pairs.csv"  # in folders that are not there
    assert "no pair in the form of 'middlebury'" in main(eval, "--data", tmp_path / "set", "--dataset", "middlebury")
    assert main(eval, "--data", tmp_path / "set", "--exclude", bad, "--exclude_above", 101, "--out", out) == 1
    text = capsys.readouterr().out
    assert "right/rgb/0002.jpg" in text and "1 of 4 pairs could not be read" in text and "(3 with ground truth)" in text
    assert bad.read_text() == "0002\n" and len(out.read_text().splitlines()) == 1 + 2 * 3
    assert "no pair has a mask" in main(eval, "--data", tmp_path / "set", "--mask", "noc")
    for wrong in (("--max_disparity", 0), ("--limit", 0), ("--iters", 0), ("--scale", -2), ("--scale", 0)):
        assert main(eval, "--data", tmp_path / "set", *wrong) == 2


def test_evaluation_tells_how_many_pairs_have_no_mask(main, pairs, tmp_path, capsys):
    from stereo import eval

    for number in range(2):
        for name, view in (("im0", "left"), ("im1", "right")):
            write_image(tmp_path / str(number) / f"{name}.png", read_image(pairs / "val" / view / "rgb" / f"000{number}.jpg"))
        truth = read_disparity(pairs / "val/left/disparity" / f"000{number}.png", "fsd")
        (tmp_path / str(number) / "disp0.pfm").write_bytes(encode_pfm(truth))
    write_image(tmp_path / "0" / "mask0nocc.png", np.full((96, 128), 255, np.uint8))
    assert main(eval, "--data", tmp_path, "--dataset", "middlebury") == 0
    assert "mask noc (1 of 2 pairs have none: all their pixels count)" in capsys.readouterr().out


def test_infer_shares_pairs_out_and_names_wrong_options(main, pairs, tmp_path, straight, monkeypatch, capsys):
    from stereo import infer

    views = [pairs / "val" / side / "rgb" for side in ("left", "right")]
    words = ("--checkpoint", straight / "checkpoint/00000004.pt", "--iters", 1, "--left", views[0], "--right", views[1], "--out")
    (tmp_path / "file").touch()
    assert "not a folder that can be written" in main(infer, *words, tmp_path / "file")
    assert "--x_offset 128: " in main(infer, *words, tmp_path / "out", "--x_offset", 128)
    for wrong in (("--x_offset", -5), ("--iters", 0), ("--scale", 0), ("--scale", -2)):
        assert main(infer, *words, tmp_path / "out", *wrong) == 2
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    assert main(infer, *words, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.pfm", "0001_disparity.jpg"]


def test_exchanged_views_are_noticed(pairs):
    from stereo.infer import look_swapped

    for pair in list_pairs(pairs / "train"):
        left, right = read_views(pair)
        assert look_swapped(right, left) and not look_swapped(left, right)
    assert not look_swapped(left, left) and not look_swapped(np.zeros_like(left), np.zeros_like(left))


def test_infer_refuses_what_it_cannot_use(pairs, tmp_path, straight):
    weights = straight / "checkpoint" / "00000004.pt"
    write_image(tmp_path / "small.png", np.zeros((50, 60, 3), np.uint8))
    left = pairs / "val/left/rgb/0000.jpg"
    common = ("--checkpoint", weights, "--left", left, "--out", tmp_path / "out", "--iters", "1")
    output = run("stereo/infer.py", *common, "--right", tmp_path / "small.png", code=None)
    assert "128x96 and 60x50, but the views of a rectified pair have one size" in output and "Traceback" not in output
    (tmp_path / "K.txt").write_text("nonsense")
    output = run(
        "stereo/infer.py", *common, "--right", pairs / "val/right/rgb/0000.jpg", "--intrinsics", tmp_path / "K.txt", code=None
    )
    assert "K.txt: not a calibration" in output and "Traceback" not in output


def test_sizes_that_are_no_multiple_of_32_are_padded(straight, pairs):
    from stereo.eval import load_model, predictor

    run_model = predictor(load_model(straight / "checkpoint" / "00000004.pt", torch.device("cpu")), torch.device("cpu"), 1)
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 45, 71, 3), dtype=np.uint8)
    assert run_model(left, right).shape == (45, 71) and np.isfinite(run_model(left, right)).all()
    assert read_disparity(pairs / "val/left/disparity/0000.png", "fsd").max() > 0
