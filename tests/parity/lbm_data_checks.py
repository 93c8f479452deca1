"""Checks of the LBM cases on data and metrics: CHECKS[kind](case, arrays, name)."""

import pickle
import tempfile
from pathlib import Path

import cv2
import golden
import numpy as np

from common.io import write_image
from lbm.augment import crop_frames, draw_view, move_tracks, photometric
from lbm.dataset import KubricDataset, load_frames
from lbm.metrics import THRESHOLDS, add_video, new_sums, summary, video_metrics
from lbm.tapvid import tapvid

NAMES = {"occlusion_accuracy": "oa", "average_jaccard": "aj", "average_pts_within_thresh": "delta_avg"}


def numbers(values) -> np.ndarray:
    """None, as JSON writes NaN, to NaN."""
    return np.array([np.nan if v is None else v for v in values], float)


def check_metrics(case, arrays, name):
    """Each video's metrics and their means, for each query mode of the case."""
    names = NAMES | {f"pts_within_{d}": f"delta_{d}" for d in THRESHOLDS} | {f"jaccard_{d}": f"jaccard_{d}" for d in THRESHOLDS}
    queries = np.concatenate([arrays["in_query_t"][..., None], arrays["in_query_yx"]], axis=-1)  # (B, N, 3)
    for mode, expected in case["expected"].items():
        sums = new_sums()
        for b, wanted in enumerate(expected["per_video"]):
            result = video_metrics(
                arrays["in_pred"][b].swapaxes(0, 1), ~arrays["in_pred_occluded"][b].T,
                arrays["in_gt"][b].swapaxes(0, 1), ~arrays["in_gt_occluded"][b].T, queries[b], mode,
            )  # fmt: skip
            add_video(sums, result)
            got = [result[names[key]] for key in wanted]
            golden.close(got, numbers(wanted.values()), rtol=1e-9, what=f"{name} {mode} video {b}")
        wanted, got = expected["mean_times_100"], summary(sums)
        assert set(wanted) <= set(got)
        for key, value in wanted.items():
            if value is not None and np.isfinite(value):  # NaN where one video's is: ours leaves that video out
                golden.close(got[key], value, rtol=1e-9, what=f"{name} {mode} {key}")


def make_video(spec) -> np.ndarray:
    """(T, H, W, 3) uint8 of an `inputs_spec` entry."""
    video = golden.module("lbm/inputs").video(spec["seed"], tuple(spec["shape"]))[0]
    return np.ascontiguousarray(video.astype(np.uint8).transpose(0, 2, 3, 1))


def check_tapvid(case, arrays, name):
    """The four layouts, written to disk from the case's inputs and read back."""
    spec = case["inputs_spec"]
    element = {
        video[: -len("_video")]: {
            "video": make_video(entry),
            "points": arrays[f"in_{video[: -len('_video')]}_points"],
            "occluded": arrays[f"in_{video[: -len('_video')]}_occluded"],
        }
        for video, entry in spec.items()
        if video.endswith("_video")
    }
    jpegs = [arrays[f"jpeg_{i}"].tobytes() for i in range(sum(key.startswith("jpeg_") for key in arrays))]
    sets = {"davis": "davis", "kinetics": "kinetics", "robotap": "robotap", "stacking": "rgb_stacking"}
    with tempfile.TemporaryDirectory() as folder:
        for file, held in spec["files"].items():
            if file == "item_0":
                continue
            kind = next(kind for kind in sets if file.startswith(kind))
            if isinstance(held, dict):
                content = {key: element[video] for key, video in held.items()}
            elif kind == "davis":
                content = {video: element[video] for video in held}
            else:
                content = [element[video] | ({"video": jpegs} if kind == "kinetics" else {}) for video in held]
            path = Path(folder, kind, file.split()[-1])
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps(content))

        tested = 0
        for key in arrays:
            kind, _, part = key.partition("_")
            if kind not in sets:
                continue
            root = Path(folder, kind)
            root = next(root.iterdir()) if kind in ("davis", "stacking") else root
            mode, _, entry = part.partition("_") if not part.startswith("frames") else ("first", "", part)
            sample = next(tapvid(root, sets[kind], mode))[1]
            tested += 1
            if entry.startswith("frames_every"):
                step = int(entry.removeprefix("frames_every"))
                frames = sample["video"].transpose(0, 3, 1, 2)[:, :, ::step, ::step]
                golden.close(frames, arrays[key], atol=2 if kind == "kinetics" else 1, what=f"{name} {key}")
            elif entry == "visible":
                assert np.array_equal(sample["visible"], arrays[key]), f"{name} {key}"
            else:
                golden.close(sample[entry], arrays[key], atol=1e-4, what=f"{name} {key}")
        assert tested


class LegacyDraws:
    """Scalar draws as NumPy's old global generator gives them, in the place of a Generator; arrays come from elsewhere."""

    def __init__(self, seed: int):
        self.old, self.new = np.random.RandomState(seed), np.random.default_rng(seed)

    def random(self, size=None):
        return self.old.rand() if size is None else self.new.random(size)

    def integers(self, low, high):
        return self.old.randint(low, high)

    def uniform(self, low, high):
        return self.old.uniform(low, high)


def check_kubric(case, arrays, name):
    """Reading and centre crop from disk exactly; and the drawn augmentations, which follow the same order of draws."""
    size, length, count = tuple(case["input_size"]), case["T"], case["N"]
    sequences = case["inputs_spec"]["sequences"]
    with tempfile.TemporaryDirectory() as folder:
        for sequence in sequences:
            path = Path(folder, sequence["name"])
            for t, frame in enumerate(make_video(sequence["video"])):
                write_image(path / "frames" / f"{t:03d}.png", frame)
            truth = {"coords": arrays[sequence["coords"]], "visibility": arrays[sequence["visibility_array"]]}
            np.save(path / f"{path.name}.npy", truth, allow_pickle=True)

        data = KubricDataset(folder, size=size, frames=length, points=count, augment=False, min_points=0)
        sample = data.sample(data.names[case["item_noaug"]], np.random.default_rng(0))
        assert sample["valid"].sum() == case["noaug_num_points"], name
        assert np.array_equal(sample["visible"], arrays["noaug_visible"]), name
        assert np.array_equal(sample["tracks"], arrays["noaug_tracks"]), name
        frames = sample["video"].transpose(0, 3, 1, 2)[::5, :, ::37, ::37]
        assert np.array_equal(frames, arrays["noaug_frames_every"]), name

        path = Path(folder, sequences[case["item_aug"]]["name"])
        clip = load_frames(path, arrays[sequences[case["item_aug"]]["coords"]].shape[1])

    for entry in (k for k in arrays if k.startswith("spatial_only_tracks_every")):
        tracks = arrays[sequences[1]["coords"]].swapaxes(0, 1)
        view = draw_view(clip.shape[1:3], tracks, np.ones(tracks.shape[:2], bool), LegacyDraws(case["aug_seed"]), size)
        got = move_tracks(tracks, view, size)[:, :: int(entry.rsplit("every", 1)[1])]
        golden.close(got, arrays[entry], atol=1e-3, what=f"{name} {entry}")
    if "aug_tracks" in arrays:
        check_augmented(case, arrays, name, clip)


def check_augmented(case, arrays, name, clip):
    """The augmented sample: the same points (chosen in another order), hidden in the same frames, on nearly the same picture."""
    size, length, sequence = tuple(case["input_size"]), case["T"], case["inputs_spec"]["sequences"][case["item_aug"]]
    rng = LegacyDraws(case["aug_seed"])
    start = rng.integers(0, len(clip) - length) if len(clip) > length else 0
    clip = clip[start : start + length].copy()
    tracks = arrays[sequence["coords"]][:, start : start + length].swapaxes(0, 1)
    visible = ~arrays[sequence["visibility_array"]][:, start : start + length].T
    photometric(clip, tracks, visible, rng)
    view = draw_view(clip.shape[1:3], tracks, visible, rng, size)
    tracks, clip = move_tracks(tracks, view, size), crop_frames(clip, view, size)
    visible = visible & ((tracks >= 0) & (tracks < size[::-1])).all(axis=-1)

    assert min(visible[0].sum(), case["N"]) == case["aug_num_points"], name
    wanted = arrays["aug_tracks"][:, : case["aug_num_points"]]
    match = np.abs(tracks[0, :, None] - wanted[0, None]).sum(axis=-1).argmin(axis=0)  # upstream's choice, point by point
    assert len(set(match.tolist())) == len(match), name
    golden.close(tracks[:, match], wanted, atol=1e-3, what=f"{name} aug_tracks")
    assert np.array_equal(visible[:, match], arrays["aug_visible"][:, : case["aug_num_points"]]), name
    # colours are jittered by other draws: compare the pattern of the grey block means, frame by frame
    wanted = arrays["aug_frames_blockmean"].mean(axis=1)  # (T, H/32, W/32)
    grey = [cv2.resize(frame.mean(axis=-1), wanted.shape[:0:-1], interpolation=cv2.INTER_AREA) for frame in clip]
    likeness = [np.corrcoef(got.ravel(), want.ravel())[0, 1] for got, want in zip(grey, wanted)]
    assert likeness[0] > 0.7 and np.quantile(likeness, 0.75) > 0.7, (name, likeness)  # another picture: about 0


CHECKS = {"metrics": check_metrics, "tapvid": check_tapvid, "kubric": check_kubric}
