"""The three copies of dinov2.py against golden values, and what the golden values do not reach."""

import importlib

import golden
import numpy as np
import pytest
import torch

COPIES = ["stereo", "moge", "pi3"]


def module(folder):
    return importlib.import_module(f"{folder}.dinov2")


def build(folder, config):
    config = dict(config)
    hub = config.pop("hub", None)
    return module(folder).dinov2(hub, **config) if hub else module(folder).DINOv2(**config)


def draw(spec):
    """offset + scale * draw(seed, shape, kind), float32."""
    value = golden.module("fill").draw(spec["seed"], spec["shape"], spec.get("kind", "uniform"))
    return torch.from_numpy(np.float32(spec.get("offset", 0)) + np.float32(spec.get("scale", 1)) * value)


def weights(case):
    """Weights by name; the positional term is enlarged, or an interpolation fault would not show."""
    state = golden.filled(case["state_dict"])
    for name, value in state.items():
        if name.endswith("pos_embed"):
            state[name] = value * np.float32(0.5 * np.sqrt(value.shape[1] * value.shape[2]))
    return state


@pytest.mark.parametrize("folder", COPIES)
@pytest.mark.parametrize("name", golden.names("dinov2"))
def test_golden(name, folder):
    case, arrays = golden.load("dinov2", name)
    assert case["kind"] == "backbone", f"unknown kind {case['kind']}"
    model = build(folder, case["config"]).eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == case["state_dict"]
    if "num_parameters" in case:
        assert sum(p.numel() for p in model.parameters()) == case["num_parameters"]
    model.load_state_dict(weights(case))
    scalars = case.get("inputs_spec", {}).get("scalar_patch_weights")
    for i, spec in enumerate(case["inputs"]):
        stored = arrays.get(f"in_in{i}", arrays.get(f"in_x{i}"))
        x = draw(spec) if stored is None else torch.from_numpy(stored)
        check_input(model, case, arrays, f"in{i}.", x, scalars and draw(scalars[i]))
    for key, want in case.get("grad_norms", {}).items():  # of the last input
        golden.close(model.get_parameter(key).grad.norm(), want, rtol=1e-3, what=key)


def check_input(model, case, arrays, prefix, x, scalar_weight):
    """Every stored value of one input: features, intermediate layers, gradients."""
    x.requires_grad_(scalar_weight is not None)
    h, w = x.shape[-2] // model.patch_size, x.shape[-1] // model.patch_size
    with torch.set_grad_enabled(scalar_weight is not None):
        got = model.forward_features(x)
        got["tokens0"] = model.prepare_tokens(x)
        got["pos_embed_interp"] = model.interpolate_pos_embed(h, w)
        for i, (patch, cls) in enumerate(model.get_intermediate_layers(x, case["layers"], return_class_token=True)):
            got[f"inter{i}.patch"], got[f"inter{i}.cls"] = patch, cls
        got["raw_last_reshaped"] = model.get_intermediate_layers(x, case["layers"], reshape=True, norm=False)[-1]
        torch.testing.assert_close(model(x), got["x_norm_clstoken"])
    if scalar_weight is not None:
        got["scalar"] = (got["x_norm_patchtokens"] * scalar_weight).sum() + got["x_norm_clstoken"].sum()
        model.zero_grad()
        got["scalar"].backward()
        got["grad_input"] = x.grad
    wanted = {k: v for k, v in case["outputs"].items() if k.startswith(prefix)}
    assert wanted
    for key, stats in wanted.items():
        value = got[key.removeprefix(prefix)]
        if not isinstance(stats, dict):
            golden.close(value, stats, rtol=1e-4, what=key)
            continue
        assert list(value.shape) == stats["shape"], key
        flat = value.detach().reshape(-1)
        tolerance = {"scale_tol": 1e-3} if key.endswith("grad_input") else {"atol": 2e-4}
        golden.close(flat[:: stats["flat_stride"]], arrays[key], **tolerance, what=key)
        golden.close(flat.abs().max(), stats["absmax"], **tolerance, what=key)
        golden.close(flat.double().mean(), stats["mean"], atol=2e-4, what=key)
        golden.close(flat.double().std(), stats["std"], atol=1e-4, rtol=1e-3, what=key)


def tiny(**options):
    torch.manual_seed(0)
    return module("stereo").DINOv2(img_size=56, embed_dim=48, depth=3, num_heads=3, num_register_tokens=2, **options)


def test_checkpointing_gives_the_same_gradients_and_keeps_less():
    grads, kept = [], []
    for checkpointing in (False, True):
        model, sizes = tiny(checkpointing=checkpointing), []
        x = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = sum(p.square().mean() for p in model.get_intermediate_layers(x, [0, 2]))
        loss.backward()
        assert model.mask_token.grad is None
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        kept.append(sum(sizes))
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed)
    assert kept[1] < 0.3 * kept[0]


def test_layers_come_in_block_order_and_bad_requests_fail():
    model, x = tiny().eval(), torch.randn(1, 3, 28, 42)
    for a, b in zip(model.get_intermediate_layers(x, [2, 0]), model.get_intermediate_layers(x, [0, 2])):
        assert torch.equal(a, b)
    for bad in ([0, 0], [3], [-1], 4, 0, []):
        with pytest.raises(ValueError, match="blocks"):
            model.get_intermediate_layers(x, bad)
    with pytest.raises(ValueError, match="30x42"):
        model(torch.randn(1, 3, 30, 42))
    with pytest.raises(ValueError, match="vitx"):
        module("stereo").dinov2("dinov2_vitx14")


def test_residual_stream_is_float32_under_autocast():
    model, x = tiny().eval(), torch.randn(1, 3, 28, 42)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.forward_features(x)
    assert out["x_prenorm"].dtype == torch.float32
    torch.testing.assert_close(out["x_prenorm"], model.forward_features(x)["x_prenorm"], atol=0.05, rtol=0.05)


def test_load_weights_accepts_wrappers_and_names_every_misfit(tmp_path):
    load = module("stereo").load_weights
    model, other = tiny(), tiny()
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    state = other.state_dict()
    chunked = {k.replace("blocks.1", "blocks.0.1"): v for k, v in state.items()}
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in chunked.items()}}, tmp_path / "w.pth")
    assert load(model, tmp_path / "w.pth") == ([], [])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    partial = {k: v for k, v in state.items() if k != "norm.bias"} | {"head.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"missing \['norm.bias'\], unexpected \['head.weight'\]"):
        load(model, partial)
    assert load(model, partial, strict=False) == (["norm.bias"], ["head.weight"])
    wide = state | {"pos_embed": torch.randn(1, 37, 48)}
    with pytest.raises(RuntimeError, match="pos_embed"):
        load(model, wide, strict=False)
    load(model, wide, resize_pos_embed=True)
    torch.testing.assert_close(model.pos_embed[:, 0], wide["pos_embed"][:, 0])
