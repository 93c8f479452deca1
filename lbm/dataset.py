"""Kubric MOVi-F clips with point tracks, the training data; and three commands on data folders.

    python lbm/dataset.py --check ROOT            list the sequences that cannot be used; draw a contact sheet of the others
    python lbm/dataset.py --pack ROOT             write each sequence in a form that loads several times faster
    python lbm/dataset.py --convert SOURCE OUT    bring your own tracks into the training and the evaluation layout

Layout of a sequence (each folder under the root is one):

    <seq>/frames/000.png ...   8-bit RGB, in the published set 24 of 512 x 512
    <seq>/<seq>.npy            a dict with coords (P, T, 2), pixels (x, y), and visibility (P, T), True where the point is HIDDEN
    <seq>/<seq>.npz            the same two arrays without pickle; used in place of the .npy where it exists      } written
    <seq>/frames.npy           the frames as one array (T, H, W, 3) uint8; used in place of the PNG files ...      } by
    <seq>/frames.jpg.npz       ... or as JPEGs: `jpeg`, their bytes one after the other, and `ends`, where each ends } --pack
"""

import argparse
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
from tqdm import tqdm

from common import data
from common.io import contact_sheet, read_image, read_png16, write_image
from lbm.augment import centre_crop, crop_frames, draw_view, move_tracks, photometric
from lbm.draw import draw_tracks
from lbm.unpickle import load_npy


def list_sequences(root: str | Path) -> list[str]:
    """Return the names of the sequence folders under `root`, sorted. Looks into a few of them only."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; movi_f_root must hold the Kubric sequences (0000, 0001, ...)")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{root}: no sequence folder in it; expected <seq>/frames/000.png and <seq>/<seq>.npy")
    if not any((root / name / f"{name}{suffix}").exists() for name in names[:8] for suffix in (".npy", ".npz")):
        raise ValueError(f"{root}: {names[0]}/{names[0]}.npy is missing, and the next ones too: not the root of a Kubric set?")
    return names


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file. ValueError naming the file where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # a damaged archive raises anything
        raise ValueError(f"{path}: not a readable npz file: {error}") from None


def load_tracks(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return coords (P, T, 2) float32 and hidden (P, T) bool of a sequence. ValueError or OSError naming the file."""
    path = folder / f"{folder.name}.npz"
    if path.exists():
        content = read_npz(path)
    else:
        path = folder / f"{folder.name}.npy"
        content = load_npy(path)
    if not isinstance(content, dict) or not {"coords", "visibility"} <= content.keys():
        raise ValueError(f"{path}: expected a dict with 'coords' and 'visibility'")
    coords, hidden = np.asarray(content["coords"]), np.asarray(content["visibility"])
    if coords.ndim != 3 or coords.shape[2] != 2 or hidden.shape != coords.shape[:2] or coords.dtype.kind not in "fiu":
        got = f"coords {coords.shape} {coords.dtype} and visibility {hidden.shape}"
        raise ValueError(f"{path}: {got}; expected (P, T, 2) numbers and (P, T)")
    finite = np.isfinite(coords).all(axis=-1)  # points behind the camera, or beyond the range of float16
    return np.where(finite[..., None], coords, 0).astype(np.float32), hidden.astype(bool) | ~finite


def load_frames(folder: Path, total: int, start: int = 0, count: int | None = None) -> np.ndarray:
    """Return frames start ... start + count of a sequence of `total` as (count, H, W, 3) uint8 RGB, perhaps a read-only file map.

    ValueError or OSError naming the file when there are not `total` frames, or one cannot be read or has another size.
    """
    stop = total if count is None else start + count
    path = folder / "frames.npy"
    if path.exists():
        try:
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:
            raise ValueError(f"{path}: not readable: {error}") from None
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) != total:
            raise ValueError(f"{path}: {frames.shape} {frames.dtype}, expected ({total}, H, W, 3) uint8; pack the sequence anew")
        return frames[start:stop]

    path = folder / "frames.jpg.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as arrays:
                parts = np.split(arrays["jpeg"], arrays["ends"][:-1])
            frames = [cv2.imdecode(part, cv2.IMREAD_COLOR_RGB) for part in parts[start:stop]]
        except Exception as error:
            raise ValueError(f"{path}: not readable: {error}") from None
        found = len(parts)
    else:
        path = folder / "frames"
        files = sorted(file for file in os.listdir(path) if file.endswith(".png"))
        found = len(files)
        frames = [read_image(path / file) for file in files[start:stop]] if found == total else []
    if found != total:
        raise ValueError(f"{path}: {found} frames, but the tracks have {total}")
    if any(frame is None or frame.shape != frames[0].shape for frame in frames):
        raise ValueError(f"{path}: a frame is damaged or of another size than the first")
    return np.stack(frames)


def load_depth(path: str | Path, depth_range: tuple[float, float]) -> np.ndarray:
    """Return the depth (H, W) float32 of a 16-bit PNG of a sequence, scaled to the `depth_range` stored with its tracks.

    The tracker is trained without depth; this is for looking at the data.
    """
    low, high = depth_range
    return (low + read_png16(path)[0] * ((high - low) / 65535)).astype(np.float32)


def sample_queries(tracks: np.ndarray, visible: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose where each point is asked for: the first quarter of them in a random frame, the others when first visible.

    tracks (T, N, 2), visible (T, N); each point must be visible somewhere. Returns (N, 3) float32 as (t, x, y).
    """
    times = visible.argmax(axis=0)
    quarter = visible.shape[1] // 4
    keys = np.where(visible[:, :quarter], rng.random((len(visible), quarter)), -1)
    times[:quarter] = keys.argmax(axis=0)
    return np.column_stack([times, tracks[times, np.arange(len(times))]]).astype(np.float32)


def pad_points(values: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Zero-pad one axis to `count`."""
    return np.pad(values, [(0, count - size if a == axis else 0) for a, size in enumerate(values.shape)])


class KubricDataset:
    """Augmented clips of Kubric MOVi-F; each is a pure function of (seed, position). Wrap `read` in `common.data.Guarded`.

    size: (height, width) of the crop. frames: length T of the clip. points: number N of tracks, fixed by padding.
    augment: False for the middle crop and the first points. aug_scale: multiplies the lengths in pixels of the augmentations,
    1 for frames of 512 x 512. min_points: a clip must show that many points in its first frame.
    """

    def __init__(self, root, seed=0, size=(384, 512), frames=24, points=256, augment=True, aug_scale=1.0, min_points=16):
        self.root, self.names = Path(root), list_sequences(root)
        self.seed, self.size, self.frames, self.points = seed, tuple(size), frames, points
        self.augment, self.aug_scale, self.min_points = augment, aug_scale, min_points

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.names)

    def read(self, position: int, attempt: int = 0) -> dict[str, np.ndarray]:
        """Return the sample of a position; with attempt > 0, of another sequence in place of the one that failed."""
        rng, count = data.rng(self.seed, position, attempt), len(self)
        item = data.epoch_item(self.seed, position, count)
        if attempt and count > 1:
            item = (item + int(rng.integers(1, count))) % count
        return self.sample(self.names[item], rng)

    def sample(self, name: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Read a sequence and augment it with draws from `rng`.

        Returns video (T, H, W, 3) uint8 RGB, tracks (T, N, 2) float32 in pixels of the crop, visible (T, N) bool, queries (N, 3)
        float32 as (t, x, y) and valid (N,) bool, False for padding (where all else is 0 or False).
        ValueError or OSError, naming the file or sequence, when it cannot be used.
        """
        folder, length = self.root / name, self.frames
        coords, hidden = load_tracks(folder)
        total = coords.shape[1]
        if total < length:
            raise ValueError(f"{folder}: {total} frames, {length} wanted")
        start = int(rng.integers(0, total - length + 1)) if self.augment and total > length else 0
        frames = load_frames(folder, total, start, length)
        tracks = coords[:, start : start + length].transpose(1, 0, 2)  # (T, P, 2)
        visible = ~hidden[:, start : start + length].T  # (T, P)

        if self.augment:
            frames = np.array(frames)  # writable, and in memory
            photometric(frames, tracks, visible, rng, self.aug_scale)
            for _ in range(8):  # a crop that shows too few points is drawn anew: it is no fault of the files
                view = draw_view(frames.shape[1:3], tracks, visible, rng, self.size, self.aug_scale)
                moved = move_tracks(tracks, view, self.size)
                if (visible[0] & self.inside(moved[0])).sum() >= self.min_points:
                    break
            frames, tracks = crop_frames(frames, view, self.size), moved
        elif frames.shape[1] < self.size[0] or frames.shape[2] < self.size[1]:
            raise ValueError(f"{folder}: frames of {frames.shape[1]} x {frames.shape[2]} are smaller than the crop {self.size}")
        else:
            frames, tracks = centre_crop(frames, tracks, self.size)

        visible = visible & self.inside(tracks)
        chosen = np.flatnonzero(visible[0])
        if len(chosen) < self.min_points:
            raise ValueError(f"{folder}: {len(chosen)} points visible in the first frame of the crop, {self.min_points} wanted")
        chosen = (rng.permutation(chosen) if self.augment else chosen)[: self.points]
        tracks, visible = tracks[:, chosen], visible[:, chosen]
        return {
            "video": np.ascontiguousarray(frames),
            "tracks": pad_points(tracks, self.points, axis=1),
            "visible": pad_points(visible, self.points, axis=1),
            "queries": pad_points(sample_queries(tracks, visible, rng), self.points, axis=0),
            "valid": np.arange(self.points) < len(chosen),
        }

    def inside(self, tracks: np.ndarray) -> np.ndarray:
        """Tell which points (..., 2) lie in the crop, 0 <= x < W and 0 <= y < H."""
        return ((tracks >= 0) & (tracks < self.size[::-1])).all(axis=-1)


# --------------------------------------------------------------------------------------------------------------- commands


def check(root: str | Path, out: str | Path = "check.png", min_points: int = 16) -> list[str]:
    """Read every sequence in full; return a line for each that cannot be used, and draw twelve of the others."""
    bad, drawn = [], []
    if not cv2.haveImageWriter(str(out)):
        raise ValueError(f"{out}: OpenCV writes no such picture; give it a name that ends in .png or .jpg")
    names = list_sequences(root)
    wanted = set(names[:: -(-len(names) // 12)])
    for name in tqdm(names, desc="check", unit="seq"):
        try:
            coords, hidden = load_tracks(Path(root) / name)
            frames = load_frames(Path(root) / name, coords.shape[1])
            if (count := int((~hidden[:, 0]).sum())) < min_points:
                raise ValueError(f"{Path(root) / name}: {count} points visible in the first frame, {min_points} wanted")
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        if name in wanted:
            shown, half = np.flatnonzero(~hidden[:, 0])[:: max(1, count // 100)], len(frames) // 2 + 1
            pictures = draw_tracks(frames[:half], coords[shown, :half].swapaxes(0, 1), ~hidden[shown, :half].T)
            drawn.append(pictures[-1])
    if drawn:
        write_image(out, contact_sheet(drawn))
    return bad


def write_atomic(path: Path, write) -> None:
    """Call write(file) on a temporary file and rename it, so that an interrupted run leaves no half-written file in use."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pack_sequence(name: str, root: Path, out: Path, quality: int = 0) -> str | None:
    """Pack one sequence (see `pack`). Returns what is wrong with it, None when all is well."""
    folder = out / name
    target = folder / ("frames.jpg.npz" if quality else "frames.npy")
    if target.exists() and (folder / f"{name}.npz").exists():
        return None
    try:
        coords, hidden = load_tracks(root / name)
        frames = load_frames(root / name, coords.shape[1])
    except (ValueError, OSError) as error:
        return str(error)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.npz", lambda file: np.savez(file, coords=coords, visibility=hidden))
    if quality:  # 4:4:4, colour at full resolution
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        parts = [cv2.imencode(".jpg", frame[..., ::-1], flags)[1].ravel() for frame in frames]
        ends = np.cumsum([len(part) for part in parts])
        write_atomic(target, lambda file: np.savez(file, jpeg=np.concatenate(parts), ends=ends))
    else:
        write_atomic(target, lambda file: np.save(file, frames))
    return None


def pack(root: str | Path, out: str | Path | None = None, quality: int = 0, workers: int = 1) -> list[str]:
    """Write each sequence's tracks as .npz and its frames as one uint8 array, or as JPEGs of the given quality (1 to 100).

    Into the sequence's own folder, or under `out`. The array is exact and the fastest (18.9 MB for 24 frames of 512 x 512);
    JPEG of quality 95 with full colour resolution takes about a quarter of that. Nothing is deleted, and what is there is not
    written again. Returns a line for each sequence that could not be read.
    """
    names, root = list_sequences(root), Path(root)
    job = partial(pack_sequence, root=root, out=Path(out or root), quality=quality)
    with ThreadPoolExecutor(workers) as pool:  # decoding and writing run outside the interpreter lock
        return [line for line in tqdm(pool.map(job, names), "pack", len(names), unit="seq") if line]


def convert(source: str | Path, out: str | Path, frames: int = 24, stride: int = 12, min_points: int = 16) -> list[str]:
    """Write a folder of frames with tracks (or a folder of such folders) as a Kubric root and a TAP-Vid file.

    source: `frames/` with images and `tracks.npz` with frames (T,) file names, tracks (T, N, 2) pixels whose centres are whole
    numbers, visible (T, N) bool and perhaps known (T, N) bool, False where the visibility could not be told.
    Writes out/kubric/<set>_<start>/ of `frames` frames every `stride`, but those that begin with fewer than `min_points` visible
    points, and out/tapvid_davis.pkl with `known` as an additional entry. Half a pixel is added: in both layouts pixel centres
    lie at halves. Returns the names of the clips. ValueError or OSError, naming the file, for what does not fit, and where no
    clip comes of it.
    """
    source, out, clips, videos = Path(source), Path(out), [], {}
    folders = [source] if (source / "tracks.npz").exists() else sorted(path.parent for path in source.glob("*/tracks.npz"))
    if not folders:
        raise FileNotFoundError(f"{source}: no tracks.npz in it, nor in the folders under it")
    for folder in folders:
        content = read_npz(folder / "tracks.npz")
        if missing := {"frames", "tracks", "visible"} - content.keys():
            raise ValueError(f"{folder / 'tracks.npz'}: lacks {', '.join(sorted(missing))}")
        visible = content["visible"].astype(bool)  # (T, N)
        known = content.get("known", np.ones_like(visible)).astype(bool)
        shapes = [content["frames"].shape, content["tracks"].shape, visible.shape, known.shape]
        if visible.ndim != 2 or shapes != [visible.shape[:1], (*visible.shape, 2), visible.shape, visible.shape]:
            text = ", ".join(f"{name} {shape}" for name, shape in zip(("frames", "tracks", "visible", "known"), shapes))
            raise ValueError(f"{folder / 'tracks.npz'}: {text}; expected (T,), (T, N, 2), (T, N), (T, N)")
        tracks = np.where(visible[..., None], content["tracks"], 0).astype(np.float32) + np.float32(0.5)
        pictures = [read_image(folder / "frames" / str(file)) for file in content["frames"]]
        if len(sizes := {picture.shape[:2] for picture in pictures}) != 1:
            raise ValueError(f"{folder / 'frames'}: the pictures differ in size: {sorted(sizes)}; a video has one size")
        video = np.stack(pictures)
        if len(video) < frames:
            print(f"{folder}: {len(video)} frames, no training clip of {frames} (--frames)", file=sys.stderr)
        points = (tracks / (video.shape[2], video.shape[1])).astype(np.float32)
        entry = {"points": points.swapaxes(0, 1), "occluded": ~visible.T, "known": known.T}
        videos[folder.name] = {"video": video, **{key: np.ascontiguousarray(value) for key, value in entry.items()}}
        starts = range(0, len(video) - frames + 1, stride)
        for start in (start for start in starts if visible[start].sum() >= min_points):
            clips.append(f"{folder.name}_{start:04d}")
            for t in range(frames):
                write_image(out / "kubric" / clips[-1] / "frames" / f"{t:03d}.png", video[start + t])
            part = slice(start, start + frames)
            truth = {"coords": tracks[part].swapaxes(0, 1), "visibility": ~visible[part].T}
            np.save(out / "kubric" / clips[-1] / f"{clips[-1]}.npy", truth, allow_pickle=True)
    if not clips:
        raise ValueError(f"{source}: no {frames} frames that begin with {min_points} visible points: no clip; lower --frames")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "tapvid_davis.pkl", partial(pickle.dump, videos))
    return clips


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands; the exit code is 1 when something could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", metavar="ROOT", help="list unusable sequences, draw a contact sheet")
    action.add_argument("--pack", metavar="ROOT", help="write .npz tracks and fast frames beside the originals")
    action.add_argument("--convert", nargs=2, metavar=("SOURCE", "OUT"), help="frames + tracks.npz to Kubric and TAP-Vid layout")
    parser.add_argument("--out", help="--check: the picture (check.png); --pack: another root to write to")
    parser.add_argument("--quality", type=int, default=0, help="--pack: JPEG of this quality (1-100); 0, the default: exact")
    parser.add_argument("--workers", type=int, default=1, help="--pack: threads")
    parser.add_argument("--frames", type=int, default=24, help="--convert: frames of a training clip")
    parser.add_argument("--stride", type=int, default=12, help="--convert: frames from one clip's start to the next")
    args = parser.parse_args(argv)
    if min(args.workers, args.frames, args.stride) < 1 or not 0 <= args.quality <= 100:
        parser.error("--workers, --frames and --stride must be at least 1, --quality lies in 0 .. 100")
    try:
        if args.convert:
            clips = convert(*args.convert, args.frames, args.stride)
            print(f"{len(clips)} clips in {args.convert[1]}/kubric, videos in {args.convert[1]}/tapvid_davis.pkl")
            return 0
        bad = check(args.check, args.out or "check.png") if args.check else pack(args.pack, args.out, args.quality, args.workers)
        print("\n".join([*bad, f"{len(bad)} of {len(list_sequences(args.check or args.pack))} sequences cannot be used"]))
        return int(bool(bad))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
