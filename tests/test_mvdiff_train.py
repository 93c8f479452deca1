"""mvdiff/train.py, dataset.py, eval.py and infer.py as a user runs them: real processes, real signals, generated objects."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, checkpoint, difference, generated, metrics, run, run_until_sigterm, same_end

from common.guard import StepGuard
from mvdiff import build, dataset, eval as evaluation, infer, loss, optim, train, validation
from mvdiff.model import unet_arguments
from mvdiff.unet import UNet
from mvdiff.weights import read_json, read_state, write_part

SMALL = {
    "resolution": 32, "num_views": 4, "max_train_samples": "null", "validation_train_samples": 0, "train_batch_size": 1,
    "gradient_accumulation_steps": 2, "max_train_steps": 4, "lr_warmup_steps": 1, "log_every": 1, "save_every": 2, "keep_last": 9,
    "validate_every": 1000, "vis_every": 1000, "validation_steps_ddim": 2, "validation_guidance_scales": "[2.0]",
    "validation_sanity_check": False,
}  # fmt: skip
SAMPLER = ["--steps", 2]


def options(values: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


def small(renders, workspace, config: str = "tiny", **changes) -> list:
    """Arguments of a small run; without validation unless asked for."""
    values = {**SMALL, "train_data_dir": renders, "workspace": workspace, "num_validation_samples": 0, "workers": 1, **changes}
    return ["mvdiff/train.py", "--config", f"mvdiff/configs/{config}.yaml", *options(values)]


@pytest.fixture(scope="session")
def renders(tmp_path_factory):
    return generated(tmp_path_factory, "mvdiff", "--scenes", "5", "--size", "32x32")


@pytest.fixture(scope="session")
def straight(renders, tmp_path_factory):
    """A run of 4 steps on one process without a stop, saved every 2 steps: what other runs are compared with."""
    folder = tmp_path_factory.mktemp("straight")
    run(*small(renders, folder))
    return folder


def test_stopped_and_resumed_run_is_bit_identical(renders, tmp_path, straight):
    run_until_sigterm(tmp_path, *small(renders, tmp_path))
    assert "resumed at step" in run(*small(renders, tmp_path, workers=0))
    same_end(tmp_path, straight, 4)
    assert difference(read_state(tmp_path / "pipeline", "unet"), read_state(straight / "pipeline", "unet")) == []
    ema, model = checkpoint(tmp_path, 4, "ema")["shadows"], checkpoint(tmp_path, 4)["model"]
    assert any(not torch.equal(shadow, model[name]) for name, shadow in ema.items())  # averages, not copies
    exported = read_state(tmp_path / "pipeline", "unet")
    assert all(torch.equal(exported[name], shadow) for name, shadow in ema.items())


# ---- the training step, in this process ------------------------------------------------------------------------------


def parsed(**changes):
    """The configuration of tiny.yaml with two views of 32 x 32 pixels."""
    return build.parse(["--config", str(ROOT / "mvdiff/configs/tiny.yaml"), *options({"resolution": 32, "num_views": 2, **changes})], "")


def encoded(frozen, objects: int = 2) -> dict[str, torch.Tensor]:
    """A batch of random frozen work, as the cache gives it."""
    g, latent = torch.Generator().manual_seed(0), (frozen.latent_channels, 4, 4)
    shapes = {"mean": (2, 2, *latent), "std": (2, 2, *latent), "condition_mean": latent, "condition_std": latent, "angles": (2, 3)}
    shapes["embedding"] = (frozen.clip.projection_dim,)
    batch = {key: torch.randn(objects, *shape, generator=g) for key, shape in shapes.items()}
    return batch | {"is_normal": torch.tensor([[1, 0]] * objects), "position": torch.arange(objects)}


def test_noise_and_weights_of_the_loss():
    """The target is the noise with its offset and without the perturbation of the input; snr_rule decides on the weights."""
    cfg = parsed(prediction_type="epsilon", noise_offset=0.1, input_perturbation=0.5, use_classifier_free_guidance=False)
    frozen = build.load_frozen_of(cfg)
    work = train.encode(frozen, encoded(frozen), cfg, {"camera_flags": True})
    draws = train.draw(work, train.make_generators(1, torch.arange(2), torch.device("cpu")), cfg, 1000)
    assert "drop" not in draws
    noise = draws["noise"] + 0.1 * draws["offset"]
    latents = (work["mean"] + work["std"] * draws["target"]) * frozen.vae.scaling_factor

    def perfect(x, *_):
        seen = x[:, : frozen.latent_channels]
        torch.testing.assert_close(seen, frozen.diffusion.add_noise(latents, noise + 0.5 * draws["perturbation"], draws["t"]))
        return noise

    assert train.denoise(perfect, frozen, work, draws, cfg, None)[0] == 0
    values = {}
    drop = train.draw(work, train.make_generators(1, torch.arange(2), torch.device("cpu")), parsed(), 1000)["drop"]
    assert drop.shape == (2,) and 0 < drop.min() < drop.max() < 1  # a uniform number per object
    for rule in ("seed", "paper", "wonder3d"):
        cfg = parsed(snr_rule=rule, use_classifier_free_guidance=False)
        frozen = build.load_frozen_of(cfg)
        blind = lambda x, *_: torch.zeros_like(noise)
        values[rule], rows = train.denoise(blind, frozen, work, {**draws, "t": torch.arange(100, 900, 100)}, cfg, None)
        weights = loss.snr_weights(frozen.diffusion.snr(torch.arange(100, 900, 100)), 5.0, "v_prediction", rule)
        torch.testing.assert_close(values[rule], (weights * rows).mean())
    assert len({round(value.item(), 4) for value in values.values()}) == 3


def test_rates_and_averages_of_the_first_steps():
    """The first update has rate 0 and copies the weights; the averages follow by (1 + n) / (10 + n)."""
    cfg = parsed(lr_scheduler="constant_with_warmup", lr_warmup_steps=2, camera_embedding_lr_mult=10)
    frozen = build.load_frozen_of(cfg)
    torch.manual_seed(0)
    network, _ = train.build_model(cfg, frozen, None, print)
    trained = optim.select_trainable(network)
    optimizer, scaler = train.build_optimizer(trained, cfg), torch.amp.GradScaler("cpu", enabled=False)
    shadows = [torch.zeros_like(p) for p in trained.values()]
    averages, guard = [s.clone() for s in shadows], StepGuard(network)
    for step, (decay, factor) in enumerate([(0, 0), (2 / 11, 0.5), (3 / 12, 1), (4 / 13, 1)]):
        before = [p.detach().clone() for p in trained.values()]
        given = (trained, shadows, [encoded(frozen)], frozen, optimizer, scaler, guard, cfg, {"camera_flags": True}, None, step, 4)
        out = train.train_step(network, *given)
        assert out["lr"] == [factor * cfg.learning_rate, factor * cfg.learning_rate * 10]
        assert out["ema_decay"] == pytest.approx(decay)
        assert any(not torch.equal(a, b) for a, b in zip(before, trained.values())) == (step > 0)
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, trained.values())]
        torch.testing.assert_close(shadows, averages, atol=1e-6, rtol=1e-4)


def test_sampling_a_long_folder_of_pictures_marks_progress(monkeypatch):
    """The watch ends a process that makes no mark for `timeout` seconds."""
    marks = []
    monkeypatch.setattr(validation.dist, "at", lambda step, phase: marks.append((step, phase)))
    monkeypatch.setattr(validation, "generate", lambda *_: torch.zeros(1, 2, 2, 3, 32, 32))
    cfg = parsed(validation_guidance_scales="[1.0, 2.0]")
    frozen, pictures = build.load_frozen_of(cfg), [("owl", np.zeros((3, 32, 32), np.float32))] * 3
    log = type("Log", (), {"image": lambda *_: None})
    validation.draw_inputs(None, frozen, pictures, cfg, {"camera_flags": True}, torch.device("cpu"), None, log, 7)
    assert marks == [(7, "sample")] * 6


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_two_ranks_make_the_batch_of_one(renders, tmp_path, straight):
    """Two ranks in place of two micro-batches, and back: the run goes on. A fresh network's error is the noise's power, 1."""
    args = {"max_steps": 2, "gradient_accumulation_steps": 1, "snr_gamma": "null"}
    output = run(*small(renders, tmp_path / "two", **args), ranks=2)
    assert "x 1 micro-batches x 2 ranks = 2 objects a step" in output
    assert "4 views x 2 domains x 1 objects = 8 rows" in output
    assert all(abs(metrics(tmp_path / "two")[1][key] - 1) < 0.25 for key in ("loss/loss", "loss/color", "loss/normal"))
    output = run(*small(renders, tmp_path / "two", max_steps=3))
    assert "resumed at step 2" in output and "x 2 micro-batches x 1 ranks = 2 objects a step" in output
    assert difference(list(checkpoint(tmp_path / "two", 3, "ema")["shadows"]), list(checkpoint(straight, 4, "ema")["shadows"])) == []


def test_training_from_the_cache(renders, tmp_path, straight):
    """The same losses as without it; a stop changes nothing; other weights and changed images are noticed."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(renders, data)
    make = ["mvdiff/dataset.py", "--cache", cache, *small(data, "none")[1:]]
    assert "5 entries written, 0 kept" in run(*make, ranks=2)
    cached = {"latent_cache_dir": cache}
    run(*small(data, tmp_path / "a", max_steps=2, **cached))
    output = run(*small(data, tmp_path / "a", **cached))
    assert "resumed at step 2" in output and "cached encoders" in output
    for step in range(1, 5):
        mine, live = metrics(tmp_path / "a")[step], metrics(straight)[step]
        keys = [key for key in live if key.startswith("loss/")]
        assert len(keys) >= 4 and all(abs(mine[key] - live[key]) < 1e-4 * live[key] for key in keys)
    weights = difference(checkpoint(tmp_path / "a", 4)["model"], checkpoint(straight, 4)["model"])
    assert len(weights) < 2 or all(
        (checkpoint(tmp_path / "a", 4)["model"][n[1:]] - checkpoint(straight, 4)["model"][n[1:]]).abs().max() < 1e-3 for n in weights
    )
    changed = data / "000" / "00002" / "rgb_000_right.png"
    Image.fromarray(np.array(Image.open(changed))[::-1]).save(changed)
    output = run(*small(data, tmp_path / "b", max_steps=5, max_train_steps=5, **cached))
    assert "the images of 00002 have changed since" in output
    assert "1 entries written, 4 kept" in run(*make)
    other = tmp_path / "other"
    shutil.copytree(ROOT / "mvdiff" / "tiny", other)
    state = read_state(other, "vae")
    write_part(other, "vae", read_json(other / "vae" / "config.json"), {k: v * 1.01 for k, v in state.items()})
    assert "no cache" in run(*small(data, tmp_path / "c", init=other, **cached), code=None)


def image_variation(folder, channels: int = 8) -> None:
    """A weights folder like those that stage 1 starts from: no camera embedding, input without the picture."""
    shutil.copytree(ROOT / "mvdiff" / "tiny", folder)
    stored = read_json(folder / "unet" / "config.json")
    config = {key: value for key, value in stored.items() if "class_embed" not in key} | {"in_channels": channels}
    torch.manual_seed(5)
    plain = UNet(**{**unet_arguments(config), "cd_attention_mid": False, "projection_class_embeddings_input_dim": None})
    write_part(folder, "unet", config, plain.state_dict())


def test_two_stages_tensorboard_evaluation_and_inference(renders, tmp_path):
    """image.yaml from image-variation weights, joint.yaml from its result; every file that a run leaves is read back."""
    image_variation(tmp_path / "variation")
    shared = {"max_train_steps": 2, "max_steps": 2, "amp": "off", "num_validation_samples": 2, "train_batch_size": 2}
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    shutil.copy(renders / "000" / "00001" / "rgb_000_front.png", inputs / "owl.png")
    one, two = tmp_path / "one", tmp_path / "two"
    output = run(*small(renders, one, "image", init=tmp_path / "variation", **shared))
    assert "1 tensors of input channels are new (conv_in.weight), 4 tensors of camera embedding are new (class_embedding." in output
    assert "4 views x 1 domains x 2 objects = 8 rows" in output
    assert metrics(one)[2]["train/lr_camera_embedding"] == 10 * metrics(one)[2]["train/lr"] > 0
    # the second stage validates, draws every picture of a folder, and trains the cross-domain layers only
    changes = {"init": one / "pipeline", "validate_every": 2, "vis_every": "null", "validation_dir": inputs}
    changes |= {"scale_input_latents": False, "clip_resize": "tensor_noaa", "normals_clamp": True}  # other than the default's
    output = run(*small(renders, two, "joint", **{**shared, **changes}), ranks=2)
    assert "tensors of cross-domain layers are new" in output and "val, guidance 2: psnr" in output
    before, after = read_state(one / "pipeline", "unet"), read_state(two / "pipeline", "unet")
    assert all(torch.equal(before[name], after[name]) for name in before)
    new = after.keys() - before.keys()
    assert new and all("joint_mid" in name for name in new)
    assert any(after[name].abs().sum() > 0 for name in new if "to_out.0.weight" in name)  # they start from zero: they have learnt
    for part in ("unet", "vae", "image_encoder", "scheduler", "feature_extractor"):
        assert (two / "pipeline" / part).is_dir()
    assert set(read_json(two / "pipeline" / "model_index.json")) >= {"unet", "vae", "image_encoder", "scheduler"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(two / "tb")).Reload()
    tags = {"loss/loss", "loss/color", "loss/normal", "train/lr", "train/grad_norm", "train/ema_decay", "time/data", "time/step"}
    assert tags | {"mem/peak_gb", "val_cfg2.0/psnr", "val_cfg2.0/normal_deg"} <= set(events.Tags()["scalars"])
    assert {"val/cfg2.0", "inputs/owl_cfg2.0"} <= set(events.Tags()["images"])
    assert [e.step for e in events.Scalars("loss/loss")] == [1, 2]
    shown = np.array(Image.open(two / "vis" / "step_00000002" / "val_cfg2.0.png"))
    assert shown.shape == (2 * 4 * 32, 5 * 32, 3)  # two objects: normals, colours, their truth; the input and 4 views

    scores = []
    for batch, ranks in ((1, 0), (3, 2)):  # neither the batch nor the ranks change a figure
        out = ["--json", tmp_path / "scores.json", "--out", tmp_path / "objects.csv", "--pictures", 1, "--picture_dir", tmp_path]
        what = ["--weights", two / "pipeline", "--data", renders, "--baselines", "--guidance", 2, *SAMPLER]
        text = run("mvdiff/eval.py", *what, "--batch", batch, *out, ranks=ranks)
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
        assert "guidance 2" in text and "truth, autoencoded" in text
        assert len((tmp_path / "objects.csv").read_text().splitlines()) == 1 + 3 * 5
    for name, result in scores[0].items():
        for key, value in result["mean"].items():
            assert abs(value - scores[1][name]["mean"][key]) < 1e-3 * max(1, abs(value)), (name, key)
    assert (tmp_path / "guidance_2.png").exists()
    # training's own figures of the objects left out are those of eval.py, which knows the network by its config alone
    what = ["--weights", two / "pipeline", "--data", renders, "--guidance", 2, "--num_validation_samples", 2, *SAMPLER]
    run("mvdiff/eval.py", *what, "--json", tmp_path / "made" / "val.json", "--tb", tmp_path / "board")
    for key, value in json.loads((tmp_path / "made" / "val.json").read_text())["guidance 2"]["mean"].items():
        assert abs(value - metrics(two)[2][f"val_cfg2.0/{key}"]) < 1e-3 * max(1, abs(value)), key
    assert "evaluation/text_summary" in EventAccumulator(str(tmp_path / "board")).Reload().Tags()["tensors"]

    checkpointed, what = two / "checkpoint" / "00000002.pt", ["mvdiff/infer.py", "--weights", two / "pipeline", *SAMPLER]
    shutil.copy(inputs / "owl.png", tmp_path / "owl.png")
    Image.open(inputs / "owl.png").save(inputs / "owl.webp", lossless=True)
    run(*what, "--unet", checkpointed, "--image", inputs, "--out", tmp_path / "a")
    run(*what, "--image", tmp_path / "owl.png", "--out", tmp_path / "b", "--quantise", "--published_folders")
    made = sorted(path.name for path in (tmp_path / "a" / "owl.png").iterdir())
    assert len(made) == 9 and "grid.png" in made and "normals_000_back.png" in made
    assert len(list((tmp_path / "a" / "owl.webp").iterdir())) == 9
    published = tmp_path / "b" / "cropsize-24-cfg3.0" / "owl"
    for name, plain, cut in (("rgb_000_left.png", ".", "masked_colors"), ("normals_000_left.png", "normals", ".")):
        ours, plain, cut = (Image.open(path / name) for path in (tmp_path / "a" / "owl.png", published / plain, published / cut))
        assert (ours.mode, plain.mode, cut.mode) == ("RGBA", "RGB", "RGBA") and ours.size == (32, 32)
        # the checkpoint's moving average is what the pipeline folder holds; the input was rounded down to 8 bits
        assert np.abs(np.asarray(ours.convert("RGB"), int) - np.asarray(plain)).max() < 30
        assert np.array_equal(np.asarray(cut)[..., :3], np.asarray(plain))


def test_users_document_in_debug_mode(tmp_path):
    """The document's own keys, noise instead of data, its rules: every view its own time step, no averages."""
    image_variation(tmp_path / "weights")
    keys = {
        "pretrained_model_name_or_path": str(tmp_path / "weights"), "output_dir": str(tmp_path / "run"), "debug": True, "resolution": 32,
        "num_views": 2, "train_batch_size": 2, "max_train_steps": 5, "mixed_precision": "no", "dataloader_num_workers": 0,
        "checkpointing_steps": 150, "checkpoints_total_limit": 5, "p_uncond": 0.1, "input_pertubation": 0.1, "noise_offset": 0.05,
        "report_to": "wandb", "enable_xformers_memory_efficient_attention": True, "center_crop": True, "resume_from_checkpoint": None,
        "validation_steps": 100, "validation_guidance_scale": 1.0, "adam_beta1": 0.9, "seed": 42,
        "vis_dir": "vis", "hub_token": "x", "pipe_kwargs": {"num_views": 2}, "pipe_validation_kwargs": {"eta": 1.0},
    }  # fmt: skip
    import yaml

    base = yaml.safe_load((ROOT / "mvdiff" / "configs" / "variation.yaml").read_text())
    renamed = {build.ALIASES.get(key, key) for key in keys}  # given under their own names
    (tmp_path / "user.yaml").write_text(yaml.safe_dump({k: v for k, v in base.items() if k not in renamed} | keys))
    more = ["log_every=1", "snr_gamma=5.0", "prediction_type=v_prediction", "--debug_distributed", "--latent_cache_dir", "nowhere"]
    output = run("mvdiff/train.py", "--config_path", tmp_path / "user.yaml", *more)
    assert "300 objects" in output and "2 views x 2 domains x 2 objects = 8 rows" in output and "without EMA, live encoders" in output
    assert "without effect here: report_to, enable_xformers_memory_efficient_attention, hub_token, vis_dir, pipe_kwargs" in output
    assert sorted(metrics(tmp_path / "run")) == [1, 2, 3, 4, 5]
    assert not (tmp_path / "run" / "checkpoint" / "00000005_ema.pt").exists()
    assert read_json(tmp_path / "run" / "pipeline" / "scheduler" / "scheduler_config.json")["prediction_type"] == "v_prediction"


def test_copied_out_folder_trains(renders, tmp_path):
    """mvdiff/ and common/ side by side are enough."""
    for name in ("mvdiff", "common"):
        shutil.copytree(ROOT / name, tmp_path / "elsewhere" / name)
    never = {"log_every": 0, "save_every": 0, "validate_every": 0, "max_train_steps": "null", "num_train_epochs": 1}
    output = run(*small(renders, tmp_path / "run", max_steps=1, **never), cwd=tmp_path / "elsewhere", PYTHONPATH="")
    assert "2 objects a step, steps 0..1 of 3" in output  # five objects: the last step of an epoch counts
    assert (tmp_path / "run" / "checkpoint" / "00000001.pt").exists()


def test_broken_objects_are_replaced_counted_and_limited(renders, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(renders, root)
    os.remove(root / "000" / "00001" / "normals_000_back.png")
    (root / "000" / "00003" / "mask_000_front.png").write_bytes(b"")
    output = run("mvdiff/dataset.py", "--check", root, "--out", tmp_path / "check.png", "--resolution", 32, code=1)
    assert "normals_000_back.png: missing view" in output and "mask_000_front.png: unreadable" in output
    assert "2 of 5 objects cannot be used" in output
    assert np.array(Image.open(tmp_path / "check.png")).shape == (3 * 32, 12 * 32, 3)
    output = run(*small(root, tmp_path / "run", max_bad_fraction=1.0))
    assert output.count("bad sample replaced") >= 1 and "missing view" in output
    assert metrics(tmp_path / "run")[4]["train/bad_samples"] >= 1
    for path in root.glob("000/*/rgb_*.png"):
        path.write_bytes(b"")
    assert "attempts failed" in run(*small(root, tmp_path / "none", max_bad_fraction=1.0, workers=0), code=None)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/must-not-exist",)


def test_weights_that_cannot_be_used_end_the_run(renders, tmp_path):
    """An unsafe pickle is refused unread; names that are missing are listed."""
    weights = tmp_path / "weights"
    image_variation(weights)
    state = read_state(weights, "unet")
    write_part(weights, "unet", read_json(weights / "unet" / "config.json"), {k: v for k, v in state.items() if "mid_block" not in k})
    output = run(*small(renders, tmp_path / "a", "image", init=weights), code=None)
    assert "missing: mid_block" in output and "do not fit" in output
    os.remove(weights / "unet" / "diffusion_pytorch_model.safetensors")
    (weights / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Evil()}))
    output = run(*small(renders, tmp_path / "b", "image", init=weights), code=None)
    assert "refused or unreadable" in output and not os.path.exists("/tmp/must-not-exist")


WRONG = [
    (["--init", "no/such/folder"], "no/such/folder: no such weights folder"),
    (["--train_data_dir", "no/such/data"], "no/such/data: no such folder of renderings"),
    (["--checkpoint", "77"], "00000077.pt is missing"),
    (["--validation_dir", "mvdiff/tiny/vae"], "mvdiff/tiny/vae: no .jpg"),
]
UNREADABLE = [  # of eval.py, with the folder of a run in place of RUN
    (["--condition_view", "front_left"], "condition_view 'front_left' is none of the 4 views"),
    (["--resolution", 36], "resolution 36 is no multiple of 8"),
    (["--steps", 1001], "1001 sampling steps"),
    (["--domain", "color"], "--domain color: the network has cross-domain attention"),
    (["--unet", "RUN/checkpoint/latest.pt"], "latest.pt: no UNet in it"),
    (["--unet", "RUN/checkpoint/00000004_optimizer.pt"], "00000004_optimizer.pt: no UNet in it"),
    (["--unet", "RUN/short.pt"], "short.pt: unreadable checkpoint"),
    (["--out", "RUN/config.yaml/x.csv"], "config.yaml"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[a[0][2:] for a, _ in WRONG])
def test_wrong_input_is_named(renders, tmp_path, arguments, message):
    assert message in run(*small(renders, tmp_path), *arguments, code=None)


def test_wrong_options_are_named(capsys):
    """Before anything is read."""
    for arguments, message in (
        (["--learning_rat", "1"], "learning_rate"),
        (["--train_batch_size", "many"], "train_batch_size"),
        (["--use_8bit_adam"], "AdamW is fused"),
        (["--push_to_hub", "true"], "nothing is uploaded"),
        (["--timestep_sharing", "view"], "must be one of group, row, object"),
        (["--unet_from_pretrained_kwargs.cd_attention_mid=true"], "needs pred_type joint"),
        (["--unet_from_pretrained_kwargs.zero_init_camera_projection=true"], "leave it false"),
        (["--camera_embedding_type", "plucker"], "only e_de_da_sincos"),
        (["--unet_from_pretrained_kwargs.num_views=4"], "num_views is 6"),
        (["--snr_rule", "mine"], "must be one of seed, paper, wonder3d"),
        (["--lr_scheduler", "cos"], "must be one of constant"),
        (["--bg_color", "7"], "bg_color '7': known are white"),
        (["--bg_color", "mauve"], "bg_color 'mauve'"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps 0 must be a number of at least 1"),
        (["--max_train_samples", "0"], "max_train_samples 0"),
        (["--vae_chunk", "-1"], "vae_chunk -1"),
        (["--num_validation_samples", "-1"], "num_validation_samples -1"),
        (["--vis_every", "often"], "vis_every 'often'"),
        (["--ema_decay", "2"], "ema_decay 2.0 must be between 0 and 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            build.parse(arguments, "")
        assert message in f"{stopped.value} {capsys.readouterr().err}", arguments


@pytest.mark.parametrize("arguments, message", UNREADABLE, ids=[str(a[-1]).split("/")[-1] for a, _ in UNREADABLE])
def test_evaluation_that_cannot_be_is_named_before_sampling(renders, straight, tmp_path, monkeypatch, arguments, message):
    run_folder = tmp_path / "run"
    shutil.copytree(straight, run_folder)
    (run_folder / "short.pt").write_bytes((run_folder / "checkpoint" / "00000004.pt").read_bytes()[:1000])
    given = ["--weights", "RUN/pipeline", "--data", renders, *arguments]
    monkeypatch.setattr("sys.argv", ["eval.py", *(str(word).replace("RUN", str(run_folder)) for word in given)])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(SystemExit, match=message):
        evaluation.main()


def test_numbers_below_one_are_refused(capsys, monkeypatch):
    for script, name, arguments in ((evaluation, "eval.py", ["--limit", "0"]), (infer, "infer.py", ["--batch", "0"])):
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with pytest.raises(SystemExit):
            script.main()
        assert "0: must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        dataset.main(["--check", "nowhere", "--resolution", "0"])
    with pytest.raises(SystemExit):
        dataset.main(["--check", "nowhere", "--out", "check.xyz"])
    assert "must end in .png" in capsys.readouterr().err
    assert dataset.main(["--cache", "nowhere", "--debug"]) == 1 and "nothing can be stored" in capsys.readouterr().err


def test_evaluation_of_no_object_is_an_error(renders, straight, tmp_path, monkeypatch):
    shutil.copytree(renders, tmp_path / "data")
    for path in tmp_path.glob("data/000/*/normals_*.png"):
        path.write_bytes(b"")
    given = ["--weights", straight / "pipeline", "--data", tmp_path / "data", *SAMPLER]
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, given)])
    with pytest.raises(SystemExit, match="not one of 5 objects could be read"):
        evaluation.main()


def test_another_networks_checkpoint_is_refused(renders, tmp_path, straight):
    shutil.copytree(straight, tmp_path / "run")
    output = run(*small(renders, tmp_path / "run", num_views=2), code=None)
    assert "num_views 4 -> 2" in output and "choose another workspace" in output


def test_shipped_configs_are_those_of_the_recipes():
    """image.yaml and joint.yaml: the published recipe; variation.yaml: the document's rules."""
    read = lambda name: build.parse(["--config", str(ROOT / "mvdiff" / "configs" / f"{name}.yaml")], "")
    one, two, other = read("image"), read("joint"), read("variation")
    for cfg, steps, lr in ((one, 30000, 1e-4), (two, 20000, 5e-5)):
        assert (cfg.max_train_steps, cfg.learning_rate, cfg.train_batch_size, cfg.gradient_accumulation_steps) == (steps, lr, 32, 2)
        assert (cfg.snr_gamma, cfg.condition_drop_rate, cfg.timestep_sharing, cfg.use_ema) == (5.0, 0.05, "group", True)
    assert (one.pred_type, one.trainable_modules, two.pred_type, two.trainable_modules) == ("mix", None, "joint", ["joint_mid"])
    assert two.unet_from_pretrained_kwargs.cd_attention_mid and two.init == f"{one.workspace}/pipeline"
    assert (other.timestep_sharing, other.drop_rule, other.row_order, other.cond_latent) == ("row", "both", "color_first", "sample")
