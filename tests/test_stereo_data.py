"""Stereo data: readers of every form, the augmentations against the ray-caster's exact truth, sampling, bad input."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from runs import generated, run

from common import data
from common.io import write_image, write_png16
from stereo import augment, baselines, photometric, spatial
from stereo.codec import decode_fsd, encode_fsd, encode_kitti, encode_pfm
from stereo.dataset import AUGMENTATIONS, StereoDataset, check, check_size, convert, make_sources
from stereo.eval import evaluate
from stereo.formats import decode_disparity, list_pairs, load_raw, read_calibration, read_disparity, read_mask, read_views
from stereo.textures import textured_pair
from synth.stereo import pair as ray_cast


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return generated(tmp_path_factory, "stereo", "--scenes", "4", "--val_scenes", "2", "--size", "96x128")


@pytest.fixture(scope="session")
def truth():
    """A pair of 120 x 160 with the exact disparity of both views, and where the other view sees the place."""
    p = ray_cast(3, 1, (120, 160), near=(0.1, 0.15))
    return {
        "left": p["left"]["rgb"],
        "right": p["right"]["rgb"],
        "d": p["disparity_left"],
        "d_right": p["disparity_right"],
        "seen": p["seen_left"],
        "seen_right": p["seen_right"],
    }


def smooth(image):
    """Hide the noise of single pixels, which no resampling can keep."""
    return cv2.GaussianBlur(image, (0, 0), 1.0).astype(np.float32)


def mismatch(left, right, disparity, mask) -> float:
    """Mean difference of the left image and the right one warped by the disparity, in grey levels, where the truth is smooth."""
    x = np.arange(left.shape[1], dtype=np.float32) - disparity
    rows = np.repeat(np.arange(left.shape[0], dtype=np.float32)[:, None], left.shape[1], 1)
    warped = cv2.remap(smooth(right), x.astype(np.float32), rows, cv2.INTER_LINEAR)
    flat = np.abs(cv2.Laplacian(disparity, cv2.CV_32F, ksize=3)) < 0.5 * max(1.0, float(np.median(disparity[mask])) / 8)
    near = cv2.erode((mask & flat & (x >= 0)).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert near.sum() > 200
    return float(np.abs(smooth(left) - warped)[near].mean())


def augmented(truth, view, size, sparse=False):
    """The geometry of `StereoDataset.sample` on exact float truth: (left, right, disparity, seen)."""
    left, right, d, seen = (
        (truth["right"], truth["left"], truth["d_right"], truth["seen_right"])
        if view.swapped
        else (truth["left"], truth["right"], truth["d"], truth["seen"])
    )
    place = np.ix_(*spatial.nearest(view, d.shape, size))
    disparity = d[place] / np.float32(abs(view.x_scale))
    if sparse:
        disparity = spatial.scatter_disparity(d, view, size)
    return spatial.warp_image(left, view, size), spatial.warp_image(right, view, size, right=True), disparity, seen[place]


def test_untouched_pair_matches_and_wrong_disparities_do_not(truth):
    good = mismatch(truth["left"], truth["right"], truth["d"], truth["seen"] & (truth["d"] > 0))
    assert good < 5
    for wrong in (truth["d"] + 3, truth["d"] * 0.8, np.zeros_like(truth["d"])):
        assert mismatch(truth["left"], truth["right"], wrong, truth["seen"] & (truth["d"] > 0)) > 1.5 * good


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("upside_down", [False, True])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.3, 0.9), (0.8, 1.2)])
def test_after_scaling_cropping_and_flipping_the_views_still_match(truth, mirror, upside_down, scale):
    before = mismatch(truth["left"], truth["right"], truth["d"], truth["seen"] & (truth["d"] > 0))
    for seed in range(3):
        view = spatial.draw_view(data.rng(seed, 0), (120, 160), (64, 96), scale, mirror, upside_down)
        left, right, disparity, seen = augmented(truth, view, (64, 96))
        mask = seen & (disparity > 0)
        if mask.mean() < 0.3:
            continue
        good = mismatch(left, right, disparity, mask)
        assert good < 1.6 * before + 1.5
        assert good < 0.8 * min(mismatch(left, right, np.float32(disparity + delta), mask) for delta in (4, -4))


def test_mirroring_the_left_disparity_would_be_wrong(truth):
    """The fault that swapping the views is there to avoid: labels of the left view mirrored with it."""
    view = spatial.draw_view(data.rng(0, 0), (120, 160), (120, 160), (1.0, 1.0), mirror=True)
    left, right, disparity, seen = augmented(truth, view, (120, 160))
    assert np.array_equal(left, truth["right"][:, ::-1]) and np.array_equal(disparity, truth["d_right"][:, ::-1])
    wrong = truth["d"][:, ::-1].copy()
    assert mismatch(left, right, disparity, seen & (disparity > 0)) < 0.7 * mismatch(left, right, wrong, seen & (wrong > 0))


def test_random_textures_match_everywhere():
    for number in range(4):
        left, right, d = textured_pair(np.random.default_rng(number), (96, 128), 24)
        assert left.shape == right.shape == (96, 128, 3) and left.dtype == np.uint8 and d.min() >= 1 and d.max() <= 24
        rows, columns = np.mgrid[:96, :128].astype(np.float32)
        for wrong in (0, 2):
            x = columns - d + wrong
            warped = cv2.remap(right.astype(np.float32), x, rows, cv2.INTER_LINEAR)
            difference = np.abs(warped - left)[(x >= 0) & (x < 127)].mean()
            assert difference > 20 if wrong else difference < 1


def test_right_view_truth_made_by_warping_agrees_with_the_exact_one(truth):
    made = augment.right_view_disparity(truth["d"])
    both = (made > 0) & truth["seen_right"]
    assert both.mean() > 0.5 and np.median(np.abs(made - truth["d_right"])[both]) < 0.3


def test_imperfect_rectification_moves_rows_only(truth):
    """A shift and a slope of the right view: matches move up or down as told, and stay in their columns."""
    size = (100, 140)
    plain = spatial.draw_view(data.rng(1, 0), (120, 160), size, (1.0, 1.0), centre=True)
    moved = plain._replace(shift=2.0)
    a, b = (spatial.warp_image(truth["right"], v, size, right=True) for v in (plain, moved))
    assert np.array_equal(b[:-2], a[2:])  # read two rows lower
    assert np.array_equal(spatial.warp_image(truth["left"], moved, size), spatial.warp_image(truth["left"], plain, size))
    slope = plain._replace(slope=0.02)
    image = np.zeros((120, 160, 3), np.uint8)
    image[:] = np.arange(120, dtype=np.uint8)[:, None, None] * 2  # brightness tells the row
    rows = spatial.warp_image(image, slope, size, right=True)[50, :, 0].astype(float) / 2
    assert np.allclose(np.diff(rows).mean(), 0.02, atol=2e-3) and abs(rows[69:71].mean() - 60) < 0.6
    image[:] = np.arange(160, dtype=np.uint8)[None, :, None]
    assert np.array_equal(spatial.warp_image(image, slope, size, right=True), spatial.warp_image(image, plain, size))


def test_sparse_truth_is_scattered_not_smeared(truth):
    d = np.where(np.random.default_rng(0).random(truth["d"].shape) < 0.1, truth["d"], 0).astype(np.float32)
    view = spatial.draw_view(data.rng(2, 0), d.shape, (64, 96), (1.3, 1.3))
    dense = augmented(truth, view, (64, 96))[2]
    got = augmented(truth | {"d": d}, view, (64, 96), sparse=True)[2]
    known = got > 0
    assert 0.03 < known.mean() < 0.12 and np.median(np.abs(got - dense)[known]) < 0.2


def test_stretch_factors_are_powers_of_two_and_always_fit():
    rng = np.random.default_rng(0)
    drawn = np.array([spatial.draw_scale(rng, (720, 1280), (320, 736), True, False) for _ in range(3000)])
    ratio = drawn[:, 0] / drawn[:, 1]
    assert 2**-0.41 <= ratio.min() < 0.85 and 1.2 < ratio.max() <= 2**0.41 and abs(np.mean(ratio == 1) - 0.2) < 0.03
    assert drawn.min() >= max(328 / 720, 744 / 1280) and drawn.max() <= 2**0.6 and drawn.max() > 1.4
    assert spatial.draw_scale(rng, (100, 200), (320, 736), False, False) == (
        3.68,
        3.68,
    )  # smaller than the crop: enlarged, never padded
    sparse = [spatial.draw_scale(rng, (720, 1280), (320, 736), True, True) for _ in range(300)]
    assert all(a == b for a, b in sparse) and 0.1 < np.mean([a == 1 for a, _ in sparse]) < 0.3


@pytest.mark.parametrize("preset", ["mild", "raft", "raft_sparse"])
def test_jitter_changes_both_views_alike_or_as_told(truth, preset):
    alike = 0
    for seed in range(40):
        left, right = photometric.jitter(truth["left"], truth["left"], np.random.default_rng(seed), preset)
        alike += np.array_equal(left, right)
        assert left.dtype == np.uint8 and left.shape == truth["left"].shape
    assert alike == 40 if preset == "raft_sparse" else 20 < alike < 40
    good = mismatch(truth["left"], truth["right"], truth["d"], truth["seen"] & (truth["d"] > 0))
    left, right = photometric.jitter(truth["left"], truth["right"], np.random.default_rng(0), "raft_sparse")  # the same factors
    assert mismatch(left, right, truth["d"], truth["seen"] & (truth["d"] > 0)) < 2 * good + 1


def test_each_colour_change_is_its_definition():
    image = np.random.default_rng(0).integers(30, 200, (20, 30, 3), dtype=np.uint8)
    grey = image @ np.array([0.299, 0.587, 0.114])
    close = lambda got, want, limit=1.01: np.abs(got.astype(float) - np.clip(want, 0, 255)).max() <= limit
    assert close(photometric.adjust(image, "brightness", 1.2), image * 1.2)
    assert close(photometric.adjust(image, "contrast", 0.8), grey.mean() + 0.8 * (image - grey.mean()))
    assert close(photometric.adjust(image, "saturation", 0.0), np.repeat(grey[..., None], 3, 2))
    assert close(photometric.adjust(image, "saturation", 1.4), grey[..., None] + 1.4 * (image - grey[..., None]), 1.6)
    assert close(photometric.adjust(image, "gamma", 0.8), 255 * (image / 255) ** 0.8)
    red = np.full((2, 2, 3), (200, 50, 50), np.uint8)
    assert close(photometric.adjust(red, "hue", 1 / 3), np.full((2, 2, 3), (50, 200, 50)), 4)
    assert close(photometric.adjust(image, "hue", 0.0), image, 8)  # hue has 256 steps: a little noise, no drift
    assert np.abs(np.mean(photometric.adjust(image, "hue", 0.0).astype(float) - image)) < 1


def test_eraser_paints_the_right_view_only_in_its_mean_colour(truth):
    image = truth["right"].copy()
    erased = photometric.erase(image, np.random.default_rng(5), 0.3)
    changed = (erased != image).any(-1)
    assert np.array_equal(image, truth["right"]) and 0 < changed.mean() < 0.5
    assert np.abs(erased[changed].astype(float) - image.reshape(-1, 3).mean(0)).max() <= 1


def sources(path, **kwargs):
    return make_sources([{"path": str(path), **kwargs}])


def test_samples_match_under_all_augmentations_and_are_functions_of_seed_and_position(pairs):
    kinds = [name for name in AUGMENTATIONS if name not in ("eraser", "misalignment", "right_perturbation", "jittering")]
    make = lambda seed=0, kinds=kinds: StereoDataset(
        sources(pairs / "train", image_augmentation=kinds), seed, [[96, 64], [64, 64]], max_disparity=64
    )
    dataset, errors = make(), []
    for position in range(12):
        sample = dataset.read((position, position // 2))
        left, right, d, mask = (sample[key] for key in ("left_image", "right_image", "disparity", "disparity_mask"))
        assert left.shape[:2] == dataset.size_at(position // 2) == right.shape[:2] == d.shape == mask.shape
        assert left.dtype == np.uint8 and d.dtype == np.float32 and mask.dtype == bool and (d[~mask] == 0).all() and d.max() < 64
        assert left.max() > 100  # the network expects 0..255
        if mask.mean() > 0.3:
            errors.append((mismatch(left, right, d, mask), mismatch(left, right, np.float32(d * 0.7), mask)))
    good, wrong = np.array(errors).mean(0)
    assert good < 0.75 * wrong and len(errors) > 6  # hidden places count too here: the set's truth does not tell them
    again, other = make(), make(seed=1)
    everything = make(kinds=AUGMENTATIONS)
    for position in (0, 5):
        a, b, c = (d.read((position, 1)) for d in (dataset, again, other))
        assert all(np.array_equal(a[key], b[key]) for key in a) and not np.array_equal(a["left_image"], c["left_image"])
        assert everything.read((position, 1))["left_image"].shape == a["left_image"].shape
    assert len({dataset.size_at(step) for step in range(20)}) == 2


def test_epochs_and_shares_of_several_sets(pairs):
    two = make_sources(
        [
            {"path": str(pairs / "train"), "name": "a", "weight": 3},
            {"path": str(pairs / "val"), "name": "b", "label_type": "invalid", "weight": 1},
        ]
    )
    assert sources(pairs / "train")[0].weight == 2  # the square root of 4 pairs
    dataset = StereoDataset(two, 0, [[64, 64]], labels=["stereo", "invalid"])
    drawn = [dataset.choose(p, 0, None) for p in range(4000)]
    names = [f"{source.name}/{pair.name}" for source, pair in drawn]
    assert abs(sum(source.name == "a" for source, _ in drawn) - 3000) <= 4
    assert {names.count(name) for name in set(names) if name.startswith("a")} == {750}  # whole epochs: each equally often
    order = [name for name in names if name.startswith("b")]
    assert all(len({*order[i : i + 2]}) == 2 for i in range(0, 1000, 2))  # an epoch repeats nothing
    assert dataset.read(next(p for p, (source, _) in enumerate(drawn) if source.name == "b"))["label"] == 1
    free = StereoDataset(two, 0, [[64, 64]], labels=["stereo", "invalid"], epoch_sampling=False)
    rng = np.random.default_rng(0)
    assert len({(source.name, pair.name) for source, pair in (free.choose(p, 0, rng) for p in range(60))}) == 6


def test_max_disparity_hides_truth_and_never_clips_it(pairs):
    dataset = StereoDataset(sources(pairs / "train"), 0, [[96, 64]], max_disparity=4)
    sample = dataset.read(0)
    assert sample["disparity"].max() < 4 and 0 < sample["disparity_mask"].mean() < 1
    whole = StereoDataset(sources(pairs / "train"), 0, [[96, 64]], max_disparity=64).read(0)
    assert np.array_equal(sample["disparity_mask"], whole["disparity_mask"] & (whole["disparity"] < 4))


# ------------------------------------------------------------------------------------------------------------------ files


def scene(rng, shape=(24, 40)):
    left, right = (rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(2))
    d = rng.uniform(8, 20, shape).astype(np.float32)
    d[:3] = 0
    return left, right, d


def write_set(kind, root, left, right, d):
    """Write one pair in a form; returns the resolution in which the form stores disparities."""
    unknown = np.where(d > 0, d, np.inf).astype(np.float32)
    views = {
        "middlebury2003": ("im2.png", "im6.png"),
        "middlebury2014": ("im0.png", "im1.png"),
        "instereo2k": ("left.png", "right.png"),
        "crestereo": ("7_left.jpg", "7_right.jpg"),
        "kitti15": ("training/image_2/000001_10.png", "training/image_3/000001_10.png"),
        "kitti12": ("training/colored_0/000001_10.png", "training/colored_1/000001_10.png"),
        "sceneflow": ("frames_finalpass/TRAIN/A/0000/left/0006.png", "frames_finalpass/TRAIN/A/0000/right/0006.png"),
        "sintel": ("training/final_left/alley/frame_0001.png", "training/final_right/alley/frame_0001.png"),
        "fallingthings": ("mixed/a/000001.left.png", "mixed/a/000001.right.png"),
        "tartanair": ("s/image_left/1_left.png", "s/image_right/1_right.png"),
        "vkitti2": ("S/clone/frames/rgb/Camera_0/rgb_00001.jpg", "S/clone/frames/rgb/Camera_1/rgb_00001.jpg"),
        "folder": ("left/rgb/0001.png", "right/rgb/0001.png"),
    }[kind]
    folder = root / "scene" if kind in ("middlebury2003", "middlebury2014", "instereo2k") else root
    write_image(folder / views[0], left)
    write_image(folder / views[1], right)
    put = lambda path, data: ((folder / path).parent.mkdir(parents=True, exist_ok=True), (folder / path).write_bytes(data))
    depth = np.where(d > 0, 1 / np.where(d > 0, d, 1), 0)
    match kind:
        case "middlebury2003":
            write_png16(folder / "disp2.png", np.uint8(np.rint(d * 4)))
            return 1 / 4
        case "middlebury2014":
            put("disp0.pfm", encode_pfm(unknown))
            put(
                "calib.txt",
                b"cam0=[994.978 0 311.193; 0 994.978 254.877; 0 0 1]\ncam1=[994.978 0 342.279; 0 994.978 254.877; 0 0 1]\n"
                b"doffs=31.086\nbaseline=193.001\nwidth=741\nheight=500\nndisp=70\n",
            )
            write_png16(folder / "mask0nocc.png", np.where(d > 12, 255, 128).astype(np.uint8))
            return 0
        case "instereo2k":
            write_png16(folder / "left_disp.png", np.uint16(np.rint(d * 100)))
            return 1 / 100
        case "crestereo":
            write_png16(folder / "7_left.disp.png", np.uint16(np.rint(d * 32)))
            return 1 / 32
        case "kitti15" | "kitti12":
            occ, noc = ("disp_occ_0", "disp_noc_0") if kind == "kitti15" else ("disp_occ", "disp_noc")
            write_png16(folder / "training" / occ / "000001_10.png", encode_kitti(d))
            write_png16(folder / "training" / noc / "000001_10.png", encode_kitti(np.where(d > 12, d, 0)))
            return 1 / 256
        case "sceneflow":
            put("disparity/TRAIN/A/0000/left/0006.pfm", encode_pfm(d))
            put("disparity/TRAIN/A/0000/right/0006.pfm", encode_pfm(-d))  # stored negative
            return 0
        case "sintel":
            code = np.rint(d.astype(np.float64) * 16384).astype(np.int64)
            rgb = np.stack([code // 65536, code // 256 % 256, code % 256], -1).astype(np.uint8)
            rgb[:3] = 20
            write_png16(folder / "training/disparities/alley/frame_0001.png", rgb)
            for hidden, rows in (("occlusions", slice(0, 2)), ("outofframe", slice(2, 3))):
                mask = np.zeros(d.shape, np.uint8)
                mask[rows] = 255
                write_image(folder / "training" / hidden / "alley/frame_0001.png", mask)
            return 1 / 16384
        case "fallingthings":
            put(
                "mixed/a/_camera_settings.json", json.dumps({"camera_settings": [{"intrinsic_settings": {"fx": 768.0}}]}).encode()
            )
            write_png16(folder / "mixed/a/000001.left.depth.png", np.uint16(np.rint(768 * 600 * depth)))
            return 0.01
        case "tartanair":
            np.save(folder / "s/image_left/x.npy", 0)
            put("s/depth_left/x", b"")
            np.save(folder / "s/depth_left/1_left_depth.npy", np.where(d > 0, 80 * depth, np.inf).astype(np.float32))
            return 1e-4
        case "vkitti2":
            far = np.where(d > 0, np.rint(725.0087 * 0.532725 * 100 * depth), 65535)
            write_png16(folder / "S/clone/frames/depth/Camera_0/depth_00001.png", np.uint16(far))
            return 0.02
    write_png16(folder / "left/disparity/0001.png", encode_fsd(d))
    return 1 / 1000


KINDS = {"middlebury2003": "middlebury", "middlebury2014": "middlebury", "kitti15": "kitti", "kitti12": "kitti"}


@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        "middlebury2003",
        "middlebury2014",
        "kitti15",
        "kitti12",
        "sceneflow",
        "sintel",
        "crestereo",
        "instereo2k",
        "fallingthings",
        "vkitti2",
        "tartanair",
    ],
)
def test_every_form_is_found_and_decoded(kind, tmp_path):
    left, right, d = scene(np.random.default_rng(0))
    step = write_set(kind, tmp_path, left, right, d)
    for form in ("auto", KINDS.get(kind, kind)):
        (pair,) = list_pairs(tmp_path, form)
        got = read_disparity(pair.disparity, pair.codec, pair.hidden)
        assert got.dtype == np.float32 and np.array_equal(got > 0, d > 0) and np.abs(got - d).max() <= 0.51 * step + 1e-5
    if pair.left.suffix == ".png":
        assert all(np.array_equal(a, b) for a, b in zip(read_views(pair), (left, right)))
    if kind in ("middlebury2014", "kitti15", "kitti12"):
        assert np.array_equal(read_mask(pair), d > 12)
    if kind == "middlebury2014":
        camera = read_calibration(pair.calibration)
        assert camera == {"fx": 994.978, "fy": 994.978, "cx": 311.193, "cy": 254.877, "baseline": 0.193001, "doffs": 31.086}
    if kind == "sceneflow":
        assert np.array_equal(read_disparity(pair.right_disparity, pair.codec), d)
    exact = lambda left, right, truth, mask: np.where(mask, truth, 0)
    shifted = lambda left, right, truth, mask: np.where(mask, truth + 1.5, 0)
    scores = evaluate({"exact": exact, "shifted": shifted}, [pair], "noc")
    assert scores["exact"]["per_image"]["epe"] == 0 and scores["shifted"]["rows"][0]["bp1"] == 100
    assert scores["shifted"]["per_pixel"]["epe"] == pytest.approx(1.5, abs=1e-4) and scores["shifted"]["per_image"]["bp2"] == 0
    counted = d > 12 if pair.mask else d > 0
    assert scores["exact"]["count"] == {"images": 1, "pixels": counted.sum()}
    dataset = StereoDataset(sources(tmp_path, image_augmentation=list(AUGMENTATIONS)), 0, [[64, 64]])
    assert dataset.sources[0].sparse == kind.startswith("kitti")
    assert dataset.read(0)["disparity_mask"].any()
    if kind == "sintel":
        plain = StereoDataset(sources(tmp_path), 0, [[64, 64]]).read(0)
        assert plain["disparity"].max() < 60  # the rows that the masks hide have 80 px, 214 at this size


def test_the_test_part_of_sceneflow_is_for_evaluation(tmp_path):
    left, right, d = scene(np.random.default_rng(0))
    write_set("sceneflow", tmp_path, left, right, d)
    for kind in ("frames_finalpass", "disparity"):
        shutil.copytree(tmp_path / kind / "TRAIN", tmp_path / kind / "TEST")
    names = lambda **options: [pair.name for source in [sources(tmp_path, **options)[0]] for pair in source.pairs]
    train, test = "frames_finalpass/TRAIN/A/0000/0006", "frames_finalpass/TEST/A/0000/0006"
    assert names() == [train] and names(split="test") == [test] and names(split="all") == [test, train]
    shutil.rmtree(tmp_path / "frames_finalpass/TRAIN")
    with pytest.raises(ValueError, match="only SceneFlow's TEST part"):
        sources(tmp_path)


def test_negative_disparities_are_known_to_sceneflow_only():
    raw = np.float32([[-3, 2, np.nan, -np.inf]])
    assert decode_disparity(raw, "pfm").tolist() == [[3, 2, 0, 0]]
    assert decode_disparity(raw, "value").tolist() == [[0, 2, 0, 0]] and decode_disparity(raw, "div:2").tolist() == [[0, 1, 0, 0]]


def test_linked_scenes_are_found_once_and_loops_end(good, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(good)
    (tmp_path / "root" / "b").symlink_to(good)
    (good / "back").symlink_to(tmp_path / "root")
    assert [pair.name for pair in list_pairs(tmp_path / "root")] == ["a/0000", "a/0001", "a/0002"]


def test_calibration_files(tmp_path):
    (tmp_path / "K.txt").write_text("754.6 0.0 489.3 0.0 750.5 265.1 0.0 0.0 1.0\n0.063\n")
    want = {"fx": 754.6, "fy": 750.5, "cx": 489.3, "cy": 265.1, "baseline": 0.063, "doffs": 0.0}
    assert read_calibration(tmp_path / "K.txt") == want
    (tmp_path / "calib.json").write_text('{"0001": {"fx": 100, "baseline": 0.2}}')
    assert read_calibration(tmp_path / "calib.json", "0001")["baseline"] == 0.2
    for name, text in (
        ("a.txt", "1 2 3"),
        ("b.json", "{}"),
        ("c.txt", "cam0=[]"),
        ("d.txt", "0 0 0 0 0 0 0 0 1\n0.1"),
        ("e.json", "[1]"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: not a calibration"):
            read_calibration(tmp_path / name)


def test_convert_and_check_commands(tmp_path):
    left, right, d = scene(np.random.default_rng(1))
    write_set("middlebury2014", tmp_path / "in", left, right, d)
    shutil.copytree(tmp_path / "in" / "scene", tmp_path / "in" / "broken")
    (tmp_path / "in" / "broken" / "im1.png").write_bytes(b"")
    bad, total = convert(tmp_path / "in", tmp_path / "out")
    assert len(bad) == 1 and "broken/im1.png" in bad[0] and total == 2
    assert (tmp_path / "out" / "names.txt").read_text() == "000001,scene\n"
    (pair,) = list_pairs(tmp_path / "out", "folder")
    assert np.abs(read_disparity(pair.disparity, pair.codec) - d).max() <= 0.0006 and np.array_equal(read_views(pair)[0], left)
    (coded,), plain = (tmp_path / "out/left/disparity").iterdir(), tmp_path / "plain.npy"
    run("stereo/codec.py", coded, plain)
    run("stereo/codec.py", plain, tmp_path / "again.png")
    assert np.array_equal(np.load(plain), read_disparity(coded, "fsd")) and (tmp_path / "again.png").read_bytes() == coded.read_bytes()
    output = run("stereo/dataset.py", "--check", tmp_path / "out", "--out", tmp_path / "sheet.png")
    assert "0 of 1 pairs cannot be used" in output and cv2.imread(str(tmp_path / "sheet.png")) is not None


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def good(tmp_path):
    """A folder with three sound pairs in the users' layout."""
    rng = np.random.default_rng(0)
    for number in range(3):
        left, right, d = scene(rng, (80, 100))
        for side, image in (("left", left), ("right", right)):
            write_image(tmp_path / "set" / side / "rgb" / f"{number:04d}.png", image)
        write_png16(tmp_path / "set" / "left" / "disparity" / f"{number:04d}.png", encode_fsd(d))
    return tmp_path / "set"


def damage(root, what):
    truth, view = root / "left/disparity/0001.png", root / "right/rgb/0001.png"
    d = decode_fsd(load_raw(truth, "fsd"))
    match what:
        case "size":
            write_image(view, np.zeros((80, 90, 3), np.uint8))
            return "right/rgb/0001.png: 100x80 and 90x80"
        case "truncated":
            view.write_bytes(view.read_bytes()[: view.stat().st_size // 2])
            return "right/rgb/0001.png"
        case "truth size":
            write_png16(truth, encode_fsd(d[:40]))
            return "0001.png: 100x40, but the images are 100x80"
        case "invalid":
            write_png16(truth, np.zeros((80, 100, 3), np.uint8))
            return "no valid pixel at all|0 of 8000 pixels"
        case "code":
            write_png16(truth, encode_fsd(d + 900))
            return r"0001.png: too few pixels .* wrong `codec`|median disparity 9\d\d px"
        case "one channel":
            write_png16(truth, encode_kitti(d))
            return "one channel of uint16.*set `codec`"
        case "16 bits":
            write_png16(truth, np.zeros((80, 100, 3), np.uint16))
            return "8 bits a channel"
    write_image(view, np.zeros((8, 8, 3), np.uint8))
    view.write_bytes(b"")
    return "right/rgb/0001.png"


@pytest.mark.parametrize("what", ["size", "truncated", "truth size", "invalid", "code", "one channel", "16 bits", "empty"])
def test_a_bad_pair_is_named_replaced_and_counted(good, what):
    message = damage(good, what)
    dataset = StereoDataset(sources(good), 0, [[64, 64]])
    pair = next(pair for pair in dataset.sources[0].pairs if pair.name == "0001")
    with pytest.raises((ValueError, OSError), match=message):
        dataset.sample(dataset.sources[0], pair, (64, 64), np.random.default_rng(0))
    samples = [data.Guarded(dataset.read)[p] for p in range(6)]
    named = [reason for sample in samples for reason in sample["bad"]]
    assert named and all("0001" in reason for reason in named)
    assert all(sample["disparity_mask"].any() for sample in samples)
    whole = dataset.sources[0].pairs
    score = lambda: evaluate({"half": lambda left, right, truth, mask: truth / 2}, whole)["half"]
    if what == "invalid":  # nothing to score: such an image counts for nothing
        assert score()["count"]["images"] == 2 and score()["bad"] == {}
        assert np.isnan(evaluate({"any": lambda left, right, truth, mask: truth}, [pair])["any"]["per_image"]["epe"])
    elif what != "code":  # a wrong code of a plausible size cannot be told from one pair in evaluation
        assert list(score()["bad"]) == ["0001"] and re.search(message, score()["bad"]["0001"])
        assert score()["count"]["images"] == 2  # the others count
    bad, total = check(good, out=good / "sheet.png")
    assert total == 3 and len(bad) == 1 and "0001" in bad[0]


def test_nan_and_infinity_in_the_truth_are_unknown(tmp_path):
    left, right, d = scene(np.random.default_rng(0), (80, 100))
    write_image(tmp_path / "left/rgb/a.png", left)
    write_image(tmp_path / "right/rgb/a.png", right)
    bad = d.copy()
    bad[10:20], bad[20:30], bad[30:40] = np.nan, np.inf, -np.inf
    (tmp_path / "left/disparity").mkdir()
    np.save(tmp_path / "left/disparity/a.npy", bad)
    sample = StereoDataset(sources(tmp_path), 0, [[96, 64]]).read(0)
    assert np.isfinite(sample["disparity"]).all() and 0 < sample["disparity_mask"].mean() < 1
    assert not np.isnan(decode_disparity(bad, "value")).any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: [p.unlink() for p in (root / "left/disparity").iterdir()], "left/disparity is missing or empty"),
        (lambda root: [p.rename(p.with_name(f"x{p.name}")) for p in (root / "right/rgb").iterdir()], "have in common"),
        (lambda root: [p.unlink() for p in (root / "right/rgb").iterdir()], "have in common"),
        (lambda root: root.rename(root.parent / "gone"), "no such folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_at_once(good, change, message):
    change(good)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sources(good, format="folder")


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"wieght": 2}, "did you mean 'weight'"),
        ({"format": "kity"}, "unknown format 'kity'"),
        ({"image_augmentation": ["jiterring"]}, "unknown augmentation 'jiterring'"),
        ({"weight": -1}, "0 or more"),
        ({"sparse": "maybe"}, "sparse 'maybe' must be true, false or null"),
        ({"mask": "noc"}, "mask 'noc' must be all, or noc where"),
        ({"split": "val"}, "split 'val'"),
        ({"codec": "fds"}, "unknown disparity code 'fds'"),
        ({"codec": "div:abc"}, "abc"),
        ({"codec": "div:0"}, "must be positive"),
        ({"jitter": "wild"}, "mild or raft"),
    ],
)
def test_wrong_entries_of_a_data_set_are_named(good, entry, message):
    with pytest.raises(ValueError, match=message):
        sources(good, **entry)


def test_sizes_and_labels_are_checked(good):
    with pytest.raises(ValueError, match=r"multiples of 32.*take 736x320"):
        check_size(740, 320)
    with pytest.raises(ValueError, match="label_type 'depth' has no entry"):
        StereoDataset(sources(good, label_type="depth"), 0, [[64, 64]])
    with pytest.raises(ValueError, match="image_sizes, or area_range"):
        StereoDataset(sources(good), 0, None)
    with pytest.raises(ValueError, match="set image_sizes null"):
        StereoDataset(sources(good), 0, [[64, 64]], area_range=[6000, 9000], aspect_ratio_range=[0.8, 2])
    with pytest.raises(ValueError, match=r"list of \[width, height\]"):
        StereoDataset(sources(good), 0, [64, 64])
    dataset = StereoDataset(sources(good), 0, None, area_range=[6000, 9000], aspect_ratio_range=[0.8, 2])
    sizes = {dataset.size_at(step) for step in range(30)}
    assert len(sizes) > 1 and all(h % 32 == 0 == w % 32 for h, w in sizes)
    assert dataset.read((0, 3))["left_image"].shape[:2] == dataset.size_at(3)  # larger than the image or not


def test_index_and_exclude_lists(good, tmp_path):
    (tmp_path / "bad.csv").write_text("0001,SGBM,80\n")
    assert [p.name for p in sources(good, exclude=str(tmp_path / "bad.csv"))[0].pairs] == ["0000", "0002"]
    assert [p.name for p in sources(good, index=str(tmp_path / "bad.csv"))[0].pairs] == ["0001"]
    with pytest.raises(ValueError, match=r"no pair .* is left"):
        sources(good, index=str(tmp_path / "bad.csv"), exclude=str(tmp_path / "bad.csv"))


def test_baselines_on_exact_truth(truth):
    mask = truth["seen"] & (truth["d"] > 0)
    constant, matched = baselines.constant(truth["d"], mask), baselines.sgbm(truth["left"], truth["right"], 40)
    error = lambda got: np.abs(got - truth["d"])[mask].mean()
    assert error(matched) < 0.5 * error(constant) and np.isfinite(matched).all()
    holes = np.float32([[0, 3, 0, 0, 5], [0, 0, 0, 0, 0]])
    assert np.array_equal(baselines.fill(holes, holes > 0), np.float32([[3, 3, 3, 3, 5], [0] * 5]))
