"""Readers of RGB-D sequences with poses: TartanAir, ScanNet, CO3Dv2 and plain folders.

A reader is a list of sequences: len(), `label`, `z_far` (metres, 0: no limit), `sequences`; `numbers(item)` lists the usable frames
of a sequence, `frames(rng, item, count)` picks those of a sample, `frame(item, number)` reads one as `Frame`, `decode_depth` turns
stored depth into metres. What is wrong with a file is a ValueError or an OSError that names it.
"""

import gzip
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.io import read_image, read_png16, safe_join
from pi3 import sampling


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
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged header raises anything
        raise ValueError(f"{path}: not a readable npy file: {error}") from None
    if depth.ndim != 2:
        raise ValueError(f"{path}: holds an array of shape {depth.shape}, expected a depth map (H, W)")
    return depth


def load_depth_image(path: Path) -> np.ndarray:
    """A depth image (H, W) uint16; ValueError naming the file for one of 8 bits or with colours."""
    depth = read_png16(path)[0]
    if depth.ndim != 2 or depth.dtype != np.uint16:
        raise ValueError(f"{path}: an image of shape {depth.shape} and type {depth.dtype}, expected depth of 16 bits")
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
        depth = load_depth_image(folder / "depth" / f"{i}.png")
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: cannot read the image: {error}") from None


def read_invalid_list(path: str | Path) -> dict[str, list[int]]:
    """The frames to leave out of each ScanNet scene."""
    try:
        lists = json.loads(Path(path).read_text())
        return {str(scene): [int(i) for i in frames] for scene, frames in lists.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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


def write_invalid_list(root: Path, path: Path) -> int:
    """Scan the poses of every ScanNet scene under `root` and write the JSON file that `read_invalid_list` takes; returns 0."""
    scenes = [s for s in sorted(root.glob("scene????_??")) if (s / "color").is_dir()]
    if not scenes:
        raise FileNotFoundError(f"{root}: no ScanNet scene (sceneXXXX_XX) in it")
    bar = tqdm(scenes, desc="scenes", unit="scene", disable=not sys.stderr.isatty())
    lists = {scene.name: frames_without_pose(scene, count_files(scene / "color", ".jpg")) for scene in bar}
    path.write_text(json.dumps(lists))
    print(f"{path}: {sum(map(len, lists.values()))} frames of {len(lists)} scenes have no usable pose")
    return 0


class CO3D:
    """CO3Dv2: {root}/{category}_{split}.jgz with the cameras, {root}/{category}/{sequence}/{images,depths,masks}.

    The annotations of a category are read once and kept as memory-mapped arrays in `index` (default {root}/index). mask_bg: zero
    the depth off the object always (True), never (False) or in half of the samples ("rand"). Sequences with a lost camera (T sums
    to over 1e5) are left out, as the evaluation protocol has it.
    """

    label, z_far = "COD3DV2", 0.0  # spelt as in the official lists of data sets

    def __init__(self, root: str | Path, split: str = "train", mask_bg: bool | str = "rand", index: str | Path | None = None):
        if mask_bg not in (True, False, "rand"):
            raise ValueError(f"data.co3d.mask_bg {mask_bg!r}: expected true, false or rand")
        self.root, self.mask_bg = Path(root), mask_bg
        files = sorted(Path(root).glob(f"*_{split}.jgz"))
        if not files:
            raise FileNotFoundError(f"{root}: no CO3Dv2 annotations CATEGORY_{split}.jgz in it; set data.co3d.root")
        folder = Path(index or self.root / "index")
        self.tables = [np.load(index_co3d(file, folder), mmap_mode="r", allow_pickle=False) for file in files]
        # sequences are runs of rows: (table, first row, end) of each
        self.sequences = []
        for t, table in enumerate(self.tables):
            starts, far = np.flatnonzero(np.diff(table["sequence"], prepend=-1)), table["T"].sum(1) > 1e5
            self.sequences += [(t, int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(table)]) if not far[a:b].any()]

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
        depth = co3d_depth(load_depth_image(self.root / (name.replace("/images/", "/depths/") + ".geometric.png")))
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
        limit = 200 * annotations.stat().st_size + (1 << 20)  # real ones grow about tenfold
        with gzip.open(annotations) as file:
            text = file.read(limit)
        if len(text) == limit:
            raise ValueError("it unpacks to more than 200 times its size")
        sequences = json.loads(text)
        rows = [
            (k, os.fsencode(safe_join("", f["filepath"])), f["R"], f["T"], f["focal_length"], f["principal_point"])
            for k, frames in enumerate(sequences.values())
            for f in frames
        ]
        fields = [("sequence", "<i4"), ("path", f"S{max(len(row[1]) for row in rows)}"), ("R", "<f8", (3, 3))]
        fields += [("T", "<f8", 3), ("focal", "<f8", 2), ("principal", "<f8", 2)]
        table = np.array(rows, dtype=fields)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, zlib.error) as error:
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
    fewer than two are left. label: name of the data set, which decides about the normal loss. broken: a list that takes what is
    wrong with sequences, which are then left out, in place of the ValueError.
    """

    def __init__(
        self, root: str | Path, depth_scale: float = 1000.0, z_far: float = 0.0, label: str = "ScanNet", broken: list | None = None
    ):
        self.root, self.depth_scale, self.z_far, self.label = Path(root), depth_scale, z_far, label
        below = sorted(f for f in self.root.glob("*") if (f / "color").is_dir())
        folders = [self.root] if (self.root / "color").is_dir() else below
        if not folders:
            raise FileNotFoundError(f"{root}: neither a sequence (color/, depth/, pose/, intrinsics.txt) nor a folder of some")
        self.sequences = []
        for folder in folders:
            try:
                self.sequences.append((folder, *self._scan(folder)))
            except (OSError, ValueError) as error:
                if broken is None:
                    raise
                broken.append(str(error))

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
        K = load_matrix(folder / "intrinsics.txt")
        if K.shape not in ((3, 3), (4, 4)) or not np.isfinite(K).all():
            raise ValueError(f"{folder}/intrinsics.txt: expected a finite 3x3 matrix in pixels, got {K.tolist()}")
        return files, np.stack(poses), K[:3, :3]

    def __len__(self) -> int:
        return len(self.sequences)

    def numbers(self, item: int) -> list[int]:
        return list(range(len(self.sequences[item][1])))

    def frames(self, rng: np.random.Generator, item: int, count: int) -> list[int]:
        return sampling.video_frames(rng, len(self.sequences[item][1]), count).tolist()

    def frame(self, item: int, i: int) -> Frame:
        _, files, poses, K = self.sequences[item]
        image, depth = files[i]
        stored = load_depth_map(depth) if depth.suffix == ".npy" else load_depth_image(depth)
        return Frame(read_image(image), stored, K, poses[i])

    def decode_depth(self, depth: np.ndarray) -> np.ndarray:
        return depth / np.float32(self.depth_scale) if depth.dtype == np.uint16 else depth


# any of them


def sequence_name(reader, item: int) -> str:
    """Where a sequence lies, for messages and pictures."""
    entry = reader.sequences[item]
    if isinstance(reader, CO3D):
        table, first, _ = entry
        return os.path.dirname(os.path.dirname(reader.tables[table][first]["path"].decode()))
    folder = entry[0] if isinstance(entry, tuple) else entry
    return str(folder.relative_to(reader.root)) if folder != reader.root else folder.name


def frame_name(reader, item: int, number) -> str:
    """What a frame is called in messages."""
    return f"{reader.label}, sequence {sequence_name(reader, item)}, frame {frame_number(number)}"


def frame_number(number: int | tuple[int, bool]) -> int:
    return number[0] if isinstance(number, tuple) else number


def read_frame(reader, item: int, number) -> Frame:
    """A frame whose parts fit together; ValueError where image and depth differ in size or the pose is not finite."""
    frame = reader.frame(item, number)
    if frame.image.shape[:2] != frame.depth.shape:
        sizes = f"image {frame.image.shape[:2]} and depth {frame.depth.shape}"
        raise ValueError(f"{frame_name(reader, item, number)}: {sizes} differ in size")
    if not np.isfinite(frame.pose).all():
        raise ValueError(f"{frame_name(reader, item, number)}: the pose is not finite")
    return frame


def detect(root: Path) -> tuple[list, list[str]]:
    """The readers of the layout found under `root`, one for each split that is there, and what is wrong with those that are broken."""
    bad, missing = [], []
    splits = lambda kind: (kind, lambda r: kind(r, "test"))
    for layout in ((TartanAir,), splits(ScanNet), splits(CO3D), (lambda r: RGBDFolder(r, broken=bad),)):
        readers = []
        for split in layout:
            try:
                readers.append(split(root))
            except FileNotFoundError as error:
                missing.append(str(error))
            except (OSError, ValueError) as error:
                bad.append(str(error))
        if readers or bad:
            return readers, bad
    raise FileNotFoundError("\n".join(missing))
