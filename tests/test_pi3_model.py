"""Pi3's network: rotations, checkpointing, freezing, initialisation from other weights, precision."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import pi3 as bench
from common.checkpoint import Checkpoints, load_weights
from pi3 import weights
from pi3.attention import rope_tables, rotate, token_positions
from pi3.dataset import unpack
from pi3.geometry import nearest_rotation
from pi3.loss import pi3_loss
from pi3.model import Pi3, conf_from_points, freeze, load_pretrained, load_vggt
from pi3.pi3x import Pi3X
from pi3.schedule import parameter_groups
from pi3.segformer import SegFormer, load_segformer
from pi3.train import compile_blocks
from pi3.weights import find_weights

SIZES = {"enc_dim": 48, "enc_depth": 1, "enc_heads": 3, "dec_dim": 48, "dec_depth": 6, "dec_heads": 3, "head_dim": 32,
         "head_depth": 1, "head_heads": 2, "point_out": 24, "camera_dim": 16, "pos_img_size": 56}  # fmt: skip


def tiny(**options) -> Pi3:
    torch.manual_seed(0)
    return Pi3(**SIZES | options)


def images(B: int = 1, N: int = 3, H: int = 28, W: int = 42) -> Tensor:
    return torch.rand(B, N, 3, H, W, generator=torch.Generator().manual_seed(1))


def loss_of(pred: dict[str, Tensor]) -> Tensor:
    B, N, H, W, _ = pred["local_points"].shape
    points = torch.rand(B, N, H, W, 3, generator=torch.Generator().manual_seed(2)) + 0.5
    sky = torch.zeros(B, N, H, W, dtype=torch.bool) if pred["conf"] is not None else None
    truth = points, torch.eye(4).repeat(B, N, 1, 1), torch.ones(B, N, H, W, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    return pi3_loss(pred, *truth, sky)["loss"]


def training_loss(model: Pi3, imgs: Tensor) -> Tensor:
    return loss_of(model(imgs))


def kept(function) -> int:
    """Bytes of distinct storages that a function's graph keeps."""
    sizes = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    del result
    return sum(sizes.values())


# rotations


def by_svd(M: Tensor) -> Tensor:
    U, _, Vt = torch.linalg.svd(M)
    sign = torch.linalg.det(U @ Vt)
    return U @ torch.diag_embed(torch.stack((torch.ones_like(sign), torch.ones_like(sign), sign), -1)) @ Vt


def test_nearest_rotation_is_that_of_the_svd():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(2000, 3, 3, generator=g, dtype=torch.float64)
    M[:300, :, 2] *= -1e-3  # nearly flat ones, of both signs
    M[300:600] = by_svd(M[300:600]) + 1e-4 * torch.randn(300, 3, 3, generator=g, dtype=torch.float64)  # nearly rotations
    M *= torch.logspace(-3, 3, 2000, dtype=torch.float64)[:, None, None]
    s = torch.linalg.svdvals(M)
    clear = s[:, 1] + torch.linalg.det(M).sign() * s[:, 2] > 1e-3 * s[:, 0]
    assert clear.sum() > 1900
    assert (nearest_rotation(M) - by_svd(M))[clear].abs().max() < 1e-6


def test_nearest_rotation_has_the_derivative_of_the_svd():
    g = torch.Generator().manual_seed(1)
    M = torch.randn(50, 3, 3, generator=g, dtype=torch.float64)
    W = torch.randn(50, 3, 3, generator=g, dtype=torch.float64)
    gradients = []
    for function in (nearest_rotation, by_svd):
        x = M.clone().requires_grad_()
        (function(x) * W).sum().backward()
        gradients.append(x.grad)
    error = (gradients[0] - gradients[1]).flatten(1).norm(dim=1) / gradients[1].flatten(1).norm(dim=1)
    assert error.max() < 1e-5


@pytest.mark.parametrize("diagonal", [(1, 1, 1), (1, 1, -1), (0, 0, 0), (1, 0, 0)])
def test_rotation_of_degenerate_matrices_has_finite_gradients(diagonal: tuple[int, ...]):
    M = torch.diag(torch.tensor(diagonal).float())
    x = M.clone().requires_grad_()
    R = nearest_rotation(x)
    (R * torch.arange(9.0).view(3, 3)).sum().backward()
    assert x.grad.isfinite().all()
    assert torch.allclose(R @ R.T, torch.eye(3), atol=1e-6) and torch.linalg.det(R) > 0
    if torch.equal(M, torch.eye(3)):  # well defined, though all singular values agree: d tr(W^T R) = <(W - W^T) / 2, dM>
        W = torch.arange(9.0).view(3, 3)
        assert torch.allclose(x.grad, (W - W.T) / 2, atol=1e-5)


# attention


def test_rotary_products_depend_on_differences_of_positions_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 32, generator=g), torch.randn(1, 1, 32, generator=g)
    at = lambda t, y, x: rotate(t, rope_tables(torch.tensor([[y, x]]), 32))
    product = lambda a, b: (at(q, *a) * at(k, *b)).sum()
    assert torch.allclose(product((3, 5), (1, 2)), product((13, 8), (11, 5)), atol=1e-4)
    assert not torch.allclose(product((3, 5), (1, 2)), product((3, 5), (2, 1)), atol=1e-2)
    assert torch.equal(at(q, 0, 0), q)


def test_rope_angles_can_be_rounded_as_published():
    positions = token_positions(37, 37, 5)
    exact, same = (rope_tables(positions, 64, dtype=torch.bfloat16, angles=a)[0] for a in ("float32", "activation"))
    assert (exact - same).abs().max() > 0.05
    with pytest.raises(ValueError, match="rope_angles"):
        rope_tables(positions, 64, angles="float16")


# training


def test_checkpointing_changes_memory_and_nothing_else():
    memory, results = {}, {}
    for K in (0, 4, 6):
        model = tiny(num_dec_blk_not_to_checkpoint=K).train()
        freeze(model)
        memory[K] = kept(lambda model=model: training_loss(model, images()))
        loss = training_loss(model, images())
        loss.backward()
        results[K] = [loss, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert memory[0] < memory[4] < memory[6]
    heads = tiny(num_dec_blk_not_to_checkpoint=0, checkpoint_heads=True).train()
    freeze(heads)
    assert kept(lambda: training_loss(heads, images())) < memory[0]
    plain, saving = (tiny(use_global_points=True, checkpoint_heads=on).train().global_points_decoder for on in (False, True))
    tokens, rope = torch.rand(2, 11, 96), tiny().rope(token_positions(2, 3, 5), 16)
    assert kept(lambda: saving(tokens, tokens, rope)) < 0.5 * kept(lambda: plain(tokens, tokens, rope))
    assert torch.equal(saving(tokens, tokens, rope), plain(tokens, tokens, rope))
    for K in (0, 4):
        assert all(torch.equal(a, b) for a, b in zip(results[K], results[6]))
    assert tiny().num_dec_blk_not_to_checkpoint == 4 and tiny(num_dec_blk_to_checkpoint=5).num_dec_blk_not_to_checkpoint == 1
    with pytest.raises(ValueError, match="give one of them"):
        tiny(num_dec_blk_to_checkpoint=2, num_dec_blk_not_to_checkpoint=4)


@pytest.mark.parametrize("stage, amp", [("all", None), ("lowres", torch.bfloat16), ("conf", None)])
def test_compiled_blocks_have_the_same_loss_and_gradients(stage: str, amp: torch.dtype | None):
    """As train.py compiles them, under recomputation too: nothing changes, and every trained parameter has a gradient."""
    torch._dynamo.reset()
    model = tiny(train_conf=stage == "conf", dec_depth=4, num_dec_blk_not_to_checkpoint=2, checkpoint_heads=True).train()
    freeze(model, encoder=stage == "lowres", all_but_conf=stage == "conf")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    results = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, one_size=True, backend="aot_eager")
        with torch.autocast("cpu", amp, enabled=amp is not None):
            pred = model(images())
        loss = loss_of(pred)
        results.append((loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))))
    (plain, expected), (loss, got) = results
    tolerance = 1e-4 if amp is None else 2e-2  # fused casts round bfloat16 elsewhere
    assert loss == pytest.approx(plain, rel=tolerance)
    for name in trained:
        size = expected[name].abs().max()
        if name == "camera_head.fc_t.bias":  # a common shift of all cameras: the loss does not see it
            assert max(size, got[name].abs().max()) < 1e-6
            continue
        assert size > 0 and got[name].abs().max() > 0, name
        assert (got[name] - expected[name]).abs().max() <= tolerance * size + 1e-7, name
    torch._dynamo.reset()


def test_compiled_blocks_take_changing_sizes_without_falling_back():
    """Numbers of views and sizes change every step: the graphs of the first few serve all others, and none is turned away."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = tiny(dec_depth=4).train()
    compile_blocks(model, one_size=False, backend="eager")
    for shape in ((1, 3, 28, 42), (1, 2, 42, 28), (2, 3, 28, 56), (1, 4, 28, 42), (3, 2, 42, 42)):
        loss_of(model(images(*shape))).backward()
        with torch.no_grad():
            model.eval()(images(*shape))
        model.train()
    graphs = counters["stats"]["unique_graphs"]
    for shape in ((1, 5, 56, 42), (4, 2, 28, 70), (2, 6, 42, 56)):
        loss_of(model(images(*shape))).backward()
    assert graphs > 4 and counters["stats"]["unique_graphs"] == graphs
    assert not counters["unimplemented"] and not counters["graph_break"]
    torch._dynamo.reset()


def test_stages_train_their_parts_and_keep_nothing_for_the_rest():
    model = tiny(train_conf=True).train()
    freeze(model)
    training_loss(model, images()).backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    everything = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert with_gradient == everything - {"encoder"}
    whole = kept(lambda: training_loss(model, images()))
    model.zero_grad()
    freeze(model, all_but_conf=True)
    training_loss(model, images()).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"conf_decoder", "conf_head"}
    assert kept(lambda: training_loss(model, images())) < whole / 2
    freeze(model, encoder=False)
    assert all(p.requires_grad for p in model.parameters())


def test_full_size_parameter_groups():
    with torch.device("meta"):
        model = Pi3()
    freeze(model)
    groups = parameter_groups(model, 5e-5, 5e-6, 0.05)
    count = [(len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"]) for g in groups]
    assert count == [(599, 703_576, 0.0), (200, 587_291_648, 0.05)]
    freeze(model, encoder=False)
    assert [g["base_lr"] for g in parameter_groups(model, 5e-5, 5e-6, 0.0)] == [5e-6, 5e-6, 5e-5, 5e-5]


def test_autocast_keeps_heads_and_geometry_in_float32():
    model, x = tiny(train_conf=True).eval(), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    exact = model(x)
    for name in ("local_points", "camera_poses", "points", "conf"):
        assert out[name].dtype == torch.float32
        assert (out[name] - exact[name]).abs().max() < 0.05 * exact[name].abs().max(), name
    R = out["camera_poses"][..., :3, :3]
    assert torch.allclose(R @ R.mT, torch.eye(3).expand_as(R), atol=1e-6)


class Waits(TorchDispatchMode):
    """Collects the operations that make the host wait for a GPU: reading values, sizes that depend on them, constants copied there."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        waits = name.startswith(("aten._local_scalar", "aten.nonzero", "aten.masked_select", "aten.equal.", "aten.lift_fresh"))
        if waits or ("index" in name and any(getattr(t, "dtype", None) == torch.bool for t in tree_leaves(args[1:]))):
            self.seen.add(name)
        return operation(*args, **(kwargs or {}))


def test_a_step_does_not_make_the_host_wait():
    model, segformer = tiny(train_conf=True, dec_depth=2).train(), SegFormer()
    batch = {"images": torch.zeros(1, 3, 42, 56, 3, dtype=torch.uint8), "depth": torch.ones(1, 3, 42, 56), "z_far": torch.zeros(1),
             "intrinsics": torch.eye(3).expand(1, 3, 3, 3), "poses": torch.eye(4).expand(1, 3, 4, 4)}  # fmt: skip
    with Waits() as waits:
        truth = unpack(batch, "cpu")
        sky = segformer.sky(truth["imgs"])
        pred = model(truth["imgs"])
        pi3_loss(pred, truth["local_points"], truth["poses"], truth["mask"], torch.ones(1, dtype=torch.bool), sky)["loss"].backward()
    assert not waits.seen
    with Waits() as waits:
        assert truth["mask"][truth["mask"]].sum().item() and torch.tensor([1.0]).sum()
    assert {"aten.lift_fresh.default", "aten._local_scalar_dense.default", "aten.index.Tensor"} <= waits.seen


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="enc_dim 32 and dec_dim 48"):
        tiny(enc_dim=32)
    with pytest.raises(ValueError, match="enc_dim 48 does not divide into enc_heads 5"):
        tiny(enc_heads=5)
    with pytest.raises(ValueError, match="in pairs"):
        tiny(dec_depth=5)
    with pytest.raises(ValueError, match="30x42"):
        tiny()(images(H=30))


# weights from elsewhere


def vggt(model: Pi3, pairs: int = 5) -> dict[str, Tensor]:
    """A VGGT-like state dict with more blocks than the model uses and parts it does not have."""
    state = {f"aggregator.patch_embed.{k}": torch.randn_like(v) for k, v in model.encoder.state_dict().items()}
    for kind in ("frame", "global"):
        for i in range(pairs):
            block = model.decoder[0].state_dict()
            state |= {f"aggregator.{kind}_blocks.{i}.{k}": torch.randn_like(v) for k, v in block.items()}
    return state | {"aggregator.camera_token": torch.zeros(1, 2, 1, 48), "aggregator.patch_embed.mask_token": torch.zeros(1, 48)}


def test_vggt_blocks_interleave():
    model = tiny()
    state, heads = vggt(model), copy.deepcopy(model.point_decoder.state_dict())
    report = load_vggt(model, state)
    for i in range(3):
        for offset, kind in ((0, "frame"), (1, "global")):
            got, want = model.decoder[2 * i + offset].attn.qkv.weight, state[f"aggregator.{kind}_blocks.{i}.attn.qkv.weight"]
            assert torch.equal(got, want)
    assert torch.equal(model.encoder.pos_embed, state["aggregator.patch_embed.pos_embed"])
    assert all(torch.equal(v, heads[k]) for k, v in model.point_decoder.state_dict().items())
    blocks = 2 * 2 * len(model.decoder[0].state_dict())  # two of five pairs are left over, and two tokens
    assert f"{blocks + 2} of the file ignored" in report
    del state["aggregator.global_blocks.2.ls1.gamma"]
    with pytest.raises(ValueError, match=r"decoder\.5\.ls1\.gamma"):
        load_vggt(model, state)


def test_a_runs_folder_stands_for_its_last_checkpoint(tmp_path):
    """Also where later files of a run that was turned back from lie beside it; without the record, the highest step."""
    run = Checkpoints(tmp_path / "checkpoint", keep_last=9)
    for step in (2, 4, 6, 3):  # back to step 2
        run.save(step, {"": {"model": {"x": torch.ones(1)}}})
        assert run.wait() is None
    files = {step: tmp_path / f"checkpoint/{step:08d}.pt" for step in (3, 4, 6)}
    assert files[6].exists() and find_weights(tmp_path) == find_weights(tmp_path / "checkpoint" / "latest.pt") == files[3]
    assert find_weights(files[4]) == files[4]
    (tmp_path / "checkpoint" / "latest.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"latest\.pt is damaged"):
        find_weights(tmp_path)
    (tmp_path / "checkpoint" / "latest.pt").unlink()
    assert find_weights(tmp_path) == files[6]
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        find_weights(tmp_path.parent)


def test_exported_weights_have_the_published_names(tmp_path, monkeypatch):
    model, file = tiny(train_conf=True), tmp_path / "new" / "pi3.safetensors"
    torch.save({"model": model.state_dict(), "config": {}}, tmp_path / "best.pt")
    monkeypatch.setattr("sys.argv", ["weights.py", "--ckpt", str(tmp_path / "best.pt"), "--export", str(file)])
    weights.main()
    assert "0 of the confidence branch start fresh, 0 of the file ignored" in load_pretrained(tiny(train_conf=True), load_weights(file))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_weights(file).items())


def test_only_the_confidence_branch_may_be_missing():
    source, model = tiny(), tiny(train_conf=True)
    state = source.state_dict()
    with pytest.raises(ValueError, match="conf_head"):
        load_pretrained(model, state)
    before = copy.deepcopy(model.conf_decoder.state_dict())
    assert "start fresh" in load_pretrained(model, state, conf_may_start_fresh=True)
    assert all(torch.equal(v, before[k]) for k, v in model.conf_decoder.state_dict().items())
    conf_from_points(model)
    assert torch.equal(model.conf_decoder.projects.weight, source.point_decoder.projects.weight)
    load_pretrained(source, model.state_dict())  # a model without the branch ignores it
    with pytest.raises(ValueError, match=r"missing \['register_token'\]"):
        load_pretrained(model, {k: v for k, v in state.items() if k != "register_token"}, conf_may_start_fresh=True)
    with pytest.raises(ValueError, match=r"register_token \(1, 1, 4, 48\) for \(1, 1, 5, 48\)"):
        load_pretrained(source, state | {"register_token": torch.zeros(1, 1, 4, 48)})


def test_pi3x_predicts_metric_points():
    torch.manual_seed(0)
    model = Pi3X(**SIZES, metric_dim=16, metric_heads=2).eval()
    x = images()
    with torch.no_grad():
        out = model(x)
        model.metric_head.bias += 1.0  # one more in the logarithm of the scale
        larger = model(x)
    assert out["local_points"].shape == (1, 3, 28, 42, 3) and out["conf"].shape == (1, 3, 28, 42, 1)
    assert torch.allclose(out["rays"].norm(dim=-1), torch.ones(1, 3, 28, 42), atol=1e-5)
    e = torch.tensor(1.0).exp()
    assert torch.allclose(larger["local_points"], e * out["local_points"], rtol=1e-4)
    assert torch.allclose(larger["camera_poses"][..., :3, 3], e * out["camera_poses"][..., :3, 3], rtol=1e-4)
    assert torch.equal(larger["camera_poses"][..., :3, :3], out["camera_poses"][..., :3, :3])


# sky


def test_benchmark_measures_and_its_memory_figures_order():
    """The small form of `bench.py pi3`: every figure is there, and what is recomputed is not kept."""
    rows = dict(bench.measure("cpu", "tiny"))
    assert all(value > 0 for row in rows.values() for value in row.values()) and len(rows) == 8
    kept = [row["kept_gib"] for name, row in rows.items() if name.startswith("kept for backward")]
    assert kept[2] > kept[0] > kept[1]  # nothing, decoder blocks, heads too


def test_segformer_file(tmp_path):
    path = tmp_path / "segformer.b0.512x512.ade.160k.pth"
    with pytest.raises(FileNotFoundError, match=r"get it from .*segformer"):
        load_segformer(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=str(path)):
        load_segformer(path)
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="not the weights of SegFormer-B0"):
        load_segformer(path)
    torch.manual_seed(0)
    model = SegFormer()
    with torch.no_grad():
        model.decode_head.linear_pred.bias[2] += 0.2
    torch.save({"meta": {"epoch": 1}, "state_dict": model.state_dict()}, path)
    loaded = load_segformer(path)
    x = torch.rand(2, 3, 3, 32, 48)
    sky = loaded.sky(x, chunk=4)
    assert sky.shape == (2, 3, 32, 48) and sky.dtype == torch.bool and 0 < sky.sum() < sky.numel()
    assert torch.equal(sky, loaded.sky(x, chunk=100)) and not torch.equal(sky, loaded.sky(x, normalise=False))
    assert not loaded.train().training and not any(p.requires_grad for p in loaded.parameters())
