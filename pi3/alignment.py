"""Robust alignment of predicted to true geometry: weighted, optionally truncated L1 fits with an exact optimum.

Every fit minimises sum_i sum_c min(T, w_i |s p_ic + t_c - g_ic|) over a scale s and/or a shift t (MoGe, section 3.2 and its
supplement, the "ROE" solver). With a scale alone this is a problem in one unknown, solved by one sort (`align_1d`). With a
scale and a shift some optimum passes exactly through one of the points, the anchor; the paper sorts once per anchor, so n points
cost n sorts of 3n (truncated: 9n) numbers. Here only a handful of anchors is ever sorted: cheap bounds prove the others worse.

Batched over any leading dimensions. The search itself carries no gradient; scale and shift are then computed again from the two
selected points with gradient, so that the optimum moves with the prediction. Needs torch only.
"""

import torch
from torch import Tensor

_NODES = (-3.0, -1.0, -0.25, 0.25, 1.0, 3.0)  # first scales tried, in units of (objective / its slope) around the start
_ROUNDS = 3  # times that anchors are bounded, on finer and finer intervals, before those left are solved


def align_1d(x: Tensor, y: Tensor, w: Tensor, trunc: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a = argmin_a sum_i min(trunc, w_i |a x_i - y_i|) exactly, by one sort.

    x, y, w: (..., n), w >= 0. Returns a (...), the objective (...), and the index (...) of the term that a makes zero:
    a = y[index] / x[index], differentiable; the other two are not. trunc None: no truncation, the weighted median of y / x (the
    first term in ascending order of y / x at which the slope of the objective is not negative).
    """
    with torch.no_grad():
        index, loss = _solve_rows(w * x, w * y, trunc)
    x, y = x.gather(-1, index[..., None])[..., 0], y.gather(-1, index[..., None])[..., 0]
    return y * x.sign() / x.abs().clamp_min(1e-7), loss.to(x.dtype), index


def align_scale(points: Tensor, target: Tensor, weight: Tensor, trunc: float | None = None) -> Tensor:
    """Scale s (...) that best maps points to target; points, target: (..., n, 3), weight: (..., n)."""
    w = weight[..., None].expand_as(points)
    return align_1d(points.flatten(-2), target.flatten(-2), w.flatten(-2), trunc)[0]


def align_z_shift(points: Tensor, target: Tensor, weight: Tensor, trunc: float | None = None) -> Tensor:
    """Shift (..., 3) = (0, 0, t_z) that best maps points to target; points, target: (..., n, 3), weight: (..., n)."""
    y = (target - points)[..., 2]
    t = align_1d(torch.ones_like(y), y, weight, trunc)[0]
    return torch.stack([torch.zeros_like(t), torch.zeros_like(t), t], -1)


def align_xyz_shift(points: Tensor, target: Tensor, weight: Tensor, trunc: float | None = None) -> Tensor:
    """Shift (..., 3) that best maps points to target, each axis by itself; points, target: (..., n, 3), weight: (..., n)."""
    y = (target - points).transpose(-1, -2)  # (..., 3, n)
    return align_1d(torch.ones_like(y), y, weight[..., None, :].expand_as(y), trunc)[0]


def align_depth_scale(depth: Tensor, target: Tensor, weight: Tensor, trunc: float | None = None) -> Tensor:
    """Scale s (...) that best maps depth to target; all (..., n)."""
    return align_1d(depth, target, weight, trunc)[0]


def align_depth_affine(depth: Tensor, target: Tensor, weight: Tensor, trunc: float | None = None) -> tuple[Tensor, Tensor]:
    """Scale s (...) and shift t (...) that best map depth to target; all (..., n). No positive weight: s = t = 0."""
    s, t = _align_anchored(depth[..., None], target[..., None], weight, trunc, (1,))
    return s, t[..., 0]


def align_scale_z_shift(points: Tensor, target: Tensor, weight: Tensor, trunc: float | None = None) -> tuple[Tensor, Tensor]:
    """Scale s (...) and shift t (..., 3) = (0, 0, t_z) that best map points to target: s * points + t.

    points, target: (..., n, 3), weight: (..., n) >= 0; truncation acts per coordinate. s may come out negative (the caller's
    business). No positive weight: s = t = 0.
    """
    return _align_anchored(points, target, weight, trunc, (0, 0, 1))


def align_scale_xyz_shift(points: Tensor, target: Tensor, weight: Tensor, trunc: float | None = None) -> tuple[Tensor, Tensor]:
    """As `align_scale_z_shift` with a shift along all three axes, the best among those that map some point exactly."""
    return _align_anchored(points, target, weight, trunc, (1, 1, 1))


def affine_lstsq(x: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least squares a, b (...) of sum_i w_i (a x_i + b - y_i)^2; x, y, weight: (..., n). All x equal: a = 0."""
    w = torch.ones_like(x) if weight is None else weight
    total = w.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    mx, my = (w * x).sum(-1, keepdim=True) / total, (w * y).sum(-1, keepdim=True) / total
    var = (w * (x - mx).square()).sum(-1)
    a = (w * (x - mx) * (y - my)).sum(-1) / torch.where(var > 0, var, 1.0)
    return a, my[..., 0] - a * mx[..., 0]


def nearest_index(n: int | Tensor, size: int, device=None) -> Tensor:
    """Indices (..., size), int64, that a nearest-neighbour resize of n entries to `size` picks (torch's mode="nearest").

    n: an int or a tensor (...) of counts. k * (n / size) is rounded to float32 before the floor, which matters for large n.
    """
    n = (n if isinstance(n, Tensor) else torch.tensor(n, device=device))[..., None]
    k = torch.arange(size, dtype=torch.float32, device=n.device)
    return torch.minimum((k * (n.float() / size)).floor().long(), (n - 1).clamp_min(0))


def _align_anchored(p: Tensor, g: Tensor, w: Tensor, trunc: float | None, shifted: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale (...) and shift (..., C) through the best anchor; p, g (..., n, C), w (..., n); `shifted`: 1 where a shift acts."""
    lead, (n, c) = p.shape[:-2], p.shape[-2:]
    p, g, w = p.reshape(-1, n, c), g.reshape(-1, n, c), w.expand(*lead, n).reshape(-1, n)
    if not len(p):
        return p.new_zeros(lead), p.new_zeros(*lead, c)
    with torch.no_grad():
        k, j = _search(p.detach().float(), g.detach().float(), w.detach().float(), trunc, shifted)
    m, axes = torch.arange(len(p), device=p.device), _axes(p, shifted)
    p1, g1 = p[m, k] * axes, g[m, k] * axes  # (M, C) the anchor
    dp, dg = p[m, j // c, j % c] - p1[m, j % c], g[m, j // c, j % c] - g1[m, j % c]
    some = (w > 0).any(-1)
    s = torch.where(some, dg / torch.where(dp == 0, 1.0, dp), 0.0)
    t = torch.where(some[:, None], g1 - s[:, None] * p1, 0.0)
    return s.reshape(lead), t.reshape(*lead, c)


def _axes(p: Tensor, shifted: tuple[int, ...]) -> Tensor:
    """`shifted` as a tensor (C,), made on p's device without a copy from the host."""
    return torch.stack([torch.full((), float(on), dtype=p.dtype, device=p.device) for on in shifted])


def _search(p: Tensor, g: Tensor, w: Tensor, trunc: float | None, shifted: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Best anchor k (M,) and the term j (M,) in 0..n*C-1 that the best scale makes zero; p, g (M, n, C), w (M, n).

    A row is a pair (problem m, anchor k), a problem in the scale alone. U is the least objective known so far.
    1. The anchor nearest to a weighted least-squares fit is solved exactly; it gives U and a first scale.
    2. Every row is evaluated at a few scales around that one, which may lower U, and bounded from below on the intervals between
       them and on the rays beyond. What cannot get below U is dropped; the rows left are bounded again on finer intervals.
    3. The few rows left are solved exactly.
    This proves the optimum over all anchors, up to 1e-6 of the objective. The number of rows left is read back from the device a
    few times; sorting all of them, which needs no such waiting, costs many times more, and a fixed number would prove nothing.
    """
    order, problem, axes = None, torch.arange(len(p), device=p.device), _axes(p, shifted)
    fullest = max(1, int((w > 0).sum(-1).max()))
    if fullest < w.shape[1]:  # leave out points without weight, as far as the fullest problem allows
        order = (w > 0).sort(dim=-1, descending=True, stable=True).indices[:, :fullest]
        p, g, w = p[problem[:, None], order], g[problem[:, None], order], w.gather(-1, order)
    best_k = _first_anchor(p, g, w, axes)
    x, y = _terms(p, g, w, axes, problem, best_k)
    best_j, best = _solve_rows(x, y, trunc)
    scale = y.gather(1, best_j[:, None]) / x.gather(1, best_j[:, None])  # (M, 1)
    scale = torch.where(scale.isfinite(), scale, 0.0)
    width = best[:, None].float() / x.abs().sum(1, keepdim=True).clamp_min(1e-30)
    lowest = best.float() * (1 + 2e-6)

    row_m, row_k = (w > 0).nonzero(as_tuple=True)
    sums, nodes, ray = None, scale + width * torch.stack([torch.full_like(best, q) for q in _NODES], 1).float(), None
    for _ in range(_ROUNDS):
        if sums is None:
            sums, nodes = _first_sums(p, g, w, shifted, row_m, row_k, trunc, nodes)
        else:
            sums = _in_chunks(_sums, p, g, w, axes, row_m, row_k, trunc, nodes)
        value, lower, ends = sums[0], _lower_bounds(*sums[:3]), sums[3]
        ray = ends.amin(1) if ray is None else ray  # (R,) bound of what lies outside the first nodes, for good
        lowest = lowest.scatter_reduce(0, row_m, value.amin(1) * (1 + 2e-6), "amin")
        bar = torch.minimum(lowest, best.float() * (1 - 1e-6))[row_m]
        alive = lower < bar[:, None]  # (R, S-1)
        bound = torch.minimum(ray, lower.amin(1))
        keep = (bound < bar).nonzero()[:, 0]
        alive, nodes, row_m, row_k, ray = alive[keep], nodes[keep], row_m[keep], row_k[keep], ray[keep]
        low = nodes.gather(1, alive.byte().argmax(1, keepdim=True))  # left end of the first interval alive
        high = nodes.gather(1, nodes.shape[1] - 1 - alive.flip(1).byte().argmax(1, keepdim=True))  # right end of the last one
        nodes = torch.lerp(low, high, torch.linspace(0, 1, 5, device=p.device))

    index, loss = _in_chunks(_solve_rows, p, g, w, axes, row_m, row_k, trunc)
    row_m, row_k = torch.cat([problem, row_m]), torch.cat([best_k, row_k])
    index, loss = torch.cat([best_j, index]), torch.cat([best, loss])
    best = best.scatter_reduce(0, row_m, loss, "amin")
    winner = torch.where(loss == best[row_m], torch.arange(len(loss), device=p.device), len(loss))
    winner = torch.full_like(best_k, len(loss)).scatter_reduce(0, row_m, winner, "amin")
    winner = winner.clamp_max(len(loss) - 1)  # a problem with NaN has no winner; its scale is NaN whatever is taken
    k, j = row_k[winner], index[winner]
    if order is not None:
        k, j = order[problem, k], order[problem, j // p.shape[2]] * p.shape[2] + j % p.shape[2]
    return k, j


def _first_sums(p, g, w, shifted, m: Tensor, k: Tensor, trunc: float | None, nodes: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """`_sums` of the rows (m, k) at the nodes (M, S) of their problems, and those nodes by row (R, S).

    The nodes are the same for all anchors of a problem; hence axes without a shift are summed once per problem.
    """
    moving, still = ([i for i, on in enumerate(shifted) if on == wanted] for wanted in (1, 0))
    common = _sums((p[..., still] * w[..., None]).flatten(1), (g[..., still] * w[..., None]).flatten(1), trunc, nodes)
    nodes = nodes[m]
    own = _in_chunks(_sums, p[..., moving], g[..., moving], w, _axes(p, (1,) * len(moving)), m, k, trunc, nodes)
    return tuple(a + b[m] for a, b in zip(own, common)), nodes


def _first_anchor(p: Tensor, g: Tensor, w: Tensor, axes: Tensor) -> Tensor:
    """Index (M,) of the point nearest to the weighted least-squares fit."""
    total = w.sum(1, keepdim=True).clamp_min(1e-30)[..., None]  # (M, 1, 1)
    x = p - (w[..., None] * p).sum(1, keepdim=True) / total * axes
    y = g - (w[..., None] * g).sum(1, keepdim=True) / total * axes
    s = (w[..., None] * x * y).sum((1, 2)) / (w[..., None] * x * x).sum((1, 2)).clamp_min(1e-30)
    error = (s[:, None, None] * x - y).abs().sum(-1)
    return torch.where(w > 0, error, torch.inf).argmin(1)


def _terms(p: Tensor, g: Tensor, w: Tensor, axes: Tensor, m: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted x, y (R, n*C) of the rows (m, k): the objective at scale s is sum min(T, |s x - y|)."""
    w = w[m][..., None]
    x = (p[m] - (p[m, k] * axes)[:, None]).mul_(w)
    y = (g[m] - (g[m, k] * axes)[:, None]).mul_(w)
    return x.flatten(1), y.flatten(1)


def _in_chunks(f, p: Tensor, g: Tensor, w: Tensor, axes: Tensor, m: Tensor, k: Tensor, *args) -> tuple[Tensor, ...]:
    """f(x, y, *args) on the terms of the rows (m, k), a few rows at a time so that the working set stays in the cache."""
    size = max(1, (2**25 if p.is_cuda else 2**16) // p[0].numel())
    parts = []
    for i in range(0, max(len(m), 1), size):
        part = slice(i, i + size)
        x, y = _terms(p, g, w, axes, m[part], k[part])
        parts.append(f(x, y, *(a[part] if isinstance(a, Tensor) else a for a in args)))
    return tuple(torch.cat(part) for part in zip(*parts))


def _sums(x: Tensor, y: Tensor, trunc: float | None, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the bounds of weighted terms x, y (R, L) at the nodes (R, S; ascending scales) are made of, each a sum over the terms.

    value (R, S): the objective F. gap0, gap1 (R, S-1): see `_lower_bounds`. ends (R, 2): lower bounds of F on the rays below and
    above the nodes, where terms that grow outwards keep at least their value, the others at least zero.
    """
    value, gap0, gap1, ends, before = [], [], [], [], None
    for i, s in enumerate(nodes.unbind(1)):
        e1 = (x * s[:, None]).sub_(y)
        a1 = e1.abs()
        f1 = a1 if trunc is None else a1.clamp_max(trunc)
        h1 = None if trunc is None else a1.clamp_min(trunc).reciprocal_().mul_(trunc)  # f = h a
        value.append(f1.sum(1))
        if before is not None:
            e0, a0, f0, h0 = before
            inside = (e0 * e1).sign_().clamp_(max=0)  # -1 where the term changes its sign
            gap0.append(-(2 * inside * a1 if trunc is None else (h0 * a1).add_(f1).mul_(inside)).sum(1))
            gap1.append(-(2 * inside * a0 if trunc is None else (h1 * a0).add_(f0).mul_(inside)).sum(1))
        if i in (0, nodes.shape[1] - 1):
            outward = (e1 * x if i else e1 * -x).sign_().clamp_(min=0)
            ends.append(outward.mul_(f1).sum(1))
        before = e1, a1, f1, h1
    return tuple(torch.stack(v, 1) for v in (value, gap0, gap1, ends))


def _lower_bounds(value: Tensor, gap0: Tensor, gap1: Tensor) -> Tensor:
    """Lower bounds (R, S-1) of the objective between neighbouring nodes.

    There each term is bounded by its convex envelope: a straight line or, when the term has its zero inside, two lines that meet
    at zero. The sum of the envelopes agrees with the objective at both nodes and lies above its tangents there, so above the
    point where these cross. The tangent at the left node passes below the right value by gap0, the one at the right node below
    the left value by gap1. Only terms with a zero inside contribute, so the bounds get tight fast.
    """
    v0, v1 = value[:, :-1], value[:, 1:]
    cross = v0 + gap1 * (v1 - v0 - gap0) / (gap0 + gap1).clamp_min(1e-30)
    return torch.minimum(torch.minimum(v0, v1), cross)


def _solve_rows(x: Tensor, y: Tensor, trunc: float | None) -> tuple[Tensor, Tensor]:
    """argmin over a of sum_i min(T, |a x_i - y_i|) for weighted x, y (..., n): index of the term made zero, objective (double).

    The objective is piecewise linear: its slope rises by 2 |x_i| at y_i / x_i and, truncated, falls by |x_i| at (y_i -+ T) / x_i.
    One sort of all these breakpoints and two running sums give the objective at each up to a constant; its global minimum lies
    on some y_i / x_i. In double precision, so that the sums may be compared.
    """
    n = x.shape[-1]
    x, y = x.double().abs(), y.double() * torch.where(x < 0, -1.0, 1.0)
    slope = torch.where(x > 0, x, 1.0)  # terms with x = 0 are constant: harmless breakpoints of height 0
    if trunc is None:
        order = (y / x.clamp_min(1e-12)).sort(dim=-1, stable=True).indices
        after = 2 * x.gather(-1, order).cumsum(-1) - x.sum(-1, keepdim=True)  # slope right of the k-th breakpoint
        index = order.gather(-1, (after >= 0).byte().argmax(-1, keepdim=True))
    else:
        key, order = torch.cat([y / slope, (y - trunc) / slope, (y + trunc) / slope], -1).sort(dim=-1)
        step = torch.cat([2 * x, -x, -x], -1).gather(-1, order)
        height = (step.cumsum(-1)[..., :-1] * key.diff(dim=-1)).cumsum(-1)
        height = torch.cat([torch.zeros_like(height[..., :1]), height], -1)
        zero = (order < n) & (step > 0)
        index = order.gather(-1, torch.where(zero, height, torch.inf).argmin(-1, keepdim=True)) % n
    a = y.gather(-1, index) / slope.gather(-1, index)
    loss = (a * x - y).abs()
    loss = (loss if trunc is None else loss.clamp_max(trunc)).sum(-1)
    return index[..., 0], loss
