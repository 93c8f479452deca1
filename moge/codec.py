"""How depth, segmentation and normals are coded in PNG files. Arrays and text in, arrays and text out: reading and writing
files is left to the caller (16-bit PNG, text chunks, compression level 7).

Depth: one 16-bit plane. 0 is unknown (NaN), 65535 infinitely far, 1..65534 logarithmic between the text chunks `near` and
`far`, which keeps the relative precision ln(far / near) / 65533 everywhere; an old chunk `unit` multiplies the result.
Segmentation: one 8- or 16-bit plane of ids, text chunk `labels` with a JSON object {name: id}. Normals: three 16-bit planes, n
* (0.5, -0.5, -0.5) + 0.5 in units of 65535, all zero where unknown.
"""

import json

import numpy as np


def encode_depth(depth: np.ndarray, max_range: float = 1e5) -> tuple[np.ndarray, dict[str, str], int]:
    """Code a depth map (H, W): (codes (H, W) uint16, text chunks {near, far}, how many pixels were not positive).

    NaN is unknown, infinity (of either sign) infinitely far; zero and negative depths are stored as unknown. Depths beyond
    max_range times the least one (which is at least 1e-5) are clipped.
    """
    depth = np.asarray(depth, np.float32)
    wrong = np.isfinite(depth) & (depth <= 0)
    known = np.isfinite(depth) & ~wrong
    near, far = np.float32(1), np.float32(1.1)
    if known.any():
        near = max(float(depth[known].min()), 1e-5)
        far = np.float32(max(1.1 * near, min(float(depth[known].max()), near * max_range)))
        near = np.float32(near)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.log(np.clip(depth, near, far) / near) / np.log(far / near)
        codes = 1 + np.round(np.clip(t, 0, 1) * np.float32(65533))
    codes = np.where(known, codes, np.where(np.isinf(depth), 65535, 0)).astype(np.uint16)
    return codes, {"near": str(near), "far": str(far)}, int(wrong.sum())


def decode_depth(codes: np.ndarray, text: dict[str, str]) -> np.ndarray:
    """Depth (H, W) float32 from codes (H, W) uint16 and the text chunks; NaN unknown, inf infinitely far. ValueError for a file
    that is not in this format.
    """
    if codes.dtype != np.uint16 or codes.ndim != 2:
        raise ValueError(f"not a depth map: {codes.ndim}-dimensional {codes.dtype} pixels, expected one 16-bit plane")
    if "near" not in text or "far" not in text:
        raise ValueError("not a depth map: no text chunks near and far; plain 16-bit depth has to be converted")
    near, far, unit = float(text["near"]), float(text["far"]), float(text.get("unit", 1))
    if not 0 < near < far < np.inf:
        raise ValueError(f"not a depth map: near {near} and far {far} should be positive, finite and ascending")
    if not 0 < unit * near < unit * far < 3e38:
        raise ValueError(f"not a depth map: unit {unit} should be positive, and depths within 32 bits")
    t = (np.arange(65536) - 1) / 65533
    table = (near ** (1 - t) * far**t * unit).astype(np.float32)
    table[0], table[65535] = np.nan, np.inf
    return table[codes]


def encode_segmentation(mask: np.ndarray, labels: dict[str, int] | None = None) -> tuple[np.ndarray, dict[str, str]]:
    """Ids (H, W) uint8 or uint16 and the text chunk for {name: id}."""
    if mask.dtype not in (np.uint8, np.uint16) or mask.ndim != 2:
        raise ValueError(f"segmentation must be one plane of uint8 or uint16, not {mask.ndim}-dimensional {mask.dtype}")
    return mask, {} if labels is None else {"labels": json.dumps(labels, ensure_ascii=True, separators=(",", ":"))}


def decode_segmentation(mask: np.ndarray, text: dict[str, str]) -> tuple[np.ndarray, dict[str, int] | None]:
    """Ids (H, W) and {name: id}, None where the file names no labels."""
    return mask, json.loads(text["labels"]) if "labels" in text else None


def encode_normal(normal: np.ndarray) -> np.ndarray:
    """Normals (H, W, 3), NaN unknown, to (H, W, 3) uint16."""
    normal = np.asarray(normal, np.float32)
    known = np.isfinite(normal).all(-1, keepdims=True)
    scaled = np.clip(normal * np.array([0.5, -0.5, -0.5], np.float32) + np.float32(0.5), 0, 1) * 65535
    return np.where(known, np.where(known, scaled, 0).astype(np.uint16), 0).astype(np.uint16)


def decode_normal(codes: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint16 to unit normals (H, W, 3) float32, NaN where all three are 0."""
    normal = (codes / np.float32(65535) - np.float32(0.5)) * np.array([2, -2, -2], np.float32)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    return np.where((codes == 0).all(-1, keepdims=True), np.nan, normal).astype(np.float32)
