"""Pi3's data: readers, bad files, sampling strategies, batch plans, crops; conventions against exactly rendered scenes."""

import gzip
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from runs import generated

from common import data
from pi3 import augment, sampling
from pi3.dataset import Mixture, main, read_sample, step_keys, unpack
from pi3.geometry import inverse_se3, transform, unproject
from pi3.loss import pi3_loss
from pi3.readers import CO3D, RGBDFolder, ScanNet, TartanAir, _tartanair_pose_file, read_invalid_list, sequence_name, write_invalid_list

SIZE = (56, 42)


def picture(i: int, h: int = 96, w: int = 128) -> np.ndarray:
    small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


def pose(i: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = (0.1 * i, 0, 0)
    return matrix


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        np.savetxt(path, value)
    elif path.suffix == ".npy":
        np.save(path, value)
    else:
        cv2.imwrite(str(path), value)


def write_folder(tmp_path: Path) -> Path:
    """A plain sequence of 6 frames of 128x96 at 2 m; frame 4 has no pose, frame 5 one that is not finite."""
    for i in range(6):
        write(tmp_path / f"color/{i:03d}.jpg", picture(i))
        write(tmp_path / f"depth/{i:03d}.png", np.full((96, 128), 2000, np.uint16))
        if i != 4:
            write(tmp_path / f"pose/{i:03d}.txt", pose(i) if i != 5 else np.full((4, 4), np.inf))
    write(tmp_path / "intrinsics.txt", [[100.0, 0, 64], [0, 100, 48], [0, 0, 1]])
    return tmp_path


def write_scannet(tmp_path: Path) -> Path:
    """A scene of each split, 8 frames of a wall at 1.5 m; frames 2 and 5 have no finite pose."""
    for scene in ("scene0001_00", "scene0700_00"):
        for i in range(8):
            write(tmp_path / scene / f"color/{i}.jpg", picture(i, 968 // 2, 1296 // 2))
            write(tmp_path / scene / f"depth/{i}.png", np.full((240, 320), 1500, np.uint16))
            write(tmp_path / scene / f"pose/{i}.txt", np.full((4, 4), -np.inf) if i in (2, 5) else pose(i))
        K = np.array([[280.0, 0, 160, 0], [0, 280, 120, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        write(tmp_path / scene / "intrinsic/intrinsic_depth.txt", K)
    return tmp_path


def write_co3d(tmp_path: Path) -> Path:
    """Two sequences of a category; the object fills the left half of each image, depth is 1.5 m everywhere."""
    sequences = {}
    for name in ("1_2_3", "4_5_6"):
        sequences[name] = []
        for i in range(5):
            path = f"apple/{name}/images/frame{i:06d}.jpg"
            write(tmp_path / path, picture(i, 128, 96))
            depth = np.full((128, 96), 1.5, np.float16)
            depth[0, 0] = np.inf
            write(tmp_path / (path.replace("images", "depths") + ".geometric.png"), depth.view(np.uint16))
            mask = np.zeros((128, 96), np.uint8)
            mask[:, :48] = 255
            write(tmp_path / path.replace("images", "masks").replace(".jpg", ".png"), mask)
            camera = {"R": np.eye(3).tolist(), "T": [0.1 * i, 0, 2.0], "focal_length": [2.0, 2.0], "principal_point": [0.0, 0.0]}
            sequences[name].append({"filepath": path, **camera})
    (tmp_path / "apple_train.jgz").write_bytes(gzip.compress(json.dumps(sequences).encode()))
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture
def scannet(tmp_path: Path) -> Path:
    return write_scannet(tmp_path)


@pytest.fixture
def co3d(tmp_path: Path) -> Path:
    return write_co3d(tmp_path)


def batch_of(sample: dict) -> dict:
    return unpack(data.stack([sample]), "cpu")


# exact geometry


def test_conventions_against_rendered_scenes(tmp_path_factory):
    """Points of one view, moved by the poses, land on the surface seen in another, and the truth has the least loss."""
    reader = TartanAir(generated(tmp_path_factory, "pi3", "--scenes", "1", "--val_scenes", "1", "--frames", "3"))
    assert len(reader) == 1
    sample = read_sample(reader, 0, np.random.default_rng(0), 3, (224, 168))
    assert len(set(sample["frames"])) >= 2
    batch = batch_of(sample)
    assert batch["imgs"].shape == (1, 3, 3, 168, 224) and batch["imgs"].min() >= 0 and batch["imgs"].max() <= 1
    points, poses, mask = batch["local_points"][0], batch["poses"][0], batch["mask"][0]
    for i in range(3):
        for j in range(3):
            seen = transform(inverse_se3(poses[j]), transform(poses[i], points[i]))[mask[i]]
            u, v, w = (seen @ torch.from_numpy(sample["intrinsics"][j]).T).unbind(-1)
            x, y = (u / w).round().long(), (v / w).round().long()
            inside = (w > 0) & (x >= 0) & (y >= 0) & (x < 224) & (y < 168)
            error = (torch.from_numpy(sample["depth"])[j][y[inside], x[inside]] - w[inside]).abs() / w[inside]
            assert inside.float().mean() > 0.5
            assert error.median() < 0.01, (i, j, error.median())  # nearest pixels; occlusions are the minority
    truth = batch["local_points"], batch["poses"], batch["mask"], torch.tensor([True])
    right = pi3_loss({"local_points": truth[0], "camera_poses": truth[1]}, *truth)
    mixed = pi3_loss({"local_points": truth[0], "camera_poses": truth[1].roll(1, 1)}, *truth)
    assert right["local_pts_loss"] < 1e-5 and right["trans_loss"] < 1e-8 and mixed["loss"] > right["loss"] + 0.05


def test_crops_keep_the_camera_true():
    """An image whose colour is its pixel position: after a crop, K still projects rays to where their colours went."""
    W, H = 320, 240
    v, u = np.mgrid[:H, :W].astype(np.float32)
    image = np.stack([u * 255 / W, v * 255 / H, np.zeros_like(u)], -1).round().astype(np.uint8)
    K = np.array([[250.0, 0, 150], [0, 260, 125], [0, 0, 1]])
    rng = np.random.default_rng(0)
    for size in ((56, 42), (126, 168), (224, 224), (300, 140)):
        for _ in range(5):
            crop = augment.plan_crop((W, H), K, size, *augment.draw_crop(rng, 0.9, 16))
            out = augment.crop_image(image, crop).astype(float)
            assert out.shape == (size[1], size[0], 3)
            y, x = size[1] // 3, 2 * size[0] // 3
            ray = np.linalg.solve(crop.K, [x, y, 1])
            source = K @ ray
            assert abs(out[y, x, 0] * W / 255 - source[0]) < 1.6 and abs(out[y, x, 1] * H / 255 - source[1]) < 1.6
            index = augment.crop_map(np.arange(H * W).reshape(H, W), crop)[y, x]
            step = (crop.box[2] - crop.box[0]) / crop.resized[0]  # OpenCV's nearest neighbour takes the first pixel of a step
            assert abs(index % W - source[0]) < 1 + step and abs(index // W - source[1]) < 1 + step
    with pytest.raises(ValueError, match="principal point"):
        augment.plan_crop((W, H), np.array([[250.0, 0, 20], [0, 250, 120], [0, 0, 1]]), (56, 42))


def test_nearest_crops_are_those_of_opencv():
    rng = np.random.default_rng(0)
    for _ in range(300):
        W, H, w, h = (int(v) for v in rng.integers(20, 700, 4))
        values = rng.random((H, W)).astype(np.float32)
        crop = augment.Crop((0, 0, W, H), (w, h), (3, 2), (w - 5, h - 4), np.eye(3))
        want = cv2.resize(values, (w, h), interpolation=cv2.INTER_NEAREST)[2 : h - 2, 3 : w - 2]
        assert np.array_equal(augment.crop_map(values, crop), want)


# strategies and plans


def test_frame_strategies():
    draws = [sampling.sliding_window(np.random.default_rng(s), 1000, 8, reach=24) for s in range(200)]
    for frames in draws:
        assert len(frames) == 8 and len(set(frames[1:].tolist())) == 7 and np.ptp(frames) <= 48
    assert np.std([f[0] for f in draws]) > 200
    assert sampling.window_around(2, 100, 10).tolist() == list(range(21)) and sampling.window_around(99, 100, 10)[0] == 79
    assert sampling.window_around(2, 7, 10).tolist() == list(range(7))
    window = np.arange(100, 180)
    for seed in range(50):
        drawn = sampling.sub_intervals(np.random.default_rng(seed), 117, window, 8)
        assert [f // 10 for f in drawn] == [10, 12, 13, 14, 15, 16, 17]  # one of each ten but the reference's
        drawn = sampling.sub_intervals(np.random.default_rng(seed), 3, np.arange(5), 6)  # one part is empty
        assert len(drawn) == 5 and drawn.max() < 5
        run = sampling.consecutive_frames(np.random.default_rng(seed), 100, 10, max_stride=4)
        assert len(set(np.diff(run))) == 1 and 1 <= run[1] - run[0] <= 4 and run[-1] < 100
        assert sampling.consecutive_frames(np.random.default_rng(seed), 3, 6).tolist() == [0, 1, 2, 2, 2, 2]
        for n in (2, 5, 40, 3000):
            for count in (2, 6, 24):
                for choose in (sampling.tartanair_frames, sampling.scannet_frames, sampling.co3d_frames, sampling.video_frames):
                    frames = choose(np.random.default_rng(seed), n, count)
                    assert len(frames) == count and frames.min() >= 0 and frames.max() < n
    wide = [np.ptp(sampling.tartanair_frames(np.random.default_rng(s), 5000, 24)) > 200 for s in range(400)]
    assert 0.05 < np.mean(wide) < 0.16  # now and then the whole flight
    kinds = [np.ptp(sampling.video_frames(np.random.default_rng(s), 5000, 8)) for s in range(400)]
    assert 0.05 < np.mean(np.array(kinds) > 400) < 0.16 and 0.02 < np.mean(np.array(kinds) <= 70) < 0.3
    with pytest.raises(ValueError, match="all 3 frames"):
        sampling.scannet_frames(np.random.default_rng(0), 3, 2, invalid=[0, 1, 2])


def test_batch_plans_follow_from_seed_and_step():
    sizes = sampling.all_resolutions()
    plans = [sampling.plan_step(5, s, (2, 24), 64, sizes) for s in range(300)]
    assert plans == [sampling.plan_step(5, s, (2, 24), 64, sizes) for s in range(300)]
    assert plans != [sampling.plan_step(6, s, (2, 24), 64, sizes) for s in range(300)]
    assert {views for _, views, _ in plans} == set(range(2, 25)) and len({size for *_, size in plans}) > 200
    assert all(n * views <= 64 and (n + 1) * views > 64 for n, views, _ in plans)
    capped = [sampling.plan_step(5, s, (2, 24), 6, sizes) for s in range(100)]
    assert max(views for _, views, _ in capped) == 6 and all(n * views <= 6 for n, views, _ in capped)
    with pytest.raises(ValueError, match="max_img_per_gpu is 3"):
        sampling.plan_step(5, 0, (4, 24), 3, sizes)
    with pytest.raises(ValueError, match="no 9 different sizes"):
        sampling.sample_resolutions(0, 9, (100_000, 101_000), (1.0, 1.01))


def test_the_world_size_does_not_change_the_samples():
    options = {"image_num_range": (2, 6), "max_img_per_gpu": 12, "resolutions": [(224, 224), (224, 168)]}
    for step in (0, 7):
        alone = step_keys(3, step, 0, 1, 4, **options)
        two = [step_keys(3, step, rank, 2, 2, **options) for rank in (0, 1)]
        assert sorted(k for part in alone for k in part) == sorted(k for rank in two for part in rank for k in part)
        assert len({k[1:] for part in alone for k in part}) == 1
    assert step_keys(3, 0, 0, 1, 1, **options)[0][-1][0] < step_keys(3, 1, 0, 1, 1, **options)[0][0][0]


# readers


def test_rgbd_folder(folder: Path):
    reader = RGBDFolder(folder)
    assert len(reader) == 1 and len(reader.sequences[0][1]) == 4  # the two frames without a usable pose are left out
    sample = read_sample(reader, 0, np.random.default_rng(0), 3, SIZE)
    assert sample["images"].shape == (3, 42, 56, 3) and sample["images"].dtype == np.uint8
    assert np.allclose(sample["depth"], 2) and sample["poses"].dtype == np.float32
    assert np.allclose(sample["poses"][:, 0, 3], [0.1 * i for i in sample["frames"]])
    batch = batch_of(sample)
    assert batch["mask"].all() and torch.allclose(batch["local_points"][..., 2], torch.tensor(2.0))
    plain = read_sample(reader, 0, np.random.default_rng(0), 3, SIZE, train=False)
    assert not np.array_equal(plain["images"], sample["images"])
    write(folder / "depth/000.npy", np.full((96, 128), 3.5, np.float32))  # metres
    os.remove(folder / "depth/000.png")
    assert np.allclose(RGBDFolder(folder).frame(0, 0).depth, 3.5)


def test_rgbd_folder_that_is_broken(folder: Path):
    read = lambda: read_sample(RGBDFolder(folder), 0, np.random.default_rng(0), 8, SIZE)
    write(folder / "depth/001.png", np.full((48, 64), 2000, np.uint16))
    with pytest.raises(ValueError, match=r"frame 1: image \(96, 128\) and depth \(48, 64\) differ in size"):
        read()
    write(folder / "depth/001.png", np.zeros((96, 128), np.uint16))
    with pytest.raises(ValueError, match=r"frame 1: no valid depth"):
        read()
    write(folder / "depth/001.png", np.full((96, 128), 200, np.uint8))
    with pytest.raises(ValueError, match=r"001\.png: .* type uint8, expected depth of 16 bits"):
        read()
    write(folder / "depth/001.png", np.zeros((96, 128), np.uint16))
    (folder / "color/001.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises((ValueError, OSError), match=r"001\.jpg"):
        read()
    (folder / "pose/002.txt").write_text("1 2 three\n")
    os.remove(folder / "pose/003.txt")
    os.remove(folder / "depth/000.png")
    with pytest.raises(ValueError, match=r"1 usable frames, at least 2 are needed.*depth/000\.png.*pose/002\.txt"):
        read()
    with pytest.raises(FileNotFoundError, match="neither a sequence"):
        RGBDFolder(folder / "color")


@pytest.mark.parametrize("content", ["100 0 64\n0 100 48\n", "100 0 64\n0 nan 48\n0 0 1\n", "fx fy cx cy\n", None])
def test_broken_intrinsics_are_named(folder: Path, content: str | None):
    (folder / "intrinsics.txt").write_text(content) if content else os.remove(folder / "intrinsics.txt")
    with pytest.raises((ValueError, OSError), match=r"intrinsics\.txt"):
        RGBDFolder(folder)


def test_a_sequence_with_too_few_frames_is_replaced(scannet: Path, tmp_path: Path):
    """One usable frame makes no sample: another sequence of the same data set takes its place, and the reason is told."""
    shutil.copytree(scannet / "scene0001_00", scannet / "scene0002_00")
    for i in range(1, 8):
        os.remove(scannet / f"scene0002_00/pose/{i}.txt")
    reader = ScanNet(scannet)
    with pytest.raises(ValueError, match=r"scene0002_00: 1 usable frames, at least 2 are needed"):
        read_sample(reader, 1, np.random.default_rng(0), 3, SIZE)
    guarded = data.Guarded(Mixture([reader], [1.0], seed=0).read)
    samples = [guarded[(position, 2, *SIZE)] for position in range(12)]
    assert {sample["sequence"] for sample in samples} == {"scene0001_00"}
    reasons = [reason for sample in samples for reason in sample["bad"]]
    assert reasons and all("1 usable frames" in reason for reason in reasons)
    with pytest.raises(RuntimeError, match="1 usable frames"):  # nothing else to take
        shutil.rmtree(scannet / "scene0001_00")
        data.Guarded(Mixture([ScanNet(scannet)], [1.0], seed=0).read)[(0, 2, *SIZE)]


def test_scannet(scannet: Path, tmp_path: Path):
    train, test = ScanNet(scannet), ScanNet(scannet, "test")
    assert [s.name for s in train.sequences] == ["scene0001_00"] and [s.name for s in test.sequences] == ["scene0700_00"]
    drawn = {i for seed in range(30) for i in train.frames(np.random.default_rng(seed), 0, 4)}
    assert drawn == {0, 1, 3, 4, 6, 7}  # two poses are not finite
    sample = read_sample(train, 0, np.random.default_rng(0), 4, SIZE, train=False)
    assert np.allclose(sample["depth"], 1.5) and sample["z_far"] == 80 and sample["dataset"] == "ScanNet"
    assert train.frame(0, 0).image.shape == (240, 320, 3)
    want = cv2.resize(picture(0, 484, 648)[..., ::-1], (320, 240), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(train.frame(0, 0).image.astype(int) - want).mean() < 3
    (tmp_path / "list.json").write_text(json.dumps({"scene0001_00": [0, 1, 2, 3, 5]}))
    listed = ScanNet(scannet, invalid_list=tmp_path / "list.json")
    assert {i for seed in range(30) for i in listed.frames(np.random.default_rng(seed), 0, 4)} == {4, 6, 7}
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"list\.json: expected JSON"):
        ScanNet(scannet, invalid_list=tmp_path / "list.json")
    assert write_invalid_list(scannet, tmp_path / "list.json") == 0
    assert read_invalid_list(tmp_path / "list.json") == {"scene0001_00": [2, 5], "scene0700_00": [2, 5]}
    listed = ScanNet(scannet, invalid_list=tmp_path / "list.json")
    assert listed.numbers(0) == train.numbers(0) == [0, 1, 3, 4, 6, 7]
    with pytest.raises(FileNotFoundError, match="no ScanNet scene"):
        write_invalid_list(scannet / "scene0001_00", tmp_path / "list.json")
    with pytest.raises(ValueError, match="pose is not finite"):
        train.frame(0, 2)
    with pytest.raises(FileNotFoundError, match=r"data\.scannet\.root"):
        ScanNet(scannet / "scene0001_00")


def test_co3d(co3d: Path):
    reader = CO3D(co3d, mask_bg="rand")
    assert len(reader) == 2 and (co3d / "index" / "apple_train.npy").is_file()
    shares = set()
    for seed in range(8):
        batch = batch_of(read_sample(reader, 1, np.random.default_rng(seed), 4, SIZE, train=False))
        shares.add(round(batch["mask"].float().mean().item(), 1))
        assert torch.allclose(batch["local_points"][batch["mask"]][:, 2], torch.tensor(1.5))
    assert shares == {0.5, 1.0}  # with and without the background
    frame = CO3D(co3d, mask_bg=False).frame(0, (3, False))
    assert frame.depth[0, 0] == 0 and np.allclose(frame.K, [[96, 0, 48], [0, 96, 64], [0, 0, 1]])
    assert np.allclose(np.linalg.inv(frame.pose)[:3], [[-1, 0, 0, -0.3], [0, -1, 0, 0], [0, 0, 1, 2]])
    sample = read_sample(reader, 0, np.random.default_rng(0), 2, SIZE)
    assert sample["sequence"] == "apple/1_2_3" and sample["dataset"] == "COD3DV2"
    with pytest.raises(ValueError, match=r"data\.co3d\.mask_bg 'random': expected true, false or rand"):
        CO3D(co3d, mask_bg="random")
    cameras = json.loads(gzip.decompress((co3d / "apple_train.jgz").read_bytes()))
    cameras["1_2_3"][4]["T"] = [1e5, 0, 2.0]  # lost
    (co3d / "apple_test.jgz").write_bytes(gzip.compress(json.dumps(cameras).encode()))
    assert [sequence_name(CO3D(co3d, split), 0) for split in ("train", "test")] == ["apple/1_2_3", "apple/4_5_6"]
    (co3d / "pear_train.jgz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ValueError, match=r"pear_train\.jgz: broken CO3D annotations"):
        CO3D(co3d)


def test_tartanair_that_is_broken(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"data\.tartanair\.root"):
        TartanAir(tmp_path)
    folder = tmp_path / "env/env/Hard/P001"
    for i in range(3):
        write(folder / f"image_left/{i:06d}_left.png", picture(i, 480, 640))
        write(folder / f"depth_left/{i:06d}_left_depth.npy", np.full((480, 640), 100.0 if i == 1 else 5.0, np.float32))
    write(folder / "pose_left.txt", np.tile([0, 0, 0, 0, 0, 0, 1.0], (2, 1)))
    reader = TartanAir(tmp_path)
    read = lambda: read_sample(reader, 0, np.random.default_rng(0), 12, SIZE)
    with pytest.raises(ValueError, match=r"pose_left\.txt: 2 poses, but there is an image 2"):
        reader.frame(0, 2)
    with pytest.raises(ValueError, match=r"no valid depth|2 poses"):  # frame 1 is all sky
        read()
    for content, message in (("0 0 0 1\n", "4 numbers per line, expected 7"), ("0 0 zero\n", "not a table of numbers")):
        (tmp_path / "broken.txt").write_text(content)
        with pytest.raises(ValueError, match=f"broken.txt.*{message}"):
            _tartanair_pose_file(tmp_path / "broken.txt")
        _tartanair_pose_file.cache_clear()
    write(folder / "pose_left.txt", np.tile([0, np.nan, 0, 0, 0, 0, 1.0], (3, 1)))
    with pytest.raises(ValueError, match=r"P001, frame \d: the pose is not finite"):
        read()
    (folder / "depth_left/000000_left_depth.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(ValueError, match=r"000000_left_depth\.npy"):
        reader.frame(0, 0)


def test_check_covers_every_split_and_goes_on_after_a_bad_scene(tmp_path: Path, monkeypatch, capsys):
    def check(root: Path) -> str:
        monkeypatch.setattr("sys.argv", ["dataset.py", "--check", str(root), "--out", str(tmp_path / "check.png"), "--views", "2"])
        assert main() == 1 and (tmp_path / "check.png").exists()
        (tmp_path / "check.png").unlink()
        return capsys.readouterr().out

    rooms, own = write_scannet(tmp_path / "rooms"), tmp_path / "own"
    (rooms / "scene0700_00/depth/3.png").write_bytes(b"cut")
    shutil.copytree(rooms / "scene0001_00", rooms / "scene0002_00")
    shutil.rmtree(rooms / "scene0001_00/color")
    output = check(rooms)
    assert "scene0700_00/depth/3.png" in output and "scene0001_00/color" in output
    assert "ScanNet: 2 sequences, ScanNet: 1 sequences; 2 problems" in output
    for name in ("a", "b", "c"):
        write_folder(own / name)
    os.remove(own / "a/intrinsics.txt")
    (own / "b/color/001.jpg").write_bytes(b"cut")
    output = check(own)
    assert "a/intrinsics.txt" in output and "b/color/001.jpg" in output and "ScanNet: 2 sequences; 2 problems" in output


def test_samples_are_functions_of_their_keys(folder: Path, co3d: Path):
    mixture = Mixture([RGBDFolder(folder), CO3D(co3d)], [3, 1], seed=4)
    same = lambda a, b: all(np.array_equal(a[k], b[k]) for k in a)
    keys = [(p, 3, *SIZE) for p in range(40)]
    samples = [mixture.read(key) for key in keys]
    assert all(same(samples[i], Mixture(mixture.readers, [3, 1], seed=4).read(keys[i])) for i in (7, 0, 3))
    assert not same(samples[0], samples[1]) and not same(samples[0], Mixture(mixture.readers, [3, 1], seed=5).read(keys[0]))
    share = np.mean([s["dataset"] == "ScanNet" for s in samples])
    assert 0.5 < share < 0.95
    retry = mixture.read(keys[0], attempt=1)
    assert retry["dataset"] == samples[0]["dataset"] and not same(retry, samples[0])
    batches = list(data.loader(data.Guarded(mixture.read), [keys[:2], keys[2:4]], workers=0))
    assert batches[0]["images"].shape == (2, 3, 42, 56, 3) and batches[0]["images"].dtype == torch.uint8
    assert np.array_equal(batches[1]["depth"][0], samples[2]["depth"])
    with pytest.raises(ValueError, match="one weight each"):
        Mixture(mixture.readers, [1], seed=0)


def test_unprojection_has_pixel_centres_at_whole_numbers():
    K = torch.tensor([[2.0, 0, 1], [0, 4, 1], [0, 0, 1]])
    points = unproject(torch.full((3, 4), 8.0), K)
    assert points[1, 1].tolist() == [0, 0, 8] and points[2, 3].tolist() == [8, 2, 8]
