"""TAP-Vid metrics (Doersch et al. 2022, section 3.3): average Jaccard, position accuracy and occlusion accuracy; numpy only.

All are computed for one video at a time, on coordinates scaled to 256 x 256, and averaged over videos.
"""

import math

import numpy as np

THRESHOLDS = (1, 2, 4, 8, 16)  # pixels at 256 x 256
REPORTED = ("aj", "delta_avg", "oa", *(f"delta_{d}" for d in THRESHOLDS))


def ratio(part: np.ndarray, whole: np.ndarray) -> float:
    """Return sum(part) / sum(whole), NaN where there is nothing to divide by."""
    total = float(whole.sum())
    return float(part.sum()) / total if total else math.nan


def video_metrics(
    tracks: np.ndarray,
    visible: np.ndarray,
    true_tracks: np.ndarray,
    true_visible: np.ndarray,
    queries: np.ndarray,
    query_mode: str = "first",
    known: np.ndarray | None = None,
) -> dict[str, float]:
    """Score the tracks of one video.

    tracks, true_tracks: (T, N, 2) pixels at 256 x 256. visible, true_visible: (T, N) bool. queries: (N, 3) as (t, y, x).
    query_mode: "first" scores the frames after the query, "strided" all but the query's. known: (T, N) bool, False where the
    truth does not tell whether the point is visible (those entries are left out); None where it always does.

    Returns fractions in [0, 1], NaN where undefined: `aj`, `delta_avg`, `oa` and per threshold d `delta_d` (share of the visible
    points within d pixels) and `jaccard_d`; and `points`, the number of visible ground-truth points that were scored.
    """
    if query_mode not in ("first", "strided"):
        raise ValueError(f"query_mode is '{query_mode}', it must be 'first' or 'strided'")
    visible, true_visible = np.asarray(visible, bool), np.asarray(true_visible, bool)
    frame, query = np.arange(len(tracks))[:, None], np.rint(queries[:, 0])[None]  # (T, 1), (1, N)
    scored = frame > query if query_mode == "first" else frame != query
    scored = scored if known is None else scored & known
    truth = scored & true_visible

    squared = np.square(tracks - true_tracks).sum(axis=-1)  # (T, N)
    result = {"oa": ratio(scored & (visible == true_visible), scored), "points": float(truth.sum())}
    for d in THRESHOLDS:
        within = squared < d * d
        hit = truth & within & visible
        false_alarm = scored & visible & ~(true_visible & within)
        result[f"delta_{d}"] = ratio(truth & within, truth)
        result[f"jaccard_{d}"] = ratio(hit, np.concatenate([truth, false_alarm]))
    result["delta_avg"] = float(np.mean([result[f"delta_{d}"] for d in THRESHOLDS]))
    result["aj"] = float(np.mean([result[f"jaccard_{d}"] for d in THRESHOLDS]))
    return result


def new_sums() -> dict[str, float]:
    """Zeros for `add_video`: per metric its sum and its number of videos. The keys are fixed, so that sums of ranks add up."""
    return {"videos": 0.0, **{f"{name}.{part}": 0.0 for name in REPORTED for part in ("sum", "count")}}


def add_video(sums: dict[str, float], result: dict[str, float]) -> None:
    """Add a video's result in place. A metric that is undefined for it is left out, and but for `oa` so is a video in which
    no visible point is to be found: it would say nothing about positions.
    """
    sums["videos"] += 1
    for name in REPORTED:
        if math.isfinite(result[name]) and (name == "oa" or result["points"]):
            sums[f"{name}.sum"] += result[name]
            sums[f"{name}.count"] += 1


def summary(sums: dict[str, float]) -> dict[str, float]:
    """Return the means over videos x 100 (NaN without any), `videos` and `skipped`, the most videos that any metric left out."""
    means = {name: 100 * sums[f"{name}.sum"] / sums[f"{name}.count"] if sums[f"{name}.count"] else math.nan for name in REPORTED}
    fewest = min(sums[f"{name}.count"] for name in REPORTED)
    return {**means, "videos": sums["videos"], "skipped": sums["videos"] - fewest}
