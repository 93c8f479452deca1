"""Stereo pairs of several data sets for training, and two commands on data folders.

    python stereo/dataset.py --check ROOT           list the pairs that cannot be used; draw a contact sheet of the others
    python stereo/dataset.py --convert ROOT OUT     write a set of any known form (stereo/formats.py) in this layout:

    left/rgb/0000.jpg  right/rgb/0000.jpg       8-bit RGB (.png, .webp too)
    left/disparity/0000.png                     three 8-bit digits in base 255: (R * 65025 + G * 255 + B) / 1000 px; 0 = none
    right/disparity/0000.png                    optional, of the right view: wanted for flips

Nested scenes are found as well.
"""

import argparse
import difflib
import sys
from functools import lru_cache
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from common import data
from common.io import contact_sheet, write_image, write_png16
from stereo import photometric, spatial
from stereo.augment import right_view_disparity
from stereo.codec import encode_fsd
from stereo.draw import disparity_picture
from stereo.formats import Pair, decode_disparity, list_pairs, load_raw, read_disparity, read_views

AUGMENTATIONS = ("disparity_stretching", "flipping", "vertical_flipping", "jittering", "eraser", "misalignment")
AUGMENTATIONS += ("right_perturbation",)
BLOCK = 1000  # positions in which every data set has its share


class Source:
    """One data set of the config: its pairs and how they are used."""

    def __init__(
        self,
        path,
        name: str = "",
        format: str = "auto",
        label_type: str = "stereo",
        weight: float | None = None,
        codec: str = "",
        sparse: bool | None = None,
        split: str = "train",
        mask: str = "all",
        index: str | None = None,
        exclude: str | None = None,
        flip_from_warp: bool = False,
        image_augmentation=(),
        stereo_augmentation=(),
        jitter: str = "raft",
    ):
        """weight: share of the samples, relative; None: the square root of the number of pairs. split: see `list_pairs`.
        mask: in validation "all" pixels count, or the non-occluded ones ("noc"). sparse: truth in single points (None: KITTI's).
        index, exclude: text files with the names of the pairs to use or to leave out, one a line (the first column of a CSV).
        flip_from_warp: flip also without truth of the right view."""
        self.name, self.format, self.label_type = name or Path(path).name, format, label_type
        pairs = list_pairs(path, format, codec, split=split)
        for file, keep in ((index, True), (exclude, False)):
            if file:
                names = {line.split(",")[0].strip() for line in Path(file).read_text().splitlines()}
                pairs = [pair for pair in pairs if (pair.name in names) == keep]
        if not pairs:
            raise ValueError(f"data set {self.name}: no pair of {path} is left by index and exclude")
        self.weight = len(pairs) ** 0.5 if weight is None else float(weight)
        if not 0 <= self.weight < np.inf:
            raise ValueError(f"data set {self.name}: weight {weight} must be 0 or more")
        if sparse not in (None, True, False):
            raise ValueError(f"data set {self.name}: sparse '{sparse}' must be true, false or null")
        if mask not in ("all", "noc") or (mask == "noc" and not any(pair.mask for pair in pairs)):
            raise ValueError(f"data set {self.name}: mask '{mask}' must be all, or noc where the set has masks of its own")
        if jitter not in ("mild", "raft"):
            raise ValueError(f"data set {self.name}: jitter '{jitter}' must be mild or raft")
        self.pairs, self.mask = pairs, mask
        self.sparse = pairs[0].sparse if sparse is None else sparse
        self.jitter = "raft_sparse" if self.sparse and jitter == "raft" else jitter
        self.augment, self.flip_from_warp = {*image_augmentation, *stereo_augmentation}, flip_from_warp
        if unknown := sorted(self.augment - set(AUGMENTATIONS)):
            raise ValueError(f"data set {self.name}: unknown augmentation '{unknown[0]}'; there are {', '.join(AUGMENTATIONS)}")


def make_sources(entries: list[dict], **defaults) -> list[Source]:
    """Sources of a config's `datasets`; `defaults` hold for entries that do not say otherwise. ValueError names a wrong key."""
    known = Source.__init__.__code__.co_varnames[1 : Source.__init__.__code__.co_argcount]
    for entry in entries:
        for key in entry:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0)
                raise ValueError(f"data set {entry.get('name', '')}: unknown key '{key}': did you mean '{near[0]}'?")
        if "path" not in entry:
            raise ValueError(f"data set {entry.get('name', '')}: 'path' is missing")
    return [Source(**(defaults | entry)) for entry in entries]


def check_size(width: int, height: int) -> tuple[int, int]:
    """(height, width) of a training size; ValueError where the network cannot take it."""
    if width % 32 or height % 32 or min(width, height) < 64:
        near = [max(64, round(side / 32) * 32) for side in (width, height)]
        rule = "both must be multiples of 32, at least 64"
        raise ValueError(f"image size {width}x{height} (width x height): {rule}; take {near[0]}x{near[1]}")
    return height, width


class StereoDataset:
    """Augmented crops; sample and crop are pure functions of (seed, position), the size of (seed, step). Wrap `read` in Guarded.

    image_sizes: [width, height] pairs, one drawn per step; or area_range (pixels) and aspect_ratio_range (width / height).
    max_disparity: ground truth from there on is not counted. min_valid: least share of the crop with ground truth.
    epoch_sampling: each set is gone through in shuffled epochs; otherwise pairs are drawn with replacement.
    resize_to_fit: the image is scaled to cover the size and its middle taken, instead of a random crop.
    labels: names of the label types; a sample holds the number of its own.
    erase_scale: multiplies the sides of the erased patches, 50 to 99 pixels.
    """

    def __init__(
        self,
        sources: list[Source],
        seed: int = 0,
        image_sizes=((736, 320),),
        area_range=None,
        aspect_ratio_range=None,
        max_disparity: float = 416,
        min_valid: float = 0.001,
        labels=("stereo",),
        epoch_sampling: bool = True,
        resize_to_fit: bool = False,
        flip_probability: float = 0.5,
        vertical_flip_probability: float = 0.5,
        erase_scale: float = 1.0,
    ):
        self.sources, self.seed, self.labels = [source for source in sources if source.weight > 0], seed, list(labels)
        if not self.sources:
            raise ValueError("data.datasets: no data set with a weight above 0")
        for source in self.sources:
            if source.label_type not in self.labels:
                known = ", ".join(self.labels)
                raise ValueError(f"data set {source.name}: label_type '{source.label_type}' has no entry in `loss` ({known})")
        if not all(isinstance(size, (list, tuple)) and len(size) == 2 for size in image_sizes or ()):
            raise ValueError(f"data.image_sizes {image_sizes} must be a list of [width, height], such as [[736, 320]]")
        if image_sizes and area_range:
            raise ValueError("data: area_range draws the sizes that image_sizes lists: set image_sizes null")
        self.sizes = [check_size(*size) for size in image_sizes or ()]
        self.area, self.aspect = area_range, aspect_ratio_range
        if not self.sizes and not (area_range and aspect_ratio_range):
            raise ValueError("data: give image_sizes, or area_range and aspect_ratio_range")
        self.max_disparity, self.min_valid = max_disparity, min_valid
        self.epoch_sampling, self.resize_to_fit, self.erase_scale = epoch_sampling, resize_to_fit, erase_scale
        self.flip, self.vertical_flip = flip_probability, vertical_flip_probability
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def __len__(self) -> int:
        """Pairs of all sets together."""
        return sum(len(source.pairs) for source in self.sources)

    def size_at(self, step: int) -> tuple[int, int]:
        """(height, width) of all samples of a step, on all ranks."""
        rng = data.rng(self.seed, step, 1)
        if self.sizes:
            return self.sizes[int(rng.integers(len(self.sizes)))]
        area, aspect = rng.uniform(*self.area), rng.uniform(*self.aspect)
        return tuple(max(64, round(side / 32) * 32) for side in ((area / aspect) ** 0.5, (area * aspect) ** 0.5))

    def _make_plan(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Set of each position of a block, how many of that set came before in the block, and the sets' counts in any block."""
        weights = np.array([source.weight for source in self.sources])
        shares = np.floor(np.cumsum(weights) / weights.sum() * BLOCK + 0.5).astype(int)
        counts = np.maximum(np.diff(shares, prepend=0), 1)
        counts[counts.argmax()] -= counts.sum() - BLOCK
        chosen = data.rng(self.seed, block, 2).permutation(np.repeat(np.arange(len(counts)), counts))
        before = np.zeros(BLOCK, int)
        for number in range(len(counts)):
            mine = np.flatnonzero(chosen == number)
            before[mine] = np.arange(len(mine))
        return chosen, before, counts

    def choose(self, position: int, attempt: int, rng: np.random.Generator) -> tuple[Source, Pair]:
        """Data set and pair of a position; with attempt > 0 another pair, drawn at random."""
        block, place = divmod(position, BLOCK)
        chosen, before, counts = self._plan(block)
        number = int(chosen[place])
        source = self.sources[number]
        if attempt or not self.epoch_sampling:
            return source, source.pairs[int(rng.integers(len(source.pairs)))]
        turn = block * int(counts[number]) + int(before[place])
        return source, source.pairs[data.epoch_item(self.seed + number, turn, len(source.pairs))]

    def read(self, key, attempt: int = 0) -> dict[str, np.ndarray]:
        """The sample of a key (position, step); a bare position has step 0. See `sample`."""
        position, step = key if isinstance(key, tuple) else (key, 0)
        rng = data.rng(self.seed, position, 0, attempt)
        source, pair = self.choose(position, attempt, rng)
        return self.sample(source, pair, self.size_at(step), rng)

    def sample(self, source: Source, pair: Pair, size: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Read a pair and augment it with draws from `rng`.

        Returns left_image, right_image (H, W, 3) uint8 RGB, disparity (H, W) float32 px (0: none), disparity_mask (H, W) bool
        (known and below max_disparity), label (number of the label type) and name. ValueError or OSError where the pair cannot
        be used, naming the file.
        """
        left, right = read_views(pair)
        shape, augment = left.shape[:2], source.augment
        mirror = "flipping" in augment and rng.random() < self.flip
        mirror &= pair.right_disparity is not None or source.flip_from_warp
        upside_down = "vertical_flipping" in augment and rng.random() < self.vertical_flip
        shift = slope = 0.0
        if "misalignment" in augment and not source.sparse:
            shift = float(rng.integers(-2, 3))
        if "right_perturbation" in augment and rng.random() < 0.3:
            shift, slope = shift + rng.uniform(-1, 1), np.tan(np.radians(rng.uniform(-0.5, 0.5)))
        scale = spatial.draw_scale(rng, shape, size, "disparity_stretching" in augment, source.sparse)
        if self.resize_to_fit:
            scale = (max(size[0] / shape[0], size[1] / shape[1]),) * 2

        raw, codec, file = self.load_truth(pair, mirror, shape)
        for _ in range(8):  # a crop that shows too little ground truth is drawn anew: it is no fault of the files
            view = spatial.draw_view(rng, shape, size, scale, mirror, upside_down, shift, slope, self.resize_to_fit)
            if source.sparse:
                disparity = spatial.scatter_disparity(decode_disparity(raw, codec), view, size)
            else:  # only the pixels of the crop are decoded
                disparity = decode_disparity(raw[np.ix_(*spatial.nearest(view, shape, size))], codec) * np.float32(scale[0])
            mask = (disparity > 0) & (disparity < self.max_disparity)
            if mask.mean() >= self.min_valid:
                break
        else:
            values = decode_disparity(raw, codec)
            known = values[values > 0]
            found = f"{known.min():.4g}..{known.max():.4g} px" if known.size else "no valid pixel at all"
            few = f"too few pixels below max_disparity {self.max_disparity:g} in any crop ({found})"
            raise ValueError(f"{file}: {few}; wrong `codec` ({codec})?")

        if view.swapped:
            left, right = right, left
        left, right = spatial.warp_image(left, view, size), spatial.warp_image(right, view, size, right=True)
        if "jittering" in augment:
            left, right = photometric.jitter(left, right, rng, source.jitter)
        if "eraser" in augment and rng.random() < 0.5:
            right = photometric.erase(right, rng, self.erase_scale)
        return {
            "left_image": left,
            "right_image": right,
            "disparity": np.where(mask, disparity, 0).astype(np.float32),
            "disparity_mask": mask,
            "label": self.labels.index(source.label_type),
            "name": f"{source.name}/{pair.name}",
        }

    @staticmethod
    def load_truth(pair: Pair, mirror: bool, shape: tuple[int, int]) -> tuple[np.ndarray, str, Path]:
        """(values as stored, their code, file) of the view that becomes the left one."""
        file = pair.right_disparity if mirror and pair.right_disparity else pair.disparity
        raw, codec = load_raw(file, pair.codec, pair.hidden if file == pair.disparity else ()), pair.codec
        if raw.shape[:2] != shape:
            raise ValueError(f"{file}: {raw.shape[1]}x{raw.shape[0]}, but the images are {shape[1]}x{shape[0]}")
        if mirror and not pair.right_disparity:
            raw, codec = right_view_disparity(decode_disparity(raw, codec)), "value"
        return raw, codec, file


# --------------------------------------------------------------------------------------------------------------- commands


def check(root, format: str = "auto", codec: str = "", out="check.png") -> tuple[list[str], int]:
    """Read every pair in full. Returns (a line for each that cannot be used, number of pairs), and draws twelve of the others."""
    bad, drawn, pairs = [], [], list_pairs(root, format, codec)
    wanted = {pair.name for pair in pairs[:: -(-len(pairs) // 12)]}
    for pair in tqdm(pairs, desc="check", unit="pair"):
        try:
            left, _ = read_views(pair)
            truth = read_disparity(pair.disparity, pair.codec, pair.hidden)
            if truth.shape != left.shape[:2]:
                sizes = f"{truth.shape[1]}x{truth.shape[0]}, but the images are {left.shape[1]}x{left.shape[0]}"
                raise ValueError(f"{pair.disparity}: {sizes}")
            known = truth[truth > 0]
            if known.size < 0.001 * truth.size:
                raise ValueError(f"{pair.disparity}: {known.size} of {truth.size} pixels have a disparity")
            if np.median(known) > left.shape[1]:
                median = f"median disparity {np.median(known):.0f} px in images {left.shape[1]} wide"
                raise ValueError(f"{pair.disparity}: {median}: wrong `codec`?")
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        if pair.name in wanted:
            height = min(240, left.shape[0])
            drawn.append(contact_sheet([left, disparity_picture(truth)], columns=2, height=height))
    if drawn:
        write_image(out, contact_sheet(drawn))
    return bad, len(pairs)


def convert(root, out, format: str = "auto", codec: str = "") -> tuple[list[str], int]:
    """Write the pairs under root in the layout of this module (rgb as PNG, disparities coded), and their names into names.txt.

    Returns (a line for each that cannot be read, number of pairs).
    """
    bad, names, out, pairs = [], [], Path(out), list_pairs(root, format, codec)
    for number, pair in enumerate(tqdm(pairs, desc="convert", unit="pair")):
        try:
            views, truth = read_views(pair), [read_disparity(pair.disparity, pair.codec, pair.hidden)]
            truth += [read_disparity(pair.right_disparity, pair.codec)] if pair.right_disparity else []
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        for side, image in zip(("left", "right"), views):
            write_image(out / side / "rgb" / f"{number:06d}.png", image)
        for side, disparity in zip(("left", "right"), truth):
            write_png16(out / side / "disparity" / f"{number:06d}.png", encode_fsd(disparity))
        names.append(f"{number:06d},{pair.name}\n")
    if names:
        (out / "names.txt").write_text("".join(names))
    return bad, len(pairs)


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands; the exit code is 1 when something could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", metavar="ROOT", help="list unusable pairs, draw a contact sheet")
    action.add_argument("--convert", nargs=2, metavar=("ROOT", "OUT"), help="write the layout of this module")
    parser.add_argument("--format", default="auto", help="form of ROOT, see stereo/formats.py")
    parser.add_argument("--codec", default="", help="how its disparities are coded, where it is not the format's own way")
    parser.add_argument("--out", default="check.png", help="--check: the picture")
    args = parser.parse_args(argv)
    try:
        if args.convert:
            bad, total = convert(*args.convert, args.format, args.codec)
            print(f"{total - len(bad)} pairs written to {args.convert[1]}")
        else:
            bad, total = check(args.check, args.format, args.codec, args.out)
        print("\n".join([*bad, f"{len(bad)} of {total} pairs cannot be used"]))
        return int(bool(bad))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
