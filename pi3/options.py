"""What the values of a config must be, and the image sizes that they mean."""

from functools import reduce
from operator import getitem

from pi3.model import PATCH
from pi3.sampling import all_resolutions, sample_resolutions

count = lambda v: v and v >= 1
limit = lambda v: not v or v > 0
span = lambda v: v and len(v) == 2 and 0 < v[0] <= v[1]
size = lambda v: not v or (len(v) == 2 and all(side > 0 and side % PATCH == 0 for side in v))
RULES = {  # key: its condition, and that in words
    "train.image_num_range": (lambda v: span(v) and v[0] >= 2, "two numbers of views, at least 2, the smaller first"),
    "train.resolution": (size, f"null, or width and height in multiples of {PATCH}"),
    "train.pixel_count_range": (span, "two numbers of pixels, the smaller first"),
    "train.aspect_ratio_range": (span, "two ratios, the smaller first"),
    "train.patch_size": (lambda v: v and v > 0 and v % PATCH == 0, f"a multiple of {PATCH}"),
    "train.gradient_accumulation_steps": (count, "1 or more"),
    "train.num_epoch": (count, "1 or more"),
    "train.iters_per_epoch": (count, "1 or more"),
    "train.optimizer.betas": (lambda v: v and len(v) == 2, "two numbers"),
    "train.clip_grad": (limit, "a norm above 0, or 0 or null for none"),
    "train_dataset.aug_focal": (lambda v: v is not None and 0 <= v <= 1, "0 (off) to 1"),
    "train_dataset.aug_crop": (lambda v: v is not None and v >= 0, "0 (off) or more pixels"),
    "test_dataset.image_num": (lambda v: v and v >= 2, "2 views or more"),
    "test_dataset.resolution": (size, f"null, or width and height in multiples of {PATCH}"),
    "test_dataset.iters_per_test": (limit, "1 or more, or null for all"),
    "model.conf_target": (lambda v: v in ("threshold", "exp"), "threshold or exp"),
    "log.ckpt_interval": (count, "1 or more"),
    "log_every": (limit, "0 (at the end only) or more"),
    "max_steps": (limit, "1 or more, or null for all"),
}


def check(cfg) -> None:
    """ValueError that names the first key whose value would fail later on, or do something else than it says."""
    for key, (good, expected) in RULES.items():
        value = reduce(getitem, key.split("."), cfg)
        if not good(value):
            raise ValueError(f"{key} is {value}: expected {expected}")
    if not sizes_at(0, cfg.train, cfg.seed):
        raise ValueError("no image size lies within both train.pixel_count_range and train.aspect_ratio_range: widen one of them")


def sizes_at(step: int, t, seed: int) -> list[tuple[int, int]]:
    """The (width, height) that a step draws from; `t` is a config's section `train`."""
    ranges = (t.pixel_count_range, t.aspect_ratio_range, t.patch_size)
    if t.resolution:
        return [tuple(t.resolution)]
    epoch = step // t.iters_per_epoch
    return all_resolutions(*ranges) if t.num_resolution < 0 else sample_resolutions(seed + epoch, t.num_resolution, *ranges)
