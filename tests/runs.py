"""Real processes for tests: the scripts as a user starts them, alone or under torchrun; small generated data, made once."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ENV = {
    key: value
    for key, value in os.environ.items()
    if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
}
ENV |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def command(*args, ranks: int = 0) -> list[str]:
    """The argument list of `python args` (ranks 0) or `torchrun --standalone --nproc_per_node ranks args`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return [sys.executable, *launcher, *map(str, args)]


def start(*args, ranks: int = 0, cwd: Path = ROOT, **env: str) -> subprocess.Popen:
    """Start a process in a session of its own; stdout and stderr come together through .communicate()."""
    return subprocess.Popen(
        command(*args, ranks=ranks),
        cwd=cwd,
        env=ENV | env,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(*args, ranks: int = 0, cwd: Path = ROOT, code: int | None = 0, timeout: float = 300, **env: str) -> str:
    """Run to the end and return its output; asserts the exit code (None: any but 0)."""
    process = start(*args, ranks=ranks, cwd=cwd, **env)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise AssertionError(f"{args[0]} did not end in {timeout} s:\n{process.communicate()[0][-3000:]}") from None
    right = process.returncode != 0 if code is None else process.returncode == code
    assert right, f"{' '.join(map(str, args))}: exit code {process.returncode}, expected {code}\n{output[-4000:]}"
    return output


def run_until_sigterm(workspace: Path, *args) -> str:
    """Start on one process, send SIGTERM after the first logged step, and return the output; asserts a good end after a save."""
    process, path = start(*args), workspace / "metrics.jsonl"
    while not (path.exists() and path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0 and "stop signal: saved at step" in output, output[-4000:]
    return output


def generated(tmp_path_factory, system: str, *options: str) -> Path:
    """The folder that `python -m synth system` wrote with these options; made once for all test processes."""
    base = Path(
        (os.environ.get("PYTEST_XDIST_TESTRUNUID", "") and tmp_path_factory.getbasetemp().parent) or tmp_path_factory.getbasetemp()
    )
    folder = base / "-".join(["synth", system, *options]).replace("/", "_").replace(" ", "_")
    with open(base / f"{system}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            run("-m", "synth", system, folder, *options)
            (folder / "done").touch()
    return folder


def metrics(workspace: Path) -> dict[int, dict]:
    """{step: logged values} of a run, lines of one step merged."""
    rows: dict[int, dict] = {}
    for line in (workspace / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


def checkpoint(workspace: Path, step: int, part: str = "") -> dict:
    """A part of the checkpoint of a step."""
    name = f"{step:08d}{'_' * bool(part)}{part}.pt"
    return torch.load(workspace / "checkpoint" / name, map_location="cpu", weights_only=True)


def difference(a, b, path: str = "") -> list[str]:
    """Places where two nested structures of tensors and plain values are not bit-identical."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) else [path]
    if isinstance(a, dict):
        lost = [f"{path}.{key}" for key in set(a) ^ set(b)]
        return lost + [place for key in a if key in b for place in difference(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [place for i, (x, y) in enumerate(zip(a, b)) for place in difference(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a} != {b}"]


def same_end(a: Path, b: Path, step: int, but: tuple[str, ...] = ()) -> None:
    """Every part of the checkpoints of a step, save the places `but`, and every value logged up to it are bit-identical in two runs."""
    parts = [path.stem[9:] for path in (b / "checkpoint").glob(f"{step:08d}*.pt")]
    assert {"", "optimizer"} <= set(parts)
    for part in parts:
        places = difference(checkpoint(a, step, part), checkpoint(b, step, part))
        assert [place for place in places if not place.startswith(but)] == []
    mine, theirs = metrics(a), metrics(b)
    for number in range(1, step + 1):
        keys = [key for key in theirs[number] if key.startswith(("loss/", "train/", "metric/"))]
        assert len(keys) >= 8 and {key: mine[number][key] for key in keys} == {key: theirs[number][key] for key in keys}


def readme_commands(path: Path) -> list[str]:
    """Every command in the ```bash blocks of a README: continued lines joined, comments and blank lines dropped."""
    commands, inside, pending = [], False, ""
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```bash"
        elif inside and line.split("#")[0].strip():
            pending += " " + line.split(" #")[0].strip()
            if pending.endswith("\\"):
                pending = pending[:-1]
                continue
            commands.append(" ".join(pending.split()))
            pending = ""
    return commands


def run_small(text: str, extra: list, replace: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a README's command in small form: the command itself, paths put in by `replace`, `extra` arguments last.

    `python X` and `torchrun ... X` become real processes; torchrun keeps two ranks where the README has several.
    """
    for old, new in (replace or {}).items():
        text = text.replace(old, str(new))
    words, ranks = text.split(), 0
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        ranks, words = 2 if any(word.startswith("--n") for word in words[1:script]) else 1, ["python", *words[script:]]
    assert words[0] == "python", f"not a Python command: {text}"
    return run(*words[1:], *extra, ranks=ranks, cwd=cwd)
