"""Writing many scenes: processes, a progress bar, atomic folders, and a stamp that tells finished data from other data."""

import contextlib
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from synth.scene import RENDERER


JPEG = (cv2.IMWRITE_JPEG_QUALITY, 96, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_image(path: Path, image: np.ndarray) -> None:
    """Grey, RGB or RGBA array (H, W[, 3 or 4]), uint8 or uint16, to a .png or .jpg file, atomically."""
    if image.ndim == 3:
        image = image[..., [2, 1, 0, 3][:image.shape[2]]]
    _, data = cv2.imencode(path.suffix, image, JPEG if path.suffix == ".jpg" else ())
    write_file(path, data.tobytes())


def stamp(out: Path, settings: dict) -> None:
    """Note the settings in OUT/synth.json. SystemExit when OUT holds data made with others: scenes of two kinds must not mix."""
    path, settings = out / "synth.json", {**settings, "renderer": RENDERER}
    settings = json.loads(json.dumps(settings))
    if path.exists():
        old = json.loads(path.read_text())
        if old != settings:
            differ = [k for k in sorted({*old, *settings}) if old.get(k) != settings.get(k)]
            changed = ", ".join(f"{k}: {old.get(k)} -> {settings.get(k)}" for k in differ)
            raise SystemExit(f"{out} holds data of other settings ({changed}). Remove that folder or choose another one.")
        return
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".synth.json.tmp"
    temporary.write_text(json.dumps(settings, indent=1))
    os.replace(temporary, path)


def write_folder(out: Path, name: str, fill) -> bool:
    """Make OUT/name by fill(folder), atomically: it appears whole or not at all. Returns False where it was there already."""
    target = out / name
    if target.exists():
        return False
    temporary = out / ".unfinished" / f"{name.replace('/', '_')}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(temporary, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(temporary)                                 # another run was faster
    with contextlib.suppress(OSError):                           # other processes may still be at work there
        temporary.parent.rmdir()
    return True


def over(function, items, workers: int, what: str, *arguments) -> list:
    """[function(*arguments, item) for item in items] with a progress bar, in `workers` processes (0 or 1: in this one)."""
    items = list(items)
    call = partial(function, *arguments)
    bar = partial(tqdm, total=len(items), desc=what, unit="scene", dynamic_ncols=True)
    if workers <= 1:
        return list(bar(map(call, items)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        return list(bar(pool.map(call, items)))
