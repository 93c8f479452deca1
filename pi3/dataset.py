"""RGB-D sequences with poses: readers of TartanAir, ScanNet, CO3Dv2 and plain folders, and the mixture that training draws from.

    python pi3/dataset.py --check ROOT     list frames that cannot be used; draw samples with the overlap of their views

A reader is a list of sequences. `frames` picks the frames of a sample, `frame` reads one of them as `Frame`. Everything about a
sample follows from its key (position, views, width, height) and the seed. Workers return uint8 images and raw depth; points and
masks are made on the device by `unpack`.
"""

import argparse
import gzip
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import data
from common.io import read_image, read_png16, write_image
from pi3 import augment, sampling
from pi3.draw import contact_sheet, overlap_picture
from pi3.geometry import inverse_se3, transform, unproject, valid_depth

STEP_STRIDE = 1 << 20  # positions between the first samples of two steps: more than any batch has


class Frame(NamedTuple):
    """A frame as stored: image (H, W, 3) uint8 RGB; depth (H, W), any type; K (3, 3) in pixels; pose (4, 4) camera-to-world."""

    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    pose: np.ndarray


# small readers


@lru_cache(maxsize=4096)
def count_files(folder: Path, suffix: str) -> int:
    """Number of files in a folder with a suffix; FileNotFoundError names the folder."""
    with os.scandir(folder) as entries:
        return sum(entry.name.endswith(suffix) for entry in entries)


def load_matrix(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """A text file of numbers, float64; ValueError naming the file if it does not hold that shape."""
    try:
        values = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers: {error}") from None
    if shape is not None and values.shape != shape:
        raise ValueError(f"{path}: holds a {values.shape[0]}x{values.shape[1]} table, expected {shape[0]}x{shape[1]}")
    return values


def load_pose(path: Path) -> np.ndarray:
    """A 4x4 camera-to-world matrix; ValueError naming the file if it is not finite."""
    pose = load_matrix(path, (4, 4))
    if not np.isfinite(pose).all():
        raise ValueError(f"{path}: the pose is not finite")
    return pose


def load_depth_map(path: Path) -> np.ndarray:
    """A depth map (H, W) of a .npy file as a memory map."""
    try:
        depth = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable npy file: {error}") from None
    if depth.ndim != 2:
        raise ValueError(f"{path}: holds an array of shape {depth.shape}, expected a depth map (H, W)")
    return depth


def rotation_from_quaternion(xyzw: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in the order x, y, z, w."""
    x, y, z, w = np.moveaxis(xyzw / np.linalg.norm(xyzw, axis=-1, keepdims=True), -1, 0)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return np.stack(rows, -1).reshape(*x.shape, 3, 3)


def tartanair_poses(rows: np.ndarray) -> np.ndarray:
    """Camera-to-world matrices (n, 4, 4) of rows (n, 7) = tx ty tz qx qy qz qw in north-east-down axes."""
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3, 3] = rows[:, [1, 2, 0]]
    poses[:, :3, :3] = rotation_from_quaternion(rows[:, [4, 5, 3, 6]])
    return poses


def co3d_camera(
    R: np.ndarray, T: np.ndarray, focal: Sequence[float], principal: Sequence[float], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(camera-to-world pose, K) of a PyTorch3D camera: row vectors, x to the left, y up, isotropic normalised coordinates."""
    scale, half = min(size) / 2, np.array(size) / 2
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = (np.asarray(R, np.float64) * [-1, -1, 1]).T
    world_to_camera[:3, 3] = np.asarray(T, np.float64) * [-1, -1, 1]
    K = np.eye(3)
    K[[0, 1], [0, 1]] = np.asarray(focal) * scale
    K[:2, 2] = half - np.asarray(principal) * scale
    return np.linalg.inv(world_to_camera), K


def co3d_depth(bits: np.ndarray) -> np.ndarray:
    """Depth (H, W) float32 of the 16-bit pixels of a CO3D depth image, which are float16 numbers; nan and inf become 0."""
    depth = bits.astype("<u2").view("<f2").astype(np.float32)
    return np.where(np.isfinite(depth), depth, 0)


# data sets


class TartanAir:
    """{root}/{env}/{env}/{Easy,Hard}/P*/{image_left,depth_left,pose_left.txt}: 640x480, depth in metres, usable below 80 m."""

    label, z_far = "TarTanAir", 80.0
    K = np.array([[320.0, 0, 320], [0, 320, 240], [0, 0, 1]])

    def __init__(self, root: str | Path, whole_prob: float = 0.1):
        self.root, self.whole_prob = Path(root), whole_prob
        found = sorted(Path(root).glob("*/*/*/P*"))
        self.sequences = [s for s in found if s.parts[-3] == s.parts[-4] and s.parts[-2] in ("Easy", "Hard")]
        if not self.sequences:
            raise FileNotFoundError(f"{root}: no TartanAir sequence ENV/ENV/Easy/P000 in it; set data.tartanair.root")

    def __len__(self) -> int:
        return len(self.sequences)

    def numbers(self, item: int) -> list[int]:
        """Every usable frame of a sequence, in order; every reader has this."""
        n = count_files(self.sequences[item] / "image_left", "_left.png")
        if not n:
            raise ValueError(f"{self.sequences[item]}/image_left: no images")
        return list(range(n))

    def frames(self, rng: np.random.Generator, item: int, count: int) -> list[int]:
        return sampling.tartanair_frames(rng, len(self.numbers(item)), count, self.whole_prob).tolist()

    def frame(self, item: int, i: int) -> Frame:
        folder = self.sequences[item]
        poses = _tartanair_pose_file(folder / "pose_left.txt")
        if i >= len(poses):
            raise ValueError(f"{folder}/pose_left.txt: {len(poses)} poses, but there is an image {i}")
        depth = load_depth_map(folder / "depth_left" / f"{i:06d}_left_depth.npy")
        return Frame(read_image(folder / "image_left" / f"{i:06d}_left.png"), depth, self.K, poses[i])

    def decode_depth(self, depth: np.ndarray) -> np.ndarray:
        return np.where(depth > self.z_far, -1, depth)


@lru_cache(maxsize=512)
def _tartanair_pose_file(path: Path) -> np.ndarray:
    rows = load_matrix(path)
    if rows.shape[1] != 7:
        raise ValueError(f"{path}: {rows.shape[1]} numbers per line, expected 7 (tx ty tz qx qy qz qw)")
    return tartanair_poses(rows)


class ScanNet:
    """{root}/scene????_??/{color/i.jpg,depth/i.png,pose/i.txt,intrinsic/intrinsic_depth.txt}: depth in millimetres, 640x480.

    The image is resized to the depth's size and used with its intrinsics. split: "train" (scenes up to 660) or "test".
    invalid_list: JSON file {scene: [frames without a usable pose]}; without one, each scene's poses are scanned at first use.
    """

    label, z_far = "ScanNet", 80.0

    def __init__(self, root: str | Path, split: str = "train", invalid_list: str | Path | None = None, whole_prob: float = 0.1):
        self.root, self.whole_prob = Path(root), whole_prob
        scenes = [s for s in sorted(Path(root).glob("scene????_??")) if s.name[5:9].isdigit()]
        self.sequences = [s for s in scenes if (int(s.name[5:9]) <= 660) == (split == "train")]
        if not self.sequences:
            raise FileNotFoundError(f"{root}: no ScanNet scene (sceneXXXX_XX) of the {split} split in it; set data.scannet.root")
        self.invalid = None if invalid_list is None else read_invalid_list(invalid_list)

    def __len__(self) -> int:
        return len(self.sequences)

    def _invalid(self, item: int) -> tuple[int, Sequence[int]]:
        """Number of frames of a scene, and those without a usable pose."""
        folder = self.sequences[item]
        n = count_files(folder / "color", ".jpg")
        return n, frames_without_pose(folder, n) if self.invalid is None else self.invalid.get(folder.name, ())

    def numbers(self, item: int) -> list[int]:
        n, invalid = self._invalid(item)
        return sorted(set(range(n)) - set(invalid))

    def frames(self, rng: np.random.Generator, item: int, count: int) -> list[int]:
        folder, (n, invalid) = self.sequences[item], self._invalid(item)
        try:
            return sampling.scannet_frames(rng, n, count, self.whole_prob, invalid).tolist()
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def frame(self, item: int, i: int) -> Frame:
        folder = self.sequences[item]
        depth = read_png16(folder / "depth" / f"{i}.png")[0]
        image = read_resized(folder / "color" / f"{i}.jpg", depth.shape[1::-1])
        K = load_matrix(folder / "intrinsic" / "intrinsic_depth.txt", (4, 4))[:3, :3]
        return Frame(image, depth, K, load_pose(folder / "pose" / f"{i}.txt"))

    def decode_depth(self, depth: np.ndarray) -> np.ndarray:
        return depth / np.float32(1000)


def read_resized(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Image as (H, W, 3) uint8 RGB of the given (width, height), by Lanczos. A JPEG twice as large is decoded smaller."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", size)
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    except OSError as error:
        raise OSError(f"{path}: cannot read the image: {error}") from None


def read_invalid_list(path: str | Path) -> dict[str, list[int]]:
    """The frames to leave out of each ScanNet scene."""
    try:
        lists = json.loads(Path(path).read_text())
        return {str(scene): [int(i) for i in frames] for scene, frames in lists.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected JSON of the form {{scene: [frame, ...]}}: {error}") from None


@lru_cache(maxsize=4096)
def frames_without_pose(scene: Path, n: int) -> tuple[int, ...]:
    """Frames 0..n-1 of a ScanNet scene whose pose file is missing, unreadable or not finite."""
    invalid = []
    for i in range(n):
        try:
            load_pose(scene / "pose" / f"{i}.txt")
        except (OSError, ValueError):
            invalid.append(i)
    return tuple(invalid)


class CO3D:
    """CO3Dv2: {root}/{category}_{split}.jgz with the cameras, {root}/{category}/{sequence}/{images,depths,masks}.

    The annotations of a category are read once and kept as memory-mapped arrays in `index` (default {root}/index). mask_bg: zero
    the depth off the object always (True), never (False) or in half of the samples ("rand").
    """

    label, z_far = "COD3DV2", 0.0  # spelt as in the official lists of data sets

    def __init__(self, root: str | Path, split: str = "train", mask_bg: bool | str = "rand", index: str | Path | None = None):
        self.root, self.mask_bg = Path(root), mask_bg
        files = sorted(Path(root).glob(f"*_{split}.jgz"))
        if not files:
            raise FileNotFoundError(f"{root}: no CO3Dv2 annotations CATEGORY_{split}.jgz in it; set data.co3d.root")
        folder = Path(index or self.root / "index")
        self.tables = [np.load(index_co3d(file, folder), mmap_mode="r", allow_pickle=False) for file in files]
        # sequences are runs of rows: (table, first row, end) of each
        self.sequences = []
        for t, table in enumerate(self.tables):
            starts = np.flatnonzero(np.diff(table["sequence"], prepend=-1))
            self.sequences += [(t, int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(table)])]

    def __len__(self) -> int:
        return len(self.sequences)

    def numbers(self, item: int) -> list[tuple[int, bool]]:
        _, first, end = self.sequences[item]
        return [(i, self.mask_bg is True) for i in range(end - first)]

    def frames(self, rng: np.random.Generator, item: int, count: int) -> list[tuple[int, bool]]:
        """Pairs (frame, whether its background is masked), the second the same for the whole sample."""
        mask = bool(rng.choice(2)) if self.mask_bg == "rand" else bool(self.mask_bg)
        _, first, end = self.sequences[item]
        return [(i, mask) for i in sampling.co3d_frames(rng, end - first, count).tolist()]

    def frame(self, item: int, which: tuple[int, bool]) -> Frame:
        (t, first, _), (i, mask) = self.sequences[item], which
        row = self.tables[t][first + i]
        name = row["path"].decode()
        image = read_image(self.root / name)
        depth = co3d_depth(read_png16(self.root / (name.replace("/images/", "/depths/") + ".geometric.png"))[0])
        if mask:
            masked = read_png16(self.root / re.sub(r"\.jpg$", ".png", name.replace("/images/", "/masks/")))[0]
            if masked.shape[:2] != depth.shape:
                raise ValueError(f"{self.root / name}: depth {depth.shape} and mask {masked.shape[:2]} differ in size")
            depth = depth * (masked / 255 > 0.1)
        pose, K = co3d_camera(row["R"], row["T"], row["focal"], row["principal"], image.shape[1::-1])
        return Frame(image, depth, K, pose)

    def decode_depth(self, depth: np.ndarray) -> np.ndarray:
        return depth


def index_co3d(annotations: Path, folder: Path) -> Path:
    """Write the cameras of an annotation file as one structured array, unless that is done already; returns its path."""
    target = folder / f"{annotations.stem}.npy"
    if target.is_file() and target.stat().st_mtime >= annotations.stat().st_mtime:
        return target
    try:
        sequences = json.loads(gzip.decompress(annotations.read_bytes()))
        rows = [
            (k, f["filepath"].encode(), f["R"], f["T"], f["focal_length"], f["principal_point"])
            for k, frames in enumerate(sequences.values())
            for f in frames
        ]
        fields = [("sequence", "<i4"), ("path", f"S{max(len(row[1]) for row in rows)}"), ("R", "<f8", (3, 3))]
        fields += [("T", "<f8", 3), ("focal", "<f8", 2), ("principal", "<f8", 2)]
        table = np.array(rows, dtype=fields)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{annotations}: broken CO3D annotations ({reason}); download the file again") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:  # ranks may do this at the same time
            np.save(file, table)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise OSError(f"{folder}: cannot write the annotation index ({error}); set data.co3d.index to another folder") from None
    return target


class RGBDFolder:
    """Plain sequences: color/NAME.jpg|png, depth/NAME.png (16 bits) or .npy (metres), pose/NAME.txt (4x4 camera-to-world),
    intrinsics.txt (3x3, pixels). `root` is one sequence or a folder of them.

    depth_scale: units per metre of the 16-bit depth. Frames without depth or without a finite pose are left out; ValueError if
    fewer than two are left. label: name of the data set, which decides about the normal loss.
    """

    def __init__(self, root: str | Path, depth_scale: float = 1000.0, z_far: float = 0.0, label: str = "ScanNet"):
        self.root, self.depth_scale, self.z_far, self.label = Path(root), depth_scale, z_far, label
        below = sorted(f for f in self.root.glob("*") if (f / "color").is_dir())
        folders = [self.root] if (self.root / "color").is_dir() else below
        if not folders:
            raise FileNotFoundError(f"{root}: neither a sequence (color/, depth/, pose/, intrinsics.txt) nor a folder of some")
        self.sequences = [(folder, *self._scan(folder)) for folder in folders]

    @staticmethod
    def _scan(folder: Path) -> tuple[list[tuple[Path, Path]], np.ndarray, np.ndarray]:
        """Usable (image, depth) files in name order, their poses and the intrinsics."""
        files, poses, dropped = [], [], []
        for image in sorted(f for f in (folder / "color").iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png")):
            depth = next((d for s in (".png", ".npy") if (d := folder / "depth" / f"{image.stem}{s}").is_file()), None)
            try:
                pose = load_pose(folder / "pose" / f"{image.stem}.txt")
            except (OSError, ValueError) as error:
                dropped.append(str(error))
                continue
            if depth is None:
                dropped.append(f"{folder}/depth/{image.stem}.png: not there")
                continue
            files.append((image, depth))
            poses.append(pose)
        if len(files) < 2:
            raise ValueError(f"{folder}: {len(files)} usable frames, at least 2 are needed; {'; '.join(dropped[:3])}")
        return files, np.stack(poses), load_matrix(folder / "intrinsics.txt")[:3, :3]

    def __len__(self) -> int:
        return len(self.sequences)

    def numbers(self, item: int) -> list[int]:
        return list(range(len(self.sequences[item][1])))

    def frames(self, rng: np.random.Generator, item: int, count: int) -> list[int]:
        return sampling.video_frames(rng, len(self.sequences[item][1]), count).tolist()

    def frame(self, item: int, i: int) -> Frame:
        _, files, poses, K = self.sequences[item]
        image, depth = files[i]
        stored = load_depth_map(depth) if depth.suffix == ".npy" else read_png16(depth)[0]
        return Frame(read_image(image), stored, K, poses[i])

    def decode_depth(self, depth: np.ndarray) -> np.ndarray:
        return depth / np.float32(self.depth_scale) if depth.dtype == np.uint16 else depth


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
    ValueError for a view without a valid pixel, with sides that differ between image and depth, or a pose that is not finite.
    """
    frames = reader.frames(rng, item, count)
    rng.shuffle(frames)
    images, depths, Ks, poses = [], [], [], []
    for i in frames:
        frame = reader.frame(item, i)
        where = f"{reader.label}, sequence {sequence_name(reader, item)}, frame {_number(i)}"
        if frame.image.shape[:2] != frame.depth.shape:
            raise ValueError(f"{where}: image {frame.image.shape[:2]} and depth {frame.depth.shape} differ in size")
        if not np.isfinite(frame.pose).all():
            raise ValueError(f"{where}: the pose is not finite")
        zoom, enlarge = augment.draw_crop(rng, aug_focal, aug_crop) if train else (1.0, 0)
        crop = augment.plan_crop(frame.depth.shape[::-1], frame.K, size, zoom, enlarge)
        image = augment.crop_image(frame.image, crop)
        depth = reader.decode_depth(augment.crop_map(frame.depth, crop)).astype(np.float32)
        depth = np.where(np.isfinite(depth), depth, 0)
        if not ((depth > 0) & (depth < (reader.z_far or np.inf))).any():
            raise ValueError(f"{where}: no valid depth in the view")
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
        "frames": [_number(i) for i in frames],
    }


def _number(frame: int | tuple[int, bool]) -> int:
    return frame[0] if isinstance(frame, tuple) else frame


def sequence_name(reader, item: int) -> str:
    """Where a sequence lies, for messages and pictures."""
    entry = reader.sequences[item]
    if isinstance(reader, CO3D):
        table, first, _ = entry
        return os.path.dirname(os.path.dirname(reader.tables[table][first]["path"].decode()))
    folder = entry[0] if isinstance(entry, tuple) else entry
    return str(folder.relative_to(reader.root)) if folder != reader.root else folder.name


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


def overlap(points: Tensor, depth: Tensor, K: Tensor, poses: Tensor, mask: Tensor, rtol: float = 0.05) -> Tensor:
    """Mask (N, N, H, W): entry [i, j] has the pixels of view i whose point view j sees, its depth there agreeing within `rtol`.

    points (N, H, W, 3) in each camera's frame, depth (N, H, W), K (N, 3, 3), poses (N, 4, 4) camera-to-world, mask (N, H, W).
    """
    N, H, W = depth.shape
    seen = torch.zeros(N, N, H, W, dtype=torch.bool)
    world, to_camera = transform(poses, points), inverse_se3(poses)
    for j in range(N):
        local = transform(to_camera[j].expand(N, 4, 4), world)
        u, v, z = (local @ K[j].T).unbind(-1)
        x, y = (u / z).round().nan_to_num(-1, -1, -1), (v / z).round().nan_to_num(-1, -1, -1)
        inside = mask & (z > 0) & (x >= 0) & (y >= 0) & (x < W) & (y < H)
        index = y.clamp(0, H - 1).long(), x.clamp(0, W - 1).long()
        seen[:, j] = inside & mask[j][index] & ((depth[j][index] - z).abs() < rtol * z)
    return seen


def detect(root: Path):
    """The reader of the layout found under `root`."""
    errors = []
    for reader in (TartanAir, RGBDFolder, ScanNet, lambda r: ScanNet(r, "test"), CO3D, lambda r: CO3D(r, "test")):
        try:
            return reader(root)
        except FileNotFoundError as error:
            errors.append(str(error))
    raise FileNotFoundError("\n".join(errors))


def check(reader, samples: int, views: int, out: str | Path, stride: int = 1, size: tuple[int, int] = (168, 126)) -> list[str]:
    """Read every stride-th frame of every sequence, and draw samples with the overlap of their views to `out`. Returns what is bad."""
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
    for position in range(samples):
        try:
            sample = mixture[(position, views, *size)]
        except RuntimeError as error:
            bad.append(str(error))
            break
        batch = unpack(data.stack([sample]), "cpu")
        K, depth = torch.from_numpy(sample["intrinsics"]), torch.from_numpy(sample["depth"])
        seen = overlap(batch["local_points"][0], depth, K, batch["poses"][0], batch["mask"][0])
        names = [f"{sample['sequence'][-14:]} {frame}" for frame in sample["frames"]]
        rows.append([overlap_picture(sample["images"], seen.numpy(), names)])
    if rows:
        write_image(out, contact_sheet(rows, gap=12))
    return bad


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
    parser.add_argument("--samples", type=int, default=3, help="samples drawn")
    parser.add_argument("--views", type=int, default=4, help="views of a sample")
    parser.add_argument("--stride", type=int, default=1, help="read every so-manieth frame")
    args = parser.parse_args()
    try:
        reader = detect(args.check)
        bad = check(reader, args.samples, args.views, args.out, args.stride)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join([*bad, f"{reader.label}: {len(reader)} sequences; {len(bad)} problems; samples drawn to {args.out}"]))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
