"""The network of lbm/: its lean forms against plain formulas, padding, checkpointing, streaming, checkpoint files."""

import argparse
import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lbm import deform_attn, loss
from lbm.backbone import pool_pyramid, sample_tokens
from lbm.deform_attn import DeformableAttention, Levels, recompute, resolve_msda, sample
from lbm.model import LBM, LOSS_NAMES, Online, load_checkpoint, load_resnet18
from lbm.transformer import Layer, Upsample, attend

SIZE = (64, 96)


def small(seed=0, **config) -> LBM:
    """A small model whose attention offsets are not all equal and whose position embedding tells places apart."""
    torch.manual_seed(seed)
    model = LBM(**({"input_size": SIZE, "memory_size": 3, "visibility_threshold": 0.45} | config))
    with torch.no_grad():
        model.backbone.frame_pos_embedding.normal_(std=0.5)
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                module.sampling_offsets.weight.normal_(std=0.02)
                module.attention_weights.weight.normal_(std=0.05)
    return model


def clip(b=2, t=4, n=6, size=(48, 80), seed=1):
    """video uint8, queries, tracks, visible of random content."""
    g = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (b, t, 3, *size), generator=g, dtype=torch.uint8)
    wh = torch.tensor((size[1], size[0]))
    tracks = torch.rand(b, t, n, 2, generator=g) * wh
    time = torch.randint(0, 2, (b, n), generator=g)
    place = tracks.gather(1, time[:, None, :, None].expand(-1, 1, -1, 2)).squeeze(1)
    return video, torch.cat((time[..., None].float(), place), -1), tracks, torch.rand(b, t, n, generator=g) > 0.3


def levels_of(*shapes) -> Levels:
    hw = torch.tensor(shapes)
    return Levels(shapes, hw, torch.cat((torch.zeros(1, dtype=torch.int64), hw.prod(1).cumsum(0)[:-1])))


def gradients(out, inputs, weight):
    return torch.autograd.grad((out * weight).sum(), inputs)


def assert_same(got, want, tol):
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tol * max(1.0, b.abs().max().item())


# ------------------------------------------------------------------------------------------- correlation, loss


def test_correlation_and_classification_loss_against_the_plain_formula():
    """Values and gradients in float64: stack of resized cosine maps, 1x1 convolution, cross-entropy."""
    torch.manual_seed(0)
    b, n, shapes = 2, 3, ((6, 8), (3, 4), (2, 2), (1, 1))
    layer, upsample = Layer(2, 4, 3, 3, 0.0).double(), Upsample(shapes).double()
    cells = sum(h * w for h, w in shapes)
    x = torch.randn(b, n, 256, dtype=torch.float64, requires_grad=True)
    feat = torch.randn(b, cells, 256, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 48, (b, n))

    f = F.normalize(feat, dim=-1)
    maps = (F.normalize(x, dim=-1) @ f.mT).split([h * w for h, w in shapes], -1)
    resized = [
        F.interpolate(m.view(b, n, h, w), shapes[0], mode="bilinear", align_corners=False) for m, (h, w) in zip(maps, shapes)
    ]
    stack = torch.stack(resized, 2).flatten(0, 1)  # (B * N, 4, h, w)
    plain = layer.corr_conv(stack).view(b, n, -1) + maps[0]
    plain_loss = F.cross_entropy((plain / 0.05).flatten(0, 1), target.flatten())

    corr, log_sum, logit = layer.correlate(x, feat, 1 / feat.norm(dim=-1), upsample, target)
    assert_same([corr], [plain], 1e-6)  # q is normalised in float32
    ours = (log_sum - logit).mean()
    assert_same([ours], [plain_loss], 1e-6)
    inputs = [x, feat, layer.corr_conv.weight]
    assert_same(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain_loss, inputs), 2e-6)


def test_masked_mean_of_nothing_is_zero_with_a_graph():
    value = torch.tensor([float("nan"), 1.0], requires_grad=True)
    out = loss.masked_mean(value, torch.zeros(2, dtype=torch.bool))
    out.backward()
    assert out == 0 and torch.equal(value.grad, torch.zeros(2))


def test_recompute_gives_the_gradients_of_the_function_itself():
    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    run = lambda a, b: (a * b.sin(), a + 1)
    for used in (0, 1):
        want = torch.autograd.grad(run(a, b)[used].sum(), (a, b), allow_unused=True)
        got = torch.autograd.grad(recompute(run, a, b)[used].sum(), (a, b), allow_unused=True)
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(got, want))


# --------------------------------------------------------------------------------------------------- memories


def test_projected_memory_equals_the_plain_attention():
    """Entries projected once and added slot keys against nn.MultiheadAttention on memory + time embedding."""
    torch.manual_seed(0)
    layer = Layer(1, 4, 3, memory_size=5, dropout=0.0).eval()
    with torch.no_grad():
        layer.stream_attention.in_proj_bias.normal_()
        layer.stream_time_emb.normal_()
    memory, x = torch.randn(1, 6, 5, 256), torch.randn(1, 6, 256)
    ignore = torch.rand(1, 6, 5) > 0.5
    ignore[..., 2] = False
    emb = layer.stream_time_emb
    q = (x + emb[:, -1]).flatten(0, 1)[:, None]
    key = (memory + emb[:, None, :-1]).flatten(0, 1)
    want = layer.stream_attention(q, key, memory.flatten(0, 1), key_padding_mask=ignore.flatten(0, 1))[0].view(1, 6, 256)
    weights = layer.attention_weights()["stream"]
    entries = [F.linear(m, *weights.entry) for m in memory.unbind(2)]
    got = attend(F.linear(x + weights.now, *weights.query), weights.slot_keys, ignore, None, *entries, heads=4)
    assert_same([layer.stream_attention.out_proj(got)], [want], 2e-6)


def test_dead_points_keep_their_token_and_have_finite_gradients():
    model = small().eval()
    layer, lattice = model.transformer.layers[0], model.transformer.lattice("torch")
    x = torch.randn(1, 3, 256, requires_grad=True)
    feat = pool_pyramid(torch.randn(1, 16, 24, 256))
    ignore = torch.tensor([[[True, True], [True, False], [False, False]]])
    weights = layer.attention_weights()
    entries = [torch.randn(1, 3, 512) for _ in range(4)]
    inv = 1 / feat.norm(dim=-1)
    run = lambda *e: layer(x, feat, inv, ignore if e else None, None, None, weights, lattice, *e)[0]
    out = run(*entries)
    assert torch.equal(out[:, 0], run()[:, 0]) and not torch.equal(out[:, 1], run()[:, 1])
    assert torch.isfinite(torch.autograd.grad(out.sum(), x)[0]).all()


# ----------------------------------------------------------------------------------------- deformable attention


def by_grid_sample(value, offsets, attention, reference, levels):
    """The textbook form: grid_sample per level, all samples at once."""
    b, _, heads, d = value.shape
    n, k = reference.shape[1:3]
    wh = levels.hw.flip(-1).to(value.dtype)
    place = reference[:, :, :, None, :, None] + (offsets / wh[:, None])[:, :, None]  # (B, N, k, H, L, K, 2)
    out = 0
    for i, v in enumerate(value.split(levels.sizes, 1)):
        maps = v.permute(0, 2, 3, 1).reshape(b * heads, d, *levels.shapes[i])
        grid = (2 * place[..., i, :, :] - 1).permute(0, 3, 1, 2, 4, 5).reshape(b * heads, n * k, -1, 2)
        samples = F.grid_sample(maps, grid, align_corners=False).view(b, heads, d, n, k, -1)
        out = out + torch.einsum("bhdnkp,bnhp->bnkhd", samples, attention[:, :, :, i])
    return out


@pytest.mark.parametrize("shapes", [((6, 8), (3, 4), (2, 2)), ((24, 32), (12, 16), (2, 2))])
def test_reading_forms_agree(shapes):
    """Gathered rows, dense weights and grid_sample: values and gradients, points outside the map included."""
    torch.manual_seed(0)
    b, n, k, heads, points, dim = 2, 5, 3, 4, 3, 32
    levels = levels_of(*shapes)
    module = DeformableAttention(dim, heads, len(shapes), points, 0.0)
    feat = torch.randn(b, sum(levels.sizes), dim)
    offsets, attention = torch.randn(b, n, heads, len(shapes), points, 2) * 3, torch.rand(b, n, heads, len(shapes), points)
    tensors = (feat, module.value_proj.weight, module.value_proj.bias, offsets, attention, torch.rand(b, n, k, len(shapes), 2))

    def plain(feat, weight, bias, offsets, attention, reference):
        value = F.linear(feat, weight, bias).unflatten(-1, (heads, -1))
        return by_grid_sample(value, offsets, attention, reference, levels).flatten(-2)

    forms = {
        "plain": plain,
        "read_then_project": functools.partial(module._read_then_project, levels),
        "project_then_read": functools.partial(module._project_then_read, levels, "torch"),
        "recomputed": lambda *t: recompute(functools.partial(module._project_then_read, levels, "torch"), *t),
    }
    grad, results = torch.randn(b, n, k, dim), {}
    for name, form in forms.items():
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = form(*leaves)
        results[name] = (out.detach(), *gradients(out, leaves, grad))
    for name in forms:
        assert_same(results[name], results["plain"], 2e-5)


TRITON_SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from lbm.deform_attn import Levels, sample, resolve_msda
assert resolve_msda("triton", "cpu") == "triton"
shapes = ((5, 6), (2, 3))
levels = Levels(shapes, torch.tensor(shapes), torch.tensor([0, 30]))
torch.manual_seed(0)
tensors = [torch.randn(2, 36, 2, 6), torch.randn(2, 3, 2, 2, 3, 2) * 2, torch.rand(2, 3, 2, 2, 3), torch.rand(2, 3, 2, 2, 2)]
for dtype, tol in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
    tensors[0] = tensors[0].to(dtype)
    results = []
    for kernel in ("torch", "triton"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = sample(kernel, *leaves, levels)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for a, b in zip(*results):
        assert a.dtype == b.dtype and (a - b).abs().max() < tol * a.abs().max(), (dtype, (a - b).abs().max())
nan, inf = torch.tensor(float("nan")), torch.tensor(float("inf"))
tensors[3][0, 0], tensors[3][0, 1], tensors[1][1, 0] = nan, inf, nan  # read nothing outside the map, and leave the others alone
leaves = [t.clone().requires_grad_() for t in tensors]
out = sample("triton", *leaves, levels)
out[1, 1:].sum().backward()
assert out[0, 2].isfinite().all() and leaves[1].grad[1, 1:].isfinite().all()
print("same")
"""


def test_triton_kernels_in_the_interpreter(root):
    pytest.importorskip("triton")
    run = [sys.executable, "-c", TRITON_SCRIPT.format(root=str(root))]
    done = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_on_the_gpu(dtype):
    """Every kernel that works here, at the published size, against plain PyTorch in float32."""
    torch.manual_seed(0)
    shapes = ((96, 128), (48, 64), (24, 32), (12, 16))
    levels = Levels(*(x if i == 0 else x.cuda() for i, x in enumerate(levels_of(*shapes))))
    value = torch.randn(2, sum(levels.sizes), 4, 64, device="cuda").to(dtype)
    small_tensors = (
        torch.randn(2, 32, 4, 4, 9, 2, device="cuda") * 5,
        torch.rand(2, 32, 4, 4, 9, device="cuda"),
        torch.rand(2, 32, 9, 4, 2, device="cuda"),
    )
    weight, results = torch.randn(2, 32, 9, 4, 64, device="cuda"), {}
    usable = [k for k in ("torch", "triton", "mmcv") if not deform_attn._works(k, torch.device("cuda"))]
    assert "triton" in usable
    for kernel in usable:
        leaves = [t.clone().requires_grad_() for t in (value, *small_tensors)]
        out = sample(kernel, *leaves, levels)
        results[kernel] = [x.float() for x in (out, *gradients(out, leaves, weight))]
    for kernel in usable[1:]:
        assert_same(results[kernel], results["torch"], 1e-4 if dtype == torch.float32 else 1e-2)


def test_msda_choice():
    assert resolve_msda("auto", "cpu") == "torch" and resolve_msda("torch", "cpu") == "torch"
    with pytest.raises(ValueError, match="mmcv does not work on cpu"):
        resolve_msda("mmcv", "cpu")
    with pytest.raises(ValueError, match="not one of auto"):
        resolve_msda("cuda", "cpu")


def test_diverged_offsets_read_nothing_outside_the_map():
    levels = levels_of((3, 4))
    offsets = torch.full((1, 1, 1, 1, 2, 2), float("nan"))
    offsets[..., 1, :] = float("inf")
    for reference in (torch.rand(1, 1, 1, 1, 2), torch.full((1, 1, 1, 1, 2), float("nan"))):
        out, mass = deform_attn.sample_torch(torch.ones(1, 12, 1, 4), offsets, torch.ones(1, 1, 1, 1, 2), reference, levels)
        assert out.shape == (1, 1, 1, 1, 4) and torch.isfinite(mass).all()


# ------------------------------------------------------------------------------------------------- whole model


def test_inputs_are_not_modified_and_uint8_equals_float():
    model = small().eval()
    given = clip()
    copies = [t.clone() for t in given]
    with torch.no_grad():
        out = model(*given)
        same = model(given[0].float(), *given[1:])
        model.inference(*given[:2])
    assert all(torch.equal(a, b) for a, b in zip(given, copies))
    assert all(torch.equal(out[k], same[k]) for k in out)


@pytest.mark.parametrize("case", ["nothing visible", "all padded", "queried last"])
def test_batches_without_a_scored_point_give_zero_losses(case):
    model = small().train()
    video, queries, tracks, visible = clip()
    valid = None
    if case == "nothing visible":
        visible = torch.zeros_like(visible)
    elif case == "all padded":
        valid = torch.zeros(queries.shape[:2], dtype=torch.bool)
    else:
        queries[..., 0] = video.shape[1] - 1
    out = model(video, queries, tracks, visible, valid)
    zero = LOSS_NAMES if case != "nothing visible" else ("classification_loss", "regression_loss")
    assert all(out[name] == 0 for name in zero) and torch.isfinite(out["loss"])
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_changes_nothing():
    """The losses of valid points alone; the batch statistics of the backbone do not see points."""
    model = small(dropout=0.0, random_memory_mask_drop=0.0).train()
    video, queries, tracks, visible = clip()
    valid = torch.ones(queries.shape[:2], dtype=torch.bool)
    pad = lambda t, axis: torch.cat((t, torch.zeros_like(t.narrow(axis, 0, 2))), axis)
    want = model(video, queries, tracks, visible, valid)
    got = model(video, pad(queries, 1), pad(tracks, 2), pad(visible, 2), pad(valid, 1))
    assert_same([got[n] for n in LOSS_NAMES], [want[n] for n in LOSS_NAMES], 1e-5)
    assert_same([got["points"][:, :, :-2]], [want["points"]], 1e-4)


def test_points_do_not_interact():
    model = small().eval()
    video, queries, tracks, visible = clip()
    order = torch.randperm(queries.shape[1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out, permuted = (
            model(video, queries, tracks, visible),
            model(video, queries[:, order], tracks[:, :, order], visible[:, :, order]),
        )
    assert_same([permuted["points"]], [out["points"][:, :, order]], 1e-4)
    assert_same([permuted["loss"]], [out["loss"]], 1e-5)


def test_checkpointing_gives_the_same_gradients_and_statistics():
    """With dropout and random masks on: the second pass repeats the first, and updates no running statistics."""
    results = []
    for checkpointing in (False, True):
        model = small(checkpointing=checkpointing).train()
        torch.manual_seed(7)
        out = model(*clip(t=3))
        out["loss"].backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append((out["loss"].detach(), grads, dict(model.named_buffers())))
    (loss_a, grads_a, buffers_a), (loss_b, grads_b, buffers_b) = results
    assert torch.equal(loss_a, loss_b) and grads_a.keys() == grads_b.keys()
    assert_same([grads_b[k] for k in grads_a], list(grads_a.values()), 1e-5)
    assert all(torch.equal(buffers_a[k], buffers_b[k]) for k in buffers_a)
    assert buffers_b["backbone.layer1.1.num_batches_tracked"] == 1 and buffers_b["backbone.layer1.1.running_mean"].any()


def test_every_trained_parameter_gets_a_gradient():
    model = small(dropout=0.0).train()
    model(*clip())["loss"].backward()
    without = {k for k, p in model.named_parameters() if p.grad is None}
    last = len(model.transformer.layers) - 1
    assert without == {f"transformer.layers.{last}.reference_rho.{k}" for k in ("weight", "bias")}
    assert not any(p.requires_grad for k, p in model.named_parameters() if k in without)


def test_streaming_equals_inference():
    """Points of frame 0 in the stream against inference, whose frame 0 fills the memory: so its first entry is left out."""
    model = small().eval()
    video, queries, *_ = clip(b=1, t=6)
    queries[..., 0] = 0
    tracker = Online(model)
    tracker.init(queries[0, :, 1:], video[0, 0])
    whole = Online(model)
    whole.init(queries[0, :, 1:], video[0, 0])
    whole.step(video[0, 0])  # tracked through, as inference does
    want = model.inference(video, queries)
    for t in range(1, 6):
        points, visible, uncertainty = whole.step(video[0, t])
        assert_same([points, uncertainty], [want["points"][0, t], want["uncertainty"][0, t]], 1e-4)
        assert torch.equal(visible, want["visibility"][0, t])
        assert tracker.step(video[0, t])[0].shape == points.shape


def test_streaming_update_refreshes_drops_and_adds():
    model = small().eval()
    video, queries, *_ = clip(b=1, t=5)
    points = queries[0, :, 1:]
    tracker = Online(model)
    tracker.init(points, video[0, 0])
    for t in (1, 2):
        tracker.step(video[0, t])
    new = torch.tensor([[10.0, 12.0], [40.0, 20.0], [5.0, 30.0]])
    update, remove = torch.zeros(2, 6, dtype=torch.bool)
    update[[1, 4]], remove[[0, 4]] = True, True  # 4 is both: removed
    feat = tracker.frame_feat
    tracker.update(new, feat, update, remove)
    track = tracker.track
    assert track.token.shape == (1, 6, 256)  # 4 stay, 1 of them refreshed, 2 new
    fresh = torch.tensor([True, False, False, False, True, True])
    assert all(torch.equal(entry["ignore"][0] | ~fresh, torch.ones(6, dtype=torch.bool)) for entry in track.memory)
    got = tracker.step(video[0, 3])[0]
    other = Online(model)
    other.init(new, video[0, 2])
    assert_same([got[fresh]], [other.step(video[0, 3])[0]], 1e-4)
    with pytest.raises(ValueError, match="to be refreshed"):
        tracker.update(new[:0], feat, torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool))


def test_no_points_at_all():
    """A video without ground truth; a stream before its first point, and after its last."""
    model = small().eval()
    video, queries, *_ = clip(b=1, t=5)
    out = model.inference(video, queries[:, :0])
    assert out["points"].shape == (1, 5, 0, 2) and out["visibility"].shape == out["uncertainty"].shape == (1, 5, 0)
    tracker, points = Online(model), queries[0, :2, 1:]
    none = torch.zeros(0, dtype=torch.bool)
    for t, (given, gone) in enumerate(((points[:0], none), (points, none), (points[:0], ~torch.zeros(2, dtype=torch.bool)))):
        if t == 0:
            tracker.init(given, video[0, 0])
        else:
            tracker.update(given, tracker.frame_feat, torch.zeros_like(gone), gone)
        assert tracker.step(video[0, t])[0].shape == given.shape
    tracker.update(points, tracker.frame_feat, none, none)
    other = Online(model)
    other.init(points, video[0, 2])
    assert_same([tracker.step(video[0, 3])[0]], [other.step(video[0, 3])[0]], 1e-4)


@pytest.mark.parametrize("query", [(0.5, 3, 3), (-1, 3, 3), (4, 3, 3), (0, float("nan"), 3)])
def test_inference_refuses_queries_of_no_frame(query):
    video = clip(b=1)[0]
    with pytest.raises(ValueError, match="whole frame of the video, 0 to 3"):
        small().eval().inference(video, torch.tensor([[query]]))


def test_inference_in_chunks_and_with_the_spatial_penalty():
    model = small().eval()
    video, queries, *_ = clip()
    queries[..., 0] = 0
    out, chunked = model.inference(video, queries), model.inference(video, queries, chunk=4)
    assert_same([chunked["points"]], [out["points"]], 1e-4)
    far, near = model.inference(video, queries, spatial_penalty=1e6), model.inference(video, queries, spatial_penalty=0.2)
    assert_same([far["points"]], [out["points"]], 1e-3)
    jump = lambda x: (x["points"][:, 3] - x["points"][:, 2]).norm(dim=-1).mean()
    assert jump(near) < jump(out)


def test_memory_size_changes_a_copy_only():
    model = small().train()
    model.compile_step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    longer = model.with_memory_size(7)
    assert longer.transformer.layers[0].stream_time_emb.shape == (1, 8, 256) and not longer.training
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    same = model.with_memory_size(model.memory_size).state_dict()
    assert all(torch.equal(before[k], same[k]) for k in before)
    assert longer.inference(*clip()[:2])["points"].isfinite().all()  # in plain form


def test_bf16_is_close_to_float32():
    torch.manual_seed(0)
    model = small().eval()
    given = clip()
    with torch.no_grad():
        want = model(*given)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(*given)
    assert got["loss"].dtype == torch.float32
    for name in LOSS_NAMES:
        assert abs(got[name] - want[name]) < 0.05 * want[name].abs() + 0.05, name
    assert (got["points"] - want["points"]).norm(dim=-1).median() < 1.0
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*given)
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padded_memory_of_the_compiled_step_changes_nothing():
    """A compiled model is given ignored zero entries until its memory is full."""
    model = small().eval()
    video, queries, *_ = clip()
    want = model.inference(video, queries)
    model.static_memory = True
    assert_same([model.inference(video, queries)["points"]], [want["points"]], 1e-4)


@pytest.mark.parametrize("amp", [False, True])
def test_compiled_step_is_one_graph_per_layer_and_changes_nothing(amp):
    """Traced whole (fullgraph refuses a break), run by the plain backend: code generation is not what is tested here."""
    torch._dynamo.reset()  # a process may compile a function only so many times
    model = small(dropout=0.0, random_memory_mask_drop=0.0, top_k_regions=3).train()
    given = clip(t=4)
    losses, grads, graphs, dtypes = [], [], [], set()
    model.transformer.register_forward_hook(lambda module, inputs, out: dtypes.update(x.dtype for x in out["corr"]))

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    for compiled in (False, True):
        if compiled:
            model.compile_step(backend=backend, fullgraph=True)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = model(*given)
        out["loss"].backward()
        losses.append(out["loss"].detach())
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(graphs) == 2 * 3 + 1 and dtypes == {torch.float32}  # a layer with and without memory, the heads
    assert_same(losses[1:], losses[:1], 1e-5)
    assert_same(grads[1], grads[0], 1e-3)


def test_query_tokens_equal_grid_sample():
    f = torch.randn(3, 2, 4, 6, 256)
    queries = torch.rand(2, 9, 3) * torch.tensor((3.0, 24.0, 16.0))
    queries[..., 0].floor_()
    queries[:, 0, 1:], queries[:, 1, 1:] = 0, torch.tensor((24.0, 16.0))
    got = sample_tokens(f, queries, (16, 24))
    for b in range(2):
        for n in range(9):
            t, x, y = queries[b, n]
            grid = torch.stack((2 * x / 24 - 1, 2 * y / 16 - 1)).view(1, 1, 1, 2)
            want = F.grid_sample(f[int(t), b].permute(2, 0, 1)[None], grid, padding_mode="border", align_corners=False)
            assert_same([got[b, n]], [want.flatten()], 1e-5)


def test_constructor_refuses_what_cannot_be():
    wrong = {"num_layers": 1, "input_size": (30, 64), "embed_dim": 128, "stride": 8, "num_levels": 3, "num_neighbors": 0}
    wrong |= {"top_k_regions": 5000, "memory_size": 0, "dropout": 1.0, "visibility_threshold": 2}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            LBM(**({"input_size": SIZE} | {name: value}))


# ------------------------------------------------------------------------------------------------- checkpoints


def test_official_checkpoint_forms_load(tmp_path):
    model = small()
    state = model.state_dict()
    forms = {
        "released": {"model": state},
        "training": {
            "model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"state": {}, "param_groups": []}, "epoch": 7,
            "scaler": None, "args": argparse.Namespace(lr=5e-4, name="x"),
        },
        "bare": state,
    }  # fmt: skip
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        other = small(seed=5)
        found = load_checkpoint(other, tmp_path / name)
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
        assert found["notes"] == []
        assert found["epoch"] == (7 if name == "training" else None)


def test_memory_of_another_size_is_interpolated_with_a_note(tmp_path):
    model = small(memory_size=4).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(*clip())["loss"].backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "four.pt")
    other = small(seed=5, memory_size=7)
    loaded = load_checkpoint(other, tmp_path / "four.pt")
    assert len(loaded["notes"]) == 2 * len(other.transformer.layers) and "from 4 to 7" in loaded["notes"][0]
    want = model.with_memory_size(7).transformer.layers[1].collision_time_emb
    assert torch.equal(other.transformer.layers[1].collision_time_emb, want)
    parameters = list(other.parameters())  # and so are their moments, which a fused optimizer reads by the parameters' shapes
    for number, state in loaded["optimizer"]["state"].items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameters[number].shape


def test_misfit_and_damaged_checkpoints_are_named(tmp_path):
    model, path = small(), tmp_path / "weights.pt"
    state = model.state_dict()
    before = {k: v.clone() for k, v in state.items()}

    def refused(content, match, error=ValueError):
        torch.save(content, path)
        with pytest.raises(error, match=match) as caught:
            load_checkpoint(model, path)
        assert str(path) in str(caught.value)

    refused({"model": {k: v for k, v in state.items() if k != "backbone.proj2.bias"}}, "missing backbone.proj2.bias")
    refused({"model": state | {"transformer.extra": torch.zeros(1)}}, "unexpected transformer.extra")
    refused({"model": state | {"backbone.proj2.bias": torch.zeros(3)}}, r"proj2.bias is \(3,\)")
    refused({"model": small(input_size=(96, 96)).state_dict()}, r"input_size \[96, 96\], the model has \[64, 96\]")
    refused({"model": state, "hook": pytest.importorskip}, "more than tensors")
    refused([1, 2], "holds a list")
    refused({"note": "nothing"}, "holds no weights")
    torch.save({"model": state}, path)
    whole = path.read_bytes()
    for quarter in range(4):
        path.write_bytes(whole[: len(whole) * quarter // 4])
        with pytest.raises(ValueError, match=r"weights\.pt"):
            load_checkpoint(model, path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, tmp_path / "none.pt")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_torchvision_resnet18_loads(tmp_path):
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    torch.manual_seed(3)
    net = resnet18().eval()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    model = small().eval()
    notes = load_resnet18(model, tmp_path / "resnet18.pth")
    assert len(notes) == 1 and "ResNet-18" in notes[0]
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))
        got = model.backbone.layer3(model.backbone.layer2(model.backbone.layer1(x)))
    assert_same([got], [want], 1e-5)
    torch.save({k: v for k, v in net.state_dict().items() if not k.startswith("layer3.1")}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth.*missing layer3\.1"):
        load_resnet18(model, tmp_path / "part.pth")
