"""Reading and writing one instance of a data set: a folder with an image, a depth map and a camera.

    image.jpg           RGB, 8 bits
    depth.png           z depth, 16 bits in a logarithmic code with unknown and infinite pixels (moge/codec.py)
    meta.json           {"intrinsics": 3 x 3}: normalised, fx and cx in image widths, fy and cy in image heights; other keys are free
    segmentation.png    optional: ids of 8 or 16 bits, with their names
    normal.png          optional: normals, 16 bits

and the index of a data set: .index.txt in its root, or another file there, names one instance folder per line. The maps may
differ in size. Every reader raises ValueError or OSError naming the file and what to do.
"""

import json
from pathlib import Path

import numpy as np

from common.io import read_image, read_png16, safe_join, write_image, write_png16
from moge import codec

__all__ = ["read_image", "write_image"]  # the colour image is an ordinary one


def read_depth(path: str | Path) -> np.ndarray:
    """Depth (H, W) float32; NaN unknown, inf infinitely far."""
    try:
        return codec.decode_depth(*read_png16(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no depth map there; the key `depth` of a data set names another file") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}; python moge/tools/convert_rgbd.py converts depth in millimetres") from None


def write_depth(path: str | Path, depth: np.ndarray, max_range: float = 1e5) -> int:
    """Write a depth map (H, W); returns how many pixels were not positive, which are stored as unknown."""
    codes, text, wrong = codec.encode_depth(depth, max_range)
    write_png16(path, codes, text)
    return wrong


def read_segmentation(path: str | Path) -> tuple[np.ndarray, dict[str, int] | None]:
    """Ids (H, W) uint8 or uint16 and {name: id}, None where the file names no labels."""
    mask, text = read_png16(path)
    try:
        mask, labels = codec.decode_segmentation(mask, text)
        if mask.ndim != 2 or not (labels is None or all(type(i) is int for i in labels.values())):
            raise ValueError("expected one plane of ids, and labels {name: id}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a segmentation: {error}") from None
    return mask, labels


def write_segmentation(path: str | Path, mask: np.ndarray, labels: dict[str, int] | None = None) -> None:
    """Write ids (H, W) uint8 or uint16 and their names."""
    write_png16(path, *codec.encode_segmentation(mask, labels))


def read_normal(path: str | Path) -> np.ndarray:
    """Unit normals (H, W, 3) float32 in camera axes, towards the camera; NaN unknown."""
    codes, _ = read_png16(path)
    if codes.dtype != np.uint16 or codes.ndim != 3:
        raise ValueError(f"{path}: not a normal map: {codes.ndim}-dimensional {codes.dtype} pixels, expected three 16-bit planes")
    return codec.decode_normal(codes)


def write_normal(path: str | Path, normal: np.ndarray) -> None:
    """Write normals (H, W, 3), NaN unknown."""
    write_png16(path, codec.encode_normal(normal))


def read_meta(path: str | Path) -> dict:
    """Everything in a meta.json, with `intrinsics` as (3, 3) float32. ValueError where they are absent or not normalised."""
    try:
        meta = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not there; write {{'intrinsics': normalised 3 x 3}} into it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(meta, dict) or "intrinsics" not in meta:
        raise ValueError(f"{path}: no key 'intrinsics'; the camera's normalised 3 x 3 matrix belongs there")
    try:
        K = np.array(meta["intrinsics"], np.float32)
    except (ValueError, TypeError, OverflowError):
        K = np.zeros(0)
    if K.shape != (3, 3) or not np.isfinite(K).all():
        raise ValueError(f"{path}: intrinsics must be 3 x 3 finite numbers, not {str(meta['intrinsics'])[:100]}")
    if np.abs(K[[1, 2, 2, 2], [0, 0, 1, 2]] - [0, 0, 0, 1]).max() > 1e-6 or min(K[0, 0], K[1, 1]) <= 0:
        raise ValueError(f"{path}: intrinsics must read [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive fx and fy, not {K.tolist()}")
    # in pixels they would be hundreds; a crop may well have its centre outside, but no lens half a degree of view
    if np.abs(K[:2, 2] - 0.5).max() > 1.5 or K[:2, :2].max() > 115:
        advice = "divide the first row by the image's width and the second by its height"
        numbers = f"fx {K[0, 0]:g}, fy {K[1, 1]:g}, cx {K[0, 2]:g}, cy {K[1, 2]:g}"
        raise ValueError(f"{path}: intrinsics are not normalised, {numbers}: {advice}")
    return {**meta, "intrinsics": K}


def read_instance(
    folder: str | Path, depth: str = "depth.png", image: bool = True, segmentation: bool = False, normal: bool = False
) -> dict:
    """An instance: image (h, w, 3) uint8 RGB, depth (h', w') float32 (NaN unknown, inf infinitely far), intrinsics (3, 3)
    float32 normalised; where asked for, segmentation (h'', w'') with labels {name: id}, and normal (h''', w''', 3) float32.

    depth: name of the depth map in the folder; image False leaves the image out. Depth without any finite pixel is returned as
    it is: such an instance can teach nothing and is for the caller to treat. ValueError or OSError names the file at fault.
    """
    folder = Path(folder)
    out = {"image": read_image(folder / "image.jpg")} if image else {}
    name = depth if Path(depth).suffix else f"{depth}.png"
    out |= {"depth": read_depth(safe_join(folder, name)), "intrinsics": read_meta(folder / "meta.json")["intrinsics"]}
    if segmentation:
        out["segmentation"], out["labels"] = read_segmentation(folder / "segmentation.png")
        if out["labels"] is None:
            raise ValueError(f"{folder / 'segmentation.png'}: no text chunk 'labels' with the JSON of {{name: id}}")
    return out | ({"normal": read_normal(folder / "normal.png")} if normal else {})


def write_instance(folder: str | Path, image: np.ndarray | bytes, depth: np.ndarray, intrinsics: np.ndarray, **meta) -> int:
    """Write image (h, w, 3) uint8, or the bytes of a JPEG file, depth (h', w'), normalised intrinsics (3, 3) and further keys
    of meta.json. Returns how many depths were not positive and went unknown.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        (folder / "image.jpg").write_bytes(image)
    else:
        write_image(folder / "image.jpg", image)
    wrong = write_depth(folder / "depth.png", depth)
    meta = {"intrinsics": np.asarray(intrinsics, np.float64).tolist(), **meta}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return wrong


def read_index(root: str | Path, index: str = ".index.txt") -> list[str]:
    """Instance folders, relative to the root, that the index file there names. ValueError for an index without any, or with one
    that leaves the root.
    """
    path = safe_join(root, index)
    if not path.is_file():
        advice = "it names one instance folder per line: (cd ROOT && find . -name meta.json -printf '%h\\n' | sort > .index.txt)"
        raise FileNotFoundError(f"{path}: no such index; {advice}")
    try:
        names = [line for line in map(str.strip, path.read_text(encoding="utf-8-sig").split("\n")) if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
    if not names:
        raise ValueError(f"{path}: the index is empty; one instance folder per line is expected")
    for name in names:  # checked here by looking only: there may be millions
        if ".." in name or "\0" in name or name[0] in "/\\":
            try:
                safe_join(root, name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return names
