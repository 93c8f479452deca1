"""One thread per test process (two run side by side) and the repository root on the path."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]
torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def root() -> Path:
    """The repository root."""
    return ROOT


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` run where there is a GPU and are left out, not counted as skipped, elsewhere."""
    if not torch.cuda.is_available():
        items[:] = [item for item in items if "gpu" not in item.keywords]
