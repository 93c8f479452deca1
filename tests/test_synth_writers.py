"""What `python -m synth` writes, read back and held against the ray-caster's truth."""

import json
import pickle
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from common.io import read_image, read_png16
from lbm.unpickle import load_pickle
from synth import lbm, moge, mvdiff, output, pi3, raster, shapes, stereo
from synth.__main__ import main
from synth.scene import Camera, Posed, cast, look_at, pixel_centres, render


def run(*words):
    main([str(w) for w in words])


def contents(folder):
    """{relative name: bytes} of all files below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ---------------------------------------------------------------- lbm

LBM = ("--scenes", 2, "--val_scenes", 1, "--size", "40x56", "--frames", 5, "--points", 80,
       "--val_frames", 6, "--val_points", 20, "--seed", 3)


@pytest.fixture(scope="module")
def kubric(tmp_path_factory):
    out = tmp_path_factory.mktemp("lbm") / "data"
    run("lbm", out, *LBM)
    return out


def test_lbm_layout_and_values(kubric):
    assert sorted(p.name for p in (kubric / "movi_f").iterdir()) == ["0000", "0001"]  # every folder there is a sequence
    truth = lbm.clip(3, 1, (40, 56), 5, 80)
    folder = kubric / "movi_f" / "0001"
    data = np.load(folder / "0001.npy", allow_pickle=True).item()
    assert data["coords"].shape == (80, 5, 2) and data["coords"].dtype == np.float32 and data["visibility"].dtype == bool
    np.testing.assert_allclose(data["coords"], truth["coords"], rtol=1e-5, atol=1e-4)
    assert (data["visibility"] == truth["occluded"]).all()                                           # True = occluded
    low, high = data["depth_range"]
    for t in range(5):
        assert (read_image(folder / "frames" / f"{t:03d}.png") == truth["video"][t]).all()
        code, _ = read_png16(folder / "depths" / f"{t:03d}.png")
        assert code.dtype == np.uint16
        depth, known = low + code * ((high - low) / 65535), np.isfinite(truth["depth"][t])
        assert np.abs(depth - truth["depth"][t])[known].max() <= (high - low) / 65535
        assert (code[~known] == 65535).all()
    assert 0.5 < (~data["visibility"][:, 0]).mean() < 1


def test_lbm_points_are_visible_where_they_say(kubric):
    """Depth read at a visible track's pixel from the written files alone is the track's depth, most of the time (edges excepted).
    """
    truth = lbm.clip(3, 0, (40, 56), 5, 80)
    agree = []
    for t in range(5):
        ok = ~truth["occluded"][:, t]
        x, y = np.floor(truth["coords"][ok, t]).astype(int).T
        agree.append(np.abs(truth["depth"][t][y, x] / truth["track_depth"][ok, t] - 1) < 0.05)
    assert np.concatenate(agree).mean() > 0.85


def test_lbm_validation_file(kubric):
    data = load_pickle(kubric / "tapvid_davis.pkl")  # the restricted reader takes it
    assert sorted(data) == ["clip_00"]
    element = data["clip_00"]
    assert element["video"].shape == (6, 40, 56, 3) and element["video"].dtype == np.uint8
    assert element["points"].shape == (20, 6, 2) and element["occluded"].shape == (20, 6) and element["occluded"].dtype == bool
    seen = element["points"][~element["occluded"]]
    assert (seen >= 0).all() and (seen <= 1).all() and (~element["occluded"]).any(1).mean() > 0.9
    training = [read_image(kubric / "movi_f" / f"000{i}" / "frames" / "000.png") for i in (0, 1)]
    assert all((element["video"][0] != frame).mean() > 0.5 for frame in training)  # other scenes than the training ones


def test_same_command_same_bytes_whatever_the_workers(kubric, tmp_path):
    run("lbm", tmp_path / "again", *LBM, "--workers", 2)
    first, second = contents(kubric), contents(tmp_path / "again")
    assert first.keys() == second.keys() and len(first) == 2 * 11 + 2
    assert all(first[k] == second[k] for k in first)


def test_interrupted_run_goes_on_and_other_settings_are_refused(kubric, tmp_path):
    out = tmp_path / "data"
    shutil.copytree(kubric, out)
    shutil.rmtree(out / "movi_f" / "0001")
    (out / ".unfinished" / "movi_f_0001.1").mkdir(parents=True)                                      # what a killed run leaves
    kept = (out / "movi_f" / "0000" / "frames" / "000.png").stat().st_mtime_ns
    run("lbm", out, *LBM)
    assert contents(out / "movi_f") == contents(kubric / "movi_f")
    assert (out / "movi_f" / "0000" / "frames" / "000.png").stat().st_mtime_ns == kept
    with pytest.raises(SystemExit, match="seed: 3 -> 4"):
        run("lbm", out, *LBM[:-1], 4)
    assert contents(out / "movi_f") == contents(kubric / "movi_f")


def test_failed_scene_leaves_no_folder(tmp_path):
    def fill(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        output.write_folder(tmp_path, "a/0000", fill)
    assert not (tmp_path / "a").exists()


def test_command_line_errors(tmp_path):
    for words, said in ((["lbm", tmp_path, "--size", "big"], "HEIGHTxWIDTH"), (["lbm", tmp_path, "--size", "4x4"], "too small"),
                        (["tapir", tmp_path], "tapir")):
        done = subprocess.run([sys.executable, "-m", "synth", *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(SystemExit, match="no such mesh"):
        run("mvdiff", tmp_path / "m", "--mesh", tmp_path / "absent.obj")
    with pytest.raises(SystemExit, match="square"):
        run("mvdiff", tmp_path / "m", "--size", "32x48")
    with pytest.raises(SystemExit, match="480x640"):
        run("pi3", tmp_path / "p", "--size", "32x48")


# ---------------------------------------------------------------- stereo

@pytest.fixture(scope="module")
def pairs():
    """A room and an open scene."""
    out = [stereo.pair(0, i, (96, 128)) for i in (0, 1)]
    return out


def bilinear(image, x, y):
    image, x, y = (a.astype(np.float32) for a in (image, x, y))
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def test_disparity_warps_one_view_onto_the_other(pairs):
    for p in pairs:
        rows, columns = np.mgrid[:96, :128]
        for one, other, sign in (("left", "right", -1), ("right", "left", 1)):
            d, seen, image = p[f"disparity_{one}"], p[f"seen_{one}"], p[one]["rgb"].astype(float)
            assert seen.mean() > 0.25 and (d >= 0).all() and ((d > 0) == (p[one]["ids"] > 0)).all()
            warped = bilinear(p[other]["rgb"], columns + sign * d, rows)
            wrong = bilinear(p[other]["rgb"], columns - sign * d, rows)
            error, flipped, hidden = (np.abs(w - image).mean(-1) for w in (warped, wrong, warped))
            hidden = hidden[~seen & (d > 0)]
            assert np.median(error[seen]) < 6 and np.median(error[seen]) < 0.4 * np.median(flipped[seen])
            assert np.median(hidden) > 1.5 * np.median(error[seen])  # the masks hide what does not match
            for shift in (-1, 1):                                            # one row off is worse: rectified
                off = np.abs(bilinear(p[other]["rgb"], columns + sign * d, rows + shift) - image)
                assert error[seen].mean() < off[seen].mean()


def test_left_and_right_disparity_agree_where_both_see(pairs):
    for p in pairs:
        rows, columns = np.mgrid[:96, :128]
        d, seen = p["disparity_left"], p["seen_left"]
        other = p["disparity_right"][rows, np.rint(columns - d).astype(int).clip(0, 127)]
        close = np.abs(other - d)[seen] < 0.5
        assert close.mean() > 0.9
        assert np.median(np.abs(other - d)[~seen & (d > 0)]) > 0.5 or (~seen).sum() < 50
        depth = p["left"]["depth"][d > 0]
        np.testing.assert_allclose(p["fx"] * p["baseline"] / d[d > 0], depth, rtol=1e-5)


def test_stereo_layout(tmp_path):
    run("stereo", tmp_path / "s", "--scenes", 2, "--val_scenes", 1, "--size", "32x64", "--seed", 5)
    root = tmp_path / "s" / "train"
    for side in ("left", "right"):
        for kind in ("rgb", "disparity", "occlusion"):
            assert sorted(f.stem for f in (root / side / kind).iterdir()) == ["0000", "0001"]
    truth = stereo.pair(5, 1, (32, 64))
    for side in ("left", "right"):
        code = cv2.imread(str(root / side / "disparity" / "0001.png"))[..., ::-1].astype(np.float64)
        decoded = (code[..., 0] * 65025 + code[..., 1] * 255 + code[..., 2]) / 1000
        assert np.abs(decoded - truth[f"disparity_{side}"]).max() <= 0.0005 + 1e-6
        assert np.abs(read_image(root / side / "rgb" / "0001.jpg").astype(float) - truth[side]["rgb"]).mean() < 5
        mask = cv2.imread(str(root / side / "occlusion" / "0001.png"), -1)
        assert ((mask > 0) == (~truth[f"seen_{side}"] & (truth[side]["ids"] > 0))).all()
    note = json.loads((root / "calib.json").read_text())["0001"]
    assert note == {"fx": truth["fx"], "baseline": truth["baseline"]}
    assert (tmp_path / "s" / "val" / "left" / "rgb" / "0000.jpg").exists()
    before = contents(tmp_path / "s")
    (root / ".calib" / "0000.json").unlink()  # as if killed before the pair was whole
    run("stereo", tmp_path / "s", "--scenes", 2, "--val_scenes", 1, "--size", "32x64", "--seed", 5)
    assert contents(tmp_path / "s") == before


def test_disparity_code():
    d = np.array([[0.0, 0.0004, 0.0005, 1.0, 65.025, 123.4567, 16581.374, 99999.0, np.inf, np.nan, -3.0]])
    code = stereo.encode_disparity(d).astype(np.int64)
    value = (code[..., 0] * 65025 + code[..., 1] * 255 + code[..., 2]) / 1000
    np.testing.assert_allclose(value, [[0, 0, 0.001, 1.0, 65.025, 123.457, 16581.374, 16581.374, 0, 0, 0]])
    assert code.max() <= 254


# ---------------------------------------------------------------- moge

def test_moge_layout(tmp_path):
    out = tmp_path / "m"
    run("moge", out, "--scenes", 4, "--val_scenes", 1, "--size", "48x64", "--unknown", 0.05)
    names = (out / ".index.txt").read_text().split()
    assert names == ["train/0000", "train/0001", "train/0002", "train/0003"]
    assert (out / ".val.txt").read_text().split() == ["val/0000"]
    assert (out / ".train.txt").read_text() == (out / ".index.txt").read_text()
    skies = 0
    for index, name in enumerate(names):
        truth = moge.view(0, index, (48, 64), 0.05)
        code, text = read_png16(out / name / "depth.png")
        near, far = np.float32(text["near"]), np.float32(text["far"])
        t = (code.astype(np.float32) - 1) / np.float32(65533)
        depth = np.where(code == 0, np.nan, np.where(code == 65535, np.inf, near ** (1 - t) * far**t))
        expected = truth["depth_known"]
        assert (np.isnan(depth) == np.isnan(expected)).all() and (np.isinf(depth) == np.isinf(expected)).all()
        assert np.isnan(depth).any()
        skies += np.isinf(depth).any()
        known = np.isfinite(expected)
        assert np.abs(depth[known] / expected[known] - 1).max() < 0.51 * np.log(far / near) / 65533 + 2e-6
        K = np.array(json.loads((out / name / "meta.json").read_text())["intrinsics"])
        assert K[0, 2] == K[1, 2] == 0.5 and np.isclose(K[0, 0] * 64, K[1, 1] * 48)
        # unproject with the normalised intrinsics on the grid of pixel centres: camera points equal the world points
        u, v = np.meshgrid((np.arange(64) + 0.5) / 64, (np.arange(48) + 0.5) / 48)
        points = (np.linalg.inv(K) @ np.stack([u, v, np.ones_like(u)])[:, known] * depth[known]).T
        pose = truth["cam_to_world"]
        error = np.linalg.norm(points @ pose[:3, :3].T + pose[:3, 3] - truth["points"][known], axis=1)
        assert (error / expected[known]).max() < 5e-4
        code16, _ = read_png16(out / name / "normal.png")
        n = (code16 / 65535 - 0.5) * [2, -2, -2]
        hit = truth["ids"] > 0
        assert np.abs(n - truth["normals_cam"])[hit].max() < 1e-4 and (code16[~hit] == 0).all()
        seg, text = read_png16(out / name / "segmentation.png")
        labels = json.loads(text["labels"])
        assert (seg == truth["ids"]).all() and set(np.unique(seg)) <= set(labels.values()) and " " not in text["labels"]
        assert np.abs(read_image(out / name / "image.jpg").astype(float) - truth["rgb"]).mean() < 5
    assert skies


def test_moge_code_without_finite_depth():
    code, text = moge.encode_depth(np.array([[np.nan, np.inf]], np.float32))
    assert code.tolist() == [[0, 65535]] and (text["near"], text["far"]) == ("1.0", "1.1")


# ---------------------------------------------------------------- pi3

def test_pi3_layout(tmp_path):
    out = tmp_path / "p"
    run("pi3", out, "--scenes", 1, "--val_scenes", 0, "--frames", 2)
    folder = out / "scene000" / "scene000" / "Easy" / "P000"
    scene, cameras = pi3.sequence(0, 0, 2)
    poses = np.loadtxt(folder / "pose_left.txt")
    assert poses.shape == (2, 7)
    frames, world = [], []
    for i, (tx, ty, tz, qx, qy, qz, qw) in enumerate(poses):
        depth = np.load(folder / "depth_left" / f"{i:06d}_left_depth.npy")
        rgb = read_image(folder / "image_left" / f"{i:06d}_left.png")
        assert depth.shape == (480, 640) and depth.dtype == np.float32 and np.isfinite(depth).all() and rgb.shape == (480, 640, 3)
        # read as TartanAir is read: axes permuted, pixel centres at whole numbers, fx = fy = 320, centre (320, 240)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = Rotation.from_quat([qy, qz, qx, qw]).as_matrix(), (ty, tz, tx)
        v, u = np.mgrid[:480, :640]
        points = np.stack([(u - 320) * depth / 320, (v - 240) * depth / 320, depth], -1)
        world.append(points @ pose[:3, :3].T + pose[:3, 3])
        frames.append((rgb, depth, pose))
    truth = render(scene, cameras[0])
    assert (truth["rgb"] == frames[0][0]).all()
    hit = truth["ids"] > 0
    assert (frames[0][1][~hit] == pi3.SKY).all()
    # the reader's world is ours but for one rotation: the second frame's points agree through the same rotation
    turn = pi3.NED_FROM_CAMERA.T @ pi3.NED_FROM_WORLD
    np.testing.assert_allclose(world[0][hit], truth["points"][hit] @ turn.T, atol=2e-4, rtol=1e-5)
    # projecting frame 0's points into frame 1 finds the depth that is stored there
    some = hit & (np.random.default_rng(0).random(hit.shape) < 0.05)
    rgb, depth, pose = frames[1]
    camera = Camera(640, 480, 320.0, 320.0, 320.5, 240.5, pose)
    uv, z = camera.project(world[0][some])
    inside = (z > 0) & (uv >= 0).all(1) & (uv < [640, 480]).all(1)
    x, y = np.floor(uv[inside]).astype(int).T
    assert inside.mean() > 0.3 and (np.abs(depth[y, x] / z[inside] - 1) < 0.02).mean() > 0.7


# ---------------------------------------------------------------- mvdiff and the rasteriser

BOX_OBJ = """mtllib box.mtl
v -1 -2 -3
v 1 -2 -3
v 1 2 -3
v -1 2 -3
v -1 -2 3
v 1 -2 3
v 1 2 3
v -1 2 3
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl picture
f 5/1 6/2 7/3 8/4
usemtl plain
f 2/1 1/2 4/3 3/4
f 1/1 5/2 8/3 4/4
f 6/1 2/2 3/3 7/4
f 8 7 3 4
f -8 -7 -3 -4
"""


@pytest.fixture
def box_obj(tmp_path):
    (tmp_path / "box.obj").write_text(BOX_OBJ)
    (tmp_path / "box.mtl").write_text("newmtl plain\nKd 0.2 0.4 0.6\n\nnewmtl picture\nKd 1 1 1\nmap_Kd four colours.png\n")
    corner = np.zeros((64, 64, 3), np.uint8)
    corner[:32, :32], corner[:32, 32:] = (255, 0, 0), (0, 255, 0)                        # rows from the top
    corner[32:, :32], corner[32:, 32:] = (0, 0, 255), (255, 255, 255)
    output.write_image(tmp_path / "four colours.png", corner)
    return tmp_path / "box.obj"


@pytest.mark.parametrize("orthographic", [False, True])
def test_rasteriser_agrees_with_the_ray_caster(box_obj, orthographic):
    mesh = raster.read_obj(box_obj)                                                      # half sides (1, 3, 2) once z is up
    assert mesh.corners.shape == (12, 3, 3) and len(mesh.textures) == 2
    pose = look_at(np.array([7.0, -6.0, 5.0]), np.zeros(3), 0.2)
    camera = Camera(90, 70, 11.0 if orthographic else 100.0, 10.0 if orthographic else 90.0, 45.3, 34.6, pose, orthographic)
    triangle, bary, depth = raster.rasterise(mesh.corners, camera)
    part = shapes.box([1, 3, 2])
    posed = Posed(part, np.eye(3), np.zeros(3), 0, (np.zeros(3), part.radius))
    t, which, face = cast([posed], *camera.rays(pixel_centres(camera)))
    t, hit = t.reshape(70, 90), (which >= 0).reshape(70, 90)
    assert ((triangle >= 0) == hit).all() and 0.1 < hit.mean() < 0.6
    np.testing.assert_allclose(depth[hit], t[hit], rtol=1e-9)
    np.testing.assert_allclose(bary[hit].sum(-1), 1, atol=1e-9)
    frame = raster.render_mesh(mesh, camera, np.array([0, 0, 1.0]))
    origin, direction = camera.rays(pixel_centres(camera))
    points = (origin + direction * np.where(which >= 0, t.ravel(), 0)[:, None]).reshape(70, 90, 3)
    np.testing.assert_allclose(frame["points"][hit], points[hit], atol=1e-9)
    normal = shapes.normals(part, points[hit], face.reshape(70, 90)[hit])
    np.testing.assert_allclose(frame["normals"][hit], normal, atol=1e-6)
    np.testing.assert_allclose(frame["normals_cam"][hit], normal @ pose[:3, :3], atol=1e-6)


def test_texture_is_the_right_way_up(box_obj):
    """The textured face looks along +z in the file (y up): seen from there, red is at the top left as in the picture."""
    mesh = raster.read_obj(box_obj)
    camera = Camera(40, 60, 10, 10, 20, 30, look_at(np.array([0.0, -9.0, 0.0]), np.zeros(3)), orthographic=True)
    rgb = raster.render_mesh(mesh, camera, np.array([0, -1.0, 0]), ambient=1, diffuse=0.0)["rgb"].astype(int)
    dominant = lambda y, x: rgb[y, x] > 100
    assert dominant(20, 15).tolist() == [True, False, False] and dominant(20, 25).tolist() == [False, True, False]
    assert dominant(40, 15).tolist() == [False, False, True] and dominant(40, 25).tolist() == [True, True, True]


def test_bad_meshes(tmp_path, box_obj):
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    with pytest.raises(ValueError, match=r"empty\.obj: no faces"):
        raster.read_obj(tmp_path / "empty.obj")
    (tmp_path / "wild.obj").write_text("v 0 0 0\nf 1 2 3\n")
    with pytest.raises(ValueError, match=r"wild\.obj: a face refers"):
        raster.read_obj(tmp_path / "wild.obj")
    (tmp_path / "four colours.png").unlink()
    with pytest.raises(ValueError, match="four colours"):
        raster.read_obj(box_obj)


def test_mvdiff_views_are_consistent():
    """Normals of the same surface point seen from two views agree once both are turned to the front camera's axes; alpha, depth
    and normals go together.
    """
    seen = mvdiff.views(0, 2, 64)
    assert list(seen) == ["front", "front_right", "right", "back", "left", "front_left"]
    front = seen["front"]["RT"][:, :3]
    for view, degrees in mvdiff.VIEWS.items():
        v, a = seen[view], np.deg2rad(degrees)
        turned = front @ v["RT"][:, :3].T  # from this view's axes to the front camera's
        np.testing.assert_allclose(turned, [[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]], atol=1e-12)
        hit = v["alpha"] > 0
        assert 0.05 < hit.mean() < 0.6 and (np.isfinite(v["depth"]) == hit).all() and (v["rgba"][~hit] == 0).all()
        np.testing.assert_allclose(np.linalg.norm(v["normals"][hit], axis=-1), 1, atol=1e-5)
        assert (v["normals"][hit][:, 2] > -0.1).all() and not hit[[0, -1]].any() and not hit[:, [0, -1]].any()
        # depth and normals of a view describe one surface: finite differences of the points lie in the tangent plane
        pixel = mvdiff.ORTHO_SCALE / 64
        whole = (v["alpha"] == 1)
        depth = np.where(whole, v["depth"], 0)
        change = depth[:, 2:] - depth[:, :-2]
        inner = whole[:, 2:] & whole[:, :-2] & (np.abs(change) < 4 * pixel)
        step = np.stack(np.broadcast_arrays(2 * pixel, 0.0, -change), -1)
        slope = np.abs((step * v["normals"][:, 1:-1]).sum(-1) / np.linalg.norm(step, axis=-1))[inner]
        assert np.median(slope) < 0.02
    # opposite views have mirrored silhouettes
    mirrored = seen["back"]["alpha"][:, ::-1] > 0.5
    both = seen["front"]["alpha"] > 0.5
    assert ((mirrored & both).sum() / (mirrored | both).sum()) > 0.3


def test_mvdiff_layout(tmp_path, box_obj):
    out = tmp_path / "o"
    run("mvdiff", out, "--scenes", 2, "--size", "48x48")
    assert json.loads((out / "objects.json").read_text()) == ["00000", "00001"]
    truth = mvdiff.views(0, 1, 48)
    folder = out / "000" / "00001"
    for view in mvdiff.VIEWS:
        v = truth[view]
        rgba = np.asarray(Image.open(folder / f"rgb_000_{view}.png"))
        normals = np.asarray(Image.open(folder / f"normals_000_{view}.png"))
        mask = np.asarray(Image.open(folder / f"mask_000_{view}.png"))
        depth = np.asarray(Image.open(folder / f"depth_000_{view}.png")).astype(np.float64)
        assert rgba.shape == normals.shape == (48, 48, 4) and mask.shape == (48, 48) and mask.dtype == np.uint8
        assert (rgba == v["rgba"]).all() and (mask == rgba[..., 3]).all() and (normals[..., 3] == mask).all()
        hit = v["alpha"] > 0
        assert np.abs(normals[..., :3] / 255 * 2 - 1 - v["normals"])[hit].max() < 2.1 / 255 and (normals[~hit] == 0).all()
        assert np.abs(depth / 65535 * 10 - v["depth"])[hit].max() < 2e-4 and (depth[~hit] == 65535).all()
        np.testing.assert_allclose(np.loadtxt(folder / f"000_{view}_RT.txt"), v["RT"], atol=1e-8)
    run("mvdiff", tmp_path / "mesh", "--scenes", 1, "--size", "32x32", "--mesh", box_obj)
    rgba = np.asarray(Image.open(tmp_path / "mesh" / "box" / "box_000" / "rgb_000_front.png"))
    assert 0.05 < (rgba[..., 3] > 0).mean() < 0.7


def test_generated_objects_fill_the_unit_box():
    for index in range(8):
        scene = mvdiff.generated_object(1, index)
        parts = [Posed(p, p.rotation, p.offset, 0, (np.zeros(3), 2.0)) for p in scene.bodies[0].parts]
        low, high = mvdiff.bounds(parts, 0.7)
        assert abs(np.linalg.norm(high - low) - 1) < 0.06 and np.abs(low + high).max() < 0.06


def test_no_pickle_surprises(kubric):
    """The files that hold pickles name numpy's array types and builtins only."""
    import pickletools
    data = (kubric / "tapvid_davis.pkl").read_bytes()
    words = {argument for op, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    assert not {w for w in words if w.split(".")[0] in ("synth", "os", "posix", "builtins")}
    assert isinstance(pickle.loads(data), dict)
