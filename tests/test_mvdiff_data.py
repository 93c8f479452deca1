"""Multi-view diffusion: reading of renderings, the nine entries, input pictures."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import BadSamples, Guarded, loader
from mvdiff import build, cache, dataset, model
from mvdiff.cache import CachedDataset
from mvdiff.camera import VIEWS, camera_angles, normal_rotation, view_names
from mvdiff.clip import preprocess_pil
from mvdiff.dataset import MultiViewDataset, NoiseDataset, compose, finish, list_objects, nine_entries, pack, split_objects
from mvdiff.pictures import background_color, fit_square, grid, prepare_input, resize_square, round_uint8

SIZE, RES = 48, 24
AZIMUTH = {"front": 0, "front_right": 45, "right": 90, "back": 180, "left": 270, "front_left": 315}


def sphere(azimuth_deg: float) -> tuple[np.ndarray, ...]:
    """Colour, normal and mask of a unit-albedo sphere whose colour is its normal in the front camera's axes."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE * 2 - 1
    n = np.stack([x, -y, np.sqrt(np.clip(0.64 - x**2 - y**2, 0, None))], -1) / 0.8  # camera axes: x right, y up, z to the viewer
    a = np.deg2rad(azimuth_deg)
    in_front = n @ np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]]).T
    encode = lambda v: ((v + 1) * 127.5).clip(0, 255).round().astype(np.uint8)
    return encode(in_front), encode(n), (x**2 + y**2 < 0.64).astype(np.uint8) * 255


def write_object(root, name, k=3, suffix="png", masks=True, alpha=False, views=VIEWS, size=None):
    folder = root / name[:k] / name
    folder.mkdir(parents=True)
    for view in views:
        color, normal, mask = sphere(AZIMUTH[view])
        pictures = {"rgb": color, "normals": normal}
        if alpha:
            pictures = {key: np.dstack([value, mask]) for key, value in pictures.items()}
        if masks:
            pictures["mask"] = mask
        for key, value in pictures.items():
            image = Image.fromarray(value)
            image = image.resize(size) if size else image
            image.save(folder / f"{key}_000_{view}.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("renders")
    for name in ("aaa0", "bbb1", "ccc2", "ddd3", "eee4"):
        write_object(folder, name)
    return folder


def make(root, **options) -> MultiViewDataset:
    return MultiViewDataset(root, list_objects(root), **{"resolution": RES, "clip_size": 28, **options})


def batch_of(samples: list[dict]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0] if k != "name"}


def test_a_sample_has_exactly_the_nine_entries(root):
    noise = nine_entries(finish(batch_of([NoiseDataset(6, RES, clip_size=28).read(0)])))
    for sample in (make(root)[0], {k: v[0] for k, v in noise.items()}):
        shapes = {
            "image_cond": (3, RES, RES), "image_target": (6, 3, RES, RES), "normal_target": (6, 3, RES, RES),
            "image_cond_vae": (3, RES, RES), "image_cond_CLIP": (3, 28, 28), "image_target_vae": (6, 3, RES, RES),
            "normal_target_vae": (6, 3, RES, RES), "camera_embed_image": (6, 10), "camera_embed_normal": (6, 10),
        }  # fmt: skip
        assert {k: tuple(v.shape) for k, v in sample.items()} == shapes
        for name, value in sample.items():
            assert value.dtype == (torch.uint8 if name in ("image_cond", "image_target", "normal_target") else torch.float32)
        assert sample["image_target_vae"].abs().max() <= 1 and sample["camera_embed_normal"].abs().max() <= 1
        raw = sample["image_target"].float() / 127.5 - 1
        torch.testing.assert_close(raw, sample["image_target_vae"], atol=0.51 / 127.5, rtol=0)
        # the first five numbers are sines of (0, elevation, azimuth, is normal, is colour)
        assert torch.equal(sample["camera_embed_normal"][:, 3:5], torch.tensor([1.0, 0]).sin().expand(6, 2))
        assert torch.equal(sample["camera_embed_image"][:, 3:5], torch.tensor([0, 1.0]).sin().expand(6, 2))


def test_a_sample_depends_on_seed_and_position_alone(root):
    data = make(root, bg_color="random", augment_data=True)
    for p in (0, 3, 17):
        a, b = data.read(p), make(root, bg_color="random", augment_data=True).read((p, 99))
        assert a["name"] == b["name"] and all(np.array_equal(a[k], b[k]) for k in a)
    epochs = [[data.read(p)["name"] for p in range(start, start + 5)] for start in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == data.objects and epochs[0] != epochs[1]
    backgrounds = {tuple(make(root, seed=s).read(p)["background"].tolist()) for s in (1, 2) for p in range(10)}
    assert backgrounds == {(1.0,) * 3, (0.5,) * 3, (0.0,) * 3}
    other = [data.read(3, attempt)["name"] for attempt in range(1, 9)]
    assert len(set(other)) > 1


def test_normals_point_where_the_surface_does(root):
    """The sphere's colours are its true normals in the front camera: rotated normals must equal them in every view."""
    sample = batch_of([make(root, bg_color="white").read(0)])
    condition, targets = compose(sample)
    inside = (sample["rgba"][0, 0, :, :, :, 3] > 0)[:, None]
    color, normal = targets[0]  # order of domains
    error = ((color - normal).abs() * inside).amax(dim=(1, 2, 3))
    edge = 0.05  # resizing mixes the rim's pixels, turned and not, with the background's
    core = torch.zeros(RES, RES, dtype=torch.bool)
    core[RES // 4 : -RES // 4, RES // 4 : -RES // 4] = True
    assert (((color - normal).abs() * core).amax(dim=(1, 2, 3)) < 2.5 / 255).all() and error.max() < 1 + edge
    right = normal[VIEWS.index("right"), :, RES // 2, RES // 2]
    torch.testing.assert_close(right, torch.tensor([1.0, 0.5, 0.5]), atol=0.04, rtol=0)  # faces the right camera: +x
    turned = batch_of([make(root, bg_color="white", condition_view="right").read(0)])
    facing = compose(turned)[1][0, 1, VIEWS.index("right"), :, RES // 2, RES // 2]
    torch.testing.assert_close(facing, torch.tensor([0.5, 0.5, 1.0]), atol=0.04, rtol=0)
    torch.testing.assert_close(condition[0], targets[0, 0, 0])


def test_backgrounds_are_where_the_object_is_not(root):
    for name, value in (("white", 1.0), ("gray", 0.5), ("black", 0.0), (0.25, 0.25)):
        condition, targets = compose(batch_of([make(root, bg_color=name).read(1)]))
        corners = torch.cat([targets[..., 0, 0].reshape(-1), condition[..., -1, -1].reshape(-1)])
        assert torch.equal(corners, torch.full_like(corners, value))
    rng = np.random.default_rng(0)
    assert len({tuple(background_color("random", rng)) for _ in range(5)}) == 5
    for wrong in ("mauve", 7, "nan"):
        with pytest.raises(ValueError, match=f"bg_color .?{wrong}"):
            background_color(wrong)
    with pytest.raises(ValueError, match="bg_color random: give one colour"):
        background_color("random")


def test_options_that_mend_normals(root):
    sample = batch_of([make(root, bg_color="black", read_mask=True).read(0)])
    plain, mended = compose(sample)[1], compose(sample, normals_renormalise=True, clamp=True)[1]
    assert mended.min() >= 0 and mended.max() <= 1
    inside = sample["rgba"][0, 1, ..., 3] > 0
    length = lambda targets: (targets[0, 1] * 2 - 1).norm(dim=1)[inside]
    assert (length(plain) - 1).abs().max() > 0.05 > 1e-3 > (length(compose(sample, normals_renormalise=True)[1]) - 1).abs().max()


def test_one_domain_at_a_time(root):
    kinds = {"mix": {0, 1}, "color": {0}, "normal": {1}}
    for pred_type, expected in kinds.items():
        data = make(root, pred_type=pred_type, bg_color="white")
        samples = [data.read(p) for p in range(10)]
        assert {int(s["is_normal"][0]) for s in samples} == expected
        batch = finish(batch_of(samples))
        assert batch["target_vae"].shape == (10, 1, 6, 3, RES, RES) and batch["camera_embed"].shape == (10, 1, 6, 10)
        joint = {s["name"]: s for s in (make(root, bg_color="white").read(p) for p in range(5))}
        for s in samples:
            full = joint[s["name"]]
            assert np.array_equal(s["rgba"][0], full["rgba"][s["is_normal"][0]])
            assert np.array_equal(s["condition"], full["condition"])  # always a colour picture
    few = finish(batch_of([make(root).read(0)]), camera_flags=False)["camera_embed"]
    assert few.shape == (1, 2, 6, 6)
    rows = model.target_rows(few)
    assert rows.shape == (12, 6) and torch.equal(rows[:6], rows[6:])
    swapped = make(root, domains=("normal", "color"), bg_color="white").read(0)
    assert swapped["is_normal"].tolist() == [1, 0]
    first, second = (
        nine_entries(finish(batch_of([make(root, domains=d, bg_color="white").read(0)])))
        for d in (("normal", "color"), ("color", "normal"))
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_fewer_views(root):
    assert view_names(4) == ("front", "right", "back", "left") and view_names(2) == ("front", "front_right")
    sample, full = make(root, num_views=4).read(0), make(root).read(0)
    assert sample["rgba"].shape == (2, 4, RES, RES, 4)
    for i, view in enumerate(view_names(4)):
        assert np.array_equal(sample["rgba"][:, i], full["rgba"][:, VIEWS.index(view)])
    assert np.array_equal(sample["angles"], camera_angles("front")[[0, 2, 3, 4]])
    assert np.allclose(normal_rotation("front", ("right",))[0] @ [0, 0, 1], [1, 0, 0], atol=1e-6)
    with pytest.raises(ValueError, match="num_views 7"):
        view_names(7)


@pytest.mark.parametrize(("k", "suffix", "masks"), [(2, "webp", False), (0, "png", True), (3, "webp", True)])
def test_folder_layouts_are_found_out(root, tmp_path, k, suffix, masks):
    for name in ("aaa0", "bbb1"):
        write_object(tmp_path, name, k, suffix, masks, alpha=not masks)
    data = make(tmp_path)
    assert (data.objects, data.k, data.suffix, data.read_mask) == (["aaa0", "bbb1"], k, suffix, masks)
    ours = data.load(0, np.random.default_rng(0))["rgba"]
    if masks:
        assert np.array_equal(ours, make(root).load(0, np.random.default_rng(0))["rgba"])
    assert ours[..., 3].max() == 255 and ours[..., 3].min() == 0


def test_object_lists(root, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["x/ddd3.glb", "aaa0", "bbb1", "aaa0", "ccc2"]))
    invalid = tmp_path / "invalid.json"
    invalid.write_text('["bbb1"]')
    assert list_objects(root, names, invalid) == ["ddd3", "aaa0", "ccc2"]
    assert split_objects(["a", "b", "c"], 1) == ["a", "b"] and split_objects(["a", "b", "c"], 1, validation=True) == ["c"]
    assert split_objects(["a", "b", "c"], 0) == ["a", "b", "c"] and split_objects(["a", "b", "c"], 0, num_samples=2) == ["a", "b"]
    with pytest.raises(ValueError, match="leave none to train on"):
        split_objects(["a"], 32)
    names.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"names.json: expected a JSON list"):
        list_objects(root, names)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_objects(tmp_path / "nowhere")
    (root / ".cache" / ".thing").mkdir(parents=True)  # hidden: no objects
    assert list_objects(root) == ["aaa0", "bbb1", "ccc2", "ddd3", "eee4"]
    shutil.rmtree(root / ".cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no objects found"):
        list_objects(tmp_path / "empty")


def broken_copy(root, tmp_path, name="aaa0"):
    shutil.copytree(root, tmp_path / "renders")
    return tmp_path / "renders", tmp_path / "renders" / name[:3] / name


def test_bad_files_are_named(root, tmp_path):
    home, folder = broken_copy(root, tmp_path)
    data = make(home)
    file = folder / "normals_000_back.png"
    good = file.read_bytes()
    for damage, error in (
        (lambda: file.unlink(), (FileNotFoundError, r"normals_000_back.png: missing view")),
        (lambda: file.write_bytes(good[: len(good) // 2]), (ValueError, r"normals_000_back.png: unreadable picture")),
        (lambda: file.write_bytes(b"nothing"), (ValueError, r"normals_000_back.png: unreadable picture")),
        (lambda: Image.new("RGB", (30, 40)).save(file), (ValueError, r"normals_000_back.png: 30 x 40 is not square")),
    ):
        damage()
        with pytest.raises(error[0], match=error[1]):
            data.load(0, np.random.default_rng(0))
    file.write_bytes(good)
    with pytest.raises(ValueError, match=r"rgb_000_front.png: no alpha channel"):
        make(home, read_mask=False).load(0, np.random.default_rng(0))
    Image.new("L", (SIZE, SIZE)).save(folder / "mask_000_front.png")
    with pytest.raises(ValueError, match=r"'aaa0' is empty in its condition view front"):
        data.load(0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="random_flip"):
        make(home, random_flip=True)
    with pytest.raises(FileNotFoundError, match=r"no rgb_001_front.png.* of object 'aaa0' .* nor of 4 others"):
        make(home, group="001")
    with pytest.raises(ValueError, match="condition_view 'left' is none of the 2 views: front, front_right"):
        make(home, num_views=2, condition_view="left")
    (folder / "rgb_000_front.png").unlink()  # the first object: the layout is found out from the next
    assert make(home).k == 3 and "rgb_000_front.png: missing view" in dataset.check(make(home, bg_color="white"), tmp_path / "a.png")[0]


def test_a_broken_object_is_replaced_and_counted(root, tmp_path):
    home, folder = broken_copy(root, tmp_path, "ccc2")
    (folder / "rgb_000_left.png").unlink()
    data, said = make(home), []
    counter = BadSamples(0.5, said.append)
    batches = list(loader(Guarded(data.read), [[0, 1, 2], [3, 4]], workers=0, pin=False))
    names = [name for batch in batches for name in batch["name"]]
    assert "ccc2" not in names and len(names) == 5
    for batch in batches:
        counter.add(batch["bad"], len(batch["name"]))
    assert counter.bad == 1 and "rgb_000_left.png: missing view" in said[0]
    assert batches[0]["rgba"].dtype == torch.uint8 and finish(batches[0])["target_vae"].shape == (3, 2, 6, 3, RES, RES)


def test_packed_objects_give_the_same_samples(root, tmp_path):
    data = make(root, bg_color="random", augment_data=True)
    pack(data, tmp_path / "packed")
    packed = make(tmp_path / "packed", bg_color="random", augment_data=True)
    assert packed.objects == data.objects
    for p in range(5):
        a, b = data.read(p), packed.read(p)
        assert a["name"] == b["name"] and all(np.array_equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="was packed with"):
        make(tmp_path / "packed", resolution=2 * RES)
    file = tmp_path / "packed" / "bbb1.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"bbb1.npy: unreadable, pack it again"):
        packed.reader("bbb1", 0)
    np.save(file, np.load(tmp_path / "packed" / "aaa0.npy").astype(np.float32))
    with pytest.raises(ValueError, match=r"bbb1.npy: float32 .* instead of uint8 .*: pack it again"):
        packed.reader("bbb1", 0)
    (tmp_path / "packed" / "pack.json").write_text("{")
    with pytest.raises(ValueError, match=r"pack.json: not valid JSON"):
        make(tmp_path / "packed")


def test_crops_take_one_window_per_object(tmp_path):
    write_object(tmp_path, "aaa0", size=(SIZE * 2, SIZE))
    center, window = make(tmp_path, crop="center"), make(tmp_path, crop="random")
    sample = window.read(0)
    assert np.array_equal(sample["rgba"], window.read(0)["rgba"])
    # all files are stretched alike: the mask must still cover the sphere in colours and normals, in every view alike
    alphas = sample["rgba"][..., 3]
    assert all(np.array_equal(alphas[0, 0], a) for row in alphas for a in row)
    assert {window.read(p)["rgba"].tobytes() for p in range(4)} != {sample["rgba"].tobytes()}
    assert np.array_equal(center.read(0)["rgba"][..., 3], center.read(5)["rgba"][..., 3])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_resizing_a_part_equals_resizing_all(mode):
    rng, channels = np.random.default_rng(0), len(mode)
    for scale, box in (
        (2, (10, 30, 40, 50)),
        (2, (0, 0, 7, 64)),
        (4, (33, 64, 5, 6)),
        (3, (95, 96, 90, 96)),
        (1.5, (8, 30, 8, 30)),
    ):
        side = int(32 * scale)
        pixels = np.zeros((side, side, channels), np.uint8)
        y0, y1, x0, x1 = box
        pixels[y0:y1, x0:x1] = rng.integers(0, 256, pixels[y0:y1, x0:x1].shape)
        image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels)
        assert image.mode == mode
        whole = image.resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(resize_square(image, 32)), np.asarray(whole)), (scale, box)


def test_condition_picture_for_clip_is_the_condition_picture(root):
    for name in ("white", "gray"):
        batch = finish(batch_of([make(root, bg_color=name, clip_size=20).read(2)]))
        direct = preprocess_pil(batch["image_cond"][0].permute(1, 2, 0).numpy(), 20)
        assert np.abs(batch["image_cond_CLIP"][0].numpy() - direct).max() < 2.5 / 255 / 0.26
    sample = batch_of([make(root, bg_color="white", clip_size=20).read(2)])
    tensor, plain = (finish(sample, clip_resize=kind)["image_cond_CLIP"] for kind in ("tensor", "tensor_noaa"))
    assert 0 < (tensor - batch_clip(sample)).abs().max() < (plain - batch_clip(sample)).abs().max()
    with pytest.raises(ValueError, match="clip_resize"):
        finish(sample, clip_resize="lanczos")


def batch_clip(sample):
    return finish(sample)["image_cond_CLIP"]


def test_input_pictures():
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:30, 20:50] = (200, 100, 50, 255)
    image = Image.fromarray(pixels)
    rgb, alpha = prepare_input(image, 64, crop_size=48)
    assert rgb.shape == (3, 64, 64) and alpha.shape == (1, 64, 64) and rgb.dtype == np.float32
    rows, columns = np.nonzero(alpha[0] > 0.5)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (8, 55, 16, 47)  # 48 x 32, centred
    assert np.array_equal(rgb[:, 0, 0], np.ones(3)) and np.allclose(rgb[:, 32, 32], np.array([200, 100, 50]) / 255, atol=0.01)
    assert prepare_input(image, 64, -1, "black")[0][:, 0, 0].max() == 0
    opaque = image.convert("RGB")
    with pytest.raises(ValueError, match="no alpha channel"):
        prepare_input(opaque, 64, 48)
    assert prepare_input(opaque, 64, 48, assume_foreground=True)[1].max() == 1
    for crop_size in (48, -1):
        with pytest.raises(ValueError, match="transparent throughout"):
            prepare_input(Image.new("RGBA", (20, 20)), 64, crop_size)
    with pytest.raises(ValueError, match="crop_size 65"):
        prepare_input(image, 64, 65)
    window = fit_square(Image.new("RGB", (50, 20)), 20, center=False, rng=np.random.default_rng(0))
    assert window.size == (20, 20)


def test_grids_and_rounding():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 4)
    out = grid(images, 2)
    assert out.shape == (3, 4, 8) and out[0, 0, ::4].tolist() == [0, 1] and out[0, 2, ::4].tolist() == [2, 0]
    assert round_uint8(torch.tensor([-1, 0.0, 0.5, 0.998, 2])).tolist() == [0, 0, 128, 254, 255]
    assert dataset.PACKED == ("color", "normal")


# ---- cache of frozen work --------------------------------------------------------------------------------------------


def frozen_networks():
    folder = Path(__file__).resolve().parents[1] / "mvdiff" / "tiny"
    return build.load_frozen({"init": str(folder)})


def cache_of(root, folder, frozen, **options):
    data = make(root, **{"clip_size": 32, "resolution": 32, **options})
    finishing = {"clip_resize": "pil", "camera_flags": True}
    key = cache.cache_key(frozen, data, finishing, None)
    counts = cache.write_cache(folder, data, frozen, finishing, key, 4, "cpu")
    stored = CachedDataset(root, data.objects, resolution=32, clip_size=32, **options)
    return data, stored, key, counts, finishing


def test_cached_samples_are_those_of_the_same_positions(root, tmp_path):
    """Every background and domain: what the encoders say about the sample that stands at a position."""
    frozen = frozen_networks()
    _, stored, key, counts, finishing = cache_of(root, tmp_path, frozen)
    assert counts == (15, 0, [])  # five objects on three backgrounds
    for pred_type in ("joint", "mix"):
        live, stored.pred_type = make(root, clip_size=32, resolution=32, pred_type=pred_type), pred_type
        stored.open(tmp_path, key)
        for p in range(6):
            a, b = batch_of([live.read(p)]), stored.read(p)
            done = finish(a, **finishing)
            work = model.frozen_work(
                frozen.vae, frozen.clip, model.target_rows(done["target_vae"]), done["image_cond_vae"], done["image_cond_CLIP"]
            )
            assert np.array_equal(b["is_normal"], a["is_normal"][0]) and np.array_equal(b["angles"], a["angles"][0])
            for name in ("mean", "std"):
                rows = torch.from_numpy(b[name])
                torch.testing.assert_close(rows.flatten(0, 1), work[name], atol=1e-4, rtol=1e-4)
            for name in ("condition_mean", "condition_std", "embedding"):
                torch.testing.assert_close(torch.from_numpy(b[name]), work[name][0], atol=1e-4, rtol=1e-4)


def test_cache_goes_by_weights_settings_and_images(root, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    frozen = frozen_networks()
    data, stored, key, _, finishing = cache_of(copy, tmp_path / "cache", frozen, bg_color="white")
    stored.open(tmp_path / "cache", key)
    again = cache.write_cache(tmp_path / "cache", data, frozen, finishing, key, 4, "cpu")
    assert again == (0, 5, [])
    victim = data.files("bbb1")[1]
    os.utime(victim, (1, 1))  # as after a copy: the content decides
    stored.load(1, np.random.default_rng(0))
    victim.write_bytes(data.files("aaa0")[0].read_bytes())
    with pytest.raises(ValueError, match="the images of bbb1 have changed"):
        stored.load(1, np.random.default_rng(0))
    os.remove(victim)
    assert victim.name in str(cache.write_cache(tmp_path / "cache", data, frozen, finishing, key, 4, "cpu")[2])
    keys = {key[0], cache.cache_key(frozen, data, {**finishing, "clip_resize": "tensor"}, None)[0]}
    keys |= {cache.cache_key(frozen, data, finishing, torch.bfloat16)[0], cache.cache_key(frozen, make(copy), finishing, None)[0]}
    with torch.no_grad():
        next(frozen.vae.encoder.parameters()).add_(1)
    other = cache.cache_key(frozen, data, finishing, None)
    assert len(keys | {other[0]}) == 5
    with pytest.raises(FileNotFoundError, match="no cache"):
        stored.open(tmp_path / "cache", other)
    os.remove(next((tmp_path / "cache" / key[0]).glob("ccc2_*.npz")))
    with pytest.raises(FileNotFoundError, match=r"1 of 5 entries are missing, ccc2_1\.npz first"):
        stored.open(tmp_path / "cache", key)
    for options in ({"augment_data": True}, {"bg_color": "random"}, {"crop": "random"}):
        with pytest.raises(ValueError, match="a cache holds one form"):
            cache.check_cacheable(make(copy, **options))


def test_check_draws_and_names(root, tmp_path):
    home, folder = broken_copy(root, tmp_path)
    (folder / "rgb_000_left.png").write_bytes(b"no picture")
    bad = dataset.check(make(home, bg_color="white"), tmp_path / "sheet.png")
    assert len(bad) == 1 and "rgb_000_left.png: unreadable picture" in bad[0]
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape == (4 * RES, 12 * RES, 3)
    assert len(pack(make(home), tmp_path / "packed")) == 1  # what can be read is packed
    assert list_objects(tmp_path / "packed") == ["bbb1", "ccc2", "ddd3", "eee4"]
