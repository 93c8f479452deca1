"""Measurements of stereo/: step and forward time, peak memory, bytes kept for the backward pass. Called by bench/bench.py.

Every row runs in a process of its own, so that its peak memory is its own: python -m bench.stereo FUNCTION '{"json": ...}'.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.stereo_data import loader_rates
from stereo.loss import foundation_stereo_loss
from stereo.model import FoundationStereo

# The official network on one thread in float32, ViT-S, max_disp 64, batch 1: (height, width, iterations) -> s per step, peak MB
OFFICIAL = {(64, 96, 3): (3.67, 1710), (128, 192, 4): (17.7, 2330)}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_pair(batch: int, height: int, width: int, device: str) -> tuple[torch.Tensor, ...]:
    """Left and right images 0..255, ground truth (B, 1, H, W) and its mask."""
    g = torch.Generator().manual_seed(0)
    left = 255 * torch.rand(batch, 3, height, width, generator=g)
    gt = 1 + 40 * torch.rand(batch, 1, height, width, generator=g)
    tensors = (left, left.roll(-5, -1), gt, torch.ones_like(gt, dtype=torch.bool))
    return tuple(t.to(device) for t in tensors)


def loss_of(model: FoundationStereo, batch: tuple[torch.Tensor, ...], iters: int, dtype: torch.dtype | None) -> torch.Tensor:
    left, right, gt, valid = batch
    with torch.autocast(left.device.type, dtype, enabled=dtype is not None):
        out = model(left, right, iters=iters)
    return foundation_stereo_loss(out["init"], out["preds"], gt, valid, model.max_disp)[0]


def timed(function, repeats: int, device: str) -> dict:
    """Median seconds of `repeats` calls after a first one: wall time and, on a CPU, time of the process."""
    wall, cpu = [], []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    figures = {"wall_s": statistics.median(wall[1:]), "first_s": wall[0]}
    return figures if device == "cuda" else {"cpu_s": statistics.median(cpu[1:]), **figures}


def peak_mb(device: str) -> float:
    """Peak memory so far: allocated on the GPU, or resident in this process (interpreter and libraries included)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def train_step(
    height: int,
    width: int,
    iters: int,
    batch: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    repeats: int = 3,
    compiled: bool = False,
    **config,
) -> dict:
    """Forward, loss and backward of one step (no optimizer).

    peak_mb: of the whole process. start_mb: the same before the first step, with interpreter, libraries and model.
    memory_ratio: what a step takes above start_mb, over what the official peak has above it (the libraries being the same);
    memory_ratio_weights: the same above the bare weights, so that the libraries count as memory of the step on both sides.
    """
    torch.manual_seed(0)
    model = FoundationStereo(**config).to(device).train()
    if compiled:
        model.compile_step()
    images, start_mb = random_pair(batch, height, width, device), peak_mb(device)

    def step():
        model.zero_grad(set_to_none=True)
        loss_of(model, images, iters, DTYPES[dtype]).backward()

    figures = timed(step, repeats, device)
    model_mb = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e6
    figures |= {"peak_mb": peak_mb(device), "start_mb": start_mb, "model_mb": model_mb}
    official = OFFICIAL.get((height, width, iters))
    if official and device == "cpu" and config.get("vit_size") == "vits" and config.get("max_disp") == 64 and batch == 1:
        figures["times_faster"] = official[0] / figures["cpu_s"]
        figures["memory_ratio"] = (figures["peak_mb"] - start_mb) / (official[1] - start_mb)
        figures["memory_ratio_weights"] = (figures["peak_mb"] - model_mb) / (official[1] - model_mb)
    return figures


def forward(
    height: int, width: int, iters: int, batch: int = 1, device: str = "cpu", dtype: str = "float32", repeats: int = 3, **config
) -> dict:
    """Inference without a graph, only the last disparity enlarged."""
    torch.manual_seed(0)
    model = FoundationStereo(**config).to(device).eval()
    left, right, _, _ = random_pair(batch, height, width, device)

    @torch.inference_mode()
    def run():
        with torch.autocast(device, DTYPES[dtype], enabled=dtype != "float32"):
            model(left, right, iters=iters)

    return {**timed(run, repeats, device), "peak_mb": peak_mb(device)}


def kept_bytes(height: int, width: int, iters: int, batch: int = 1, dtype: str = "bfloat16", **config) -> dict:
    """Bytes that the forward pass of a training step keeps for its backward pass, counted on fake tensors (no memory used).

    kept_gb: distinct storages handed to autograd, without parameters, buffers and the batch. largest: by kind, in MB.
    """
    with FakeTensorMode():
        model = FoundationStereo(**config).train()
        images = random_pair(batch, height, width, "cpu")
        given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *images)}
        kept, kinds = {}, {}

        def pack(t):
            storage = t.untyped_storage()
            if storage._cdata not in given and storage._cdata not in kept:
                kept[storage._cdata] = storage  # holding it keeps the address from being used again
                kind = f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
                kinds[kind] = kinds.get(kind, 0) + storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss_of(model, images, iters, DTYPES[dtype])
        total = sum(s.nbytes() for s in kept.values())
    largest = sorted(kinds.items(), key=lambda x: -x[1])[:8]
    return {"kept_gb": total / 1e9, "largest": {k: round(v / 1e6) for k, v in largest}}


def fresh(function: str, **arguments) -> dict:
    """Run a function of this file in a new process and return its result."""
    command = [sys.executable, "-m", "bench.stereo", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(device: str, config: str) -> Iterator[tuple[str, dict]]:
    """Rows (name, figures). config "tiny": a small network, a few seconds in all."""
    if config == "tiny":
        small = {"vit_size": None, "max_disp": 32, "hidden_dims": (32, 32, 32), "n_gru_layers": 2, "volume_dim": 8, "iters": 2}
        yield "train step, tiny, 64x96", fresh("train_step", height=64, width=96, batch=2, device=device, repeats=1, **small)
        yield "kept, tiny, 64x96", fresh("kept_bytes", height=64, width=96, batch=2, **small)
        yield "loader, 1280x720 to 736x320, per core", loader_rates(pairs=1, reads=4)
        return
    if device == "cpu":
        for height, width, iters in OFFICIAL:
            case = {"height": height, "width": width, "iters": iters, "vit_size": "vits", "max_disp": 64}
            name = f"ViT-S, {height}x{width}, {iters} iterations, float32"
            yield f"train step, {name}", fresh("train_step", **case)
            yield f"train step, {name}, checkpointing", fresh("train_step", checkpointing=True, **case)
            yield f"forward, {name}", fresh("forward", **case)
        yield "loader, 1280x720 to 736x320, per core", loader_rates()
    crop = {"height": 320, "width": 736, "iters": 22, "batch": 4, "dtype": "bfloat16"}  # the published training crop
    for size in ("vits", "vitl"):
        for checkpointing in (False, True):
            case = {**crop, "vit_size": size, "max_disp": 416, "checkpointing": checkpointing}
            name = f"{size}, 320x736, 22 iterations, batch 4, bf16" + (", checkpointing" if checkpointing else "")
            yield f"kept, {name}", fresh("kept_bytes", **case)
            if device == "cuda":
                yield f"train step, {name}", fresh("train_step", device=device, **case)
    if device == "cuda":
        case = {"height": 384, "width": 1248, "iters": 32, "vit_size": "vitl", "dtype": "bfloat16", "device": device}
        yield "forward, ViT-L, 375x1242 padded, 32 iterations, bf16", fresh("forward", **case)
        yield "forward, the same, low_memory", fresh("forward", low_memory=True, **case)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
