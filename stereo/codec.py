"""Disparity codecs between arrays and the bytes or integers of files, as pure functions; and one file from one form to another.

    python stereo/codec.py disparity.npy coded.png          encode: from any form of stereo/formats.py to a .png
    python stereo/codec.py coded.png disparity.pfm          decode: to .pfm or .npy (--codec: how the first file is coded)

fsd: three-channel 8-bit PNG of the FoundationStereo data set, base 255. pfm: Middlebury, ETH3D, SceneFlow. kitti: 16-bit
PNG, 256 steps per pixel. In all of them disparities are in pixels. `stereo/dataset.py --convert` takes whole sets.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

FSD_MAX = 255**3 - 1  # largest code; disparities reach 16581.374


def encode_fsd(disp: np.ndarray, truncate: bool = False) -> np.ndarray:
    """(H, W) disparity -> (H, W, 3) uint8 RGB with digits 0..254 of round(1000 * disparity) in base 255.

    0 means invalid: non-finite and not positive disparities become 0; large ones saturate. Halves round up.
    truncate: cut instead of rounding, as the conversion script of the users' document does.
    """
    disp = np.asarray(disp, np.float64)
    valid = np.isfinite(disp) & (disp > 0)
    code = np.floor(1000 * np.where(valid, disp, 0) + (0.0 if truncate else 0.5)).clip(0, FSD_MAX).astype(np.int64)
    return np.stack([code // 65025, code // 255 % 255, code % 255], -1).astype(np.uint8)


def decode_fsd(rgb: np.ndarray, channels: str = "RGB") -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) float32 = (R * 65025 + G * 255 + B) / 1000, 0 where invalid.

    channels: "RGB", or "GRB" for files with red and green exchanged. Reverse OpenCV's BGR before.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"fsd code must be (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    if sorted(channels) != ["B", "G", "R"]:
        raise ValueError(f"codec_channels {channels!r} must be an order of R, G, B")
    digits = [rgb[..., channels.index(c)].astype(np.int32) for c in "RGB"]
    return ((digits[0] * 65025 + digits[1] * 255 + digits[2]) / 1000.0).astype(np.float32)


def decode_pfm(data: bytes) -> np.ndarray:
    """Bytes of a PFM file -> (H, W) or (H, W, 3) float32, top row first. Infinite or NaN disparities mean invalid."""
    header, offset = [], 0
    while len(header) < 4:  # magic, width, height, scale
        end = data.find(b"\n", offset)
        if end < 0 or offset > 256:
            raise ValueError("not a PFM file: the header is incomplete")
        header += data[offset:end].split(b"#")[0].split()
        offset = end + 1
    magic, width, height, scale = header[0], int(header[1]), int(header[2]), float(header[3])
    if magic not in (b"Pf", b"PF"):
        raise ValueError(f"not a PFM file: it begins with {magic[:16]!r} instead of Pf or PF")
    shape = (height, width, 3) if magic == b"PF" else (height, width)
    size = 4 * int(np.prod(shape))
    if len(data) - offset < size:
        raise ValueError(f"truncated PFM: {len(data) - offset} bytes of pixels, {width}x{height} needs {size}")
    values = np.frombuffer(data, "<f4" if scale < 0 else ">f4", size // 4, offset)
    return np.ascontiguousarray(values.reshape(shape)[::-1], np.float32)  # rows are stored bottom-up


def encode_pfm(values: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) -> bytes of a little-endian PFM file."""
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise ValueError(f"PFM holds (H, W) or (H, W, 3), got {values.shape}")
    header = f"{'PF' if values.ndim == 3 else 'Pf'}\n{values.shape[1]} {values.shape[0]}\n-1.0\n"
    return header.encode() + np.ascontiguousarray(values[::-1], "<f4").tobytes()


def encode_kitti(disp: np.ndarray) -> np.ndarray:
    """(H, W) disparity -> uint16 = 256 * disparity, halves rounded up, valid ones within [1, 65535]; 0 = invalid."""
    disp = np.asarray(disp, np.float64)
    valid = np.isfinite(disp) & (disp > 0)
    code = np.floor(256 * np.where(valid, disp, 0) + 0.5).clip(1, 65535)
    return np.where(valid, code, 0).astype(np.uint16)


def main() -> None:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of stereo/
    from common.io import write_png16
    from stereo.formats import check_codec, read_disparity

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--codec", help="of the source; default: fsd for .png, else value")
    args = parser.parse_args()
    try:
        codec = args.codec or ("fsd" if args.source.suffix == ".png" else "value")
        check_codec(codec)
        disparity = read_disparity(args.source, codec)
        match args.target.suffix:
            case ".png":
                write_png16(args.target, encode_fsd(disparity))
            case ".pfm":
                args.target.write_bytes(encode_pfm(np.where(disparity > 0, disparity, np.inf)))
            case ".npy":
                np.save(args.target, disparity)
            case suffix:
                raise ValueError(f"{args.target}: '{suffix}' must be .png, .pfm or .npy")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
