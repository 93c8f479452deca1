"""Cache of frozen work: posterior means and deviations of all views, and the image embedding, of every object.

    <cache>/<key>/settings.json            what the key was made of: weights' hash, resolution, views, ...
    <cache>/<key>/<name>_<background>.npz  color_mean, color_std, normal_mean, normal_std (V,4,h,w), condition_mean, condition_std
                                           (4,h,w), embedding (E,), all float32; images: hashes of the object's files

Other weights or settings make another key; an object whose images have changed is noticed when it is read.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.data import stack
from mvdiff.dataset import MultiViewDataset, finish
from mvdiff.model import frozen_work, target_rows
from mvdiff.pictures import BACKGROUNDS, background_color

REMEDY = "run python mvdiff/dataset.py --cache --config with the same config and options"
SETTINGS = ("resolution", "condition_view", "crop", "read_mask", "clip_size")


def weights_hash(*modules: nn.Module) -> str:
    """sha256 over the names and values of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in (item for module in modules for item in module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def cache_key(frozen, data: MultiViewDataset, options: dict, dtype: torch.dtype | None) -> tuple[str, dict]:
    """(key, settings) of the encoders `frozen` in `dtype`, on the images of `data` finished with `options`."""
    weights = weights_hash(frozen.vae.encoder, frozen.vae.quant_conv, frozen.clip)
    settings = {"weights": weights, "dtype": str(dtype or torch.float32), "views": list(data.views)}
    settings |= {key: getattr(data, key) for key in SETTINGS} | {k: v for k, v in options.items() if k != "camera_flags"}
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16], settings


def backgrounds_of(bg_color: str | float) -> list[np.ndarray]:
    """The colours that `bg_color` may come to."""
    return [background_color(name) for name in (BACKGROUNDS if bg_color == "three_choices" else [bg_color])]


def check_cacheable(data: MultiViewDataset) -> None:
    """ValueError where a sample has more variants than a cache can hold."""
    if data.augment_data or data.crop == "random" or data.bg_color == "random":
        raise ValueError("a cache holds one form of each object: set augment_data false, crop not random, bg_color not random")


def entry_name(name: str, background: np.ndarray) -> str:
    return f"{name}_{float(background[0]):g}.npz"


def stamp(files: list[Path]) -> str:
    """Hash of sizes and times of files: quick to compare."""
    about = [(path.name, (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()


def content_hash(files: list[Path]) -> str:
    """Hash of names and bytes of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_current(stored: list[str], files: list[Path]) -> bool:
    """Whether an entry's hashes [stamp, content] are those of the files; times alone may differ, as after a copy."""
    return stored[0] == stamp(files) or stored[1] == content_hash(files)


@torch.no_grad()
def encode_object(data: MultiViewDataset, index: int, background: np.ndarray, frozen, options: dict, chunk: int, device) -> dict:
    """The arrays of one entry, from an object's images on a background."""
    sample = data.load(index, np.random.default_rng(0)) | {"background": background}
    sample |= {"clip": data.clip(sample["condition"], background)}
    batch = {k: v.to(device) for k, v in stack([sample]).items() if k != "name"}
    batch = finish(batch, **options)
    targets = target_rows(batch["target_vae"])
    work = frozen_work(frozen.vae, frozen.clip, targets, batch["image_cond_vae"], batch["image_cond_CLIP"], chunk)
    out = {key: work[key][0].cpu().numpy() for key in ("condition_mean", "condition_std", "embedding")}
    for kind in ("mean", "std"):
        rows = work[kind].view(len(data.domains), len(data.views), *work[kind].shape[1:])  # one object
        out |= {f"{domain}_{kind}": rows[d].cpu().numpy() for d, domain in enumerate(data.domains)}
    return out


def write_cache(
    root: str | Path, data: MultiViewDataset, frozen, options: dict, key: tuple[str, dict], chunk: int, device, part=(0, 1)
) -> tuple[int, int, list[str]]:
    """Store every object of `data` (joint) that is not stored yet, or has changed; `part` (rank, world) shares them out.

    Returns (entries written, entries kept, objects that cannot be read, with the reason).
    """
    check_cacheable(data)
    folder = Path(root) / key[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(key[1], indent=1))
    written, kept, bad = 0, 0, []
    for index in tqdm(range(part[0], len(data), part[1]), desc="cache", unit="object", disable=part[0] > 0):
        files = data.files(data.objects[index])
        for background in backgrounds_of(data.bg_color):
            path = folder / entry_name(data.objects[index], background)
            try:
                if path.exists() and is_current(list(np.load(path)["images"]), files):
                    kept += 1
                    continue
                arrays = encode_object(data, index, background, frozen, options, chunk, device)
                arrays["images"] = np.array([stamp(files), content_hash(files)])
            except (OSError, ValueError) as error:
                bad.append(str(error))
                break
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)
            written += 1
    return written, kept, bad


class CachedDataset(MultiViewDataset):
    """Like MultiViewDataset, at the same positions with the same choices, with frozen work in place of pictures.

    A sample: mean, std float32 (D,V,4,h,w), condition_mean, condition_std (4,h,w), embedding (E,), angles (V,3), is_normal (D,).
    """

    def open(self, root: str | Path, key: tuple[str, dict]) -> "CachedDataset":
        """Find the entries; FileNotFoundError with the remedy where there are none for this key, or some are missing."""
        check_cacheable(self)
        self.cache = Path(root) / key[0]
        if not (self.cache / "settings.json").exists():
            others = [path.parent.name for path in Path(root).glob("*/settings.json")]
            raise FileNotFoundError(f"{root}: no cache {key[0]} for these weights and settings (there: {others or 'none'}): {REMEDY}")
        there = set(os.listdir(self.cache))
        wanted = [entry_name(name, b) for name in self.objects for b in backgrounds_of(self.bg_color)]
        missing = [name for name in wanted if name not in there]
        if missing:
            raise FileNotFoundError(f"{self.cache}: {len(missing)} of {len(wanted)} entries are missing, {missing[0]} first: {REMEDY}")
        return self

    def load(self, index: int, rng: np.random.Generator) -> dict:
        name, (domains, background, at) = self.objects[index], self.choose(rng)
        path, files = self.cache / entry_name(name, background), self.files(self.objects[index])
        with np.load(path) as arrays:
            if not is_current(list(arrays["images"]), files):
                raise ValueError(f"{path}: the images of {name} have changed since: {REMEDY}")
            sample = {key: arrays[key] for key in ("condition_mean", "condition_std", "embedding")}
            sample |= {kind: np.stack([arrays[f"{domain}_{kind}"] for domain in domains]) for kind in ("mean", "std")}
        angles, flags = self.angles[self.views[at]], np.array([d == "normal" for d in domains], np.uint8)
        return {**sample, "angles": angles, "is_normal": flags, "name": name}
