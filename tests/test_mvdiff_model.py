"""Multi-view diffusion: what the networks, the weights folders and the sampler promise beyond the golden values."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F

from bench import mvdiff as bench
from mvdiff import build, layers, loss, metrics, model, optim, unet, weights
from mvdiff.camera import camera_angles, camera_vector
from mvdiff.clip import CLIPVision
from mvdiff.diffusion import Diffusion
from mvdiff.eval import object_metrics
from mvdiff.vae import AutoencoderKL

VIEWS = 2
SMALL = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16}
SMALL |= {"attention_head_dim": 4, "num_views": VIEWS}
CONFIG = {**SMALL, "in_channels": 8, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 10}
VAE = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "projection_dim": 16,
}


def small_unet(seed: int = 0, **changes) -> unet.UNet:
    """A UNet all of whose layers matter: the zeroed outputs of the joint layers get values too."""
    torch.manual_seed(seed)
    network = unet.UNet(**{**SMALL, **changes})
    for name, parameter in network.named_parameters():
        if ".attn_joint_" in name and ".to_out." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def inputs(objects: int = 2, domains: int = 2, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Latents, time steps, image tokens, cameras of (domains, objects, VIEWS) rows."""
    g = torch.Generator().manual_seed(seed)
    n = domains * objects * VIEWS
    x, t = torch.randn(n, 8, 8, 8, generator=g), torch.randint(1000, (n,), generator=g)
    return x, t, torch.randn(n, 1, 16, generator=g), torch.randn(n, 10, generator=g)


# ---- layers ----------------------------------------------------------------------------------------------------------


def gradients(function, *tensors):
    out = function(*tensors)
    torch.manual_seed(3)
    return out, torch.autograd.grad((out.float() * torch.randn(out.shape)).sum(), [t for t in tensors if t.requires_grad])


@pytest.mark.parametrize("convolve", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "strided"])
def test_group_norm_has_the_plain_gradients(convolve, layout):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + torch.randn(3, 16, 6, 5)
    if layout == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = (3 + torch.randn(16, 3, 5, 6)).permute(1, 0, 3, 2)
    x.requires_grad_()
    conv = torch.nn.Conv2d(16, 5, 3, padding=1)
    inputs = (x, norm.weight, norm.bias, *(conv.parameters() if convolve else ()))
    plain = lambda x, *_: conv(F.silu(norm(x))) if convolve else norm(x)
    own = lambda x, *_: layers.norm_conv2d(x, norm, conv) if convolve else layers.group_norm(x, norm)
    ours, grads = gradients(own, *inputs)
    want, want_grads = gradients(plain, *inputs)
    assert len(grads) == len(inputs)
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, want_grads):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_norms_are_fp32_inside_for_16_bit_input():
    torch.manual_seed(0)
    group, layer = torch.nn.GroupNorm(4, 16), torch.nn.LayerNorm(16)
    x = (100 + torch.randn(2, 16, 8, 8)).bfloat16()  # statistics in 16 bits would lose the deviation
    torch.nn.init.uniform_(layer.weight, 1, 1.004)  # 16 bits would make it 1
    linear = torch.nn.Linear(16, 16, bias=False)
    torch.nn.init.eye_(linear.weight)
    y = torch.randn(64, 16).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (out,) = layers.norm_linear(y, layer, linear)
    out.float().sum().backward()
    torch.testing.assert_close(out, layer(y.float()).bfloat16(), atol=0, rtol=0)  # rounded once, at the end
    assert layer.weight.grad.dtype == torch.float32 and y.grad.dtype == torch.bfloat16
    for got, want in (
        (layers.group_norm(x, group), group(x.float())),
        (layers.layer_norm(x.movedim(1, -1), layer), layer(x.movedim(1, -1).float())),
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.01)


def test_geglu_and_frozen_convolution_have_the_plain_gradients():
    torch.manual_seed(0)
    x = torch.randn(4, 7, 12, requires_grad=True)
    linear = torch.nn.Linear(6, 5)
    inputs = (x, *linear.parameters())
    ours = gradients(lambda x, *_: layers.geglu_linear(x, linear), *inputs)[1]
    want = gradients(lambda x, *_: linear(x[..., :6] * F.gelu(x[..., 6:])), *inputs)[1]
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b)
    for stride, padding in ((1, 1), (2, 1), (1, 0)):
        conv = torch.nn.Conv2d(5, 6, 3, stride, padding)
        image = torch.randn(2, 5, 9, 8, requires_grad=True)
        want, want_grads = gradients(conv, image)
        conv.requires_grad_(False)
        got, grads = gradients(lambda x, conv=conv: layers.conv2d(x, conv), image)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads[0], want_grads[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_norm_and_linear_layers_have_the_plain_gradients(frozen):
    """Several layers on one LayerNorm, with and without bias; frozen ones hand the gradient on and take none."""
    torch.manual_seed(0)
    norm, linears = torch.nn.LayerNorm(6), [torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(6, 3)]
    torch.nn.init.normal_(norm.weight)
    linears[0].requires_grad_(not frozen)
    x = torch.randn(4, 7, 6, requires_grad=True)
    inputs = [p for p in (x, *norm.parameters(), *linears[0].parameters(), *linears[1].parameters()) if p.requires_grad]
    ours = gradients(lambda *_: torch.cat(layers.norm_linear(x, norm, *linears), -1), *inputs)
    want = gradients(lambda *_: torch.cat([linear(norm(x)) for linear in linears], -1), *inputs)
    torch.testing.assert_close(ours[0], want[0])
    assert len(ours[1]) == 5 + (not frozen)
    for a, b in zip(ours[1], want[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_layers_have_the_same_gradients(frozen):
    torch.manual_seed(0)
    block = layers.ResnetBlock(8, 16, 12, 4, 1e-5).requires_grad_(not frozen)
    forward, norm = unet.FeedForward(16), torch.nn.LayerNorm(16)
    x, time = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 12)

    def run(x):
        h = block(x, time).flatten(2).transpose(1, 2)
        return h + forward(layers.layer_norm(h, norm))

    parameters = [p for m in (block, forward) for p in m.parameters() if p.requires_grad]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(f(x).square().sum(), [x, *parameters]) for f in (run, compiled)]
    for a, b in zip(*results):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_less_is_kept_for_backward_than_in_the_published_form():
    small = {"block_out_channels": (32, 32), "layers_per_block": 1}
    ours = bench.kept_bytes(objects=1, **small)["saved_gib"]
    frozen = bench.kept_bytes(objects=1, trainable=["joint_mid"], **small)["saved_gib"]
    checkpointed = bench.kept_bytes(objects=1, checkpointing=True, **small)["saved_gib"]
    with bench.published_form():
        published = bench.kept_bytes(objects=1, **small)["saved_gib"]
    assert checkpointed < 0.22 * ours and frozen < 0.85 * ours and ours < 0.55 * published, (frozen, ours, published)


# ---- UNet ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["4-D", "3-D"])
def test_merged_attention_equals_the_published_form(attention):
    network, given = small_unet(cd_attention_mid=True), inputs()
    out = network(*given)
    with bench.published_form(attention):
        torch.testing.assert_close(network(*given), out, atol=2e-5, rtol=1e-4)


def test_swapping_the_domains_swaps_the_output():
    network, given = small_unet(cd_attention_mid=True, cd_attention_last=True), inputs()
    swap = lambda x: torch.cat(x.chunk(2)[::-1])
    torch.testing.assert_close(network(*map(swap, given)), swap(network(*given)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_input_reaches_the_rows_it_should_and_no_other():
    network, (x, t, context, labels) = small_unet(cd_attention_mid=True), inputs(objects=2)
    out = network(x, t, context, labels)

    def changed(**given) -> list[int]:
        other = network(*[given.get(k, v) for k, v in {"x": x, "t": t, "context": context, "labels": labels}.items()])
        return ((other - out).abs().amax(dim=(1, 2, 3)) > 1e-4).nonzero().flatten().tolist()

    one = lambda v, row=0: torch.cat([v[:row], v[row : row + 1] + 1, v[row + 1 :]])
    # rows of object 0: 0, 1 in the first domain, 4, 5 in the second; object 1: 2, 3, 6, 7
    first, second = [0, 1, 4, 5], [2, 3, 6, 7]
    assert changed(x=one(x)) == changed(context=one(context)) == changed(labels=one(labels)) == changed(t=one(t)) == first
    assert changed(x=one(x, 7)) == second
    flipped = labels.clone()  # the domain flag of one view
    flipped[2] = camera_vector(torch.zeros(3), torch.tensor(True))
    assert set(changed(labels=flipped)) == set(second)


@torch.no_grad()
def test_stage_2_starts_exactly_from_stage_1(tmp_path):
    torch.manual_seed(0)
    stage1 = unet.UNet(**SMALL, cd_attention_mid=False)
    model.save_unet(tmp_path, stage1, {**CONFIG, "cd_attention_mid": False})
    said = []
    stage2, config = model.load_unet(tmp_path, overrides={"cd_attention_mid": True}, training=True, say=said.append)
    assert config["cd_attention_mid"] and "cross-domain layers are new" in said[0]
    given = inputs()
    assert torch.equal(stage1(*given), stage2(*given))


def test_checkpointing_changes_no_gradient():
    network, given = small_unet(cd_attention_mid=True), inputs(objects=1)
    results = []
    for on in (False, True):
        network.set_checkpointing(on)
        network.zero_grad()
        network(*given).square().mean().backward()
        results.append({k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name


def test_incomplete_objects_are_refused():
    network, (x, t, context, labels) = small_unet(cd_attention_mid=True), inputs()
    for rows in (3, 6):  # half an object; three objects' rows, which are no pairs of domains
        with pytest.raises(ValueError, match="no multiple of 4: 2 views per object and two domains"):
            network(x[:rows], t[:rows], context[:rows], labels[:rows])


def test_it_learns():
    """A tiny network learns the noise of a few fixed rows."""
    torch.manual_seed(0)
    network = unet.UNet(**{**SMALL, "block_out_channels": (16, 32)}, cd_attention_mid=True)
    trained = optim.select_trainable(network)
    assert not any(".attn2.to_q." in name or (".norm2." in name and "transformer" in name) for name in trained)
    optimizer = torch.optim.AdamW(optim.parameter_groups(trained, 3e-3, 1.0))
    schedule, n = Diffusion(), 2 * VIEWS
    latents, noise, t = torch.randn(n, 4, 8, 8), torch.randn(n, 4, 8, 8), torch.tensor([100, 100, 700, 700])
    latent, embedding = torch.randn(1, 4, 8, 8), torch.randn(1, 16)
    angles = torch.from_numpy(camera_angles("front", ("front", "back"))).repeat(2, 1)
    camera = camera_vector(angles, torch.tensor([1, 1, 0, 0]))
    losses = []
    for _ in range(60):
        x = schedule.add_noise(latents, noise, t)
        prediction = model.predict(network, x, t, latent, embedding, camera, VIEWS)
        value, rows = loss.denoising_loss(prediction, latents, noise, t, schedule)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert rows.shape == (n,) and losses[-1] < 0.2 * losses[0]


def test_stage_2_trains_the_joint_layers_only():
    network = small_unet(cd_attention_mid=True)
    trained = optim.select_trainable(network, ["joint_mid"])
    assert trained and all(model.is_joint(name) for name in trained)
    network(*inputs(objects=1)).square().mean().backward()
    have = {name for name, p in network.named_parameters() if p.grad is not None}
    assert have == set(trained)
    with pytest.raises(ValueError, match="'joint_middle': no module"):
        optim.select_trainable(network, ["joint_mid", "joint_middle"])
    given = build.parse(["--trainable_modules", "joint_mid, norm_joint_mid"], "").trainable_modules  # as the command line has it
    assert list(optim.select_trainable(network, given)) == list(trained)


def test_training_in_16_bit():
    """The benchmark's steps for a GPU, whole: autocast, with and without cache and checkpointing."""
    rows = dict(bench.measure_gpu(1, 32, 1, bench.TINY_NET, "cpu", compiles=(False,)))
    assert len(rows) == 4 and all(figures["objects_per_s"] > 0 for figures in rows.values())
    stage2 = bench.Trainer(bench.TINY_NET, 32, 1, "encoded", stage=2, amp=torch.bfloat16)
    before = [p.detach().clone() for p in stage2.trained]
    bench.run_step(stage2)
    # the output projections start at zero: in the first step they move, and nothing that stands before them
    moved = [(a - b).abs().max() > 5e-5 for a, b in zip(before, stage2.trained)]
    assert any(moved) and all(p.isfinite().all() for p in stage2.trained)


# ---- weights ---------------------------------------------------------------------------------------------------------


def write_all(root) -> tuple[unet.UNet, AutoencoderKL, CLIPVision]:
    network, autoencoder, encoder = small_unet(cd_attention_mid=True), AutoencoderKL(**VAE), CLIPVision(**CLIP)
    model.save_unet(root, network, {**CONFIG, "cd_attention_mid": True})
    weights.write_part(root, "vae", VAE, autoencoder.state_dict())
    weights.write_part(root, "image_encoder", {**CLIP, "hidden_act": "quick_gelu"}, encoder.state_dict())
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler", "skip_prk_steps": true}')
    return network, autoencoder, encoder


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "fp16"])
def test_weights_folders_round_trip(tmp_path, kind):
    network, autoencoder, encoder = write_all(tmp_path)
    variant = None
    for part, stem, old in (
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("image_encoder", "model", "pytorch_model"),
    ):
        file = tmp_path / part / f"{stem}.safetensors"
        state = weights.read_safetensors(file)
        if part == "vae":  # as older libraries named the attention, with 1 x 1 kernels
            names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            for new, name in names.items():
                state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
            state = {k: v[:, :, None, None] if ".query.w" in k or ".key.w" in k else v for k, v in state.items()}
        if part == "image_encoder":
            state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        file.unlink()
        if kind == "bin":
            torch.save(state, tmp_path / part / f"{old}.bin")
        elif kind == "fp16":
            variant, state = "fp16", {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
            weights.write_safetensors(tmp_path / part / f"{stem}.fp16.safetensors", state)
        else:
            weights.write_safetensors(file, state)
    loaded = model.load_unet(tmp_path, variant=variant)[0], model.load_vae(tmp_path, variant), model.load_clip(tmp_path, variant)
    for a, b in zip(loaded, (network, autoencoder, encoder)):
        assert same(a, b.half().float() if kind == "fp16" else b)
        assert all(v.dtype == torch.float32 for v in a.state_dict().values())
    assert model.load_diffusion(tmp_path, prediction_type="v_prediction").prediction_type == "v_prediction"
    assert same(model.load_unet(tmp_path / "unet", variant=variant)[0], loaded[0])  # a part's own folder will do


def test_weights_that_do_not_fit_are_named(tmp_path):
    network, _, _ = write_all(tmp_path)
    state = network.state_dict()
    config = {**CONFIG, "cd_attention_mid": True}
    dropped = {k: v for k, v in state.items() if k != "conv_out.bias"}
    for wrong, message in (
        (dropped, "1 missing: conv_out.bias"),
        ({**state, "extra.weight": torch.zeros(1)}, "1 unexpected: extra.weight"),
        ({**state, "conv_out.bias": torch.zeros(5)}, r"another shape: conv_out.bias \(5,\)"),
    ):
        weights.write_part(tmp_path, "unet", config, wrong)
        for training in (False, True):
            with pytest.raises(ValueError, match=message):
                model.load_unet(tmp_path, training=training)
    some = {k: v for k, v in state.items() if "mid_block.attentions.0.transformer_blocks.0.attn_joint_mid" not in k}
    weights.write_part(tmp_path, "unet", config, some)
    for training in (False, True):  # some but not all of a part
        with pytest.raises(ValueError, match=r"5 missing: mid_block.*attn_joint_mid"):
            model.load_unet(tmp_path, training=training)
    none = {k: v for k, v in state.items() if not model.is_joint(k)}
    weights.write_part(tmp_path, "unet", config, none)
    said = []
    assert not model.load_unet(tmp_path, say=said.append)[0].joint and "running without" in said[0]
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae: neither .*safetensors nor .*bin \(found: config.json\)"):
        model.load_vae(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such weights folder"):
        model.load_vae(tmp_path / "nowhere")
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        model.load_unet(tmp_path)


def test_image_variation_weights_start_a_multi_view_network(tmp_path):
    torch.manual_seed(0)
    plain = unet.UNet(**SMALL, in_channels=4, projection_class_embeddings_input_dim=None, cd_attention_mid=False)
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    config = {
        **SMALL,
        "in_channels": 4,
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    model.save_unet(tmp_path, plain, config)
    changes = {k: CONFIG[k] for k in ("in_channels", "class_embed_type", "projection_class_embeddings_input_dim")}
    said = []
    network, _ = model.load_unet(tmp_path, overrides=changes, training=True, say=said.append)
    assert "1 tensors of input channels" in said[0] and "4 tensors of camera embedding" in said[0]
    x, t, context, labels = inputs(domains=1)
    torch.nn.init.zeros_(network.class_embedding.linear_2.weight)
    torch.nn.init.zeros_(network.class_embedding.linear_2.bias)
    out = network(x, t, context, labels)  # the picture's latent and the camera do nothing yet
    torch.testing.assert_close(out, plain(x[:, :4], t, context), atol=1e-5, rtol=1e-4)


class Evil:
    target = ""

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_no_weights_file_runs_code(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.bin"
    Evil.target = str(tmp_path / "executed")
    torch.save({"conv_in.weight": Evil()}, path)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin: refused"):
        weights.read_bin(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin: refused"):
        weights.read_bin(path)
    assert not (tmp_path / "executed").exists()
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match="flat dict"):
        weights.read_bin(path)


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.write_safetensors(path, {"a": torch.arange(10.0), "b": torch.ones(3, dtype=torch.bfloat16)})
    good = path.read_bytes()
    n = int.from_bytes(good[:8], "little")
    bad_span = good[8 : 8 + n].replace(b"[0,40]", b"[4,44]")
    for data, message in (
        (good[:-2], "tensor 'b' lies at bytes"),
        (good[:4], "not a safetensors file"),
        (good[:20], "not a safetensors file"),
        ((10**9).to_bytes(8, "little") + good[8:], "not a safetensors file"),
        (good[:8] + b"[" * n + good[8 + n :], "broken safetensors header"),
        (good[:8] + good[8 : 8 + n].replace(b'"F32"', b'"Q99"') + good[8 + n :], "broken safetensors header"),
        (good[:8] + bad_span.replace(b"[40,46]", b"[44,50]") + good[8 + n :], "lies at bytes 44 to 50 of 46"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            weights.read_safetensors(path)


def test_unsupported_options_are_named():
    for config, message in (
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier': only 'positional'"),
        ({"addition_embed_type": "text"}, "addition_embed_type = 'text': the option is not supported"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"cross_attention_dim": [16, 32]}, "all entries must be equal"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "block types"),
    ):
        with pytest.raises(ValueError, match=message):
            model.unet_arguments(config)
    published = {"joint_attention": True, "cross_domain_attention": False, "encoder_hid_dim": None, "sample_size": 32}
    published |= {"mvcd_attention": True, "_class_name": "UNetMV2DConditionModel", "joint_attention_twice": True}
    assert model.unet_arguments(published)["cd_attention_mid"]
    with pytest.raises(ValueError, match="hidden_act"):
        model.clip_arguments({"vision_config": {"hidden_act": "gelu"}})
    with pytest.raises(ValueError, match="block types"):
        model.vae_arguments({"down_block_types": ["AttnDownEncoderBlock2D"]})
    with pytest.raises(ValueError, match="thresholding"):
        model.diffusion_arguments({"thresholding": True})


# ---- sampling --------------------------------------------------------------------------------------------------------


def conditions(objects: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(objects, 4, 8, 8, generator=g), torch.randn(objects, 16, generator=g)


def draw(network, latent, embedding, seeds, guidance=2.0, eta=1.0, domains=2):
    noise = model.ObjectNoise(seeds, domains, VIEWS, (4, 8, 8))
    angles = torch.from_numpy(camera_angles("front", ("front", "back"))).expand(domains, len(latent), -1, -1)
    is_normal = torch.arange(domains)[:, None, None].expand(domains, len(latent), VIEWS) == 0
    camera = camera_vector(angles, is_normal).flatten(0, 2)
    start = noise()
    rows = model.sample(network, Diffusion(), latent, embedding, camera, start, VIEWS, 4, guidance, eta, noise)
    return rows.view(domains, len(latent), VIEWS, 4, 8, 8).transpose(0, 1)


@pytest.mark.parametrize(("joint", "domains"), [(True, 2), (False, 2), (False, 1)])
def test_objects_of_a_batch_do_not_mix(joint, domains):
    """Three objects in one batch, with guidance and noise, come out as each alone; whatever the other objects are."""
    network, (latent, embedding) = small_unet(cd_attention_mid=joint).eval(), conditions(3)
    together = draw(network, latent, embedding, [42, 43, 44], domains=domains)
    for i in range(3):
        alone = draw(network, latent[i : i + 1], embedding[i : i + 1], [42 + i], domains=domains)
        torch.testing.assert_close(alone[0], together[i], atol=2e-4, rtol=1e-3)


def test_guidance_extrapolates_from_the_unconditional_prediction():
    network, (latent, embedding) = small_unet(cd_attention_mid=True).eval(), conditions(1)
    once = draw(network, latent, embedding, [1], guidance=1.0, eta=0.0)
    none = draw(network, 0 * latent, 0 * embedding, [1], guidance=1.0, eta=0.0)
    assert (once - none).abs().max() > 0.1
    torch.testing.assert_close(draw(network, latent, embedding, [1], guidance=0.0, eta=0.0), none, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(draw(network, 0 * latent, 0 * embedding, [1], 3.0, 0.0), none, atol=1e-4, rtol=1e-3)


def test_condition_is_encoded_once_per_object():
    autoencoder, encoder = AutoencoderKL(**VAE).eval(), CLIPVision(**CLIP).eval()
    counts = {}
    for name, module in (("vae", autoencoder.encoder), ("clip", encoder.vision_model)):
        module.register_forward_hook(lambda m, args, out, name=name: counts.__setitem__(name, len(args[0])))
    latent, embedding = model.encode_condition(autoencoder, encoder, torch.rand(3, 3, 32, 32), torch.rand(3, 3, 28, 28))
    assert counts == {"vae": 3, "clip": 3}
    rows = model.to_rows(latent, 2, VIEWS)
    assert rows.shape == (12, 4, 4, 4) and all(torch.equal(rows[i], latent[i // VIEWS % 3]) for i in range(12))
    assert model.to_rows(embedding, 1, VIEWS).shape == (6, 16)


def test_zero_terminal_snr_cannot_be_sampled_from_epsilon():
    schedule = Diffusion(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        schedule.step(x, schedule.timesteps(10)[0], x, 10)
    velocity = Diffusion(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    assert velocity.step(x + 1, 999, x, 10).isfinite().all()
    with pytest.raises(ValueError, match="between 1 and 1000"):
        schedule.timesteps(0)
    with pytest.raises(ValueError, match="start beyond 999"):
        Diffusion().timesteps(1000)


def test_time_steps_and_noise_are_shared_as_asked():
    make = lambda seeds=(0, 1, 2): [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (2, 3, VIEWS)
    for sharing, same_over in (("row", ()), ("pair", (0,)), ("group", (2,)), ("object", (0, 2))):
        t = loss.draw_timesteps(1000, sharing, make(), 2, VIEWS).view(shape)
        for axis in range(3):
            equal = bool((t == t.narrow(axis, 0, 1)).all())
            assert equal == (axis in same_over), (sharing, axis)
        alone = loss.draw_timesteps(1000, sharing, make([1]), 2, VIEWS).view(2, 1, VIEWS)
        assert torch.equal(alone, t[:, 1:2])  # whatever else is in the batch
    noise, extra = torch.zeros(4, 4, 8, 8), torch.randn(4, 4, 1, 1)
    assert torch.equal(loss.offset_noise(noise, 0.5, extra), 0.5 * extra.expand_as(noise))
    assert loss.offset_noise(noise, 0.0, extra) is noise and loss.perturb_input(noise, 0.0, noise) is noise
    assert torch.equal(loss.perturb_input(noise, 0.1, noise + 1), noise + 0.1)
    rows = loss.draw_rows(torch.randn, make(), 2, VIEWS, 4, 8, 8).view(2, 3, VIEWS, 4, 8, 8)
    assert torch.equal(rows[:, 2:], loss.draw_rows(torch.randn, make([2]), 2, VIEWS, 4, 8, 8).view(2, 1, VIEWS, 4, 8, 8))
    assert 0.9 < rows.std() < 1.1 and not torch.equal(rows[:, 0], rows[:, 1])


def test_metrics_of_known_pictures():
    image = torch.rand(2, 3, 32, 32)
    assert (metrics.psnr(image, image) == 100).all()
    torch.testing.assert_close(metrics.psnr(image, image + 0.1), torch.full((2,), 20.0).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(metrics.ssim(image, image), torch.ones(2).double())
    with pytest.raises(ValueError, match="smaller than the SSIM window"):
        metrics.ssim(image[..., :8, :8], image[..., :8, :8])
    normal, mask = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 4, 4), torch.ones(4, 4, dtype=torch.bool)
    tilted = torch.tensor([0.0, 0.5, 0.75**0.5]).view(3, 1, 1).expand(3, 4, 4)
    error = metrics.normal_angular_error(3 * tilted, normal, mask)
    assert abs(error["mean"] - 30) < 1e-3 and error["within_22.5"] == 0 and error["count"] == 16
    assert metrics.normal_angular_error(0 * tilted, normal, mask)["mean"] == 90
    assert metrics.normal_angular_error(tilted, normal, ~mask) is None
    picture = torch.ones(1, 3, 32, 32)
    picture[:, :, 8:16, 8:24] = 0.2
    picture[:, :, 30, 30] = 0  # a speck, which the opening removes
    found = metrics.foreground(picture)
    assert found.sum() == 8 * 16 and found[0, 8:16, 8:24].all()
    alpha = torch.stack([found[0], found[0] & False])  # the second view shows nothing
    values = object_metrics(picture.expand(1, 2, 3, 32, 32), picture.expand(1, 2, 3, 32, 32), alpha, ["normal"], 0)
    assert (values["empty_masks"], values["normal_deg"], values["within_22.5"]) == (1, pytest.approx(0, abs=1e-3), 1)
    half = found.clone()
    half[:, 8:12] = False
    assert metrics.foreground_iou(found, half).item() == 0.5
    assert metrics.foreground_iou(found & False, half & False).item() == 1


def test_config_written_is_config_read(tmp_path):
    network = small_unet(cd_attention_mid=True)
    folder = model.save_unet(tmp_path, network, {**CONFIG, "cd_attention_mid": True}, part="unet_ema")
    assert folder == tmp_path / "unet_ema" and json.loads((folder / "config.json").read_text())["num_views"] == VIEWS
    assert same(model.load_unet(folder)[0], network)
