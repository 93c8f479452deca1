"""How fast Kubric clips load: clips per second of CPU time on one thread, from PNG files and packed."""

import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from common.io import write_image
from lbm.dataset import KubricDataset, pack


def write_clips(root: Path, clips: int, frames: int = 24, side: int = 512, points: int = 2048, seed: int = 0) -> None:
    """Write clips in the published form: a moving smooth texture with grain, about as hard to compress as a rendered frame."""
    rng = np.random.default_rng(seed)
    for name in (f"{i:04d}" for i in range(clips)):
        coarse = rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        texture = cv2.resize(coarse, (side + frames, side), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        for t in range(frames):
            grain = rng.integers(-6, 7, (side, side, 3), dtype=np.int16)
            write_image(root / name / "frames" / f"{t:03d}.png", (texture[:, t : t + side] + grain).clip(0, 255).astype(np.uint8))
        start = rng.uniform(0, side, (points, 1, 2)).astype(np.float32)
        coords = start - np.arange(frames, dtype=np.float32)[:, None] * np.float32([1, 0])
        truth = {"coords": coords, "visibility": rng.random((points, frames)) < 0.3}
        np.save(root / name / f"{name}.npy", truth, allow_pickle=True)


def rate(root: Path, reads: int) -> float:
    """Clips per second of process CPU time, full augmentation at the published sizes; the first read is not counted."""
    data = KubricDataset(root, seed=0)
    data.read(0)
    start = time.process_time()
    for position in range(reads):
        data.read(position)
    return reads / (time.process_time() - start)


def loader_rates(clips: int = 4, reads: int = 24) -> dict[str, float]:
    """Measure on generated clips of 24 frames of 512 x 512 with 2048 points. Returns clips/s per core by storage form."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "png")
            write_clips(root, clips)
            rates = {"png_clips_per_s": rate(root, reads)}
            for name, quality in (("packed", 0), ("packed_jpeg95", 95)):
                pack(root, Path(folder, name), quality)
                rates[f"{name}_clips_per_s"] = rate(Path(folder, name), reads)
            files = sorted(path for path in Path(folder).rglob("0000/**/*") if path.suffix in (".png", ".npy", ".npz"))
            for name in ("png", "packed", "packed_jpeg95"):
                rates[f"{name}_mb_per_clip"] = sum(path.stat().st_size for path in files if name in path.parts) / 1e6
            return rates
    finally:
        cv2.setNumThreads(threads)
