"""Where weights come from: our checkpoints and runs, published files, upstream training folders, VGGT. And where they go:

  python pi3/weights.py --ckpt outputs/pi3_conf --export pi3.safetensors     a flat file with the names of the published one
"""

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from common.checkpoint import apply_weights, load_weights
from pi3.model import Pi3, conf_from_points, load_pretrained, load_vggt
from pi3.pi3x import Pi3X

# constructor arguments of the network that a config's section `model` holds under the same name
MODEL_KEYS = (
    "enc_dim", "enc_depth", "enc_heads", "dec_dim", "dec_depth", "dec_heads", "head_dim", "head_depth", "head_heads", "point_out",
    "camera_dim", "pos_img_size", "train_conf", "use_global_points", "rope_angles",
)  # fmt: skip
VGGT_DOWNLOAD = "https://huggingface.co/facebook/VGGT-1B (model.safetensors)"


def model_options(m) -> dict:
    """Constructor arguments of `Pi3` from a config's section `model`, without the memory knobs: every checkpoint holds them."""
    if m.decoder_size != "large":
        raise ValueError(f"model.decoder_size {m.decoder_size!r}: only large was published; other sizes: model.enc_dim and the like")
    if not re.fullmatch(r"rope\d+(\.\d+)?", m.pos_type):
        raise ValueError(f"model.pos_type {m.pos_type!r}: expected rope and its base frequency, as in rope100")
    return {key: m[key] for key in MODEL_KEYS} | {"rope_base": float(m.pos_type.removeprefix("rope"))}


def find_weights(path: str | Path) -> Path:
    """The file that a path means: itself, or in a folder model.safetensors, pytorch_model.bin or a run's last checkpoint."""
    path = Path(path)
    if path.is_file() and path.stem != "latest":
        return path
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"weights {path} do not exist")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    for f in (folder, folder / "checkpoint"):
        if (f / "latest.pt").is_file():  # later files than its step are those of a run that was turned back from
            return f / f"{last_step(f / 'latest.pt'):08d}.pt"
        if steps := [p for p in f.glob("*.pt") if re.fullmatch(r"\d{8,}", p.stem)]:
            return max(steps, key=lambda p: int(p.stem))
    raise FileNotFoundError(f"{folder}: no model.safetensors, pytorch_model.bin or {{step}}.pt in it")


def last_step(record: Path) -> int:
    """The step that a run's latest.pt names as its last; ValueError where the file is damaged."""
    try:
        return int(torch.load(record, weights_only=True)["step"])
    except Exception as error:  # a damaged archive raises anything
        raise ValueError(f"{record} is damaged: give the file of a step, {{step}}.pt beside it, instead ({error})") from None


def stored_options(path: Path) -> dict | None:
    """The constructor arguments that a checkpoint of ours records; None for others."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return value.get("config") if isinstance(value, dict) else None
    except Exception:  # not ours; load_weights says what is wrong with it, if anything
        return None


def initialise(model: Pi3, m) -> list[str]:
    """Give a new run its weights as section `model` of the config says. Returns lines for the log."""
    if m.ckpt:
        path = find_weights(m.ckpt)
        state = load_weights(path)
        fresh = model.conf_head is not None and "conf_head.proj.weight" not in state
        notes = [f"{path}: {load_pretrained(model, state, conf_may_start_fresh=True)}"]
        if fresh and m.conf_init == "point_decoder":
            conf_from_points(model)
            notes.append("the confidence transformer starts as a copy of the point transformer")
        elif m.conf_init not in ("random", "point_decoder"):
            raise ValueError(f"model.conf_init {m.conf_init!r}: expected random or point_decoder")
        return notes
    if m.train_conf and m.conf_freeze:
        raise ValueError("stage conf trains the confidence branch of a trained network: give model.ckpt=PATH of the highres run")
    if not m.load_vggt:
        return ["all weights start from random values (no model.ckpt, load_vggt false)"]
    if not Path(m.vggt_path).is_file():
        raise FileNotFoundError(f"{m.vggt_path} is not there: get VGGT from {VGGT_DOWNLOAD}, or set model.load_vggt=false")
    return [load_vggt(model, load_weights(m.vggt_path))]


def load_model(path: str | Path, device: torch.device) -> Pi3:
    """The network of a checkpoint in eval mode: ours with the sizes it records, else the published Pi3 or Pi3X."""
    path = find_weights(path)
    state: dict[str, Tensor] = load_weights(path)
    if "metric_token" in state:
        model = Pi3X()
        apply_weights(model, state)
    else:
        branches = {"train_conf": "conf_head.proj.weight" in state, "use_global_points": "global_point_head.proj.weight" in state}
        model = Pi3(**(stored_options(path) or {}) | branches)
        load_pretrained(model, state)
    return model.to(device).eval()


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="weights: a run's folder, a file of ours, an upstream training folder")
    parser.add_argument("--export", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    args = parser.parse_args()
    state = load_weights(find_weights(args.ckpt))
    args.export.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, args.export)
    print(f"{args.export}: {len(state)} tensors")


if __name__ == "__main__":
    main()
