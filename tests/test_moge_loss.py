"""The losses of moge/ as one table over a batch of mixed label types."""

import numpy as np
import pytest
import torch

from moge import alignment
from moge import loss as losses
from moge.geometry import depth_to_points

GLOBAL = {"function": "affine_invariant_global_loss", "weight": 1.0, "params": {"align_resolution": 16}}
PATCH = {
    "function": "affine_invariant_local_loss",
    "weight": 0.5,
    "params": {"level": 4, "align_resolution": 8, "num_patches": 6},
}
TABLE = {
    "synthetic": {
        "global": GLOBAL,
        "patch_4": PATCH,
        "normal": {"function": "normal_loss", "weight": 1.0},
        "edge": {"function": "edge_loss", "weight": 1.0},
        "mask": {"function": "mask_bce_loss", "weight": 0.1},
        "scale": {"function": "metric_scale_loss", "weight": 0.1},
        "normal_map": {"function": "normal_map_loss", "weight": 0.1},
    },
    "lidar": {"global": {**GLOBAL, "weight": 2.0}, "mask_l2": {"function": "mask_l2_loss", "weight": 1.0}},
    "patches": {"patch_4": PATCH},
    "invalid": {},
}


def make_batch(labels, height=40, width=52, seed=0):
    """(output, batch): a wavy surface with unknown and infinite pixels, and a prediction of it up to scale, shift and noise."""
    g = torch.Generator().manual_seed(seed)
    n = len(labels)
    u, v = torch.meshgrid(torch.linspace(0, 1, width), torch.linspace(0, 1, height), indexing="xy")
    depth = 3 + torch.sin(5 * u + torch.rand(n, 1, 1, generator=g) * 6) * torch.cos(4 * v)
    K = torch.tensor([[0.8, 0, 0.5], [0, 0.8 * width / height, 0.5], [0, 0, 1]]).expand(n, 3, 3).clone()
    points = depth_to_points(depth, K)
    pred = (points - torch.tensor([0, 0, 0.4])) / 1.5 + 0.02 * torch.randn(points.shape, generator=g)
    depth[torch.rand(depth.shape, generator=g) < 0.1] = torch.nan
    depth[:, :4] = torch.inf
    normal = torch.nn.functional.normalize(torch.randn(points.shape, generator=g), dim=-1)
    normal[:, :6] = torch.nan
    output = {
        "points": pred.requires_grad_(),
        "mask": torch.rand(n, height, width, generator=g).requires_grad_(),
        "normal": torch.nn.functional.normalize(torch.randn(points.shape, generator=g), dim=-1).requires_grad_(),
        "metric_scale": (1 + torch.rand(n, generator=g)).requires_grad_(),
    }
    batch = {
        "depth": depth,
        "intrinsics": K,
        "normal": normal,
        "depth_mask_fin": ~depth.isinf(),
        "depth_mask_inf": depth.isinf(),
        "label_type": list(labels),
        "is_metric": [i % 2 == 0 for i in range(n)],
    }
    return output, batch


def one(output, batch, i):
    """Image i as a batch of its own."""
    cut = slice(i, i + 1)
    return {k: v[cut] for k, v in output.items()}, {k: v[cut] for k, v in batch.items()}


def test_a_mixed_batch_is_the_mean_of_its_images(monkeypatch):
    labels = ["synthetic", "lidar", "invalid", "synthetic", "lidar"]
    output, batch = make_batch(labels)
    valid = batch["depth"].isfinite()
    anchors = torch.stack([valid[i].nonzero()[::150][:6] for i in range(5)])
    monkeypatch.setattr(
        losses, "sample_anchors", lambda points, mask, *a: torch.stack([match(mask[i]) for i in range(len(mask))])
    )

    def match(mask):  # the anchors of the image that has this mask
        return next(anchors[i] for i in range(5) if torch.equal(valid[i], mask))

    total, logs = losses.total_loss(TABLE, output, batch)
    singles = [losses.total_loss(TABLE, *one(output, batch, i)) for i in range(5)]
    torch.testing.assert_close(total, torch.stack([t for t, _ in singles]).mean(), rtol=1e-5, atol=1e-6)
    for i, (_, own) in enumerate(singles):
        for key, value in logs.items():
            if key in own:
                torch.testing.assert_close(value[i], own[key][0], rtol=1e-5, atol=1e-6, equal_nan=True)
            else:
                assert value[i].isnan(), (i, key)
    assert singles[2][0] == 0 and set(singles[1][1]) == {"global", "global.truncated_error", "global.delta", "mask_l2"}
    assert logs["scale"].isfinite().tolist() == [True, False, False, False, False]  # image 3 is synthetic, but not metric
    weighted = 2 * logs["global"][1] + logs["mask_l2"][1]
    torch.testing.assert_close(singles[1][0].detach(), weighted)
    total.backward()
    for key in ("points", "mask", "normal", "metric_scale"):
        grad = output[key].grad
        assert grad.isfinite().all() and grad[0].any() and not grad[2].any(), key


def test_a_local_loss_without_a_global_one_aligns_by_itself():
    output, batch = make_batch(["patches"])
    torch.manual_seed(0)
    alone, logs = losses.total_loss(TABLE, output, batch)
    assert alone > 0 and set(logs) == {"patch_4", "patch_4.truncated_error", "patch_4.delta"}
    torch.manual_seed(0)
    params = {**PATCH["params"]}
    points = depth_to_points(batch["depth"], batch["intrinsics"])
    scale = losses.affine_invariant_global_loss(output["points"], points, align_resolution=32)[2]
    focal = losses.focal_from_intrinsics(batch["intrinsics"])
    direct, _ = losses.affine_invariant_local_loss(output["points"], points, None, focal, scale, **params)
    torch.testing.assert_close(alone, 0.5 * direct[0])


@pytest.mark.parametrize("hole", ["unknown", "infinite", "one pixel"])
def test_images_without_geometry_give_zero_with_a_graph(hole):
    output, batch = make_batch(["synthetic", "synthetic"])
    batch["depth"][0] = torch.inf if hole == "infinite" else torch.nan
    if hole == "one pixel":
        batch["depth"][0, 20, 30] = 2.0
    batch["normal"][0] = torch.nan
    total, logs = losses.total_loss(TABLE, output, batch)
    total.backward()
    assert total.isfinite() and output["points"].grad.isfinite().all()
    assert not output["points"].grad[0].any() or hole == "one pixel"
    assert logs["patch_4"][0] == 0 and logs["patch_4.delta"][0].isnan() and logs["normal"][0] == 0 and logs["normal_map"][0] == 0
    if hole != "one pixel":
        assert logs["global"][0] == 0 and logs["global.delta"][0].isnan()


def test_perfect_prediction():
    """The exact points up to scale and z shift: no error, and gradients that are finite where everything is zero."""
    _, batch = make_batch(["synthetic"])
    K = batch["intrinsics"]
    filled = torch.where(batch["depth"].isfinite(), batch["depth"], 2.0)
    points = ((depth_to_points(filled, K) - torch.tensor([0, 0, 0.4])) / 1.5).requires_grad_()
    total, logs = losses.total_loss(
        {"synthetic": {k: TABLE["synthetic"][k] for k in ("global", "patch_4")}}, {"points": points}, batch
    )
    assert logs["global"][0] < 1e-6 and logs["patch_4"][0] < 1e-5 and logs["global.delta"][0] > 0.999
    total.backward()
    assert points.grad.isfinite().all()
    for function in (losses.normal_loss, losses.edge_loss):
        exact = depth_to_points(filled, K).requires_grad_()
        function(exact, depth_to_points(batch["depth"], K)).sum().backward()
        assert exact.grad.isfinite().all()


def test_gradients_against_finite_differences(monkeypatch):
    """With the selected points held: where another anchor takes over, the losses jump."""
    search, held = alignment._search, {}
    monkeypatch.setattr(alignment, "_search", lambda p, *args: held.setdefault(p.shape, search(p, *args)))
    output, batch = make_batch(["synthetic"], 12, 14)
    gt = depth_to_points(batch["depth"], batch["intrinsics"])
    focal, scale = losses.focal_from_intrinsics(batch["intrinsics"]), torch.tensor([1.5])
    anchors = torch.tensor([[[6, 7], [8, 4]]])
    params = {"level": 2, "align_resolution": 6, "num_patches": 2, "beta": 0.05}
    functions = {
        "global": lambda p: losses.affine_invariant_global_loss(p, gt, align_resolution=8, beta=0.05)[0],
        "local": lambda p: losses.affine_invariant_local_loss(p, gt, None, focal, scale, anchors=anchors, **params)[0],
        "normal": lambda p: losses.normal_loss(p, gt),
        "edge": lambda p: losses.edge_loss(p, gt),
    }
    direction = torch.randn(output["points"].shape, generator=torch.Generator().manual_seed(1))
    for name, function in functions.items():
        p = output["points"].detach().clone().requires_grad_()
        slope = (torch.autograd.grad(function(p).sum(), p)[0] * direction).sum().item()
        h = 3e-4
        with torch.no_grad():
            numeric = ((function(p + h * direction) - function(p - h * direction)).sum() / (2 * h)).item()
        assert slope == pytest.approx(numeric, rel=0.05, abs=2e-4), name


def test_anchors_prefer_thin_structures_and_stay_on_valid_pixels():
    points = torch.zeros(1, 60, 80, 3)
    points[..., :2] = torch.stack(torch.meshgrid(torch.arange(80.0), torch.arange(60.0), indexing="xy"), -1) / 40
    points[..., 2] = 5
    points[0, :, 38:40, 2] = 2  # a pole in front
    mask = torch.ones(1, 60, 80, dtype=torch.bool)
    mask[0, :20] = False
    radius = torch.full((1, 60, 80), 0.25)
    torch.manual_seed(0)
    for importance in (True, False):
        drawn = losses.sample_anchors(points, mask, radius, 10, 4000, importance)
        assert drawn.shape == (1, 4000, 2) and mask[0, drawn[0, :, 0], drawn[0, :, 1]].all()
        pole = ((drawn[0, :, 1] >= 38) & (drawn[0, :, 1] < 40)).float().mean()
        assert (pole > 0.06) if importance else (0.015 < pole < 0.035)
    rows, cols = torch.tensor([0, 3, -3]), torch.tensor([2, 0, -5])
    shifted = losses.anchor_weights(points, mask, radius, rows, cols)
    gathered = losses.anchor_weights(points, mask, radius, rows.expand(60, 80, 3), cols.expand(60, 80, 3))
    torch.testing.assert_close(shifted, gathered)


def test_table_errors_name_the_entry():
    with pytest.raises(ValueError, match=r"synthetic\.x.*'no_such_loss'.*normal_loss"):
        losses.check_table({"synthetic": {"x": {"function": "no_such_loss", "weight": 1}}})
    wrong = [
        ({"function": "normal_loss"}, "needs function and weight"),
        ("normal_loss", "needs function and weight"),
        ({"function": "normal_loss", "weight": "big"}, "weight, a number"),
        ({"function": "normal_loss", "weight": 1, "params": {"beta": 1}}, "takes no params beta: 1, but none"),
        ({"function": "affine_invariant_global_loss", "weight": 1, "params": {"align_resolution": "32"}}, "align_resolution: '32'"),
        ({"function": "affine_invariant_global_loss", "weight": 1, "params": {"trunk": 1}}, "trunk: 1, but align_resolution"),
        ({"function": "affine_invariant_local_loss", "weight": 1}, "need a level"),
        ({"function": "affine_invariant_local_loss", "weight": 1, "params": {"level": 4, "anchor_sampling": "all"}}, "anchor_sampling"),
    ]
    for entry, message in wrong:
        with pytest.raises(ValueError, match=rf"lidar\.y.*{message}"):
            losses.check_table({"lidar": {"y": entry}})
    for function, missing in (("mask_bce_loss", "mask_logit"), ("normal_map_loss", "normal")):
        table = {"lidar": {"y": {"function": function, "weight": 1.0}}}
        used = {"x": {"y": {"function": "normal_loss", "weight": 1.0}}}
        losses.check_table(used | table, ["x"], ["points", "mask"])
        with pytest.raises(ValueError, match=f"needs {missing}, and the model gives points, mask"):
            losses.check_table(table, ["lidar"], ["points", "mask"])
    with pytest.raises(ValueError, match="has no losses"):
        losses.check_table({"invalid": {}}, ["invalid"])
    with pytest.raises(ValueError, match="'sfm' is not in the loss table"):
        losses.check_table(TABLE, ["synthetic", "sfm"])
    losses.check_table(TABLE, ["synthetic"])
    output, batch = make_batch(["synthetic"])
    points = depth_to_points(batch["depth"], batch["intrinsics"])
    with pytest.raises(ValueError, match="importance or uniform"):
        losses.affine_invariant_local_loss(output["points"], points, None, torch.ones(1), None, 4, anchor_sampling="random")


def test_same_seed_same_patches():
    output, batch = make_batch(["synthetic"])
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(losses.total_loss(TABLE, output, batch)[0].item())
    assert values[0] == values[1] != values[2] and np.isfinite(values).all()
