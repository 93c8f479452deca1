"""The MoGe networks beyond their golden values: loading, checkpointing of activations, inference, sizes."""

import math

import pytest
import torch

from moge.geometry import depth_to_points, recover_focal_shift
from moge.model import build, load, load_weights, postprocess

HEAD = {"dim_res_blocks": [32, 32, 32], "num_res_blocks": [0, 1, 0], "resamplers": "bilinear"}
V1 = {
    "encoder": "dinov2_vits14",
    "intermediate_layers": [1],
    "dim_proj": 32,
    "dim_upsample": [32, 32],
    "remap_output": "exp",
    "num_tokens_range": [12, 30],
}
V2 = {
    "encoder": {"backbone": "dinov2_vits14", "intermediate_layers": [0, 1], "dim_out": 32},
    "neck": {**HEAD, "dim_in": [34, 2, 2], "dim_out": None},
    "points_head": {**HEAD, "dim_in": [32, 32, 32], "dim_out": [None, None, 3]},
    "mask_head": {**HEAD, "dim_in": [32, 32, 32], "dim_out": [None, None, 1]},
    "normal_head": {**HEAD, "dim_in": [32, 32, 32], "dim_out": [None, None, 3]},
    "scale_head": {"dims": [384, 16, 1]},
    "remap_output": "exp",
    "num_tokens_range": [12, 30],
}


@pytest.fixture(params=["v1", "v2"], scope="module")
def model(request):
    torch.manual_seed(0)
    return build(V1 if request.param == "v1" else V2, request.param)


def test_checkpointing_of_activations_changes_nothing(model):
    image = torch.rand(1, 3, 40, 56)
    grads = {}
    for mode in ("none", "backbone", "head", "all", True, False):
        model.set_gradient_checkpointing(mode)
        model.zero_grad()
        out = model(image, 12)
        sum(v.square().mean() for v in out.values()).backward()
        grads[mode] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for mode, grad in grads.items():
        assert torch.equal(grad, grads["none"]), mode
    with pytest.raises(ValueError, match="none, backbone, head or all"):
        model.set_gradient_checkpointing("some")


def test_infer_one_or_many_images_of_any_size(model):
    images = torch.rand(2, 3, 45, 61)
    many = model.infer(images)
    assert many["points"].shape == (2, 45, 61, 3) and many["depth"].shape == many["mask"].shape == (2, 45, 61)
    assert many["mask"].dtype == torch.bool and many["intrinsics"].shape == (2, 3, 3)
    assert ("normal" in many) == (model.version == "v2")
    one = model.infer(images[1], num_tokens=model.tokens_at(9))
    for k, v in one.items():
        torch.testing.assert_close(v, many[k][1], rtol=1e-3, atol=1e-4)
    known = model.infer(images[0], fov_x=50.0, apply_mask=False)
    assert known["intrinsics"][0, 0].item() == pytest.approx(0.5 / math.tan(math.radians(25)), rel=1e-5)
    assert known["points"].isfinite().all() and model.tokens_at(0) == 12 and model.tokens_at(9) == 30
    for thin in ((1, 200), (200, 1)):
        assert model.infer(torch.rand(3, *thin))["depth"].shape == thin


def test_checkpoints_load_strictly(model, tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"model_config": {**model.config, "some_old_key": 1}, "model": model.state_dict()}, path)
    with pytest.warns(UserWarning, match="some_old_key"):
        again = load(path)
    assert not again.training and again.version == model.version
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    other = "v2" if model.version == "v1" else "v1"
    with pytest.raises(ValueError, match=f"describes MoGe {model.version}, but {other}"):
        load(path, version=other)
    state = dict(model.state_dict())
    gone = next(k for k in state if k.endswith("projects.0.bias") or k.endswith("output_projections.0.bias"))
    del state[gone]
    with pytest.raises(RuntimeError, match=f"missing {gone}"):
        load_weights(model, state)
    assert load_weights(model, state, allow=["*projec*"]) == [f"missing {gone}"]
    for content in ({"weights": state}, {"model": 3, "model_config": {}}, [1], b"GIF89a", torch.nn.Linear(1, 1)):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(RuntimeError, match=r"m\.pt is no MoGe checkpoint"):
            load(path)


def test_older_names_and_wrong_values():
    assert build({**V1, "trained_area_range": [196000, 490000]}).num_tokens_range == [1000, 2500]
    for config in (V1, V2):
        for tokens in ([50, 20], [48], [0, 10], ["a", "b"], 48):
            with pytest.raises(ValueError, match=r"num_tokens_range .* two whole numbers"):
                build({**config, "num_tokens_range": tokens})
    with pytest.raises(ValueError, match="remap_output 'square'"):
        build({**V1, "remap_output": "square"})
    with pytest.raises(ValueError, match="no DINOv2 variant named 'dinov2_vitx14'"):
        build({**V1, "encoder": "dinov2_vitx14"})
    with pytest.raises(ValueError, match="multiples of 32"):
        build({**V1, "dim_upsample": [48, 32]})
    with pytest.raises(ValueError, match="unknown resampler 'cubic'"):
        build({**V2, "neck": {**V2["neck"], "resamplers": "cubic"}})


def test_upsampling_starts_without_checkerboard():
    v1 = build(V1).head.upsample_blocks[0][0][0].weight
    assert (v1 == v1[:, :, :1, :1]).all()
    shuffled = build({**V2, "neck": {**V2["neck"], "resamplers": ["pixel_shuffle", "conv_transpose"]}}).neck.resamplers
    assert (shuffled[0][0].weight.unflatten(0, (-1, 4)).diff(dim=1) == 0).all()
    assert (shuffled[1][0].weight == shuffled[1][0].weight[:, :, :1, :1]).all()


@pytest.mark.parametrize("size", [(60, 80), (80, 50)])
@pytest.mark.parametrize("fov", [20.0, 60.0, 110.0])
def test_postprocess_finds_camera_and_depth(size, fov):
    """Points of a known camera, shifted in z, give back focal length, depth and points."""
    H, W = size
    fx = 0.5 / math.tan(math.radians(fov) / 2)
    K = torch.tensor([[fx, 0, 0.5], [0, fx * W / H, 0.5], [0, 0, 1]])
    g = torch.Generator().manual_seed(0)
    depth = 2 + torch.nn.functional.interpolate(torch.rand(1, 1, 5, 6, generator=g), (H, W), mode="bicubic")[0, 0]
    true = depth_to_points(depth, K)
    mask = torch.ones(1, H, W)
    mask[:, : H // 4] = 0
    raw = (true - torch.tensor([0, 0, 1.5]))[None]
    raw[:, : H // 4] = 7.0  # what lies outside the mask does not matter
    for given in (None, fov):
        out = postprocess(raw, mask, metric_scale=torch.tensor([2.0]), fov_x=given)
        torch.testing.assert_close(out["intrinsics"][0], K, rtol=2e-3, atol=2e-3)
        inside = out["mask"][0]
        assert torch.equal(inside, mask[0] > 0.5)
        torch.testing.assert_close(out["points"][0][inside], 2 * true[inside], rtol=5e-3, atol=5e-3)
        assert out["depth"][0][~inside].isinf().all() and out["points"][0][~inside].isinf().all()


def test_focal_and_shift_from_bad_starts():
    """Points behind the camera before the shift, many at once, and hopeless input."""
    K = torch.tensor([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]])
    depth = 2 + torch.rand(1, 64, 64)
    points = depth_to_points(depth, K) - torch.tensor([0, 0, 4.0])
    focal, shift = recover_focal_shift(torch.cat([points, points + torch.tensor([0, 0, 3.0])]))
    torch.testing.assert_close(shift, torch.tensor([4.0, 1.0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(focal, torch.full((2,), 0.9 * 2 / 2**0.5), rtol=1e-3, atol=1e-3)
    for bad in (torch.full((1, 20, 20, 3), torch.nan), torch.zeros(1, 20, 20, 3), torch.full((1, 20, 20, 3), torch.inf)):
        focal, shift = recover_focal_shift(bad)
        assert focal.isfinite().all() and shift.isfinite().all()
