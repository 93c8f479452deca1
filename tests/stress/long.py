"""A long run of tiny steps, with saves and log lines all along: do memory and open files stay flat?

  python tests/stress/long.py --system lbm --steps 2000 [--json OUT]

The trainer runs as one process with a loader worker; from outside, resident memory, open files and threads of both are read from
/proc as the run goes. The first quarter is left out (allocators and caches fill). Growth is the difference of the medians of the
last quarter and of the second, over the steps between them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import forks
from systems import SYSTEMS

MEGABYTE = 1 << 20
LONGER = {  # schedules of more than 2,000 steps
    **{"lbm": {"epoch_num": 1000}, "stereo": {"num_iterations": 5000}, "moge": {"num_iterations": 5000}},
    **{"pi3": {"train.num_epoch": 50}, "mvdiff": {"max_train_steps": 5000}},
}


def state_of(pid: int) -> dict[str, float] | None:
    """Memory that is its own (MB), open files and threads of a process; None where it has ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        rss = (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) * 1024 / MEGABYTE
        return {"memory_mb": rss, "files": len(list(Path(f"/proc/{pid}/fd").iterdir())), "threads": int(fields["Threads"])}
    except (OSError, KeyError):
        return None


def steps_done(path: Path) -> int:
    """The last step in metrics.jsonl."""
    lines = path.read_bytes()[-4000:].splitlines()[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if len(lines) > 1 else 0


def long_run(name: str, steps: int, folder: Path, every: int = 10, data: Path | None = None) -> dict:
    """Run and watch; returns the growth and the extremes of the trainer and of its loader worker."""
    system, rows, begin = SYSTEMS[name], [], time.monotonic()
    data = data or system.generate(folder / "data")
    often = {"log_every": every, "save_every": max(50, steps // 40), "keep_last": 2, "max_steps": steps, **LONGER[name]}
    run = forks.start(*system.words(data, folder / "run", system.one, often), ranks=0, output=folder / "output")
    while run.running():
        family = forks.descendants(run.pid)
        states = [state for state in map(state_of, family) if state]
        step = steps_done(folder / "run" / "metrics.jsonl")
        if len(states) >= 2 and step and (not rows or rows[-1]["step"] < step):
            rows.append({"step": step, "trainer": states[0], "worker": states[1]})
        time.sleep(0.2)
    run.end()
    second = [row for row in rows if steps / 4 <= row["step"] < steps / 2]
    last = [row for row in rows if row["step"] >= 3 * steps / 4]
    out = {"system": name, "steps": steps, "samples": len(rows), "seconds": round(time.monotonic() - begin)}
    for who in ("trainer", "worker"):
        middle = lambda part, what: statistics.median(row[who][what] for row in part)  # noqa: B023
        out[who] = {
            "memory_mb": [round(middle(second, "memory_mb"), 1), round(middle(last, "memory_mb"), 1)],
            "growth_kb_per_step": round(1024 * (middle(last, "memory_mb") - middle(second, "memory_mb")) / (steps / 2), 2),
            "files": [min(row[who]["files"] for row in part) for part in (second, last)],
            "threads": [middle(second, "threads"), middle(last, "threads")],
        }
    return out


def is_flat(figures: dict) -> bool:
    """Less than 10 KB a step, no more threads, and no file for every save or log line (tensors on their way to the trainer are a
    few files, now there and now not)."""
    rows = [figures[who] for who in ("trainer", "worker")]
    return all(
        row["growth_kb_per_step"] < 10 and row["files"][1] - row["files"][0] <= 10 and row["threads"][0] == row["threads"][1]
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = long_run(args.system, args.steps, Path(folder))
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(not is_flat(figures))


if __name__ == "__main__":
    main()
