"""Renderings of objects from six views: colours, normals and masks in folders, one per object.

    <root>/<uid[:k]>/<uid>/rgb_000_<view>.png  normals_000_<view>.png  [mask_000_<view>.png]        k = 3, 2 or 0

Workers return resized 8-bit arrays; `compose` does the colour and normal maths for a whole batch where the batch lies. Sample p
of a run is a pure function of (seed, p).

  python mvdiff/dataset.py --check ROOT [--out check.png]                     list unusable objects, draw a contact sheet
  python mvdiff/dataset.py --pack ROOT --out PACKED [--resolution 256]        one file per object, resized: loads ten times faster
  python mvdiff/dataset.py --cache CACHE --config FILE [key=value ...]        frozen work of a training, to train from
  torchrun --nproc_per_node 4 mvdiff/dataset.py --cache CACHE --config FILE   the same on many GPUs
"""

import argparse
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of mvdiff/

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import dist
from common.config import number
from common.data import epoch_item, rng as position_rng
from common.io import write_image
from mvdiff.camera import camera_angles, camera_vector, normal_rotation, view_names
from mvdiff.clip import constants, preprocess_tensor, resize_shorter_side
from mvdiff.pictures import background_color, fit_square, grid, resize_square, round_uint8
from mvdiff.weights import read_json

FILES = {"color": "rgb", "normal": "normals"}
PACKED, PACK_RECORD = ("color", "normal"), "pack.json"  # order of domains in a packed object; marks a folder of packed ones
SUFFIXES = ("png", "webp", "jpg")


# ---- objects on disk -------------------------------------------------------------------------------------------------


def list_objects(root: str | Path, object_list: str | Path | None = None, invalid_list: str | Path | None = None) -> list[str]:
    """Names of the objects, in the order of the JSON list (names or paths, ".glb" or not), without doubles and without those of
    `invalid_list`; without a list, the folders of `root` in name order."""

    def read(path: str | Path) -> list[str]:
        try:
            names = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: expected a JSON list of object names")
        return [os.path.basename(name).removesuffix(".glb") for name in names]

    if object_list:
        names = read(object_list)
    else:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{root}: no such folder of renderings")
        visible = lambda folder: sorted(entry for entry in Path(folder).iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in visible(root) if entry.is_dir()]
        packed = [path.stem for path in visible(root) if path.suffix == ".npy"]
        flat = packed or [entry.name for entry in folders if any(entry.glob("rgb_*_front.*"))]
        names = flat or sorted(inner.name for entry in folders for inner in visible(entry) if inner.is_dir())
    invalid = set(read(invalid_list)) if invalid_list else set()
    names = [name for name in dict.fromkeys(names) if name not in invalid]
    if not names:
        raise ValueError(f"{object_list or root}: no objects found")
    return names


def split_objects(
    names: list[str], num_validation: int = 32, validation: bool = False, num_samples: int | None = None
) -> list[str]:
    """The last `num_validation` names are for validation, the others for training; `num_samples` cuts the result."""
    cut = len(names) - num_validation
    if num_validation and cut <= 0:
        raise ValueError(f"{len(names)} objects leave none to train on beside {num_validation} for validation")
    return (names[cut:] if validation else names[:cut])[:num_samples]


def probe(root: str | Path, names: list[str], group: str = "000") -> tuple[int, str, bool]:
    """(k, suffix, whether there are mask files) of the folder layout, from the first object that has its front picture."""
    for name, k, suffix in itertools.product(names, (3, 2, 0), SUFFIXES):
        folder = Path(root, name[:k], name)
        if (folder / f"rgb_{group}_front.{suffix}").exists():
            return k, suffix, (folder / f"mask_{group}_front.{suffix}").exists()
    name, others = names[0], f", nor of {len(names) - 1} others" if len(names) > 1 else ""
    places = f"{name[:3]}/{name}, {name[:2]}/{name} or {name}"
    raise FileNotFoundError(f"{root}: no rgb_{group}_front.png (.webp, .jpg) of object {name!r} in {places}{others}")


def open_picture(path: str | Path) -> Image.Image:
    """Decode a picture as it is, but palettes and unusual modes as RGB or RGBA. Errors name the file."""
    try:
        with Image.open(path) as image:
            if image.mode in ("RGB", "RGBA", "L"):
                image.load()
                return image
            return image.convert("RGBA" if image.mode in ("LA", "PA") or "transparency" in image.info else "RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing view") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: unreadable picture: {error}") from None


class MultiViewDataset:
    """Objects rendered from `num_views` views.

    `pred_type`: "joint" reads colours and normals of all views, "mix" one of the two by a coin, "color" and "normal" that one.
    `domains` is the order of the D axis for "joint". `read_mask`: mask files rather than the alpha of each picture; it,
    `subscene_tag` (k) and `suffix` are found out from the objects where None. `augment_data` draws the condition view among
    the views. `crop`: None wants square files; "center" or "random" fits the shorter side and crops one window per object.
    `random_flip` is refused: a flipped view would not show the same object from the same camera as the others.
    `clip_size` is the side of the image encoder's input.
    """

    def __init__(
        self,
        root: str | Path,
        objects: list[str],
        num_views: int = 6,
        resolution: int = 256,
        seed: int = 42,
        bg_color: str | float = "three_choices",
        pred_type: str = "joint",
        domains: tuple[str, str] = ("color", "normal"),
        condition_view: str = "front",
        augment_data: bool = False,
        crop: str | None = None,
        random_flip: bool = False,
        read_mask: bool | None = None,
        subscene_tag: int | None = None,
        suffix: str | None = None,
        group: str = "000",
        clip_size: int = 224,
    ):
        if random_flip:
            raise ValueError("random_flip mirrors views one by one, which no camera can see: switch it off")
        if pred_type not in ("joint", "mix", "color", "normal") or crop not in (None, "center", "random"):
            raise ValueError(f"pred_type {pred_type!r} or crop {crop!r} is unknown")
        self.root, self.objects, self.views = Path(root), objects, view_names(num_views)
        if condition_view not in self.views:
            raise ValueError(f"condition_view {condition_view!r} is none of the {num_views} views: {', '.join(self.views)}")
        self.resolution, self.seed = resolution, seed
        self.bg_color, self.pred_type, self.domains, self.crop = bg_color, pred_type, domains, crop
        self.condition_view, self.augment_data, self.group, self.clip_size = condition_view, augment_data, group, clip_size
        self.packed = (self.root / PACK_RECORD).exists()
        if self.packed:
            record = read_json(self.root / PACK_RECORD)
            if record != {"resolution": resolution, "views": list(self.views)}:
                raise ValueError(f"{self.root} was packed with {record}: choose the same resolution and views, or pack again")
        found = (3, "png", True)
        if not self.packed and (subscene_tag is None or suffix is None or read_mask is None):
            found = probe(root, objects, group)
        self.k = found[0] if subscene_tag is None else subscene_tag
        self.suffix = found[1] if suffix is None else suffix
        self.read_mask = found[2] if read_mask is None else read_mask
        self.rotations = {view: normal_rotation(view, self.views) for view in self.views}  # by condition view
        self.angles = {view: camera_angles(view, self.views) for view in self.views}

    def __len__(self) -> int:
        return len(self.objects)

    def read(self, key: int | tuple, attempt: int = 0) -> dict:
        """The sample at a position of the run: see `load`. An object that cannot be read is replaced by one drawn at random."""
        position = key[0] if isinstance(key, tuple) else key
        rng = position_rng(self.seed, position, attempt)
        n = len(self.objects)
        return self.load(epoch_item(self.seed, position, n) if attempt == 0 else int(rng.integers(n)), rng)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """The nine entries of one sample, without a batch axis."""
        sample = self.read(position)
        batch = {k: torch.from_numpy(np.asarray(v))[None] for k, v in sample.items() if not isinstance(v, str)}
        return {k: v[0] for k, v in nine_entries(finish(batch)).items()}

    def load(self, index: int, rng: np.random.Generator) -> dict:
        """Object `index` as arrays; everything random comes from `rng`. V views, R = resolution, D = 2 for "joint", else 1.

        rgba uint8 (D,V,R,R,4): colours or encoded normals as stored (normals in the axes of their own camera), with alpha;
        condition uint8 (R,R,4); clip uint8 (3,S,S): the condition picture on its background, resized for CLIP; background
        float32 (3,), rotation float32 (V,3,3), angles float32 (V,3), is_normal uint8 (D,), name.
        """
        name, (domains, background, at) = self.objects[index], self.choose(rng)
        read = self.reader(name, window=int(rng.integers(2**31)))
        rgba = np.stack([np.stack([read(domain, i) for i in range(len(self.views))]) for domain in domains])
        condition = rgba[domains.index("color"), at].copy() if "color" in domains else read("color", at)
        if not condition[..., 3].any():
            raise ValueError(f"{self.root}: object {name!r} is empty in its condition view {self.views[at]}")
        return {
            "rgba": rgba,
            "condition": condition,
            "clip": self.clip(condition, background),
            "background": background,
            "rotation": self.rotations[self.views[at]],
            "angles": self.angles[self.views[at]],
            "is_normal": np.array([d == "normal" for d in domains], np.uint8),
            "name": name,
        }

    def choose(self, rng: np.random.Generator) -> tuple[tuple[str, ...], np.ndarray, int]:
        """(domains, background colour (3,), index of the condition view) of a sample."""
        domains = (self.pred_type,)
        if self.pred_type == "joint":
            domains = self.domains
        elif self.pred_type == "mix":
            domains = (("color", "normal")[int(rng.integers(2))],)
        background = background_color(self.bg_color, rng)
        at = int(rng.integers(len(self.views))) if self.augment_data else self.views.index(self.condition_view)
        return domains, background, at

    def clip(self, condition: np.ndarray, background: np.ndarray) -> np.ndarray:
        """Condition picture (R,R,4) on its background, resized for the image encoder: uint8 (3,S,S)."""
        return clip_picture(condition, background, self.clip_size)

    def files(self, name: str) -> list[Path]:
        """The files that hold an object, both domains, all views."""
        if self.packed:
            return [self.root / f"{name}.npy"]
        kinds = [*FILES.values(), *(["mask"] if self.read_mask else [])]
        folder = self.root / name[: self.k] / name
        return [folder / f"{kind}_{self.group}_{view}.{self.suffix}" for kind in kinds for view in self.views]

    def reader(self, name: str, window: int) -> Callable[[str, int], np.ndarray]:
        """Function of (domain, view index) -> (R,R,4) uint8 for one object; `window` seeds the crop window of all its files.

        Mask files win over the alpha of a picture: 255 wherever the resized mask is above 0, which lets it grow by the filter's
        reach. ValueError or FileNotFoundError names the file.
        """
        if self.packed:
            file, shape = self.root / f"{name}.npy", (2, len(self.views), self.resolution, self.resolution, 4)
            try:
                stored = np.load(file, mmap_mode="r")
            except ValueError as error:
                raise ValueError(f"{file}: unreadable, pack it again: {error}") from None
            if (stored.shape, stored.dtype) != (shape, np.uint8):
                raise ValueError(f"{file}: {stored.dtype} {stored.shape} instead of uint8 {shape}: pack it again")
            return lambda domain, i: np.array(stored[PACKED.index(domain), i])
        folder = self.root / name[: self.k] / name
        path = lambda kind, i: folder / f"{kind}_{self.group}_{self.views[i]}.{self.suffix}"

        @functools.cache
        def mask(i: int) -> np.ndarray:
            image = open_picture(path("mask", i))
            image = image if image.mode == "L" else image.convert("L")
            return (np.asarray(self.resize(image, path("mask", i), window)) > 0).astype(np.uint8) * 255

        def read(domain: str, i: int) -> np.ndarray:
            file = path(FILES[domain], i)
            image = open_picture(file)
            image = image.convert("RGB") if image.mode == "L" else image
            if image.mode == "RGB" and not self.read_mask:
                raise ValueError(f"{file}: no alpha channel, and masks are not read: write RGBA or add mask files")
            pixels = np.asarray(self.resize(image, file, window))
            alpha = mask(i) if self.read_mask else pixels[..., 3]
            return np.dstack([pixels[..., :3], alpha])

        return read

    def resize(self, image: Image.Image, path: Path, window: int) -> Image.Image:
        """To (R,R): by PIL's bicubic, or fitted and cropped."""
        if self.crop:
            return fit_square(image, self.resolution, self.crop == "center", np.random.default_rng(window))
        if image.width != image.height:
            raise ValueError(f"{path}: {image.width} x {image.height} is not square: render square views, or set crop to center")
        return resize_square(image, self.resolution)


def pack(data: MultiViewDataset, out: str | Path) -> list[str]:
    """Write every object of `data` as one file out/<name>.npy, uint8 (2,V,R,R,4), already resized: reading it takes no decoding.

    A MultiViewDataset on `out` gives the same samples (with crop windows of "random" drawn once and for all). Returns what is
    wrong with the objects that cannot be read.
    """
    out, bad = Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    (out / PACK_RECORD).write_text(json.dumps({"resolution": data.resolution, "views": list(data.views)}))
    for i, name in enumerate(data.objects):
        try:
            read = data.reader(name, window=i)
            pixels = np.stack([[read(domain, v) for v in range(len(data.views))] for domain in PACKED])
        except (OSError, ValueError) as error:
            bad.append(str(error))
            continue
        temporary = out / f".{name}.{os.getpid()}"
        with open(temporary, "wb") as file:
            np.save(file, pixels)
        os.replace(temporary, out / f"{name}.npy")
    return bad


class NoiseDataset:
    """Objects of noise, without files, to try a set-up: same arrays as MultiViewDataset."""

    def __init__(self, num_views: int = 6, resolution: int = 256, seed: int = 42, clip_size: int = 224, length: int = 300):
        self.views, self.resolution, self.seed, self.clip_size, self.length = num_views, resolution, seed, clip_size, length

    def __len__(self) -> int:
        return self.length

    def read(self, key: int | tuple, attempt: int = 0) -> dict:
        """The sample at a position; both domains."""
        item = epoch_item(self.seed, key[0] if isinstance(key, tuple) else key, self.length)
        rng, v, r = position_rng(self.seed, item, attempt), self.views, self.resolution
        noise, opaque = lambda *shape: rng.integers(0, 256, shape, np.uint8), np.array([0, 0, 0, 255], np.uint8)
        return {
            "rgba": noise(2, v, r, r, 4) | opaque,
            "condition": noise(r, r, 4) | opaque,
            "clip": noise(3, self.clip_size, self.clip_size),
            "background": np.ones(3, np.float32),
            "rotation": np.tile(np.eye(3, dtype=np.float32), (v, 1, 1)),
            "angles": rng.standard_normal((v, 3)).astype(np.float32),
            "is_normal": np.array([0, 1], np.uint8),
            "name": f"noise_{item:03d}",
        }


def clip_picture(rgba: np.ndarray, background: np.ndarray, size: int) -> np.ndarray:
    """rgba (R,R,4) uint8 on its background, shorter side resized (PIL bicubic), centre cropped -> (3,size,size) uint8."""
    canvas = Image.new("RGB", rgba.shape[1::-1], tuple(int(255 * c + 0.5) for c in background))
    image = Image.fromarray(rgba)
    canvas.paste(image, mask=image)
    canvas = resize_shorter_side(canvas, size, Image.Resampling.BICUBIC)
    left, top = (canvas.width - size) // 2, (canvas.height - size) // 2
    return np.asarray(canvas.crop((left, top, left + size, top + size))).transpose(2, 0, 1).copy()


# ---- batches ---------------------------------------------------------------------------------------------------------


def compose(batch: dict[str, Tensor], normals_renormalise: bool = False, clamp: bool = False) -> tuple[Tensor, Tensor]:
    """Condition pictures (B,3,R,R) and targets (B,D,V,3,R,R), fp32 in [0,1], on their backgrounds, from batched arrays of `load`.

    Normals are turned into the axes of the condition view's camera, and left so: not of unit length after resizing, and beyond
    [0,1] at soft edges, where undefined values are turned too, as in the published training; `normals_renormalise` and `clamp`
    mend that for new trainings.
    """
    pixels = batch["rgba"].movedim(-1, 3).to(torch.float32, memory_format=torch.contiguous_format)  # (B,D,V,4,R,R)
    image, alpha = pixels.split((3, 1), dim=3)
    alpha = alpha / 255
    # Encoded normals e = x / 255, n = 2 e - 1: their rotation R n / 2 + 1 / 2 is the affine map R x / 255 + (1 - R 1) / 2
    is_normal = batch["is_normal"].bool()[:, :, None, None, None]
    matrix = torch.where(is_normal, batch["rotation"].float()[:, None], torch.eye(3, device=pixels.device))  # (B,D,V,3,3)
    offset, matrix = (1 - matrix.sum(-1)) / 2, matrix / 255
    targets = offset[..., None, None]  # (B,D,V,3,1,1)
    for j in range(3):  # written out, because a matrix product may run in reduced precision
        targets = torch.addcmul(targets, matrix[..., j, None, None], image[:, :, :, j, None])
    if normals_renormalise:
        n = F.normalize(targets * 2 - 1, dim=3, eps=1e-6)
        targets = torch.where(is_normal[..., None] & (alpha > 0), n * 0.5 + 0.5, targets)
    background = batch["background"][:, :, None, None]  # (B,3,1,1)
    targets = torch.lerp(background[:, None, None], targets, alpha)
    rgb, alpha = (batch["condition"].movedim(-1, 1).float() / 255).split((3, 1), dim=1)  # (B,3,R,R), (B,1,R,R)
    return torch.lerp(background, rgb, alpha), targets.clamp(0, 1) if clamp else targets


def finish(batch: dict[str, Tensor], clip_resize: str = "pil", camera_flags: bool = True, **options) -> dict[str, Tensor]:
    """What a training step needs, on the batch's device. D domains in the order of is_normal.

    image_cond uint8 (B,3,R,R), image_cond_vae fp32 (B,3,R,R) in [-1,1], image_cond_CLIP fp32 (B,3,S,S), target uint8 and
    target_vae fp32 (B,D,V,3,R,R), camera_embed fp32 (B,D,V,10), is_normal bool (B,D). `clip_resize`: "pil" (as in sampling),
    "tensor", or "tensor_noaa" (the published training: no antialiasing). `camera_flags` False leaves the domain out of the
    vector: 6 numbers. `options`: those of `compose`.
    """
    condition, targets = compose(batch, **options)
    if clip_resize == "pil":
        mean, std = constants(condition.device)
        pixels = (batch["clip"].float() / 255 - mean) / std
    elif clip_resize in ("tensor", "tensor_noaa"):
        pixels = preprocess_tensor(condition, batch["clip"].shape[-1], antialias=clip_resize == "tensor")
    else:
        raise ValueError(f"clip_resize {clip_resize!r}: known are pil, tensor and tensor_noaa")
    return {
        "image_cond": round_uint8(condition),
        "image_cond_vae": condition * 2 - 1,
        "image_cond_CLIP": pixels,
        "target": round_uint8(targets),
        "target_vae": targets * 2 - 1,
        "camera_embed": camera_embedding(batch["angles"], batch["is_normal"], camera_flags),
        "is_normal": batch["is_normal"].bool(),
    }


def camera_embedding(angles: Tensor, is_normal: Tensor, camera_flags: bool = True) -> Tensor:
    """Camera vectors (B,D,V,10), or (B,D,V,6) without flags, from angles (B,V,3) and is_normal (B,D)."""
    (b, v, _), d = angles.shape, is_normal.shape[1]
    flags = is_normal.bool()[:, :, None].expand(b, d, v) if camera_flags else None
    return camera_vector(angles[:, None].expand(b, d, v, 3), flags)


def nine_entries(finished: dict[str, Tensor]) -> dict[str, Tensor]:
    """A joint batch under the nine names of the training document: condition, colours and normals, each raw and prepared."""
    normal = int(finished["is_normal"][0, 1])  # where on the D axis the normals stand
    out = {key: finished[key] for key in ("image_cond", "image_cond_vae", "image_cond_CLIP")}
    for name, at in (("image", 1 - normal), ("normal", normal)):
        out[f"{name}_target"] = finished["target"][:, at]
        out[f"{name}_target_vae"] = finished["target_vae"][:, at]
        out[f"camera_embed_{name}"] = finished["camera_embed"][:, at]
    return out


# ---- command line ----------------------------------------------------------------------------------------------------


def check(data: MultiViewDataset, picture: str | Path, shown: int = 8) -> list[str]:
    """Read every object of `data` (joint); write a contact sheet of the first good ones, a row each: colours, then normals in the
    axes of the condition view. Returns what is wrong with the others."""
    bad, rows = [], []
    for index in range(len(data)):
        try:
            sample = data.load(index, np.random.default_rng(0))
        except (OSError, ValueError) as error:
            bad.append(str(error))
            continue
        if len(rows) < shown:
            batch = {k: torch.from_numpy(np.asarray(v))[None] for k, v in sample.items() if not isinstance(v, str)}
            rows.append(compose(batch, clamp=True)[1][0].flatten(0, 1))  # (D*V,3,R,R)
    if rows:
        sheet = round_uint8(grid(torch.cat(rows), len(rows[0])))
        write_image(picture, sheet.permute(1, 2, 0).numpy())
    return bad


def open_root(root: str | Path, num_views: int, resolution: int, **options) -> MultiViewDataset:
    """All objects of a folder, both domains, on white."""
    return MultiViewDataset(root, list_objects(root), num_views, resolution, bg_color="white", **options)


def cache_command(root: str, argv: list[str]) -> list[str]:
    """Store the frozen work of the training that `argv` configures, all its objects; returns what could not be read."""
    from mvdiff import build, cache  # they import this file

    cfg = build.parse(argv, __doc__)
    if cfg.debug:
        raise ValueError("debug makes noise, of which nothing can be stored: leave it out with --cache")
    device = dist.init(cfg.timeout)
    dtype = dist.autocast_dtype(cfg.amp, device)
    frozen, options = build.load_frozen_of(cfg), build.finish_options(cfg)
    data = build.build_dataset(cfg, build.object_names(cfg)[0], frozen.clip.image_size)
    data.pred_type = "joint"  # an entry holds both domains
    key = cache.cache_key(frozen, data, options, dtype)
    chunk, part = cfg.vae_chunk or (32 if device.type == "cuda" else 2), (dist.rank(), dist.world_size())
    counts = dist.gather(cache.write_cache(root, data, frozen.to(device, dtype), options, key, chunk, device, part))
    written, kept = (sum(count[i] for count in counts) for i in range(2))
    if dist.is_main():
        print(f"{written} entries written, {kept} kept, in {Path(root) / key[0]}; train with latent_cache_dir={root}")
    dist.shutdown()
    return [reason for count in counts for reason in count[2]] if part[0] == 0 else []


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands; the exit code is 1 when something could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", metavar="ROOT", help="list unusable objects, draw a contact sheet")
    action.add_argument("--pack", metavar="ROOT", help="write every object as one file, resized")
    action.add_argument("--cache", metavar="CACHE", help="store frozen work; all other arguments are those of train.py")
    parser.add_argument("--out", help="--check: the picture (check.png); --pack: the folder to write to")
    parser.add_argument("--resolution", type=number(int, 1), default=256)
    parser.add_argument("--num_views", type=int, default=6)
    parser.add_argument("--crop", choices=["center"], help="for files that are not square: fit the shorter side, crop the centre")
    args, rest = parser.parse_known_args(argv)
    try:
        if args.cache:
            given = list(sys.argv[1:] if argv is None else argv)
            at = next(i for i, word in enumerate(given) if word.startswith("--cache"))
            bad = cache_command(args.cache, given[:at] + given[at + (1 if "=" in given[at] else 2) :])
        else:
            if rest or (args.pack and not args.out):
                parser.error(f"unknown arguments {rest}" if rest else "--pack needs --out FOLDER")
            if args.check and Path(args.out or "check.png").suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
                parser.error(f"--out {args.out}: the name of a picture must end in .png, .jpg or .webp")
            data = open_root(args.check or args.pack, args.num_views, args.resolution, crop=args.crop)
            bad = check(data, args.out or "check.png") if args.check else pack(data, args.out)
            print("\n".join([*bad, f"{len(bad)} of {len(data)} objects cannot be used"]))
            return int(bool(bad))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for reason in bad:
        print(reason)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
