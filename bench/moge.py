"""Measurements of moge/: training step, losses, alignment solver and data pipeline. Called by bench/bench.py.

CPU figures are seconds of processor time on one thread. The CPU rows repeat a setting measured on the official code, one thread
of a similar machine: ViT-S with the MoGe-1 training head and losses, 224 x 280 pixels, 300 tokens, batch 1: 10.6 s per step, of
which losses 6.7 s; the solver alone with 32 x 32 anchors: 6.7 s and 1.0 GB; data from 480 x 640 to 250 kpixels: 1.88 samples/s
on two cores.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from moge import alignment
from moge.dataset import MoGeDataset, batch_keys
from moge.geometry import depth_to_points
from moge.io import write_instance
from moge.loss import total_loss
from moge.model import build
from moge.optimization import build_optimizer

HEAD = {"remap_output": "exp", "dim_upsample": [256, 128, 64], "dim_times_res_block_hidden": 2, "num_res_blocks": 2}
LOCAL = "affine_invariant_local_loss"
LOSSES = {
    "global": {"function": "affine_invariant_global_loss", "weight": 1.0, "params": {"align_resolution": 32}},
    "patch_4": {"function": LOCAL, "weight": 1.0, "params": {"level": 4, "align_resolution": 16, "num_patches": 16}},
    "patch_16": {"function": LOCAL, "weight": 1.0, "params": {"level": 16, "align_resolution": 8, "num_patches": 256}},
    "patch_64": {"function": LOCAL, "weight": 1.0, "params": {"level": 64, "align_resolution": 4, "num_patches": 4096}},
    "normal": {"function": "normal_loss", "weight": 1.0},
    "mask_l2": {"function": "mask_l2_loss", "weight": 1.0},
}
OPTIMIZER = {
    "type": "AdamW",
    "params": [
        {"params": {"include": ["*"], "exclude": ["*backbone.*"]}, "lr": 1e-4},
        {"params": {"include": ["*backbone.*"]}, "lr": 1e-5},
    ],
}


def make_batch(batch: int, height: int, width: int, device: str) -> dict:
    """Random images over smooth random depth with a sky and unknown pixels."""
    g = torch.Generator().manual_seed(0)
    depth = torch.nn.functional.interpolate(torch.rand(batch, 1, 8, 10, generator=g), (height, width), mode="bicubic")[:, 0]
    depth = 2 + 4 * depth.clamp_min(0)
    depth[:, : height // 8, width // 2 :] = torch.inf
    depth[torch.rand(depth.shape, generator=g) < 0.05] = torch.nan
    K = torch.tensor([[0.9, 0, 0.5], [0, 0.9 * width / height, 0.5], [0, 0, 1]]).expand(batch, 3, 3)
    made = {"image": torch.rand(batch, 3, height, width, generator=g), "depth": depth, "intrinsics": K}
    made |= {"depth_mask_fin": ~depth.isinf(), "depth_mask_inf": depth.isinf()}
    return {**{k: v.to(device) for k, v in made.items()}, "label_type": ["synthetic"] * batch, "is_metric": [False] * batch}


def clock(device: str) -> float:
    """Processor time, or on a GPU the wall clock once it has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def training_step(
    device: str, encoder: str, batch: int, size: tuple[int, int], tokens: int, checkpointing: bool, steps: int = 3
) -> dict:
    """Seconds of the parts of the fastest of some training steps, and peak memory on a GPU."""
    torch.manual_seed(0)
    model = build({"encoder": encoder, "num_tokens_range": [1200, 2500], **HEAD}).to(device)
    model.set_gradient_checkpointing(checkpointing)
    optimizer, data = build_optimizer(model, OPTIMIZER), make_batch(batch, *size, device)
    table, best = {"synthetic": LOSSES}, {"step_s": float("inf")}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        times = [clock(device)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = model(data["image"], tokens)
        times.append(clock(device))
        loss, _ = total_loss(table, out, data)
        times.append(clock(device))
        loss.backward()
        times.append(clock(device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock(device))
        parts = np.diff(times)
        if times[-1] - times[0] < best["step_s"]:
            best = {
                "step_s": times[-1] - times[0],
                **dict(zip(("forward_s", "losses_s", "backward_s", "update_s"), parts.tolist())),
            }
    if device == "cuda":
        best |= {"images_per_s": batch / best["step_s"], "peak_gb": torch.cuda.max_memory_allocated() / 2**30}
    return best


def losses_alone(device: str, size: tuple[int, int], batch: int = 1) -> dict:
    """Seconds of forward and backward of each loss, and of all together, on a good prediction."""
    data = make_batch(batch, *size, device)
    filled = torch.where(data["depth"].isfinite(), data["depth"], 3.0)
    noise = 1 + 0.02 * torch.randn(filled.shape, generator=torch.Generator().manual_seed(1)).to(device)
    points = (0.7 * depth_to_points(filled * noise, data["intrinsics"]) + 0.1).requires_grad_()
    out, figures = {"points": points, "mask": torch.rand_like(data["depth"]).requires_grad_()}, {}
    for name in [*LOSSES, "all"]:
        table = {"synthetic": LOSSES if name == "all" else {"global": LOSSES["global"], name: LOSSES[name]}}
        best = float("inf")
        for _ in range(3):
            start = clock(device)
            total_loss(table, out, data)[0].backward()
            best = min(best, clock(device) - start)
        figures[f"{name}_s"] = best
    for name in LOSSES:
        if name != "global":
            figures[f"{name}_s"] = max(0.0, figures[f"{name}_s"] - figures["global_s"])
    return figures


def solver(method: str, side: int, device: str) -> dict:
    """The alignment of side x side points, all of them anchors, with a shift along all axes: seconds, MB above the input,
    objective.

    method: "bounds" (ours) or "sort" (the plain way: one sort per anchor, all at once).
    """
    g = torch.Generator().manual_seed(0)
    target = torch.rand(1, side * side, 3, generator=g) * 2 + torch.tensor([-1, -1, 2.0])
    points = (0.7 * target + 0.03 * torch.randn(target.shape, generator=g)).to(device)
    target, weight = target.to(device), 1 / target[..., 2].to(device)

    def fit(n: int) -> float:
        p, g, w = points[:, :n], target[:, :n], weight[:, :n]
        if method == "bounds":
            s, t = alignment.align_scale_xyz_shift(p, g, w, 1.0)
            return (w[..., None] * (s[:, None, None] * p + t[:, None] - g).abs()).clamp_max(1).double().sum().item()
        k = torch.arange(n, device=device)
        x, y = alignment._terms(p, g, w, torch.ones(3, device=device), torch.zeros_like(k), k)
        return alignment._solve_rows(x, y, 1.0)[1].min().item()

    def megabytes(field: str) -> float:  # VmRSS: now, VmHWM: at most so far
        if device == "cuda":
            return (torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

    fit(16)  # warm
    before = megabytes("VmRSS")
    start = clock(device)
    value = fit(side * side)
    seconds = clock(device) - start
    return {"seconds": seconds, "memory_mb": megabytes("VmHWM") - before, "objective": value}


def in_new_process(*args) -> dict:
    """`solver` in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "bench.moge", *map(str, args)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout)


def data_pipeline(samples: int) -> dict:
    """Processor seconds per sample of MoGe-1's training data, from the files of an instance, 480 x 640, to 250 kpixels."""
    made = make_batch(1, 480, 640, "cpu")
    image = (made["image"][0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as root:
        write_instance(f"{root}/a", image, made["depth"][0].numpy(), made["intrinsics"][0].numpy())
        Path(root, ".index.txt").write_text("a\n")
        section = {"datasets": [{"path": root, "label_type": "synthetic"}], "area_range": [250000, 250000]}
        cfg = {"seed": 0, "batch_size_forward": 1, "gradient_accumulation_steps": 1, "data": section}
        dataset = MoGeDataset(section["datasets"], seed=0, defaults=section, normals=False)
        keys = [batch_keys(cfg, step, 0, 1)[0][0] for step in range(samples + 1)]
        dataset.read(keys.pop())
        start = time.process_time()
        for key in keys:
            dataset.read(key)
        seconds = (time.process_time() - start) / samples
    return {"seconds_per_sample": seconds, "samples_per_s_two_cores": 2 / seconds}


def measure(device: str, config: str) -> Iterator[tuple[str, dict]]:
    """Rows (name, figures) for bench.py."""
    tiny = config == "tiny"
    if device == "cpu":
        size, tokens = ((112, 140), 80) if tiny else ((224, 280), 300)
        yield "training step, ViT-S", training_step("cpu", "dinov2_vits14", 1, size, tokens, False, 1 if tiny else 3)
        yield "losses", losses_alone("cpu", size)
        for method in ("bounds", "sort"):
            yield f"solver, {method}", in_new_process(method, 16 if tiny else 32, device)
        yield "data", data_pipeline(2 if tiny else 20)
        return
    for batch in (2, 8):
        for checkpointing in (False, True):
            name = f"training step, ViT-L, batch {batch}, {'with' if checkpointing else 'without'} checkpointing"
            yield name, training_step("cuda", "dinov2_vitl14", batch, (700, 896), 2500, checkpointing, 2 if tiny else 6)
    yield "losses, batch 8", losses_alone("cuda", (700, 896), 8)
    for method in ("bounds", "sort"):
        yield f"solver, {method}", in_new_process(method, 32, device)
    yield "data", data_pipeline(2 if tiny else 20)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(solver(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
