"""Pi3's losses and metrics: invariances, masks, known values."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from pi3 import loss as losses
from pi3 import metrics
from pi3.geometry import transform, unproject


def random_poses(n: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(0.5 * rng.standard_normal((n, 3))).as_matrix()
    poses[:, :3, 3] = rng.standard_normal((n, 3))
    return torch.from_numpy(poses).float()


def truth(B: int = 2, N: int = 3, H: int = 20, W: int = 26) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points on smooth surfaces, poses, mask with holes, all scenes with normals."""
    g = torch.Generator().manual_seed(0)
    v, u = torch.meshgrid(torch.linspace(0, 3, H), torch.linspace(0, 3, W), indexing="ij")
    depth = 3 + 0.3 * torch.sin(u + torch.rand(B, N, 1, 1, generator=g)) * torch.cos(v)
    K = torch.tensor([[20.0, 0, W / 2], [0, 20, H / 2], [0, 0, 1]])
    mask = torch.rand(B, N, H, W, generator=g) > 0.1
    return unproject(depth, K), random_poses(B * N).view(B, N, 4, 4), mask, torch.ones(B, dtype=torch.bool)


def prediction(points: Tensor, poses: Tensor, noise: float) -> dict[str, Tensor]:
    rng = np.random.default_rng(1)
    moved, (B, N) = poses.clone(), poses.shape[:2]
    turn = Rotation.from_rotvec(noise * rng.standard_normal((B * N, 3))).as_matrix().reshape(B, N, 3, 3)
    moved[..., :3, :3] = torch.from_numpy(turn).float() @ poses[..., :3, :3]
    moved[..., :3, 3] += noise * torch.from_numpy(rng.standard_normal((B, N, 3))).float()
    return {"local_points": points + noise * torch.from_numpy(rng.standard_normal(points.shape)).float(), "camera_poses": moved}


def test_a_perfect_prediction_up_to_similarity_is_at_the_minimum():
    points, poses, mask, flags = truth()
    similarity = torch.eye(4)
    similarity[:3] = random_poses(1, seed=5)[0, :3]
    moved = similarity @ poses
    moved[..., :3, 3] *= 2.5
    out = losses.pi3_loss({"local_points": 2.5 * points, "camera_poses": moved}, points, poses, mask, flags)
    assert out["local_pts_loss"] < 1e-6 and out["trans_loss"] < 1e-9
    # both angles are clamped: to 1 degree and to acos(1 - 1e-6)
    assert out["rot_loss"].item() == pytest.approx(math.acos(1 - 1e-6), abs=2e-4)
    smooth = math.radians(1) ** 2 / (2 * math.radians(3))
    assert 0 < out["normal_loss"] <= 4 * smooth / (4 * 26) * 1.001
    worse = losses.pi3_loss(prediction(points, poses, 0.1), points, poses, mask, flags)
    assert all(worse[name] > 2 * out[name] for name in out)


def test_the_loss_does_not_see_scale_and_frame():
    points, poses, mask, flags = truth()
    pred = prediction(points, poses, 0.05)
    want = losses.pi3_loss(pred, points, poses, mask, flags)
    scaled = {"local_points": 7 * pred["local_points"], "camera_poses": pred["camera_poses"].clone()}
    scaled["camera_poses"][..., :3, 3] *= 7
    world = random_poses(1, seed=9)[0]
    moved = world @ poses
    for p, t in ((scaled, poses), (pred, moved)):
        got = losses.pi3_loss(p, points, t, mask, flags)
        for name in want:
            assert got[name].item() == pytest.approx(want[name].item(), rel=2e-4), name


def test_a_scene_far_from_the_origin_has_the_same_loss():
    points, poses, mask, flags = truth()
    poses[..., :3, 3] = (64 * poses[..., :3, 3]).round() / 64  # so that float32 holds the moved poses exactly
    pred, far = prediction(points, poses, 0.05), poses.clone()
    far[..., :3, 3] += 65536
    want, got = (losses.pi3_loss(pred, points, t, mask, flags) for t in (poses, far))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_pixels_outside_the_mask_do_not_matter():
    points, poses, mask, flags = truth()
    pred = prediction(points, poses, 0.05)
    want = losses.pi3_loss(pred, points, poses, mask, flags)
    spoilt = points.clone()
    spoilt[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    got = losses.pi3_loss(pred, spoilt, poses, mask, flags)
    for name in ("local_pts_loss", "trans_loss", "rot_loss"):
        assert got[name].item() == pytest.approx(want[name].item(), rel=1e-5)
    assert got["loss"].isfinite()


def test_an_empty_mask_gives_zero_with_a_finite_gradient():
    points, poses, mask, flags = truth()
    pred = {k: v.requires_grad_() for k, v in prediction(points, poses, 0.05).items()}
    logits = torch.zeros(mask.shape + (1,), requires_grad=True)
    none = torch.zeros_like(mask)
    out = losses.pi3_loss(pred | {"conf": logits}, points, poses, none, flags, sky=none)
    assert out["local_pts_loss"] == 0 and out["normal_loss"] == 0 and out["local_conf_loss"] == 0 and out["trans_loss"] > 0
    out["loss"].backward()
    assert all(t.grad.isfinite().all() for t in (*pred.values(), logits)) and (logits.grad == 0).all()


def test_evenly_spaced_entries_are_those_of_the_compacted_list():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 5000, generator=g) > torch.tensor([[0.1], [0.5], [0.99]])
    mask[1, :100] = False
    positions = losses.evenly_spaced(mask, 512)
    for row, got in zip(mask, positions):
        index = row.nonzero()[:, 0].float()[None, None]
        assert torch.equal(torch.nn.functional.interpolate(index, 512, mode="nearest")[0, 0].long(), got)


def test_normals_of_a_tilted_plane():
    H, W, degrees = 12, 15, 20.0
    K = torch.tensor([[20.0, 0, 7], [0, 20, 6], [0, 0, 1]])
    rays = unproject(torch.ones(1, 1, H, W), K)
    flat = rays * 2
    normal = torch.tensor([0.0, math.sin(math.radians(degrees)), math.cos(math.radians(degrees))])
    tilted = rays * (2 / (rays @ normal))[..., None]
    mask = torch.ones(1, 1, H, W, dtype=torch.bool)
    got = losses.normal_loss(tilted, flat, mask, torch.tensor([True]))
    assert got.item() == pytest.approx((math.radians(degrees) - math.radians(1.5)) / W, rel=1e-4)
    assert losses.normal_loss(tilted, flat, mask, torch.tensor([False])) == 0
    mask[..., :6, :] = False  # of eleven rows of cells, five are left
    part = losses.normal_loss(tilted, flat, mask, torch.tensor([True]))
    assert part.item() == pytest.approx(got.item() * 5 / 11, rel=1e-4)


def test_which_data_sets_have_normals_and_what_cameras_need():
    assert losses.has_normals(["TarTanAir", "COD3DV2", "ScanNet"]).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="at least 2"):
        losses.camera_loss(torch.eye(4)[None, None], torch.eye(4)[None, None], torch.ones(1))


def test_confidence_targets():
    mask, sky = torch.tensor([[[[True, True, False, False]]]]), torch.tensor([[[[True, False, True, False]]]])
    residual = torch.tensor([0.001, 0.5, 9.0, 9.0]).view(1, 1, 1, 4, 1).expand(-1, -1, -1, -1, 3)
    logits = torch.tensor([2.0, -1.0, 0.5, 77.0]).view(1, 1, 1, 4, 1)
    softplus = lambda x: math.log1p(math.exp(x))
    want = (softplus(-2.0) + softplus(-1.0)) / 2 + softplus(0.5)  # the valid pixel is no sky, the last is not supervised
    assert losses.confidence_loss(logits, residual, mask, sky).item() == pytest.approx(want, rel=1e-5)
    soft = losses.confidence_loss(logits, residual, mask, sky, target="exp")
    t = math.exp(-50 * 0.001)
    want = (softplus(2.0) - 2 * t + softplus(-1.0) + math.exp(-25.0)) / 2 + softplus(0.5)
    assert soft.item() == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="conf_target"):
        losses.confidence_loss(logits, residual, mask, sky, target="log")


# metrics


def test_relative_pose_metrics():
    poses = random_poses(6).double().numpy()
    world_to_camera = np.linalg.inv(poses)
    rotation, translation = metrics.relative_pose_errors(world_to_camera, world_to_camera)
    assert len(rotation) == 15 and rotation.max() < 1e-4 and translation.max() < 1e-4
    assert all(v == 100 for v in metrics.pose_accuracy(rotation, translation).values())
    turn = Rotation.from_euler("x", 10, degrees=True).as_matrix()
    spun = world_to_camera.copy()
    spun[3, :3] = turn @ spun[3, :3]  # one camera looks 10 degrees off: its five pairs are wrong by that
    rotation, _ = metrics.relative_pose_errors(spun, world_to_camera)
    assert sorted(rotation.round(4))[-5:] == [10.0] * 5 and sorted(rotation)[-6] < 1e-4
    accuracy = metrics.pose_accuracy(rotation, np.zeros(15), (5, 15))
    assert accuracy["rra@5"] == pytest.approx(100 * 10 / 15) and accuracy["rra@15"] == 100


def test_trajectory_errors_do_not_see_a_similarity():
    poses = random_poses(12).double().numpy()
    moved = poses.copy()
    R = Rotation.from_rotvec([0.3, -0.2, 0.5]).as_matrix()
    moved[:, :3, :3], moved[:, :3, 3] = R @ poses[:, :3, :3], 3 * poses[:, :3, 3] @ R.T + [1, 2, 3]
    assert max(metrics.trajectory_errors(moved, poses).values()) < 1e-5
    moved[:, 0, 3] += 0.3 * np.random.default_rng(0).standard_normal(12)
    assert metrics.trajectory_errors(moved, poses)["ate"] > 0.02
    with pytest.raises(ValueError, match="at least 3"):
        metrics.umeyama(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="coincide"):
        metrics.umeyama(np.zeros((5, 3)), np.random.default_rng(0).random((5, 3)))


def test_reconstruction_of_a_moved_surface_is_perfect():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 1500))
    surface = np.stack([x, y, 0.4 * np.sin(2 * x) * y], 1)
    R = Rotation.from_rotvec([0.4, 0.1, -0.3]).as_matrix()
    got = metrics.evaluate_reconstruction(0.5 * surface @ R.T + [3, 0, 1], surface)
    assert got["acc"] < 1e-6 and got["comp"] < 1e-6 and got["nc"] > 0.999
    noisy = metrics.evaluate_reconstruction(surface + 0.05 * rng.standard_normal(surface.shape), surface)
    assert noisy["acc"] > 0.02 and noisy["nc"] < 0.99


def test_depth_alignments():
    g = torch.Generator().manual_seed(0)
    target = 1 + 9 * torch.rand(2, 30, 40, generator=g)
    target[0, :5] = 0  # no reading
    outliers = torch.where(torch.rand(target.shape, generator=g) < 0.1, 5.0, 1.0)
    assert metrics.depth_errors(target / 3, target, "l1_scale")["abs_rel"] < 1e-5
    assert metrics.depth_errors(outliers * target / 3, target, "l1_scale")["delta1"] == pytest.approx(0.9, abs=0.02)
    assert metrics.depth_errors((target - 1) / 3 + 0.0, target, "lstsq")["abs_rel"] < 1e-5
    assert metrics.depth_errors(target, target, "metric")["rmse"] == 0
    assert metrics.depth_errors(target / 2, target, "metric")["abs_rel"] == pytest.approx(0.5)
    shifted = metrics.depth_errors(target / 2 + 0.02, target, "l1_scale_shift", lr=1e-3)
    assert shifted["abs_rel"] < metrics.depth_errors(target / 2 + 0.02, target, "median")["abs_rel"]
    assert shifted["abs_rel"] < 0.005
    assert metrics.depth_errors(target, target, "metric", max_depth=5)["valid_pixels"] == ((target > 0) & (target < 5)).sum()
    empty = metrics.depth_errors(target, torch.zeros_like(target))
    assert empty["valid_pixels"] == 0 and empty["rmse"] == 0
    results = [{"rmse": r, "valid_pixels": n} for r, n in ((1.0, 30), (4.0, 10), (9.0, 0))]
    pooled = metrics.pool_depth_errors(results)
    assert pooled == {"rmse": 1.75, "valid_pixels": 40}
    with pytest.raises(ValueError, match="alignment 'scale'"):
        metrics.depth_errors(target, target, "scale")


def test_points_move_with_poses():
    points, poses, *_ = truth()
    moved = transform(poses, points)
    one = poses[1, 2] @ torch.cat([points[1, 2, 3, 4], torch.ones(1)])
    assert torch.allclose(moved[1, 2, 3, 4], one[:3], atol=1e-5)
