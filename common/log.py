"""What a run leaves behind: config.yaml, log.txt, metrics.jsonl, TensorBoard, pictures, progress; and the lock on its folder."""

import fcntl
import json
import os
import resource
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from common import config, dist, io

_locks = []  # open for the life of the process


def lock(workspace) -> None:
    """Take the folder for this process, or exit naming the host and pid that hold it.

    A POSIX record lock: the kernel drops it with its process, so a stale file never blocks, and forked workers do not inherit it.
    """
    Path(workspace).mkdir(parents=True, exist_ok=True)
    _locks.append(open(Path(workspace) / "lock", "a+"))  # noqa: SIM115
    try:
        fcntl.lockf(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        _locks[-1].seek(0)
        owner = _locks.pop().read()
        raise SystemExit(f"{workspace} is in use by another run ({owner}): stop it or choose another workspace") from None
    except OSError as error:
        print(f"WARNING: {workspace} is not locked, its file system cannot: {error}", file=sys.stderr)
    _locks[-1].truncate(0)
    print(f"host {socket.gethostname()} pid {os.getpid()}", end="", file=_locks[-1], flush=True)


def _careful(write):
    """A method that runs on the main rank only, and for which a full disk ends the log, not the run."""

    def method(self, *args):
        try:
            if self.main:
                write(self, *args)
        except OSError as error:
            with suppress(OSError):  # stderr may lie on the same disk
                if not self.failed:
                    print(f"ERROR: cannot log in {self.folder}: {error}; training goes on", file=sys.stderr, flush=True)
            self.failed = True

    method.__doc__ = write.__doc__
    return method


class Logger:
    """Writes on the main rank only, but for `warn`. With a config: locks the folder, says what changed since the last run, saves it.

    A resumed run drops what the interrupted one logged from its own first logged step on.
    """

    def __init__(self, workspace, cfg: dict | None = None, main: bool | None = None):
        self.folder, self.main = Path(workspace), dist.is_main() if main is None else main
        self.board, self.failed, path = None, False, Path(workspace) / "config.yaml"
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.main and cfg is not None:
            lock(workspace)
            for line in config.diff(config.read(path), cfg) if path.exists() else []:
                self.text(f"config changed: {line}")
            config.save(cfg, path)

    def _open(self, step: int) -> None:
        """At the first step logged: drop later lines of an interrupted run, half lines too, and open TensorBoard."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        path, kept = self.folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):
                kept += [line + "\n"] if json.loads(line)["step"] < step else []
        path.with_suffix(".tmp").write_text("".join(kept))
        os.replace(path.with_suffix(".tmp"), path)
        self.board = SummaryWriter(self.folder / "tb", purge_step=step)

    @_careful
    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one TensorBoard point per tag."""
        if not self.board:
            self._open(step)
        values = {tag: float(value) for tag, value in values.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step)

    @_careful
    def image(self, step: int, tag: str, rgb) -> None:
        """rgb: (H, W, 3) uint8, to TensorBoard and vis/step_{step:08d}/{tag}.png."""
        if not self.board:
            self._open(step)
        io.write_image(self.folder / "vis" / f"step_{step:08d}" / f"{tag.replace('/', '_')}.png", rgb)
        self.board.add_image(tag, rgb, step, dataformats="HWC")

    @_careful
    def text(self, line: str) -> None:
        """One line to stdout (above a progress bar) and to log.txt."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{time.strftime('%F %T')} {line}\n")

    def warn(self, line: str) -> None:
        """One line from whichever rank has something to tell."""
        Logger(self.folder, main=True).text(f"rank {dist.rank()}: {line}")

    @_careful
    def close(self) -> None:
        if self.board:
            self.board.close()


def due(step: int, every: int | None) -> bool:
    """Whether what happens every so many steps happens after this one; 0 or None: never."""
    return bool(every) and step % every == 0


class Averages:
    """Means of what a run logs: over the steps since the last log line, their entries and the ranks. Sums stay on the device."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}  # (2,) float64 for each name: sum and number of finite entries

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Take tensors of any shape; entries that are not finite (NaN: there is none) are left out."""
        for name, value in values.items():
            known = value.isfinite()
            pair = torch.stack([torch.where(known, value.double(), 0.0).sum(), known.sum()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def state(self) -> list[dict]:
        """The sums of each rank, for a checkpoint. Every rank takes part."""
        return dist.gather({name: pair.tolist() for name, pair in self.sums.items()})

    def load(self, ranks: list[dict], device: torch.device) -> None:
        """Take a state up again; with another number of ranks the first takes it all."""
        mine = ranks[dist.rank()] if len(ranks) == dist.world_size() else {}
        if len(ranks) != dist.world_size() and dist.is_main():
            for name in {name for part in ranks for name in part}:
                mine[name] = [sum(pair) for pair in zip(*(part[name] for part in ranks if name in part))]
        self.sums = {name: torch.tensor(pair, dtype=torch.float64, device=device) for name, pair in mine.items()}

    def take(self) -> dict[str, float]:
        """The means so far, of names with a finite entry on some rank; starts anew. Every rank takes part."""
        names = sorted({name for part in dist.gather(list(self.sums)) for name in part})
        pairs = {name: self.sums[name].tolist() if name in self.sums else (0.0, 0.0) for name in names}
        total = dist.all_sum({f"{name} {i}": pairs[name][i] for name in names for i in (0, 1)})
        self.sums = {}
        return {name: total[f"{name} 0"] / total[f"{name} 1"] for name in names if total[f"{name} 1"]}


class Progress:
    """One bar on a terminal, plain lines through the log elsewhere: loss, lr, samples/s, data share, memory, time left."""

    def __init__(self, total: int, start: int, log: Logger):
        self.total, self.start, self.log, self.data_s, self.last_step = total, start, log, 0.0, start
        self.begin = self.last_time = time.perf_counter()
        self.bar = tqdm(total=total, initial=start, dynamic_ncols=True) if log.main and sys.stderr.isatty() else None

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self.data_s += seconds

    def update(self, step: int, loss: float, lr: float, samples: int) -> dict[str, float]:
        """Show the state at a step of `samples` samples over all ranks; return time/* and mem/* scalars since the last call."""
        now, steps = time.perf_counter(), max(step - self.last_step, 1)
        span, cuda = now - self.last_time, torch.cuda.is_available()
        peak_gb = (torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
        rate, left = samples * steps / span, (now - self.begin) / max(step - self.start, 1) * (self.total - step)
        text = f"loss {loss:.4g}  lr {lr:.3g}  {rate:.3g} samples/s  data {self.data_s / span:.0%}  mem {peak_gb:.2f} GB"
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            self.log.text(f"step {step}/{self.total}  {text}  left {tqdm.format_interval(left)}")
        data_s, self.last_time, self.last_step, self.data_s = self.data_s, now, step, 0.0
        return {"time/step": span / steps, "time/data": data_s / steps, "time/samples_per_s": rate, "mem/peak_gb": peak_gb}

    def close(self) -> None:
        if self.bar:
            self.bar.close()
