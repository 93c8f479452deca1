"""Files of unknown origin, read with care: images, 16-bit PNG with text, npy; and writers for images and PLY.

Every reader raises OSError or ValueError that names the file, before any harm is done.
"""

import io
import math
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = 100_000_000  # PIL refuses, by the header alone, what has twice as many: 200 Mpixel


def _decode(path, flags: int):
    """Return (BGR or grey array, PNG text chunks before the pixels). PIL checks the header before OpenCV decodes."""
    data = Path(path).read_bytes()
    try:
        text = {k: v for k, v in Image.open(io.BytesIO(data)).info.items() if isinstance(v, str)}
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except Exception as error:  # each library raises kinds of its own
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"  # has an address in it, another one each time
        raise ValueError(f"{path}: not a readable image{reason}") from None
    if image is None:
        raise ValueError(f"{path}: the image is corrupt or cut short")
    return image, text


def read_image(path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB; alpha is dropped, grey repeated, 16 bits cut to 8, EXIF orientation applied."""
    return cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR)[0], cv2.COLOR_BGR2RGB)


def _write(path, *parts: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"".join(parts))


def write_image(path, rgb: np.ndarray) -> None:
    """Write (H, W, 3) RGB or (H, W) grey uint8; the suffix names the format. Makes the folder."""
    bgr = np.ascontiguousarray(rgb[..., ::-1]) if rgb.ndim == 3 else rgb
    _write(path, cv2.imencode(Path(path).suffix, bgr)[1].tobytes())


def read_png16(path) -> tuple[np.ndarray, dict[str, str]]:
    """Read a PNG as stored: ((H, W) or (H, W, 3) RGB uint8 or uint16, {key: text} of its text chunks)."""
    image, text = _decode(path, cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else np.ascontiguousarray(image[..., 2::-1]), text


def write_png16(path, values: np.ndarray, text: dict[str, str] | None = None, level: int = 7) -> None:
    """Write (H, W) or (H, W, 3) RGB uint8 or uint16 with text chunks (tEXt, zTXt where long)."""
    values = np.ascontiguousarray(values[..., ::-1]) if values.ndim == 3 else values
    data, chunks = cv2.imencode(".png", values, [cv2.IMWRITE_PNG_COMPRESSION, level])[1].tobytes(), b""
    for key, value in (text or {}).items():
        key, value = key.encode("latin-1"), value.encode("latin-1")
        body = b"zTXt" + key + b"\0\0" + zlib.compress(value) if len(value) > 512 else b"tEXt" + key + b"\0" + value
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    _write(path, data[:33], chunks, data[33:])  # after the signature (8 bytes) and IHDR (25)


def write_ply(path, points: np.ndarray, colors: np.ndarray | None = None, normals: np.ndarray | None = None) -> None:
    """Write a binary PLY point cloud. points, normals: (N, 3) float; colors: (N, 3) uint8 RGB."""
    columns = [("float", "x y z", points), ("float", "nx ny nz", normals), ("uchar", "red green blue", colors)]
    columns = [(kind, names.split(), values) for kind, names, values in columns if values is not None]
    columns = [(kind, name, values[:, i]) for kind, names, values in columns for i, name in enumerate(names)]
    vertices = np.empty(len(points), [(name, {"float": "<f4", "uchar": "u1"}[kind]) for kind, name, _ in columns])
    for _, name, values in columns:
        vertices[name] = values
    properties = "".join(f"property {kind} {name}\n" for kind, name, _ in columns)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    _write(path, header.encode(), vertices.tobytes())


def load_npy(path, load_objects=None) -> np.ndarray:
    """Read a .npy file. An array of Python objects is what load_objects(path, file) makes of its pickle; without it, refused."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
        except Exception as error:
            raise ValueError(f"{path}: not a readable npy file: {error}") from None
        if dtype.hasobject:
            if load_objects is None:
                raise ValueError(f"{path}: refused, it holds Python objects, not numbers")
            return load_objects(path, file)
        wanted, present = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
        if min(shape, default=0) < 0 or wanted != present:
            raise ValueError(f"{path}: the header promises {shape} of {dtype}, {wanted} bytes, and {present} follow")
        return np.frombuffer(bytearray(file.read()), dtype).reshape(shape, order="F" if fortran else "C")


def colorize(values: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """(H, W) numbers to (H, W, 3) uint8 RGB in the turbo colour map over [lo, hi]; non-finite ones are black."""
    finite = np.isfinite(values)
    level = np.clip((np.where(finite, values, lo) - lo) / max(hi - lo, 1e-12), 0, 1)
    return cv2.applyColorMap(np.uint8(np.rint(255 * level)), cv2.COLORMAP_TURBO)[..., ::-1] * finite[..., None].astype(np.uint8)


def at_height(image: np.ndarray, height: int) -> np.ndarray:
    """An image (H, W, 3), resized to this height."""
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_NEAREST)


def contact_sheet(images: list[np.ndarray], columns: int | None = None, gap: int = 4, height: int | None = None) -> np.ndarray:
    """Lay images (h, w, 3) uint8 out in rows on white, at the top left of cells of the largest size; scaled to `height` first."""
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    images = [at_height(image, height) for image in images] if height else images
    columns = min(columns or int(np.ceil(np.sqrt(len(images)))), len(images))
    rows = -(-len(images) // columns)
    high, wide = (max(image.shape[axis] for image in images) + gap for axis in (0, 1))
    sheet = np.full((rows * high - gap, columns * wide - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * high, i % columns * wide
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def safe_join(root, relative: str) -> Path:
    """root/relative; ValueError where that leaves the root (absolute, "..", NUL). Links below the root are the owner's choice."""
    normal = os.path.normpath(relative)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == ".." or "\0" in normal:
        raise ValueError(f"path {relative!r} leaves its root {root}")
    return Path(root) / normal
