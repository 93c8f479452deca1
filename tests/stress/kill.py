"""Kill a training run again and again, and count how often it came back bit for bit.

  python tests/stress/kill.py --system lbm --kills 50 [--ranks 2] [--json OUT]

A run of two ranks under torchrun's agent is killed by SIGKILL of all its processes at once: at random moments from its first
line on, and every second time while a checkpoint is being written. The same command is then started again, until the run is
over; then a new run begins, until there were enough kills. After every kill the newest checkpoint that loads must equal that of
an uninterrupted run in every bit, the next start must go on from it, and at the end every checkpoint and every logged value must
be that of the uninterrupted run.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import forks
from runs import difference, metrics
from systems import SYSTEMS

from common.checkpoint import Checkpoints

SAVE_EVERY, STEPS = 2, 8
OWN = ("loss/", "train/", "metric/", "val/")  # what must not depend on the interruptions; times and memory may


def logged(workspace: Path) -> dict[int, dict]:
    """{step: values that a run must reproduce}; a last line cut in two by a kill is left out."""
    path = workspace / "metrics.jsonl"
    if not path.exists():
        return {}
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(whole))
    return {step: {k: v for k, v in row.items() if k.startswith(OWN) and "fps" not in k} for step, row in metrics(workspace).items()}


def newest(workspace: Path) -> dict:
    """The state that the next start would go on from; step 0 where there is none."""
    return Checkpoints(workspace / "checkpoint", say=lambda _: None).load("latest") or {"step": 0}


def wait_and_kill(run: forks.Run, checkpoints: Path, rng: random.Random, span: float, in_save: bool) -> bool:
    """Kill the run at its moment. False where it had ended before."""
    end = time.monotonic() + rng.uniform(0.1, span)
    if in_save:  # the n-th file written by this process, and a little later
        seen, count, later = set(), rng.randint(1, 8), rng.uniform(0, 0.3) ** 2
        while run.running() and len(seen) < count:
            seen |= _unfinished(checkpoints)
            time.sleep(0.001)
        end = time.monotonic() + later
    while run.running() and time.monotonic() < end:
        time.sleep(0.002)
    if not run.running():
        return False
    run.kill()
    return True


def _unfinished(folder: Path) -> set[tuple[str, int]]:
    """Name and inode of every file that is being written; it may be gone the next moment."""
    found = set()
    for path in folder.glob("*.tmp"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def drill(name: str, kills: int, ranks: int = 2, seed: int = 0) -> dict:
    """Run the drill; returns the counts. AssertionError where a run does not come to its end."""
    system, rng, begin = SYSTEMS[name], random.Random(seed), time.monotonic()
    counts = {"system": name, "ranks": ranks, "kills": 0, "bit_exact": 0, "killed_in_a_save": 0, "before_the_first_checkpoint": 0,
              "most_steps_lost": 0, "save_every": SAVE_EVERY, "runs_completed": 0, "faults": []}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = system.generate(folder / "data")
        recipe = {**(system.two if ranks > 1 else system.one), "save_every": SAVE_EVERY, "max_steps": STEPS}
        launch = lambda workspace, keep: forks.start(
            *system.words(data, workspace, recipe, {"keep_last": keep}), ranks=ranks if ranks > 1 else 0, output=folder / "output"
        )
        launch(folder / "straight", 99).end(timeout=1200)
        start = time.monotonic()
        launch(folder / "again", 2).end(timeout=1200)
        span, straight = time.monotonic() - start, logged(folder / "straight")
        reference = Checkpoints(folder / "straight" / "checkpoint")
        places = difference(newest(folder / "again"), reference.load(STEPS))
        assert not places and logged(folder / "again") == straight, f"two uninterrupted runs differ: {places[:3]}"
        workspace = folder / "again"
        while counts["kills"] < kills:
            shutil.rmtree(workspace)
            pending, step = False, 0  # a kill whose recovery is not judged yet; where the next start must go on
            while True:
                run = launch(workspace, 2)
                in_save = rng.random() < 0.5
                killed = counts["kills"] < kills and wait_and_kill(run, workspace / "checkpoint", rng, span, in_save)
                text = run.output() if killed else run.end(timeout=1200)
                resumed = re.search(r"resumed at step (\d+)", text)
                wrong = [f"resumed at {resumed[1]}, not {step}"] if resumed and int(resumed[1]) != step else []
                wrong += ["began anew"] if step and not resumed and not killed else []
                half = bool(_unfinished(workspace / "checkpoint"))
                state, seen = newest(workspace), max(logged(workspace), default=0)
                wrong += difference(state, reference.load(state["step"])) if state["step"] else []
                wrong += [f"metrics of step {s}" for s, row in logged(workspace).items() if s <= state["step"] and row != straight[s]]
                counts["bit_exact"] += pending and not wrong
                counts["faults"] += [{"kill": counts["kills"], "wrong": wrong[:5]}] if wrong else []
                if not killed:
                    counts["runs_completed"] += 1
                    assert state["step"] == STEPS and sorted(logged(workspace)) == sorted(straight), text[-3000:]
                    break
                pending, step = True, state["step"]
                counts["kills"] += 1
                counts["killed_in_a_save"] += half
                counts["before_the_first_checkpoint"] += not step
                counts["most_steps_lost"] = max(counts["most_steps_lost"], seen - step)
                print(f"{name}: kill {counts['kills']} {'in a save' if half else ''} at step {seen}, goes on from {step}", flush=True)
    return counts | {"seconds": round(time.monotonic() - begin)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2, help="1: without torchrun")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments, as far as a clock can")
    parser.add_argument("--json", type=Path, help="write the counts there")
    args = parser.parse_args()
    counts = drill(args.system, args.kills, args.ranks, args.seed)
    print(json.dumps(counts, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(counts, indent=1) + "\n")
    sys.exit(counts["bit_exact"] != counts["kills"])


if __name__ == "__main__":
    main()
