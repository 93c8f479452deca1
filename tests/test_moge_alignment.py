"""The alignment solvers of moge/ (and pi3/) against a plain search over every anchor, and in the cases that training can meet."""

import pytest
import torch

from moge import alignment
from moge.alignment import align_1d, align_depth_affine, align_scale, align_scale_xyz_shift, align_scale_z_shift, nearest_index


def problems(kind: str, m: int, n: int, seed: int = 0):
    """m problems of n points: (points, target (m, n, 3), weight (m, n) with a third of it zero)."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(m, n, 3, generator=g) + torch.tensor([0, 0, 4.0])
    noise = torch.randn(m, n, 3, generator=g)
    if kind == "unrelated":
        points = noise + torch.tensor([0, 0, 1.0])
    else:
        points = (target - torch.tensor([0, 0, 0.5])) / 1.7 + {"clean": 0.003, "noisy": 0.1, "outliers": 0.01}[kind] * noise
        if kind == "outliers":
            points = torch.where(torch.rand(m, n, 1, generator=g) < 0.3, 3 * noise + torch.tensor([0, 0, 3.0]), points)
    weight = torch.rand(m, n, generator=g) * (torch.rand(m, n, generator=g) > 0.33)
    return points, target, weight


def objective(p, g, w, s, t, trunc):
    error = w.double()[..., None] * (s.double()[:, None, None] * p + t.double()[:, None] - g).abs()
    return (error if trunc is None else error.clamp_max(trunc)).sum((1, 2))


def every_anchor(p, g, w, trunc, axes):
    """Least objective over all anchors: for each, the exact optimum among all scales that make some term zero, one by one."""
    best = torch.full((len(p),), torch.inf, dtype=torch.double)
    for m in range(len(p)):
        for k in (w[m] > 0).nonzero()[:, 0]:
            x = ((p[m] - p[m, k] * axes) * w[m][:, None]).flatten().double()
            y = ((g[m] - g[m, k] * axes) * w[m][:, None]).flatten().double()
            scales = (y / x)[x != 0]
            error = (scales[:, None] * x - y).abs()
            best[m] = min(best[m], (error if trunc is None else error.clamp_max(trunc)).sum(1).min())
    return best


@pytest.mark.parametrize("trunc", [None, 1.0, 0.1])
@pytest.mark.parametrize("kind", ["clean", "noisy", "outliers", "unrelated"])
def test_optimum_over_all_anchors(kind, trunc):
    p, g, w = problems(kind, 6, 24)
    for solve, axes in ((align_scale_z_shift, (0, 0, 1.0)), (align_scale_xyz_shift, (1.0, 1.0, 1.0))):
        s, t = solve(p, g, w, trunc)
        best = every_anchor(p, g, w, trunc, torch.tensor(axes))
        torch.testing.assert_close(objective(p, g, w, s, t, trunc), best, rtol=1e-5, atol=1e-5)
    s, t = align_depth_affine(p[..., 2], g[..., 2], w, trunc)
    best = every_anchor(p[..., 2:], g[..., 2:], w, trunc, torch.ones(1))
    torch.testing.assert_close(objective(p[..., 2:], g[..., 2:], w, s, t[:, None], trunc), best, rtol=1e-5, atol=1e-5)


def test_one_unknown_is_the_global_optimum_on_a_fine_grid():
    p, g, w = problems("outliers", 5, 40)
    a = torch.linspace(-5, 5, 20001, dtype=torch.double)
    x, y, weight = p[..., 2].double(), g[..., 2].double(), w.double()
    for trunc in (None, 0.5):
        error = weight[:, None] * (a[:, None] * x[:, None] - y[:, None]).abs()
        grid = (error if trunc is None else error.clamp_max(trunc)).sum(-1).amin(1)
        _, loss, index = align_1d(x, y, weight, trunc)
        assert (loss <= grid + 1e-12).all() and (loss >= grid * 0.99).all()
        assert (weight.gather(1, index[:, None]) > 0).all()


def test_shifts_and_scale_are_medians():
    p, g, _ = problems("noisy", 3, 41)
    w = torch.ones(3, 41)
    torch.testing.assert_close(alignment.align_z_shift(p, g, w)[:, 2], (g - p)[..., 2].median(1).values)
    torch.testing.assert_close(alignment.align_xyz_shift(p, g, w), (g - p).median(1).values)
    exact = align_scale(p, 2.5 * p, w)
    torch.testing.assert_close(exact, torch.full((3,), 2.5))


@pytest.mark.parametrize("solve", [align_scale_z_shift, align_scale_xyz_shift])
def test_no_problem_no_point_no_weight(solve):
    s, t = solve(torch.rand(0, 5, 3), torch.rand(0, 5, 3), torch.rand(0, 5), 1.0)
    assert s.shape == (0,) and t.shape == (0, 3)
    p, g, w = problems("clean", 2, 30)
    w[0] = 0
    p.requires_grad_()
    s, t = solve(p, g, w, 1.0)
    assert s[0] == 0 and (t[0] == 0).all() and 1.6 < s[1] < 1.8
    (s.sum() + t.sum()).backward()
    assert p.grad.isfinite().all() and not p.grad[0].any() and p.grad[1].any()


def test_other_batch_shapes_and_a_problem_with_nan():
    p, g, w = problems("noisy", 6, 20)
    s, t = align_scale_xyz_shift(p.view(2, 3, 20, 3), g.view(2, 3, 20, 3), w.view(2, 3, 20), 1.0)
    whole = align_scale_xyz_shift(p, g, w, 1.0)
    assert torch.equal(s.flatten(), whole[0]) and torch.equal(t.flatten(0, 1), whole[1])
    p[2, 4] = torch.nan  # leaves its neighbours alone
    s, _ = align_scale_xyz_shift(p, g, w, 1.0)
    keep = torch.arange(6) != 2
    torch.testing.assert_close(s[keep], whole[0][keep])


def test_constant_prediction_and_constant_truth():
    p, g, w = problems("noisy", 2, 30)
    s, t = align_scale_z_shift(p * 0 + 1, g, w, 1.0)
    assert s.isfinite().all() and t.isfinite().all()
    s, t = align_scale_xyz_shift(p, g * 0 + 2, w, 1.0)
    torch.testing.assert_close(s, torch.zeros(2))
    torch.testing.assert_close(t, torch.full((2, 3), 2.0))


def test_gradient_is_that_of_the_two_selected_points():
    p, g, w = problems("noisy", 3, 25)
    p = p.double().requires_grad_()
    s, t = align_scale_xyz_shift(p, g.double(), w.double(), 1.0)
    (s.sum() + t.sum()).backward()
    assert ((p.grad != 0).any(-1).sum(1) <= 2).all()
    step = 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    s1, t1 = align_scale_xyz_shift(p.detach() + step, g.double(), w.double(), 1.0)
    change = (s1.sum() + t1.sum() - s.sum() - t.sum()).item()
    assert abs(change - (p.grad * step).sum().item()) < 1e-3 * abs(change) + 1e-9


def test_nearest_index():
    assert nearest_index(10, 4).tolist() == [0, 2, 5, 7]
    assert nearest_index(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_index(torch.tensor([[10], [0]]), 4).tolist() == [[[0, 2, 5, 7]], [[0, 0, 0, 0]]]
    x = torch.arange(70001.0)[None, None]
    assert torch.equal(torch.nn.functional.interpolate(x, size=4096, mode="nearest")[0, 0].long(), nearest_index(70001, 4096))


@pytest.mark.gpu
def test_cuda_agrees():
    p, g, w = problems("outliers", 64, 64)
    for solve in (align_scale_z_shift, align_scale_xyz_shift):
        s, t = solve(p, g, w, 1.0)
        s1, t1 = solve(p.cuda(), g.cuda(), w.cuda(), 1.0)
        found, known = objective(p, g, w, s1.cpu(), t1.cpu(), 1.0), objective(p, g, w, s, t, 1.0)
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)
