"""LBM against the official implementation's values: every case of the folder, by its `kind`."""

import re

import golden
import numpy as np
import pytest
import torch
from golden import close
from lbm_data_checks import CHECKS as DATA_CHECKS

from lbm import loss
from lbm.backbone import inverse_norm, pool_pyramid, sample_tokens
from lbm.dataset import sample_queries
from lbm.deform_attn import DeformableAttention, Levels, sample
from lbm.model import LBM, LOSS_NAMES, Online, point_grid, rescale

NAMES = {  # entry of a case -> output of the transformer
    "offset": "offset", "vis_logit": "vis", "rho_logit": "rho", "mem_collision": "collision", "mem_stream": "stream",
    "ref_points": "candidates", "ref_rho": "candidate_rho", "corr": "corr", "lse": "log_sum",
}  # fmt: skip


def tensors(case, arrays) -> dict[str, torch.Tensor]:
    """Every input of a case by name: stored arrays win over draws, draws over formulas (which are only explanations)."""
    fill, make = golden.module("fill"), golden.module("lbm/inputs")
    found = {}
    for name, spec in (case.get("inputs", {}) | case.get("inputs_spec", {})).items():
        if isinstance(spec, list) and len(spec) > 1 and isinstance(spec[1], list):
            found[name] = fill.draw(*spec)
        elif isinstance(spec, dict) and spec.get("fn") == "inputs.video":
            found[name] = make.video(spec["seed"], spec["shape"])
        elif isinstance(spec, dict) and spec.get("fn") == "inputs.queries":
            found[name] = make.queries(spec["seed"], *spec["args"])
        elif isinstance(spec, dict) and spec.get("fn") == "inputs.queries(...)[0,:,1:]":
            found[name] = make.queries(spec["seed"], *spec["args"])[0, :, 1:]
        elif isinstance(spec, dict) and "shape" in spec:
            draw = fill.draw(spec["seed"], spec["shape"], spec.get("kind", "uniform"))
            found[name] = draw * np.float32(spec.get("scale", 1)) + np.float32(spec.get("offset", 0))
    for name in case.get("inputs_stored", []):
        found[name.removeprefix("in_")] = arrays[name]
    found |= {name.removeprefix("in_"): value for name, value in arrays.items() if name.startswith("in_")}
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


def build(case, **changes) -> LBM:
    """The case's model with the case's weights, in eval mode, deformable attention in plain PyTorch."""
    config = {k: v for k, v in case["config"].items() if k not in ("N", "T")}
    model = LBM(**config, msda="torch", random_memory_mask_drop=0.0, **changes).eval()
    if "visibility_threshold" in case:
        model.visibility_threshold = case["visibility_threshold"]
    model.requires_grad_(True)
    own, table = model.state_dict(), case["state_dict"]
    assert {k: list(v.shape) for k, v in own.items()} == table and list(own) == list(table)
    weights = golden.filled({k: s for k, s in table.items() if own[k].is_floating_point()}, golden.module("lbm/inputs").weights)
    model.load_state_dict(own | weights)
    return model


def watch(model) -> list[dict]:
    """A list that fills with the outputs of the transformer, one dict per frame."""
    frames = []
    model.transformer.register_forward_hook(lambda module, args, out: frames.append(dict(out)))
    return frames


def strided(tensor, every: int, count: int | None = None):
    """Every n-th of the last axis, at most `count`."""
    return tensor[..., ::every][..., :count]


def gradient_slice(grad, count: int):
    """The cases' slice of a flattened gradient."""
    return strided(grad.reshape(-1), max(1, grad.numel() // count), count)


def compare_candidates(got, rho, want, want_rho, tol, what, known=None):
    """Candidates (..., k, 2) as sets; their rho (..., k) in the same order, where the case holds it."""
    order = lambda x: torch.argsort(x[..., 1] * 1e5 + x[..., 0], -1)
    want = torch.from_numpy(want)
    mine, theirs = order(got), order(want)
    pick = lambda x, i: x.gather(-2, i[..., None].expand(*i.shape, 2))
    known = torch.ones(want.shape[:-2], dtype=torch.bool) if known is None else known
    close(pick(got, mine)[known], pick(want, theirs)[known], atol=1e-3, what=f"{what} candidates")
    if want_rho is not None:
        want_rho = torch.from_numpy(want_rho).gather(-1, theirs)
        close(rho.gather(-1, mine)[known], want_rho[known], atol=tol, rtol=tol, what=f"{what} rho")


def compare_frames(frames, arrays, tol, known=None):
    """Every per-frame entry of a case, (B, T, N, ...); `known` (B, T, N): only these are compared. Returns what it looked at."""
    seen = set()
    stack = lambda x: torch.stack(x, 1).detach()
    known = torch.ones(arrays["vis_logit"].shape, dtype=torch.bool) if known is None else known
    for entry, want in arrays.items():
        match = re.fullmatch(r"([a-z_]+?)(?:_(\d+))?(_lse_t05)?(?:_every(\d+))?", entry)
        if match is None or NAMES.get(match[1]) is None:
            continue
        name, layer, lse, every = match.groups()
        seen.add(entry)
        key = NAMES["lse" if lse else name]
        got = stack([out[key] if layer is None else out[key][int(layer)] for out in frames])
        if name == "ref_points":
            rho, want_rho = stack([out["candidate_rho"][int(layer)] for out in frames]), arrays.get(f"ref_rho_{layer}")
            compare_candidates(got, rho, want, want_rho, tol, entry, known)
        elif name != "ref_rho":  # compared with its candidates
            got = strided(got, int(every)) if every else got
            close(got[known], want[known.numpy()], atol=tol, rtol=tol, what=entry)
    return seen


def check_gradients(model, case, arrays):
    """Slices and norms of the gradients."""
    checked = 0
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if name in case["params_without_grad"]:
            assert grad is None or not grad.any(), name
            continue
        assert grad is not None, f"no gradient for {name}"
        if name.endswith("corr_conv.bias"):
            assert grad.abs().max() < 1e-4, name
            continue
        if name in case["grad_norms"]:
            close(grad.norm(), case["grad_norms"][name], rtol=2e-3, what=f"norm of the gradient of {name}")
        if f"grad.{name}" in arrays:
            want = arrays[f"grad.{name}"]
            top = max(np.abs(want).max(), grad.abs().max().item())  # of the whole gradient
            close(gradient_slice(grad, 64), want, atol=2e-3 * top, what=f"gradient of {name}")
            checked += 1
    assert checked + sum(k.endswith("corr_conv.bias") for k in arrays) == sum(k.startswith("grad.") for k in arrays)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    close(norm, case["grad_norm_all"], rtol=2e-3, what="norm of all gradients")


def check_model(case, arrays, name):
    given = tensors(case, arrays)
    model = build(case)
    for parameter in case["params_without_grad"]:
        model.get_parameter(parameter).requires_grad_(False)
    frames = watch(model)
    out = model(given["video"], given["queries"], given["gt_tracks"], given["gt_visibility"])
    seen = compare_frames(frames, arrays, 2e-4)
    own = {k for k in arrays if k.startswith(("grad.", "gt_", "in_"))} | {"points", "visibility"}
    assert seen | own == set(arrays), f"not compared: {set(arrays) - seen - own}"
    close(out["points"], arrays["points"], atol=2e-4, rtol=2e-4, what="points")
    close(out["visibility"], arrays["visibility"], what="visibility")
    assert set(case["losses"]) == set(LOSS_NAMES)
    for term in LOSS_NAMES:
        close(out[term], case["losses"][term], rtol=1e-4, what=term)
    close(out["loss"], case["total"], rtol=1e-4, what="total")
    out["loss"].backward()
    check_gradients(model, case, arrays)


def check_train_step(case, arrays, name):
    given = tensors(case, arrays)
    recipe = {k: float(v) for k, v in re.findall(r"\b(lr|wd|clip|eps) ([\d.]+(?:e-?\d+)?)", case["mode"])}
    betas = tuple(float(b) for b in re.search(r"betas ([\d.]+)/([\d.]+)", case["mode"]).groups())
    model = build(case).train()
    model.transformer.layers[-1].reference_rho.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), recipe["lr"], betas, recipe["eps"], recipe["wd"])
    for i, step in enumerate(case["steps"]):
        tol = 2e-4 if i == 0 else 2e-2
        out = model(given["video"], given["queries"], given["gt_tracks"], given["gt_visibility"])
        for term in LOSS_NAMES:
            close(out[term], step["losses"][term], rtol=tol, what=f"step {i + 1} {term}")
        close(out["loss"], step["total"], rtol=tol, what=f"step {i + 1} total")
        optimizer.zero_grad()
        out["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        close(norm, step["grad_norm_before_clip"], rtol=tol, what=f"step {i + 1} gradient norm")
        optimizer.step()
        if i > 0:
            continue
        close(out["points"], arrays["points"], atol=2e-4, rtol=2e-4, what="points")
        for entry, want in arrays.items():
            if entry.endswith(("running_mean", "running_var")):
                close(model.get_buffer(entry), want, atol=2e-4, rtol=2e-4, what=entry)
            elif entry.startswith("param_after_step1."):
                parameter = model.get_parameter(entry.removeprefix("param_after_step1."))
                # Adam's first step is lr * sign(gradient): where the gradient is nothing but rounding the sign is open.
                grad = gradient_slice(parameter.grad, 64)
                sure = (grad.abs() > 2e-3 * parameter.grad.abs().max()).numpy() & (grad.abs() > 1e-6).numpy()
                got = gradient_slice(parameter.detach(), 64).numpy()
                close(got[sure], want[sure], atol=1e-4, what=entry)
                close(got, want, atol=2.1 * recipe["lr"], what=entry)
            else:
                assert entry == "points" or entry.startswith(("gt_", "in_")), f"nothing checks {entry}"


def check_inference(case, arrays, name):
    given = tensors(case, arrays)
    model = build(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    extended = model.with_memory_size(case["new_memory_size"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    frames = watch(extended)
    out = extended.inference(given["video"], given["queries"])
    # The token of a point is taken when its query frame comes: what is before that differs by construction.
    known = torch.arange(len(frames))[None, :, None] >= given["queries"][:, None, :, 0]
    seen = compare_frames(frames, arrays, 2e-4, known)
    embeddings = {entry: match for entry in arrays if (match := re.fullmatch(r"(\w+_time_emb)_(\d+|last)", entry))}
    for entry, match in embeddings.items():
        layer = extended.transformer.layers[-1 if match[2] == "last" else int(match[2])]
        close(getattr(layer, match[1]), arrays[entry], atol=1e-5, what=entry)
    close(out["points"][known], arrays["points"][known.numpy()], atol=2e-3, what="points")
    close(out["visibility"][known], arrays["visibility"][known.numpy()], what="visibility")
    assert seen | set(embeddings) | {"points", "visibility"} | {k for k in arrays if k.startswith("in_")} == set(arrays)


def check_online(case, arrays, name):
    given, spec = tensors(case, arrays), case["inputs_spec"]
    video = given["video"][0]
    tracker = Online(build(case))
    tracker.init(given["points"], video[0])
    rows = []
    for t in range(1, len(video)):
        rows.append(tracker.step(video[t]))
        if t == spec["update_after_frame"]:
            n = len(rows[-1][0])
            remove = torch.zeros(n, dtype=torch.bool)
            remove[spec["removed_points"]] = True
            tracker.update(given["new_points"], tracker.frame_feat, torch.zeros_like(remove), remove)
    assert len(rows) == len(arrays["points"]) == len(arrays["visible"]) == len(arrays["rho"])
    for i, (points, visible, uncertainty) in enumerate(rows):
        close(points, arrays["points"][i], atol=2e-3, what=f"points {i}")
        close(visible, arrays["visible"][i], what=f"visible {i}")
        close(uncertainty, arrays["rho"][i], atol=2e-4, what=f"rho {i}")


def levels_of(shapes) -> Levels:
    """The layout of a pyramid with these (h, w)."""
    hw = torch.tensor(shapes)
    start = torch.cat((torch.zeros(1, dtype=torch.int64), hw.prod(1).cumsum(0)[:-1]))
    return Levels(tuple(map(tuple, shapes)), hw, start)


def check_msda(case, arrays, name):
    given = tensors({"inputs": case["inputs"] | {f"core_{k}": v for k, v in case["inputs"]["core"].items()}}, arrays)
    levels, heads = levels_of(case["levels"]), case["num_heads"]
    wh = levels.hw.flip(-1).float()
    module = DeformableAttention(case["embed_dims"], heads, len(wh), case["num_points"], 0.0)
    weights = golden.filled(case["state_dict"], golden.module("lbm/inputs").weights)
    module.load_state_dict({k.removeprefix("msda."): v for k, v in weights.items()})
    reference = given["reference"][:, :, None, None].expand(-1, -1, 1, len(wh), -1)  # (B, N, 1, L, 2)
    for form in (module._read_then_project, lambda levels, *args: module._project_then_read(levels, "torch", *args)):
        module._read_then_project = form  # what a CPU takes
        inputs = [x.clone().requires_grad_() for x in (given["query"], given["value"], reference)]
        out = module(inputs[0], inputs[2], inputs[1], levels).squeeze(2)
        close(out, arrays["out"], atol=1e-5, rtol=1e-5, what="out")
        module.zero_grad()
        out.backward(given["grad_out"])
        grads = {"query": inputs[0].grad, "value": inputs[1].grad[:, ::5], "ref": inputs[2].grad.squeeze(2)}
        for key, grad in grads.items():
            close(grad, arrays[f"grad_{key}"], scale_tol=1e-4, what=f"grad_{key}")
        for key, parameter in module.named_parameters():
            close(gradient_slice(parameter.grad, 64), arrays[f"grad.{key}"], scale_tol=1e-4, what=f"grad.{key}")

    locations, attention = given["core_locations"], given["core_attention"]
    value = given["core_value"].clone().requires_grad_()
    offsets = (locations * wh[:, None]).requires_grad_()  # from a reference at 0
    attention = attention.clone().requires_grad_()
    out = sample("torch", value, offsets, attention, torch.zeros(*locations.shape[:2], 1, len(wh), 2), levels)
    out = out.flatten(2)  # (B, N, 1, H, D) -> (B, N, H * D)
    close(out, arrays["core_out"], atol=1e-5, rtol=1e-5, what="core_out")
    out.backward(given["core_grad_out"])
    close(value.grad[:, ::5], arrays["core_grad_value"], scale_tol=1e-4, what="core_grad_value")
    close(offsets.grad * wh[:, None], arrays["core_grad_loc"], scale_tol=1e-4, what="core_grad_loc")
    close(attention.grad, arrays["core_grad_attn"], scale_tol=1e-4, what="core_grad_attn")


def check_layer(case, arrays, name):
    """One layer by itself; with raw memories, which the network only holds projected."""
    given = tensors(case, arrays)
    specs = case.get("inputs_spec", {}).values()
    small = any(spec.get("scale", 1) < 1 for spec in specs)  # inputs so small that eps counts: tighter tolerances
    q_tol, corr_tol, grad_tol = (2e-5, 2e-6, 1e-5) if small else (1e-4, 1e-4, 1e-4)
    model = build(case)
    layer, lattice = model.get_submodule(case["layer"]), model.transformer.lattice("torch")
    layer.k = case["n_topk"]
    query, feat, collision, stream = (given[k].requires_grad_() for k in ("query", "feat", "collision", "stream"))
    pyramid = pool_pyramid(feat.permute(0, 2, 3, 1))
    inv_norm = inverse_norm(pyramid)
    weights = layer.attention_weights()
    project = lambda memory, name: [torch.nn.functional.linear(x, *weights[name].entry) for x in memory.unbind(2)]
    entries = project(collision, "collision") + project(stream, "stream")
    ignore = given["vis_mask"] | given["mem_mask"]
    q, candidates, rho, corr, *_ = layer(query, pyramid, inv_norm, ignore, None, None, weights, lattice, *entries)
    alone = given.get("correlation_alone_query")
    alone = None if alone is None else layer.correlate(alone, pyramid, inv_norm, lattice.upsample)[0]
    for entry in (k for k in arrays if "_every" in k and k.startswith("corr")):
        name, every = entry.split("_every")
        close(strided({"corr": corr, "correlation_alone": alone}[name], int(every)), arrays[entry], atol=corr_tol, what=entry)
    compare_candidates(candidates, rho.detach(), arrays["ref_points"], arrays["ref_rho"], q_tol, "layer")
    close(q, arrays["q_out"], atol=q_tol, what="q_out")
    ((corr * given["gc"]).sum() + (q * given["gq"]).sum() + rho.sum()).backward()
    grads = {
        "grad_query": query.grad,
        "grad_feat_every": feat.grad.flatten(2)[:, ::8, ::7],
        "grad_collision": strided(collision.grad, 16),
        "grad_stream": strided(stream.grad, 16),
    } | {f"grad.{key}": gradient_slice(p.grad, 32) for key, p in layer.named_parameters()}
    tops = {f"grad.{key}": p.grad.abs().max().item() for key, p in layer.named_parameters()}
    assert set(grads) == {k for k in arrays if k.startswith("grad")}
    for key, grad in grads.items():
        close(grad, arrays[key], atol=grad_tol * max(np.abs(arrays[key]).max(), tops.get(key, 0)), what=key)


def check_backbone(case, arrays, name):
    given = tensors(case, arrays)
    model = build(case)
    video, size = given["video"], given["video"].shape[-2:]
    b, t = video.shape[:2]
    tokens = lambda f: f.unflatten(0, (t, b)).transpose(0, 1).flatten(2, 3)[:, :, ::17, ::16]  # (B, T, cells, C)
    with torch.no_grad():
        f, pyramid = model.encode(video.transpose(0, 1).flatten(0, 1))
        close(tokens(f), arrays["tokens_every"], atol=2e-4, rtol=2e-4, what="tokens")
        queries = torch.cat((given["queries"][..., :1], rescale(given["queries"][..., 1:], size, model.input_size)), -1)
        got = sample_tokens(f.unflatten(0, (t, b)), queries, model.input_size)
        close(got, arrays["query_tokens"], atol=2e-4, rtol=2e-4, what="query tokens")
        levels = pyramid.unflatten(0, (t, b))[0].split([h * w for h, w in model.transformer.shapes], 1)
        for i, level in enumerate(levels):
            close(level[:, ::13, ::16], arrays[f"level{i}_every"], atol=2e-4, rtol=2e-4, what=f"level {i}")
        f = model.train().encode(video.transpose(0, 1).flatten(0, 1))[0]
        close(tokens(f), arrays["tokens_trainmode_every"], atol=2e-4, rtol=2e-4, what="tokens in train mode")


def check_losses(case, arrays, name):
    given, stride = tensors(case, arrays), case["stride"]
    sharper = loss.TEMPERATURE / case["temperature"]  # ours is a constant
    weight, size = case["lambdas"], case["size"]
    visible, gt = given["visible"], given["gt"]
    index = loss.cell_index(gt, size, stride)
    close(index, arrays["gt_index"], what="class index")

    def terms(visible):
        scored, both = loss.loss_masks(given["query_time"], visible, after_query=case["loss_after_query"])
        leaf = {k: given[k].clone().requires_grad_() for k in ("corr", "vis_logit", "rho_logit", "offset")}
        place = given["track_for_uncertainty"]
        values = {
            "classification": weight["cls"] * loss.classification_loss(*loss.log_partition(leaf["corr"] * sharper, index), both),
            "visibility": weight["vis"] * loss.visibility_loss(leaf["vis_logit"], visible, scored),
            "regression": weight["reg"] * loss.regression_loss(leaf["offset"], given["ref"], gt, both, stride),
            "uncertainty": weight["unc"] * loss.uncertainty_loss(leaf["rho_logit"], place, gt, visible, scored),
        }
        sum(values.values()).backward()
        return values, dict(zip(values, (leaf[k].grad for k in ("corr", "vis_logit", "offset", "rho_logit")))), scored, both

    values, grads, scored, both = terms(visible)
    close(scored.sum(), arrays["n_time"], what="n_time")
    close(both.sum(), arrays["n_point"], what="n_point")
    for key, want in case["values"].items():
        close(values[key], want, rtol=1e-5, what=key)
        grad = strided(grads[key], 7) if key == "classification" else grads[key]
        close(grad, arrays[f"grad_{key}"], atol=1e-5 * grads[key].abs().max().item(), what=f"gradient of {key}")
    values, grads, *_ = terms(torch.zeros_like(visible))
    for key, want in case["all_invisible_values_upstream"].items():
        close(values[key], 0.0 if want is None else want, rtol=1e-5, what=f"{key}, nothing visible")
        assert torch.isfinite(grads[key]).all(), key


def check_coords(case, arrays, name):
    given, size = tensors(case, arrays), case["size"]
    close(loss.cell_center(given["indices"], size, case["stride"]), arrays["coords"], what="coords")
    close(loss.cell_index(given["points"], size, case["stride"]), arrays["indices_of_points"], what="indices")
    for b, want in enumerate(arrays["queries"]):
        got = sample_queries(given["tracks"][b].numpy(), given["visible"][b].numpy(), np.random.default_rng(b))
        close(got, want, what="queries")
    for entry in (k for k in arrays if k.startswith("grid")):
        close(point_grid(int(entry.removeprefix("grid")), *size), arrays[entry], atol=1e-4, what=entry)


def check_schedule_and_shapes(case, arrays, name):
    from lbm.train import lr_at

    steps = case["iters_per_epoch"] * case["epochs"]
    for step, want in case["lr_used_by_step_i"].items():
        close(lr_at(int(step), steps, case["base_lr"]), want, rtol=1e-9, atol=1e-20, what=f"lr of step {step}")
    model = LBM(**{k: v for k, v in case["config"].items() if k not in ("N", "T")})
    own = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert own == case["default_state_dict"] and list(own) == list(case["default_state_dict"])
    assert sum(p.numel() for p in model.parameters()) == case["params_total"]
    for module in (m for m in model.modules() if isinstance(m, DeformableAttention)):
        bias = module.sampling_offsets.bias.view(module.heads, module.levels, -1)
        for head, which in enumerate(("first", "second")):
            want = np.array(case[f"init_sampling_offsets_bias_{which}_head"])
            for level in range(module.levels):
                close(bias[head, level], want[: 2 * module.points], atol=1e-6, what=f"{which} head")
        assert not module.sampling_offsets.weight.any() and not module.attention_weights.weight.any()


CHECKS = DATA_CHECKS | {
    "model": check_model,
    "train_step": check_train_step,
    "inference": check_inference,
    "online": check_online,
    "msda": check_msda,
    "layer": check_layer,
    "backbone": check_backbone,
    "losses": check_losses,
    "coords": check_coords,
    "schedule_and_shapes": check_schedule_and_shapes,
}


@pytest.mark.parametrize("name", golden.names("lbm"))
def test_golden(name):
    case, arrays = golden.load("lbm", name)
    assert case["kind"] in CHECKS, f"unknown kind {case['kind']}"
    CHECKS[case["kind"]](case, arrays, name)
