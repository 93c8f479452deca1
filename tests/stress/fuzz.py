"""Fuzz every reader of files of unknown origin for a bounded time.

  python tests/stress/fuzz.py [--seconds 600] [--only NAME ...] [--keep FOLDER]

Sound files of each kind are cut, flipped, spliced and made to lie (sizes, offsets and counts replaced by hostile ones, pickle
opcodes and YAML tags put in, checksums mended so that the damage gets through). A reader may return a value, or raise ValueError
or OSError that names the file. Anything else is a finding: another exception, a message without the name, more than 2 GB of new
memory, more than 20 seconds, or an attempt to start a process, to open a connection, to delete a file or to run code. The input
of a finding is kept and the exit code is 1.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from common import config, io as files
from common.checkpoint import Checkpoints, load_weights

MEMORY, SECONDS = 2 << 30, 20
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree", "os.remove",
             "exec")  # fmt: skip


class Reader(NamedTuple):
    """One reader: the names of the files it is given, sound files, and strings worth putting in."""

    name: str
    read: Callable
    seeds: list[bytes]
    words: tuple[bytes, ...] = ()


def bytes_of(write) -> bytes:
    """What write(path or file) writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed"
        write(path)
        path = path if path.exists() else next(Path(folder).iterdir())
        return path.read_bytes()


def npy(value, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


def png(values: np.ndarray, text: dict[str, str]) -> bytes:
    return bytes_of(lambda path: files.write_png16(path, values, text))


def picture(kind: str) -> bytes:
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


EVIL = (  # what would run, were it read without care
    b"cos\nsystem\n(S'touch fuzz_was_here'\ntR.",
    b"c__builtin__\neval\n(S'1+1'\ntR",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x12touch fuzz_was_here\x85R.",
    b"\x8c\x08builtins\x8c\x07getattr\x93",
    b"cnumpy\nload\n", b"\x81", b"R", b"b", b"}", b"(", b"t", b"u.", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"\x8a\x04\xff\xff\xff\x7f",
)  # fmt: skip
YAML = (b"!!python/object/apply:os.system ['touch fuzz_was_here']", b"&a [*a]", b"*a", b"<<: ", b"? ", b"- ", b"{", b"[" * 900, b"%TAG",
        b"1e999", b".inf", b"!!binary ", b"!!timestamp ", b"0x", b"1_000_000_000_000_000_000_000", b"2001-99-99", b"!!set ", b"---\n",
        b"=")  # fmt: skip
JSON = (b"[" * 3000, b"NaN", b"1e999", b"-Infinity", b'"\\ud800"', b"null", b"{}", b"[]", b"true", b'"../../etc/passwd"', b"9" * 5000)
SIZES = (b"0", b"-1", b"1", b"65536", b"2147483648", b"4294967295", b"9223372036854775807", b"18446744073709551616", b"1" + b"0" * 30,
         b"1e9", b"nan")  # fmt: skip
FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3)
PLAIN = {"a": FLOATS, "b": ["x", b"y", 2.5, None, True], "c": OrderedDict(d=np.float64(1)), "e": {1, 2}}
TENSORS = {"layer.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "layer.bias": torch.zeros(3, dtype=torch.bfloat16)}


def safetensors_bytes() -> bytes:
    from safetensors.torch import save

    return save(TENSORS, {"format": "pt"})


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def checkpoint_folder(path: Path):
    """Reads a file as the model part of a checkpoint without a record."""
    return Checkpoints(path.parent, say=lambda _: None).load(path)


def common_readers() -> list[Reader]:
    """Readers in common."""
    rng = np.random.default_rng(0)
    text = {"near": "0.5", "far": "12.25", "unit": "m", "labels": '{"chair": 1}', "long": "v" * 700}
    maps = [png(rng.integers(0, 65536, (5, 6), dtype=np.uint16), text), png(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), {})]
    arrays = [npy(np.arange(12.0).reshape(3, 4)), npy(np.asfortranarray(np.ones((2, 3), ">i4"))), npy(np.array(["ab", "c"]))]
    yaml = b"lr: 1e-4\nmodel: {width: 3, sizes: [1, 2]}\n# comment\nname: 'a: b'\ndata:\n  - {path: a/b, weight: 1.5}\n"
    weights = [torch_bytes({"model": TENSORS, "epoch": 3}), torch_bytes(TENSORS)]
    return [
        Reader("config.yaml", config.read, [yaml], YAML + SIZES),
        Reader("config.json", config.read, [b'{"lr": 1e-4, // rate\n "sets": [{"path": "a#b"}], # note\n "x": null}'], JSON + SIZES),
        Reader("map.png", files.read_png16, maps, (b"zTXt", b"tEXt", b"iTXt", b"IDAT", b"acTL", b"eXIf", b"iCCP")),
        Reader("image.png", files.read_image, maps, (b"IHDR", b"PLTE", b"tRNS", b"IDAT")),
        Reader("image.jpg", files.read_image, [picture("JPEG")], (b"\xff\xc0", b"\xff\xd9", b"\xff\xe1", b"\xff\xda")),
        Reader("array.npy", files.load_npy, arrays, SIZES + (b"'|O'", b"'<f8'", b"'<U999999999'", b"[('a','O')]", b"(" * 300)),
        Reader("weights.safetensors", load_weights, [safetensors_bytes()], SIZES + JSON + (b"F8_E4M3", b"__metadata__")),
        Reader("weights.pt", load_weights, weights, EVIL),
        Reader("00000001.pt", checkpoint_folder, weights, EVIL),
    ]


def folder_readers() -> list[Reader]:
    """Readers of the five folders."""
    from lbm.dataset import load_tracks
    from lbm.tapvid import elements
    from lbm.unpickle import load_npy, load_pickle
    from moge.io import read_depth, read_index, read_meta, read_segmentation
    from mvdiff.dataset import list_objects, open_picture
    from mvdiff.weights import read_bin, read_json, read_safetensors
    from pi3.readers import index_co3d, load_depth_map, load_pose, read_invalid_list, read_resized
    from stereo.codec import encode_pfm
    from stereo.formats import load_raw, read_calibration

    rng = np.random.default_rng(0)
    objects = npy(np.array(PLAIN, object), allow_pickle=True)
    tracks = {"coords": np.ones((4, 3, 2), np.float32), "visibility": np.zeros((4, 3), bool), "depth_range": np.ones(2, np.float32)}
    clip = {"video": np.zeros((2, 4, 4, 3), np.uint8), "points": np.ones((1, 2, 2), np.float32), "occluded": np.zeros((1, 2), bool)}
    pickles = [pickle.dumps(PLAIN, protocol) for protocol in (0, 2, 4, 5)]
    depth = png(rng.integers(0, 65536, (5, 6), dtype=np.uint16), {"near": "0.5", "far": "12.25", "unit": "1.0"})
    labels = png(rng.integers(0, 9, (5, 6), dtype=np.uint8), {"labels": '{"chair": 1, "table": 2}'})
    pfm = [encode_pfm(np.arange(12, dtype=np.float32).reshape(3, 4)), encode_pfm(np.ones((2, 3, 3), np.float32))]
    camera = {"filepath": "a/images/1.jpg", "R": np.eye(3).tolist(), "T": [0, 0, 1], "focal_length": [2, 2], "principal_point": [0, 0]}
    meta = {"intrinsics": [[1.1, 0, 0.5], [0, 1.4, 0.5], [0, 0, 1]], "note": "x"}
    calibration = [b"cam0=[700 0 320; 0 700 240; 0 0 1]\nbaseline=0.5\ndoffs=0\n", b"700 0 320 0 700 240 0 0 1\n0.5\n"]
    leaving = (b"../", b"/etc/passwd", b"\0", b"\r\n", b"..")

    def sequence(path: Path):  # the folder of a track file bears its name
        folder = path.with_suffix("")
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.name)
        return load_tracks(folder)

    def co3d(path: Path):
        return index_co3d(path, path.parent / f"index_{time.monotonic_ns()}")

    return [
        Reader("lbm.pkl", load_pickle, pickles, EVIL),
        Reader("lbm.npy", load_npy, [objects], EVIL + SIZES),
        Reader("tracks.npy", sequence, [npy(np.array(tracks, object), allow_pickle=True)], EVIL + SIZES),
        Reader("tapvid.pkl", lambda path: list(elements([path], False)), [pickle.dumps({"clip": clip}, 4)], EVIL),
        Reader("pfm.pfm", lambda path: load_raw(path, "pfm"), pfm, SIZES + (b"PF", b"Pf", b"#", b"\n", b"-")),
        Reader("stereo.npy", lambda path: load_raw(path, "value"), [npy(np.ones((3, 4), np.float32))], SIZES),
        Reader("stereo.png", lambda path: load_raw(path, "fsd"), [png(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8), {})], (b"IDAT",)),
        Reader("calib.json", read_calibration, [b'{"fx": 700.5, "baseline": 0.54}'], JSON + SIZES),
        Reader("calib.txt", read_calibration, calibration, SIZES + (b"[", b"]", b";", b"=")),
        Reader("depth.png", read_depth, [depth], SIZES + (b"near", b"far", b"nan", b"inf")),
        Reader("labels.png", read_segmentation, [labels], JSON + SIZES),
        Reader("meta.json", read_meta, [json.dumps(meta).encode()], JSON + SIZES),
        Reader("index.txt", lambda path: read_index(path.parent, path.name), [b"a/b\nc d/e\n0001\n"], leaving),
        Reader("depth_map.npy", load_depth_map, [npy(np.ones((3, 4), np.float32))], SIZES + (b"'|O'", b"'<U9'")),
        Reader("pose.txt", load_pose, ["\n".join(" ".join(map(str, row)) for row in np.eye(4)).encode()], SIZES + (b"#", b"1,2", b"1j")),
        Reader("invalid.json", read_invalid_list, [b'{"scene0001_00": [1, 2], "b": []}'], JSON + SIZES),
        Reader("co3d.jgz", co3d, [gzip.compress(json.dumps({"s": [camera, camera]}).encode(), mtime=0)]),
        Reader("resized.jpg", lambda path: read_resized(path, (8, 6)), [picture("JPEG")], (b"\xff\xc0", b"\xff\xda")),
        Reader("objects.json", lambda path: list_objects(path.parent, path), [b'["a.glb", "b/c.glb"]'], JSON),
        Reader("picture.png", open_picture, [picture("PNG")], (b"IHDR", b"PLTE", b"tRNS")),
        Reader("mvdiff.safetensors", read_safetensors, [safetensors_bytes()], SIZES + JSON),
        Reader("mvdiff.bin", read_bin, [torch_bytes(TENSORS)], EVIL),
        Reader("mvdiff.json", read_json, [b'{"sample_size": 32, "layers": [1, 2]}'], JSON),
    ]


# ---- damage -----------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, reader: Reader) -> bytes:
    """A sound file with up to four faults, or nothing but noise."""
    data = bytearray(draw(st.sampled_from(reader.seeds)))
    zipped = data[:2] == b"\x1f\x8b" and draw(st.booleans())
    data = bytearray(gzip.decompress(data)) if zipped else data
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("byte", "bit", "cut", "drop", "repeat", "word", "number", "digits", "noise")))
        if kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            data[at:at] = data[at : at + 40] * draw(st.integers(1, 50))
        elif kind == "word" and reader.words:
            data[at:at] = draw(st.sampled_from(reader.words))
        elif kind == "number":
            code = draw(st.sampled_from(("<I", ">I", "<Q", ">H", "<d")))
            number = draw(st.sampled_from((0, 1, 127, 2**15, 2**16 - 1)))
            big = draw(st.booleans()) and code not in (">H", "<d")
            data[at : at + struct.calcsize(code)] = struct.pack(code, (1 << 8 * struct.calcsize(code)) - 1 - number if big else number)
        elif kind == "digits":
            found = list(re.finditer(rb"\d+", data))
            if found:
                match = draw(st.sampled_from(found))
                data[match.start() : match.end()] = draw(st.sampled_from(SIZES))
        elif kind == "noise":
            data[at:at] = draw(st.binary(max_size=30))
    if data[:4] == b"\x89PNG" and draw(st.booleans()):
        data = bytearray(mend_png(bytes(data)))
    return gzip.compress(bytes(data), 1, mtime=0) if zipped else bytes(data)


def mend_png(data: bytes) -> bytes:
    """Give every chunk the checksum of its content, so that the damage reaches the decoder."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = min(struct.unpack(">I", data[at : at + 4])[0], len(data) - at - 12)
        body = data[at + 4 : at + 8 + length]
        out += struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out


# ---- the watch --------------------------------------------------------------------------------------------------------

_watched: list[str] | None = None  # what the reader at work did beside reading


def is_import(code) -> bool:
    """True for the body of a module of Python or of an installed package: a first import."""
    return code.co_name == "<module>" and code.co_filename.startswith((sys.prefix, sys.base_prefix, "<frozen"))


def _audit(event: str, arguments) -> None:
    if _watched is not None and event in FORBIDDEN and not (event == "exec" and is_import(arguments[0])):
        _watched.append(f"{event} {str(arguments)[:200]}")
        raise PermissionError(f"forbidden here: {event}")


def _printed(kind, error, trace) -> None:
    """An error that the interpreter could only print. CPython prints one of its own when memory for a bytearray is refused."""
    if "deallocated bytearray object" not in str(error):
        (sys.stderr.write if _watched is None else _watched.append)(f"{kind.__name__}: {error}")


def _too_long(*_):
    raise TimeoutError(f"more than {SECONDS} s")  # an OSError: noted apart


def fault_of(reader: Reader, path: Path) -> str | None:
    """What is wrong with how the reader takes the file; None: nothing."""
    global _watched
    _watched, start = [], time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(path)
        fault = None
    except (ValueError, OSError) as error:
        named = path.name in str(error) or path.stem in str(error)
        fault = None if named else f"{type(error).__name__} does not name the file: {str(error)[:300]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        fault = f"{type(error).__name__}: {str(error)[:300]}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        seen, _watched = _watched, None
    if seen:
        fault = f"forbidden: {seen[:3]}"
    return f"took {time.monotonic() - start:.0f} s" if fault is None and time.monotonic() - start > SECONDS else fault


def fuzz_reader(reader: Reader, folder: Path, examples: int, number: int) -> tuple[int, str | None, bytes]:
    """Run so many damaged files; returns (files read, first fault, its input)."""
    path, last = folder / reader.name, [0, None, b""]

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, derandomize=False, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])  # fmt: skip
    @given(damaged(reader))
    def attempt(data):
        path.write_bytes(data)
        fault = fault_of(reader, path)
        last[0] += 1
        if fault:
            last[1:] = [fault, data]
            raise AssertionError(fault)

    with suppress(AssertionError):
        attempt()
    return tuple(last)


def watch() -> None:
    """From now on this process grows by no more than MEMORY, and what a reader does beside reading is noted."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    Image.init()  # imports PIL's own readers
    sys.addaudithook(_audit)
    sys.excepthook, sys.unraisablehook = _printed, lambda a: _printed(a.exc_type, a.exc_value, a.exc_traceback)
    signal.signal(signal.SIGALRM, _too_long)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--only", nargs="+", help="names of readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=100, help="files a reader and round")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_findings"), help="where inputs of findings are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    readers = [r for r in (*common_readers(), *folder_readers()) if not args.only or r.name in args.only]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for reader in readers:  # sound files are read, and everything is imported before the watch begins
            for data in reader.seeds:
                (folder / reader.name).write_bytes(data)
                reader.read(folder / reader.name)
            shutil.rmtree(folder)
            folder.mkdir()
        watch()
        end, number, count, findings = time.monotonic() + args.seconds, args.seed, 0, {}
        while time.monotonic() < end:
            for reader in readers:
                if time.monotonic() > end or reader.name in findings:
                    continue
                (folder / "r").mkdir(exist_ok=True)
                files_read, fault, data = fuzz_reader(reader, folder / "r", args.examples, number)
                count += files_read
                if fault:
                    findings[reader.name] = fault
                    args.keep.mkdir(parents=True, exist_ok=True)
                    (args.keep / reader.name).write_bytes(data)
                    print(f"FINDING {reader.name}: {fault}\n  input: {args.keep / reader.name}", flush=True)
                shutil.rmtree(folder / "r")
            number += 1
    assert not Path("fuzz_was_here").exists(), "something was executed"
    print(json.dumps({"readers": len(readers), "files": count, "findings": sorted(findings), "seconds": args.seconds, "rounds": number}))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
