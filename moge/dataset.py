"""Training samples from data sets in the MoGe format (moge/io.py), each a pure function of the seed and its position.

python moge/dataset.py --check ROOT      list the instances that cannot be used; draw a contact sheet of others
"""

import argparse
import difflib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from common import data
from common.io import contact_sheet, safe_join, write_image
from moge.augment import AUGMENTATIONS, process_instance
from moge.io import read_index, read_instance
from moge.vis_data import COLUMNS, instance_row

DEFAULTS = {  # keys of the config's section `data` that an entry of `datasets` may replace for itself
    "aspect_ratio_range": (0.5, 2.0),
    "center_augmentation": 0.5,
    "fov_range_absolute": (1, 179),
    "fov_range_relative": (0.01, 1.0),
    "image_augmentation": ("jittering", "jpeg_loss", "blurring"),
}
OWN = ("name", "path", "label_type", "weight", "index", "depth", "depth_unit", "finite_depth_mask")  # keys of an entry alone


class Source:
    """One entry of `datasets`: where its instances lie and how they are augmented. ValueError names a wrong key or value.

    path: root of the data set; label_type: which table of losses holds; weight: how often it is drawn, relative to the others;
    index, depth: names of its index file and depth maps; depth_unit: metres per unit of depth, makes it metric;
    finite_depth_mask "only_known": pixels of unknown depth are no examples of the mask; and the keys of DEFAULTS.
    """

    def __init__(self, entry: dict, defaults: dict):
        self.name = str(entry.get("name") or Path(str(entry.get("path", "?"))).name)
        known = [*OWN, *DEFAULTS]
        for key in entry:
            if key not in known:
                raise self.error(f"unknown key '{key}': did you mean '{difflib.get_close_matches(key, known, 1, 0)[0]}'?")
        if missing := [key for key in ("path", "label_type") if not entry.get(key)]:
            raise self.error(f"'{missing[0]}' is missing")
        self.root, self.label_type, self.weight = Path(entry["path"]), str(entry["label_type"]), entry.get("weight", 1)
        self.depth = entry.get("depth") or "depth.png"
        self.aspect = options(entry, defaults, "aspect_ratio_range")
        self.process = {key: options(entry, defaults, key) for key in DEFAULTS if key != "aspect_ratio_range"}
        self.process["clamp_max_depth"] = 1000.0 if defaults.get("clamp_max_depth") is None else defaults["clamp_max_depth"]
        self.process |= {key: entry.get(key) for key in ("depth_unit", "finite_depth_mask")}
        try:
            self._validate()
        except TypeError as error:
            raise self.error(f"a value is of the wrong type: {error}") from None
        # bytes in one array: millions of str objects would be copied into every worker by their reference counts
        self.names = np.array([name.encode() for name in read_index(self.root, entry.get("index") or ".index.txt")])

    def error(self, text: str) -> ValueError:
        return ValueError(f"data set {self.name}: {text}")

    def _validate(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise self.error(f"weight {self.weight} must be 0 or above")
        ranges = {"aspect_ratio_range": self.aspect, **{k: self.process[k] for k in ("fov_range_absolute", "fov_range_relative")}}
        for key, value in ranges.items():
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise self.error(f"{key} {list(value)} must be two positive numbers, the lower first")
        if not self.process["fov_range_absolute"][1] < 180 or not self.process["fov_range_relative"][1] <= 1:
            raise self.error("fields of view end below 180 degrees, and relative ones at 1, the whole of the source's")
        if not self.process["clamp_max_depth"] > 0:
            raise self.error(f"clamp_max_depth {self.process['clamp_max_depth']} must be positive")
        if not 0 <= self.process["center_augmentation"] <= 1:
            raise self.error(f"center_augmentation {self.process['center_augmentation']} must lie in 0..1")
        if unknown := sorted(set(self.process["image_augmentation"]) - set(AUGMENTATIONS)):
            raise self.error(f"unknown image_augmentation '{unknown[0]}'; there are {', '.join(AUGMENTATIONS)}")
        if self.process["finite_depth_mask"] not in (None, "only_known"):
            raise self.error(f"finite_depth_mask '{self.process['finite_depth_mask']}' must be absent or only_known")
        if self.process["depth_unit"] is not None and not 0 < self.process["depth_unit"] < float("inf"):
            raise self.error(f"depth_unit {self.process['depth_unit']} must be positive: metres per unit of depth")

    def __len__(self) -> int:
        return len(self.names)

    def instance(self, item: int) -> dict:
        """Read an instance, with its label_type."""
        folder = safe_join(self.root, self.names[item].decode())
        return {**read_instance(folder, self.depth), "label_type": self.label_type}


def options(entry: dict, defaults: dict, key: str):
    """Value of a key for an entry of `datasets`: its own, the config's, or the published one."""
    return next(value for value in (entry.get(key), defaults.get(key), DEFAULTS[key]) if value is not None)


class MoGeDataset:
    """Samples of several data sets. `read` is a pure function of the seed and its key; wrap it in `common.data.Guarded`.

    datasets: entries of the config (see `Source`); those of weight 0 are left out. defaults: the config's section `data`.
    normals: whether samples hold normals, which only normal_map_loss needs. Several data sets are drawn by weight and their
    instances uniformly, with replacement; a single one is gone through in shuffled epochs.
    """

    def __init__(self, datasets: Sequence[dict], *, seed: int, defaults: dict, normals: bool = True):
        if defaults.get("depth_interpolation") is not None:
            text = "data.depth_interpolation has no effect: depth is warped bilinearly in disparity, nearest at edges"
            warnings.warn(text, stacklevel=2)
        check_sizes(defaults.get("image_sizes"), defaults.get("area_range"))
        self.sources = [Source(entry, defaults) for entry in in_use(datasets)]
        self.weights, self.seed, self.normals = [source.weight for source in self.sources], seed, normals

    @property
    def label_types(self) -> list[str]:
        """Label types in use, sorted, for `moge.loss.check_table`."""
        return sorted({source.label_type for source in self.sources})

    def __len__(self) -> int:
        """Instances of all data sets together."""
        return sum(map(len, self.sources))

    def read(self, key: tuple[int, int, int], attempt: int = 0) -> dict:
        """The sample of a key (position, width, height), as `moge.augment.process_instance` returns it, and its `name`.

        normal is float16, and left out without `normals`. Another attempt takes another instance of the same data set. A view
        that shows no depth ("invalid") is replaced by another instance's: it would teach nothing. ValueError after five in a row.
        """
        position, width, height = key
        source = self.sources[choose(self.seed, position, self.weights)]
        rng, n = data.rng(self.seed, position, 0, attempt), len(source)
        item = data.epoch_item(self.seed, position, n) if len(self.sources) == 1 else int(rng.integers(n))
        if attempt and n > 1:
            item = (item + int(rng.integers(1, n))) % n
        for retry in range(5):
            item = int(rng.integers(n)) if retry else item
            sample = process_instance(source.instance(item), width, height, rng, **source.process, normals=self.normals)
            if sample["label_type"] == source.label_type:
                break
        else:
            advice = f"python moge/dataset.py --check {source.root} lists the instances without"
            raise ValueError(f"data set {source.name}: five views in a row show no depth; {advice}")
        if self.normals:
            sample["normal"] = sample["normal"].astype(np.float16)
        return sample | {"name": f"{source.name}/{source.names[item].decode()}"}


def in_use(datasets: Sequence[dict]) -> list[dict]:
    """The entries whose weight is not 0; ValueError if none is left, or one is no dict."""
    if odd := [entry for entry in datasets or () if not isinstance(entry, dict)]:
        raise ValueError(f"data.datasets: {odd[0]!r} must be keys and values, {{path, label_type, ...}}")
    entries = [entry for entry in datasets or () if entry.get("weight", 1) != 0]
    if not entries:
        raise ValueError("data.datasets: no data set with a weight above 0")
    return entries


def check_sizes(sizes: Sequence | None, area: Sequence | None) -> None:
    """ValueError for sizes that are no [width, height] of at least 14 pixels, or an area range that does not ascend from 196."""
    for size in sizes or ():
        if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 14:
            raise ValueError(f"data.image_sizes: {size} must be [width, height], 14 pixels (a patch) or more each")
    if area and (len(area) != 2 or not 196 <= area[0] <= area[1]):
        raise ValueError(f"data.area_range {list(area)} must be two numbers of pixels, the lower first, at least 196 (a patch)")


def choose(seed: int, position: int, weights: Sequence[float]) -> int:
    """Which data set the sample at a position comes from."""
    if len(weights) == 1:
        return 0
    return int(data.rng(seed, position, 1).choice(len(weights), p=np.divide(weights, sum(weights))))


def batch_size(seed: int, step: int, section: dict, drawn: Sequence[dict]) -> tuple[int, int]:
    """(width, height) of all samples of a step: one of `image_sizes`, or of a drawn area and aspect ratio (width / height).

    section: the config's `data`; drawn: the entries of `datasets` that samples of the step come from, whose aspect ranges
    together bound the aspect.
    """
    rng = data.rng(seed, step, 2)
    if sizes := section.get("image_sizes"):
        width, height = sizes[int(rng.integers(len(sizes)))]
        return int(width), int(height)
    ranges = np.array([options(entry, section, "aspect_ratio_range") for entry in drawn])
    area = rng.uniform(*(section.get("area_range") or (250000, 1000000)))
    aspect = rng.uniform(ranges[:, 0].min(), ranges[:, 1].max())
    return int((area * aspect) ** 0.5), int((area / aspect) ** 0.5)


def batch_keys(cfg: dict, step: int, rank: int, world: int) -> list[list[tuple[int, int, int]]]:
    """This rank's keys (position, width, height) of an optimizer step, one list per micro-batch.

    All samples of a step, on all ranks, have one size, drawn from (seed, step): no rank waits for one with larger images, and
    another number of ranks sees the same samples if the product of ranks, micro-batches and batch_size_forward is kept.
    """
    seed, section, accumulation = cfg["seed"], cfg["data"], cfg["gradient_accumulation_steps"]
    total = cfg["batch_size_forward"] * accumulation * world
    entries = drawn = in_use(section["datasets"])
    if any(entry.get("aspect_ratio_range") for entry in entries):
        weights = [entry.get("weight", 1) for entry in entries]
        drawn = [entries[i] for i in {choose(seed, p, weights) for p in range(step * total, (step + 1) * total)}]
    size = batch_size(seed, step, section, drawn)
    return [[(p, *size) for p in micro] for micro in data.positions(step, total, rank, world, accumulation)]


def unpack(batch: dict, device: torch.device | str) -> dict:
    """A collated batch (`common.data.stack`) on the device, as the model and `moge.loss.total_loss` take it.

    image (B, 3, H, W) float32 in 0..1, depth (B, H, W), depth_mask_fin, depth_mask_inf (B, H, W) bool, intrinsics (B, 3, 3),
    normal (B, H, W, 3) where there; label_type, is_metric and name stay lists on the host. Does not wait for the device.
    """
    names = ("image", "depth", "depth_mask_fin", "depth_mask_inf", "intrinsics", "normal")
    out = {key: batch[key].to(device, non_blocking=True) for key in names if key in batch}
    out["image"] = out["image"].permute(0, 3, 1, 2).float() / 255  # (B, H, W, 3) -> (B, 3, H, W)
    if "normal" in out:
        out["normal"] = out["normal"].float()
    return out | {"label_type": batch["label_type"], "is_metric": batch["is_metric"].tolist(), "name": batch["name"]}


# --------------------------------------------------------------------------------------------------------------- commands


def read_strictly(root: Path, name: str, depth: str = "depth.png") -> dict:
    """Read an instance; ValueError also for what training lets pass: hardly any depth, shapes that cannot belong together."""
    folder = safe_join(root, name)
    instance = read_instance(folder, depth)
    z, K, (h, w) = instance["depth"], instance["intrinsics"], instance["image"].shape[:2]
    if np.isfinite(z).mean() < 0.001:
        raise ValueError(f"{folder}: {100 * np.isfinite(z).mean():.2g} % of the depth map are known and finite: nothing to learn from")
    if not 0.95 < (z.shape[1] / z.shape[0]) / (w / h) < 1.05:
        sizes = f"the image is {w} x {h}, the depth map {z.shape[1]} x {z.shape[0]}"
        raise ValueError(f"{folder}: {sizes}: different aspect ratios, so they cannot show the same view")
    if not 0.8 < (pixel := K[0, 0] * w / (K[1, 1] * h)) < 1.25:
        advice = "fx belongs divided by the width and fy by the height"
        raise ValueError(f"{folder / 'meta.json'}: pixels would be {pixel:.2f} times as high as wide; {advice}")
    return instance


def check(root: str | Path, index: str = ".index.txt", depth: str = "depth.png", out: str | Path = "check.png") -> tuple[list[str], int]:
    """Read every instance in full. Returns (a line for each that cannot be used, their number), and draws eight of the others."""
    bad, rows, names = [], [], read_index(root, index)
    wanted = set(names[:: -(-len(names) // 8)])
    for name in tqdm(names, desc="check", unit="instance", disable=not sys.stderr.isatty()):
        try:
            instance = read_strictly(Path(root), name, depth)
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        if name in wanted:
            rows += instance_row(instance, name)
    if rows:
        write_image(out, contact_sheet(rows, COLUMNS))
    return bad, len(names)


def main(argv: list[str] | None = None) -> int:
    """Check a data set; the exit code is 1 when something cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="ROOT", required=True, help="root folder of a data set, the one with the index")
    parser.add_argument("--index", default=".index.txt", help="name of the index file in it")
    parser.add_argument("--depth", default="depth.png", help="name of the depth maps")
    parser.add_argument("--out", default="check.png", help="picture: image, depth and normals of some instances")
    args = parser.parse_args(argv)
    try:
        bad, total = check(args.check, args.index, args.depth, args.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join([*bad, f"{len(bad)} of {total} instances cannot be used; others drawn to {args.out}"]))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
