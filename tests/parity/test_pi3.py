"""Pi3 against golden values of the official implementation: every case is run, chosen by its kind."""

import itertools
import re
from pathlib import Path

import cv2
import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from pi3 import augment, dataset, geometry, heads, metrics, readers, sampling, schedule
from pi3 import loss as losses
from pi3.alignment import align_1d, nearest_index
from pi3.attention import Block, rope_tables, rotate, token_positions
from pi3.model import NUM_REGISTERS, Pi3, freeze
from pi3.pi3x import Pi3X
from pi3.segformer import SKY, SegFormer


def draw(spec: dict) -> Tensor:
    """An input entry {seed, shape, kind, scale, offset, power}."""
    x = golden.module("fill").draw(spec["seed"], tuple(spec["shape"]), spec.get("kind", "uniform"))
    x = x ** spec.get("power", 1) * np.float32(spec.get("scale", 1)) + np.float32(spec.get("offset", 0))
    return torch.from_numpy(np.asarray(x, np.float32))


def weights(shapes: dict, prefix: str = "", factors: dict | None = None) -> dict[str, Tensor]:
    """Filled weights: integer buffers and the image statistics keep their values; factors multiply by the end of the name."""
    kept = ("image_mean", "image_std", "num_batches_tracked")
    state = golden.filled({prefix + k: s for k, s in shapes.items() if not k.endswith(kept)})
    for name in state:
        for end, factor in (factors or {}).items():
            if name.endswith(end):
                state[name] = state[name] * factor
    return {k.removeprefix(prefix): v for k, v in state.items()}


def load(module: torch.nn.Module, shapes: dict, prefix: str = "", factors: dict | None = None) -> torch.nn.Module:
    """Fill a module after checking that its names and shapes are exactly those of the case."""
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == {k: list(s) for k, s in shapes.items()}
    module.load_state_dict(weights(shapes, prefix, factors), strict=False)
    return module


def flat(got, want: np.ndarray) -> np.ndarray:
    """The entries of `got` that the case has kept of it."""
    got = got.detach().cpu().numpy() if isinstance(got, Tensor) else np.asarray(got)
    if got.shape == want.shape:
        return got
    got = got.reshape(-1)
    return got[np.linspace(0, got.size - 1, want.size).astype(np.int64)]


def close(got, want: np.ndarray, tol: float, what: str, ignore: np.ndarray | None = None) -> None:
    """Within `tol` of the array's largest magnitude; entries in `ignore` may differ."""
    got = flat(got, want)
    if ignore is not None:
        got = np.where(flat(ignore, want), want, got)
    golden.close(got, want, scale_tol=tol, what=what)


def near(got, want: float, tol: float, what: str) -> None:
    golden.close(got.item() if isinstance(got, Tensor) else float(got), want, rtol=tol, atol=1e-12, what=what)


def agree(got, want: np.ndarray, share: float, what: str) -> None:
    """Boolean or integer maps that agree on at least `share` of their entries."""
    got = flat(got, want)
    assert got.shape == want.shape and (got == want).mean() >= share, f"{what}: {(got != want).mean():.4%} differ"


# kinds


def check_model(case: dict, arrays: dict) -> None:
    model = load(Pi3(**case["config"]), case["state_dict"], factors=case.get("extra_fill_factors")).eval()
    imgs = draw(case["input"])
    N, (h, w) = imgs.shape[1], (s // model.encoder.patch_size for s in imgs.shape[-2:])
    blocks = {}
    for name in arrays:
        if match := re.match(r"decoder_block(\d+)_out", name):
            keep = lambda _, args, out, name=name: blocks.update({name: out})
            model.decoder[int(match[1])].register_forward_hook(keep)
    with torch.no_grad():
        got = dict(model(imgs))
        tokens, positions = model.encode(imgs), token_positions(h, w, NUM_REGISTERS)
        got["encoder_x_norm_patchtokens"] = tokens
        got["decoder_concat_last_two"] = model.decode(tokens, N, positions)
        got["rope_positions"] = positions.expand(len(tokens), -1, -1)
        got |= blocks
        permutation = torch.arange(N).roll(1)
        permuted = model(imgs[:, permutation])
    for name, want in arrays.items():
        close(got[name], want, 2e-5, name)
    for name in ("local_points", "camera_poses"):  # permuting the views permutes the outputs
        close(permuted[name], got[name][:, permutation].numpy(), 2e-5, f"permuted {name}")


def check_train_step(case: dict, arrays: dict) -> None:
    model = load(Pi3(**case["config"]), case["state_dict"], factors=case.get("extra_fill_factors")).train()
    freeze(model)
    world, mask, pose = (torch.from_numpy(arrays[f"in_{k}"]) for k in ("world", "mask", "pose"))
    local = geometry.transform(geometry.inverse_se3(pose), world)
    out = losses.pi3_loss(model(draw(case["inputs_spec"]["image"])), local, pose, mask, losses.has_normals(case["dataset_names"]))
    out["loss"].backward()
    values = case["values"]
    near(out["loss"], values["loss"], 1e-5, "loss")
    for name, want in values["details"].items():
        near(out[name], want, 1e-5, name)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == values["grad_l2_norm"].keys()
    for name, want in values["grad_l2_norm"].items():
        if want is None:
            assert gradients[name] is None, name
        elif name == "camera_head.fc_t.bias":  # truly zero: a common shift of all cameras cancels
            assert gradients[name].norm() < 1e-6
        else:
            near(gradients[name].norm(), want, 1e-3, f"norm of the gradient of {name}")
    if "grad_l2_total" in values:
        total = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
        near(total, values["grad_l2_total"], 1e-3, "norm of all gradients")
    for name, want in arrays.items():
        if name.startswith("grad_"):
            close(gradients[name.removeprefix("grad_")], want, 1e-3, name)


def check_blocks(case: dict, arrays: dict) -> None:
    d, factors = case["dims"], case.get("extra_fill_factors")
    tables = {key.split()[0]: (shapes, re.search(r'prefix "([^"]+)"', key)[1]) for key, shapes in case["state_dict"].items()}
    x = draw(case["input_x"])
    positions = token_positions(*d["grid"], d["registers"])
    rope = rope_tables(positions, d["dim"] // d["heads"])
    got = {"positions_yx": positions.expand(d["batch"], -1, -1)}
    if "input_q" in case:
        got["rope_out"] = rotate(draw(case["input_q"]).transpose(1, 2), rope).transpose(1, 2)  # (B, heads, L, d) in the case
    with torch.no_grad():
        if "decoder_block" in tables:
            shapes, prefix = tables["decoder_block"]
            block = load(Block(d["dim"], d["heads"], qk_norm=True, layer_scale=0.01), shapes, prefix, factors)
            got["decoder_block_out"], got["decoder_block_attn_of_norm1"] = block(x, rope), block.attn(block.norm1(x), rope)
        if "head_block" in tables:
            shapes, prefix = tables["head_block"]
            got["head_block_out"] = load(Block(d["dim"], d["heads"]), shapes, prefix, factors)(x, rope)
    for name, want in arrays.items():
        close(got[name], want, 1e-5, name)


def check_heads(case: dict, arrays: dict) -> None:
    d = case["dims"]
    inputs = {k: draw(v) for k, v in case["inputs"].items()}
    got = {}
    for key, shapes in case["state_dict"].items():
        prefix, times = re.search(r'prefix "([^"]+)"', key)[1], re.search(r"all times ([\d.]+)", key)
        factors = {"": float(times[1])} if times else None
        with torch.no_grad():
            if key.startswith("camera_head"):
                got["camera_pose"] = load(heads.CameraHead(d["dim"]), shapes, prefix, factors)(inputs["feat"])
            else:
                head = load(heads.DenseHead(d["dim"], 3), shapes, prefix, factors)
                got["point_head_raw"] = head(inputs["feat"], d["ph"], d["pw"])
                got["local_points"] = heads.points_from_raw(got["point_head_raw"])
    if "svd_m" in inputs:
        m = inputs["svd_m"].requires_grad_()
        R = heads.rotation_from_raw(m)
        (R * inputs["svd_W"]).sum().backward()
        got |= {"svd_in": m, "svd_W": inputs["svd_W"], "svd_R": R, "svd_grad_of_sum_R_times_W": m.grad}
        golden.close(torch.linalg.det(R), case["values"]["svd_det"], atol=1e-5, what="determinants")
    for name, want in arrays.items():
        close(got[name], want, 1e-3 if "grad" in name else 1e-5, name)


def check_align(case: dict, arrays: dict) -> None:
    if "in_x" in arrays:
        scale, objective, index = align_1d(*(torch.from_numpy(arrays[f"in_{k}"]) for k in "xyw"))
        for name, got in (("a", scale), ("loss", objective)):
            golden.close(got, arrays[name], rtol=1e-6, atol=1e-6, what=name)
        assert np.array_equal(index, arrays["index"])
    for n in case.get("inputs_spec", {}).get("roe_points", []):
        want = torch.from_numpy(arrays[f"roe_index_{n}"]).long()
        assert torch.equal(nearest_index(n, len(want)), want)
        chosen = losses.evenly_spaced(torch.ones(1, n, dtype=torch.bool), len(want))
        assert torch.equal(chosen[0].long(), want)
    if "roe_no_valid" in case.get("values", {}):
        p, none = torch.rand(1, 2, 4, 5, 3), torch.zeros(1, 2, 4, 5, dtype=torch.bool)
        assert losses.scale_to_target(p, 2 * p, p[..., 0], none).item() == case["values"]["roe_no_valid"]


class Expected:
    """What a case of losses expects; compares the entries that it has and remembers which were looked at."""

    def __init__(self, case: dict, arrays: dict):
        self.arrays, self.seen = arrays, {name for name in arrays if name.startswith("in_")}
        self.values = {}
        for name, value in case["values"].items():
            nested = value.items() if isinstance(value, dict) else [("", value)]
            self.values |= {f"{name.split(' ')[0]}/{key}" if key else name.split(" ")[0]: v for key, v in nested}

    def array(self, name: str, got, tol: float, ignore=None) -> None:
        self.seen.add(name)
        if name in self.arrays:
            close(got, self.arrays[name], tol, name, ignore)

    def value(self, name: str, got, tol: float = 1e-5) -> None:
        self.seen.add(name)
        if name in self.values:
            near(got, self.values[name], tol if self.values[name] else 1e-10, name)

    def rest(self) -> set[str]:
        return (self.arrays.keys() | self.values.keys()) - self.seen


def check_losses(case: dict, arrays: dict) -> None:
    T, expected = {k: torch.from_numpy(v) for k, v in arrays.items()}, Expected(case, arrays)
    spec, mask, tolerance = case["inputs_spec"], T["in_mask"], {"normal_loss": 1e-4}
    local = geometry.transform(geometry.inverse_se3(T["in_pose"]), T["in_world"])
    raw = lambda: {name: T[f"in_pred_{name}"].clone().requires_grad_() for name in ("local_points", "camera_poses")}
    flags = losses.has_normals(case["dataset_names"])

    pred = raw()
    total = losses.pi3_loss(pred, local, T["in_pose"], mask, flags)
    total["loss"].backward()
    expected.value("pi3_loss_total", total["loss"])
    for name, got in total.items():
        expected.value(f"pi3_loss_details/{name}", got, tolerance.get(name, 1e-5))
    gt, gt_poses = losses.prepare_ground_truth(local, T["in_pose"], mask)
    w = losses.inverse_depth_weights(gt, mask)
    points, poses = losses.normalise_prediction(T["in_pred_local_points"], T["in_pred_camera_poses"], mask)
    scale = losses.scale_to_target(points, gt, w, mask)
    aligned = points * scale[:, None, None, None, None]
    for name, got in (
        ("gt_local_points", gt), ("gt_camera_poses", gt_poses), ("gt_weights", w), ("scale", scale),
        ("pred_normalised_local_points", points), ("pred_normalised_camera_poses", poses),
    ):  # fmt: skip
        expected.array(name, got, 1e-5)
    # where the scale makes a residual vanish, the sign of its L1 gradient is decided by rounding
    decided = ((aligned - gt).abs() < 3e-6 * gt.abs()).numpy()
    expected.array("pi3_loss_grad_local_points", pred["local_points"].grad, 1e-3, decided)
    expected.array("pi3_loss_grad_camera_poses", pred["camera_poses"].grad, 1e-3)

    p = points.clone().requires_grad_()
    point = losses.point_loss(p, gt, w, mask, scale)
    normal = losses.normal_loss(p * scale[:, None, None, None, None], gt, mask, flags)
    (point + normal).backward()
    expected.value("point_loss", point + normal)
    expected.value("point_loss_details/local_pts_loss", point)
    expected.value("point_loss_details/normal_loss", normal, 1e-4)
    expected.array("point_loss_grad", p.grad, 1e-3, decided)

    a = aligned.clone().requires_grad_()
    normal = losses.normal_loss(a, gt, mask, torch.ones_like(flags))
    normal.backward()
    expected.value("normal_loss_all_batch", normal, 1e-4)
    expected.array("normal_loss_grad", a.grad, 1e-3)

    c = poses.clone().requires_grad_()
    trans, rot = losses.camera_loss(c, gt_poses, scale)
    (100 * trans + rot).backward()
    expected.value("camera_loss", 100 * trans + rot)
    expected.value("camera_loss_details/trans_loss", trans)
    expected.value("camera_loss_details/rot_loss", rot)
    expected.array("camera_loss_grad", c.grad, 1e-3)
    c = gt_poses.clone().requires_grad_()
    trans, rot = losses.camera_loss(c, gt_poses, torch.ones_like(scale))
    (100 * trans + rot).backward()
    perfect = {"loss": 100 * trans + rot, "trans_loss": trans, "rot_loss": rot, "grad_absmax": c.grad.abs().max()}
    for name, got in perfect.items():
        expected.value(f"camera_loss_perfect_prediction/{name}", got)

    names = spec.get("no_normal_dataset_names", case["dataset_names"])
    got = losses.pi3_loss(raw(), local, T["in_pose"], mask, losses.has_normals(names))
    for name in got:
        expected.value(f"pi3_loss_no_normal_datasets/{'total' if name == 'loss' else name}", got[name])
    if "global_prediction" in spec:
        g = spec["global_prediction"]
        pred = raw() | {"global_points": g["scale"] * T[g["of"]] + g["offset"]}
        got = losses.pi3_loss(pred, local, T["in_pose"], mask, flags)
        expected.value("global_pts_loss", got["global_pts_loss"])
        expected.value("total_with_global", got["loss"])
    if "conf_logits" in spec:
        residual, sky = losses.weighted_residual(points, gt, w, scale), T["in_sky"].view(mask.shape)
        logits = draw(spec["conf_logits"]).requires_grad_()
        conf = losses.confidence_loss(logits, residual, mask, sky)
        (0.05 * conf).backward()
        expected.value("conf_loss_details/local_conf_loss", conf)
        expected.value("conf_loss_details/local_pts_loss", point)
        expected.value("conf_loss_details/normal_loss", total["normal_loss"], 1e-4)
        expected.value("conf_total_point_loss", point + total["normal_loss"] + 0.05 * conf)
        expected.array("conf_grad", logits.grad, 1e-3)
        expected.value("conf_loss_no_sky", losses.confidence_loss(logits, residual, mask, torch.zeros_like(sky)))
        expected.value("conf_positive_fraction", (residual.mean(-1) < 0.02)[mask].float().mean())
        whole = losses.pi3_loss(raw() | {"conf": logits}, local, T["in_pose"], mask, flags, sky)
        near(whole["local_conf_loss"], conf.item(), 1e-6, "confidence within the total")
        near(whole["loss"], (total["loss"] + 0.05 * conf).item(), 1e-6, "everything")
    assert not expected.rest(), f"nothing checks {expected.rest()}"


def check_segformer(case: dict, arrays: dict) -> None:
    model = load(SegFormer(), case["state_dict"], factors=case.get("extra_fill_factors"))
    value, name, index = re.search(r"add (-?[\d.]+) to ([\w.]+)\[(\d+)\]", case["extra_rule"]).groups()
    with torch.no_grad():
        model.get_parameter(name)[int(index)] += float(value)
    model.train()  # stays in evaluation mode all the same
    x = draw(case["input"])
    features = model.backbone(x)
    quarter = model.decode_head(features)
    full = torch.nn.functional.interpolate(quarter, x.shape[-2:], mode="bilinear", align_corners=False)
    got = {f"feat{i + 1}": f for i, f in enumerate(features)} | {"logits_quarter": quarter, "logits_full": full}
    for key, want in arrays.items():
        if key == "argmax":
            agree(full.argmax(1), want, 0.999, key)
        else:
            close(got[key], want, 2e-5, key)
    sky = model.sky(x, normalise=False)
    assert torch.equal(sky, full.argmax(1) == SKY)
    assert abs(sky.sum().item() - case["values"]["sky_pixels"]) <= 1e-3 * sky.numel()
    assert sum(p.numel() for p in model.parameters()) == case["values"]["n_params"]


def check_geometry(case: dict, arrays: dict) -> None:
    points, mask = torch.from_numpy(arrays["in_points"]), torch.from_numpy(arrays["in_mask"])
    z = points[..., 2]
    normals, defined = geometry.point_normals(points, mask)
    for name, want in arrays.items():
        number = re.search(r"_([\d.]+)(deg)?(_mask)?$", name)
        if name.startswith("in_") or name == "se3_in":
            continue
        if name.startswith("edge_rtol"):
            rtol = float(number[1]) if number else 0.03
            agree(geometry.depth_edge(z, rtol=rtol, mask=mask if name.endswith("mask") else None), want, 0.999, name)
        elif name.startswith("edge_atol"):
            agree(geometry.depth_edge(z, atol=float(number[1]), mask=mask if name.endswith("mask") else None), want, 0.999, name)
        elif name == "normals":
            close(normals, want, 1e-4, name)
        elif name == "normals_mask":
            agree(defined, want, 0.999, name)
        elif name.startswith("normal_edge"):
            agree(geometry.normal_edge(normals, defined, float(number[1])), want, 0.999, name)
        elif name == "depth_normal_edge":
            agree(geometry.depth_normal_edge(points, mask), want, 0.999, name)
        elif name in ("K_from_points", "K_centred"):
            close(geometry.intrinsics_from_points(points, centred=name == "K_centred"), want, 1e-4, name)
        elif name == "se3_inverse":
            close(geometry.inverse_se3(torch.from_numpy(arrays["se3_in"])), want, 1e-4, name)
        else:
            raise AssertionError(f"nothing checks the entry {name}")


def check_crop(case: dict, arrays: dict) -> None:
    for i, item in enumerate(case["values"]["items"]):
        image, depth, K = (arrays[f"in_{k}_{i}"] for k in ("image", "depth", "K"))
        a = item["aug_focal"]
        zoom = a + (1 - a) * item["beta"] if a else 1.0
        crop = augment.plan_crop(image.shape[1::-1], K, tuple(item["res"]), zoom, item["offset"])
        got, got_depth = augment.crop_image(image, crop), augment.crop_map(depth, crop)
        assert list(got.shape[1::-1]) == item["out_size_wh"]
        want = arrays[f"img_{i}"].astype(int)
        difference = np.abs(got.reshape(-1)[:: item["img_stride"]].astype(int) - want)
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.01
        assert abs(int(got.sum(dtype=np.int64)) - item["img_sum"]) <= 0.01 * got.size
        assert np.array_equal(flat(got_depth, arrays[f"depth_{i}"]), arrays[f"depth_{i}"])
        near(got_depth.sum(dtype=np.float64), item["depth_sum"], 1e-6, "sum of the depth")
        golden.close(crop.K, arrays[f"K_{i}"], atol=1e-4, rtol=1e-6, what=f"K_{i}")
        golden.close(crop.K, item["K"], atol=1e-4, rtol=1e-6, what=f"K of item {i}")
    sizes = case["values"].get("inference_target_sizes_wh")
    if sizes:
        for size, want in sizes["sizes"].items():
            assert list(augment.inference_size(tuple(map(int, size.split("x"))), sizes["pixel_limit"])) == want, size


def check_transforms(case: dict, arrays: dict) -> None:
    # the first numbers of the official module-level generators have no counterpart: here every sample has its own generator
    functions = {"jitter": (augment.jitter, 1), "jpeg": (augment.jpeg, 3), "blur": (augment.blur, 1)}
    assert {name.rsplit("_", 1)[0] for name in arrays if name != "input_image"} <= functions.keys() & case["config"].keys()
    for name, (function, tolerance) in functions.items():
        for i, parameters in enumerate(case["config"].get(name, [])):
            got = function(arrays["input_image"], *(parameters if isinstance(parameters, list) else [parameters]))
            difference = np.abs(got.astype(int) - arrays[f"{name}_{i}"].astype(int))
            assert difference.max() <= tolerance, f"{name}_{i}: {difference.max()}"


def write_tartan_tree(root: Path, tree: dict, poses: np.ndarray) -> None:
    for difficulty in tree["difficulties"]:
        folder = root / tree["environment"] / tree["environment"] / difficulty / tree["trajectory"]
        for entry in tree["images"]:
            path = folder / entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            small = draw({**entry, "scale": 1, "offset": 0}).numpy()
            large = cv2.resize(small, tuple(entry["resize_bilinear_to_wh"]), interpolation=cv2.INTER_LINEAR)
            image = (large * np.float32(entry["scale"]) + np.float32(entry["offset"])).astype(np.uint8)
            cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        for entry in tree["depths"]:
            path = folder / entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, draw(entry).numpy())
        np.savetxt(folder / "pose_left.txt", poses)


def check_loaders(case: dict, arrays: dict, tmp_path: Path) -> None:
    v, spec = case["values"], case.get("inputs_spec", {})
    checked = {"tartan_pose_rows", "co3d_camera", "co3d_depth", "unproj", "frame_selection", "tartan_sample", "tartan_tree"}
    assert v.keys() <= checked and v.get("frame_selection", {}).keys() <= {"tartanair", "scannet"}
    if "tartan_pose_rows" in v:
        poses = readers.tartanair_poses(np.array(v["tartan_pose_rows"]))
        golden.close(poses, arrays["tartan_c2w"], atol=1e-4, what="TartanAir poses")
    if "co3d_camera" in v:
        c = v["co3d_camera"]
        pose, K = readers.co3d_camera(c["R"], c["T"], c["focal"], c["principal"], c["image_hw"][::-1])
        golden.close(pose, c["c2w"], atol=1e-4, what="CO3D pose")
        golden.close(np.linalg.inv(pose), c["w2c"], atol=1e-4, what="CO3D world to camera")
        golden.close(K, c["K"], rtol=1e-4, what="CO3D intrinsics")
    if "co3d_depth" in v:
        depth = readers.co3d_depth(np.array(v["co3d_depth"]["u16"], np.uint16))
        golden.close(depth, v["co3d_depth"]["depth"], atol=1e-4, what="CO3D depth")
    if "unproj" in v:
        depth, u = torch.from_numpy(arrays["unproj_in_depth"]), v["unproj"]
        world = geometry.transform(torch.tensor(u["c2w"]), geometry.unproject(depth, torch.tensor(u["K"])))
        mask = geometry.valid_depth(depth, world, u["z_far"])
        assert np.array_equal(mask, arrays["unproj_mask"])
        golden.close(world[mask], arrays["unproj_X"][arrays["unproj_mask"]], rtol=1e-4, atol=1e-4, what="unprojection")
    for name, choose in (("tartanair", sampling.tartanair_frames), ("scannet", sampling.scannet_frames)):
        for s in v.get("frame_selection", {}).get(name, []):
            options = {"invalid": s["invalid"]} if "invalid" in s else {}
            got = choose(np.random.default_rng(s["seed"]), s["n_frames"], s["frame_num"], s["whole_prob"], **options)
            assert got.tolist() == s["ids"], (name, s["seed"])
    if "tartan_sample" in v:
        write_tartan_tree(tmp_path, spec["tartan_tree"], arrays[spec["tartan_tree"]["pose_rows"]])
        s, want = spec["tartan_sample"], v["tartan_sample"]
        reader = readers.TartanAir(tmp_path)
        reader.z_far = s["z_far"]
        rng = np.random.default_rng(s["seed"])
        sample = dataset.read_sample(reader, s["index"][0], rng, s["frame_num"], tuple(s["resolution_wh"]), train=False)
        assert [str(i) for i in sample["frames"]] == want["frames"]
        assert "_".join(Path(sample["sequence"]).parts[1:]) == want["label"] and sample["dataset"] == want["dataset"]
        assert want["sequence"].endswith("/".join(Path(sample["sequence"]).parts[1:]))
        folder = tmp_path / sample["sequence"] / "image_left"
        assert readers.count_files(folder, ".png") == want["n_frames"]
        batch = {k: torch.as_tensor(x)[None] for k, x in sample.items() if isinstance(x, (np.ndarray, np.generic))}
        got = {k: x[0] for k, x in dataset.unpack(batch, "cpu").items()}
        world = geometry.transform(got["poses"], got["local_points"])
        assert got["mask"].sum((1, 2)).tolist() == want["valid"]
        golden.close(sample["intrinsics"][0], want["K"], rtol=1e-4, atol=1e-4, what="intrinsics")
        golden.close(got["imgs"].mean((1, 2, 3)), want["img_mean"], rtol=1e-4, what="means of the images")
        means = [world[i][got["mask"][i]].double().mean().item() for i in range(len(world))]
        golden.close(means, want["pts_mean"], rtol=1e-4, atol=1e-4, what="means of the points")
        close(sample["poses"], arrays["tartan_c2w_sample"], 1e-4, "poses")
        close(world[0], arrays["tartan_pts0"], 1e-4, "world points of the first view")
        close(got["imgs"][0], arrays["tartan_img0"], 1e-4, "first image")
        assert np.array_equal(flat(got["mask"][0], arrays["tartan_mask0"]), arrays["tartan_mask0"])


def check_sampler(case: dict, arrays: dict) -> None:
    v, c = case["values"], case["config"]
    every = v.get("all_resolutions_wh", {"pixels": c["pix"], "aspect": [0.5, 2.0], "patch": 14})
    ranges = every["pixels"], every["aspect"], every["patch"]
    if "list" in every:
        sizes = sampling.all_resolutions(*ranges)
        assert [list(s) for s in sizes] == every["list"] and len(sizes) == every["count"]
    if "sampled_resolutions_wh" in v:
        some = v["sampled_resolutions_wh"]
        assert [list(s) for s in sampling.sample_resolutions(some["seed"], some["n"], *ranges)] == some["list"]
    for key, batches in v.get("dynamic_batches", {}).items():
        rank, epoch = map(int, re.fullmatch(r"rank(\d+)_epoch(\d+)", key).groups())
        stream = sampling.official_batches(c["len"], epoch, rank, 2, c["range"], c["max_img"], c["nres"])  # two ranks
        stream = list(itertools.islice(stream, len(batches)))
        assert len(stream) == len(batches), key
        for want, (views, size, items) in zip(batches, stream):
            got = {"image_num": views, "batch_size": len(items), "resolution_idx": size}
            assert got == {k: want[k] for k in got} and items[: len(want["first_indices"])] == want["first_indices"], key
    if "mixture" in v:
        m = v["mixture"]
        assert sum(m["weights"]) == m["length"]
        for index, (name, item, *_) in m["items"].items():  # data sets are called A, B, ...
            want = (ord(name) - ord("A"), item)
            assert sampling.mixture_item(int(index), m["weights"], m["sizes"], *m["set_epoch"]) == want
    published = {"TarTanAir": 8000, "ScanNet": 20000, "CO3DV2": 10000}
    for key, lengths in v.items():
        if key.startswith("weights_to_length_"):
            got = sampling.mixture_lengths([published[name] for name in lengths], int(key.rsplit("_", 1)[1]))
            assert got == list(lengths.values())


def check_schedule(case: dict, arrays: dict) -> None:
    c = case["config"]
    for want in case["values"]["lr_at_step"]:
        step = want["step"]
        near(schedule.lr_at(step, c["total"], c["lr"]), want["lr"], 1e-9, f"lr at {step}")
        near(schedule.lr_at(step, c["total"], c["enc_lr"]), want["lr_encoder"], 1e-9, f"encoder lr at {step}")
        near(schedule.beta1_at(step, c["total"]), want["beta1"], 1e-9, f"beta1 at {step}")
        assert want["beta2"] == 0.999


def check_metrics(case: dict, arrays: dict) -> None:
    v, A = case["values"], arrays
    checked = {"relpose", "umeyama", "recon_given_normals", "icp", "trajectory", "depth"}
    assert v.keys() <= checked, f"nothing checks {v.keys() - checked}"
    # ground truth at the depth limits: the L1 scale iteration amplifies rounding
    edges = "edges" in case["case"] or ("depth_gt" in A and (A["depth_gt"] < 0).any())
    if "relpose" in v:
        rotation, translation = metrics.relative_pose_errors(A["pred_w2c"], A["gt_w2c"])
        golden.close(rotation, A["relpose_rot_deg"], rtol=1e-5, what="rotation errors")
        golden.close(translation, A["relpose_trans_deg"], rtol=1e-5, what="translation errors")
        thresholds = sorted({int(name.rsplit("_", 1)[1]) for name in v["relpose"]})
        got = metrics.pose_accuracy(rotation, translation, thresholds)
        ours = {"Racc": "rra", "Tacc": "rta", "Auc": "auc"}
        for name, want in v["relpose"].items():
            kind, t = name.split("_")
            near(got[f"{ours[kind]}@{t}"], want, 1e-5, name)
    if "umeyama" in v:
        c, R, t = metrics.umeyama(A["umeyama_X"], A["umeyama_Y"])
        near(c, v["umeyama"]["c"], 1e-5, "scale")
        golden.close(R, v["umeyama"]["R"], atol=1e-5, what="rotation")
        golden.close(t, np.ravel(v["umeyama"]["t"]), atol=1e-5, what="translation")
        near(np.linalg.det(R), v["umeyama"].get("det_R", 1.0), 1e-5, "determinant")
    if "recon_given_normals" in v:
        got = metrics.reconstruction_errors(A["pc_pred"], A["pc_gt"], A["pc_pred_normals"], A["pc_gt_normals"])
        for name, want in v["recon_given_normals"].items():
            near(got[name], want, 1e-5, name)
    if "icp" in v:
        i = v["icp"]
        limits = i["max_corr"], i["max_iterations"], i["relative_fitness"], i["relative_rmse"]
        motion, fitness, rmse = metrics.icp(A["icp_source"], A["icp_target"], *limits)
        golden.close(motion, i["transformation"], atol=1e-5, what="ICP motion")
        near(fitness, i["fitness"], 1e-5, "ICP fitness")
        near(rmse, i["inlier_rmse"], 1e-5, "ICP RMSE")
        normals = metrics.estimate_normals(A["icp_target"])
        assert np.abs((normals * A["icp_target_normals_up_to_sign"]).sum(1)).min() > 0.999
        moved = A["icp_source"] @ motion[:3, :3].T + motion[:3, 3]
        got = metrics.reconstruction_errors(moved, A["icp_target"], metrics.estimate_normals(moved), normals)
        for name in got.keys() & i.keys():
            near(got[name], i[name], 1e-5, f"{name} after ICP")
    if "trajectory" in v:
        got = metrics.trajectory_errors(A["pred_c2w"], A["gt_c2w"])
        ours = {"ATE_rmse": "ate", "RPE_rot_deg_rmse": "rpe_rot_deg", "RPE_trans_rmse": "rpe_trans"}
        for name, want in v["trajectory"].items():
            near(got[ours[name]], want, 1e-5, name)
    settings = {
        "scale": ("l1_scale", 80, None), "scale_shift": ("l1_scale_shift", 80, None), "median": ("median", 80, None),
        "scale_max70_clip70": ("l1_scale", 70, 70), "no_max": ("l1_scale", None, None), "metric": ("metric", 80, None),
        "lstsq": ("lstsq", 80, None),
    }  # fmt: skip
    ours = {"Abs Rel": "abs_rel", "Sq Rel": "sq_rel", "RMSE": "rmse", "Log RMSE": "log_rmse", "valid_pixels": "valid_pixels",
            "δ < 1.25": "delta1", "δ < 1.25^2": "delta2", "δ < 1.25^3": "delta3"}  # fmt: skip
    for setting, values in v.get("depth", {}).items():
        got = metrics.depth_errors(A["depth_pred"], A["depth_gt"], *settings[setting])
        tolerance = 1e-3 if setting == "scale_shift" else 1e-4 if edges else 1e-5
        for name, want in values.items():
            if name == "δ < 1.":  # no ratio of two numbers and its inverse are both below 1
                assert want == 0
            else:
                near(got[ours[name]], want, tolerance, f"{setting}: {name}")


def check_shapes(case: dict, arrays: dict) -> None:
    table = case["state_dict"]
    has = lambda prefix: any(name.startswith(prefix) for name in table)
    with torch.device("meta"):
        options = {"train_conf": has("conf_"), "use_global_points": has("global_points_")} | case.get("config", {})
        model = Pi3X() if has("metric_token") else Pi3(**options)
    got = {k: list(t.shape) for k, t in model.state_dict().items()}
    assert got.keys() == table.keys(), f"missing {sorted(table.keys() - got.keys())}, more {sorted(got.keys() - table.keys())}"
    assert got == table
    assert len(got) == case["n_tensors"]
    assert sum(p.numel() for p in model.parameters()) == case["n_params"]


CHECKS = {
    "model": check_model, "train_step": check_train_step, "blocks": check_blocks, "heads": check_heads, "align": check_align,
    "losses": check_losses, "segformer": check_segformer, "geometry": check_geometry, "crop": check_crop,
    "transforms": check_transforms, "sampler": check_sampler, "schedule": check_schedule, "metrics": check_metrics,
    "shapes": check_shapes,
}  # fmt: skip


@pytest.mark.parametrize("name", golden.names("pi3"))
def test_case(name: str, tmp_path: Path):
    case, arrays = golden.load("pi3", name)
    kind = case["kind"]
    if kind == "loaders":
        check_loaders(case, arrays, tmp_path)
    else:
        assert kind in CHECKS, f"{name}: unknown kind {kind!r}"
        CHECKS[kind](case, arrays)
