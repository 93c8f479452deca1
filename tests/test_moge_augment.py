"""The codecs and the data pipeline of moge/ against exact geometry and the input that it can meet."""

import json

import numpy as np
import pytest
import torch

from common.io import read_png16, write_png16
from moge import augment, codec, optimization, panorama
from moge.geometry import depth_to_points
from synth.moge import view

OPTIONS = {"image_augmentation": [], "fov_range_relative": (0.4, 0.9)}


def instance(seed=3, size=(120, 160), **changes):
    v = view(seed, 0, size)
    made = {"image": v["rgb"], "depth": v["depth"].astype(np.float32), "intrinsics": v["intrinsics"].astype(np.float32)}
    return {**made, "label_type": "synthetic", **changes}


# codecs


def test_depth_codec_keeps_relative_precision_through_a_file(tmp_path):
    rng = np.random.default_rng(0)
    depth = np.exp(rng.uniform(np.log(0.02), np.log(1500), (40, 50))).astype(np.float32)
    depth[0, :5], depth[1, :5] = np.nan, np.inf
    codes, text, wrong = codec.encode_depth(depth)
    write_png16(tmp_path / "d.png", codes, text)
    got = codec.decode_depth(*read_png16(tmp_path / "d.png"))
    assert wrong == 0 and np.isnan(got[0, :5]).all() and np.isinf(got[1, :5]).all()
    known = np.isfinite(depth)
    assert np.abs(got[known] / depth[known] - 1).max() < np.log(1500 / 0.02) / 65533


@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf, 0.0, -2.0])
def test_depth_without_any_positive_value(fill):
    codes, text, wrong = codec.encode_depth(np.full((4, 5), fill, np.float32))
    got = codec.decode_depth(codes, text)
    assert (np.isinf(got) if np.isinf(fill) else np.isnan(got)).all() and wrong == (20 if np.isfinite(fill) else 0)


def test_zero_and_negative_depth_become_unknown_and_leave_the_range_alone():
    depth = np.array([[0, -1, 2, 4, 3e6]], np.float32)
    codes, text, wrong = codec.encode_depth(depth)
    assert wrong == 2 and text["near"] == "2.0" and text["far"] == "200000.0"
    golden = np.array([[np.nan, np.nan, 2, 4, 2e5]])
    np.testing.assert_allclose(codec.decode_depth(codes, text), golden, rtol=2e-4)


@pytest.mark.parametrize(
    ("codes", "text", "message"),
    [
        (np.zeros((3, 4), np.uint8), {"near": "1", "far": "2"}, "one 16-bit plane"),
        (np.zeros((3, 4, 3), np.uint16), {"near": "1", "far": "2"}, "one 16-bit plane"),
        (np.zeros((3, 4), np.uint16), {"near": "1"}, "near and far"),
        (np.zeros((3, 4), np.uint16), {"near": "2", "far": "1"}, "ascending"),
        (np.zeros((3, 4), np.uint16), {"near": "0", "far": "1"}, "positive"),
    ],
)
def test_other_files_are_refused_as_depth(codes, text, message):
    with pytest.raises(ValueError, match=message):
        codec.decode_depth(codes, text)


def test_segmentation_and_normals(tmp_path):
    mask = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    write_png16(tmp_path / "s.png", *codec.encode_segmentation(mask, {"a": 0, "ö": 11000}))
    again, labels = codec.decode_segmentation(*read_png16(tmp_path / "s.png"))
    assert np.array_equal(again, mask) and labels == {"a": 0, "ö": 11000}
    assert codec.decode_segmentation(mask, {})[1] is None and json.loads(codec.encode_segmentation(mask, {"a": 0})[1]["labels"])
    with pytest.raises(ValueError, match="uint8 or uint16"):
        codec.encode_segmentation(mask.astype(np.int64))
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(6, 7, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    normal[2, 3] = np.nan
    write_png16(tmp_path / "n.png", codec.encode_normal(normal))
    got = codec.decode_normal(read_png16(tmp_path / "n.png")[0])
    assert np.isnan(got[2, 3]).all()
    np.testing.assert_allclose(np.nan_to_num(got), np.nan_to_num(normal), atol=5e-5)


# warping


@pytest.mark.parametrize("size", [(96, 130), (300, 200), (40, 40)])
def test_warped_depth_lies_on_the_true_surface(size):
    """Unprojected with the new camera, turned back and projected into the source, the points agree with the source's depth."""
    source = instance(size=(240, 320))
    args = size[1], size[0]
    got = augment.process_instance(source, *args, np.random.default_rng(5), **OPTIONS)
    rng = np.random.default_rng(5)
    K, R = augment.sample_perspective(source["intrinsics"], size[1] / size[0], 0.5, (1, 179), (0.4, 0.9), rng)
    np.testing.assert_array_equal(K, got["intrinsics"])
    depth = got["depth"][:, ::-1] if rng.choice([True, False]) else got["depth"]
    points = depth_to_points(torch.from_numpy(depth.copy()), torch.from_numpy(K)).numpy() @ R  # rows: R^T of the new axes
    uv = points @ source["intrinsics"].T
    known = np.isfinite(depth)
    h, w = source["depth"].shape
    column = np.clip((uv[..., 0] / uv[..., 2] * w)[known].astype(int), 0, w - 1)
    row = np.clip((uv[..., 1] / uv[..., 2] * h)[known].astype(int), 0, h - 1)
    error = np.abs(points[known][:, 2] / source["depth"][row, column] - 1)
    error = error[np.isfinite(error)]
    assert np.median(error) < 0.004 and (error < 0.02).mean() > 0.93
    sky = np.isinf(depth)
    assert got["depth_mask_inf"].mean() == pytest.approx(sky.mean()) and (got["depth_mask_fin"] == ~got["depth_mask_inf"]).all()


def test_planes_stay_plane_and_normals_point_at_the_camera():
    """A tilted plane, exactly: depth and normals after the warp are those of the plane in the new camera, also when flipped."""
    K = np.array([[0.9, 0, 0.45], [0, 1.2, 0.52], [0, 0, 1]], np.float32)
    normal = np.array([0.3, -0.2, -1.0]) / np.linalg.norm([0.3, -0.2, -1.0])
    ray = depth_to_points(torch.ones(150, 200), torch.from_numpy(K)).numpy()
    depth = (-3 / (ray @ normal)).astype(np.float32)
    plane = {"image": np.zeros((150, 200, 3), np.uint8), "depth": depth, "intrinsics": K, "label_type": "a"}
    flips = set()
    for seed in range(6):
        got = augment.process_instance(plane, 120, 100, np.random.default_rng(seed), **OPTIONS)
        rng = np.random.default_rng(seed)
        _, R = augment.sample_perspective(K, 1.2, 0.5, (1, 179), (0.4, 0.9), rng)
        turned = R @ normal * ([-1, 1, 1] if rng.choice([True, False]) else [1, 1, 1])
        flips.add(turned[0] == (R @ normal)[0])
        own = depth_to_points(torch.ones(100, 120), torch.from_numpy(got["intrinsics"])).numpy()
        inner = (slice(3, -3), slice(3, -3))
        np.testing.assert_allclose(got["depth"][inner], (-3 / (own @ turned))[inner], rtol=2e-3)
        np.testing.assert_allclose(got["normal"][inner], np.broadcast_to(turned, (100, 120, 3))[inner], atol=2e-3)
    assert flips == {True, False}


def test_fields_of_view_stay_in_their_ranges_and_inside_the_image():
    rng = np.random.default_rng(0)
    for seed in range(40):
        fov = np.deg2rad(rng.uniform(30, 110))
        fx = 0.5 / np.tan(fov / 2)
        K = np.array([[fx, 0, rng.uniform(0.45, 0.55)], [0, fx * rng.uniform(0.6, 1.6), 0.5], [0, 0, 1]], np.float32)
        view_K, R = augment.sample_perspective(K, rng.uniform(0.5, 2), 1.0, (10, 60), (0.2, 0.8), np.random.default_rng(seed))
        new = 2 * np.arctan(0.5 / view_K[0, 0])
        assert new <= np.deg2rad(60) + 1e-6 and new <= 0.8 * fov + 1e-6
        corners = np.array([[u, v, 1] for u in (0, 1) for v in (0, 1)]) @ np.linalg.inv(view_K.astype(np.float64)).T @ R
        corners = corners @ K.T.astype(np.float64)
        assert (corners[:, 2] > 0).all() and (corners[:, :2] / corners[:, 2:]).min() > -1e-4
        assert (corners[:, :2] / corners[:, 2:]).max() < 1 + 1e-4


def test_same_generator_same_sample_and_every_augmentation_changes_the_image():
    source = instance()
    for names in ([], ["jittering"], list(augment.AUGMENTATIONS)):
        options = {**OPTIONS, "image_augmentation": names}
        a, b = (augment.process_instance(source, 90, 80, np.random.default_rng(9), **options) for _ in range(2))
        assert all(np.array_equal(a[k], b[k], equal_nan=k in ("depth", "normal")) for k in a)
        shuffled = augment.process_instance(
            source, 90, 80, np.random.default_rng(9), **{**options, "image_augmentation": names[::-1]}
        )
        assert np.array_equal(shuffled["image"], a["image"])
    for name in augment.AUGMENTATIONS:
        images = [augment.augment_colors(a["image"], a["depth"], [name], np.random.default_rng(i)) for i in range(8)]
        changed = sum((image != a["image"]).any() for image in images)
        assert changed == 8 if name == "jittering" else 1 <= changed <= 7, name
        assert all(image.shape == a["image"].shape and image.dtype == np.uint8 for image in images)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_instances_without_depth(value):
    got = augment.process_instance(
        instance(depth=np.full((120, 160), value, np.float32)), 64, 48, np.random.default_rng(0), **OPTIONS
    )
    assert got["label_type"] == "invalid" and (got["depth"] == 1).all() and not got["depth_mask_inf"].any()


def test_units_limits_and_masks():
    depth = np.full((100, 100), 2.0, np.float32)
    depth[40:60, 40:60], depth[:10], depth[90:] = 5000, np.inf, np.nan
    K = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], np.float32)
    flat = {"image": np.zeros((100, 100, 3), np.uint8), "depth": depth, "intrinsics": K, "label_type": "a"}
    options = {"image_augmentation": [], "fov_range_relative": (1, 1), "center_augmentation": 0, "depth_unit": 0.5}
    got = augment.process_instance(flat, 100, 100, np.random.default_rng(0), finite_depth_mask="only_known", **options)
    assert (
        got["is_metric"]
        and got["depth"][30, 50] == pytest.approx(1, rel=1e-4)
        and got["depth"][50, 50] == pytest.approx(1000, rel=1e-3)
    )
    unknown = np.isnan(got["depth"])
    assert 0.05 < unknown.mean() < 0.15 and not got["depth_mask_fin"][unknown].any() and not got["depth_mask_inf"][unknown].any()
    loose = augment.process_instance(flat, 100, 100, np.random.default_rng(0), **options)
    assert loose["depth_mask_fin"][unknown].all() and (loose["depth_mask_fin"] != loose["depth_mask_inf"]).all()


def test_image_and_depth_of_different_sizes():
    full = instance(size=(240, 320))
    half = {**full, "image": np.ascontiguousarray(full["image"][::2, ::2])}
    a, b = (augment.process_instance(x, 100, 80, np.random.default_rng(1), **OPTIONS) for x in (full, half))
    assert np.array_equal(a["depth"], b["depth"], equal_nan=True) and a["image"].shape == b["image"].shape
    assert np.abs(a["image"].astype(int) - b["image"].astype(int)).mean() < 12


def test_evaluation_sample():
    source = instance(size=(180, 240))
    segmentation = np.ones((180, 240), np.uint8)
    segmentation[:, 100:] = 2
    segmentation[:5, :5] = 3
    labels = {"wall": 1, "sky": 2, "tiny": 3}
    got = augment.prepare_evaluation({**source, "segmentation": segmentation, "labels": labels}, 120, 90, depth_unit=2.0)
    assert got["labels"] == {"wall": 1} and got["is_metric"] and got["segmentation"].shape == (90, 120)
    inside = got["depth_mask"]
    points = depth_to_points(torch.from_numpy(got["depth"]), torch.from_numpy(got["intrinsics"])).numpy()
    np.testing.assert_allclose(got["points"][inside], points[inside], rtol=1e-4, atol=1e-4)
    known = np.isfinite(source["depth"])
    assert np.median(got["depth"][inside]) == pytest.approx(2 * np.median(source["depth"][known]), rel=0.1)
    drawn = [augment.prepare_evaluation(source, 120, 90, rng=np.random.default_rng(i))["intrinsics"][0, 0] for i in (1, 1, 2)]
    assert got["intrinsics"][0, 0] <= drawn[0] == drawn[1] != drawn[2]
    empty = augment.prepare_evaluation(instance(depth=np.full((60, 80), np.nan, np.float32)), 40, 30)
    assert empty["depth_mask"].all() and (empty["depth"] == 1).all() and not empty["is_metric"]


# panorama, optimizer, schedule


def test_panorama_of_a_room_is_recovered_up_to_a_factor():
    cameras, K = panorama.panorama_cameras()

    def distance(d):  # to the walls of a box, seen from inside
        return (np.array([2.0, 3.0, 1.5]) / np.maximum(np.abs(d), 1e-9)).min(-1)

    views = []
    for k, matrix in enumerate(cameras):
        d = panorama.view_directions(matrix, K, 64)
        views.append(distance(d / np.linalg.norm(d, axis=-1, keepdims=True)) * (1 + 0.1 * k))
    merged, seen = panorama.merge_panorama(128, 64, views, [np.ones((64, 64), bool)] * 12, cameras, K)
    ratio = np.log(merged / distance(panorama.equirectangular_directions(128, 64)))
    assert seen.all() and np.abs(ratio - np.median(ratio)).mean() < 0.01
    uv = panorama.directions_to_uv(panorama.equirectangular_directions(10, 5) * 3)
    np.testing.assert_allclose(uv[0, :, 0], (np.arange(10) + 0.5) / 10, atol=1e-6)


def test_panorama_through_a_model():
    """A stand-in that knows the box from the brightness of the image gives back its distances, with a hole left out."""

    def distance(d):
        return (np.array([2.0, 3.0, 1.5]) / np.maximum(np.abs(d / np.linalg.norm(d, axis=-1, keepdims=True)), 1e-9)).min(-1)

    class Model(torch.nn.Linear):
        def infer(self, image, fov_x, apply_mask, num_tokens):
            assert fov_x == 90 and not apply_mask and num_tokens == 5 and image.max() <= 1
            length = image[:, 0] * 5
            return {"points": torch.stack([length * 0, length * 0, length], -1), "mask": image[:, 1] > 0.5}

    true = distance(panorama.equirectangular_directions(120, 60))
    image = np.zeros((60, 120, 3), np.uint8)
    image[..., 0], image[..., 1] = np.round(true / 5 * 255), 255
    image[:5, :, 1] = 0  # zenith
    got = panorama.infer_panorama(Model(1, 1), image, view_size=48, merge_width=96, num_tokens=5)
    assert got["distance"].shape == (60, 120) and got["points"].shape == (60, 120, 3) and not got["mask"][:3].any()
    ratio = np.log(got["distance"] / true)[8:]
    assert got["mask"][8:].all() and np.abs(ratio - np.median(ratio)).mean() < 0.03


def test_optimizer_groups_by_pattern():
    model = torch.nn.ModuleDict({"m": torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})})
    head, body = (
        {"params": {"include": ["*"], "exclude": ["*backbone.*"]}, "lr": 1e-4},
        {"params": {"include": ["*backbone.*"]}, "lr": 1e-5},
    )
    made = optimization.build_optimizer(model, {"type": "SGD", "momentum": 0.9, "params": [head, body], "lr": 1})
    assert [(len(g["params"]), g["lr"], g["momentum"]) for g in made.param_groups] == [(2, 1e-4, 0.9), (2, 1e-5, 0.9)]
    model["m"]["head"].bias.requires_grad_(False)
    made = optimization.build_optimizer(model, {"type": "AdamW", "params": [head, body]})
    assert [len(g["params"]) for g in made.param_groups] == [1, 2]
    with pytest.raises(ValueError, match=r"no optimizer group.*m\.head\.weight"):
        optimization.build_optimizer(model, {"type": "AdamW", "params": [body]})
    with pytest.raises(ValueError, match=r"m\.backbone\.weight is in the optimizer groups 0 and 1"):
        optimization.build_optimizer(model, {"type": "AdamW", "params": [{"params": {"include": ["*"]}, "lr": 1}, body]})
    for group, message in (
        ({**head, "weigth_decay": 0}, "has no option 'weigth_decay'"),
        ({"params": {"include": ["*head*"]}}, "group 0 needs params .* and lr, a number"),
        ({"params": {"includes": ["*"]}, "lr": 1}, "group 0 needs params {include, exclude}"),
        ({"params": {"include": "*head*"}, "lr": 1}, "group 0 needs params {include, exclude}, lists"),
        ({**head, "lr": "fast"}, "group 0 needs params .* lr, a number"),
    ):
        with pytest.raises(ValueError, match=message):
            optimization.build_optimizer(model, {"type": "AdamW", "params": [group, body]})
    with pytest.raises(ValueError, match=r"optimizer SGD: .*momentun"):
        optimization.build_optimizer(model, {"type": "SGD", "params": [head, body], "momentun": 0.9})
    with pytest.raises(ValueError, match=r"group 2 has no parameters: its patterns are .*tail"):
        optimization.build_optimizer(model, {"type": "AdamW", "params": [head, body, {"params": {"include": ["tail*"]}, "lr": 1}]})
    with pytest.raises(ValueError, match="'Adamw' is not in"):
        optimization.build_optimizer(model, {"type": "Adamw", "params": [head, body]})


SCHEDULES = [
    {"type": "StepLR", "params": {"step_size": 3, "gamma": 0.5}},
    {"type": "MultiStepLR", "params": {"milestones": [2, 5]}},
    {"type": "ExponentialLR", "params": {"gamma": 0.9}},
    {"type": "ConstantLR", "params": {"factor": 0.3, "total_iters": 4}},
    {"type": "LinearLR", "params": {"start_factor": 0.1, "total_iters": 6}},
    {"type": "CosineAnnealingLR", "params": {"T_max": 12}},
]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: c["type"])
def test_schedules_are_those_of_torch(config):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    theirs = getattr(torch.optim.lr_scheduler, config["type"])(optimizer, **config["params"])
    for step in range(12):
        assert 0.2 * optimization.lr_factors(config, step, 1)[0] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        theirs.step()


def test_schedule_errors_and_expressions():
    factors = optimization.lr_factors({"type": "LambdaLR", "params": {"lr_lambda": "min(1, epoch / 10)"}}, 5, 2)
    assert factors == [0.5, 0.5] and optimization.lr_factors(None, 7, 3) == [1.0] * 3
    for config, message in (
        ({"type": "LambdaLR", "params": {"lr_lambda": ["1", "2", "3"]}}, "3 expressions for 2"),
        ({"type": "LambdaLR", "params": {"lr_lambda": "__import__('os')"}}, "not allowed"),
        ({"type": "OneCycleLR", "params": {}}, "'OneCycleLR'"),
        ({"type": "SequentialLR", "params": {"schedulers": [SCHEDULES[0]], "milestones": [3]}}, "one milestone fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            optimization.check_schedule(config, 2)
    for part, message in (
        ({"type": "StepLR", "params": {"step_size": 3, "gama": 0.5}}, "StepLR: 'gama' is unknown"),
        ({"type": "StepLR"}, "StepLR: 'step_size' is unknown or missing"),
        ({"type": "StepLR", "params": {"step_size": 0}}, "StepLR with .*ZeroDivision"),
    ):
        for config in (part, {"type": "SequentialLR", "params": {"schedulers": [SCHEDULES[0], part], "milestones": [3]}}):
            with pytest.raises(ValueError, match=message):
                optimization.check_schedule(config, 2)
    for config in (*SCHEDULES, None):
        optimization.check_schedule(config, 2)


def test_average_copies_first_and_then_follows():
    average, current = [torch.zeros(2), torch.zeros(1)], [torch.ones(2), torch.full((1,), 3.0)]
    updates = optimization.update_ema(average, current, 0, 0.9)
    assert updates == 1 and average[0].tolist() == [1, 1] and average[1].tolist() == [3]
    updates = optimization.update_ema(average, [torch.zeros(2), torch.zeros(1)], updates, 0.9)
    torch.testing.assert_close(average[1], torch.tensor([2.7]))
