"""Step time, forward time, peak memory, bytes kept for backward and loader speed of one system; printed, and written as JSON.

python bench/bench.py lbm                       # what this machine can measure
python bench/bench.py lbm --config tiny --device cpu --out bench/results/my_machine.json
"""

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU figures are per core
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository root instead of bench/

import torch

SYSTEMS = ("lbm", "stereo", "moge", "pi3", "mvdiff")


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.processor() or platform.machine()}, one thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument(
        "--config", default="default", choices=["default", "tiny"], help="tiny: a few seconds, to see that it works"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="default: bench/results/SYSTEM_DEVICE.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = device_name(args.device)
    print(f"{args.system} on {name}, torch {torch.__version__}", flush=True)
    rows = {}
    for row, figures in importlib.import_module(f"bench.{args.system}").measure(args.device, args.config):
        rows[row] = figures
        print(
            f"{row}: " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), flush=True
        )
    short = "_".join(name.replace("(R)", "").replace(",", "").split())
    out = args.out or ROOT / "bench" / "results" / f"{args.system}_{short}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"device": name, "torch": torch.__version__, "config": args.config, "rows": rows}, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
