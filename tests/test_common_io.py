"""Files: what is written reads back exactly, and hostile or damaged files are refused by name before any harm."""

import os
import pickle
import struct
import subprocess
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from common import io
from lbm.unpickle import load_npy, load_pickle

RNG = np.random.default_rng(0)
PICTURE = cv2.GaussianBlur(RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8), (0, 0), 2)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"\0" * 100) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_image_round_trip_and_kinds(tmp_path):
    io.write_image(tmp_path / "new" / "a.png", PICTURE)
    got = io.read_image(tmp_path / "new" / "a.png")
    assert (got == PICTURE).all() and got.dtype == np.uint8
    io.write_image(tmp_path / "a.jpg", PICTURE)
    assert np.abs(io.read_image(tmp_path / "a.jpg").astype(int) - PICTURE).mean() < 4
    io.write_image(tmp_path / "grey.png", PICTURE[..., 0])
    assert (io.read_image(tmp_path / "grey.png") == PICTURE[..., :1]).all()
    Image.fromarray(np.dstack([PICTURE, PICTURE[..., :1]])).save(tmp_path / "alpha.png")
    assert (io.read_image(tmp_path / "alpha.png") == PICTURE).all()
    io.write_png16(tmp_path / "deep.png", PICTURE.astype(np.uint16) * 257)
    assert (io.read_image(tmp_path / "deep.png") == PICTURE).all()


def test_damaged_images_are_named(tmp_path):
    for suffix in (".png", ".jpg"):
        io.write_image(tmp_path / f"good{suffix}", PICTURE)
        good = (tmp_path / f"good{suffix}").read_bytes()
        for i, data in enumerate((b"", good[: len(good) // 2], good[:20], good[:-30], b"hello", RNG.bytes(500))):
            path = tmp_path / f"{i}{suffix}"
            path.write_bytes(data)
            with pytest.raises(ValueError, match=path.name):
                io.read_image(path)
    good = bytearray((tmp_path / "good.png").read_bytes())
    good[len(good) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(good)
    with pytest.raises(ValueError, match=r"flipped\.png"):
        io.read_image(tmp_path / "flipped.png")
    with pytest.raises(OSError, match=r"gone\.png"):
        io.read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("size", [(40_000, 25_000), (1_000_000_000, 1), (20_000, 10_001)])
def test_image_of_too_many_pixels_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    start = time.perf_counter()
    for read in (io.read_image, io.read_png16):
        with pytest.raises(ValueError, match=r"bomb\.png.*pixels"):
            read(tmp_path / "bomb.png")
    assert time.perf_counter() - start < 0.5


def test_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
    bomb = chunk(b"zTXt", b"near\0\0" + zlib.compress(bytes(50_000_000)))
    (tmp_path / "bomb.png").write_bytes(png(2, 2, bomb, data=b"\0" * 14))
    with pytest.raises(ValueError, match=r"bomb\.png"):
        io.read_png16(tmp_path / "bomb.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)])
def test_png16_round_trip_with_text(tmp_path, dtype, shape):
    values = RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    values.flat[0], values.flat[1] = 0, np.iinfo(dtype).max
    text = {"near": "2.5", "far": "1.1000000238418579", "labels": '{"chair":1}', "long": "x=é" * 400}
    io.write_png16(tmp_path / "a.png", values, text)
    got, got_text = io.read_png16(tmp_path / "a.png")
    assert got.dtype == dtype and (got == values).all() and got_text == text
    with Image.open(tmp_path / "a.png") as image:  # as others read it
        assert image.text == text
        assert len(shape) == 3 or (np.asarray(image) == values).all()


def test_png16_written_by_others(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("near", "0.5")
    info.add_text("far", "9", zip=True)
    values = RNG.integers(0, 65536, (6, 4), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", pnginfo=info)
    got, text = io.read_png16(tmp_path / "a.png")
    assert (got == values).all() and got.dtype == np.uint16 and text == {"near": "0.5", "far": "9"}


def test_ply_reads_back(tmp_path):
    points, normals = RNG.normal(size=(11, 3)).astype(np.float32), RNG.normal(size=(11, 3)).astype(np.float32)
    colors = RNG.integers(0, 256, (11, 3), dtype=np.uint8)
    kinds = {"float": "<f4", "uchar": "u1"}
    for name, extra in {"all": {"colors": colors, "normals": normals}, "bare": {}, "colors": {"colors": colors}}.items():
        io.write_ply(tmp_path / f"{name}.ply", points, **extra)
        header, body = (tmp_path / f"{name}.ply").read_bytes().split(b"end_header\n", 1)
        head = header.decode().splitlines()
        assert head[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 11"]
        columns = [line.split()[1:] for line in head if line.startswith("property")]
        table = np.frombuffer(body, [(column, kinds[kind]) for kind, column in columns])
        read = lambda *names: np.stack([table[n] for n in names], 1)  # noqa: B023
        assert len(table) == 11 and (read("x", "y", "z") == points).all()
        assert ("nx" in table.dtype.names) == ("normals" in extra) and ("red" in table.dtype.names) == ("colors" in extra)
        assert "colors" not in extra or (read("red", "green", "blue") == colors).all()
        assert "normals" not in extra or (read("nx", "ny", "nz") == normals).all()
    io.write_ply(tmp_path / "none.ply", np.zeros((0, 3)), np.zeros((0, 3), np.uint8))
    assert b"element vertex 0" in (tmp_path / "none.ply").read_bytes()


DATA = {
    "video": RNG.integers(0, 256, (2, 3, 4), dtype=np.uint8),
    "points": np.ones((2, 2), np.float32)[:, ::-1],
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "text": np.array(["ab", "c"]),
    "objects": np.array([[1, "a", b"jpeg"]], object),
    "names": ["a", b"c", "é"],
    "plain": (1, 2.5, None, True, 1j),
    "ids": {3, 4},
    "scalars": [np.float64(2), np.bool_(True), np.str_("ab"), np.uint8(3)],
    "ordered": OrderedDict(a=1),
}


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_and_plain_types_are_read(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(DATA, protocol))
    assert equal(load_pickle(tmp_path / "a.pkl"), DATA)


class Attack:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def attacks(marker) -> dict:
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Attack(os.system, f"touch {marker}"),
        "builtins.eval": Attack(eval, touch),
        "builtins.exec": Attack(exec, touch),
        "builtins.getattr": Attack(getattr, {}, "keys"),
        "subprocess.Popen": Attack(subprocess.Popen, ["touch", str(marker)]),
        "pathlib.Path": Attack(Path, "x"),
        "builtins.open": Attack(open, str(marker), "w"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_foreign_classes_are_refused_and_nothing_is_executed(tmp_path, protocol):
    marker = tmp_path / "marker"
    for name, attack in attacks(marker).items():
        for value in (attack, {"video": np.zeros(3), "x": [attack]}):
            (tmp_path / "bad.pkl").write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(ValueError, match=rf"bad\.pkl.*refused.*{name.split('.')[1]}"):
                load_pickle(tmp_path / "bad.pkl")
            np.save(tmp_path / "bad.npy", np.array(value, object), allow_pickle=True)
            with pytest.raises(ValueError, match=rf"bad\.npy.*refused.*{name.split('.')[1]}"):
                load_npy(tmp_path / "bad.npy")
            with pytest.raises(ValueError, match=r"bad\.npy.*refused"):
                io.load_npy(tmp_path / "bad.npy")
    dotted = b"\x80\x04\x8c\x08builtins\x8c\x0ddict.fromkeys\x93."  # an attribute of an allowed class is not allowed
    (tmp_path / "dotted.pkl").write_bytes(dotted)
    with pytest.raises(ValueError, match=r"refused.*dict\.fromkeys"):
        load_pickle(tmp_path / "dotted.pkl")
    assert not marker.exists()
    pickle.loads(pickle.dumps(attacks(marker)["posix.system"]))  # the attack is a real one
    assert marker.exists()


class Reduced:
    """Pickles as a call with a state, as numpy's own objects do."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def test_forged_dtypes_do_not_reach_numpy(tmp_path):
    """The flags in a dtype's state decide whether numpy follows raw bytes as pointers; fields can hide objects."""
    make = np.zeros(0).__reduce__()[0]

    def stored(code, state):
        kind = Reduced(np.dtype, (code, False, True), state)
        return pickle.dumps(Reduced(make, (np.ndarray, (0,), b"b"), (1, (2,), kind, False, b"A" * 16)))

    (tmp_path / "flags.pkl").write_bytes(stored("U2", (3, "<", None, None, None, 8, 4, 63)))
    array = load_pickle(tmp_path / "flags.pkl")
    assert array.dtype == np.dtype("<U2") and array.dtype.flags == np.dtype("<U2").flags
    fields = {"a": (np.dtype("O"), 0)}
    (tmp_path / "fields.pkl").write_bytes(stored("V8", (3, "|", None, ("a",), fields, 8, 1, 0)))
    with pytest.raises(ValueError, match=r"fields\.pkl.*refused"):
        load_pickle(tmp_path / "fields.pkl")


def test_npy_round_trip(tmp_path):
    for array in (
        *(DATA[key] for key in ("video", "points", "text", "fortran")),
        np.arange(3, dtype=">i4"), np.float32(3), np.zeros((0, 3)), np.array([(1, 2.0)], "i4,f8"),
    ):  # fmt: skip
        np.save(tmp_path / "a.npy", array)
        got = load_npy(tmp_path / "a.npy")
        assert got.dtype == array.dtype and got.shape == array.shape and np.array_equal(got, array)
    np.save(tmp_path / "a.npy", DATA, allow_pickle=True)
    assert equal(load_npy(tmp_path / "a.npy"), DATA)


def npy(header: str, body: bytes = b"") -> bytes:
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize(
    "data",
    [
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000, 100000), }", b"\0" * 64),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", b"\0" * 11),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", b"\0" * 13),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", b"\0" * 8),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }", b"\0" * 16),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", b"\0" * 24),
        npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': (3,), }"),
        npy("__import__('os').system('true')"),
        b"\x93NUMPY\x09\x00" + b"\0" * 50, b"\x93NUMPY\x01\x00\xff\xff{", b"", b"\x93NUMPY", b"PK\x03\x04",
    ],
    ids=lambda data: f"{zlib.crc32(data):08x}",
)  # fmt: skip
def test_npy_headers_that_lie_are_refused(tmp_path, data):
    (tmp_path / "bad.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.npy"):
        load_npy(tmp_path / "bad.npy")


def test_missing_files_are_named(tmp_path):
    for read in (io.load_npy, load_npy, load_pickle, io.read_png16):
        with pytest.raises(FileNotFoundError, match="gone"):
            read(tmp_path / "gone")


def test_colorize():
    colors = io.colorize(np.array([[0.0, 0.5, 1.0], [np.nan, np.inf, 7.0]]), 0.0, 1.0)
    assert colors.shape == (2, 3, 3) and colors.dtype == np.uint8 and (colors[1, :2] == 0).all()
    assert colors[0, 0, 2] > colors[0, 0, 0] and colors[0, 2, 0] > colors[0, 2, 2]  # blue to red
    assert colors[0, 1, 1] > 150 and (colors[1, 2] == colors[0, 2]).all()
    io.colorize(np.full((2, 2), np.nan), 0.0, 0.0)


@pytest.mark.parametrize("bad", ["../x", "a/../../x", "/etc/passwd", "a/b/../../..", "..", "x\0y", "a/../../root2/x"])
def test_paths_that_leave_the_root_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="leaves its root"):
        io.safe_join(tmp_path / "root", bad)


@pytest.mark.parametrize(("relative", "want"), [("a/b.png", "a/b.png"), ("./a//b", "a/b"), ("a/../b", "b"), ("..a/b", "..a/b")])
def test_paths_inside_the_root_are_joined(tmp_path, relative, want):
    assert io.safe_join(tmp_path, relative) == tmp_path / want


def seeds() -> dict[str, bytes]:
    """A valid file of each kind, to be damaged."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    path = folder / f"seed_{os.getpid()}.png"
    io.write_png16(path, RNG.integers(0, 65536, (6, 5), dtype=np.uint16), {"near": "1", "long": "y" * 900})
    image = path.read_bytes()
    np.save(path.with_suffix(".npy"), np.arange(12.0).reshape(3, 4))
    array = path.with_suffix(".npy").read_bytes()
    path.unlink(), path.with_suffix(".npy").unlink()
    return {"png": image, "npy": array, "pkl": pickle.dumps({k: v for k, v in DATA.items() if k != "objects"})}


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(seeds().items())), EDITS, st.floats(0, 1))
def test_damaged_files_read_or_raise_by_name(tmp_path_factory, seed, edits, keep):
    """Whatever the damage: a value, or an OSError or ValueError that names the file; never a crash or another exception."""
    kind, data = seed[0], bytearray(seed[1])
    for at, value in edits:
        data[int(at * (len(data) - 1))] = value
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(data if keep > 0.5 else data[: int(2 * keep * len(data))])
    try:
        {"png": io.read_png16, "npy": load_npy, "pkl": load_pickle}[kind](path)
    except (OSError, ValueError) as error:
        assert path.name in str(error)
