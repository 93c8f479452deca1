"""Multi-view diffusion against the official implementation's values: every case of the folder, by its `kind`."""

import functools
import re

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import close
from PIL import Image

from mvdiff import build, camera, clip, dataset, loss, metrics, model, optim, pictures, train, unet, vae
from mvdiff.diffusion import Diffusion, make_betas, zero_terminal_snr
from mvdiff.layers import Downsample, ResnetBlock, Upsample
from mvdiff.weights import read_safetensors, write_safetensors


def tensors(case: dict, arrays: dict) -> dict[str, torch.Tensor]:
    """Every input by name: stored arrays win over draws, lists of numbers stand for themselves."""
    fill, found = golden.module("fill"), {}
    for name, spec in {**case.get("inputs", {}), **case.get("inputs_spec", {})}.items():
        if isinstance(spec, dict) and {"seed", "shape"} <= spec.keys():
            draw = fill.draw(spec["seed"], spec["shape"], spec.get("kind", "uniform"))
            draw = np.float32(spec.get("offset", 0)) + np.float32(spec.get("scale", 1)) * draw
            found[name] = np.floor(draw).astype(np.uint8) if "uint8" in spec.get("cast", "") else draw
        elif isinstance(spec, list) and spec and all(isinstance(v, (int, float)) for v in spec):
            found[name] = np.array(spec, np.float32 if any(isinstance(v, float) for v in spec) else np.int64)
    stored = [*case.get("inputs_stored", []), *(name for name in arrays if name.startswith("in_"))]
    found |= {name.removeprefix("in_"): arrays[name] for name in stored}
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


def loaded(module, table: dict):
    """The module with the case's weights, after its names and shapes were compared with the case's table."""
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == table
    module.load_state_dict(golden.filled(table))
    return module.eval()


def build_unet(config: dict, table: dict) -> unet.UNet:
    return loaded(unet.UNet(**model.unet_arguments(config)), table)


def build_frozen(case: dict) -> tuple[vae.AutoencoderKL, clip.CLIPVision]:
    autoencoder = vae.AutoencoderKL(**model.vae_arguments(case["config"]["vae"]))
    encoder = clip.CLIPVision(**model.clip_arguments(case["config"]["clip"]))
    return loaded(autoencoder, case["state_dict"]["vae"]), loaded(encoder, case["state_dict"]["image_encoder"])


def gradient_norms(module) -> dict[str, float]:
    return {k: 0.0 if p.grad is None else p.grad.norm().item() for k, p in module.named_parameters()}


def check_norms(got: dict, want: dict):
    """Norms within 1e-3; below 1e-6 both count as zero (the queries and keys of attention to one token)."""
    for name, value in want.items():
        assert abs(got[name] - value) <= 1e-3 * value + 1e-7 or max(got[name], value) < 1e-6, (name, got[name], value)


def number(text: str) -> float:
    return float(re.search(r"-?\d+(\.\d+)?(e-?\d+)?", text).group())


# ---- networks --------------------------------------------------------------------------------------------------------


def check_unet(case, arrays):
    network, given, want = build_unet(case["config"], case["state_dict"]), tensors(case, arrays), case["expected"]
    stages = {}
    for entry in want:
        if entry.startswith("stage:"):
            keep = lambda _module, _args, out, entry=entry: stages.__setitem__(entry, out[0] if isinstance(out, tuple) else out)
            network.get_submodule(entry.removeprefix("stage:")).register_forward_hook(keep)
    for value in given.values():
        value.requires_grad_(value.is_floating_point())
    out = network(given["sample"], given["timesteps"], given["encoder_hidden_states"], given.get("class_labels"))
    mean_square = out.square().mean()
    mean_square.backward()
    for entry, value in want.items():
        if entry in stages:
            got, sub = stages[entry], value["flat_subsample"]
            assert got.numel() == np.prod(value["shape"])
            close(got.reshape(-1)[:: value["every"]][: len(sub)], sub, atol=5e-5, what=entry)
        elif entry == "param_grad_norms":
            check_norms(gradient_norms(network), value)
        elif entry.startswith("grad_"):
            grad = given[entry.removeprefix("grad_").removesuffix("_of_mean_square")].grad
            close(grad, arrays[entry], atol=1e-6, rtol=1e-3, what=entry)
        else:
            close({"sample": out, "mean_square": mean_square}[entry], arrays.get(entry, value), atol=5e-5, what=entry)


def block_of(name: str, c: dict, table: dict) -> unet.TransformerBlock:
    flags = {f"cd_attention_{at}": f"attn_joint_{at}.to_q.weight" in table for at in ("mid", "last")}
    flags |= {"multiview_attention": "single" not in name, "sparse_mv_attention": "sparse" in name, "num_views": c["num_views"]}
    return loaded(unet.TransformerBlock(c["dim"], c["heads"], c["context_dim"], **flags), table)


def transformer_of(c: dict, table: dict) -> unet.Transformer2D:
    inner = [k.removeprefix("transformer_blocks.") for k in table if k.startswith("transformer_blocks.")]
    flags = {f"cd_attention_{at}": any(f".attn_joint_{at}." in k for k in inner) for at in ("mid", "last")}
    depth, linear = 1 + max(int(k.split(".")[0]) for k in inner), len(table["proj_in.weight"]) == 2
    args = (c["dim"], c["heads"], c["context_dim"], c["groups"], depth, linear)
    return loaded(unet.Transformer2D(*args, num_views=c["num_views"], **flags), table)


def check_blocks(case, arrays):
    c, given, tables = case["config"], tensors(case, arrays), case["state_dict"]
    joint = [t for n, t in tables.items() if n.startswith("block") and "attn_joint_mid.to_q.weight" in t]
    joint = tables.get("block_mid", joint[0] if joint else None)
    for entry, spec in case["expected"].items():
        small = "_small" if entry.endswith("_small") else ""
        name, rows = entry.removesuffix("_small"), spec["shape"][0]
        feat, tokens = given.get("feat" + small, torch.empty(0))[:rows], given.get("tokens" + small, torch.empty(0))[:rows]
        table = tables.get(name)
        if name.startswith("resnet"):
            channels = table["conv1.weight"]
            time = table["time_emb_proj.weight"][1] if "time_emb_proj.weight" in table else None
            block = loaded(ResnetBlock(channels[1], channels[0], time, c["groups"], 1e-6 if "vae" in name else 1e-5), table)
            out = block(feat, None if time is None else F.silu(given["temb"][:rows]))
        elif name.startswith("upsample"):
            out = loaded(Upsample(c["dim"]), table)(feat, tuple(spec["shape"][2:]) if "to_size" in name else None)
        elif name.startswith("downsample"):
            out = loaded(Downsample(c["dim"], padding=0 if "pad0" in name else 1), table)(feat)
        elif name.startswith("block"):
            context = given["context3" if "context3" in name else "context"][:rows]
            out = block_of(name, c, table or tables[name.replace("_context3", "")])(tokens, context)
        elif name.endswith("_only"):
            block = block_of("mid", c, joint)
            out = {
                "attn1_only": lambda x, b=block: b.self_attention(x),
                "attn_joint_only": lambda x, b=block: b.attn_joint_mid.cross_domain(x),
                "attn2_only": lambda x, b=block: b.attn2.single_token(given["context"][: len(x)]).expand_as(x),
                "ff_only": lambda x, b=block: b.ff(x),
            }[name](tokens)
        elif name == "transformer2d":
            out = transformer_of(c, table)(feat, given["context"][:rows])
        elif name == "vae_mid_attention":
            out = loaded(vae.Attention(c["dim"], c["groups"]), table)(feat)
        elif name == "time_proj":
            out = unet.timestep_embedding(given["timesteps"], spec["shape"][1])
        elif name in ("time_embedding", "class_embedding"):
            wide, narrow = table["linear_1.weight"]
            x = unet.timestep_embedding(given["timesteps"], narrow) if name == "time_embedding" else given["labels10"]
            out = loaded(unet.Embedding(narrow, wide), table)(x)
        else:
            raise AssertionError(f"unknown block {entry}")
        close(out, arrays[entry], atol=2e-5, what=entry)


def check_vae(case, arrays):
    given, config, got = tensors(case, arrays), case["config"], {}
    if "state_dict" in case:
        autoencoder, tolerance = vae.AutoencoderKL(**model.vae_arguments(config)), {"atol": 5e-5}
        renamed = case.get("deprecated_names", {})
        today = golden.filled(case["state_dict"])
        back = {new: old for old, new in renamed.items()}
        old = {back.get(k, k): v[:, :, None, None] if k in back and v.ndim == 2 else v for k, v in today.items()}
        assert set(renamed) <= set(old)
        assert {k: v.shape for k, v in vae.rename_old_attention(old).items()} == {k: v.shape for k, v in today.items()}
        loaded(autoencoder, case["state_dict"]).load_state_dict(vae.rename_old_attention(old))
        if "image" in given:
            got["encoder_out"] = autoencoder.encoder(2 * given["image"] - 1)
            moments = got["moments"] = autoencoder.quant_conv(got["encoder_out"])
            for got_part, part in zip(autoencoder.encode(2 * given["image"] - 1, chunk=1), vae.posterior(moments.detach())):
                close(got_part, part, atol=1e-5, what="encode in chunks")
        if "latent" in given:
            got["decoded"] = autoencoder.decode(given["latent"] / autoencoder.scaling_factor, chunk=1)
            got["post_quant"] = autoencoder.post_quant_conv(given["latent"])
        if "mid_feat" in given:
            got["mid_attention"] = autoencoder.encoder.mid_block.attentions[0](given["mid_feat"])
            got["mid_block"] = autoencoder.encoder.mid_block(given["mid_feat"])
    else:
        got["moments"], tolerance = torch.cat([given["mean"], given["logvar"]], dim=1), {"rtol": 1e-5}
    if "moments" in got:
        mean, std = vae.posterior(got["moments"])
        got |= {"mode": mean, "std": std, "logvar": 2 * std.log(), "scaled_mode": mean * config.get("scaling_factor", 0.18215)}
        got |= {"sample": mean + std * given["sample_noise"]} if "sample_noise" in given else {}
    for entry in case["expected"]:
        close(got[entry], arrays[entry], what=entry, **tolerance)


def check_clip(case, arrays):
    network = loaded(clip.CLIPVision(**model.clip_arguments(case["config"])), case["state_dict"])
    got, tower = {}, network.vision_model
    tower.embeddings.register_forward_hook(lambda m, a, out: got.update(embeddings=out))
    for i, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: got.update({f"layer{i}": out, "last_hidden_state": out}))
    got["image_embeds"] = network(tensors(case, arrays)["pixel_values"])
    for entry in case["expected"]:
        close(got[entry], arrays[entry], atol=2e-5, what=entry)


def check_clip_preprocess(case, arrays):
    given, size = tensors(case, arrays), case["config"]["size"]
    for entry, spec in case["expected"].items():
        if entry == "to_pil_uint8":
            assert np.array_equal(clip.to_uint8(given["to_pil"])[0].permute(1, 2, 0), arrays[entry])
        elif entry.startswith("tensor"):
            name, antialias = entry.split("_antialias_")
            out = clip.preprocess_tensor(given[name], size, antialias == "True")
            step = size // spec["shape"][-1]
            close(out[..., ::step, ::step], arrays[entry], atol=1e-4, what=entry)
        else:
            out = clip.preprocess_pil(given[entry.removesuffix("_edges")].numpy(), size)
            step = size // spec["shape"][-1]
            out = out[:, [0, size - 1]] if entry.endswith("_edges") else out[:, ::step, ::step]
            close(out, arrays[entry], atol=1e-5, what=entry)


# ---- diffusion and loss ----------------------------------------------------------------------------------------------


def check_noise_schedule(case, arrays):
    given, config, t = tensors(case, arrays), case["config"], tensors(case, arrays)["timesteps"]
    schedule = Diffusion(**model.diffusion_arguments(config))
    zero = Diffusion(**model.diffusion_arguments({**config, "rescale_betas_zero_snr": True}))
    close((1 - zero_terminal_snr(schedule.betas)).cumprod(0), zero.alphas_cumprod, atol=1e-6)
    rules = {"eps": ("epsilon", "wonder3d"), "snrplus1": ("v_prediction", "seed")}
    for entry in case["expected"]:
        tolerance, name = {"atol": 1e-6}, entry.removeprefix("zero_snr_")
        used = schedule if name == entry else zero
        if name in ("betas", "alphas_cumprod"):
            out = getattr(used, name)[t]
        elif name.startswith("alphas_cumprod_all_every_"):
            out = used.alphas_cumprod[:: int(name.rsplit("_", 1)[1])]
        elif name == "snr" or name.startswith("minsnr_weight_"):
            out, tolerance = used.snr(t), {"rtol": 1e-4}
            if name != "snr":
                rule, gamma = name.removeprefix("minsnr_weight_").split("_gamma")
                out = loss.snr_weights(out, float(gamma), *rules[rule])
        elif name in ("add_noise", "velocity"):
            out = getattr(used, name)(given["latents"], given["noise"], t)
        elif entry.startswith("linear_betas_every_"):
            out = make_betas(config["num_train_timesteps"], 1e-4, 0.02, "linear")[:: int(entry.rsplit("_", 1)[1])]
        else:
            raise AssertionError(f"unknown entry {entry}")
        close(out, arrays[entry], what=entry, **tolerance)


def trajectory(schedule: Diffusion, spec: dict, given: dict) -> torch.Tensor:
    x, steps = given[spec["start"]], spec["num_inference_steps"]
    for k, t in enumerate(schedule.timesteps(steps)):
        output = spec["model"]["x_factor"] * x + spec["model"]["sin_t_factor"] * float(np.sin(t))
        noise = given["variance_noise"][k] if spec["eta"] else None
        x = schedule.step(output, t, x, steps, spec["eta"], noise)
    return x


def check_ddim(case, arrays):
    given, spec = tensors(case, arrays), case.get("inputs_spec", {})
    make = lambda **changes: Diffusion(**model.diffusion_arguments({**case["config"], **changes}))
    runs = {"trajectory": spec.get("trajectory")} | {run["expected"]: run for run in spec.get("trajectories", [])}
    scheduler = lambda run: make(**run)
    for entry, want in case["expected"].items():
        if entry == "timesteps":
            for name, steps in want.items():
                spacing, n = name.rsplit("_", 1)
                assert make(timestep_spacing=spacing).timesteps(int(n)) == steps, name
        elif entry.startswith("timesteps_"):
            run = runs[entry.replace("timesteps", "trajectory")]
            assert scheduler(run).timesteps(run["num_inference_steps"]) == want, entry
        elif entry.startswith("trajectory"):
            close(trajectory(scheduler(runs[entry]), runs[entry], given), arrays[entry], atol=1e-4, what=entry)
        else:
            prediction, t, eta = re.fullmatch(r"step_(\w+)_t(\d+)_eta([\d.]+)", entry).groups()
            step = make(prediction_type=prediction).step
            noise, n = given["variance_noise"], spec["num_inference_steps"]
            out = step(given["model_output"], int(t), given["sample"], n, float(eta), noise)
            close(out, arrays[entry], atol=1e-5, what=entry)


def check_loss(case, arrays):
    given, config, spec = tensors(case, arrays), case["config"], case.get("inputs_spec", {})
    t, schedules = given["timesteps"], {}
    for prediction in ("epsilon", "v_prediction"):
        for zero in (False, True):
            changes = {"prediction_type": prediction, "rescale_betas_zero_snr": zero}
            schedules[prediction, zero] = Diffusion(**model.diffusion_arguments({**config, **changes}))
    for entry, want in case["expected"].items():
        zero = entry.startswith("zero_snr_")
        name = entry.removeprefix("zero_snr_").removeprefix("grad_")
        kind = "v_prediction" if "v_prediction" in name else "epsilon"
        schedule = schedules[kind, zero]
        if name == "snr":
            close(schedule.snr(t), arrays[entry], rtol=1e-4, what=entry)
        elif name.startswith("noise_with_offset_"):
            out = loss.offset_noise(given["noise"], number(name), given["offset_noise"])
            assert number(name) == spec["noise_offset"]
            close(out, arrays[entry], atol=1e-6, what=entry)
        elif name.startswith("noisy_with_perturbation_"):
            noise = loss.perturb_input(given["noise"], number(name), given["perturb_noise"])
            close(schedule.add_noise(given["latents"], noise, t), arrays[entry], atol=1e-6, what=entry)
        elif "_plus1" in name:  # a value or its gradient; the rule of v-prediction is asked of both kinds
            gamma, plus = re.search(r"_gamma(None|[\d.]+)_plus1(True|False)", name).groups()
            rule = ("v_prediction", "seed") if plus == "True" else (kind, "wonder3d")
            weights = loss.snr_weights(schedule.snr(t), None if gamma == "None" else float(gamma), *rule)
            prediction = given["prediction"].clone().requires_grad_()
            value, rows = loss.diffusion_loss(prediction, schedule.target(given["latents"], given["noise"], t), weights)
            value.backward()
            close((weights * rows).mean(), value.detach(), rtol=1e-6)
            if entry.startswith("grad_"):
                close(prediction.grad, arrays[entry], atol=1e-7, what=entry)
            else:
                close(value, want, atol=1e-6, rtol=1e-5, what=entry)
        else:
            rule = re.match(r"wonder3d|seed|paper", name)
            weights = loss.snr_weights(schedule.snr(t), number(name.split("_gamma")[1]), kind, *([rule.group()] if rule else []))
            close(weights, arrays[entry], rtol=1e-4, what=entry)


def check_cfg_dropout(case, arrays):
    given, config, rate = tensors(case, arrays), case["config"], case["config"]["condition_drop_rate"]
    got = {}
    if "B" in config:
        for name, spec in case["inputs_spec"].items():
            masks = loss.keep_conditions(given[spec["random_p"]][: spec["first"]], rate)
            unit = loss.DROP_UNITS[name]
            rows = next(len(v) for entry, v in case["expected"].items() if entry.startswith(name))
            domains = rows // (config["B"] * config["V"])
            assert loss.unit_count(unit, domains, config["B"], config["V"]) == spec["first"]
            for mask, what in zip(masks, ("image", "clip")):
                got[f"{name}_{what}_mask"] = loss.spread(mask, unit, domains, config["B"], config["V"])
    else:
        masks = lambda name: dict(zip(("image", "clip"), loss.keep_conditions(given[name], rate)))
        for entry in case["expected"]:
            what = "image" if "image" in entry else "clip"
            if entry == "seed_keep_mask_both":
                got[entry] = loss.keep_conditions(given["seed_rand"], case["inputs"]["seed_p_uncond"], "both")[0]
            elif entry.startswith("drop_joint_"):
                pairs = masks("drop_joint_random_p_per_view_pair")[what]
                got[entry] = loss.spread(pairs, "pair", 2, 1, len(pairs))
            elif match := re.fullmatch(r"as_a_whole_joint_\w+_mask_B(\d+)_V(\d+)", entry):
                got[entry] = loss.spread(masks("two_objects_random_p")[what], "object", 2, *map(int, match.groups()))
            else:
                got[entry] = masks("random_p")[what]
    for entry, want in case["expected"].items():
        assert got[entry].tolist() == want, entry


def check_lr_ema_optimizer(case, arrays):
    given, want, config = tensors(case, arrays), case["expected"], case["config"]
    checked = {"lr", "ema_decay_first", "ema_decay_at", "ema_warmup_decay_at", "ema_shadow", "adamw_history", "grad_norms_before_clip"}
    assert want.keys() <= checked, f"nothing checks {want.keys() - checked}"
    for name, rows in want.get("lr", {}).items():
        schedule, _, rest = name.partition("_nproc")
        default = {"default_lr": config["base_lr"]} if rest.endswith("default_lr_base") else {}
        ratio = next((row[2] / row[1] for row in rows if row[1] > 0), 1.0)
        for step, lr, camera_lr in rows:
            got = config["base_lr"] * optim.lr_factor(schedule, step, config["warmup"], config["max_train_steps"], **default)
            close([got, ratio * got], [lr, camera_lr], atol=1e-9, what=f"{name} {step}")
    for i, decay in enumerate(want.get("ema_decay_first", []), 1):
        close(optim.ema_decay(i), decay, atol=1e-9, what=f"decay {i}")
    for name, warm in (("ema_decay_at", False), ("ema_warmup_decay_at", True)):
        for n, decay in want.get(name, {}).items():
            close(optim.ema_decay(int(n), use_ema_warmup=warm), decay, atol=1e-9, what=f"{name} {n}")
    if "ema_shadow" in want:
        shadow = [given["ema_init"].clone()]
        for k, row in enumerate(given["ema_params"]):
            optim.ema_update(shadow, [row], optim.ema_decay(k + 1))
            close(shadow[0], arrays["ema_shadow"][k], atol=1e-6, what=f"shadow {k}")
    if "adamw_history" in want:
        check_adamw(case["inputs_spec"]["adamw"], given, want, arrays["adamw_history"])


def check_adamw(spec, given, want, history):
    w, cls = (torch.nn.Parameter(given[k].clone()) for k in ("w", "cls"))
    groups = optim.parameter_groups({"w": w, "class_embedding": cls}, spec["lr"], spec["lr_class_embedding"] / spec["lr"])
    optimizer = torch.optim.AdamW(groups, betas=spec["betas"], weight_decay=spec["weight_decay"], eps=spec["eps"])
    for k, row in enumerate(history):
        w.grad, cls.grad = given["w_grads"][k].clone(), given["cls_grads"][k].clone()
        norm = torch.nn.utils.clip_grad_norm_([w, cls], spec["clip_norm"])
        if "grad_norms_before_clip" in want:
            close(norm, want["grad_norms_before_clip"][k], rtol=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * optim.lr_factor(spec["schedule"], k, spec["num_warmup_steps"], len(history))
        optimizer.step()
        close(torch.cat([w, cls]), row, atol=1e-6, what=f"step {k}")


# ---- data ------------------------------------------------------------------------------------------------------------


def check_camera(case, arrays):
    given, views, spec = tensors(case, arrays), tuple(case["config"]["views"]), case["inputs_spec"]
    flag = lambda n, value: torch.full((n,), value)
    for entry in case["expected"]:
        name, _, view = entry.partition("_cond_")
        angles = torch.from_numpy(camera.camera_angles(view, views)) if view else None
        if name == "camera_embeddings":
            out = angles
        elif name == "normal_rotation":
            out = camera.normal_rotation(view, views)
        elif name in ("embed10_normal", "embed10_color"):
            out = camera.camera_vector(angles, flag(len(views), name.endswith("normal")))
        elif name.startswith("pipeline_default"):
            table = torch.from_numpy(camera.sampler_angles(len(views))).repeat(2, 1)
            is_normal = torch.cat([flag(len(views), True), flag(len(views), False)])
            out = camera.camera_vector(table, is_normal)
            if "embed10" not in name:
                out = torch.cat([table, is_normal.float()[:, None], 1 - is_normal.float()[:, None]], dim=1)
        elif name == "normals_rotated_01":
            assert view == spec["normals_condition_view"]
            rgba = F.pad(given["normals_u8"], (0, 1), value=255)  # (V,H,W,4)
            batch = {
                "rgba": rgba[None, None],
                "condition": rgba[:1],
                "background": torch.ones(1, 3),
                "is_normal": torch.ones(1, 1),
            }
            batch["rotation"] = torch.from_numpy(camera.normal_rotation(view, views))[None]
            out = dataset.compose(batch)[1][0, 0].permute(0, 2, 3, 1)
        else:
            raise AssertionError(f"unknown entry {entry}")
        close(out, arrays[entry], atol=1e-6, what=entry)


def check_objaverse_dataset(case, arrays, folder):
    given, config, spec, want = tensors(case, arrays), case["config"], case["inputs_spec"], case["expected"]
    views, size = spec["view_order"], config["img_wh"][0]
    variants = spec.get("variants") or {k: config[k] for k in ("joint", "rgba") if k in config}
    for variant, options in variants.items():
        home = folder / variant / "abc" / "abcdef"
        home.mkdir(parents=True)
        rgb, normals, mask = (given[k].numpy() for k in ("rgb", "normals", "mask"))
        if options.get("rgba"):
            rgb, normals = (np.concatenate([x, mask[..., None]], axis=-1) for x in (rgb, normals))
        for i, view in enumerate(views):
            stored = {"rgb": rgb[i][..., : options.get("rgb_channels", 4)], "mask": mask[i]}
            stored["normals"] = normals[i][..., : options.get("normals_channels", 4)]
            for name, pixels in stored.items():
                if name != "mask" or options["read_mask"]:
                    Image.fromarray(np.ascontiguousarray(pixels)).save(home / f"{name}_000_{view}.png")
        at = options.get("condition_view", config.get("condition_view", "front"))
        objects = dataset.list_objects(folder / variant)
        chosen = {"condition_view": at, "bg_color": options["bg_color"], "read_mask": options["read_mask"]}
        data = dataset.MultiViewDataset(folder / variant, objects, len(views), size, **chosen)
        assert list(data.views) == views
        sample = data.load(0, np.random.default_rng(0))
        batch = {k: torch.from_numpy(np.asarray(v))[None] for k, v in sample.items() if k != "name"}
        condition, targets = dataset.compose(batch)
        got = {"imgs_in": condition, "camera_embeddings": batch["angles"][0]}
        for d, name in enumerate(data.domains):
            got[{"color": "imgs_out", "normal": "normals_out"}[name]] = targets[0, d]
            flags = torch.stack([batch["is_normal"][0, d], 1 - batch["is_normal"][0, d]]).float()
            got[f"{name}_task_embeddings"] = flags.repeat(len(views), 1)
        got["elevations_deg"], got["azimuths_deg"] = batch["angles"][0, :, 1:].rad2deg().unbind(1)
        names = {k: k for k in got} if variant == "joint" else {k: k for k in ("camera_embeddings",)}
        names |= {f"rgba_{k}": k for k in got} if variant == "rgba" else {f"{k}_{variant}": k for k in got}
        for entry, key in names.items():
            if entry in want:
                expected = arrays[entry] if entry in arrays else want[entry]
                step = -(-len(got[key]) // len(expected))  # stored is every step-th view
                close(got[key][::step], expected, atol=1e-4 if key.endswith("_deg") else 1e-6, what=entry)
    done = {"mix_note", *(e for e in want if any(e.endswith(v) or e.startswith(v) for v in variants))}
    assert set(want) - done <= set(got), set(want) - done - set(got)


def check_single_image(case, arrays):
    given = tensors(case, arrays)
    for name, options in case["inputs"].items():
        size = options["img_wh"][0]
        image, alpha = pictures.prepare_input(
            Image.fromarray(given[f"image_{name}"].numpy()), size, options["crop_size"], options["bg_color"], crop_inclusive=False
        )
        pair = {f"image_{name}": image, f"alpha_{name}": alpha}
        for entry, got in ((entry, got) for entry, got in pair.items() if entry in case["expected"]):
            step = size // arrays[entry].shape[-1]
            close(got[:, ::step, ::step], arrays[entry], atol=1e-6, what=entry)
        if f"bbox_{name}" in case["expected"]:
            rows, columns = np.nonzero(alpha[0])
            assert [rows.min(), rows.max(), columns.min(), columns.max()] == case["expected"][f"bbox_{name}"]


def check_seed_dataset(case, arrays):
    given, config, spec, want = tensors(case, arrays), case["config"], case["inputs_spec"], case["expected"]
    images = {"image_vae": "image_u8"} | {one["expected"]: one["image"].removeprefix("in_") for one in spec.get("images", {}).values()}
    for entry in want:
        if entry == "image_clip":
            out = clip.preprocess_pil(given["image_u8"].numpy())
            step = out.shape[-1] // arrays[entry].shape[-1]
            close(out[:, ::step, ::step], arrays[entry], atol=1e-6, what=entry)
        elif entry == "row_labels_seed_order":
            s = spec["row_labels"]
            label = torch.arange(s["B"] * s["V"]).view(s["B"], s["V"])
            rows = model.target_rows(torch.stack([s["color_base"] + label, s["normal_base"] + label], dim=1))
            assert rows.tolist() == want[entry]
        else:
            image = Image.fromarray(given[images[entry]].numpy())
            out = np.asarray(pictures.fit_square(image, config["resolution"], config["center_crop"]), np.float32)
            close((out.transpose(2, 0, 1) / 255 - 0.5) / 0.5, arrays[entry], atol=1e-6, what=entry)


def check_validation_grid(case, arrays):
    given, per_row = tensors(case, arrays), case["config"]["nrow"]
    truth = pictures.grid(torch.cat([given["normals"], given["colors"]]), per_row)
    got = {"joint_pred_grid_upstream": pictures.grid(torch.stack([given["normals"], given["colors"]], 1).flatten(0, 1), per_row)}
    got |= {"gt_grid_upstream": truth, "save_image_uint8_of_gt_grid": pictures.round_uint8(truth).permute(1, 2, 0)}
    for entry in case["expected"]:
        close(got[entry], arrays[entry], atol=0 if "uint8" in entry else 1e-6, what=entry)


def check_safetensors(case, arrays, folder):
    read = read_safetensors(golden.ROOT / "mvdiff" / case["config"]["file"])
    write_safetensors(folder / "again.safetensors", read)
    for found in (read, read_safetensors(folder / "again.safetensors")):
        assert found.keys() == read.keys() >= case["expected"].keys()
        for name, want in case["expected"].items():
            assert str(found[name].dtype) == f"torch.{want['dtype']}" and list(found[name].shape) == want["shape"]
            assert found[name].reshape(-1).double().tolist() == want["values"], name


def check_metrics(case, arrays):
    given, want = tensors(case, arrays), case["expected"]
    got = {}
    if "pred" in given:
        got["psnr"] = metrics.psnr(given["pred"], given["gt"])
        got["ssim_gaussian11"] = metrics.ssim(given["pred"], given["gt"])
        got["ssim_uniform7"] = metrics.ssim(given["pred"], given["gt"], "uniform")
    if "points_a" in given:
        names = ("chamfer_mean_a_to_b", "chamfer_mean_b_to_a", "chamfer_half_sum")
        got |= dict(zip(names, metrics.chamfer(given["points_a"].numpy(), given["points_b"].numpy())))
    if "vox_a" in given:
        got["volume_iou"] = metrics.volume_iou(given["vox_a"].numpy(), given["vox_b"].numpy())
    for entry, value in want.items():
        if entry.startswith("normal_"):
            i = int(entry.removeprefix("normal_"))
            angles = metrics.normal_angular_error(given["normal_pred"][i], given["normal_gt"][i], given["mask"][i].bool())
            for name, number_ in value.items():
                close(angles[name], number_, rtol=1e-5, what=f"{entry} {name}")
        else:
            close(got[entry], arrays.get(entry, value), rtol=1e-5, what=entry)


# ---- whole steps -----------------------------------------------------------------------------------------------------


def check_pipeline(case, arrays):
    c, given, want = case["config"], tensors(case, arrays), case["expected"]
    network = build_unet(c["unet"], case["state_dict"]["unet"])
    autoencoder, encoder = build_frozen(case)
    schedule = Diffusion(**model.diffusion_arguments(c["scheduler"]))
    (objects, views), domains = given["cam3"].shape[:2], c.get("domains", ["normal", "color"])
    image = clip.to_uint8(given["image"])
    pixels = torch.from_numpy(np.stack([clip.preprocess_pil(i.permute(1, 2, 0).numpy(), encoder.image_size) for i in image]))
    latent, embedding = model.encode_condition(autoencoder, encoder, image.float() / 255 * 2 - 1, pixels)
    encoded = {"image_embeddings": embedding[:, None], "cond_latents": latent}
    for entry in encoded.keys() & want.keys():  # stored are the first views' rows
        close(model.to_rows(encoded[entry], len(domains), views)[::views], arrays[entry], atol=5e-5, what=entry)
    is_normal = torch.tensor([d == "normal" for d in domains])[:, None, None].expand(-1, objects, views)
    cameras = camera.camera_vector(given["cam3"].expand(len(domains), -1, -1, -1), is_normal)  # (D,B,V,10)
    rows = lambda x: x.view(len(domains), objects, views, *x.shape[1:])

    def run(guidance, eta, keep=slice(None)):
        pick = lambda x: rows(x)[:, keep].flatten(0, 2)
        return model.sample(
            network, schedule, latent[keep], embedding[keep], cameras[:, keep].flatten(0, 2), pick(given["init_latents"]), views,
            c["num_inference_steps"], guidance, eta, lambda k: pick(given["eta1_noise"][k]),
        )  # fmt: skip

    whole = functools.cache(run)
    pictures_of = functools.cache(lambda guidance, eta: model.decode(autoencoder, whole(guidance, eta)))
    for entry, value in want.items():
        if entry in ("image_embeddings", "cond_latents"):
            continue
        guidance, eta = number(entry.split("_g")[1]), number(entry.split("_eta")[1]) if "_eta" in entry else 0.0
        if entry.startswith("latents_"):
            close(whole(guidance, eta), arrays[entry], atol=5e-4, what=entry)
            if objects > 1:  # an object sampled alone
                one = rows(whole(guidance, eta))[:, 1:2].flatten(0, 2)
                close(run(guidance, eta, slice(1, 2)), one, atol=5e-4, what=f"{entry} alone")
        elif entry.startswith("image_"):
            step = pictures_of(guidance, eta).shape[-1] // arrays[entry].shape[-1]
            close(pictures_of(guidance, eta)[:, :, ::step, ::step], arrays[entry], atol=2e-4, what=entry)
        else:
            decoded = pictures_of(guidance, eta)
            assert entry.startswith("saturated_fraction_g")
            close(((decoded == 0) | (decoded == 1)).double().mean(), value, atol=1e-3, what=entry)


def denoised(network, autoencoder, case, work: dict, draws: dict, cameras, **options) -> dict:
    """The program's own training step up to the loss, on a case's draws: its loss, and what the network was given and gave."""
    got, options = {}, {"num_views": network.num_views, **options}
    cfg = build.parse([f"--{key}={'null' if value is None else value}" for key, value in options.items()], "")
    scheduler = {**case["config"].get("scheduler", {}), "prediction_type": cfg.prediction_type}
    schedule = Diffusion(**model.diffusion_arguments(scheduler))

    def net(x, t, context, camera):
        got.update(noisy=x[:, :4], cond_latents=x[:, 4:], image_embeddings=context, embed10=camera)
        got["pred"] = network(x, t, context, camera)
        return got["pred"]

    frozen = build.Frozen(autoencoder, None, schedule, {})
    got["loss"], got["rows"] = train.denoise(net, frozen, {**work, "camera": cameras}, draws, cfg, None)
    latents = (work["mean"] + work["std"] * draws["target"]) * autoencoder.scaling_factor
    return {**got, "target_latents": latents, "schedule": schedule}


def check_train_step(case, arrays):
    c, given, want = case["config"], tensors(case, arrays), case["expected"]
    autoencoder, encoder = build_frozen(case)
    objects, views = given["colors_out"].shape[:2]
    antialias = "antialias False" not in c["clip_resize"]
    pixels = clip.preprocess_tensor(given["cond_image"], encoder.image_size, antialias)
    unit = loss.DROP_UNITS[c["drop_type"]]
    modes = [mode for mode in ("joint", "mix") if f"unet_{mode}" in c]
    assert {entry.split("_")[0] for entry in want} == set(modes)
    for mode in modes:
        network = build_unet(c[f"unet_{mode}"], case["state_dict"][f"unet_{mode}"])
        trained = optim.select_trainable(network, ["joint_mid"] if mode == "joint" else None, freeze_unused=False)
        if mode == "joint":  # normals, then colours
            targets, flags = torch.stack([given["normals_out"], given["colors_out"]], 1), torch.tensor([[1, 0]] * objects)
        else:  # colours and normals by turns
            flags = torch.arange(objects)[:, None] % 2
            targets = torch.where(flags[..., None, None, None] > 0, given["normals_out"], given["colors_out"])[:, None]
        domains = flags.shape[1]
        n = domains * objects * views
        angles = given["camera_embeddings"][:, None].expand(-1, domains, -1, -1)
        cameras = model.target_rows(camera.camera_vector(angles, flags[:, :, None].expand(-1, -1, views)))
        work = model.frozen_work(autoencoder, encoder, model.target_rows(targets) * 2 - 1, given["cond_image"] * 2 - 1, pixels, chunk=4)
        draws = {"target": given["vae_noise"][:n], "noise": given["noise"][:n]}
        draws["t"] = loss.spread(given["timesteps_per_group"][: domains * objects], "group", domains, objects, views)
        draws["drop"] = given["random_p"][: loss.unit_count(unit, domains, objects, views)]
        options = {"snr_gamma": c["snr_gamma"], "drop_type": c["drop_type"], "condition_drop_rate": c["drop_rate"]}
        options["prediction_type"] = c["prediction"]
        got = denoised(network, autoencoder, case, {**work, "is_normal": flags}, draws, cameras, **options)
        got["loss"].backward()
        noise, t, schedule = draws["noise"], draws["t"], got["schedule"]
        close(got["noisy"], schedule.add_noise(got["target_latents"], noise, t), atol=1e-5, what="noisy latents")
        norms = {k: v for k, v in gradient_norms(network).items() if k in trained}
        zero = [k for k, v in norms.items() if v < 1e-6]
        got |= {"cond_latents_masked": got["cond_latents"][::views], "image_embeddings": got["image_embeddings"][::views]}
        got["loss_no_snr"] = loss.denoising_loss(got["pred"], got["target_latents"], noise, t, schedule)[0]
        counts = {"num_trainable_tensors": len(trained), "num_trainable": sum(p.numel() for p in trained.values())}
        counts["zero_grad_count"] = len(zero)
        for entry in (e for e in want if e.startswith(f"{mode}_")):
            name = entry.removeprefix(f"{mode}_")
            if name in counts:
                assert counts[name] == want[entry], entry
            elif name == "zero_grad_examples":
                assert set(want[entry]) <= set(zero)
            elif name == "grad_norms":
                check_norms(norms, want[entry])
            elif name == "grad_total_norm":
                check_norms({"all": sum(v**2 for v in norms.values()) ** 0.5}, {"all": want[entry]})
            else:
                close(got[name], arrays.get(entry, want[entry]), atol=1e-5 if "loss" in name else 1e-4, what=entry)


def check_seed_train_step(case, arrays):
    c, given, want = case["config"], tensors(case, arrays), case["expected"]
    network, (autoencoder, encoder) = build_unet(c["unet"], case["state_dict"]["unet"]), build_frozen(case)
    targets = model.target_rows(torch.stack([given["image_target_vae"], given["normal_target_vae"]], dim=1))
    cameras = model.target_rows(torch.stack([given["camera_embed_image"], given["camera_embed_normal"]], dim=1))
    work = model.frozen_work(autoencoder, encoder, targets, given["image_cond_vae"], given["image_cond_CLIP"])
    work["is_normal"] = torch.tensor([[0, 1]] * c["B"])
    names = {"target": "vae_noise_target", "condition": "vae_noise_cond", "noise": "noise", "offset": "offset_noise"}
    names |= {"t": "timesteps", "drop": "drop_rand", "perturbation": "perturb_noise"}
    draws = {name: given[key] for name, key in names.items()}
    options = {"noise_offset": c["noise_offset"], "input_perturbation": c["input_perturbation"], "cond_latent": "sample"}
    options |= {"condition_drop_rate": c["p_uncond"], "drop_rule": "both", "drop_type": "drop_independent"}
    for entry in [e for e in want if e.startswith("loss_")] or ["loss_epsilon_gammaNone"]:
        kind, gamma = re.fullmatch(r"loss_(\w+)_gamma(None|[\d.]+)", entry).groups()
        gamma = None if gamma == "None" else float(gamma)
        got = denoised(network, autoencoder, case, work, draws, cameras, **options, prediction_type=kind, snr_gamma=gamma)
        close(got["loss"], want.get(entry, got["loss"].item()), atol=1e-5, what=entry)
        dropped = [i for i, latent in enumerate(got["cond_latents"]) if not latent.any()]
        assert dropped == want["dropped_rows"]
        close(got["image_embeddings"][:, 0], arrays["image_embeddings"], atol=1e-4, what="embeddings")
        first = len(arrays["cond_latents"])
        close(got["cond_latents"][:first], arrays["cond_latents"], atol=1e-4, what="condition latents")
        close(got["pred"], arrays["pred"], atol=1e-4, what="prediction")


def check_init_from_sd(case, arrays):
    c, want, table = case["config"], case["expected"], case["state_dict"]
    new, channels = want["new_keys"], want["shape_changed"]["conv_in.weight"][1][1]
    config = {**c["sd_unet"], "in_channels": channels, "class_embed_type": "projection"}
    config |= {f"cd_attention_{at}": any(f".attn_joint_{at}." in k for k in new) for at in ("mid", "last")}
    loaded(unet.UNet(**model.unet_arguments(c["sd_unet"])), table)  # the source is a network of ours as well
    source = golden.filled(table)
    target = unet.UNet(**model.unet_arguments(config))
    shapes = {k: list(v.shape) for k, v in target.state_dict().items()}
    report = model.init_unet(target, source)
    state = target.state_dict()
    assert report["new"] == sorted(new)
    assert {k: [table[k], shapes[k]] for k in report["changed"]} == want["shape_changed"]
    assert sorted(source.keys() - state.keys()) == want["unused_keys"]
    same = [torch.equal(state[k], v) for k, v in source.items() if k not in want["shape_changed"]]
    assert all(same) == want["all_other_equal"]
    first = table["conv_in.weight"][1]
    assert torch.equal(state["conv_in.weight"][:, :first], source["conv_in.weight"]) == want["conv_in_first4_equals_sd"]
    assert state["conv_in.weight"][:, first:].abs().max() == want["conv_in_last4_absmax"]
    joint = [v.abs().max() for k, v in state.items() if ".attn_joint_" in k and ".to_out.0." in k]
    assert max(joint) == want["joint_to_out_weight_absmax"]  # ours: the bias too
    old = {k: v for k, v in state.items() if ".attn_joint_" in k or ".norm_joint_" in k}
    for before, after in c["rename"].items():
        old = {k.replace(f".{after}", f".{before}"): v for k, v in old.items()}
    renamed = model.rename_old_unet(old)
    assert set(renamed) == {k for k in state if model.is_joint(k)}
    assert all(torch.equal(renamed[k], state[k]) for k in renamed) == want["old_names_loaded_exactly"]


def check_full_shapes(case, arrays):
    tables = {name: table for name, table in case.items() if isinstance(table, dict)}
    assert tables
    for name, table in tables.items():
        with torch.device("meta"):
            if name.startswith("unet"):
                flags = {"cd_attention_mid": "mid" in name, "cd_attention_last": "last" in name}
                network = unet.UNet(**flags)
            else:
                network = {"vae": vae.AutoencoderKL, "image_encoder": clip.CLIPVision}[name]()
        assert {k: list(v.shape) for k, v in network.state_dict().items()} == table, name


def check_fixed_poses(case, arrays):
    assert set(case["views"]) == set(camera.POSES)
    for view, pose in case["views"].items():
        close(np.float32(camera.POSES[view]), np.float32(pose), what=view)


ALIASES = {  # the kind of a case may be the name of an older case
    r"unet_.*": "unet", r"pipeline_.*": "pipeline", r"ddim_.*": "ddim", "norm_eps": "blocks", "vae_posterior": "vae",
    "clip_preprocess_odd": "clip_preprocess", "single_image_box": "single_image", "dataset_alpha_view": "objaverse_dataset",
    "seed_crop": "seed_dataset", "lr_tail": "lr_ema_optimizer", "snr_rules": "loss", "dropout_units": "cfg_dropout",
    r"full_shapes.*": "full_shapes", r"fixed_poses.*": "fixed_poses",
}  # fmt: skip


def kind_of(name: str, case: dict) -> str:
    kind = case.get("kind", name) if isinstance(case.get("kind", name), str) else name
    kind = re.sub(r"^\d+_", "", kind)
    return next((target for pattern, target in ALIASES.items() if re.fullmatch(pattern, kind)), kind)


@pytest.mark.parametrize("name", golden.names("mvdiff"))
def test_case(name, tmp_path):
    case, arrays = golden.load("mvdiff", name)
    wanted = case.get("expected", {}).items()
    arrays |= {entry: arrays[spec["npz"]] for entry, spec in wanted if isinstance(spec, dict) and "npz" in spec}
    check = globals().get(f"check_{kind_of(name, case)}")
    assert check is not None, f"case {name} is of unknown kind {case.get('kind')!r}"
    folder = [tmp_path] if check in (check_objaverse_dataset, check_safetensors) else []
    check(case, arrays, *folder)
