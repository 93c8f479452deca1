"""Which frames make a sample, and how many views of which size make a batch. Pure functions of generators, seeds and steps.

Frame strategies take a numpy Generator and return N frame numbers, not sorted. The batch plan of a step follows from (seed, step)
alone, so that all ranks agree on it without talking.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

# frames of one sequence


def draw(rng: np.random.Generator, frames: np.ndarray, count: int) -> np.ndarray:
    """`count` of `frames`, uniformly; a frame repeats only if there are fewer."""
    return rng.choice(frames, count, replace=len(frames) < count)


def window_around(reference: int, n: int, reach: int) -> np.ndarray:
    """Positions within `reach` of `reference` in a sequence of n; at an end the window is moved, not shortened."""
    end = min(n - 1, max(0, reference - reach) + 2 * reach)
    return np.arange(max(0, end - 2 * reach), end + 1)


def whole_sequence(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """Frames from anywhere in the sequence: for objects and small rooms, where any two views overlap."""
    return draw(rng, np.arange(n), count)


def sliding_window(rng: np.random.Generator, n: int, count: int, reach: int) -> np.ndarray:
    """A random reference frame, and frames within `reach` of it (among which it may be drawn again)."""
    reference = int(rng.integers(0, n))
    return np.concatenate([[reference], draw(rng, window_around(reference, n, reach), count - 1)])


def sub_intervals(rng: np.random.Generator, reference: int, window: np.ndarray, count: int) -> np.ndarray:
    """One frame from each of `count` near-equal parts of the window but the reference's own part: spread evenly over time.

    A window of count - 1 frames leaves one part empty: a random frame fills up.
    """
    parts = np.array_split(window, count)
    drawn = [int(rng.choice(part)) for part in parts if len(part) and reference not in part]
    return np.array(drawn + [int(rng.choice(window)) for _ in range(count - 1 - len(drawn))], dtype=np.int64)


def consecutive_frames(rng: np.random.Generator, n: int, count: int, max_stride: int = 1) -> np.ndarray:
    """A run of frames with one stride of 1..max_stride; the last one repeats if the sequence is too short."""
    longest = max(1, min(max_stride, (n - 1) // max(1, count - 1)))
    stride = int(rng.integers(1, longest + 1))
    start = int(rng.integers(0, max(1, n - stride * (count - 1))))
    return np.minimum(start + stride * np.arange(count), n - 1)


def tartanair_frames(rng: np.random.Generator, n: int, count: int, whole_prob: float = 0.1) -> np.ndarray:
    """Long flights: a window of 3 frames per view to either side; above 20 views, now and then the whole flight."""
    if count > 20 and rng.random() < whole_prob:
        return whole_sequence(rng, n, count)
    return sliding_window(rng, n, count, reach=3 * count)


def scannet_frames(
    rng: np.random.Generator, n: int, count: int, whole_prob: float = 0.1, invalid: Sequence[int] = ()
) -> np.ndarray:
    """Rooms filmed by hand: a window of 30 frames per view to either side, half of the time split into sub-intervals; above 16
    views, now and then the whole room. `invalid` frames are never drawn. ValueError if no frame is left."""
    valid = np.setdiff1d(np.arange(n), np.asarray(invalid, dtype=np.int64))
    if not len(valid):
        raise ValueError(f"all {n} frames are marked invalid")
    if count > 16 and rng.random() < whole_prob:
        return draw(rng, valid, count)
    reference = int(rng.integers(0, len(valid)))
    window = window_around(reference, len(valid), reach=30 * count)
    if rng.random() < 0.5 or len(window) < count - 1:
        others = draw(rng, window, count - 1)
    else:
        others = sub_intervals(rng, reference, window, count)
    return valid[np.concatenate([[reference], others])]


def co3d_frames(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """A camera that circles one object: any views."""
    return whole_sequence(rng, n, count)


def video_frames(
    rng: np.random.Generator, n: int, count: int, reach_per_view: int = 10, whole_prob: float = 0.1, consecutive_prob: float = 0.1
) -> np.ndarray:
    """RGB-D videos of unknown origin: windows split into sub-intervals, now and then the whole sequence or consecutive frames."""
    kind = rng.random()
    if kind < whole_prob:
        return whole_sequence(rng, n, count)
    if kind < whole_prob + consecutive_prob:
        return consecutive_frames(rng, n, count, max_stride=reach_per_view)
    reference = int(rng.integers(0, n))
    window = window_around(reference, n, reach=reach_per_view * count)
    others = sub_intervals(rng, reference, window, count) if len(window) >= count - 1 else draw(rng, window, count - 1)
    return np.concatenate([[reference], others])


# sizes and numbers of views of a batch


def all_resolutions(
    pixels: Sequence[int] = (100_000, 255_000), aspect: Sequence[float] = (0.5, 2.0), patch: int = 14
) -> list[tuple[int, int]]:
    """Every (width, height) in multiples of `patch` with a pixel count and an aspect ratio w/h in the given ranges, sorted."""
    longest = int((pixels[1] * max(aspect[1], 1 / aspect[0])) ** 0.5) // patch + 1
    sides = [patch * k for k in range(1, longest + 1)]
    return [(w, h) for w in sides for h in sides if pixels[0] <= w * h <= pixels[1] and aspect[0] <= w / h <= aspect[1]]


def sample_resolutions(
    seed: int, n: int, pixels: Sequence[int] = (100_000, 255_000), aspect: Sequence[float] = (0.5, 2.0), patch: int = 14
) -> list[tuple[int, int]]:
    """n distinct random (width, height), sorted: aspect ratio and pixel count uniform, sides rounded to `patch`.

    ValueError when the ranges do not hold n sizes.
    """
    rng, found = np.random.default_rng(seed), set()
    for _ in range(1000 * n):
        if len(found) == n:
            return sorted(found)
        a, p = rng.uniform(*aspect), rng.uniform(*pixels)
        found.add((patch * round((p * a) ** 0.5 / patch), patch * round((p / a) ** 0.5 / patch)))
    raise ValueError(f"no {n} different sizes with {pixels[0]} to {pixels[1]} pixels and aspect {aspect[0]} to {aspect[1]}")


def draw_image_num(rng: np.random.Generator, lo: int, hi: int) -> int:
    """Number of views, uniform in lo..hi."""
    return int(rng.choice(np.arange(lo, hi + 1), p=np.full(hi - lo + 1, 1 / (hi - lo + 1))))


def batch_size(image_num: int, max_img_per_gpu: int) -> int:
    """Samples of `image_num` views that fit into the image budget of a process, at least one."""
    return max(1, max_img_per_gpu // image_num)


def plan_step(
    seed: int, step: int, image_num_range: Sequence[int], max_img_per_gpu: int, resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int, tuple[int, int]]:
    """(samples per process, views per sample, (width, height)) of an optimizer step or micro-batch, equal on all ranks.

    The number of views is capped by the image budget; ValueError if the budget is below the smallest number asked for.
    """
    lo, hi = image_num_range
    if max_img_per_gpu < lo:
        raise ValueError(f"train.max_img_per_gpu is {max_img_per_gpu}: a sample has at least {lo} images (image_num_range)")
    rng = np.random.default_rng([seed, step])
    views = draw_image_num(rng, lo, min(hi, max_img_per_gpu))
    return batch_size(views, max_img_per_gpu), views, resolutions[int(rng.integers(len(resolutions)))]


# the official sampler, reproduced to the draw


def mixture_lengths(weights: Sequence[float], length: int = 10_000_000) -> list[int]:
    """Virtual items of each data set in an epoch of `length`."""
    return [int(w / sum(weights) * length) for w in weights]


def mixture_item(index: int, lengths: Sequence[int], sizes: Sequence[int], epoch: int, base_seed: int = 666) -> tuple[int, int]:
    """(data set, item) behind virtual item `index` of the official mixture."""
    for which, (length, size) in enumerate(zip(lengths, sizes)):
        if index < length:
            return which, int(np.random.default_rng(epoch + base_seed).permutation(size)[index % size])
        index -= length
    raise IndexError(f"the mixture has {sum(lengths)} items")


def official_batches(
    items: int,
    epoch: int,
    rank: int,
    world: int,
    image_num_range: Sequence[int],
    max_img_per_gpu: int,
    num_resolutions: int,
    base_seed: int = 666,
) -> Iterator[tuple[int, int, list[int]]]:
    """(views, resolution index, item indices) of the successive batches that a rank of the official trainer sees in an epoch."""
    order = torch.randperm(items, generator=torch.Generator().manual_seed(base_seed + epoch))
    mine = order[rank : items - items % world : world].tolist()
    views_rng = np.random.default_rng(100 * epoch + base_seed)  # the same on all ranks
    size_rng = np.random.default_rng(100 * epoch + base_seed + rank)
    while mine:
        views = draw_image_num(views_rng, *image_num_range)
        size = int(size_rng.integers(0, num_resolutions))
        n = batch_size(views, max_img_per_gpu)
        yield views, size, mine[:n]
        mine = mine[n:]
