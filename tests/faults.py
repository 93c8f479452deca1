"""Faults put into a running trainer before its first line, by wrapping what it calls in common and in torch.

inject({"signal": {"step": 3, "rank": 1, "phase": "data", "numbers": [15]}, "samples": FILE}): a fault by its name here and its
settings. Those at a place wait for the rank to announce it (dist.at); with "once": FILE they happen only while FILE is not there.
"""

import hashlib
import json
import os
import resource
import signal
import time
from pathlib import Path

import torch

from common import checkpoint, data, dist, guard


def inject(faults: dict) -> None:
    for name, settings in faults.items():
        globals()[f"put_{name}"](**settings) if isinstance(settings, dict) else globals()[f"put_{name}"](settings)


def wrap(owner, name: str, make) -> None:
    """Replace owner.name by make(original)."""
    setattr(owner, name, make(getattr(owner, name)))


def first_time(once: str | None) -> bool:
    """True where no file says that this fault has happened; leaves the file."""
    if once is None:
        return True
    if Path(once).exists():
        return False
    Path(once).touch()
    return True


def at_place(step: int, phase: str, rank: int | None, once: str | None, act) -> None:
    """Call act() when this rank (None: any) first announces a phase that begins with `phase` at or after that step.

    A validation counts its own samples instead of steps: its phases are taken at the last training step announced.
    """
    seen, done = [-1], []

    def make(original):
        def at(now, what):
            own = what.startswith(("validate", "evaluate"))
            seen[0] = seen[0] if own else now
            original(now, what)
            here = rank is None or dist.rank() == rank
            if here and not done and seen[0] >= step and what.startswith(tuple(phase.split("|"))) and first_time(once):
                done.append(1)
                act()

        return at

    wrap(dist, "at", make)


def put_signal(step: int, numbers: list[int], phase: str = "train step", rank: int | None = None, once: str | None = None) -> None:
    """Signals to this rank, one after the other."""
    at_place(step, phase, rank, once, lambda: [os.kill(os.getpid(), number) for number in numbers])


def put_death(step: int, rank: int, once: str | None = None, phase: str = "train step") -> None:
    """kill -9 of one rank."""
    at_place(step, phase, rank, once, lambda: os.kill(os.getpid(), signal.SIGKILL))


def put_hang(step: int, rank: int, phase: str = "train step") -> None:
    """The rank stands still."""
    at_place(step, phase, rank, None, lambda: time.sleep(1000))


def put_pause(step: int, file: str, rank: int = 0) -> None:
    """The rank waits until the file is there."""

    def wait():
        print("PAUSED", flush=True)
        while not Path(file).exists():
            time.sleep(0.02)

    at_place(step, "train step", rank, None, wait)


def put_full_disk(first: int, last: int, limit: int = 65536) -> None:
    """From the announcement of step `first` on, no file of the main rank grows beyond `limit` bytes; from `last` on it may."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    allow = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    at_place(first, "train step", 0, None, lambda: allow(limit))
    at_place(last, "train step", 0, None, lambda: allow(resource.RLIM_INFINITY))


def put_gradient(rank: int, factors: dict[str, float]) -> None:
    """Multiplies the loss that one rank differentiates, at the updates numbered here, counted by calls of StepGuard.check."""
    count = [0]

    def backward_of(original):
        def backward(self, *args, **kwargs):
            factor = float(factors.get(str(count[0]), 1.0)) if dist.rank() == rank else 1.0
            return original(self if factor == 1.0 else self * factor, *args, **kwargs)

        return backward

    def check_of(original):
        def check(self, *args):
            count[0] += 1
            return original(self, *args)

        return check

    wrap(torch.Tensor, "backward", backward_of)
    wrap(guard.StepGuard, "check", check_of)


def put_loss(rank: int, steps: list[int], value: float = float("nan"), until: int = 0) -> None:
    """The loss that one rank reports is `value` at these updates, and at all from `until` on where that is not 0."""
    count = [-1]

    def check_of(original):
        def check(self, loss, norm, where):
            count[0] += 1
            bad = dist.rank() == rank and (count[0] in steps or (until and count[0] >= until))
            return original(self, loss * 0 + value if bad else loss, norm, where)

        return check

    wrap(guard.StepGuard, "check", check_of)


def put_scaler(_) -> None:
    """Loss scaling as with fp16, also where the device has none: the arithmetic stays fp32."""
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, enabled=False: scaler(device, init_scale=1024.0, enabled=True)


def put_drift(step: int, rank: int) -> None:
    """One weight of one rank is changed before a step."""
    models = []

    def init_of(original):
        def init(self, model, *args, **kwargs):
            models.append(model)
            original(self, model, *args, **kwargs)

        return init

    @torch.no_grad()
    def change():
        weight = next(p for p in models[0].parameters() if p.requires_grad)
        weight.view(-1)[0] += 1e-3

    wrap(guard.StepGuard, "__init__", init_of)
    at_place(step, "train step", rank, None, change)


def put_samples(file: str) -> None:
    """Append (position, digest of everything in the sample) to a file, for every training sample read."""

    def getitem_of(original):
        def getitem(self, key):
            sample = original(self, key)
            if dist._place["phase"] != "data":  # a validation's; a worker has the phase in which it was started
                return sample
            digest = hashlib.sha256()
            for name in sorted(sample):
                value = sample[name]
                digest.update(name.encode())
                digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
            with open(file, "a") as log:
                log.write(json.dumps([repr(key), digest.hexdigest()]) + "\n")
            return sample

        return getitem

    wrap(data.Guarded, "__getitem__", getitem_of)


def put_worker_death(call: int, once: str) -> None:
    """A loader worker is killed while it reads its sample number `call`."""
    count = [0]

    def getitem_of(original):
        def getitem(self, key):
            count[0] += 1
            if count[0] == call and torch.utils.data.get_worker_info() is not None and first_time(once):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, key)

        return getitem

    wrap(data.Guarded, "__getitem__", getitem_of)


def put_slow_writes(seconds: float) -> None:
    """Every file of a checkpoint takes this much longer between its bytes and its name."""

    def write_of(original):
        def slow(path):
            time.sleep(seconds)
            return original(path)

        return slow

    wrap(checkpoint, "_entry", write_of)


def put_foreign_device(_: bool) -> None:
    """From the seeding of a step to its backward pass, whatever names no device is made on `meta`, as if the model were elsewhere."""
    foreign = []

    def enter(original):
        def seed_step(*args):
            original(*args)
            foreign.append(torch.device("meta"))
            foreign[-1].__enter__()

        return seed_step

    def leave(original):
        def settle(self):
            while foreign:
                foreign.pop().__exit__(None, None, None)
            original(self)

        return settle

    wrap(dist, "seed_step", enter)
    wrap(guard.StepGuard, "settle", leave)
