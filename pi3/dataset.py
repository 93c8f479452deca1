"""Samples of RGB-D sequences, the mixture that training draws from, and batches on the device.

    python pi3/dataset.py --check ROOT     list frames that cannot be used, of all splits; draw samples with the overlap of their views
    ... --invalid_list FILE                write the frames of ScanNet's scenes that have no usable pose, for data.scannet.invalid_list

Everything about a sample follows from its key (position, views, width, height) and the seed. Workers return uint8 images and raw
depth; points and masks are made on the device by `unpack`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import data
from common.io import contact_sheet, write_image
from pi3 import augment, sampling
from pi3.draw import overlap_picture
from pi3.geometry import overlap, transform, unproject, valid_depth
from pi3.readers import detect, frame_name, frame_number, read_frame, sequence_name, write_invalid_list

STEP_STRIDE = 1 << 20  # positions between the first samples of two steps: more than any batch has


# samples


def read_sample(
    reader,
    item: int,
    rng: np.random.Generator,
    count: int,
    size: tuple[int, int],
    train: bool = True,
    aug_focal: float = 0.9,
    aug_crop: int = 16,
) -> dict:
    """One sample: `count` views of sequence `item`, shuffled, of exactly `size` = (width, height).

    Returns images (N, H, W, 3) uint8, depth (N, H, W) float32 (0 or less: no reading), intrinsics (N, 3, 3), poses (N, 4, 4)
    camera-to-world, float32, z_far, dataset, sequence, frames. train: focal and size augmentation, colour, JPEG, blur per view.
    ValueError for a sequence with fewer than two usable frames, a view without a valid pixel, with sides that differ between image
    and depth, or with a pose that is not finite.
    """
    if count > 1 and (usable := len(reader.numbers(item))) < 2:
        raise ValueError(f"{reader.label}, sequence {sequence_name(reader, item)}: {usable} usable frames, at least 2 are needed")
    frames = reader.frames(rng, item, count)
    rng.shuffle(frames)
    images, depths, Ks, poses = [], [], [], []
    for i in frames:
        frame = read_frame(reader, item, i)
        zoom, enlarge = augment.draw_crop(rng, aug_focal, aug_crop) if train else (1.0, 0)
        crop = augment.plan_crop(frame.depth.shape[::-1], frame.K, size, zoom, enlarge)
        image = augment.crop_image(frame.image, crop)
        depth = reader.decode_depth(augment.crop_map(frame.depth, crop)).astype(np.float32)
        depth = np.where(np.isfinite(depth), depth, 0)
        if not ((depth > 0) & (depth < (reader.z_far or np.inf))).any():
            raise ValueError(f"{frame_name(reader, item, i)}: no valid depth in the view")
        images.append(augment.photometric(image, augment.draw_photometric(rng)) if train else image)
        depths.append(depth)
        Ks.append(crop.K)
        poses.append(frame.pose.astype(np.float32))
    return {
        "images": np.stack(images),
        "depth": np.stack(depths),
        "intrinsics": np.stack(Ks),
        "poses": np.stack(poses),
        "z_far": np.float32(reader.z_far),
        "dataset": reader.label,
        "sequence": sequence_name(reader, item),
        "frames": [frame_number(i) for i in frames],
    }


class Mixture:
    """Samples drawn from readers by weight. `read(key, attempt)` is a pure function of the seed and the key
    (position, views, width, height); another attempt draws another sequence of the same data set."""

    def __init__(
        self,
        readers: Sequence,
        weights: Sequence[float],
        seed: int,
        train: bool = True,
        aug_focal: float = 0.9,
        aug_crop: int = 16,
    ):
        if len(readers) != len(weights) or not readers or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"{len(readers)} data sets with weights {list(weights)}: one weight each, not all zero")
        self.readers, self.weights = list(readers), np.array(weights, np.float64) / sum(weights)
        self.seed, self.train, self.aug_focal, self.aug_crop = seed, train, aug_focal, aug_crop

    def read(self, key: tuple[int, int, int, int], attempt: int = 0) -> dict:
        position, views, width, height = key
        reader = self.readers[int(data.rng(self.seed, position).choice(len(self.readers), p=self.weights))]
        rng = data.rng(self.seed, position, attempt)
        item = int(rng.integers(len(reader)))
        return read_sample(reader, item, rng, views, (width, height), self.train, self.aug_focal, self.aug_crop)


def step_keys(
    seed: int,
    step: int,
    rank: int,
    world: int,
    accumulation: int,
    image_num_range: Sequence[int],
    max_img_per_gpu: int,
    resolutions: Sequence[tuple[int, int]],
) -> list[list[tuple[int, int, int, int]]]:
    """This rank's sample keys of an optimizer step, one list per micro-batch; all of one size and number of views.

    With world * accumulation kept, another number of ranks sees the same samples.
    """
    n, views, (width, height) = sampling.plan_step(seed, step, image_num_range, max_img_per_gpu, resolutions)
    starts = [step * STEP_STRIDE + (micro * world + rank) * n for micro in range(accumulation)]
    return [[(start + i, views, width, height) for i in range(n)] for start in starts]


def unpack(batch: dict, device: torch.device | str) -> dict[str, Tensor]:
    """A collated batch on the device: imgs (B, N, 3, H, W) in [0, 1], local_points (B, N, H, W, 3) in metres, poses (B, N, 4, 4),
    mask (B, N, H, W): depth above 0, below z_far (where that is above 0), finite world point."""
    names = ("images", "depth", "intrinsics", "poses", "z_far")
    images, depth, K, poses, z_far = (batch[k].to(device, non_blocking=True) for k in names)
    local_points = unproject(depth, K)
    return {
        "imgs": images.permute(0, 1, 4, 2, 3).float() / 255,  # (B, N, H, W, 3) -> (B, N, 3, H, W)
        "local_points": local_points,
        "poses": poses,
        "mask": valid_depth(depth, transform(poses, local_points), z_far),
    }


# checking a data set


def check(
    reader, samples: int, views: int, stride: int = 1, size: tuple[int, int] = (168, 126)
) -> tuple[list[str], list[np.ndarray]]:
    """Read every stride-th frame of every sequence: what is bad, and pictures of samples with the overlap of their views."""
    bad, rows = [], []
    for item in tqdm(range(len(reader)), desc="sequences", unit="sequence", disable=not sys.stderr.isatty()):
        name = sequence_name(reader, item)
        try:
            numbers = reader.numbers(item)
            if len(numbers) < 2:
                bad.append(f"{name}: {len(numbers)} usable frames, at least 2 are needed")
        except (OSError, ValueError) as error:
            bad.append(str(error))
            continue
        for i in numbers[::stride]:
            one = np.random.default_rng(0)
            try:
                read_sample(_OneFrame(reader, i), item, one, 1, size, train=False)
            except (OSError, ValueError) as error:
                bad.append(str(error))
    mixture = data.Guarded(Mixture([reader], [1.0], seed=0, train=False).read)
    for position in range(samples if len(reader) else 0):
        try:
            sample = mixture[(position, views, *size)]
        except RuntimeError as error:
            bad.append(str(error))
            break
        batch = unpack(data.stack([sample]), "cpu")
        K, depth = torch.from_numpy(sample["intrinsics"]), torch.from_numpy(sample["depth"])
        seen = overlap(batch["local_points"][0], depth, K, batch["poses"][0], batch["mask"][0])
        names = [f"{sample['sequence'][-14:]} {frame}" for frame in sample["frames"]]
        rows.append(overlap_picture(sample["images"], seen.numpy(), names))
    return bad, rows


class _OneFrame:
    """A reader that draws one given frame: lets `read_sample` judge it."""

    def __init__(self, reader, number):
        self.reader, self.number = reader, number

    def __getattr__(self, name):
        return getattr(self.reader, name)

    def frames(self, rng: np.random.Generator, item: int, count: int) -> list:
        return [self.number]


def main() -> int:
    """Check a data set; the exit code is 1 when something could not be read."""
    parser = argparse.ArgumentParser(description="Check a data set for pi3 (TartanAir, ScanNet, CO3Dv2 or plain RGB-D folders).")
    parser.add_argument("--check", metavar="ROOT", required=True, type=Path, help="root folder; the layout is found out")
    parser.add_argument("--out", default="check.png", help="picture of samples: views, what other views see of them, shares in per cent")
    parser.add_argument("--samples", type=int, default=3, help="samples drawn of each split")
    parser.add_argument("--views", type=int, default=4, help="views of a sample")
    parser.add_argument("--stride", type=int, default=1, help="read every so-manieth frame")
    parser.add_argument("--invalid_list", type=Path, help="ScanNet: write the frames without a usable pose to this file; no check")
    args = parser.parse_args()
    try:
        if args.invalid_list:
            return write_invalid_list(args.check, args.invalid_list)
        readers, bad = detect(args.check)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = []
    for reader in readers:
        problems, pictures = check(reader, args.samples, args.views, args.stride)
        bad, rows = bad + problems, rows + pictures
    if rows:
        write_image(args.out, contact_sheet(rows, columns=1, gap=12))
    found = ", ".join(f"{reader.label}: {len(reader)} sequences" for reader in readers)
    drawn = f"samples drawn to {args.out}" if rows else "no sample could be drawn"
    print("\n".join([*bad, f"{found or args.check}; {len(bad)} problems; {drawn}"]))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
