"""Measurements of lbm/: bytes kept for the backward pass, step and inference time, peak memory. Called by bench/bench.py."""

import functools
import statistics
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lbm.deform_attn import DeformableAttention, recompute
from bench.lbm_data import loader_rates
from lbm.model import LBM

GIB = 2**30


def clip(model: LBM, batch: int, frames: int, points: int, device="cpu") -> tuple[torch.Tensor, ...]:
    """A random clip at the model's size: video uint8, queries (all in frame 0), tracks (a random walk, 2 px a frame), visible."""
    h, w = model.input_size
    g = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (batch, frames, 3, h, w), generator=g, dtype=torch.uint8)
    start = torch.rand(batch, 1, points, 2, generator=g) * torch.tensor((w, h))
    tracks = start + torch.randn(batch, frames, points, 2, generator=g).mul(2).cumsum(1)
    tracks = tracks.clamp(min=0).minimum(torch.tensor((w - 1.0, h - 1.0)))
    queries = torch.cat((torch.zeros(batch, points, 1), tracks[:, 0]), -1)
    visible = torch.ones(batch, frames, points, dtype=torch.bool)
    return tuple(x.to(device) for x in (video, queries, tracks, visible))


class _Made(TorchDispatchMode):
    """Weak references to every storage that an operator returns."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> dict[int, int]:
        """{storage: bytes} of those that still exist."""
        return {key: size for key, (reference, size) in self.storages.items() if not reference.expired()}


def _as_on_gpu(module: DeformableAttention, levels, *tensors):
    return recompute(functools.partial(module._project_then_read, levels, "torch"), *tensors)


def kept_bytes(batch=4, frames=24, points=256, size=(384, 512), dtype=torch.bfloat16, checkpointing=False, **config) -> dict:
    """Bytes that the forward pass of one training step keeps for its backward pass, on fake tensors (no memory, no numbers).

    `saved_gib`: distinct storages handed to autograd, seen by saved-tensor hooks: plain operators, custom Functions and the inputs of
    checkpoints; parameters, buffers and the batch are not counted. `alive_gib`: every storage made during the forward pass that
    still exists at its end, found by weak references to all operators' results: it also covers what is held in any other way
    (closures, attributes, the outputs themselves). `largest_gib`: the saved ones, summed by dtype and shape.
    The deformable attentions are counted in the form that a GPU takes (value maps projected again in the backward pass).
    """
    with FakeTensorMode(), torch.device("cpu"):
        model = LBM(input_size=size, checkpointing=checkpointing, msda="torch", **config).train()
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                module._read_then_project = functools.partial(_as_on_gpu, module)
        tensors = clip(model, batch, frames, points)
        given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *tensors)}
        saved = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage._cdata not in given:  # holding the storage keeps its address from being used again
                saved[storage._cdata] = (storage, f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}")
            return t

        made = _Made()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype), made:
            out = model(*tensors)  # held: its graph is what keeps the rest
        total, shapes = 0, {}
        for storage, shape in saved.values():
            total += storage.nbytes()
            shapes[shape] = shapes.get(shape, 0) + storage.nbytes()
        saved.clear()
        alive = sum(size for key, size in made.alive().items() if key not in given)
        del out
    largest = sorted(shapes.items(), key=lambda item: -item[1])[:12]
    return {
        "saved_gib": round(total / GIB, 3),
        "alive_gib": round(alive / GIB, 3),
        "largest_gib": {shape: round(size / GIB, 3) for shape, size in largest},
    }


def _times(run, repeats: int, device: torch.device) -> dict:
    """Seconds of repeated calls after one for warming up: wall clock and this process's CPU time (what counts on a shared CPU)."""
    wall, cpu = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for i in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i > 0:
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
    ordered = sorted(wall)
    result = {
        "median_s": round(statistics.median(wall), 4),
        "p10_s": round(ordered[len(ordered) // 10], 4),
        "p90_s": round(ordered[(9 * len(ordered)) // 10], 4),
        "cpu_median_s": round(statistics.median(cpu), 4),
        "cpu_min_s": round(min(cpu), 4),
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 3)
        result["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return result


def step_time(
    batch=1, frames=8, points=64, size=(192, 256), device="cpu", dtype=None, repeats=5, compile=False, **config
) -> dict:
    """One training step: forward with losses, backward, clipping, AdamW. dtype: torch.bfloat16 / float16 for autocast, or None.

    The defaults are the CPU setting (use one thread); on a GPU ask for batch=4, frames=24, points=256, size=(384, 512).
    Peak memory (CUDA) is that of the steps after the first.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    model = LBM(input_size=size, **config).to(device).train()
    if compile:
        model.compile_step()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    tensors = clip(model, batch, frames, points, device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(*tensors)["loss"]
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return _times(step, repeats, device) | {"msda": model.msda_name(device), "dtype": str(dtype or torch.float32)}


def forward_time(frames=8, points=10, size=(384, 512), device="cpu", dtype=None, repeats=3, **config) -> dict:
    """Inference on one clip; `frame_ms` is the median time of one frame."""
    device = torch.device(device)
    torch.manual_seed(0)
    model = LBM(input_size=size, **config).to(device).eval()
    video, queries, *_ = clip(model, 1, frames, points, device)

    def run():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            model.inference(video, queries)

    times = _times(run, repeats, device)
    return times | {"frame_ms": round(1e3 * times["median_s"] / frames, 2), "msda": model.msda_name(device)}


def measure(device: str, config: str):
    """Yield (row, figures): bytes kept for backward at the published setting, step and inference time, loader rates."""
    if config == "tiny":
        small = {"frames": 4, "points": 16, "size": (64, 96), "num_layers": 2}
        yield "kept for backward", kept_bytes(batch=1, **small)
        yield "training step", step_time(device=device, repeats=2, **small)
        yield "inference", forward_time(device=device, repeats=1, frames=4, points=4, size=(64, 96), num_layers=2)
        return
    for checkpointing in (False, True):
        name = "kept for backward, B 4, T 24, N 256, 384x512, bf16" + ", checkpointing" * checkpointing
        yield name, kept_bytes(checkpointing=checkpointing)
    if device == "cuda":
        full = {"batch": 4, "frames": 24, "points": 256, "size": (384, 512), "device": device, "dtype": torch.bfloat16}
        yield "training step, B 4, T 24, N 256, 384x512, bf16", step_time(**full)
        yield "the same, compiled", step_time(compile=True, **full)
        yield "the same, checkpointing", step_time(checkpointing=True, **full)
        yield "inference, 10 points, 384x512, bf16", forward_time(device=device, dtype=torch.bfloat16, frames=24)
    else:
        yield "training step, B 1, T 8, N 64, 192x256, fp32", step_time()
        yield "inference, 10 points, 384x512, fp32", forward_time()
    yield "loader, 24 frames of 512x512", loader_rates()
