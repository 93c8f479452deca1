"""How long a save holds the training loop of each published network, as a share of the run at the default interval.

  python bench/checkpoint.py [--systems lbm stereo ...] [--out FILE]

A save holds the loop for three things: the checksum that compares the ranks' parameters, the copy of weights, optimizer and
averages to memory of the CPU, and the start of the writing thread. Writing and hashing go on beside the training, and hold up
only a save that comes before the last one is on the disk. The copy is timed on real tensors of the network's own shapes, as many
as --gigabytes, and scaled to all of them; on a GPU that includes the way to the host.

The share depends on how long a step takes. `step_s` is the measured one in bench/results where a file of this device has it, a
network or a picture much smaller than the published one and so an upper bound of the share; `shortest_step_s` is the step below
which the share would pass 1 %.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU figures are per core
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository root instead of bench/

import torch
from torch import nn

from bench.bench import device_name
from common import config, dist
from common.checkpoint import Checkpoints, snapshot

STEPS = {  # file in bench/results, row and figure of a measured training step
    "lbm": ("training step, B 1, T 8, N 64, 192x256, fp32", "median_s"),
    "stereo": ("train step, ViT-S, 128x192, 4 iterations, float32", "wall_s"),
    "moge": ("training step, ViT-S", "step_s"),
    "pi3": ("step, checkpointing from decoder block 4", "step_s"),
    "mvdiff": ("stage 1, ours, encoders in the step", "step_s"),
}


def networks() -> dict:
    """{system: () -> (network on the meta device, whether it has averaged weights, steps between saves by default)}."""

    def lbm():
        from lbm.eval import MODEL_KEYS
        from lbm.model import LBM

        cfg = config.read(ROOT / "lbm/configs/default.yaml")
        return LBM(**{key: cfg[key] for key in MODEL_KEYS}), False, 11000 // (4 * cfg.bs)  # an epoch of MOVi-F on four GPUs

    def stereo():
        from stereo.model import FoundationStereo

        cfg = config.read(ROOT / "stereo/configs/paper.yaml")
        return FoundationStereo(**cfg.model), cfg.enable_ema, cfg.save_every

    def moge():
        from moge.model import build

        cfg = config.read(ROOT / "moge/configs/default.yaml")
        return build(dict(cfg.model)), cfg.enable_ema, cfg.save_every

    def pi3():
        from pi3.model import Pi3, freeze
        from pi3.weights import model_options

        cfg = config.read(ROOT / "pi3/configs/default.yaml")
        model = Pi3(**model_options(cfg.model))
        freeze(model, encoder=cfg.model.freeze_encoder, all_but_conf=False)
        return model, False, cfg.save_every or cfg.log.ckpt_interval * cfg.train.iters_per_epoch

    def mvdiff():
        from mvdiff.unet import UNet

        cfg = config.read(ROOT / "mvdiff/configs/default.yaml")
        return UNet(), cfg.use_ema, cfg.save_every

    return {"lbm": lbm, "stereo": stereo, "moge": moge, "pi3": pi3, "mvdiff": mvdiff}


def state_of(network: nn.Module, averaged: bool) -> list[tuple[torch.Size, torch.dtype]]:
    """Shapes and types of every tensor in a checkpoint: weights, both moments of what trains, averages."""
    weights = [(t.shape, t.dtype) for t in network.state_dict().values()]
    moments = [(p.shape, torch.float32) for p in network.parameters() if p.requires_grad]
    return weights + 2 * moments + weights * averaged


def size_of(tensors) -> float:
    """Gigabytes."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in tensors) / 1e9


def timed(call, device: str) -> float:
    """Seconds of call(): on a GPU with its device work; on a CPU processor time, which other programs do not lengthen."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(name: str, device: str, gigabytes: float, repeats: int = 3) -> dict:
    """Figures of one system."""
    with torch.device("meta"):
        network, averaged, interval = networks()[name]()
    tensors, part, taken = state_of(network, averaged), [], 0.0
    for shape, dtype in sorted(tensors, key=lambda entry: -entry[0].numel()):
        if taken + shape.numel() * dtype.itemsize / 1e9 <= gigabytes:
            part.append(torch.ones(shape, dtype=dtype, device=device))
            taken += shape.numel() * dtype.itemsize / 1e9
    copy = min(timed(lambda: snapshot({"x": part}), device) for _ in range(repeats)) / taken  # seconds a gigabyte
    floats = [t for t in part if t.dtype == torch.float32]
    compare = min(timed(lambda: dist.checksum(floats), device) for _ in range(repeats)) / size_of([(t.shape, t.dtype) for t in floats])
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, {"": {"model": part}})
        start = time.perf_counter()
        assert checkpoints.wait() is None
        written = (time.perf_counter() - start) / taken
    trained = size_of([(p.shape, p.dtype) for p in network.parameters()])
    hold = copy * size_of(tensors) + compare * trained
    found = {"parameters_m": sum(p.numel() for p in network.parameters()) / 1e6, "checkpoint_gb": size_of(tensors), "timed_gb": taken}
    found |= {"copy_s_per_gb": copy, "checksum_s_per_gb": compare, "write_s_per_gb": written}
    found |= {"held_s": hold, "interval_steps": interval, "shortest_step_s": 99 * hold / interval}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of tensors to time")
    parser.add_argument("--out", type=Path, help="default: bench/results/checkpoint_DEVICE.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, rows = device_name(args.device), {}
    short = "_".join(device.replace("(R)", "").replace(",", "").split())
    for name in args.systems:
        rows[name] = measure(name, args.device, args.gigabytes)
        results, (row, key) = ROOT / "bench" / "results" / f"{name}_{short}.json", STEPS[name]
        step = json.loads(results.read_text())["rows"].get(row, {}).get(key) if results.exists() else None
        if step:
            held = rows[name]["held_s"]
            rows[name] |= {"step_s": step, "share": held / (rows[name]["interval_steps"] * step + held)}
        print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()), flush=True)
        gc.collect()
    out = args.out or ROOT / "bench" / "results" / f"checkpoint_{short}.json"
    out.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
