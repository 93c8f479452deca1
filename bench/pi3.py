"""Measurements of pi3/: training step, loss, loader, bytes kept for the backward pass. Called by bench/bench.py.

CPU times are CPU time of one thread. The small CPU setting (encoder 384 x 6, decoder 384 x 12, heads of the published size, one
scene of four 112 x 112 views, float32) is one for which figures of the official code are known: `OFFICIAL`.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.io import write_image
from pi3.dataset import read_sample
from pi3.geometry import unproject
from pi3.loss import pi3_loss
from pi3.model import Pi3, freeze
from pi3.readers import TartanAir
from pi3.schedule import parameter_groups

SMALL = {"enc_dim": 384, "enc_depth": 6, "enc_heads": 6, "dec_dim": 384, "dec_depth": 12, "dec_heads": 6}
TINY = SMALL | {"enc_depth": 1, "dec_depth": 6, "head_dim": 192, "head_heads": 3, "head_depth": 1, "point_out": 96}
OFFICIAL = {"checkpointed": 3.03, "plain": 2.68, "loss": 0.24, "loader": 18.8}  # seconds, seconds, seconds, frames per second


def scene(B: int, N: int, H: int, W: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, local points, poses, mask and normal flags of random scenes: tilted surfaces with steps, some without depth."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=g)
    steps = rand(B, N, H // 14, W // 14).repeat_interleave(14, 2).repeat_interleave(14, 3)
    depth = 2 + steps + 0.5 * torch.linspace(0, 1, W) + 0.01 * rand(B, N, H, W)
    K = torch.tensor([[float(W), 0, W / 2], [0, float(W), H / 2], [0, 0, 1]]).expand(B, N, 3, 3)
    poses = torch.eye(4).repeat(B, N, 1, 1)
    poses[..., :3, 3] = rand(B, N, 3)
    tensors = rand(B, N, 3, H, W), unproject(depth, K), poses, rand(B, N, H, W) > 0.05, torch.ones(B, dtype=torch.bool)
    return tuple(t.to(device) for t in tensors)


def cpu_seconds(function, repeats: int) -> float:
    """Least CPU time of this thread over several calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times[1:])


def trainer(config: dict, data: tuple[Tensor, ...], amp: torch.dtype | None = None, compile: bool = False):
    """(model, forward + loss + backward, update) on the device of the data, as training does them."""
    torch.manual_seed(0)
    model = Pi3(**config).to(data[0].device).train()
    freeze(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 5e-5, 5e-6, 0.05), fused=True)
    if compile:
        for block in (*model.encoder.blocks, *model.decoder, *model.point_decoder.blocks, *model.camera_decoder.blocks):
            block.compile(dynamic=False)
    imgs, *truth = data
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> None:
        with torch.autocast(imgs.device.type, amp, enabled=amp is not None):
            pred = model(imgs)
        pi3_loss(pred, *truth)["loss"].backward()

    def update() -> None:  # clipping is folded into the fused update: gradients are divided by grad_scale there
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained], foreach=True)
        optimizer.grad_scale = norm.clamp(min=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, gradients, update


def gemm_rate(m: int = 276, k: int = 1024, n: int = 4096) -> float:
    """GFLOP/s of the step's commonest matrix product: what a busy or slower machine takes away from all CPU figures."""
    x, w = torch.randn(m, k), torch.randn(n, k)
    return 2e-9 * m * k * n / cpu_seconds(lambda: torch.nn.functional.linear(x, w), 30)


def step_times(config: dict, views: int, side: int, repeats: int) -> dict[str, dict]:
    """CPU seconds of a training step with checkpointing from decoder block 4 and without, float32."""
    data = scene(1, views, side, side)
    rows = {}
    for name, K in (("checkpointed", 4), ("plain", config["dec_depth"])):
        _, gradients, update = trainer(config | {"num_dec_blk_not_to_checkpoint": K}, data)

        def step(gradients=gradients, update=update) -> None:
            gradients()
            update()

        rows[name] = {"step_s": cpu_seconds(step, repeats), "forward_backward_s": cpu_seconds(gradients, repeats)}
    return rows


def loss_time(views: int, side: int, repeats: int) -> float:
    """CPU seconds of all loss terms, forward and backward, on a prediction near the truth."""
    _, points, poses, mask, flags = scene(1, views, side, side)
    pred = {
        "local_points": (points * 0.7 + 0.02 * torch.randn_like(points)).requires_grad_(),
        "camera_poses": (poses + 0.01).requires_grad_(),
    }
    return cpu_seconds(lambda: pi3_loss(pred, points, poses, mask, flags)["loss"].backward(), repeats)


def write_tartanair(root: Path, frames: int = 48) -> None:
    """One sequence in TartanAir's layout: 640x480 images about as hard to decode as rendered ones, depth, poses."""
    rng, folder = np.random.default_rng(0), root / "env" / "env" / "Easy" / "P000"
    coarse = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)
    texture = cv2.resize(coarse, (832, 640), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    depth = cv2.resize(rng.uniform(2, 60, (12, 16)).astype(np.float32), (640, 480), interpolation=cv2.INTER_LINEAR)
    (folder / "depth_left").mkdir(parents=True)
    for i in range(frames):
        grain = rng.integers(-6, 7, (480, 640, 3), dtype=np.int16)
        image = (texture[i : i + 480, 2 * i : 2 * i + 640] + grain).clip(0, 255).astype(np.uint8)
        write_image(folder / "image_left" / f"{i:06d}_left.png", image)
        np.save(folder / "depth_left" / f"{i:06d}_left_depth.npy", depth + np.float32(0.01 * i))
    poses = np.zeros((frames, 7))
    poses[:, 0], poses[:, 6] = 0.1 * np.arange(frames), 1
    np.savetxt(folder / "pose_left.txt", poses)


def loader_rate(views: int, size: tuple[int, int], reads: int) -> float:
    """Frames per second of CPU time of one thread, full augmentation."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_tartanair(Path(folder))
            reader = TartanAir(folder)
            read_sample(reader, 0, np.random.default_rng(0), views, size)
            start = time.thread_time()
            for i in range(reads):
                read_sample(reader, 0, np.random.default_rng(i), views, size)
            return reads * views / (time.thread_time() - start)
    finally:
        cv2.setNumThreads(threads)


def kept_bytes(B: int, N: int, side: int, amp: torch.dtype | None = torch.bfloat16, **config) -> dict:
    """GiB that forward pass and loss keep for the backward pass, encoder frozen, counted on fake tensors (no memory, no numbers).

    Distinct storages handed to autograd, without parameters and the batch. The published size by default.
    """
    with FakeTensorMode():
        model = Pi3(**config).train()
        freeze(model)
        imgs, points = torch.rand(B, N, 3, side, side), torch.rand(B, N, side, side, 3)
        mask = torch.ones(B, N, side, side, dtype=torch.bool)
        data = imgs, points, torch.rand(B, N, 4, 4), mask, torch.ones(B, dtype=torch.bool)
        given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *data)}
        saved, in_model = {}, 0.0

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in given:
                saved[storage._cdata] = storage.nbytes(), storage  # holding it keeps the address from being used again
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast("cpu", amp, enabled=amp is not None):
                pred = model(imgs)
            in_model = sum(n for n, _ in saved.values())
            pi3_loss(pred, *data[1:])
        weights = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(n for n, _ in saved.values())
    return {
        "kept_gib": total / 2**30,
        "of_it_model_gib": in_model / 2**30,
        "weights_gradients_adam_gib": 4 * (weights + 3 * trained) / 2**30,
    }


def cuda_step(B: int, N: int, side: int, K: int, compile: bool, steps: int = 8) -> dict:
    """Seconds, images per second and peak memory of a full-size bf16 training step on the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    data = scene(B, N, side, side, "cuda")
    _, gradients, update = trainer({"num_dec_blk_not_to_checkpoint": K}, data, torch.bfloat16, compile)
    for _ in range(3):
        gradients()
        update()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        gradients()
        update()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    return {"step_s": seconds, "images_per_s": B * N / seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def measure(device: str, config: str) -> Iterator[tuple[str, dict]]:
    """Rows of figures; `config` "tiny" only shows that everything runs."""
    tiny = config == "tiny"
    views, side, repeats = (2, 28, 1) if tiny else (4, 112, 5)
    yield "float32 matrix products", {"gflop_per_s": gemm_rate()}
    steps = step_times(TINY if tiny else SMALL, views, side, repeats)
    for name, what in (("checkpointed", "step, checkpointing from decoder block 4"), ("plain", "step, no checkpointing")):
        row = {**steps[name], "official_s": OFFICIAL[name]}
        yield what, row if tiny else row | {"times_faster": OFFICIAL[name] / row["step_s"]}
    loss = loss_time(views, side, 2 if tiny else 20)
    official = {} if tiny else {"official_s": OFFICIAL["loss"], "times_faster": OFFICIAL["loss"] / loss}
    yield "loss alone", {"loss_s": loss} | official
    rate = loader_rate(2, (56, 56), 1) if tiny else loader_rate(8, (224, 224), 8)
    official = {} if tiny else {"official": OFFICIAL["loader"], "times_faster": rate / OFFICIAL["loader"]}
    yield "loader, full augmentation", {"frames_per_s_per_core": rate} | official
    B, N, side = (1, 2, 28) if tiny else (4, 16, 224)
    sizes = TINY if tiny else {}
    depth = sizes.get("dec_depth", 36)
    for name, options in (
        ("checkpointing from decoder block 4", {"num_dec_blk_not_to_checkpoint": 4}),
        ("the same and heads", {"num_dec_blk_not_to_checkpoint": 4, "checkpoint_heads": True}),
        ("no checkpointing", {"num_dec_blk_not_to_checkpoint": depth}),
    ):
        yield f"kept for backward, {B * N} images of {side}x{side}, bf16, {name}", kept_bytes(B, N, side, **sizes, **options)
    if device == "cuda":
        for K in (4, 36):
            for compiled in (False, True):
                name = f"GPU step, 64 images of 224x224, bf16, K={K}, {'compiled' if compiled else 'eager'}"
                yield name, cuda_step(4, 16, 224, K, compiled)
