"""LBM data: geometry and statistics of the augmentations, reading, bad files, packing, TAP-Vid readers, metrics, baselines."""

import io
import itertools
import math
import os
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as TF

from common import data
from common.io import contact_sheet, read_image, write_image, write_png16
from lbm import augment, baselines, dataset, draw, metrics
from lbm.dataset import KubricDataset
from lbm.tapvid import tapvid
from lbm.unpickle import load_pickle

FRAMES, SIDE, POINTS = 8, 160, 120
OPTIONS = {"size": (96, 128), "frames": FRAMES, "points": 64, "aug_scale": 0.3}


def noise(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def smooth(rng, height, width):
    """A texture whose neighbouring pixels are alike."""
    return cv2.resize(noise(rng, height // 8, width // 8, 3), (width, height), interpolation=cv2.INTER_CUBIC)


def content(folder: Path) -> dict:
    return np.load(folder / f"{folder.name}.npy", allow_pickle=True).item()


def save(folder: Path, value) -> None:
    np.save(folder / f"{folder.name}.npy", value, allow_pickle=True)


def write_sequence(folder: Path, seed: int, frames: int = FRAMES) -> None:
    rng = np.random.default_rng(seed)
    for t in range(frames):
        write_image(folder / "frames" / f"{t:03d}.png", smooth(rng, SIDE, SIDE))
    coords = rng.uniform(0, SIDE, (POINTS, frames, 2)).astype(np.float16)  # such files occur in half precision
    hidden = rng.random((POINTS, frames)) < 0.3
    save(folder, {"coords": coords, "visibility": hidden, "depth_range": np.zeros(2)})


@pytest.fixture(scope="session")
def kubric(tmp_path_factory):
    root = tmp_path_factory.mktemp("kubric")
    for i in range(5):
        write_sequence(root / f"{i:04d}", i)
    return root


@pytest.fixture
def broken(kubric, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(kubric, tmp_path / "copy"))


def same(a: dict, b: dict) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in ("video", "tracks", "visible", "queries", "valid"))


# ------------------------------------------------------------------------------------------------------------------ geometry


def test_view_keeps_tracks_on_their_content():
    """Red and green say where a pixel came from: after zoom, crop and flips a track still lies on its own place."""
    side, size, biases, flips = 256, np.array([160, 192]), [], set()
    ramp = np.zeros((6, side, side, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(side), np.arange(side)[:, None]  # pixel i has its centre at i + 0.5
    for seed in range(24):
        rng = np.random.default_rng(seed)
        tracks = rng.uniform(4, side - 4, (6, 400, 2)).astype(np.float32)
        view = augment.draw_view((side, side), tracks, np.ones((6, 400), bool), rng, tuple(size))
        moved, frames = augment.move_tracks(tracks, view, tuple(size)), augment.crop_frames(ramp, view, tuple(size))
        assert frames.shape == (6, *size, 3)
        flips.add(view.flips)
        padded = np.array([side + view.pad[2] + view.pad[3], side + view.pad[0] + view.pad[1]])
        zoom = view.sizes / padded  # of the picture; tracks go by (W'-1)/(W-1) instead
        exact = (tracks + np.array(view.pad)[[2, 0]]) * zoom[:, None] - view.starts[:, None]
        exact = np.where(view.flips, size[::-1] - exact, exact)
        assert (np.abs(moved - exact) <= np.abs(zoom - 1)[:, None] + 1e-3).all()
        for t in range(6):
            inside = ((exact[t] > 1.5) & (exact[t] < size[::-1] - 1.5)).all(-1)
            assert inside.sum() > 30
            places = (exact[t][inside] - 0.5).astype(np.float32)[None]
            read = cv2.remap(frames[t].astype(np.float32), places, None, cv2.INTER_LINEAR)[0, :, :2]
            error = read + 0.5 - tracks[t][inside]
            assert np.abs(error).max() < 1  # rounded to uint8
            biases.append(error.mean(0))
    assert len(flips) == 4
    assert np.abs(biases).max() < 0.35  # OpenCV's fixed-point resize is 0.12 grey levels low; half a pixel off would be 0.5


def test_view_statistics():
    bases, pads, steps, starts, flips = [], [], [], [], []
    tracks = np.random.default_rng(0).uniform(0, 512, (24, 50, 2)).astype(np.float32)
    tracks[0] = tracks[0] * 0.01 + 256
    for seed in range(300):
        view = augment.draw_view((512, 512), tracks, np.ones((24, 50), bool), np.random.default_rng(seed))
        padded = np.array([512 + view.pad[2] + view.pad[3], 512 + view.pad[0] + view.pad[1]])
        assert (view.sizes >= (522, 394)).all()
        assert (view.starts >= 0).all() and (view.starts <= view.sizes - (512, 384) - 1).all()
        np.testing.assert_allclose(view.factors, (view.sizes - 1) / (padded - 1))
        bases.append(view.factors[0, 1])
        pads += view.pad
        flips.append(view.flips)
        free = ((view.starts > 0) & (view.starts < view.sizes - (512, 384) - 1)).all(1)  # not held by the border
        steps += np.abs(np.diff(view.starts, axis=0))[free[1:] & free[:-1]].ravel().tolist()
        starts.append(view.starts[0] - (256 + np.array(view.pad)[[2, 0]]) * view.factors[0] + (256, 192))
    assert 0.74 < min(bases) < 0.8 and 1.2 < max(bases) < 1.26 and abs(np.mean(bases) - 1) < 0.03
    assert (min(pads), max(pads)) == (0, 24) and abs(np.mean(pads) - 12) < 0.8
    assert 10 < max(steps) <= 15 and np.abs(np.mean(flips, 0) - 0.5).max() < 0.1
    assert np.median(np.abs(starts)) < 4  # centred on the visible points where the border allows


def test_scale_shrinks_lengths():
    boxes = np.array([augment.draw_rectangle(np.random.default_rng(i), 512, 512, 0.3) for i in range(400)])
    assert 25 <= (boxes[:, 2:] - boxes[:, :2]).max() <= 30
    tracks = np.full((4, 1, 2), 64, np.float32)
    seen = np.ones((4, 1), bool)
    views = [augment.draw_view((128, 160), tracks, seen, np.random.default_rng(i), (96, 128), 0.3) for i in range(50)]
    assert max(max(view.pad) for view in views) == 7 and min(view.sizes.min() for view in views) == 99


# -------------------------------------------------------------------------------------------------------- occluders, colour


@pytest.mark.parametrize("occlude", [augment.erase, augment.replace])
def test_occlusion_flags_match_the_pixels(occlude):
    touched, total = 0, 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        frames = noise(rng, 12, 200, 240, 3)
        tracks = rng.uniform(-5, (245, 205), (12, 800, 2)).astype(np.float32)  # some of them outside
        before, visible = frames.copy(), rng.random((12, 800)) < 0.8
        seen = visible.copy()
        occlude(frames, tracks, visible, rng)
        assert np.array_equal(frames[0], before[0]) and np.array_equal(visible[0], seen[0])
        assert not (visible & ~seen).any()
        changed = (frames != before).any(-1)
        touched, total = touched + changed.any((1, 2)).sum(), total + 11
        column, row = np.floor(tracks).astype(int).transpose(2, 0, 1)
        inside = (column >= 0) & (column < 240) & (row >= 0) & (row < 200)
        under = changed[np.arange(12)[:, None], row.clip(0, 199), column.clip(0, 239)] & inside
        assert not (visible & under).any()  # what was painted over is hidden
        hidden = seen & ~visible
        assert hidden.sum() > 100 and (under & hidden).sum() > 0.98 * hidden.sum()  # and nothing else is
    assert 0.35 < touched / total < 0.65


def test_rectangles():
    boxes = np.array([augment.draw_rectangle(np.random.default_rng(i), 512, 512) for i in range(4000)])
    assert boxes.min() == 0 and boxes.max() == 511
    free = boxes[(boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 511).all(1)]
    sides = free[:, 2:] - free[:, :2]
    assert sides.min() >= 2 and 97 <= sides.max() <= 100 and abs(np.median(sides) - 50) < 4


class Draws:
    """Scripted scalar draws; arrays are random."""

    def __init__(self, *integers):
        self.values, self.rng = iter(integers), np.random.default_rng(3)

    def random(self, size=None):
        return 0.0 if size is None else self.rng.random(size)

    def integers(self, low, high):
        return next(self.values)


def test_erase_fills_with_the_mean():
    frames = noise(np.random.default_rng(0), 2, 64, 64, 3)
    before = frames.copy()
    tracks = np.repeat(np.float32([[15, 26], [24.9, 33.9], [25, 30], [14.9, 30], [20, 34]])[None], 2, 0)
    visible = np.ones((2, 5), bool)
    augment.erase(frames, tracks, visible, Draws(1, 20, 30, 10, 8))  # one rectangle about (20, 30), 10 wide and 8 high
    assert (frames[1, 26:34, 15:25] == before[1, 26:34, 15:25].mean((0, 1)).astype(np.uint8)).all()
    assert (frames != before).any(-1).sum() <= 80 and visible.tolist() == [[True] * 5, [False, False, True, True, True]]


def test_replace_pastes_from_a_jittered_frame():
    rng = np.random.default_rng(0)
    frames = np.stack([smooth(rng, 128, 128) for _ in range(3)])
    frames[:, :, 64:] //= 8  # a patch is not as bright as its frame
    before, tracks, visible = frames.copy(), np.zeros((3, 1, 2), np.float32), np.ones((3, 1), bool)
    draws = (1, 40, 50, 20, 12, 100, 90, 2)  # into frame 1 about (40, 50), from y = 100, x = 90 of frame 2
    draws += (1, 30, 30, 30, 30, 44, 30, 1)  # and into frame 2, from where frame 1 got its patch
    augment.replace(frames, tracks, visible, Draws(*draws))
    jitter = Draws()
    parameters = [augment.jitter_parameters(jitter, 3) for _ in range(2)]
    for (t, y, x), (source, y0, x0), (h, w) in (((1, 44, 30), (2, 100, 90), (12, 20)), ((2, 15, 15), (1, 44, 30), (30, 30))):
        whole = before[source]
        for order, values in parameters:
            whole = augment.colour_jitter(whole, order[source], values[source])
        gap = np.abs(frames[t, y : y + h, x : x + w].astype(int) - whole[y0 : y0 + h, x0 : x0 + w])
        assert gap.mean() < 1
    assert (frames != before).any(-1).sum() <= 12 * 20 + 30 * 30


def test_colour_jitter_is_torchvisions():
    image = smooth(np.random.default_rng(0), 64, 80)
    for order in itertools.permutations(range(4)):
        values = np.random.default_rng(order).uniform(-1, 1, 4) * augment.JITTER + (1, 1, 1, 0)
        expected = Image.fromarray(image)
        for step in order:
            name = ("brightness", "contrast", "saturation", "hue")[step]
            expected = getattr(TF, f"adjust_{name}")(expected, float(values[step]))
        gap = np.abs(augment.colour_jitter(image, order, values).astype(int) - np.asarray(expected, int))
        assert gap.mean() < 2 and np.quantile(gap, 0.95) <= 6, (order, gap.mean())


def test_patches_are_jittered_as_their_frame():
    rng = np.random.default_rng(1)
    frame = smooth(rng, 256, 256)
    thumbnail = frame[::8, ::8].reshape(1, -1, 3)
    for order, values in zip(*augment.jitter_parameters(rng, 10)):
        pixels = np.concatenate([thumbnail, frame[40:90, 100:160].reshape(1, -1, 3)], axis=1)
        patch = augment.colour_jitter(pixels, order, values, thumbnail.shape[1])[:, thumbnail.shape[1] :].reshape(50, 60, 3)
        whole = augment.colour_jitter(frame, order, values)[40:90, 100:160]
        assert np.abs(patch.astype(int) - whole).mean() < 1


def test_jitter_parameters():
    order, values = augment.jitter_parameters(np.random.default_rng(0), 2000)
    assert len(np.unique(order, axis=0)) == 24
    for i, (middle, width) in enumerate(zip((1, 1, 1, 0), augment.JITTER)):
        assert abs(values[:, i].min() - middle + width) < 0.01 * width and abs(values[:, i].max() - middle - width) < 0.01 * width


# ------------------------------------------------------------------------------------------------------------------- reading


def test_sample_contents(kubric):
    clips = KubricDataset(kubric, seed=1, **OPTIONS)
    assert len(clips) == 5 and clips.names == [f"{i:04d}" for i in range(5)]
    sample = clips.read(3)
    kinds = {"video": (np.uint8, (FRAMES, 96, 128, 3)), "tracks": (np.float32, (FRAMES, 64, 2)), "visible": (bool, (FRAMES, 64))}
    kinds |= {"queries": (np.float32, (64, 3)), "valid": (bool, (64,))}
    assert {key: (value.dtype, value.shape) for key, value in sample.items()} == kinds
    n = sample["valid"].sum()
    assert 16 <= n <= 64 and sample["valid"][:n].all()
    assert all(not sample[key][:, n:].any() for key in ("tracks", "visible")) and not sample["queries"][n:].any()
    assert sample["visible"][0, :n].all()
    inside = ((sample["tracks"] >= 0) & (sample["tracks"] < (128, 96))).all(-1)
    assert not (sample["visible"] & ~inside).any()
    times = sample["queries"][:n, 0].astype(int)
    assert np.array_equal(sample["queries"][:n, 1:], sample["tracks"][times, np.arange(n)])
    assert sample["visible"][times, np.arange(n)].all() and not times[n // 4 :].any()


def test_centre_crop_without_augmentation(kubric):
    sample = KubricDataset(kubric, **OPTIONS | {"augment": False}).sample("0002", data.rng(0, 0))
    content = np.load(kubric / "0002" / "0002.npy", allow_pickle=True).item()
    x, y = (SIDE - 128) // 2, (SIDE - 96) // 2
    assert np.array_equal(sample["video"][4], read_image(kubric / "0002" / "frames" / "004.png")[y : y + 96, x : x + 128])
    coords = content["coords"].astype(np.float32).swapaxes(0, 1) - np.float32([x, y])
    inside = ((coords >= 0) & (coords < (128, 96))).all(-1)
    seen = ~content["visibility"].T & inside
    chosen = np.flatnonzero(seen[0])[:64]
    n = sample["valid"].sum()
    assert n == len(chosen) and np.array_equal(sample["tracks"][:, :n], coords[:, chosen])
    assert np.array_equal(sample["visible"][:, :n], seen[:, chosen])


def test_depth(tmp_path):
    write_png16(tmp_path / "000.png", np.array([[0, 65535], [13107, 26214]], np.uint16))
    np.testing.assert_allclose(dataset.load_depth(tmp_path / "000.png", (2, 7)), [[2, 7], [3, 4]], rtol=1e-6)


def test_samples_are_functions_of_seed_and_position(kubric):
    first, second = (KubricDataset(kubric, seed=5, **OPTIONS) for _ in range(2))
    samples = [first.read(p) for p in range(6)]
    assert all(same(sample, second.read(p)) for p, sample in reversed(list(enumerate(samples))))
    assert not any(same(samples[0], samples[p]) for p in range(1, 6))
    assert not same(samples[0], KubricDataset(kubric, seed=6, **OPTIONS).read(0))
    assert not same(samples[0], first.read(5 * 1000))  # another epoch


def test_an_epoch_visits_each_sequence_once(kubric, monkeypatch):
    clips = KubricDataset(kubric, seed=2, **OPTIONS)
    monkeypatch.setattr(clips, "sample", lambda name, rng: name)
    epochs = [[clips.read(p) for p in range(e * 5, e * 5 + 5)] for e in range(6)]
    assert all(sorted(epoch) == clips.names for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    for position, attempt in itertools.product(range(5), range(1, 5)):
        assert clips.read(position, attempt) != clips.read(position)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_batches(kubric):
    clips = data.Guarded(KubricDataset(kubric, seed=3, **OPTIONS).read)
    runs = [list(data.loader(clips, [[0, 1], [5, 3], [2, 9]], workers)) for workers in (0, 1, 3)]
    for batches in zip(*runs):
        assert str(batches[0]["video"].dtype) == "torch.uint8" and batches[0]["video"].shape == (2, FRAMES, 96, 128, 3)
        assert same(batches[0], batches[1]) and same(batches[0], batches[2])


def test_short_clips_start_anywhere(kubric):
    clips = KubricDataset(kubric, seed=0, **OPTIONS | {"frames": 6})
    starts = []
    original = dataset.load_frames
    try:
        dataset.load_frames = lambda folder, total, start, count: starts.append(start) or original(folder, total, start, count)
        for position in range(40):
            clips.read(position)
    finally:
        dataset.load_frames = original
    assert set(starts) == {0, 1, 2}


def test_queries():
    rng = np.random.default_rng(0)
    visible = rng.random((10, 4000)) < 0.4
    visible[rng.integers(0, 10, 4000), np.arange(4000)] = True
    tracks = rng.random((10, 4000, 2)).astype(np.float32)
    times = dataset.sample_queries(tracks, visible, rng)[:, 0].astype(int)
    assert visible[times, np.arange(4000)].all()
    assert np.array_equal(times[1000:], visible.argmax(0)[1000:])
    rank = (np.cumsum(visible, 0)[times, np.arange(4000)] - 1)[:1000]  # which of its visible frames each point took
    count = visible.sum(0)[:1000]
    assert abs((rank / (count - 1).clip(1))[count > 1].mean() - 0.5) < 0.05 and (rank[count == 3] == 1).mean() > 0.2


# ----------------------------------------------------------------------------------------------------------------- bad files


class Intruder:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("dtype", ["O8", np.dtype("O")])
@pytest.mark.parametrize("way", ["_frombuffer", "ndarray"])
def test_pickles_cannot_make_pointers_of_bytes(tmp_path, way, dtype):
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    given = (np.ndarray, (1,), dtype, b"A" * 8) if way == "ndarray" else (frombuffer, b"A" * 8, dtype, (1,), "C")
    (tmp_path / "forged.pkl").write_bytes(pickle.dumps(Call(*given)))
    with pytest.raises(ValueError, match=r"forged\.pkl: not a readable pickle"):
        load_pickle(tmp_path / "forged.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_out_of_pickles_as_they_went_in(tmp_path, protocol):
    arrays = [np.arange(6.0).reshape(2, 3).T, np.zeros((0, 4)), np.array([b"jpeg", None, {}], object), np.array(["a", "bcd"])]
    (tmp_path / "good.pkl").write_bytes(pickle.dumps(arrays, protocol))
    for got, want in zip(load_pickle(tmp_path / "good.pkl"), arrays, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape and (got == want).all()


def break_png_short(folder, marker):
    file = folder / "frames" / "003.png"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def break_png_bytes(folder, marker):
    (folder / "frames" / "003.png").write_bytes(b"not a picture")


def break_missing_frame(folder, marker):
    (folder / "frames" / "007.png").unlink()


def break_frame_size(folder, marker):
    write_image(folder / "frames" / "003.png", np.zeros((SIDE, SIDE - 8, 3), np.uint8))


def break_foreign_class(folder, marker):
    save(folder, {"coords": Intruder(marker), "visibility": np.zeros((3, FRAMES), bool)})


def break_npy_short(folder, marker):
    file = folder / f"{folder.name}.npy"
    file.write_bytes(file.read_bytes()[:-200])


def break_npz(folder, marker):
    (folder / f"{folder.name}.npz").write_bytes(b"PK\3\4 and no more")


def break_shape(folder, marker):
    save(folder, {"coords": np.zeros((POINTS, FRAMES, 3), np.float32), "visibility": np.zeros((POINTS, FRAMES), bool)})


def break_swapped_axes(folder, marker):
    save(folder, content(folder) | {"visibility": content(folder)["visibility"].T})


def break_keys(folder, marker):
    save(folder, {"tracks": content(folder)["coords"]})


def break_no_dict(folder, marker):
    save(folder, np.zeros((POINTS, FRAMES, 2), np.float32))


def break_all_hidden(folder, marker):
    save(folder, content(folder) | {"visibility": np.ones((POINTS, FRAMES), bool)})


BREAKS = {
    break_png_short: "003.png", break_png_bytes: "003.png", break_missing_frame: "7 frames.*8", break_frame_size: "another size",
    break_foreign_class: "0001.npy.*system", break_npy_short: "0001.npy", break_npz: "0001.npz", break_keys: "0001.npy.*coords",
    break_shape: "0001.npy.*120, 8, 3", break_swapped_axes: r"0001.npy.*\(8, 120\)", break_no_dict: "0001.npy.*dict",
    break_all_hidden: "0001: 0 points visible",
}  # fmt: skip


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_broken_sequences_are_named_and_replaced(broken, tmp_path, damage):
    marker = tmp_path / "marker"
    damage(broken / "0001", marker)
    clips = KubricDataset(broken, **OPTIONS)
    with pytest.raises((ValueError, OSError), match=f"(?s){broken}.*{BREAKS[damage]}"):
        clips.sample("0001", data.rng(0, 0))
    position = next(p for p in range(5) if data.epoch_item(0, p, 5) == 1)
    sample = data.Guarded(clips.read)[position]
    assert sample["valid"].sum() >= 16 and len(sample["bad"]) >= 1 and "0001" in sample["bad"][0]
    bad = dataset.check(broken, tmp_path / "sheet.png")
    assert len(bad) == 1 and "0001" in bad[0] and (tmp_path / "sheet.png").exists()
    assert not marker.exists()


def test_too_few_frames_and_too_small_frames(kubric, tmp_path):
    write_sequence(tmp_path / "short", 0, frames=23)
    with pytest.raises(ValueError, match="short: 23 frames, 24 wanted"):
        KubricDataset(tmp_path, **OPTIONS | {"frames": 24}).read(0)
    with pytest.raises(ValueError, match="160 x 160 are smaller than the crop"):
        KubricDataset(kubric, **OPTIONS | {"size": (192, 256), "augment": False}).read(0)


def test_missing_and_empty_roots(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder.*movi_f_root"):
        KubricDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no sequence folder"):
        KubricDataset(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"photos/photos\.npy is missing"):
        KubricDataset(tmp_path)


def test_unbounded_coordinates_become_hidden(broken):
    truth = content(broken / "0001")
    truth["coords"][3:6, 4] = np.inf
    save(broken / "0001", truth)
    coords, hidden = dataset.load_tracks(broken / "0001")
    assert np.isfinite(coords).all() and hidden[3:6, 4].all()


# ------------------------------------------------------------------------------------------------------------------ commands


def test_pack_is_exact_and_jpeg_is_close(kubric, tmp_path):
    exact, close = tmp_path / "exact", tmp_path / "close"
    assert dataset.main(["--pack", str(kubric), "--out", str(exact), "--workers", "2"]) == 0
    assert dataset.main(["--pack", str(kubric), "--out", str(close), "--quality", "95"]) == 0
    files = {path.name for path in exact.rglob("*") if path.is_file()}
    assert files == {"frames.npy", *(f"{i:04d}.npz" for i in range(5))}
    png, raw, jpeg = (KubricDataset(root, seed=4, **OPTIONS) for root in (kubric, exact, close))
    for position in range(6):
        a, b, c = (clips.read(position) for clips in (png, raw, jpeg))
        assert same(a, b)
        assert all(np.array_equal(a[key], c[key]) for key in ("tracks", "visible", "queries", "valid"))
        assert np.abs(a["video"].astype(int) - c["video"]).mean() < 2
    assert dataset.main(["--check", str(close), "--out", str(tmp_path / "sheet.png")]) == 0

    before = (exact / "0000" / "frames.npy").stat().st_mtime_ns
    dataset.pack(kubric, exact)
    assert (exact / "0000" / "frames.npy").stat().st_mtime_ns == before  # nothing is done twice
    file = exact / "0000" / "frames.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"frames\.npy"):
        raw.sample("0000", data.rng(0, 0))


def test_pack_reports_what_it_cannot_read(broken, tmp_path, capsys):
    break_png_bytes(broken / "0001", None)
    assert dataset.main(["--pack", str(broken)]) == 1
    assert "003.png" in capsys.readouterr().out
    assert not (broken / "0001" / "frames.npy").exists() and (broken / "0002" / "frames.npy").exists()


def test_commands_explain_errors(tmp_path, capsys):
    for command in (["--check", "nowhere"], ["--pack", "nowhere"], ["--convert", "nowhere", str(tmp_path)]):
        assert dataset.main(command) == 1
        assert "nowhere" in capsys.readouterr().err


def test_commands_refuse_what_cannot_be(kubric, tmp_path, capsys):
    for words in (["--pack", str(kubric), "--quality", "-5"], ["--convert", "a", "b", "--stride", "0"]):
        with pytest.raises(SystemExit, match="2"):
            dataset.main(words)
        assert words[-2] in capsys.readouterr().err
    assert dataset.main(["--check", str(kubric), "--out", str(tmp_path / "chk")]) == 1
    told = capsys.readouterr().err
    assert "chk: OpenCV writes no such picture" in told and "seq/s" not in told  # before the scan


def test_convert_names_the_file_that_does_not_fit(tmp_path, capsys):
    folder = tmp_path / "toy"
    for t in range(6):
        write_image(folder / "frames" / f"{t}.png", np.zeros((16, 16 + 2 * (t == 5), 3), np.uint8))
    good = {"frames": [f"{t}.png" for t in range(5)], "tracks": np.zeros((5, 20, 2)), "visible": np.ones((5, 20), bool)}
    for change, message in (
        ({"tracks": np.zeros((20, 5, 2))}, r"tracks.npz: frames (5,), tracks (20, 5, 2)"),
        ({"known": np.ones(20, bool)}, "tracks.npz: frames (5,)"),
        ({"frames": ["0.png", "1.png"]}, "tracks.npz: frames (2,)"),
        ({"frames": [f"{t}.png" for t in range(1, 6)]}, "frames: the pictures differ in size: [(16, 16), (16, 18)]"),
        ({}, "toy: 5 frames, no training clip of 24"),
        ({}, "toy: no 24 frames that begin with 16 visible points"),
    ):
        np.savez(folder / "tracks.npz", **good | change)
        assert dataset.main(["--convert", str(folder), str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    (folder / "tracks.npz").write_bytes(b"PK")
    assert dataset.main(["--convert", str(folder), str(tmp_path / "out")]) == 1 and "tracks.npz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_own_tracks(tmp_path):
    rng = np.random.default_rng(0)
    source, video = tmp_path / "source" / "toy", [smooth(rng, 96, 128) for _ in range(20)]
    for t, frame in enumerate(video):
        write_image(source / "frames" / f"{t}.png", frame)
    tracks = rng.uniform(0, 90, (20, 30, 2)).astype(np.float32)
    visible, known = rng.random((20, 30)) < 0.8, rng.random((20, 30)) < 0.9
    visible[6] = False
    tracks[~visible] = np.nan
    np.savez(source / "tracks.npz", frames=[f"{t}.png" for t in range(20)], tracks=tracks, visible=visible, known=known)
    for given in (source, source.parent):
        out = tmp_path / given.name
        assert dataset.main(["--convert", str(given), str(out), "--frames", "8", "--stride", "6"]) == 0
        assert sorted(path.name for path in (out / "kubric").iterdir()) == ["toy_0000", "toy_0012"]  # 0006 starts unseen
        coords, hidden = dataset.load_tracks(out / "kubric" / "toy_0012")
        assert np.array_equal(hidden, ~visible[12:20].T)
        assert np.allclose(coords.swapaxes(0, 1)[visible[12:20]], tracks[12:20][visible[12:20]] + 0.5)
        assert np.array_equal(dataset.load_frames(out / "kubric" / "toy_0012", 8), video[12:20])
        [(name, sample)] = tapvid(out, "davis")
        assert name == "toy" and np.array_equal(sample["visible"], visible) and np.array_equal(sample["known"], known)
        expected = (tracks + 0.5) * np.float32([256 / 128, 256 / 96])
        assert np.allclose(sample["tracks"][visible], expected[visible], atol=1e-3)


# ------------------------------------------------------------------------------------------------------------------- TAP-Vid


def make_element(seed: int, frames: int = 11, points: int = 6, height: int = 48, width: int = 64) -> dict:
    rng = np.random.default_rng(seed)
    occluded = rng.random((points, frames)) < 0.4
    occluded[0], occluded[1, :3], occluded[1, 3] = True, True, False
    video = np.stack([smooth(rng, height, width) for _ in range(frames)])
    return {"video": video, "points": rng.random((points, frames, 2)), "occluded": occluded}


def jpegs(video) -> list[bytes]:
    out = []
    for frame in video:
        Image.fromarray(frame).save(buffer := io.BytesIO(), "JPEG", quality=98)
        out.append(buffer.getvalue())
    return out


@pytest.fixture
def sets(tmp_path):
    """One small file set of each layout: {dataset: (root, names in order, seeds in order)}."""
    (tmp_path / "kinetics").mkdir()
    (tmp_path / "robotap").mkdir()

    def dump(name, value):
        (tmp_path / name).write_bytes(pickle.dumps(value))

    dump("tapvid_davis.pkl", {"zebra": make_element(0), "ant": make_element(1)})
    dump("tapvid_rgb_stacking.pkl", [make_element(2), make_element(3)])
    for part, seeds in enumerate(((4, 5), (6,))):
        elements = [make_element(seed) for seed in seeds]
        dump(f"kinetics/{part:04d}_of_0010.pkl", [element | {"video": jpegs(element["video"])} for element in elements])
        dump(f"robotap/robotap_split{part}.pkl", {f"v{seed}": make_element(seed) for seed in seeds})
    return {
        "davis": (tmp_path / "tapvid_davis.pkl", ["ant", "zebra"], [1, 0]),
        "rgb_stacking": (tmp_path / "tapvid_rgb_stacking.pkl", ["tapvid_rgb_stacking_0000", "tapvid_rgb_stacking_0001"], [2, 3]),
        "kinetics": (tmp_path / "kinetics", ["0000_of_0010_0000", "0000_of_0010_0001", "0001_of_0010_0000"], [4, 5, 6]),
        "robotap": (tmp_path / "robotap", ["v4", "v5", "v6"], [4, 5, 6]),
    }


@pytest.mark.parametrize("kind", ["davis", "kinetics", "robotap", "rgb_stacking"])
@pytest.mark.parametrize("mode", ["first", "strided"])
def test_tapvid_layouts(sets, kind, mode):
    root, names, seeds = sets[kind]
    found = list(tapvid(root, kind, mode))
    assert [name for name, _ in found] == names
    for (_, sample), seed in zip(found, seeds):
        element = make_element(seed)
        points, seen = element["points"].astype(np.float32) * 256, ~element["occluded"]
        queries = []  # (track, frame), by the plainest reading of the two rules
        if mode == "first":
            queries = [(n, int(np.flatnonzero(seen[n])[0])) for n in range(6) if seen[n].any()]
        else:
            queries = [(n, t) for t in range(0, 11, 5) for n in range(6) if seen[n, t]]
        ids, times = (np.array(v) for v in zip(*queries))
        assert np.array_equal(sample["queries"], np.column_stack([times, points[ids, times, 1], points[ids, times, 0]]))
        assert np.array_equal(sample["tracks"], points[ids].swapaxes(0, 1)) and np.array_equal(sample["visible"], seen[ids].T)
        assert sample["known"].all() and sample["known"].shape == sample["visible"].shape
        frame = np.asarray(Image.fromarray(element["video"][7]).resize((256, 256), Image.Resampling.LANCZOS), int)
        assert np.abs(sample["video"][7] - frame).mean() < (8 if kind == "kinetics" else 0.01)


def test_tapvid_shards_and_limits(sets):
    root, names, _ = sets["kinetics"]
    shards = [[name for name, _ in tapvid(root, "kinetics", rank=rank, world=2)] for rank in range(2)]
    assert shards == [names[::2], names[1::2]]
    assert [name for name, _ in tapvid(root, "kinetics", limit=2)] == names[:2]
    assert list(tapvid(root, "kinetics", rank=3, world=4)) == []
    assert [name for name, _ in tapvid(root.parent, "davis")] == ["ant", "zebra"]  # the folder of the file does as well


def test_tapvid_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*robotap_split"):
        next(tapvid(tmp_path / "nowhere", "robotap"))
    with pytest.raises(ValueError, match=r"'tao'.*davis"):
        next(tapvid(tmp_path, "tao"))
    with pytest.raises(ValueError, match="'last'"):
        next(tapvid(tmp_path, "davis", "last"))
    file, marker = tmp_path / "tapvid_davis.pkl", tmp_path / "marker"
    for value, text in (
        ({"cat": make_element(0) | {"video": Intruder(marker)}}, "system"),
        ({"cat": make_element(0) | {"points": np.zeros((6, 11))}}, "'cat'"),
        ({"cat": {"video": 1}}, "'cat'"),
        ({"cat": make_element(0) | {"video": [b"no picture"] * 11}}, "'cat'"),
        (7, "holds a int"),
    ):
        file.write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match=rf"tapvid_davis\.pkl.*{text}"):
            next(tapvid(file, "davis"))
    file.write_bytes(pickle.dumps({"cat": make_element(0)})[:-500])
    with pytest.raises(ValueError, match=r"tapvid_davis\.pkl"):
        next(tapvid(file, "davis"))
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------------- metrics, baselines


def perfect(frames: int = 6, points: int = 4):
    rng = np.random.default_rng(0)
    tracks = rng.uniform(0, 256, (frames, points, 2)).astype(np.float32)
    visible = np.ones((frames, points), bool)
    visible[3, 0] = False
    queries = np.column_stack([np.zeros(points), tracks[0, :, ::-1]]).astype(np.float32)
    return tracks, visible, queries


def test_metrics_by_hand():
    tracks, visible, queries = perfect()
    ideal = metrics.video_metrics(tracks, visible, tracks, visible, queries)
    assert all(ideal[name] == 1 for name in metrics.REPORTED) and ideal["points"] == 19
    moved = tracks.copy()
    moved[2:, 1, 0] += 3  # 4 of the 19 points to be found are 3 px off
    result = metrics.video_metrics(moved, visible, tracks, visible, queries)
    assert [result[f"delta_{d}"] for d in metrics.THRESHOLDS] == [15 / 19, 15 / 19, 1, 1, 1]
    assert result["jaccard_1"] == 15 / 23 and result["jaccard_4"] == 1 and result["oa"] == 1
    blind = metrics.video_metrics(tracks, np.zeros_like(visible), tracks, visible, queries)
    assert blind["aj"] == 0 and blind["delta_avg"] == 1 and blind["oa"] == 1 / 20
    late = queries + np.float32([3, 0, 0])
    assert metrics.video_metrics(tracks, visible, tracks, visible, late)["points"] == 8  # frames 4 and 5
    assert metrics.video_metrics(tracks, visible, tracks, visible, late, "strided")["points"] == 20  # all but frame 3
    wrong = visible.copy()
    wrong[3, 0] = True
    assert metrics.video_metrics(tracks, wrong, tracks, visible, queries)["oa"] == 19 / 20
    assert metrics.video_metrics(tracks, wrong, tracks, visible, queries, known=visible)["oa"] == 1  # not known there


def test_undefined_videos_are_left_out_and_counted():
    tracks, visible, queries = perfect()
    good = metrics.video_metrics(tracks, visible, tracks, visible, queries)
    unseen = metrics.video_metrics(tracks, visible, tracks, np.zeros_like(visible), queries)  # no visible point
    empty = metrics.video_metrics(tracks[:, :0], visible[:, :0], tracks[:, :0], visible[:, :0], queries[:0])
    assert math.isnan(unseen["delta_avg"]) and unseen["oa"] == 1 / 20 and math.isnan(empty["oa"])
    ranks = [metrics.new_sums() for _ in range(2)]
    for sums, results in zip(ranks, ([good, unseen], [empty])):
        for result in results:
            metrics.add_video(sums, result)
    total = metrics.summary({key: ranks[0][key] + ranks[1][key] for key in ranks[0]})
    assert (total["aj"], total["delta_avg"], total["delta_1"], total["videos"], total["skipped"]) == (100, 100, 100, 3, 2)
    assert total["oa"] == pytest.approx(100 * (1 + 1 / 20) / 2)
    nothing = metrics.summary(metrics.new_sums())
    assert math.isnan(nothing["aj"]) and nothing["videos"] == 0
    with pytest.raises(ValueError, match="query_mode"):
        metrics.video_metrics(tracks, visible, tracks, visible, queries, "last")


def test_baselines():
    rng = np.random.default_rng(0)
    wide = cv2.GaussianBlur(smooth(rng, 160, 240), (0, 0), 1.5)
    video = np.stack([wide[:, 3 * t : 3 * t + 160] for t in range(10)])  # the content moves left by 3 px a frame
    queries = np.array([[0, 100.5, 80.25], [4, 80, 60], [9, 50, 100], [0, 12, 80]], np.float32)
    truth = queries[:, 1:] - np.stack([3 * (np.arange(10)[:, None] - queries[:, 0]), np.zeros((10, 4))], -1)
    tracks, visible = baselines.lucas_kanade(video, queries)
    assert tracks.shape == (10, 4, 2) and visible[:, :3].all() and np.abs(tracks - truth)[:, :3].max() < 0.3
    assert visible[0, 3] and not visible[6:, 3].any()  # it leaves the picture
    tracks, visible = baselines.still(video, queries)
    assert (tracks == queries[:, 1:]).all() and visible.all()


def test_drawing():
    frames = np.full((5, 64, 96, 3), 90, np.uint8)
    tracks = np.stack([np.full((5, 2), 20.0), np.full((5, 2), 20.0)], -1)
    tracks[:, 0, 0], tracks[:, 1, 1] = 20 + 10 * np.arange(5), 50
    visible = np.ones((5, 2), bool)
    visible[2:, 1] = False
    pictures = draw.draw_tracks(frames, tracks, visible)
    assert pictures.shape == frames.shape and pictures.dtype == np.uint8 and (frames == 90).all()
    changed = (pictures != 90).any(-1)
    assert changed[0, 15:25, 15:25].any() and not changed[0, :, 35:].any()
    assert changed[4, 20, 55] and changed[4, 19:21, 25].any()  # the dot, and its trail
    strength = np.abs(pictures[4, 19:21, 25:55].astype(int) - 90).sum((0, 2))
    assert strength[20:25].sum() > 1.3 * strength[:5].sum()  # which fades
    assert np.abs(pictures[4, 50, 20].astype(int) - 90).sum() < np.abs(pictures[0, 50, 20].astype(int) - 90).sum()  # ring, dot
    empty = draw.draw_tracks(frames, tracks[:, :0], visible[:, :0])
    assert np.array_equal(empty, frames)
    nothing = draw.draw_tracks(frames, np.full_like(tracks, np.nan), visible & False)  # no rings
    assert np.array_equal(nothing, frames)
    wild = draw.draw_tracks(frames, np.where(tracks > 40, np.nan, 1e12), visible)
    assert wild.shape == frames.shape
    sheet = contact_sheet([*pictures, pictures[0, :32]], columns=4, gap=2)
    assert sheet.shape == (2 * 66 - 2, 4 * 98 - 2, 3) and np.array_equal(sheet[66:, 98 : 98 + 96][:32], pictures[0, :32])
