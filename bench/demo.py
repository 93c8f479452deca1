"""The demo behind `make demo`: generate clips, train a small point tracker on two processes, stop and resume it, compare, draw.

python bench/demo.py [--steps 240] [--workspace workspace/demo]
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository root instead of bench/

import torch

from common.io import write_image
from lbm import baselines
from lbm.eval import evaluate, load_model, score, stored_config, table
from lbm.model import LBM
from lbm.tapvid import tapvid

CONFIG = "lbm/configs/tiny.yaml"


def run(*command: str) -> None:
    """Run a Python command of the repository and stop the demo when it fails."""
    print("$ python " + " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def trained_steps(workspace: Path) -> int:
    """The last step in metrics.jsonl, 0 before the first."""
    path = workspace / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def train(data: Path, workspace: Path, steps: int, interrupt_at: int | None) -> None:
    """Train on two processes up to `steps`; with `interrupt_at` send SIGTERM to one of them once that step is logged."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "lbm/train.py", "--config", CONFIG]
    command += ["--movi_f_root", str(data / "movi_f"), "--tapvid_root", "null"]
    command += ["--workspace", str(workspace), "--max_steps", str(steps)]
    print("$ torchrun " + " ".join(command[2:]), flush=True)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while interrupt_at is not None and process.poll() is None and trained_steps(workspace) < interrupt_at:
        time.sleep(0.5)
    if interrupt_at is not None and process.poll() is None:
        print("-- sending SIGTERM to one process, as a cluster does before it takes a machine back --", flush=True)
        os.kill(int((workspace / "lock").read_text().split()[-1]), signal.SIGTERM)  # rank 0: it holds the lock of the workspace
    if process.wait():
        raise SystemExit(f"training failed with exit code {process.returncode}; see {workspace / 'log.txt'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps")
    parser.add_argument("--workspace", type=Path, default=Path("workspace/demo"))
    parser.add_argument("--data", type=Path, default=Path("data/tiny/lbm"))
    args = parser.parse_args()
    os.chdir(ROOT)
    begin = time.time()
    videos = args.data / "tapvid_davis.pkl"
    print("\n== 1. Generate clips with exact tracks (ray-cast, so the truth is known to the last digit)")
    if not videos.exists():
        run("-m", "synth", "lbm", str(args.data))
    print("\n== 2. Train on two processes, interrupted half way")
    shutil.rmtree(args.workspace, ignore_errors=True)
    train(args.data, args.workspace, args.steps, interrupt_at=args.steps // 2)
    print(f"\n== 3. The same command again: it goes on from step {trained_steps(args.workspace)} or later")
    train(args.data, args.workspace, args.steps, interrupt_at=None)

    print("\n== 4. Evaluate on clips that training has not seen")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = args.workspace / "checkpoint" / f"{args.steps:08d}.pt"
    model = load_model(str(checkpoint), device)
    torch.manual_seed(0)
    untrained = LBM(**stored_config(checkpoint)).to(device)
    results = {
        "points never move": score(baselines.still, str(videos), "davis"),
        "Lucas-Kanade (OpenCV)": score(baselines.lucas_kanade, str(videos), "davis"),
        "LBM before training": evaluate(untrained, str(videos), "davis", device, memory_size=8),
        "LBM after training": evaluate(model, str(videos), "davis", device, memory_size=8),
    }
    print("\n== 5. Draw the tracks of one of them")
    clip, out = args.workspace / "clip", args.workspace / "tracks"
    _, sample = next(tapvid(str(videos), "davis"))
    for t, frame in enumerate(sample["video"]):
        write_image(clip / f"{t:03d}.png", frame)
    run(
        "lbm/infer.py",
        "--checkpoint",
        str(checkpoint),
        "--video",
        str(clip),
        "--grid",
        "8",
        "--out",
        str(out),
        "--memory_size",
        "8",
    )

    text = table(results)
    (args.workspace / "result.txt").write_text(text + "\n")
    print(f"\n{text}\n")
    clips = results["points never move"]["videos"]
    print(f"AJ, delta_avg and OA in per cent, higher is better; {clips:.0f} unseen clips, {time.time() - begin:.0f} s in all")
    print(f"picture      {out / 'tracks.png'} (and tracks.mp4)")
    print(f"TensorBoard  .venv/bin/tensorboard --logdir {args.workspace / 'tb'}")
    if results["LBM after training"]["delta_avg"] <= results["points never move"]["delta_avg"]:
        raise SystemExit("training did not beat 'points never move'")


if __name__ == "__main__":
    main()
