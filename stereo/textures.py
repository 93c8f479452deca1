"""Write pairs of random textures with exact disparity, on which a network without trained weights learns to match first.

    python stereo/textures.py OUT --pairs 400

The layout is that of stereo/dataset.py. The left image is the right one read at x - d, so every left pixel has its match: there is
nothing to learn but matching, and random features tell random texture apart. Scenes come after it (stereo/README.md).
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np

from common.io import write_image, write_png16
from stereo.codec import decode_fsd, encode_fsd

OCTAVES = ((1, 0.2), (2, 0.3), (8, 0.5))  # pixels of a grain, weight


def noise(rng: np.random.Generator, shape: tuple[int, ...], grain: int, low: float, high: float) -> np.ndarray:
    """Smooth random values (H, W, ...) float32 between `low` and `high` (a little beyond them by interpolation)."""
    coarse = rng.uniform(low, high, (shape[0] // grain + 2, shape[1] // grain + 2, *shape[2:])).astype(np.float32)
    return cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_CUBIC)


def textured_pair(rng: np.random.Generator, size: tuple[int, int] = (96, 128), largest: float = 24.0) -> tuple[np.ndarray, ...]:
    """Left and right (H, W, 3) uint8 RGB, disparity (H, W) float32 px of the left view, up to `largest`: a wavy ground with up to
    two rectangles at other distances."""
    (H, W), margin = size, int(largest) + 1
    texture = sum(weight * noise(rng, (H, W + margin, 3), grain, 0, 255) for grain, weight in OCTAVES).clip(0, 255)
    disparity = rng.uniform(0.1, 0.7) * largest + noise(rng, size, 32, -1, 1) * rng.uniform(0, 0.15) * largest
    for _ in range(rng.integers(0, 3)):
        y, x = rng.integers(0, H - 16), rng.integers(0, W - 24)
        disparity[y : y + rng.integers(12, 32), x : x + rng.integers(16, 40)] = rng.uniform(0.25, 1) * largest
    disparity = decode_fsd(encode_fsd(disparity.clip(1, largest)))  # as it will be read
    rows, columns = np.mgrid[:H, :W].astype(np.float32)
    left = cv2.remap(texture, columns + margin - disparity, rows, cv2.INTER_LINEAR)
    return np.rint(left).astype(np.uint8), np.rint(texture[:, margin:]).astype(np.uint8), disparity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for number in range(args.pairs):
        left, right, disparity = textured_pair(np.random.default_rng([args.seed, number]))
        for side, image in (("left", left), ("right", right)):
            write_image(args.out / side / "rgb" / f"{number:04d}.png", image)
        write_png16(args.out / "left" / "disparity" / f"{number:04d}.png", encode_fsd(disparity))
    print(f"{args.pairs} pairs: {args.out}")


if __name__ == "__main__":
    main()
