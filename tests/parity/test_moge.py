"""MoGe against golden values of the official implementation: every case is run, chosen by its kind."""

import base64
import copy
import io
import math
import re
from unittest import mock

import golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.io import read_png16
from moge import alignment, augment, codec, geometry, metrics, optimization, panorama
from moge import loss as losses
from moge.model import build, postprocess


def tensor(x) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def scene(spec: dict) -> dict:
    return golden.module("moge/scene").scene(**spec)


def draw(spec: dict) -> np.ndarray:
    """offset + scale * draw(seed, shape, kind), float32."""
    x = golden.module("fill").draw(spec["seed"], tuple(spec["shape"]), spec.get("kind", "uniform"))
    return (np.float32(spec.get("offset", 0)) + np.float32(spec.get("scale", 1)) * x).astype(np.float32)


def flat(x, stride: int) -> np.ndarray:
    x = x.detach().numpy() if isinstance(x, Tensor) else np.asarray(x)
    return x.reshape(-1)[::stride]


def finite_close(got: np.ndarray, want: np.ndarray, what: str, **tol) -> None:
    """golden.close on the entries finite in `want`."""
    keep = np.isfinite(want)
    golden.close(got[keep], want[keep], what=what, **tol)


def unpack(packed: np.ndarray, shape) -> np.ndarray:
    return np.unpackbits(packed)[: math.prod(shape)].reshape(shape).astype(bool)


# ----------------------------------------------------------------------------------------------------------------- codecs


def read_case_png(text: str, tmp_path) -> tuple[np.ndarray, dict[str, str]]:
    path = tmp_path / "case.png"
    path.write_bytes(base64.b64decode(text))
    return read_png16(path)


def codec_depth(case, z, tmp_path):
    for i, entry in enumerate(case["cases"]):
        depth, codes = z[f"{i}.depth"], z[f"{i}.codes"]
        stored, text = read_case_png(entry["png_base64"], tmp_path)
        assert np.array_equal(stored, codes)
        got, own_text, wrong = codec.encode_depth(depth)
        unusual = np.isfinite(depth) & (depth <= 0)  # the official code clips these; here they are unknown
        assert wrong == unusual.sum() and not got[unusual].any()
        if not unusual.any():
            for key in ("near", "far"):
                assert np.float32(own_text[key]) == np.float32(entry[key]) == np.float32(text[key])
            assert np.array_equal(got, codes)
        decoded = codec.decode_depth(stored, text)
        golden.close(decoded, z[f"{i}.decoded"], rtol=2e-6, what=f"decoded {i}")
    if "legacy" in case:
        stored, text = read_case_png(case["legacy"]["png_base64"], tmp_path)
        assert np.array_equal(stored, case["legacy"]["codes"])
        assert all(text[key] == case["legacy"][key] for key in ("near", "far", "unit"))
        golden.close(codec.decode_depth(stored, text), z["legacy.decoded"], rtol=2e-6, what="legacy")


def codec_segmentation(case, z, tmp_path):
    for entry in case["cases"]:
        stored, text = read_case_png(entry["png_base64"], tmp_path)
        mask, labels = codec.decode_segmentation(stored, text)
        assert mask.dtype == entry["dtype"] and np.array_equal(mask, entry["mask"]) and labels == entry["labels"]
        again, own_text = codec.encode_segmentation(np.array(entry["mask"], entry["dtype"]), entry["labels"])
        assert np.array_equal(again, entry["mask"]) and own_text["labels"] == entry["text_chunk"]


def codec_normal(case, z, tmp_path):
    assert np.array_equal(codec.encode_normal(z["normal"]), z["rgb16"])
    golden.close(codec.decode_normal(z["rgb16"]), z["decoded"], atol=1e-6, what="decoded")


# ------------------------------------------------------------------------------------------------- alignment and its ties


def near_ties(p, g, w, trunc, shifted, m: int, chosen: tuple[int, int]) -> list[tuple[int, int]]:
    """Other (anchor, term) of problem m whose objective exceeds the optimum by 1e-6 of it at most: float32 cannot tell them
    apart.
    """
    anchors = (w[m] > 0).nonzero()[:, 0]
    axes, values = alignment._axes(p, shifted), []
    for part in anchors.split(64):
        values.append(alignment._solve_rows(*alignment._terms(p, g, w, axes, torch.full_like(part, m), part), trunc)[1])
    best, found = torch.cat(values), []
    for anchor in anchors[best <= best.min() * (1 + 1e-6)]:
        x, y = (v[0].double() for v in alignment._terms(p, g, w, axes, torch.full_like(anchor, m)[None], anchor[None]))
        for part in (x != 0).nonzero()[:, 0].split(256):
            error = (y[part] / x[part])[:, None] * x - y
            value = error.abs().clamp_max(torch.inf if trunc is None else trunc).sum(1)
            found += [(int(anchor), int(j)) for j in part[value <= best.min() * (1 + 1e-6)]]
    return [pair for pair in found if pair != chosen]


def match_gradient(run, want: np.ndarray, tol: float, what: str) -> None:
    """run() -> gradient, within tol of the largest entry of `want`.

    Where two anchors reach the same objective up to rounding, the official solver may have taken the other one, which moves the
    gradient to other points: then each such choice is tried in turn and kept where it brings the gradient closer.
    """
    search, override, calls = alignment._search, {}, []

    def recorded(*args, **kwargs):
        k, j = search(*args, **kwargs)
        call = len(calls)
        calls.append((args, k, j))
        k, j = k.clone(), j.clone()
        for (at, m), (kk, jj) in override.items():
            if at == call:
                k[m], j[m] = kk, jj
        return k, j

    def error() -> float:
        calls.clear()
        return float(np.abs(run() - want).max())

    bound = tol * max(float(np.abs(want).max()), 1e-30)
    with mock.patch.object(alignment, "_search", recorded):
        worst = error()
        tried = list(calls) if worst > bound else []
        for call, ((p, g, w, trunc, shifted), k, j) in enumerate(tried):
            for m in range(len(k)):
                for pair in near_ties(p, g, w, trunc, shifted, m, (int(k[m]), int(j[m]))) if (w[m] > 0).any() else ():
                    before = override.get((call, m))
                    override[call, m] = pair
                    new = error()
                    if new < worst:
                        worst = new
                    elif before is None:
                        del override[call, m]
                    else:
                        override[call, m] = before
                    if worst <= bound:
                        return
    assert worst <= bound, f"{what}: gradient off by {worst:.3g} (allowed {bound:.3g})"


def objective(src: Tensor, tgt: Tensor, w: Tensor, s: Tensor, t: Tensor, trunc: float | None) -> Tensor:
    """Objective (B,) in double precision of scale s (B,) and shift t (B, 3)."""
    error = w.double()[..., None] * (s.double()[:, None, None] * src + t.double()[:, None] - tgt).abs()
    return (error if trunc is None else error.clamp_max(trunc)).sum((1, 2))


def align_solvers(case, z, tmp_path):
    src, tgt, w = (tensor(z[k]) for k in ("in_src", "in_tgt", "in_w"))
    stored = {k for k in z if k.endswith(".grad_src")}
    assert stored <= {f"{entry['fn']}.trunc{entry.get('trunc')}.grad_src" for entry in case["cases"]}
    for entry in case["cases"]:
        fn, trunc, what = entry["fn"], entry.get("trunc"), f"{entry['fn']}, trunc {entry.get('trunc')}"
        axis = "xyz".index(found[1]) if (found := re.search(r"([xyz]) components", fn)) else 2
        if fn.startswith("affine_lstsq"):
            a, b = alignment.affine_lstsq(src[..., axis], tgt[..., axis])
            golden.close(a, entry["a"], rtol=1e-4, what=what)
            golden.close(b, entry["b"], rtol=1e-4, atol=1e-5, what=what)
            continue
        if fn.startswith("align_1d"):
            a, value, index = alignment.align_1d(src[..., axis], tgt[..., axis], w, trunc)
            golden.close(value, entry["loss"], rtol=1e-5, what=what)
            golden.close(a, entry["a"], rtol=1e-4, what=what)
            at = index[:, None]
            golden.close((tgt[..., axis].gather(1, at) / src[..., axis].gather(1, at))[:, 0], a.detach(), rtol=1e-5, what=what)
            continue
        flat_depth = fn.startswith("depth")
        args = (src[..., 2], tgt[..., 2]) if flat_depth else (src, tgt)
        got = getattr(alignment, f"align_{fn}")(*args, w, trunc)
        got = dict(zip([k for k in ("scale", "shift") if k in entry], got if isinstance(got, tuple) else (got,)))
        zero = torch.zeros(len(src), 3)

        def value(result, fn=fn, flat_depth=flat_depth, trunc=trunc, zero=zero):
            s = torch.as_tensor(result.get("scale", torch.ones(len(src))))
            t = torch.as_tensor(result.get("shift", zero))
            if flat_depth:
                shift = t if "shift" in result else zero[:, 0]
                return objective(src[..., 2:], tgt[..., 2:], w, s, shift[:, None], trunc)
            return objective(src, tgt, w, s, t, trunc)

        if "objective" in entry:
            golden.close(value(got), entry["objective"], rtol=1e-5, what=f"{what}: objective")
        theirs = value({k: torch.tensor(entry[k]) for k in got})
        assert (value(got) <= theirs * (1 + 1e-5)).all(), what
        tie = value(got) <= theirs * (1 - 1e-8)  # another anchor, and a better one: its scale and shift need not agree
        for k, v in got.items():
            want = torch.tensor(entry[k])
            golden.close(v[~tie], want[~tie].numpy(), rtol=1e-4, atol=1e-5, what=f"{what}: {k}")
            golden.close(v[tie], want[tie].numpy(), rtol=1e-3, atol=1e-3, what=f"{what}: {k}")
        key = f"{fn}.trunc{trunc}.grad_src"
        if key in z:

            def gradient(fn=fn, trunc=trunc):
                leaf = src.clone().requires_grad_()
                out = getattr(alignment, f"align_{fn}")(leaf, tgt, w, trunc)
                total = out[0].sum() + 0.5 * out[1].sum() if isinstance(out, tuple) else out.sum()
                return torch.autograd.grad(total, leaf)[0].numpy()

            match_gradient(gradient, z[key], 2e-3, what)


# ----------------------------------------------------------------------------------------------------------------- losses


def scene_of(case: dict, z: dict) -> dict:
    """The case's scene; arrays that it stores (in_image, in_depth, ...) stand for those of the scene."""
    spec = case.get("input", {}).get("scene")
    return (scene(spec) if spec else {}) | {k.removeprefix("in_"): v for k, v in z.items() if k.startswith("in_")}


def loss_inputs(case: dict, z: dict) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Predicted and true points (1, H, W, 3), validity (1, H, W), the scene."""
    s = scene_of(case, z)
    rule = case.get("inputs_spec", {}).get("pred", {})
    pred = s[rule.get("scene", "pred")] * np.float32(rule.get("factor", 1))
    return tensor(pred)[None], tensor(s["points"])[None], tensor(np.isfinite(s["depth"]))[None], s


def check_loss(case, z, leaf: Tensor, compute) -> None:
    """compute(leaf) -> (loss (1,), metrics); values and the gradient against the case."""
    loss, found = compute(leaf)
    golden.close(loss[0], np.float32(case["loss"]), rtol=1e-4, what="loss")
    misc = case.get("misc", {})
    for k, v in misc.items():
        golden.close(found[k][0], np.float32(v), rtol=1e-4, atol=1e-6, what=k)
    if "misc" in case and not misc:
        assert all(v.isnan().all() for v in found.values())

    def gradient() -> np.ndarray:
        x = leaf.clone().requires_grad_()
        value = compute(x)[0].sum()
        return torch.autograd.grad(value, x)[0].numpy().reshape(-1)

    if "grad" in z:
        stride = case["outputs"]["grad"]["flat_stride"]
        match_gradient(lambda: gradient()[::stride], z["grad"], 2e-3, "gradient")
    elif "grad_nz_index" in z:
        want = np.zeros(leaf.numel(), np.float32)
        want[z["grad_nz_index"]] = z["grad_nz_value"]
        match_gradient(gradient, want, 2e-3, "gradient")
    elif case["loss"] == 0:
        assert not gradient().any()


def loss_global(case, z, tmp_path):
    pred, gt, mask, _ = loss_inputs(case, z)
    golden.close(losses.affine_invariant_global_loss(pred, gt, mask, **case["params"])[2][0], case["scale"], rtol=1e-4, what="scale")
    check_loss(case, z, pred, lambda p: losses.affine_invariant_global_loss(p, gt, mask, **case["params"])[:2])


def loss_local(case, z, tmp_path):
    pred, gt, mask, _ = loss_inputs(case, z)
    focal, scale, anchors = (
        torch.tensor([case["focal"]]),
        torch.tensor([case["global_scale"]]),
        torch.tensor(case["anchors_ij"])[None],
    )
    check_loss(case, z, pred, lambda p: losses.affine_invariant_local_loss(p, gt, mask, focal, scale, anchors=anchors, **case["params"]))


def loss_local_seeded(case, z, tmp_path):
    """The official random calls, made here, give the official anchors from our weights."""
    pred, gt, mask, s = loss_inputs(case, z)
    H, W = mask.shape[1:]
    level, focal = case["params"]["level"], torch.tensor([s["focal"]])
    radius = math.ceil(0.5 / level * math.hypot(H, W))
    torch.manual_seed(case["torch_manual_seed"])
    rows = torch.randint(-radius, radius + 1, (H, W, 64))
    cols = torch.randint(-radius, radius + 1, (H, W, 64))
    radius_3d = 0.5 / level / focal * torch.where(mask, gt[..., 2], 1.0)
    weight = losses.anchor_weights(gt, mask, radius_3d, rows, cols)[0]
    drawn = torch.multinomial(weight[mask[0]], case["params"]["num_patches"], replacement=True)
    anchors, scale = mask[0].nonzero()[drawn][None], torch.tensor([case["global_scale"]])
    loss, found = losses.affine_invariant_local_loss(pred, gt, mask, focal, scale, anchors=anchors, **case["params"])
    golden.close(loss[0], case["loss"], rtol=1e-3, what="loss")
    for k, v in case["misc"].items():
        golden.close(found[k][0], v, rtol=1e-3, what=k)


def loss_normal(case, z, tmp_path):
    pred, gt, mask, _ = loss_inputs(case, z)
    function = {"loss_normal": losses.normal_loss, "loss_edge": losses.edge_loss}[case["kind"]]
    check_loss(case, z, pred, lambda p: (function(p, gt, mask), {}))


def loss_mask(case, z, tmp_path):
    function = {"loss_mask_l2": losses.mask_l2_loss, "loss_mask_bce": losses.mask_bce_loss}[case["kind"]]
    positive, negative = tensor(z["in_pos"])[None], tensor(z["in_neg"])[None]
    pred = tensor(z["in_pred_mask"])[None]
    check_loss(case, z, pred, lambda m: (function(m, positive, negative), {}))
    if case["kind"] == "loss_mask_bce":  # the form on logits has the same value
        golden.close(losses.mask_bce_loss(pred.logit(), positive, negative, logit=True)[0], case["loss"], rtol=1e-4, what="logit")


def loss_metric_scale(case, z, tmp_path):
    pred = torch.tensor(case["pred"], requires_grad=True)
    loss = losses.metric_scale_loss(pred, torch.tensor(case["gt"]))
    golden.close(loss, np.float32(case["loss"]), rtol=1e-4, what="loss")
    golden.close(torch.autograd.grad(loss.sum(), pred)[0], np.float32(case["grad"]), scale_tol=2e-3, what="gradient")


def loss_normal_map(case, z, tmp_path):
    gt = tensor(z["in_gt_normal"])[None]
    check_loss(case, z, tensor(z["in_pred_normal"])[None], lambda n: (losses.normal_map_loss(n, gt), {}))
    limit = re.search(r"edge_threshold=([\d.]+)", case.get("input", {}).get("gt", ""))
    if limit:
        s = scene(case["input"]["scene"])
        depth = tensor(s["depth"])
        normal, known = geometry.points_to_normal(geometry.depth_to_points(depth, tensor(s["K"])), depth.isfinite(), float(limit[1]))
        own = torch.where(known[..., None], normal, torch.nan)
        finite_close(own.numpy(), z["in_gt_normal"], "normals of the scene", atol=1e-4)


def anchor_weights(case, z, tmp_path):
    args = (tensor(z[k])[None] for k in ("in_points", "in_mask", "in_radius_3d"))
    weight = losses.anchor_weights(*args, tensor(z["in_di"]), tensor(z["in_dj"]))
    stride = case["outputs"]["weights"]["flat_stride"]
    golden.close(flat(weight[0], stride), z["weights"], rtol=1e-5, atol=1e-9, what="weights")


# --------------------------------------------------------------------------------------------------------------- geometry


def focal_shift(case, z, tmp_path):
    for i, entry in enumerate(case["cases"]):
        if f"in_{i}.points" not in z:
            focal, shift = geometry.recover_focal_shift(torch.rand(1, 20, 30, 3), torch.zeros(1, 20, 30, dtype=torch.bool))
            golden.close(focal, entry["focal"], what="empty mask"), golden.close(shift, entry["shift"], what="empty mask")
            continue
        points, mask = tensor(z[f"in_{i}.points"])[None], tensor(z[f"in_{i}.mask"])[None]
        given = None if entry["given_focal"] is None else torch.tensor([entry["given_focal"]])
        for key, m in (("masked", mask), ("unmasked", None)):
            focal, shift = geometry.recover_focal_shift(points, m, given)
            golden.close(focal, entry[key]["focal"], atol=2e-3, what=f"{i} {key} focal")
            golden.close(shift, entry[key]["shift"], atol=2e-3, what=f"{i} {key} shift")


def masked_nearest_resize(case, z, tmp_path):
    for i, entry in enumerate(case["cases"]):
        mask, index = geometry.masked_nearest_resize(tensor(z[f"in_{i}.mask"]), tuple(entry["size"]))
        assert np.array_equal(mask.numpy(), z[f"{i}.mask"])
        assert np.array_equal(torch.where(mask, index, -1).numpy(), z[f"{i}.flat_index"])
    for entry in case.get("inputs_spec", {}).get("view_plane_uv", []):
        uv = geometry.view_plane_uv(entry["width"], entry["height"], entry["aspect_ratio"])
        golden.close(uv, z[entry["key"]], atol=1e-6, what=entry["key"])


def geometry_helpers(case, z, tmp_path):
    depth, K = tensor(scene_of(case, z)["depth"]), torch.tensor(case["input"]["K"])
    mask = depth.isfinite()
    points = geometry.depth_to_points(depth, K)
    golden_points = z["point_map"]
    got = flat(points, case["outputs"]["point_map"]["flat_stride"])
    assert not np.isfinite(got[~np.isfinite(golden_points)]).any()
    finite_close(got, golden_points, "points", rtol=1e-5, atol=1e-5)
    for key in z:
        name, _, form = key.partition(".")
        if name == "normal":
            limit = None if form == "None" else float(form)
            normal, known = geometry.points_to_normal(points, mask, limit)
            got = flat(normal, case["outputs"][key]["flat_stride"])
            assert np.array_equal(np.isfinite(got), np.isfinite(z[key])), key
            finite_close(got, z[key], key, atol=1e-5)
            assert (known.numpy() != z[f"normal_mask.{form}"]).mean() <= 0.005
        elif name == "edge":
            kernel, tolerance = re.fullmatch(r"(?:k(\d+)\.)?([lr](?:tol)?[\d.]+)", form).groups()
            option = {"ltol" if tolerance[0] == "l" else "rtol": float(tolerance.strip("lrto"))}
            edge = geometry.depth_edge(depth, mask, int(kernel or 3), **option)
            assert (edge.numpy() != z[key]).mean() <= 0.005, key
    filled = torch.where(mask, depth, 1.0)
    golden.close(geometry.weighted_mean(filled, mask.float()), case["weighted_mean"], rtol=1e-5, what="weighted mean")
    golden.close(geometry.harmonic_mean(filled, mask.float()), case["harmonic_mean"], rtol=1e-5, what="harmonic mean")


def panorama_maths(case, z, tmp_path):
    cameras, K = panorama.panorama_cameras()
    golden.close(cameras, z["extrinsics"], atol=1e-4, what="cameras")
    golden.close(K, case["intrinsics"], atol=1e-4, what="intrinsics")
    directions = panorama.equirectangular_directions(case["W"], case["H"])
    golden.close(flat(directions, case["outputs"]["directions"]["flat_stride"]), z["directions"], atol=1e-4, what="directions")
    uv = panorama.directions_to_uv(directions)
    golden.close(flat(uv, case["outputs"]["uv_back"]["flat_stride"]), z["uv_back"], atol=1e-4, what="uv")
    views = panorama.split_panorama(z["in_image"], cameras, K, case["inputs_spec"]["split_size"])
    stored = case["inputs_spec"]["split_views_stored"]
    golden.close(np.stack(views[:stored]), z["split"], atol=1, what="split")
    masks = [np.ones(d.shape, bool) for d in z["in_distances"]]
    merged, seen = panorama.merge_panorama(case["W"], case["H"], z["in_distances"], masks, cameras, K)
    assert seen.sum() == case["mask_true"]
    ratio = np.log(merged / z["merged"])
    golden.close(ratio - np.median(ratio), np.zeros_like(ratio), atol=1e-2, what="merged, up to a factor")


# ------------------------------------------------------------------------------------------------------------------- data


def sample_perspective(case, z, tmp_path):
    for i, c in enumerate(case["cases"]):
        rng = np.random.default_rng(c["rng_seed"])
        options = (c["tgt_aspect"], c["center_augmentation"], c["fov_range_absolute"], c["fov_range_relative"])
        K, R = augment.sample_perspective(np.array(c["K"], np.float32), *options, rng)
        golden.close(K, c["K_out"], atol=1e-4, rtol=1e-4, what=f"{i} K")
        golden.close(R, c["R"], atol=1e-4, what=f"{i} R")


def process_instance(case, z, tmp_path):
    s, config, out = scene_of(case, z), case["config"], case["outputs"]
    dataset = config["dataset"]
    keys = ("center_augmentation", "fov_range_absolute", "fov_range_relative", "image_augmentation", "clamp_max_depth")
    keys += ("depth_unit", "finite_depth_mask")
    options = {k: dataset.get(k, config.get(k)) for k in keys if k in dataset or k in config}
    instance = {"image": s["image"], "depth": s["depth"], "intrinsics": np.array(case["input"]["K"], np.float32)}
    instance["label_type"] = dataset["label_type"]
    rng = np.random.default_rng(case["input"]["instance_seed"])
    got = augment.process_instance(instance, case["input"]["width"], case["input"]["height"], rng, **options)
    assert (got["label_type"], got["is_metric"]) == (case["label_type"], case["is_metric"])
    golden.close(got["intrinsics"], case["intrinsics"], atol=1e-4, rtol=1e-4, what="intrinsics")
    image = flat(got["image"].transpose(2, 0, 1) / np.float32(255), out["image"]["flat_stride"])
    assert np.abs(image - z["image"]).mean() <= 1.5 / 255
    for key, tol in (("depth", 1e-3), ("normal", 1e-3)):
        own, want = flat(got[key], out[key]["flat_stride"]), z[key]
        both = np.isfinite(own) & np.isfinite(want)
        error = np.abs(own[both] - want[both]) / (want[both] if key == "depth" else 1)
        assert (error <= tol).mean() >= 0.99, key
        want_known = np.isfinite(want) & ~(want == 0) if key == "depth" else np.isfinite(want)  # depth 0 is unknown here
        assert (np.isfinite(own) != want_known).mean() <= 0.01, key
    for key in ("depth_mask_fin", "depth_mask_inf"):
        assert (got[key] != unpack(z[f"{key}.packed"], got[key].shape)).mean() <= 0.01, key


def color_augmentation(case, z, tmp_path):
    stored = scene_of(case, z)
    for i, entry in enumerate(case["cases"]):
        rng = np.random.default_rng(entry["rng_seed"])
        image = augment.augment_colors(stored["image"].copy(), stored["depth"], entry["augmentations"], rng)
        if "radius" in entry:  # depth of field alone, with its map of radii
            inner = (slice(*(case["interior"][k] for k in ("start", "stop", "step"))),) * 2
            rng = np.random.default_rng(entry["rng_seed"])
            assert rng.uniform() < 0.5 and int(rng.integers(12)) == entry["max_blur_radius"]
            radius = augment.blur_radius(stored["depth"], entry["max_blur_radius"], rng)[inner]
            same = radius == z[entry["radius"]]
            assert (~same).mean() <= 0.005, i
            golden.close(image[inner][same], z[entry["image"]][same], atol=1, what=f"image {i}")
            continue
        assert (image != stored["image"]).any() == entry["changed"], i
        step = -(-len(image) // len(z[str(i)]))  # stored is [::step, ::step]
        error = np.abs(image[::step, ::step].astype(np.float64) - z[str(i)])
        error = error[2:-2, 2:-2] if "dof" in entry["augmentations"] else error
        assert error.mean() <= (3 if {"dof", "jpeg_loss"} & set(entry["augmentations"]) else 1.5), (i, error.mean())


def eval_instance(case, z, tmp_path):
    given, out, spec = case["input"], case["outputs"], case.get("inputs_spec", {})
    s = scene_of(case, z)
    instance = {"image": s["image"], "depth": s["depth"], "intrinsics": np.array(given["K"], np.float32)}
    if "segmentation" in s:
        instance |= {"segmentation": s["segmentation"], "labels": spec["segmentation_labels"]}
    names = ("depth_unit", "drop_max_depth", "max_segments", "min_seg_area")
    got = augment.prepare_evaluation(instance, given["width"], given["height"], **{k: given[k] for k in names if k in given})
    golden.close(got["intrinsics"], case["intrinsics"], atol=1e-4, what="intrinsics")
    if "labels" in case:
        assert got["labels"] == case["labels"]
    image = flat(got["image"].transpose(2, 0, 1) / np.float32(255), out["image"]["flat_stride"])
    assert np.abs(image - z["image"]).mean() <= 1.5 / 255
    want = unpack(z["depth_mask.packed"], got["depth_mask"].shape)
    assert (got["depth_mask"] != want).mean() <= 0.01 and abs(int(got["depth_mask"].sum()) - case["depth_mask_count"]) <= 0.01 * want.size
    both = got["depth_mask"] & want
    for key, inside in (("depth", both), ("points", np.repeat(both[..., None], 3, -1))):
        stride = out[key]["flat_stride"]
        inside, own = flat(inside, stride), flat(got[key], stride)
        error = np.abs(own - z[key])[inside] / np.maximum(np.abs(z[key][inside]), 1e-2)
        assert (error <= 1e-3).mean() >= 0.99, key
    if "segmentation" in z:
        assert (got["segmentation"][::3, ::3] != z["segmentation"]).mean() <= 0.01


def eval_metrics(case, z, tmp_path):
    spec, arrays = case["inputs_spec"], {k: tensor(v) for k, v in z.items()}
    for name in (k for k, v in spec.items() if isinstance(v, dict) and "unproject" in v):
        arrays[name] = geometry.depth_to_points(*(arrays[k] for k in spec[name]["unproject"]))
    gt = {
        "depth": arrays["in_gt_depth"],
        "points": arrays["gt_points"],
        "depth_mask": arrays["in_gt_mask"],
        "intrinsics": arrays["in_K"],
    }
    gt |= {"is_metric": spec["is_metric"], "has_sharp_boundary": spec["has_sharp_boundary"]}
    if "in_segmentation" in z:
        gt |= {"segmentation": arrays["in_segmentation"], "labels": spec["segmentation_labels"]}
    for kind, want in case["results"].items():
        got, _ = metrics.compute_metrics({k: arrays[v] for k, v in spec["predictions"][kind].items()}, gt)
        assert set(got) == set(want), kind
        for name, values in want.items():
            assert set(got[name]) == set(values), (kind, name)
            for k, v in values.items():
                golden.close(got[name][k], v, atol=1e-3, what=f"{kind} {name} {k}")


# ------------------------------------------------------------------------------------------------------------------ models


def filled_model(case: dict) -> nn.Module:
    """The case's model, filled by the rule of the cases."""
    model = build(case["config"], case.get("model_version", "v1"))
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == case.get("state_dict", shapes)
    state = golden.filled({k: s for k, s in shapes.items() if not k.endswith(("image_mean", "image_std"))})
    for k, v in state.items():
        if k.endswith("pos_embed"):
            state[k] = v * np.float32(0.5 * math.sqrt(v.shape[1] * v.shape[2]))
    model.load_state_dict(state, strict=False)
    return model


class ReluSides:
    """Lets single units of a network's ReLUs be held on the other side of zero.

    The gradient of a ReLU jumps where its input is zero; inputs that are zero up to rounding may lie on either side,
    differently on another processor. `doubtful` lists such units after a forward pass: (module, flat index).
    """

    def __init__(self, model: nn.Module, rounding: float = 5e-5):
        self.flipped, self.doubtful, self.rounding = [], [], rounding
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self.hook)

    def hook(self, module, args, out):
        x = args[0]
        self.doubtful += [(module, i) for i in (x.detach().flatten().abs() < self.rounding).nonzero()[:, 0].tolist()]
        own = [i for m, i in self.flipped if m is module]
        if not own:
            return None
        gate = (x > 0).flatten()
        gate[own] = ~gate[own]
        return x * gate.view_as(x)


def model_forward(case, z, tmp_path):
    model = filled_model(case)
    assert sum(p.numel() for p in model.parameters()) == case["num_parameters"]
    image = tensor(draw(case["input"])).requires_grad_()
    inner, sides = {}, ReluSides(model)
    encoder = model.encoder_network
    layers = encoder.get_intermediate_layers

    def recorded(x, *args, **kwargs):
        inner["size"] = list(x.shape[-2:])
        for k, (patches, cls) in enumerate(layers(x, *args, **{**kwargs, "reshape": False, "return_class_token": True})):
            inner[f"feature{k}"], inner[f"cls{k}"] = patches, cls
        return layers(x, *args, **kwargs)

    encoder.get_intermediate_layers = recorded
    if case["model_version"] == "v1":
        for k, block in enumerate(model.head.upsample_blocks):
            block[-1].register_forward_hook(lambda m, a, o, k=k: inner.__setitem__(f"upsample{k}", o))
        model.head.register_forward_pre_hook(lambda m, a: inner.__setitem__("size", list(a[1:3])))

    def gradients() -> tuple[dict, np.ndarray, dict]:
        model.zero_grad()
        image.grad = None
        sides.doubtful = []
        out = model(image, case["num_tokens"])
        scalar = 0
        for key, weight in case["inputs_spec"]["output_weights"].items():
            scalar = scalar + case["inputs_spec"]["scalar_factor"] * (out[key] * tensor(draw(weight))).mean()
        scalar.backward()
        norms = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
        return {**out, **inner, "scalar": scalar}, flat(image.grad, case["outputs"]["grad_image"]["flat_stride"]), norms

    out, grad, norms = gradients()
    for key, entry in case["outputs"].items():
        if key != "grad_image":
            golden.close(flat(out[key], entry["flat_stride"]), z[key], scale_tol=2e-4, what=key)
    if "resized_hw" in case:
        assert out["size"] == case["resized_hw"]
    golden.close(out["scalar"].item(), case["scalar"], rtol=1e-3, atol=1e-4, what="scalar")
    assert {k for k, p in model.named_parameters() if k not in norms} == set(case["params_without_grad"])

    def worst() -> float:
        """Largest error of the gradients in units of what is allowed."""
        image_error = np.abs(grad - z["grad_image"]).max() / (2e-3 * np.abs(z["grad_image"]).max())
        floor = 1e-6 * max(case["grad_norms"].values())
        return max(image_error, *(abs(norms[k] - v) / (2e-3 * max(v, floor)) for k, v in case["grad_norms"].items()))

    error = worst()
    for unit in list(sides.doubtful) if error > 1 else ():
        sides.flipped.append(unit)
        _, grad, norms = gradients()
        if worst() < error:
            error = worst()
        else:
            sides.flipped.pop()
        if error <= 1:
            break
    assert error <= 1, f"gradients off by {error:.2f} times what is allowed, whatever side the doubtful units are on"


def infer_post(case, z, tmp_path):
    assert len(case["cases"]) == len(case["inputs_spec"]["cases"])
    for i, (entry, spec) in enumerate(zip(case["cases"], case["inputs_spec"]["cases"])):
        p = spec["points"]
        points = scene(p["scene"])["points"] * np.float32(p["scale"]) + np.float32(p["add"]) + draw(p["noise"])
        normal = tensor(z[spec["normal"]])[None] if "normal" in spec else None
        scale = None if entry["metric_scale"] is None else torch.tensor([entry["metric_scale"]])
        options = {**entry["infer_args"], "version": entry["version"]}
        got = postprocess(tensor(points)[None], tensor(draw(spec["mask"]))[None], normal, scale, **options)
        golden.close(got["intrinsics"][0], entry["intrinsics"], atol=2e-3, what=f"{i} intrinsics")
        assert int(got["mask"].sum()) == entry["mask_true"]
        for key in ("points", "depth", "normal"):
            if f"{i}.{key}" in z:
                own, want = flat(got[key], case["outputs"][f"{i}.{key}"]["flat_stride"]), z[f"{i}.{key}"]
                assert np.array_equal(np.isfinite(own), np.isfinite(want)), (i, key)
                top = np.abs(want[np.isfinite(want)]).max()
                finite_close(own, want, f"{i} {key}", rtol=5e-3, atol=5e-3 * 0.05 * top)


# ---------------------------------------------------------------------------------------------------------------- training


def lr_schedule(case, z, tmp_path):
    base = [group["lr"] for group in case["optimizer"]["params"]]
    for step, want in case["lr"].items():
        factors = optimization.lr_factors(case["lr_scheduler"], int(step), len(base))
        golden.close([b * f for b, f in zip(base, factors)], want, rtol=1e-9, what=f"step {step}")
    layers = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    wrapped = nn.ModuleDict({"model": layers})
    optimizer = optimization.build_optimizer(wrapped, case["optimizer"])
    assert type(optimizer).__name__ == case["optimizer"]["type"] and [g["lr"] for g in optimizer.param_groups] == base
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    for k, v in case["adamw_defaults"].items():
        if k not in ("lr", "betas"):
            assert optimizer.defaults[k] == v, k
    assert list(optimizer.defaults["betas"]) == case["adamw_defaults"]["betas"]


def train_trajectory(case, z, tmp_path):
    """Optimizer steps of a small model; before the last one everything goes through a file, as when a run is stopped and
    resumed.
    """
    spec = case["inputs_spec"]
    names = {"global": "affine_invariant_global_loss"} | {k: f"{k}_loss" for k in ("normal", "edge", "mask_l2", "mask_bce")}
    table = {"all": {k: {"function": names[k], "weight": w} for k, w in spec["weights"].items()}}
    table["all"]["global"]["params"] = spec["global_loss"]
    scenes = [scene(s) for s in spec["scenes"]]
    micro = spec.get("micro_batches") or [{"scenes": list(range(len(scenes))), "num_tokens": case["num_tokens"]}]
    batches = [trajectory_batch([scenes[i] for i in m["scenes"]], spec["image_scale"]) for m in micro]

    model = filled_model(case)
    optimizer = optimization.build_optimizer(model, case["optimizer"])
    average, updates = copy.deepcopy(model.state_dict()), 0
    for step, want in enumerate(case["steps"]):
        loose = 2e-3 if step == 0 else 2e-2
        if step == len(case["steps"]) - 1:
            buffer = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": average, "updates": updates}, buffer)
            buffer.seek(0)
            held = torch.load(buffer, weights_only=True)
            model = build(case["config"], case.get("model_version", "v1"))
            model.load_state_dict(held["model"])
            optimizer = optimization.build_optimizer(model, case["optimizer"])
            optimizer.load_state_dict(held["optimizer"])
            average, updates = held["ema"], held["updates"]
        rates = optimization.set_lr(optimizer, case["lr_scheduler"], step)
        golden.close(rates, want["lr"], rtol=1e-9, what=f"step {step} lr")
        total = 0.0
        for m, batch, entry in zip(micro, batches, want.get("micro", [want])):
            out = model(batch["image"], m["num_tokens"])
            loss, logs = losses.total_loss(table, out, batch)
            (loss / len(micro)).backward()
            total += loss.item() / len(micro)
            golden.close(loss.item(), entry["loss"], rtol=loose, what=f"step {step} loss")
            parts = np.stack([logs[k].numpy() for k in spec["weights"]], 1)
            golden.close(parts, np.array(entry["parts"])[:, : parts.shape[1]], rtol=loose, atol=1e-4, what=f"step {step} parts")
        golden.close(total, want["loss"], rtol=loose, what=f"step {step} loss")
        norm = nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"]).item()
        golden.close(norm, want["grad_norm_before_clip"], rtol=max(loose, 1e-2), what=f"step {step} gradient norm")
        optimizer.step()
        optimizer.zero_grad()
        updates = optimization.update_ema(list(average.values()), model.state_dict().values(), updates, case["ema_decay"])
    for key, entry in case["outputs"].items():
        which, _, name = key.partition(".")
        own = (average if which == "ema" else model.state_dict())[name]
        golden.close(flat(own, entry["flat_stride"]), z[key], atol=2e-3 * entry["absmax"], what=key)


def trajectory_batch(scenes: list[dict], scale: float) -> dict:
    depth = tensor(np.stack([s["depth"] for s in scenes]))
    return {
        "image": tensor(np.stack([s["image"].transpose(2, 0, 1) for s in scenes]) * np.float32(scale)),
        "depth": depth,
        "intrinsics": tensor(np.stack([s["K"] for s in scenes])),
        "depth_mask_fin": ~depth.isinf(),
        "depth_mask_inf": depth.isinf(),
        "label_type": ["all"] * len(scenes),
        "is_metric": [False] * len(scenes),
    }


KINDS = {
    "codec_depth": codec_depth,
    "codec_segmentation": codec_segmentation,
    "codec_normal": codec_normal,
    "align_solvers": align_solvers,
    "loss_global": loss_global,
    "loss_local": loss_local,
    "loss_local_seeded": loss_local_seeded,
    "loss_normal": loss_normal,
    "loss_edge": loss_normal,
    "loss_mask_l2": loss_mask,
    "loss_mask_bce": loss_mask,
    "loss_metric_scale": loss_metric_scale,
    "loss_normal_map": loss_normal_map,
    "anchor_weights": anchor_weights,
    "focal_shift": focal_shift,
    "masked_nearest_resize": masked_nearest_resize,
    "geometry": geometry_helpers,
    "panorama": panorama_maths,
    "sample_perspective": sample_perspective,
    "process_instance": process_instance,
    "color_augmentation": color_augmentation,
    "eval_instance": eval_instance,
    "metrics": eval_metrics,
    "model": model_forward,
    "infer_post": infer_post,
    "lr_schedule": lr_schedule,
    "train_trajectory": train_trajectory,
}


@pytest.mark.parametrize("name", golden.names("moge"))
def test_case(name, tmp_path):
    case, arrays = golden.load("moge", name)
    assert case["kind"] in KINDS, f"case {name} is of the unknown kind {case['kind']!r}"
    KINDS[case["kind"]](case, arrays, tmp_path)
