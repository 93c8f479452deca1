"""Files of unknown origin, read with care: images, 16-bit PNG with text, npy, pickle; and writers for images and PLY.

Every reader raises OSError or ValueError that names the file, before any harm is done.
"""

import io
import math
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = 100_000_000  # PIL refuses, by the header alone, what has twice as many: 200 Mpixel


def _decode(path, flags: int):
    """Return (BGR or grey array, PNG text chunks before the pixels). PIL checks the header before OpenCV decodes."""
    data = Path(path).read_bytes()
    try:
        text = {k: v for k, v in Image.open(io.BytesIO(data)).info.items() if isinstance(v, str)}
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except Exception as error:  # each library raises kinds of its own
        raise ValueError(f"{path}: not a readable image: {error}") from None
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


class _Kind:
    """Stands for numpy.dtype in a pickle: numpy trusts the flags in a dtype's state, and forged ones make it follow raw bytes."""

    def __init__(self, code: str, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSUO":
            raise ValueError(f"refused, arrays of type {code} are not read")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __setstate__(self, state):
        super().__setstate__((*state[:2], state[2].dtype, *state[3:]))


_PLAIN = (dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, bool, complex)
_KNOWN = {f"builtins.{kind.__name__}": kind for kind in _PLAIN}
_KNOWN |= {"numpy.ndarray": _Array, "numpy.dtype": _Kind, "collections.OrderedDict": OrderedDict}
_KNOWN["_codecs.encode"] = lambda text, _: text.encode("latin1")  # bytes, in old protocols
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _KNOWN[f"{_core}.multiarray._reconstruct"] = lambda *_: _Array(0)
    _KNOWN[f"{_core}.multiarray.scalar"] = lambda kind, data: np.frombuffer(data, kind.dtype)[0]
    _KNOWN[f"{_core}.numeric._frombuffer"] = lambda data, kind, size, order: np.ndarray(size, kind.dtype, data, order=order)


class _Unpickler(pickle.Unpickler):
    """Knows numpy arrays and plain types; every other name is refused, and none is imported."""

    def find_class(self, module, name):
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full not in _KNOWN:
            raise ValueError(f"refused, it wants to load {module}.{name}: only numpy arrays and plain types are read")
        return _KNOWN[full]


def load_pickle(path, file=None):
    """Read a pickle (from an open `file`, if given) of numpy arrays and plain types.

    Any other class is a ValueError that names it, and nothing is executed.
    """
    try:
        return _Unpickler(file or io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(f"{path}: not a readable pickle: {error}") from None


def load_npy(path):
    """Read a .npy file; object arrays go through `load_pickle`, and a single stored object (a dict) is returned bare."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
        except Exception as error:
            raise ValueError(f"{path}: not a readable npy file: {error}") from None
        if dtype.hasobject:
            array = load_pickle(path, file)
            return array.item() if isinstance(array, np.ndarray) and array.shape == () else array
        wanted, present = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
        if min(shape, default=0) < 0 or wanted != present:
            raise ValueError(f"{path}: the header promises {shape} of {dtype}, {wanted} bytes, and {present} follow")
        return np.frombuffer(bytearray(file.read()), dtype).reshape(shape, order="F" if fortran else "C")


def colorize(values: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """(H, W) numbers to (H, W, 3) uint8 RGB in the turbo colour map over [lo, hi]; non-finite ones are black."""
    finite = np.isfinite(values)
    level = np.clip((np.where(finite, values, lo) - lo) / max(hi - lo, 1e-12), 0, 1)
    return cv2.applyColorMap(np.uint8(np.rint(255 * level)), cv2.COLORMAP_TURBO)[..., ::-1] * finite[..., None].astype(np.uint8)


def safe_join(root, relative: str) -> Path:
    """root/relative; ValueError where that leaves the root (absolute, "..", NUL). Links below the root are the owner's choice."""
    normal = os.path.normpath(relative)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == ".." or "\0" in normal:
        raise ValueError(f"path {relative!r} leaves its root {root}")
    return Path(root) / normal
