"""Weights folders in the layout that diffusion models are shared in: safetensors or torch files beside a config.json.

    root/unet/            config.json, diffusion_pytorch_model.safetensors or .bin
    root/vae/             config.json, diffusion_pytorch_model.safetensors or .bin
    root/image_encoder/   config.json, model.safetensors or pytorch_model.bin
    root/scheduler/       scheduler_config.json

Nothing is ever unpickled but tensors. Every error names the file.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
STEMS = {"image_encoder": ("model", "pytorch_model")}  # (.safetensors, .bin); every other part: diffusion_pytorch_model


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """{name: CPU tensor, in its stored dtype} of a safetensors file. ValueError where the file is not a sound one."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path}: not a safetensors file, or cut short (header of {length} bytes in a file of {size})")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: (DTYPES[e["dtype"]], list(e["shape"]), *map(int, e["data_offsets"])) for name, e in header.items()}
            if wrong := [name for name, entry in entries.items() if len(entry) != 4]:
                raise ValueError(f"data_offsets of {wrong[0]!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: broken safetensors header: {type(error).__name__} {error}") from None
    start, tensors = 8 + length, {}
    data = np.memmap(path, np.uint8, "r") if size > start else np.zeros(start, np.uint8)
    for name, (dtype, shape, begin, end) in entries.items():
        if not 0 <= begin <= end <= size - start or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name!r} lies at bytes {begin} to {end} of {size - start}: damaged or cut short")
        raw = torch.from_numpy(np.array(data[start + begin : start + end]))
        tensors[name] = raw.view(dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file: first to a temporary one beside it, which then takes its place."""
    path, header, offset = Path(path), {"__metadata__": {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        end = offset + tensors[name].numel() * tensors[name].dtype.itemsize
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(tensor.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_bin(path: str | Path) -> dict[str, Tensor]:
    """{name: CPU tensor} of a torch file that holds a flat dict of tensors and nothing else."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the older file format cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: refused or unreadable; only a torch file of plain tensors is read. Convert it to safetensors with the "
            f"library that wrote it ({type(error).__name__}: {str(error)[:200]})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a flat dict of name to tensor")
    return state


def part_folder(root: str | Path, part: str) -> Path:
    """The folder of a part ("unet", "vae", ...): root/part if there is one, else root itself."""
    root = Path(root)
    folder = root / part if (root / part).is_dir() else root
    if not folder.is_dir():
        raise FileNotFoundError(f"{root}: no such weights folder (expected it, or {root / part}, with a config.json)")
    return folder


def read_json(path: str | Path) -> dict:
    """A JSON file that holds an object."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; a weights folder needs its config beside the weights") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def read_state(root: str | Path, part: str, variant: str | None = None) -> dict[str, Tensor]:
    """Weights of a part in fp32 (integers as they are). safetensors before .bin; `variant` "fp16" picks names like x.fp16.bin."""
    folder = part_folder(root, part)
    safe, old = STEMS.get(part, ("diffusion_pytorch_model",) * 2)
    suffix = f".{variant}" if variant else ""
    names = [f"{safe}{suffix}.safetensors", f"{old}{suffix}.bin"]
    for name, read in zip(names, (read_safetensors, read_bin)):
        if (folder / name).exists():
            return {k: v.float() if v.is_floating_point() else v for k, v in read(folder / name).items()}
    there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"{folder}: neither {names[0]} nor {names[1]} (found: {there})")


def write_part(root: str | Path, part: str, config: dict, state: dict[str, Tensor]) -> Path:
    """Write root/part/ with config.json and safetensors; returns the folder."""
    folder = Path(root) / part
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{STEMS.get(part, ('diffusion_pytorch_model',))[0]}.safetensors", state)
    write_json(folder / "config.json", config)
    return folder


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file as those of weights folders are; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
