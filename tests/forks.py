"""Trainers started within a second: a server that has imported torch once forks them, alone or under torchrun's own agent.

Each is a process of its own with its own ranks and loader workers, run from the script's first line; only the import of torch
and of the other packages is shared. For tests and drills that need hundreds of starts.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
import uuid
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = [
    *("torch", "torchvision", "cv2", "yaml", "scipy.ndimage", "scipy.spatial", "PIL.Image", "tqdm", "safetensors.torch"),
    *("torch.utils.tensorboard", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel"),
    *("torch.distributed.launcher.api", "faults", "torch._dynamo", "torch.testing"),
]


def _rank(words: list[str], faults: dict) -> None:
    """One rank: puts the faults in, then runs the script as `python words` does."""
    if faults:
        from faults import inject

        inject(faults)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()  # as `python` does; the agent tells one rank's error only
        raise
    # a forked rank that has ended well waits until its agent has asked for a result; an agent that ends itself does not ask
    stopped = getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "received", False)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stopped:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.alarm(8)


def _launch(words: list[str], ranks: int, restarts: int, output: str, faults: dict, cwd: str, env: dict) -> None:
    """In the forked process: its own session and output; ranks 0: the script itself; else torchrun's agent with that many."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a process of one's own
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(env, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    os.chdir(cwd)
    sys.path.insert(0, "")
    import torch

    torch.set_num_threads(1)
    _agent(words, ranks, restarts, faults) if ranks else _rank(words, faults)


def _agent(words: list[str], ranks: int, restarts: int, faults: dict) -> None:
    """What `torchrun --nproc_per_node ranks --max-restarts restarts` does, with forked ranks."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 60},
        max_restarts=restarts,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(),
    )
    elastic_launch(config, _rank)(words, faults)


def descendants(pid: int) -> list[int]:
    """The process and all below it, parents first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # gone meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    family = [pid]
    for parent in family:
        family += children.get(parent, [])
    return family


def kill_all(pid: int) -> None:
    """SIGKILL to the process, its ranks and their loader workers, as when the machine is taken away."""
    for member in descendants(pid):
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


class Run:
    """A running trainer: `pid`, `running()`, `output()`, `end()`, `kill()`."""

    def __init__(self, process, output: Path):
        self.process, self.file, self.pid = process, output, process.pid

    def output(self) -> str:
        return self.file.read_text(errors="replace") if self.file.exists() else ""

    def running(self) -> bool:
        return self.process.is_alive()

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until the output holds text."""
        limit = time.monotonic() + timeout
        while text not in self.output():
            assert self.running() and time.monotonic() < limit, f"no {text!r} in:\n{self.output()[-3000:]}"
            time.sleep(0.01)

    def kill(self) -> None:
        kill_all(self.pid)
        self.process.join()

    def end(self, code: int | None = 0, timeout: float = 120) -> str:
        """Wait for the end, check the exit code (None: any but 0) and return the output."""
        self.process.join(timeout)
        ended = not self.running()
        if not ended:
            self.kill()
        got, text = self.process.exitcode, self.output()
        assert ended, f"still running after {timeout} s:\n{text[-4000:]}"
        assert got != 0 if code is None else got == code, f"exit code {got}, expected {code}\n{text[-6000:]}"
        return text


def _context():
    context = multiprocessing.get_context("forkserver")
    sys.path[:0] = [path for path in (str(Path(__file__).parent), str(ROOT)) if path not in sys.path]
    context.set_forkserver_preload(PRELOAD)
    return context


def start(*words, ranks: int = 0, restarts: int = 0, output: Path, cwd: Path = ROOT, faults: dict | None = None, **env: str) -> Run:
    """Start `python words` (ranks 0) or `torchrun --nproc_per_node ranks --max-restarts restarts words`. faults: see faults.py."""
    words = [str(cwd / words[0]), *map(str, words[1:])]
    json.dumps(faults)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("")
    process = _context().Process(target=_launch, args=(words, ranks, restarts, str(output), faults or {}, str(cwd), env))
    process.start()
    return Run(process, output)
