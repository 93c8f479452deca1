"""How fast stereo pairs load: samples per second of CPU time on one thread, from 1280x720 files to augmented crops of 736x320."""

import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from common.io import write_image, write_png16
from stereo.codec import encode_fsd
from stereo.dataset import AUGMENTATIONS, StereoDataset, make_sources


def write_pairs(root: Path, pairs: int, size=(720, 1280), seed: int = 0) -> None:
    """Write pairs of textured planes before one another, the right view made by the disparity; JPEG and base-255 PNG."""
    rng, (H, W) = np.random.default_rng(seed), size
    for number in range(pairs):
        yy, xx = np.mgrid[:H, :W].astype(np.float32)
        disparity = 20 + 30 * yy / H + 5 * np.sin(xx / 90).astype(np.float32)
        for _ in range(12):
            x, y, w, h = rng.integers(0, W), rng.integers(0, H), rng.integers(80, 400), rng.integers(60, 300)
            disparity[y : y + h, x : x + w] = rng.uniform(30, 120) + rng.uniform(-0.05, 0.05) * (xx[y : y + h, x : x + w] - x)
        coarse = cv2.resize(rng.integers(0, 256, (H // 12, W // 12, 3), dtype=np.uint8), (W, H), interpolation=cv2.INTER_CUBIC)
        left = (coarse.astype(np.int16) + rng.integers(-12, 13, (H, W, 3), dtype=np.int16)).clip(0, 255).astype(np.uint8)
        right = cv2.remap(left, xx + disparity, yy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for side, image in (("left", left), ("right", right)):
            write_image(root / side / "rgb" / f"{number:04d}.jpg", image)
            write_png16(root / side / "disparity" / f"{number:04d}.png", encode_fsd(disparity))


def loader_rates(pairs: int = 3, reads: int = 24) -> dict[str, float]:
    """Samples/s per core: decoding alone, jitter and stretch (the target's measure), and every augmentation there is."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder), pairs)
            rates = {}
            cases = {"plain": [], "jitter_stretch": ["jittering", "disparity_stretching"], "everything": AUGMENTATIONS}
            for name, kinds in cases.items():
                dataset = StereoDataset(make_sources([{"path": folder, "format": "folder", "image_augmentation": kinds}]))
                dataset.read(0)
                start = time.process_time()
                for position in range(reads):
                    dataset.read(position)
                rates[f"{name}_samples_per_s"] = reads / (time.process_time() - start)
            rates["mb_per_pair"] = sum(path.stat().st_size for path in Path(folder).rglob("left/*/*.*")) * 2 / pairs / 1e6
            return rates
    finally:
        cv2.setNumThreads(threads)
