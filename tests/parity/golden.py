"""Finds and reads the golden cases: $PARITY_DIR, by default the public cases beside this file."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

OWN = Path(__file__).parent / "cases"
ROOT = Path(os.environ.get("PARITY_DIR", OWN))


def module(name: str) -> ModuleType:
    """Import a helper that stands beside the cases (or beside ours), e.g. module('fill') or module('lbm/inputs')."""
    path = next(p for p in (ROOT / f"{name}.py", OWN / f"{name}.py") if p.exists())
    spec = importlib.util.spec_from_file_location("golden_" + name.replace("/", "_"), path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def names(system: str) -> list[str]:
    """Every case of a system, in name order; an empty folder is an error, never an empty test."""
    found = sorted(p.stem for p in (ROOT / system).glob("*.json"))
    if not found:
        raise FileNotFoundError(f"no parity case in {ROOT / system}: set PARITY_DIR to the folder of golden values")
    return found


def load(system: str, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return (the case's JSON, its arrays; empty where it has none)."""
    case = json.loads((ROOT / system / f"{name}.json").read_text())
    path = ROOT / system / f"{name}.npz"
    if not path.exists() and isinstance(case.get("arrays"), str):
        path = path.with_name(case["arrays"])
    if not path.exists():
        return case, {}
    with np.load(path, allow_pickle=False) as stored:
        return case, dict(stored)


def filled(shapes: dict, fill=None) -> dict[str, torch.Tensor]:
    """Weights by name from fill.py (or from `fill`, a function of {name: shape})."""
    fill = fill or module("fill").fill_state_dict
    return {k: torch.from_numpy(np.array(v)) for k, v in fill({k: tuple(s) for k, s in shapes.items()}).items()}


def close(got, want, atol: float = 0.0, rtol: float = 0.0, scale_tol: float = 0.0, what: str = "") -> None:
    """Assert |got - want| <= atol + rtol |want| + scale_tol max|want|, NaN equal to NaN, shapes equal."""
    got = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    want = np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True), f"{what}: non-finite values differ"
    top = np.abs(want[finite]).max(initial=0.0)
    gap = np.abs(got[finite] - want[finite]) - (atol + rtol * np.abs(want[finite]) + scale_tol * top)
    assert not (gap > 0).any() and not np.isnan(gap).any(), (
        f"{what}: {(~(gap <= 0)).sum()} of {want.size} values off, worst by {np.abs(got[finite] - want[finite]).max():.3g} "
        f"(largest expected value {top:.3g})"
    )
