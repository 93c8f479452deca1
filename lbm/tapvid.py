"""TAP-Vid style evaluation sets: DAVIS, Kinetics, RoboTAP and RGB-Stacking, as pickles of the published layouts.

The pickles go through a restricted unpickler: arrays and plain types only. One file is held in memory at a time.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lbm.unpickle import load_pickle

FILES = {"davis": "*davis*.pkl", "kinetics": "*_of_*.pkl", "robotap": "robotap_split*.pkl", "rgb_stacking": "*stacking*.pkl"}
MEMORY_SIZE = {"davis": 20, "kinetics": 36, "robotap": 60, "rgb_stacking": 20}  # memory slots at test time
SIDE = 256  # videos are scored at 256 x 256


def find_files(root: str | Path, dataset: str) -> list[Path]:
    """Return the pickles of a set: `root` itself where it is a file, else those in the folder, by name."""
    if dataset not in FILES:
        raise ValueError(f"eval_dataset is '{dataset}', it must be one of {', '.join(FILES)}")
    root = Path(root)
    files = [root] if root.is_file() else sorted(root.glob(FILES[dataset]))
    if not files:
        raise FileNotFoundError(f"{root}: no such file, nor a folder with {FILES[dataset]} ({dataset}): check tapvid_root")
    return files


def elements(files: list[Path], sort: bool) -> Iterator[tuple[str, dict]]:
    """Yield (name, element) file by file; a file holds a dict by name (gone through by name if `sort`) or a list."""
    for path in files:
        content = load_pickle(path)
        if isinstance(content, dict):
            names = sorted(content) if sort else list(content)
            yield from ((str(name), content[name]) for name in names)
        elif isinstance(content, list):
            yield from ((f"{path.stem}_{i:04d}", element) for i, element in enumerate(content))
        else:
            raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict or a list of videos")
        content = None  # let go of it before the next file is read


def resize_video(video) -> np.ndarray:
    """Return (T, 256, 256, 3) uint8 from (T, H, W, 3) uint8 or a list of encoded images, by Lanczos as the benchmark does."""
    out = np.empty((len(video), SIDE, SIDE, 3), np.uint8)
    for t, frame in enumerate(video):
        image = Image.open(io.BytesIO(frame)).convert("RGB") if isinstance(frame, bytes) else Image.fromarray(frame)
        out[t] = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return out


def sample_first(points: np.ndarray, occluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One query per track, where it is first visible; tracks never visible are dropped.

    points: (N, T, 2) pixels, occluded: (N, T) bool. Returns the tracks' indices (Q,) and queries (Q, 3) as (t, y, x) float32.
    """
    ids = np.flatnonzero(~occluded.all(axis=1))
    times = occluded[ids].argmin(axis=1)
    return ids, np.column_stack([times, points[ids, times, ::-1]]).astype(np.float32)


def sample_strided(points: np.ndarray, occluded: np.ndarray, stride: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """One query for each track visible in each `stride`-th frame; arguments and result as of `sample_first`."""
    frames, ids = np.nonzero(~occluded[:, ::stride].T)  # in the order of frames, then of tracks
    times = frames * stride
    return ids, np.column_stack([times, points[ids, times, ::-1]]).astype(np.float32)


def make_sample(element: dict, query_mode: str = "first") -> dict[str, np.ndarray]:
    """Turn an element of a pickle into a sample (see `tapvid`); the element is left as it is."""
    points, occluded = np.asarray(element["points"], np.float32), np.asarray(element["occluded"], bool)
    known = np.asarray(element.get("known", np.ones_like(occluded)), bool)  # an extension: is the visibility known at all?
    shape = (*occluded.shape, 2)
    if points.shape != shape or known.shape != shape[:2] or len(element["video"]) != shape[1]:
        raise ValueError(f"{len(element['video'])} frames, points {points.shape}, occluded {occluded.shape}: not one clip")
    points = points * np.float32(SIDE)
    ids, queries = {"first": sample_first, "strided": sample_strided}[query_mode](points, occluded)
    return {
        "video": resize_video(element["video"]),
        "tracks": np.ascontiguousarray(points[ids].transpose(1, 0, 2)),
        "visible": np.ascontiguousarray(~occluded[ids].T),
        "known": np.ascontiguousarray(known[ids].T),
        "queries": queries,
    }


def tapvid(
    root: str | Path, dataset: str, query_mode: str = "first", rank: int = 0, world: int = 1, limit: int | None = None
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield (name, sample) for videos rank, rank + world, ... of a set (of its first `limit`, if given).

    root: the pickle, or the folder with the pickles. dataset: davis, kinetics, robotap or rgb_stacking. query_mode: first or
    strided. A sample has video (T, 256, 256, 3) uint8 RGB, tracks (T, N, 2) float32 pixels, visible (T, N) bool, known (T, N)
    bool and queries (N, 3) float32 as (t, y, x), the order of the TAP-Vid files. N may be 0.
    FileNotFoundError or ValueError, naming file or video, when something is missing or not of the layout.
    """
    if query_mode not in ("first", "strided"):
        raise ValueError(f"query_mode is '{query_mode}', it must be 'first' or 'strided'")
    for index, (name, element) in enumerate(elements(find_files(root, dataset), sort=dataset == "davis")):
        if limit is not None and index >= limit:
            return
        if index % world == rank:
            try:
                sample = make_sample(element, query_mode)
            except (ValueError, TypeError, KeyError, OSError) as error:
                raise ValueError(f"{root}: video '{name}' is not of the TAP-Vid layout: {error!r}") from None
            yield name, sample
