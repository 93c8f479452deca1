"""Files that stereo data come in: which pairs a folder holds, and how their disparities are coded.

`list_pairs(root, format)` knows these trees (PATTERNS below; `auto` tries them in turn):

    folder        <scene>/left/rgb/N.jpg, right/rgb/N.jpg, left/disparity/N.png (base-255 code, or PFM, npy); nested scenes too.
                  The released FSD data set has this form, and so has what `python -m synth stereo` writes
    middlebury    one folder a pair: im0/im1.png with disp0.pfm or disp0GT.pfm and calib.txt (2014, v3; ETH3D too), im2/im6 with
                  disp2/disp6.png (2003), view1/view5 with disp1/disp5.png (2005, 2006), left/right with disp_left.png, .npz, .pfm
    kitti         <split>/image_2, image_3, disp_occ_0 (2015) or colored_0, colored_1, disp_occ (2012); *_noc* for the mask
    sceneflow     .../frames_finalpass/X/left/N.png (or frames_cleanpass), .../disparity/X/left/N.pfm
    sintel        final_left/X/N.png, final_right, disparities, occlusions, outofframe
    crestereo     N_left.jpg, N_right.jpg, N_left.disp.png
    instereo2k    one folder a pair: left.png, right.png, left_disp.png, right_disp.png
    fallingthings .../N.left.jpg, N.right.jpg, N.left.depth.png, _camera_settings.json
    vkitti2       .../frames/rgb/Camera_0/rgb_N.jpg, Camera_1, .../frames/depth/Camera_0/depth_N.png
    tartanair     .../image_left/N_left.png, image_right/N_right.png, depth_left/N_left_depth.npy
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.io import load_npy, read_image, read_png16
from stereo.codec import decode_fsd, decode_pfm

IMAGES = (".jpg", ".png", ".jpeg", ".webp", ".ppm", ".bmp")
VKITTI_FX_BASELINE = 725.0087 * 0.532725  # pixels times metres


class Pair(NamedTuple):
    """One stereo pair on disk. Paths; None where the set has no such file. `codec`: see `decode_disparity`."""

    name: str
    left: Path
    right: Path
    disparity: Path | None = None
    codec: str = "pfm"
    right_disparity: Path | None = None
    mask: Path | None = None  # the non-occluded pixels: 255 (Middlebury, ETH3D), or a map that is > 0 there (KITTI noc)
    calibration: Path | None = None
    hidden: tuple[Path, ...] = ()  # masks, not 0 where the truth of the left view does not count (Sintel)
    sparse: bool = False  # ground truth in single points (KITTI)


# ---------------------------------------------------------------------------------------------------------- disparities


def load_raw(path: Path, codec: str, hidden: tuple[Path, ...] = ()) -> np.ndarray:
    """Read a disparity file as it is stored, (H, W) or (H, W, 3), 0 where a mask of `hidden` is not. ValueError or OSError naming
    the file."""
    suffix = path.suffix.lower()
    if suffix == ".pfm":
        try:
            raw = decode_pfm(path.read_bytes())
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: {error}") from None
        return raw if raw.ndim == 2 else raw[..., 0]
    if suffix == ".npy":
        raw = load_npy(path)
    elif suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                raw = arrays["disparity" if "disparity" in arrays else arrays.files[0]]
        except Exception as error:  # a damaged archive raises anything
            raise ValueError(f"{path}: not a readable npz file: {error}") from None
    else:
        raw = read_png16(path)[0]
    colours = codec.split(":")[0] in ("fsd", "sintel")
    if codec.startswith("fsd") and isinstance(raw, np.ndarray) and raw.ndim == 2:  # whole pixels in 8 bits are unmistakable
        if raw.dtype == np.uint8:
            return raw
        remedy = "set `codec` to div:256 (KITTI), div:100, div:32 or value"
        raise ValueError(f"{path}: one channel of {raw.dtype}, not the three-channel code; {remedy}")
    if not isinstance(raw, np.ndarray) or raw.ndim != 2 + colours or raw.dtype.kind not in "uif":
        shape = f"{raw.shape} {raw.dtype}" if isinstance(raw, np.ndarray) else type(raw).__name__
        raise ValueError(f"{path}: {shape}; the code '{codec}' wants an array of {'(H, W, 3)' if colours else '(H, W)'}")
    if colours and raw.dtype != np.uint8:
        raise ValueError(f"{path}: {raw.dtype}; the code '{codec}' wants 8 bits a channel")
    for file in hidden:
        mask = read_image(file).any(-1)
        if mask.shape != raw.shape[:2]:
            raise ValueError(f"{file}: {mask.shape[1]}x{mask.shape[0]}, but the disparity is {raw.shape[1]}x{raw.shape[0]}")
        raw[mask] = 0
    return raw


def decode_disparity(raw: np.ndarray, codec: str) -> np.ndarray:
    """Values as stored -> disparity in pixels, float32, 0 where there is none (not finite, not positive, or marked as missing).

    codec: "fsd" (base 255; "fsd:GRB" for files with red and green exchanged), "sintel" (4 R + G / 64 + B / 16384), "value" (as it
    is), "pfm" (SceneFlow's: as it is, but negative ones lose their sign), "div:256" (value / 256: KITTI, "div:100" InStereo2K,
    "div:32" CREStereo, "div:4" Middlebury 2003), "over:386.2" (386.2 / value: depth files, the number is focal length times
    baseline in the unit of the file; the largest integer of a 16-bit file is sky).
    """
    kind, _, argument = codec.partition(":")
    if kind == "fsd" and raw.ndim == 2:
        return raw.astype(np.float32)
    if kind == "fsd":
        return decode_fsd(raw, argument or "RGB")
    if kind == "sintel":
        r, g, b = (raw[..., c].astype(np.float32) for c in range(3))
        return 4 * r + g / 64 + b / 16384
    values = np.abs(raw.astype(np.float32)) if kind == "pfm" else raw.astype(np.float32)
    values = np.where(np.isfinite(values) & (values > 0), values, 0)
    if kind == "div":
        return values / np.float32(argument)
    if kind == "over":
        known = (values > 0) & ((raw.dtype != np.uint16) | (raw < 65535))
        return np.where(known, np.float32(argument) / np.where(known, values, 1), 0).astype(np.float32)
    if kind not in ("pfm", "value"):
        raise ValueError(f"unknown disparity code '{codec}': fsd, sintel, pfm, value, div:NUMBER or over:NUMBER")
    return values


def check_codec(codec: str) -> None:
    """ValueError for a code that `decode_disparity` does not know: it is tried on one pixel."""
    try:
        with np.errstate(divide="ignore"):
            one = decode_disparity(np.ones((1, 1, 3), np.uint8), codec)
        if not 0 < one.min() <= one.max() < np.inf:
            raise ValueError("its number must be positive")
    except ValueError as error:
        raise ValueError(f"codec '{codec}': {error}") from None


def read_disparity(path: Path, codec: str, hidden: tuple[Path, ...] = ()) -> np.ndarray:
    """The whole disparity map (H, W) float32 of a file, 0 where there is none or a mask of `hidden` is not 0."""
    return decode_disparity(load_raw(path, codec, hidden), codec)


def read_mask(pair: Pair) -> np.ndarray | None:
    """(H, W) bool of the pixels that count in a set's own evaluation (non-occluded ones), None where the set has no such file."""
    if pair.mask is None:
        return None
    mask = read_png16(pair.mask)[0]
    mask = mask if mask.ndim == 2 else mask[..., 0]
    return mask > 0 if mask.dtype == np.uint16 else mask == 255


def read_calibration(path: Path, index: str = "") -> dict[str, float]:
    """{"fx", "fy", "cx", "cy", "baseline" (metres), "doffs"} of a calib.txt (Middlebury), a calib.json, or an intrinsics file.

    depth = fx * baseline / (disparity + doffs). Intrinsics file: nine numbers of K on the first line, the baseline in metres on
    the second. A calib.json may hold one entry per pair, by `index`, and leave out fy, cx and cy. ValueError naming the file when
    something is missing.
    """
    try:
        text = Path(path).read_text()
        if path.suffix == ".json":
            found = json.loads(text)
            found = found.get(index, found)
            out = {key: float(found[key]) for key in ("fx", "fy", "cx", "cy", "doffs") if key in found}
            out["baseline"] = float(found["baseline_m"] if "baseline_m" in found else found["baseline"])
        elif "cam0" in text:
            lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            K = [float(v) for v in re.findall(r"[-+.\deE]+", lines["cam0"])]
            out = {"fx": K[0], "fy": K[4], "cx": K[2], "cy": K[5], "baseline": float(lines["baseline"]) / 1000}
            out["doffs"] = float(lines.get("doffs", 0))
        else:
            K, rest = [float(v) for v in text.split()[:9]], text.split()[9:]
            out = {"fx": K[0], "fy": K[4], "cx": K[2], "cy": K[5], "baseline": float(rest[0]), "doffs": 0.0}
        if not (out["fx"] > 0 and out.get("fy", 1) > 0 and out["baseline"] > 0):
            raise ValueError("focal lengths and baseline must be positive")
        return {"doffs": 0.0} | out
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError) as error:
        wanted = "calib.txt of Middlebury, a JSON with fx and baseline, or nine numbers of K and then the baseline in metres"
        raise ValueError(f"{path}: not a calibration ({type(error).__name__}: {error}); expected {wanted}") from None


# -------------------------------------------------------------------------------------------------------------- folders


def stems(folder: Path, suffixes=IMAGES, tail: str = "") -> dict[str, Path]:
    """{name without suffix and `tail`: path} of the files of one folder with one of these suffixes."""
    files = (Path(entry.path) for entry in os.scandir(folder)) if folder.is_dir() else ()
    found = {file.stem: file for file in files if file.suffix.lower() in suffixes and file.stem.endswith(tail)}
    return {stem[: len(stem) - len(tail)]: file for stem, file in sorted(found.items())}


def first(folder: Path, *names: str) -> Path | None:
    """The first of these files that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def folders(root: Path) -> list[Path]:
    """All folders below and with root, sorted, linked ones too, each once; hidden ones left out."""
    found = {}
    for path, below, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        below[:] = sorted(name for name in below if not name.startswith(".")) if real not in found else []  # a link may lead back
        found.setdefault(real, Path(path))
    return list(found.values())


def name_of(root: Path, path: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def list_folder(root: Path, codec: str) -> list[Pair]:
    pairs = []
    for scene in [path for path in folders(root) if (path / "left" / "rgb").is_dir()]:
        left, right = (stems(scene / side / "rgb") for side in ("left", "right"))
        truth, other = (stems(scene / side / "disparity", (".png", ".pfm", ".npy", ".npz")) for side in ("left", "right"))
        calibration = first(scene, "calib.json", "calib.txt")
        for stem in sorted(left.keys() & right.keys() & (truth.keys() or left.keys())):
            file = truth.get(stem)
            coded = codec or ("value" if file is not None and file.suffix != ".png" else "fsd")
            name = (scene.relative_to(root) / stem).as_posix()
            pairs.append(Pair(name, left[stem], right[stem], file, coded, other.get(stem), None, calibration))
    return pairs


def list_middlebury(root: Path, codec: str) -> list[Pair]:
    views = [
        ("im0", "im1", ("disp0GT", "disp0"), ("disp1GT", "disp1"), "value"),
        ("im2", "im6", ("disp2",), ("disp6",), "div:4"),
        ("view1", "view5", ("disp1",), ("disp5",), "div:3"),
        ("left", "right", ("disp_left",), ("disp_right",), "div:4"),
    ]
    pairs = []
    for folder in folders(root):
        for left, right, truth, other, png in views:
            images = [first(folder, *(view + suffix for suffix in IMAGES)) for view in (left, right)]
            if None in images:
                continue
            file, second = (
                first(folder, *(name + suffix for name in names for suffix in (".pfm", ".npz", ".npy", ".png")))
                for names in (truth, other)
            )
            coded = codec or (png if file is not None and file.suffix == ".png" else "value")
            mask = first(folder, "mask0nocc.png")
            name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
            pairs.append(Pair(name, *images, file, coded, second, mask, first(folder, "calib.txt", "calib.json")))
            break
    return pairs


def list_kitti(root: Path, codec: str) -> list[Pair]:
    pairs = []
    for folder in folders(root):
        for names in ("image_2 image_3 disp_occ_0 disp_noc_0", "colored_0 colored_1 disp_occ disp_noc"):
            left, right, occ, noc = names.split()
            views, others = stems(folder / left, IMAGES), stems(folder / right, IMAGES)
            truth, mask = stems(folder / occ, (".png",)), stems(folder / noc, (".png",))
            for stem in sorted(views.keys() & others.keys() & (truth.keys() or views.keys())):
                if stem.endswith("_10") or not truth:  # _11 is the next moment, without ground truth
                    name = name_of(root, folder / stem)
                    files = views[stem], others[stem], truth.get(stem)
                    pairs.append(Pair(name, *files, codec or "div:256", mask=mask.get(stem), sparse=True))
    return pairs


def list_sceneflow(root: Path, codec: str) -> list[Pair]:
    pairs = []
    for kind in ("frames_finalpass", "frames_cleanpass"):
        for base in [path for path in folders(root) if path.name == kind]:
            for folder in [path for path in folders(base) if path.name == "left"]:
                truth = base.parent / "disparity" / folder.relative_to(base)
                views, others = stems(folder), stems(folder.parent / "right")
                left, right = stems(truth, (".pfm",)), stems(truth.parent / "right", (".pfm",))
                for stem in sorted(views.keys() & others.keys() & left.keys()):
                    name = name_of(root, folder.parent / stem)
                    pairs.append(Pair(name, views[stem], others[stem], left[stem], codec or "pfm", right.get(stem)))
        if pairs:  # one of the two renderings of the same scenes
            return pairs
    return pairs


def list_sintel(root: Path, codec: str) -> list[Pair]:
    pairs = []
    base = next((path for path in folders(root) if (path / "disparities").is_dir()), root)
    for kind in ("final", "clean"):
        for folder in folders(base / f"{kind}_left") if (base / f"{kind}_left").is_dir() else ():
            scene = folder.name
            views, others, truth = stems(folder), stems(base / f"{kind}_right" / scene), stems(base / "disparities" / scene)
            masks = [stems(base / kind / scene) for kind in ("occlusions", "outofframe")]
            for stem in sorted(views.keys() & others.keys() & truth.keys()):
                hidden = tuple(mask[stem] for mask in masks if stem in mask)
                files = views[stem], others[stem], truth[stem]
                pairs.append(Pair(name_of(root, folder / stem), *files, codec or "sintel", hidden=hidden))
        if pairs:
            return pairs
    return pairs


def list_suffixed(root: Path, codec: str, left: str, right: str, truth: str, code: str) -> list[Pair]:
    """Pairs whose files lie in one folder and differ by what follows the name."""
    pairs = []
    for folder in folders(root):
        views, others = stems(folder, tail=left), stems(folder, tail=right)
        maps, second = stems(folder, (".png",), truth), stems(folder, (".png",), truth.replace("left", "right"))
        for stem in sorted(views.keys() & others.keys() & maps.keys()):
            name = (folder.relative_to(root) / stem.rstrip("_.")).as_posix()
            pairs.append(Pair(name, views[stem], others[stem], maps[stem], codec or code, second.get(stem)))
    return pairs


def list_crestereo(root: Path, codec: str) -> list[Pair]:
    return list_suffixed(root, codec, "_left", "_right", "_left.disp", "div:32")


def list_instereo2k(root: Path, codec: str) -> list[Pair]:
    pairs = []
    for folder in folders(root):
        left, right, truth = (first(folder, f"{name}.png") for name in ("left", "right", "left_disp"))
        if left and right and truth:
            other = first(folder, "right_disp.png")
            pairs.append(Pair(folder.relative_to(root).as_posix(), left, right, truth, codec or "div:100", other))
    return pairs


def list_fallingthings(root: Path, codec: str) -> list[Pair]:
    pairs = []
    for folder in [path for path in folders(root) if (path / "_camera_settings.json").is_file()]:
        settings = folder / "_camera_settings.json"
        try:
            fx = json.loads(settings.read_text())["camera_settings"][0]["intrinsic_settings"]["fx"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{settings}: no focal length of the left camera in it ({error})") from None
        code = f"over:{fx * 600:.10g}"  # baseline 6 cm, depth in 0.1 mm
        pairs += list_suffixed(folder, codec, ".left", ".right", ".left.depth", code)
    return [pair._replace(name=name_of(root, pair.disparity.parent / pair.name)) for pair in pairs]


def list_vkitti2(root: Path, codec: str) -> list[Pair]:
    pairs = []
    for folder in [path for path in folders(root) if path.name == "Camera_0" and path.parent.name == "rgb"]:
        depth = folder.parents[1] / "depth" / "Camera_0"
        for stem, left in stems(folder).items():
            right, truth = folder.parent / "Camera_1" / left.name, depth / f"{stem.replace('rgb', 'depth')}.png"
            if right.is_file() and truth.is_file():
                code = f"over:{VKITTI_FX_BASELINE * 100:.10g}"  # centimetres
                pairs.append(Pair(name_of(root, left), left, right, truth, codec or code))
    return pairs


def list_tartanair(root: Path, codec: str) -> list[Pair]:
    pairs = []
    for folder in [path for path in folders(root) if path.name == "image_left"]:
        views, others = stems(folder, tail="_left"), stems(folder.parent / "image_right", tail="_right")
        truth = stems(folder.parent / "depth_left", (".npy",), "_left_depth")
        for stem in sorted(views.keys() & others.keys() & truth.keys()):
            pairs.append(Pair(name_of(root, folder.parent / stem), views[stem], others[stem], truth[stem], codec or "over:80"))
    return pairs


LISTS = {
    "folder": list_folder,
    "middlebury": list_middlebury,
    "kitti": list_kitti,
    "sceneflow": list_sceneflow,
    "sintel": list_sintel,
    "crestereo": list_crestereo,
    "instereo2k": list_instereo2k,
    "fallingthings": list_fallingthings,
    "vkitti2": list_vkitti2,
    "tartanair": list_tartanair,
    "eth3d": list_middlebury,
}


def list_pairs(root, format: str = "auto", codec: str = "", truth: bool = True, split: str = "all") -> list[Pair]:
    """The pairs under `root`, sorted by name. FileNotFoundError or ValueError naming the folder and what was looked for.

    format: a key of LISTS, or "auto". codec: how the disparities are coded, where it is not the format's own way.
    truth: pairs without ground truth are an error. split: "test" is SceneFlow's TEST part where there is one, "train" the rest.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of stereo pairs")
    if format != "auto" and format not in LISTS:
        raise ValueError(f"unknown format '{format}' of {root}: auto, {', '.join(LISTS)}")
    if split not in ("all", "train", "test"):
        raise ValueError(f"split '{split}' of {root} must be all, train or test")
    if codec:
        check_codec(codec)
    found = {}
    for kind in LISTS if format == "auto" else [format]:
        if pairs := LISTS[kind](root, codec):
            found.setdefault(kind, pairs)
            if pairs[0].disparity:
                break
    else:
        kind, pairs = next(iter(found.items()), ("", []))
    if not pairs:
        if format in ("auto", "folder") and (root / "left" / "rgb").is_dir():
            raise ValueError(f"{root}: no name that left/rgb, right/rgb and left/disparity have in common")
        expected = (
            "left/rgb/0000.jpg, right/rgb/0000.jpg, left/disparity/0000.png; the other forms are listed in stereo/formats.py"
        )
        raise ValueError(f"{root}: no pair in the form of '{format}' in it; expected such as {expected}")
    if truth and (lacking := [pair.name for pair in pairs if pair.disparity is None]):
        reason = "left/disparity is missing or empty" if kind == "folder" else "no disparity file"
        raise ValueError(f"{root}: no ground truth for {len(lacking)} of {len(pairs)} pairs, among them {lacking[0]}: {reason}")
    if kind == "sceneflow" and split != "all":
        apart = {split: [] for split in ("train", "test")}
        for pair in pairs:
            apart["test" if "TEST" in pair.name.split("/") else "train"].append(pair)
        pairs = apart[split] or (pairs if split == "test" else [])
        if not pairs:
            raise ValueError(f"{root}: only SceneFlow's TEST part, which is for evaluation; `split: all` trains on it")
    return sorted(pairs)


def read_views(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Both images (H, W, 3) uint8 RGB. ValueError naming the files when their sizes differ."""
    left, right = read_image(pair.left), read_image(pair.right)
    if left.shape != right.shape:
        sizes = " and ".join(f"{image.shape[1]}x{image.shape[0]}" for image in (left, right))
        raise ValueError(f"{pair.left} and {pair.right}: {sizes}, but the views of a rectified pair have one size")
    return left, right
