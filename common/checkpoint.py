"""Checkpoints that survive kill -9, full disks and rot: atomic, verified, written in the background.

`{step:08d}.pt` holds the model part, `{step:08d}_{name}.pt` the others, `latest.pt` the commit record: size and sha256 of every
file of every kept step. The model part is written after the other parts and the record last: neither ever stands for a half save.
"""

import hashlib
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

FORMAT = 1
_scalar = np.float64(0).__reduce__()[0]  # numpy's own: its module has had two names
NUMPY_SCALARS = [np.dtype, _scalar, (_scalar, "numpy.core.multiarray.scalar"), *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}]


def snapshot(value, name: str = "checkpoint"):
    """A CPU copy of nested tensors and plain types; anything else is a TypeError that names its place."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: snapshot(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(snapshot(v, f"{name}[{i}]") for i, v in enumerate(value))
    value = value.item() if isinstance(value, np.generic) else value
    if value is not None and type(value) not in (str, int, float, bool, bytes):
        raise TypeError(f"{name} holds a {type(value).__name__}: checkpoints hold tensors and plain types only")
    return value


def _entry(path: Path) -> dict:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _write(path: Path, value) -> dict:
    """Write and fsync under a temporary name, rename, fsync the folder. Returns the file's entry for the record."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    entry = _entry(temporary)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return entry


def _read(path: Path, entry: dict | None = None, map_location="cpu"):
    """Verify by the record's entry, or by the archive's own CRC where there is none, and load. ValueError where damaged."""
    try:
        if entry and _entry(path) != entry:
            raise ValueError("its size or sha256 is not the recorded one")
        if not entry and (broken := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{broken} is corrupt")
        value = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Exception as error:  # a damaged archive raises anything, from KeyError to RuntimeError
        raise ValueError(f"{path} is damaged: {error}") from None
    if isinstance(value, dict) and value.get("format", 0) > FORMAT:
        raise ValueError(f"{path} has format {value['format']}, and this version reads up to {FORMAT}: update the code")
    return value


class Checkpoints:
    """Saves and loads in one folder; keeps the last `keep_last` steps (None: all) and every one divisible by `keep_every` (0: none)."""

    def __init__(self, folder, keep_last: int | None = 3, keep_every: int = 0, say=print):
        self.folder, self.keep_last, self.keep_every, self.say = Path(folder), keep_last or sys.maxsize, keep_every, say
        self.writer, self.jobs, self.error, self.committed = ThreadPoolExecutor(1), [], None, None

    @staticmethod
    def owns(path) -> bool:
        """True for a file named as this class names them."""
        return bool(re.fullmatch(r"\d{8,}|latest", Path(path).stem))

    def _record(self) -> dict:
        """{"step": last committed, "steps": {step: {file: entry}}}; where the record is lost, from the model parts present."""
        try:
            return _read(self.folder / "latest.pt")
        except ValueError as error:
            steps = sorted(int(p.stem) for p in self.folder.glob("*.pt") if re.fullmatch(r"\d{8,}", p.stem))
            if steps:
                self.say(f"WARNING: {error}; going by the checkpoints present")
            return {"step": steps[-1] if steps else -1, "steps": {step: {} for step in steps}}

    def save(self, step: int, parts: dict[str, dict]) -> None:
        """Copy `parts` ({"": model part, "optimizer": ..., "ema": ...}) to the CPU; the rest happens in the background.

        Waits for an unfinished previous save. A step that this object has saved or loaded is not written again.
        """
        self.wait()
        if step != self.committed:
            copy = {name: snapshot(part, name or "model") for name, part in parts.items()}
            copy[""] |= {"step": step, "format": FORMAT}
            self.jobs.append(self.writer.submit(self._save, step, copy))

    def save_weights(self, name: str, value: dict) -> None:
        """Write one more file, such as the best weights so far, in the background; it is not part of the record."""
        self.jobs.append(self.writer.submit(self._save, name, snapshot(value)))

    def wait(self) -> str | None:
        """Wait for the writes in progress; return the error of the last one, None when it succeeded."""
        while self.jobs:
            self.jobs.pop(0).result()
        return self.error

    def _save(self, what, value: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._commit(what, value) if isinstance(what, int) else _write(self.folder / what, value)
            self.error = None
        except Exception as error:  # a full or read-only disk must not end the training
            self.error = f"checkpoint {what} was NOT saved in {self.folder}: {type(error).__name__}: {error}"
            self.say(f"ERROR: {self.error}; training goes on, earlier checkpoints are kept")
        for path in self.folder.glob("*.pt.tmp"):
            path.unlink(missing_ok=True)

    def _commit(self, step: int, parts: dict) -> None:
        steps, files = self._record()["steps"], {}
        for part in sorted(parts, reverse=True):  # "", the model part, last
            name = f"{step:08d}{'_' * bool(part)}{part}.pt"
            files[name] = _write(self.folder / name, parts[part])
        past = sorted(s for s in steps if s < step)  # later ones belong to a run that was turned back from: not ours to count
        drop = {s for s in past[: max(0, len(past) + 1 - self.keep_last)] if not self.keep_every or s % self.keep_every}
        steps = {s: entries for s, entries in steps.items() if s not in drop} | {step: files}
        _write(self.folder / "latest.pt", {"format": FORMAT, "step": step, "steps": steps})
        self.committed = step
        for path in [path for old in drop for path in self.folder.glob(f"{old:08d}*.pt")]:
            path.unlink(missing_ok=True)

    def _load_step(self, step: int, entries: dict, map_location) -> dict:
        name = f"{step:08d}"
        files = {f"{name}.pt", *entries, *(path.name for path in self.folder.glob(f"{name}_*.pt"))}
        parts = {file[len(name) + 1 : -3]: _read(self.folder / file, entries.get(file), map_location) for file in sorted(files)}
        self.committed = step
        return {"step": step, **parts}

    def load(self, which="latest", map_location="cpu") -> dict | None:
        """Return {"step", "": model part, "optimizer": ..., ...}; None for "none", and for "latest" where nothing was saved.

        which: "latest" (a damaged one is reported and the one before it used), "none", a step, or a path (damaged: ValueError).
        """
        which, path = str(which or "none"), Path(str(which))
        if which == "none":
            return None
        if which != "latest" and not which.isdigit():
            if not path.is_dir() and not self.owns(path):
                value = _read(path, None, map_location)
                return {"step": value.get("step", 0), "": value}
            folder, which = (path, "latest") if path.is_dir() else (path.parent, path.stem)
            return Checkpoints(folder, say=self.say).load(which, map_location)
        record = self._record()
        if which != "latest":
            return self._load_step(int(which), record["steps"].get(int(which), {}), map_location)
        steps = sorted((s for s in record["steps"] if s <= record["step"]), reverse=True)
        for step in steps:
            try:
                return self._load_step(step, record["steps"][step], map_location)
            except ValueError as error:
                self.say(f"WARNING: {error}; trying the checkpoint before it")
        if steps:
            raise ValueError(f"every checkpoint in {self.folder} is damaged; --checkpoint none starts anew")
        return None


def load_weights(path) -> dict[str, torch.Tensor]:
    """Read {name: tensor} on the CPU from .safetensors or a torch file, out of 'model' or 'state_dict' and without 'module.'."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"weights file {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name a weights file in it") from None
    except Exception as error:
        remedy = "where you trust it, load it with weights_only=False elsewhere and save the tensors alone"
        raise ValueError(f"cannot read weights from {path} (damaged, or it holds more than tensors: {remedy}): {error}") from None
    for wrapper in ("model", "state_dict"):
        value = value[wrapper] if isinstance(value, dict) and isinstance(value.get(wrapper), dict) else value
    tensors = {k: v for k, v in value.items() if isinstance(v, torch.Tensor)} if isinstance(value, dict) else {}
    if not tensors:
        raise ValueError(f"{path} holds no weights (expected names and tensors, bare or under 'model' or 'state_dict')")
    return {k.removeprefix("module."): v for k, v in tensors.items()}


def apply_optimizer(optimizer, scaler, saved: dict) -> None:
    """Load {"optimizer", "scaler"}: moments and loss scale. Rates and decays stay the config's, should it have changed."""
    groups, old = optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in old]:
        raise ValueError("the checkpoint's optimizer has other parameter groups: choose another workspace, or `init` from its weights")
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for i, moments in saved["optimizer"]["state"].items():  # a fused optimizer would read past the end of smaller ones
        if any(m.ndim and m.shape != shapes[i] for m in moments.values() if isinstance(m, torch.Tensor)):
            raise ValueError(f"the checkpoint's optimizer state of parameter {i} is not of its shape {tuple(shapes[i])}")
    optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])


def apply_weights(module: torch.nn.Module, state: dict[str, torch.Tensor], strict: bool = True) -> str:
    """Load state into module. Returns a report of missing, unexpected and wrong-shape names; ValueError with it when strict."""
    own = module.state_dict()
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    faults = {"missing": sorted(own.keys() - state.keys()), "unexpected": sorted(state.keys() - own.keys())}
    faults["of wrong shape"] = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in wrong]
    report = "\n".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in faults.items() if names)
    if report and strict:
        raise ValueError(f"the weights do not fit the model:\n{report}")
    module.load_state_dict({k: v for k, v in state.items() if k in own and k not in wrong}, strict=False)
    return report or f"all {len(own)} tensors loaded"
