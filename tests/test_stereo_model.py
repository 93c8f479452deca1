"""The stereo network's parts against plain formulas, and what its training relies on."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.checkpoint import load_weights
from stereo import blocks, codec, cost_volume, ema, gru, loss, metrics, schedule, weights
from stereo.aggregation import AxialPlanarConv, DisparityTransformer
from stereo.depth_anything import two_resizes
from stereo.model import FoundationStereo, UpsampleStem, convex_upsample, hierarchical, pad, padding, predict

TINY = {"vit_size": None, "max_disp": 32, "hidden_dims": (32, 32, 32), "n_gru_layers": 2, "volume_dim": 8}


def tiny(**options) -> FoundationStereo:
    torch.manual_seed(0)
    return FoundationStereo(**{**TINY, **options})


def pair(batch=2, H=32, W=64, shift=4):
    """A random texture and its view with constant disparity `shift`."""
    left = 255 * torch.rand(batch, 3, H, W, generator=torch.Generator().manual_seed(1))
    return left, left.roll(-shift, -1)


def truth(left, shift=4.0):
    gt = torch.full_like(left[:, :1], shift)
    return gt, torch.ones_like(gt, dtype=torch.bool)


def randomise(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Give norms and layer scales values at which a mistake would show."""
    g = torch.Generator().manual_seed(2)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.dim() < 2 and value.is_floating_point():
            value.data = std * torch.randn(value.shape, generator=g) + (1.0 if "bias" not in name and "mean" not in name else 0.0)
            if "var" in name:
                value.data.abs_().add_(0.1)
    return module


def training_loss(model, left, right, iters=2):
    gt, valid = truth(left)
    out = model(left, right, iters=iters)
    return loss.foundation_stereo_loss(out["init"], out["preds"], gt, valid, model.max_disp)[0]


# --- the network as a whole ---------------------------------------------------------------------------------------------


def test_checkpointing_keeps_less_and_changes_nothing():
    plain, (left, right), kept = tiny(), pair(), []
    recomputed = copy.deepcopy(plain)
    recomputed.set_checkpointing(True)
    for model in (plain, recomputed):
        model.train()
        storages = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t
            return t

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            torch.manual_seed(3)  # dropout of the disparity transformer
            value = training_loss(model, left, right)
        kept.append(sum(t.untyped_storage().nbytes() for p, t in storages.items() if p not in own))
        value.backward()
    assert kept[1] < 0.55 * kept[0]
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters()):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()) + 1e-7, msg=name)
    for (name, a), b in zip(plain.named_buffers(), recomputed.buffers()):
        torch.testing.assert_close(a, b, msg=f"{name}: a recomputed unit updated its statistics twice")
    tracked = [b for n, b in recomputed.named_buffers() if n == "classifier.0.bn.num_batches_tracked"]
    assert tracked == [1]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_training_changes_nothing_and_reaches_every_parameter(dtype):
    """Losses and gradients of the compiled update block, without and with checkpointing, against the plain ones."""
    model, (left, right) = tiny(n_gru_layers=3).train(), pair()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif hasattr(m, "gamma"):
            m.gamma.data.fill_(0.3)  # the layer scale hides what is behind it at its initial 1e-6
    results = []
    for compiled, checkpointing in ((False, False), (True, False), (True, True)):
        if compiled and not checkpointing:
            model.compile_step(backend="aot_eager", fullgraph=True)
        model.set_checkpointing(checkpointing)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = model(left, right, iters=3)
        value = loss.foundation_stereo_loss(out["init"], out["preds"], *truth(left), model.max_disp)[0]
        value.backward()
        results.append((value.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (value, plain), close = results[0], 1e-3 if dtype is None else 0.05
    # a bias before an instance norm has no gradient but rounding
    rounding = (1e-5 if dtype is None else 1e-4) * torch.stack([g.norm() for g in plain.values()]).norm()
    for other, gradients in results[1:]:
        assert torch.allclose(value, other, rtol=1e-5 if dtype is None else 1e-2)
        for name, gradient in gradients.items():
            assert gradient.any(), f"{name}: no gradient"
            assert (gradient - plain[name]).norm() <= close * plain[name].norm() + rounding, name


def test_outputs_shapes_and_modes():
    model, (left, right) = tiny().train(), pair(H=64)
    out = model(left, right, iters=3)
    assert out["init"].shape == (2, 1, 16, 16) and [p.shape for p in out["preds"]] == [(2, 1, 64, 64)] * 3
    model.eval()
    with torch.no_grad():
        every = model(left, right, iters=3, every_iteration=True)["preds"]
        last = model(left, right, iters=3)["preds"]
        assert len(last) == 1 and torch.equal(last[0], every[2])
        start = torch.full((2, 1, 16, 16), 1.5)
        given = model(left, right, iters=1, init_disp=start)
        assert torch.equal(given["init"], start) and not torch.equal(given["preds"][0], every[0])


def test_bad_arguments_are_named():
    model, (left, right) = tiny(), pair()
    for images in ((left[..., :60], right[..., :60]), (left, right[:, :, :, :32])):
        with pytest.raises(ValueError, match="multiple of 32"):
            model(*images)
    with pytest.raises(ValueError, match="iters"):
        model(left, right, iters=0)
    for options, word in (
        ({"max_disp": 100}, "max_disp"),
        ({"hidden_dims": (32, 64, 32)}, "hidden_dims"),
        ({"n_gru_layers": 1}, "n_gru_layers"),
    ):
        with pytest.raises(ValueError, match=word):
            tiny(**options)
    with pytest.raises(ValueError, match="lookup levels"):
        tiny(corr_levels=4)(left, right)


def test_frozen_parts_stay_frozen():
    with torch.device("meta"):
        model = FoundationStereo("vits", max_disp=64, bn_frozen=True)
    model.train()
    assert not any(m.training for m in model.feature.dino.modules())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d))
    frozen = ("feature.dino.", "stem_4.", "context_zqr_convs.", "cnet.down.", "cnet.norm.")
    assert all(p.requires_grad != n.startswith(frozen) for n, p in model.named_parameters())
    assert model.classifier[0].bn.weight.requires_grad and model.cost_agg.atts["4"].sa[0].dropout.training


def test_frozen_batch_norm_trains_scale_and_shift_but_not_statistics():
    model, (left, right) = tiny(bn_frozen=True).train(), pair()
    before = {k: v.clone() for k, v in model.named_buffers()}
    training_loss(model, left, right).backward()
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
    assert model.classifier[0].bn.weight.grad.abs().sum() > 0


def test_autocast_keeps_disparities_in_float32():
    model, (left, right) = tiny().eval(), pair()
    with torch.no_grad():
        want = model(left, right, iters=2)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(left, right, iters=2)
    assert got["init"].dtype == got["preds"][0].dtype == torch.float32
    torch.testing.assert_close(got["init"], want["init"], atol=0.1, rtol=0.05)
    torch.testing.assert_close(got["preds"][0], want["preds"][0], atol=0.5, rtol=0.05)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(left, right, iters=2)
    loss.foundation_stereo_loss(out["init"], out["preds"], *truth(left), 32)[0].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_few_steps_bring_the_loss_down():
    model, (left, right) = tiny().train(), pair(H=32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(12):
        optimizer.zero_grad(set_to_none=True)
        value = training_loss(model, left, right)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        values.append(value.item())
    assert min(values[-3:]) < 0.6 * values[0], values


def test_any_size_and_hierarchical_inference():
    model, (left, right) = tiny().eval(), pair(batch=1, H=70, W=101)
    with torch.no_grad():
        assert predict(model, left, right, iters=1).shape == (1, 1, 70, 101)
        quirk, fixed = (hierarchical(model, left, right, 1, pad_fix=f) for f in (False, True))
        assert quirk.shape == (1, 1, 70, 101) and not torch.equal(quirk, fixed)
        left, right = left[..., :64, :96], right[..., :64, :96]
        quirk, fixed = (hierarchical(model, left, right, 1, pad_fix=f) for f in (False, True))
        assert torch.equal(quirk, fixed)  # nothing to pad, nothing to fix


def test_padding_replicates_the_border():
    pads = padding(33, 60, 32)
    padded = pad(torch.arange(60.0).expand(1, 1, 33, 60), pads)
    assert padded.shape == (1, 1, 64, 64) and padded[0, 0, 0, 0] == 0 and padded[0, 0, -1, -1] == 59
    assert padding(33, 60, 32, force_square=True) == (2, 2, 15, 16)


def test_low_memory_inference_is_close():
    model, (left, right) = tiny().eval(), pair(H=64)
    with torch.no_grad():
        want = model(left, right, iters=2)["preds"][0]
        model.low_memory = True
        torch.testing.assert_close(model(left, right, iters=2)["preds"][0], want, atol=2e-2, rtol=1e-3)


# --- exact re-associations against the plain formulas -------------------------------------------------------------------


@pytest.mark.parametrize("n_disp", [5, 12, 20])
def test_cost_volumes(n_disp):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 2, 16, 3, 12, generator=g, dtype=torch.float32)
    want = torch.zeros(2, 8, n_disp, 3, 12)
    moved = torch.zeros(2, 16, n_disp, 3, 12)
    l, r = (F.normalize(t.view(2, 8, 2, 3, 12), dim=2) for t in (left, right))
    for i in range(min(n_disp, 12)):
        want[:, :, i, :, i:] = (l[..., i:] * r[..., : 12 - i]).sum(2)
        moved[:, :, i, :, i:] = right[..., : 12 - i]
    torch.testing.assert_close(cost_volume.group_correlation(left, right, n_disp, 8), want)
    torch.testing.assert_close(cost_volume.shifted_planes(right, n_disp), moved)
    stem = randomise(cost_volume.CostStem(8, 16, 8)).eval()
    plain = stem[0](torch.cat([want, left.unsqueeze(2).expand(-1, -1, n_disp, -1, -1), moved], 1))
    for unit in list(stem)[1:]:
        plain = unit(plain)
    torch.testing.assert_close(stem(want, left, right), plain, atol=1e-5, rtol=1e-5)


def plain_lookup(volume, centre, radius):
    """Tent weights over all planes: the definition of linear interpolation with zeros outside."""
    position = centre.unsqueeze(2) + torch.arange(-radius, radius + 1).view(1, 1, -1, 1, 1)  # (B, 1, taps, h, w)
    planes = torch.arange(volume.shape[2]).view(1, 1, 1, -1, 1, 1)
    weight = (1 - (position.unsqueeze(3) - planes).abs()).clamp(min=0)  # (B, 1, taps, n, h, w)
    return (weight * volume.unsqueeze(2)).sum(3)


def test_lookup_and_its_gradient_over_several_calls():
    g = torch.Generator().manual_seed(0)
    volume = torch.randn(2, 3, 11, 2, 9, generator=g, requires_grad=True)
    left, right = (torch.randn(2, 4, 2, 9, generator=g).requires_grad_() for _ in range(2))
    disps = [16 * torch.rand(2, 1, 2, 9, generator=g) - 3 for _ in range(3)]
    lookup = cost_volume.CostLookup(volume, left, right, 2, 4)
    l, r = F.normalize(left, dim=1), F.normalize(right, dim=1)
    pairs = torch.einsum("bchp,bchx->bphx", r, l).unsqueeze(1)
    x, total, want = torch.arange(9.0), 0, 0
    for d in disps:
        features, parts = lookup(d), []
        for i in range(2):
            for v, centre in ((volume, d), (pairs, x - d)):
                v = v if i == 0 else F.avg_pool3d(v, (2, 1, 1))
                parts.append(plain_lookup(v, centre / 2**i, 4).flatten(1, 2))
        torch.testing.assert_close(features, torch.cat(parts, 1), atol=1e-5, rtol=1e-4)
        weight = torch.randn(features.shape, generator=g)
        total, want = total + (features * weight).sum(), want + (torch.cat(parts, 1) * weight).sum()
    inputs = (volume, left, right)
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(want, inputs)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_lookup_finds_the_match():
    left = torch.randn(1, 16, 2, 24, generator=torch.Generator().manual_seed(0))
    lookup = cost_volume.CostLookup(torch.zeros(1, 4, 8, 2, 24), left, left.roll(-3, -1), 1, 4)
    features = lookup(torch.full((1, 1, 2, 24), 2.0))[:, 4 * 9 :]  # correlation at right x - 2 + (-4 .. 4)
    assert (features[..., 6:18].argmax(1) == 3).all()  # tap -1: disparity 3
    far = lookup(torch.full((1, 1, 2, 24), 1e30))
    assert torch.equal(far, torch.zeros_like(far))


def test_soft_argmin_of_a_peak():
    logits = torch.zeros(1, 8, 2, 2)
    logits[:, 5] = 50.0
    torch.testing.assert_close(cost_volume.soft_argmin(logits), torch.full((1, 1, 2, 2), 5.0))


def test_convex_upsampling():
    logits = torch.randn(2, 9, 24, 32, generator=torch.Generator().manual_seed(0))
    up = convex_upsample(torch.full((2, 1, 6, 8), 2.5), logits)
    torch.testing.assert_close(up[..., 4:-4, 4:-4], torch.full((2, 1, 16, 24), 10.0))  # the border mixes with zeros
    centre = torch.full((1, 9, 8, 8), -100.0)
    centre[:, 4] = 100.0
    disp = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    torch.testing.assert_close(convex_upsample(disp, centre), 4 * F.interpolate(disp, scale_factor=4, mode="nearest"))


def test_upsample_stem_equals_concatenation():
    stem, mask = UpsampleStem(8, 6), torch.randn(1, 8, 4, 5)
    detail = torch.randn(1, 6, 8, 10)
    want = stem.conv2(torch.cat([stem.conv1(mask), detail], 1))
    torch.testing.assert_close(stem(mask, stem.prepare(detail)), want)


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
        (nn.Conv3d(4, 4, 4, stride=4, groups=4), (2, 4, 8, 8, 4)),
        (nn.ConvTranspose3d(4, 6, 4, stride=2, padding=1, bias=False), (2, 4, 3, 4, 2)),
    ],
)
def test_folded_norm_equals_norm_after_convolution(conv, shape):
    norm = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d
    bn, x = randomise(norm(conv.out_channels)), torch.randn(shape)
    torch.testing.assert_close(blocks.conv_bn(conv, bn.eval(), x), bn(conv(x)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("conv", "shape"), [(nn.Conv2d(3, 5, 1, stride=2), (2, 3, 7, 6)), (nn.Conv3d(4, 2, 1, bias=False), (2, 4, 3, 5, 6))]
)
def test_pointwise_convolutions_equal_the_plain_ones(conv, shape):
    conv = conv.double()
    mine, theirs = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for _ in range(2))
    a, b = blocks.convolve(conv, mine.requires_grad_(), conv.weight, conv.bias), conv(theirs.requires_grad_())
    assert torch.allclose(a, b)
    weights = torch.randn(a.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * weights).sum(), [x, *conv.parameters()]) for x, y in ((mine, a), (theirs, b))]
    assert all(torch.allclose(*pair) for pair in zip(*gradients))


class Pointwise(TorchDispatchMode):
    """Collects the kernels and strides of the convolutions with kernels of one pixel that are strided or in three dimensions."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.unsafe = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            kernel, stride = args[1].shape[2:], args[3]
            self.seen += 1
            if max(kernel) == 1 and (len(kernel) > 2 or max(stride) > 1):
                self.unsafe.append((tuple(args[1].shape), stride))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_no_convolution_of_one_pixel_is_strided_or_three_dimensional(frozen):
    """Their backward passes write out of bounds on the CPU (oneDNN in torch 2.11, seen in the network under bf16)."""
    model = tiny(n_gru_layers=3, bn_frozen=frozen).train()
    left, right = pair(1, 64, 64)
    with Pointwise() as calls, torch.autocast("cpu", torch.bfloat16):
        model(left, right, iters=1)
    assert calls.seen > 100 and calls.unsafe == []


def test_backward_pass_of_pointwise_convolutions_stays_in_its_memory():
    """In a process of its own, whose allocator checks the borders of every block; the plain convolution does not survive it."""
    code = """
import torch
from torch import nn
from stereo.blocks import BatchResidual, ConvBlock
torch.set_num_threads(1)
for unit, shape in ((ConvBlock(nn.Conv3d(8, 8, 1, bias=False)), (1, 8, 8, 96, 128)), (BatchResidual(8, 12, 2), (1, 8, 96, 128))):
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(torch.randn(shape, dtype=torch.bfloat16, requires_grad=True))
    y.float().square().sum().backward()
print("unharmed")
"""
    assert "unharmed" in run("-c", code, LD_PRELOAD="libc_malloc_debug.so.0", MALLOC_CHECK_="3", PYTHONPATH=".")


@pytest.mark.parametrize("planes", [1, 2, 6, 30])
def test_axial_planar_convolution(planes):
    apc, x = randomise(AxialPlanarConv(4)), torch.randn(2, 4, planes, 3, 5)
    for mode in (True, False):
        apc.train(mode)
        plain = copy.deepcopy(apc)
        want = plain.conv2(plain.conv1(x).relu()).relu()
        torch.testing.assert_close(apc(x), want, atol=1e-5, rtol=1e-4)


def test_lean_mlp():
    up, down, x = nn.Linear(6, 24), nn.Linear(24, 6), torch.randn(2, 3, 6, requires_grad=True)
    inputs = (x, *up.parameters(), *down.parameters())
    want = torch.autograd.grad(down(F.gelu(up(x))).square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(blocks.lean_mlp(up, down, x).square().sum(), inputs), want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_selective_gru():
    unit, g = gru.SelectiveGRU(4, 12), torch.Generator().manual_seed(0)
    context, one, two, h = (torch.randn(1, 4, 5, 6, generator=g) for _ in range(4))
    attention = torch.rand(1, 1, 5, 6, generator=g)
    x = unit.conv0(torch.cat([context, one, two], 1))
    hx, states = unit.conv1(torch.cat([x, h], 1)), []
    for cell in (unit.small_gru, unit.large_gru):
        z, r = cell.convz(hx).sigmoid(), cell.convr(hx).sigmoid()
        states.append((1 - z) * h + z * cell.convq(torch.cat([r * h, x], 1)).tanh())
    want = states[0] * attention + states[1] * (1 - attention)
    torch.testing.assert_close(unit(attention, h, unit.prepare(context), one, two), want, atol=1e-6, rtol=1e-4)


def test_two_resizes_are_one_matrix():
    x = torch.randn(1, 3, 16, 24)
    want = F.interpolate(x, size=(28, 42), mode="bilinear", align_corners=True)
    want = F.interpolate(want, size=(9, 30), mode="bilinear", align_corners=True)
    rows, columns = two_resizes(16, 28, 9, x.device), two_resizes(24, 42, 30, x.device)
    torch.testing.assert_close(rows @ (x @ columns.T), want, atol=1e-5, rtol=1e-4)


def test_attention_axis():
    x, model = torch.randn(1, 8, 6, 2, 2), DisparityTransformer(8).eval()
    other = copy.deepcopy(x)
    other[:, :, 5] += torch.randn(1, 8, 2, 2)  # no constant: the layer norms would remove it
    assert (model(x)[:, :, 0] - model(other)[:, :, 0]).abs().max() > 1e-4  # planes see each other
    for layer in model.sa:
        layer.self_attn.over_heads = True
    assert torch.equal(model(x)[:, :, 0], model(other)[:, :, 0])  # over the heads they do not


# --- losses, metrics, codecs, weights -----------------------------------------------------------------------------------


def loss_forms():
    return {
        "l1": lambda p, g, m: loss.disparity_l1_loss(p, g, m, max_disparity=20.0),
        "smooth": lambda p, g, m: loss.disparity_smooth_l1_loss(p, g, m, per_sample_mean=True),
        "gradient": lambda p, g, m: loss.gradient_loss(p, g, m, signed=True),
        "multi": lambda p, g, m: loss.multi_scale_loss(loss.disparity_pyramid(p), g, m, [0.5, 0.7, 1.0]),
        "sequence": lambda p, g, m: loss.foundation_stereo_loss(
            F.avg_pool2d(p[:, None], 4) / 4, [p[:, None]] * 2, g, m, 20.0, gamma_mode="adjusted"
        ),
    }


@pytest.mark.parametrize("name", loss_forms())
def test_losses_with_nothing_valid_and_with_nan_truth(name):
    function, pred = loss_forms()[name], torch.rand(2, 8, 12).requires_grad_()
    gt, mask = torch.full((2, 8, 12), torch.nan), torch.zeros(2, 8, 12, dtype=torch.bool)
    value, _ = function(pred, gt, mask)
    value.backward()
    assert value == 0 and torch.equal(pred.grad, torch.zeros_like(pred))
    mask[:, 2:6], gt[:, 2:6] = True, 1.5
    pred.grad = None
    value, logged = function(pred, gt, mask)
    value.backward()
    assert value > 0 and pred.grad.isfinite().all() and pred.grad.abs().sum() > 0
    assert all(v.isfinite().all() and not v.requires_grad for v in logged.values())


def test_loss_formulas():
    pred, gt = torch.tensor([[[2.0, 5.0, 1.0]]]), torch.tensor([[[2.5, 2.0, 30.0]]])
    mask = torch.ones_like(gt, dtype=torch.bool)
    assert loss.disparity_l1_loss(pred, gt, mask, max_disparity=20.0)[0] == pytest.approx((0.5 + 3) / 2)
    assert loss.disparity_smooth_l1_loss(pred, gt, mask, max_disparity=20.0)[0] == pytest.approx((0.125 + 2.5) / 2)
    clamped = loss.disparity_l1_loss(pred, gt, mask, max_disparity=4.0, clamp_prediction=True)[0]
    assert clamped == pytest.approx((0.5 + 2 + 29) / 3)  # the mask is untouched, the prediction is cut
    assert loss.gradient_loss(pred, gt, mask)[0] == pytest.approx(0.5 * (2.5 + 24) / 2)
    assert loss.gradient_loss(pred, gt, mask, signed=True)[0] == pytest.approx(0.5 * (3.5 + 32) / 2)
    two = torch.stack([pred[0], gt[0]]), torch.stack([gt[0], gt[0]]), torch.stack([mask[0], mask[0]])
    two[2][1, 0, 1:] = False  # samples with 3 and 1 valid pixels
    both = loss.disparity_l1_loss(*two)[0], loss.disparity_l1_loss(*two, per_sample_mean=True)[0]
    assert both == (pytest.approx(32.5 / 4), pytest.approx(32.5 / 3 / 2))
    with pytest.raises(ValueError, match="3 weights for 2 maps"):
        loss.multi_scale_loss([pred, pred], gt, mask, [1.0, 1.0, 1.0])


def test_sequence_loss_counts_only_truth_in_range():
    gt = torch.tensor([[[[-1.0, 0.0, 5.0, 20.0, 25.0, torch.inf]]]]).expand(1, 1, 4, 6)
    pred = torch.full((1, 1, 4, 6), 7.0, requires_grad=True)
    value, parts = loss.foundation_stereo_loss(torch.full((1, 1, 1, 2), 2.0), [pred, pred], gt, gt > -5, 20.0, gamma=0.5)
    assert parts["n_valid"] == 4 and value.detach() == pytest.approx(2.5 + 0.5 * 2 + 2)  # init 8: error 3, smooth 2.5
    value.backward()
    assert (pred.grad != 0).sum() == 4


def test_metrics():
    gt = torch.tensor([[[10.0, 10.0, 100.0, 100.0]], [[5.0, 5.0, 5.0, 5.0]]])
    pred = gt + torch.tensor([[[0.0, -4.0, 4.0, 6.0]], [[1.0, torch.nan, torch.nan, torch.nan]]])
    mask = torch.tensor([[[True] * 4], [[True] + [False] * 3]])
    running = metrics.DisparityMetrics()
    running.update(pred, gt, mask)
    running.update(pred, gt, torch.zeros_like(mask))  # images without truth do not count
    got = running.compute()
    assert got["count"] == {"images": 2, "pixels": 5}
    assert got["per_image"]["d1_kitti"] == 25.0 and got["per_pixel"]["d1_kitti"] == 40.0
    assert got["per_image"]["bp3"] == pytest.approx(37.5) and got["per_pixel"]["bp3"] == pytest.approx(60.0)
    assert got["per_image"]["epe"] == pytest.approx((3.5 + 1) / 2) and got["per_pixel"]["epe"] == pytest.approx(3.0)
    assert got["per_pixel"]["rmse"] == pytest.approx((69 / 5) ** 0.5)
    broken = torch.full_like(gt, torch.nan)
    assert metrics.step_metrics(broken, gt, mask)["bp5"] == 100.0  # no number is no match
    step = metrics.step_metrics(pred, gt, mask)
    assert step["D1"] == step["bp3"] == pytest.approx(60.0) and step["D3"] == step["bp1"]
    assert all(v == 0 for v in metrics.step_metrics(pred, gt, torch.zeros_like(mask)).values())


def test_codecs_round_trip_and_refuse():
    disp = np.random.default_rng(0).uniform(0.001, 16581, (40, 50))
    assert np.abs(codec.decode_fsd(codec.encode_fsd(disp)) - disp).max() <= 0.0005 + 1e-3  # float32 has 1e-3 at 16581
    swapped = codec.encode_fsd(disp)[..., [1, 0, 2]]
    assert np.array_equal(codec.decode_fsd(swapped, "GRB"), codec.decode_fsd(codec.encode_fsd(disp)))
    with pytest.raises(ValueError, match="uint8"):
        codec.decode_fsd(np.zeros((4, 4), np.uint16))
    colour = np.random.default_rng(0).standard_normal((3, 5, 3)).astype(np.float32)
    assert np.array_equal(codec.decode_pfm(codec.encode_pfm(colour)), colour)
    wrong = {"truncated": codec.encode_pfm(colour)[:-4], "not a PFM": b"P6\n2 2\n255\n1\n", "incomplete": b"Pf\n2"}
    for word, data in wrong.items():
        with pytest.raises(ValueError, match=word):
            codec.decode_pfm(data)


def test_schedule_expressions():
    assert schedule.evaluate("Piecewise((1.0, epoch < 10), (0.1 * cos(pi), True))", 10) == pytest.approx(-0.1)
    assert schedule.evaluate("-2 ** 2 + max(epoch, 3) / sqrt(4)", 5) == pytest.approx(-1.5)
    wrong = ("__import__('os')", "epoch.real", "lambda: 1", "step", "epoch +", "1 / 0", "9 ** 9 ** 9 ** 9", "(1, 2)", "epoch is 1")
    for bad in (*wrong, "epoch not in 1"):
        with pytest.raises(ValueError, match="schedule"):
            schedule.evaluate(bad, 1)
    assert schedule.evaluate("epoch / steps", 5, 20) == 0.25


def test_ema_shares_frozen_weights_and_copies_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    average = ema.make_ema(model)
    assert average[0].weight is model[0].weight and average[1].weight is not model[1].weight and model[1].weight.requires_grad
    model.train()(torch.randn(4, 2))
    model[1].weight.data.fill_(3.0)
    ema.update_ema(average, model, 0.9)
    assert torch.allclose(average[1].weight, torch.full((2,), 1.2)) and not average[1].weight.requires_grad
    assert torch.equal(average[1].running_mean, model[1].running_mean) and not average.training


def test_published_weights(tmp_path):
    model = tiny()
    state = {f"module.{k}": torch.randn(v.shape) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"model": state, "global_step": 3}, tmp_path / "model_best_bp2.pth")
    (tmp_path / "cfg.yaml").write_text("corr_levels: 4\nfeature_type: dinov2\nnotes: x\nvolume_dim: 8\n")
    inner, config = load_weights(tmp_path / "model_best_bp2.pth"), weights.stored_config(tmp_path / "model_best_bp2.pth")
    with pytest.raises(ValueError, match="checkpoint has corr_levels=2"):
        weights.model_options(config, inner)
    options, notes = weights.model_options({**config, "corr_levels": 2}, inner)
    assert options == {"corr_levels": 2, "volume_dim": 8, "vit_size": None} and notes == ["model.feature_type has no effect"]
    torch.save({"model": state, "model_config": options}, tmp_path / "00000001.pt")
    assert weights.stored_config(tmp_path / "00000001.pt") == options  # ours needs no cfg.yaml
    edgenext = {k.removeprefix("feature."): torch.zeros_like(v) for k, v in inner.items() if k.startswith(("feature.st",))}
    with pytest.raises(ValueError, match=r"not a FoundationStereo checkpoint.*cnn_checkpoint"):
        weights.model_options({}, edgenext)
    weights.load_edgenext(model, edgenext | {"head.fc.weight": torch.zeros(2)})
    assert model.feature.stem[0].weight.abs().sum() == 0
    with pytest.raises(ValueError, match="missing"):
        weights.load_edgenext(model, dict(list(edgenext.items())[1:]))


def test_group_correlation_without_gradient_goes_by_rows():
    left, right = torch.randn(2, 1, 16, 40, 160, generator=torch.Generator().manual_seed(0))
    whole = cost_volume.group_correlation(left, right, 8, 8)
    products = []
    with torch.no_grad(), mock.patch.object(torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or torch.matmul(a, b)):
        rows = cost_volume.group_correlation(left, right, 8, 8)
    torch.testing.assert_close(rows, whole, rtol=1e-6, atol=1e-6)
    assert [shape[2] for shape in products] == [20, 20]
