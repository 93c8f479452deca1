"""The stereo system against golden values; a case's `kind` chooses the check."""

import base64
import re
from functools import lru_cache

import golden
import numpy as np
import pytest
import torch

from stereo import augment, codec, cost_volume, ema, loss, metrics, recipe, spatial
from stereo.aggregation import DisparityTransformer, sinusoid
from stereo.depth_anything import FrozenDepthAnything, vit_input_size
from stereo.formats import decode_disparity
from stereo.gru import SelectiveGRU
from stereo.model import GROUPS, FoundationStereo, convex_upsample, hierarchical, pad, padding, unpad

# without effect on the reference; our `low_memory` stores 16 bit and has its own test
IGNORED = {"corr_implementation", "slow_fast_gru", "mixed_precision", "n_downsample", "low_memory"}


def draw(spec: dict) -> np.ndarray:
    """offset + scale * draw(seed, shape, kind), or a sum of such terms, each weighted and rolled along the width."""
    if "terms" in spec:
        return np.float32(sum(np.float32(t["factor"]) * np.roll(draw(t), t["roll"], -1) for t in spec["terms"]))
    value = golden.module("fill").draw(spec["seed"], spec["shape"], spec["kind"])
    return np.float32(spec.get("scale", 1.0)) * value + np.float32(spec.get("offset", 0.0))


def case_input(case: dict, arrays: dict, name: str) -> torch.Tensor:
    stored = arrays.get(f"in_{name}")
    return torch.from_numpy(np.array(draw(case["inputs_spec"][name]) if stored is None else stored))


@lru_cache(maxsize=1)
def filled(shapes: tuple) -> dict[str, torch.Tensor]:
    """Weights by name; most cases share one table, and drawing it takes a second."""
    return golden.filled(dict(shapes))


def fill(module: torch.nn.Module, extra_scale: dict, prefix: str = "") -> None:
    """Weights by name, then the factors of the case; a norm with two names takes the values of `downsample.1`."""
    shapes = {prefix + k: tuple(v.shape) for k, v in module.state_dict().items() if v.is_floating_point()}
    state = dict(filled(tuple(shapes.items())))
    for key, factor in extra_scale.items():
        rule = re.fullmatch(r"(\d)-dimensional tensors whose name starts with (\S+?)(?: \(except (\S+?)\*\))?", key)
        names = (
            [key]
            if rule is None
            else [k for k in state if k.startswith(rule[2]) and state[k].dim() == int(rule[1]) and not (rule[3] and k.startswith(rule[3]))]
        )
        for name in names:
            state[name] = state[name] * np.float32(factor)
    state |= {k.replace("downsample.1", "norm3"): v for k, v in state.items() if "downsample.1" in k and "cnet" in k}
    missing, unexpected = module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()}, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)


def build(case: dict) -> FoundationStereo:
    options = {k: v for k, v in case["config"].items() if k not in IGNORED}
    model = FoundationStereo(**options, legacy_head_attention=case.get("attention") == "head")
    fill(model, case["extra_scale"])
    return model.eval()


def record(model: torch.nn.Module, names) -> dict[str, torch.Tensor]:
    """First output of each named module, filled in while the model runs."""
    seen = {}

    def hook(name):
        def keep(module, args, out):
            seen.setdefault(name, out)

        return keep

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    return seen


def check_tensors(case: dict, arrays: dict, got: dict, tolerance) -> None:
    """Compare every stored entry; tolerance(name) is relative to the standard deviation of the whole tensor."""
    for name, stats in case["tensors"].items():
        value = got[name].detach()
        assert list(value.shape) == stats["shape"], name
        flat, limit = value.reshape(-1), tolerance(name) * stats["std"]
        golden.close(flat[:: stats["stride"]], arrays[name], atol=limit, what=name)
        golden.close(flat.double().mean(), stats["mean"], atol=limit, what=f"mean of {name}")
        golden.close(flat.double().std(correction=0), stats["std"], atol=limit, rtol=1e-5, what=f"std of {name}")
        golden.close(flat.abs().max(), stats["absmax"], atol=limit, what=f"absmax of {name}")


def check_state_dict(name, table):
    table = table.get("state_dict", table)
    options = re.fullmatch(r"state_dict_(vit[sbl])(?:_L(\d+)r(\d+))?", name)
    levels, radius = int(options[2] or 2), int(options[3] or 4)
    with torch.device("meta"):
        model = FoundationStereo(vit_size=options[1], corr_levels=levels, corr_radius=radius)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == table


def concatenation(left, right, n_disp):
    """The volume that CostStem never builds: left everywhere, right moved by the disparity."""
    return torch.cat([left.unsqueeze(2).expand(-1, -1, n_disp, -1, -1), cost_volume.shifted_planes(right, n_disp)], 1)


def check_forward(case, arrays):
    model = build(case)
    left, right = case_input(case, arrays, "left"), case_input(case, arrays, "right")
    special = {"vit_feat": "feature.dino", "cam_level0": "cam", "sam_level0": "sam"}
    computed = {"input_left", "input_right", "cost_volume", "geo_feat_iter0", "init_disp"}
    computed |= {f"disp_{i}" for i in range(case["iters"])}
    modules = {n for n in case["tensors"] if n not in computed and n not in special}
    seen = record(model, modules | {"feature.conv4", *special.values()})
    inner = []
    model.update_block.encoder.register_forward_pre_hook(lambda m, args: inner.append(args[1]))
    projected = []
    model.proj_cmb.register_forward_hook(lambda m, a, out: projected.append(out))
    with torch.no_grad():
        out = model(left, right, iters=case["iters"], every_iteration=True)
        f4 = seen["feature.conv4"].chunk(2)
        correlation = cost_volume.group_correlation(*f4, case["config"]["max_disp"] // 4, GROUPS)
        volume = torch.cat([correlation, concatenation(*projected, correlation.shape[2])], 1)
    got = seen | {k: seen[v] for k, v in special.items()} | {"input_left": left, "input_right": right}
    got |= {"cost_volume": volume, "geo_feat_iter0": inner[0], "init_disp": out["init"]}
    got |= {f"disp_{i}": d for i, d in enumerate(out["preds"])}
    early = ("input_", "feature.", "vit_feat", "stem_2", "proj_cmb", "cost_volume")
    check_tensors(case, arrays, got, lambda name: 2e-4 if name.startswith(early) else 1e-3)
    with torch.no_grad():  # the form used in evaluation gives the same last map
        last = model(left, right, iters=case["iters"])["preds"]
    assert len(last) == 1 and torch.equal(last[0], out["preds"][-1])


def check_hierarchical(case, arrays):
    model = build(case)
    left, right = case_input(case, arrays, "left"), case_input(case, arrays, "right")
    with torch.no_grad():
        disp = hierarchical(model, left, right, case["iters"], case["hierarchical_small_ratio"])
    check_tensors(case, arrays, {"input_left": left, "input_right": right, "disp": disp}, lambda name: 2e-3)


def check_vit_feat(case, arrays):
    branch = FrozenDepthAnything(case["config"]["vit_size"])
    fill(branch, case["extra_scale"], case["state_dict_prefix"])
    image, inner = case_input(case, arrays, "image"), branch.depth_anything
    modules = {n: f"depth_anything.depth_head.{n}" for n in case["tensors"] if n.startswith("scratch.")}
    seen = record(branch, modules.values())
    taps = []
    inner.depth_head.register_forward_pre_hook(lambda m, args: taps.extend(args[0]))
    resized = []
    inner.pretrained.patch_embed.register_forward_pre_hook(lambda m, args: resized.append(args[0]))
    got = {"vit_feat": branch(image), "resized": resized[0]}
    got |= {f"tap_{i}": t for i, t in enumerate(taps)} | {k: seen[v] for k, v in modules.items()}
    check_tensors(case, arrays, got, lambda name: 2e-4)


def check_train_step(case, arrays):
    modes = [mode for mode in ("bn_eval", "bn_train") if mode in case]
    assert modes
    for mode in modes:
        check_one_step(case, arrays, mode, checkpointing=False)
    if "bn_train" in case:
        check_one_step(case, arrays, "bn_train", checkpointing=True)


def check_one_step(case, arrays, mode, checkpointing):
    want, train = case[mode], mode == "bn_train"
    model = build(case)
    model.set_checkpointing(checkpointing)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    model.train(train)
    left, right = case_input(case, arrays, "left"), case_input(case, arrays, "right")
    gt, valid = case_input(case, arrays, "gt"), case_input(case, arrays, "valid") > 0
    out = model(left, right, iters=case["iters"], every_iteration=True)
    gamma = case["inputs_spec"]["gamma"]
    max_disp = case["config"]["max_disp"]
    value, parts = loss.foundation_stereo_loss(out["init"], out["preds"], gt, valid, max_disp, gamma=gamma)
    value.backward()
    golden.close(value, want["loss"], rtol=1e-4 if train else 1e-5, what="loss")
    for key, value in want.get("parts", {}).items():
        golden.close(parts[key], value, rtol=1e-4 if train else 1e-5, what=key)
    if "n_valid" in want:
        assert int(parts["n_valid"]) == want["n_valid"]
    norm_tolerance = 3e-2 if train else 2e-3
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained if p.grad is not None) == want["n_params_with_grad"]
    assert all(p.grad is not None for p in trained)
    for prefix in want["params_without_grad_trainable"]:
        assert all(not p.requires_grad for p in model.get_submodule(prefix).parameters()), prefix
    total = torch.stack([p.grad.norm() for p in trained]).norm()
    golden.close(total, want["total_grad_norm"], rtol=norm_tolerance, what="total gradient norm")
    for name, entry in want["grads"].items():
        grad = model.get_parameter(name).grad
        rtol = max(norm_tolerance, 1e-2) if name.endswith("temperature") else norm_tolerance
        golden.close(grad.norm(), entry["norm"], rtol=rtol, what=name)
        sample = grad.reshape(-1)[:: max(1, grad.numel() // 5)][:5]
        golden.close(sample, entry["sample"], scale_tol=0.3 if train else 0.1, what=f"sample of {name}")
    for name, entry in want.get("running_stats_after", {}).items():
        value = model.get_buffer(name)
        golden.close(value.mean(), entry["mean"], atol=1e-4, what=name)
        golden.close(value[: len(entry["sample"])], entry["sample"], atol=1e-4, what=name)


# --- parts: one function per section of the file -------------------------------------------------------------------------


def near(got, want, what: str, tol: float = 1e-5) -> None:
    """Relative to the largest expected magnitude."""
    golden.close(got, want, scale_tol=tol, what=what)


class Section:
    """A section of a parts file with its inputs (`x`), outputs (`out`) and whether an output is there (`has`)."""

    def __init__(self, name: str, case: dict, arrays: dict):
        self.name, self.case, self.arrays, self.seen = name, case, arrays, set()

    def names(self, prefix: str) -> list[str]:
        """The numbered inputs prefix0, prefix1, ... in their order."""
        stored = [k.split(".", 1)[1] for k in self.arrays if k.startswith(f"in_{self.name}.")]
        found = {k for k in (*stored, *self.case.get("inputs_spec", {})) if re.fullmatch(prefix + r"\d+", k)}
        return sorted(found, key=lambda k: int(k.removeprefix(prefix)))

    def x(self, name: str, grad: bool = False) -> torch.Tensor:
        value = self.arrays.get(f"in_{self.name}.{name}")
        value = draw(self.case["inputs_spec"][name]) if value is None else value
        return torch.from_numpy(np.array(value)).requires_grad_(grad)

    def has(self, name: str) -> bool:
        return f"{self.name}/{name}" in self.arrays

    def out(self, name: str) -> np.ndarray:
        self.seen.add(name)
        return self.arrays[f"{self.name}/{name}"]

    def check(self, name: str, got, tol: float = 1e-5) -> None:
        if self.has(name):
            near(got, self.out(name), f"{self.name}/{name}", tol)

    def rest(self) -> set[str]:
        """Outputs that nothing has looked at; copies of inputs do not count."""
        names = {k.split("/", 1)[1] for k in self.arrays if k.startswith(f"{self.name}/")}
        return {k for k in names - self.seen if f"in_{self.name}.{k}" not in self.arrays}


def part_cost_volume(s):
    left, right, n = s.x("left"), s.x("right"), s.case["n_disp"]
    s.check("gwc", cost_volume.group_correlation(left, right, n, s.case["groups"]))
    c = s.case["concat_channels"]
    s.check("concat", concatenation(left[:, :c], right[:, :c], n))


def part_disp_transformer(s):
    c, x = s.case, s.x("input")
    assert c["ffn"] == c["d_model"]
    for name, over_heads in (("out_disparity", False), ("out_head", True)):
        model = DisparityTransformer(c["d_model"], c["layers"], c["heads"], over_heads=over_heads).eval()
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == c["state_dict"]
        model.load_state_dict(golden.filled(c["state_dict"]))
        s.check(name, model(x))
    s.check("pos_embed", sinusoid(c["max_len"], c["d_model"], x.device))


def part_geometry_lookup(s):
    left, right, geo = (s.x(name, grad=True) for name in ("left", "right", "geo"))
    lookup = cost_volume.CostLookup(geo, left, right, s.case["levels"], s.case["radius"])
    out = lookup(s.x("disp"))
    s.check("out", out)
    with torch.no_grad():
        low = cost_volume.CostLookup(geo, left, right, s.case["levels"], s.case["radius"], low_memory=True)
        near(low(s.x("disp")), out.detach().numpy(), "low_memory", tol=2e-3)  # 16-bit storage
    if any(s.has(f"grad_{name}") for name in ("left", "right", "geo")):
        (out * s.x("weight")).sum().backward()
        for name, value in (("left", left), ("right", right), ("geo", geo)):
            s.check(f"grad_{name}", value.grad, tol=1e-4)


def part_upsample(s):
    if s.has("up"):
        s.check("up", convex_upsample(s.x("disp"), s.x("logits")))
    if s.has("soft_argmin"):
        s.check("soft_argmin", cost_volume.soft_argmin(s.x("cost_logits")))


def part_selective_gru(s):
    h, att = s.x("h"), s.x("att")
    inputs = [s.x(name) for name in s.names("x")]
    gru = SelectiveGRU(s.case["hidden"], s.case["input"])
    assert {k: list(v.shape) for k, v in gru.state_dict().items()} == s.case["state_dict"]
    gru.load_state_dict(golden.filled(s.case["state_dict"]))
    s.check("h", gru(att, h, gru.prepare(inputs[0]), *inputs[1:]))


def sizes_of(table: dict) -> dict:
    return {size: want for size, want in table.items() if re.fullmatch(r"\d+x\d+", size)}


def part_vit_resize(s):
    for size, want in sizes_of(s.case).items():
        assert list(vit_input_size(*map(int, size.split("x")))) == want, size


def part_input_padder(s):
    divisor = int(s.name.rsplit("_", 1)[1])
    for size, want in sizes_of(s.case).items():
        H, W = map(int, size.split("x"))
        pads = padding(H, W, divisor)
        assert list(pads) == want, size
        image = torch.arange(H * W, dtype=torch.float32).view(1, 1, H, W)
        padded = pad(image, pads)
        assert padded.shape[-2] % divisor == 0 == padded.shape[-1] % divisor and torch.equal(unpad(padded, pads), image)


def one_loss(name: str, s, preds):
    """The loss that an entry of section `loss` names, on the (1, H, W) ground truth of the section."""
    gt, mask, top = s.x("gt")[None], s.x("mask")[None] > 0, s.case["max_disparity"]
    clamp = {"max_disparity": top, "clamp_prediction": True} if name.endswith("_clamped") else {}
    if name.startswith("multi_scale"):
        kind, weights = name.removeprefix("multi_scale_"), s.case["values"][name]["weights"]
        preds = [p[None] for p in preds]
        return loss.multi_scale_loss(preds, gt, mask, weights, kind, max_disparity=top, clamp_prediction=True)
    pred = preds[0][None]
    if "empty_mask" in name:
        mask = torch.zeros_like(mask)
    if name.startswith("gradient"):
        return loss.gradient_loss(pred, gt, mask)
    if name.startswith("smooth_l1"):
        beta = float(re.search(r"_b([\d.]+)_", name)[1])
        return loss.disparity_smooth_l1_loss(pred, gt, mask, beta=beta, **clamp)
    function = {"l1": loss.disparity_l1_loss, "epe": loss.disparity_epe_loss}[name.split("_")[0]]
    return function(pred, gt, mask, **clamp)


def part_loss(s):
    levels = s.names("pyramid_")
    for name, want in s.case["values"].items():
        preds = [s.x(n, grad=True) for n in (levels if name.startswith("multi_scale") else ["pred"])]
        value, logged = one_loss(name, s, preds)
        near(value, want["value"], name)
        for key, expected in want["misc"].items():
            near(logged[key], expected, f"{name} {key}")
        value.backward()
        for i, p in enumerate(preds):
            s.check(f"grad_{name}_{i}" if name.startswith("multi_scale") else f"grad_{name}", p.grad, tol=1e-4)


def part_sequence_loss(s):
    init, preds = s.x("d0", grad=True), [s.x(name, grad=True) for name in s.names("pred_")]
    gt, valid = s.x("gt"), s.x("valid") > 0
    value, parts = loss.foundation_stereo_loss(init, preds, gt, valid, s.case["max_disp"], gamma=s.case["gamma"])
    near(value, s.case["value"], "sequence loss")
    assert int(parts["n_valid"]) == s.case.get("n_valid", int(parts["n_valid"]))
    for key, want in s.case.get("parts", {}).items():
        near(parts[key], want, key)
    value.backward()
    s.check("grad_d0", init.grad, tol=1e-4)
    for i, p in enumerate(preds):
        s.check(f"grad_pred_{i}", p.grad, tol=1e-4)


def part_metrics(s):
    pred, gt, mask = s.x("pred")[None], s.x("gt")[None], s.x("mask")[None] > 0
    got = metrics.step_metrics(pred, gt, mask)
    got |= {"n": mask.sum(), "seed_D1_error": got["D1"] / 100, "seed_D3_error": got["D3"] / 100}
    for key, want in s.case["expected"].items():
        near(got[key], want, key)


def part_metrics_aggregation(s):
    pred, gt, mask = s.x("pred"), s.x("gt"), s.x("mask") > 0
    assert mask.flatten(1).sum(1).tolist() == s.case["n_valid"]
    running = metrics.DisparityMetrics()
    for image in zip(pred, gt, mask):  # image by image and all at once give the same
        running.update(*(x[None] for x in image))
    together = metrics.DisparityMetrics()
    together.update(pred, gt, mask)
    for got in (running.compute(), together.compute()):
        assert got["count"]["images"] == s.case["images_counted"]
        for way in ("per_image", "per_pixel"):
            for key, want in s.case[way].items():
                near(got[way][key], want, f"{way} {key}")


def part_codec_fsd(s):
    if "encode_input" in s.case:
        disp = np.array([float(v) for v in s.case["encode_input"]])[None]
        coded = codec.encode_fsd(disp)
        assert coded[0].tolist() == s.case.get("encode_round_nearest_rgb", coded[0].tolist())
        if "encode_truncate_rgb_seed_test_script" in s.case:
            assert codec.encode_fsd(disp, truncate=True)[0].tolist() == s.case["encode_truncate_rgb_seed_test_script"]
        if "decoded" in s.case:
            assert np.array_equal(codec.decode_fsd(coded)[0], np.float32(s.case["decoded"]))
    if "raw_rgb" in s.case:
        assert np.array_equal(codec.decode_fsd(np.uint8([s.case["raw_rgb"]]))[0], np.float32(s.case["raw_decoded"]))


def part_pfm(s):
    want = np.array([[np.inf if v is None else v for v in row] for row in s.case["values_top_down"]], np.float32)
    for key in (k for k in s.case if k.endswith("_base64")):
        got = codec.decode_pfm(base64.b64decode(s.case[key]))
        assert got.dtype == np.float32 and np.array_equal(np.where(np.isfinite(got), got, np.inf), want), key
    assert np.array_equal(codec.decode_pfm(codec.encode_pfm(want)), want)


def part_kitti_png(s):
    if "disp" in s.case:
        assert codec.encode_kitti(np.array([s.case["disp"]]))[0].tolist() == s.case["uint16"]
    if "read_uint16" in s.case:
        disp = decode_disparity(np.uint16(s.case["read_uint16"]), "div:256")
        assert disp.tolist() == s.case["read_disp"] and (disp > 0).tolist() == s.case["read_valid"]


def part_schedules(s):
    for series, spec in s.case["inputs_spec"].items():
        steps = {int(k): v for k, v in s.case[series].items() if k.isdigit()}
        assert steps
        for step, want in steps.items():
            part = lambda rule: {"type": "LambdaLR", "params": {"lr_lambda": rule}}
            if "max_lr" in spec:
                section = {"type": "OneCycleLR", "params": spec}
            elif "milestones" in spec:
                params = {"schedulers": [part(rule) for rule in spec["lr_lambda"]], "milestones": spec["milestones"]}
                params["sequential_restart"] = spec["epoch"] == "as torch SequentialLR counts"
                section = {"type": "SequentialLR", "params": params}
            else:
                section = part(spec["lr_lambda"])
            base = spec.get("base_lr", spec.get("max_lr"))
            got = base * recipe.lr_factor(section, step, base)
            assert got == pytest.approx(want, rel=1e-9, abs=1e-18), f"{series} at {step}"


def part_sequence_weights(s):
    for series, spec in s.case["inputs_spec"].items():
        mode = "adjusted" if spec["igev_adjusted"] else "plain"
        near(loss.sequence_weights(spec["num_predictions"], spec["gamma"], mode), s.case[series], series)


def part_ema(s):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(s.x("init"))
    average = ema.make_ema(model)
    for update in s.x("updates"):
        model.weight.data.copy_(update)
        ema.update_ema(average, model, s.case["decay"])
    near(average.weight, s.case["value"], "ema")


def part_right_disparity(s):
    left = np.float32(s.case["left_disp"])
    right = augment.right_view_disparity(left)
    assert np.array_equal(right, np.float32(s.case["right_disp"]))
    images = np.random.default_rng(0).integers(0, 256, (2, *left.shape, 3), np.uint8)
    view = spatial.draw_view(np.random.default_rng(0), left.shape, left.shape, (1.0, 1.0), mirror=True)
    new_left, new_right = (spatial.warp_image(image, view, left.shape) for image in images[::-1])
    flipped = right[np.ix_(*spatial.nearest(view, left.shape, left.shape))]
    assert view.swapped and np.array_equal(flipped, np.float32(s.case.get("flipped_left_disp", flipped)))
    assert np.array_equal(new_left, images[1][:, ::-1]) and np.array_equal(new_right, images[0][:, ::-1])


PARTS = {
    "cost_volume": part_cost_volume,
    "disp_transformer": part_disp_transformer,
    "geometry_lookup": part_geometry_lookup,
    "upsample": part_upsample,
    "selective_gru": part_selective_gru,
    "vit_resize": part_vit_resize,
    "input_padder": part_input_padder,
    "loss": part_loss,
    "sequence_loss": part_sequence_loss,
    "metrics": part_metrics,
    "metrics_aggregation": part_metrics_aggregation,
    "codec_fsd": part_codec_fsd,
    "pfm": part_pfm,
    "kitti_png": part_kitti_png,
    "schedules": part_schedules,
    "sequence_weights": part_sequence_weights,
    "ema": part_ema,
    "right_disparity": part_right_disparity,
}


def check_parts(case, arrays):
    sections = {k: v for k, v in case.items() if isinstance(v, dict)}
    assert sections
    for name, section in sections.items():
        part, given = PARTS.get(re.sub(r"^(input_padder)_\d+$", r"\1", name)), Section(name, section, arrays)
        assert part is not None, f"unknown section {name}"
        part(given)
        assert not given.rest(), f"nothing checks {given.rest()} of {name}"


KINDS = {
    "forward": check_forward,
    "parts": check_parts,
    "hierarchical": check_hierarchical,
    "vit_feat": check_vit_feat,
    "train_step": check_train_step,
}


@pytest.mark.parametrize("name", golden.names("stereo"))
def test_golden(name):
    case, arrays = golden.load("stereo", name)
    if name.startswith("state_dict_"):
        return check_state_dict(name, case)
    assert case["kind"] in KINDS, f"unknown kind {case['kind']}"
    KINDS[case["kind"]](case, arrays)
